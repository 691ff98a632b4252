/* What the kernels shall compute, in plain C and double precision. Numbers are rounded to fewer bits where the kernels do it,
 * because that is part of what a precision means.
 */

typedef struct {
    int kind, inputs, outputs;
    float *weight; /* (outputs, inputs): what the stored levels stand for */
    float *bias;   /* (outputs), or NULL */
} Plain;

static float in_bf16(float x) { return of_bf16(bf16_of(x)); }

/* n inputs as a matrix of this kind reads them. */
static void plain_form(int kind, const double *x, int n, double *out) {
    for (int i = 0; i < n; i++) out[i] = kind == BF16 ? in_bf16((float)x[i]) : (float)x[i];
    if (kind != INT8 && kind != INT4 && kind != STORED) return;
    float largest = kind == STORED ? 16256 : 127;
    for (double *group = out; group < out + n; group += GROUP) {
        float most = 0;
        for (int i = 0; i < GROUP; i++) most = fmaxf(most, fabsf((float)group[i]));
        float inverse = most > 0 ? largest / most : 0, scale = most / largest;
        for (int i = 0; i < GROUP; i++) group[i] = (double)rintf((float)group[i] * inverse) * scale;
    }
}

/* ---- blocks of GGUF files ---- */

static const struct {
    const char *name;
    int inputs, bytes, bits, offset; /* of a block; of a level, 0 where there are minima */
    int scales, least; /* where its fp16 scales are, of which there are one or two, and the bits of a small one */
} TYPES[] = { /* from Q4_0 on */
    {"Q4_0", 32, 18, 4, 8, 0, 0x2000}, {"Q4_1", 32, 20, 4, 0, 0, 0x2000}, {"Q5_0", 32, 22, 5, 16, 0, 0x1c00},
    {"Q5_1", 32, 24, 5, 0, 0, 0x1c00}, {"Q8_0", 32, 34, 8, 128, 0, 0x1000}, {"MXFP4", 32, 17, 4, 12, 0, 0}, {"Q4_Z", 32, 19, 4, -1, 0, 0x2000}, {"Q4_K", 256, 144, 4, 0, 0, 0x0c00},
    {"Q5_K", 256, 176, 5, 0, 0, 0x0800}, {"Q6_K", 256, 210, 6, 32, 208, 0x0010},
};
enum { TYPE_COUNT = sizeof TYPES / sizeof *TYPES, NARROW_TYPES = 7 };

static double half(const uint8_t *b) {
    int bits = b[0] | b[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return bits >> 15 ? -size : size;
}

/* The weight of input i of a block. */
static float plain_block(int type, const uint8_t *b, int i) {
    int group = i / 32, low = i % 32 < 16 ? 0 : 4, step, least;
    double d = half(b + TYPES[type - Q4_0].scales), m = TYPES[type - Q4_0].offset ? 0 : half(b + 2);
    const uint8_t *s = b + 4;
    static const float mxfp4[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    switch (type) {
    case MXFP4:
        low = b[1 + i % 16] >> low & 15;
        return ldexpf(low > 7 ? -mxfp4[low - 8] : mxfp4[low], b[0] - 127);
    case Q4_0: return (float)(d * ((b[2 + i % 16] >> low & 15) - 8));
    case Q4_Z: return (float)(d * ((b[3 + i % 16] >> low & 15) - (int8_t)b[2]));
    case Q4_1: return (float)(d * (b[4 + i % 16] >> low & 15) + m);
    case Q5_0: return (float)(d * ((b[6 + i % 16] >> low & 15) + (b[2 + i / 8] >> i % 8 & 1) * 16 - 16));
    case Q5_1: return (float)(d * ((b[8 + i % 16] >> low & 15) + (b[4 + i / 8] >> i % 8 & 1) * 16) + m);
    case Q8_0: return (float)(d * (int8_t)b[2 + i]);
    case Q6_K:
        low = b[i / 128 * 64 + i % 64] >> i / 64 % 2 * 4 & 15;
        return (float)(d * (int8_t)b[192 + i / 16] * (low + (b[128 + i / 128 * 32 + i % 32] >> i / 32 % 4 * 2 & 3) * 16 - 32));
    default: /* Q4_K, Q5_K */
        step = group < 4 ? s[group] % 64 : s[group + 4] % 16 + s[group - 4] / 64 * 16;
        least = group < 4 ? s[group + 4] % 64 : s[group + 4] / 16 + s[group] / 64 * 16;
        low = b[(type == Q4_K ? 16 : 48) + i / 64 * 32 + i % 32] >> group % 2 * 4 & 15;
        return (float)(d * step * (low + (type == Q5_K ? b[16 + i % 32] >> group & 1 : 0) * 16) - m * least);
    }
}

/* Rounds p->weight to what its kind can hold, and puts it into panels first, first + step, ... of a matrix's weight and scale,
 * as MatrixForm in matrix.py describes them. */
static void plain_pack(const Plain *p, uint8_t *packed, void *scale, int first, int step) {
    int n = p->inputs;
    for (int o = 0; o < p->outputs; o++) {
        float *row = p->weight + (size_t)o * (size_t)n, most = 1e-12f;
        size_t panel = (size_t)(first + o / PANEL * step), lane = (size_t)(o % PANEL), base = panel * PANEL * (size_t)n;
        for (int i = 0; i < n; i++) most = fmaxf(most, fabsf(row[i]));
        if (p->kind == INT8) ((float *)scale)[panel * PANEL + lane] = most / 127;
        for (int i = 0; i < n; i++) {
            size_t at = (size_t)i;
            if (p->kind == FP32) memcpy(packed + 4 * (base + at * PANEL + lane), row + i, 4);
            if (p->kind == BF16 || p->kind == WIDENED) {
                uint16_t bits = bf16_of(row[i]);
                row[i] = of_bf16(bits);
                memcpy(packed + 2 * (base + at / 2 * 2 * PANEL + 2 * lane + at % 2), &bits, 2);
            }
            if (p->kind == INT8) {
                float level = rintf(row[i] / (most / 127));
                row[i] = level * (most / 127);
                packed[base + at / 4 * 4 * PANEL + 4 * lane + at % 4] = (uint8_t)(level + 128);
            }
        }
        for (int g = 0; g < n / GROUP && p->kind == INT4; g++) {
            float *group = row + g * GROUP, low = group[0], high = group[0];
            for (int i = 0; i < GROUP; i++) low = fminf(low, group[i]), high = fmaxf(high, group[i]);
            uint16_t size = bf16_of(fmaxf((high - low) / 15, 1e-12f)), least = bf16_of(low);
            uint16_t *factors = (uint16_t *)scale + (base / GROUP + (size_t)g * PANEL) * 2;
            uint8_t *levels = packed + base / 2 + (size_t)g * GROUP / 2 * PANEL;
            factors[lane] = size, factors[PANEL + lane] = least;
            for (int i = 0; i < GROUP; i++) {
                int level = (int)rintf(fminf(fmaxf((group[i] - of_bf16(least)) / of_bf16(size), 0), 15)), at = i % 16;
                group[i] = (float)level * of_bf16(size) + of_bf16(least);
                levels[(size_t)(at / 4) * 4 * PANEL + 4 * lane + (size_t)(at % 4)] |= (uint8_t)(level << (i < 16 ? 0 : 4));
            }
        }
    }
}

/* The outputs of n inputs; `sizes`, if there are any: the sums of the magnitudes of what is summed. */
static void plain_product(const Plain *p, const double *x, double *out, double *sizes) {
    double formed[p->inputs];
    plain_form(p->kind, x, p->inputs, formed);
    for (int o = 0; o < p->outputs; o++) {
        double sum = p->bias ? p->bias[o] : 0, size = fabs(sum);
        for (int i = 0; i < p->inputs; i++) {
            double product = p->weight[(size_t)o * (size_t)p->inputs + (size_t)i] * formed[i];
            sum += product, size += fabs(product);
        }
        out[o] = sum;
        if (sizes) sizes[o] = size;
    }
}

static void plain_norm(const Norm *norm, const double *x, int n, double eps, double *out) {
    double center = 0, square = 0;
    for (int i = 0; i < n && norm->bias; i++) center += x[i] / n;
    for (int i = 0; i < n; i++) square += (x[i] - center) * (x[i] - center) / n;
    for (int i = 0; i < n; i++) {
        double normal = norm->weight ? (x[i] - center) / sqrt(square + eps) * norm->weight[i] : x[i];
        out[i] = normal + (norm->bias ? norm->bias[i] : 0);
    }
}

static void plain_rotate(double *x, int rotary, const float *cos, const float *sin) {
    for (int i = 0, half = rotary / 2; i < half; i++) {
        double a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i], x[i + half] = b * cos[i] + a * sin[i];
    }
}

enum { MOST_PLAIN = 6 }; /* experts */

typedef struct {
    Plain qkv, output, gate, up, down; /* no gate: gate.weight is NULL */
    Plain gates[MOST_PLAIN], ups[MOST_PLAIN], downs[MOST_PLAIN]; /* of experts */
} PlainLayer;

/* Values of a row's head, mixed. q, k, v: (row, heads of queries, keys and values, dimension). */
static void plain_attention(const Shape *s, const Layer *l, const double *qkv, int row, int head, double *out) {
    int size = s->head_dim, slots = s->heads + 2 * s->kv_heads, own = s->heads + head / (s->heads / s->kv_heads);
    int first = l->window && row >= l->window ? row + 1 - l->window : 0;
    double weight[row + 1], total = 0, most = l->sinks ? l->sinks[head] : -INFINITY;
    for (int t = first; t <= row; t++) {
        weight[t] = 0;
        for (int d = 0; d < size; d++) weight[t] += qkv[(row * slots + head) * size + d] * qkv[(t * slots + own) * size + d];
        if (s->score_cap > 0) weight[t] = s->score_cap * tanh(weight[t] / s->score_cap);
        most = fmax(most, weight[t]);
    }
    for (int d = 0; d < size; d++) out[d] = 0;
    if (l->sinks) total = exp(l->sinks[head] - most);
    for (int t = first; t <= row; t++) {
        weight[t] = exp(weight[t] - most);
        if (s->bf16_cache) weight[t] = in_bf16((float)weight[t]);
        total += weight[t];
        for (int d = 0; d < size; d++) out[d] += weight[t] * qkv[(t * slots + own + s->kv_heads) * size + d];
    }
    for (int d = 0; d < size; d++) out[d] /= total;
}

/* hidden += what a block gives, after a norm if there is one. */
static void plain_add(const Shape *s, const Norm *after, const double *block, double *hidden) {
    double normal[s->hidden];
    plain_norm(after, block, s->hidden, s->eps, normal);
    for (int i = 0; i < s->hidden; i++) hidden[i] += s->residual_scale * normal[i];
}

static double plain_activation(double x, int kind, const float *bends) {
    double above = fmax(x, 0), cubic = x + 0.044715 * x * x * x;
    switch (kind) {
    case GELU: return x * 0.5 * erfc(-x * M_SQRT1_2);
    case RELU: return above;
    case RELU_SQUARED: return above * above;
    case XIELU: return x / 2 + (x > 0 ? bends[0] * x * x : bends[1] * (expm1(x) - x));
    default: return x / (1 + exp(-(kind == GELU_TANH ? 1.5957691216057308 * cubic : x)));
    }
}

/* An MLP, or an expert; no gate: gate->weight is NULL. */
static void plain_mlp(const Shape *s, const float *bends, const Plain *gate, const Plain *up, const Plain *down, const double *x, double *out) {
    double ups[up->outputs], gates[up->outputs], inside[up->outputs];
    plain_product(up, x, ups, NULL);
    if (gate->weight) plain_product(gate, x, gates, NULL);
    for (int i = 0; i < up->outputs; i++) {
        if (s->activation == CLAMPED) { /* always with a gate */
            double g = fmin(gates[i], bends[1]), u = fmax(fmin(ups[i], bends[1]), -bends[1]);
            inside[i] = g / (1 + exp(-bends[0] * g)) * (u + 1);
            continue;
        }
        double act = plain_activation(gate->weight ? gates[i] : ups[i], s->activation, bends);
        inside[i] = gate->weight ? act * ups[i] : act;
    }
    plain_product(down, inside, out, NULL);
}

/* The weighted sum of the experts with the largest logits. */
static void plain_experts(const Shape *s, const Layer *l, const PlainLayer *p, const double *x, double *out) {
    double logits[MOST_PLAIN], product[s->hidden], total = 0;
    for (int d = 0; d < s->hidden; d++) out[d] = 0;
    for (int e = 0; e < s->experts; e++) {
        logits[e] = l->router_bias ? l->router_bias[e] : 0;
        for (int d = 0; d < s->hidden; d++) logits[e] += x[d] * l->router[e * s->hidden + d];
    }
    for (int pass = 0; pass < 2; pass++)
        for (int e = 0; e < s->experts; e++) {
            int better = 0;
            for (int other = 0; other < s->experts; other++) better += logits[other] > logits[e];
            if (!pass && (better < s->chosen || !s->normalised)) total += exp(logits[e]);
            if (!pass || better >= s->chosen) continue;
            plain_mlp(s, l->bends, p->gates + e, p->ups + e, p->downs + e, x, product);
            for (int d = 0; d < s->hidden; d++) out[d] += exp(logits[e]) / total * product[d];
        }
}

/* A layer over a text of `rows` positions, in place, from the `first` on. cos, sin: (position, rotary / 2). */
static void plain_layer(
    const Shape *s, const Layer *l, const PlainLayer *p, int first, int rows, const float *cos, const float *sin, double *hidden
) {
    int size = s->head_dim, slots = s->heads + 2 * s->kv_heads, n = s->hidden;
    double normal[n], block[n], mixed[s->heads * size];
    double *qkv = malloc(sizeof *qkv * (size_t)(rows * slots * size));
    for (int r = 0; r < rows; r++) {
        double *own = qkv + r * slots * size;
        plain_norm(&l->before_attention, hidden + r * n, n, s->eps, normal);
        plain_product(&p->qkv, normal, own, NULL);
        if (s->norms_projections) {
            plain_norm(&l->query, own, s->heads * size, s->eps, own);
            plain_norm(&l->key, own + s->heads * size, s->kv_heads * size, s->eps, own + s->heads * size);
        }
        for (int h = 0; h < slots; h++) {
            double *x = own + h * size;
            int is_query = h < s->heads, is_value = h >= s->heads + s->kv_heads;
            const Norm *norm = is_query ? &l->query : is_value ? &l->value : &l->key;
            int norms = !s->norms_projections, rotates = !is_value && l->rope >= 0;
            if (norms && (is_value || !s->norms_rotated)) plain_norm(norm, x, size, s->eps, x);
            if (rotates) plain_rotate(x, s->rotary, cos + r * s->rotary / 2, sin + r * s->rotary / 2);
            if (norms && !is_value && s->norms_rotated) plain_norm(norm, x, size, s->eps, x);
            for (int d = 0; d < size && is_query; d++) x[d] *= s->attention_scale;
            for (int d = 0; d < size && s->bf16_cache; d++) x[d] = in_bf16((float)x[d]);
        }
    }
    for (int r = first; r < rows; r++) {
        double *own = hidden + r * n;
        plain_norm(&l->before_mlp, own, n, s->eps, normal);
        for (int h = 0; h < s->heads; h++) plain_attention(s, l, qkv, r, h, mixed + h * size);
        plain_product(&p->output, mixed, block, NULL);
        plain_add(s, &l->after_attention, block, own);
        if (!s->parallel) plain_norm(&l->before_mlp, own, n, s->eps, normal);
        if (l->router) plain_experts(s, l, p, normal, block);
        else plain_mlp(s, l->bends, &p->gate, &p->up, &p->down, normal, block);
        plain_add(s, &l->after_mlp, block, own);
        for (int i = 0; i < n; i++) own[i] *= l->scale;
    }
    free(qkv);
}
