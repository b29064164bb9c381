// Attention of a few query rows over low-rank codes of keys and values, and over some exact ones.
//
// A tile of tokens at a time: codes are unpacked, keys rebuilt by a small matrix product, rotated and scored while they
// are in the first-level cache; softmax is kept online; values stay codes until the end, when one product per row brings
// the weighted sum of codes back. Work is split over threads by tokens, always in the same way for a number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
enum { BYTES = 64, ROWS = 6, COLUMNS = 4 };
#elif defined(__AVX__)
enum { BYTES = 32, ROWS = 4, COLUMNS = 2 };
#else
enum { BYTES = 16, ROWS = 4, COLUMNS = 2 };
#endif
typedef float vec __attribute__((vector_size(BYTES), aligned(4), may_alias));
enum { LANES = BYTES / 4, TILE = 48, PAD = 16 };

struct Problem {
    int64_t batch, heads, rows, width, value_width, half;
    int64_t k_rank, v_rank, k_bits, v_bits, code_type, table_type;  // types: 0 float32, 1 bfloat16, 2 float16
    int64_t pages, table_batch, window, sinks, threads;
    int64_t mask_batch, mask_head, mask_row;  // strides in elements
    const float *query;         // [batch, heads, rows, width], scaled, rotary pairs i and i + half
    const float *exact_query;   // the same in the order of the exact keys
    const float *k_decode, *k_mean;  // [heads, k_rank, padded width], [heads, padded width] or null
    const float *v_decode, *v_mean;
    const int64_t *page_tokens, *table_tokens;
    const void *const *k_codes;  // per page [batch, tokens, k_rank], or packed bytes
    const void *const *k_ranges;
    const void *const *v_codes;
    const void *const *v_ranges;
    const void *const *tables;  // per page [2, table_batch, tokens, half]
    const float *window_keys, *window_values;  // [batch, heads, window, width]
    const int64_t *sink_columns;  // [batch, sinks]
    const float *sink_keys, *sink_values;  // [batch, heads, sinks, width]
    const float *mask;  // added to the scores, or null
    float *out;  // [batch, heads, rows, value_width]
};

static inline int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

static inline float sum(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
#endif
}

template <int R, int N>
static inline void product_block(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb,
                                 int64_t inner, bool add) {
    vec acc[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) acc[r][n] = add ? *(const vec *)(c + r * ldc + n * LANES) : vec{};
    for (int64_t k = 0; k < inner; k++) {
        vec right[N];
        for (int n = 0; n < N; n++) right[n] = *(const vec *)(b + k * ldb + n * LANES);
        for (int r = 0; r < R; r++) {
            float left = a[r * lda + k];
            for (int n = 0; n < N; n++) acc[r][n] += left * right[n];
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) *(vec *)(c + r * ldc + n * LANES) = acc[r][n];
}

template <int N>
static void product_columns(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb,
                            int64_t count, int64_t inner, bool add) {
    int64_t r = 0;
    for (; r + ROWS <= count; r += ROWS) product_block<ROWS, N>(c + r * ldc, ldc, a + r * lda, lda, b, ldb, inner, add);
    for (; r + 2 <= count; r += 2) product_block<2, N>(c + r * ldc, ldc, a + r * lda, lda, b, ldb, inner, add);
    if (r < count) product_block<1, N>(c + r * ldc, ldc, a + r * lda, lda, b, ldb, inner, add);
}

// c [count, columns] (+)= a [count, inner] b [inner, columns]; columns and the rows of b and c are padded
static void product(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t count,
                    int64_t columns, int64_t inner, bool add) {
    int64_t n = 0, vectors = columns / LANES;
    for (; n + COLUMNS <= vectors; n += COLUMNS)
        product_columns<COLUMNS>(c + n * LANES, ldc, a, lda, b + n * LANES, ldb, count, inner, add);
    if (COLUMNS > 2)
        for (; n + 2 <= vectors; n += 2)
            product_columns<2>(c + n * LANES, ldc, a, lda, b + n * LANES, ldb, count, inner, add);
    for (; n < vectors; n++) product_columns<1>(c + n * LANES, ldc, a, lda, b + n * LANES, ldb, count, inner, add);
}

// exp by a polynomial on [-ln 2 / 2, ln 2 / 2], relative error below 2e-7; 0 far below 0
static inline float power(float x) {
    float kept = x < -87.0f ? -87.0f : x;
    float n = std::nearbyintf(kept * 1.44269504f);
    float r = kept - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &p, 4);
    bits += (int32_t)n << 23;
    std::memcpy(&p, &bits, 4);
    return x < -87.0f ? 0.0f : p;
}

static void to_float(float *to, const void *from, int64_t offset, int64_t count, int64_t type) {
    if (type == 0) {
        std::memcpy(to, (const float *)from + offset, count * sizeof(float));
    } else if (type == 1) {
        const uint16_t *p = (const uint16_t *)from + offset;
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits = (uint32_t)p[i] << 16;
            std::memcpy(to + i, &bits, 4);
        }
    } else {
        const _Float16 *p = (const _Float16 *)from + offset;
        for (int64_t i = 0; i < count; i++) to[i] = (float)p[i];
    }
}

// what every byte holds
struct Levels {
    float four[256][2], two[256][4];
    Levels() {
        for (int byte = 0; byte < 256; byte++) {
            for (int i = 0; i < 2; i++) four[byte][i] = (byte >> (4 * i)) & 15;
            for (int i = 0; i < 4; i++) two[byte][i] = (byte >> (2 * i)) & 3;
        }
    }
};
static const Levels LEVELS;

// codes of n tokens as float32 rows that are `stride` apart
static void unpack(float *to, int64_t stride, const void *codes, const void *ranges, int64_t first, int64_t n,
                   int64_t rank, int64_t bits, int64_t type) {
    if (bits == 16) {
        for (int64_t t = 0; t < n; t++) to_float(to + t * stride, codes, (first + t) * rank, rank, type);
        return;
    }
    const int64_t groups = (rank + 63) / 64, size = (rank + groups - 1) / groups, per_byte = 8 / bits;
    const int64_t bytes = (groups * size + per_byte - 1) / per_byte;
    static thread_local std::vector<float> memory;
    memory.resize(bytes * per_byte);
    float *levels = memory.data();
    for (int64_t t = 0; t < n; t++) {
        const uint8_t *packed = (const uint8_t *)codes + (first + t) * bytes;
        const _Float16 *range = (const _Float16 *)ranges + (first + t) * 2 * groups;
        float *row = to + t * stride;
        if (bits == 8)
            for (int64_t i = 0; i < bytes; i++) levels[i] = packed[i];
        else if (bits == 4)
            for (int64_t i = 0; i < bytes; i++) std::memcpy(levels + 2 * i, LEVELS.four[packed[i]], 2 * sizeof(float));
        else
            for (int64_t i = 0; i < bytes; i++) std::memcpy(levels + 4 * i, LEVELS.two[packed[i]], 4 * sizeof(float));
        for (int64_t group = 0; group < groups; group++) {
            const int64_t end = (group + 1) * size < rank ? (group + 1) * size : rank;
            const float low = (float)range[2 * group], scale = (float)range[2 * group + 1];
            for (int64_t i = group * size; i < end; i++) row[i] = low + scale * levels[i];
        }
    }
}

struct Part {  // softmax over some of the old tokens, before the division
    std::vector<float> top, mass, codes;
};

struct Tile {
    int64_t page, first, count, column;
};

static void run_part(const Problem &p, int64_t b, const std::vector<Tile> &tiles, int64_t start, int64_t stop, Part &part) {
    const int64_t rows = p.heads * p.rows, kp = padded(p.width), vp = padded(p.v_rank), rotary = 2 * p.half;
    part.top.assign(rows, -std::numeric_limits<float>::infinity());
    part.mass.assign(rows, 0.0f);
    part.codes.assign(rows * vp, 0.0f);
    static thread_local std::vector<float> memory;
    memory.resize(TILE * (p.k_rank + vp + kp + rotary) + rows * TILE + rows * kp);
    float *zk = memory.data(), *zv = zk + TILE * p.k_rank, *keys = zv + TILE * vp, *cos = keys + TILE * kp;
    float *sin = cos + TILE * p.half, *scores = sin + TILE * p.half, *query = scores + rows * TILE;
    std::memset(zv, 0, TILE * vp * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        std::memcpy(query + r * kp, p.query + (b * rows + r) * p.width, p.width * sizeof(float));
        std::memset(query + r * kp + p.width, 0, (kp - p.width) * sizeof(float));
    }
    for (int64_t index = start; index < stop; index++) {
        const Tile &tile = tiles[index];
        const int64_t n = tile.count, page = tile.page, at = b * p.page_tokens[page] + tile.first;
        const void *ranges = p.k_bits == 16 ? nullptr : p.k_ranges[page];
        const float *z = zk;
        if (p.k_bits == 16 && p.code_type == 0)
            z = (const float *)p.k_codes[page] + at * p.k_rank;
        else
            unpack(zk, p.k_rank, p.k_codes[page], ranges, at, n, p.k_rank, p.k_bits, p.code_type);
        unpack(zv, vp, p.v_codes[page], p.v_bits == 16 ? nullptr : p.v_ranges[page], at, n, p.v_rank, p.v_bits, p.code_type);
        const int64_t length = p.table_tokens[page], row = p.table_batch > 1 ? b : 0;
        to_float(cos, p.tables[page], (row * length + tile.first) * p.half, n * p.half, p.table_type);
        to_float(sin, p.tables[page], ((p.table_batch + row) * length + tile.first) * p.half, n * p.half, p.table_type);
        for (int64_t h = 0; h < p.heads; h++) {
            product(keys, kp, z, p.k_rank, p.k_decode + h * p.k_rank * kp, kp, n, kp, p.k_rank, false);
            for (int64_t t = 0; t < n; t++) {
                float *__restrict one = keys + t * kp;
                if (p.k_mean)
                    for (int64_t i = 0; i < kp; i++) one[i] += p.k_mean[h * kp + i];
                float *__restrict two = one + p.half;
                const float *__restrict c = cos + t * p.half, *__restrict s = sin + t * p.half;
                for (int64_t i = 0; i < p.half; i++) {
                    float x = one[i], y = two[i];
                    one[i] = x * c[i] - y * s[i];
                    two[i] = y * c[i] + x * s[i];
                }
            }
            for (int64_t m = 0; m < p.rows; m++) {
                const float *q = query + (h * p.rows + m) * kp;
                float *to = scores + (h * p.rows + m) * TILE;
                for (int64_t t = 0; t < n; t++) {
                    vec dot = {};
                    for (int64_t i = 0; i < kp; i += LANES) dot += *(const vec *)(q + i) * *(const vec *)(keys + t * kp + i);
                    to[t] = sum(dot);
                }
                if (p.mask) {
                    const float *mask = p.mask + b * p.mask_batch + h * p.mask_head + m * p.mask_row + tile.column;
                    for (int64_t t = 0; t < n; t++) to[t] += mask[t];
                }
            }
        }
        for (int64_t s = 0; s < p.sinks; s++) {  // they count with the exact tokens
            int64_t t = p.sink_columns[b * p.sinks + s] - tile.column;
            if (t >= 0 && t < n)
                for (int64_t r = 0; r < rows; r++) scores[r * TILE + t] = -std::numeric_limits<float>::infinity();
        }
        for (int64_t r = 0; r < rows; r++) {
            float *to = scores + r * TILE, top = part.top[r];
            for (int64_t t = 0; t < n; t++) top = to[t] > top ? to[t] : top;
            if (top == -std::numeric_limits<float>::infinity()) {
                for (int64_t t = 0; t < n; t++) to[t] = 0.0f;
                continue;
            }
            float shrink = part.mass[r] > 0 ? power(part.top[r] - top) : 0.0f, mass = 0.0f;
            for (int64_t t = 0; t < n; t++) to[t] = power(to[t] - top);
            for (int64_t t = 0; t < n; t++) mass += to[t];
            if (shrink != 1.0f)
                for (int64_t i = 0; i < vp; i++) part.codes[r * vp + i] *= shrink;
            part.mass[r] = part.mass[r] * shrink + mass;
            part.top[r] = top;
        }
        product(part.codes.data(), vp, scores, TILE, zv, vp, rows, vp, n, true);
    }
}

static float dot(const float *a, const float *b, int64_t n) {
    float s = 0;
    for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}

// adds the exact tokens to the parts of one row of the batch, and brings codes of values back
static void finish(const Problem &p, int64_t b, const Part *parts, int64_t count, int64_t old) {
    const int64_t rows = p.heads * p.rows, kp = padded(p.v_rank), vp = padded(p.value_width);
    const int64_t exact = p.sinks + p.window;
    std::vector<float> score(exact), code(kp), value(vp);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t h = r / p.rows, head = b * p.heads + h;
        const float *q = p.exact_query + (b * rows + r) * p.width;
        const float *mask = p.mask ? p.mask + b * p.mask_batch + h * p.mask_head + (r % p.rows) * p.mask_row : nullptr;
        float top = -std::numeric_limits<float>::infinity();
        for (int64_t e = 0; e < exact; e++) {
            int64_t column = old + e - p.sinks;
            const float *key = p.window_keys + (head * p.window + e - p.sinks) * p.width;
            bool skip = false;
            if (e < p.sinks) {
                const int64_t *columns = p.sink_columns + b * p.sinks;
                column = columns[e];
                key = p.sink_keys + (head * p.sinks + e) * p.width;
                skip = column >= old;  // it is in the window, too
                for (int64_t before = 0; before < e; before++) skip = skip || columns[before] == column;
            }
            score[e] = skip ? -std::numeric_limits<float>::infinity() : dot(q, key, p.width) + (mask ? mask[column] : 0.0f);
            top = score[e] > top ? score[e] : top;
        }
        for (int64_t i = 0; i < count; i++) top = parts[i].top[r] > top ? parts[i].top[r] : top;
        float mass = 0.0f, coded = 0.0f;
        std::fill(code.begin(), code.end(), 0.0f);
        for (int64_t i = 0; i < count; i++) {
            if (parts[i].mass[r] <= 0) continue;
            float w = power(parts[i].top[r] - top);
            coded += w * parts[i].mass[r];
            for (int64_t j = 0; j < kp; j++) code[j] += w * parts[i].codes[r * kp + j];
        }
        mass = coded;
        product(value.data(), vp, code.data(), kp, p.v_decode + h * p.v_rank * vp, vp, 1, vp, p.v_rank, false);
        if (p.v_mean)
            for (int64_t j = 0; j < vp; j++) value[j] += coded * p.v_mean[h * vp + j];
        for (int64_t e = 0; e < exact; e++) {
            float w = power(score[e] - top);
            const float *from = e < p.sinks ? p.sink_values + (head * p.sinks + e) * p.value_width
                                            : p.window_values + (head * p.window + e - p.sinks) * p.value_width;
            mass += w;
            for (int64_t j = 0; j < p.value_width; j++) value[j] += w * from[j];
        }
        float *out = p.out + (b * rows + r) * p.value_width;
        for (int64_t j = 0; j < p.value_width; j++) out[j] = value[j] / mass;
    }
}

extern "C" int64_t lossplug_problem_bytes() { return sizeof(Problem); }

extern "C" void lossplug_latent_attention(const Problem *problem) {
    const Problem &p = *problem;
    std::vector<Tile> tiles;
    int64_t old = 0;
    for (int64_t page = 0; page < p.pages; page++) {
        for (int64_t first = 0; first < p.page_tokens[page]; first += TILE) {
            int64_t left = p.page_tokens[page] - first;
            tiles.push_back({page, first, left < TILE ? left : (int64_t)TILE, old + first});
        }
        old += p.page_tokens[page];
    }
    const int64_t count = (int64_t)tiles.size();
    int64_t parts = (p.threads + p.batch - 1) / p.batch;
    parts = parts > count ? count : parts;
    parts = parts < 1 ? 1 : parts;
    std::vector<Part> found(p.batch * parts);
    const int64_t items = p.batch * parts;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t item = 0; item < items; item++) {
        int64_t b = item / parts, i = item % parts;
        run_part(p, b, tiles, count * i / parts, count * (i + 1) / parts, found[item]);
    }
    for (int64_t b = 0; b < p.batch; b++) finish(p, b, &found[b * parts], parts, old);
}
