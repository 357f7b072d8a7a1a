// Models: their descriptions are checked, their buffers and cache made, their batches checked and cut into tasks.
#include "model.h"

#if defined(_WIN32)
#define NOMINMAX
#include <windows.h>

#include <malloc.h>
#else
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace keifu {
namespace {

// ---- memory ----

#if defined(_WIN32)
void *take_small(size_t bytes) { return _aligned_malloc(bytes, 64); }
void free_small(void *p) { _aligned_free(p); }
void *take_pages(size_t bytes) { return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE); }
void free_pages(void *p, size_t) { VirtualFree(p, 0, MEM_RELEASE); }
#else
void *take_small(size_t bytes) { return std::aligned_alloc(64, bytes); }
void free_small(void *p) { std::free(p); }
void free_pages(void *p, size_t bytes) { munmap(p, bytes); }
void *take_pages(size_t bytes) {
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return p;
}
#endif

// Memory of a model or a thread, all zeros, freed together; `complete` is false where the system had no more. What is
// large is mapped, in huge pages where the system gives them, and takes memory only where it was written.
class Arena {
  public:
    Arena() = default;
    Arena(const Arena &) = delete;
    ~Arena() {
        for (const auto &[start, size] : mapped) free_pages(start, size);
        for (void *p : small) free_small(p);
    }
    template <class T> T *take(int64_t n) {
        const size_t bytes = (size_t)round_up(n > 0 ? n * (int64_t)sizeof(T) : 1, 64);
        void *p = bytes < PAGE ? take_small(bytes) : map(bytes + PAGE);
        complete = complete && p;
        if (p && bytes < PAGE) {
            std::memset(p, 0, bytes);
            small.push_back(p);
        }
        return static_cast<T *>(p);
    }
    bool complete = true;

  private:
    static constexpr size_t PAGE = 2 << 20;

    void *map(size_t bytes) {  // aligned to PAGE
        void *start = take_pages(bytes);
        if (!start) return nullptr;
        mapped.push_back({start, bytes});
        return (void *)round_up((int64_t)start, PAGE);
    }

    std::vector<std::pair<void *, size_t>> mapped;
    std::vector<void *> small;
};

Rows make_rows(Arena &arena, int64_t n, int64_t columns) {
    Rows rows;
    rows.columns = round_up(columns, PAIR);
    rows.numbers = arena.take<float>(n * rows.columns);
    rows.dense = arena.take<uint16_t>(n * rows.columns);
    rows.codes = arena.take<int8_t>(n * rows.columns);
    rows.groups = arena.take<CodeGroup>(round_up(n, TILE) * rows.n_groups());
    return rows;
}

struct Owned : KeifuModel {  // the model with what it owns
    Arena arena;
    int n_scratch;
};

Scratch make_scratch(Owned &m) {
    Arena &arena = m.arena;
    const int64_t widest = std::max(m.width, m.query_width);
    const int64_t scores = MAX_TASK_ROWS * ((int64_t)m.max_seen + PAIR);
    Scratch s;
    s.out = arena.take<float>(2 * BLOCK_ROWS * CHUNK * TILE);
    s.row = arena.take<float>(widest);
    s.heads = arena.take<float>(MAX_TASK_ROWS * round_up(m.about.head_dim, PAIR));
    s.queries = arena.take<float>(MAX_TASK_ROWS * round_up(m.about.head_dim, PAIR));
    s.scores = arena.take<float>(scores);
    s.weights = arena.take<float>(scores);
    s.codes = arena.take<uint8_t>(TILE * std::max(widest, m.hidden.columns));
    s.sums = arena.take<int32_t>(4 * TILE * TILE);
    s.own = make_rows(arena, 1, widest);
    return s;
}

bool give_scratch(Owned &m, int threads) {  // to each thread
    for (; m.n_scratch < threads && m.arena.complete; m.n_scratch++) m.scratch[m.n_scratch] = make_scratch(m);
    return m.arena.complete;
}

// ---- checks ----

int check_matrix(const KeifuMatrix &w, const char *name, int layer, int64_t rows, int64_t columns) {
    if (!w.data) return fail("Layer %d has no %s matrix.", layer, name);
    if (w.format < 0 || w.format >= N_FORMATS) return fail("The %s matrix of layer %d has format %d.", name, layer, w.format);
    if (w.rows != rows || w.columns != columns)
        return fail("The %s matrix of layer %d is %lld x %lld; %lld x %lld is needed.", name, layer, (long long)w.rows,
                    (long long)w.columns, (long long)rows, (long long)columns);
    return 0;
}

int check_same_input(const KeifuMatrix &a, const KeifuMatrix &b, const char *names, int layer) {
    if (input_of(a.format) == input_of(b.format)) return 0;
    return fail("The %s matrices of layer %d have one input: all must be float32, or bf16, or none.", names, layer);
}

int check_network(const KeifuExpert &e, int i, int64_t hidden, int64_t dim) {
    if (check_matrix(e.up, "up", i, hidden, dim) || check_matrix(e.down, "down", i, dim, hidden) ||
        (e.gate.data && (check_matrix(e.gate, "gate", i, hidden, dim) || check_same_input(e.gate, e.up, "gate and up", i))))
        return -1;
    return 0;
}

int check_mixture(const KeifuLayer &l, int i, int64_t dim) {
    if (l.n_experts < 1 || l.n_chosen < 1 || l.n_chosen > l.n_experts)
        return fail("Layer %d chooses %d of %d experts.", i, l.n_chosen, l.n_experts);
    if (check_matrix(l.router, "router", i, l.n_experts, dim)) return -1;
    const KeifuExpert &first = l.experts[0];
    for (const KeifuExpert *e = l.experts; e < l.experts + l.n_experts; e++)
        if (check_network(*e, i, first.up.rows, dim) || check_same_input(e->up, first.up, "experts' up", i) ||
            check_same_input(e->down, first.down, "experts' down", i))
            return -1;
    return 0;
}

int check_layer(const KeifuModelDescription &about, const KeifuLayer &l, int i) {
    const int64_t dim = about.dim;
    const int64_t inner = (int64_t)about.n_heads * about.head_dim;
    const int64_t kv = (int64_t)about.n_kv_heads * about.head_dim;
    if (check_matrix(l.query, "query", i, inner, dim) || check_matrix(l.key, "key", i, kv, dim) ||
        check_matrix(l.value, "value", i, kv, dim) || check_matrix(l.out, "out", i, dim, inner) ||
        (l.experts ? check_mixture(l, i, dim) : check_network({l.gate, l.up, l.down}, i, l.up.rows, dim)) ||
        (l.cross_query.data && (check_matrix(l.cross_query, "cross query", i, inner, dim) ||
                                check_matrix(l.cross_out, "cross out", i, dim, inner))))
        return -1;
    if (check_same_input(l.query, l.key, "query and key", i) || check_same_input(l.query, l.value, "query and value", i))
        return -1;
    if (l.rotary_frequencies && (l.rotary_pairs < 1 || 2 * l.rotary_pairs > about.head_dim))
        return fail("Layer %d turns %d pairs; heads of %d have 1 to %d.", i, l.rotary_pairs, about.head_dim, about.head_dim / 2);
    const bool gated = l.experts ? l.experts[0].gate.data : l.gate.data;
    if (l.activation < KEIFU_SILU || l.activation > KEIFU_CLAMPED || (l.activation == KEIFU_CLAMPED && !gated))
        return fail("Layer %d has activation %d.", i, l.activation);
    if (l.window < 0) return fail("Layer %d has a window of %d.", i, l.window);
    if (l.bidirectional && (l.window || l.sinks || l.cross_query.data))
        return fail("Layer %d sees all positions, and has a window, sinks or a cross-attention.", i);
    return 0;
}

int check(const KeifuModelDescription &about) {
    if (about.dim < 1 || about.n_heads < 1 || about.n_kv_heads < 1 || about.head_dim < 1 || about.vocab_size < 1 ||
        about.n_layers < 0 || about.context_length < 1)
        return fail("A model's sizes must be above 0.");
    if (about.head_dim > 256) return fail("Heads of %d are wider than the 256 that are supported.", about.head_dim);
    if (about.n_heads % about.n_kv_heads || about.n_heads / about.n_kv_heads > MAX_TASK_ROWS)
        return fail("%d heads cannot share %d kv heads.", about.n_heads, about.n_kv_heads);
    if (check_matrix(about.embedding, "embedding", -1, about.vocab_size, about.dim) ||
        check_matrix(about.head, "head", -1, about.vocab_size, about.dim))
        return -1;
    for (int i = 0; i < about.n_layers; i++)
        if (check_layer(about, about.layers[i], i)) return -1;
    return 0;
}

Cache plan_cache(const KeifuModelDescription &about, int n_blocks, int block_size) {
    Cache c{};
    c.n_blocks = n_blocks;
    c.block_size = block_size;
    c.float32 = about.embedding.format == KEIFU_F32;
    c.key_tile = round_up(about.head_dim, GROUP) * TILE * c.number();
    c.value_tile = (int64_t)block_size * TILE * c.number();
    c.values = block_size / TILE * c.key_tile;
    c.head = c.values + (about.head_dim + TILE - 1) / TILE * c.value_tile;
    c.block = about.n_kv_heads * c.head;
    c.layer = n_blocks * c.block;
    return c;
}

// ---- a model's parts ----

void copy_layers(Owned &m, const KeifuLayer *layers) {
    m.layers = m.arena.take<Layer>(m.about.n_layers);
    m.rotations = m.arena.take<Rotation>(m.about.n_layers);
    for (int i = 0; i < m.about.n_layers; i++) {
        Layer &layer = m.layers[i];
        static_cast<KeifuLayer &>(layer) = layers[i];
        if (layer.experts) {
            KeifuExpert *own = m.arena.take<KeifuExpert>(layer.n_experts);
            std::copy_n(layers[i].experts, layer.n_experts, own);
            layer.experts = own;
        }
        if (!layer.rotary_frequencies) continue;
        Rotation *rotation = m.rotations;
        Rotation *const end = rotation + m.n_rotations;
        while (rotation != end && (rotation->frequencies != layer.rotary_frequencies ||
                                   rotation->magnitude != layer.rotary_magnitude))
            rotation++;
        layer.rotation = rotation;
        if (rotation != end) continue;
        const int64_t n = (int64_t)m.max_tokens * layer.rotary_pairs;
        *rotation = {layer.rotary_frequencies, layer.rotary_pairs, layer.rotary_magnitude, m.arena.take<float>(n),
                     m.arena.take<float>(n)};
        m.n_rotations++;
    }
}

void make_buffers(Owned &m) {
    const KeifuModelDescription &about = m.about;
    const int64_t n = m.max_tokens;
    int64_t widest = 1;
    int64_t slots = 0;
    int64_t choices = 0;
    int experts = 0;
    for (int i = 0; i < about.n_layers; i++) {
        const Layer &l = m.layers[i];
        widest = std::max(widest, l.experts ? l.experts[0].up.rows : l.up.rows);
        if (!l.experts) continue;
        slots = std::max<int64_t>(slots, most_slots(l, m.max_tokens));
        choices = std::max(choices, n * l.n_chosen);
        experts = std::max(experts, l.n_experts);
    }
    m.width = round_up(about.dim, PAIR);
    m.query_width = round_up((int64_t)about.n_heads * about.head_dim, PAIR);
    m.kv_width = round_up((int64_t)about.n_kv_heads * about.head_dim, PAIR);
    for (float **buffer : {&m.x, &m.added}) *buffer = m.arena.take<float>(n * m.width);
    for (float **buffer : {&m.query, &m.attended}) *buffer = m.arena.take<float>(n * m.query_width);
    for (float **buffer : {&m.key, &m.value}) *buffer = m.arena.take<float>(n * m.kv_width);
    m.normed = make_rows(m.arena, n, about.dim);
    m.mixed = make_rows(m.arena, n, m.query_width);
    m.hidden = make_rows(m.arena, std::max(n, slots), widest);
    m.routed = make_rows(m.arena, slots, about.dim);
    m.score_width = round_up(experts, TILE);
    m.scores = m.arena.take<float>(n * m.score_width);
    m.shares = m.arena.take<float>(choices);
    m.chosen = m.arena.take<int32_t>(choices);
    m.slots = m.arena.take<int32_t>(slots);
    m.expert_tokens = m.arena.take<ExpertTokens>(experts);
    for (AttentionTasks *all : {&m.own, &m.cross}) all->tasks = m.arena.take<AttentionTask>(n);
    m.scratch = m.arena.take<Scratch>(MAX_THREADS);
}

// ---- a batch ----

constexpr int MAX_LAYER_PHASES = 23;  // of step.h: with norms after all sublayers, cross-attention, experts, and a prompt

int check_blocks(const Cache &c, const int32_t *table, int64_t n_positions) {
    for (int64_t i = 0; i * c.block_size < n_positions; i++)
        if (table[i] < 0 || table[i] >= c.n_blocks)
            return fail("Block %d is not one of the cache's %d.", table[i], c.n_blocks);
    return 0;
}

int check_sources(const KeifuModel &m, const KeifuBatch &b) {
    bool wanted = false;
    for (int i = 0; i < m.about.n_layers; i++) wanted = wanted || m.layers[i].cross_query.data || m.layers[i].bidirectional;
    if (wanted && b.n_sources < 1) return fail("This model looks at a source, and the batch has none.");
    for (int s = 0; s < b.n_sequences && b.n_sources; s++)
        if (b.sources[s] < 0 || b.sources[s] >= b.n_sources)
            return fail("Source %d is not one of the batch's %d.", b.sources[s], b.n_sources);
    for (int s = 0; s < b.n_sources; s++) {
        const int length = b.source_lengths[s];
        if (length < 1 || length > m.about.source_length || (length - 1) / m.cache.block_size >= b.source_width)
            return fail("A source of %d positions is beyond the %d of the model, or its block table of %d.", length,
                        m.about.source_length, b.source_width);
        if (check_blocks(m.cache, b.source_tables + (int64_t)s * b.source_width, length)) return -1;
    }
    return 0;
}

int check_batch(const KeifuModel &m, const KeifuBatch &b) {
    if (b.n_tokens < 1 || b.n_tokens > m.max_tokens)
        return fail("A batch of %d tokens; 1 to %d are taken.", b.n_tokens, m.max_tokens);
    for (int t = 0; t < b.n_tokens; t++) {
        if (!b.inputs && (b.tokens[t] < 0 || b.tokens[t] >= m.about.vocab_size))
            return fail("Token %d is not one of the vocabulary of %d.", b.tokens[t], m.about.vocab_size);
        if (b.positions[t] < 0 || b.positions[t] >= m.max_positions ||
            b.positions[t] / m.cache.block_size >= b.table_width)
            return fail("Position %d is beyond the %d of the model and its cache, or the block table of %d.", b.positions[t],
                        m.max_positions, b.table_width);
        if (b.sequences[t] < 0 || b.sequences[t] >= b.n_sequences)
            return fail("Sequence %d is not one of the batch's %d.", b.sequences[t], b.n_sequences);
        if (check_blocks(m.cache, b.block_tables + (int64_t)b.sequences[t] * b.table_width, b.positions[t] + 1)) return -1;
    }
    for (int i = 0; i < b.n_wanted; i++)
        if (b.wanted[i] < 0 || b.wanted[i] >= b.n_tokens)
            return fail("Logits of token %d are wanted; the batch has %d.", b.wanted[i], b.n_tokens);
    return check_sources(m, b);
}

// Cuts a batch into runs of at most so many tokens that have the same owner.
template <class Owner> void cut(AttentionTasks &all, int n, int most, Owner owner) {
    all.n = 0;
    for (int t = 0; t < n;) {
        const int first = t;
        while (t < n && owner(t) == owner(first) && t - first < most) t++;
        all.tasks[all.n++] = {first, t - first};
    }
}

// Keys and values of a source, [position, kv head, number], to where attention reads them.
template <class Number>
void store_source(const KeifuModel &m, int layer, const void *keys, const void *values, int n_positions, const int32_t *table) {
    const Cache &c = m.cache;
    const int head_dim = m.about.head_dim;
    const auto in_tile = [&](int column, int row) {
        return sizeof(Number) == 4 ? column * TILE + row : bfloat16_place(column, row);
    };
    const Number *key = (const Number *)keys;
    const Number *value = (const Number *)values;
    for (int position = 0; position < n_positions; position++) {
        const int place = position % c.block_size;
        uint8_t *head = c.data + layer * c.layer + table[position / c.block_size] * c.block;
        for (int h = 0; h < m.about.n_kv_heads; h++, head += c.head) {
            Number *key_tile = (Number *)(head + place / TILE * c.key_tile);
            Number *value_tile = (Number *)(head + c.values);
            for (int i = 0; i < head_dim; i++) key_tile[in_tile(i, place % TILE)] = *key++;
            for (int i = 0; i < head_dim; i++)
                value_tile[i / TILE * (c.value_tile / (int)sizeof(Number)) + in_tile(place, i % TILE)] = *value++;
        }
    }
}

}  // namespace
}  // namespace keifu

using namespace keifu;

int64_t keifu_cache_bytes(const KeifuModelDescription *about, int32_t n_blocks, int32_t block_size) {
    return plan_cache(*about, n_blocks, block_size).layer * about->n_layers;
}

KeifuModel *keifu_create(const KeifuModelDescription *about, int32_t n_blocks, int32_t block_size, int32_t max_tokens) {
    if (check(*about)) return nullptr;
    if (n_blocks < 1 || block_size < GROUP || block_size % GROUP || max_tokens < 1) {
        fail("A cache of %d blocks of %d positions, for %d tokens a forward: blocks must be multiples of 32.", n_blocks,
             block_size, max_tokens);
        return nullptr;
    }
    auto m = std::make_unique<Owned>();
    m->about = *about;
    m->max_tokens = max_tokens;
    m->cache = plan_cache(*about, n_blocks, block_size);
    m->max_positions = (int)std::min<int64_t>((int64_t)n_blocks * block_size, about->context_length);
    m->max_seen = std::max(m->max_positions, about->source_length);
    copy_layers(*m, about->layers);
    m->about.layers = nullptr;
    make_buffers(*m);
    m->cache.data = m->arena.take<uint8_t>(keifu_cache_bytes(about, n_blocks, block_size));
    if (m->arena.complete && give_scratch(*m, pool_threads())) return m.release();
    fail("There is not memory enough for a cache of %lld MB and the buffers of %d tokens.",
         (long long)(keifu_cache_bytes(about, n_blocks, block_size) >> 20), max_tokens);
    return nullptr;
}

void keifu_destroy(KeifuModel *model) {
    wait_for_pool();
    delete static_cast<Owned *>(model);
}

int32_t keifu_copy_block(KeifuModel *model, int32_t from, int32_t to) {
    const Cache &c = model->cache;
    if (from < 0 || from >= c.n_blocks || to < 0 || to >= c.n_blocks)
        return fail("Block %d cannot be copied to %d: the cache has %d.", from, to, c.n_blocks);
    for (int layer = 0; layer < model->about.n_layers; layer++) {
        uint8_t *base = c.data + layer * c.layer;
        std::memcpy(base + to * c.block, base + from * c.block, (size_t)c.block);
    }
    return 0;
}

int32_t keifu_read_block(KeifuModel *model, int32_t block, void *data) {
    const Cache &c = model->cache;
    if (check_blocks(c, &block, 1)) return -1;
    for (int layer = 0; layer < model->about.n_layers; layer++)
        std::memcpy((uint8_t *)data + layer * c.block, c.data + layer * c.layer + block * c.block, (size_t)c.block);
    return 0;
}

int32_t keifu_write_block(KeifuModel *model, int32_t block, const void *data) {
    const Cache &c = model->cache;
    if (check_blocks(c, &block, 1)) return -1;
    for (int layer = 0; layer < model->about.n_layers; layer++)
        std::memcpy(c.data + layer * c.layer + block * c.block, (const uint8_t *)data + layer * c.block, (size_t)c.block);
    return 0;
}

int32_t keifu_store_source(KeifuModel *model, int32_t layer, const void *keys, const void *values, int32_t n_positions,
                           const int32_t *table) {
    if (layer < 0 || layer >= model->about.n_layers) return fail("Layer %d is not one of %d.", layer, model->about.n_layers);
    if (check_blocks(model->cache, table, n_positions)) return -1;
    if (model->cache.float32) store_source<float>(*model, layer, keys, values, n_positions, table);
    else store_source<uint16_t>(*model, layer, keys, values, n_positions, table);
    return 0;
}

int32_t keifu_forward(KeifuModel *model, const KeifuBatch *batch) {
    if (check_batch(*model, *batch)) return -1;
    const int most = MAX_TASK_ROWS / (model->about.n_heads / model->about.n_kv_heads);
    const auto sequence = [&](int t) { return batch->sequences[t]; };
    cut(model->own, batch->n_tokens, most, sequence);
    cut(model->cross, batch->n_sources ? batch->n_tokens : 0, most, [&](int t) { return batch->sources[sequence(t)]; });
    bool whole = true;
    for (int i = 1; i < model->own.n; i++)
        whole = whole && sequence(model->own.tasks[i].first) != sequence(model->own.tasks[i - 1].first);
    const Forward forward{model, *batch, model->own, model->cross, whole};
    const auto ready = [&](int threads) { return give_scratch(static_cast<Owned &>(*model), threads); };
    const auto work = [forward, use = kernels().forward](Walk &walk) { use(forward, walk); };
    if (run_on_pool(model->about.n_layers * MAX_LAYER_PHASES + 4, ready, work)) return 0;
    return fail("There is not memory enough for the threads' buffers.");
}
