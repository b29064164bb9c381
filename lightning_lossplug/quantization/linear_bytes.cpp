// A linear layer on bytes in one pass over its rows: values to codes, int8 products with int32 sums, steps, bias,
// activation, and values or the codes of the next layer out.

#include "vnni.h"

enum Kind : int64_t { FLOAT32, BFLOAT16, BYTES };
enum Activation : int64_t { NONE, CLAMP, GELU, GELU_TANH, SILU, HARDSWISH };

struct Linear {
    int64_t inputs, outputs;
    int64_t zero, top;                    // byte of an input of 0; largest code of rows with steps of their own, or 0
    int64_t activation, out_zero;
    double step, low, high;               // of the input; its least and largest code, counted from that of 0
    double least, most;                   // of CLAMP
    double out_step, out_low, out_high;   // of BYTES; least and largest code, counted from that of 0
    const int8_t *weights;                // [wide(outputs) / 16, deep(inputs) / 4, 16, 4]
    const int32_t *sums;                  // [wide(outputs)]: what the byte of 0 adds to a sum
    const float *scales, *bias;           // [wide(outputs)]
};

struct Call {
    const Linear *p;
    int64_t rows, in, out, threads;
    const void *x;                        // [rows, inputs]
    const float *times;                   // [rows, outputs], multiplies what the activation gives; or null
    const void *plus;                     // as y, which it is added to at last; or null
    void *y;                              // [rows, outputs]
};

#if defined(LOSSPLUG_VNNI) && !defined(__AMX_INT8__)  // where there are tiles (AMX), oneDNN is faster

#include <algorithm>
#include <vector>

static const int64_t BLOCK = 16;  // tiles of rows that are turned into bytes at once: they stay in the second cache

template <class T> static float step_of(const T *from, int64_t count, int64_t top) {
    // Magnitudes as integers: their order is that of the numbers, and NaN is above all.
    __m512i most = _mm512_setzero_si512();
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int64_t k = 0; k < count; k += 16) {
        const __m512i bits = _mm512_castps_si512(sixteen(from + k, first_of(count - k)));
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
    }
    const int32_t largest = _mm512_reduce_max_epi32(most);
    float step;
    std::memcpy(&step, &largest, 4);
    step /= (float)top;
    return step == 0 ? 1 : step;
}

template <class T> static void bytes_of(const Call &call, int64_t first, int64_t count, uint8_t *to, float *steps) {
    const Linear &p = *call.p;
    const T *from = (const T *)call.x + first * p.inputs;
    for (int64_t r = 0; r < count; r++, from += p.inputs, to += wide(p.inputs)) {
        steps[r] = p.top ? step_of(from, p.inputs, p.top) : (float)p.step;
        to_codes<false>(from, p.inputs, steps[r], p.low, p.high, p.zero, to);
    }
}

// erf(x / sqrt(2)) / x as a polynomial of x squared, up to |x| = 5: gelu is off by at most 1.5e-6.
INLINED __m512 gelu(__m512 x) {
    const __m512 square = _mm512_mul_ps(x, x);
    const __m512 u = _mm512_fmadd_ps(square, _mm512_set1_ps(0.08f), _mm512_set1_ps(-1.0f));
    __m512 y = _mm512_set1_ps(0.0009430684731341898f);
    for (const float next : {-0.0029869081918150187f, 0.004102340433746576f, -0.005925917997956276f,
                             0.012249569408595562f, -0.021869326010346413f, 0.03302418440580368f,
                             -0.046700380742549896f, 0.06284832209348679f, -0.08086217194795609f,
                             0.10304301232099533f, -0.14059343934059143f, 0.28272756934165955f})
        y = _mm512_fmadd_ps(y, u, _mm512_set1_ps(next));
    const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    const __mmask16 far = _mm512_cmp_ps_mask(square, _mm512_set1_ps(25.0f), _CMP_GT_OQ);
    return _mm512_mask_max_ps(_mm512_fmadd_ps(_mm512_mul_ps(y, x), half, half), far, _mm512_setzero_ps(), x);
}

INLINED __m512 silu(__m512 x) {  // x / (1 + exp(-x))
    const __m512 away = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(88.0f));
    return _mm512_div_ps(x, _mm512_add_ps(exponential(away), _mm512_set1_ps(1.0f)));
}

INLINED __m512 gelu_tanh(__m512 x) {  // x (1 + tanh(z)) / 2 is x / (1 + exp(-2 z))
    const __m512 square = _mm512_mul_ps(x, x), slope = _mm512_set1_ps(-1.5957691216057308f);
    const __m512 z = _mm512_mul_ps(x, _mm512_fmadd_ps(square, _mm512_set1_ps(-0.07135481282556484f), slope));
    return _mm512_div_ps(x, _mm512_add_ps(exponential(_mm512_min_ps(z, _mm512_set1_ps(88.0f))), _mm512_set1_ps(1.0f)));
}

INLINED __m512 clamped(__m512 x, float least, float most) {
    return _mm512_min_ps(_mm512_set1_ps(most), _mm512_max_ps(_mm512_set1_ps(least), x));  // NaN stays: it comes second
}

INLINED __m512 activated(const Linear &p, __m512 x) {
    switch (p.activation) {
        case CLAMP: return clamped(x, (float)p.least, (float)p.most);
        case GELU: return gelu(x);
        case GELU_TANH: return gelu_tanh(x);
        case SILU: return silu(x);
        case HARDSWISH: {
            const __m512 gate = _mm512_fmadd_ps(x, _mm512_set1_ps(1.0f / 6), _mm512_set1_ps(0.5f));
            return _mm512_mul_ps(x, clamped(gate, 0.0f, 1.0f));
        }
        default: return x;
    }
}

template <class T> INLINED void put_sum(const Call &call, int64_t at, __m512 y, __mmask16 part) {
    if (call.plus) y = _mm512_add_ps(y, sixteen((const T *)call.plus + at, part));
    put((T *)call.y + at, part, y);
}

INLINED void store(const Call &call, int64_t at, __m512 y, __mmask16 part) {
    const Linear &p = *call.p;
    if (call.times) y = _mm512_mul_ps(y, sixteen(call.times + at, part));
    if (call.out == FLOAT32) put_sum<float>(call, at, y, part);
    else if (call.out == BFLOAT16) put_sum<uint16_t>(call, at, y, part);
    else {
        const __m512 code = clamped(_mm512_mul_ps(y, _mm512_set1_ps((float)(1 / p.out_step))), (float)p.out_low, (float)p.out_high);
        const __m512i byte = _mm512_add_epi32(_mm512_cvtps_epi32(code), _mm512_set1_epi32((int32_t)p.out_zero));
        _mm_mask_storeu_epi8((uint8_t *)call.y + at, part, _mm512_cvtepi32_epi8(byte));
    }
}

template <int COUNT>
static void tile_of(const Call &call, const uint8_t *bytes, int64_t apart, const float *steps, int64_t row, int64_t rows, int64_t column) {
    __m512i sums[TILE][COUNT];
    const Linear &p = *call.p;
    const int64_t depth = deep(p.inputs);
    product<COUNT>(bytes, apart, p.weights + column * depth, 64, 16 * depth, depth, sums);
    for (int c = 0; c < COUNT; c++, column += 16) {
        const __m512i shift = _mm512_loadu_si512(p.sums + column);
        const __m512 scale = _mm512_loadu_ps(p.scales + column), bias = _mm512_loadu_ps(p.bias + column);
        const __mmask16 part = first_of(p.outputs - column);
        for (int r = 0; r < TILE; r++) {
            if (r >= rows) break;
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][c], shift));
            const __m512 y = _mm512_fmadd_ps(_mm512_mul_ps(sum, scale), _mm512_set1_ps(steps[r]), bias);
            store(call, (row + r) * p.outputs + column, activated(p, y), part);
        }
    }
}

// Rows [first, end) times the vectors of columns [left, right).
static void part_of(const Call &call, int64_t first, int64_t end, int64_t left, int64_t right) {
    const Linear &p = *call.p;
    const int64_t apart = wide(p.inputs);
    thread_local std::vector<uint8_t> room;
    room.resize(BLOCK * TILE * apart);
    float steps[BLOCK * TILE];
    for (; first < end; first += BLOCK * TILE) {
        const int64_t count = std::min(BLOCK * TILE, end - first);
        if (call.in == FLOAT32) bytes_of<float>(call, first, count, room.data(), steps);
        else if (call.in == BFLOAT16) bytes_of<uint16_t>(call, first, count, room.data(), steps);
        else
            for (int64_t r = 0; r < count; r++) {
                std::memcpy(room.data() + r * apart, (const uint8_t *)call.x + (first + r) * p.inputs, p.inputs);
                steps[r] = (float)p.step;
            }
        in_parts((right - left) * 16, [&](auto vectors, int64_t column) {
            // A last tile with fewer rows multiplies what lies behind them; nobody reads that.
            for (int64_t r = 0; r < count; r += TILE)
                tile_of<vectors>(call, room.data() + r * apart, apart, steps + r, first + r, std::min(TILE, count - r),
                                 left * 16 + column);
        });
    }
}

extern "C" {

int64_t lossplug_linear_bytes() { return sizeof(Call); }

void lossplug_integer_linear(const Call *given) {
    const Call &call = *given;
    const int64_t rows = call.rows, threads = call.threads;
    const int64_t tiles = (rows + TILE - 1) / TILE, vectors = wide(call.p->outputs) / 16;
    // Rows are split among threads; few rows are quantised by each, and columns are split.
    const bool by_rows = tiles >= 4 * threads;
#pragma omp parallel for schedule(static, 1) num_threads((int)threads)
    for (int64_t t = 0; t < threads; t++) {
        if (by_rows)
            part_of(call, tiles * t / threads * TILE, std::min(rows, tiles * (t + 1) / threads * TILE), 0, vectors);
        else part_of(call, 0, rows, vectors * t / threads, vectors * (t + 1) / threads);
    }
}
}

#else

extern "C" {

int64_t lossplug_linear_bytes() { return 0; }  // no such instruction here

void lossplug_integer_linear(const Call *) {}
}

#endif
