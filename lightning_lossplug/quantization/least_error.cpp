// Squared errors of rows on grids of many steps, and the best of them: a block of a row is read once for all steps.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

static const int64_t BLOCK = 4096;  // entries that stay in the first cache

static double error_of(const float *x, int64_t count, float step, float low, float high) {
    const float by = 1 / step;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) {
        const float at = x[i] * by, above = at < low ? low : at, held = above > high ? high : above;
        const float off = x[i] - std::nearbyint(held) * step;
        sum += off * off;
    }
    return sum;
}

// Tries full[r] * fractions[f] for every row; best[r] is the first of the least error, or full[r] if none is a number.
// errors: [rows, count], zeros.
extern "C" void lossplug_least_error(const float *x, int64_t rows, int64_t columns, const float *full,
                                     const float *fractions, int64_t count, float least, double low, double high,
                                     double *errors, float *best, int64_t threads) {
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads((int)threads)
    {
        std::vector<double> own(count);
#pragma omp for collapse(2) schedule(static)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t b = 0; b < blocks; b++) {
                const float *from = x + r * columns + b * BLOCK;
                const int64_t here = std::min(BLOCK, columns - b * BLOCK);
                for (int64_t f = 0; f < count; f++)
                    own[f] = error_of(from, here, std::max(full[r] * fractions[f], least), (float)low, (float)high);
                for (int64_t f = 0; f < count; f++)
#pragma omp atomic
                    errors[r * count + f] += own[f];
            }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const double *of = errors + r * count;
            double lowest = std::numeric_limits<double>::infinity();
            best[r] = full[r];
            for (int64_t f = 0; f < count; f++)
                if (of[f] < lowest) lowest = of[f], best[r] = full[r] * fractions[f];
        }
    }
}
