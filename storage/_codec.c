/* The quantizers' arithmetic, fast: storage/quantizers.py says what it computes and is its
 * reference.
 *
 * Both give the same bits: the butterflies run in the same order and nothing is contracted to FMA
 * (-ffp-contract=off). Vectors are taken 16 at a time and transposed, so that every inner loop
 * runs over 16 independent lanes and the compiler vectorises all of it (AVX2, AVX-512, NEON). The
 * number of bits is a constant wherever it matters. Little-endian, as the format. The GIL is
 * released while it computes, and results go where the caller says, so that threads can fill one
 * array together.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define MAX_DIM 1024

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

#define MAX_HALF 65504.0f

typedef float tile_t[LANES];
typedef uint16_t halves_t[LANES];
typedef float vector_t __attribute__((vector_size(LANES * sizeof(float)), may_alias));
typedef uint32_t words_t __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef int32_t ints_t __attribute__((vector_size(LANES * sizeof(int32_t))));

INLINE float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
INLINE uint32_t to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

/* Both are computed: a branch around a float operation would keep a loop from being vectorised. */
INLINE uint32_t choose(int condition, uint32_t yes, uint32_t no) {
    uint32_t mask = -(uint32_t)condition;
    return (yes & mask) | (no & ~mask);
}

INLINE float smaller(float a, float b) {
    return from_bits(choose(a < b, to_bits(a), to_bits(b)));
}

INLINE float larger(float a, float b) {
    return from_bits(choose(a > b, to_bits(a), to_bits(b)));
}

INLINE float half_to_float(uint16_t h) {
    uint32_t magnitude = h & 0x7fff;
    float scaled = from_bits(magnitude << 13) * 0x1p112f; /* subnormals come out right */
    uint32_t bits = choose(magnitude >= 0x7c00, magnitude << 13 | 0x7f800000, to_bits(scaled));
    return from_bits(bits | (uint32_t)(h & 0x8000) << 16);
}

INLINE uint16_t float_to_half(float f) { /* round to nearest, ties to even; saturates */
    uint32_t x = to_bits(f), sign = x >> 16 & 0x8000, max_half = 0x477fe000;
    x &= 0x7fffffff;
    x = x < max_half ? x : max_half;
    uint32_t normal = (x + 0xc8000fff + (x >> 13 & 1)) >> 13;
    uint32_t subnormal = to_bits(from_bits(x) + 0.5f) - 0x3f000000;
    uint32_t half = choose(x < 0x38800000, subnormal, normal);
    return (uint16_t)(half | sign);
}

/* dim x LANES values, every run of `block` along dim times the Hadamard matrix of 1 and -1. Two
 * steps of butterflies at once: half the memory traffic, the same sums. */
INLINE void rotate(tile_t *tiles, int dim, int block) {
    vector_t *x = (vector_t *)tiles;
    int h = 1;
    for (; 2 * h < block; h *= 4)
        for (int i = 0; i < dim; i += 4 * h)
            for (int j = i; j < i + h; j++) {
                vector_t a = x[j], b = x[j + h], c = x[j + 2 * h], d = x[j + 3 * h];
                vector_t ab = a + b, cd = c + d, a_b = a - b, c_d = c - d;
                x[j] = ab + cd;
                x[j + h] = a_b + c_d;
                x[j + 2 * h] = ab - cd;
                x[j + 3 * h] = a_b - c_d;
            }
    for (; h < block; h *= 2)
        for (int i = 0; i < dim; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                vector_t a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
}

/* 4 x 4 halves, one row in each word. */
INLINE void transpose(uint64_t r[4]) {
    uint64_t t;
    for (int i = 0; i < 2; i++) {
        t = (r[i] >> 32 ^ r[i + 2]) & 0xffffffffu;
        r[i] ^= t << 32;
        r[i + 2] ^= t;
    }
    for (int i = 0; i < 4; i += 2) {
        t = (r[i] >> 16 ^ r[i + 1]) & 0x0000ffff0000ffffu;
        r[i] ^= t << 16;
        r[i + 1] ^= t;
    }
}

/* Rows of dim halves to columns of LANES; lanes that have no row repeat the last one. */
INLINE void load_columns(const uint16_t *rows, int lanes, int dim, halves_t *columns) {
    for (int l = 0; l < LANES; l += 4)
        for (int d = 0; d < dim; d += 4) {
            uint64_t r[4];
            for (int i = 0; i < 4; i++)
                memcpy(&r[i], rows + (l + i < lanes ? l + i : lanes - 1) * dim + d, 8);
            transpose(r);
            for (int i = 0; i < 4; i++) memcpy(&columns[d + i][l], &r[i], 8);
        }
}

INLINE void store_rows(halves_t *columns, int lanes, int dim, uint16_t *rows) {
    for (int l = 0; l < lanes; l += 4)
        for (int d = 0; d < dim; d += 4) {
            uint64_t r[4];
            for (int i = 0; i < 4; i++) memcpy(&r[i], &columns[d + i][l], 8);
            transpose(r);
            for (int i = 0; i < 4 && l + i < lanes; i++) memcpy(rows + (l + i) * dim + d, &r[i], 8);
        }
}

/* The range of every lane's group: what is subtracted, what is multiplied by, and what is stored. */
INLINE void fit(tile_t *v, int group, int levels, float *bias, float *inverse, uint16_t *scales,
                uint16_t *biases) {
    tile_t low, high;
    memcpy(low, v[0], sizeof low);
    memcpy(high, v[0], sizeof high);
    for (int d = 1; d < group; d++)
        for (int l = 0; l < LANES; l++) {
            low[l] = smaller(v[d][l], low[l]);
            high[l] = larger(v[d][l], high[l]);
        }
    for (int l = 0; l < LANES; l++) {
        low[l] = smaller(larger(low[l], -MAX_HALF), MAX_HALF) + 0.0f; /* -0 becomes 0 */
        high[l] = smaller(larger(high[l], -MAX_HALF), MAX_HALF) + 0.0f;
        scales[l] = float_to_half((high[l] - low[l]) / (float)levels);
        biases[l] = float_to_half(low[l]);
        float scale = half_to_float(scales[l]);
        inverse[l] = scale != 0.0f ? 1.0f / scale : 0.0f;
        bias[l] = half_to_float(biases[l]);
    }
}

INLINE void encode(const uint16_t *in, Py_ssize_t n, int dim, int bits, int group, int block,
                   float scale, uint32_t *codes, uint16_t *scales, uint16_t *biases) {
    _Alignas(64) tile_t x[MAX_DIM];
    _Alignas(64) halves_t halves[MAX_DIM];
    int n_groups = dim / group, per_word = 32 / bits, n_words = dim / per_word;
    uint32_t levels = (1u << bits) - 1;
    for (Py_ssize_t first = 0; first < n; first += LANES) {
        int lanes = n - first < LANES ? (int)(n - first) : LANES;
        load_columns(in + first * dim, lanes, dim, halves);
        for (int d = 0; d < dim; d++)
            for (int l = 0; l < LANES; l++) x[d][l] = half_to_float(halves[d][l]);
        rotate(x, dim, block);
        for (int d = 0; d < dim; d++)
            for (int l = 0; l < LANES; l++) x[d][l] *= scale;
        for (int g = 0; g < n_groups; g++) {
            tile_t bias, inverse;
            halves_t s, b;
            tile_t *v = x + g * group;
            fit(v, group, (int)levels, bias, inverse, s, b);
            for (int l = 0; l < lanes; l++) {
                scales[(first + l) * n_groups + g] = s[l];
                biases[(first + l) * n_groups + g] = b[l];
            }
            for (int w = 0; w < group / per_word; w++) {
                uint32_t word[LANES] = {0};
                for (int i = 0; i < per_word; i++)
                    for (int l = 0; l < LANES; l++) {
                        float q = (v[w * per_word + i][l] - bias[l]) * inverse[l];
                        q = smaller(larger(q, 0.0f), (float)levels);
                        /* adding 2^23 rounds to an integer, ties to even, in the low bits */
                        word[l] |= (to_bits(q + 0x1p23f) & levels) << (bits * i);
                    }
                for (int l = 0; l < lanes; l++)
                    codes[(first + l) * n_words + g * (group / per_word) + w] = word[l];
            }
        }
    }
}

INLINE void decode(const uint32_t *codes, const uint16_t *scales, const uint16_t *biases,
                   Py_ssize_t n, int dim, int bits, int group, int block, float scale,
                   uint16_t *out) {
    _Alignas(64) tile_t x[MAX_DIM];
    _Alignas(64) halves_t halves[MAX_DIM];
    int n_groups = dim / group, per_word = 32 / bits, n_words = dim / per_word;
    uint32_t levels = (1u << bits) - 1;
    for (Py_ssize_t first = 0; first < n; first += LANES) {
        int lanes = n - first < LANES ? (int)(n - first) : LANES;
        for (int g = 0; g < n_groups; g++) {
            vector_t s = {0}, b = {0}, *v = (vector_t *)(x + g * group);
            for (int l = 0; l < lanes; l++) {
                s[l] = half_to_float(scales[(first + l) * n_groups + g]);
                b[l] = half_to_float(biases[(first + l) * n_groups + g]);
            }
            for (int w = 0; w < group / per_word; w++) {
                words_t word = {0};
                for (int l = 0; l < lanes; l++)
                    word[l] = codes[(first + l) * n_words + g * (group / per_word) + w];
                for (int i = 0; i < per_word; i++) {
                    ints_t q = (ints_t)(word >> (bits * i) & levels);
                    v[w * per_word + i] = __builtin_convertvector(q, vector_t) * s + b;
                }
            }
        }
        rotate(x, dim, block);
        for (int d = 0; d < dim; d++)
            for (int l = 0; l < LANES; l++) halves[d][l] = float_to_half(x[d][l] * scale);
        store_rows(halves, lanes, dim, out + first * dim);
    }
}

#define ENCODE(bits)                                                                              \
    CLONES static void encode_##bits(const uint16_t *in, Py_ssize_t n, int dim, int group,        \
                                     int block, float scale, uint32_t *codes, uint16_t *scales,   \
                                     uint16_t *biases) {                                          \
        encode(in, n, dim, bits, group, block, scale, codes, scales, biases);                     \
    }
#define DECODE(bits)                                                                              \
    CLONES static void decode_##bits(const uint32_t *codes, const uint16_t *scales,               \
                                     const uint16_t *biases, Py_ssize_t n, int dim, int group,    \
                                     int block, float scale, uint16_t *out) {                     \
        decode(codes, scales, biases, n, dim, bits, group, block, scale, out);                    \
    }
ENCODE(4)
ENCODE(8)
DECODE(4)
DECODE(8)

/* 1/sqrt(block), rounded once from double, as numpy's float32(block ** -0.5). */
static float rotation_scale(int block) {
    double root = 1.0;
    while (block >= 4) { root /= 2.0; block /= 4; }
    return (float)(block == 2 ? root * 0.70710678118654757 : root);
}

/* What the functions take: vectors of dim halves, and their stored fields. */
typedef struct {
    Py_buffer vectors, codes, scales, biases;
    int bits, group, block;
} call_t;

static void release(call_t *c) {
    PyBuffer_Release(&c->vectors);
    PyBuffer_Release(&c->codes);
    PyBuffer_Release(&c->scales);
    PyBuffer_Release(&c->biases);
}

/* The length of the vectors, or -1 with an exception set. */
static Py_ssize_t check(const call_t *c) {
    const Py_buffer *v = &c->vectors;
    Py_ssize_t dim = v->ndim ? v->shape[v->ndim - 1] : 0;
    int bits = c->bits, group = c->group, block = c->block;
    if (v->itemsize != 2 || c->codes.itemsize != 4) {
        PyErr_SetString(PyExc_ValueError, "vectors are (..., D) float16, their codes uint32");
        return -1;
    }
    if ((bits != 4 && bits != 8) || dim <= 0 || dim > MAX_DIM || group <= 0 || group % 8 ||
        dim % group || block <= 0 || (block & (block - 1)) || dim % block) {
        PyErr_Format(PyExc_ValueError, "dim %zd, %d bits, group %d, block %d do not fit", dim, bits,
                     group, block);
        return -1;
    }
    Py_ssize_t n = v->len / (2 * dim);
    if (c->codes.len != n * dim * bits / 8 || c->scales.len != n * (dim / group) * 2 ||
        c->biases.len != c->scales.len) {
        PyErr_SetString(PyExc_ValueError, "codes, scales or biases do not fit the vectors");
        return -1;
    }
    return dim;
}

/* "O" and not "y*": only a buffer that was asked for its shape has one. */
static int take(PyObject *args, int encoding, call_t *c) {
    PyObject *arrays[4];
    Py_buffer *buffers[4] = {&c->vectors, &c->codes, &c->scales, &c->biases};
    memset(c, 0, sizeof *c); /* releasing a buffer of zeros does nothing */
    if (!PyArg_ParseTuple(args, "OOOOiii", &arrays[0], &arrays[1], &arrays[2], &arrays[3],
                          &c->bits, &c->group, &c->block))
        return 0;
    for (int i = 0; i < 4; i++) {
        int flags = PyBUF_ND | PyBUF_C_CONTIGUOUS;
        if (encoding == (i > 0)) flags |= PyBUF_WRITABLE;
        if (PyObject_GetBuffer(arrays[i], buffers[i], flags)) return 0;
    }
    return check(c) >= 0;
}

static PyObject *py_encode(PyObject *self, PyObject *args) {
    call_t c;
    (void)self;
    int ready = take(args, 1, &c);
    if (ready) {
        int dim = (int)c.vectors.shape[c.vectors.ndim - 1];
        Py_BEGIN_ALLOW_THREADS
        (c.bits == 4 ? encode_4 : encode_8)(c.vectors.buf, c.vectors.len / (2 * dim), dim, c.group,
                                            c.block, rotation_scale(c.block), c.codes.buf,
                                            c.scales.buf, c.biases.buf);
        Py_END_ALLOW_THREADS
    }
    release(&c);
    if (!ready) return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_decode(PyObject *self, PyObject *args) {
    call_t c;
    (void)self;
    int ready = take(args, 0, &c);
    if (ready) {
        int dim = (int)c.vectors.shape[c.vectors.ndim - 1];
        Py_BEGIN_ALLOW_THREADS
        (c.bits == 4 ? decode_4 : decode_8)(c.codes.buf, c.scales.buf, c.biases.buf,
                                            c.vectors.len / (2 * dim), dim, c.group, c.block,
                                            rotation_scale(c.block), c.vectors.buf);
        Py_END_ALLOW_THREADS
    }
    release(&c);
    if (!ready) return NULL;
    Py_RETURN_NONE;
}

/* The four-bit codes of vectors <-> ggml's Q4_1 blocks; actors/engines/llama_q4.py is the reference
 * and says how a block looks. A word's nibbles become the low halves of eight bytes, and back. */
#define BLOCK_BYTES 20
#define BYTES 0x00ff00ff00ff00ffu
#define PAIRS 0x0000ffff0000ffffu

INLINE uint64_t widen(uint32_t w) { /* bytes to every second byte */
    uint64_t x = (w | (uint64_t)w << 16) & PAIRS;
    return (x | x << 8) & BYTES;
}

INLINE uint32_t narrow(uint64_t x) {
    x = ((x & BYTES) | (x & BYTES) >> 8) & PAIRS;
    return (uint32_t)(x | x >> 16);
}

INLINE uint64_t spread(uint32_t w) {
    uint64_t x = widen(w);
    return (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
}

INLINE uint32_t gather(uint64_t x) {
    x &= 0x0f0f0f0f0f0f0f0fu;
    return narrow(x | x >> 4);
}

INLINE void put_block(uint8_t *block, uint64_t first, uint64_t second, const uint16_t *scale,
                      const uint16_t *bias) {
    memcpy(block, scale, 2);
    memcpy(block + 2, bias, 2);
    memcpy(block + 4, &first, 8);
    memcpy(block + 12, &second, 8);
}

static void to_q4_1(const uint32_t *codes, const uint16_t *scales, const uint16_t *biases,
                    Py_ssize_t n_blocks, Py_ssize_t per_vector, Py_ssize_t per_scale,
                    int interleaved, uint8_t *out) {
    for (Py_ssize_t i = 0; i < n_blocks; i++, out += BLOCK_BYTES) {
        const uint16_t *scale = scales + i / per_scale, *bias = biases + i / per_scale;
        if (!interleaved) {
            const uint32_t *w = codes + 4 * i;
            put_block(out, spread(w[0]) | spread(w[2]) << 4, spread(w[1]) | spread(w[3]) << 4,
                      scale, bias);
            continue;
        }
        Py_ssize_t in_vector = i % per_vector;
        const uint32_t *x = codes + 4 * (i - in_vector) + 2 * in_vector, *y = x + 2 * per_vector;
        uint64_t even = spread(x[0]) | spread(x[1]) << 4, odd = spread(y[0]) | spread(y[1]) << 4;
        put_block(out, widen((uint32_t)even) | widen((uint32_t)odd) << 8,
                  widen((uint32_t)(even >> 32)) | widen((uint32_t)(odd >> 32)) << 8, scale, bias);
    }
}

/* One scale and one bias per block. */
static void from_q4_1(const uint8_t *in, Py_ssize_t n_blocks, Py_ssize_t per_vector,
                      int interleaved, uint32_t *codes, uint16_t *scales, uint16_t *biases) {
    for (Py_ssize_t i = 0; i < n_blocks; i++, in += BLOCK_BYTES) {
        uint64_t a, b;
        memcpy(&scales[i], in, 2);
        memcpy(&biases[i], in + 2, 2);
        memcpy(&a, in + 4, 8);
        memcpy(&b, in + 12, 8);
        if (!interleaved) {
            uint32_t *w = codes + 4 * i;
            w[0] = gather(a), w[1] = gather(b), w[2] = gather(a >> 4), w[3] = gather(b >> 4);
            continue;
        }
        Py_ssize_t in_vector = i % per_vector;
        uint32_t *x = codes + 4 * (i - in_vector) + 2 * in_vector, *y = x + 2 * per_vector;
        uint64_t even = narrow(a) | (uint64_t)narrow(b) << 32;
        uint64_t odd = narrow(a >> 8) | (uint64_t)narrow(b >> 8) << 32;
        x[0] = gather(even), x[1] = gather(even >> 4);
        y[0] = gather(odd), y[1] = gather(odd >> 4);
    }
}

/* The blocks are where the other calls have vectors. */
static PyObject *py_q4_1(PyObject *args, int filling) {
    PyObject *arrays[4];
    call_t c;
    Py_buffer *buffers[4] = {&c.vectors, &c.codes, &c.scales, &c.biases};
    int interleaved, ready = 0;
    memset(&c, 0, sizeof c);
    if (!PyArg_ParseTuple(args, "OOOOp", &arrays[0], &arrays[1], &arrays[2], &arrays[3],
                          &interleaved))
        return NULL;
    for (int i = 0; i < 4; i++) {
        int flags = PyBUF_ND | PyBUF_C_CONTIGUOUS;
        if (filling == (i == 0)) flags |= PyBUF_WRITABLE;
        if (PyObject_GetBuffer(arrays[i], buffers[i], flags)) goto end;
    }
    Py_ssize_t words = c.codes.ndim ? c.codes.shape[c.codes.ndim - 1] : 0;
    Py_ssize_t n_blocks = c.codes.len / 16, n_scales = c.scales.len / 2;
    if (c.codes.itemsize != 4 || words % (interleaved ? 8 : 4) || c.codes.len % 16 ||
        c.vectors.len != n_blocks * BLOCK_BYTES || c.biases.len != c.scales.len ||
        (n_blocks && (!n_scales || n_blocks % n_scales)) || (!filling && n_scales != n_blocks)) {
        PyErr_SetString(PyExc_ValueError, "codes, scales or biases do not fit the blocks");
        goto end;
    }
    ready = 1;
    Py_BEGIN_ALLOW_THREADS
    if (!n_blocks)
        ;
    else if (filling)
        to_q4_1(c.codes.buf, c.scales.buf, c.biases.buf, n_blocks, words / 4, n_blocks / n_scales,
                interleaved, c.vectors.buf);
    else
        from_q4_1(c.vectors.buf, n_blocks, words / 4, interleaved, c.codes.buf, c.scales.buf,
                  c.biases.buf);
    Py_END_ALLOW_THREADS
end:
    release(&c);
    if (!ready) return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_to_q4_1(PyObject *self, PyObject *args) {
    (void)self;
    return py_q4_1(args, 1);
}

static PyObject *py_from_q4_1(PyObject *self, PyObject *args) {
    (void)self;
    return py_q4_1(args, 0);
}

static PyMethodDef methods[] = {
    {"encode", py_encode, METH_VARARGS, "vectors -> codes, scales, biases; bits, group, block"},
    {"decode", py_decode, METH_VARARGS, "vectors <- codes, scales, biases; bits, group, block"},
    {"to_q4_1", py_to_q4_1, METH_VARARGS, "blocks <- codes, scales, biases; interleaved"},
    {"from_q4_1", py_from_q4_1, METH_VARARGS, "blocks -> codes, scales, biases; interleaved"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_codec", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__codec(void) { return PyModule_Create(&module); }
