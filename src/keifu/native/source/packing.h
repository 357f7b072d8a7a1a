// Packing a tile of a matrix: numbers to bf16 or to codes with scales that make the squared error small; and reading a
// row of a packed matrix.

#pragma once
#include "product.h"

namespace KEIFU_NAMESPACE {

// ---- reading ----

template <int FORMAT> INLINE void unpack_row(const uint8_t *tile, int lane, int64_t columns, float *out) {
    constexpr Layout L = LAYOUTS[FORMAT];
    for (int64_t start = 0; start < columns; start += GROUP) {
        const int64_t pair = start / PAIR;
        const int g = start / GROUP % 2;
        const uint8_t *header = tile + pair_offset(L, pair);
        const uint8_t *codes = header + L.group(g);
        v16 scale{};
        v16 second{};
        if constexpr (FORMAT != KEIFU_BF16) read_scales<FORMAT>(tile + super_offset(L, pair), header, g, scale, second);
        const float scales[2] = {scale[lane], L.halves ? second[lane] : scale[lane]};
        const float min = second[lane];
        const int n = columns - start < GROUP ? (int)(columns - start) : GROUP;
        for (int i = 0; i < n; i++) {
            float value;
            if constexpr (FORMAT == KEIFU_BF16) {
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
    switch (format) {
    case KEIFU_BF16: return unpack_row<KEIFU_BF16>(tile, lane, columns, out);
    case KEIFU_INT8: return unpack_row<KEIFU_INT8>(tile, lane, columns, out);
    case KEIFU_INT4: return unpack_row<KEIFU_INT4>(tile, lane, columns, out);
    case KEIFU_INT4_MIN: return unpack_row<KEIFU_INT4_MIN>(tile, lane, columns, out);
    case KEIFU_INT4_SUPER: return unpack_row<KEIFU_INT4_SUPER>(tile, lane, columns, out);
    case KEIFU_INT6_SUPER: return unpack_row<KEIFU_INT6_SUPER>(tile, lane, columns, out);
    }
}

// ---- choosing scales ----

struct Numbers {  // a group
    v16 a, b;
};

INLINE float dot(v16 a, v16 b, v16 c, v16 d) { return sum(a * b + c * d); }

INLINE v16 clamp(v16 x, float low, float high) {
    x = x < low ? splat(low) : x;
    return x > high ? splat(high) : x;
}

INLINE Numbers codes_of(Numbers x, float scale, float min, float low, float high) {
    const float inverse = scale != 0 ? 1.f / scale : 0.f;
    const v16 a = clamp((x.a - min) * inverse, low, high);
    const v16 b = clamp((x.b - min) * inverse, low, high);
    return {to_float(round_to_int(a)), to_float(round_to_int(b))};
}

// The scale of codes -8..7 with the least squared error of those near the largest number / -8.
INLINE float symmetric_scale(Numbers x) {
    const float most = maximum(max(abs(x.a), abs(x.b)));
    if (most == 0) return 0;
    const float extreme = maximum(max(x.a, x.b)) == most ? most : -most;
    float best = 0;
    float scale = 0;
    for (int step = -12; step <= 12; step++) {
        const Numbers q = codes_of(x, extreme / (-8.f - 0.1f * (float)step), 0, -8, 7);
        const float xq = dot(x.a, q.a, x.b, q.b);
        const float qq = dot(q.a, q.a, q.b, q.b);
        if (qq > 0 && xq * xq > best * qq) {
            best = xq * xq / qq;
            scale = xq / qq;
        }
    }
    return scale;
}

struct Affine {
    float scale, min;
};

// Scale and min of codes 0..15 with the least squared error, by least squares from several first scales. The min is 0
// or below where `below` is set.
INLINE Affine affine_scale(Numbers x, bool below) {
    float low = -maximum(max(-x.a, -x.b));
    const float high = maximum(max(x.a, x.b));
    if (below && low > 0) low = 0;
    Affine best{0, low};
    if (high <= low) return best;
    const float sum_x = sum(x.a + x.b);
    float least = 3e38f;
    for (int step = -12; step <= 12; step++) {
        const Numbers q = codes_of(x, (high - low) / (15.f + 0.1f * (float)step), low, 0, 15);
        const float sum_q = sum(q.a + q.b);
        const float qq = dot(q.a, q.a, q.b, q.b);
        const float xq = dot(x.a, q.a, x.b, q.b);
        const float determinant = GROUP * qq - sum_q * sum_q;
        if (determinant <= 0) continue;
        Affine now{(GROUP * xq - sum_x * sum_q) / determinant, (qq * sum_x - sum_q * xq) / determinant};
        if (below && now.min > 0) now = {xq / qq, 0};
        const v16 a = x.a - (q.a * now.scale + now.min);
        const v16 b = x.b - (q.b * now.scale + now.min);
        const float error = dot(a, a, b, b);
        if (error < least && now.scale > 0) {
            least = error;
            best = now;
        }
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

INLINE float half(uint16_t bits) {
    uint16_t all[16] = {bits};
    return load_half(all)[0];
}

struct Place {  // a row's group in a tile
    uint8_t *super, *header, *codes;
    int g, lane;

    uint16_t &halfword(uint8_t *base, int index) const { return ((uint16_t *)base)[index * TILE + lane]; }
    uint8_t &byte(int index) const { return header[index * TILE + lane]; }
};

template <int FORMAT> INLINE void put_codes(const Place &place, Numbers q) {
    float codes[GROUP];
    store(codes, q.a);
    store(codes + TILE, q.b);
    constexpr Layout L = LAYOUTS[FORMAT];
    for (int i = 0; i < GROUP; i++) {
        const int code = (int)codes[i] + L.offset;
        if (L.codes == 256) place.codes[nibble_place(i, place.lane)] |= (uint8_t)(code << nibble_shift(i));
        else place.codes[code_place(i, place.lane)] = (uint8_t)code;
    }
}

template <int FORMAT> INLINE void pack_group(const Place &place, Numbers x) {
    if constexpr (FORMAT == KEIFU_BF16) {
        uint16_t bits[GROUP];
        store_bfloat16(bits, x.a);
        store_bfloat16(bits + TILE, x.b);
        for (int i = 0; i < GROUP; i++) ((uint16_t *)place.codes)[bfloat16_place(i, place.lane)] = bits[i];
    } else if constexpr (FORMAT == KEIFU_INT4_MIN) {
        const Affine best = affine_scale(x, false);
        const uint16_t scale = place.halfword(place.header, 2 * place.g) = half_bits(best.scale);
        const uint16_t min = place.halfword(place.header, 2 * place.g + 1) = half_bits(best.min);
        put_codes<FORMAT>(place, codes_of(x, half(scale), half(min), 0, 15));
    } else {
        constexpr bool EIGHT = FORMAT == KEIFU_INT8;
        const float best = EIGHT ? maximum(max(abs(x.a), abs(x.b))) / 127.f : symmetric_scale(x);
        const uint16_t scale = place.halfword(place.header, place.g) = half_bits(best);
        put_codes<FORMAT>(place, codes_of(x, half(scale), 0, EIGHT ? -127 : -8, EIGHT ? 127 : 7));
    }
}

// The groups of a super block together: their scales and mins are multiples of d and dmin.
INLINE void pack_super(const Place *places, const Numbers *x, int n) {
    Affine best[2 * SUPER_PAIRS];
    float scale = 0;
    float min = 0;
    for (int g = 0; g < n; g++) {
        best[g] = affine_scale(x[g], true);
        scale = best[g].scale > scale ? best[g].scale : scale;
        min = -best[g].min > min ? -best[g].min : min;
    }
    const float d = half(places[0].halfword(places[0].super, 0) = half_bits(scale / 255.f));
    const float dmin = half(places[0].halfword(places[0].super, 1) = half_bits(min / 255.f));
    for (int g = 0; g < n; g++) {
        const float multiple = d > 0 ? __builtin_rintf(best[g].scale / d) : 0.f;
        const float below = dmin > 0 ? __builtin_rintf(-best[g].min / dmin) : 0.f;
        const float s = places[g].byte(2 * places[g].g) = (uint8_t)(multiple < 255.f ? multiple : 255.f);
        const float m = places[g].byte(2 * places[g].g + 1) = (uint8_t)(below < 255.f ? below : 255.f);
        put_codes<KEIFU_INT4_SUPER>(places[g], codes_of(x[g], d * s, -(dmin * m), 0, 15));
    }
}

// Up to 16 numbers from column `column` on of a row, as floats, zeros after its end.
INLINE v16 read_numbers(int source_type, const void *row, int64_t column, int64_t columns) {
    const int n = columns - column < TILE ? (int)(columns - column) : TILE;
    float numbers[TILE] = {};
    uint16_t halves[TILE] = {};
    if (n <= 0) return v16{};
    if (source_type == KEIFU_FROM_FLOAT32) {
        memcpy(numbers, (const float *)row + column, (size_t)n * 4);
        return load(numbers);
    }
    memcpy(halves, (const uint16_t *)row + column, (size_t)n * 2);
    if (source_type == KEIFU_FROM_FLOAT16) return load_half(halves);
    return load_bfloat16(halves);
}

template <int FORMAT>
INLINE int64_t pack_row(int source_type, const void *row, int64_t columns, int lane, uint8_t *tile) {
    constexpr Layout L = LAYOUTS[FORMAT];
    constexpr int UNIT = 2 * SUPER_PAIRS;
    const int64_t groups = round_up(columns, PAIR) / GROUP;
    for (int64_t first_group = 0; first_group < groups; first_group += UNIT) {
        Place places[UNIT];
        Numbers x[UNIT];
        const int n = groups - first_group < UNIT ? (int)(groups - first_group) : UNIT;
        for (int i = 0; i < n; i++) {
            const int64_t group = first_group + i;
            uint8_t *header = tile + pair_offset(L, group / 2);
            const int g = (int)(group % 2);
            places[i] = {tile + super_offset(L, group / 2), header, header + L.group(g), g, lane};
            x[i] = {read_numbers(source_type, row, group * GROUP, columns),
                    read_numbers(source_type, row, group * GROUP + TILE, columns)};
            if (sum(x[i].a * 0.f + x[i].b * 0.f) != 0.f) return group * GROUP;  // a maximum may lose a NaN
            if constexpr (FORMAT != KEIFU_INT4_SUPER) pack_group<FORMAT>(places[i], x[i]);
        }
        if constexpr (FORMAT == KEIFU_INT4_SUPER) pack_super(places, x, n);
    }
    return -1;
}

// Packs a row into its tile, whose bytes were 0; gives -1, or the first column of a group with a NaN or an infinity.
static int64_t pack(int format, int source_type, const void *row, int64_t columns, int lane, uint8_t *tile) {
    switch (format) {
    case KEIFU_BF16: return pack_row<KEIFU_BF16>(source_type, row, columns, lane, tile);
    case KEIFU_INT8: return pack_row<KEIFU_INT8>(source_type, row, columns, lane, tile);
    case KEIFU_INT4: return pack_row<KEIFU_INT4>(source_type, row, columns, lane, tile);
    case KEIFU_INT4_MIN: return pack_row<KEIFU_INT4_MIN>(source_type, row, columns, lane, tile);
    default: return pack_row<KEIFU_INT4_SUPER>(source_type, row, columns, lane, tile);
    }
}

}  // namespace KEIFU_NAMESPACE
