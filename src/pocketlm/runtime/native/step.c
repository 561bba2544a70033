/* One decoding step of a plain decoder on a CPU: all blocks in one parallel region.
 *
 * At one token a step reads every weight once and computes little, so what counts is that memory
 * never waits: no interpreter between operators, threads that meet at four barriers a block, codes
 * decoded in registers. Activations are float32 throughout.
 *
 * Layouts are those that the weights have in PyTorch's own kernels (kernels/cpu.py), so that none is
 * held twice: int4 in blocks of `block` output rows, for each column block / 2 bytes, of which byte
 * r holds rows r and r + block / 2; int8 and floats by rows.
 */
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
enum { LANES = 16, UNIT = 64 }; /* floats of a vector; rows that a thread takes at once */
enum { AHEAD = 8192 }; /* bytes: what the processor fetches by itself comes too late, and stops at a page's end */

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint8_t vc __attribute__((vector_size(LANES), aligned(1)));
typedef int8_t vb __attribute__((vector_size(LANES), aligned(1)));

typedef struct {
    int64_t kind, rows, columns, groups, block;
    const void *weight, *scale;
    const float *bias;
} Linear;

typedef struct {
    Linear q, k, v, o, gate, up, down;
    const float *norm, *mlp_norm, *q_norm, *k_norm;
    void *keys, *values;
    int64_t row_stride, head_stride, window;
    float norm_epsilon, mlp_epsilon, head_epsilon, unused;
} Block;

typedef struct {
    int64_t blocks, hidden, inner, heads, kv_heads, width, rotated, cache_kind, activation, capacity;
    const Block *block;
    const float *norm, *cos, *sin;
    Linear head;
    float epsilon, scale;
} Model;

static inline float from_bf16(uint16_t h) {
    union { uint32_t i; float f; } u = {.i = (uint32_t)h << 16};
    return u.f;
}

static inline uint16_t to_bf16(float f) { /* to nearest, ties to even */
    union { float f; uint32_t i; } u = {.f = f};
    return (uint16_t)((u.i + 0x7fff + ((u.i >> 16) & 1)) >> 16);
}

static inline float sum(vf v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const void *p, int64_t kind, int64_t at) {
    if (kind == BF16) {
        vu wide = __builtin_convertvector(*(const vh *)((const uint16_t *)p + at), vu) << 16;
        return (vf)wide;
    }
    if (kind == INT8) {
#ifdef __AVX512F__ /* one instruction each, which compilers do not find for signed bytes */
        const __m128i byte = _mm_loadu_si128((const __m128i *)((const int8_t *)p + at));
        return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(byte));
#else
        return __builtin_convertvector(*(const vb *)((const int8_t *)p + at), vf);
#endif
    }
    return *(const vf *)((const float *)p + at);
}

INLINE float element(const void *p, int64_t kind, int64_t at) {
    if (kind == BF16) return from_bf16(((const uint16_t *)p)[at]);
    if (kind == INT8) return ((const int8_t *)p)[at];
    return ((const float *)p)[at];
}

/* sum over n of x[i] * w[start + i]; kind is a constant where this is inlined */
INLINE float dot(const float *x, const void *w, int64_t kind, int64_t start, int64_t n) {
    vf a = {0}, b = {0}, c = {0}, d = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        a += *(const vf *)(x + i) * load(w, kind, start + i);
        b += *(const vf *)(x + i + LANES) * load(w, kind, start + i + LANES);
        c += *(const vf *)(x + i + 2 * LANES) * load(w, kind, start + i + 2 * LANES);
        d += *(const vf *)(x + i + 3 * LANES) * load(w, kind, start + i + 3 * LANES);
    }
    float total = sum((a + b) + (c + d));
    for (; i < n; i++) total += x[i] * element(w, kind, start + i);
    return total;
}

/* The same for four rows that lie one after the other: enough sums at once that none waits for
 * itself, and x is read once for four. */
INLINE void four_dots(const float *x, const void *w, int64_t kind, int64_t start, int64_t n, float *y) {
    const int64_t size = kind == INT8 ? 1 : kind == BF16 ? 2 : 4;
    vf a = {0}, b = {0}, c = {0}, d = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vf xi = *(const vf *)(x + i);
        const char *next = (const char *)w + (start + 4 * i) * size + AHEAD;
        for (int64_t line = 0; line < size; line++) __builtin_prefetch(next + 64 * line);
        a += xi * load(w, kind, start + i);
        b += xi * load(w, kind, start + i + n);
        c += xi * load(w, kind, start + i + 2 * n);
        d += xi * load(w, kind, start + i + 3 * n);
    }
    y[0] = sum(a), y[1] = sum(b), y[2] = sum(c), y[3] = sum(d);
    for (; i < n; i++)
        for (int64_t r = 0; r < 4; r++) y[r] += x[i] * element(w, kind, start + i + r * n);
}

/* rows of one block of the int4 layout: y = sum over groups of scale * (x . (u - 8)) + zero * sum x */
static void block_int4(const Linear *l, const float *x, float *y, int64_t row) {
    const int64_t half = l->block / 2, group = l->columns / l->groups;
    const uint8_t *w = (const uint8_t *)l->weight + row * (l->columns / 2);
    const uint16_t *scale = (const uint16_t *)l->scale;
    vf out[UNIT / LANES] = {0};
    const int parts = (int)(half / LANES); /* vectors in half a block: 2 with AVX-512, 1 else */
    for (int64_t g = 0; g < l->groups; g++) {
        vf low0 = {0}, low1 = {0}, high0 = {0}, high1 = {0};
        float total = 0;
        for (int64_t k = g * group; k < (g + 1) * group; k++) {
            const uint8_t *byte = w + k * half;
            const float xk = x[k];
            total += xk;
            const vc c0 = *(const vc *)byte;
            low0 += xk * __builtin_convertvector(__builtin_convertvector(c0 & 15, vi), vf);
            high0 += xk * __builtin_convertvector(__builtin_convertvector(c0 >> 4, vi), vf);
            if (parts == 2) {
                const vc c1 = *(const vc *)(byte + LANES);
                low1 += xk * __builtin_convertvector(__builtin_convertvector(c1 & 15, vi), vf);
                high1 += xk * __builtin_convertvector(__builtin_convertvector(c1 >> 4, vi), vf);
            }
        }
        const vf part[4] = {low0, parts == 2 ? low1 : high0, high0, high1};
        for (int p = 0; p < 2 * parts; p++) {
            vf s, z;
            for (int i = 0; i < LANES; i++) {
                const int64_t at = (g * l->rows + row + p * LANES + i) * 2;
                s[i] = from_bf16(scale[at]);
                z[i] = from_bf16(scale[at + 1]);
            }
            out[p] += s * (part[p] - 8.0f * total) + z * total;
        }
    }
    for (int p = 0; p < 2 * parts; p++) *(vf *)(y + row + p * LANES) = out[p];
}

/* The same for blocks of 64 rows, two columns at a time: their 64 bytes are 16 words, of which each
 * nibble is one row of one column. A nibble moved to bits 12 or 16 under an exponent is the float
 * 2048 + u or 128 + u: one shift for two nibbles and one operation for each in place of widening and
 * conversion. The offset is taken off once a group; float32 keeps 1e-4 of a code. */
#define NIBBLE(word, bit, exponent) \
    ((vf)(((word) & (15u << (bit))) | ((127u + (exponent)) << 23)))
#define FOLDED(v) ((v) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7))
#define PAIRED(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31)

static void block64_int4(const Linear *l, const float *x, float *y, int64_t row) {
    const int64_t group = l->columns / l->groups;
    const uint8_t *w = (const uint8_t *)l->weight + row * (l->columns / 2);
    vf out[4] = {0};
    for (int64_t g = 0; g < l->groups; g++) {
        vf a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, a4 = {0}, a5 = {0}, a6 = {0}, a7 = {0};
        vf both = {0};
        for (int64_t k = g * group; k < (g + 1) * group; k += 2) {
            const vu word = *(const vu *)(w + k * 32);
            __builtin_prefetch(w + k * 32 + AHEAD);
            const vf one = (vf){0} + x[k], two = (vf){0} + x[k + 1];
            const vf xs = __builtin_shufflevector(one, two, 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27,
                                                  28, 29, 30, 31);
            const vu up12 = word << 12, up8 = word << 8, down8 = word >> 8, down16 = word >> 16;
            both += xs;
            a0 += xs * NIBBLE(up12, 12, 11);
            a1 += xs * NIBBLE(up8, 12, 11);
            a2 += xs * NIBBLE(up8, 16, 7);
            a3 += xs * NIBBLE(word, 12, 11);
            a4 += xs * NIBBLE(word, 16, 7);
            a5 += xs * NIBBLE(down8, 12, 11);
            a6 += xs * NIBBLE(down8, 16, 7);
            a7 += xs * NIBBLE(down16, 12, 11);
        }
        const float total = both[0] + both[8], far = (2048 + 8) * total, near = (128 + 8) * total;
        a0 = FOLDED(a0) - far;
        a1 = FOLDED(a1) - far;
        a2 = FOLDED(a2) - near;
        a3 = FOLDED(a3) - far;
        a4 = FOLDED(a4) - near;
        a5 = FOLDED(a5) - far;
        a6 = FOLDED(a6) - near;
        a7 = FOLDED(a7) - far;
        const vf even0 = PAIRED(a0, a2), even1 = PAIRED(a4, a6); /* low nibbles: rows 0 to 31 */
        const vf odd0 = PAIRED(a1, a3), odd1 = PAIRED(a5, a7);
        const vf part[4] = {LOW(even0, even1), HIGH(even0, even1), LOW(odd0, odd1), HIGH(odd0, odd1)};
        for (int p = 0; p < 4; p++) { /* a word holds a row's scale and, above it, its zero */
            const vu pair = *(const vu *)((const uint16_t *)l->scale +
                                          2 * (g * l->rows + row + p * LANES));
            out[p] += (vf)(pair << 16) * part[p] + (vf)(pair & 0xffff0000u) * total;
        }
    }
    for (int p = 0; p < 4; p++) *(vf *)(y + row + p * LANES) = out[p];
}

/* rows [from, to) of a product whose weight lies by rows; kind is a constant where this is inlined */
INLINE void by_rows(const Linear *l, const float *x, float *y, int64_t kind, int64_t from, int64_t to) {
    int64_t r = from;
    for (; r + 4 <= to; r += 4) four_dots(x, l->weight, kind, r * l->columns, l->columns, y + r);
    for (; r < to; r++) y[r] = dot(x, l->weight, kind, r * l->columns, l->columns);
}

/* rows [from, to) of a product with one token */
static void product(const Linear *l, const float *x, float *y, int64_t from, int64_t to) {
    if (l->kind == INT4)
        for (int64_t r = from; r < to; r += l->block)
            (l->block == UNIT ? block64_int4 : block_int4)(l, x, y, r);
    else if (l->kind == INT8) {
        by_rows(l, x, y, INT8, from, to);
        for (int64_t r = from; r < to; r++) y[r] *= from_bf16(((const uint16_t *)l->scale)[r]);
    } else if (l->kind == BF16)
        by_rows(l, x, y, BF16, from, to);
    else
        by_rows(l, x, y, F32, from, to);
    if (l->bias)
        for (int64_t r = from; r < to; r++) y[r] += l->bias[r];
}

/* the rows of this thread, in whole units */
static void share(int64_t rows, int64_t *from, int64_t *to) {
    const int64_t units = (rows + UNIT - 1) / UNIT, all = omp_get_num_threads();
    const int64_t me = omp_get_thread_num();
    *from = units * me / all * UNIT;
    *to = units * (me + 1) / all * UNIT;
    if (*to > rows) *to = rows;
    if (*from > rows) *from = rows;
}

static void normed(const float *x, const float *weight, float epsilon, int64_t n, float *y) {
    const float inverse = 1.0f / sqrtf(dot(x, x, F32, 0, n) / n + epsilon);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * inverse * weight[i];
}

static void rotated(const Model *m, const float *x, const float *norm, float epsilon,
                    int64_t position, float *y) {
    const int64_t width = m->width, all = m->rotated, half = all / 2;
    float t[width];
    if (norm) normed(x, norm, epsilon, width, t);
    else memcpy(t, x, width * sizeof(float));
    const float *c = m->cos + position * all, *s = m->sin + position * all;
    for (int64_t i = 0; i < half; i++) {
        y[i] = t[i] * c[i] - t[i + half] * s[i];
        y[i + half] = t[i + half] * c[i + half] + t[i] * s[i + half];
    }
    for (int64_t i = all; i < width; i++) y[i] = t[i];
}

static void put(void *to, int64_t kind, int64_t at, const float *x, int64_t n) {
    if (kind == BF16)
        for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[at + i] = to_bf16(x[i]);
    else
        memcpy((float *)to + at, x, n * sizeof(float));
}

/* one head of queries over the positions [first, place]; the head's keys are written by the first
 * of its group, and the newest are taken from here, so that no thread waits for another's */
static void attention(const Model *m, const Block *b, const float *q, const float *k,
                      const float *v, int64_t row, int64_t head, int64_t place, int64_t pad,
                      float *score, float *out) {
    const int64_t width = m->width, group = m->heads / m->kv_heads, kv = head / group;
    const int64_t base = row * b->row_stride + kv * b->head_stride;
    int64_t first = pad;
    if (b->window > 0 && place + 1 - b->window > first) first = place + 1 - b->window;
    float query[width], key[width];
    rotated(m, q + head * width, b->q_norm, b->head_epsilon, place - pad, query);
    rotated(m, k + kv * width, b->k_norm, b->head_epsilon, place - pad, key);
    if (head % group == 0) {
        put(b->keys, m->cache_kind, base + place * width, key, width);
        put(b->values, m->cache_kind, base + place * width, v + kv * width, width);
    }
    float top = dot(query, key, F32, 0, width) * m->scale;
    score[place] = top;
    for (int64_t t = first; t < place; t++) {
        const int64_t at = base + t * width;
        score[t] = m->scale * (m->cache_kind == BF16 ? dot(query, b->keys, BF16, at, width)
                                                     : dot(query, b->keys, F32, at, width));
        if (score[t] > top) top = score[t];
    }
    float total = 0;
    for (int64_t t = first; t <= place; t++) total += score[t] = expf(score[t] - top);
    for (int64_t i = 0; i < width; i++) out[i] = score[place] * v[kv * width + i];
    for (int64_t t = first; t < place; t++) {
        const int64_t at = base + t * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            const vf value = m->cache_kind == BF16 ? load(b->values, BF16, at + i)
                                                   : load(b->values, F32, at + i);
            *(vf *)(out + i) += score[t] * value;
        }
        for (; i < width; i++) out[i] += score[t] * element(b->values, m->cache_kind, at + i);
    }
    for (int64_t i = 0; i < width; i++) out[i] /= total;
}

static inline float activated(float x, int64_t kind) {
    if (kind == 0) /* SiLU; fast division makes no number of 1 / infinity */
        return x / (1.0f + expf(x > -80.0f ? -x : 80.0f));
    const float inner = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + tanhf(inner)); /* GELU, by tanh */
}

/* x: rows x hidden, overwritten; logits: rows x head rows; pad: one a row; 0 where all went well */
int pocketlm_step(const Model *m, int64_t rows, float *x, int64_t place, const int64_t *pad,
                  float *logits) {
    const int64_t hidden = m->hidden, inner = m->inner, width = m->width;
    const int64_t q_all = m->heads * width, kv_all = m->kv_heads * width;
    const int64_t shared = rows * (2 * q_all + 2 * kv_all + inner);
    const int threads = omp_get_max_threads();
    const int64_t own = hidden + 2 * inner + hidden + m->capacity;
    float *room = malloc((shared + threads * own) * sizeof(float));
    if (!room) return 1;
    float *q = room, *k = q + rows * q_all, *v = k + rows * kv_all;
    float *o = v + rows * kv_all, *act = o + rows * q_all;
#pragma omp parallel num_threads(threads)
    {
        float *mine = room + shared + omp_get_thread_num() * own;
        float *h = mine, *gate = h + hidden, *up = gate + inner, *y = up + inner;
        float *score = y + hidden;
        int64_t from, to;
        for (int64_t layer = 0; layer < m->blocks; layer++) {
            const Block *b = m->block + layer;
            for (int64_t r = 0; r < rows; r++) {
                normed(x + r * hidden, b->norm, b->norm_epsilon, hidden, h);
                share(q_all, &from, &to);
                product(&b->q, h, q + r * q_all, from, to);
                share(kv_all, &from, &to);
                product(&b->k, h, k + r * kv_all, from, to);
                product(&b->v, h, v + r * kv_all, from, to);
            }
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t i = 0; i < rows * m->heads; i++) {
                const int64_t r = i / m->heads, head = i % m->heads;
                attention(m, b, q + r * q_all, k + r * kv_all, v + r * kv_all, r, head, place,
                          pad[r], score, o + i * width);
            }
            for (int64_t r = 0; r < rows; r++) {
                share(hidden, &from, &to);
                product(&b->o, o + r * q_all, y, from, to);
                for (int64_t i = from; i < to; i++) x[r * hidden + i] += y[i];
            }
#pragma omp barrier
            for (int64_t r = 0; r < rows; r++) {
                normed(x + r * hidden, b->mlp_norm, b->mlp_epsilon, hidden, h);
                share(inner, &from, &to);
                product(&b->gate, h, gate, from, to);
                product(&b->up, h, up, from, to);
                for (int64_t i = from; i < to; i++)
                    act[r * inner + i] = activated(gate[i], m->activation) * up[i];
            }
#pragma omp barrier
            for (int64_t r = 0; r < rows; r++) {
                share(hidden, &from, &to);
                product(&b->down, act + r * inner, y, from, to);
                for (int64_t i = from; i < to; i++) x[r * hidden + i] += y[i];
            }
#pragma omp barrier
        }
        for (int64_t r = 0; r < rows; r++) {
            normed(x + r * hidden, m->norm, m->epsilon, hidden, h);
            share(m->head.rows, &from, &to);
            product(&m->head, h, logits + r * m->head.rows, from, to);
        }
    }
    free(room);
    return 0;
}
