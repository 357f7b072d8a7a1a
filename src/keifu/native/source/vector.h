// Sixteen numbers at once, on any CPU: in one register of AVX-512, or in as many as the instruction set needs.
//
// This file is compiled once per instruction set, inside its namespace (see kernels.h); it defines no symbol that
// another could take for its own. Multiplications and additions are joined only where fma() says so, so that a row has
// the same bits in every function that it goes through.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace KEIFU_NAMESPACE {

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")  // so that the arrays of sums are registers

#if defined(__AVX512F__)
typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef float v16_unaligned __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16_unaligned __attribute__((vector_size(64), aligned(1), may_alias));

INLINE v16 splat(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }  // x + 0 would cost an addition
INLINE i16 splat(int32_t x) { return i16{} + x; }
INLINE v16 load(const float *p) { return *(const v16_unaligned *)p; }
INLINE i16 load_ints(const void *p) { return *(const i16_unaligned *)p; }
INLINE void store(float *p, v16 x) { *(v16_unaligned *)p = x; }
INLINE i16 lanes() { return i16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
INLINE v16 as_float(i16 x) { return (v16)x; }
INLINE i16 as_int(v16 x) { return (i16)x; }
INLINE v16 to_float(i16 x) { return __builtin_convertvector(x, v16); }
template <class T> INLINE T select(i16 which, T a, T b) { return which ? a : b; }
#else
// A vector type of 64 bytes would compute the same. But GCC keeps it in memory from one operation to the next.
#if defined(__AVX2__)
constexpr int REGISTER = 32;  // bytes
#else
constexpr int REGISTER = 16;
#endif
constexpr int PARTS = 64 / REGISTER;
constexpr int WIDTH = REGISTER / 4;  // numbers of a register

template <class T> struct Sixteen {
    typedef T Register __attribute__((vector_size(REGISTER)));
    typedef T Unaligned __attribute__((vector_size(REGISTER), aligned(1), may_alias));
    Register part[PARTS];

    ALWAYS_INLINE T operator[](int i) const { return part[i / WIDTH][i % WIDTH]; }
};
typedef Sixteen<float> v16;
typedef Sixteen<int32_t> i16;

template <class T, class Make, int... I> INLINE Sixteen<T> join_parts(Make make, std::integer_sequence<int, I...>) {
    return {{(typename Sixteen<T>::Register)make(I)...}};
}
template <class T, class Make> INLINE Sixteen<T> parts(Make make) {
    return join_parts<T>(make, std::make_integer_sequence<int, PARTS>());
}
// Part i of a result: parts<T>(PART { return ...; }). Not in a loop, so that no array is left for GCC to keep in memory.
#define PART [&](int i) __attribute__((always_inline))

template <class T> struct Is {
    typedef T Type;
};
template <class T> INLINE typename Sixteen<T>::Register splat_part(T x) {
#if defined(__AVX2__)
    return typename Sixteen<T>::Register{x, x, x, x, x, x, x, x};
#else
    return typename Sixteen<T>::Register{x, x, x, x};
#endif
}
INLINE v16 splat(float x) { return parts<float>(PART { return splat_part(x); }); }
INLINE i16 splat(int32_t x) { return parts<int32_t>(PART { return splat_part(x); }); }
template <class T> INLINE Sixteen<T> load_parts(const void *p) {
    return parts<T>(PART { return (typename Sixteen<T>::Register)((const typename Sixteen<T>::Unaligned *)p)[i]; });
}
INLINE v16 load(const float *p) { return load_parts<float>(p); }
INLINE i16 load_ints(const void *p) { return load_parts<int32_t>(p); }
INLINE void store(float *p, v16 x) {
    UNROLL for (int i = 0; i < PARTS; i++) ((v16::Unaligned *)p)[i] = x.part[i];
}
INLINE i16 lanes() {
    const int32_t all[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_ints(all);
}
INLINE v16 as_float(i16 x) { return parts<float>(PART { return x.part[i]; }); }
INLINE i16 as_int(v16 x) { return parts<int32_t>(PART { return x.part[i]; }); }
INLINE v16 to_float(i16 x) { return parts<float>(PART { return __builtin_convertvector(x.part[i], v16::Register); }); }
template <class T> INLINE Sixteen<T> select(i16 which, Sixteen<T> a, Sixteen<T> b) {
    return parts<T>(PART { return which.part[i] ? a.part[i] : b.part[i]; });
}

#define OPERATOR(RESULT, OP)                                                                                                    \
    template <class T> INLINE Sixteen<RESULT> operator OP(Sixteen<T> a, Sixteen<T> b) {                                         \
        return parts<RESULT>(PART { return a.part[i] OP b.part[i]; });                                                          \
    }                                                                                                                           \
    template <class T> INLINE Sixteen<RESULT> operator OP(Sixteen<T> a, typename Is<T>::Type b) { return a OP splat(b); }       \
    template <class T> INLINE Sixteen<RESULT> operator OP(typename Is<T>::Type a, Sixteen<T> b) { return splat(a) OP b; }
#define ASSIGNING(OP)                                                                                                           \
    OPERATOR(T, OP)                                                                                                             \
    template <class T, class Other> INLINE Sixteen<T> &operator OP##=(Sixteen<T> &a, Other b) { return a = a OP b; }
ASSIGNING(+) ASSIGNING(-) ASSIGNING(*) ASSIGNING(/) ASSIGNING(&) ASSIGNING(|) ASSIGNING(^)
OPERATOR(int32_t, <) OPERATOR(int32_t, >) OPERATOR(int32_t, >=) OPERATOR(int32_t, <=) OPERATOR(int32_t, ==) OPERATOR(int32_t, !=)
#undef ASSIGNING
#undef OPERATOR
INLINE i16 operator>>(i16 x, int n) { return parts<int32_t>(PART { return x.part[i] >> n; }); }
INLINE i16 operator<<(i16 x, int n) { return parts<int32_t>(PART { return x.part[i] << n; }); }
INLINE i16 &operator>>=(i16 &x, int n) { return x = x >> n; }
template <class T> INLINE Sixteen<T> operator-(Sixteen<T> x) { return parts<T>(PART { return -x.part[i]; }); }
#endif

INLINE v16 first(v16 x, int n) { return select(lanes() < n, x, v16{}); }  // zeros from number n on
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
        return {{(Quarter)x.part[0], (Quarter)x.part[1], (Quarter)x.part[2], (Quarter)x.part[3]}};
    }
    template <class Vector> __attribute__((always_inline)) Vector join() const {
        typedef typename Vector::Register Register;
        return {{(Register)q[0], (Register)q[1], (Register)q[2], (Register)q[3]}};
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
INLINE i16 join(__m256i low, __m256i high) { return {{(i16::Register)low, (i16::Register)high}}; }
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
    int32_t x[16];
    for (int i = 0; i < 16; i++) x[i] = p[i];
    return load_ints(x);
}
#endif
#if defined(__AVX2__)  // the numbers fit
INLINE void narrow(uint16_t *p, i16 x) {
    const __m256i mixed = _mm256_packus_epi32((__m256i)x.part[0], (__m256i)x.part[1]);
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(mixed, 0xd8));
}
INLINE void narrow(int8_t *p, i16 x) {
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x.part[0], (__m256i)x.part[1]), 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
#elif defined(__ARM_NEON)
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

INLINE v16 max(v16 a, v16 b) { return select(a > b, a, b); }
INLINE v16 abs(v16 x) { return as_float(as_int(x) & 0x7fffffff); }

INLINE v16 fma(v16 a, v16 b, v16 c) {  // a · b + c, rounded once where the CPU can
#if defined(__AVX512F__)
    return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__ARM_NEON)
    return parts<float>(PART { return vfmaq_f32((float32x4_t)c.part[i], (float32x4_t)a.part[i], (float32x4_t)b.part[i]); });
#elif defined(__AVX2__)
    return parts<float>(PART { return _mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]); });
#else
    return a * b + c;
#endif
}

// In one order: halves onto halves.
#if defined(__AVX512F__)
#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, i16{__VA_ARGS__})
#endif
#define ROTATE_8(x) SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define SWAP_4(x) SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define SWAP_2(x) SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAP_1(x) SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)

template <class Join> INLINE float fold(v16 x, Join join) {
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
#else
template <class T, class Join> INLINE T fold(Sixteen<T> x, Join join) {
#if defined(__AVX2__)
    const auto eight = join(x.part[0], x.part[1]);
    typedef T Four __attribute__((vector_size(16)));
    const Four four = join((Four)_mm256_castsi256_si128((__m256i)eight), (Four)_mm256_extracti128_si256((__m256i)eight, 1));
#else
    const auto four = join(join(x.part[0], x.part[2]), join(x.part[1], x.part[3]));
#endif
    return join(join(four[0], four[2]), join(four[1], four[3]));
}
INLINE void sum_two(i16 x, i16 y, int32_t *sums) {  // sums[0] of x, sums[1] of y
    const auto add = [](auto a, auto b) { return a + b; };
    sums[0] = fold(x, add);
    sums[1] = fold(y, add);
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
    return as_int(x + magic) - as_int(splat(magic));
}

// A polynomial by Horner's rule; the coefficient of the highest power comes first.
template <class... Floats> INLINE v16 polynomial(v16 x, float highest, Floats... others) {
    v16 p = splat(highest);
    ((p = fma(p, x, splat(others))), ...);
    return p;
}

INLINE v16 exp(v16 x) {  // 2^n · e^r; 0 below -87
    x = select(x > -87.f, x, splat(-87.f));
    x = select(x < 88.f, x, splat(88.f));
    i16 n = round_to_int(x * 1.44269504f);
    v16 r = fma(to_float(n), splat(-0.693145752f), x);
    r = fma(to_float(n), splat(-1.42860677e-6f), r);
    v16 y = polynomial(r, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f) * as_float((n + 127) << 23);
    return select(x > -87.f, y, v16{});
}

INLINE v16 sigmoid(v16 x) { return 1.f / (1.f + exp(-x)); }

INLINE v16 erf(v16 x) {  // Abramowitz and Stegun, 7.1.26: absolute error below 1.5e-7
    v16 t = 1.f / fma(abs(x), splat(0.3275911f), splat(1.f));
    v16 p = polynomial(t, 1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f);
    v16 y = 1.f - p * t * exp(-x * x);
    return select(x < 0.f, -y, y);
}

INLINE i16 bfloat16_bits(v16 x) {  // rounded to the nearest, ties to even; NaN stays NaN
    i16 u = as_int(x);
    i16 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return select(x == x, rounded, (u >> 16) | 0x40) & 0xffff;
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
    return {{(v16::Register)_mm256_cvtph_ps(load_16(halves)), (v16::Register)_mm256_cvtph_ps(load_16(halves + 8))}};
#else
    i16 h = widen((const uint16_t *)p);
    i16 exponent = h & 0x7c00;
    i16 mantissa = h & 0x3ff;
    v16 normal = as_float(((h & 0x7fff) << 13) + (112 << 23));
    v16 infinite = as_float((mantissa << 13) | 0x7f800000);
    v16 tiny = to_float(mantissa) * 5.9604644775390625e-8f;
    v16 size = select(exponent == 0, tiny, select(exponent == 0x7c00, infinite, normal));
    return as_float(as_int(size) | ((h & 0x8000) << 16));
#endif
}
template <class T> INLINE v16 load_bytes(const T *p) { return to_float(widen(p)); }

}  // namespace KEIFU_NAMESPACE
