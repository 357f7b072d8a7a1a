// Packing a tile of a matrix, a lane for each of its rows: numbers to bf16 or to codes with scales that make the squared
// error small; and reading a row of a packed matrix.

#pragma once
#include "product.h"

namespace KEIFU_NAMESPACE {

// ---- reading ----

template <int FORMAT> INLINE void unpack_row(const uint8_t *tile, int lane, int64_t columns, float *out) {
    constexpr Layout L = LAYOUTS[FORMAT];
    for (int64_t start = 0; start < columns; start += GROUP) {
        const int64_t pair = start / PAIR;
        const int g = start / GROUP % 2;
        const uint8_t *codes = tile + pair_offset(L, pair) + L.group(g);
        Scales all{};
        if constexpr (input_of(FORMAT) == Input::CODES) all = read_scales<FORMAT>(tile, pair, g);
        if constexpr (FORMAT == KEIFU_INT4_64) all.scale *= to_float(read_multipliers(tile, pair, g));
        const float scales[2] = {all.scale[lane], L.halves ? all.second[lane] : all.scale[lane]};
        const float min = L.wide && g ? all.third[lane] : all.second[lane];
        const int n = columns - start < GROUP ? (int)(columns - start) : GROUP;
        for (int i = 0; i < n; i++) {
            float value;
            if constexpr (FORMAT == KEIFU_F32) {
                memcpy(&value, codes + (i * TILE + lane) * 4, 4);
            } else if constexpr (FORMAT == KEIFU_BF16) {
                const uint32_t bits = (uint32_t)((const uint16_t *)codes)[bfloat16_place(i, lane)] << 16;
                memcpy(&value, &bits, 4);
            } else if constexpr (L.codes == 256) {
                value = scales[0] * (float)((codes[nibble_place(i, lane)] >> nibble_shift(i) & 15) - L.offset);
            } else {
                value = scales[i / 16] * (float)((const int8_t *)codes)[code_place(i, lane)];
            }
            out[start + i] = L.has_min ? value + min : value;
        }
    }
}

static void unpack(int format, const uint8_t *data, int64_t columns, int64_t row, float *out) {
    const uint8_t *tile = data + row / TILE * tile_bytes(format, columns);
    const int lane = (int)(row % TILE);
    with_format(format, [&](auto F) { unpack_row<F.value>(tile, lane, columns, out); });
}

// ---- choosing scales, of 16 groups at a time ----

typedef v16 Group[GROUP];

INLINE v16 nearest(v16 x) { return (x + 12582912.f) - 12582912.f; }  // whole numbers, ties to even

INLINE v16 clamp(v16 x, float low, float high) {
    x = select(x < low, splat(low), x);
    return select(x > high, splat(high), x);
}

INLINE v16 inverse_of(v16 x) { return select(x != 0.f, 1.f / x, v16{}); }

INLINE v16 code_of(v16 x, v16 inverse, v16 min, float low, float high) { return nearest(clamp((x - min) * inverse, low, high)); }

INLINE void extremes(const v16 *x, int n, v16 &low, v16 &high) {
    low = high = x[0];
    for (int i = 1; i < n; i++) {
        low = select(x[i] < low, x[i], low);
        high = max(x[i], high);
    }
}

constexpr int FEWEST = -12;  // scales that are tried, around that of the largest number
constexpr int MOST = 12;

struct Affine {
    v16 scale, min;
};

// Scale and min, which is 0 or below, of codes 0..15 with the least squared error, by least squares from several first
// scales.
INLINE Affine affine_scale(const Group &x) {
    v16 low, high;
    extremes(x, GROUP, low, high);
    low = select(low > 0.f, v16{}, low);
    Affine best{v16{}, low};
    v16 least = splat(3e38f);
    v16 sum_x{};
    for (int i = 0; i < GROUP; i++) sum_x += x[i];
    for (int step = FEWEST; step <= MOST; step++) {
        const v16 inverse = (15.f + 0.1f * (float)step) * inverse_of(high - low);
        v16 sum_q{};
        v16 qq{};
        v16 xq{};
        for (int i = 0; i < GROUP; i++) {
            const v16 q = code_of(x[i], inverse, low, 0, 15);
            sum_q += q;
            qq += q * q;
            xq += x[i] * q;
        }
        const v16 determinant = inverse_of((float)GROUP * qq - sum_q * sum_q);
        v16 scale = ((float)GROUP * xq - sum_x * sum_q) * determinant;
        v16 min = (qq * sum_x - sum_q * xq) * determinant;
        scale = select(min > 0.f, xq * inverse_of(qq), scale);
        min = select(min > 0.f, v16{}, min);
        v16 error = scale * (scale * qq + 2.f * (min * sum_q - xq)) + min * ((float)GROUP * min - 2.f * sum_x);
        error = select((determinant > 0.f) & (scale > 0.f), error, splat(3e38f));
        best.scale = select(error < least, scale, best.scale);
        best.min = select(error < least, min, best.min);
        least = select(error < least, error, least);
    }
    return best;
}

// ---- writing ----

INLINE uint16_t half_bits(float x) {  // float16, rounded to the nearest; what is too large becomes the largest
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7bff);
    if (u >= 0x38800000) return (uint16_t)(sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13));
    float size;
    memcpy(&size, &u, 4);
    return (uint16_t)(sign | (uint32_t)__builtin_rintf(size * 16777216.f));
}

// Write a float16 for each row and return the numbers that it stands for: the nearest, or with UP none below x (x >= 0).
template <bool UP = false> INLINE v16 put_halves(uint8_t *to, v16 x) {
    uint16_t bits[TILE];
    for (int lane = 0; lane < TILE; lane++) bits[lane] = half_bits(x[lane]);
    if constexpr (UP) {
        memcpy(to, bits, sizeof bits);
        const v16 nearest_half = load_half(to);
        for (int lane = 0; lane < TILE; lane++)
            if (nearest_half[lane] < x[lane] && bits[lane] < 0x7bff) bits[lane]++;
    }
    memcpy(to, bits, sizeof bits);
    return load_half(to);
}

INLINE void put_bytes(uint8_t *to, v16 x) {
    for (int lane = 0; lane < TILE; lane++) to[lane] = (uint8_t)x[lane];
}

template <int FORMAT> INLINE void put_codes(uint8_t *codes, const Group &x, v16 scale, v16 min) {
    constexpr bool NIBBLES = LAYOUTS[FORMAT].codes == 256;
    const v16 inverse = inverse_of(scale);
    for (int quad = 0; quad < 8; quad++) {
        i16 word{};
        for (int k = 0; k < 4; k++) {
            const v16 code = code_of(x[4 * quad + k], inverse, min, NIBBLES ? 0 : -127, NIBBLES ? 15 : 127);
            word |= (round_to_int(code) & 255) << (8 * k);
        }
        uint8_t *to = codes + (NIBBLES ? quad % 4 : quad) * 64;
        if (NIBBLES && quad >= 4) word = word << 4 | load_ints(to);
        memcpy(to, &word, 64);
    }
}

struct Fit {
    v16 min, error;  // the code of the minimum, and the squared error with it
};

// Fit the minimum, a multiple of -dmin, to a group whose scale is given; `min` is a first guess.
INLINE Fit fit_min(const Group &x, v16 scale, v16 min, v16 dmin) {
    const v16 inverse = inverse_of(scale);
    v16 rest{};
    for (int i = 0; i < GROUP; i++) rest += x[i] - scale * code_of(x[i], inverse, min, 0, 15);
    const v16 code = clamp(nearest(-rest / (float)GROUP * inverse_of(dmin)), 0, 255);
    const v16 coded = -(dmin * code);
    v16 error{};
    for (int i = 0; i < GROUP; i++) {
        const v16 difference = x[i] - scale * code_of(x[i], inverse, coded, 0, 15) - coded;
        error += difference * difference;
    }
    return {code, error};
}

struct PairCodes {
    v16 scale;           // of the pair, a multiple of d
    v16 multipliers[2];  // of the scale, 1 to 16, for each group
    v16 mins[2];
};

// Choose the codes of a pair of groups. The larger scale is 16 to 9 times the pair's: of these the one with the least
// squared error, since the other group's scale must be a whole multiple too.
INLINE PairCodes choose_codes(const Group *x, const Affine *wanted, v16 d, v16 dmin) {
    const v16 larger = max(wanted[0].scale, wanted[1].scale);
    PairCodes best{};
    v16 least = splat(3e38f);
    for (int times = 16; times > 8; times--) {
        const v16 scale = clamp(nearest(larger / (float)times * inverse_of(d)), 0, 255);
        v16 multipliers[2];
        Fit fits[2];
        for (int g = 0; g < 2; g++) {
            multipliers[g] = clamp(nearest(wanted[g].scale * inverse_of(d * scale)), 1, 16);
            fits[g] = fit_min(x[g], d * scale * multipliers[g], wanted[g].min, dmin);
        }
        const v16 error = fits[0].error + fits[1].error;
        best.scale = select(error < least, scale, best.scale);
        for (int g = 0; g < 2; g++) {
            best.multipliers[g] = select(error < least, multipliers[g], best.multipliers[g]);
            best.mins[g] = select(error < least, fits[g].min, best.mins[g]);
        }
        least = select(error < least, error, least);
    }
    return best;
}

// Up to 8 groups, which are a super block: scales and mins are multiples of d and dmin.
INLINE void pack_int4(uint8_t *tile, int64_t first_pair, const Group *x, int pairs) {
    constexpr Layout L = LAYOUTS[KEIFU_INT4_64];
    Affine best[2 * SUPER_PAIRS];
    v16 most_scale{};
    v16 most_min{};
    for (int g = 0; g < 2 * pairs; g++) {
        best[g] = affine_scale(x[g]);
        most_scale = max(best[g].scale, most_scale);
        most_min = max(-best[g].min, most_min);
    }
    uint8_t *super = tile + super_offset(L, first_pair);
    // Rounded up: of small weights d is a float16 of few bits, and the largest code must not exceed 255.
    const v16 d = put_halves<true>(super, most_scale / (16 * 255.f));
    const v16 dmin = put_halves<true>(super + 32, most_min / 255.f);
    for (int pair = 0; pair < pairs; pair++) {
        const Group *groups = x + 2 * pair;
        const PairCodes codes = choose_codes(groups, best + 2 * pair, d, dmin);
        uint8_t *header = tile + pair_offset(L, first_pair + pair);
        put_bytes(header, codes.scale);
        for (int g = 0; g < 2; g++) {
            const v16 m = codes.multipliers[g];
            for (int lane = 0; lane < TILE; lane++) header[TILE + lane] |= ((uint8_t)m[lane] - 1) << 4 * g;
            put_bytes(header + 32 + g * TILE, codes.mins[g]);
            put_codes<KEIFU_INT4_64>(header + L.group(g), groups[g], d * codes.scale * m, -(dmin * codes.mins[g]));
        }
    }
}

INLINE void pack_int8(uint8_t *tile, int64_t pair, const Group *x) {
    constexpr Layout L = LAYOUTS[KEIFU_INT8_64];
    v16 low, high;
    extremes(x[0], PAIR, low, high);
    const v16 scale = put_halves(tile + super_offset(L, pair) + pair % SUPER_PAIRS * 32, max(high, -low) / 127.f);
    for (int g = 0; g < 2; g++) put_codes<KEIFU_INT8_64>(tile + pair_offset(L, pair) + L.group(g), x[g], scale, v16{});
}

INLINE void pack_bfloat16(uint8_t *tile, int64_t pair, const Group *x) {
    for (int i = 0; i < PAIR; i += 2) {
        const i16 two = bfloat16_bits(x[0][i]) | bfloat16_bits(x[0][i + 1]) << 16;
        memcpy(tile + pair_offset(LAYOUTS[KEIFU_BF16], pair) + i * 32, &two, 64);
    }
}

INLINE void pack_float32(uint8_t *tile, int64_t pair, const Group *x) {
    for (int i = 0; i < PAIR; i++) store((float *)(tile + pair_offset(LAYOUTS[KEIFU_F32], pair)) + i * TILE, x[0][i]);
}

// A group of each row, zeros beyond the rows and the columns.
INLINE void read_group(const Numbers &from, int64_t column, Group &x) {
    float numbers[GROUP][TILE] = {};
    const int n = from.columns - column < GROUP ? (int)(from.columns - column) : GROUP;
    for (int row = 0; row < from.rows; row++) {
        const char *start = from.data + row * from.stride + column * from.size;
        for (int i = 0; i < n; i++)
            if (from.size == 4) memcpy(&numbers[i][row], start + 4 * i, 4);
            else memcpy(&numbers[i][row], start + 2 * i, 2);
    }
    for (int i = 0; i < GROUP; i++) {
        uint16_t halves[2 * TILE];
        memcpy(halves, numbers[i], sizeof halves);
        for (int row = 0; row < TILE; row++) halves[row] = halves[2 * row];
        x[i] = from.type == KEIFU_FROM_FLOAT32 ? load(numbers[i]) : from.type == KEIFU_FROM_FLOAT16 ? load_half(halves) : load_bfloat16(halves);
    }
}

// The first row of a group that has a NaN or an infinity, or -1. (A maximum may lose a NaN.)
INLINE int find_bad(const Group &x) {
    v16 zeros{};
    for (int i = 0; i < GROUP; i++) zeros += x[i] * 0.f;
    for (int row = 0; row < TILE; row++)
        if (zeros[row] != 0.f) return row;
    return -1;
}

// Packs up to 16 rows as a tile, whose bytes were 0; gives -1, or of a group with a NaN or an infinity its row ·
// columns + its first column.
static int64_t pack(int format, const Numbers &from, uint8_t *tile) {
    const int64_t all = round_up(from.columns, PAIR) / PAIR;
    for (int64_t first = 0; first < all; first += SUPER_PAIRS) {
        Group x[2 * SUPER_PAIRS];
        const int pairs = all - first < SUPER_PAIRS ? (int)(all - first) : SUPER_PAIRS;
        for (int g = 0; g < 2 * pairs; g++) {
            const int64_t column = first * PAIR + g * GROUP;
            read_group(from, column, x[g]);
            const int bad = find_bad(x[g]);
            if (bad >= 0) return bad * from.columns + column;
        }
        if (format == KEIFU_INT4_64) pack_int4(tile, first, x, pairs);
        for (int pair = 0; pair < pairs; pair++)
            if (format == KEIFU_F32) pack_float32(tile, first + pair, x + 2 * pair);
            else if (format == KEIFU_BF16) pack_bfloat16(tile, first + pair, x + 2 * pair);
            else if (format == KEIFU_INT8_64) pack_int8(tile, first + pair, x + 2 * pair);
    }
    return -1;
}

}  // namespace KEIFU_NAMESPACE
