// A layer's input to bytes, with a step for all or for each row, and what comes out back to values: a pass each.

#include "bfloat16.h"

template <class T>
static void to_bytes(const T *x, int64_t rows, int64_t columns, float top, uint8_t *out, float *steps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const T *in = x + r * columns;
        // Magnitudes as integers: their order is that of the numbers, and NaN is above all.
        int32_t largest = 0;
        for (int64_t c = 0; c < columns; c++) {
            float value = single(in[c]);
            int32_t bits;
            std::memcpy(&bits, &value, 4);
            bits &= 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        float step;
        std::memcpy(&step, &largest, 4);
        step = step / top;
        if (step == 0) step = 1;
        steps[r] = step;
        for (int64_t c = 0; c < columns; c++) {
            // Added to 1.5 * 2^23, a small number is rounded to a whole one, ties to even, in the lowest bits.
            float value = single(in[c]) / step + 12582912.0f;
            int32_t bits;
            std::memcpy(&bits, &value, 4);
            out[r * columns + c] = (uint8_t)(bits - 0x4b400000 + (int32_t)top);
        }
    }
}

template <class T>
static void with_step(const T *x, int64_t count, float step, int32_t zero, float low, float high, uint8_t *out,
                      int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        float value = single(x[i]) / step;
        value = value < low ? low : value;
        value = (value > high ? high : value) + 12582912.0f;
        int32_t bits;
        std::memcpy(&bits, &value, 4);
        out[i] = (uint8_t)(bits - 0x4b400000 + zero);
    }
}

template <class T>
static void to_values(const float *y, const float *steps, const float *bias, int64_t rows, int64_t columns, T *out,
                      int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const float step = steps[r], *in = y + r * columns;
        T *to = out + r * columns;
        if (bias)
            for (int64_t c = 0; c < columns; c++) narrow(in[c] * step + bias[c], to + c);
        else
            for (int64_t c = 0; c < columns; c++) narrow(in[c] * step, to + c);
    }
}

extern "C" {

// x: float32 (size 4) or bfloat16 (2). Codes from -top to top travel as bytes from 0 to 2 top.
void lossplug_to_bytes(const void *x, int64_t size, int64_t rows, int64_t columns, double top, uint8_t *out, float *steps,
                       int64_t threads) {
    if (size == 4) to_bytes((const float *)x, rows, columns, (float)top, out, steps, (int)threads);
    else to_bytes((const uint16_t *)x, rows, columns, (float)top, out, steps, (int)threads);
}

// One step for all: bytes from low to high, of which `zero` stands for 0.
void lossplug_with_step(const void *x, int64_t size, int64_t count, double step, int64_t zero, int64_t low, int64_t high,
                        uint8_t *out, int64_t threads) {
    const float least = (float)(low - zero), most = (float)(high - zero);
    if (size == 4) with_step((const float *)x, count, (float)step, (int32_t)zero, least, most, out, (int)threads);
    else with_step((const uint16_t *)x, count, (float)step, (int32_t)zero, least, most, out, (int)threads);
}

// out = y * step of its row + bias, float32 (may be y) or bfloat16.
void lossplug_to_values(const float *y, const float *steps, const float *bias, int64_t size, int64_t rows,
                        int64_t columns, void *out, int64_t threads) {
    if (size == 4) to_values(y, steps, bias, rows, columns, (float *)out, (int)threads);
    else to_values(y, steps, bias, rows, columns, (uint16_t *)out, (int)threads);
}
}
