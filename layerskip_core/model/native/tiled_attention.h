/* Attention's products by AMX: the bf16 layout of attention.h is that of tiles. */
#if defined(__AMX_BF16__)

INLINE int in_attention_tiles(int size) { return size % 32 == 0; }

/* Scores of all queries, for which the tiles were shaped, and n places. */
INLINE void score_in_tiles(Attention *a, int from, const uint16_t *keys, int n, int size) {
    write_all_memory(a);
    for (int t = 0; t < n; t += 32, keys += 32 * size) {
        _tile_zero(0);
        _tile_zero(1);
        for (int d = 0; d < size; d += 32) {
            _tile_loadd(4, (const uint16_t *)a->queries + d, 2 * (size_t)size);
            _tile_loadd(6, keys + 16 * d, 64);
            _tile_loadd(7, keys + 16 * (d + size), 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, a->scores[0] + from + t, sizeof a->scores[0]);
        _tile_stored(1, a->scores[0] + from + t + 16, sizeof a->scores[0]);
    }
    write_all_memory(a);
}

/* Adds the values of n places times their weights: 64 dimensions from d on, or 32. */
INLINE void add_dimensions(Attention *a, int from, const uint16_t *values, int n, int size, int d, const int wide) {
    size_t row = 4 * (size_t)size, mixed_row = sizeof a->mixed[0];
    float *mixed = a->mixed[0] + d;
    _tile_loadd(0, mixed, mixed_row);
    _tile_loadd(1, mixed + 16, mixed_row);
    if (wide) {
        _tile_loadd(2, mixed + 32, mixed_row);
        _tile_loadd(3, mixed + 48, mixed_row);
    }
    values += 2 * d;
    for (int t = 0; t < n; t += 32, values += 32 * size) {
        _tile_loadd(4, a->rounded[0] + from + t, sizeof a->rounded[0]);
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
    _tile_stored(0, mixed, mixed_row);
    _tile_stored(1, mixed + 16, mixed_row);
    if (!wide) return;
    _tile_stored(2, mixed + 32, mixed_row);
    _tile_stored(3, mixed + 48, mixed_row);
}

INLINE void add_in_tiles(Attention *a, int from, const uint16_t *values, int n, int size) {
    int d = 0;
    write_all_memory(a);
    for (; d + 64 <= size; d += 64) add_dimensions(a, from, values, n, size, d, 1);
    if (d < size) add_dimensions(a, from, values, n, size, d, 0);
    write_all_memory(a);
}

#else

INLINE int in_attention_tiles(int size) { return (void)size, 0; }
INLINE void shape_tiles(int upper, int lower) { (void)upper, (void)lower; }
INLINE void score_in_tiles(Attention *a, int from, const uint16_t *keys, int n, int size) { (void)a, (void)from, (void)keys, (void)n, (void)size; }
INLINE void add_in_tiles(Attention *a, int from, const uint16_t *values, int n, int size) { (void)a, (void)from, (void)values, (void)n, (void)size; }

#endif
