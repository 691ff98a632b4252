/* Sixteen lanes as two halves by AVX2 and FMA: see lanes.h. */
#include <immintrin.h>

typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi;
#define TILE 2
#define LOW_BIT_TILE 2
#define LEVEL_OFFSET 128
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
INLINE void fetch_line(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
INLINE void relax(void) { _mm_pause(); }

INLINE int lanes_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
