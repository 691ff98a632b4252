/* A mixture of experts in the place of a layer's MLP: each row is multiplied by the few experts that its router scores highest.
 *
 * The panels of all experts are in one matrix, expert after expert; its `outputs` and `panels` are those of one. A call
 * multiplies each chosen expert's panels once, by all rows that chose it; threads divide the panels of all chosen experts.
 * Experts are summed in router order, so results do not depend on the batch.
 */
#define MOST_EXPERTS 1024

/* Sum of n products. */
static float dot(const float *x, const float *y, int n) {
    vf sum[4] = {f_set(0), f_set(0), f_set(0), f_set(0)};
    float rest = 0;
    int i = 0;
    for (; i + 64 <= n; i += 64)
        for (int k = 0; k < 4; k++) sum[k] = f_fma(f_load(x + i + 16 * k), f_load(y + i + 16 * k), sum[k]);
    for (; i + 16 <= n; i += 16) sum[0] = f_fma(f_load(x + i), f_load(y + i), sum[0]);
    for (; i < n; i++) rest += x[i] * y[i];
    return f_sum(f_add(f_add(sum[0], sum[1]), f_add(sum[2], sum[3]))) + rest;
}

/* Outputs of a router; the last may be the gate of shared experts. */
INLINE int logits_of_router(const Shape *s) { return s->experts + s->gates_shared; }

/* A row's experts with the largest logits, weighted by the softmax over all experts or over the chosen ones; then the shared
 * experts, with equal weights. */
static void choose_experts(const Shape *s, const Routing *routing, int row) {
    const float *logits = routing->logits + (size_t)row * (size_t)logits_of_router(s);
    int routed = s->chosen - s->shared;
    int32_t *chosen = routing->chosen + (size_t)row * (size_t)s->chosen;
    float *weights = routing->weights + (size_t)row * (size_t)s->chosen, all = 0, sum = 0, most = 0;
    float exps[MOST_EXPERTS]; /* local, so that threads that repeat a choice write only its results */
    uint8_t taken[MOST_EXPERTS] = {0};
    for (int c = 0; c < routed; c++) {
        int best = -1;
        for (int e = 0; e < s->experts; e++)
            if (!taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
        taken[best] = 1, chosen[c] = best;
        if (c == 0) most = logits[best];
        sum += exps[c] = expf(logits[best] - most);
    }
    for (int e = 0; e < s->experts && !s->normalised; e++) all += expf(logits[e] - most);
    for (int c = 0; c < routed; c++) weights[c] = exps[c] / (s->normalised ? sum : all);
    for (int c = routed; c < s->chosen; c++) {
        chosen[c] = s->experts + c - routed;
        weights[c] = s->gates_shared ? 1 / (1 + expf(-logits[s->experts])) : 1;
    }
}

/* Assigns slots to all choices. */
static void group_rows(const Shape *s, const Routing *routing, int rows) {
    int32_t next[MOST_EXPERTS] = {0}; /* by expert, how often it was chosen; then its next slot */
    int choices = rows * s->chosen, used = 0, slot = 0;
    for (int c = 0; c < choices; c++) next[routing->chosen[c]]++;
    for (int e = 0; e < s->experts + s->shared; e++) {
        int count = next[e];
        next[e] = slot;
        if (count) routing->experts[used] = e, routing->starts[used++] = slot, slot += count;
    }
    routing->starts[used] = slot, *routing->used = used;
    for (int c = 0; c < choices; c++) {
        int own = next[routing->chosen[c]]++;
        routing->slots[c] = own, routing->rows[own] = c / s->chosen;
    }
}

/* With few rows, threads divide the experts for the logits, and then each repeats the whole choice, which is cheaper than a
 * barrier. With many, threads divide the rows. */
static void route(Work *work, const Layer *l, int thread, int threads) {
    const Shape *s = work->shape;
    const Call *call = work->call;
    const Routing *routing = &call->routing;
    int rows = call->rows, n = s->hidden, outputs = logits_of_router(s), is_few = rows <= FEW_ROWS;
    int first = is_few ? 0 : share(rows, thread, threads), last = is_few ? rows : share(rows, thread + 1, threads);
    int from = is_few ? share(outputs, thread, threads) : 0, to = is_few ? share(outputs, thread + 1, threads) : outputs;
    float *own = own_room(work, thread).row;
    for (int r = first; r < last; r++) {
        const float *x = call->hidden + (size_t)r * (size_t)n;
        if (l->before_mlp.weight) normed(x, &l->before_mlp, n, s->eps, own), x = own;
        float *logits = routing->logits + (size_t)r * (size_t)outputs;
        for (int e = from; e < to; e++)
            logits[e] = dot(x, l->router + (size_t)e * (size_t)n, n) + (l->router_bias ? l->router_bias[e] : 0);
    }
    if (is_few) barrier(&work->team, threads);
    for (int r = first; r < last; r++) choose_experts(s, routing, r);
    if (!is_few) barrier(&work->team, threads);
    if (is_few || thread == 0) group_rows(s, routing, rows);
    if (!is_few) barrier(&work->team, threads);
}

/* hidden += residual_scale * the weighted sum of the outputs of a row's experts. */
static void mix_experts(Work *work, const Layer *l, int thread, int threads) {
    const Shape *s = work->shape;
    const Call *call = work->call;
    const Routing *routing = &call->routing;
    int inner = l->down.inputs, n = s->hidden, slots = call->rows * s->chosen;
    route(work, l, thread, threads);
    Multiplication up = {&l->up, call->hidden, &l->before_mlp, slots, call->inside, inner, ACTIVATE, routing, routing->rows, l->bends};
    multiply(work, up, 0, thread, threads);
    barrier(&work->team, threads);
    Multiplication down = {&l->down, call->inside, NULL, slots, routing->products, n, PUT, routing, NULL};
    multiply(work, down, 0, thread, threads);
    barrier(&work->team, threads);
    int from = share(n, thread, threads), to = share(n, thread + 1, threads); /* dimensions, to divide even few rows */
    for (int r = 0; r < call->rows; r++) {
        float *hidden = call->hidden + (size_t)r * (size_t)n;
        for (int c = 0; c < s->chosen; c++) {
            size_t choice = (size_t)r * (size_t)s->chosen + (size_t)c;
            const float *product = routing->products + (size_t)routing->slots[choice] * (size_t)n;
            float weight = s->residual_scale * routing->weights[choice];
            for (int i = from; i < to; i++) hidden[i] += weight * product[i];
        }
    }
    barrier(&work->team, threads);
}
