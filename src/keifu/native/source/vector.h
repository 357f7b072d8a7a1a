// Sixteen floats at once, on any CPU: the compiler splits them into the registers that the instruction set has.
//
// This file is compiled once per instruction set, inside its namespace (see kernels.h); it defines no symbol that
// another could take for its own. Multiplications and additions are joined only where fma() says so, so that a row has
// the same bits in every function that it goes through.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace KEIFU_NAMESPACE {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef float v16_unaligned __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16_unaligned __attribute__((vector_size(64), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")  // so that the arrays of sums are registers

INLINE v16 splat(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }  // x + 0 would cost an addition
INLINE i16 splat(int32_t x) { return i16{} + x; }
INLINE v16 load(const float *p) { return *(const v16_unaligned *)p; }
INLINE i16 load_ints(const void *p) { return *(const i16_unaligned *)p; }
INLINE void store(float *p, v16 x) { *(v16_unaligned *)p = x; }
INLINE v16 first(v16 x, int n) {  // zeros from number n on
    const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < n ? x : v16{};
}
INLINE v16 load_first(const float *p, int n) {  // reads no more than n numbers; zeros after them
    if (n >= 16) return load(p);
    float t[16] = {};
    for (int i = 0; i < n; i++) t[i] = p[i];
    return load(t);
}
#if defined(__ARM_NEON)
// The four registers of a vector.
template <class Quarter> struct Quarters {
    Quarter q[4];
    template <class Vector> __attribute__((always_inline)) static Quarters of(const Vector &x) {
        Quarters parts;
        memcpy(parts.q, &x, 64);
        return parts;
    }
    template <class Vector> __attribute__((always_inline)) Vector join() const {
        Vector x;
        memcpy(&x, q, 64);
        return x;
    }
};
#endif
// Between int32 and narrower integers; GCC 12 would take __builtin_convertvector apart, number by number.
#if defined(__AVX512F__)
INLINE i16 widen(const uint8_t *p) { return (i16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE i16 widen(const int8_t *p) { return (i16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE i16 widen(const uint16_t *p) { return (i16)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void narrow(int8_t *p, i16 x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)x)); }
INLINE void narrow(uint16_t *p, i16 x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)x)); }
#else
#if defined(__AVX2__)
INLINE i16 join(__m256i low, __m256i high) {
    i16 x;
    _mm256_storeu_si256((__m256i *)&x, low);
    _mm256_storeu_si256((__m256i *)&x + 1, high);
    return x;
}
INLINE __m128i half_of(const void *p) { return _mm_loadl_epi64((const __m128i *)p); }
INLINE __m128i load_16(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
INLINE i16 widen(const uint8_t *p) { return join(_mm256_cvtepu8_epi32(half_of(p)), _mm256_cvtepu8_epi32(half_of(p + 8))); }
INLINE i16 widen(const int8_t *p) { return join(_mm256_cvtepi8_epi32(half_of(p)), _mm256_cvtepi8_epi32(half_of(p + 8))); }
INLINE i16 widen(const uint16_t *p) { return join(_mm256_cvtepu16_epi32(load_16(p)), _mm256_cvtepu16_epi32(load_16(p + 8))); }
#elif defined(__ARM_NEON)
INLINE i16 widen(uint16x8_t low, uint16x8_t high) {
    return Quarters<uint32x4_t>{{vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high)}}.join<i16>();
}
INLINE i16 widen(const uint16_t *p) { return widen(vld1q_u16(p), vld1q_u16(p + 8)); }
INLINE i16 widen(const uint8_t *p) {
    const uint8x16_t x = vld1q_u8(p);
    return widen(vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x));
}
INLINE i16 widen(const int8_t *p) {
    const int8x16_t x = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(x));
    const int16x8_t high = vmovl_high_s8(x);
    return Quarters<int32x4_t>{{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}}.join<i16>();
}
#else
template <class T> INLINE i16 widen(const T *p) {
    i16 x;
    for (int i = 0; i < 16; i++) x[i] = p[i];
    return x;
}
#endif
#if defined(__ARM_NEON)
INLINE int16x8_t narrow(int32x4_t low, int32x4_t high) { return vmovn_high_s32(vmovn_s32(low), high); }
INLINE void narrow(uint16_t *p, i16 x) {
    const auto parts = Quarters<int32x4_t>::of(x);
    vst1q_s16((int16_t *)p, narrow(parts.q[0], parts.q[1]));
    vst1q_s16((int16_t *)p + 8, narrow(parts.q[2], parts.q[3]));
}
INLINE void narrow(int8_t *p, i16 x) {
    const auto parts = Quarters<int32x4_t>::of(x);
    vst1q_s8(p, vmovn_high_s16(vmovn_s16(narrow(parts.q[0], parts.q[1])), narrow(parts.q[2], parts.q[3])));
}
#else
template <class T> INLINE void narrow(T *p, i16 x) {
    for (int i = 0; i < 16; i++) p[i] = (T)x[i];
}
#endif
#endif

INLINE v16 to_float(i16 x) { return __builtin_convertvector(x, v16); }
INLINE v16 as_float(i16 x) { return (v16)x; }
INLINE v16 max(v16 a, v16 b) { return a > b ? a : b; }
INLINE v16 abs(v16 x) { return as_float((i16)x & 0x7fffffff); }

INLINE v16 fma(v16 a, v16 b, v16 c) {  // a · b + c, rounded once where the CPU can
#if defined(__AVX512F__)
    return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__ARM_NEON)
    const auto x = Quarters<float32x4_t>::of(a);
    const auto y = Quarters<float32x4_t>::of(b);
    auto z = Quarters<float32x4_t>::of(c);
    UNROLL for (int i = 0; i < 4; i++) z.q[i] = vfmaq_f32(z.q[i], x.q[i], y.q[i]);
    return z.join<v16>();
#elif defined(__FP_FAST_FMAF) || defined(__FMA__)
    v16 r;
    for (int i = 0; i < 16; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
#else
    return a * b + c;
#endif
}

#if defined(__ARM_NEON)
// In one order, that of the other sets: halves onto halves.
template <class Join> INLINE float fold(v16 x, Join join) {
    const auto parts = Quarters<float32x4_t>::of(x);
    float32x4_t y = join(join(parts.q[0], parts.q[2]), join(parts.q[1], parts.q[3]));
    y = join(y, vextq_f32(y, y, 2));
    return join(y, vrev64q_f32(y))[0];
}
INLINE void sum_two(i16 x, i16 y, int32_t *sums) {  // sums[0] of x, sums[1] of y
    const auto a = Quarters<int32x4_t>::of(x);
    const auto b = Quarters<int32x4_t>::of(y);
    sums[0] = vaddvq_s32((a.q[0] + a.q[1]) + (a.q[2] + a.q[3]));
    sums[1] = vaddvq_s32((b.q[0] + b.q[1]) + (b.q[2] + b.q[3]));
}
#else
#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, i16{__VA_ARGS__})
#endif
#define ROTATE_8(x) SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define SWAP_4(x) SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define SWAP_2(x) SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAP_1(x) SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)

template <class Join> INLINE float fold(v16 x, Join join) {  // in one order: halves onto halves
    x = join(x, ROTATE_8(x));
    x = join(x, SWAP_4(x));
    x = join(x, SWAP_2(x));
    x = join(x, SWAP_1(x));
    return x[0];
}
INLINE void sum_two(i16 x, i16 y, int32_t *sums) {  // sums[0] of x, sums[1] of y
    i16 both = SHUFFLE(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLE(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    both += SWAP_4(both);
    both += SWAP_2(both);
    both += SWAP_1(both);
    sums[0] = both[0];
    sums[1] = both[8];
}
#endif
INLINE float sum(v16 x) {
    return fold(x, [](auto a, auto b) { return a + b; });
}
INLINE float maximum(v16 x) {
    return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}

INLINE i16 round_to_int(v16 x) {  // to the nearest, ties to even; |x| < 2^22
    const float magic = 12582912.f;
    return (i16)(x + magic) - (i16)splat(magic);
}

// A polynomial by Horner's rule; the coefficient of the highest power comes first.
template <class... Floats> INLINE v16 polynomial(v16 x, float highest, Floats... others) {
    v16 p = splat(highest);
    ((p = fma(p, x, splat(others))), ...);
    return p;
}

INLINE v16 exp(v16 x) {  // 2^n · e^r; 0 below -87
    x = x > -87.f ? x : splat(-87.f);
    x = x < 88.f ? x : splat(88.f);
    i16 n = round_to_int(x * 1.44269504f);
    v16 r = fma(to_float(n), splat(-0.693145752f), x);
    r = fma(to_float(n), splat(-1.42860677e-6f), r);
    v16 y = polynomial(r, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f) * as_float((n + 127) << 23);
    return x > -87.f ? y : v16{};
}

INLINE v16 sigmoid(v16 x) { return 1.f / (1.f + exp(-x)); }

INLINE v16 erf(v16 x) {  // Abramowitz and Stegun, 7.1.26: absolute error below 1.5e-7
    v16 t = 1.f / fma(abs(x), splat(0.3275911f), splat(1.f));
    v16 p = polynomial(t, 1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f);
    v16 y = 1.f - p * t * exp(-x * x);
    return x < 0.f ? -y : y;
}

INLINE i16 bfloat16_bits(v16 x) {  // rounded to the nearest, ties to even; NaN stays NaN
    i16 u = (i16)x;
    i16 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (x == x ? rounded : (u >> 16) | 0x40) & 0xffff;
}
INLINE v16 round_to_bfloat16(v16 x) { return as_float(bfloat16_bits(x) << 16); }
INLINE void store_bfloat16(uint16_t *p, v16 x) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    const auto parts = Quarters<float32x4_t>::of(x);
    for (int i = 0; i < 2; i++) {
        const bfloat16x8_t low = vcvtq_low_bf16_f32(parts.q[2 * i]);
        vst1q_bf16((bfloat16_t *)p + 8 * i, vcvtq_high_bf16_f32(low, parts.q[2 * i + 1]));
    }
#else
    narrow(p, bfloat16_bits(x));
#endif
}
INLINE v16 load_bfloat16(const uint16_t *p) { return as_float(widen(p) << 16); }

INLINE v16 load_half(const void *p) {  // float16
#if defined(__AVX512F__)
    return (v16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__ARM_NEON)
    Quarters<float32x4_t> x;
    UNROLL for (int i = 0; i < 4; i++) x.q[i] = vcvt_f32_f16(vld1_f16((const float16_t *)p + 4 * i));
    return x.join<v16>();
#elif defined(__F16C__)
    const uint16_t *halves = (const uint16_t *)p;
    return (v16)join((__m256i)_mm256_cvtph_ps(load_16(halves)), (__m256i)_mm256_cvtph_ps(load_16(halves + 8)));
#else
    i16 h = widen((const uint16_t *)p);
    i16 exponent = h & 0x7c00;
    i16 mantissa = h & 0x3ff;
    v16 normal = as_float(((h & 0x7fff) << 13) + (112 << 23));
    v16 infinite = as_float((mantissa << 13) | 0x7f800000);
    v16 tiny = to_float(mantissa) * 5.9604644775390625e-8f;
    v16 size = exponent == 0 ? tiny : exponent == 0x7c00 ? infinite : normal;
    return as_float((i16)size | ((h & 0x8000) << 16));
#endif
}
template <class T> INLINE v16 load_bytes(const T *p) { return to_float(widen(p)); }

}  // namespace KEIFU_NAMESPACE
