// A model, its cache and its buffers, and one forward pass of it as a job of the pool. Plain data: what is computed
// with it is in step.h, once per instruction set.
#pragma once
#include "formats.h"
#include "pool.h"

namespace keifu {

constexpr int MAX_TASK_ROWS = 32;  // queries (tokens times heads of a group) that one attention task takes
constexpr int BLOCK_ROWS = 64;     // rows of a product that are computed before they are handed on
constexpr int CHUNK = 4;           // tiles of a matrix in one task

// One group of 32 numbers of a row, rounded to int8: number = scale · code. Both groups of a pair have the same scale.
struct CodeGroup {
    float scale;
    float moment;         // scale · sum, for formats with a min
    int32_t sum;          // of the codes
    int32_t half[2];      // of the first 16 codes and the others
    int32_t pair_sum;     // of both groups, where this is the first of a pair
    int32_t unused[2];
};

// The rows of a product's input as the kernels want them: see Input.
struct Rows {
    int64_t columns;   // padded to PAIR; also the distance between rows
    float *numbers;    // float32; of bf16 too, where no instruction multiplies its pairs
    uint16_t *dense;   // bfloat16
    int8_t *codes;
    CodeGroup *groups;  // [rows / TILE][groups][TILE]

    ALWAYS_INLINE int64_t n_groups() const { return columns / GROUP; }
    ALWAYS_INLINE CodeGroup *about(int64_t row, int64_t group) const {
        return groups + (row / TILE * n_groups() + group) * TILE + row % TILE;
    }
};

// What a thread needs for itself.
struct Scratch {
    float *out;       // [2, BLOCK_ROWS, CHUNK · TILE]: of two products
    float *row;       // numbers of one row, padded
    float *heads;     // [MAX_TASK_ROWS, head_dim padded to TILE]
    void *queries;    // [MAX_TASK_ROWS, head_dim padded to GROUP] dense
    float *scores;    // [MAX_TASK_ROWS, longest sequence + PAIR]
    void *weights;    // the same, dense
    uint8_t *codes;   // a tile whose 4-bit codes are spread to bytes
    int32_t *sums;    // [4, 16, 16] of AMX
    Rows own;         // rows that the thread makes for itself where there are few
};

// Where keys and values lie: [layer][block][kv head][keys | values]. Keys of 16 positions are a tile of bf16 or float32;
// values are tiles of 16 numbers of the head whose columns are positions.
struct Cache {
    uint8_t *data;
    bool float32;
    int block_size, n_blocks;
    int64_t key_tile, value_tile;       // bytes of a tile of a block
    int64_t values, head, block, layer;  // offset of the values; bytes of a head, of a block, of a layer

    ALWAYS_INLINE int number() const { return float32 ? 4 : 2; }  // bytes
};

struct Rotation {  // the rotary tables of the tokens of a batch
    const float *frequencies;
    int pairs;
    float magnitude;
    float *cos, *sin;  // [max_tokens, pairs]
};

struct Layer : KeifuLayer {
    const Rotation *rotation;  // or nullptr
};

struct ExpertTokens {  // the slots of the tokens that an expert has; a slot is one of a token's choices
    int expert, first, n;
};

struct AttentionTask {  // tokens side by side that look at the same blocks: those of one sequence, or of one source
    int first, n_tokens;
};

struct AttentionTasks {
    AttentionTask *tasks;  // [max_tokens]
    int n;
};

}  // namespace keifu

struct KeifuModel {
    KeifuModelDescription about;
    keifu::Layer *layers;
    keifu::Rotation *rotations;
    int n_rotations, max_tokens, max_positions;
    int max_seen;  // by a query: positions of its sequence, or of its source
    int64_t width, query_width, kv_width;  // of the buffers' rows, padded to PAIR
    float *x, *added, *query, *key, *value, *attended;
    keifu::Rows normed, mixed, hidden;  // inputs of q, k, v and up; of out; of down
    keifu::Rows routed;                 // inputs of the experts' up, by slots
    int64_t score_width;                // of the rows of scores
    float *scores, *shares;             // [max_tokens, score_width] of all experts; [max_tokens, n_chosen] of those chosen
    int32_t *chosen, *slots;            // [max_tokens, n_chosen] experts; [slots] the choice that a slot is, or -1
    keifu::ExpertTokens *expert_tokens;  // of a layer, in the order of the experts
    keifu::Scratch *scratch;            // [MAX_THREADS]
    keifu::AttentionTasks own, cross;   // of the forward that runs
    keifu::Cache cache;
};

namespace keifu {

struct Forward {
    KeifuModel *model;
    KeifuBatch batch;
    AttentionTasks own, cross;
    bool whole_spans;  // each sequence's new tokens are one task, which can store their keys and values itself
};

// A mixture's experts that a forward may use, and the slots of their tokens, which begin at multiples of TILE.
ALWAYS_INLINE int most_used(const KeifuLayer &layer, int n_tokens) {
    const int64_t choices = (int64_t)n_tokens * layer.n_chosen;
    return choices < layer.n_experts ? (int)choices : layer.n_experts;
}
ALWAYS_INLINE int most_slots(const KeifuLayer &layer, int n_tokens) {
    return n_tokens * layer.n_chosen + most_used(layer, n_tokens) * (TILE - 1);
}

struct Numbers {  // rows that are to be packed
    int type;       // KeifuSource
    const char *data;
    int64_t stride, size;  // bytes from one row to the next, and of a number
    int rows;
    int64_t columns;
};

// What an instruction set gives.
struct Kernels {
    void (*forward)(const Forward &forward, Walk &walk);
    int64_t (*pack)(int format, const Numbers &from, uint8_t *tile);
    void (*unpack)(int format, const uint8_t *data, int64_t columns, int64_t row, float *out);
};

extern const Kernels portable_kernels, avx2_kernels, avx_vnni_kernels, avx512_kernels, avx512_bf16_kernels, amx_kernels,
    neon_dotprod_kernels, neon_i8mm_kernels, neon_bf16_kernels;
const Kernels &kernels();  // those in use

// While this exists, its thread uses an instruction set of its own.
class KernelsHere {
  public:
    explicit KernelsHere(int which);
    ~KernelsHere();
    KernelsHere(const KernelsHere &) = delete;

  private:
    const int before;
};

int32_t fail(const char *format, ...) __attribute__((format(printf, 1, 2)));  // sets the last error, gives -1

}  // namespace keifu
