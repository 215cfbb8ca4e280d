/* The q4 codec's arithmetic, fast: storage/codec.py says what it computes and is its reference.
 *
 * Both give the same bits: the butterflies run in the same order and nothing is contracted to FMA
 * (-ffp-contract=off). Vectors are taken 16 at a time and transposed, so that every inner loop
 * runs over 16 independent lanes and the compiler vectorises all of it (AVX2, AVX-512, NEON).
 * Little-endian, as the format. The GIL is released while it computes.
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

INLINE uint16_t float_to_half(float f) { /* round to nearest, ties to even */
    uint32_t x = to_bits(f), sign = x >> 16 & 0x8000;
    x &= 0x7fffffff;
    uint32_t normal = (x + 0xc8000fff + (x >> 13 & 1)) >> 13;
    uint32_t subnormal = to_bits(from_bits(x) + 0.5f) - 0x3f000000;
    uint32_t half = choose(x < 0x38800000, subnormal, normal);
    half = choose(x >= 0x47800000, choose(x > 0x7f800000, 0x7e00, 0x7c00), half);
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

CLONES static void encode(const uint16_t *in, Py_ssize_t n, int dim, int group, int block,
                          float scale, uint32_t *codes, uint16_t *scales, uint16_t *biases) {
    _Alignas(64) tile_t x[MAX_DIM];
    _Alignas(64) halves_t halves[MAX_DIM];
    int n_groups = dim / group;
    for (Py_ssize_t first = 0; first < n; first += LANES) {
        int lanes = n - first < LANES ? (int)(n - first) : LANES;
        load_columns(in + first * dim, lanes, dim, halves);
        for (int d = 0; d < dim; d++)
            for (int l = 0; l < LANES; l++) x[d][l] = half_to_float(halves[d][l]);
        rotate(x, dim, block);
        for (int d = 0; d < dim; d++)
            for (int l = 0; l < LANES; l++) x[d][l] *= scale;
        for (int g = 0; g < n_groups; g++) {
            tile_t low, high, inverse;
            tile_t *v = x + g * group;
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
                uint16_t s = float_to_half((high[l] - low[l]) / 15.0f), b = float_to_half(low[l]);
                float sf = half_to_float(s);
                inverse[l] = sf != 0.0f ? 1.0f / sf : 0.0f;
                low[l] = half_to_float(b);
                if (l < lanes) {
                    scales[(first + l) * n_groups + g] = s;
                    biases[(first + l) * n_groups + g] = b;
                }
            }
            for (int w = 0; w < group / 8; w++) {
                uint32_t word[LANES] = {0};
                for (int i = 0; i < 8; i++)
                    for (int l = 0; l < LANES; l++) {
                        float q = (v[w * 8 + i][l] - low[l]) * inverse[l];
                        q = smaller(larger(q, 0.0f), 15.0f);
                        /* adding 2^23 rounds to an integer, ties to even, in the low bits */
                        word[l] |= (to_bits(q + 0x1p23f) & 15) << (4 * i);
                    }
                for (int l = 0; l < lanes; l++)
                    codes[(first + l) * (dim / 8) + g * (group / 8) + w] = word[l];
            }
        }
    }
}

CLONES static void decode(const uint32_t *codes, const uint16_t *scales, const uint16_t *biases,
                          Py_ssize_t n, int dim, int group, int block, float scale,
                          uint16_t *out) {
    _Alignas(64) tile_t x[MAX_DIM];
    _Alignas(64) halves_t halves[MAX_DIM];
    int n_groups = dim / group;
    for (Py_ssize_t first = 0; first < n; first += LANES) {
        int lanes = n - first < LANES ? (int)(n - first) : LANES;
        for (int g = 0; g < n_groups; g++) {
            tile_t s = {0}, b = {0};
            for (int l = 0; l < lanes; l++) {
                s[l] = half_to_float(scales[(first + l) * n_groups + g]);
                b[l] = half_to_float(biases[(first + l) * n_groups + g]);
            }
            for (int w = 0; w < group / 8; w++) {
                uint32_t word[LANES] = {0};
                for (int l = 0; l < lanes; l++)
                    word[l] = codes[(first + l) * (dim / 8) + g * (group / 8) + w];
                for (int i = 0; i < 8; i++)
                    for (int l = 0; l < LANES; l++)
                        x[g * group + w * 8 + i][l] =
                            (float)(int32_t)(word[l] >> (4 * i) & 15) * s[l] + b[l];
            }
        }
        rotate(x, dim, block);
        for (int d = 0; d < dim; d++)
            for (int l = 0; l < LANES; l++) halves[d][l] = float_to_half(x[d][l] * scale);
        store_rows(halves, lanes, dim, out + first * dim);
    }
}

/* 1/sqrt(block), rounded once from double, as numpy's float32(block ** -0.5). */
static float rotation_scale(int block) {
    double root = 1.0;
    while (block >= 4) { root /= 2.0; block /= 4; }
    return (float)(block == 2 ? root * 0.70710678118654757 : root);
}

static int check(Py_ssize_t dim, int group, int block) {
    if (dim <= 0 || dim > MAX_DIM || group <= 0 || group % 8 || dim % group || block <= 0 ||
        (block & (block - 1)) || dim % block) {
        PyErr_Format(PyExc_ValueError, "q4: dim %zd, group %d, block %d do not fit", dim, group,
                     block);
        return 0;
    }
    return 1;
}

static PyObject *py_encode(PyObject *self, PyObject *args) {
    PyObject *array;
    Py_buffer in;
    int group, block;
    if (!PyArg_ParseTuple(args, "Oii", &array, &group, &block)) return NULL;
    if (PyObject_GetBuffer(array, &in, PyBUF_ND | PyBUF_C_CONTIGUOUS)) return NULL;
    PyObject *result = NULL, *codes = NULL, *scales = NULL, *biases = NULL;
    (void)self;
    if (in.ndim != 2 || in.itemsize != 2) {
        PyErr_SetString(PyExc_ValueError, "encode_q4 takes an (N, D) float16 array");
        goto done;
    }
    Py_ssize_t n = in.shape[0], dim = in.shape[1];
    if (!check(dim, group, block)) goto done;
    codes = PyBytes_FromStringAndSize(NULL, n * dim / 2);
    scales = PyBytes_FromStringAndSize(NULL, n * (dim / group) * 2);
    biases = PyBytes_FromStringAndSize(NULL, n * (dim / group) * 2);
    if (!codes || !scales || !biases) goto done;
    Py_BEGIN_ALLOW_THREADS
    encode(in.buf, n, (int)dim, group, block, rotation_scale(block),
           (uint32_t *)PyBytes_AS_STRING(codes), (uint16_t *)PyBytes_AS_STRING(scales),
           (uint16_t *)PyBytes_AS_STRING(biases));
    Py_END_ALLOW_THREADS
    result = PyTuple_Pack(3, codes, scales, biases);
done:
    PyBuffer_Release(&in);
    Py_XDECREF(codes);
    Py_XDECREF(scales);
    Py_XDECREF(biases);
    return result;
}

static PyObject *py_decode(PyObject *self, PyObject *args) {
    PyObject *array, *out = NULL;
    Py_buffer codes, scales, biases;
    int group, block;
    if (!PyArg_ParseTuple(args, "Oy*y*ii", &array, &scales, &biases, &group, &block)) return NULL;
    if (PyObject_GetBuffer(array, &codes, PyBUF_ND | PyBUF_C_CONTIGUOUS)) {
        PyBuffer_Release(&scales);
        PyBuffer_Release(&biases);
        return NULL;
    }
    (void)self;
    if (codes.ndim < 1 || codes.itemsize != 4) {
        PyErr_SetString(PyExc_ValueError, "decode_q4 takes (..., D/8) uint32 codes");
        goto done;
    }
    Py_ssize_t dim = codes.shape[codes.ndim - 1] * 8;
    if (!check(dim, group, block)) goto done;
    Py_ssize_t n = codes.len / (dim / 2);
    if (scales.len != n * (dim / group) * 2 || biases.len != scales.len) {
        PyErr_SetString(PyExc_ValueError, "decode_q4: scales or biases do not fit the codes");
        goto done;
    }
    out = PyBytes_FromStringAndSize(NULL, n * dim * 2);
    if (!out) goto done;
    Py_BEGIN_ALLOW_THREADS
    decode(codes.buf, scales.buf, biases.buf, n, (int)dim, group, block, rotation_scale(block),
           (uint16_t *)PyBytes_AS_STRING(out));
    Py_END_ALLOW_THREADS
done:
    PyBuffer_Release(&codes);
    PyBuffer_Release(&scales);
    PyBuffer_Release(&biases);
    return out;
}

static PyMethodDef methods[] = {
    {"encode_q4", py_encode, METH_VARARGS, "(N, D) float16, group, block -> codes, scales, biases"},
    {"decode_q4", py_decode, METH_VARARGS, "codes, scales, biases, group, block -> float16 bytes"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_codec", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__codec(void) { return PyModule_Create(&module); }
