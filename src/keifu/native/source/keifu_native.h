/* The C interface of the native step: weights packed for the CPU, and the forward pass of a causal Transformer over a
 * cache of keys and values in blocks.
 *
 * Every function that can fail returns 0, or -1 with the reason in keifu_last_error(). Nothing here keeps a pointer to
 * a description (structs and the arrays of KeifuBatch) after the call; the weights, norms, biases and frequencies that
 * a description points at are used in place and must stay where they are until keifu_destroy().
 *
 * Building: each .cpp file on its own, with -std=c++17 -O2 -pthread -ffp-contract=off and, on the machine that it
 * names, the flags of its first line; all of them make one library, which chooses among the instruction sets when it runs.
 *
 * Threads: one model runs one forward at a time; models share one pool of threads, so that forwards of two models from
 * two threads wait for each other.
 */
#ifndef KEIFU_NATIVE_H
#define KEIFU_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

const char *keifu_last_error(void); /* of the calling thread; never NULL */

/* ---- the CPU ---- */

enum KeifuInstructions {
    KEIFU_PORTABLE = 0, KEIFU_AVX2 = 1, KEIFU_AVX_VNNI = 2, KEIFU_AVX512 = 3, KEIFU_AVX512_BF16 = 4, KEIFU_AMX = 5,
    KEIFU_NEON_DOTPROD = 6, KEIFU_NEON_I8MM = 7, KEIFU_NEON_BF16 = 8 /* arm64; there KEIFU_PORTABLE uses NEON */
};

int32_t keifu_best_instructions(void);      /* the best that this CPU (and its kernel) has */
int32_t keifu_has_instructions(int32_t which); /* 1 or 0 */
int32_t keifu_instructions(void);           /* those in use; the best at first */
int32_t keifu_use_instructions(int32_t which); /* fails where the CPU lacks them; packed weights serve all of them */

/* Known inputs in each weight format: how far the results of an instruction set are from those of KEIFU_PORTABLE, as a
 * share of the most that rounding explains. Above 1 the set computes wrongly; -1 where the check cannot run. It does not
 * change the instructions in use. */
int32_t keifu_checks(void);                 /* how many there are */
const char *keifu_check_name(int32_t check); /* the weight format */
float keifu_check(int32_t which, int32_t check);

int32_t keifu_available_threads(void);      /* CPUs that affinity and the cgroup's quota leave this process, at most 256 */
int32_t keifu_threads(void);                /* those in use; keifu_available_threads() at first */
int32_t keifu_use_threads(int32_t n);       /* 1 to 256; waits for a forward that is running */

/* ---- packed matrices ----
 *
 * A matrix [rows, columns] is used as y = matrix · x, rows being outputs (as in torch's Linear). It is packed as tiles
 * of 16 rows; a tile goes through the columns in pairs of groups of 32. Rows are padded to 16 and columns to 64 with
 * zeros, so that any shape can be packed. The bytes are the same for all instruction sets; `data` must be 64-byte
 * aligned. Quantised weights are multiplied with x rounded to int8 in groups of 64.
 *
 *   format            value of a weight                      bits a weight   same values as
 *   KEIFU_BF16        bfloat16                               16
 *   KEIFU_F32         float32, with which x is not rounded   32
 *   KEIFU_INT8        scale · q, q in -128..127              8.5             GGUF Q8_0 (and Q5_0)
 *   KEIFU_INT4        scale · (q - 8), q in 0..15            4.5             GGUF Q4_0
 *   KEIFU_INT4_MIN    scale · q + min                        5               GGUF Q4_1
 *   KEIFU_INT4_SUPER  (d · scale) · q - (dmin · min)         4.625           GGUF Q4_K: d and dmin of 8 groups, scales
 *                                                                            and mins in bytes
 *   KEIFU_INT6_SUPER  (d · scale) · (q - 32), q in 0..63     8.5625          GGUF Q6_K: d of 8 groups, scales of 16
 *                                                                            columns in int8 (q is kept in a byte)
 *   KEIFU_INT8_64     scale · q, of 64 columns               8.25            -
 *   KEIFU_INT4_64     (d · scale) · (m · q) - (dmin · min)   4.625           - (d and dmin of 8 groups, scales of 64
 *                                                                            columns and mins in bytes, m in 1..16)
 * scale, min, d and dmin are float16, a number for each row and group.
 */
enum KeifuFormat {
    KEIFU_BF16 = 0, KEIFU_INT8 = 1, KEIFU_INT4 = 2, KEIFU_INT4_MIN = 3, KEIFU_INT4_SUPER = 4, KEIFU_INT6_SUPER = 5,
    KEIFU_INT8_64 = 6, KEIFU_INT4_64 = 7, KEIFU_F32 = 8
};

enum KeifuSource { KEIFU_FROM_FLOAT32 = 0, KEIFU_FROM_BFLOAT16 = 1, KEIFU_FROM_FLOAT16 = 2 };

/* Bytes of a packed matrix; -1 for an unknown format or a size below 1. */
int64_t keifu_packed_size(int32_t format, int64_t rows, int64_t columns);

/* Packs numbers to KEIFU_F32, KEIFU_BF16, KEIFU_INT8_64 or KEIFU_INT4_64. `row_stride` counts numbers from one row to the next.
 * Scales are chosen to make the squared error of each group small. Fails at a NaN or an infinity, naming row and column.
 * Uses the pool's threads. */
int32_t keifu_pack(int32_t format, int32_t source_type, const void *source, int64_t rows, int64_t columns,
                   int64_t row_stride, void *packed);

/* The format that GGUF's blocks of a type are repacked to without loss: ggml types 2 (Q4_0), 3 (Q4_1), 6 (Q5_0),
 * 8 (Q8_0), 12 (Q4_K), 14 (Q6_K); -1 for the others. */
int32_t keifu_gguf_format(int32_t ggml_type);

/* Repacks rows of GGUF blocks to keifu_gguf_format(ggml_type): the same numbers, bit for bit. The rows follow one
 * another as in the file. Fails where `columns` is no multiple of the type's block (32, or 256 for the K types). */
int32_t keifu_repack_gguf(int32_t ggml_type, const void *blocks, int64_t rows, int64_t columns, void *packed);

/* Writes rows first..first+n_rows-1 as float32 [n_rows, columns]. */
int32_t keifu_unpack(int32_t format, const void *packed, int64_t rows, int64_t columns, int64_t first, int64_t n_rows,
                     float *out);

/* ---- a model as data ----
 *
 * x = embedding[token] · embedding_scale (+ positions[position]), or a row of KeifuBatch.inputs in place of the embedding's
 * a layer, sequential:  x = x + post_attention_norm(out · attention(attention_norm(x)))
 *                       x = x + cross_out · attention to the source(cross_norm(x)), where there is cross_query
 *                       x = x + post_feedforward_norm(down · f(feedforward_norm(x)))
 * a layer, norm_after:  the same with the three norms after the sums: x = attention_norm(x + out · attention(x)), ...
 * a layer, parallel:    n = attention_norm(x);  x = x + out · attention(n) + down · f(n)
 * f(n) = activation(gate · n) * (up · n), or activation(up · n) where there is no gate
 * a mixture of experts, in place of down · f(n): the sum of share · down · f(n) of the n_chosen experts with the highest
 * scores router · n; a share is exp(score) / the sum of exp over all experts, or over those that are chosen (normalised)
 * logits = soft cap of (head · norm(x)) · logit_scale
 */
typedef struct {
    int32_t format; /* KeifuFormat */
    int64_t rows, columns;
    const void *data;  /* packed; NULL: there is no such matrix */
    const float *bias; /* [rows], or NULL */
} KeifuMatrix;

enum KeifuNormKind { KEIFU_NO_NORM = 0, KEIFU_RMS_NORM = 1, KEIFU_LAYER_NORM = 2 };

typedef struct {
    int32_t kind;        /* KeifuNormKind; KEIFU_NO_NORM: the input as it is */
    float eps;
    const float *weight; /* what is multiplied with (1 + w for Gemma); [dim], or [head_dim] for each head of q and k; NULL: ones */
    const float *bias;   /* of LayerNorm, or NULL */
} KeifuNorm;

/* KEIFU_CLAMPED, with a gate: (up' + 1) · gate' · sigmoid(gate_slope · gate'), where up' is up · n within
 * ±gate_limit and gate' is gate · n up to it. */
enum KeifuActivation { KEIFU_SILU = 0, KEIFU_GELU_TANH = 1, KEIFU_GELU_ERF = 2, KEIFU_RELU = 3, KEIFU_CLAMPED = 4 };

typedef struct {
    KeifuMatrix gate, up, down; /* as a layer's */
} KeifuExpert;

typedef struct {
    KeifuMatrix query, key, value, out; /* [heads·head_dim, dim], [kv_heads·head_dim, dim] twice, [dim, heads·head_dim] */
    KeifuMatrix gate, up, down;         /* [hidden, dim] twice, [dim, hidden]; gate.data NULL: not gated */
    KeifuMatrix cross_query, cross_out; /* as query and out, of a decoder that looks at a source; both NULL: it does not */
    KeifuNorm attention_norm, post_attention_norm, feedforward_norm, post_feedforward_norm;
    KeifuNorm query_norm, key_norm;     /* of each head, before the rotation */
    KeifuNorm all_queries_norm, all_keys_norm; /* of all heads together, before those; weights: [heads·head_dim] */
    KeifuNorm cross_norm;
    int32_t parallel, norm_after;       /* 0 or 1 */
    int32_t activation;                 /* KeifuActivation */
    int32_t window;                     /* tokens that a query sees, itself included; 0: all before it */
    int32_t bidirectional;              /* 0 or 1: a query sees all positions of its source in the batch, which is the
                                           sequence itself; then without window, sinks and cross_query */
    float attention_scale;              /* what q·k is multiplied with */
    const float *rotary_frequencies;    /* [rotary_pairs] radians a position; NULL: not rotated. Layers that share the
                                           pointer share the table of cosines and sines */
    int32_t rotary_pairs;               /* pairs that turn: head_dim / 2, or fewer (partial rotary: the first ones) */
    int32_t rotary_interleaved;         /* 0: number i goes with i + rotary_pairs; 1: 2i with 2i + 1 */
    float rotary_magnitude;             /* factor on cos and sin; 1 but for YaRN */
    const float *sinks;                 /* [heads] scores that take weight and give no value, or NULL */
    float gate_slope, gate_limit;       /* of KEIFU_CLAMPED */
    KeifuMatrix router;                 /* [n_experts, dim] of a mixture, which has no gate, up and down of its own */
    const KeifuExpert *experts;         /* [n_experts], of the same shapes; NULL: no mixture */
    int32_t n_experts, n_chosen;        /* n_chosen: of a token */
    int32_t normalised;                 /* 0 or 1 */
} KeifuLayer;

typedef struct {
    int32_t dim, n_heads, n_kv_heads, head_dim, vocab_size, n_layers;
    KeifuMatrix embedding; /* [vocab_size, dim] */
    float embedding_scale;
    const float *positions; /* [context_length, dim] learned positions, or NULL */
    int32_t context_length; /* positions from 0 to this - 1 are taken */
    const KeifuLayer *layers;
    KeifuNorm norm;
    KeifuMatrix head; /* the embedding again where they are tied */
    float logit_scale;
    float logit_softcap; /* cap · tanh(logit / cap); 0: none */
    int32_t source_length; /* most positions of a source; 0 where no layer looks at one */
} KeifuModelDescription;

/* Fails where shapes do not fit together (which matrix, which sizes), or where of query, key and value (or gate and up)
 * one is KEIFU_F32, or KEIFU_BF16, and another is not; or where the same holds for the matrices of two experts. */
typedef struct KeifuModel KeifuModel;

/* ---- the cache of keys and values ----
 *
 * `n_blocks` blocks of `block_size` positions (a multiple of 32), for all layers, in float32 where the embedding is
 * KEIFU_F32, else in bfloat16. Sequence s keeps
 * position p in block table[s][p / block_size]. The caller decides which blocks a sequence has (and which of them it
 * shares); the memory is the model's. `max_tokens` is the most tokens that one forward takes. */
int64_t keifu_cache_bytes(const KeifuModelDescription *description, int32_t n_blocks, int32_t block_size);
KeifuModel *keifu_create(const KeifuModelDescription *description, int32_t n_blocks, int32_t block_size,
                         int32_t max_tokens); /* NULL: see keifu_last_error() */
void keifu_destroy(KeifuModel *model);
int32_t keifu_copy_block(KeifuModel *model, int32_t from, int32_t to); /* all layers */

/* Copies a block of all layers, keifu_cache_bytes(description, 1, block_size) bytes, out of the cache or into it. The
 * bytes have the cache's own order, which is the same for all instruction sets. */
int32_t keifu_read_block(KeifuModel *model, int32_t block, void *data);
int32_t keifu_write_block(KeifuModel *model, int32_t block, const void *data);

/* Writes a source's keys and values for the cross-attention of one layer, [n_positions, kv_heads·head_dim] each in
 * the cache's type, into the blocks of `table`, in order. */
int32_t keifu_store_source(KeifuModel *model, int32_t layer, const void *keys, const void *values, int32_t n_positions,
                           const int32_t *table);

/* ---- the forward pass ----
 *
 * A batch lists the new tokens of some sequences: one for a sequence that decodes, many for a prompt (or a part of it).
 * The tokens of one sequence stand side by side, at consecutive positions; keys and values of its earlier positions
 * must be in its blocks. The logits of a token have the same bits however its sequence was cut into forwards, whatever
 * else is in the batch, and for any number of threads; also for every instruction set with fused multiplication (all
 * but KEIFU_PORTABLE on x86-64, and KEIFU_AMX where there are bf16 weights). */
typedef struct {
    int32_t n_tokens;
    const int32_t *tokens, *positions; /* [n_tokens] */
    const int32_t *sequences;          /* [n_tokens] row of block_tables */
    int32_t n_sequences, table_width;
    const int32_t *block_tables; /* [n_sequences, table_width] */
    int32_t n_sources, source_width; /* 0 where no layer looks at a source */
    const int32_t *source_tables;    /* [n_sources, source_width] blocks that keifu_store_source() filled, or those of
                                        the sequence itself where layers are bidirectional */
    const int32_t *source_lengths;   /* [n_sources] positions of each, at least 1 */
    const int32_t *sources;          /* [n_sequences] row of source_tables */
    int32_t n_wanted;
    const int32_t *wanted; /* [n_wanted] indices of tokens whose logits are wanted, in any order */
    float *logits;         /* [n_wanted, vocab_size] */
    const float *inputs;   /* [n_tokens, dim] in place of the tokens' embeddings; then `tokens` is not read. Or NULL */
} KeifuBatch;

/* Fails, with nothing written, at a token, position or block that is out of range. */
int32_t keifu_forward(KeifuModel *model, const KeifuBatch *batch);

#ifdef __cplusplus
}
#endif
#endif
