/* Sixteen lanes as four quarters by NEON, with int8 and bf16 dot products if the target has them: see lanes.h. */
#include <arm_neon.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif

typedef struct { float32x4_t q[4]; } vf;
typedef struct { uint8x16_t q[4]; } vi;
#define SUMS 6 /* vectors, of four registers each */
#define TILE 6
#define WHOLE_TILE 2
#define WIDENED_TILE 2
#define LOW_BIT_TILE 6
#define MOST_PANELS 2
#define EACH_ROWS ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
/* A vector of the values of `expression` for each quarter i. */
#define QUARTERS(type, expression) \
    type out; \
    for (int i = 0; i < 4; i++) out.q[i] = (expression); \
    return out

INLINE int32x4_t as_s32(uint8x16_t x) { return vreinterpretq_s32_u8(x); }
INLINE uint8x16_t of_s32(int32x4_t x) { return vreinterpretq_u8_s32(x); }

INLINE vf f_set(float x) { QUARTERS(vf, vdupq_n_f32(x)); }
INLINE vf f_load(const float *p) { QUARTERS(vf, vld1q_f32(p + 4 * i)); }
INLINE void f_store(float *p, vf x) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.q[i]); }
INLINE vf f_add(vf x, vf y) { QUARTERS(vf, vaddq_f32(x.q[i], y.q[i])); }
INLINE vf f_sub(vf x, vf y) { QUARTERS(vf, vsubq_f32(x.q[i], y.q[i])); }
INLINE vf f_mul(vf x, vf y) { QUARTERS(vf, vmulq_f32(x.q[i], y.q[i])); }
INLINE vf f_div(vf x, vf y) { QUARTERS(vf, vdivq_f32(x.q[i], y.q[i])); }
INLINE vf f_max(vf x, vf y) { QUARTERS(vf, vmaxq_f32(x.q[i], y.q[i])); }
INLINE vf f_min(vf x, vf y) { QUARTERS(vf, vminq_f32(x.q[i], y.q[i])); }
INLINE vf f_abs(vf x) { QUARTERS(vf, vabsq_f32(x.q[i])); }
INLINE vf f_fma(vf x, vf y, vf z) { QUARTERS(vf, vfmaq_f32(z.q[i], x.q[i], y.q[i])); }
INLINE vf f_add_product(vf sum, vf x, vf y) { return f_fma(x, y, sum); }
INLINE float f_sum(vf x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.q[0], x.q[1]), vaddq_f32(x.q[2], x.q[3]))); }
INLINE float f_largest(vf x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.q[0], x.q[1]), vmaxq_f32(x.q[2], x.q[3]))); }
INLINE vf f_of_int(vi x) { QUARTERS(vf, vcvtq_f32_s32(as_s32(x.q[i]))); }
INLINE vi i_rounded(vf x) { QUARTERS(vi, of_s32(vcvtnq_s32_f32(x.q[i]))); }
INLINE vi i_bits(vf x) { QUARTERS(vi, vreinterpretq_u8_f32(x.q[i])); }
INLINE vf f_power_of_two(vi n) {
    QUARTERS(vf, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(as_s32(n.q[i]), vdupq_n_s32(127)), 23)));
}
INLINE vf f_load_bf16(const uint16_t *p) { QUARTERS(vf, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))); }
INLINE void f_store_int8(int8_t *p, vf x) {
    int16x4_t n[4];
    for (int i = 0; i < 4; i++) n[i] = vqmovn_s32(vcvtnq_s32_f32(x.q[i]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(vcombine_s16(n[0], n[1])), vqmovn_s16(vcombine_s16(n[2], n[3]))));
}
INLINE vi i_load_int8(const int8_t *p) {
    int16x8_t n[2] = {vmovl_s8(vld1_s8(p)), vmovl_s8(vld1_s8(p + 8))};
    QUARTERS(vi, of_s32(i % 2 ? vmovl_high_s16(n[i / 2]) : vmovl_s16(vget_low_s16(n[i / 2]))));
}
INLINE vf f_load_fp16(const uint16_t *p) { QUARTERS(vf, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }
INLINE vi i_set(int32_t x) { QUARTERS(vi, of_s32(vdupq_n_s32(x))); }
INLINE vi i_load(const void *p) { QUARTERS(vi, vld1q_u8((const uint8_t *)p + 16 * i)); }
INLINE void i_store(void *p, vi x) { for (int i = 0; i < 4; i++) vst1q_u8((uint8_t *)p + 16 * i, x.q[i]); }
INLINE vi i_interleaved(vi x, vi y, int second) {
    QUARTERS(vi, second ? vzip2q_u8(x.q[i], y.q[i]) : vzip1q_u8(x.q[i], y.q[i]));
}
INLINE vi i_low(vi x) { QUARTERS(vi, vandq_u8(x.q[i], vdupq_n_u8(15))); }
INLINE vi i_high(vi x) { QUARTERS(vi, vshrq_n_u8(x.q[i], 4)); }
INLINE vi i_or(vi x, vi y) { QUARTERS(vi, vorrq_u8(x.q[i], y.q[i])); }
INLINE vi i_lookup(const int8_t *table, vi x, int high) {
    vi indices = high ? i_high(x) : i_low(x);
    QUARTERS(vi, vqtbl1q_u8(vld1q_u8((const uint8_t *)table), indices.q[i]));
}
INLINE vi i_bits_of(vi x, int left, int mask) {
    QUARTERS(vi, vandq_u8(vshlq_u8(x.q[i], vdupq_n_s8((int8_t)left)), vdupq_n_u8((uint8_t)mask)));
}

/* BFDOT rounds a pair of products and their sums each to odd, and flushes subnormal numbers to zero. Without it products are
 * exact, and the even input's is added before the odd one's. */
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

INLINE void f_store_bf16(uint16_t *p, vf x) {
    for (int i = 0; i < 4; i += 2) {
        bfloat16x8_t rounded = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(x.q[i]), x.q[i + 1]);
        vst1q_u16(p + 4 * i, vreinterpretq_u16_bf16(rounded));
    }
}
#define BF16_PARTS 1
INLINE vf dot_bf16(vf acc, vi w, vi x) {
    QUARTERS(vf, vbfdotq_f32(acc.q[i], vreinterpretq_bf16_u8(w.q[i]), vreinterpretq_bf16_u8(x.q[i])));
}

#else

INLINE void f_store_bf16(uint16_t *p, vf x) { /* to the nearest, ties to even */
    for (int i = 0; i < 4; i++) {
        uint32x4_t bits = vreinterpretq_u32_f32(x.q[i]), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        vst1_u16(p + 4 * i, vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16));
    }
}
#define BF16_PARTS 2
INLINE vf f_first(vi w) { QUARTERS(vf, vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(w.q[i]), 16))); }
INLINE vf f_second(vi w) {
    QUARTERS(vf, vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(w.q[i]), vdupq_n_u32(0xffff0000))));
}

#endif

INLINE int32x4_t quarter_dot(int32x4_t acc, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, w, x);
#else
    int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x); /* two of them fit into 16 bits */
    return vpadalq_s16(acc, vpaddq_s16(low, high));
#endif
}
INLINE vi dot_signed(vi sum, vi w, vi x) {
    QUARTERS(vi, of_s32(quarter_dot(as_s32(sum.q[i]), vreinterpretq_s8_u8(w.q[i]), vreinterpretq_s8_u8(x.q[i]))));
}
#define INT8_PARTS 1
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define LEVEL_OFFSET 128
INLINE vi int8_part(vi w, int part) { return (void)part, w; }
INLINE vi dot_int8(vi sum, vi w, vi x) {
    QUARTERS(vi, of_s32(vusdotq_s32(as_s32(sum.q[i]), w.q[i], vreinterpretq_s8_u8(x.q[i]))));
}
#else
#define LEVEL_OFFSET 0
INLINE vi int8_part(vi w, int part) {
    (void)part;
    QUARTERS(vi, veorq_u8(w.q[i], vdupq_n_u8(128)));
}
INLINE vi dot_int8(vi sum, vi w, vi x) { return dot_signed(sum, w, x); }
#endif
INLINE vi dot_int4(vi sum, vi w, vi x) { return dot_signed(sum, w, x); }
INLINE vi int4_sum(vi sum) { return sum; }

INLINE void fetch_line(const void *p) { __builtin_prefetch(p, 0, 3); }
INLINE void fetch_line_later(const void *p) { __builtin_prefetch(p, 0, 2); } /* into L2 */
INLINE void relax(void) { __asm__ volatile("isb"); } /* `yield` does nothing on most cores */

#if defined(__APPLE__)
INLINE int has_feature(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value;
}
INLINE int has_dot(void) { return has_feature("hw.optional.arm.FEAT_DotProd"); }
INLINE int has_bf16(void) { return has_feature("hw.optional.arm.FEAT_BF16") && has_feature("hw.optional.arm.FEAT_I8MM"); }
#else /* Linux: the bits of asm/hwcap.h, which older systems do not name */
INLINE int has_dot(void) { return getauxval(AT_HWCAP) >> 20 & 1; }
INLINE int has_bf16(void) { return (getauxval(AT_HWCAP2) >> 13 & 3) == 3; }
#endif

INLINE int lanes_supported(void) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return has_dot() && has_bf16();
#elif defined(__ARM_FEATURE_DOTPROD)
    return has_dot();
#else
    return 1;
#endif
}
