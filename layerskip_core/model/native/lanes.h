/* Sixteen lanes of fp32. lanes_*.h define them, each for one instruction set, and hold all that the kernels need of it; what
 * follows is the same for all.
 *
 * dot_bf16 adds to each lane the product of its pair of bf16 with the pair x. dot_int8 and dot_int4 add that of its four levels
 * with the four int8 of x, of which none is -128. Levels of int4 are 0 to 15; those of int8 are stored plus 128, of which dot_int8
 * leaves LEVEL_OFFSET in them. TILE is the most rows that share a weight once it is loaded, as many as there are registers for.
 */
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_neon.h"
#endif

INLINE vf f_set_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return f_set(x);
}

/* The first n of sixteen numbers, n being at most 15, with zeros after them. */
INLINE vf f_load_some(const float *p, int n) {
    float some[16] = {0};
    memcpy(some, p, 4 * (size_t)n);
    return f_load(some);
}

/* Sixteen numbers to bf16, or the n that there are if these are fewer. */
INLINE void round_some(uint16_t *to, const float *x, int n) {
    if (n >= 16) {
        f_store_bf16(to, f_load(x));
        return;
    }
    uint16_t rounded[16];
    f_store_bf16(rounded, f_load_some(x, n));
    memcpy(to, rounded, 2 * (size_t)n);
}

/* exp: 2^n times a polynomial of degree 5 on half a logarithm of two each side (Cephes' expf), within two units in the last place. */
INLINE vf f_exp(vf x) {
    x = f_max(f_min(x, f_set(88.0f)), f_set(-87.0f));
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
