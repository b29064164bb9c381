// Attention on bytes: scores and weighted values as int8 products with int32 sums, the softmax between them in float32.
//
// Signed key and value codes are laid out so that 64 bytes hold four neighbours of the summed axis for sixteen
// columns, which is what one VNNI instruction multiplies by four unsigned bytes of a row and adds up.

#include "vnni.h"

struct Problem {
    int64_t batch, heads, key_heads, rows, keys, width, value_width, size, causal, threads;
    int64_t query_low, query_high, query_shift, key_low, key_high, value_low, value_high, top;
    int64_t query_strides[3], key_strides[3], value_strides[3];  // of batch, head and token, in entries
    double query_step, key_step, value_step, probability_step, scale;
    const void *query, *key, *value;
    uint8_t *query_codes;   // [batch, heads, rows, wide(width)], and TILE more rows to read past the end
    int8_t *key_codes;      // [batch, key_heads, deep(width) / 4, wide(keys), 4]
    int8_t *value_codes;    // [batch, key_heads, deep(keys) / 4, wide(value_width), 4]
    int32_t *key_sums;      // [batch, key_heads, wide(keys)]: what the shift of the queries adds to a score
    void *out;              // [batch, rows, heads, value_width], as the operands
};

#ifdef LOSSPLUG_VNNI

#include <algorithm>
#include <cmath>
#include <vector>

static const int64_t BLOCK = 12;  // rows of a task

template <class T> static void pack_queries(const Problem &p, int64_t b, int64_t h) {
    const T *from = (const T *)p.query + b * p.query_strides[0] + h * p.query_strides[1];
    const int64_t apart = wide(p.width);
    int8_t *to = (int8_t *)p.query_codes + (b * p.heads + h) * p.rows * apart;
    for (int64_t l = 0; l < p.rows; l++, from += p.query_strides[2], to += apart)
        to_codes<false>(from, p.width, p.query_step, p.query_low, p.query_high, p.query_shift, to);
}

template <class T> static void pack_keys(const Problem &p, int64_t b, int64_t h) {
    const T *from = (const T *)p.key + b * p.key_strides[0] + h * p.key_strides[1];
    const int64_t depth = deep(p.width), across = wide(p.keys);
    int8_t *to = p.key_codes + (b * p.key_heads + h) * depth * across;
    int32_t *sums = p.key_sums + (b * p.key_heads + h) * across;
    std::vector<int8_t> row(wide(p.width));
    for (int64_t s = 0; s < across; s++, from += p.key_strides[2]) {
        if (s < p.keys)
            sums[s] = (int32_t)p.query_shift *
                      to_codes<true>(from, p.width, p.key_step, p.key_low, p.key_high, 0, row.data());
        else
            std::fill(row.begin(), row.end(), 0), sums[s] = 0;
        for (int64_t d = 0; d < depth; d += 4) std::memcpy(to + (d * across + s * 4), &row[d], 4);
    }
}

template <class T> static void pack_values(const Problem &p, int64_t b, int64_t h) {
    const T *from = (const T *)p.value + b * p.value_strides[0] + h * p.value_strides[1];
    const int64_t depth = deep(p.keys), across = wide(p.value_width);
    int8_t *to = p.value_codes + (b * p.key_heads + h) * depth * across;
    std::vector<int8_t> four(4 * across);
    for (int64_t s = 0; s < depth; s += 4, to += 4 * across) {
        for (int64_t k = 0; k < 4; k++, from += p.value_strides[2])
            if (s + k < p.keys)
                to_codes<false>(from, p.value_width, p.value_step, p.value_low, p.value_high, 0, &four[k * across]);
            else
                std::memset(&four[k * across], 0, across);
        for (int64_t d = 0; d < across; d += 16) {
            __m128i r[4];
            for (int k = 0; k < 4; k++) r[k] = _mm_loadu_si128((const __m128i *)&four[k * across + d]);
            const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpackhi_epi8(r[0], r[1]);
            const __m128i c = _mm_unpacklo_epi8(r[2], r[3]), e = _mm_unpackhi_epi8(r[2], r[3]);
            const __m128i out[4] = {_mm_unpacklo_epi16(a, c), _mm_unpackhi_epi16(a, c), _mm_unpacklo_epi16(b, e),
                                    _mm_unpackhi_epi16(b, e)};
            std::memcpy(to + d * 4, out, 64);
        }
    }
}

template <int COUNT>
static void scores_of(const uint8_t *rows, int64_t apart, const int8_t *keys, const int32_t *shifts, int64_t across,
                      int64_t depth, float factor, float *out) {
    __m512i sums[TILE][COUNT];
    product<COUNT>(rows, apart, keys, 4 * across, 64, depth, sums);
    const __m512 times = _mm512_set1_ps(factor);
    for (int c = 0; c < COUNT; c++) {
        const __m512i shift = _mm512_loadu_si512(shifts + c * 16);
        for (int r = 0; r < TILE; r++) {
            const __m512 score = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][c], shift));
            _mm512_storeu_ps(out + r * across + c * 16, _mm512_mul_ps(score, times));
        }
    }
}

template <int COUNT, class T>
static void values_of(const uint8_t *rows, int64_t apart, const int8_t *values, int64_t depth, int64_t across,
                      float factor, T *const *out, int64_t count, int64_t columns) {
    __m512i sums[TILE][COUNT];
    product<COUNT>(rows, apart, values, 4 * across, 64, depth, sums);
    const __m512 times = _mm512_set1_ps(factor);
    for (int64_t r = 0; r < count; r++)
        for (int c = 0; c < COUNT; c++) {
            const __mmask16 part = first_of(columns - c * 16);
            put(out[r] + c * 16, part, _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), times));
        }
}

// One row of scores to codes of probabilities; columns from `seen` on are 0.
static void softmax(float *scores, int64_t seen, int64_t length, double step, int32_t top, uint8_t *out) {
    const __m512 least = _mm512_set1_ps(-INFINITY);
    __m512 most = least, sum = _mm512_setzero_ps();
    const auto part = [&](int64_t s) { return first_of(seen - s); };
    for (int64_t s = 0; s < seen; s += 16) most = _mm512_max_ps(most, _mm512_mask_loadu_ps(least, part(s), scores + s));
    const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t s = 0; s < seen; s += 16) {
        const __m512 e = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + s), maximum));
        _mm512_storeu_ps(scores + s, e);
        sum = _mm512_mask_add_ps(sum, part(s), sum, e);
    }
    const __m512 times = _mm512_set1_ps((float)(1.0 / (step * (double)_mm512_reduce_add_ps(sum))));
    const __m512i largest = _mm512_set1_epi32(top);
    for (int64_t s = 0; s < length; s += 16) {
        const __mmask16 here = s < seen ? part(s) : (__mmask16)0;
        const __m512 share = _mm512_mul_ps(_mm512_maskz_loadu_ps(here, scores + s), times);
        const __m512i codes = _mm512_min_epi32(_mm512_cvtps_epi32(share), largest);
        _mm_storeu_si128((__m128i *)(out + s), _mm512_cvtepi32_epi8(codes));
    }
}

template <class T> static void attend(const Problem &p, int64_t b, int64_t h, int64_t first) {
    const int64_t depth = deep(p.width), across = wide(p.keys), room = wide(p.value_width);
    const int64_t kv = b * p.key_heads + h / (p.heads / p.key_heads), count = std::min(BLOCK, p.rows - first);
    // A causal row sees the keys up to its own; the last row of the block sees the most.
    const int64_t most = p.causal ? std::min(p.keys, first + count) : p.keys, length = wide(most);
    const int8_t *keys = p.key_codes + kv * depth * across, *values = p.value_codes + kv * deep(p.keys) * room;
    const int32_t *shifts = p.key_sums + kv * across;
    const float factor = (float)(p.query_step * p.key_step * p.scale);
    thread_local std::vector<uint8_t> bytes;
    thread_local std::vector<float> scores;
    bytes.resize(TILE * across);
    scores.resize(TILE * across);
    uint8_t *shares = bytes.data();
    for (int64_t done = 0; done < count; done += TILE) {
        const int64_t here = std::min(TILE, count - done);
        // Where fewer rows are left than a tile has, it multiplies what lies behind them; nobody reads that.
        const uint8_t *from = p.query_codes + ((b * p.heads + h) * p.rows + first + done) * wide(p.width);
        in_parts(length, [&](auto vectors, int64_t s) {
            scores_of<vectors>(from, wide(p.width), keys + s * 4, shifts + s, across, depth, factor, scores.data() + s);
        });
        T *out[TILE];
        for (int64_t r = 0; r < here; r++) {
            const int64_t row = first + done + r, seen = p.causal ? std::min(p.keys, row + 1) : p.keys;
            softmax(scores.data() + r * across, seen, length, p.probability_step, (int32_t)p.top, shares + r * across);
            out[r] = (T *)p.out + ((b * p.rows + row) * p.heads + h) * p.value_width;
        }
        const float step = (float)(p.probability_step * p.value_step);
        in_parts(room, [&](auto vectors, int64_t d) {
            T *to[TILE];
            for (int64_t r = 0; r < here; r++) to[r] = out[r] + d;
            values_of<vectors, T>(shares, across, values + d * 4, deep(most), room, step, to, here, p.value_width - d);
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

int64_t lossplug_attention_bytes() { return sizeof(Problem); }

void lossplug_integer_attention(const Problem *p) {
    if (p->size == 4) run<float>(*p);
    else run<uint16_t>(*p);
}
}

#else

extern "C" {

int64_t lossplug_attention_bytes() { return 0; }  // no such instruction here

void lossplug_integer_attention(const Problem *) {}
}

#endif
