/* Sixteen lanes as two halves by AVX2 and FMA, with VNNI if the target has it: see lanes.h. */
#include <cpuid.h>
#include <immintrin.h>

typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi;
#define SUMS 6        /* vectors of sums that registers hold */
#define TILE 6        /* most rows that share a loaded weight of half a panel */
#define WHOLE_TILE 3  /* and of a whole panel, */
#define WIDENED_TILE 2 /* of widened weights, which take registers */
#define MOST_PANELS 2 /* multiplied together */
#define EACH_ROWS ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
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
/* Keeps the sum in its register: with the intrinsic the compiler moves sums to new registers, and runs out of them. */
INLINE __m256 half_add_product(__m256 sum, __m256 x, __m256 y) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "xm"(y));
    return sum;
}
INLINE vf f_add_product(vf sum, vf x, vf y) {
    return BOTH(vf, half_add_product(sum.a, x.a, y.a), half_add_product(sum.b, x.b, y.b));
}
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
INLINE __m256i packed_int16(vi x) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8); }
INLINE void f_store_int8(int8_t *p, vf x) {
    __m256i wide = packed_int16(i_rounded(x));
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
}
INLINE __m256i half_of_int8(const int8_t *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE vi i_load_int8(const int8_t *p) { return BOTH(vi, half_of_int8(p), half_of_int8(p + 8)); }
INLINE __m256 half_of_fp16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vf f_load_fp16(const uint16_t *p) { return BOTH(vf, half_of_fp16(p), half_of_fp16(p + 8)); }
INLINE vi i_set(int32_t x) { return BOTH(vi, _mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
INLINE vi i_load(const void *p) {
    return BOTH(vi, _mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1));
}
INLINE void i_store(void *p, vi x) { _mm256_storeu_si256((__m256i *)p, x.a), _mm256_storeu_si256((__m256i *)p + 1, x.b); }
INLINE vi i_interleaved(vi x, vi y, int second) {
    return second ? BOTH(vi, _mm256_unpackhi_epi8(x.a, y.a), _mm256_unpackhi_epi8(x.b, y.b))
                  : BOTH(vi, _mm256_unpacklo_epi8(x.a, y.a), _mm256_unpacklo_epi8(x.b, y.b));
}
INLINE __m256i half_low(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE vi i_low(vi x) { return BOTH(vi, half_low(x.a), half_low(x.b)); }
INLINE vi i_high(vi x) { return BOTH(vi, half_low(_mm256_srli_epi16(x.a, 4)), half_low(_mm256_srli_epi16(x.b, 4))); }
INLINE vi i_or(vi x, vi y) { return BOTH(vi, _mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)); }
INLINE vi i_lookup(const int8_t *table, vi x, int high) {
    vi indices = high ? i_high(x) : i_low(x);
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return BOTH(vi, _mm256_shuffle_epi8(both, indices.a), _mm256_shuffle_epi8(both, indices.b));
}
INLINE __m256i half_bits_of(__m256i x, int left, int mask) {
    return _mm256_and_si256(left < 0 ? _mm256_srli_epi16(x, -left) : _mm256_slli_epi16(x, left), _mm256_set1_epi8((char)mask));
}
INLINE vi i_bits_of(vi x, int left, int mask) { return BOTH(vi, half_bits_of(x.a, left, mask), half_bits_of(x.b, left, mask)); }

/* bf16 pairs are widened. */
#define BF16_PARTS 2
INLINE __m256 half_first(__m256i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
INLINE __m256 half_second(__m256i w) { return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000))); }
INLINE vf f_first(vi w) { return BOTH(vf, half_first(w.a), half_first(w.b)); }
INLINE vf f_second(vi w) { return BOTH(vf, half_second(w.a), half_second(w.b)); }

#define LEVEL_OFFSET 128
#if defined(__AVXVNNI__) || defined(EVEX_VNNI)

#define LOW_BIT_TILE 6
#define INT8_PARTS 1
#if defined(__AVXVNNI__)
#define ENCODING "%{vex%}"
#else /* of AVX-512 VNNI; its intrinsic would let the compiler use other AVX-512 instructions too */
#define ENCODING "%{evex%}"
#endif
INLINE __m256i half_dot(__m256i sum, __m256i w, __m256i x) {
    __asm__(ENCODING " vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "xm"(x));
    return sum;
}
INLINE vi int8_part(vi w, int part) { return (void)part, w; }
INLINE vi dot_int8(vi sum, vi w, vi x) { return BOTH(vi, half_dot(sum.a, w.a, x.a), half_dot(sum.b, w.b, x.b)); }
INLINE vi dot_int4(vi sum, vi w, vi x) { return dot_int8(sum, w, x); }
INLINE vi int4_sum(vi sum) { return sum; }

#else

/* Stops the compiler from adding products before they are added to the sum: there are not enough registers for them. */
INLINE __m256i in_order(__m256i sum) {
    __asm__("" : "+x"(sum));
    return sum;
}

#define LOW_BIT_TILE 5

/* Levels are widened to 16 bits: the first and third of a quad, then the second and fourth. */
#define INT8_PARTS 2
INLINE void f_store_levels(int16_t *p, vf x) {
    vi r = i_rounded(x);
    _mm256_storeu_si256((__m256i *)p, packed_int16(BOTH(vi, _mm256_shuffle_epi32(r.a, 0xd8), _mm256_shuffle_epi32(r.b, 0xd8))));
}
INLINE __m256i half_int8_part(__m256i w, int part) {
    return part ? _mm256_srli_epi16(w, 8) : _mm256_and_si256(w, _mm256_set1_epi16(255));
}
INLINE vi int8_part(vi w, int part) { return BOTH(vi, half_int8_part(w.a, part), half_int8_part(w.b, part)); }
INLINE __m256i half_dot_int8(__m256i sum, __m256i w, __m256i x) { return in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(w, x))); }
INLINE vi dot_int8(vi sum, vi w, vi x) { return BOTH(vi, half_dot_int8(sum.a, w.a, x.a), half_dot_int8(sum.b, w.b, x.b)); }

/* Sums stay in 16 bits: with four-bit levels, eight pairs of products of at most 2 * 15 * 127 each fit. */
INLINE __m256i half_dot_int4(__m256i sum, __m256i w, __m256i x) {
    return in_order(_mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)));
}
INLINE vi dot_int4(vi sum, vi w, vi x) { return BOTH(vi, half_dot_int4(sum.a, w.a, x.a), half_dot_int4(sum.b, w.b, x.b)); }
INLINE __m256i half_int4_sum(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
INLINE vi int4_sum(vi sum) { return BOTH(vi, half_int4_sum(sum.a), half_int4_sum(sum.b)); }

#endif

INLINE void fetch_line(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
INLINE void fetch_line_later(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); } /* into L2 */
INLINE void relax(void) { _mm_pause(); }

INLINE int lanes_supported(void) {
    __builtin_cpu_init();
    int supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(__AVXVNNI__)
    unsigned a, b, c, d;
    supported = supported && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
#elif defined(EVEX_VNNI)
    supported = supported && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
    return supported;
}
