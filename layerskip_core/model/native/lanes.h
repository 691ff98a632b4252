/* Sixteen lanes of fp32, by AVX-512 or as two halves by AVX2: all that the kernels need of an instruction set. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

typedef __m512 vf;  /* 16 floats */
typedef __m512i vi; /* 16 int32, or 64 bytes */
#define TILE 12 /* most rows that share a weight once it is loaded: 24 sums of 32 registers */
#define LOW_BIT_TILE 8
#define EACH_ROWS ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)

INLINE vf f_set(float x) { return _mm512_set1_ps(x); }
INLINE vf f_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void f_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf f_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf f_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf f_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf f_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf f_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf f_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf f_abs(vf a) { return _mm512_abs_ps(a); }
INLINE vf f_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float f_sum(vf a) { return _mm512_reduce_add_ps(a); }
INLINE float f_largest(vf a) { return _mm512_reduce_max_ps(a); }
INLINE vf f_of_int(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vi i_rounded(vf a) { return _mm512_cvtps_epi32(a); }
INLINE vi i_bits(vf a) { return _mm512_castps_si512(a); }
INLINE vf f_power_of_two(vi n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23)); }
INLINE vf f_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE void f_store_bf16(uint16_t *p, vf a) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(a)); }
INLINE void f_store_int8(int8_t *p, vf a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a))); }
INLINE vi i_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi i_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vi i_low(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE vi i_high(vi a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
/* acc + the product of each lane's pair of bf16 with the pair x. */
INLINE vf dot_bf16(vf acc, vi w, uint32_t x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x)); }
/* acc + the product of each lane's four uint8 with the four int8 of x. */
INLINE vi dot_int8(vi acc, vi w, int32_t x) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)); }
INLINE vi dot_int4(vi acc, vi w, int32_t x) { return dot_int8(acc, w, x); }

#else /* AVX2 and FMA */

typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi;
#define TILE 2
#define LOW_BIT_TILE 2
#define EACH_ROWS ROWS(1) ROWS(2)
#define BOTH(type, one, other) ((type){(one), (other)})

INLINE vf f_set(float x) { return BOTH(vf, _mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE vf f_load(const float *p) { return BOTH(vf, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
INLINE void f_store(float *p, vf x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
INLINE vf f_add(vf x, vf y) { return BOTH(vf, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
INLINE vf f_sub(vf x, vf y) { return BOTH(vf, _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
INLINE vf f_mul(vf x, vf y) { return BOTH(vf, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
INLINE vf f_div(vf x, vf y) { return BOTH(vf, _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
INLINE vf f_max(vf x, vf y) { return BOTH(vf, _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
INLINE vf f_min(vf x, vf y) { return BOTH(vf, _mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
INLINE __m256 half_abs(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE vf f_abs(vf x) { return BOTH(vf, half_abs(x.a), half_abs(x.b)); }
INLINE vf f_fma(vf x, vf y, vf z) { return BOTH(vf, _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)); }
INLINE float f_sum(vf x) {
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
INLINE float f_largest(vf x) {
    __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
INLINE vf f_of_int(vi x) { return BOTH(vf, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
INLINE vi i_rounded(vf x) { return BOTH(vi, _mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)); }
INLINE vi i_bits(vf x) { return BOTH(vi, _mm256_castps_si256(x.a), _mm256_castps_si256(x.b)); }
INLINE __m256 half_power(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
INLINE vf f_power_of_two(vi n) { return BOTH(vf, half_power(n.a), half_power(n.b)); }
INLINE __m256 half_of_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE vf f_load_bf16(const uint16_t *p) { return BOTH(vf, half_of_bf16(p), half_of_bf16(p + 8)); }
INLINE __m256i half_bf16(__m256 x) { /* in 32 bits each, to the nearest, ties to even */
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
INLINE void f_store_bf16(uint16_t *p, vf x) {
    __m256i mixed = _mm256_packus_epi32(half_bf16(x.a), half_bf16(x.b)); /* halves of 128 bits alternate */
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(mixed, 0xd8));
}
INLINE void f_store_int8(int8_t *p, vf x) {
    int32_t n[16];
    vi r = i_rounded(x);
    _mm256_storeu_si256((__m256i *)n, r.a), _mm256_storeu_si256((__m256i *)(n + 8), r.b);
    for (int i = 0; i < 16; i++) p[i] = (int8_t)n[i];
}
INLINE vi i_set(int32_t x) { return BOTH(vi, _mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
INLINE vi i_load(const void *p) {
    return BOTH(vi, _mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1));
}
INLINE __m256i half_low(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE vi i_low(vi x) { return BOTH(vi, half_low(x.a), half_low(x.b)); }
INLINE vi i_high(vi x) { return BOTH(vi, half_low(_mm256_srli_epi16(x.a, 4)), half_low(_mm256_srli_epi16(x.b, 4))); }
INLINE __m256 half_dot_bf16(__m256 acc, __m256i w, __m256 first, __m256 second) {
    acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), first, acc);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000))), second, acc);
}
INLINE vf dot_bf16(vf acc, vi w, uint32_t x) {
    __m256 first = _mm256_castsi256_ps(_mm256_set1_epi32((int)(x << 16)));
    __m256 second = _mm256_castsi256_ps(_mm256_set1_epi32((int)(x & 0xffff0000)));
    return BOTH(vf, half_dot_bf16(acc.a, w.a, first, second), half_dot_bf16(acc.b, w.b, first, second));
}
/* Of levels up to 15, whose pairs of products fit into 16 bits. */
INLINE __m256i half_dot_int4(__m256i acc, __m256i w, __m256i x, int times) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16((short)times)));
}
INLINE vi dot_int4(vi acc, vi w, int32_t x) {
    __m256i xs = _mm256_set1_epi32(x);
    return BOTH(vi, half_dot_int4(acc.a, w.a, xs, 1), half_dot_int4(acc.b, w.b, xs, 1));
}
INLINE vi dot_int8(vi acc, vi w, int32_t x) {
    __m256i xs = _mm256_set1_epi32(x);
    vi low = i_low(w), high = i_high(w);
    acc = BOTH(vi, half_dot_int4(acc.a, low.a, xs, 1), half_dot_int4(acc.b, low.b, xs, 1));
    return BOTH(vi, half_dot_int4(acc.a, high.a, xs, 16), half_dot_int4(acc.b, high.b, xs, 16));
}

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
