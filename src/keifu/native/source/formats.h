// How a packed matrix lies in memory. A tile is 16 rows of the matrix; the tiles follow one another. A tile goes through
// the columns by pairs of groups of 32:
//
//   float32:    [32 columns of a group][16 rows] for both groups
//   bf16:       [16 column pairs of a group][16 rows][2 columns] for both groups
//   quantised:  a super header (where there is one) before every fourth pair; the pair's header with its scales; then
//               the codes of both groups, [8 column quads][16 rows][4 columns] in bytes. In 4 bits a byte holds column
//               quad i of the group in its low half and quad i + 4 in its high half.
//
// A vector of 64 bytes is then what 16 rows need of one, two or four columns, and 8 or 16 of them are a tile of AMX.
#pragma once
#include <cstddef>
#include <cstdint>

#include "keifu_native.h"

// What is inline here must not become a symbol: the linker would keep one instruction set's copy for all.
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace keifu {

constexpr int TILE = 16;
constexpr int GROUP = 32;
constexpr int PAIR = 2 * GROUP;
constexpr int SUPER_PAIRS = 4;

struct Layout {
    int super;      // bytes of the header before every fourth pair
    int header;     // bytes of a pair's own header
    int codes;      // bytes of a group's codes
    int offset;     // what a code stands above the number that it means (4 bits)
    bool has_min;   // value = scale · q + min
    bool halves;    // two scales a group, one for each 16 columns
    bool wide;      // one scale for both groups of a pair, whose codes (times m) are added up together

    ALWAYS_INLINE constexpr int group(int g) const { return header + g * codes; }  // where the codes of group 0 or 1 of a pair are
    ALWAYS_INLINE constexpr int pair() const { return header + 2 * codes; }
};

constexpr Layout LAYOUTS[] = {
    {0, 0, 1024, 0, false, false, false},    // KEIFU_BF16
    {0, 64, 512, 0, false, false, false},    // KEIFU_INT8: 2 x 16 scales
    {0, 64, 256, 8, false, false, false},    // KEIFU_INT4: 2 x 16 scales
    {0, 128, 256, 0, true, false, false},    // KEIFU_INT4_MIN: 2 x (16 scales, 16 mins)
    {64, 64, 256, 0, true, false, false},    // KEIFU_INT4_SUPER: 16 d, 16 dmin; 2 x (16 scales, 16 mins) in bytes
    {64, 64, 512, 0, false, true, false},    // KEIFU_INT6_SUPER: 16 d; 2 x 2 x 16 scales in bytes
    {128, 0, 512, 0, false, false, true},    // KEIFU_INT8_64: 4 x 16 scales of the four pairs
    {64, 64, 256, 0, true, false, true},     // KEIFU_INT4_64: 16 d, 16 dmin; 16 scales, 16 x 2 of m - 1, 2 x 16 mins
    {0, 0, 2048, 0, false, false, false},    // KEIFU_F32
};
constexpr int N_FORMATS = sizeof(LAYOUTS) / sizeof(Layout);

// What x is rounded to for a product with weights of a format.
enum class Input { CODES, BFLOAT16, FLOAT32 };
static ALWAYS_INLINE constexpr Input input_of(int format) {
    return format == KEIFU_F32 ? Input::FLOAT32 : format == KEIFU_BF16 ? Input::BFLOAT16 : Input::CODES;
}

template <int N> struct Constant {
    static constexpr int value = N;
};

// use(Constant<format>()), for a format that is known only when the program runs.
template <int FORMAT = 0, class Use> static ALWAYS_INLINE void with_format(int format, Use use) {
    if (format == FORMAT) return use(Constant<FORMAT>());
    if constexpr (FORMAT + 1 < N_FORMATS) with_format<FORMAT + 1>(format, use);
}

static ALWAYS_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static ALWAYS_INLINE constexpr int64_t tile_bytes(int format, int64_t columns) {
    const Layout &l = LAYOUTS[format];
    const int64_t pairs = (columns + PAIR - 1) / PAIR;
    return pairs * l.pair() + (pairs + SUPER_PAIRS - 1) / SUPER_PAIRS * l.super;
}

static ALWAYS_INLINE constexpr int64_t n_tiles(int64_t rows) { return (rows + TILE - 1) / TILE; }

// Where pair `p` of a tile begins: its own header; and the super header above it.
static ALWAYS_INLINE constexpr int64_t pair_offset(const Layout &l, int64_t p) {
    return (p / SUPER_PAIRS + 1) * l.super + p * l.pair();
}
static ALWAYS_INLINE constexpr int64_t super_offset(const Layout &l, int64_t p) {
    return p / SUPER_PAIRS * (l.super + SUPER_PAIRS * l.pair());
}

// Where column i of a group stands for a row of the tile: which byte of the codes (in 4 bits: which half of it).
static ALWAYS_INLINE constexpr int code_place(int i, int row) { return i / 4 * 64 + row * 4 + i % 4; }
static ALWAYS_INLINE constexpr int nibble_place(int i, int row) { return i % 16 / 4 * 64 + row * 4 + i % 4; }
static ALWAYS_INLINE constexpr int nibble_shift(int i) { return i / 16 * 4; }
static ALWAYS_INLINE constexpr int bfloat16_place(int i, int row) { return i / 2 * 32 + row * 2 + i % 2; }

}  // namespace keifu
