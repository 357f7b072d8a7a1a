// The products of matrices of the engine, in WebAssembly's 128-bit vectors: y = x · wᵀ.
// Axes: x [rows, in], w [out, in], y [rows, out]. The weights are bfloat16, int8 (without their scales) or float32.
// page/build.py compiles this file; without the result, tensors.js computes the same in plain JavaScript.
#include <wasm_simd128.h>

typedef struct {
    v128_t low, high;
} Eight;  // eight neighbouring numbers in float32

#define INLINE static inline __attribute__((always_inline))

INLINE Eight load_f32(const char *w) {
    return (Eight){wasm_v128_load(w), wasm_v128_load(w + 16)};
}

INLINE Eight load_bf16(const char *w) {  // a bfloat16 is the upper half of a float32
    const v128_t halves = wasm_v128_load(w), zero = wasm_i16x8_const_splat(0);
    return (Eight){wasm_i16x8_shuffle(zero, halves, 0, 8, 0, 9, 0, 10, 0, 11),
                   wasm_i16x8_shuffle(zero, halves, 0, 12, 0, 13, 0, 14, 0, 15)};
}

INLINE Eight load_int8(const char *w) {
    const v128_t wide = wasm_i16x8_load8x8(w);
    return (Eight){wasm_f32x4_convert_i32x4(wasm_i32x4_extend_low_i16x8(wide)),
                   wasm_f32x4_convert_i32x4(wasm_i32x4_extend_high_i16x8(wide))};
}

INLINE float one_f32(const char *w) {
    return *(const float *)w;
}

INLINE float one_bf16(const char *w) {
    union {
        unsigned bits;
        float number;
    } one = {(unsigned)*(const unsigned short *)w << 16};
    return one.number;
}

INLINE float one_int8(const char *w) {
    return *(const signed char *)w;
}

INLINE float total(v128_t v) {
    v = wasm_f32x4_add(v, wasm_i32x4_shuffle(v, v, 2, 3, 0, 1));
    return wasm_f32x4_extract_lane(v, 0) + wasm_f32x4_extract_lane(v, 1);
}

// A block of outputs and rows at a time: each loaded number is used several times. Both are constants where the function
// is inlined. The last numbers of a row, fewer than eight, are added one by one.
#define LINEAR(KIND, SIZE)                                                                                       \
    INLINE void block_##KIND(int outputs, int rows, const float *x, const char *w, int in, int out, float *y) {  \
        v128_t sums[4][2];                                                                                       \
        for (int o = 0; o < outputs; o++)                                                                        \
            for (int r = 0; r < rows; r++) sums[o][r] = wasm_f32x4_const_splat(0);                               \
        int i = 0;                                                                                               \
        for (; i + 8 <= in; i += 8) {                                                                            \
            Eight inputs[2];                                                                                     \
            for (int r = 0; r < rows; r++) inputs[r] = load_f32((const char *)(x + r * in + i));                 \
            for (int o = 0; o < outputs; o++) {                                                                  \
                const Eight weights = load_##KIND(w + (o * in + i) * SIZE);                                      \
                for (int r = 0; r < rows; r++) {                                                                 \
                    const v128_t low = wasm_f32x4_mul(inputs[r].low, weights.low);                               \
                    const v128_t high = wasm_f32x4_mul(inputs[r].high, weights.high);                            \
                    sums[o][r] = wasm_f32x4_add(wasm_f32x4_add(sums[o][r], low), high);                          \
                }                                                                                                \
            }                                                                                                    \
        }                                                                                                        \
        for (int o = 0; o < outputs; o++)                                                                        \
            for (int r = 0; r < rows; r++) {                                                                     \
                float sum = total(sums[o][r]);                                                                   \
                for (int k = i; k < in; k++) sum += x[r * in + k] * one_##KIND(w + (o * in + k) * SIZE);         \
                y[r * out + o] = sum;                                                                            \
            }                                                                                                    \
    }                                                                                                            \
    __attribute__((export_name("linear_" #KIND))) void linear_##KIND(                                            \
        const float *x, int rows, const char *w, int in, int out, float *y) {                                    \
        int o = 0;                                                                                               \
        for (; o + 4 <= out; o += 4) {                                                                           \
            const char *matrix = w + o * in * SIZE;                                                              \
            int r = 0;                                                                                           \
            for (; r + 2 <= rows; r += 2) block_##KIND(4, 2, x + r * in, matrix, in, out, y + r * out + o);      \
            for (; r < rows; r++) block_##KIND(4, 1, x + r * in, matrix, in, out, y + r * out + o);              \
        }                                                                                                        \
        for (; o < out; o++)                                                                                     \
            for (int r = 0; r < rows; r++)                                                                       \
                block_##KIND(1, 1, x + r * in, w + o * in * SIZE, in, out, y + r * out + o);                     \
    }

LINEAR(f32, 4)
LINEAR(bf16, 2)
LINEAR(int8, 1)
