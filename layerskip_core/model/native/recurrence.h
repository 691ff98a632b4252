/* Layers with a state of fixed size: short convolutions, and linear recurrences after one.
 *
 * A head of values has a state S (key dimension, value dimension), which each token changes and then reads:
 *
 *     S = decay * S + k d^T       DECAY, Mamba-2 (Dao and Gu, 2024): d = step * v
 *     o = S^T q + skip * v        DELTA, gated delta rule (Yang et al., 2024): d = step * (v - decay * S^T k)
 *
 * Heads of values share heads of keys and queries in groups, which Mamba-2 calls B and C.
 *
 * Like keys and values, each token's input of the convolution and its update of the state (decay, k, d) are kept by position,
 * in a ring of a few slots. So rejected tokens cost nothing: later ones overwrite them. The state includes the tokens before
 * position `base`. A call first applies the updates of tokens that are settled by then; beyond these it works on a copy.
 *
 * Each value dimension is summed by itself, in the order of key dimensions, and each token takes the same operations. So no bit
 * depends on how tokens are divided into calls, or on when they are settled.
 */
#define MOST_TAPS 8     /* of a convolution */
#define LARGEST_KEY 256 /* dimensions */
#define BLOCK_FLOATS (16 * LARGEST_KEY) /* of a state, processed together: with its copy they fit in L1 */
#define MOST_COLUMNS (SUMS >= 8 ? 4 : 2) /* panels of such a block */

enum { CONVOLUTION, DECAY, DELTA }; /* kinds of such layers */

struct Recurrence {
    int32_t kind, taps, channels;   /* of the convolution, whose channels are adjacent */
    int32_t width;                  /* of a row of projections; and offsets in it: */
    int32_t convolved, query, key, value; /* of the channels, and of their queries, keys and values */
    int32_t factor, gate;           /* of factors of the convolution's inputs, -1 for none; of gates of outputs */
    int32_t key_heads, heads, key_dim, value_dim;
    int32_t steps;                  /* of the inputs of steps; 0: Passage.steps has them */
    int32_t norm_size, gates_first; /* outputs that are normed together, 0 for no norm; whether gates come before the norm */
    float eps, least_step, most_step;
    int64_t state, entry;     /* byte offsets of the layer in a text's state, and in a slot of its ring */
    const float *filter;      /* (tap, channel), the newest token's tap last */
    const float *filter_bias; /* by channel, or NULL */
    const float *rate;        /* of the decay, by head: below 0 */
    const float *rate_bias;   /* by head */
    const float *skip;        /* by head, or NULL */
    const float *norm;        /* by output */
};

/* Tokens of some texts, text after text; a text without tokens is only settled. A ring needs slots for the positions from
 * `base` to the first token, for unsettled positions, and for the taps before these. */
typedef struct {
    const int64_t *positions; /* by token; consecutive in a text */
    const int32_t *starts;    /* by text: its first token; then the number of tokens */
    char *const *states;      /* by text, of all layers */
    char *const *rings;       /* by text: (position modulo slots, slot_bytes) */
    const int64_t *slots;     /* by text; at least as many as taps */
    const int64_t *settled;   /* by text: tokens before this position are final */
    int64_t slot_bytes;       /* of all layers */
    int32_t texts;
    float *rows;  /* (token, width): projections; channels are replaced by outputs of the convolution */
    float *steps; /* (token, 2, head): inputs of steps and decays, replaced by these; DECAY has no first half */
    float *out;   /* (token, output) */
} Passage;

/* A slot's entry of a layer is inputs (channel), decays (head), keys (head, dimension), deltas (head, panel of 16 values, 16).
 * A layer's state is `base`, and from HEADER on (head, panel of 16 values, key dimension, 16). */
#define HEADER 64 /* bytes */

INLINE size_t in_vectors(int floats) { return ((size_t)floats + 15) & ~(size_t)15; }
INLINE int panels_of(const Recurrence *l) { return (l->value_dim + 15) / 16; }
INLINE size_t decays_of(const Recurrence *l) { return in_vectors(l->channels); }
INLINE size_t keys_of(const Recurrence *l) { return decays_of(l) + in_vectors(l->heads); }
INLINE size_t deltas_of(const Recurrence *l) { return keys_of(l) + in_vectors(l->key_heads * l->key_dim); }
INLINE size_t values_of(const Recurrence *l) { return (size_t)(l->heads * panels_of(l)) * 16; }

static size_t entry_bytes(const Recurrence *l) { return 4 * (l->kind == CONVOLUTION ? decays_of(l) : deltas_of(l) + values_of(l)); }

static size_t state_bytes(const Recurrence *l) {
    return l->kind == CONVOLUTION ? 0 : HEADER + 4 * values_of(l) * (size_t)l->key_dim;
}

/* A text of a call, in one layer. */
typedef struct {
    int first, count, slots;           /* first, count: of its tokens; slots fit in 32 bits */
    int64_t base, settled, start, end; /* positions; start and end are those of its tokens */
    float *state;
    char *ring;
    size_t slot_bytes;
} Text;

static Text text_of(const Recurrence *l, const Passage *p, int text) {
    char *state = p->states[text] + l->state;
    Text t = {.first = p->starts[text], .slots = (int)p->slots[text], .settled = p->settled[text], .slot_bytes = (size_t)p->slot_bytes};
    t.count = p->starts[text + 1] - t.first;
    t.start = t.count ? p->positions[t.first] : t.settled, t.end = t.start + t.count;
    t.base = l->kind == CONVOLUTION ? t.start : t.count && !t.start ? 0 : *(int64_t *)state;
    if (t.count && t.base > t.start) t.base = t.start; /* a text rolled back further than it may be */
    if (t.settled > t.end) t.settled = t.end;
    if (t.settled < t.base) t.settled = t.base;
    t.state = (float *)(state + HEADER), t.ring = p->rings[text] + l->entry;
    return t;
}

INLINE float *entry_at(const Text *t, int64_t position) {
    return (float *)(t->ring + (size_t)(position % t->slots) * t->slot_bytes);
}

INLINE void store_up_to(float *p, vf x, int n) {
    float some[16];
    if (n >= 16) {
        f_store(p, x);
        return;
    }
    f_store(some, x), memcpy(p, some, 4 * (size_t)n);
}

/* log(1 + e^x) = max(x, 0) + log(1 + u) with u = e^-|x|; log(1 + u) = 2 artanh(s) with s = u / (2 + u) <= 1/3. */
INLINE vf softplus(vf x) {
    vf u = f_exp(f_sub(f_set(0), f_abs(x))), s = f_div(u, f_add(f_set(2), u)), square = f_mul(s, s), sum = f_set(1.0f / 13);
    for (int odd = 11; odd > 0; odd -= 2) sum = f_fma(sum, square, f_set(1.0f / (float)odd));
    return f_add(f_max(x, f_set(0)), f_mul(f_add(s, s), sum));
}

/* ---- the convolution ---- */

/* Channels that a thread convolves together: a head of queries, keys or values. */
typedef struct {
    int column, size;
    float scale; /* L2 norm that the head is scaled to; 0: not scaled */
} Chunk;

INLINE int chunks_of_channels(const Recurrence *l) {
    return l->kind == CONVOLUTION ? (l->channels + 63) / 64 : 2 * l->key_heads + l->heads;
}

static Chunk chunk_of(const Recurrence *l, int index) {
    int head = index - 2 * l->key_heads;
    if (l->kind == CONVOLUTION)
        return (Chunk){l->convolved + 64 * index, l->channels - 64 * index < 64 ? l->channels - 64 * index : 64, 0};
    if (head >= 0) return (Chunk){l->value + head * l->value_dim, l->value_dim, 0};
    int is_key = index >= l->key_heads, column = (is_key ? l->key : l->query) + index % l->key_heads * l->key_dim;
    return (Chunk){column, l->key_dim, l->kind == DELTA ? is_key ? 1 : 1 / sqrtf((float)l->key_dim) : 0};
}

/* Scales a head of keys or queries to the given L2 norm. */
static void lengthen(float *x, int n, float length) {
    vf sum = f_set(0);
    for (int i = 0; i < n; i += 16) {
        vf part = load_up_to(x + i, n - i);
        sum = f_fma(part, part, sum);
    }
    vf factor = f_set(length / sqrtf(f_sum(sum) + 1e-6f));
    for (int i = 0; i < n; i += 16) store_up_to(x + i, f_mul(load_up_to(x + i, n - i), factor), n - i);
}

/* Convolves a token's channels. `at`: inputs at each tap's position, the last of which is the token's. Taps before the text's
 * first token are skipped. */
INLINE void convolve_token(
    const Recurrence *l, const int taps, int skipped, Chunk chunk, const float *row, float *const *at, float *out
) {
    int first = chunk.column - l->convolved;
    for (int c = 0; c < chunk.size; c += 16) {
        int channel = first + c, n = chunk.size - c;
        vf input = load_up_to(row + chunk.column + c, n);
        vf sum = l->filter_bias ? load_up_to(l->filter_bias + channel, n) : f_set(0);
        if (l->factor >= 0) input = f_mul(input, load_up_to(row + l->factor + channel, n));
        for (int tap = skipped; tap < taps - 1; tap++)
            sum = f_fma(load_up_to(l->filter + tap * l->channels + channel, n), load_up_to(at[tap] + channel, n), sum);
        sum = f_fma(load_up_to(l->filter + (taps - 1) * l->channels + channel, n), input, sum);
        store_up_to(at[taps - 1] + channel, input, n);
        sum = f_mul(sum, l->kind == CONVOLUTION ? load_up_to(row + l->gate + channel, n) : logistic(sum));
        store_up_to(out + c, sum, n);
    }
}

static void convolve_chunk(const Recurrence *l, const Passage *p, const Text *t, Chunk chunk) {
    int taps = l->taps, slot = (int)(t->start % t->slots); /* slot: of the token */
    for (int i = 0; i < t->count; i++, slot = slot + 1 < t->slots ? slot + 1 : 0) {
        int64_t position = t->start + i;
        int skipped = position < taps - 1 ? taps - 1 - (int)position : 0;
        size_t token = (size_t)(t->first + i);
        float *row = p->rows + token * (size_t)l->width, *out = row + chunk.column, *at[MOST_TAPS];
        for (int tap = 0; tap < taps; tap++) {
            int place = slot - (taps - 1 - tap);
            at[tap] = (float *)(t->ring + (size_t)(place < 0 ? place + t->slots : place) * t->slot_bytes);
        }
        if (l->kind == CONVOLUTION) out = p->out + token * (size_t)l->channels + (chunk.column - l->convolved);
        if (taps == 3 && !skipped) convolve_token(l, 3, 0, chunk, row, at, out);
        else if (taps == 4 && !skipped) convolve_token(l, 4, 0, chunk, row, at, out);
        else convolve_token(l, taps, skipped, chunk, row, at, out);
        if (chunk.scale > 0) lengthen(out, chunk.size, chunk.scale);
    }
}

/* Steps and decays of a token. */
static void take_steps(const Recurrence *l, float *steps) {
    float *decays = steps + l->heads;
    for (int h = 0; h < l->heads; h += 16) {
        int n = l->heads - h;
        vf rate = load_up_to(l->rate + h, n), soft = softplus(f_add(load_up_to(decays + h, n), load_up_to(l->rate_bias + h, n)));
        vf step = f_min(f_max(soft, f_set(l->least_step)), f_set(l->most_step));
        if (l->kind == DELTA) step = f_mul(f_set(l->most_step), logistic(load_up_to(steps + h, n)));
        vf decay = f_exp(f_mul(rate, l->kind == DELTA ? soft : step));
        decay = f_max(f_set(0), f_sub(decay, f_set(1e-37f))); /* 0 where it would make a state subnormal, which is slow */
        store_up_to(steps + h, step, n), store_up_to(decays + h, decay, n);
    }
}

/* This thread's part of all channels, and of all tokens' steps. */
static void convolve(const Recurrence *l, const Passage *p, int thread, int threads) {
    int chunks = chunks_of_channels(l), tokens = l->kind == CONVOLUTION ? 0 : p->starts[p->texts];
    size_t heads = (size_t)l->heads;
    for (int text = 0; text < p->texts; text++) {
        Text t = text_of(l, p, text);
        for (int c = share(chunks, thread, threads); c < share(chunks, thread + 1, threads); c++)
            convolve_chunk(l, p, &t, chunk_of(l, c));
    }
    for (int token = share(tokens, thread, threads); token < share(tokens, thread + 1, threads); token++) {
        float *steps = p->steps + (size_t)token * 2 * heads;
        if (l->steps) memcpy(steps + heads, p->rows + (size_t)token * (size_t)l->width + l->steps, 4 * heads);
        take_steps(l, steps);
    }
}

/* ---- the recurrence ---- */

/* A token's update of a head's state, for some panels of values. */
typedef struct {
    float decay;
    const float *key, *delta; /* (key dimension), (vector, 16) */
} Change;

/* C panels of a state: applies an update, if there is one, and multiplies by a query and a key, if there are any. The update is
 * the previous token's, so that the state is read and written once per token. Prefetches `ahead`: hardware prefetching does not
 * cover a state. */
INLINE void pass_state(
    const int C, const int changes, const int reads, const float *from, float *to, int key_dim, const Change *change,
    const float *query, const float *key, const float *ahead, vf *of_query, vf *of_key
) {
    size_t panel = 16 * (size_t)key_dim;
    vf decay = f_set(changes ? change->decay : 0), delta[4], by_query[4], by_key[4]; /* in registers */
    for (int c = 0; c < C; c++) {
        delta[c] = changes ? f_load(change->delta + 16 * c) : f_set(0);
        by_query[c] = by_key[c] = f_set(0);
    }
    for (int i = 0; i < key_dim; i++, from += 16, to += 16, ahead += 16) {
        vf changed = f_set(changes ? change->key[i] : 0), q = f_set(reads ? query[i] : 0), k = f_set(reads > 1 ? key[i] : 0);
        for (int c = 0; c < C; c++) {
            vf state = f_load(from + (size_t)c * panel);
            fetch_line_later(ahead + (size_t)c * panel);
            if (changes) state = f_fma(changed, delta[c], f_mul(decay, state)), f_store(to + (size_t)c * panel, state);
            if (reads) by_query[c] = f_add_product(by_query[c], q, state);
            if (reads > 1) by_key[c] = f_add_product(by_key[c], k, state);
        }
    }
    for (int c = 0; c < C && reads; c++) of_query[c] = by_query[c], of_key[c] = by_key[c];
}

/* `reads`: 0 for none, 1 for the query, 2 for the key too. */
static void pass_panels(
    int C, int reads, const float *from, float *to, int key_dim, const Change *change, const float *query, const float *key,
    const float *ahead, vf *of_query, vf *of_key
) {
#define PASS(C, CHANGES, READS) \
    case 8 * (C) + 4 * (CHANGES) + (READS): \
        pass_state(C, CHANGES, READS, from, to, key_dim, change, query, key, ahead, of_query, of_key); \
        break;
#define EACH_PASS(C) PASS(C, 0, 1) PASS(C, 0, 2) PASS(C, 1, 0) PASS(C, 1, 1) PASS(C, 1, 2)
    switch (8 * C + 4 * (change != NULL) + reads) {
        EACH_PASS(1)
        EACH_PASS(2)
#if SUMS >= 8
        EACH_PASS(4)
#endif
    }
#undef EACH_PASS
#undef PASS
}

/* Runs a text's tokens in C panels of a head's state, from `panel` on. `copy`: buffer for the state after unsettled tokens. */
static void advance(const Recurrence *l, const Passage *p, const Text *t, int head, int panel, int C, float *copy) {
    int size = l->key_dim, own = head / (l->heads / l->key_heads) * size; /* own: the first of its keys */
    size_t place = (size_t)(head * panels_of(l) + panel) * 16, decays = decays_of(l) + (size_t)head;
    size_t keys = keys_of(l) + (size_t)own, kept_deltas = deltas_of(l) + place;
    float *state = t->state + place * (size_t)size, deltas[64];
    const float *before = state, *ahead = state + 16 * (size_t)(C * size);
    vf of_query[4], of_key[4];
    if (t->count && !t->start) memset(state, 0, 64 * (size_t)(C * size)); /* a text begins */
    Change last, *change = NULL; /* the previous token's; NULL: already applied */
    for (int64_t position = t->base; position < t->end; position++) {
        float *after = position <= t->settled ? state : copy, *kept = entry_at(t, position);
        if (position < t->start) {
            if (change) pass_panels(C, 0, before, after, size, change, NULL, NULL, ahead, NULL, NULL), before = after;
            last = (Change){kept[decays], kept + keys, kept + kept_deltas}, change = &last;
            continue;
        }
        size_t token = (size_t)(t->first + (int)(position - t->start));
        const float *row = p->rows + token * (size_t)l->width, *query = row + l->query + own, *key = row + l->key + own;
        const float *steps = p->steps + token * 2 * (size_t)l->heads + head;
        float step = steps[0], decay = steps[l->heads], product = dot(query, key, size);
        pass_panels(C, l->kind == DELTA ? 2 : 1, before, after, size, change, query, key, ahead, of_query, of_key);
        if (change) before = after;
        for (int c = 0; c < C; c++) {
            int first = 16 * (panel + c), n = l->value_dim - first, index = head * l->value_dim + first;
            vf value = load_up_to(row + l->value + index, n), delta = value;
            if (l->kind == DELTA) delta = f_sub(value, f_mul(f_set(decay), of_key[c]));
            delta = f_mul(f_set(step), delta);
            vf out = f_fma(f_set(product), delta, f_mul(f_set(decay), of_query[c]));
            if (l->skip) out = f_fma(f_set(l->skip[head]), value, out);
            f_store(deltas + 16 * c, delta);
            store_up_to(p->out + token * (size_t)(l->heads * l->value_dim) + index, out, n);
        }
        if (position >= t->settled) memcpy(kept + kept_deltas, deltas, 64 * (size_t)C);
        last = (Change){decay, key, deltas}, change = &last;
    }
    if (change && t->end <= t->settled) pass_panels(C, 0, before, state, size, change, NULL, NULL, ahead, NULL, NULL);
}

/* This thread's part of all states: the same heads of every text, so that texts of different lengths keep threads balanced. */
static void recur(const Recurrence *l, const Passage *p, int thread, int threads) {
    float copy[BLOCK_FLOATS] __attribute__((aligned(64)));
    int most = BLOCK_FLOATS / (16 * l->key_dim) < MOST_COLUMNS ? BLOCK_FLOATS / (16 * l->key_dim) : MOST_COLUMNS;
    int panels = panels_of(l), all = l->heads * panels, stop = share(all, thread + 1, threads);
    for (int at = share(all, thread, threads), C; at < stop; at += C) {
        int left = panels - at % panels < stop - at ? panels - at % panels : stop - at;
        for (C = most >= 4 ? 4 : most >= 2 ? 2 : 1; C > left; C /= 2) {}
        for (int text = 0; text < p->texts; text++) {
            Text t = text_of(l, p, text);
            advance(l, p, &t, at / panels, at % panels, C, copy);
        }
    }
}

/* Keeps this thread's part of the decays and keys of unsettled tokens. Runs after `recur`, which reads earlier updates, perhaps
 * in the same slots. */
static void keep_changes(const Recurrence *l, const Passage *p, int thread, int threads) {
    size_t heads = (size_t)l->heads, keys = (size_t)(l->key_heads * l->key_dim);
    for (int text = 0; text < p->texts; text++) {
        Text t = text_of(l, p, text);
        for (int64_t position = t.settled > t.start ? t.settled : t.start; position < t.end; position++) {
            size_t token = (size_t)(t.first + (int)(position - t.start));
            if ((int)(token % (size_t)threads) != thread) continue;
            float *kept = entry_at(&t, position);
            memcpy(kept + decays_of(l), p->steps + (2 * token + 1) * heads, 4 * heads);
            memcpy(kept + keys_of(l), p->rows + token * (size_t)l->width + l->key, 4 * keys);
        }
    }
}

/* This thread's part of the outputs: their norm and their gates. */
static void gate_outputs(const Recurrence *l, const Passage *p, int thread, int threads) {
    int width = l->heads * l->value_dim, size = l->norm_size ? l->norm_size : l->value_dim, groups = width / size;
    int64_t tasks = (int64_t)p->starts[p->texts] * groups, end = share_of_many(tasks, thread + 1, threads);
    for (int64_t task = share_of_many(tasks, thread, threads); task < end; task++) {
        size_t token = (size_t)(task / groups), first = (size_t)(task % groups) * (size_t)size;
        float *out = p->out + token * (size_t)width + first;
        const float *gate = p->rows + token * (size_t)l->width + (size_t)l->gate + first;
        for (int turn = 0; turn < 2; turn++) {
            if (turn == !l->gates_first) {
                for (int i = 0; i < size; i += 16) {
                    vf x = load_up_to(gate + i, size - i);
                    store_up_to(out + i, f_mul(load_up_to(out + i, size - i), f_mul(x, logistic(x))), size - i);
                }
            } else if (l->norm_size) {
                Norm norm = {l->norm + first, NULL};
                normed(out, &norm, size, l->eps, out);
            }
        }
    }
}

/* A layer between its projections, with a barrier after the outputs. */
static void remember(const Recurrence *l, const Passage *p, Team *team, int thread, int threads) {
    convolve(l, p, thread, threads);
    barrier(team, threads);
    if (l->kind == CONVOLUTION) return;
    recur(l, p, thread, threads);
    barrier(team, threads);
    keep_changes(l, p, thread, threads);
    gate_outputs(l, p, thread, threads);
    barrier(team, threads);
    for (int text = 0; text < p->texts && thread == 0; text++)
        *(int64_t *)(p->states[text] + l->state) = text_of(l, p, text).settled;
}
