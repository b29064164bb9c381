// What the integer products of this folder share: int8 products on AVX-512 VNNI, rows of values to codes, and exp.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define LOSSPLUG_VNNI 1

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#define INLINED static inline __attribute__((always_inline))

static const int64_t TILE = 6, VECTORS = 4;  // rows of a product, vectors of columns beside each other: 24 registers

INLINED int64_t deep(int64_t n) { return (n + 3) / 4 * 4; }
INLINED int64_t wide(int64_t n) { return (n + 15) / 16 * 16; }

INLINED __mmask16 first_of(int64_t count) { return (__mmask16)(count >= 16 ? 0xffff : (1u << count) - 1); }

INLINED __m512 sixteen(const float *from, __mmask16 part) { return _mm512_maskz_loadu_ps(part, from); }

INLINED __m512 sixteen(const uint16_t *from, __mmask16 part) {  // bfloat16
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

INLINED void put(float *to, __mmask16 part, __m512 y) { _mm512_mask_storeu_ps(to, part, y); }

INLINED void put(uint16_t *to, __mmask16 part, __m512 y) {  // bfloat16, to nearest, ties to even; NaN stays one
    const __m512i bits = _mm512_castps_si512(y), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i half = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    half = _mm512_mask_mov_epi32(half, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(to, part, _mm512_cvtepi32_epi16(half));
}

// Codes of a row plus a shift, round(value / step) within bounds, ties to even, written in whole sixteens (0 behind the
// last); returns the sum of the codes, or 0.
template <bool SUM, class T>
static int32_t to_codes(const T *from, int64_t count, double step, double low, double high, int64_t shift, void *to) {
    const __m512 by = _mm512_set1_ps((float)step), least = _mm512_set1_ps((float)low), most = _mm512_set1_ps((float)high);
    const __m512i add = _mm512_set1_epi32((int32_t)shift);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t d = 0; d < count; d += 16) {
        const __mmask16 part = first_of(count - d);
        const __m512 at = _mm512_div_ps(sixteen(from + d, part), by);
        const __m512i codes = _mm512_cvtps_epi32(_mm512_min_ps(most, _mm512_max_ps(least, at)));
        if (SUM) sum = _mm512_mask_add_epi32(sum, part, sum, codes);
        const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_maskz_add_epi32(part, codes, add));
        _mm_storeu_si128((__m128i *)((uint8_t *)to + d), bytes);
    }
    return SUM ? _mm512_reduce_add_epi32(sum) : 0;
}

// TILE rows of bytes times COUNT vectors of sixteen columns; keeps int32 sums. Four bytes of a row meet 64 bytes of a
// vector: four neighbours of the summed axis for each of its columns.
template <int COUNT>
INLINED void product(const uint8_t *rows, int64_t apart, const int8_t *columns, int64_t per_four, int64_t per_vector,
                     int64_t depth, __m512i (&sums)[TILE][COUNT]) {
    __m512i held[TILE][COUNT];  // an array of its own: the compiler keeps it in registers
#pragma GCC unroll 6
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) held[r][c] = _mm512_setzero_si512();
    for (int64_t d = 0; d < depth; d += 4, columns += per_four) {
        __m512i right[COUNT];
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) right[c] = _mm512_loadu_si512(columns + c * per_vector);
#pragma GCC unroll 6
        for (int r = 0; r < TILE; r++) {
            int32_t four;
            std::memcpy(&four, rows + r * apart + d, 4);
            const __m512i left = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int c = 0; c < COUNT; c++) held[r][c] = _mm512_dpbusd_epi32(held[r][c], left, right[c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; c++) sums[r][c] = held[r][c];
}

// Columns in parts of at most VECTORS sixteens, as even as can be: do_part(how many sixteens, first column).
template <class F> INLINED void in_parts(int64_t columns, F do_part) {
    int64_t left = columns / 16, parts = (left + VECTORS - 1) / VECTORS, at = 0;
    for (; parts > 0; parts--) {
        const int64_t vectors = (left + parts - 1) / parts;
        switch (vectors) {
            case 1: do_part(std::integral_constant<int, 1>(), at); break;
            case 2: do_part(std::integral_constant<int, 2>(), at); break;
            case 3: do_part(std::integral_constant<int, 3>(), at); break;
            default: do_part(std::integral_constant<int, 4>(), at);
        }
        left -= vectors;
        at += vectors * 16;
    }
}

// What both attentions do, on several threads: pack(operand, batch, head) of queries (0), keys (1) and values (2), then
// attend(batch, head, first row) for every block of rows. Heads of queries share those of keys and values.
template <class P, class Pack, class Attend>
static void over_heads(const P &p, int64_t block, Pack pack, Attend attend) {
    const int64_t blocks = (p.rows + block - 1) / block, groups = p.heads / p.key_heads;
#pragma omp parallel num_threads((int)p.threads)
    {
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t h = 0; h < p.heads; h++)
                for (int operand = 0; operand < 3; operand++) {
                    if (operand == 0) pack(operand, b, h);
                    else if (h % groups == 0) pack(operand, b, h / groups);
                }
#pragma omp for collapse(3) schedule(dynamic, 2)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t h = 0; h < p.heads; h++)
                for (int64_t i = 0; i < blocks; i++) attend(b, h, i * block);
    }
}

// exp to two units in the last place, of numbers whose exp is a float32 number above 0; less is taken for -87.
INLINED __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.0f / 5040);  // its series: |r| is at most 0.35
    for (const float next : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(next));
    return _mm512_scalef_ps(y, n);
}

#endif
