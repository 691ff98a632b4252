/* Sixteen lanes in one register of AVX-512, with its VNNI and BF16 instructions: see lanes.h.
 *
 * With WIDEN_BF16, for Intel, bf16 is multiplied as fp32: there VDPBF16PS has half the multiply-adds per second of VFMADD231PS.
 */
#include <immintrin.h>

typedef __m512 vf;  /* 16 floats */
typedef __m512i vi; /* 16 int32, or 64 bytes */
#define SUMS 24       /* vectors of sums that registers hold */
#define TILE 10       /* most rows that share a loaded weight; more would leave no registers for the rows' addresses */
#define WHOLE_TILE 10 /* and of a whole panel, */
#define WIDENED_TILE 10 /* of weights of any kind */
#define LOW_BIT_TILE 7
#define MOST_PANELS 4 /* multiplied together */
#define EACH_ROWS ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10)

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
INLINE vf f_add_product(vf sum, vf a, vf b) { return f_fma(a, b, sum); }
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
INLINE vi i_load_int8(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vf f_load_fp16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vi i_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi i_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void i_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
INLINE vi i_interleaved(vi a, vi b, int second) { return second ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b); }
INLINE vi i_low(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE vi i_high(vi a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
INLINE vi i_or(vi a, vi b) { return _mm512_or_si512(a, b); }
INLINE vi i_lookup(const int8_t *table, vi a, int high) { /* four copies, so index bits above the fourth do not matter */
    __m512i tables = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return _mm512_permutexvar_epi8(high ? _mm512_srli_epi16(a, 4) : a, tables);
}
INLINE vi i_bits_of(vi a, int left, int mask) {
    return _mm512_and_si512(left < 0 ? _mm512_srli_epi16(a, -left) : _mm512_slli_epi16(a, left), _mm512_set1_epi8((char)mask));
}

#ifdef WIDEN_BF16
#define BF16_PARTS 2
INLINE vf f_first(vi pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
INLINE vf f_second(vi pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000))); }
#else
#define BF16_PARTS 1
INLINE vf dot_bf16(vf acc, vi w, vi x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
#endif

#define LEVEL_OFFSET 128
#define INT8_PARTS 1
INLINE vi int8_part(vi w, int part) { return (void)part, w; }
INLINE vi dot_int8(vi sum, vi w, vi x) { return _mm512_dpbusd_epi32(sum, w, x); }
INLINE vi dot_int4(vi sum, vi w, vi x) { return dot_int8(sum, w, x); }
INLINE vi int4_sum(vi sum) { return sum; }

INLINE void fetch_line(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
INLINE void fetch_line_later(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); } /* into L2 */
INLINE void relax(void) { _mm_pause(); }

INLINE int lanes_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi")
#ifdef WIDEN_BF16
           && __builtin_cpu_is("intel")
#endif
        ;
}
