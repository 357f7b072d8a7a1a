// Products on AMX's tiles: C[rows, 16] += A[rows, columns of a group] · B[columns of a group, 16]. A is rows of the
// input, B a packed tile's group as it lies in memory. The sums are those of product.h, bit for bit.

#pragma once
namespace KEIFU_NAMESPACE {

static_assert(std::is_same_v<RowNumber, uint16_t> && std::is_same_v<Dense, uint16_t>,
              "TDPBF16PS multiplies bfloat16: rows, queries and attention weights must be stored as bfloat16");

constexpr int AMX_ROWS = 6;  // from so many rows on, tiles are faster than vectors for quantised weights

// Registers 0-3 are C, 4 and 5 are A, 6 and 7 are B.
struct __attribute__((packed)) TileConfig {
    uint8_t palette = 1;
    uint8_t start = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int n_rows, int n_bytes) {
        rows[tile] = (uint8_t)n_rows;
        bytes[tile] = (uint16_t)n_bytes;
    }
};

static thread_local int configured = 0;  // what the thread's tiles are configured for

// C0, C1 and A4 have `first` rows, C2, C3 and A5 `second`; A and B take so many bytes of a row's columns.
static void configure(int first, int second, int bytes) {
    const int wanted = (first * 32 + second) * 128 + bytes;
    if (configured == wanted) return;
    TileConfig config;
    for (int c = 0; c < 4; c++) config.set(c, c < 2 ? first : second, 64);
    config.set(4, first, bytes);
    config.set(5, second, bytes);
    for (int b = 6; b < 8; b++) config.set(b, bytes / 4, 64);
    _tile_loadconfig(&config);
    configured = wanted;
}

// Up to 16 rows and up to 4 tiles; or, where SQUARE, 16 rows and up to 16 more (`second`) and 2 tiles.
template <bool SQUARE, class At>
INLINE void dense_tiles(At at, int tiles, int groups, const Dense *x, int64_t stride, int first, int second, float *out,
                        int64_t out_stride) {
    configure(first, second, 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int g = 0; g < groups; g++) {
        _tile_loadd(4, x + g * GROUP, stride * 2);
        _tile_loadd(6, at(0, g), 64);
        _tile_dpbf16ps(0, 4, 6);
        if (!SQUARE && tiles < 2) continue;
        _tile_loadd(7, at(1, g), 64);
        _tile_dpbf16ps(1, 4, 7);
        if (SQUARE) {
            _tile_loadd(5, x + 16 * stride + g * GROUP, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            continue;
        }
        if (tiles < 3) continue;
        _tile_loadd(6, at(2, g), 64);
        _tile_dpbf16ps(2, 4, 6);
        if (tiles < 4) continue;
        _tile_loadd(7, at(3, g), 64);
        _tile_dpbf16ps(3, 4, 7);
    }
    float *below = SQUARE ? out + 16 * out_stride : out + 32;
    _tile_stored(0, out, out_stride * 4);
    if (SQUARE || tiles > 1) _tile_stored(1, out + 16, out_stride * 4);
    if (SQUARE || tiles > 2) _tile_stored(2, below, out_stride * 4);
    if (SQUARE || tiles > 3) _tile_stored(3, below + 16, out_stride * 4);
}

// Products of up to four bf16 tiles with rows; at(s, g) is where group g of tile s lies.
template <class At>
INLINE void dense_product(At at, int tiles, int columns, const Dense *x, int64_t stride, int rows, float *out,
                          int64_t out_stride) {
    const int groups = (columns + GROUP - 1) / GROUP;
    int b = 0;
    while (rows - b > 16 && tiles % 2 == 0) {
        const int more = rows - b < 32 ? rows - b - 16 : 16;
        for (int s = 0; s < tiles; s += 2) {
            const auto here = [&](int i, int g) { return at(s + i, g); };
            float *y = out + b * out_stride + s * TILE;
            dense_tiles<true>(here, 2, groups, x + b * stride, stride, 16, more, y, out_stride);
        }
        b += 16 + more;
    }
    for (; b < rows; b += 16) {
        const int here = rows - b < 16 ? rows - b : 16;
        dense_tiles<false>(at, tiles, groups, x + b * stride, stride, here, here, out + b * out_stride, out_stride);
    }
}

// Spreads the 4-bit codes of a tile to bytes, with a sign, or times m: [pairs][2 groups][512].
template <int FORMAT> INLINE void spread_codes(const uint8_t *tile, int64_t pairs, uint8_t *out) {
    constexpr Layout L = LAYOUTS[FORMAT];
    const __m512i offset = _mm512_set1_epi8(L.offset);
    for (int64_t pair = 0; pair < pairs; pair++)
        for (int g = 0; g < 2; g++) {
            const uint8_t *codes = tile + pair_offset(L, pair) + L.group(g);
            __m512i m{};
            if constexpr (FORMAT == KEIFU_INT4_64) m = (__m512i)(read_multipliers(tile, pair, g) * 0x10001);
            for (int quad = 0; quad < 4; quad++, out += 64)
                for (int high = 0; high < 2; high++) {
                    __m512i w = (__m512i)(load_ints(codes + quad * 64) >> 4 * high & 0x0f0f0f0f);
                    if constexpr (FORMAT == KEIFU_INT4_64) w = _mm512_mullo_epi16(w, m);  // no byte overflows
                    _mm512_storeu_si512(out + high * 256, L.offset ? _mm512_sub_epi8(w, offset) : w);
                }
            out += 256;
        }
}

// A unit: columns that have one scale, whose exact sums are one product of tiles.
template <int FORMAT> constexpr int UNIT = LAYOUTS[FORMAT].wide ? PAIR : LAYOUTS[FORMAT].halves ? GROUP / 2 : GROUP;
constexpr int UNITS = 4;            // whose sums are made before they are read
constexpr int SLOT = TILE * TILE;  // sums of a unit

// What a call fetches of the tile that comes next: the even, the odd, or all cache lines.
struct Ahead {
    const uint8_t *tile;
    bool even, odd;

    ALWAYS_INLINE void fetch(int64_t at) const {
        if (even) _mm_prefetch(tile + at, _MM_HINT_T1);
        if (odd) _mm_prefetch(tile + at + 64, _MM_HINT_T1);
    }
};

// Adds the sums of a unit, times its scales, to the totals of R rows. Between them lines are fetched: here nothing else
// waits for memory.
template <int FORMAT, int R>
INLINE void add_unit(const uint8_t *tile, int64_t unit, const CodeGroup *about, const int32_t *sums, Ahead ahead, v16 *total) {
    constexpr Layout L = LAYOUTS[FORMAT];
    constexpr int BYTES = (4 * L.pair() + L.super) * UNIT<FORMAT> / (4 * PAIR);  // of a unit, with its share of headers
    constexpr int LINES = (BYTES + 127) / 128;                                   // pairs of them
    constexpr int EACH = R / 8;
    const int64_t column = unit * UNIT<FORMAT>;
    Scales scales = read_scales<FORMAT>(tile, column / PAIR, (int)(column / GROUP % 2));
    if (L.halves && unit % 2) scales.scale = scales.second;
    UNROLL for (int r = 0; r < R; r++) {
        if (r % EACH == 0 && r / EACH < LINES) ahead.fetch(unit * BYTES + r / EACH * 128);
        total[r] = add_sums<FORMAT>(total[r], load_ints(sums + r * TILE), scales, OneRow{about + r});
    }
    if (LINES > 8) ahead.fetch(unit * BYTES + 8 * 128);
}

// The sums of a unit; the numbers of the tiles must be written out.
#define MULTIPLY_UNIT(C, A, B, unit)                              \
    _tile_loadd(B, codes(unit), 64);                              \
    _tile_loadd(A, x + (unit) * UNIT<FORMAT>, rows.columns);      \
    _tile_zero(C);                                                \
    if constexpr (FORMAT == KEIFU_INT4_64) _tile_dpbsud(C, A, B); \
    else _tile_dpbssd(C, A, B)

// One tile times `n` of R rows.
template <int FORMAT, int R>
INLINE void quantised_tile(const uint8_t *tile, const uint8_t *spread, Ahead ahead, const Rows &rows, int64_t row, int n,
                           int32_t *sums, float *out) {
    constexpr Layout L = LAYOUTS[FORMAT];
    const int64_t units = rows.columns / UNIT<FORMAT>;
    const int8_t *x = rows.codes + row * rows.columns;
    const CodeGroup *about = rows.about(row, 0);
    const auto codes = [&](int64_t unit) {
        const int64_t column = unit * UNIT<FORMAT>;
        if (spread) return spread + column * TILE;
        return tile + pair_offset(L, column / PAIR) + L.group((int)(column / GROUP % 2)) + column % GROUP * TILE;
    };
    configure(n, n, UNIT<FORMAT>);
    v16 total[R] = {};
    for (int64_t unit = 0; unit < units; unit += UNITS) {
        const int64_t end = unit + UNITS < units ? unit + UNITS : units;
        for (int64_t u = unit; u < end; u += 2) {
            int32_t *here = sums + (u - unit) * SLOT;
            MULTIPLY_UNIT(0, 4, 6, u);
            if (u + 1 < end) { MULTIPLY_UNIT(1, 5, 7, u + 1); }
            _tile_stored(0, here, 64);
            if (u + 1 < end) _tile_stored(1, here + SLOT, 64);
        }
        for (int64_t u = unit; u < end; u++)
            add_unit<FORMAT, R>(tile, u, about + u * UNIT<FORMAT> / GROUP * TILE, sums + (u - unit) * SLOT, ahead, total);
    }
    UNROLL for (int r = 0; r < R; r++)
        if (r < n) store(out + r * OUT, total[r]);
}

template <int FORMAT>
void amx_quantised(const uint8_t *const *tiles, int n, const Rows &rows, int64_t row, int n_rows, Scratch &scratch,
                   float *out) {
    constexpr bool SPREAD = LAYOUTS[FORMAT].codes == 256;
    for (int s = 0; s < n; s++) {
        if (SPREAD) spread_codes<FORMAT>(tiles[s], rows.columns / PAIR, scratch.codes);
        const uint8_t *spread = SPREAD ? scratch.codes : nullptr;
        for (int b = 0; b < n_rows; b += TILE) {
            const int here = n_rows - b < TILE ? n_rows - b : TILE;
            const Ahead ahead{tiles[s + 1], b == 0, n_rows <= TILE || b == TILE};  // behind the last one: the next chunk's
            float *y = out + b * OUT + s * TILE;
            if (here > 8) quantised_tile<FORMAT, 16>(tiles[s], spread, ahead, rows, row + b, here, scratch.sums, y);
            else quantised_tile<FORMAT, 8>(tiles[s], spread, ahead, rows, row + b, here, scratch.sums, y);
        }
    }
}

}  // namespace KEIFU_NAMESPACE
