// Products of packed tiles with rows: y[row][16 s + i] = sum over columns of tile s, row i.
//
// The order of the sums is the same for every number of rows. Quantised: the codes of a group are multiplied and added
// up exactly in int32, then the sum times both scales is added; the same bits on every CPU. float32: column by column.
// bf16: of each pair of columns the odd one is added to the total first, as VDPBF16PS does; AMX's tiles have an order of
// their own. Keys and values are multiplied in AMX's order everywhere: even and odd columns of a group of 32 apart from
// zero, then their sum is added to the total.
#pragma once
#include <type_traits>

#include "model.h"
#include "vector.h"

namespace KEIFU_NAMESPACE {

using namespace keifu;

// How this instruction set stores rows that are rounded to bfloat16: as its 16 bits, or as the float32 of the same value.
// This is the only place that decides it. `put_rounded` writes what the type of its pointer says, and the functions that
// read such rows take a pointer of the type that their instructions multiply.
//   RowNumber: a row that is multiplied with bf16 weights. Dense: queries and attention weights.
#if defined(__AMX_TILE__)
typedef uint16_t RowNumber;
typedef uint16_t Dense;
#elif defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
typedef uint16_t RowNumber;
typedef float Dense;
#else
typedef float RowNumber;
typedef float Dense;
#endif
INLINE void put_rounded(uint16_t *p, v16 x) { store_bfloat16(p, x); }
INLINE void put_rounded(float *p, v16 x) { store(p, round_to_bfloat16(x)); }

template <class T = RowNumber> INLINE T *rounded_rows(const Rows &rows) {
    if constexpr (std::is_same_v<T, float>) return rows.numbers;
    else return rows.dense;
}

template <bool FLOAT32> using Number = std::conditional_t<FLOAT32, float, Dense>;
template <bool FLOAT32> INLINE void put(Number<FLOAT32> *p, v16 x) {
    if constexpr (FLOAT32) store(p, x);
    else put_rounded(p, x);
}

constexpr int OUT = CHUNK * TILE;  // floats from one row of a product's output to the next

// ---- rows ----

INLINE void encode_codes(const Rows &rows, int64_t row, int64_t pair, const float *x) {
    v16 most_of = abs(load(x));
    for (int i = TILE; i < PAIR; i += TILE) most_of = max(most_of, abs(load(x + i)));
    const float most = maximum(most_of);
    const float inverse = most > 0 ? 127.f / most : 0.f;
    int8_t *codes = rows.codes + row * rows.columns + pair * PAIR;
    CodeGroup *both[2];
    for (int g = 0; g < 2; g++) {
        const i16 p = round_to_int(load(x + g * GROUP) * inverse);
        const i16 q = round_to_int(load(x + g * GROUP + TILE) * inverse);
        narrow(codes + g * GROUP, p);
        narrow(codes + g * GROUP + TILE, q);
        CodeGroup &about = *(both[g] = rows.about(row, 2 * pair + g));
        sum_two(p, q, about.half);
        about.sum = about.half[0] + about.half[1];
        about.scale = most / 127.f;
        about.moment = about.scale * (float)about.sum;
    }
    both[0]->pair_sum = both[0]->sum + both[1]->sum;
}

// Rounds 64 numbers of a row to what the weights of a product are multiplied with.
INLINE void encode(const Rows &rows, Input kind, int64_t row, int64_t pair, const float *x) {
    const int64_t place = row * rows.columns + pair * PAIR;
    if (kind == Input::CODES) return encode_codes(rows, row, pair, x);
    for (int i = 0; i < PAIR; i += TILE)
        if (kind == Input::FLOAT32) store(rows.numbers + place + i, load(x + i));
        else put_rounded(rounded_rows(rows) + place + i, load(x + i));
}

// ---- blocks of a product ----

// A product is cut into blocks whose sums fit the registers: so many tiles at once with so many rows; for a row alone,
// so many tiles.
struct Blocking {
    int tiles, rows, alone;
};
// While a row alone goes through a tile, what lies so many bytes ahead comes into a cache; 0 where the CPU is faster by
// itself.
struct Prefetch {
    int bits_4, bits_8, cache;
};
#if defined(__AVX512F__)
constexpr Blocking FLOATS = {2, 8, CHUNK};
constexpr Blocking BFLOAT16 = FLOATS;
#elif defined(__AVX2__)
constexpr Blocking FLOATS = {1, 6, CHUNK};
constexpr Blocking BFLOAT16 = {1, 4, CHUNK};
#else
constexpr Blocking FLOATS = {1, 4, CHUNK};
constexpr Blocking BFLOAT16 = FLOATS;
#endif
#if defined(__AMX_TILE__)
constexpr Blocking QUANTISED = {2, 4, CHUNK};
constexpr Prefetch PREFETCH = {2048, 2048, 2};
#elif defined(__ARM_FEATURE_MATMUL_INT8)
constexpr Blocking QUANTISED = {1, 8, 1};
constexpr Prefetch PREFETCH = {8192, 0, 1};
#else
constexpr Blocking QUANTISED = {1, BFLOAT16.rows, 1};
constexpr Prefetch PREFETCH = {8192, 0, 1};
#endif

// Cuts CHUNK tiles x rows, and calls block(tiles, rows, first tile, first row).
template <int TILES, int ALONE, int B, class Block> INLINE void cut(int b, int rows, Block block) {
    constexpr int S = B == 1 ? ALONE : TILES;
    const int end = b + (rows - b) / B * B;
    for (int r = b; r < end; r += B)
        for (int s = 0; s < CHUNK; s += S) block(Constant<S>(), Constant<B>(), s, r);
    if constexpr (B > 1) cut<TILES, ALONE, (B > 4 ? 4 : B / 2)>(end, rows, block);
}

// Which part of the tiles that come next a block fetches: every (mask + 1)th step, from `turn` on.
struct Turn {
    int64_t mask, turn;
};

// Into the cache of the second level, or of the first.
template <int LEVEL = 2> INLINE void fetch(const uint8_t *p, int bytes) {
    UNROLL for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 4 - LEVEL);
}

// Fetches what lies at `place` of a tile of so many bytes; beyond its end, of the next one.
template <int LEVEL = 2>
INLINE void fetch_ahead(const uint8_t *tile, const uint8_t *next, int64_t bytes, int64_t place, int n) {
    fetch<LEVEL>(place < bytes ? tile + place : next + place - bytes, n);
}

// ---- scales of quantised weights ----

struct Scales {
    v16 scale{};   // of all columns, or of the first half
    v16 second{};  // the min, or the other half's scale
    v16 third{};   // the second group's min, where the format is wide
};

// The scales of group g of a pair, or of both where the format is wide.
template <int FORMAT> INLINE Scales read_scales(const uint8_t *tile, int64_t pair, int g) {
    constexpr Layout L = LAYOUTS[FORMAT];
    const uint8_t *super = tile + super_offset(L, pair);
    const uint8_t *header = tile + pair_offset(L, pair);
    Scales s;
    if constexpr (FORMAT == KEIFU_INT8_64) {
        s.scale = load_half(super + pair % SUPER_PAIRS * 32);
    } else if constexpr (FORMAT == KEIFU_INT4_64) {
        const v16 dmin = -load_half(super + 32);
        s.scale = load_half(super) * load_bytes(header);
        s.second = dmin * load_bytes(header + 32);
        s.third = dmin * load_bytes(header + 48);
    } else if constexpr (FORMAT == KEIFU_INT4_MIN) {
        s.scale = load_half(header + g * 64);
        s.second = load_half(header + g * 64 + 32);
    } else if constexpr (FORMAT == KEIFU_INT4_SUPER) {
        s.scale = load_half(super) * load_bytes(header + g * 32);
        s.second = -(load_half(super + 32) * load_bytes(header + g * 32 + 16));
    } else if constexpr (FORMAT == KEIFU_INT6_SUPER) {
        const v16 d = load_half(super);
        s.scale = d * load_bytes((const int8_t *)header + g * 32);
        s.second = d * load_bytes((const int8_t *)header + g * 32 + 16);
    } else {
        s.scale = load_half(header + g * 32);
    }
    return s;
}

// What the codes of group g of a pair of KEIFU_INT4_64 are multiplied with.
INLINE i16 read_multipliers(const uint8_t *tile, int64_t pair, int g) {
    return (widen(tile + pair_offset(LAYOUTS[KEIFU_INT4_64], pair) + TILE) >> 4 * g & 15) + 1;
}

// The sums in a vector: those of a tile's 16 rows with one row of the input.
struct OneRow {
    const CodeGroup *row;

    template <class Vector> ALWAYS_INLINE Vector of_tile(Vector x) const { return x; }
    template <class Get> ALWAYS_INLINE auto of_input(Get get) const { return splat(get(*row)); }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)
template <int B> constexpr bool PAIRED = B > 1;

// The sums of 8 rows of a tile with two rows of the input, in the order of SMMLA: [tile's row][input's row].
struct TwoRows {
    const CodeGroup *row;  // the first of two
    int half;              // of the tile

    template <class Vector> ALWAYS_INLINE Vector of_tile(Vector x) const {
        const auto parts = Quarters<int32x4_t>::of(x);
        const int32x4_t low = parts.q[2 * half];
        const int32x4_t high = parts.q[2 * half + 1];
        return Quarters<int32x4_t>{{vzip1q_s32(low, low), vzip2q_s32(low, low), vzip1q_s32(high, high), vzip2q_s32(high, high)}}
            .template join<Vector>();
    }
    template <class Get> ALWAYS_INLINE auto of_input(Get get) const {
        return select((lanes() & 1) == 1, splat(get(row[1])), splat(get(row[0])));
    }
};

// From both halves of the tile with two rows of the input to the whole tile with each of them.
INLINE void part_rows(v16 &first, v16 &second) {
    const auto low = Quarters<float32x4_t>::of(first);
    const auto high = Quarters<float32x4_t>::of(second);
    first = Quarters<float32x4_t>{{vuzp1q_f32(low.q[0], low.q[1]), vuzp1q_f32(low.q[2], low.q[3]),
                                   vuzp1q_f32(high.q[0], high.q[1]), vuzp1q_f32(high.q[2], high.q[3])}}.join<v16>();
    second = Quarters<float32x4_t>{{vuzp2q_f32(low.q[0], low.q[1]), vuzp2q_f32(low.q[2], low.q[3]),
                                    vuzp2q_f32(high.q[0], high.q[1]), vuzp2q_f32(high.q[2], high.q[3])}}.join<v16>();
}
#else
template <int B> constexpr bool PAIRED = false;
#endif

// The sums in vector b of a block of B rows.
template <int B> INLINE auto sums_of(const CodeGroup *about, int b) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    if constexpr (PAIRED<B>) return TwoRows{about + b / 2 * 2, b % 2};
    else
#endif
        return OneRow{about + b};
}

// Adds exact sums, times the scales of weights and row, to the total. The next group is TILE further.
template <int FORMAT, class Of> INLINE v16 add_sums(v16 total, i16 sums, const Scales &scales, Of of) {
    constexpr Layout L = LAYOUTS[FORMAT];
    total = fma(to_float(sums), of.of_tile(scales.scale) * of.of_input([](const CodeGroup &g) { return g.scale; }), total);
    if constexpr (L.has_min)
        total = fma(of.of_tile(scales.second), of.of_input([](const CodeGroup &g) { return g.moment; }), total);
    if constexpr (L.has_min && L.wide)
        total = fma(of.of_tile(scales.third), of.of_input([](const CodeGroup &g) { return (&g)[TILE].moment; }), total);
    return total;
}

// ---- keys and values ----

#if defined(__AVX512F__)
constexpr int SHARED = 2;  // tiles at once
constexpr int ROWS = 4;
#else
constexpr int SHARED = 1;
constexpr int ROWS = 2;
#endif

template <bool FLOAT32, int S, int B, class At>
INLINE void vector_block(At at, int columns, const float *x, int64_t stride, float *out, int64_t out_stride) {
    v16 total[S][B] = {};
    for (int g = 0; g * GROUP < columns; g++) {
        const int pairs = columns - g * GROUP < GROUP ? (columns - g * GROUP + 1) / 2 : GROUP / 2;
        v16 even[S][B] = {};
        v16 odd[S][B] = {};
        const uint8_t *tile[S];
        UNROLL for (int s = 0; s < S; s++) tile[s] = at(s, g);
        for (int pair = 0; pair < pairs; pair++)
            UNROLL for (int s = 0; s < S; s++) {
                const i16 w = load_ints(tile[s] + pair * (FLOAT32 ? 128 : 64));
                const v16 low = as_float(FLOAT32 ? w : w << 16);
                const v16 high = as_float(FLOAT32 ? load_ints(tile[s] + pair * 128 + 64) : w & (int32_t)0xffff0000);
                UNROLL for (int b = 0; b < B; b++) {
                    const float *two = x + b * stride + g * GROUP + 2 * pair;
                    even[s][b] = fma(splat(two[0]), low, even[s][b]);
                    odd[s][b] = fma(splat(two[1]), high, odd[s][b]);
                }
            }
        UNROLL for (int i = 0; i < S * B; i++) total[i / B][i % B] += even[i / B][i % B] + odd[i / B][i % B];
    }
    UNROLL for (int i = 0; i < S * B; i++) store(out + i % B * out_stride + i / B * TILE, total[i / B][i % B]);
}

// Products of up to four tiles, of bf16 or float32, with up to MAX_TASK_ROWS rows; at(s, g) is where group g of tile s
// lies. After the last column the rows' group has zeros, which are not multiplied.
template <bool FLOAT32, class At>
INLINE void vector_product(At at, int tiles, int columns, const float *x, int64_t stride, int rows, float *out,
                           int64_t out_stride) {
    const auto run = [&](auto S, auto B, int s, int b) {
        const auto here = [&](int i, int g) { return at(s + i, g); };
        float *y = out + b * out_stride + s * TILE;
        vector_block<FLOAT32, S.value, B.value>(here, columns, x + b * stride, stride, y, out_stride);
    };
    int b = 0;
    for (; b + ROWS <= rows; b += ROWS) {
        int s = 0;
        for (; s + SHARED <= tiles; s += SHARED) run(Constant<SHARED>(), Constant<ROWS>(), s, b);
        for (; s < tiles; s++) run(Constant<1>(), Constant<ROWS>(), s, b);
    }
    for (; b < rows; b++) {
        int s = 0;
        for (; s + CHUNK <= tiles; s += CHUNK) run(Constant<CHUNK>(), Constant<1>(), s, b);
        for (; s < tiles; s++) run(Constant<1>(), Constant<1>(), s, b);
    }
}

#if defined(__AMX_TILE__)
}  // namespace KEIFU_NAMESPACE
#include "amx.h"
namespace KEIFU_NAMESPACE {
#else
template <class At>
INLINE void dense_product(At at, int tiles, int columns, const Dense *x, int64_t stride, int rows, float *out,
                          int64_t out_stride) {
    vector_product<false>(at, tiles, columns, x, stride, rows, out, out_stride);
}
#endif

// ---- bf16 and float32 ----

typedef int32_t Four __attribute__((aligned(1), may_alias));
INLINE int32_t four_bytes(const void *p) { return *(const Four *)p; }

// The total plus two columns of 16 rows of bf16 weights, which are `w`, times the numbers x[0] and x[1] of a row. It exists
// where such an instruction does, so that rows of bfloat16 without it do not compile.
#if defined(__AVX512BF16__)
INLINE v16 dot_pair(v16 total, i16 w, const uint16_t *x) {
    return (v16)_mm512_dpbf16_ps((__m512)total, (__m512bh)w, (__m512bh)splat(four_bytes(x)));
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)  // BFDOT and BFMMLA would round to odd
INLINE v16 dot_pair(v16 total, i16 w, const uint16_t *x) {
    const auto both = Quarters<bfloat16x8_t>::of(w);
    const auto two = Quarters<bfloat16x8_t>::of(splat(four_bytes(x)));
    auto sums = Quarters<float32x4_t>::of(total);
    UNROLL for (int i = 0; i < 4; i++)
        sums.q[i] = vbfmlalbq_f32(vbfmlaltq_f32(sums.q[i], both.q[i], two.q[i]), both.q[i], two.q[i]);
    return sums.join<v16>();
}
#endif

template <int FORMAT, int S, int B>
INLINE void plain_block(const uint8_t *const *tiles, const Rows &rows, int64_t row, Turn turn, float *out) {
    constexpr bool FLOAT32 = FORMAT == KEIFU_F32;
    constexpr int COLUMNS = FLOAT32 ? 1 : 2;  // of a line, which is a vector of each tile
    typedef std::conditional_t<FLOAT32, float, RowNumber> Element;
    constexpr bool PAIRS = std::is_same_v<Element, uint16_t>;  // an instruction multiplies two columns at once
    const Element *input;
    if constexpr (FLOAT32) input = rows.numbers;
    else input = rounded_rows(rows);
    v16 total[S][B] = {};
    for (int64_t line = 0; line < rows.columns / COLUMNS; line += 4) {
        if (B > 1 && (line / 4 & turn.mask) == turn.turn)
            UNROLL for (int s = 0; s < S; s++) fetch(tiles[CHUNK + s] + line * 64, 256);
        UNROLL for (int i = 0; i < 4; i++)
            UNROLL for (int s = 0; s < S; s++) {
                const i16 w = load_ints(tiles[s] + (line + i) * 64);
                const int64_t at = row * rows.columns + COLUMNS * (line + i);
                const auto *x = input + at;
                UNROLL for (int b = 0; b < B; b++) {
                    const int64_t down = b * rows.columns;
                    v16 &sum = total[s][b];
                    if constexpr (FLOAT32) sum = fma(splat(x[down]), as_float(w), sum);
                    else if constexpr (PAIRS) sum = dot_pair(sum, w, x + down);
                    else sum = fma(splat(x[down + 1]), as_float(w & (int32_t)0xffff0000), sum);
                }
                if constexpr (!FLOAT32 && !PAIRS)
                    UNROLL for (int b = 0; b < B; b++) total[s][b] = fma(splat(x[b * rows.columns]), as_float(w << 16), total[s][b]);
            }
    }
    UNROLL for (int i = 0; i < S * B; i++) store(out + i % B * OUT + i / B * TILE, total[i / B][i % B]);
}

// ---- quantised ----

// dot: each of 16 sums gains the products of four codes of a weight's row with four of x.
#if defined(__AVX512VNNI__)
typedef const int8_t *Quad;  // an instruction reads it from memory; the intrinsic would load it into a register
INLINE Quad quad_of(const int8_t *x) { return x; }
#else
typedef int32_t Quad;
INLINE Quad quad_of(const int8_t *x) { return four_bytes(x); }
#endif

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
template <class Half> INLINE i16 by_halves(i16 total, i16 w, Half half) {
    return parts<int32_t>(PART { return half((__m256i)total.part[i], (__m256i)w.part[i]); });
}
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int32_t CODE_BIAS = 128;  // VPDPBUSD wants unsigned weights: they are raised by this, and the sum corrected
constexpr int HIGH_SHIFT = 4;       // high halves of bytes are used in place, 16 times too large
#if defined(__AVX512VNNI__) && defined(KEIFU_EMULATED)  // a build for tests: see cpu.cpp
INLINE i16 dot_bytes(i16 total, i16 w, Quad x) {
    return (i16)_mm512_dpbusd_epi32((__m512i)total, (__m512i)w, _mm512_set1_epi32(four_bytes(x)));
}
#elif defined(__AVX512VNNI__)
INLINE i16 dot_bytes(i16 total, i16 w, Quad x) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(total) : "v"(w), "m"(*(const Four *)x));
    return total;
}
#else
INLINE i16 dot_bytes(i16 total, i16 w, Quad x) {
    const __m256i four = _mm256_set1_epi32(x);
    return by_halves(total, w, [&](__m256i t, __m256i h) { return _mm256_dpbusd_avx_epi32(t, h, four); });
}
#endif
INLINE i16 dot_codes(i16 total, i16 w, Quad x) { return dot_bytes(total, w ^ (int32_t)0x80808080, x); }
INLINE i16 dot_low(i16 total, i16 w, Quad x) { return dot_bytes(total, w & 0x0f0f0f0f, x); }
INLINE i16 dot_high(i16 total, i16 w, Quad x) { return dot_bytes(total, w & (int32_t)0xf0f0f0f0, x); }
#else
constexpr int32_t CODE_BIAS = 0;
constexpr int HIGH_SHIFT = 0;
#if defined(__AVX2__)
INLINE __m256i add_products(__m256i total, __m256i w, __m256i x) {  // unsigned · signed: no overflow up to 128 · 127 · 2
    return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
INLINE i16 dot_codes(i16 total, i16 w, Quad x) {
    const __m256i four = _mm256_set1_epi32(x);
    return by_halves(total, w, [&](__m256i t, __m256i h) { return add_products(t, _mm256_abs_epi8(h), _mm256_sign_epi8(four, h)); });
}
// Sums of 16 bits, each of two columns: those of a group are below 8 · 2 · 15 · 127 < 2^15.
INLINE i16 dot_low(i16 total, i16 w, Quad x) {
    const __m256i four = _mm256_set1_epi32(x);
    return by_halves(total, w & 0x0f0f0f0f, [&](__m256i t, __m256i h) { return _mm256_add_epi16(t, _mm256_maddubs_epi16(h, four)); });
}
INLINE i16 add_short_sums(i16 total, i16 sums) {
    return by_halves(total, sums, [](__m256i t, __m256i h) { return _mm256_add_epi32(t, _mm256_madd_epi16(h, _mm256_set1_epi16(1))); });
}
#elif defined(__ARM_NEON)
INLINE i16 dot_codes(i16 total, i16 w, Quad x) {
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(x));
    const auto codes = Quarters<int8x16_t>::of(w);
    auto sums = Quarters<int32x4_t>::of(total);
    UNROLL for (int i = 0; i < 4; i++) {
#if defined(__ARM_FEATURE_DOTPROD)
        sums.q[i] = vdotq_s32(sums.q[i], codes.q[i], four);
#else  // two products of codes fit 16 bits: those of x are at least -127
        const int16x8_t low = vmull_s8(vget_low_s8(codes.q[i]), vget_low_s8(four));
        sums.q[i] = vpadalq_s16(sums.q[i], vpaddq_s16(low, vmull_high_s8(codes.q[i], four)));
#endif
    }
    return sums.join<i16>();
}
INLINE i16 dot_low(i16 total, i16 w, Quad x) { return dot_codes(total, w & 0x0f0f0f0f, x); }
#else
INLINE i16 dot_codes(i16 total, i16 w, Quad x) {
    for (int i = 0; i < 4; i++) total += ((w << (24 - 8 * i)) >> 24) * ((x << (24 - 8 * i)) >> 24);
    return total;
}
INLINE i16 dot_low(i16 total, i16 w, Quad x) { return dot_codes(total, w & 0x0f0f0f0f, x); }
#endif
INLINE i16 dot_high(i16 total, i16 w, Quad x) { return dot_low(total, w >> 4, x); }
#endif

#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr bool SHORT_SUMS = true;  // dot_low adds in 16 bits; an addition takes one cycle
#define EACH_QUAD _Pragma("GCC unroll 1")  // unrolled, GCC would keep all products and add them up in another order
#else
constexpr bool SHORT_SUMS = false;
INLINE i16 add_short_sums(i16 total, i16) { return total; }  // not used
#define EACH_QUAD UNROLL
#endif

// Sums of the codes of a group: `low` and `high` of two halves of the columns, or `low` of all where neither the format
// nor the latency of few sums asks for two. With short sums of nibbles `high` has those until the end.
template <int FORMAT, int S, int B> struct Sums {
    static constexpr Layout L = LAYOUTS[FORMAT];
    static constexpr bool NIBBLES = L.codes == 256;
    static constexpr bool APART = L.halves || (!SHORT_SUMS && S * B < 8 && !PAIRED<B>);
    i16 low[S][B];
    i16 high[S][B];

    ALWAYS_INLINE void begin(const CodeGroup *about) {
        UNROLL for (int b = 0; b < B; b++) {
            const i16 first = sums_of<B>(about, b).of_input([](const CodeGroup &row) {
                const int32_t sum = L.wide && !NIBBLES ? row.pair_sum : L.halves ? row.half[0] : row.sum;
                return (NIBBLES ? -L.offset : -CODE_BIAS) * sum;
            });
            const i16 second = sums_of<B>(about, b).of_input([](const CodeGroup &row) { return L.halves ? -CODE_BIAS * row.half[1] : 0; });
            UNROLL for (int s = 0; s < S; s++) low[s][b] = first, high[s][b] = second;
        }
    }

#if defined(__ARM_FEATURE_MATMUL_INT8)
    // SMMLA multiplies 8 columns of two rows of the tile with those of two rows of the input.
    ALWAYS_INLINE void add_matrices(const uint8_t *codes, const int8_t *x, int64_t stride, i16 *low, i16 *high) {
        for (int half = 0; half < 2; half++) {  // of the tile, so that the sums are registers
            Quarters<int32x4_t> sums[2][B / 2];
            UNROLL for (int p = 0; p < B / 2; p++) {
                sums[0][p] = sums[0][p].of(low[2 * p + half]);
                sums[1][p] = sums[1][p].of(high[2 * p + half]);
            }
            UNROLL for (int eight = 0; eight < 4; eight++) {  // columns
                const bool second = eight > 1;
                const uint8_t *at = codes + (NIBBLES ? eight % 2 : eight) * 128 + half * 32;
                int8x16_t rows[B / 2];
                UNROLL for (int p = 0; p < B / 2; p++)
                    rows[p] = vcombine_s8(vld1_s8(x + 2 * p * stride + 8 * eight), vld1_s8(x + (2 * p + 1) * stride + 8 * eight));
                UNROLL for (int r = 0; r < 2; r++) {
                    int32x4_t quad = vreinterpretq_s32_u8(vld1q_u8(at + r * 16));
                    int32x4_t next = vreinterpretq_s32_u8(vld1q_u8(at + r * 16 + 64));
                    if (NIBBLES) quad = (second ? quad >> 4 : quad) & 0x0f0f0f0f, next = (second ? next >> 4 : next) & 0x0f0f0f0f;
                    const int8x16_t two[] = {vreinterpretq_s8_s32(vzip1q_s32(quad, next)), vreinterpretq_s8_s32(vzip2q_s32(quad, next))};
                    UNROLL for (int p = 0; p < B / 2; p++)
                        UNROLL for (int i = 0; i < 2; i++) {
                            int32x4_t &sum = sums[L.halves && second][p].q[2 * r + i];
                            sum = vmmlaq_s32(sum, two[i], rows[p]);
                        }
                }
            }
            UNROLL for (int p = 0; p < B / 2; p++) {
                low[2 * p + half] = sums[0][p].template join<i16>();
                high[2 * p + half] = sums[1][p].template join<i16>();
            }
        }
    }
#endif

    ALWAYS_INLINE void add(const uint8_t *const (&codes)[S], const int8_t *x, int64_t stride) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        if constexpr (PAIRED<B>) {
            for (int s = 0; s < S; s++) add_matrices(codes[s], x, stride, low[s], high[s]);
            return;
        }
#endif
        EACH_QUAD for (int quad = 0; quad < 4; quad++)
            UNROLL for (int s = 0; s < S; s++) {
                const i16 w = load_ints(codes[s] + quad * 64);
                const i16 v = !NIBBLES ? load_ints(codes[s] + (quad + 4) * 64) : APART ? w : w >> 4;
                UNROLL for (int b = 0; b < B; b++) {
                    const Quad first = quad_of(x + b * stride + quad * 4);
                    const Quad second = quad_of(x + b * stride + quad * 4 + TILE);
                    if constexpr (NIBBLES && SHORT_SUMS) {
                        high[s][b] = dot_low(dot_low(high[s][b], w, first), v, second);
                        continue;
                    }
                    low[s][b] = NIBBLES ? dot_low(low[s][b], w, first) : dot_codes(low[s][b], w, first);
                    if (!APART) low[s][b] = NIBBLES ? dot_low(low[s][b], v, second) : dot_codes(low[s][b], v, second);
                    else high[s][b] = NIBBLES ? dot_high(high[s][b], v, second) : dot_codes(high[s][b], v, second);
                }
            }
    }

    ALWAYS_INLINE void end() {
        UNROLL for (int i = 0; i < S * B; i++) {
            if (NIBBLES && SHORT_SUMS) low[i / B][i % B] = add_short_sums(low[i / B][i % B], high[i / B][i % B]);
            if (NIBBLES && APART && HIGH_SHIFT) high[i / B][i % B] >>= HIGH_SHIFT;
            if (!L.halves && APART) low[i / B][i % B] += high[i / B][i % B];
        }
    }
};

template <int FORMAT, int S, int B>
INLINE void quantised_block(const uint8_t *const *tiles, const Rows &rows, int64_t row, Turn turn, float *out) {
    constexpr Layout L = LAYOUTS[FORMAT];
    constexpr int ahead = L.codes == 256 ? PREFETCH.bits_4 : PREFETCH.bits_8;
    const CodeGroup *about = rows.about(row, 0);
    const int8_t *x = rows.codes + row * rows.columns;
    const int64_t bytes = tile_bytes(FORMAT, rows.columns);
    v16 total[S][B] = {};
    for (int64_t pair = 0; pair < rows.columns / PAIR; pair++) {
        const int64_t header = pair_offset(L, pair);
        if (B == 1 && ahead)
            UNROLL for (int s = 0; s < S; s++)
                fetch_ahead<PREFETCH.cache>(tiles[s], tiles[S + s], bytes, header + ahead, L.pair());
        if (B > 1 && (pair & turn.mask) == turn.turn)
            UNROLL for (int s = 0; s < S; s++) fetch(tiles[CHUNK + s] + header - L.super, L.super + L.pair());
        Sums<FORMAT, S, B> sums;
        i16 before[S][B];
        for (int g = 0; g < 2; g++, about += TILE, x += GROUP) {
            const uint8_t *codes[S];
            UNROLL for (int s = 0; s < S; s++) codes[s] = tiles[s] + header + L.group(g);
            if (FORMAT != KEIFU_INT8_64 || g == 0) sums.begin(about);
            sums.add(codes, x, rows.columns);
            if (FORMAT == KEIFU_INT8_64 && g == 0) continue;
            sums.end();
            UNROLL for (int s = 0; s < S; s++) {
                if constexpr (FORMAT == KEIFU_INT4_64) {
                    const i16 multipliers = read_multipliers(tiles[s], pair, g);
                    UNROLL for (int b = 0; b < B; b++) {
                        const i16 m = sums_of<B>(about, b).of_tile(multipliers);
                        if (g == 0) before[s][b] = sums.low[s][b] * m;
                        else sums.low[s][b] = sums.low[s][b] * m + before[s][b];
                    }
                    if (g == 0) continue;
                }
                const Scales scales = read_scales<FORMAT>(tiles[s], pair, g);
                UNROLL for (int b = 0; b < B; b++) {
                    const auto of = sums_of<B>(about - (L.wide ? TILE : 0), b);
                    total[s][b] = add_sums<FORMAT>(total[s][b], sums.low[s][b], scales, of);
                    if (!L.halves) continue;
                    const v16 scale = of.of_tile(scales.second) * of.of_input([](const CodeGroup &row) { return row.scale; });
                    total[s][b] = fma(to_float(sums.high[s][b]), scale, total[s][b]);
                }
            }
        }
    }
#if defined(__ARM_FEATURE_MATMUL_INT8)
    if constexpr (PAIRED<B>) UNROLL for (int i = 0; i < S * B; i += 2) part_rows(total[i / B][i % B], total[i / B][i % B + 1]);
#endif
    UNROLL for (int i = 0; i < S * B; i++) store(out + i % B * OUT + i / B * TILE, total[i / B][i % B]);
}

// Not inline: with all formats in one function the compiler leaves blocks out of line, and is slower.
template <int FORMAT>
__attribute__((noinline)) void product_of(const uint8_t *const *tiles, const Rows &rows, int64_t row, int n_rows,
                [[maybe_unused]] Scratch &scratch, float *out) {
    constexpr bool PLAIN = input_of(FORMAT) != Input::CODES;
#if defined(__AMX_TILE__)
    if constexpr (FORMAT == KEIFU_BF16) {
        const int64_t bytes = tile_bytes(FORMAT, rows.columns);
        const auto at = [&](int s, int g) {
            if (n_rows <= 2 * TILE) fetch_ahead(tiles[s], tiles[CHUNK + s], bytes, g * 1024 + 4096, 1024);
            return tiles[s] + g * 1024;
        };
        const RowNumber *x = rounded_rows(rows) + row * rows.columns;
        dense_product(at, CHUNK, (int)rows.columns, x, rows.columns, n_rows, out, OUT);
    } else {
        if constexpr (!PLAIN)
            if (n_rows >= AMX_ROWS) return amx_quantised<FORMAT>(tiles, CHUNK, rows, row, n_rows, scratch, out);
#else
    {
#endif
        constexpr Blocking K = FORMAT == KEIFU_F32 ? FLOATS : PLAIN ? BFLOAT16 : QUANTISED;
        const int64_t mask = n_rows < 2 * K.rows ? 0 : n_rows < 4 * K.rows ? 1 : 3;
        cut<K.tiles, K.alone, K.rows>(0, n_rows, [&](auto S, auto B, int s, int b) {
            const Turn turn{mask, b / B.value};
            float *y = out + b * OUT + s * TILE;
            if constexpr (PLAIN) plain_block<FORMAT, S.value, B.value>(tiles + s, rows, row + b, turn, y);
            else quantised_block<FORMAT, S.value, B.value>(tiles + s, rows, row + b, turn, y);
        });
    }
}

// out[r][16 s + i] = row i of tile s times row `row` + r, for CHUNK tiles and up to BLOCK_ROWS rows. Behind the tiles
// stand CHUNK more, which this thread will probably be given next: they are fetched meanwhile.
static void product(int format, const uint8_t *const *tiles, const Rows &rows, int64_t row, int n_rows, Scratch &scratch,
                    float *out) {
    with_format(format, [&](auto F) { product_of<F.value>(tiles, rows, row, n_rows, scratch, out); });
#if defined(KEIFU_PLANTED_ERROR)  // a weight format: tests see that the check of instruction sets finds an error in it
    if (format == KEIFU_PLANTED_ERROR) out[0] = -out[0];
#endif
}

}  // namespace KEIFU_NAMESPACE
