// Products on AMX's tiles: C[rows, 16] += A[rows, columns of a group] · B[columns of a group, 16]. A is rows of the
// input, B a packed tile's group as it lies in memory. The sums are those of product.h, bit for bit.

#pragma once
namespace KEIFU_NAMESPACE {

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

// Dense: C0, C1 and A4 have `first` rows, C2, C3 and A5 `second`.
static void configure_dense(int first, int second) {
    const int wanted = first * 32 + second;
    if (configured == wanted) return;
    TileConfig config;
    for (int c = 0; c < 4; c++) config.set(c, c < 2 ? first : second, 64);
    config.set(4, first, 64);
    config.set(5, second, 64);
    config.set(6, 16, 64);
    config.set(7, 16, 64);
    _tile_loadconfig(&config);
    configured = wanted;
}

// Quantised: A4 and B6 take 64 columns, or 32; A5 and B7 16.
static void configure_quantised(int rows, bool wide) {
    const int wanted = -2 * rows - wide;
    if (configured == wanted) return;
    TileConfig config;
    for (int c = 0; c < 2; c++) config.set(c, rows, 64);
    config.set(4, rows, wide ? 64 : 32);
    config.set(5, rows, 16);
    config.set(6, wide ? 16 : 8, 64);
    config.set(7, 4, 64);
    _tile_loadconfig(&config);
    configured = wanted;
}

// Up to 16 rows, up to 4 tiles.
template <class At>
INLINE void dense_low(At at, int tiles, int groups, const Dense *x, int64_t stride, int rows, float *out,
                      int64_t out_stride) {
    configure_dense(rows, rows);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int g = 0; g < groups; g++) {
        _tile_loadd(4, x + g * GROUP, stride * 2);
        _tile_loadd(6, at(0, g), 64);
        _tile_dpbf16ps(0, 4, 6);
        if (tiles < 2) continue;
        _tile_loadd(7, at(1, g), 64);
        _tile_dpbf16ps(1, 4, 7);
        if (tiles < 3) continue;
        _tile_loadd(6, at(2, g), 64);
        _tile_dpbf16ps(2, 4, 6);
        if (tiles < 4) continue;
        _tile_loadd(7, at(3, g), 64);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, out, out_stride * 4);
    if (tiles > 1) _tile_stored(1, out + 16, out_stride * 4);
    if (tiles > 2) _tile_stored(2, out + 32, out_stride * 4);
    if (tiles > 3) _tile_stored(3, out + 48, out_stride * 4);
}

// 16 rows and up to 16 more, 2 tiles.
template <class At>
INLINE void dense_square(At at, int groups, const Dense *x, int64_t stride, int more, float *out, int64_t out_stride) {
    configure_dense(16, more);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const Dense *below = x + 16 * stride;
    for (int g = 0; g < groups; g++) {
        _tile_loadd(4, x + g * GROUP, stride * 2);
        _tile_loadd(6, at(0, g), 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, at(1, g), 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below + g * GROUP, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, out_stride * 4);
    _tile_stored(1, out + 16, out_stride * 4);
    _tile_stored(2, out + 16 * out_stride, out_stride * 4);
    _tile_stored(3, out + 16 * out_stride + 16, out_stride * 4);
}

// Products of up to four bf16 tiles with rows; at(s, g) is where group g of tile s lies.
template <class At>
INLINE void dense_product(At at, int tiles, int groups, const Dense *x, int64_t stride, int rows, float *out,
                          int64_t out_stride) {
    int b = 0;
    while (rows - b > 16 && tiles % 2 == 0) {
        const int more = rows - b < 32 ? rows - b - 16 : 16;
        for (int s = 0; s < tiles; s += 2) {
            const auto here = [&](int i, int g) { return at(s + i, g); };
            dense_square(here, groups, x + b * stride, stride, more, out + b * out_stride + s * TILE, out_stride);
        }
        b += 16 + more;
    }
    for (; b < rows; b += 16) {
        const int here = rows - b < 16 ? rows - b : 16;
        dense_low(at, tiles, groups, x + b * stride, stride, here, out + b * out_stride, out_stride);
    }
}

struct Scales;
template <int FORMAT>
INLINE v16 add_sums(v16 total, i16 low, i16 high, const Scales &scales, const CodeGroup *row);
template <int FORMAT> INLINE Scales read_scales(const uint8_t *tile, int64_t pair, int g);
INLINE i16 read_multipliers(const uint8_t *tile, int64_t pair, int g);

// Spreads the 4-bit codes of a tile to bytes, with a sign, or times m: [pairs][2 groups][512].
template <int FORMAT> INLINE void spread_codes(const uint8_t *tile, int64_t pairs, uint8_t *out) {
    constexpr Layout L = LAYOUTS[FORMAT];
    const __m512i offset = _mm512_set1_epi8(L.offset);
    for (int64_t pair = 0; pair < pairs; pair++)
        for (int g = 0; g < 2; g++) {
            const uint8_t *codes = tile + pair_offset(L, pair) + L.group(g);
            const i16 m = FORMAT == KEIFU_INT4_64 ? read_multipliers(tile, pair, g) : i16{};
            for (int quad = 0; quad < 4; quad++, out += 64)
                for (int high = 0; high < 2; high++) {
                    const i16 four = load_ints(codes + quad * 64) >> 4 * high & 0x0f0f0f0f;
                    const __m512i w = (__m512i)(FORMAT == KEIFU_INT4_64 ? four * m : four);  // no byte overflows
                    _mm512_storeu_si512(out + high * 256, L.offset ? _mm512_sub_epi8(w, offset) : w);
                }
            out += 256;
        }
}

// Sums are read so many steps after they were stored, as a tile's store takes long to be seen; and the slots fill one
// page (two for halves): a load with the lowest 12 bits of an unfinished store's address would wait for it.
constexpr int BEHIND = 3;
constexpr int SLOTS = 4;
constexpr int SLOT = TILE * TILE;

// Exact sums of a group, or of a pair where the format is wide, for up to 16 rows: to [row][16], of the second half
// SLOTS · SLOT further on.
template <int FORMAT> INLINE void sum_codes(const int8_t *x, int64_t stride, const uint8_t *codes, int32_t *sums) {
    _tile_zero(0);
    if constexpr (LAYOUTS[FORMAT].halves) {
        _tile_zero(1);
        _tile_loadd(5, x, stride);
        _tile_loadd(7, codes, 64);
        _tile_dpbssd(0, 5, 7);
        _tile_loadd(5, x + TILE, stride);
        _tile_loadd(7, codes + 256, 64);
        _tile_dpbssd(1, 5, 7);
        _tile_stored(1, sums + SLOTS * SLOT, 64);
    } else {
        _tile_loadd(4, x, stride);
        _tile_loadd(6, codes, 64);
        if constexpr (FORMAT == KEIFU_INT4_64) _tile_dpbsud(0, 4, 6);
        else _tile_dpbssd(0, 4, 6);
    }
    _tile_stored(0, sums, 64);
}

// One tile times `n` of R rows. `ahead`: the tile that is read next, of which this call fetches its part.
template <int FORMAT, int R>
INLINE void quantised_tile(const uint8_t *tile, const uint8_t *spread, const uint8_t *ahead, Turn turn, const Rows &rows,
                           int64_t row, int n, int32_t *sums, float *out) {
    constexpr Layout L = LAYOUTS[FORMAT];
    constexpr int STEP = L.wide ? PAIR : GROUP;  // columns
    const int64_t steps = rows.columns / STEP;
    const int8_t *x = rows.codes + row * rows.columns;
    const CodeGroup *about = rows.about(row, 0);
    configure_quantised(n, L.wide);
    v16 total[R] = {};
    for (int64_t now = 0; now < steps + BEHIND; now++) {
        if (now < steps) {
            const int64_t pair = now * STEP / PAIR;
            const int g = now * STEP / GROUP % 2;
            const int64_t here = pair_offset(L, pair);
            if (g == 0 && (pair & turn.mask) == turn.turn)
                for (int i = 0; i < L.pair(); i += 64) _mm_prefetch(ahead + here + i, _MM_HINT_T1);
            const uint8_t *codes = spread ? spread + now * STEP * TILE : tile + here + L.group(g);
            sum_codes<FORMAT>(x + now * STEP, rows.columns, codes, sums + now % SLOTS * SLOT);
        }
        const int64_t then = now - BEHIND;
        if (then < 0) continue;
        const int32_t *here = sums + then % SLOTS * SLOT;
        const CodeGroup *row_groups = about + then * STEP / GROUP * TILE;
        const Scales scales = read_scales<FORMAT>(tile, then * STEP / PAIR, then * STEP / GROUP % 2);
        UNROLL for (int r = 0; r < R; r++) {
            const i16 high = L.halves ? load_ints(here + SLOTS * SLOT + r * TILE) : i16{};
            total[r] = add_sums<FORMAT>(total[r], load_ints(here + r * TILE), high, scales, row_groups + r);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        if (r < n) store(out + r * OUT, total[r]);
}

template <int FORMAT>
void amx_quantised(const uint8_t *const *tiles, int n, const Rows &rows, int64_t row, int n_rows, Scratch &scratch,
                   float *out) {
    constexpr bool SPREAD = LAYOUTS[FORMAT].codes == 256;
    const int64_t mask = n_rows <= 16 ? 0 : n_rows <= 48 ? 1 : 3;
    for (int s = 0; s < n; s++) {
        if (SPREAD) spread_codes<FORMAT>(tiles[s], rows.columns / PAIR, scratch.codes);
        const uint8_t *spread = SPREAD ? scratch.codes : nullptr;
        const uint8_t *ahead = tiles[s + 1];  // behind the last one: the first of those that come next
        for (int b = 0; b < n_rows; b += 16) {
            const int here = n_rows - b < 16 ? n_rows - b : 16;
            const Turn turn{mask, b / 16};
            float *y = out + b * OUT + s * TILE;
            if (here > 8) quantised_tile<FORMAT, 16>(tiles[s], spread, ahead, turn, rows, row + b, here, scratch.sums, y);
            else quantised_tile<FORMAT, 8>(tiles[s], spread, ahead, turn, rows, row + b, here, scratch.sums, y);
        }
    }
}

}  // namespace KEIFU_NAMESPACE
