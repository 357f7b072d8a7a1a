// Packed matrices: sizes, packing numbers, repacking GGUF's blocks, reading.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "model.h"

namespace keifu {
namespace {

// Fills the tiles of a matrix, zeros before, on the pool's threads. fill(first row, how many, tile) gives -1, or the
// place of a number that is not finite; so does this, of any of them.
template <class Fill> int64_t fill_tiles(int format, int64_t rows, int64_t columns, void *packed, Fill fill) {
    const int64_t bytes = tile_bytes(format, columns);
    std::atomic<int64_t> bad{-1};
    const auto fill_one = [&](int t) {
        uint8_t *tile = (uint8_t *)packed + t * bytes;
        std::memset(tile, 0, (size_t)bytes);
        const int64_t row = (int64_t)t * TILE;
        const int64_t found = fill(row, (int)std::min<int64_t>(rows - row, TILE), tile);
        if (found >= 0) bad = found;
    };
    const int tiles = (int)n_tiles(rows);
    run_on_pool(1, [](int) { return true; }, [tiles, &fill_one](Walk &walk) { walk.deal(tiles, fill_one); });
    return bad;
}

// ---- GGUF's blocks ----

// Where a block's groups go: one row of a tile.
class Row {
  public:
    Row(const Layout &layout, uint8_t *tile, int lane) : layout(layout), tile(tile), lane(lane) {}

    void put_half(int64_t group, int index, const uint8_t *bits) { copy_half(header(group) + index * 2 * TILE, bits); }
    void put_super(int64_t group, int index, const uint8_t *bits) {
        copy_half(tile + super_offset(layout, group / 2) + index * 2 * TILE, bits);
    }
    void put_byte(int64_t group, int index, uint8_t byte) { header(group)[index * TILE + lane] = byte; }
    // Columns 4 quad, 4 quad + 1, ... of a group; in 4 bits also those 16 further on, in the upper halves.
    void put_quad(int64_t group, int quad, uint32_t four) { std::memcpy(codes(group) + quad * 64 + 4 * lane, &four, 4); }

    bool finite = true;  // all scales so far

  private:
    void copy_half(uint8_t *base, const uint8_t *bits) {
        finite = finite && (bits[1] & 0x7c) != 0x7c;
        std::memcpy(base + 2 * lane, bits, 2);
    }
    uint8_t *header(int64_t group) { return tile + pair_offset(layout, group / 2); }
    uint8_t *codes(int64_t group) { return header(group) + layout.group((int)(group % 2)); }

    const Layout &layout;
    uint8_t *tile;
    int lane;
};

uint32_t word(const uint8_t *bytes, int index) {
    uint32_t four;
    std::memcpy(&four, bytes + 4 * index, 4);
    return four;
}

uint32_t less(uint32_t four, uint32_t n) { return ((four | 0x80808080) - n * 0x01010101) ^ 0x80808080; }  // each byte

// Blocks of 32 columns: a scale, perhaps a min, and codes.
template <int TYPE> void repack_small(const uint8_t *block, int64_t group, Row &row) {
    constexpr int HALVES = TYPE == 3 ? 2 : 1;
    for (int h = 0; h < HALVES; h++) row.put_half(group, (int)(group % 2) * HALVES + h, block + 2 * h);
    const uint8_t *codes = block + 2 * HALVES;
    for (int quad = 0; quad < (TYPE < 6 ? 4 : 8); quad++) {
        uint32_t four = word(codes, TYPE == 6 ? 1 + quad % 4 : quad);
        if (TYPE == 6) {  // the fifth bits, then codes as in 4 bits
            four = four >> (quad / 4 * 4) & 0x0f0f0f0f;
            for (int i = 0; i < 4; i++) four |= (word(codes, 0) >> (4 * quad + i) & 1) << (8 * i + 4);
            four = less(four, 16);
        }
        row.put_quad(group, quad, four);
    }
}

void repack_q4_k(const uint8_t *block, int64_t first, Row &row) {
    row.put_super(first, 0, block);
    row.put_super(first, 1, block + 2);
    const uint8_t *six = block + 4;  // 6-bit scales and mins: four of each whole, the others' upper bits above those
    for (int g = 0; g < 8; g++) {
        const int scale = g < 4 ? six[g] & 63 : (six[g + 4] & 15) | six[g - 4] >> 6 << 4;
        const int min = g < 4 ? six[g + 4] & 63 : six[g + 4] >> 4 | six[g] >> 6 << 4;
        row.put_byte(first + g, 2 * (g % 2), (uint8_t)scale);
        row.put_byte(first + g, 2 * (g % 2) + 1, (uint8_t)min);
        const uint8_t *codes = block + 16 + g / 2 * 32;
        const int shift = g % 2 * 4;
        for (int quad = 0; quad < 4; quad++)
            row.put_quad(first + g, quad, (word(codes, quad) >> shift & 0x0f0f0f0f) |
                                              (word(codes, quad + 4) >> shift & 0x0f0f0f0f) << 4);
    }
}

void repack_q6_k(const uint8_t *block, int64_t first, Row &row) {
    row.put_super(first, 0, block + 208);
    for (int g = 0; g < 8; g++) {
        for (int h = 0; h < 2; h++) row.put_byte(first + g, 2 * (g % 2) + h, block[192 + 2 * g + h]);
        const uint8_t *low = block + g / 4 * 64 + g % 2 * 32;  // groups 0, 1 of a half in the low nibbles, 2, 3 above
        const uint8_t *high = block + 128 + g / 4 * 32;
        for (int quad = 0; quad < 8; quad++) {
            const uint32_t four = word(low, quad) >> (g % 4 / 2 * 4) & 0x0f0f0f0f;
            const uint32_t two = word(high, quad) >> (g % 4 * 2) & 0x03030303;
            row.put_quad(first + g, quad, less(four | two << 4, 32));
        }
    }
}

struct Block {  // of a ggml type
    int type, format, columns, bytes;
    void (*repack)(const uint8_t *block, int64_t first_group, Row &row);
};

constexpr Block BLOCKS[] = {
    {2, KEIFU_INT4, 32, 18, repack_small<2>},          // Q4_0: d, 16 bytes
    {3, KEIFU_INT4_MIN, 32, 20, repack_small<3>},      // Q4_1: d, m, 16 bytes
    {6, KEIFU_INT8, 32, 22, repack_small<6>},          // Q5_0: d, 32 fifth bits, 16 bytes
    {8, KEIFU_INT8, 32, 34, repack_small<8>},          // Q8_0: d, 32 bytes
    {12, KEIFU_INT4_SUPER, 256, 144, repack_q4_k},     // Q4_K: d, dmin, 12 bytes of scales and mins, 128 bytes
    {14, KEIFU_INT6_SUPER, 256, 210, repack_q6_k},     // Q6_K: 128 low bytes, 64 high bytes, 16 scales, d
};

const Block *find_block(int type) {
    for (const Block &block : BLOCKS)
        if (block.type == type) return &block;
    return nullptr;
}

bool known(int32_t format, int64_t rows, int64_t columns) {
    return format >= 0 && format < N_FORMATS && rows > 0 && columns > 0;
}

}  // namespace
}  // namespace keifu

using namespace keifu;

int64_t keifu_packed_size(int32_t format, int64_t rows, int64_t columns) {
    if (!known(format, rows, columns))
        return fail("No packed matrix has format %d and %lld x %lld numbers.", format, (long long)rows, (long long)columns);
    return n_tiles(rows) * tile_bytes(format, columns);
}

int32_t keifu_pack(int32_t format, int32_t source_type, const void *source, int64_t rows, int64_t columns,
                   int64_t row_stride, void *packed) {
    if (keifu_packed_size(format, rows, columns) < 0) return -1;
    if (format != KEIFU_BF16 && format < KEIFU_INT8_64)
        return fail("Numbers cannot be packed to format %d: it is for GGUF's blocks.", format);
    if (source_type < KEIFU_FROM_FLOAT32 || source_type > KEIFU_FROM_FLOAT16)
        return fail("There is no source type %d; known are 0 to 2.", source_type);
    const Kernels &use = kernels();
    const int64_t number = source_type == KEIFU_FROM_FLOAT32 ? 4 : 2;
    const int64_t bad = fill_tiles(format, rows, columns, packed, [&](int64_t row, int n, uint8_t *tile) {
        const char *from = (const char *)source + row * row_stride * number;
        const int64_t found = use.pack(format, {source_type, from, row_stride * number, number, n, columns}, tile);
        return found < 0 ? found : row * columns + found;
    });
    if (bad < 0) return 0;
    return fail("Row %lld has a NaN or an infinity at column %lld or one of the 31 after it.",
                (long long)(bad / columns), (long long)(bad % columns));
}

int32_t keifu_gguf_format(int32_t ggml_type) {
    const Block *block = find_block(ggml_type);
    return block ? block->format : fail("GGUF blocks of type %d cannot be repacked.", ggml_type);
}

int32_t keifu_repack_gguf(int32_t ggml_type, const void *blocks, int64_t rows, int64_t columns, void *packed) {
    if (keifu_gguf_format(ggml_type) < 0) return -1;
    const Block &kind = *find_block(ggml_type);
    if (keifu_packed_size(kind.format, rows, columns) < 0) return -1;
    if (columns % kind.columns)
        return fail("Blocks of type %d have %d columns, which do not divide the %lld of this matrix.", ggml_type,
                    kind.columns, (long long)columns);
    const int64_t bytes = columns / kind.columns * kind.bytes;  // of a row
    const int64_t bad = fill_tiles(kind.format, rows, columns, packed, [&](int64_t first, int n, uint8_t *tile) {
        int64_t found = -1;
        for (int lane = 0; lane < n; lane++) {
            Row to(LAYOUTS[kind.format], tile, lane);
            const uint8_t *block = (const uint8_t *)blocks + (first + lane) * bytes;
            for (int64_t column = 0; column < columns; column += kind.columns, block += kind.bytes)
                kind.repack(block, column / GROUP, to);
            if (!to.finite) found = first + lane;
        }
        return found;
    });
    return bad < 0 ? 0 : fail("Row %lld has a NaN or an infinity among its scales.", (long long)bad);
}

int32_t keifu_unpack(int32_t format, const void *packed, int64_t rows, int64_t columns, int64_t first, int64_t n_rows,
                     float *out) {
    if (keifu_packed_size(format, rows, columns) < 0) return -1;
    if (first < 0 || n_rows < 0 || first + n_rows > rows)
        return fail("Rows %lld to %lld were asked for; the matrix has %lld.", (long long)first,
                    (long long)(first + n_rows - 1), (long long)rows);
    for (int64_t row = 0; row < n_rows; row++)
        kernels().unpack(format, (const uint8_t *)packed, columns, first + row, out + row * columns);
    return 0;
}
