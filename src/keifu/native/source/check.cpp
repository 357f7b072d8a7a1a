// The check of an instruction set: small models of known numbers, one for each weight format, are computed with it and
// with the portable set. Their logits must agree but for rounding.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "model.h"

namespace keifu {
namespace {

struct Case {
    const char *name;
    int format, ggml;  // of numbers that are packed; or, with format -1, GGML's number of a block type of GGUF
    int n_experts;
    float limit;  // of the relative difference of a token's logits; rounding alone gives a third of it
};
constexpr Case CASES[] = {
    {"f32", KEIFU_F32, 0, 0, 1e-5f},
    {"bf16", KEIFU_BF16, 0, 0, 0.04f},
    {"int8", KEIFU_INT8_64, 0, 0, 0.04f},
    {"int4", KEIFU_INT4_64, 0, 0, 0.04f},
    {"Q4_0", -1, 2, 0, 0.04f},
    {"Q4_1", -1, 3, 0, 0.04f},
    {"Q5_0", -1, 6, 0, 0.04f},
    {"Q8_0", -1, 8, 0, 0.04f},
    {"Q4_K", -1, 12, 0, 0.04f},
    {"Q6_K", -1, 14, 0, 0.04f},
    {"f32 experts", KEIFU_F32, 0, 5, 1e-5f},
    {"bf16 experts", KEIFU_BF16, 0, 5, 0.04f},
    {"int8 experts", KEIFU_INT8_64, 0, 5, 0.04f},
};
constexpr int N_CASES = sizeof(CASES) / sizeof(Case);
constexpr float PACKING_LIMIT = 0.02f;  // of the relative difference of packed numbers

struct Block {  // of GGUF: its numbers and bytes, and where it has float16 scales
    int ggml, numbers, bytes, halves[2];
};
constexpr Block BLOCKS[] = {{2, 32, 18, {0, 0}}, {3, 32, 20, {0, 2}},    {6, 32, 22, {0, 0}},
                            {8, 32, 34, {0, 0}}, {12, 256, 144, {0, 2}}, {14, 256, 210, {208, 208}}};

constexpr int HEADS = 4;
constexpr int KV_HEADS = 2;
constexpr int VOCABULARY = 77;
constexpr int LAYERS = 2;
constexpr int CONTEXT = 64;

// A step: so many more tokens of each of two sequences. Prompts, a few tokens, and one token, as the kernels' blocks of
// rows differ.
constexpr int STEPS[][2] = {{19, 26}, {12, 15}, {3, 3}, {1, 1}, {0, 1}};

double relative_difference(const float *x, const float *expected, int64_t n) {
    double difference = 0;
    double size = 1e-30;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)x[i] - expected[i]) * ((double)x[i] - expected[i]);
        size += (double)expected[i] * expected[i];
    }
    return std::sqrt(difference / size);
}

// A model of one case, whose numbers come from a generator of whole numbers: the same on every machine.
class Sample {
  public:
    Sample(const Case &about, int instructions) : about(about), instructions(instructions) {
        const bool wide = about.format < 0 && about.ggml > 8;  // blocks of 256 numbers
        dim = wide ? 256 : about.format < 0 ? 96 : 72;
        head_dim = wide ? 64 : about.format < 0 ? 24 : 20;
        hidden = wide ? 256 : 96;
        for (KeifuLayer &layer : layers) make_layer(layer, &layer == layers);
        table = matrix(VOCABULARY, dim, true);
        final_norm = {KEIFU_RMS_NORM, 1e-5f, numbers(dim, 1), nullptr};
    }

    // The logits of all tokens, with an instruction set; none where they cannot be computed.
    std::vector<float> logits(int which) const {
        const KernelsHere use(which);
        KeifuModelDescription model{};
        model.dim = dim, model.n_heads = HEADS, model.n_kv_heads = KV_HEADS, model.head_dim = head_dim;
        model.vocab_size = VOCABULARY, model.n_layers = LAYERS, model.embedding = model.head = table;
        model.embedding_scale = 1, model.context_length = CONTEXT, model.layers = layers, model.norm = final_norm;
        model.logit_scale = 0.5f;
        KeifuModel *made = keifu_create(&model, 4, 32, 45);
        if (!made) return {};
        const int32_t tables[] = {2, 0, 1, 3};
        int32_t seen[2] = {};
        std::vector<float> all;
        bool complete = true;
        for (const auto &step : STEPS) {
            std::vector<int32_t> tokens, positions, sequences, wanted;
            for (int s = 0; s < 2; s++)
                for (int i = 0; i < step[s]; i++) {
                    wanted.push_back((int32_t)wanted.size());
                    tokens.push_back((seen[s] * 13 + s * 5) % VOCABULARY);
                    positions.push_back(seen[s]++);
                    sequences.push_back(s);
                }
            const int32_t n = (int32_t)tokens.size();
            const size_t before = all.size();
            all.resize(before + (size_t)n * VOCABULARY);
            KeifuBatch batch{};
            batch.n_tokens = batch.n_wanted = n, batch.tokens = tokens.data(), batch.positions = positions.data();
            batch.sequences = sequences.data(), batch.n_sequences = 2, batch.table_width = 2;
            batch.block_tables = tables, batch.wanted = wanted.data(), batch.logits = &all[before];
            complete = complete && keifu_forward(made, &batch) == 0;
        }
        keifu_destroy(made);
        return complete ? all : std::vector<float>();
    }

    double packing_difference = 0;  // between the instruction set and the portable one

  private:
    uint32_t number() {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return (uint32_t)(state >> 33);
    }

    uint8_t *room(int64_t bytes) {
        owned.push_back(std::make_unique<uint8_t[]>((size_t)bytes + 64));
        return (uint8_t *)round_up((int64_t)owned.back().get(), 64);
    }

    float *numbers(int64_t n, float offset) {
        float *x = (float *)room(n * 4);
        for (int64_t i = 0; i < n; i++) x[i] = offset + (float)((int)(number() % 2001) - 1000) / 4096.f;
        return x;
    }

    KeifuMatrix packed(int format, const float *from, int64_t rows, int64_t columns) {
        const int64_t bytes = keifu_packed_size(format, rows, columns);
        uint8_t *own = room(bytes);
        uint8_t *portable = room(bytes);
        std::vector<float> x((size_t)(rows * columns)), expected(x);
        for (const bool reference : {false, true}) {
            const KernelsHere use(reference ? KEIFU_PORTABLE : instructions);
            uint8_t *to = reference ? portable : own;
            keifu_pack(format, KEIFU_FROM_FLOAT32, from, rows, columns, columns, to);
            keifu_unpack(format, to, rows, columns, 0, rows, reference ? expected.data() : x.data());
        }
        const double difference = relative_difference(x.data(), expected.data(), rows * columns);
        if (!(difference <= packing_difference)) packing_difference = difference;
        return {format, rows, columns, portable, nullptr};
    }

    // With `decides` the first numbers of each row say which experts a token chooses, whatever rounding does.
    KeifuMatrix matrix(int64_t rows, int64_t columns, bool decides = false) {
        if (about.format >= 0) {
            float *from = numbers(rows * columns, 0);
            for (int64_t row = 0; row < rows && decides; row++)
                for (int e = 0; e < about.n_experts; e++)
                    from[row * columns + e] = (row + e) % about.n_experts < 2 ? 4.f - (float)((row + e) % about.n_experts) : -4.f;
            return packed(about.format, from, rows, columns);
        }
        const Block *block = BLOCKS;
        while (block->ggml != about.ggml) block++;
        const int format = keifu_gguf_format(about.ggml);
        uint8_t *to = room(keifu_packed_size(format, rows, columns));
        const int64_t n = rows * columns / block->numbers;
        uint8_t *from = room(n * block->bytes);
        for (int64_t i = 0; i < n * block->bytes; i++) from[i] = (uint8_t)number();
        for (int64_t i = 0; i < n; i++)
            for (const int at : block->halves) {
                const uint16_t half = (uint16_t)(0x0c00 | (number() & 0x83ff));  // about 2^-12, of both signs
                std::memcpy(from + i * block->bytes + at, &half, 2);
            }
        keifu_repack_gguf(about.ggml, from, rows, columns, to);
        return {format, rows, columns, to, nullptr};
    }

    KeifuExpert network(bool gated) {
        KeifuExpert made{};
        if (gated) made.gate = matrix(hidden, dim);
        made.up = matrix(hidden, dim);
        made.down = matrix(dim, hidden);
        return made;
    }

    void make_layer(KeifuLayer &layer, bool first) {
        layer.query = matrix(HEADS * head_dim, dim);
        layer.key = matrix(KV_HEADS * head_dim, dim);
        layer.value = matrix(KV_HEADS * head_dim, dim);
        layer.out = matrix(dim, HEADS * head_dim);
        layer.query.bias = numbers(HEADS * head_dim, 0);
        layer.attention_norm = {KEIFU_RMS_NORM, 1e-5f, numbers(dim, 1), nullptr};
        layer.feedforward_norm = {first ? KEIFU_RMS_NORM : KEIFU_LAYER_NORM, 1e-5f, numbers(dim, 1), first ? nullptr : numbers(dim, 0)};
        layer.query_norm = layer.key_norm = {KEIFU_RMS_NORM, 1e-6f, numbers(head_dim, 1), nullptr};
        layer.activation = first ? KEIFU_SILU : KEIFU_GELU_ERF;
        layer.window = first ? 0 : 9;
        layer.attention_scale = 0.25f;
        layer.rotary_pairs = head_dim / 2;
        layer.rotary_frequencies = numbers(head_dim / 2, 0.3f);
        layer.rotary_magnitude = 1;
        const KeifuExpert dense = about.n_experts ? KeifuExpert{} : network(first);
        layer.gate = dense.gate, layer.up = dense.up, layer.down = dense.down;
        if (!about.n_experts) return;
        std::vector<KeifuExpert> made;
        for (int e = 0; e < about.n_experts; e++) made.push_back(network(first));
        experts.push_back(std::move(made));
        layer.experts = experts.back().data();
        layer.n_experts = about.n_experts, layer.n_chosen = 2, layer.normalised = 1;
        float *routes = (float *)room(about.n_experts * dim * 4);
        for (int i = 0; i < about.n_experts * dim; i++) routes[i] = i % (dim + 1) == 0 ? 1.f : 0.f;
        layer.router = packed(KEIFU_F32, routes, about.n_experts, dim);
    }

    const Case &about;
    const int instructions;
    int dim, head_dim, hidden;
    uint64_t state = 7;
    std::vector<std::unique_ptr<uint8_t[]>> owned;
    std::vector<std::vector<KeifuExpert>> experts;
    KeifuLayer layers[LAYERS] = {};
    KeifuMatrix table{};
    KeifuNorm final_norm{};
};

}  // namespace
}  // namespace keifu

using namespace keifu;

int32_t keifu_checks(void) { return N_CASES; }
const char *keifu_check_name(int32_t check) { return check >= 0 && check < N_CASES ? CASES[check].name : ""; }

float keifu_check(int32_t which, int32_t check) {
    if (!keifu_has_instructions(which)) return (float)fail("This CPU lacks instruction set %d.", which);
    if (check < 0 || check >= N_CASES) return (float)fail("There is no check %d; known are 0 to %d.", check, N_CASES - 1);
    const Sample sample(CASES[check], which);
    const std::vector<float> logits = sample.logits(which);
    const std::vector<float> expected = sample.logits(KEIFU_PORTABLE);
    if (logits.empty() || expected.empty()) return -1;
    double worst = sample.packing_difference / PACKING_LIMIT;
    for (size_t row = 0; row < logits.size(); row += VOCABULARY) {
        const double difference = relative_difference(&logits[row], &expected[row], VOCABULARY) / CASES[check].limit;
        if (!(difference <= worst)) worst = difference;
    }
    return std::isfinite(worst) ? (float)worst : 3e38f;
}
