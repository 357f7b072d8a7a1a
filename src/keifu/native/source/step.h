// A forward pass, phase by phase. All threads run this; what they deal out among themselves is tokens (norms), chunks
// of four tiles (products) and kv heads (attention).

#pragma once
#include "attention.h"
#include "packing.h"

namespace KEIFU_NAMESPACE {

constexpr int OWN_ROWS = 1;  // so few rows each thread normalises for itself, which costs less than waiting for another

INLINE v16 activate(int which, v16 x) {
    switch (which) {
    case KEIFU_SILU: return x * sigmoid(x);
    case KEIFU_GELU_TANH: return x * sigmoid(1.5957691216f * x * (1.f + 0.044715f * x * x));
    case KEIFU_GELU_ERF: return 0.5f * x * (1.f + erf(x * 0.70710678f));
    default: return max(x, v16{});
    }
}

INLINE v16 bias(const KeifuMatrix &w, int64_t column) {
    const int64_t left = w.rows - column;
    return w.bias && left > 0 ? load_first(w.bias + column, left < TILE ? (int)left : TILE) : v16{};
}

struct Target {  // a matrix of a product and where its results go
    const KeifuMatrix *matrix;
    float *out;
    int64_t stride;
};

class Step {
  public:
    Step(const Forward &f, Walk &walk) : f(f), m(*f.model), walk(walk), scratch(m.scratch[walk.thread]) {}

    void run() {
        walk.deal(f.batch.n_tokens, [&](int t) { embed(t); });
        for (int index = 0; index < m.about.n_layers; index++) {
            const Layer &layer = m.layers[index];
            attention(index);
            if (layer.parallel) hidden(layer, layer.attention_norm);
            add_attended(layer.out, layer.post_attention_norm);
            norm_after(layer, layer.attention_norm);
            if (layer.cross_query.data) cross_attention(index);
            if (!layer.parallel) hidden(layer, before(layer, layer.feedforward_norm));
            add_hidden(layer);
            norm_after(layer, layer.feedforward_norm);
        }
        logits();
    }

  private:
    void embed(int t) {
        const KeifuModelDescription &about = m.about;
        float *x = m.x + t * m.width;
        const int position = f.batch.positions[t];
        if (f.batch.inputs) memcpy(x, f.batch.inputs + (int64_t)t * about.dim, about.dim * sizeof(float));
        else unpack(about.embedding.format, (const uint8_t *)about.embedding.data, about.dim, f.batch.tokens[t], x);
        for (int i = 0; i < about.dim; i++) x[i] *= about.embedding_scale;
        if (about.positions)
            for (int i = 0; i < about.dim; i++) x[i] += about.positions[(int64_t)position * about.dim + i];
        for (const Rotation *r = m.rotations; r < m.rotations + m.n_rotations; r++)
            for (int i = 0; i < r->pairs; i++) {
                const float angle = (float)position * r->frequencies[i];
                r->cos[(int64_t)t * r->pairs + i] = __builtin_cosf(angle) * r->magnitude;
                r->sin[(int64_t)t * r->pairs + i] = __builtin_sinf(angle) * r->magnitude;
            }
    }

    void attention(int index) {
        const Layer &layer = m.layers[index];
        const Target targets[] = {{&layer.query, m.query, m.query_width},
                                  {&layer.key, m.key, m.kv_width},
                                  {&layer.value, m.value, m.kv_width}};
        multiply(targets, 3, before(layer, layer.attention_norm));
        norm_all_heads(layer.all_queries_norm, m.query, m.query_width, m.about.n_heads);
        norm_all_heads(layer.all_keys_norm, m.key, m.kv_width, m.about.n_kv_heads);
        const int heads = m.about.n_kv_heads;
        if (!f.whole_spans || layer.bidirectional)
            walk.deal(f.batch.n_tokens * heads,
                      [&](int i) { store_token(f, index, i / heads, i % heads, scratch.heads); });
        attend_all(index, layer.bidirectional);
    }

    // Normalises the queries or keys of each token over all heads together.
    void norm_all_heads(const KeifuNorm &norm, float *rows, int64_t width, int heads) {
        if (!norm.kind) return;
        walk.deal(f.batch.n_tokens,
                  [&](int t) { normalise(norm, rows + t * width, rows + t * width, heads * m.about.head_dim); });
    }

    void cross_attention(int index) {
        const Layer &layer = m.layers[index];
        const Target target = {&layer.cross_query, m.query, m.query_width};
        multiply(&target, 1, before(layer, layer.cross_norm));
        attend_all(index, true);
        add_attended(layer.cross_out, {});
        norm_after(layer, layer.cross_norm);
    }

    void attend_all(int index, bool cross) {
        const int heads = m.about.n_kv_heads;
        const AttentionTasks &all = cross ? f.cross : f.own;
        walk.deal(all.n * heads, [&](int i) {
            const AttentionTask &task = all.tasks[i / heads];
            const int head = i % heads;
            for (int t = 0; t < task.n_tokens && f.whole_spans && !cross; t++)
                store_token(f, index, task.first + t, head, scratch.heads);
            const bool fetches = head + 1 < heads && task.n_tokens == 1;
            if (m.cache.float32) attend<true>(f, index, task, cross, head, fetches, scratch);
            else attend<false>(f, index, task, cross, head, fetches, scratch);
        });
    }

    void add_attended(const KeifuMatrix &out, const KeifuNorm &norm) {
        const int inner = m.about.n_heads * m.about.head_dim;
        const auto mix = [&](const Rows &rows, int r) {
            encode_row(rows, input_of(out.format), r, m.attended + r * m.query_width, inner);
        };
        from_rows(m.mixed, f.batch.n_tokens, mix, n_chunks(out), [&](const Rows &rows, int chunk) {
            add_products(out, norm, rows, chunk);
        });
        add_normed(norm);
    }

    void hidden(const Layer &layer, const KeifuNorm &norm) {
        if (layer.experts) return hidden_of_experts(layer, norm);
        const KeifuExpert network = {layer.gate, layer.up, layer.down};
        const auto make = [&](const Rows &rows, int r) { norm_row(rows, input_of(layer.up.format), r, norm, r); };
        from_rows(m.normed, f.batch.n_tokens, make, n_chunks(layer.up), [&](const Rows &rows, int chunk) {
            activate_rows(layer, network, rows, chunk, 0, 0, f.batch.n_tokens);
        });
    }

    // Each used expert goes through its own tokens. How many experts that is only the threads with a task may ask, so the
    // tasks are as many as there can be.
    void hidden_of_experts(const Layer &layer, const KeifuNorm &norm) {
        const Target scores = {&layer.router, m.scores, m.score_width};
        multiply(&scores, 1, norm);
        walk.deal(f.batch.n_tokens, [&](int t) { choose(layer, t); });
        walk.deal(1, [&](int) { sort_by_expert(layer); });
        const bool alone = f.batch.n_tokens == 1;  // then all experts have the same row
        const KeifuMatrix &up = layer.experts[0].up;
        const int chunks = n_chunks(up);
        const auto make = [&](const Rows &rows, int r) {
            if (alone || m.slots[r] >= 0) norm_row(rows, input_of(up.format), r, norm, alone ? 0 : m.slots[r] / layer.n_chosen);
        };
        const int n = alone ? 1 : most_slots(layer, f.batch.n_tokens);
        from_rows(m.routed, n, make, most_used(layer, f.batch.n_tokens) * chunks, [&](const Rows &rows, int task) {
            const ExpertTokens &e = m.expert_tokens[task / chunks];
            activate_rows(layer, layer.experts[e.expert], rows, task % chunks, alone ? 0 : e.first, e.first, e.n);
        });
    }

    // The experts of a token: those with the highest scores, and their shares.
    void choose(const Layer &layer, int t) {
        float *scores = m.scores + t * m.score_width;
        float *shares = m.shares + t * layer.n_chosen;
        float highest = scores[0];
        for (int e = 1; e < layer.n_experts; e++) highest = scores[e] > highest ? scores[e] : highest;
        float total = 0;
        for (int e = 0; e < layer.n_experts && !layer.normalised; e++) total += __builtin_expf(scores[e] - highest);
        for (int i = 0; i < layer.n_chosen; i++) {
            int best = 0;
            for (int e = 1; e < layer.n_experts; e++) best = scores[e] > scores[best] ? e : best;
            m.chosen[t * layer.n_chosen + i] = best;
            shares[i] = __builtin_expf(scores[best] - highest);
            if (layer.normalised) total += shares[i];
            scores[best] = -__builtin_inff();
        }
        for (int i = 0; i < layer.n_chosen; i++) shares[i] /= total;
    }

    void sort_by_expert(const Layer &layer) {
        const int n = f.batch.n_tokens * layer.n_chosen;
        const int slots = most_slots(layer, f.batch.n_tokens);
        for (int s = 0; s < slots; s++) m.slots[s] = -1;
        ExpertTokens *next = m.expert_tokens;
        int used = 0;
        for (int e = 0; e < layer.n_experts; e++) {
            const int first = used;
            for (int i = 0; i < n; i++)
                if (m.chosen[i] == e) m.slots[used++] = i;
            if (used > first) *next++ = {e, first, used - first};
            used = (int)round_up(used, TILE);  // where the kernels' blocks of rows may begin
        }
        ExpertTokens *const end = m.expert_tokens + most_used(layer, f.batch.n_tokens);
        while (next < end) *next++ = {0, 0, 0};
    }

    // In the order of the experts, whatever other tokens there are.
    void add_experts(const Layer &layer, int chunk) {
        const KeifuNorm &norm = layer.post_feedforward_norm;
        float *const out = norm.kind ? m.added : m.x;
        for (int t = 0; t < f.batch.n_tokens && norm.kind; t++) memset(out + t * m.width + chunk * OUT, 0, OUT * sizeof(float));
        const ExpertTokens *const end = m.expert_tokens + most_used(layer, f.batch.n_tokens);
        for (const ExpertTokens *e = m.expert_tokens; e < end; e++) {
            const KeifuMatrix &down = layer.experts[e->expert].down;
            const Rows rows = hidden_of(layer.experts[e->expert].up);
            over_chunk(down, rows, e->first, e->n, chunk, [&](int r, int64_t column, const float *results) {
                float *y = out + m.slots[r] / layer.n_chosen * m.width + column;
                store(y, load(y) + m.shares[m.slots[r]] * (load(results) + bias(down, column)));
            });
        }
    }

    void add_hidden(const Layer &layer) {
        walk.deal(n_chunks(layer.experts ? layer.experts[0].down : layer.down), [&](int chunk) {
            if (layer.experts) add_experts(layer, chunk);
            else add_products(layer.down, layer.post_feedforward_norm, hidden_of(layer.up), chunk);
        });
        add_normed(layer.post_feedforward_norm);
    }

    void logits() {
        const KeifuMatrix &head = m.about.head;
        const auto make = [&](const Rows &rows, int r) {
            norm_row(rows, input_of(head.format), r, m.about.norm, f.batch.wanted[r]);
        };
        from_rows(m.normed, f.batch.n_wanted, make, n_chunks(head), [&](const Rows &rows, int chunk) {
            const float cap = m.about.logit_softcap;
            over_chunk(head, rows, 0, f.batch.n_wanted, chunk, [&](int r, int64_t column, const float *results) {
                v16 y = (load(results) + bias(head, column)) * m.about.logit_scale;
                if (cap > 0) y = cap * (2.f * sigmoid(y * (2.f / cap)) - 1.f);
                float *out = f.batch.logits + (int64_t)r * head.rows + column;
                if (head.rows - column >= TILE) return store(out, y);
                for (int i = 0; i < head.rows - column; i++) out[i] = y[i];
            });
        });
    }

    // ---- rows ----

    // Makes the rows of a product's input and works through its chunks. Few rows are made by each thread for itself.
    template <class Make, class Work> void from_rows(const Rows &shared, int n, Make make, int chunks, Work work) {
        if (n > OWN_ROWS) {
            walk.deal((n + 1) / 2, [&](int pair) {  // a cache line tells of two rows
                for (int r = 2 * pair; r < n && r < 2 * pair + 2; r++) make(shared, r);
            });
            walk.deal(chunks, [&](int chunk) { work(shared, chunk); });
            return;
        }
        Rows own = scratch.own;
        own.columns = shared.columns;
        bool made = false;
        walk.deal(chunks, [&](int chunk) {
            for (int r = 0; r < n && !made; r++) make(own, r);
            made = true;
            work(own, chunk);
        });
    }

    // The hidden numbers, in rows as wide as they are of this matrix.
    Rows hidden_of(const KeifuMatrix &up) {
        Rows rows = m.hidden;
        rows.columns = round_up(up.rows, PAIR);
        return rows;
    }

    void encode_row(const Rows &rows, Input kind, int r, const float *x, int n) {
        int i = 0;
        for (; i + PAIR <= n; i += PAIR) encode(rows, kind, r, i / PAIR, x + i);
        if (i == n) return;
        float rest[PAIR] = {};
        memcpy(rest, x + i, (n - i) * sizeof(float));
        encode(rows, kind, r, i / PAIR, rest);
    }

    void norm_row(const Rows &rows, Input kind, int r, const KeifuNorm &norm, int t) {
        normalise(norm, m.x + t * m.width, scratch.row, m.about.dim);
        encode_row(rows, kind, r, scratch.row, m.about.dim);
    }

    // ---- products ----

    int n_chunks(const KeifuMatrix &w) { return (int)((n_tiles(w.rows) + CHUNK - 1) / CHUNK); }

    // Calls take(row, column, its 16 results) for n rows from `first` on, of a chunk of a matrix.
    template <class Take> void over_chunk(const KeifuMatrix &w, const Rows &rows, int first, int n, int chunk, Take take) {
        for (int row = first; row < first + n; row += BLOCK_ROWS) {
            const int here = first + n - row < BLOCK_ROWS ? first + n - row : BLOCK_ROWS;
            const int count = multiply_chunk(w, chunk, rows, row, here, scratch.out);
            for (int r = 0; r < here; r++)
                for (int s = 0; s < count; s++)
                    take(row + r, ((int64_t)chunk * CHUNK + s) * TILE, scratch.out + r * OUT + s * TILE);
        }
    }

    // The product of a chunk of a matrix (its last tile again where there are fewer); gives the number of its tiles.
    // Behind them stand those of the next chunk.
    int multiply_chunk(const KeifuMatrix &w, int64_t chunk, const Rows &rows, int row, int n, float *out) {
        const int64_t bytes = tile_bytes(w.format, w.columns);
        const int64_t left = n_tiles(w.rows) - chunk * CHUNK;
        const int count = left < CHUNK ? (int)left : CHUNK;
        const uint8_t *tiles[2 * CHUNK];
        for (int s = 0; s < CHUNK; s++) {
            tiles[s] = (const uint8_t *)w.data + (chunk * CHUNK + (s < count ? s : count - 1)) * bytes;
            tiles[CHUNK + s] = tiles[s] + CHUNK * bytes;
        }
        product(w.format, tiles, rows, row, n, scratch, out);
        return count;
    }

    // Products of several matrices with the normalised stream.
    void multiply(const Target *targets, int n, const KeifuNorm &norm) {
        int chunks = 0;
        for (int i = 0; i < n; i++) chunks += n_chunks(*targets[i].matrix);
        const Input kind = input_of(targets[0].matrix->format);
        const auto make = [&](const Rows &rows, int r) { norm_row(rows, kind, r, norm, r); };
        from_rows(m.normed, f.batch.n_tokens, make, chunks, [&](const Rows &rows, int chunk) {
            const Target *target = targets;
            for (; chunk >= n_chunks(*target->matrix); target++) chunk -= n_chunks(*target->matrix);
            over_chunk(*target->matrix, rows, 0, f.batch.n_tokens, chunk, [&](int r, int64_t column, const float *results) {
                store(target->out + r * target->stride + column, load(results) + bias(*target->matrix, column));
            });
        });
    }

    // A chunk of a sublayer's last product: to the stream, or beside it where a norm comes first.
    void add_products(const KeifuMatrix &w, const KeifuNorm &norm, const Rows &rows, int chunk) {
        over_chunk(w, rows, 0, f.batch.n_tokens, chunk, [&](int r, int64_t column, const float *results) {
            const v16 y = load(results) + bias(w, column);
            float *x = m.x + r * m.width + column;
            if (norm.kind) store(m.added + r * m.width + column, y);
            else store(x, load(x) + y);
        });
    }

    // The norm of a sublayer's input, where it stands there.
    KeifuNorm before(const Layer &layer, const KeifuNorm &norm) { return layer.norm_after ? KeifuNorm{} : norm; }

    // The stream after a sublayer, where the norm stands there.
    void norm_after(const Layer &layer, const KeifuNorm &norm) {
        if (!layer.norm_after) return;
        walk.deal(f.batch.n_tokens, [&](int r) { normalise(norm, m.x + r * m.width, m.x + r * m.width, m.about.dim); });
    }

    void add_normed(const KeifuNorm &norm) {
        if (!norm.kind) return;
        walk.deal(f.batch.n_tokens, [&](int r) {
            normalise(norm, m.added + r * m.width, scratch.row, m.about.dim);
            for (int i = 0; i < m.about.dim; i++) m.x[r * m.width + i] += scratch.row[i];
        });
    }

    // One chunk of a network's hidden numbers, for n rows from `from` on; they go to the rows from `to` on.
    void activate_rows(const Layer &layer, const KeifuExpert &network, const Rows &rows, int chunk, int from, int to, int n) {
        for (int done = 0; done < n; done += BLOCK_ROWS)
            activate_block(layer, network, rows, chunk, from + done, to + done, n - done < BLOCK_ROWS ? n - done : BLOCK_ROWS);
    }

    void activate_block(const Layer &layer, const KeifuExpert &network, const Rows &rows, int chunk, int from, int to, int n) {
        const bool gated = network.gate.data != nullptr;
        float *made = scratch.out;
        float *gates = scratch.out + BLOCK_ROWS * OUT;
        if (gated) multiply_chunk(network.gate, chunk, rows, from, n, gates);
        const int count = multiply_chunk(network.up, chunk, rows, from, n, made);
        for (int r = 0; r < n; r++, made += OUT, gates += OUT) {
            for (int s = 0; s < CHUNK; s++) {
                const int64_t column = (int64_t)(chunk * CHUNK + s) * TILE;
                v16 y = load(made + s * TILE) + bias(network.up, column);
                if (gated) y = gate_by(layer, load(gates + s * TILE) + bias(network.gate, column), y);
                else y = activate(layer.activation, y);
                store(made + s * TILE, s < count ? y : v16{});
            }
            encode(hidden_of(network.up), input_of(network.down.format), to + r, chunk, made);
        }
    }

    v16 gate_by(const Layer &layer, v16 gate, v16 y) {
        if (layer.activation != KEIFU_CLAMPED) return activate(layer.activation, gate) * y;
        gate = clamp(gate, -3e38f, layer.gate_limit);
        return (clamp(y, -layer.gate_limit, layer.gate_limit) + 1.f) * gate * sigmoid(layer.gate_slope * gate);
    }

    const Forward &f;
    const KeifuModel &m;
    Walk &walk;
    Scratch &scratch;
};

static void forward(const Forward &f, Walk &walk) {
#if defined(__x86_64__)
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);  // numbers below 1e-38 are zeros, as they are in AMX's tiles
#endif
#if defined(__AMX_TILE__)
    TileConfig others;  // other libraries on this thread rely on the tiles as they configured them
    _tile_storeconfig(&others);
    configured = 0;
#endif
    Step(f, walk).run();
#if defined(__AMX_TILE__)
    _tile_loadconfig(&others);
#endif
#if defined(__x86_64__)
    _mm_setcsr(mode);
#endif
}

}  // namespace KEIFU_NAMESPACE
