/* Attention of up to MOST_QUERIES queries that share keys and values.
 *
 * A head's keys stand in blocks of sixteen places, so that a vector holds one number of each: (block, dimension, place) in fp32
 * and (block, pair of dimensions, place, 2) in bf16. Its values are (place, dimension), in bf16 (pair of places, dimension, 2).
 * Scores and sums are fp32; with a bf16 cache the softmax weights are bf16.
 *
 * The softmax is online (Milakov and Gimelshein, 2018), over spans that start at the same places for every query. A place that
 * a query does not see has weight 0 and changes no bit of its sums, because cached values are finite: others are stored as
 * zeros with a key of NaN, so that a query that does see the place gets NaN.
 */
#define MOST_QUERIES 16
#define PAGE 64         /* places that are contiguous in memory; a divisor of SPAN_PLACES */
#define SPAN_PLACES 256
#define LARGEST_HEAD 512
#define LEAST_SCORE -1e30f /* the maximum before the first score */

typedef struct {
    float *out;
    const float *gate;   /* of the output, before the logistic function; NULL for none */
    const float *sink;   /* an extra score without a value; NULL for none */
    int64_t start, stop; /* of the places seen, of which the last is the query's own */
} Query;

typedef struct {
    float queries[MOST_QUERIES * LARGEST_HEAD]; /* (query, dimension), RowBf16 with a bf16 cache */
    float mixed[MOST_QUERIES][LARGEST_HEAD];    /* sums of values, by sixteens of dimensions: see dimension_of */
    float scores[MOST_QUERIES][SPAN_PLACES];    /* then the softmax weights */
    RowBf16 rounded[MOST_QUERIES][SPAN_PLACES]; /* the weights in bf16 */
    float total[MOST_QUERIES][16], most[MOST_QUERIES];
    const char *next; /* as many bytes of a later step, fetched now: CPUs do not prefetch into a new page */
} Attention;

#include "tiled_attention.h"

/* The first dimension of a chunk of sixteen. The last chunk ends where the head does, so it may repeat some of the one before. */
INLINE int dimension_of(int chunk, int size) { return size < 16 || 16 * chunk + 16 <= size ? 16 * chunk : size - 16; }

INLINE int chunks_of(int size) { return (size + 15) / 16; }

/* Vectors that are read at once for R queries: independent sums, as many as registers hold. */
#define AT_ONCE(R) ((R) <= 2 && 4 * (R) <= SUMS ? 4 : 2 * (R) <= SUMS ? 2 : 1)

/* Scores of R queries and n places of a page, from place `from` of the span on; a page has at least 16 * AT_ONCE(R). */
INLINE void score_places(Attention *a, int from, int first, const int R, const char *keys, int n, int size, const int bf16) {
    const int B = AT_ONCE(R);
    int units = bf16 ? size / 2 : size; /* 64 bytes of a block */
    const float *queries = a->queries + first * size;
    const RowBf16 *rounded = (const RowBf16 *)a->queries + first * size;
    const char *next = a->next;
    for (int t = 0; t < n; t += 16 * B, keys += 64 * (size_t)(B * units), next += 64 * (size_t)(B * units)) {
        vf acc[TILE][4];
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) acc[r][b] = f_set(0);
        for (int u = 0; u < units; u++)
            for (int part = 0; part < (bf16 ? BF16_PARTS : 1); part++)
                for (int b = 0; b < B; b++) {
                    vf key = f_load((const float *)(keys + 64 * (size_t)(b * units + u)));
                    if (!part) fetch_line_later(next + 64 * (size_t)(b * units + u));
                    Bf16 pairs = bf16_part(i_bits(key), part);
                    for (int r = 0; r < R; r++) {
                        if (bf16) acc[r][b] = dot_bf16(acc[r][b], pairs, bf16_value(rounded + r * size + 2 * u, part));
                        else acc[r][b] = f_fma(key, f_set(queries[r * size + u]), acc[r][b]);
                    }
                }
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) f_store(a->scores[first + r] + from + t + 16 * b, acc[r][b]);
    }
}

/* Adds the values of n places by the weights of R queries to C chunks from the `chunk`-th on. `whole`: size is at least 16. */
INLINE void add_chunks(
    Attention *a, int from, int first, const int R, const char *values, int n, int size, int chunk, const int C, const int whole,
    const int bf16
) {
    vf acc[TILE][4];
    const float *at[4], *next[4];
    for (int c = 0; c < C; c++) {
        at[c] = (const float *)values + dimension_of(chunk + c, size);
        next[c] = (const float *)a->next + dimension_of(chunk + c, size);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = f_load(a->mixed[first + r] + 16 * (chunk + c));
    for (int t = 0, row = 0; t < n; t += bf16 ? 2 : 1, row += size)
        for (int part = 0; part < (bf16 ? BF16_PARTS : 1); part++)
            for (int c = 0; c < C; c++) {
                vf value = whole ? f_load(at[c] + row) : f_load_some(at[c] + row, size);
                if (!part) fetch_line_later(next[c] + row);
                Bf16 pairs = bf16_part(i_bits(value), part);
                for (int r = 0; r < R; r++) {
                    if (bf16) acc[r][c] = dot_bf16(acc[r][c], pairs, bf16_value(a->rounded[first + r] + from + t, part));
                    else acc[r][c] = f_fma(value, f_set(a->scores[first + r][from + t]), acc[r][c]);
                }
            }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) f_store(a->mixed[first + r] + 16 * (chunk + c), acc[r][c]);
}

INLINE void add_values(Attention *a, int from, int first, const int R, const char *values, int n, int size, const int bf16) {
    int chunk = 0, chunks = chunks_of(size);
    if (size < 16) {
        add_chunks(a, from, first, R, values, n, size, 0, 1, 0, bf16);
        return;
    }
    if (AT_ONCE(R) == 4)
        for (; chunk + 4 <= chunks; chunk += 4) add_chunks(a, from, first, R, values, n, size, chunk, 4, 1, bf16);
    if (AT_ONCE(R) >= 2)
        for (; chunk + 2 <= chunks; chunk += 2) add_chunks(a, from, first, R, values, n, size, chunk, 2, 1, bf16);
    for (; chunk < chunks; chunk++) add_chunks(a, from, first, R, values, n, size, chunk, 1, 1, bf16);
}

enum { SCORE, ADD_VALUES }; /* what happens to the places of a span */

/* A step of `rows` <= TILE queries. */
INLINE void span_step(Attention *a, int step, int from, int first, const int R, const char *at, int n, int size, const int bf16) {
    if (step == SCORE) score_places(a, from, first, R, at, n, size, bf16);
    else add_values(a, from, first, R, at, n, size, bf16);
}

static void span_step_bf16(Attention *a, int step, int from, int first, int rows, const char *at, int n, int size) {
#define ROWS(R) case R: span_step(a, step, from, first, R, at, n, size, 1); break;
    switch (rows) { EACH_ROWS }
#undef ROWS
}

static void span_step_fp32(Attention *a, int step, int from, int first, int rows, const char *at, int n, int size) {
#define ROWS(R) case R: span_step(a, step, from, first, R, at, n, size, 0); break;
    switch (rows) { EACH_ROWS }
#undef ROWS
}

/* A step of all queries over n places of a page. */
static void page_step(Attention *a, int step, int from, int count, const char *at, int n, int size, int bf16) {
    if (bf16 && in_attention_tiles(size)) {
        if (step == SCORE) score_in_tiles(a, from, (const uint16_t *)at, n, size);
        else add_in_tiles(a, from, (const uint16_t *)at, n, size);
        return;
    }
    int parts = (count + TILE - 1) / TILE;
    for (int part = 0; part < parts; part++) {
        int first = share(count, part, parts), rows = share(count, part + 1, parts) - first;
        if (bf16) span_step_bf16(a, step, from, first, rows, at, n, size);
        else span_step_fp32(a, step, from, first, rows, at, n, size);
    }
}

/* Softmax weights of a query for n places, of which it sees first..last-1; rescales its sums so far to the new maximum. */
static void weigh_places(Attention *a, int q, int n, int64_t first, int64_t last, int size, int bf16, float cap) {
    float *scores = a->scores[q];
    int start = first < 0 ? 0 : first > n ? n : (int)first, stop = last < start ? start : last > n ? n : (int)last;
    int from = start / 16 * 16, to = (stop + 15) / 16 * 16, end = (n + 31) / 32 * 32;
    vf largest = f_set(a->most[q]), sum = f_set(0);
    if (cap > 0)
        for (int t = from; t < to; t += 16) f_store(scores + t, f_mul(f_set(cap), f_tanh(f_mul(f_load(scores + t), f_set(1 / cap)))));
    for (int t = from; t < start; t++) scores[t] = -INFINITY;
    for (int t = stop; t < to; t++) scores[t] = -INFINITY;
    for (int t = from; t < to; t += 16) largest = f_max(largest, f_load(scores + t));
    float most = f_largest(largest);
    for (int t = from; t < to; t += 16) f_store(scores + t, f_exp(f_sub(f_load(scores + t), f_set(most))));
    for (int t = 0; t < start; t++) scores[t] = 0;
    for (int t = stop; t < end; t++) scores[t] = 0;
    for (int t = 0; t < end; t += 16) {
        if (bf16) f_store_row(a->rounded[q] + t, f_load(scores + t));
        sum = f_add(sum, bf16 ? f_load_row(a->rounded[q] + t) : f_load(scores + t));
    }
    if (most > a->most[q] && a->most[q] > LEAST_SCORE) {
        vf factor = f_exp(f_set(a->most[q] - most));
        f_store(a->total[q], f_mul(f_load(a->total[q]), factor));
        for (int c = 0; c < chunks_of(size); c++) f_store(a->mixed[q] + 16 * c, f_mul(f_load(a->mixed[q] + 16 * c), factor));
    }
    a->most[q] = most;
    f_store(a->total[q], f_add(f_load(a->total[q]), sum));
}

/* A head's keys or values of a row in the page of a place, from the page's first place on. */
INLINE char *in_page(const Shape *s, const Layer *l, const Call *call, int is_value, int row, int head, int64_t place) {
    char *page = call->pages[call->page_rows[row] * call->row_pages + place / PAGE];
    int64_t part = (int64_t)is_value * s->kv_heads + head;
    return page + (l->keys + part * PAGE * s->head_dim) * (s->bf16_cache ? 2 : 4);
}

/* `count` <= MOST_QUERIES queries of a row, given in `a`, over the keys and values of a head. */
static void attend(Attention *a, const Query *queries, int count, const Shape *s, const Layer *l, const Call *call, int row, int head) {
    int size = s->head_dim, bf16 = s->bf16_cache;
    int64_t start = INT64_MAX, stop = 0;
    for (int q = 0; q < count; q++) {
        for (int c = 0; c < chunks_of(size); c++) f_store(a->mixed[q] + 16 * c, f_set(0));
        f_store(a->total[q], f_set(0)), a->most[q] = LEAST_SCORE;
        if (queries[q].sink) a->total[q][0] = 1, a->most[q] = *queries[q].sink;
        start = queries[q].start < start ? queries[q].start : start, stop = queries[q].stop > stop ? queries[q].stop : stop;
    }
    for (int64_t place = start / SPAN_PLACES * SPAN_PLACES; place < stop; place += SPAN_PLACES) {
        int n = stop - place < SPAN_PLACES ? (int)(stop - place) : SPAN_PLACES;
        for (int t = 0; t < n; t += PAGE) {
            const char *keys = in_page(s, l, call, 0, row, head, place + t);
            a->next = in_page(s, l, call, 1, row, head, place + t);
            page_step(a, SCORE, t, count, keys, n - t < PAGE ? n - t : PAGE, size, bf16);
        }
        for (int q = 0; q < count; q++)
            weigh_places(a, q, n, queries[q].start - place, queries[q].stop - place, size, bf16, s->score_cap);
        for (int t = 0; t < n; t += PAGE) {
            const char *values = in_page(s, l, call, 1, row, head, place + t);
            int64_t after = place + SPAN_PLACES + t;
            a->next = after < stop ? in_page(s, l, call, 0, row, head, after) : values;
            page_step(a, ADD_VALUES, t, count, values, n - t < PAGE ? n - t : PAGE, size, bf16);
        }
    }
    for (int q = 0; q < count; q++) {
        vf inverse = f_set(1 / f_sum(f_load(a->total[q])));
        for (int c = 0; c < chunks_of(size); c++) {
            float chunk[16];
            int d = dimension_of(c, size);
            vf sum = f_mul(f_load(a->mixed[q] + 16 * c), inverse);
            if (queries[q].gate) sum = f_mul(sum, logistic(load_up_to(queries[q].gate + d, size - d)));
            f_store(chunk, sum);
            memcpy(queries[q].out + d, chunk, 4 * (size_t)(size - d < 16 ? size - d : 16));
        }
    }
}

/* A query or key x as attention takes it: after its norm, if there is one, and rotation, times `scale`. */
static void rotated(const Shape *s, const Layer *l, const Call *call, const float *x, const Norm *norm, float scale, int64_t place, float *out) {
    int size = s->head_dim, half = l->rope < 0 ? 0 : s->rotary / 2;
    float own[LARGEST_HEAD], last = 1;
    if (norm->weight && !s->norms_projections) {
        if (s->norms_rotated) last = scale, scale = 1;
        else normed(x, norm, size, s->eps, own), x = own;
    }
    const float *cos = call->cos[l->rope > 0] + place * half, *sin = call->sin[l->rope > 0] + place * half;
    for (int i = 0; i < half; i++) {
        float a = x[i] * scale, b = x[i + half] * scale;
        out[i] = a * cos[i] - b * sin[i], out[i + half] = b * cos[i] + a * sin[i];
    }
    for (int i = 2 * half; i < size; i++) out[i] = x[i] * scale;
    if (s->norms_rotated) {
        normed(out, norm, size, s->eps, out);
        for (int i = 0; i < size; i++) out[i] *= last;
    }
}

/* Writes a head's key or value to its place in a page, where the head's keys or values begin at `head`. */
static void keep(const float *x, int size, int bf16, int is_value, int64_t place, char *head) {
    int within = (int)(place % (!is_value ? 16 : bf16 ? 2 : 1));
    place %= PAGE;
    if (bf16) {
        uint16_t rounded[LARGEST_HEAD], *to = (uint16_t *)head + (place - within) * size;
        for (int i = 0; i < size; i += 16) round_some(rounded + i, x + i, size - i);
        if (is_value)
            for (int i = 0; i < size; i++) to[2 * i + within] = rounded[i];
        else
            for (int i = 0; i < size; i += 2) memcpy(to + 16 * i + 2 * within, rounded + i, 4);
    } else {
        float *to = (float *)head + (place - within) * size;
        for (int i = 0; i < size; i++) to[is_value ? i : 16 * i + within] = x[i];
    }
}

/* Whether all numbers are finite, in bf16 too. */
INLINE int are_finite(const float *x, int n) {
    int all = 1;
    for (int i = 0; i < n; i++) all &= fabsf(x[i]) <= 3.3895314e38f;
    return all;
}

/* Writes this thread's part of keys and values to the cache. */
static void place_keys(const Shape *s, const Layer *l, const Call *call, int thread, int threads) {
    int size = s->head_dim, kinds = 2 * s->kv_heads;
    int64_t tasks = (int64_t)call->rows * kinds, end = share_of_many(tasks, thread + 1, threads);
    for (int64_t task = share_of_many(tasks, thread, threads); task < end; task++) {
        int row = (int)(task / kinds), slot = (int)(task % kinds), is_value = slot >= s->kv_heads;
        int64_t place = call->positions[row];
        const float *x = call->qkv + ((size_t)row * (size_t)l->qkv.outputs + (size_t)((s->heads + slot) * size));
        float kept[LARGEST_HEAD];
        int finite = are_finite(is_value ? x : x + s->kv_heads * size, size); /* the head's value */
        if (!finite)
            for (int i = 0; i < size; i++) kept[i] = is_value ? 0 : NAN;
        else if (!is_value) rotated(s, l, call, x, &l->key, 1, place, kept);
        else if (l->value.weight) normed(x, &l->value, size, s->eps, kept);
        else memcpy(kept, x, sizeof(float) * (size_t)size);
        keep(kept, size, s->bf16_cache, is_value, place, in_page(s, l, call, is_value, row, slot % s->kv_heads, place));
    }
}

/* This thread's part of the queries: up to MOST_QUERIES of a sequence that share keys are attended at once. */
static void mix_values(const Shape *s, const Layer *l, const Call *call, int thread, int threads) {
    int size = s->head_dim, group = s->heads / s->kv_heads, bf16 = s->bf16_cache;
    int64_t queries = (int64_t)call->rows * s->heads, end = share_of_many(queries, thread + 1, threads);
    Attention a __attribute__((aligned(64)));
    int shaped = 0, sequence = 0;
    for (int64_t at = share_of_many(queries, thread, threads); at < end;) {
        while (at >= (int64_t)call->starts[sequence + 1] * s->heads) sequence++;
        int first = call->starts[sequence], per_head = (call->starts[sequence + 1] - first) * group;
        int64_t here = at - (int64_t)first * s->heads;
        int within = (int)(here % per_head), count = per_head - within, own = (int)(here / per_head); /* own: head of keys */
        Query run[MOST_QUERIES];
        if (count > MOST_QUERIES) count = MOST_QUERIES;
        if (count > end - at) count = (int)(end - at);
        for (int q = 0; q < count; q++) {
            int64_t row = first + (within + q) / group, query = own * group + (within + q) % group, place = call->positions[row];
            const float *x = call->qkv + row * l->qkv.outputs + query * size;
            float rounding[LARGEST_HEAD];
            rotated(s, l, call, x, &l->query, s->attention_scale, place, bf16 ? rounding : a.queries + q * size);
            if (bf16) form_bf16((RowBf16 *)a.queries + q * size, rounding, size);
            run[q].out = call->mixed + (row * s->heads + query) * size;
            run[q].sink = l->sinks ? l->sinks + query : NULL;
            run[q].gate = s->gates_attention ? x + (s->heads + 2 * s->kv_heads) * size : NULL;
            run[q].start = l->window && place >= l->window ? place + 1 - l->window : 0, run[q].stop = place + 1;
        }
        if (bf16 && in_attention_tiles(size) && count != shaped) shape_tiles(shaped = count, count);
        attend(&a, run, count, s, l, call, first, own);
        at += count;
    }
    if (shaped) release_tiles();
}
