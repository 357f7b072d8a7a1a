// Prints the bits of the logits of small models, for each weight format and instruction set of this machine.
//
// Weights and tokens come from one generator of whole numbers, so that each machine computes the same models.
#include <cstdio>
#include <cstring>
#include <vector>

#include "keifu_native.h"

static uint64_t state = 1;

static uint32_t number() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33);
}

static float small() { return ((int)(number() % 2001) - 1000) / 8192.f; }

struct Aligned {
    std::vector<uint8_t> bytes;
    explicit Aligned(int64_t size) : bytes(size + 64) {}
    uint8_t *data() { return bytes.data() + (64 - (uintptr_t)bytes.data() % 64) % 64; }
};

static std::vector<Aligned *> kept;

static uint8_t *room(int64_t size) {
    kept.push_back(new Aligned(size));
    return kept.back()->data();
}

static const float *numbers(int n, float offset) {
    float *x = (float *)room(n * 4);
    for (int i = 0; i < n; i++) x[i] = offset + small();
    return x;
}

struct Kind {
    int ggml, weights, bytes, halves[2];  // weights and bytes of a block; where its float16 numbers are
};
static const Kind GGUF[] = {{2, 32, 18, {0, 0}},   {3, 32, 20, {0, 2}},    {6, 32, 22, {0, 0}},
                            {8, 32, 34, {0, 0}},   {12, 256, 144, {0, 2}}, {14, 256, 210, {208, 208}}};

static KeifuMatrix matrix(int format, const Kind *kind, int rows, int columns) {
    KeifuMatrix m{format, rows, columns, nullptr, nullptr};
    if (kind) m.format = keifu_gguf_format(kind->ggml);
    uint8_t *packed = room(keifu_packed_size(m.format, rows, columns));
    m.data = packed;
    if (!kind) {
        const float *from = numbers(rows * columns, 0);
        if (keifu_pack(format, KEIFU_FROM_FLOAT32, from, rows, columns, columns, packed)) std::puts(keifu_last_error());
        return m;
    }
    const int64_t blocks = (int64_t)rows * columns / kind->weights;
    uint8_t *from = room(blocks * kind->bytes);
    for (int64_t i = 0; i < blocks * kind->bytes; i++) from[i] = (uint8_t)number();
    for (int64_t i = 0; i < blocks; i++)
        for (int at : kind->halves) {
            const uint16_t half = (uint16_t)(0x0c00 | (number() & 0x83ff));  // about 2^-12, of both signs
            memcpy(from + i * kind->bytes + at, &half, 2);
        }
    if (keifu_repack_gguf(kind->ggml, from, rows, columns, packed)) std::puts(keifu_last_error());
    return m;
}

static void run(const char *name, int format, const Kind *kind, int dim, int head_dim, int hidden) {
    const int heads = 4, kv_heads = 2, vocab = 77, n_layers = 2;
    state = 7;
    KeifuLayer layers[n_layers] = {};
    for (KeifuLayer &layer : layers) {
        const auto make = [&](int rows, int columns) { return matrix(format, kind, rows, columns); };
        layer.query = make(heads * head_dim, dim);
        layer.key = make(kv_heads * head_dim, dim);
        layer.value = make(kv_heads * head_dim, dim);
        layer.out = make(dim, heads * head_dim);
        layer.gate = make(hidden, dim);
        layer.up = make(hidden, dim);
        layer.down = make(dim, hidden);
        layer.query.bias = numbers(heads * head_dim, 0);
        layer.attention_norm = {KEIFU_RMS_NORM, 1e-5f, numbers(dim, 1), nullptr};
        layer.feedforward_norm = {KEIFU_LAYER_NORM, 1e-5f, numbers(dim, 1), numbers(dim, 0)};
        layer.query_norm = layer.key_norm = {KEIFU_RMS_NORM, 1e-6f, numbers(head_dim, 1), nullptr};
        layer.activation = &layer == layers ? KEIFU_SILU : KEIFU_GELU_ERF;
        layer.window = &layer == layers ? 0 : 9;
        layer.attention_scale = 0.25f;
        layer.rotary_pairs = head_dim / 2;
        layer.rotary_frequencies = numbers(head_dim / 2, 0.2f);
        layer.rotary_magnitude = 1;
    }
    const KeifuMatrix table = matrix(format, kind, vocab, dim);
    const KeifuModelDescription about = {dim, heads, kv_heads, head_dim, vocab, n_layers, table, 1, nullptr, 64, layers,
                                         {KEIFU_RMS_NORM, 1e-5f, numbers(dim, 1), nullptr}, table, 0.5f, 0};
    KeifuModel *model = keifu_create(&about, 4, 32, 48);
    if (!model) return (void)std::puts(keifu_last_error());
    std::vector<int32_t> tokens, positions, sequences, wanted;
    for (int s = 0; s < 2; s++)
        for (int i = 0; i < 19 + 14 * s; i++) {
            wanted.push_back((int32_t)tokens.size());
            tokens.push_back((int32_t)(number() % vocab));
            positions.push_back(i);
            sequences.push_back(s);
        }
    const int32_t tables[] = {2, 0, 1, 3};
    std::vector<float> logits(wanted.size() * vocab);
    for (size_t first = 0; first < tokens.size(); first += 45) {  // a prompt of two sequences, then tokens of one
        const int32_t n = (int32_t)(tokens.size() - first < 45 ? tokens.size() - first : 45);
        KeifuBatch batch = {n, &tokens[first], &positions[first], &sequences[first], 2, 2, tables, 0, 0, nullptr, nullptr,
                            nullptr, n, wanted.data(), &logits[first * vocab]};
        if (keifu_forward(model, &batch)) std::puts(keifu_last_error());
    }
    uint64_t hash = 14695981039346656037ull;
    for (float x : logits) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        hash = (hash ^ bits) * 1099511628211ull;
    }
    std::printf("%d %s %016llx %.6g\n", keifu_instructions(), name, (unsigned long long)hash, logits[5]);
    keifu_destroy(model);
    for (Aligned *each : kept) delete each;
    kept.clear();
}

int main() {
    keifu_use_threads(1);
    for (int set = KEIFU_PORTABLE; set <= KEIFU_NEON_BF16; set++) {
        if (!keifu_has_instructions(set) || keifu_use_instructions(set)) continue;
        run("bf16", KEIFU_BF16, nullptr, 72, 20, 90);
        run("f32", KEIFU_F32, nullptr, 72, 20, 90);
        run("int8", KEIFU_INT8_64, nullptr, 72, 20, 90);
        run("int4", KEIFU_INT4_64, nullptr, 72, 20, 90);
        for (const Kind &kind : GGUF) {
            char name[32];
            std::snprintf(name, sizeof name, "ggml-type-%d", kind.ggml);
            run(name, 0, &kind, 256, 64, 256);
        }
    }
}
