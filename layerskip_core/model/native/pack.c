/* Packs weights (outputs, inputs) into a matrix: rounds them, where it has fewer bits, and stores them in panels.
 *
 * A panel of any kind interleaves its 32 rows in units of 32 bits. Numbers equal those of torch's operations in weights.py, to
 * the bit. Included after kernels.c.
 */

typedef struct {
    const Matrix *to;
    const char *weight; /* (rows, inputs) in `from`: FP32, BF16, INT4 for the bytes of a calibrated weight, or a type of blocks */
    int from, rows;     /* rows after the last are zeros */
    int first, step;    /* the first of the panels that take the rows, and the distance to the next */
    int64_t *found;     /* of bf16 in 12 bits: see list_exception */
    atomic_int taken;   /* panels taken by threads so far */
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

/* ---- bf16 in 12 bits, see coded.h ---- */

/* found[0] is the number of exceptions so far, which other threads raise too; found[1] how many there is room for after it. */
static void list_exception(int64_t *found, int64_t place, uint16_t bits) {
    int64_t at = __atomic_fetch_add(found, 1, __ATOMIC_RELAXED);
    if (at < found[1]) found[2 + at] = place << 16 | bits;
}

enum { UNIT_WEIGHTS = 2 * PANEL, UNCODED = 16 };

/* The 16 most frequent high bytes of a panel, and the code of each high byte. */
static void choose_codes(const Rows *rows, int n, uint8_t *high, uint8_t *codes) {
    uint32_t counts[4][256] = {{0}}; /* apart, so that an addition does not wait for the last */
    for (int lane = 0; lane < PANEL; lane++) {
        const uint8_t *row = (const uint8_t *)rows->row[lane];
        for (int i = 0; row && i < n; i += 4)
            for (int k = 0; k < 4; k++) counts[k][row[2 * (i + k) + 1]]++;
        if (!row) counts[0][0] += (uint32_t)n;
    }
    for (int byte = 0; byte < 256; byte++) counts[0][byte] += counts[1][byte] + counts[2][byte] + counts[3][byte];
    memset(codes, UNCODED, 256);
    for (uint8_t code = 0; code < 16; code++) {
        int best = 0;
        for (int byte = 1; byte < 256; byte++)
            if (counts[0][byte] > counts[0][best]) best = byte;
        high[code] = (uint8_t)best;
        if (counts[0][best]) codes[best] = code, counts[0][best] = 0;
    }
}

/* Where a weight's bytes stand among a unit's, by its place in the unit of bf16, in runs of eight: what i_interleaved undoes. */
INLINE int coded_place(int place) { return place % 32 / 8 * 16 + place / 32 * 8 + place % 8; }

/* The low bytes of a unit, and the codes of the others, UNCODED for exceptions; returns whether there are any. */
static int split_unit(const uint16_t *unit, const uint8_t *codes, uint8_t *low, uint8_t *coded) {
    uint8_t lows[UNIT_WEIGHTS], found[UNIT_WEIGHTS], all = 0;
    for (int i = 0; i < UNIT_WEIGHTS; i++) lows[i] = (uint8_t)unit[i];
    for (int i = 0; i < UNIT_WEIGHTS; i++) found[i] = codes[unit[i] >> 8];
    for (int i = 0; i < UNIT_WEIGHTS; i++) all |= found[i];
    for (int i = 0; i < UNIT_WEIGHTS; i += 8) memcpy(low + coded_place(i), lows + i, 8), memcpy(coded + coded_place(i), found + i, 8);
    return all & UNCODED;
}

/* `first`: the place of the panel's first weight in the matrix. */
static void pack_coded(const Rows *rows, int n, int64_t first, uint8_t *high, uint8_t *out, int64_t *found) {
    uint16_t units[16][UNIT_WEIGHTS];
    uint8_t codes[256];
    choose_codes(rows, n, high, codes);
    for (int i = 0; i < n && __atomic_load_n(found, __ATOMIC_RELAXED) <= found[1]; i += 32) {
        Rows some;
        for (int lane = 0; lane < PANEL; lane++) some.row[lane] = rows->row[lane] ? rows->row[lane] + 2 * i : NULL;
        pack_as_they_are(&some, 16, (uint32_t *)units);
        for (int unit = 0; unit < 16; unit += CODED_UNITS, out += CODED_BYTES) {
            uint8_t coded[CODED_UNITS][UNIT_WEIGHTS];
            for (int u = 0; u < CODED_UNITS; u++) {
                int has_exceptions = split_unit(units[unit + u], codes, out + 64 * u, coded[u]);
                for (int place = 0; has_exceptions && place < UNIT_WEIGHTS; place++) {
                    uint8_t *code = coded[u] + coded_place(place);
                    if (*code != UNCODED) continue;
                    list_exception(found, first + (i / 2 + unit + u) * UNIT_WEIGHTS + place, units[unit + u][place]), *code = 0;
                }
            }
            for (int k = 0; k < UNIT_WEIGHTS; k++) out[64 * CODED_UNITS + k] = (uint8_t)(coded[0][k] | coded[1][k] << 4);
        }
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

/* Rounds a finite number to nearest, ties to even, as torch does; the CPU's instruction flushes subnormal numbers to zero. */
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

/* ---- rows of blocks as GGUF files have them ---- */

enum { Q4_0 = 16, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4, Q4_Z, Q4_K, Q5_K, Q6_K };

static const struct { int inputs, bytes; } BLOCKS[] = {
    {32, 18}, {32, 20}, {32, 22}, {32, 24}, {32, 34}, {32, 17}, {32, 19}, {256, 144}, {256, 176}, {256, 210}};

typedef struct {
    uint8_t levels[256];
    uint16_t scales[2];  /* the second is of minima */
    int8_t steps[16][2]; /* by group */
} StoredBlock;

/* Unpacks each `run` bytes to the levels in their low halves, then those in their high halves. */
static void read_halves(uint8_t *levels, const uint8_t *from, int bytes, int run) {
    for (int i = 0; i < bytes; i++) {
        uint8_t *to = levels + i / run * 2 * run + i % run;
        to[0] = from[i] & 15, to[run] = from[i] >> 4;
    }
}

static void read_block(int type, const uint8_t *b, StoredBlock *to) {
    uint8_t *levels = to->levels;
    if (type == Q8_0) {
        memcpy(to->scales, b, 2);
        for (int i = 0; i < 32; i++) levels[i] = b[2 + i] ^ 128;
    } else if (type == MXFP4) { /* twice its levels times 2^(byte - 128); the two least powers would be subnormal, and are 0 */
        to->steps[0][0] = (int8_t)(b[0] < 1 ? -127 : b[0] - 128);
        read_halves(levels, b + 1, 16, 16);
    } else if (type == Q4_Z) {
        memcpy(to->scales, b, 2);
        to->steps[0][0] = (int8_t)b[2];
        read_halves(levels, b + 3, 16, 16);
    } else if (type == Q6_K) {
        read_halves(levels, b, 128, 64);
        for (int i = 0; i < 256; i++) levels[i] |= (uint8_t)((b[128 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3) << 4);
        for (int g = 0; g < 16; g++) to->steps[g][0] = (int8_t)b[192 + g];
        memcpy(to->scales, b + 208, 2);
    } else if (type == Q4_K || type == Q5_K) { /* six-bit steps; the last four groups' upper two bits are stored apart */
        const uint8_t *s = b + 4;
        for (int g = 0; g < 4; g++) {
            to->steps[g][0] = s[g] & 63, to->steps[4 + g][0] = (int8_t)((s[8 + g] & 15) | s[g] >> 6 << 4);
            to->steps[g][1] = s[4 + g] & 63, to->steps[4 + g][1] = (int8_t)(s[8 + g] >> 4 | s[4 + g] >> 6 << 4);
        }
        memcpy(to->scales, b, 4);
        to->scales[1] ^= 0x8000; /* minima are subtracted */
        read_halves(levels, b + (type == Q4_K ? 16 : 48), 128, 32);
        for (int i = 0; i < 256 && type == Q5_K; i++) levels[i] |= (uint8_t)((b[16 + i % 32] >> i / 32 & 1) << 4);
    } else {
        int factors = type == Q4_1 || type == Q5_1 ? 4 : 2, fifths = type == Q5_0 || type == Q5_1 ? 4 : 0;
        memcpy(to->scales, b, (size_t)factors);
        read_halves(levels, b + factors + fifths, 16, 16);
        for (int i = 0; i < 32 && fifths; i++) levels[i] |= (uint8_t)((b[factors + i / 8] >> i % 8 & 1) << 4);
    }
}

/* A group's levels, see quads_of. */
static void place_levels(uint32_t *out, int lane, const uint8_t *levels, int bits) {
    uint8_t bytes[4 * 16] = {0}; /* the most that place_units takes */
    if (bits == 8) memcpy(bytes, levels, GROUP);
    for (int i = 0; i < GROUP && bits < 8; i++) {
        int quad = i / 4, upper = levels[i] >> 4;
        bytes[quad / 2 * 4 + i % 4] |= (uint8_t)((levels[i] & 15) << quad % 2 * 4);
        if (bits == 5) bytes[16 + i % 4] |= (uint8_t)(upper << quad);
        if (bits == 6) bytes[16 + quad / 4 * 4 + i % 4] |= (uint8_t)(upper << quad % 4 * 2);
    }
    place_units(out, lane, bytes, bits);
}

static void pack_blocks(const StoredPanel *to, const Rows *rows, int n, int type) {
    int width = BLOCKS[type - Q4_0].inputs, factors = to->offset ? 1 : 2, steps = width / (to->bits == 6 ? 16 : 32);
    for (int lane = 0; lane < PANEL; lane++)
        for (int block = 0; block < n / width; block++) {
            StoredBlock own = {{0}, {0}, {{0}}};
            if (rows->row[lane]) read_block(type, (const uint8_t *)rows->row[lane] + (size_t)(block * BLOCKS[type - Q4_0].bytes), &own);
            for (int g = 0; g < width / GROUP; g++) {
                size_t unit = (size_t)(block * width / GROUP + g) * (size_t)to->bits;
                place_levels((uint32_t *)to->weight + unit * PANEL, lane, own.levels + g * GROUP, to->bits);
            }
            for (int f = 0; f < factors; f++) {
                if (to->scale) ((uint16_t *)to->scale)[(block * factors + f) * PANEL + lane] = own.scales[f];
                for (int g = 0; g < steps && to->steps; g++)
                    ((int8_t *)to->steps)[((block * steps + g) * factors + f) * PANEL + lane] = own.steps[g][f];
            }
        }
}

static void pack_panel(const Packing *p, int index) {
    const Matrix *m = p->to;
    int n = m->inputs, bf16 = p->from == BF16;
    size_t panel = (size_t)(p->first + index * p->step), size = panel * PANEL * (size_t)n;
    size_t row_bytes = p->from == INT4 ? (size_t)n / GROUP * (GROUP / 2 + 4) : (size_t)n * (bf16 ? 2 : 4);
    if (m->kind == STORED) row_bytes = (size_t)(n / BLOCKS[p->from - Q4_0].inputs * BLOCKS[p->from - Q4_0].bytes);
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
    case BF16:
        if (m->high)
            pack_coded(&rows, n, (int64_t)size, (uint8_t *)m->high + 16 * panel, (uint8_t *)m->weight + panel * coded_bytes(m), p->found);
        else pack_as_they_are(&rows, n / 2, (uint32_t *)m->weight + size / 2);
        break;
    case INT8:
        if (bf16) pack_int8(&rows, n, 1, (uint32_t *)m->weight + size / 4, scale);
        else pack_int8(&rows, n, 0, (uint32_t *)m->weight + size / 4, scale);
        break;
    case INT4:
        if (p->from == INT4) pack_stored_int4(&rows, n, (uint32_t *)m->weight + size / 8, factors);
        else if (bf16) pack_int4(&rows, n, 1, (uint32_t *)m->weight + size / 8, factors);
        else pack_int4(&rows, n, 0, (uint32_t *)m->weight + size / 8, factors);
        break;
    case STORED: pack_blocks((const StoredPanel *)m->weight + panel, &rows, n, p->from);
    }
}

static void pack_panels(void *packing) {
    Packing *p = packing;
    int panels = (p->rows + PANEL - 1) / PANEL;
    for (int index; (index = atomic_fetch_add_explicit(&p->taken, 1, memory_order_relaxed)) < panels;) pack_panel(p, index);
}

/* Packs a weight into panels first, first + step, ... FP32 and BF16 matrices take only weights of their precision. `found`: of
 * bf16 in 12 bits, see list_exception. */
void layerskip_pack(
    const Matrix *to, const void *weight, int from, int rows, int first, int step, int64_t *found, int threads
) {
    Packing packing = {.to = to, .weight = weight, .from = from, .rows = rows, .first = first, .step = step, .found = found};
    if (threads > 1 && parallel) parallel(pack_panels, &packing, (unsigned)threads, 0);
    else pack_panels(&packing);
}

/* All panels of a matrix in 12 bits, in bf16. */
void layerskip_decode(const Matrix *m, int panels, char *out) {
    size_t bytes = (size_t)m->inputs * PANEL * 2;
    for (int p = 0; p < panels; p++, out += bytes) decode(m, p, 0, m->inputs / 2, m->exceptions + m->starts[p], out, 0);
}
