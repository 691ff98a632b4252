/* Products of bf16 matrices by AMX, which multiplies tiles: registers of up to 16 rows of 64 bytes.
 *
 * A step multiplies 32 inputs of up to 16 rows by 16 outputs. As Intel defines it (TDPBF16PS), each output's products of even
 * inputs are summed in their order, those of odd inputs too, and the two sums are added to the output. So a row's bits
 * do not depend on the tile's other rows.
 */
#if defined(__AMX_BF16__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_ROWS 16
#define TILED_ROWS 32 /* of a product: a tile of weights, once loaded, serves two tiles of rows */
#define MOST_ROWS TILED_ROWS
#define AHEAD 2048 /* bytes to prefetch ahead: past the end of a panel, the next one's weights */

enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* Linux: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */

/* Whether the CPU has AMX and Linux lets this process use it, which a process must ask for. */
static int tiles_supported(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    int has_bf16 = d >> 22 & 1, has_tiles = d >> 24 & 1;
    return has_bf16 && has_tiles && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

INLINE int in_tiles(const Matrix *m) { return m->kind == BF16 && m->inputs % 32 == 0; }

/* Tells the compiler that tile instructions read memory. */
INLINE void write_all_memory(void *at) { __asm__ volatile("" : : "r"(at) : "memory"); }

/* Shapes this thread's tiles: 0 to 3 for sums, 4 and 5 for left operands, 6 and 7 for right ones. Tiles 0, 1 and 4 have `upper`
 * rows; 2, 3 and 5 have `lower`. */
static void shape_tiles(int upper, int lower) {
    struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    const int live[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int i = 0; i < 8; i++)
        if (live[i]) config.row_bytes[i] = 64, config.rows[i] = (uint8_t)live[i];
    write_all_memory(&config);
    _tile_loadconfig(&config);
}

INLINE void release_tiles(void) { _tile_release(); }

/* A panel w by the rows x; `two`: more than TILE_ROWS. `coded`: the matrix and panel in 12 bits, of which each step's weights are
 * decoded one step before, in the shadow of tiles (a tile is not read from the CPU's queue of stores): to w, or where that is NULL
 * to a buffer of two steps. */
INLINE void panel_by_tiles(
    uint16_t *w, int n, const char *x, size_t stride, const int two, const Matrix *coded, int panel, float (*out)[PANEL]
) {
    const size_t step = 32 * PANEL, row_bytes = 4 * PANEL; /* of two inputs' weights, and of a row of sums */
    _Alignas(64) uint16_t decoded[2 * 32 * PANEL];
    const int64_t *exceptions = NULL;
    int back = coded && !w; /* each second step is decoded to where the one before the last was */
    if (back) w = decoded;
    if (coded) exceptions = decode(coded, panel, 0, 16, coded->exceptions + coded->starts[panel], (char *)w, 0);
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = 0; i < n; i += 32, x += 64) {
        uint16_t *next = back && i / 32 % 2 ? w - step : w + step;
        if (coded) {
            int unit = i / 2 + 16;
            if (i + 32 < n) exceptions = decode(coded, panel, unit, unit + 16, exceptions, (char *)next, 0);
            write_all_memory(w);
        } else {
            for (size_t k = 0; k < step; k += 32) fetch_line((const char *)(w + k) + AHEAD);
        }
        _tile_loadd(4, x, stride);
        _tile_loadd(6, w, row_bytes);
        _tile_loadd(7, w + 32, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        w = next;
        if (!two) continue;
        _tile_loadd(5, x + TILE_ROWS * stride, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out[0], row_bytes);
    _tile_stored(1, out[0] + 16, row_bytes);
    if (!two) return;
    _tile_stored(2, out[TILE_ROWS], row_bytes);
    _tile_stored(3, out[TILE_ROWS] + 16, row_bytes);
}

/* For panels by `rows` <= TILED_ROWS rows. */
static void shape_tiles_for(int rows) {
    int upper = rows < TILE_ROWS ? rows : TILE_ROWS;
    shape_tiles(upper, rows - upper);
}

/* A panel of a matrix by the rows x, for whose number the tiles were shaped. */
static void panel_in_tiles(const Matrix *m, int panel, const char *x, size_t stride, int rows, float (*out)[PANEL]) {
    char *panels = m->high ? m->room : (char *)m->weight;
    uint16_t *w = panels ? (uint16_t *)(panels + (size_t)panel * PANEL * 2 * (size_t)m->inputs) : NULL;
    write_all_memory(out);
    if (m->high && rows > TILE_ROWS) panel_by_tiles(w, m->inputs, x, stride, 1, m, panel, out);
    else if (m->high) panel_by_tiles(w, m->inputs, x, stride, 0, m, panel, out);
    else if (rows > TILE_ROWS) panel_by_tiles(w, m->inputs, x, stride, 1, NULL, 0, out);
    else panel_by_tiles(w, m->inputs, x, stride, 0, NULL, 0, out);
}

#else

#define TILED_ROWS 0
#define MOST_ROWS (TILES * TILE) /* see panel_in_steps */

INLINE int tiles_supported(void) { return 1; } /* none are needed */
INLINE int in_tiles(const Matrix *m) { return (void)m, 0; }
INLINE void shape_tiles_for(int rows) { (void)rows; }
INLINE void release_tiles(void) {}
INLINE void panel_in_tiles(const Matrix *m, int panel, const char *x, size_t stride, int rows, float (*out)[PANEL]) {
    (void)m, (void)panel, (void)x, (void)stride, (void)rows, (void)out;
}

#endif
