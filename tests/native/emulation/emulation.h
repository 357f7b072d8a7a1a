// Emulation of the AVX2, AVX-512 and AMX instructions that the native step uses, in plain C++ for any x86-64 CPU.
//
// A file of kernels includes this header before its own code, and the macros that a compiler would set for the file's
// flags are defined after it (tests/native/emulated.py): so the kernel's code path is the real one, and the compiler,
// which gets no -m flag, emits no instruction that the CPU lacks. Results have the bits of the CPU's instructions; AMX
// ends the process where a CPU would raise an exception. An intrinsic that is not here does not compile.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulation {

// The numbers of a register.
template <class T, class Register> struct Lanes {
    static constexpr int N = sizeof(Register) / sizeof(T);
    T x[N];
    Lanes() = default;
    Lanes(const Register &r) { std::memcpy(x, &r, sizeof x); }
    operator Register() const {
        Register r;
        std::memcpy(&r, x, sizeof x);
        return r;
    }
    T &operator[](int i) { return x[i]; }
};

template <class Register, class T, class Make> static inline Register each(Make make) {
    Lanes<T, Register> y;
    for (int i = 0; i < y.N; i++) y[i] = (T)make(i);
    return y;
}
template <class Register> static inline Register load(const void *p) {
    Register r;
    std::memcpy(&r, p, sizeof r);
    return r;
}
template <class Register> static inline void save(void *p, Register x) { std::memcpy(p, &x, sizeof x); }

// Between integers of different widths: the lowest lanes, cut off without saturation.
template <class To, class T, class From, class S> static inline To convert(From x) {
    Lanes<S, From> a(x);
    return each<To, T>([&](int i) { return a[i]; });
}
// To half the width with saturation, of each 128 bits of a and then of b.
template <class T, class S> static inline __m256i pack(__m256i a, __m256i b, int least, int most) {
    Lanes<S, __m256i> x(a), y(b);
    constexpr int HALF = 16 / sizeof(S);
    return each<__m256i, T>([&](int i) {
        const int quarter = i / HALF;  // 0 and 2 are of a
        const S z = (quarter % 2 ? y : x)[quarter / 2 * HALF + i % HALF];
        return z < least ? least : z > most ? most : z;
    });
}

template <class Register> static inline Register fused(Register a, Register b, Register c) {
    Lanes<float, Register> x(a), y(b), z(c);
    return each<Register, float>([&](int i) { return __builtin_fmaf(x[i], y[i], z[i]); });
}

static inline float half_to_float(uint16_t h) {
    const int exponent = h >> 10 & 31;
    const int mantissa = h & 1023;
    float x = exponent == 0 ? (float)mantissa * 0x1p-24f : (float)(mantissa + 1024) * 0x1p-10f * 0x1p-15f;
    for (int e = 0; e < exponent; e++) x *= exponent ? 2.f : 1.f;
    if (exponent == 31) x = mantissa ? __builtin_nanf("") : __builtin_inff();
    return h >> 15 ? -x : x;
}
template <class To, class From> static inline To halves(From x) {
    Lanes<uint16_t, From> a(x);
    return each<To, float>([&](int i) { return half_to_float(a[i]); });
}

static inline float bfloat16(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}
static inline __m512 dot_bfloat16(__m512 total, __m512i a, __m512i b) {  // the odd product is added first
    Lanes<float, __m512> t(total);
    Lanes<uint16_t, __m512i> x(a), y(b);
    return each<__m512, float>([&](int i) {
        const float odd = __builtin_fmaf(bfloat16(x[2 * i + 1]), bfloat16(y[2 * i + 1]), t[i]);
        return __builtin_fmaf(bfloat16(x[2 * i]), bfloat16(y[2 * i]), odd);
    });
}
template <class Register> static inline Register dot_bytes(Register total, Register a, Register b) {
    Lanes<int32_t, Register> t(total);
    Lanes<uint8_t, Register> x(a);
    Lanes<int8_t, Register> y(b);
    return each<Register, int32_t>([&](int i) {
        int32_t sum = t[i];
        for (int k = 4 * i; k < 4 * i + 4; k++) sum += x[k] * y[k];
        return sum;
    });
}

template <class T, class Register, class Op> static inline Register lanewise(Register a, Register b, Op op) {
    Lanes<T, Register> x(a), y(b);
    return each<Register, T>([&](int i) { return op(x[i], y[i]); });
}
static inline __m256i add_pairs(__m256i a, __m256i b) {  // madd: products of 16 bits, two and two
    Lanes<int16_t, __m256i> x(a), y(b);
    return each<__m256i, int32_t>([&](int i) { return x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1]; });
}
static inline __m256i add_byte_pairs(__m256i a, __m256i b) {  // maddubs: unsigned times signed, with saturation
    Lanes<uint8_t, __m256i> x(a);
    Lanes<int8_t, __m256i> y(b);
    return each<__m256i, int16_t>([&](int i) {
        const int sum = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
        return sum < -32768 ? -32768 : sum > 32767 ? 32767 : sum;
    });
}
static inline __m256i permute(__m256i a, int order) {
    Lanes<int64_t, __m256i> x(a);
    return each<__m256i, int64_t>([&](int i) { return x[order >> 2 * i & 3]; });
}
static inline __m128i half_of(__m256i a, int which) {
    Lanes<int64_t, __m256i> x(a);
    return each<__m128i, int64_t>([&](int i) { return x[2 * which + i]; });
}

// ---- AMX: eight tiles of up to 16 rows of 64 bytes for each thread ----

struct Tiles {
    struct __attribute__((packed)) Config {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config;
    uint8_t data[8][16][64];
};
static thread_local Tiles tiles;

static inline void require(bool condition, const char *rule) {
    if (condition) return;
    std::fprintf(stderr, "Emulated AMX: %s.\n", rule);
    std::abort();
}
static inline int rows_of(int tile) {
    require(tiles.config.palette == 1, "the tiles are not configured");
    require(tile >= 0 && tile < 8 && tiles.config.rows[tile], "a tile that is used is not configured");
    return tiles.config.rows[tile];
}
static inline int bytes_of(int tile) { return rows_of(tile) ? tiles.config.bytes[tile] : 0; }

static inline void configure(const void *from) {
    std::memcpy(&tiles.config, from, 64);
    std::memset(tiles.data, 0, sizeof tiles.data);
    if (!tiles.config.palette) return std::memset(&tiles.config, 0, 64), void();
    require(tiles.config.palette == 1, "the palette is not 1");
    for (int t = 0; t < 16; t++) {
        const int rows = tiles.config.rows[t];
        const int bytes = tiles.config.bytes[t];
        require(rows <= 16 && bytes <= 64 && !rows == !bytes && (t < 8 || !rows), "a tile's size is not allowed");
    }
}
static inline void zero(int tile) { rows_of(tile), std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]); }
static inline void tile_load(int tile, const void *from, int64_t stride) {
    zero(tile);
    for (int r = 0; r < rows_of(tile); r++) std::memcpy(tiles.data[tile][r], (const char *)from + r * stride, bytes_of(tile));
}
static inline void tile_save(int tile, void *to, int64_t stride) {
    for (int r = 0; r < rows_of(tile); r++) std::memcpy((char *)to + r * stride, tiles.data[tile][r], bytes_of(tile));
}
static inline void require_product(int c, int a, int b) {
    require(rows_of(c) == rows_of(a) && bytes_of(c) == bytes_of(b) && bytes_of(a) == 4 * rows_of(b) && bytes_of(a) % 4 == 0,
            "the sizes of the tiles of a product do not match");
    require(a != b && b != c && a != c, "a product has one tile twice");
}
// c += a · b, four bytes of a's row and of b's column at a time.
template <class A, class B> static inline void multiply_bytes(int c, int a, int b) {
    require_product(c, a, b);
    for (int row = 0; row < rows_of(c); row++)
        for (int column = 0; column < bytes_of(c) / 4; column++) {
            int32_t sum;
            std::memcpy(&sum, tiles.data[c][row] + 4 * column, 4);
            for (int k = 0; k < bytes_of(a); k++)
                sum += (A)tiles.data[a][row][k] * (B)tiles.data[b][k / 4][4 * column + k % 4];
            std::memcpy(tiles.data[c][row] + 4 * column, &sum, 4);
        }
}
// Even and odd products are added up apart from zero, then their sum is added to c.
static inline void multiply_bfloat16(int c, int a, int b) {
    require_product(c, a, b);
    for (int row = 0; row < rows_of(c); row++)
        for (int column = 0; column < bytes_of(c) / 4; column++) {
            float sums[2] = {};
            for (int k = 0; k < bytes_of(a) / 2; k++) {
                uint16_t x, y;
                std::memcpy(&x, tiles.data[a][row] + 2 * k, 2);
                std::memcpy(&y, tiles.data[b][k / 2] + 4 * column + k % 2 * 2, 2);
                sums[k % 2] = __builtin_fmaf(bfloat16(x), bfloat16(y), sums[k % 2]);
            }
            float total;
            std::memcpy(&total, tiles.data[c][row] + 4 * column, 4);
            total += sums[0] + sums[1];
            std::memcpy(tiles.data[c][row] + 4 * column, &total, 4);
        }
}

}  // namespace emulation

#undef _mm256_extracti128_si256  // macros, in some compilers
#undef _mm256_permute4x64_epi64
#undef _mm256_cvtph_ps
#undef _mm512_cvtph_ps
#undef _mm512_dpbf16_ps
#undef _mm512_dpbusd_epi32
#undef _mm256_dpbusd_avx_epi32
#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_dpbsud
#define _mm256_loadu_si256(p) emulation::load<__m256i>(p)
#define _mm256_storeu_si256(p, x) emulation::save<__m256i>(p, x)
#define _mm256_set1_epi16(n) emulation::each<__m256i, int16_t>([&](int) { return n; })
#define _mm256_set1_epi32(n) emulation::each<__m256i, int32_t>([&](int) { return n; })
#define _mm256_add_epi16(a, b) emulation::lanewise<uint16_t>((__m256i)(a), (__m256i)(b), [](int x, int y) { return x + y; })
#define _mm256_add_epi32(a, b) emulation::lanewise<uint32_t>((__m256i)(a), (__m256i)(b), [](uint32_t x, uint32_t y) { return x + y; })
#define _mm256_abs_epi8(a) emulation::lanewise<int8_t>((__m256i)(a), (__m256i)(a), [](int x, int) { return x < 0 ? -x : x; })
#define _mm256_sign_epi8(a, b) emulation::lanewise<int8_t>((__m256i)(a), (__m256i)(b), [](int x, int y) { return y < 0 ? -x : y ? x : 0; })
#define _mm256_madd_epi16 emulation::add_pairs
#define _mm256_maddubs_epi16 emulation::add_byte_pairs
#define _mm256_permute4x64_epi64 emulation::permute
#define _mm256_castsi256_si128(x) emulation::half_of(x, 0)
#define _mm256_extracti128_si256 emulation::half_of
#define _mm256_packus_epi32(a, b) emulation::pack<uint16_t, int32_t>(a, b, 0, 65535)
#define _mm256_packs_epi32(a, b) emulation::pack<int16_t, int32_t>(a, b, -32768, 32767)
#define _mm256_cvtepu8_epi32 emulation::convert<__m256i, int32_t, __m128i, uint8_t>
#define _mm256_cvtepi8_epi32 emulation::convert<__m256i, int32_t, __m128i, int8_t>
#define _mm256_cvtepu16_epi32 emulation::convert<__m256i, int32_t, __m128i, uint16_t>
#define _mm256_cvtph_ps emulation::halves<__m256, __m128i>
#define _mm256_fmadd_ps emulation::fused<__m256>
#define _mm256_dpbusd_avx_epi32 emulation::dot_bytes<__m256i>
#define _mm512_storeu_si512(p, x) emulation::save<__m512i>(p, x)
#define _mm512_set1_epi8(n) emulation::each<__m512i, int8_t>([&](int) { return n; })
#define _mm512_set1_epi32(n) emulation::each<__m512i, int32_t>([&](int) { return n; })
#define _mm512_sub_epi8(a, b) emulation::lanewise<int8_t>((__m512i)(a), (__m512i)(b), [](int x, int y) { return x - y; })
#define _mm512_mullo_epi16(a, b) emulation::lanewise<int16_t>((__m512i)(a), (__m512i)(b), [](int x, int y) { return x * y; })
#define _mm512_cvtepu8_epi32 emulation::convert<__m512i, int32_t, __m128i, uint8_t>
#define _mm512_cvtepi8_epi32 emulation::convert<__m512i, int32_t, __m128i, int8_t>
#define _mm512_cvtepu16_epi32 emulation::convert<__m512i, int32_t, __m256i, uint16_t>
#define _mm512_cvtepi32_epi8 emulation::convert<__m128i, int8_t, __m512i, int32_t>
#define _mm512_cvtepi32_epi16 emulation::convert<__m256i, int16_t, __m512i, int32_t>
#define _mm512_cvtph_ps emulation::halves<__m512, __m256i>
#define _mm512_fmadd_ps emulation::fused<__m512>
#define _mm512_dpbf16_ps(t, a, b) emulation::dot_bfloat16(t, (__m512i)(a), (__m512i)(b))
#define _mm512_dpbusd_epi32 emulation::dot_bytes<__m512i>
#define _tile_loadconfig(from) emulation::configure(from)
#define _tile_storeconfig(to) std::memcpy(to, &emulation::tiles.config, 64)
#define _tile_zero emulation::zero
#define _tile_loadd emulation::tile_load
#define _tile_stored emulation::tile_save
#define _tile_dpbf16ps emulation::multiply_bfloat16
#define _tile_dpbssd emulation::multiply_bytes<int8_t, int8_t>
#define _tile_dpbsud emulation::multiply_bytes<int8_t, uint8_t>
