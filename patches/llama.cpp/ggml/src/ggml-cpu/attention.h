// Flash attention over f16 K and V for ggml's CPU backend: decode steps, and two loops of prompts.
//
// For a decode step ggml takes one query head and one cell at a time: it looks at every cell's mask by
// itself, converts K and V again for every head of a group, and brings its f16 sums to f32 and back for
// every cell. Here the cells that a token sees are collected first (in a cache that many sequences
// share most are another's), BLOCK at a time; the query heads of one K head share each converted row;
// sums stay in f32 registers; and the next rows are fetched early. What a token sees is divided into
// pieces of a size that depends on nothing but their number, and the pieces' sums are put together in
// their order: a token's attention is the same bits alone and in a batch, on any number of threads.
//
// Included by ops.cpp (attention.patch), whose ggml_compute_forward_flash_attn_ext_f16 asks forward()
// first. Prompts (GGML_FA_TILE_Q tokens and more) and all that is not supported stay with ggml.
#pragma once

#if defined(__AVX512F__)
#    define KVF_WIDTH 16
#    define KVF_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#    define KVF_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#    define KVF_WIDTH 8
#    define KVF_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#    define KVF_ODD 1, 3, 5, 7, 9, 11, 13, 15
#elif defined(__ARM_NEON) && defined(__aarch64__)
#    define KVF_WIDTH 4
#    define KVF_EVEN 0, 2, 4, 6
#    define KVF_ODD 1, 3, 5, 7
#endif

#if defined(KVF_WIDTH) && defined(__GNUC__)
#    define KVF_SUPPORTED
#endif

namespace attention {
namespace {

#ifdef KVF_SUPPORTED

constexpr int W     = KVF_WIDTH; // floats of a register
constexpr int BLOCK = 64;        // cells between two looks at the maximum
constexpr int PIECE = 2;         // blocks, at least, that a thread takes of one token
constexpr int HEADS = 4;         // query heads taken together, at most

typedef float vec __attribute__((vector_size(4 * KVF_WIDTH)));
typedef float vec_at __attribute__((vector_size(4 * KVF_WIDTH), aligned(4), may_alias)); // anywhere

inline vec load(const ggml_fp16_t * p) {
#    if defined(__AVX512F__)
    return (vec) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
#    elif defined(__AVX2__)
    return (vec) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
#    else
    return (vec) vcvt_f32_f16(vld1_f16((const __fp16 *) p));
#    endif
}

inline vec  load(const float * p) { return *(const vec_at *) p; }
inline void store(float * p, vec x) { *(vec_at *) p = x; }

inline vec   largest(vec a, vec b) { return a > b ? a : b; }
inline float largest(vec x) {
    float most = x[0];
    for (int i = 1; i < W; i++) {
        most = std::max(most, x[i]);
    }
    return most;
}

// n is a multiple of W.
inline float largest(const float * x, int n) {
    vec top = load(x);
    for (int i = W; i < n; i += W) {
        top = largest(top, load(x + i));
    }
    return largest(top);
}

// Neighbours added up: those of a, then those of b.
inline vec pairs(vec a, vec b) {
#    ifdef __clang__
    return __builtin_shufflevector(a, b, KVF_EVEN) + __builtin_shufflevector(a, b, KVF_ODD);
#    else
    typedef int lanes __attribute__((vector_size(4 * KVF_WIDTH)));
    return __builtin_shuffle(a, b, lanes{ KVF_EVEN }) + __builtin_shuffle(a, b, lanes{ KVF_ODD });
#    endif
}

// Lane c of the result is the sum of x[c]'s lanes; x is used up.
inline vec sums(vec * x) {
    for (int n = W; n > 1; n /= 2) {
        for (int i = 0; i < n / 2; i++) {
            x[i] = pairs(x[2 * i], x[2 * i + 1]);
        }
    }
    return x[0];
}

// The cells that one token sees.
struct row {
    const ggml_fp16_t * mask; // nullptr: all
    int64_t             n;

    static constexpr uint64_t HIDDEN = 0xFC00; // -infinity

    bool sees(int64_t cell) const { return !mask || mask[cell] != HIDDEN; }

    bool none_of_four(int64_t cell) const {
        uint64_t four;
        return mask && cell + 4 <= n && (memcpy(&four, mask + cell, 8), four == HIDDEN * 0x0001000100010001u);
    }

    int64_t count() const { return count(0, n); }
    int64_t count(int64_t from, int64_t to) const {
        if (!mask) {
            return to - from;
        }
        int64_t seen = 0;
        for (int64_t i = from; i < to; i++) {
            seen += mask[i] != HIDDEN;
        }
        return seen;
    }

    // The cell ahead of which `rank` are seen.
    int64_t find(int64_t rank) const {
        for (int64_t from = 0; from < n; from += BLOCK) {
            const int64_t to = std::min(from + BLOCK, n), seen = count(from, to);
            if (seen <= rank) {
                rank -= seen;
                continue;
            }
            for (int64_t i = from;; i++) {
                if (sees(i) && rank-- == 0) {
                    return i;
                }
            }
        }
        return n;
    }
};

// Cells taken together.
struct block {
    int64_t cells[BLOCK];
    float   bias[BLOCK]; // their mask
    int     n;
    bool    biased;      // any of it is not 0

    // The next that are seen from `at` on; `at` moves on.
    void take(const row & seen, int64_t & at) {
        biased = false;
        for (n = 0; at < seen.n && n < BLOCK; at++) {
            if (seen.none_of_four(at)) {
                at += 3;
            } else if (seen.sees(at)) {
                biased |= seen.mask && seen.mask[at];
                bias[n]    = seen.mask ? GGML_CPU_FP16_TO_FP32(seen.mask[at]) : 0.0f;
                cells[n++] = at;
            }
        }
        std::fill(cells + n, cells + GGML_PAD(n, W), n ? cells[0] : 0);
    }
};

struct shape {
    const ggml_tensor * q, * k, * v, * mask, * sinks;
    int64_t DK, DV, heads, group; // of a head; of q, and of them for one head of K
    float   scale, max_bias, softcap;

    explicit shape(const ggml_tensor * t)
        : q(t->src[0]), k(t->src[1]), v(t->src[2]), mask(t->src[3]), sinks(t->src[4]), DK(k->ne[0]), DV(v->ne[0]),
          heads(q->ne[2]), group(heads / k->ne[2]) {
        memcpy(&scale, (const float *) t->op_params + 0, sizeof(float));
        memcpy(&max_bias, (const float *) t->op_params + 1, sizeof(float));
        memcpy(&softcap, (const float *) t->op_params + 2, sizeof(float));
        scale /= softcap != 0.0f ? softcap : 1.0f;
    }

    bool one_mask() const { return !mask || mask->ne[2] == 1; } // for all heads

    bool supported() const {
        return q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 && DK % W == 0 &&
               DV % W == 0 && k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] && q->ne[1] < GGML_FA_TILE_Q &&
               q->nb[0] == sizeof(float) && k->nb[0] == sizeof(ggml_fp16_t) && v->nb[0] == sizeof(ggml_fp16_t) &&
               most_pieces() >= 4;
    }

    // Of the scratch memory that ggml gives each thread (ggml_graph_plan), floats.
    int64_t scratch() const {
        return GGML_FA_TILE_Q * (DK + DV + 2 * GGML_FA_TILE_KV) + GGML_FA_TILE_KV * (DK + DV);
    }

    // The first head of the i-th share of `split`; whole groups, if there are as many.
    int64_t share(int64_t i, int64_t split) const {
        const int64_t unit = split * group <= heads ? group : 1;
        return i * (heads / unit) / split * unit;
    }

    int64_t sum_size() const { return 2 + DV; } // floats

    // For whose sums two threads have room; a thread has it for two pieces.
    int64_t most_pieces() const { return 2 * scratch() / (heads * sum_size()); }

    int64_t blocks_of_piece(int64_t seen) const {
        const int64_t all = most_pieces() * BLOCK;
        return std::max((int64_t) PIECE, (seen + all - 1) / all);
    }

    float slope(int64_t head) const { // ALiBi
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int64_t half = 1 << (int) floorf(log2f(heads));
        return head < half ? powf(powf(2.0f, -max_bias / half), head + 1) :
                             powf(powf(2.0f, -max_bias / 2.0f / half), 2 * (head - half) + 1);
    }

    row seen(int64_t token, int64_t head, int64_t stream) const {
        const char * at = mask ? (const char *) mask->data + token * mask->nb[1] +
                                     head % mask->ne[2] * mask->nb[2] + stream % mask->ne[3] * mask->nb[3] :
                                 nullptr;
        return { (const ggml_fp16_t *) at, k->ne[1] };
    }
};

// What has been summed up for one query head: running maximum, sum of weights, weighted values.
struct sum {
    float * at;

    float & max() const { return at[0]; }
    float & weight() const { return at[1]; }
    float * values() const { return at + 2; }

    void clear(int64_t DV) const {
        max() = -INFINITY;
        memset(at + 1, 0, (1 + DV) * sizeof(float));
    }

    void rise(float to, int64_t DV) const {
        if (to > max()) {
            const float less = expf(max() - to);
            ggml_vec_scale_f32(DV, values(), less);
            weight() *= less;
            max() = to;
        }
    }

    void add(const sum & other, int64_t DV) const {
        if (other.weight() != 0.0f) {
            rise(other.max(), DV);
            const float less = expf(other.max() - max());
            weight() += other.weight() * less;
            ggml_vec_mad_f32(DV, values(), other.values(), less);
        }
    }

    // A sink has weight and no value.
    void add_sink(float sink, int64_t DV) const {
        rise(sink, DV);
        weight() += expf(sink - max());
    }
};

// Rows of K or V; those of a cache that is larger than the CPU's come late unless they are asked for early.
struct rows {
    const char * data;
    size_t       stride;
    int64_t      size; // of a row, bytes

    const ggml_fp16_t * at(int64_t cell) const { return (const ggml_fp16_t *) (data + cell * stride); }

    void fetch(int64_t cell) const {
        for (int64_t i = 0; i < size; i += CACHE_LINE_SIZE) {
            __builtin_prefetch(data + cell * stride + i);
        }
    }
};

// s[h][c] = q[h] . K[cells[c]]; V of the same cells is fetched.
template <int G>
void dots(const rows & k, const rows & v, const block & b, const float * const * q, int64_t DK, float (*s)[BLOCK]) {
    for (int from = 0; from < b.n; from += W) {
        vec dot[G][W];
        for (int c = 0; c < W; c++) {
            const ggml_fp16_t * at = k.at(b.cells[from + c]);
            vec acc[G] = {};
            v.fetch(b.cells[from + c]);
            for (int64_t d = 0; d < DK; d += W) {
                const vec x = load(at + d);
                for (int h = 0; h < G; h++) {
                    acc[h] += x * load(q[h] + d);
                }
            }
            for (int h = 0; h < G; h++) {
                dot[h][c] = acc[h];
            }
        }
        for (int h = 0; h < G; h++) {
            store(s[h] + from, sums(dot[h]));
        }
    }
}

// out[h][d..] += sum over c of s[h][c] * V[cells[c]][d..], J registers wide.
template <int G, int J>
void weigh(const rows & v, const block & b, const float (*s)[BLOCK], int64_t d, const sum * out) {
    vec acc[G][J];
    for (int h = 0; h < G; h++) {
        for (int j = 0; j < J; j++) {
            acc[h][j] = load(out[h].values() + d + j * W);
        }
    }
    for (int c = 0; c < b.n; c++) {
        const ggml_fp16_t * at = v.at(b.cells[c]) + d;
        for (int j = 0; j < J; j++) {
            const vec x = load(at + j * W);
            for (int h = 0; h < G; h++) {
                acc[h][j] += x * s[h][c];
            }
        }
    }
    for (int h = 0; h < G; h++) {
        for (int j = 0; j < J; j++) {
            store(out[h].values() + d + j * W, acc[h][j]);
        }
    }
}

// Scores become weights, relative to the sum's maximum, which rises to theirs.
inline void soften(const shape & a, const block & b, int64_t head, float * s, const sum & out) {
    ggml_vec_scale_f32(b.n, s, a.scale);
    if (a.softcap != 0.0f) {
        ggml_vec_tanh_f32(b.n, s, s);
        ggml_vec_scale_f32(b.n, s, a.softcap);
    }
    if (b.biased) {
        ggml_vec_mad_f32(b.n, s, b.bias, a.slope(head));
    }
    std::fill(s + b.n, s + BLOCK, -INFINITY);
    out.rise(largest(s, BLOCK), a.DV);
    out.weight() += ggml_vec_soft_max_f32(BLOCK, s, s, out.max());
}

// G query heads from `head` on, of one token, over a block; `next` is the one after it.
template <int G>
void attend(const shape & a, const block & b, const block & next, int64_t token, int64_t head, int64_t stream,
            const sum * out) {
    const float * q[G];
    for (int h = 0; h < G; h++) {
        q[h] = (const float *) ((const char *) a.q->data + token * a.q->nb[1] + (head + h) * a.q->nb[2] +
                                stream * a.q->nb[3]);
    }
    const int64_t khead = head / a.group, kstream = stream / (a.q->ne[3] / a.k->ne[3]);
    const rows    k{ (const char *) a.k->data + khead * a.k->nb[2] + kstream * a.k->nb[3], a.k->nb[1], 2 * a.DK };
    const rows    v{ (const char *) a.v->data + khead * a.v->nb[2] + kstream * a.v->nb[3], a.v->nb[1], 2 * a.DV };

    float s[G][BLOCK];
    dots<G>(k, v, b, q, a.DK, s);
    for (int c = 0; c < next.n; c++) {
        k.fetch(next.cells[c]);
    }
    for (int h = 0; h < G; h++) {
        soften(a, b, head + h, s[h], out[h]);
    }
    constexpr int J = G == 1 ? 4 : 2; // enough sums at a time to keep the multipliers busy
    int64_t       d = 0;
    for (; d + J * W <= a.DV; d += J * W) {
        weigh<G, J>(v, b, s, d, out);
    }
    for (; d < a.DV; d += W) {
        weigh<G, 1>(v, b, s, d, out);
    }
}

// The query heads [first, last) of one token over a piece that begins at `at`, which moves on to its
// end; `sums` holds one for each head.
inline void attend_piece(const shape & a, const row & seen, int64_t blocks, int64_t & at, int64_t token,
                         int64_t stream, int64_t first, int64_t last, float * sums) {
    const auto of = [&](int64_t head) { return sum{ sums + (head - first) * a.sum_size() }; };
    for (int64_t head = first; head < last; head++) {
        of(head).clear(a.DV);
    }
    block   two[2], *b = two, *next = two + 1;
    int64_t ahead = at;
    next->take(seen, ahead);
    while (blocks-- > 0 && next->n) {
        std::swap(b, next);
        at = ahead;
        next->take(seen, ahead);
        for (int64_t head = first, g; head < last; head += g) {
            g = std::min({ (int64_t) HEADS, last - head, a.group - head % a.group });
            sum out[HEADS];
            for (int i = 0; i < g; i++) {
                out[i] = of(head + i);
            }
            const auto attend_group = g == 4 ? attend<4> : g == 3 ? attend<3> : g == 2 ? attend<2> : attend<1>;
            attend_group(a, *b, *next, token, head, stream, out);
        }
    }
    if (next->n == 0) {
        at = seen.n;
    }
}

inline void finish(const shape & a, ggml_tensor * dst, int64_t token, int64_t head, int64_t stream, const sum & all) {
    if (a.sinks) {
        all.add_sink(((const float *) a.sinks->data)[head], a.DV);
    }
    ggml_vec_scale_f32(a.DV, all.values(), all.weight() == 0.0f ? 0.0f : 1.0f / all.weight());
    memcpy((char *) dst->data + head * dst->nb[1] + token * dst->nb[2] + stream * dst->nb[3], all.values(),
           a.DV * sizeof(float));
}

// Into how many shares the heads of each of n are divided, so that there is work for all threads: by
// heads of K as long as that is enough, as its rows are then converted once.
inline int64_t shares(const ggml_compute_params * params, const shape & a, int64_t n) {
    const int64_t kheads = a.heads / a.group, wanted = (4 * params->nth + n - 1) / n;
    return std::min(wanted, n * kheads < 2 * params->nth ? a.heads : kheads);
}

// f(i) for every i below n, by the thread that comes to it.
template <typename F> void share(const ggml_compute_params * params, int64_t n, F f) {
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = params->ith; i < n; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        f(i);
    }
}

// One token: the threads share its pieces, whose sums lie in all threads' scratch memory together.
inline void forward_one(const ggml_compute_params * params, ggml_tensor * dst, const shape & a) {
    const row     seen   = a.seen(0, 0, 0);
    const int64_t all    = seen.count();
    const int64_t blocks = a.blocks_of_piece(all), size = blocks * BLOCK, pieces = (all + size - 1) / size;
    const int64_t split = pieces ? shares(params, a, pieces) : 0;
    const auto    of     = [&](int64_t piece, int64_t head) {
        return (float *) params->wdata + (piece * a.heads + head) * a.sum_size();
    };
    share(params, pieces * split, [&](int64_t i) {
        const int64_t piece = i / split, first = a.share(i % split, split), last = a.share(i % split + 1, split);
        int64_t       at = seen.find(piece * size);
        attend_piece(a, seen, blocks, at, 0, 0, first, last, of(piece, first));
    });
    ggml_barrier(params->threadpool);
    for (int64_t head = params->ith; head < a.heads; head += params->nth) {
        const sum total{ of(0, head) };
        if (pieces == 0) {
            total.clear(a.DV);
        }
        for (int64_t piece = 1; piece < pieces; piece++) {
            total.add(sum{ of(piece, head) }, a.DV);
        }
        finish(a, dst, 0, head, 0, total);
    }
}

// Any number of tokens: a thread takes one token's heads, or some of them, at a time.
inline void forward_many(const ggml_compute_params * params, ggml_tensor * dst, const shape & a) {
    const int64_t tokens = a.q->ne[1], all = tokens * a.q->ne[3];
    const int64_t split = a.one_mask() ? shares(params, a, all) : a.heads; // heads that see the same cells
    float *       own   = (float *) params->wdata + params->ith * (a.scratch() + CACHE_LINE_SIZE_F32);

    share(params, all * split, [&](int64_t i) {
        const int64_t token = i / split % tokens, stream = i / split / tokens, part = i % split;
        const int64_t first = a.share(part, split), last = a.share(part + 1, split);
        const row     seen   = a.seen(token, first, stream);
        const int64_t blocks = a.blocks_of_piece(seen.count());
        float *       piece  = own + (last - first) * a.sum_size();
        int64_t       at     = 0;
        attend_piece(a, seen, blocks, at, token, stream, first, last, own);
        while (at < seen.n) {
            attend_piece(a, seen, blocks, at, token, stream, first, last, piece);
            for (int64_t j = 0; j < (last - first) * a.sum_size(); j += a.sum_size()) {
                sum{ own + j }.add(sum{ piece + j }, a.DV);
            }
        }
        for (int64_t head = first; head < last; head++) {
            finish(a, dst, token, head, stream, sum{ own + (head - first) * a.sum_size() });
        }
    });
}

#else

inline float largest(const float * x, int n) {
    float most;
    ggml_vec_max_f32(n, &most, x);
    return most;
}

#endif

// A row of a prompt's masks as floats; false: nothing is seen.
inline bool read_mask(const ggml_fp16_t * mask, int n, float slope, float * to) {
    int   i       = 0;
    float largest = -INFINITY;
#ifdef KVF_SUPPORTED
    vec top = largest - vec{};
    for (; i + W <= n; i += W) {
        const vec x = load(mask + i) * slope;
        top         = attention::largest(top, x);
        store(to + i, x);
    }
    largest = attention::largest(top);
#endif
    for (; i < n; i++) {
        to[i]   = slope * GGML_CPU_FP16_TO_FP32(mask[i]);
        largest = std::max(largest, to[i]);
    }
    return largest != -INFINITY;
}

// False: not done, ggml's own loops are to do it.
inline bool forward(const ggml_compute_params * params, ggml_tensor * dst) {
#ifdef KVF_SUPPORTED
    const shape a(dst);
    if (params->use_ref || !a.supported()) {
        return false;
    }
    if (a.q->ne[1] == 1 && a.q->ne[3] == 1 && a.one_mask() && params->nth > 1) {
        forward_one(params, dst, a);
    } else {
        forward_many(params, dst, a);
    }
    return true;
#else
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
    return false;
#endif
}

} // namespace
} // namespace attention
