/* Sixteen lanes of fp32. lanes_*.h define them, each for one instruction set, and hold all that the kernels need of it; what
 * follows is the same for all.
 *
 * SUMS: vectors of sums that registers hold besides the operands. TILE: most rows that share a loaded weight of half a panel;
 * WHOLE_TILE (fp32) and WIDENED_TILE: of a whole panel; see products.h. f_add_product: f_fma for such a sum.
 *
 * 64 bytes of weights are multiplied in parts: without instructions for bf16 pairs or int8 quads they are widened, and so are
 * rows when they are converted. dot_bf16 adds to each lane the product of its part with the row's. dot_int8 and dot_int4 add
 * products of weight levels with row levels, which are never -128. Levels of int4 have four bits; int4_sum widens the sums of a
 * group's dots. Levels of int8 are stored plus 128, of which int8_part leaves LEVEL_OFFSET. dot_low_bit takes parts of unsigned
 * levels below eight bits. Row levels of 15 bits stand in PLANES, two of bytes or one of 16 bits, whose dots f_of_planes adds.
 * i_lookup indexes a table by the low or high halves of bytes. i_interleaved: of each 16 bytes of two vectors the first or second
 * eight, taken in turns.
 */
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE int32_t four_bytes(const void *p) {
    int32_t bytes;
    memcpy(&bytes, p, 4);
    return bytes;
}

#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_neon.h"
#endif

INLINE vf f_load_int8(const int8_t *p) { return f_of_int(i_load_int8(p)); }

/* ---- rows, as bf16 weights or levels multiply them ---- */

#if BF16_PARTS == 1
typedef uint16_t RowBf16;
typedef vi Bf16;
INLINE void f_store_row(RowBf16 *p, vf x) { f_store_bf16(p, x); }
INLINE vf f_load_row(const RowBf16 *p) { return f_load_bf16(p); }
INLINE Bf16 bf16_part(vi w, int part) { return (void)part, w; }
INLINE Bf16 bf16_value(const RowBf16 *pair, int part) { return (void)part, i_set(four_bytes(pair)); }
INLINE void bf16_store(char *p, Bf16 w) { i_store(p, w); }
#else
typedef float RowBf16;
typedef vf Bf16;
INLINE void f_store_row(RowBf16 *p, vf x) {
    uint16_t rounded[16];
    f_store_bf16(rounded, x), f_store(p, f_load_bf16(rounded));
}
INLINE vf f_load_row(const RowBf16 *p) { return f_load(p); }
INLINE Bf16 bf16_part(vi w, int part) { return part ? f_second(w) : f_first(w); }
INLINE Bf16 bf16_value(const RowBf16 *pair, int part) { return f_set(pair[part]); }
INLINE void bf16_store(char *p, Bf16 w) { f_store((float *)p, w); }
INLINE vf dot_bf16(vf acc, Bf16 w, Bf16 x) { return f_add_product(acc, x, w); }
#endif

#if INT8_PARTS == 1
#define PLANES 2
typedef int8_t RowInt8;
INLINE void f_store_levels(RowInt8 *p, vf x) { f_store_int8(p, x); }
/* Level i is 128 * p[i] + p[n + i]. */
INLINE void f_store_wide_levels(RowInt8 *p, int n, vf x) {
    vf high = f_of_int(i_rounded(f_mul(x, f_set(1.0f / 128))));
    f_store_int8(p, high), f_store_int8(p + n, f_fma(high, f_set(-128), x));
}
INLINE vf f_of_planes(const vi *sums) { return f_fma(f_of_int(sums[0]), f_set(128), f_of_int(sums[1])); }
INLINE vi low_bit_part(vi w, int part) { return (void)part, w; }
INLINE vi dot_low_bit(vi sum, vi w, vi x) { return dot_int4(sum, w, x); }
#else
#define PLANES 1
typedef int16_t RowInt8;
INLINE void f_store_wide_levels(RowInt8 *p, int n, vf x) { (void)n, f_store_levels(p, x); }
INLINE vf f_of_planes(const vi *sums) { return f_of_int(sums[0]); }
INLINE vi low_bit_part(vi w, int part) { return int8_part(w, part); }
INLINE vi dot_low_bit(vi sum, vi w, vi x) { return dot_int8(sum, w, x); }
#endif
INLINE vi int8_value(const RowInt8 *quad, int part) { return i_set(four_bytes(quad + 2 * part)); }
INLINE vi int4_value(const int8_t *quad) { return i_set(four_bytes(quad)); }

/* Loads n <= 15 numbers, with zeros after them. */
INLINE vf f_load_some(const float *p, int n) {
    float some[16] = {0};
    memcpy(some, p, 4 * (size_t)n);
    return f_load(some);
}

/* Rounds min(n, 16) numbers to bf16. */
INLINE void round_some(uint16_t *to, const float *x, int n) {
    if (n >= 16) {
        f_store_bf16(to, f_load(x));
        return;
    }
    uint16_t rounded[16];
    f_store_bf16(rounded, f_load_some(x, n));
    memcpy(to, rounded, 2 * (size_t)n);
}

/* A row of n numbers as bf16. */
INLINE void form_bf16(RowBf16 *to, const float *x, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) f_store_row(to + i, f_load(x + i));
    if (i == n) return;
    RowBf16 rest[16];
    f_store_row(rest, f_load_some(x + i, n - i));
    memcpy(to + i, rest, sizeof(RowBf16) * (size_t)(n - i));
}

/* exp: 2^n times a polynomial of degree 5 on half a logarithm of two each side (Cephes' expf), within two units in the last place. */
INLINE vf f_exp(vf x) {
    x = f_max(f_set(-87.0f), f_min(f_set(88.0f), x)); /* in this order NaN stays NaN on x86 too */
    vi n = i_rounded(f_mul(x, f_set(1.44269504f)));
    vf k = f_of_int(n);
    x = f_fma(k, f_set(2.12194440e-4f), f_fma(k, f_set(-0.693359375f), x));
    vf p = f_set(1.9875691500e-4f);
    p = f_fma(p, x, f_set(1.3981999507e-3f));
    p = f_fma(p, x, f_set(8.3334519073e-3f));
    p = f_fma(p, x, f_set(4.1665795894e-2f));
    p = f_fma(p, x, f_set(1.6666665459e-1f));
    p = f_fma(p, x, f_set(5.0000001201e-1f));
    return f_mul(f_add(f_fma(p, f_mul(x, x), x), f_set(1.0f)), f_power_of_two(n));
}

/* Within 2e-7 of the true value; not exact near 0. */
INLINE vf f_tanh(vf x) { return f_sub(f_set(1), f_div(f_set(2), f_add(f_exp(f_add(x, x)), f_set(1)))); }

INLINE vf load_up_to(const float *p, int n) { return n >= 16 ? f_load(p) : f_load_some(p, n); }

INLINE vf logistic(vf x) { return f_div(f_set(1), f_add(f_set(1), f_exp(f_sub(f_set(0), x)))); }
