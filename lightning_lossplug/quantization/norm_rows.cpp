// Layer norm and RMS norm of rows: a row is read once from memory, and its output written once.

#include <cmath>

#include "bfloat16.h"

struct Norm {
    int64_t size, rows, columns, centred, threads;  // size: 4 for float32, 2 for bfloat16
    double eps;
    const float *weight, *bias;  // [columns]; bias may be null
    const void *x;               // [rows, columns]
    void *y;                     // may be x
};

template <class T>
static void norm(const Norm &p) {
    const int64_t columns = p.columns;
    const float *weight = p.weight, *bias = p.bias;
#pragma omp parallel for schedule(static) num_threads((int)p.threads)
    for (int64_t r = 0; r < p.rows; r++) {
        const T *in = (const T *)p.x + r * columns;
        T *out = (T *)p.y + r * columns;
        float mean = 0, square = 0;
        if (p.centred) {
#pragma omp simd reduction(+ : mean)
            for (int64_t c = 0; c < columns; c++) mean += single(in[c]);
            mean /= (float)columns;
        }
#pragma omp simd reduction(+ : square)
        for (int64_t c = 0; c < columns; c++) {
            const float off = single(in[c]) - mean;
            square += off * off;
        }
        const float scale = (float)(1 / std::sqrt((double)square / (double)columns + p.eps));
        if (bias)
            for (int64_t c = 0; c < columns; c++) narrow((single(in[c]) - mean) * scale * weight[c] + bias[c], out + c);
        else
            for (int64_t c = 0; c < columns; c++) narrow((single(in[c]) - mean) * scale * weight[c], out + c);
    }
}

extern "C" {

int64_t lossplug_norm_bytes() { return sizeof(Norm); }

void lossplug_norm_rows(const Norm *p) {
    if (p->size == 4) norm<float>(*p);
    else norm<uint16_t>(*p);
}
}
