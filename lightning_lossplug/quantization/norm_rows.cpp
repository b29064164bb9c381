// Layer norm and RMS norm of rows: a row is read once from memory, and its output written once.

#include <cmath>

#include "bfloat16.h"

template <class T>
static void norm(const T *x, int64_t rows, int64_t columns, const float *weight, const float *bias, double eps,
                 bool centred, T *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const T *in = x + r * columns;
        T *out = y + r * columns;
        float mean = 0, square = 0;
        if (centred) {
#pragma omp simd reduction(+ : mean)
            for (int64_t c = 0; c < columns; c++) mean += wide(in[c]);
            mean /= (float)columns;
        }
#pragma omp simd reduction(+ : square)
        for (int64_t c = 0; c < columns; c++) {
            const float off = wide(in[c]) - mean;
            square += off * off;
        }
        const float scale = (float)(1 / std::sqrt((double)square / (double)columns + eps));
        if (bias)
            for (int64_t c = 0; c < columns; c++) narrow((wide(in[c]) - mean) * scale * weight[c] + bias[c], out + c);
        else
            for (int64_t c = 0; c < columns; c++) narrow((wide(in[c]) - mean) * scale * weight[c], out + c);
    }
}

// x and y: float32 (size 4) or bfloat16 (2), [rows, columns]; y may be x. bias may be null.
extern "C" void lossplug_norm_rows(const void *x, int64_t size, int64_t rows, int64_t columns, const float *weight,
                                   const float *bias, double eps, int64_t centred, void *y, int64_t threads) {
    if (size == 4) norm((const float *)x, rows, columns, weight, bias, eps, centred, (float *)y, (int)threads);
    else norm((const uint16_t *)x, rows, columns, weight, bias, eps, centred, (uint16_t *)y, (int)threads);
}
