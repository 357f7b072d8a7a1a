// Attention of some tokens of one sequence over its cached keys and values, for the query heads of one kv head.
//
// Positions are taken in tiles of 32 from the beginning of the sequence (or of the window), and what a query must not
// see has the weight 0, so that a query's sums do not depend on which others it is computed with.

#pragma once
#include "product.h"

namespace KEIFU_NAMESPACE {

// out = norm(x) of n numbers; `out` has room for the next multiple of 16.
INLINE void normalise(const KeifuNorm &norm, const float *x, float *out, int n) {
    if (norm.kind == KEIFU_NO_NORM) {
        for (int i = 0; i < n; i += 16) store(out + i, load_first(x + i, n - i));
        return;
    }
    float mean = 0;
    if (norm.kind == KEIFU_LAYER_NORM) {
        v16 total{};
        for (int i = 0; i < n; i += 16) total += load_first(x + i, n - i);
        mean = sum(total) / (float)n;
    }
    v16 squares{};
    for (int i = 0; i < n; i += 16) {
        const v16 d = first(load_first(x + i, n - i) - mean, n - i);
        squares = fma(d, d, squares);
    }
    const float inverse = 1.f / __builtin_sqrtf(sum(squares) / (float)n + norm.eps);
    for (int i = 0; i < n; i += 16) {
        v16 y = (load_first(x + i, n - i) - mean) * inverse;
        if (norm.weight) y *= load_first(norm.weight + i, n - i);
        if (norm.bias) y += load_first(norm.bias + i, n - i);
        store(out + i, y);
    }
}

// Turns the pairs of a head by the angles of token `t`.
INLINE void rotate(const Layer &layer, int t, float *head) {
    const Rotation *rotation = layer.rotation;
    if (!rotation) return;
    const int n = rotation->pairs;
    const int step = layer.rotary_interleaved ? 2 : 1;
    const int apart = layer.rotary_interleaved ? 1 : n;
    const float *cos = rotation->cos + (int64_t)t * n;
    const float *sin = rotation->sin + (int64_t)t * n;
    int i = 0;
    for (; apart > 1 && i + 16 <= n; i += 16) {
        const v16 a = load(head + i);
        const v16 b = load(head + i + n);
        store(head + i, a * load(cos + i) - b * load(sin + i));
        store(head + i + n, b * load(cos + i) + a * load(sin + i));
    }
    for (; i < n; i++) {
        const float a = head[i * step];
        const float b = head[i * step + apart];
        head[i * step] = a * cos[i] - b * sin[i];
        head[i * step + apart] = b * cos[i] + a * sin[i];
    }
}

INLINE void make_head(const Layer &layer, const KeifuNorm &norm, int t, const float *from, float *head, int head_dim) {
    normalise(norm, from, head, head_dim);
    rotate(layer, t, head);
}

INLINE const int32_t *own_table(const Forward &f, int t) {
    return f.batch.block_tables + (int64_t)f.batch.sequences[t] * f.batch.table_width;
}

INLINE uint8_t *cached_head(const Cache &c, const int32_t *table, int layer, int64_t position, int head) {
    return c.data + layer * c.layer + table[position / c.block_size] * c.block + head * c.head;
}

// Writes the key and the value of token `t` into its place in the cache.
INLINE void store_token(const Forward &f, int index, int t, int head, float *scratch) {
    const KeifuModel &m = *f.model;
    const Layer &layer = m.layers[index];
    const int head_dim = m.about.head_dim;
    const int position = f.batch.positions[t];
    const int place = position % m.cache.block_size;
    uint8_t *base = cached_head(m.cache, own_table(f, t), index, position, head);
    uint8_t *key_tile = base + place / TILE * m.cache.key_tile;
    const float *value = m.value + t * m.kv_width + head * head_dim;
    for (int i = 0; i < head_dim; i += 4 / m.cache.number()) __builtin_prefetch(key_tile + i * TILE * m.cache.number(), 1);
    make_head(layer, layer.key_norm, t, m.key + t * m.kv_width + head * head_dim, scratch, head_dim);
    if (m.cache.float32) {
        float *keys = (float *)key_tile + place % TILE;
        float *values = (float *)(base + m.cache.values) + place * TILE;
        for (int i = 0; i < head_dim; i++) keys[i * TILE] = scratch[i];
        for (int i = 0; i < head_dim; i++) values[i / TILE * (m.cache.value_tile / 4) + i % TILE] = value[i];
        return;
    }
    uint16_t *keys = (uint16_t *)key_tile + place % TILE * 2;
    uint16_t *values = (uint16_t *)(base + m.cache.values) + place / 2 * 32 + place % 2;
    uint16_t rounded[256 + TILE];
    for (int i = 0; i < head_dim; i += TILE) store_bfloat16(rounded + i, load(scratch + i));
    if (head_dim % 2) rounded[head_dim] = 0;
    for (int i = 0; i < head_dim; i += 2) memcpy(keys + i * 16, rounded + i, 4);
    for (int i = 0; i < head_dim; i += TILE) store_bfloat16(rounded + i, load_first(value + i, head_dim - i));
    for (int i = 0; i < head_dim; i++) values[i / TILE * (m.cache.value_tile / 2) + i % TILE * 2] = rounded[i];
}

// The queries of a task, normalised, rotated and rounded: [token, head of the group, head_dim padded to GROUP]. Those of
// cross-attention are only rounded.
template <bool FLOAT32>
INLINE int make_queries(const Forward &f, const Layer &layer, const AttentionTask &task, bool cross, int head, Scratch &scratch) {
    const KeifuModel &m = *f.model;
    const int head_dim = m.about.head_dim;
    const int group = m.about.n_heads / m.about.n_kv_heads;
    const int width = (int)round_up(head_dim, GROUP);
    auto *out = (Number<FLOAT32> *)scratch.queries;
    for (int t = task.first; t < task.first + task.n_tokens; t++)
        for (int h = 0; h < group; h++, out += width) {
            const float *query = m.query + t * m.query_width + (head * group + h) * head_dim;
            if (layer.cross_query.data && cross) normalise({}, query, scratch.heads, head_dim);
            else make_head(layer, layer.query_norm, t, query, scratch.heads, head_dim);
            for (int i = 0; i < width; i += TILE)
                put<FLOAT32>(out + i, i < head_dim ? first(load(scratch.heads + i), head_dim - i) : v16{});
        }
    return task.n_tokens * group;
}

constexpr float NO_SINK = -3e38f;

// weights = exp(score · scale - maximum), rounded, where visible, else 0; gives 1 / their sum, to which a sink adds.
// `n`: a multiple of 32.
template <bool FLOAT32>
INLINE float soften(float *scores, Number<FLOAT32> *weights, int n, int seen_from, int seen_to, float scale, float sink) {
    const int from = seen_from / TILE * TILE;
    v16 most = splat(sink);
    for (int i = from; i <= seen_to; i += TILE) {
        const i16 place = lanes() + i;
        v16 x = load(scores + i) * scale;
        x = select((place >= seen_from) & (place <= seen_to), x, splat(-3e38f));
        store(scores + i, x);
        most = max(most, x);
    }
    const float highest = maximum(most);
    v16 total{};
    for (int i = 0; i < n; i += TILE) {
        v16 w{};
        if (i >= from && i <= seen_to) w = exp(load(scores + i) - highest);
        if (!FLOAT32) w = round_to_bfloat16(w);
        total += w;
        put<FLOAT32>(weights + i, w);
    }
    return 1.f / (sum(total) + (sink == NO_SINK ? 0.f : __builtin_expf(sink - highest)));
}

// Attends for one task and one kv head; writes model.attended. `cross`: to all of the tokens' source, or of their own sequence. `fetches`: the
// next head comes next, and what it reads is fetched meanwhile.
template <bool FLOAT32>
INLINE void attend(const Forward &f, int index, const AttentionTask &task, bool cross, int head, bool fetches, Scratch &scratch) {
    const KeifuModel &m = *f.model;
    const Layer &layer = m.layers[index];
    const Cache &c = m.cache;
    const int head_dim = m.about.head_dim;
    const int group = m.about.n_heads / m.about.n_kv_heads;
    const int64_t source = cross ? f.batch.sources[f.batch.sequences[task.first]] : 0;
    const int32_t *table = cross ? f.batch.source_tables + source * f.batch.source_width : own_table(f, task.first);
    const int first_position = cross ? f.batch.source_lengths[source] - 1 : f.batch.positions[task.first];
    const int advance = cross ? 0 : 1;  // positions that the next token sees beyond those of this one
    const int window = layer.window && !cross ? layer.window : m.max_seen;
    const int earliest = first_position - window + 1 > 0 ? first_position - window + 1 : 0;
    const int start = earliest / GROUP * GROUP;
    const int seen = first_position + 1 + advance * (task.n_tokens - 1) - start;
    const int n = (int)round_up(seen, GROUP);
    const int64_t stride = m.max_seen + PAIR;
    const int rows = make_queries<FLOAT32>(f, layer, task, cross, head, scratch);
    constexpr int GROUP_BYTES = GROUP * TILE * (FLOAT32 ? 4 : 2);  // of a tile
    const auto multiply = [rows](auto at, int tiles, int columns, const void *x, int64_t step, float *y, int64_t y_step) {
        if constexpr (FLOAT32) vector_product<true>(at, tiles, columns, (const float *)x, step, rows, y, y_step);
        else dense_product(at, tiles, columns, (const Dense *)x, step, rows, y, y_step);
    };
    const int64_t ahead = fetches ? c.head : 0;

    const int width = (int)round_up(head_dim, GROUP);
    const int step = rows > TILE ? CHUNK : 1;  // tiles at once: one by one they are read in the order of memory
    for (int i = 0; i < seen; i += step * TILE) {
        const int tiles = seen - i < step * TILE ? (seen - i + TILE - 1) / TILE : step;
        const uint8_t *keys[CHUNK];
        for (int s = 0; s < tiles; s++) {
            const int position = start + i + s * TILE;
            keys[s] = cached_head(c, table, index, position, head) + position % c.block_size / TILE * c.key_tile;
        }
        const auto at = [&](int s, int g) {
            if (ahead) fetch<PREFETCH.cache>(keys[s] + g * GROUP_BYTES + ahead, GROUP_BYTES);
            return keys[s] + g * GROUP_BYTES;
        };
        multiply(at, tiles, head_dim, scratch.queries, width, scratch.scores + i, stride);
    }

    auto *weights = (Number<FLOAT32> *)scratch.weights;
    float inverse[MAX_TASK_ROWS];
    for (int r = 0; r < rows; r++) {
        const int place = first_position + advance * (r / group) - start;
        const int from = place - window + 1 > 0 ? place - window + 1 : 0;
        const float sink = layer.sinks && !cross ? layer.sinks[head * group + r % group] : NO_SINK;
        inverse[r] = soften<FLOAT32>(scratch.scores + r * stride, weights + r * stride, n, from, place, layer.attention_scale, sink);
    }

    const auto at = [&](int s, int g) {
        const int position = start + g * GROUP;
        const uint8_t *tile = cached_head(c, table, index, position, head) + c.values + s * c.value_tile +
                              position % c.block_size / GROUP * GROUP_BYTES;
        if (ahead) fetch<PREFETCH.cache>(tile + ahead, seen - g * GROUP < GROUP ? (seen - g * GROUP) * GROUP_BYTES / GROUP : GROUP_BYTES);
        return tile;
    };
    const int padded = (int)round_up(head_dim, TILE);
    for (int s = 0; s < padded / TILE; s += CHUNK) {
        const int tiles = padded / TILE - s < CHUNK ? padded / TILE - s : CHUNK;
        const auto here = [&](int i, int g) { return at(s + i, g); };
        multiply(here, tiles, seen, weights, stride, scratch.heads + s * TILE, padded);
    }
    for (int r = 0; r < rows; r++) {
        float *out = m.attended + (task.first + r / group) * m.query_width + (head * group + r % group) * head_dim;
        int i = 0;
        for (; i + TILE <= head_dim; i += TILE) store(out + i, load(scratch.heads + r * padded + i) * inverse[r]);
        for (; i < head_dim; i++) out[i] = scratch.heads[r * padded + i] * inverse[r];
    }
}

}  // namespace KEIFU_NAMESPACE
