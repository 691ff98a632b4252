/* Layers with a memory, of random sizes and weights: what they shall compute, and that no division of a text changes it. */

enum { MOST_TOKENS = 40, SLOTS = 8 };

typedef struct {
    char *states[2], *rings[2];
} TwoTexts;

static TwoTexts two_texts(const Recurrence *l) {
    size_t state = state_bytes(l), ring = (SLOTS + 3) * entry_bytes(l);
    return (TwoTexts){{room(state), room(state)}, {room(ring), room(ring)}};
}

static Recurrence recurrence_of(int kind) {
    Recurrence l = {.kind = kind, .taps = 2 + below(3), .factor = -1, .eps = 1e-5f, .most_step = 1};
    if (kind == CONVOLUTION) {
        l.channels = 1 + below(150), l.width = 3 * l.channels, l.factor = 0, l.gate = l.channels, l.convolved = 2 * l.channels;
    } else {
        l.key_heads = 1 + below(2), l.heads = l.key_heads * (1 + below(3)), l.key_dim = 1 + below(140), l.value_dim = 1 + below(140);
        int keys = l.key_heads * l.key_dim, values = l.heads * l.value_dim;
        l.channels = 2 * keys + values, l.width = l.channels + values, l.gate = kind == DECAY ? 0 : l.channels;
        l.convolved = kind == DECAY ? values : 0, l.query = l.convolved, l.key = l.query + keys, l.value = l.key + keys;
        l.norm_size = kind == DELTA ? l.value_dim : below(2) ? values / l.key_heads : 0, l.gates_first = kind == DECAY;
        if (kind == DECAY) l.least_step = 0.2f, l.most_step = 1.5f, l.skip = numbers_of((size_t)l.heads, 1, 0);
        float *rate = numbers_of((size_t)l.heads, 1, 0);
        for (int h = 0; h < l.heads; h++) rate[h] = -expf(rate[h]);
        l.rate = rate, l.rate_bias = numbers_of((size_t)l.heads, 1, 0), l.norm = numbers_of((size_t)values, 0.2, 1);
    }
    l.filter = numbers_of((size_t)(l.taps * l.channels), 0.5, 0);
    l.filter_bias = below(2) ? numbers_of((size_t)l.channels, 0.5, 0) : NULL;
    return l;
}

static int outputs_of(const Recurrence *l) { return l->kind == CONVOLUTION ? l->channels : l->heads * l->value_dim; }

static double plain_silu(double x) { return x / (1 + exp(-x)); }

/* A channel of a token after the convolution. */
static double plain_convolved(const Recurrence *l, const float *rows, int token, int channel) {
    double sum = l->filter_bias ? l->filter_bias[channel] : 0;
    for (int tap = 0, at; tap < l->taps; tap++) {
        if ((at = token - l->taps + 1 + tap) < 0) continue;
        const float *row = rows + at * l->width;
        double input = (double)row[l->convolved + channel] * (l->factor < 0 ? 1 : row[l->factor + channel]);
        sum += input * l->filter[tap * l->channels + channel];
    }
    return l->kind == CONVOLUTION ? sum * rows[token * l->width + l->gate + channel] : plain_silu(sum);
}

/* A head of keys or queries after the convolution. */
static void plain_head(const Recurrence *l, const float *rows, int token, int column, double length, double *out) {
    double square = 1e-6;
    for (int i = 0; i < l->key_dim; i++) {
        out[i] = plain_convolved(l, rows, token, column - l->convolved + i);
        square += out[i] * out[i];
    }
    for (int i = 0; i < l->key_dim && l->kind == DELTA; i++) out[i] *= length / sqrt(square);
}

static void plain_recurrence(const Recurrence *l, int tokens, const float *rows, const float *steps, double *out) {
    int size = l->key_dim, width = l->value_dim, outputs = outputs_of(l);
    for (int i = 0; i < tokens * outputs && l->kind == CONVOLUTION; i++)
        out[i] = plain_convolved(l, rows, i / outputs, i % outputs);
    if (l->kind == CONVOLUTION) return;
    double *state = malloc(sizeof *state * (size_t)(size * width)), key[size], query[size];
    for (int h = 0; h < l->heads; h++) {
        int own = h / (l->heads / l->key_heads) * size;
        for (int i = 0; i < size * width; i++) state[i] = 0;
        for (int t = 0; t < tokens; t++) {
            const float *in = steps + 2 * t * l->heads + h;
            double soft = log1p(exp(in[l->heads] + (double)l->rate_bias[h])), step = fmin(fmax(soft, l->least_step), l->most_step);
            double decay = exp(l->rate[h] * (l->kind == DELTA ? soft : step));
            if (l->kind == DELTA) step = l->most_step / (1 + exp(-in[0]));
            plain_head(l, rows, t, l->key + own, 1, key), plain_head(l, rows, t, l->query + own, 1 / sqrt(size), query);
            for (int v = 0; v < width; v++) {
                double value = plain_convolved(l, rows, t, l->value + h * width + v - l->convolved), known = 0, read = 0;
                for (int k = 0; k < size; k++) known += decay * state[k * width + v] * key[k];
                double delta = step * (l->kind == DELTA ? value - known : value);
                for (int k = 0; k < size; k++) {
                    state[k * width + v] = decay * state[k * width + v] + key[k] * delta;
                    read += state[k * width + v] * query[k];
                }
                out[t * outputs + h * width + v] = read + (l->skip ? l->skip[h] * value : 0);
            }
        }
    }
    free(state);
    for (int t = 0; t < tokens; t++) {
        double *x = out + t * outputs;
        const float *gate = rows + t * l->width + l->gate;
        for (int i = 0; i < outputs && l->gates_first; i++) x[i] *= plain_silu(gate[i]);
        for (int i = 0; i < outputs && l->norm_size; i += l->norm_size)
            plain_norm(&(Norm){l->norm + i, NULL}, x + i, l->norm_size, l->eps, x + i);
        for (int i = 0; i < outputs && !l->gates_first; i++) x[i] *= plain_silu(gate[i]);
    }
}

/* Tokens first..first+count-1 of each of two texts of MOST_TOKENS, of which the second is the first one's continuation. */
static void remember_part(
    const Recurrence *l, const float *rows, const float *steps, int first, int count, int settled, const TwoTexts *texts, float *out,
    int threads
) {
    size_t before = used, width = (size_t)l->width, both = 2 * (size_t)l->heads, outputs = (size_t)outputs_of(l);
    int64_t *positions = room(16 * (size_t)(count + 1)), stops[] = {settled, settled};
    int32_t starts[] = {0, count, 2 * count};
    int64_t slots[] = {SLOTS, SLOTS + 3};
    float *own = room(8 * (size_t)count * width), *own_steps = room(8 * (size_t)count * both), *own_out = room(8 * (size_t)count * outputs);
    for (int i = 0; i < 2 * count; i++) {
        size_t token = (size_t)(i / count * MOST_TOKENS + first + i % count);
        positions[i] = first + i % count;
        memcpy(own + (size_t)i * width, rows + token * width, 4 * width);
        memcpy(own_steps + (size_t)i * both, steps + token * both, 4 * both);
    }
    Passage p = {positions, starts, texts->states, texts->rings, slots, stops, (int64_t)entry_bytes(l), 2, own, own_steps, own_out};
    layerskip_remember(l, &p, threads);
    for (int text = 0; text < 2; text++)
        memcpy(out + (size_t)(text * MOST_TOKENS + first) * outputs, own_out + (size_t)(text * count) * outputs, 4 * (size_t)count * outputs);
    used = before;
}

static void check_recurrence(int kind) {
    Recurrence l = recurrence_of(kind);
    size_t numbers = 2 * MOST_TOKENS * (size_t)l.width, outputs = (size_t)outputs_of(&l), bytes = 8 * MOST_TOKENS * outputs;
    float *rows = numbers_of(numbers, 1, 0), *steps = numbers_of(4 * MOST_TOKENS * (size_t)l.heads, 1, 0);
    float *wrong = room(4 * numbers), *whole = room(bytes), *pieces = room(bytes);
    double *right = room(bytes), error = 0, size = 0;
    TwoTexts texts = two_texts(&l), again = two_texts(&l);
    for (size_t i = 0; i < numbers; i++) wrong[i] = NAN;
    remember_part(&l, rows, steps, 0, MOST_TOKENS, MOST_TOKENS, &texts, whole, 1);
    plain_recurrence(&l, MOST_TOKENS, rows, steps, right);
    for (size_t i = 0; i < MOST_TOKENS * outputs; i++) error += pow(whole[i] - right[i], 2), size += pow(right[i], 2);
    error = sqrt(error / size);
    expect(error < 3e-6, "recurrence of kind %d, %dx%d: error %g", kind, l.key_dim, l.value_dim, error);
    for (int at = 0, settled = 0, count; at < MOST_TOKENS; at += count) { /* the state always has what is settled */
        int most = SLOTS - (at - settled), left = MOST_TOKENS - at; /* of tokens that there are slots for, and inputs before them */
        most = most < SLOTS + 1 - l.taps ? most : SLOTS + 1 - l.taps, most = most < left ? most : left;
        if (below(2)) remember_part(&l, wrong, steps, at, 1 + below(most), settled, &again, pieces, 1 + below(THREADS));
        if (below(2)) remember_part(&l, rows, steps, 0, 0, settled += below(at - settled + 1), &again, pieces, 1 + below(THREADS));
        count = 1 + below(most < 3 ? most : 3);
        int least = at + count - 5 > settled ? at + count - 5 : settled;
        settled = least + below(at + count - least + 1);
        remember_part(&l, rows, steps, at, count, settled, &again, pieces, 1 + below(THREADS));
    }
    remember_part(&l, rows, steps, 0, 0, MOST_TOKENS, &again, pieces, THREADS);
    expect(!memcmp(whole, pieces, bytes), "recurrence of kind %d: pieces differ", kind);
    for (int text = 0; text < 2; text++)
        expect(!memcmp(texts.states[text], again.states[text], state_bytes(&l)), "recurrence of kind %d: states differ", kind);
}
