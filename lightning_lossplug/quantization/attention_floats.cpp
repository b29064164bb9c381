// Attention in float32 arithmetic: scores, softmax and weighted values of six rows at a time. Operands and output are
// float32 or bfloat16.

#include "bfloat16.h"
#include "vnni.h"

struct Problem {
    int64_t batch, heads, key_heads, rows, keys, width, value_width, size, causal, threads;
    int64_t query_strides[3], key_strides[3], value_strides[3];  // of batch, head and token, in entries
    double scale;
    const void *query, *key, *value;
    float *query_rows;    // [batch, heads, rows, width], times scale, and TILE more rows to read past the end
    float *key_columns;   // [batch, key_heads, width, wide(keys)]
    float *value_rows;    // [batch, key_heads, keys, wide(value_width)]
    void *out;            // [batch, rows, heads, value_width]
};

#ifdef LOSSPLUG_VNNI

#include <algorithm>
#include <cmath>
#include <vector>

static const int64_t BLOCK = 12;  // rows of a task

template <class T> static void pack_queries(const Problem &p, int64_t b, int64_t h) {
    const T *from = (const T *)p.query + b * p.query_strides[0] + h * p.query_strides[1];
    float *to = p.query_rows + (b * p.heads + h) * p.rows * p.width;
    for (int64_t l = 0; l < p.rows; l++, from += p.query_strides[2], to += p.width)
        for (int64_t d = 0; d < p.width; d++) to[d] = single(from[d]) * (float)p.scale;
}

template <class T> static void pack_keys(const Problem &p, int64_t b, int64_t h) {
    const T *from = (const T *)p.key + b * p.key_strides[0] + h * p.key_strides[1];
    const int64_t across = wide(p.keys), apart = p.key_strides[2];
    float *to = p.key_columns + (b * p.key_heads + h) * p.width * across;
    for (int64_t s = 0; s < across; s += 16) {
        const int64_t count = std::min<int64_t>(16, p.keys - s);
        for (int64_t d = 0; d < p.width; d++)
            for (int64_t k = 0; k < 16; k++) to[d * across + s + k] = k < count ? single(from[(s + k) * apart + d]) : 0;
    }
}

template <class T> static void pack_values(const Problem &p, int64_t b, int64_t h) {
    const T *from = (const T *)p.value + b * p.value_strides[0] + h * p.value_strides[1];
    const int64_t room = wide(p.value_width);
    float *to = p.value_rows + (b * p.key_heads + h) * p.keys * room;
    for (int64_t s = 0; s < p.keys; s++, from += p.value_strides[2], to += room)
        for (int64_t d = 0; d < room; d += 16)
            _mm512_storeu_ps(to + d, sixteen(from + d, first_of(p.value_width - d)));
}

// TILE rows times COUNT vectors of columns: sums of rows[r][d] * columns[d][c].
template <int COUNT>
INLINED void product(const float *rows, int64_t apart, const float *columns, int64_t across, int64_t depth,
                     __m512 (&sums)[TILE][COUNT]) {
    __m512 held[TILE][COUNT];  // an array of its own: the compiler keeps it in registers
#pragma GCC unroll 6
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) held[r][c] = _mm512_setzero_ps();
    for (int64_t d = 0; d < depth; d++, columns += across) {
        __m512 right[COUNT];
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) right[c] = _mm512_loadu_ps(columns + c * 16);
#pragma GCC unroll 6
        for (int r = 0; r < TILE; r++) {
            const __m512 left = _mm512_set1_ps(rows[r * apart + d]);
#pragma GCC unroll 4
            for (int c = 0; c < COUNT; c++) held[r][c] = _mm512_fmadd_ps(left, right[c], held[r][c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) sums[r][c] = held[r][c];
}

// One row of scores to exp(score - largest), 0 from `seen` to `length`; returns one over their sum, or NaN where a score
// is no number or infinite.
static float softmax(float *scores, int64_t seen, int64_t length) {
    const __m512 least = _mm512_set1_ps(-INFINITY);
    __m512 most = least, sum = _mm512_setzero_ps();
    const auto part = [&](int64_t s) { return first_of(seen - s); };
    __mmask16 lost = 0;
    for (int64_t s = 0; s < seen; s += 16) {
        const __m512 score = _mm512_mask_loadu_ps(least, part(s), scores + s);
        most = _mm512_max_ps(most, score);
        lost |= _mm512_cmp_ps_mask(score, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
    }
    const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t s = 0; s < length; s += 16) {
        const __mmask16 here = s < seen ? part(s) : (__mmask16)0;
        const __m512 e = _mm512_maskz_mov_ps(here, exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + s), maximum)));
        _mm512_storeu_ps(scores + s, e);
        sum = _mm512_add_ps(sum, e);
    }
    return lost ? NAN : 1 / _mm512_reduce_add_ps(sum);
}

template <class T> static void attend(const Problem &p, int64_t b, int64_t h, int64_t first) {
    const int64_t across = wide(p.keys), room = wide(p.value_width), count = std::min(BLOCK, p.rows - first);
    const int64_t kv = b * p.key_heads + h / (p.heads / p.key_heads);
    // A causal row sees the keys up to its own; the last row of the block sees the most.
    const int64_t most = p.causal ? std::min(p.keys, first + count) : p.keys, length = wide(most);
    const float *keys = p.key_columns + kv * p.width * across, *values = p.value_rows + kv * p.keys * room;
    thread_local std::vector<float> shares;
    shares.resize(TILE * across);
    for (int64_t done = 0; done < count; done += TILE) {
        const int64_t here = std::min(TILE, count - done);
        // Where fewer rows are left than a tile has, it multiplies what lies behind them; nobody reads that.
        const float *from = p.query_rows + ((b * p.heads + h) * p.rows + first + done) * p.width;
        in_parts(length, [&](auto vectors, int64_t s) {
            __m512 sums[TILE][vectors];
            product<vectors>(from, p.width, keys + s, across, p.width, sums);
            for (int r = 0; r < TILE; r++)
                for (int c = 0; c < vectors; c++) _mm512_storeu_ps(&shares[r * across + s + c * 16], sums[r][c]);
        });
        float over[TILE];
        T *out[TILE];
        for (int64_t r = 0; r < here; r++) {
            const int64_t row = first + done + r, seen = p.causal ? std::min(p.keys, row + 1) : p.keys;
            over[r] = softmax(&shares[r * across], seen, length);
            out[r] = (T *)p.out + ((b * p.rows + row) * p.heads + h) * p.value_width;
        }
        in_parts(room, [&](auto vectors, int64_t d) {
            __m512 sums[TILE][vectors];
            product<vectors>(shares.data(), across, values + d, room, most, sums);
            for (int64_t r = 0; r < here; r++)
                for (int c = 0; c < vectors; c++) {
                    const int64_t at = d + c * 16;
                    put(out[r] + at, first_of(p.value_width - at), _mm512_mul_ps(sums[r][c], _mm512_set1_ps(over[r])));
                }
        });
    }
}

template <class T> static void run(const Problem &p) {
    over_heads(
        p, BLOCK,
        [&](int operand, int64_t b, int64_t h) {
            if (operand == 0) pack_queries<T>(p, b, h);
            else if (operand == 1) pack_keys<T>(p, b, h);
            else pack_values<T>(p, b, h);
        },
        [&](int64_t b, int64_t h, int64_t first) { attend<T>(p, b, h, first); });
}

extern "C" {

int64_t lossplug_float_attention_bytes() { return sizeof(Problem); }

void lossplug_float_attention(const Problem *p) {
    if (p->size == 4) run<float>(*p);
    else run<uint16_t>(*p);
}
}

#else

extern "C" {

int64_t lossplug_float_attention_bytes() { return 0; }  // no such instruction here

void lossplug_float_attention(const Problem *) {}
}

#endif
