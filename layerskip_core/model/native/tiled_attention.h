/* Attention by AMX, of up to 16 queries that share keys and values.
 *
 * What is summed over stands in pairs in the cache, as in the weights: a head's keys are (block of 16 places, pair of
 * dimensions, place, 2), its values (block of 32 places, pair of places, dimension, 2). Scores and sums are fp32, weights bf16.
 * Places come in spans, with sums on the scale of the largest score so far (Milakov and Gimelshein, 2018), and spans start at
 * the same places for every query. What a query does not see has weight 0 and changes no bit of its sums.
 */
#define SPAN_PLACES 128
#define LARGEST_HEAD (16 * MOST_CHUNKS)

#if defined(__AMX_BF16__)

/* Whether the cache has this layout. Its places are then a multiple of 32. */
INLINE int tiled_cache(const Shape *s) { return s->bf16_cache && s->head_dim % 32 == 0; }

/* A key or a value to its place of a head. */
static void keep_in_tiles(const float *x, int size, int is_value, int64_t place, uint16_t *head) {
    int pairs = is_value ? 32 : 16, within = (int)(place % pairs);
    uint16_t *to = head + (place - within) * size + (is_value ? within / 2 * 2 * size + within % 2 : 2 * within);
    uint16_t rounded[LARGEST_HEAD];
    for (int i = 0; i < size; i += 16) f_store_bf16(rounded + i, f_load(x + i));
    for (int i = 0; i < size; i++) to[is_value ? 2 * i : i / 2 * 32 + i % 2] = rounded[i];
}

typedef struct {
    const float *query;
    float *out;
    int64_t start, stop; /* of the places seen */
} Query;

typedef struct {
    float scores[TILE_ROWS * SPAN_PLACES], mixed[TILE_ROWS * LARGEST_HEAD], total[TILE_ROWS][16], most[TILE_ROWS];
    uint16_t queries[TILE_ROWS * LARGEST_HEAD], weights[TILE_ROWS * SPAN_PLACES];
} Attention;

/* Scores of all queries and n places. */
INLINE void score_places(Attention *a, const uint16_t *keys, int n, int size) {
    for (int t = 0; t < n; t += 32, keys += 32 * size) {
        _tile_zero(0);
        _tile_zero(1);
        for (int d = 0; d < size; d += 32) {
            _tile_loadd(4, a->queries + d, 2 * (size_t)size);
            _tile_loadd(6, keys + 16 * d, 64);
            _tile_loadd(7, keys + 16 * (d + size), 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, a->scores + t, 4 * SPAN_PLACES);
        _tile_stored(1, a->scores + t + 16, 4 * SPAN_PLACES);
    }
}

/* A query's weights of n places, of which it sees first..last-1, and its sums so far on the scale of the new maximum. */
INLINE void weigh_places(Attention *a, int query, int n, int64_t first, int64_t last, int size, float cap) {
    float *scores = a->scores + query * SPAN_PLACES, *mixed = a->mixed + query * size;
    vf largest = f_set(a->most[query]), sum = f_set(0);
    __mmask16 seen[SPAN_PLACES / 16];
    for (int t = 0; t < n; t += 16) {
        __mmask16 from = t < first ? (first - t < 16 ? (__mmask16)(0xffffu << (first - t)) : 0) : 0xffff;
        __mmask16 to = last - t < 16 ? (last > t ? (__mmask16)((1u << (last - t)) - 1) : 0) : 0xffff;
        seen[t / 16] = from & to;
        if (!seen[t / 16]) continue;
        vf score = f_load(scores + t);
        if (cap > 0) f_store(scores + t, score = f_mul(f_set(cap), f_tanh(f_mul(score, f_set(1 / cap)))));
        largest = _mm512_mask_max_ps(largest, seen[t / 16], largest, score);
    }
    float most = f_largest(largest);
    for (int t = 0; t < n; t += 16) {
        __m256i weight = _mm256_setzero_si256();
        if (seen[t / 16])
            weight = (__m256i)_mm512_maskz_cvtneps_pbh(seen[t / 16], f_exp(f_sub(f_load(scores + t), f_set(most))));
        _mm256_store_si256((__m256i *)(a->weights + query * SPAN_PLACES + t), weight);
        sum = f_add(sum, f_load_bf16(a->weights + query * SPAN_PLACES + t));
    }
    if (most > a->most[query]) {
        vf factor = f_exp(f_set(a->most[query] - most));
        f_store(a->total[query], f_mul(f_load(a->total[query]), factor));
        for (int i = 0; i < size; i += 16) f_store(mixed + i, f_mul(f_load(mixed + i), factor));
        a->most[query] = most;
    }
    f_store(a->total[query], f_add(f_load(a->total[query]), sum));
}

/* Adds the values of n places by their weights: 64 dimensions from d on, or 32. */
INLINE void add_values(Attention *a, const uint16_t *values, int n, int size, int d, const int wide) {
    size_t row = 4 * (size_t)size;
    float *mixed = a->mixed + d;
    _tile_loadd(0, mixed, row);
    _tile_loadd(1, mixed + 16, row);
    if (wide) {
        _tile_loadd(2, mixed + 32, row);
        _tile_loadd(3, mixed + 48, row);
    }
    values += 2 * d;
    for (int t = 0; t < n; t += 32, values += 32 * size) {
        _tile_loadd(4, a->weights + t, 2 * SPAN_PLACES);
        _tile_loadd(6, values, row);
        _tile_loadd(7, values + 32, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!wide) continue;
        _tile_loadd(6, values + 64, row);
        _tile_loadd(7, values + 96, row);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, mixed, row);
    _tile_stored(1, mixed + 16, row);
    if (!wide) return;
    _tile_stored(2, mixed + 32, row);
    _tile_stored(3, mixed + 48, row);
}

/* `count` <= TILE_ROWS queries, for which the tiles were shaped, over a head's keys and values. */
static void attend_in_tiles(const Query *queries, int count, const uint16_t *keys, const uint16_t *values, int size, float cap) {
    Attention a __attribute__((aligned(64)));
    int64_t start = INT64_MAX, stop = 0;
    for (int q = 0; q < count; q++) {
        for (int i = 0; i < size; i += 16) {
            f_store_bf16(a.queries + q * size + i, f_load(queries[q].query + i));
            f_store(a.mixed + q * size + i, f_set(0));
        }
        f_store(a.total[q], f_set(0)), a.most[q] = -1e30f;
        start = queries[q].start < start ? queries[q].start : start, stop = queries[q].stop > stop ? queries[q].stop : stop;
    }
    for (int64_t place = start / SPAN_PLACES * SPAN_PLACES; place < stop; place += SPAN_PLACES) {
        int n = stop - place < SPAN_PLACES ? (int)(stop - place + 31) / 32 * 32 : SPAN_PLACES;
        write_all_memory(&a);
        score_places(&a, keys + place * size, n, size);
        for (int q = 0; q < count; q++)
            weigh_places(&a, q, n, queries[q].start - place, queries[q].stop - place, size, cap);
        write_all_memory(&a);
        int d = 0;
        for (; d + 64 <= size; d += 64) add_values(&a, values + place * size, n, size, d, 1);
        if (d < size) add_values(&a, values + place * size, n, size, d, 0);
    }
    for (int q = 0; q < count; q++) {
        vf inverse = f_set(1 / f_sum(f_load(a.total[q])));
        for (int i = 0; i < size; i += 16) f_store(queries[q].out + i, f_mul(f_load(a.mixed + q * size + i), inverse));
    }
}

/* This thread's part of the queries; those of a sequence that share keys stand next to each other, up to TILE_ROWS at once. */
static void mix_values_in_tiles(const Shape *s, const Layer *l, const Call *call, int layer, int thread, int threads) {
    int size = s->head_dim, group = s->heads / s->kv_heads, per_head = call->rows_per_sequence * group, shaped = 0;
    int64_t queries = (int64_t)call->rows * s->heads, end = share_of_many(queries, thread + 1, threads);
    for (int64_t at = share_of_many(queries, thread, threads); at < end;) {
        int64_t head = at / per_head, sequence = head / s->kv_heads; /* head: of keys, of all sequences */
        int within = (int)(at % per_head), count = per_head - within;
        Query run[TILE_ROWS];
        if (count > TILE_ROWS) count = TILE_ROWS;
        if (count > end - at) count = (int)(end - at);
        int first = (int)(sequence * call->rows_per_sequence);
        for (int i = 0; i < count; i++) {
            int64_t row = first + (within + i) / group, query = head % s->kv_heads * group + (within + i) % group;
            int64_t stop = call->positions[row] + 1;
            run[i].query = call->qkv + (row * (s->heads + 2 * s->kv_heads) + query) * size;
            run[i].out = call->mixed + (row * s->heads + query) * size;
            run[i].start = l->window && stop > l->window ? stop - l->window : 0, run[i].stop = stop;
        }
        const uint16_t *keys = (const uint16_t *)place_of(s, call, layer, 0, first, (int)(head % s->kv_heads), 0);
        const uint16_t *values = (const uint16_t *)place_of(s, call, layer, 1, first, (int)(head % s->kv_heads), 0);
        if (count != shaped) shape_tiles(shaped = count, count);
        attend_in_tiles(run, count, keys, values, size, s->score_cap);
        at += count;
    }
    release_tiles();
}

#else

INLINE int tiled_cache(const Shape *s) { return (void)s, 0; }
INLINE void keep_in_tiles(const float *x, int size, int is_value, int64_t place, uint16_t *head) {
    (void)x, (void)size, (void)is_value, (void)place, (void)head;
}
INLINE void mix_values_in_tiles(const Shape *s, const Layer *l, const Call *call, int layer, int thread, int threads) {
    (void)s, (void)l, (void)call, (void)layer, (void)thread, (void)threads;
}

#endif
