/* Checks the kernels of one instruction set against plain.h, without Python: on the machine itself, or under an emulator.
 *
 *     cc FLAGS -I layerskip_core/model/native tests/native/check_kernels.c -lm -lpthread -o check && ./check [ROUNDS [SEED]]
 *
 * FLAGS are those of a variant in setup.py. Each round draws other shapes and numbers. Exit status: 0 if all is as it shall be,
 * 1 if not, 77 if this CPU lacks the instructions. With -DWITH_OPENMP and -lgomp or -lomp the threads are those of OpenMP.
 */
#define _GNU_SOURCE
#include "kernels.c"
#include "pack.c"
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include "plain.h"
#include "material.h"
#include "recurrences.h"

/* ---- single instructions ---- */

/* Sums by lane of `start` and of `times` the products of four levels, plus `offset`, with four inputs. */
static void expect_dots(const int32_t *sums, int32_t start, const uint8_t *levels, int offset, const int32_t *in, int times) {
    for (int i = 0; i < 16; i++) {
        int32_t right = start;
        for (int k = 0; k < 4; k++) right += times * in[k] * (levels[4 * i + k] + offset);
        expect(sums[i] == right, "dots: %d instead of %d", sums[i], right);
    }
}

static void check_lanes(void) {
    float x[16], y[16];
    uint16_t rounded[16];
    int8_t narrow[16];
    for (int t = 0; t < 4096; t += 3) {
        double largest = -INFINITY, sum = 0, size = 0;
        for (int i = 0; i < 16; i++) {
            x[i] = (float)((uniform() - 0.5) * (t % 2 ? 180 : 2)), sum += x[i], size += fabsf(x[i]);
            largest = fmax(largest, x[i]);
        }
        expect(f_largest(f_load(x)) == (float)largest, "f_largest");
        expect(fabs(f_sum(f_load(x)) - sum) <= 1e-6 * size, "f_sum %g %g", f_sum(f_load(x)), sum);
        f_store(y, f_exp(f_load(x)));
        for (int i = 0; i < 16; i++) {
            double power = exp(fmin(fmax(x[i], -87), 88));
            expect(fabs(y[i] - power) <= 3e-7 * power, "f_exp(%g) = %g", x[i], y[i]);
        }
        f_store(y, f_tanh(f_load(x)));
        for (int i = 0; i < 16; i++) expect(fabs(y[i] - tanh(x[i])) <= 4e-7, "f_tanh(%g) = %g", x[i], y[i]);
        for (int i = 0; i < 16; i++) {
            uint32_t bits = (uint32_t)(t * 16 + i) << 16 | (uint32_t)(i % 2 ? 0x8000 : below(1 << 16));
            if ((bits >> 23 & 255) % 255 == 0) bits = 0x3f800000; /* no subnormal, infinite or other number */
            memcpy(x + i, &bits, 4);
        }
        f_store_bf16(rounded, f_load(x)), f_store(y, f_load_bf16(rounded));
        for (int i = 0; i < 16; i++)
            expect(rounded[i] == bf16_of(x[i]) && y[i] == in_bf16(x[i]), "bf16 of %g is %x", x[i], rounded[i]);
        for (int i = 0; i < 16; i++) x[i] = (float)(below(509) - 254) / 2;
        f_store_int8(narrow, f_load(x));
        for (int i = 0; i < 16; i++) expect(narrow[i] == (int8_t)rintf(x[i]), "int8 of %g is %d", x[i], narrow[i]);
        f_store(y, f_load_int8(narrow));
        for (int i = 0; i < 16; i++) expect(y[i] == narrow[i], "%d of int8 is %g", narrow[i], y[i]);
        for (int i = 0; i < 16; i++) rounded[i] = (uint16_t)((t * 16 + i) & 0xfbff); /* finite, some of them subnormal */
        f_store(y, f_load_fp16(rounded));
        for (int i = 0; i < 16; i++) expect(y[i] == half((uint8_t *)(rounded + i)), "fp16 %x is %g", rounded[i], y[i]);
    }
    for (int t = 0; t < 4096; t++) { /* the extremes too: levels of 0 and 255, inputs of -127 and 127 */
        uint8_t levels[64], low[64];
        int8_t bytes[4];
        int32_t in[4], sums[16], start = below(1 << 20) - (1 << 19);
        RowInt8 row[16];
        for (int i = 0; i < 64; i++) levels[i] = (uint8_t)(t >= 64 ? below(256) : t >> i % 4 & 1 ? 255 : 0);
        for (int i = 0; i < 4; i++) {
            in[i] = t < 64 ? (t >> i % 2 * 2 & 4 ? 127 : -127) : below(255) - 127;
            bytes[i] = (int8_t)in[i];
        }
        for (int i = 0; i < 16; i++) x[i] = (float)in[i % 4];
        f_store_levels(row, f_load(x));
        for (int left = -3; left <= 4; left++) {
            uint8_t bits[64], right[64];
            int mask = left == -3 ? 16 : 48; /* of a byte's own bits */
            vi some = i_bits_of(i_load(levels), left, mask);
            memcpy(bits, &some, 64);
            for (int i = 0; i < 64; i++) right[i] = (uint8_t)((left < 0 ? levels[i] >> -left : levels[i] << left) & mask);
            expect(!memcmp(bits, right, 64), "bits %d to the left", left);
        }
        vi eight = i_set(start), four = i_set(0);
        for (int i = 0; i < 64; i++) low[i] = (uint8_t)(levels[i] & 15);
        for (int part = 0; part < INT8_PARTS; part++) eight = dot_int8(eight, int8_part(i_load(levels), part), int8_value(row, part));
        for (int dot = 0; dot < 8; dot++) four = dot_int4(four, i_load(low), int4_value(bytes));
        memcpy(sums, &eight, sizeof sums), expect_dots(sums, start, levels, LEVEL_OFFSET - 128, in, 1);
        four = int4_sum(four), memcpy(sums, &four, sizeof sums), expect_dots(sums, 0, low, 0, in, 8);

        int32_t wide[4];
        RowInt8 wide_row[PLANES * 16];
        for (int i = 0; i < 4; i++) wide[i] = 128 * in[i] + (abs(in[i]) < 127 ? below(128) - 64 : 0);
        for (int i = 0; i < 16; i++) x[i] = (float)wide[i % 4];
        f_store_wide_levels(wide_row, 16, f_load(x));
        for (int bits = 4; bits <= 8; bits += bits == 6 ? 2 : 1) {
            vi planes[PLANES];
            for (int i = 0; i < 64; i++) low[i] = (uint8_t)(levels[i] & ((1 << bits) - 1));
            for (int plane = 0; plane < PLANES; plane++) {
                vi sum = i_set(0);
                for (int part = 0; part < INT8_PARTS; part++) {
                    vi value = int8_value(wide_row + 16 * plane, part);
                    if (bits == 8) sum = dot_int8(sum, int8_part(i_load(low), part), value);
                    else sum = dot_low_bit(sum, low_bit_part(i_load(low), part), value);
                }
                planes[plane] = sum;
            }
            f_store(y, f_of_planes(planes));
            for (int i = 0; i < 16; i++) sums[i] = (int32_t)y[i]; /* below 2^24 */
            expect_dots(sums, 0, low, bits == 8 ? LEVEL_OFFSET - 128 : 0, wide, 1);
        }
    }
}

/* ---- matrices ---- */

static void check_products(int precision, int inputs, int outputs, int rows) {
    Plain plain;
    Matrix m = matrix_of(precision, inputs, outputs, 1, below(2), (Plain *[]){&plain});
    Shape shape = {.hidden = inputs};
    Norm none = {NULL, NULL};
    size_t bytes = 4 * (size_t)(rows * outputs);
    float *x = numbers_of((size_t)(rows * inputs), 1, 0), *together = room(bytes), *other = room(bytes);
    const char *name = PRECISIONS[precision].name;
    memset(x, 0, rows > 3 ? 4 * (size_t)inputs : 0);
    Call call = call_of(&shape, rows, 1, x, inputs);
    layerskip_score(&shape, &none, &m, &call, together, 1);
    for (int r = 0; r < rows; r++) {
        double wide[inputs], right[outputs], sizes[outputs];
        for (int i = 0; i < inputs; i++) wide[i] = x[r * inputs + i];
        plain_product(&plain, wide, right, sizes);
        for (int o = 0; o < outputs; o++) {
            float sum = together[r * outputs + o];
            int near = fabs(sum - right[o]) <= (m.kind == STORED ? 1e-5 : 3e-6) * sizes[o] + 1e-30;
            expect(near, "%s, %d rows, %dx%d: %g instead of %g", name, rows, outputs, inputs, sum, right[o]);
        }
        Call alone = call_of(&shape, 1, 1, x + r * inputs, inputs);
        layerskip_score(&shape, &none, &m, &alone, other + r * outputs, 1);
    }
    expect(!memcmp(together, other, bytes), "%s: a row alone differs from the same among %d", name, rows);
    layerskip_score(&shape, &none, &m, &call, other, THREADS);
    expect(!memcmp(together, other, bytes), "%s: threads differ", name);
}

/* ---- layers ---- */

/* Layers first..last-1 over `count` tokens of each sequence, in place. */
static void run_span(
    const Model *m, int first, int last, int position, int count, int sequences, float *hidden, char *cache, int threads
) {
    size_t before = used;
    Call call = rows_of(m, first, position, count, sequences, hidden, cache);
    layerskip_span(&m->shape, m->layers + first, last - first, &call, threads);
    used = before;
}

/* The first `layers` layers over `rows` tokens, of which plain C computes those from `first` on. */
static void check_layers(const Model *m, int style, int layers, int first, int rows) {
    const Shape *s = &m->shape;
    const char *name = PRECISIONS[m->precision].name;
    size_t numbers = (size_t)(rows * s->hidden), bytes = 4 * numbers, cached = cache_bytes(m, 1);
    float *start = numbers_of(numbers, 1, 0), *whole = memcpy(room(bytes), start, bytes), *other = room(bytes);
    double *right = room(2 * bytes), error = 0, size = 0;
    char *cache = room(cached), *pieces = room(cached);
    for (size_t i = 0; i < numbers; i++) right[i] = start[i];
    for (int i = 0; i < layers; i++) plain_layer(s, m->layers + i, m->plain + i, first, rows, m->cos, m->sin, right);
    run_span(m, 0, layers, 0, rows, 1, whole, cache, 1);
    for (size_t i = (size_t)(first * s->hidden); i < numbers; i++)
        error += pow(whole[i] - right[i], 2), size += pow(right[i] - start[i], 2);
    error = sqrt(error / size); /* what is rounded otherwise because a sum differs in its last bit counts with its share */
    int kind = PRECISIONS[m->precision].kind;
    double most = kind == FP32 || kind == WIDENED ? 2e-6 : kind == STORED ? 2e-4 : kind == BF16 ? 4e-3 : 1.5e-2;
    expect(error < most, "%s layers of style %d, %d rows: error %g", name, style, rows, error);

    memcpy(other, start, bytes);
    for (int at = 0, count; at < rows; at += count) {
        count = 1 + below(at ? 16 : 3), count = count > rows - at ? rows - at : count;
        run_span(m, 0, layers, at, count, 1, other + at * s->hidden, pieces, 1 + below(THREADS));
    }
    expect(!memcmp(whole, other, bytes), "%s layers of style %d: %d rows in pieces differ", name, style, rows);
    expect(!memcmp(cache, pieces, cached), "%s layers of style %d: caches differ", name, style);

    memcpy(other, start, bytes), memset(pieces, 0, cached);
    Call call = rows_of(m, 0, 0, rows, 1, other, pieces);
    layerskip_write(s, m->layers, 1, &call, THREADS);
    int same = !memcmp(start, other, bytes);
    for (size_t at = 0; at < cached; at += page_bytes(m)) same &= !memcmp(cache + at, pieces + at, page_bytes(m) / LAYERS);
    expect(same, "%s layers of style %d: written keys differ", name, style);

    if (rows % 2) return; /* two texts at once */
    float *two = memcpy(room(bytes), start, bytes), *one = room(bytes / 2);
    char *both = room(cache_bytes(m, 2));
    run_span(m, 0, layers, 0, rows / 2, 2, two, both, THREADS);
    memcpy(one, start + numbers / 2, bytes / 2), memset(pieces, 0, cached);
    run_span(m, 0, layers, 0, rows / 2, 1, one, pieces, 1);
    same = !memcmp(two, whole, bytes / 2) && !memcmp(two + numbers / 2, one, bytes / 2);
    expect(same, "%s layers of style %d: two texts differ", name, style);
}

static void embedding_of(const Model *m, int64_t token, float *out) {
    const Shape *s = &m->shape;
    for (int d = 0; d < s->hidden; d++) {
        size_t at = (size_t)(token * s->hidden + d);
        float stored = s->bf16_cache ? of_bf16(((uint16_t *)m->embedding)[at]) : ((float *)m->embedding)[at];
        out[d] = stored * s->embedding_scale;
    }
}

static int best_of(const float *logits) {
    int best = 0;
    for (int v = 0; v < VOCAB; v++) best = logits[v] > logits[best] ? v : best;
    return best;
}

/* Drafts by the first two layers, one of them before the exit, against the same calls one by one. */
static void check_draft(const Model *m) {
    const Shape *s = &m->shape;
    const char *name = PRECISIONS[m->precision].name;
    int prompt = 1 + below(20), n = s->hidden;
    size_t cached = cache_bytes(m, 1);
    char *cache = room(cached), *copy;
    run_span(m, 0, 2, 0, prompt, 1, numbers_of((size_t)(prompt * n), 1, 0), cache, 1);
    copy = memcpy(room(cached), cache, cached);
    int32_t order[] = {0, 1}, stops[] = {1};
    int64_t tokens[1 + MOST_DRAFTS] = {below(VOCAB)}, token = tokens[0];
    float probs[MOST_DRAFTS], *states = room(4 * (size_t)((1 + MOST_DRAFTS) * n));
    float *logits = room(4 * VOCAB), *state = room(4 * (size_t)n);
    Draft draft = {.embedding = m->embedding, .order = order, .stops = stops, .layer_count = 2, .stop_count = 1};
    draft.probs = probs, draft.most = MOST_DRAFTS, draft.runs_last = 1, draft.logits_scale = 1;
    draft.tokens = tokens, draft.states = states;
    draft.beyond = room(4 * (size_t)n), draft.logits = room(4 * VOCAB);
    Call call = rows_of(m, 0, prompt, 1, 1, NULL, cache);
    layerskip_draft(s, m->layers, &m->final, &m->head, &call, &draft, 1 + below(THREADS));
    expect(draft.drafted == MOST_DRAFTS, "%s: %d drafts", name, draft.drafted);
    for (int i = 0; i <= MOST_DRAFTS; i++) {
        embedding_of(m, token, state);
        run_span(m, 0, 1, prompt + i, 1, 1, state, copy, 1);
        expect(!memcmp(state, states + i * n, 4 * (size_t)n), "%s: state %d of a draft differs", name, i);
        if (i == MOST_DRAFTS) break;
        run_span(m, 1, 2, prompt + i, 1, 1, state, copy, 1);
        Call last = rows_of(m, 0, 0, 1, 1, state, NULL);
        layerskip_score(s, &m->final, &m->head, &last, logits, 1);
        double total = 0;
        int best = best_of(logits);
        for (int v = 0; v < VOCAB; v++) total += exp(logits[v] - logits[best]);
        token = best;
        int same = tokens[i + 1] == best && fabs(probs[i] * total - 1) < 1e-5;
        expect(same, "%s: draft %d is %d at %g", name, i, (int)tokens[i + 1], probs[i]);
    }
    expect(!memcmp(cache, copy, cached), "%s: caches of a draft differ", name);
}

/* A call over entries of a drafter's layer, which has wider rows than others. */
static Call entries_of(const Model *m, int first, int rows, float *hidden, float *entries, char *cache) {
    Call call = rows_of(m, 0, first, rows, 1, hidden, cache), wide = call_of(&m->shape, rows, 1, NULL, 2 * m->shape.hidden);
    if (call.scratch_bytes < wide.scratch_bytes) call.scratch = wide.scratch, call.scratch_bytes = wide.scratch_bytes;
    call.entries = entries;
    return call;
}

/* A drafter's layer in the EAGLE-3 layout: its norms and its residual against plain C, and its drafts against calls one by one. */
static void check_drafter(Model m) {
    Shape *s = &m.shape;
    Layer *l = m.layers;
    Plain plain;
    const char *name = PRECISIONS[m.precision].name;
    int n = s->hidden, rows = 1 + below(20);
    l->qkv = matrix_of(m.precision, 2 * n, (s->heads + 2 * s->kv_heads) * s->head_dim, 1, 0, (Plain *[]){&plain});
    l->embedding = norm_of(n, 1, 0), l->before_attention = norm_of(n, 1, 0), s->norms_residual = below(2);
    size_t cached = cache_bytes(&m, 1), bytes = 4 * (size_t)(rows * n);
    char *cache = room(cached), *copy;
    float *given = numbers_of((size_t)(2 * rows * n), 1, 0), *entries = memcpy(room(2 * bytes), given, 2 * bytes), *hidden = room(bytes);
    Call call = entries_of(&m, 0, rows, hidden, entries, cache);
    layerskip_write(s, l, 1, &call, 1 + below(THREADS));
    for (int half = 0; half < 2 * rows; half++) {
        double x[3 * 32], normal[3 * 32];
        for (int d = 0; d < n; d++) x[d] = given[half * n + d];
        plain_norm(half % 2 ? &l->before_attention : &l->embedding, x, n, s->eps, normal);
        for (int d = 0; d < n; d++) {
            double residual = half % 2 == 0 ? 0 : (s->norms_residual ? normal[d] : x[d]) - hidden[half / 2 * n + d];
            expect(fabs(entries[half * n + d] - normal[d]) + fabs(residual) < 1e-5, "%s: entry %d", name, half);
        }
    }
    copy = memcpy(room(cached), cache, cached);
    int32_t order[] = {0}, stops[] = {0};
    int64_t tokens[1 + MOST_DRAFTS] = {below(VOCAB)}, token = tokens[0];
    float *feature = numbers_of((size_t)n, 1, 0), *drafted = room(8 * (size_t)n), *entry = room(8 * (size_t)n), *logits = room(4 * VOCAB);
    memcpy(drafted + n, feature, 4 * (size_t)n);
    Draft draft = {.embedding = m.embedding, .order = order, .stops = stops, .layer_count = 1, .stop_count = 1};
    draft.most = MOST_DRAFTS, draft.tokens = tokens, draft.entry = drafted;
    draft.states = room(4 * (size_t)((1 + MOST_DRAFTS) * n)), draft.beyond = room(4 * (size_t)n), draft.logits = logits;
    call = entries_of(&m, rows, 1, NULL, NULL, cache);
    layerskip_draft(s, l, &m.final, &m.head, &call, &draft, 1 + below(THREADS));
    for (int i = 0; i < MOST_DRAFTS; i++) {
        embedding_of(&m, token, entry), memcpy(entry + n, feature, 4 * (size_t)n);
        Call step = entries_of(&m, rows + i, 1, feature, entry, copy);
        layerskip_span(s, l, 1, &step, 1);
        layerskip_score(s, &m.final, &m.head, &step, logits, 1);
        token = best_of(logits);
        expect(tokens[i + 1] == token, "%s: a drafter's draft %d is %d", name, i, (int)tokens[i + 1]);
    }
    expect(!memcmp(cache, copy, cached), "%s: caches of a drafter differ", name);
}

/* Tokens of two texts, and what follows the first layer of one, through layers, head and choice at once and one by one. */
static void check_choice(const Model *m) {
    const Shape *s = &m->shape;
    int rows = 1 + below(12), n = s->hidden;
    size_t cached = cache_bytes(m, 2), numbers = (size_t)(2 * rows * n);
    char *cache = room(cached), *copy = room(cached);
    float *given = room(4 * numbers), *hidden = numbers_of(numbers, 1, 0), *logits = room(8 * (size_t)rows * VOCAB);
    int64_t tokens[2 * 12], chosen[2 * 12], again[2 * 12];
    for (int r = 0; r < 2 * rows; r++) {
        tokens[r] = below(VOCAB);
        embedding_of(m, tokens[r], given + r * n);
    }
    int32_t stops[] = {0, 1, LAYERS};
    float *states = room(3 * 4 * numbers);
    Choice choice = {.embedding = m->embedding, .tokens = tokens, .logits = logits, .chosen = chosen};
    choice.stops = stops, choice.stop_count = 3, choice.states = states;
    Call call = rows_of(m, 0, 0, rows, 2, hidden, cache);
    layerskip_choose(s, m->layers, LAYERS, &m->final, &m->head, &call, &choice, 1 + below(THREADS));
    Call first = rows_of(m, 0, 0, rows, 2, given, copy);
    int kept = !memcmp(states, given, 4 * numbers);
    layerskip_span(s, m->layers, 1, &first, 1);
    kept &= !memcmp(states + numbers, given, 4 * numbers);
    Call rest = rows_of(m, 1, 0, rows, 2, memcpy(hidden, given, 4 * numbers), copy);
    Choice other = {.logits = logits, .chosen = again};
    layerskip_choose(s, m->layers + 1, LAYERS - 1, &m->final, &m->head, &rest, &other, 1 + below(THREADS));
    run_span(m, 1, LAYERS, 0, rows, 2, given, copy, 1);
    expect(kept && !memcmp(states + 2 * numbers, given, 4 * numbers), "%s: states of a choice", PRECISIONS[m->precision].name);
    Call last = rows_of(m, 0, 0, 2 * rows, 1, given, NULL);
    layerskip_score(s, &m->final, &m->head, &last, logits, 1);
    for (int r = 0; r < 2 * rows; r++) {
        int best = best_of(logits + r * VOCAB);
        expect(chosen[r] == best && again[r] == best, "%s: choice %d is %d", PRECISIONS[m->precision].name, r, (int)chosen[r]);
    }
    expect(!memcmp(cache, copy, cached), "%s: caches of a choice differ", PRECISIONS[m->precision].name);
}

int main(int count, char **arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 1;
    uint64_t first = count > 2 ? (uint64_t)atoi(arguments[2]) : 1;
    if (!layerskip_supported()) return puts("this CPU lacks the instructions"), 77;
    memory = aligned_alloc(64, MEMORY);
    layerskip_use_openmp((void *)GOMP_parallel, (void *)omp_get_thread_num, (void *)omp_get_num_threads);
    check_lanes();
    for (int round = 0; round < rounds; round++) {
        seed = (first + (uint64_t)round) * 0x9e3779b97f4a7c15u | 1;
        for (int precision = 0; precision < (int)(sizeof PRECISIONS / sizeof *PRECISIONS); precision++) {
            int low_bit = is_low_bit(PRECISIONS[precision].kind) || PRECISIONS[precision].coded, width = PRECISIONS[precision].kind == STORED ? 256 : 32;
            for (int rows = 1; rows <= 16; rows++)
                used = 0, check_products(precision, low_bit ? width * (1 + below(4)) : 2 * (1 + below(70)), 1 + below(170), rows);
            used = 0, check_products(precision, 512, 300, 8); /* long enough that threads help each other */
            used = 0, check_products(precision, 64, 170, 17 + below(40)); /* of several turns of rows, too */
            for (int style = 0; style < 5; style++) {
                used = 0;
                Model model = model_of(precision, style);
                check_layers(&model, style, LAYERS, 0, 1 + below(24));
                check_draft(&model);
                check_choice(&model);
                if (style == 0) check_drafter(model);
            }
            if (low_bit) continue;
            used = 0;
            Model model = model_of(precision, round % 5);
            int rows = SPAN_PLACES + 3 + 2 * below(6); /* more than attention takes at once */
            check_layers(&model, round % 5, 1, rows - 6, rows);
        }
        for (int turn = 0; turn < 12; turn++) used = 0, check_recurrence(turn % 3);
    }
    if (failures) return fprintf(stderr, "%d differences\n", failures), 1;
    return printf("%d rounds: as they shall be\n", rounds), 0;
}
