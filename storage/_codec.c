/* The q4 codec's arithmetic, fast: storage/codec.py says what it computes and is its reference.
 *
 * Both give the same bits: the butterflies run in the same order and nothing is contracted to FMA
 * (-ffp-contract=off). Vectors are taken 16 at a time and transposed, so that every inner loop
 * runs over 16 independent lanes and the compiler vectorises all of it (AVX2, AVX-512, NEON).
 * The GIL is released while it computes.
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

typedef float tile_t[LANES];

INLINE float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
INLINE uint32_t to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

INLINE float half_to_float(uint16_t h) {
    uint32_t magnitude = h & 0x7fff;
    float scaled = from_bits(magnitude << 13) * 0x1p112f; /* subnormals come out right */
    uint32_t bits = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : to_bits(scaled);
    return from_bits(bits | (uint32_t)(h & 0x8000) << 16);
}

INLINE uint16_t float_to_half(float f) { /* round to nearest, ties to even */
    uint32_t x = to_bits(f), sign = x >> 16 & 0x8000;
    x &= 0x7fffffff;
    uint32_t normal = (x + 0xc8000fff + (x >> 13 & 1)) >> 13;
    uint32_t subnormal = to_bits(from_bits(x) + 0.5f) - 0x3f000000;
    uint32_t half = x < 0x38800000 ? subnormal : normal;
    half = x >= 0x47800000 ? (x > 0x7f800000 ? 0x7e00 : 0x7c00) : half;
    return (uint16_t)(half | sign);
}

/* dim x LANES values, every run of `block` along dim times the orthonormal Hadamard matrix. */
INLINE void rotate(tile_t *x, int dim, int block, float scale) {
    for (int h = 1; h < block; h *= 2)
        for (int i = 0; i < dim; i += 2 * h)
            for (int j = i; j < i + h; j++)
                for (int l = 0; l < LANES; l++) {
                    float a = x[j][l], b = x[j + h][l];
                    x[j][l] = a + b;
                    x[j + h][l] = a - b;
                }
    for (int d = 0; d < dim; d++)
        for (int l = 0; l < LANES; l++) x[d][l] *= scale;
}

CLONES static void encode(const uint16_t *in, Py_ssize_t n, int dim, int group, int block,
                          float scale, uint32_t *codes, uint16_t *scales, uint16_t *biases) {
    tile_t x[MAX_DIM];
    int n_groups = dim / group;
    for (Py_ssize_t first = 0; first < n; first += LANES) {
        int lanes = n - first < LANES ? (int)(n - first) : LANES;
        if (lanes < LANES) memset(x, 0, sizeof(tile_t) * dim);
        for (int l = 0; l < lanes; l++)
            for (int d = 0; d < dim; d++) x[d][l] = half_to_float(in[(first + l) * dim + d]);
        rotate(x, dim, block, scale);
        for (int g = 0; g < n_groups; g++) {
            tile_t low, high, inverse;
            tile_t *v = x + g * group;
            memcpy(low, v[0], sizeof low);
            memcpy(high, v[0], sizeof high);
            for (int d = 1; d < group; d++)
                for (int l = 0; l < LANES; l++) {
                    low[l] = v[d][l] < low[l] ? v[d][l] : low[l];
                    high[l] = v[d][l] > high[l] ? v[d][l] : high[l];
                }
            for (int l = 0; l < LANES; l++) {
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
                        q = q > 0.0f ? q : 0.0f;
                        q = q < 15.0f ? q : 15.0f;
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
    tile_t x[MAX_DIM];
    uint16_t halves[MAX_DIM][LANES];
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
        rotate(x, dim, block, scale);
        for (int d = 0; d < dim; d++)
            for (int l = 0; l < LANES; l++) halves[d][l] = float_to_half(x[d][l]);
        for (int l = 0; l < lanes; l++)
            for (int d = 0; d < dim; d++) out[(first + l) * dim + d] = halves[d][l];
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
