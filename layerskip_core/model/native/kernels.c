/* Decoder layers and the LM head: one call runs all layers of a span over some tokens. What an architecture leaves out is a
 * NULL pointer, a 0 or a scale of 1.
 *
 * The kernels are batch-invariant: every sum is taken in the same order for one row as for many, so a token gets the same bits
 * drafted alone or verified in a batch. Hidden states, queries and sums are fp32.
 *
 * Weights (outputs, inputs) are stored in panels of 32 outputs that are read from front to end; pack.c packs them. Threads
 * come from the OpenMP runtime that torch uses, because two pools would compete for the cores. They divide the panels of a
 * matrix and the heads of attention and wait at barriers: see threads.h.
 */
#include "lanes.h"
#include <math.h>
#include <stdatomic.h>
#include <stddef.h>

#define PANEL 32
#define GROUP 32 /* inputs that share a scale */

typedef struct Recurrence Recurrence; /* see recurrence.h */
typedef struct Shape Shape;

/* WIDENED: bf16 weights that multiply fp32 rows, where bf16 is widened anyway. STORED: levels as a GGUF file has them. */
enum { FP32, BF16, INT8, INT4, WIDENED, STORED };

typedef struct {
    int32_t kind, inputs, outputs, panels;
    const void *weight; /* STORED: a StoredPanel for each panel */
    const void *scale;  /* int8: fp32 by output; int4: bf16 scales and zeros, (panel, group, 2, output) */
    const float *bias; /* by output, or NULL */
    const int8_t *high; /* of bf16 weights in 12 bits, see decode; else NULL */
    const int64_t *exceptions;
    const int32_t *starts; /* by panel, its first exception */
    char *room; /* where tiles leave decoded panels, from panel 0 on; NULL: nowhere */
} Matrix;

/* A panel of weights (level - offset) * scale + minimum, exactly as in the GGUF file. In K types a group's scale or minimum is
 * its step times the `scale` of 256 inputs. In MXFP4, without scales, levels index a table (see panel_stored) and a group's
 * step is the exponent of a power of two. In Q4_Z a group's step is the offset of its levels. Layout:
 *     weight (group, bits, output, 4 bytes): below 8 bits the low four bits come first, see quads_of
 *     scale (group or 256 inputs, 1 or 2 with minimum, output)
 *     steps (group, or half a group with 6 bits; 1 or 2, output)
 */
typedef struct {
    const char *weight;
    const uint16_t *scale; /* fp16; NULL for MXFP4 */
    const int8_t *steps;   /* or NULL */
    int32_t bits, offset;  /* of levels; 0 where there are minima, -1 where the steps are offsets */
} StoredPanel;

typedef struct {
    const float *weight; /* NULL: no norm */
    const float *bias;   /* of a LayerNorm, or NULL */
} Norm;

typedef struct {
    Matrix qkv, output, up, down; /* up: panels of gate and up alternate where the MLP is gated; see experts.h for experts. A
                                   * matrix that the layer lacks has no panels */
    const float *router;          /* (expert, hidden), then the gate of shared experts if any; NULL: the layer has an MLP */
    Norm before_attention, after_attention, before_mlp, after_mlp;
    Norm embedding;       /* of a drafter's layer, see enter; else no norm */
    Norm query, key;      /* by dimension of a head, or of all heads where Shape.norms_projections */
    int32_t rope, window; /* rope: index of Call.cos and Call.sin, -1 for none; window: positions seen, 0 for all */
    float bends[2];       /* XIELU: factors of positive and of negative inputs; CLAMPED: see gated */
    Norm value;           /* as `key` */
    int64_t keys;         /* where the keys that it reads begin in a page: its own, or another layer's */
    int32_t shares;       /* it reads another layer's keys and values */
    int32_t slice;        /* its slice of TokenInputs, if there are any */
    float scale;          /* of its output, where a norm follows the last block */
    Matrix token_gate, token_output;
    Norm after_token;
    const Shape *shape;   /* of its attention, where layers differ; else NULL */
    const Recurrence *recurrence; /* in place of attention, with its own layout of qkv's row; else NULL */
    const float *steps;   /* (2, head, hidden): projections of its steps and decays; NULL for none */
    const float *router_bias; /* by expert; or NULL */
    const float *sinks;   /* by query head: an extra score without a value (attention sink); or NULL */
} Layer;

enum { SILU, GELU_TANH, GELU, RELU, RELU_SQUARED, XIELU, CLAMPED }; /* activations */

struct Shape {
    int32_t hidden, heads, kv_heads, head_dim, rotary, inner; /* rotary: dimensions of a head that rotate */
    int32_t bf16_cache, activation, gated, norms_projections;
    int32_t experts, chosen, normalised; /* number of experts; of those that run for a row; whether routed weights sum to 1 */
    int32_t shared, gates_shared; /* shared experts among `chosen`, which run for all rows; whether a router logit gates them */
    int32_t norms_rotated; /* queries and keys are normed after their rotation */
    int32_t parallel;      /* the MLP reads what the attention reads */
    int32_t norms_residual; /* of a drafter's layer, see enter */
    int32_t gates_attention; /* qkv has a gate of each query's output, after the values */
    float eps, attention_scale, score_cap; /* score_cap: 0 for none */
    float embedding_scale, residual_scale;
};

/* Per-layer inputs of a token, `width` numbers for each layer: the normed product of `model` and the embedding, plus a row of a
 * table. The norm's weights include the product's share of the sum. */
typedef struct {
    Matrix model; /* (slices * width, hidden) */
    Norm norm;
    const void *embedding, *table; /* as a Draft's; (token, slices * width), bf16 or fp32 */
    int32_t width, bf16_table;
    float eps, table_scale; /* eps: on the scale of the product */
} TokenInputs;

/* Which experts the rows of a call chose. Each choice has a slot; slots are in the order of experts, then of rows. */
typedef struct {
    float *logits, *weights;          /* (row, expert); (row, choice) */
    int32_t *chosen, *slots;          /* (row, choice): the expert, and the slot */
    int32_t *rows;                    /* by slot */
    int32_t *experts, *starts, *used; /* the chosen experts; their first slots, then the end; their number */
    float *products;                  /* (slot, hidden) */
} Routing;

typedef struct {
    const int64_t *positions; /* by row */
    int32_t rows;
    const float *cos[2], *sin[2];         /* by kind of layer: (position, rotary / 2) */
    char *const *pages;       /* (text, page); a page is (layer with keys, key or value, kv head, place, dimension) */
    const int64_t *page_rows; /* by row: its text */
    const int32_t *starts;    /* the first row of each sequence, whose rows are consecutive; then `rows` */
    int64_t row_pages;        /* pages of a text */
    char *const *states, *const *rings; /* as in Passage, by sequence */
    const int64_t *slots, *settled;
    int64_t slot_bytes;
    int32_t sequences;
    float *steps;             /* (row, 2, head) of layers with a recurrence */
    float *hidden, *qkv, *mixed, *inside; /* (row, ...): shared by the threads; hidden is changed in place */
    float *entries;                       /* (row, 2 * hidden): input of a drafter's layer, changed in place; else NULL */
    float *block;                         /* (row, hidden): a block's output before its norm; else NULL */
    Routing routing;
    const TokenInputs *inputs;            /* or NULL */
    const int64_t *tokens;                /* by row, for `inputs` */
    float *slices;                        /* (row, slices * width) */
    char *scratch;                        /* one part of scratch_bytes for each thread */
    int64_t scratch_bytes;
} Call;

typedef struct {
    const void *embedding;     /* (token, hidden), bf16 if the cache is */
    const float *learned;      /* (position, hidden), added to embeddings; NULL where positions are not learned */
    const int64_t *vocabulary; /* token id of each output of the head; NULL where they are equal */
    const int64_t *ends;       /* tokens that end a draft */
    const int32_t *order;      /* (layer_count): the indices of the layers that draft, in ascending order */
    const int32_t *stops;      /* (stop_count): how many of them run before states are kept, ascending; the last is the exit */
    float *probs;              /* (most): of each draft; NULL where not needed */
    int32_t layer_count, stop_count;
    int32_t end_count, most;   /* most: largest number of drafts */
    int32_t runs_last;         /* whether the layers before the exit run over the last draft too */
    int32_t power;             /* see doubt */
    float logits_scale;        /* factor of the head's logits, before the cap */
    float logits_cap;          /* 0 for none */
    float survival;            /* drafting ends when the estimated probability that all drafts are accepted is less; */
    float doubt;               /* a draft of probability p is accepted with 1 - doubt * (1 - p)^power */
    float *entry;              /* (2 * hidden), input of a drafter's layer: the second half is the feature, which is given for
                                * the first token, then the layer's output; NULL without such a layer */
    int64_t *tokens;           /* (1 + most): the first is given */
    float *states;             /* (stop_count, 1 + most, hidden) */
    float *beyond, *logits;    /* one hidden state, if layers follow the exit; logits of a pass */
    int32_t drafted;           /* number of drafts made */
    int32_t guesses, searched; /* most looked-up tokens in a pass; tokens of the text before tokens[0] */
    int32_t passes, starts[2]; /* number of passes; see Call */
    int32_t norms_output;      /* whether the head's norm is applied to the next feature */
    const Matrix *join;        /* MTP's projection from an entry to its layer's input; else NULL */
    Norm input_norms[2];       /* of both halves of an entry, before `join` */
    const uint64_t *keys;      /* (most): of the noise of each draft; NULL for greedy drafts */
    float temperature;         /* factor of the noise */
} Draft;

typedef struct {
    const void *embedding; /* as a Draft's */
    const int64_t *tokens; /* by row, to be embedded; NULL: hidden states are given */
    const int32_t *stops;  /* (stop_count): how many layers run before states are kept, ascending */
    float *states;         /* (stop_count, row, hidden) */
    float *logits;         /* (row, outputs) */
    int64_t *chosen;       /* by row: the output with the largest logit */
    const uint64_t *keys;  /* by row: of the noise that is added to logits; NULL for none */
    float *most;           /* (row): scratch, with keys */
    float temperature;     /* factor of the noise */
    int32_t stop_count;
} Choice;

#include "threads.h"

/* ---- rows in the form that a matrix's kernel reads: fp32, bf16 pairs, or int8 groups followed by their scales and by one
 * correction for each group: for int8 weights -LEVEL_OFFSET times its sum, for int4 its sum; for STORED see
 * form_stored_row ---- */

#define LARGEST 16256.0f /* largest level of a row for STORED weights */
#define LEAST 1e-30f     /* groups that are smaller are zeros */

/* Quantises a row of n numbers to 15 bits for STORED weights. Each group has a scale, and the sums of its first half, of its
 * second half and of all. Errors are 4e-5 of the numbers' size: outputs show no difference from fp32 rows. */
static void form_stored_row(const float *x, int n, RowInt8 *out) {
    float *factors = (float *)(out + PLANES * n);
    for (int g = 0; g < n / GROUP; g++, x += GROUP, out += GROUP, factors += 4) {
        vf half[2] = {f_load(x), f_load(x + 16)};
        float most = f_largest(f_max(f_abs(half[0]), f_abs(half[1]))), sums[2];
        vf inverse = f_set(most > LEAST ? LARGEST / most : 0);
        for (int h = 0; h < 2; h++) {
            vf levels = f_of_int(i_rounded(f_mul(half[h], inverse)));
            f_store_wide_levels(out + 16 * h, n, levels);
            sums[h] = f_sum(levels);
        }
        factors[0] = most / LARGEST, factors[1] = factors[0] * sums[0], factors[2] = factors[0] * sums[1];
        factors[3] = factors[0] * (sums[0] + sums[1]);
    }
}

/* Bytes of a row's levels for a low-bit matrix. */
INLINE size_t level_bytes(const Matrix *m) { return (m->kind == INT8 ? sizeof(RowInt8) : 1) * (size_t)m->inputs; }

static size_t form_bytes(const Matrix *m) {
    size_t n = (size_t)m->inputs, bytes = level_bytes(m) + n / GROUP * 8;
    if (m->kind == FP32 || m->kind == WIDENED) bytes = 4 * n;
    if (m->kind == BF16) bytes = sizeof(RowBf16) * n;
    if (m->kind == STORED) bytes = PLANES * sizeof(RowInt8) * n + n / GROUP * 16;
    return (bytes + 63) & ~(size_t)63;
}

static void quantize_row(const Matrix *m, const float *x, char *out) {
    int n = m->inputs;
    if (m->kind == FP32 || m->kind == WIDENED) {
        memcpy(out, x, 4 * (size_t)n);
    } else if (m->kind == BF16) {
        form_bf16((RowBf16 *)out, x, n);
    } else if (m->kind == STORED) {
        form_stored_row(x, n, (RowInt8 *)out);
    } else {
        float *scales = (float *)(out + level_bytes(m));
        float *sums = scales + n / GROUP;
        size_t group_bytes = level_bytes(m) / (size_t)n * GROUP;
        for (int g = 0; g < n / GROUP; g++, x += GROUP, out += group_bytes) {
            vf a = f_load(x), b = f_load(x + 16);
            float most = f_largest(f_max(f_abs(a), f_abs(b)));
            vf inverse = f_set(most > 0 ? 127 / most : 0);
            a = f_mul(a, inverse), b = f_mul(b, inverse);
            if (m->kind == INT8) f_store_levels((RowInt8 *)out, a), f_store_levels((RowInt8 *)out + 16, b);
            else f_store_int8((int8_t *)out, a), f_store_int8((int8_t *)out + 16, b);
            scales[g] = most / 127;
            float sum = f_sum(f_add(f_of_int(i_rounded(a)), f_of_int(i_rounded(b))));
            int32_t offset = (int32_t)(-LEVEL_OFFSET * sum);
            if (m->kind == INT8) memcpy(sums + g, &offset, 4);
            else sums[g] = scales[g] * sum;
        }
    }
}

/* Mean of n numbers, or of the squares of their distances from `center`. */
INLINE float mean(const float *x, int n, float center, int squared) {
    vf sum = f_set(0), c = f_set(center);
    float rest = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        vf d = f_sub(f_load(x + i), c);
        sum = squared ? f_fma(d, d, sum) : f_add(sum, d);
    }
    for (; i < n; i++) rest += squared ? (x[i] - center) * (x[i] - center) : x[i] - center;
    return (f_sum(sum) + rest) / (float)n;
}

/* RMSNorm of n numbers, or LayerNorm where there is a bias. */
static void normed(const float *x, const Norm *norm, int n, float eps, float *out) {
    const float *weight = norm->weight, *bias = norm->bias;
    int i = 0;
    if (bias) {
        float center = mean(x, n, 0, 0), factor = 1 / sqrtf(mean(x, n, center, 1) + eps);
        for (; i < n; i++) out[i] = (x[i] - center) * factor * weight[i] + bias[i];
        return;
    }
    float factor = 1 / sqrtf(mean(x, n, 0, 1) + eps);
    for (; i + 16 <= n; i += 16) f_store(out + i, f_mul(f_mul(f_load(x + i), f_set(factor)), f_load(weight + i)));
    for (; i < n; i++) out[i] = x[i] * factor * weight[i];
}

#include "products.h"

typedef struct {
    const Shape *shape;
    const Layer *layers;
    int count, keys_only; /* keys_only: layers only write keys and values of the given hidden states */
    const int32_t *order; /* the indices of the layers to run; NULL: 0..count-1 */
    Call *call;
    const Matrix *head; /* of `score` and `draft`, with its norm; else NULL */
    const Norm *head_norm;
    float *logits;
    Draft *draft;
    Choice *choice;
    int ended, finished; /* a draft: no more tokens; no more layers */
    Team team;
} Work;

enum { PUT, ADD, ACTIVATE, WEIGH }; /* what happens to a product */

/* GELU: x times the normal distribution function (Abramowitz and Stegun 7.1.26, within 1.5e-7). */
INLINE vf gelu(vf x) {
    vf size = f_abs(x), t = f_div(f_set(1), f_fma(f_set(0.3275911f * 0.70710678f), size, f_set(1)));
    vf p = f_fma(t, f_set(1.061405429f), f_set(-1.453152027f));
    p = f_fma(p, t, f_set(1.421413741f));
    p = f_fma(p, t, f_set(-0.284496736f));
    p = f_mul(t, f_fma(p, t, f_set(0.254829592f)));
    vf tail = f_mul(f_mul(f_set(0.5f), p), f_exp(f_mul(f_set(-0.5f), f_mul(x, x)))); /* beyond the size of x */
    return f_sub(f_max(f_set(0), x), f_mul(size, tail));
}

/* bends[0] * x^2 of a positive x, bends[1] * (e^x - 1 - x) of a negative one, plus x / 2. */
INLINE vf xielu(vf x, const float *bends) {
    vf above = f_max(f_set(0), x), below = f_min(f_set(0), x);
    vf curve = f_mul(f_set(bends[1]), f_sub(f_sub(f_exp(below), f_set(1)), below));
    return f_add(f_fma(f_mul(f_set(bends[0]), above), above, curve), f_mul(f_set(0.5f), x));
}

/* SiLU: x * logistic(x); GELU by tanh: x * logistic(2 sqrt(2/pi) (x + 0.044715 x^3)); or one of the others. */
INLINE vf activated(vf x, int activation, const float *bends) {
    vf inner = x, above = f_max(f_set(0), x);
    if (activation == GELU) return gelu(x);
    if (activation == RELU) return above;
    if (activation == RELU_SQUARED) return f_mul(above, above);
    if (activation == XIELU) return xielu(x, bends);
    if (activation == GELU_TANH) {
        vf cubic = f_mul(f_mul(x, x), f_mul(x, f_set(0.044715f)));
        inner = f_mul(f_set(1.5957691216f), f_add(x, cubic));
    }
    return f_div(x, f_add(f_set(1), f_exp(f_sub(f_set(0), inner))));
}

/* activated(gate) * up; CLAMPED: gate * logistic(bends[0] * gate) * (up + 1), gate at most bends[1], up within +-bends[1]. */
INLINE vf gated(vf gate, vf up, int activation, const float *bends) {
    if (activation != CLAMPED) return f_mul(activated(gate, activation, bends), up);
    vf most = f_set(bends[1]), least = f_set(-bends[1]); /* in this order NaN stays NaN on x86 too */
    gate = f_min(most, gate), up = f_max(least, f_min(most, up));
    return f_mul(f_mul(gate, logistic(f_mul(gate, f_set(bends[0])))), f_add(up, f_set(1)));
}

/* A product of rows (row, inputs), after a norm if there is one, to out (row, width): out = rows @ matrix (PUT), out +=
 * residual_scale * rows @ matrix (ADD), or, of `up` (ACTIVATE), out = gated(gate, up), or activated(up) without a gate, or
 * out = activated(rows @ matrix) * factors (WEIGH). */
typedef struct {
    const Matrix *matrix;
    const float *rows;
    const Norm *norm; /* NULL: none */
    int count;        /* of rows */
    float *out;
    int width, what;
    const Routing *routing; /* of matrices of experts, whose rows are slots; else NULL */
    const int32_t *picks;   /* (count): which of `rows` are multiplied; NULL: all */
    const float *bends; /* of the layer */
    const float *factors; /* (row, stride) */
    int stride;
} Multiplication;

/* A thread's part of Call.scratch. */
typedef struct {
    float *row;   /* one row, after its norm */
    char *formed; /* rows as a matrix reads them */
} Own;

INLINE Own own_room(const Work *work, int thread) {
    float *row = (float *)(work->call->scratch + thread * work->call->scratch_bytes);
    return (Own){row, (char *)(row + work->shape->hidden + 16)};
}

/* Converts rows first..first+count-1 to the form that the matrix reads. Each thread does so for itself, which is cheaper than a
 * barrier. */
static void form_rows(const Shape *s, const Multiplication *of, int first, int count, Own own) {
    const Matrix *m = of->matrix;
    for (int r = 0; r < count; r++) {
        int index = of->picks ? of->picks[first + r] : first + r;
        const float *row = of->rows + (size_t)index * (size_t)m->inputs;
        if (of->norm && of->norm->weight) normed(row, of->norm, m->inputs, s->eps, own.row), row = own.row;
        quantize_row(m, row, own.formed + (size_t)r * form_bytes(m));
    }
}

/* The panels of a matrix that the same rows multiply: all of them, or those of an expert. */
typedef struct {
    int panel, first, rows; /* the first panel; rows first..first+rows-1 */
} Group;

INLINE int groups_of(const Multiplication *of) { return of->routing ? *of->routing->used : 1; }

INLINE Group group_of(const Multiplication *of, int index) {
    const Routing *r = of->routing;
    if (!r) return (Group){0, 0, of->count};
    return (Group){r->experts[index] * of->matrix->panels, r->starts[index], r->starts[index + 1] - r->starts[index]};
}

/* A few converted rows, which a group's panels multiply one after the other. */
typedef struct {
    int base, panel, left; /* the group's first panel; the first to multiply; how many are left; gate and up count as one */
    int first, rows;
} Block;

INLINE void weigh(const float *x, const float *factors, int n, float *out) {
    for (int i = 0; i < n; i++) out[i] = x[i] * factors[i];
}

/* Multiplies panels from..to-1, or pairs of gate and up (`step` 2), by the `formed` rows of a block. */
static void multiply_panels(const Shape *s, const Multiplication *of, Block block, char *formed, int step, int from, int to) {
    const Matrix *m = of->matrix;
    int first = block.first, rows = block.rows;
    size_t stride = form_bytes(m);
    int most = rows_at_once(m, rows), shaped = 0;
    int together = in_tiles(m) ? 1 : panels_at_once(m->kind, rows < most ? rows : most) / step;
    if (together < 1) together = 1;
    Product product[MOST_PANELS];
    int turns = (rows + most - 1) / most;
    Matrix coded = *m, decoded = *m; /* of tiles in several turns, of which the first decodes */
    int decodes = m->high && in_tiles(m) && turns > 1;
    decoded.high = NULL;
    for (int p = from; p < to; p += together) {
        int units = to - p < together ? to - p : together;
        if (decodes) { /* behind the rows, see Buffers in layers.py */
            coded.room = formed + (size_t)rows * stride - (size_t)(block.base + p * step) * PANEL * 2 * (size_t)m->inputs;
            decoded.weight = coded.room;
        }
        for (int turn = 0; turn < turns; turn++) {
            if (decodes) m = turn ? &decoded : &coded;
            int row = turn * most, tile = rows - row < most ? rows - row : most;
            if (in_tiles(m) && tile != shaped) shape_tiles_for(shaped = tile);
            panel_rows(m, block.base + p * step, units * step, formed + (size_t)row * stride, stride, tile, turn, turns, product);
            for (int u = 0; u < units; u++) {
                int place = (p + u) * PANEL, live = of->width - place < PANEL ? of->width - place : PANEL;
                for (int r = 0; r < tile; r++) {
                    float *put = product[u * step][r], *out = of->out + (size_t)(first + row + r) * (size_t)of->width + place;
                    if (of->what >= ACTIVATE)
                        for (int i = 0; i < PANEL; i += 16) {
                            vf first = f_load(put + i), second = f_load(product[u * step + step - 1][r] + i);
                            f_store(put + i, step == 2 ? gated(first, second, s->activation, of->bends)
                                                       : activated(first, s->activation, of->bends));
                        }
                    if (of->what == ADD) for (int i = 0; i < live; i++) out[i] += s->residual_scale * put[i];
                    else if (of->what == WEIGH) weigh(put, of->factors + (size_t)(first + row + r) * (size_t)of->stride + place, live, out);
                    else memcpy(out, put, 4 * (size_t)live);
                }
            }
        }
    }
    if (shaped) release_tiles();
}

#define LONG_PRODUCT (1 << 20)  /* multiplications; a shorter product ends before stealing pays */
#define BLOCK_BYTES (192 << 10) /* of converted rows, which stay in a core's cache while panels pass */
#define LEAST_BLOCK 32          /* rows, enough to be compute-bound */

/* Rows of a product that are converted together: blocks of about the same size. */
static int rows_of_block(const Matrix *m, int rows) {
    int most = (int)((m->high && in_tiles(m) ? 4 : 1) * BLOCK_BYTES / form_bytes(m)); /* larger, where each block decodes the panels again */
    if (most < LEAST_BLOCK) most = LEAST_BLOCK;
    int blocks = (rows + most - 1) / most;
    return (rows + blocks - 1) / blocks;
}

/* The at-th unit of panels from..to-1, where groups follow one another with `each` panels, from panel `first` of a group on. A
 * unit is one panel by one block of rows. With at -1: a Block whose `left` is the number of units. */
static Block block_at(const Multiplication *of, int each, int first, int from, int to, int at) {
    int units = 0;
    for (int g = from / each; from < to && g * each < to; g++) {
        Group group = group_of(of, g);
        int start = g * each < from ? from - g * each : 0, stop = (g + 1) * each > to ? to - g * each : each;
        int panels = stop - start, rows = rows_of_block(of->matrix, group.rows), blocks = (group.rows + rows - 1) / rows;
        int here = at - units, row = here / panels * rows, panel = here % panels;
        units += panels * blocks;
        if (at < 0 || at >= units) continue;
        int live = group.rows - row < rows ? group.rows - row : rows;
        return (Block){group.panel, first + start + panel, panels - panel, group.first + row, live};
    }
    return (Block){.left = units};
}

/* This thread's part of a product, from panel `first` on; of a long product it then steals panels of other threads. */
static void multiply(Work *work, Multiplication of, int first, int thread, int threads) {
    const Shape *s = work->shape;
    const Matrix *m = of.matrix;
    Own own = own_room(work, thread);
    int step = of.what == ACTIVATE && s->gated ? 2 : 1, each = m->panels / step - first, count = each * groups_of(&of);
    int formed = -1; /* the first row of the block in own.formed */
    int helps = threads > 1 && threads <= MOST_TAKERS && (int64_t)m->inputs * m->outputs * of.count >= LONG_PRODUCT;
    unsigned phase = atomic_load_explicit(&work->team.phase, memory_order_relaxed);
    for (int i = 0; i < (helps ? threads : 1); i++) {
        int whose = (thread + i) % threads, from = share(count, whose, threads), to = share(count, whose + 1, threads);
        int all = block_at(&of, each, first, from, to, -1).left;
        int few = helps ? (of.count > TILE ? 2 : MOST_PANELS) / step : all;
        for (int at = 0; (at = helps ? steal(work->team.taken + whose, phase, few, all) : at) >= 0 && at < all;)
            for (int end = all - at < few ? all : at + few, units; at < end; at += units) {
                Block block = block_at(&of, each, first, from, to, at);
                units = end - at < block.left ? end - at : block.left;
                if (block.first != formed) form_rows(s, &of, block.first, block.rows, own), formed = block.first;
                multiply_panels(s, &of, block, own.formed, step, block.panel, block.panel + units);
            }
    }
}

/* ---- attention ---- */

#include "attention.h"

/* This thread's part of the norms over all queries of a row, and over all its keys. */
static void norm_projections(const Shape *s, const Layer *l, const Call *call, int keys_only, int thread, int threads) {
    int queries = s->heads * s->head_dim, keys = s->kv_heads * s->head_dim, width = l->qkv.outputs;
    for (int task = share(2 * call->rows, thread, threads); task < share(2 * call->rows, thread + 1, threads); task++) {
        float *row = call->qkv + (size_t)(task / 2) * (size_t)width;
        if (task % 2 == 0 && !keys_only) normed(row, &l->query, queries, s->eps, row);
        if (task % 2) normed(row + queries, &l->key, keys, s->eps, row + queries);
    }
}

/* ---- a span of layers, and the head ---- */

/* hidden += residual_scale * x (row, inputs) @ matrix; with a norm: (hidden + residual_scale * norm(x @ matrix)) * times. */
static void add_block(Work *work, const Matrix *m, const float *x, const Norm *after, float times, int thread, int threads) {
    const Shape *s = work->shape;
    const Call *call = work->call;
    int rows = call->rows, n = s->hidden, adds = !after->weight;
    Multiplication block = {m, x, NULL, rows, adds ? call->hidden : call->block, n, adds ? ADD : PUT};
    multiply(work, block, 0, thread, threads);
    barrier(&work->team, threads);
    if (adds) return;
    float scale = s->residual_scale, *row = own_room(work, thread).row;
    for (int r = share(rows, thread, threads); r < share(rows, thread + 1, threads); r++) {
        float *hidden = call->hidden + (size_t)r * (size_t)n;
        normed(call->block + (size_t)r * (size_t)n, after, n, s->eps, row);
        for (int i = 0; i < n; i++) hidden[i] = (hidden[i] + scale * row[i]) * times;
    }
    barrier(&work->team, threads);
}

#define FEW_ROWS 16

#include "experts.h"
#include "recurrence.h"

/* The input of a drafter's layer in the EAGLE-3 layout: an entry is an embedding and a feature. Both are normed, and the
 * feature is the residual, before its norm or after. */
static void enter(Work *work, const Layer *l, int thread, int threads) {
    const Shape *s = work->shape;
    const Call *call = work->call;
    size_t n = (size_t)s->hidden;
    for (int r = share(call->rows, thread, threads); r < share(call->rows, thread + 1, threads); r++) {
        float *entry = call->entries + 2 * n * (size_t)r, *feature = entry + n, *hidden = call->hidden + n * (size_t)r;
        if (!s->norms_residual) memcpy(hidden, feature, sizeof(float) * n);
        normed(entry, &l->embedding, s->hidden, s->eps, entry);
        normed(feature, &l->before_attention, s->hidden, s->eps, feature);
        if (s->norms_residual) memcpy(hidden, feature, sizeof(float) * n);
    }
    barrier(&work->team, threads);
}

/* A recurrence in place of attention, up to the input of the output projection. */
static void recall(Work *work, const Layer *l, int thread, int threads) {
    const Shape *s = work->shape;
    const Call *call = work->call;
    const Recurrence *r = l->recurrence;
    int n = s->hidden, outputs = 2 * r->heads, normed_row = -1;
    Multiplication inward = {&l->qkv, call->hidden, &l->before_attention, call->rows, call->qkv, r->width, PUT};
    multiply(work, inward, 0, thread, threads);
    int64_t tasks = l->steps ? (int64_t)call->rows * outputs : 0, end = share_of_many(tasks, thread + 1, threads);
    float *own = own_room(work, thread).row;
    for (int64_t task = share_of_many(tasks, thread, threads); task < end; task++) {
        int row = (int)(task / outputs);
        if (row != normed_row) normed(call->hidden + (size_t)row * (size_t)n, &l->before_attention, n, s->eps, own), normed_row = row;
        call->steps[task] = dot(own, l->steps + (size_t)(task % outputs) * (size_t)n, n);
    }
    barrier(&work->team, threads);
    Passage passage = {
        .positions = call->positions, .starts = call->starts, .states = call->states, .rings = call->rings, .slots = call->slots,
        .settled = call->settled, .slot_bytes = call->slot_bytes, .texts = call->sequences,
        .rows = call->qkv, .steps = call->steps, .out = call->mixed,
    };
    remember(r, &passage, &work->team, thread, threads);
}

/* Attention of a layer, up to the input of the output projection. */
static void attend_layer(Work *work, const Layer *l, int thread, int threads) {
    const Shape *s = l->shape ? l->shape : work->shape;
    const Call *call = work->call;
    int rows = call->rows, mixed = s->heads * s->head_dim;
    if (work->keys_only && l->shares) return;
    Multiplication qkv = {&l->qkv, call->hidden, &l->before_attention, rows, call->qkv, l->qkv.outputs, PUT};
    if (l->embedding.weight) enter(work, l, thread, threads), qkv.rows = call->entries, qkv.norm = NULL;
    multiply(work, qkv, work->keys_only ? mixed / PANEL : 0, thread, threads);
    barrier(&work->team, threads);
    if (s->norms_projections) {
        norm_projections(s, l, call, work->keys_only, thread, threads);
        barrier(&work->team, threads);
    }
    if (l->shares) {
    } else if (rows <= FEW_ROWS && !work->keys_only) {
        place_keys(s, l, call, 0, 1); /* by each thread: all write the same, which is cheaper than a barrier */
    } else {
        place_keys(s, l, call, thread, threads);
        barrier(&work->team, threads);
    }
    if (work->keys_only) return;
    mix_values(s, l, call, thread, threads);
    barrier(&work->team, threads);
}

/* The index-th layer of those to run. */
INLINE const Layer *layer_at(const Work *work, int index) { return work->layers + (work->order ? work->order[index] : index); }

/* Widens n numbers in bf16 or fp32, from index `first` on. */
static void widen(const void *numbers, int bf16, size_t first, int n, float *out) {
    if (!bf16) memcpy(out, (const float *)numbers + first, sizeof(float) * (size_t)n);
    for (int i = 0; bf16 && i < n; i++) {
        uint32_t bits = (uint32_t)((const uint16_t *)numbers)[first + (size_t)i] << 16;
        memcpy(out + i, &bits, 4);
    }
}

static void embed(const Shape *s, const void *embedding, int64_t token, float *out) {
    widen(embedding, s->bf16_cache, (size_t)token * (size_t)s->hidden, s->hidden, out);
    for (int i = 0; i < s->hidden; i++) out[i] *= s->embedding_scale;
}

/* Computes the token inputs of the layers to run. */
static void read_tokens(Work *work, int thread, int threads) {
    const Shape *s = work->shape;
    const Call *call = work->call;
    const TokenInputs *in = call->inputs;
    if (!in || work->keys_only) return;
    int n = s->hidden, low = layer_at(work, 0)->slice, high = low, width = in->width;
    for (int i = 1; i < work->count; i++) {
        int slice = layer_at(work, i)->slice;
        low = slice < low ? slice : low, high = slice > high ? slice : high;
    }
    for (int r = share(call->rows, thread, threads); r < share(call->rows, thread + 1, threads); r++)
        embed(s, in->embedding, call->tokens[r], call->block + (size_t)r * (size_t)n);
    barrier(&work->team, threads);
    Matrix model = in->model;
    model.panels = ((high + 1) * width + PANEL - 1) / PANEL;
    Multiplication projected = {&model, call->block, NULL, call->rows, call->slices, model.outputs, PUT};
    multiply(work, projected, low * width / PANEL, thread, threads);
    barrier(&work->team, threads);
    int each = high + 1 - low;
    int64_t tasks = (int64_t)call->rows * each, end = share_of_many(tasks, thread + 1, threads);
    float *row = own_room(work, thread).row;
    for (int64_t task = share_of_many(tasks, thread, threads); task < end; task++) {
        size_t r = (size_t)(task / each), at = (size_t)(low + task % each) * (size_t)width;
        float *slice = call->slices + r * (size_t)model.outputs + at;
        widen(in->table, in->bf16_table, (size_t)call->tokens[r] * (size_t)model.outputs + at, width, row);
        normed(slice, &in->norm, width, in->eps, slice);
        for (int i = 0; i < width; i++) slice[i] += in->table_scale * row[i];
    }
    barrier(&work->team, threads);
}

/* Layers first..last-1 of those to run. */
static void span(Work *work, int first, int last, int thread, int threads) {
    const Shape *s = work->shape;
    const Call *call = work->call;
    for (int i = first; i < last; i++) {
        const Layer *l = layer_at(work, i);
        Multiplication up = {&l->up, call->hidden, &l->before_mlp, call->rows, call->inside, l->down.inputs, ACTIVATE, NULL, NULL, l->bends};
        if (l->recurrence) recall(work, l, thread, threads);
        else if (l->qkv.panels) attend_layer(work, l, thread, threads);
        if (work->keys_only) continue;
        if (!s->parallel && l->qkv.panels) add_block(work, &l->output, call->mixed, &l->after_attention, 1, thread, threads);
        if (l->router) {
            mix_experts(work, l, thread, threads);
            continue;
        }
        if (!l->up.panels) continue;
        multiply(work, up, 0, thread, threads);
        barrier(&work->team, threads);
        if (s->parallel) add_block(work, &l->output, call->mixed, &l->after_attention, 1, thread, threads);
        add_block(work, &l->down, call->inside, &l->after_mlp, l->token_gate.panels ? 1 : l->scale, thread, threads);
        if (!l->token_gate.panels) continue;
        int width = l->token_output.inputs;
        Multiplication gate = {&l->token_gate, call->hidden, NULL, call->rows, call->inside, width, WEIGH, NULL, NULL, l->bends};
        gate.factors = call->slices + (size_t)l->slice * (size_t)width, gate.stride = call->inputs->model.outputs;
        multiply(work, gate, 0, thread, threads);
        barrier(&work->team, threads);
        add_block(work, &l->token_output, call->inside, &l->after_token, l->scale, thread, threads);
    }
}

static void score(Work *work, int thread, int threads) {
    const Call *call = work->call;
    Multiplication logits = {work->head, call->hidden, work->head_norm, call->rows, work->logits, work->head->outputs, PUT};
    multiply(work, logits, 0, thread, threads);
}

/* The index of the largest of n numbers; of equal ones the first. */
static int largest_of(const float *x, int n) {
    enum { BLOCK = 256 };
    int block = 0, live = n < BLOCK ? n : BLOCK, index = 0;
    float most = -INFINITY;
    for (int start = 0; start < n; start += BLOCK) {
        int stop = n - start < BLOCK ? n : start + BLOCK, i = start;
        vf largest = f_set(-INFINITY);
        for (; i + 16 <= stop; i += 16) largest = f_max(largest, f_load(x + i));
        float here = f_largest(largest);
        for (; i < stop; i++) here = x[i] > here ? x[i] : here;
        if (here > most) most = here, block = start, live = stop - start;
    }
    while (index < live - 1 && x[block + index] != most) index++;
    return block + index;
}

#include "noise.h"

static int ends(const Draft *draft, int64_t token) {
    for (int i = 0; i < draft->end_count; i++)
        if (draft->ends[i] == token) return 1;
    return 0;
}

INLINE vf logits_of(const Draft *draft, vf x) {
    x = f_mul(x, f_set(draft->logits_scale));
    if (draft->logits_cap <= 0) return x;
    vf cap = f_set(draft->logits_cap);
    return f_mul(cap, f_tanh(f_div(x, cap)));
}

/* The softmax probability of the largest of n outputs of the head, or of n scores with noise, which are scaled already. */
static float prob_of_largest(const Draft *draft, const float *x, int n, float largest) {
    const Draft plain = {.logits_scale = 1};
    if (draft->keys) draft = &plain;
    vf sum = f_set(0), most = logits_of(draft, f_set(largest));
    float rest[16];
    int i = 0;
    for (; i + 16 <= n; i += 16) sum = f_add(sum, f_exp(f_sub(logits_of(draft, f_load(x + i)), most)));
    float total = f_sum(sum);
    if (i < n) {
        for (int k = 0; k < 16; k++) rest[k] = x[i + k < n ? i + k : i];
        f_store(rest, f_exp(f_sub(logits_of(draft, f_load(rest)), most)));
        for (int k = 0; k < n - i; k++) total += rest[k];
    }
    return 1 / total;
}

/* Scales n outputs of the head and adds the noise of the next draft, in place. */
static void add_noise_of(const Draft *draft, float *x, int n) {
    float rest[16], most;
    int i = 0;
    if (draft->logits_scale == 1 && draft->logits_cap <= 0) i = n;
    for (; i + 16 <= n; i += 16) f_store(x + i, logits_of(draft, f_load(x + i)));
    if (i < n) {
        f_store(rest, logits_of(draft, f_load_some(x + i, n - i)));
        memcpy(x + i, rest, sizeof(float) * (size_t)(n - i));
    }
    Perturbation noise = {x, &most, draft->keys + draft->drafted, draft->vocabulary, 0, 1, n, draft->temperature};
    perturb(&noise, NULL, 0, 1);
}

/* Takes the most probable token, or with keys a sample, as the next draft. Returns whether the draft ends. */
static int choose(Work *work, float *survival) {
    Draft *draft = work->draft;
    if (draft->keys) add_noise_of(draft, work->logits, work->head->outputs);
    int chosen = largest_of(work->logits, work->head->outputs);
    if (draft->probs) {
        float prob = prob_of_largest(draft, work->logits, work->head->outputs, work->logits[chosen]);
        float rejected = draft->doubt;
        for (int i = 0; i < draft->power; i++) rejected *= 1 - prob;
        draft->probs[draft->drafted] = prob, *survival *= 1 - rejected;
    }
    int64_t token = draft->vocabulary ? draft->vocabulary[chosen] : chosen;
    draft->tokens[++draft->drafted] = token;
    work->call->positions++;
    return draft->drafted == draft->most || (draft->probs && *survival < draft->survival) || ends(draft, token);
}

#define LONGEST_MATCH 16

/* Finds the longest earlier match of the last tokens (of several the latest) and writes the tokens after it to `end`: at most
 * `most`, and no more than matched. Returns how many. */
static int look_up(const int64_t *text, int64_t *end, int most) {
    const int64_t *found = end;
    int longest = 0;
    for (const int64_t *at = end - 1; at > text && longest < LONGEST_MATCH; at--) {
        int match = 0;
        while (match < LONGEST_MATCH && at - match > text && at[-1 - match] == end[-1 - match]) match++;
        if (match > longest) longest = match, found = at;
    }
    if (most > longest) most = longest;
    for (int i = 0; i < most; i++) end[i] = found[i];
    return most;
}

/* Where the newest token's state at a stop is kept. */
static float *kept(const Work *work, int stop) {
    const Draft *draft = work->draft;
    return draft->states + (size_t)(stop * (1 + draft->most) + draft->drafted) * (size_t)work->shape->hidden;
}

/* Runs the layers up to the exit on the newest token's state, in place, and copies the state at earlier stops. */
static void reach_exit(Work *work, int thread, int threads) {
    const Draft *draft = work->draft;
    for (int stop = 0, from = 0; stop < draft->stop_count; from = draft->stops[stop++]) {
        span(work, from, draft->stops[stop], thread, threads);
        /* A span has a barrier before it changes the state. */
        if (thread == 0 && stop < draft->stop_count - 1)
            memcpy(kept(work, stop), work->call->hidden, sizeof(float) * (size_t)work->shape->hidden);
    }
}

/* Copies the exit's state to the input of the layers beyond it, so that these do not change it. */
static void leave_exit(Work *work, int thread, int threads) {
    Draft *draft = work->draft;
    const Shape *s = work->shape;
    size_t n = (size_t)s->hidden;
    if (thread == 0) {
        memcpy(draft->entry ? draft->entry : draft->beyond, work->call->hidden, sizeof(float) * n);
        for (size_t half = 0; draft->join && half < 2; half++)
            normed(draft->entry + half * n, &draft->input_norms[half], s->hidden, s->eps, draft->entry + half * n);
        work->call->hidden = draft->beyond, work->call->entries = draft->entry;
    }
    if (draft->join) {
        barrier(&work->team, threads);
        multiply(work, (Multiplication){draft->join, draft->entry, NULL, 1, draft->beyond, s->hidden, PUT}, 0, thread, threads);
    }
    barrier(&work->team, threads);
}

/* Embeds the newest token, and guesses of the next ones, as the rows of a pass. */
static void begin_pass(Work *work) {
    Draft *draft = work->draft;
    Call *call = work->call;
    int n = work->shape->hidden, room = draft->most - draft->drafted - 1;
    int64_t *newest = draft->tokens + draft->drafted;
    if (room > draft->guesses) room = draft->guesses;
    call->rows = draft->starts[1] = 1 + (room > 0 ? look_up(draft->tokens - draft->searched, newest + 1, room) : 0);
    call->hidden = kept(work, draft->stop_count - 1), call->tokens = newest, draft->passes++;
    for (int r = 0; r < call->rows; r++) {
        float *hidden = call->hidden + (size_t)r * (size_t)n;
        embed(work->shape, draft->embedding, newest[r], hidden);
        for (int i = 0; draft->learned && i < n; i++) hidden[i] += draft->learned[call->positions[r] * n + i];
    }
}

/* Drafts the most probable tokens: after the newest token, and after each guess as long as guesses are right. */
static int choose_next(Work *work, float *survival) {
    Draft *draft = work->draft;
    float *logits = work->logits;
    int rows = work->call->rows, ended = 0;
    for (int r = 0, right = 1; r < rows && right && !ended; r++) {
        int64_t guess = draft->tokens[draft->drafted + 1];
        work->logits = logits + (size_t)r * (size_t)work->head->outputs;
        ended = choose(work, survival), right = draft->tokens[draft->drafted] == guess;
    }
    work->logits = logits;
    return ended;
}

/* Drafts pass by pass. Over the last draft only the layers before the exit run, and only if `runs_last`. */
static void draft(Work *work, int thread, int threads) {
    Draft *draft = work->draft;
    int exit_layer = draft->stops[draft->stop_count - 1];
    float survival = 1;
    for (;;) {
        if (thread == 0) begin_pass(work);
        barrier(&work->team, threads);
        read_tokens(work, thread, threads);
        reach_exit(work, thread, threads);
        if (work->ended) return; /* the same for all threads: thread 0 set it before the last barrier */
        if (exit_layer < work->count) {
            leave_exit(work, thread, threads);
            span(work, exit_layer, work->count, thread, threads);
        }
        score(work, thread, threads);
        barrier(&work->team, threads);
        if (thread == 0) {
            const Shape *s = work->shape;
            size_t n = (size_t)s->hidden;
            if (draft->entry && draft->norms_output) normed(draft->beyond, work->head_norm, s->hidden, s->eps, draft->entry + n);
            else if (draft->entry) memcpy(draft->entry + n, draft->beyond, sizeof(float) * n);
            int before = draft->drafted;
            work->ended = choose_next(work, &survival);
            work->finished = work->ended && (!draft->runs_last || draft->drafted == before);
        }
        barrier(&work->team, threads);
        if (work->finished) return;
    }
}

/* All layers, the head, and each row's largest logit, with its noise if any. States are copied at the stops, after a span's
 * barrier. */
static void choose_all(Work *work, int thread, int threads) {
    const Choice *choice = work->choice;
    const Call *call = work->call;
    int outputs = work->head->outputs, first = share(call->rows, thread, threads), last = share(call->rows, thread + 1, threads);
    size_t n = (size_t)work->shape->hidden;
    if (choice->tokens) {
        for (int r = first; r < last; r++)
            embed(work->shape, choice->embedding, choice->tokens[r], call->hidden + (size_t)r * n);
        barrier(&work->team, threads);
    }
    read_tokens(work, thread, threads);
    int from = 0;
    for (int stop = 0; stop < choice->stop_count; from = choice->stops[stop++]) {
        span(work, from, choice->stops[stop], thread, threads);
        for (int r = first; r < last; r++)
            memcpy(choice->states + n * (size_t)(stop * call->rows + r), call->hidden + n * (size_t)r, sizeof(float) * n);
    }
    span(work, from, work->count, thread, threads);
    score(work, thread, threads);
    barrier(&work->team, threads);
    if (choice->keys) {
        Perturbation noise = {choice->logits, choice->most, choice->keys, NULL, 0, call->rows, outputs, choice->temperature};
        perturb(&noise, &work->team, thread, threads);
    }
    for (int r = first; r < last; r++) choice->chosen[r] = largest_of(choice->logits + (size_t)r * (size_t)outputs, outputs);
}

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
static int (*thread_number)(void), (*thread_count)(void);

static void part(Work *work, int thread, int threads) {
    if (work->draft) draft(work, thread, threads);
    else if (work->choice) choose_all(work, thread, threads);
    else if (work->head) score(work, thread, threads);
    else read_tokens(work, thread, threads), span(work, 0, work->count, thread, threads);
}

static void in_thread(void *work) { part(work, thread_number(), thread_count()); }

static void run(Work *work, int threads) {
    if (work->call->rows == 0) return;
    int now = parallel ? threads_now(threads) : 1;
    if (now == 1) {
        part(work, 0, 1);
        return;
    }
    Moment started = moment();
    parallel(in_thread, work, (unsigned)now, 0);
    adapt_threads(now, started);
}

/* Entry points of an OpenMP runtime, whose threads then share calls; without them calls run in the calling thread. */
void layerskip_use_openmp(void *parallel_, void *number, void *count) {
    parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel_;
    thread_number = (int (*)(void))number, thread_count = (int (*)(void))count;
}

/* Version of the functions and structures that compiled.py uses: raise it whenever they change. */
int layerskip_interface(void) { return 33; }

/* Bytes of a structure, by its index in compiled.STRUCTURES; after the last, of a Passage. */
int layerskip_size_of(int structure) {
    const size_t sizes[] = {sizeof(Matrix), sizeof(Layer), sizeof(Shape), sizeof(Call), sizeof(Draft), sizeof(Choice),
                            sizeof(Recurrence), sizeof(StoredPanel), sizeof(TokenInputs), sizeof(Perturbation), sizeof(Passage)};
    return (int)sizes[structure];
}

/* Whether this CPU and its system run the other functions. Called first, on every CPU: no vector instructions here. */
int layerskip_supported(void) { return lanes_supported() && tiles_supported(); }

/* Layers 0..count-1 of `layers` over the call's rows, in place. */
void layerskip_span(const Shape *shape, const Layer *layers, int count, Call *call, int threads) {
    Work work = {.shape = shape, .layers = layers, .count = count, .call = call};
    run(&work, threads);
}

/* The keys and values of layers 0..count-1 of `layers`, as if the call's rows were the input of each. */
void layerskip_write(const Shape *shape, const Layer *layers, int count, Call *call, int threads) {
    Work work = {.shape = shape, .layers = layers, .count = count, .keys_only = 1, .call = call};
    run(&work, threads);
}

/* Final norm and head: the call's rows to logits (row, outputs). */
void layerskip_score(const Shape *shape, const Norm *norm, const Matrix *head, Call *call, float *logits, int threads) {
    Work work = {.shape = shape, .call = call, .head = head, .head_norm = norm, .logits = logits};
    run(&work, threads);
}

/* Layers 0..count-1 of `layers`, final norm and head over the call's rows, whose hidden states are changed. */
void layerskip_choose(
    const Shape *shape, const Layer *layers, int count, const Norm *norm, const Matrix *head, Call *call, Choice *choice, int threads
) {
    Work work = {.shape = shape, .layers = layers, .count = count, .call = call, .head = head, .head_norm = norm, .choice = choice};
    work.logits = choice->logits;
    run(&work, threads);
}

/* Drafts greedily with the layers draft->order and a head, from draft->tokens[0] at call->positions[0] on; the call has room
 * for the rows of a pass. */
void layerskip_draft(
    const Shape *shape, const Layer *layers, const Norm *norm, const Matrix *head, const Call *call, Draft *draft, int threads
) {
    Call step = *call;
    step.starts = draft->starts;
    Work work = {.shape = shape, .layers = layers, .call = &step, .head = head, .head_norm = norm};
    work.count = draft->layer_count, work.order = draft->order;
    work.logits = draft->logits, work.draft = draft;
    run(&work, threads);
}

typedef struct {
    const Perturbation *of;
    Team team;
} Perturbing;

static void perturb_in_thread(void *at) {
    Perturbing *turn = at;
    perturb(turn->of, &turn->team, thread_number(), thread_count());
}

/* Subtracts the largest score of each row, and adds noise. */
void layerskip_perturb(const Perturbation *of, int threads) {
    Perturbing turn = {.of = of};
    int now = parallel ? threads_now(threads) : 1;
    if (now == 1) {
        perturb(of, &turn.team, 0, 1);
        return;
    }
    Moment started = moment();
    parallel(perturb_in_thread, &turn, (unsigned)now, 0);
    adapt_threads(now, started);
}

typedef struct {
    const Recurrence *layer;
    const Passage *passage;
    Team team;
} Turn;

static void remember_in_thread(void *at) {
    Turn *turn = at;
    remember(turn->layer, turn->passage, &turn->team, thread_number(), thread_count());
}

/* For tests: a recurrent layer between its projections, over a passage; settled tokens move into the state. */
void layerskip_remember(const Recurrence *layer, const Passage *passage, int threads) {
    Turn turn = {.layer = layer, .passage = passage};
    int now = parallel ? threads_now(threads) : 1;
    if (now == 1) {
        remember(layer, passage, &turn.team, 0, 1);
        return;
    }
    Moment started = moment();
    parallel(remember_in_thread, &turn, (unsigned)now, 0);
    adapt_threads(now, started);
}

/* Bytes of a recurrent layer in a text's state, or in a slot of its ring. */
int64_t layerskip_memory_bytes(const Recurrence *layer, int of_slot) {
    return (int64_t)(of_slot ? entry_bytes(layer) : state_bytes(layer));
}
