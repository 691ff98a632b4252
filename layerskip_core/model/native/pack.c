/* Packs weights (outputs, inputs) into a matrix: rounds them, where it has fewer bits, and stores them in panels.
 *
 * Whatever the kind, a panel consists of units of 32 bits: for each unit of a row, those of its 32 rows stand side by side. The
 * numbers are those of torch's operations in weights.py, to the bit. Included after kernels.c.
 */

typedef struct {
    const Matrix *to;
    const char *weight; /* (rows, inputs) in `from`, which is FP32, BF16, or INT4 for the bytes of a calibrated weight */
    int from, rows;     /* rows after the last are zeros */
    int first, step;    /* the first of the panels that take the rows, and the distance to the next */
    atomic_int taken;   /* panels that a thread has taken */
} Packing;

/* The bytes of row `lane`, or NULL after the last. */
typedef struct {
    const char *row[PANEL];
} Rows;

INLINE vf weights_at(const char *row, int i, const int bf16) {
    if (!row) return f_set(0);
    return bf16 ? f_load_bf16((const uint16_t *)row + i) : f_load((const float *)row + i);
}

INLINE void place_units(uint32_t *out, int lane, const void *from, int count) {
    uint32_t units[16];
    memcpy(units, from, 4 * (size_t)count);
    for (int u = 0; u < count; u++) out[u * PANEL + lane] = units[u];
}

static void pack_as_they_are(const Rows *rows, int units, uint32_t *out) {
    static const uint32_t zeros[16];
    for (int first = 0; first < units; first += 16, out += 16 * PANEL)
        for (int lane = 0; lane < PANEL; lane++) {
            const char *row = rows->row[lane];
            const void *from = row ? row + 4 * (size_t)first : (const void *)zeros;
            if (units - first >= 16) place_units(out, lane, from, 16);
            else place_units(out, lane, from, units - first);
        }
}

/* A row's largest magnitude is level 127. */
INLINE void pack_int8(const Rows *rows, int n, const int bf16, uint32_t *out, float *scale) {
    for (int lane = 0; lane < PANEL; lane++) {
        vf most = f_set(1e-12f);
        for (int i = 0; i < n; i += 16) most = f_max(most, f_abs(weights_at(rows->row[lane], i, bf16)));
        scale[lane] = f_largest(most) / 127;
    }
    for (int i = 0; i < n; i += GROUP, out += GROUP / 4 * PANEL)
        for (int lane = 0; lane < PANEL; lane++) {
            const char *row = rows->row[lane];
            vf size = f_set(scale[lane]);
            int8_t levels[GROUP];
            f_store_int8(levels, f_div(weights_at(row, i, bf16), size));
            f_store_int8(levels + 16, f_div(weights_at(row, i + 16, bf16), size));
            for (int k = 0; k < GROUP; k++) levels[k] ^= -128; /* plus 128 */
            place_units(out, lane, levels, GROUP / 4);
        }
}

/* Of a finite number, to the nearest, ties to even. The instruction for it takes subnormal numbers for zeros, torch does not. */
INLINE uint16_t bf16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float of_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

/* The smallest of a group is level 0, its largest level 15. */
INLINE void pack_int4(const Rows *rows, int n, const int bf16, uint32_t *out, uint16_t *factors) {
    vf zero = f_set(0), most = f_set(15);
    for (int i = 0; i < n; i += GROUP, out += GROUP / 8 * PANEL, factors += 2 * PANEL)
        for (int lane = 0; lane < PANEL; lane++) {
            vf a = weights_at(rows->row[lane], i, bf16), b = weights_at(rows->row[lane], i + 16, bf16);
            float low = -f_largest(f_sub(zero, f_min(a, b))), scale = (f_largest(f_max(a, b)) - low) / 15;
            factors[lane] = bf16_of(scale > 1e-12f ? scale : 1e-12f), factors[PANEL + lane] = bf16_of(low);
            vf size = f_set(of_bf16(factors[lane])), least = f_set(of_bf16(factors[PANEL + lane]));
            int8_t levels[GROUP], halves[GROUP / 2];
            f_store_int8(levels, f_min(f_max(f_div(f_sub(a, least), size), zero), most));
            f_store_int8(levels + 16, f_min(f_max(f_div(f_sub(b, least), size), zero), most));
            for (int k = 0; k < GROUP / 2; k++) halves[k] = (int8_t)(levels[k] | levels[k + 16] << 4);
            place_units(out, lane, halves, GROUP / 8);
        }
}

/* Groups of 16 bytes of levels, a scale and a lowest value. */
static void pack_stored_int4(const Rows *rows, int n, uint32_t *out, uint16_t *factors) {
    enum { BYTES = GROUP / 2 + 4 };
    static const char zeros[BYTES];
    for (int g = 0; g < n / GROUP; g++, out += GROUP / 8 * PANEL, factors += 2 * PANEL)
        for (int lane = 0; lane < PANEL; lane++) {
            const char *group = rows->row[lane] ? rows->row[lane] + BYTES * (size_t)g : zeros;
            place_units(out, lane, group, GROUP / 8);
            memcpy(factors + lane, group + GROUP / 2, 2), memcpy(factors + PANEL + lane, group + GROUP / 2 + 2, 2);
        }
}

static void pack_panel(const Packing *p, int index) {
    const Matrix *m = p->to;
    int n = m->inputs, bf16 = p->from == BF16;
    size_t panel = (size_t)(p->first + index * p->step), size = panel * PANEL * (size_t)n;
    size_t row_bytes = p->from == INT4 ? (size_t)n / GROUP * (GROUP / 2 + 4) : (size_t)n * (bf16 ? 2 : 4);
    Rows rows;
    for (int lane = 0; lane < PANEL; lane++) {
        int row = index * PANEL + lane;
        rows.row[lane] = row < p->rows ? p->weight + (size_t)row * row_bytes : NULL;
    }
    uint16_t *factors = (uint16_t *)m->scale + size / GROUP * 2;
    float *scale = (float *)m->scale + panel * PANEL;
    switch (m->kind) {
    case FP32: pack_as_they_are(&rows, n, (uint32_t *)m->weight + size); break;
    case WIDENED:
    case BF16: pack_as_they_are(&rows, n / 2, (uint32_t *)m->weight + size / 2); break;
    case INT8:
        if (bf16) pack_int8(&rows, n, 1, (uint32_t *)m->weight + size / 4, scale);
        else pack_int8(&rows, n, 0, (uint32_t *)m->weight + size / 4, scale);
        break;
    case INT4:
        if (p->from == INT4) pack_stored_int4(&rows, n, (uint32_t *)m->weight + size / 8, factors);
        else if (bf16) pack_int4(&rows, n, 1, (uint32_t *)m->weight + size / 8, factors);
        else pack_int4(&rows, n, 0, (uint32_t *)m->weight + size / 8, factors);
    }
}

static void pack_panels(void *packing) {
    Packing *p = packing;
    int panels = (p->rows + PANEL - 1) / PANEL;
    for (int index; (index = atomic_fetch_add_explicit(&p->taken, 1, memory_order_relaxed)) < panels;) pack_panel(p, index);
}

/* A weight into the panels first, first + step, ... of a matrix. A matrix in FP32 or BF16 takes weights in that precision only. */
void layerskip_pack(const Matrix *to, const void *weight, int from, int rows, int first, int step, int threads) {
    Packing packing = {.to = to, .weight = weight, .from = from, .rows = rows, .first = first, .step = step};
    if (threads > 1 && parallel) parallel(pack_panels, &packing, (unsigned)threads, 0);
    else pack_panels(&packing);
}
