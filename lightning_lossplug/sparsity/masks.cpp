// N:M masks and what is done with them, one pass each over a weight on a CPU.
//
// Magnitudes are compared as integers: without the sign bit, IEEE numbers of one width have the order of their bits.
// Bits of a mask lie in rows of whole bytes along the weight's first axis, the first entry in the lowest bit (bits.py).

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
enum { BYTES = 64 };
#elif defined(__AVX2__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
enum { LARGEST_RANKED = 32 };

template <class T>
struct Lanes {
    enum { COUNT = BYTES / sizeof(T) };
    typedef T vec __attribute__((vector_size(BYTES)));
    typedef T loose __attribute__((vector_size(BYTES), aligned(1), may_alias));
    typedef int8_t flags __attribute__((vector_size(BYTES / sizeof(T))));
    typedef int8_t loose_flags __attribute__((vector_size(BYTES / sizeof(T)), aligned(1), may_alias));
};

struct Shape {
    int64_t rows, length;         // of the weight: its first axis, and the entries per index of it
    int64_t units, groups, m, inner;  // [units, groups, m, inner]; a unit is one row, or m rows grouped across them
    int64_t n;
};

static uint64_t eight_bits(const uint8_t *flags) {  // 0 or 1 each
    uint64_t word;
    std::memcpy(&word, flags, 8);
    return (word * 0x0102040810204080ull) >> 56;
}

static void pack(const uint8_t *flags, int64_t length, uint8_t *bits) {
    int64_t whole = length / 8;
    for (int64_t i = 0; i < whole; i++) bits[i] = (uint8_t)eight_bits(flags + 8 * i);
    if (length % 8) {
        uint8_t last[8] = {0};
        std::memcpy(last, flags + 8 * whole, length % 8);
        bits[whole] = (uint8_t)eight_bits(last);
    }
}

template <class vec>
static vec turn(vec values, vec places) {
#ifdef __clang__
    vec turned;
    for (unsigned l = 0; l < sizeof(vec) / sizeof(values[0]); l++) turned[l] = values[places[l]];
    return turned;
#else
    return __builtin_shuffle(values, places);
#endif
}

// A row of whole vectors of groups of M = 2, 4, 8 ...: each vector is compared with itself, rotated within the groups.
template <class T, int M>
static T along(const T *source, int64_t entries, T n, uint8_t *flags) {
    using V = Lanes<T>;
    typedef typename V::vec vec;
    const T magnitude = (T)~((T)1 << (8 * sizeof(T) - 1));
    vec turned[M], earlier[M], worst = {0};
    for (int shift = 1; shift < M; shift++)
        for (int l = 0; l < V::COUNT; l++) {
            int place = l % M, other = (place + shift) % M;
            turned[shift][l] = (T)(l - place + other);
            earlier[shift][l] = place < other ? -1 : 0;  // of equal ones the earlier wins
        }
    for (int64_t at = 0; at < entries; at += V::COUNT) {
        vec keys = *(const typename V::loose *)(source + at) & magnitude, wins = {0};
        worst = keys > worst ? keys : worst;
        for (int shift = 1; shift < M; shift++)
            wins -= keys > turn(keys, turned[shift]) + earlier[shift];
        vec kept = wins >= (T)(M - n);
        *(typename V::loose_flags *)(flags + at) = __builtin_convertvector(kept, typename V::flags) & 1;
    }
    T highest = 0;
    for (int l = 0; l < V::COUNT; l++) highest = worst[l] > highest ? worst[l] : highest;
    return highest;
}

// Groups of whole vectors, of which one entry is kept (the first of the largest) or dropped (the last of the smallest).
template <class T>
static T extreme_along(const T *source, int64_t entries, int64_t m, bool largest, uint8_t *flags) {
    using V = Lanes<T>;
    typedef typename V::vec vec;
    const T magnitude = (T)~((T)1 << (8 * sizeof(T) - 1));
    vec turned[8] = {}, worst = {0};
    for (int step = 0, shift = 1; shift < V::COUNT; step++, shift *= 2)
        for (int l = 0; l < V::COUNT; l++) turned[step][l] = (T)(l ^ shift);
    for (int64_t start = 0; start < entries; start += m) {
        vec best = *(const typename V::loose *)(source + start) & magnitude, found = {0};
        for (int64_t at = V::COUNT; at < m; at += V::COUNT) {
            vec keys = *(const typename V::loose *)(source + start + at) & magnitude;
            worst = keys > worst ? keys : worst;
            best = (largest ? keys > best : keys < best) ? keys : best;
        }
        worst = best > worst ? best : worst;
        for (int step = 0; 1 << step < V::COUNT; step++) {
            vec other = turn(best, turned[step]);
            best = (largest ? other > best : other < best) ? other : best;
        }
        for (int64_t at = 0; at < m; at += V::COUNT) {
            vec here = (*(const typename V::loose *)(source + start + at) & magnitude) == best;
            found -= here;
            here = largest ? here : ~here;
            *(typename V::loose_flags *)(flags + start + at) = __builtin_convertvector(here, typename V::flags) & 1;
        }
        int64_t ties = -1;
        for (int l = 0; l < V::COUNT; l++) ties += found[l];
        for (int64_t i = largest ? m - 1 : 0; ties > 0; i += largest ? -1 : 1)
            if ((flags[start + i] != 0) == largest) {
                flags[start + i] = !largest;
                ties--;
            }
    }
    T highest = 0;
    for (int l = 0; l < V::COUNT; l++) highest = worst[l] > highest ? worst[l] : highest;
    return highest;
}

template <class T, int V>
static int64_t at_least(const typename Lanes<T>::vec *keys, T threshold) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        int64_t count = 0;
        for (int v = 0; v < V; v++)
            count += __builtin_popcount(_mm512_cmpge_epi32_mask((__m512i)keys[v], _mm512_set1_epi32(threshold)));
        return count;
    }
#endif
    typename Lanes<T>::vec found = {0};
    for (int v = 0; v < V; v++) found -= keys[v] >= threshold;
    T count = 0;
    for (int l = 0; l < Lanes<T>::COUNT; l++) count += found[l];
    return count;
}

// Groups of V vectors: the n-th largest is looked for between the smallest and the largest, by halving.
template <class T, int V>
static T halving_along(const T *source, int64_t entries, int64_t n, uint8_t *flags) {
    enum { COUNT = Lanes<T>::COUNT, M = V * COUNT };
    typedef typename Lanes<T>::vec vec;
    const T magnitude = (T)~((T)1 << (8 * sizeof(T) - 1));
    T highest = 0;
    for (int64_t start = 0; start < entries; start += M) {
        vec keys[V], least, most;
        for (int v = 0; v < V; v++) {
            keys[v] = *(const typename Lanes<T>::loose *)(source + start + v * COUNT) & magnitude;
            least = v == 0 ? keys[v] : least < keys[v] ? least : keys[v];
            most = v == 0 ? keys[v] : most > keys[v] ? most : keys[v];
        }
        T low = least[0], high = most[0];
        for (int l = 1; l < COUNT; l++) {
            low = least[l] < low ? least[l] : low;
            high = most[l] > high ? most[l] : high;
        }
        highest = high > highest ? high : highest;
        int64_t count = M;
        while (low < high && count != n) {
            const T middle = (T)(low + (high - low) / 2 + 1);
            const int64_t found = at_least<T, V>(keys, middle);
            if (found >= n) low = middle, count = found;
            else high = (T)(middle - 1);
        }
        for (int v = 0; v < V; v++)
            *(typename Lanes<T>::loose_flags *)(flags + start + v * COUNT) =
                __builtin_convertvector(keys[v] >= low, typename Lanes<T>::flags) & 1;
        for (int64_t i = M - 1; count > n; i--)  // of equal ones the last go
            if ((source[start + i] & magnitude) == low) {
                flags[start + i] = 0;
                count--;
            }
    }
    return highest;
}

// One group per lane: finds the largest (sign 1) or, of the smallest, the last (sign -1).
template <class T, class vec>
static void by_extreme(const vec *keys, vec *kept, int64_t m, bool largest) {
    vec best = keys[0], place = {0};
    for (int64_t i = 1; i < m; i++) {
        vec better = largest ? keys[i] > best : keys[i] <= best;
        best = better ? keys[i] : best;
        place = better ? (vec){} + (T)i : place;
    }
    for (int64_t i = 0; i < m; i++) {
        vec here = place == (vec){} + (T)i;
        kept[i] = largest ? here : ~here;
    }
}

// One group per lane: counts, for each entry, how many of its group it beats.
template <class T, class vec>
static void by_rank(const vec *keys, vec *kept, int64_t m, T needed) {
    for (int64_t i = 0; i < m; i++) {
        vec wins = (vec){} + (T)i;
        for (int64_t j = 0; j < i; j++) {
            vec lost = keys[j] >= keys[i];
            kept[j] -= lost;
            wins += lost;
        }
        kept[i] = wins;
    }
    for (int64_t i = 0; i < m; i++) kept[i] = kept[i] >= needed;
}

// One group per lane: finds the n-th largest bit by bit, then takes the first ones of those equal to it.
template <class T, class vec>
static void by_threshold(const vec *keys, vec *kept, int64_t m, T n) {
    vec threshold = {0}, missing = (vec){} + n;
    for (int bit = 8 * (int)sizeof(T) - 2; bit >= 0; bit--) {
        vec trial = threshold | (T)((T)1 << bit), count = {0};
        for (int64_t i = 0; i < m; i++) count -= keys[i] >= trial;
        threshold = count >= n ? trial : threshold;
    }
    for (int64_t i = 0; i < m; i++) missing += keys[i] > threshold;
    for (int64_t i = 0; i < m; i++) {
        vec equal = (keys[i] == threshold) & (missing > 0);
        missing += equal;
        kept[i] = (keys[i] > threshold) | equal;
    }
}

template <class T>
static T across(const T *source, const Shape &s, typename Lanes<T>::vec *keys, typename Lanes<T>::vec *kept,
                uint8_t *flags) {
    enum { COUNT = Lanes<T>::COUNT };
    const int64_t m = s.m, inner = s.inner, lanes = s.groups * inner;
    const T magnitude = (T)~((T)1 << (8 * sizeof(T) - 1));
    typename Lanes<T>::vec worst = {0};
    for (int64_t start = 0; start < lanes; start += COUNT) {
        const int64_t filled = lanes - start < COUNT ? lanes - start : COUNT;
        int64_t base[COUNT];
        for (int64_t l = 0; l < COUNT; l++) {
            int64_t lane = start + (l < filled ? l : 0);
            base[l] = inner == 1 ? lane * m : lane / inner * m * inner + lane % inner;
        }
        for (int64_t i = 0; i < m; i++) {
            T *to = (T *)(keys + i);
            for (int64_t l = 0; l < COUNT; l++) to[l] = source[base[l] + i * inner];
            keys[i] &= magnitude;
            worst = keys[i] > worst ? keys[i] : worst;
        }
        if (s.n == 1 || s.n == m - 1)
            by_extreme<T>(keys, kept, m, s.n == 1);
        else if (m <= LARGEST_RANKED)
            by_rank<T>(keys, kept, m, (T)(m - s.n));
        else
            by_threshold<T>(keys, kept, m, (T)s.n);
        for (int64_t i = 0; i < m; i++) {
            const T *from = (const T *)(kept + i);
            for (int64_t l = 0; l < filled; l++) flags[base[l] + i * inner] = (uint8_t)(from[l] & 1);
        }
    }
    T highest = 0;
    for (int l = 0; l < COUNT; l++) highest = worst[l] > highest ? worst[l] : highest;
    return highest;
}

template <class T>
static T unit_mask(const T *source, const Shape &s, typename Lanes<T>::vec *keys, typename Lanes<T>::vec *kept,
                   uint8_t *flags) {
    const int64_t entries = s.groups * s.m;
    const bool whole = s.inner == 1 && entries % Lanes<T>::COUNT == 0;
    if (whole && s.m % Lanes<T>::COUNT == 0 && (s.n == 1 || s.n == s.m - 1))
        return extreme_along(source, entries, s.m, s.n == 1, flags);
    if (whole && s.m <= Lanes<T>::COUNT) switch (s.m) {
        case 2: return along<T, 2>(source, entries, (T)s.n, flags);
        case 4: return along<T, 4>(source, entries, (T)s.n, flags);
        case 8: return along<T, 8>(source, entries, (T)s.n, flags);
        case 16: return along<T, 16>(source, entries, (T)s.n, flags);
        }
    if (whole && s.m % Lanes<T>::COUNT == 0) switch (s.m / Lanes<T>::COUNT) {
        case 1: return halving_along<T, 1>(source, entries, s.n, flags);
        case 2: return halving_along<T, 2>(source, entries, s.n, flags);
        case 4: return halving_along<T, 4>(source, entries, s.n, flags);
        case 8: return halving_along<T, 8>(source, entries, s.n, flags);
        }
    return across<T>(source, s, keys, kept, flags);
}

template <class T>
static int64_t mask_of(const void *source, const Shape &s, T infinity, uint8_t *out, bool packed, int threads) {
    const int64_t unit = s.groups * s.m * s.inner, rows = s.rows / s.units, bytes = (s.length + 7) / 8;
    int64_t unordered = 0;
#pragma omp parallel num_threads(threads) reduction(+ : unordered)
    {
        std::vector<typename Lanes<T>::vec> keys(s.m), kept(s.m);
        std::vector<uint8_t> own(packed ? unit : 0);
#pragma omp for schedule(static)
        for (int64_t u = 0; u < s.units; u++) {
            uint8_t *flags = packed ? own.data() : out + u * unit;
            unordered += unit_mask((const T *)source + u * unit, s, keys.data(), kept.data(), flags) >= infinity;
            for (int64_t r = 0; packed && r < rows; r++)
                pack(flags + r * s.length, s.length, out + (u * rows + r) * bytes);
        }
    }
    return unordered;
}

template <class T>
struct Eight {
    typedef T vec __attribute__((vector_size(8 * sizeof(T))));
    typedef T loose __attribute__((vector_size(8 * sizeof(T)), aligned(1), may_alias));

    vec rows[256];  // what the bits of a byte say of eight entries

    Eight(T kept, T pruned) {
        for (int byte = 0; byte < 256; byte++)
            for (int i = 0; i < 8; i++) rows[byte][i] = byte >> i & 1 ? kept : pruned;
    }
};

// to = change(to, from, what the bits say), eight entries at a time.
template <class T, class Change>
static void each(T *to, const T *from, const uint8_t *bits, int64_t rows, int64_t length, const Eight<T> &table,
                 int threads, Change change) {
    typedef typename Eight<T>::loose loose;
    typedef typename Eight<T>::vec vec;
    const int64_t bytes = (length + 7) / 8, whole = length / 8, rest = length % 8 * (int64_t)sizeof(T);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = bits + r * bytes;
        const T *in = from + r * length;
        T *out = to + r * length;
        for (int64_t b = 0; b < whole; b++) {
            vec old = *(loose *)(out + 8 * b), given = *(const loose *)(in + 8 * b);
            *(loose *)(out + 8 * b) = change(old, given, table.rows[row[b]]);
        }
        if (rest) {
            vec old = {0}, given = {0};
            std::memcpy(&old, out + 8 * whole, rest);
            std::memcpy(&given, in + 8 * whole, rest);
            old = change(old, given, table.rows[row[whole]]);
            std::memcpy(out + 8 * whole, &old, rest);
        }
    }
}

template <class T>
static void keep(const void *values, const uint8_t *bits, void *out, int64_t rows, int64_t length, int threads) {
    static const Eight<T> table((T)-1, 0);
    typedef typename Eight<T>::vec vec;
    each((T *)out, (const T *)values, bits, rows, length, table, threads, [](vec, vec in, vec all) { return in & all; });
}

template <class T>
static void scale(const void *values, const uint8_t *bits, void *out, int64_t rows, int64_t length, double kept,
                  double pruned, int threads) {
    const Eight<T> table((T)kept, (T)pruned);
    typedef typename Eight<T>::vec vec;
    each((T *)out, (const T *)values, bits, rows, length, table, threads, [](vec, vec in, vec by) { return in * by; });
}

template <class T>
static void pull(void *grad, const void *weight, const uint8_t *bits, int64_t rows, int64_t length, double strength,
                 int threads) {
    const Eight<T> table(0, (T)strength);
    typedef typename Eight<T>::vec vec;
    each((T *)grad, (const T *)weight, bits, rows, length, table, threads, [](vec old, vec in, vec by) {
        vec change = in * by;
        return old + change;
    });
}

extern "C" {

// How many bits differ.
int64_t lossplug_changed(const uint8_t *before, const uint8_t *after, int64_t bytes) {
    int64_t count = 0, whole = bytes / 8;
    for (int64_t i = 0; i < whole; i++) {
        uint64_t a, b;
        std::memcpy(&a, before + 8 * i, 8);
        std::memcpy(&b, after + 8 * i, 8);
        count += __builtin_popcountll(a ^ b);
    }
    for (int64_t i = 8 * whole; i < bytes; i++) count += __builtin_popcount(before[i] ^ after[i]);
    return count;
}

// dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64. Returns 0 if every entry could be ordered.
int64_t lossplug_nm_mask(const void *source, int64_t dtype, int64_t rows, int64_t length, int64_t units, int64_t groups,
                         int64_t m, int64_t inner, int64_t n, uint8_t *out, int64_t packed, int64_t threads) {
    const Shape s = {rows, length, units, groups, m, inner, n};
    switch (dtype) {
    case 0: return mask_of<int32_t>(source, s, 0x7f800000, out, packed, (int)threads);
    case 1: return mask_of<int16_t>(source, s, 0x7f80, out, packed, (int)threads);
    case 2: return mask_of<int16_t>(source, s, 0x7c00, out, packed, (int)threads);
    default: return mask_of<int64_t>(source, s, 0x7ff0000000000000ll, out, packed, (int)threads);
    }
}

// out = values where a bit is set, else +0.
void lossplug_keep(const void *values, const uint8_t *bits, void *out, int64_t size, int64_t rows, int64_t length,
                   int64_t threads) {
    if (size == 2) keep<uint16_t>(values, bits, out, rows, length, (int)threads);
    else if (size == 4) keep<uint32_t>(values, bits, out, rows, length, (int)threads);
    else keep<uint64_t>(values, bits, out, rows, length, (int)threads);
}

// out = values times kept or pruned; float32 (size 4) or float64.
void lossplug_scale(const void *values, const uint8_t *bits, void *out, int64_t size, int64_t rows, int64_t length,
                    double kept, double pruned, int64_t threads) {
    if (size == 4) scale<float>(values, bits, out, rows, length, kept, pruned, (int)threads);
    else scale<double>(values, bits, out, rows, length, kept, pruned, (int)threads);
}

// grad += strength * weight where a bit is not set.
void lossplug_pull(void *grad, const void *weight, const uint8_t *bits, int64_t size, int64_t rows, int64_t length,
                   double strength, int64_t threads) {
    if (size == 4) pull<float>(grad, weight, bits, rows, length, strength, (int)threads);
    else pull<double>(grad, weight, bits, rows, length, strength, (int)threads);
}
}
