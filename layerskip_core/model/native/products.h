/* Products of panels by a few rows, with sums in registers.
 *
 * CPUs with many registers multiply whole panels, several at once if there are few rows. Others multiply halves of a panel, so
 * that each loaded weight serves more rows; halves alternate in steps of some weights, which stay in the cache. All take weights in
 * 12 bits in such steps, where there are more rows than registers hold sums of.
 */
#define UNIT 128     /* bytes of a panel that are read at once, a vector for each half */
#define STEP 64      /* most units of a step by halves */
#define LEAST_TURN 4 /* least rows of a turn, where whole panels take several; the last may have fewer */
#define MOST_TURN 8
#define LOW_BIT_TURN 5 /* most rows of a turn by low-bit weights, whose sums of groups need registers too */
/* Most rows that share a weight of STORED: each has a sum of a group by plane. */
#define STORED_TILE (WHOLE_TILE == TILE ? 4 : PLANES == 2 ? 3 : LOW_BIT_TILE)
#define SYSTEM_PAGE 4096
#define TILES 4 /* most tiles of rows that a step is multiplied by in turn */

#include "coded.h"
#include "tiles.h"

typedef float Product[MOST_ROWS][PANEL]; /* of a panel, (row, output) */

/* Operands of a product: units from..to-1 of P neighbouring panels (H = 2), or of half a panel (H = 1), by R rows. P, H and R
 * are compile-time constants. */
typedef struct {
    const char *weight;
    const uint16_t *scale; /* of int4, and of a stored panel */
    const int8_t *steps;   /* of a stored panel */
    const StoredPanel *stored;
    const Matrix *matrix; /* of bf16 in 12 bits, and the first panel; else NULL */
    int panel;
    const char *x;
    size_t stride; /* bytes from row to row */
    float *out;    /* in the panel's Product; sums continue from it if `from` is not 0 */
    int inputs, units, from, to;
    const char *next; /* weights of a later step, or NULL */
    size_t share;     /* bytes of them to prefetch with each unit */
} Operands;

typedef vf Sums[TILE][MOST_PANELS][2];

#define EACH(i, n) _Pragma("GCC unroll 12") for (int i = 0; i < n; i++) /* n is constant, and sums stand in registers */
#define EACH_SUM EACH(r, R) EACH(p, P) EACH(h, H)

INLINE float *place_of(const Operands *o, int r, int p, int h) { return o->out + (p * MOST_ROWS + r) * PANEL + 16 * h; }

INLINE void take_sums(Sums sums, const Operands *o, const int R, const int P, const int H) {
    EACH_SUM sums[r][p][h] = f_set(0);
    if (o->from) EACH_SUM sums[r][p][h] = f_load(place_of(o, r, p, h));
}

INLINE void put_sums(Sums sums, const Operands *o, const int R, const int P, const int H) {
    EACH_SUM f_store(place_of(o, r, p, h), sums[r][p][h]);
}

INLINE const char *weights_of(const Operands *o, int p, int unit) { return o->weight + (size_t)(p * o->units + unit) * UNIT; }

/* Prefetches weights: those at `next` or, where that is NULL, those of the page after, into which CPUs do not prefetch by
 * themselves. */
INLINE void fetch(const Operands *o, int p, int unit, const int R, const int H) {
    size_t at = (size_t)(p * o->units + unit) * o->share;
    if (H == 1) {
        fetch_line(o->next + at);
    } else if (R > 1 && o->next) {
        fetch_line_later(o->next + at);
        if (o->share > 64) fetch_line_later(o->next + at + 64);
    } else {
        const char *after = weights_of(o, p, unit) + SYSTEM_PAGE;
        fetch_line_later(after), fetch_line_later(after + 64);
    }
}

INLINE void panels_fp32(const Operands *o, const int R, const int P, const int H) {
    Sums acc;
    take_sums(acc, o, R, P, H);
    for (int k = o->from; k < o->to; k++)
        EACH(p, P) {
            const char *w = weights_of(o, p, k);
            fetch(o, p, k, R, H);
            vf weight[2];
            EACH(h, H) weight[h] = f_load((const float *)(w + 64 * h));
            EACH(r, R) {
                vf value = f_set(((const float *)(o->x + r * o->stride))[k]);
                EACH(h, H) acc[r][p][h] = f_add_product(acc[r][p][h], value, weight[h]);
            }
        }
    put_sums(acc, o, R, P, H);
}

/* Adds the products of a panel's unit, two inputs, to its sums. */
INLINE void add_pair(Sums acc, const Operands *o, const char *w, int pair, int p, const int R, const int H) {
    EACH(part, BF16_PARTS) {
        Bf16 weight[2];
        EACH(h, H) weight[h] = bf16_part(i_load(w + 64 * h), part);
        EACH(r, R) {
            Bf16 value = bf16_value((const RowBf16 *)(o->x + r * o->stride) + 2 * pair, part);
            EACH(h, H) acc[r][p][h] = dot_bf16(acc[r][p][h], weight[h], value);
        }
    }
}

INLINE void panels_bf16(const Operands *o, const int R, const int P, const int H) {
    Sums acc;
    take_sums(acc, o, R, P, H);
    for (int pair = o->from; pair < o->to; pair++)
        EACH(p, P) {
            fetch(o, p, pair, R, H);
            add_pair(acc, o, weights_of(o, p, pair), pair, p, R, H);
        }
    put_sums(acc, o, R, P, H);
}

/* Whole panels of bf16 in 12 bits. The few units decoded at a time are read back from the CPU's queue of stores; exceptions are
 * written between. */
INLINE void panels_coded(const Operands *o, const int R, const int P) {
    _Alignas(64) char decoded[MOST_PANELS][CODED_UNITS * UNIT];
    const int64_t *exceptions[MOST_PANELS];
    Sums acc;
    EACH(p, P) exceptions[p] = o->matrix->exceptions + o->matrix->starts[o->panel + p];
    take_sums(acc, o, R, P, 2);
    for (int pair = 0; pair < o->to; pair += CODED_UNITS) {
        EACH(p, P) exceptions[p] = decode(o->matrix, o->panel + p, pair, pair + CODED_UNITS, exceptions[p], decoded[p], 0);
        EACH(u, CODED_UNITS) EACH(p, P) add_pair(acc, o, decoded[p] + u * UNIT, pair + u, p, R, 2);
    }
    put_sums(acc, o, R, P, 2);
}

/* Levels are stored plus 128, because x86 multiplies unsigned by signed; a group's sum starts with the correction for the
 * LEVEL_OFFSET that is left. The caller multiplies the sums by the scales. */
INLINE void panels_int8(const Operands *o, const int R, const int P, const int H) {
    enum { UNITS = GROUP / 4 };
    const char *factors = o->x + sizeof(RowInt8) * (size_t)o->inputs;
    int groups = o->inputs / GROUP;
    Sums acc;
    take_sums(acc, o, R, P, H);
    for (int g = o->from / UNITS; g < o->to / UNITS; g++) {
        vi sum[TILE][MOST_PANELS][2];
        EACH_SUM sum[r][p][h] = i_set(four_bytes(factors + r * o->stride + 4 * (groups + g)));
        for (int quad = g * UNITS; quad < (g + 1) * UNITS; quad++)
            EACH(p, P) {
                const char *w = weights_of(o, p, quad);
                fetch(o, p, quad, R, H);
                EACH(part, INT8_PARTS) {
                    vi weight[2];
                    EACH(h, H) weight[h] = int8_part(i_load(w + 64 * h), part);
                    EACH(r, R) {
                        vi value = int8_value((const RowInt8 *)(o->x + r * o->stride) + 4 * quad, part);
                        EACH(h, H) sum[r][p][h] = dot_int8(sum[r][p][h], weight[h], value);
                    }
                }
            }
        EACH(r, R) {
            vf factor = f_set(((const float *)(factors + r * o->stride))[g]);
            EACH(p, P)
                EACH(h, H) acc[r][p][h] = f_fma(f_of_int(sum[r][p][h]), factor, acc[r][p][h]);
        }
    }
    put_sums(acc, o, R, P, H);
}

/* A byte holds the level of input i in its low half and of input i + 16 of the group in its high half. */
INLINE void panels_int4(const Operands *o, const int R, const int P, const int H) {
    enum { UNITS = GROUP / 8 };
    int groups = o->inputs / GROUP;
    Sums acc;
    take_sums(acc, o, R, P, H);
    for (int g = o->from / UNITS; g < o->to / UNITS; g++) {
        vi sum[TILE][MOST_PANELS][2];
        EACH_SUM sum[r][p][h] = i_set(0);
        for (int unit = g * UNITS; unit < (g + 1) * UNITS; unit++)
            EACH(p, P) {
                const char *w = weights_of(o, p, unit);
                fetch(o, p, unit, R, H);
                EACH(high, 2) {
                    vi levels[2];
                    EACH(h, H) levels[h] = high ? i_high(i_load(w + 64 * h)) : i_low(i_load(w + 64 * h));
                    EACH(r, R) {
                        const char *quad = o->x + r * o->stride + g * GROUP + 4 * (unit - g * UNITS) + GROUP / 2 * high;
                        vi value = int4_value((const int8_t *)quad);
                        EACH(h, H) sum[r][p][h] = dot_int4(sum[r][p][h], levels[h], value);
                    }
                }
            }
        EACH(r, R) {
            const float *factors = (const float *)(o->x + r * o->stride + o->inputs);
            vf factor = f_set(factors[g]), whole = f_set(factors[groups + g]);
            EACH(p, P)
                EACH(h, H) {
                    const uint16_t *own = o->scale + (size_t)(p * groups + g) * 2 * PANEL + 16 * h;
                    vf product = f_of_int(int4_sum(sum[r][p][h]));
                    acc[r][p][h] = f_fma(product, f_mul(f_load_bf16(own), factor), acc[r][p][h]);
                    acc[r][p][h] = f_fma(f_load_bf16(own + PANEL), whole, acc[r][p][h]);
                }
        }
    }
    put_sums(acc, o, R, P, H);
}

/* Four levels of a group, a quad, for each output. A unit has two quads, in the low and the high halves of its bytes. After
 * four units, one more holds the fifth bits of all quads, or two more hold the upper two bits of four quads each. */
INLINE vi quads_of(const char *group, int quad, const int bits) {
    if (bits == 8) return i_load(group + quad * UNIT);
    vi halves = i_load(group + quad / 2 * UNIT), low = quad % 2 ? i_high(halves) : i_low(halves);
    if (bits == 5) return i_or(low, i_bits_of(i_load(group + 4 * UNIT), 4 - quad, 16));
    if (bits == 6) return i_or(low, i_bits_of(i_load(group + (4 + quad / 4) * UNIT), 4 - quad % 4 * 2, 48));
    return low;
}

/* The scale of a span of inputs, or their minimum, for a stored panel's outputs. */
INLINE vf factor_of(const Operands *o, const int spans, int span, int h, int is_minimum) {
    size_t factors = o->stored->offset ? PANEL : 2 * PANEL, at = 16 * (size_t)h + (size_t)is_minimum * PANEL;
    if (!o->steps || o->stored->offset < 0) return f_load_fp16(o->scale + (size_t)span * factors + at);
    vf scale = f_load_fp16(o->scale + (size_t)(span / spans / 8) * factors + at);
    return f_mul(scale, f_load_int8(o->steps + (size_t)span * factors + at));
}

/* A row level has two bytes, or 16 bits. A sum over the inputs of a step is exact up to six bits, and rounded once with eight, so
 * results do not depend on how many dots are added at once. */
INLINE void panel_stored(const Operands *o, const int bits, const int by_table, const int R, const int H) {
    static const int8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; /* twice MXFP4's levels, plus 12 */
    const int spans = bits == 6 ? 2 : 1, quads = GROUP / 4 / spans;
    Sums acc;
    take_sums(acc, o, R, 1, H);
    for (int g = o->from / bits; g < o->to / bits; g++)
        EACH(span, spans) {
            vi dots[TILE][2][PLANES];
            EACH(r, R) EACH(h, H) EACH(plane, PLANES) dots[r][h][plane] = i_set(0);
            EACH(within, quads) {
                const int quad = span * quads + within;
                if (quad < bits) fetch(o, 0, g * bits + quad, R, H);
                vi levels[2];
                EACH(h, H) {
                    const char *group = weights_of(o, 0, g * bits) + 64 * h;
                    levels[h] = by_table ? i_lookup(table, i_load(group + quad / 2 * UNIT), quad % 2) : quads_of(group, quad, bits);
                }
                EACH(part, INT8_PARTS) {
                    vi weight[2];
                    EACH(h, H) weight[h] = bits == 8 ? int8_part(levels[h], part) : low_bit_part(levels[h], part);
                    EACH(r, R)
                        EACH(plane, PLANES) {
                            const RowInt8 *row = (const RowInt8 *)(o->x + r * o->stride) + plane * o->inputs;
                            vi value = int8_value(row + GROUP * g + 4 * quad, part);
                            EACH(h, H) {
                                vi sum = dots[r][h][plane];
                                dots[r][h][plane] = bits == 8 ? dot_int8(sum, weight[h], value) : dot_low_bit(sum, weight[h], value);
                            }
                        }
                }
            }
            EACH(h, H) {
                const int offset = bits == 8 ? LEVEL_OFFSET : o->stored->offset, place = g * spans + span;
                const int8_t *step = o->steps + (size_t)place * PANEL + 16 * h; /* of MXFP4 and Q4_Z */
                vf scale = by_table ? f_power_of_two(i_load_int8(step)) : factor_of(o, spans, place, h, 0);
                vf minimum = f_set(0);
                if (bits == 4 && offset < 0) minimum = f_sub(minimum, f_mul(scale, f_load_int8(step)));
                else if (bits <= 5 && !offset) minimum = factor_of(o, spans, place, h, 1);
                EACH(r, R) {
                    const RowInt8 *row = (const RowInt8 *)(o->x + r * o->stride);
                    const float *factors = (const float *)(row + PLANES * o->inputs) + 4 * g;
                    vf sum = f_of_planes(dots[r][h]);
                    float whole = factors[spans == 1 ? 3 : 1 + span];
                    if (bits > 5 || offset > 0) {
                        vf product = f_fma(sum, f_set(factors[0]), f_set((float)-offset * whole));
                        acc[r][0][h] = f_fma(scale, product, acc[r][0][h]);
                    } else {
                        acc[r][0][h] = f_fma(sum, f_mul(scale, f_set(factors[0])), acc[r][0][h]);
                        acc[r][0][h] = f_fma(minimum, f_set(whole), acc[r][0][h]);
                    }
                }
            }
        }
    put_sums(acc, o, R, 1, H);
}

INLINE void panel_of_bits(const Operands *o, const int R, const int H) {
    switch (o->stored->scale ? o->stored->bits : 0) {
    case 0: panel_stored(o, 4, 1, R, H); break;
    case 4: panel_stored(o, 4, 0, R, H); break;
    case 5: panel_stored(o, 5, 0, R, H); break;
    case 6: panel_stored(o, 6, 0, R, H); break;
    case 8: panel_stored(o, 8, 0, R, H);
    }
}

INLINE int is_low_bit(int kind) { return kind == INT8 || kind == INT4 || kind == STORED; }

/* How many whole panels are multiplied together: the few sums of one would wait for each other, and each value of a row is read
 * once for all panels. Low-bit weights need registers for sums of groups too. */
INLINE int panels_at_once(int kind, int rows) {
    int sums = is_low_bit(kind) ? SUMS / 2 : SUMS;
    return kind == STORED ? 1 : rows == 1 ? MOST_PANELS : 4 * rows <= sums ? 2 : 1;
}

INLINE void panels_by_rows(int kind, const Operands *o, const int R, const int P, const int H) {
    switch (is_low_bit(kind) && (R > LOW_BIT_TILE || P > panels_at_once(INT8, R)) ? -1 : kind) {
    case FP32: panels_fp32(o, R, P, H); break;
    case WIDENED:
    case BF16:
        if (H == 2 && o->matrix) panels_coded(o, R, P);
        else panels_bf16(o, R, P, H);
        break;
    case INT8: panels_int8(o, R, P, H); break;
    case INT4: panels_int4(o, R, P, H); break;
    case STORED:
        if (R <= STORED_TILE && P == 1 && (WHOLE_TILE == TILE || R == 1 || H == 1)) panel_of_bits(o, R, H);
    }
}

/* A whole panel by the rows x. */
INLINE Operands operands_of(const Matrix *m, int panel, const char *x, size_t stride, Product *out) {
    int n = m->inputs, units = n / (m->kind == FP32 ? 1 : m->kind == INT8 ? 4 : m->kind == INT4 ? 8 : 2);
    if (m->kind == STORED) {
        const StoredPanel *own = (const StoredPanel *)m->weight + panel;
        units = n / GROUP * own->bits;
        return (Operands){
            .weight = own->weight, .scale = own->scale, .steps = own->steps, .stored = own,
            .x = x, .stride = stride, .out = out[0][0], .inputs = n, .units = units, .to = units,
        };
    }
    return (Operands){
        .weight = (const char *)m->weight + (size_t)panel * (size_t)units * UNIT,
        .scale = (const uint16_t *)m->scale + (size_t)panel * (size_t)(n / GROUP) * 2 * PANEL, .matrix = m->high ? m : NULL, .panel = panel,
        .x = x, .stride = stride, .out = out[0][0], .inputs = n, .units = units, .to = units,
    };
}

/* `count` panels by R rows, with sums in registers. Each of `turns`, which have other rows, prefetches a part of the next panels,
 * so that memory is read while all of them compute. */
INLINE void whole_panels(
    const Matrix *m, int panel, int count, const char *x, size_t stride, const int R, int turn, int turns, Product *out
) {
    for (int p = 0, few; p < count; p += few) {
        Operands o = operands_of(m, panel + p, x, stride, out + p);
        if (turns > 1) {
            size_t bytes = (size_t)o.units * UNIT;
            o.next = o.weight + (size_t)(count - p) * bytes + (size_t)(turn * count + p) * (bytes / (size_t)turns);
            o.share = UNIT / (size_t)turns;
        }
        few = 1;
        int most = panels_at_once(m->kind, R);
        if (R == 1 && MOST_PANELS == 4 && most == 4 && count - p >= 4) few = 4, panels_by_rows(m->kind, &o, R, 4, 2);
        else if (4 * R <= SUMS && most >= 2 && count - p >= 2) few = 2, panels_by_rows(m->kind, &o, R, 2, 2);
        else panels_by_rows(m->kind, &o, R, 1, 2);
    }
}

enum { DECODED = BF16_PARTS == 1 ? BF16 : FP32 }; /* the kind of weights that were decoded in parts */

/* A step of half a panel; with many registers, of a whole panel in 12 bits. */
static void step_by_rows(int kind, const Operands *o, int rows) {
    const int is_half = WHOLE_TILE < TILE;
    switch (rows) {
#define ROWS(R) case R: \
        if (is_half && (R > WIDENED_TILE || kind == STORED)) panels_by_rows(kind, o, R, 1, 1); \
        if (!is_half && !TILED_ROWS && R >= LEAST_TURN) panels_by_rows(DECODED, o, R, 1, 2); \
        break;
    EACH_ROWS
#undef ROWS
    }
}

INLINE int tile_of(const Matrix *m) { return m->kind == STORED ? STORED_TILE : is_low_bit(m->kind) ? LOW_BIT_TILE : TILE; }
INLINE int whole_tile_of(const Matrix *m) {
    return m->kind == FP32 ? WHOLE_TILE : m->kind == STORED && WHOLE_TILE < TILE ? 1 : WIDENED_TILE;
}

/* A panel by up to TILES tiles of rows. Each tile and half of a step prefetches a part of the next step's weights. A step of
 * weights in 12 bits is decoded once for all rows, to a buffer in the L1 cache. */
static void panel_in_steps(const Matrix *m, int panel, const char *x, size_t stride, int rows, Product *out) {
    const int halves = WHOLE_TILE < TILE ? 2 : 1;
    Operands all = operands_of(m, panel, x, stride, out);
    int tiles = (rows + tile_of(m) - 1) / tile_of(m), turns = halves * tiles;
    int steps = (all.units + STEP - 1) / STEP, group = m->kind == STORED ? all.stored->bits : 8; /* units: one group, or two */
    int few = ((all.units + steps - 1) / steps + group - 1) / group * group;
    _Alignas(64) char decoded[STEP * BF16_PARTS * UNIT];
    const int64_t *exceptions = m->high ? m->exceptions + m->starts[panel] : NULL;
    int parts = m->high ? BF16_PARTS : 1, kind = m->high ? DECODED : m->kind;
    size_t unit = m->high ? CODED_BYTES / CODED_UNITS / BF16_PARTS : UNIT;
    all.share = (unit + (size_t)turns - 1) / (size_t)turns;
    for (int from = 0, to; from < all.units; from = to) {
        to = all.units - from < few ? all.units : from + few;
        all.from = from * parts, all.to = to * parts;
        const char *next = all.weight + (size_t)to * UNIT;
        if (m->high) {
            exceptions = decode(m, panel, from, to, exceptions, decoded, 1);
            next = (const char *)m->weight + (size_t)panel * coded_bytes(m) + coded_at(to);
            all.weight = decoded - (size_t)all.from * UNIT, all.matrix = NULL;
        }
        all.next = next - (size_t)all.from * all.share; /* rebased to unit 0 */
        for (int turn = 0; turn < turns; turn++) {
            Operands o = all;
            int half = turn % halves, first = share(rows, turn / halves, tiles), last = share(rows, turn / halves + 1, tiles);
            o.weight += 64 * half, o.scale += 16 * half, o.steps += o.steps ? 16 * half : 0;
            o.next += (size_t)(turn * (o.to - o.from)) * o.share;
            o.x += (size_t)first * stride, o.out = out[0][first] + 16 * half;
            step_by_rows(kind, &o, last - first);
        }
    }
}

/* Rows in one call of panel_rows: parts of about the same size; of many rows, as many as pairs of whole panels take; with AMX,
 * whole tiles. */
static int rows_at_once(const Matrix *m, int rows) {
    if (in_tiles(m)) return TILED_ROWS;
    int most = tile_of(m) * (WHOLE_TILE < TILE || m->high ? TILES : 1);
    if (rows <= most) return most;
    if (WHOLE_TILE == TILE && m->kind != STORED && !m->high)
        most = is_low_bit(m->kind) ? LOW_BIT_TURN : rows > 2 * MOST_TURN ? SUMS / 4 : MOST_TURN;
    int parts = (rows + most - 1) / most;
    return (rows + parts - 1) / parts;
}

/* `count` <= MOST_PANELS neighbouring panels. */
static void panel_rows(
    const Matrix *m, int panel, int count, const char *x, size_t stride, int rows, int turn, int turns, Product *out
) {
    if (in_tiles(m) || rows > whole_tile_of(m)) {
        for (int p = 0; p < count; p++)
            if (in_tiles(m)) panel_in_tiles(m, panel + p, x, stride, rows, out[p]);
            else panel_in_steps(m, panel + p, x, stride, rows, out + p);
    } else {
        switch (rows) {
#define ROWS(R) case R: if (R <= WHOLE_TILE) whole_panels(m, panel, count, x, stride, R, turn, turns, out); break;
        EACH_ROWS
#undef ROWS
        }
    }
    const float *scale = m->kind == INT8 ? (const float *)m->scale + panel * PANEL : NULL;
    const float *bias = m->bias ? m->bias + panel * PANEL : NULL;
    if (!scale && !bias) return;
    for (int p = 0; p < count; p++)
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < PANEL; i += 16) {
                vf sum = f_load(out[p][r] + i);
                if (scale) sum = f_mul(sum, f_load(scale + p * PANEL + i));
                if (bias) sum = f_add(sum, f_load(bias + p * PANEL + i));
                f_store(out[p][r] + i, sum);
            }
}
