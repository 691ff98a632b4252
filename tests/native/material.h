/* Matrices and models of random numbers, with what they shall compute; threads that run them; and what was wrong. */

enum { LAYERS = 2, PLACES = 320, VOCAB = 67, MOST_DRAFTS = 5, THREADS = 3 };

static int failures;

static void expect(int right, const char *format, ...) {
    if (right || ++failures > 20) return;
    va_list arguments;
    va_start(arguments, format);
    fputs("wrong: ", stderr), vfprintf(stderr, format, arguments), fputc('\n', stderr);
    va_end(arguments);
}

/* ---- memory, which the next round takes again, and random numbers ---- */

static char *memory;
static size_t used;
enum { MEMORY = 64 << 20 };

static void *room(size_t bytes) {
    void *at = memory + used;
    used += (bytes + 63) & ~(size_t)63;
    if (used > MEMORY) fputs("out of memory\n", stderr), exit(2);
    return memset(at, 0, bytes);
}

static uint64_t seed = 1;

static double uniform(void) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (double)(seed >> 11) / 9007199254740992.0;
}

static int below(int n) { return (int)(uniform() * n); }

/* Evenly distributed. */
static float *numbers_of(size_t count, double deviation, double center) {
    float *x = room(4 * count);
    for (size_t i = 0; i < count; i++) x[i] = (float)(center + 3.4641016 * deviation * (uniform() - 0.5));
    return x;
}

/* ---- threads ---- */

#if defined(WITH_OPENMP)
void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);
int omp_get_thread_num(void), omp_get_num_threads(void);
#else
static _Thread_local int own_number;
static int team_size = 1;

typedef struct {
    void (*function)(void *);
    void *data;
    int number;
} Start;

static void *started(void *start) {
    own_number = ((Start *)start)->number;
    ((Start *)start)->function(((Start *)start)->data);
    return NULL;
}

static void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags) {
    pthread_t ids[64];
    Start starts[64];
    (void)flags, team_size = (int)threads;
    for (unsigned i = 1; i < threads; i++) {
        starts[i] = (Start){function, data, (int)i};
        pthread_create(ids + i, NULL, started, starts + i);
    }
    function(data);
    for (unsigned i = 1; i < threads; i++) pthread_join(ids[i], NULL);
}

static int omp_get_thread_num(void) { return own_number; }
static int omp_get_num_threads(void) { return team_size; }
#endif

/* ---- matrices ---- */

static const struct {
    const char *name;
    int kind, bf16, coded; /* bf16: the cache, and the weights before they are packed; coded: in 12 bits */
} PRECISIONS[] = {
    {"fp32", FP32, 0, 0}, {"bf16", BF16, 1, 0}, {"int8", INT8, 1, 0}, {"int4", INT4, 0, 0}, {"stored", STORED, 0, 0},
    {"bf16 in 12 bits", BF16, 1, 1},
#if BF16_PARTS == 2
    {"bf16 widened", WIDENED, 0, 0}, {"bf16 widened from 12 bits", WIDENED, 0, 1},
#endif
};

static int order(const void *a, const void *b) { return (*(const int64_t *)a > *(const int64_t *)b) - (*(const int64_t *)a < *(const int64_t *)b); }

/* Ends the list of a matrix's exceptions, and checks that it decodes to the panels `expected`. */
static void end_coded(Matrix *m, int panels, int64_t *found, const void *expected) {
    int64_t size = (int64_t)PANEL * m->inputs, *listed = found + 2;
    int32_t *starts = room(4 * (size_t)(panels + 1));
    expect(found[0] <= found[1], "%d exceptions", (int)found[0]);
    qsort(listed, (size_t)found[0], 8, order);
    listed[found[0]] = panels * size << 16;
    for (int p = 0, at = 0; p < panels; starts[p++] = at)
        while (listed[at] >> 16 < p * size) at++;
    m->exceptions = listed, m->starts = starts;
    char *decoded = room((size_t)(panels * size) * 2);
    layerskip_decode(m, panels, decoded);
    expect(!memcmp(decoded, expected, (size_t)(panels * size) * 2), "bf16 from 12 bits");
}

/* As experts_of, of random blocks: of one type, or of one for each projection. */
static Matrix stored_of(int experts, int inputs, int outputs, int count, int biased, Plain *const *plain) {
    static int next;
    int each = (outputs + PANEL - 1) / PANEL, panels = each * count, all = experts * panels, is_one = below(2);
    StoredPanel *table = room(sizeof *table * (size_t)all);
    float *bias = biased ? room(4 * (size_t)all * PANEL) : NULL;
    Matrix m = {STORED, inputs, outputs * count, panels, table, NULL, bias};
    for (int c = 0; c < experts * count; c++) {
        int first = c / count * panels + c % count, type = next % (inputs % 256 ? NARROW_TYPES : TYPE_COUNT);
        if (!is_one || c == experts * count - 1) next++;
        int held = is_one ? all : each, bits = TYPES[type].bits, factors = TYPES[type].offset ? 1 : 2, width = TYPES[type].inputs;
        if (!is_one || c == 0) {
            StoredPanel own = {
                .weight = room((size_t)(held * inputs * bits * 4)), .bits = bits, .offset = TYPES[type].offset,
                .scale = Q4_0 + type == MXFP4 ? NULL : room((size_t)(held * inputs / width * factors * PANEL * 2)),
                .steps = width == 256 || Q4_0 + type == MXFP4 || Q4_0 + type == Q4_Z ? room((size_t)(held * inputs / (bits == 6 ? 16 : 32) * factors * PANEL)) : NULL,
            };
            for (int i = 0; i < held; i++) {
                table[is_one ? i : first + i * count] = own;
                own.weight += inputs * bits * 4, own.scale += own.scale ? inputs / width * factors * PANEL : 0;
                if (own.steps) own.steps += inputs / (bits == 6 ? 16 : 32) * factors * PANEL;
            }
        }
        int blocks = inputs / width, bytes = TYPES[type].bytes;
        uint8_t *rows = room((size_t)(outputs * blocks * bytes));
        float *weight = room(4 * (size_t)(outputs * inputs));
        for (int i = 0; i < outputs * blocks * bytes; i++) rows[i] = (uint8_t)below(256);
        for (int i = 0; i < outputs * blocks; i++) {
            uint8_t *block = rows + i * bytes;
            for (int f = 0; f < factors; f++) {
                int scale = TYPES[type].least + below(TYPES[type].least < 0x400 ? 0x40 : 0x400) + (f && width == 32 ? 0x8c00 : 0);
                block[TYPES[type].scales + 2 * f] = (uint8_t)scale, block[TYPES[type].scales + 2 * f + 1] = (uint8_t)(scale >> 8);
            }
            if (Q4_0 + type == Q4_Z) block[2] = (uint8_t)(below(18) - 1);
            if (Q4_0 + type == MXFP4) block[0] = (uint8_t)(120 + below(5));
            for (int k = 0; k < width; k++) weight[i * width + k] = plain_block(Q4_0 + type, block, k);
        }
        layerskip_pack(&m, rows, Q4_0 + type, outputs, first, count, NULL, 1 + below(THREADS));
        *plain[c] = (Plain){STORED, inputs, outputs, weight, biased ? numbers_of((size_t)outputs, 0.1, 0) : NULL};
        for (int o = 0; o < outputs && biased; o++) bias[(first + o / PANEL * count) * PANEL + o % PANEL] = plain[c]->bias[o];
    }
    return m;
}

/* One matrix of `count` projections of each expert, whose panels alternate, and what it shall compute. */
static Matrix experts_of(int precision, int experts, int inputs, int outputs, int count, int biased, Plain *const *plain) {
    int kind = PRECISIONS[precision].kind, source = PRECISIONS[precision].bf16 || kind == WIDENED ? BF16 : FP32;
    if (kind == STORED) return stored_of(experts, inputs, outputs, count, biased, plain);
    int panels = (outputs + PANEL - 1) / PANEL * count;
    size_t numbers = (size_t)(experts * panels) * PANEL * (size_t)inputs, bytes = numbers * (kind == FP32 ? 4 : is_low_bit(kind) ? 1 : 2);
    size_t factors = kind == INT4 ? numbers / GROUP * 4 : (size_t)(experts * panels) * PANEL * 4;
    uint8_t *packed = room(bytes), *expected = room(bytes), *scale = room(factors), *expected_scale = room(factors);
    float *bias = biased ? room(4 * (size_t)(experts * panels) * PANEL) : NULL;
    Matrix m = {kind, inputs, outputs * count, panels, packed, scale, bias}, coded = m;
    int64_t *found = room(8 * (numbers / 8 + 3));
    found[1] = (int64_t)numbers / 8;
    coded.weight = room(bytes), coded.high = room(16 * (size_t)(experts * panels));
    for (int c = 0; c < experts * count; c++) {
        int first = c / count * panels + c % count;
        float *weight = numbers_of((size_t)outputs * (size_t)inputs, 1 / sqrt(inputs), 0);
        uint16_t *narrow = room(2 * (size_t)outputs * (size_t)inputs);
        weight[0] = weight[outputs * inputs - 1] = 1e-20f; /* exceptions at the first and the last place */
        for (int i = 0; i < outputs * inputs && source == BF16; i++)
            narrow[i] = bf16_of(weight[i]), weight[i] = of_bf16(narrow[i]);
        layerskip_pack(&m, source == BF16 ? (void *)narrow : weight, source, outputs, first, count, NULL, 1 + below(THREADS));
        if (PRECISIONS[precision].coded) layerskip_pack(&coded, narrow, source, outputs, first, count, found, 1 + below(THREADS));
        *plain[c] = (Plain){kind, inputs, outputs, weight, biased ? numbers_of((size_t)outputs, 0.1, 0) : NULL};
        plain_pack(plain[c], expected, expected_scale, first, count);
        for (int o = 0; o < outputs && biased; o++) bias[(first + o / PANEL * count) * PANEL + o % PANEL] = plain[c]->bias[o];
    }
    if (outputs % PANEL == 0) /* what rows after the last hold is of no interest */
        expect(
            !memcmp(packed, expected, bytes) && (!is_low_bit(kind) || !memcmp(scale, expected_scale, factors)),
            "panels of %s", PRECISIONS[precision].name
        );
    if (!PRECISIONS[precision].coded) return m;
    end_coded(&coded, experts * panels, found, packed);
    coded.bias = bias;
    return coded;
}

static Matrix matrix_of(int precision, int inputs, int outputs, int count, int biased, Plain *const *plain) {
    return experts_of(precision, 1, inputs, outputs, count, biased, plain);
}

static Call call_of(const Shape *s, int rows, int sequences, float *hidden, int widest) {
    int projected = (s->heads + 2 * s->kv_heads) * s->head_dim;
    Call call = {.rows = rows, .row_pages = PLACES / PAGE};
    int64_t *page_rows = room(sizeof *page_rows * (size_t)rows);
    int32_t *starts = room(sizeof *starts * (size_t)(sequences + 1));
    for (int i = 0; i < rows; i++) page_rows[i] = sequences - 1 - i / (rows / sequences);
    for (int i = 0; i <= sequences; i++) starts[i] = i * (rows / sequences);
    call.hidden = hidden, call.page_rows = page_rows, call.starts = starts;
    size_t each = 4 * (size_t)rows;
    call.qkv = room(each * (size_t)projected), call.mixed = room(each * (size_t)(s->heads * s->head_dim));
    size_t choices = (size_t)rows * (size_t)s->chosen, sizes = 4 * (size_t)(s->experts + 1);
    call.inside = room(each * (size_t)(s->inner * (1 + s->chosen))), call.block = room(each * (size_t)s->hidden);
    call.routing = (Routing){
        room(each * (size_t)s->experts), room(4 * choices), room(4 * choices), room(4 * choices), room(4 * choices),
        room(sizes), room(sizes), room(4), room(4 * choices * (size_t)s->hidden),
    };
    size_t own = (4 * (size_t)(s->hidden + 16) + (size_t)(rows + PANEL) * (4 * (size_t)widest + 128) + 63) & ~(size_t)63;
    call.scratch_bytes = (int64_t)own, call.scratch = room(own * THREADS);
    return call;
}

/* ---- layers ---- */

typedef struct {
    int precision;
    Shape shape;
    Layer layers[LAYERS];
    PlainLayer plain[LAYERS];
    Matrix head;
    Plain plain_head;
    Norm final;
    void *embedding;
    float *cos, *sin;
} Model;

static Norm norm_of(int size, int exists, int centered) {
    float *weight = exists ? numbers_of((size_t)size, 0.2, 1) : NULL;
    return (Norm){weight, exists && centered ? numbers_of((size_t)size, 0.1, 0) : NULL};
}

static Model model_of(int precision, int style) {
    static const int SIZES[] = {8, 16, 32, 64, 24, 48};
    Model m = {.precision = precision};
    int gated = style != 2, size = SIZES[below(style % 4 ? 6 : 4)], kv_heads = 1 + below(2), centered = style == 2;
    int heads = kv_heads * (1 + below(3));
    while (heads * size % 32) heads += kv_heads;
    Shape *s = &m.shape;
    *s = (Shape){.hidden = 32 * (1 + below(3)), .heads = heads, .kv_heads = kv_heads, .head_dim = size};
    s->inner = 32 * (1 + below(3));
    s->rotary = style == 1 ? size / 2 : size, s->bf16_cache = PRECISIONS[precision].bf16, s->gated = gated;
    s->activation = style == 2 ? GELU + below(4) : style % 4 ? GELU_TANH : below(2) ? SILU : CLAMPED, s->norms_projections = style == 3, s->eps = 1e-5f;
    s->parallel = style == 2 && below(2), s->norms_rotated = style == 1 && below(2);
    s->attention_scale = (float)(1 / sqrt(size)), s->score_cap = style == 1 ? 5 : 0;
    s->experts = style == 4 ? 2 + below(5) : 0, s->chosen = style == 4 ? 1 + below(s->experts) : 0, s->normalised = below(2);
    s->embedding_scale = style == 1 ? 8 : 1, s->residual_scale = style == 2 ? 0.5f : 1;
    int queries = heads * size, keys = kv_heads * size, after = style == 1 || style == 3, before = style != 3;
    for (int i = 0; i < LAYERS; i++) {
        Layer *l = m.layers + i;
        PlainLayer *p = m.plain + i;
        Plain *gate_and_up[] = {&p->gate, &p->up}, *up[] = {&p->up}, *ups[2 * MOST_PLAIN], *downs[MOST_PLAIN];
        for (int e = 0; e < MOST_PLAIN; e++) ups[2 * e] = p->gates + e, ups[2 * e + 1] = p->ups + e, downs[e] = p->downs + e;
        l->qkv = matrix_of(precision, s->hidden, queries + 2 * keys, 1, style == 2, (Plain *[]){&p->qkv});
        l->output = matrix_of(precision, queries, s->hidden, 1, style == 2, (Plain *[]){&p->output});
        l->up = matrix_of(precision, s->hidden, s->inner, 1 + gated, style == 2, gated ? gate_and_up : up);
        l->down = matrix_of(precision, s->inner, s->hidden, 1, style == 2, (Plain *[]){&p->down});
        if (s->experts) {
            l->router = numbers_of((size_t)(s->experts * s->hidden), 1 / sqrt(s->hidden), 0);
            int biased = below(2);
            l->router_bias = biased ? numbers_of((size_t)s->experts, 0.5, 0) : NULL;
            l->up = experts_of(precision, s->experts, s->hidden, s->inner, 2, biased, ups);
            l->down = experts_of(precision, s->experts, s->inner, s->hidden, 1, biased, downs);
        }
        l->before_attention = norm_of(s->hidden, before, centered), l->before_mlp = norm_of(s->hidden, before, centered);
        l->after_attention = norm_of(s->hidden, after, 0), l->after_mlp = norm_of(s->hidden, after, 0);
        l->query = norm_of(style == 3 ? queries : size, style % 2, 0), l->key = norm_of(style == 3 ? keys : size, style % 2, 0);
        l->value = norm_of(size, style == 1, 0);
        l->bends[0] = 0.4f, l->bends[1] = 0.7f, l->scale = style == 1 ? 0.8f : 1, l->keys = i * 2 * keys * PAGE;
        l->sinks = below(2) ? numbers_of((size_t)heads, 1, 0) : NULL;
        l->rope = style == 2 && i == 1 ? -1 : 0, l->window = style == 1 && i != 1 ? 5 + below(20) : 0;
    }
    m.head = matrix_of(precision, s->hidden, VOCAB, 1, 0, (Plain *[]){&m.plain_head});
    m.final = norm_of(s->hidden, 1, centered);
    float *embedding = numbers_of((size_t)(VOCAB * s->hidden), 1, 0);
    uint16_t *narrow = room(2 * (size_t)(VOCAB * s->hidden));
    for (int i = 0; i < VOCAB * s->hidden; i++) narrow[i] = bf16_of(embedding[i]);
    m.embedding = s->bf16_cache ? (void *)narrow : embedding;
    int half = s->rotary / 2;
    m.cos = room(4 * (size_t)(PLACES * half)), m.sin = room(4 * (size_t)(PLACES * half));
    for (int i = 0; i < PLACES * half; i++) {
        double angle = i / half * pow(1e4, -(double)(i % half) / half);
        m.cos[i] = (float)cos(angle), m.sin[i] = (float)sin(angle);
    }
    return m;
}

static size_t page_bytes(const Model *m) {
    return (size_t)(LAYERS * 2 * m->shape.kv_heads * PAGE * m->shape.head_dim) * (m->shape.bf16_cache ? 2 : 4);
}

static size_t cache_bytes(const Model *m, int sequences) { return page_bytes(m) * (size_t)(sequences * (PLACES / PAGE)); }

/* A call over `count` tokens of each sequence, from a layer on. Pages lie in the reverse of their order. */
static Call rows_of(const Model *m, int layer, int first, int count, int sequences, float *hidden, char *cache) {
    const Shape *s = &m->shape;
    int widest = s->hidden > s->inner ? s->hidden : s->inner;
    if (widest < s->heads * s->head_dim) widest = s->heads * s->head_dim;
    Call call = call_of(s, sequences * count, sequences, hidden, widest);
    int64_t *positions = room(sizeof *positions * (size_t)(sequences * count + MOST_DRAFTS + 1));
    for (int i = 0; i < sequences * count + MOST_DRAFTS + 1; i++) positions[i] = first + (sequences > 1 ? i % count : i);
    int pages = sequences * (PLACES / PAGE);
    char **table = room(sizeof *table * (size_t)pages);
    for (int page = 0; page < pages && cache; page++) table[page] = cache + page_bytes(m) * (size_t)(pages - 1 - page);
    call.pages = table;
    call.positions = positions, call.cos[0] = call.cos[1] = m->cos, call.sin[0] = call.sin[1] = m->sin;
    return call;
}
