// One pass over raw storage: read the sources, merge in float32, round, store.
//
// Work goes by rows of ROW elements. Where all tensors are float32, or all bfloat16, a row is merged from
// where it lies; any other row (mixed types, the odd end of a tensor, elements that are dropped one by one) is
// first copied into float32 rows, which gives the same bits.

#include "common.h"

namespace {

// --- eight numbers at once; GCC and Clang make of it what the processor has

typedef float V __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));
typedef int16_t H __attribute__((vector_size(32)));

struct Two {  // sixteen elements: the first and the last eight, or the even and the odd ones
    V a, b;
};

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (I){__VA_ARGS__})
#endif

inline V all(float x) { return V{x, x, x, x, x, x, x, x}; }
inline U all(uint32_t x) { return U{x, x, x, x, x, x, x, x}; }
inline U bits(V x) { return reinterpret_cast<U>(x); }
inline V number(U x) { return reinterpret_cast<V>(x); }
inline V keep_where(I mask, V x) { return number(bits(x) & reinterpret_cast<U>(mask)); }
inline V drop_where(I mask, V x) { return number(bits(x) & ~reinterpret_cast<U>(mask)); }

inline V multiply_add(V x, V factor, V sum) {
#if defined(__FMA__)
    return reinterpret_cast<V>(_mm256_fmadd_ps(reinterpret_cast<__m256>(x), reinterpret_cast<__m256>(factor),
                                               reinterpret_cast<__m256>(sum)));
#else
    V result;
    for (int i = 0; i < 8; ++i) result[i] = __builtin_fmaf(x[i], factor[i], sum[i]);
    return result;
#endif
}

inline V at_least_zero(V x) {  // as torch: -0 stays, and so does what is no number
#if defined(__AVX__)
    return reinterpret_cast<V>(_mm256_max_ps(_mm256_setzero_ps(), reinterpret_cast<__m256>(x)));
#else
    return drop_where(x < all(0.0f), x);
#endif
}

// The upper half of each number is the result, the lower is left over. A NaN stays one, because those that
// come of bfloat16 inputs have no bits set in the lower half.
inline U round_to_bfloat(V x) { return bits(x) + all(0x7fffu) + (bits(x) >> 16 & all(1u)); }

// Sixteen elements of a type. Masks go by pairs of neighbours, whose elements lie in `a` and in `b`.
struct Float {
    static constexpr int64_t size = 4;
    typedef Two Raw;
    static inline Raw read(const char* from) { return {load<V>(from), load<V>(from + 32)}; }
    static inline Two split(Raw x) { return x; }
    static inline Two paired(Raw x) {
        return {SHUFFLE(x.a, x.b, 0, 2, 8, 10, 4, 6, 12, 14), SHUFFLE(x.a, x.b, 1, 3, 9, 11, 5, 7, 13, 15)};
    }
    static inline void write(char* to, Two x) {
        save(to, x.a);
        save(to + 32, x.b);
    }
    static inline void write_paired(char* to, Two x) {
        write(to, {SHUFFLE(x.a, x.b, 0, 8, 1, 9, 4, 12, 5, 13), SHUFFLE(x.a, x.b, 2, 10, 3, 11, 6, 14, 7, 15)});
    }
    static inline U words() { return U{0, 1, 4, 5, 2, 3, 6, 7}; }  // numbers of the pairs, as they lie
    // x - base, or 0 where a half of the word, as a signed number, is above the limit.
    static inline Two drawn(Raw raw, Raw, Two base, U word, int32_t limit) {
        const Two x = paired(raw);
        const I above = reinterpret_cast<I>(all(uint32_t(limit) << 16 | 0xffffu));
        const I low = reinterpret_cast<I>(word << 16) > above, high = reinterpret_cast<I>(word) > above;
        return {drop_where(low, x.a - base.a), drop_where(high, x.b - base.b)};
    }
};

struct Bfloat {
    static constexpr int64_t size = 2;
    typedef U Raw;
    static inline Raw read(const char* from) { return load<U>(from); }
    static inline Two split(Raw x) { return {number(x << 16), number(x & all(0xffff0000u))}; }
    static inline Two paired(Raw x) { return split(x); }
    static inline void write(char* to, Two x) {
        save(to, U(round_to_bfloat(x.a) >> 16 | (round_to_bfloat(x.b) & all(0xffff0000u))));
    }
    static inline void write_paired(char* to, Two x) { write(to, x); }
    static inline U words() { return U{0, 1, 2, 3, 4, 5, 6, 7}; }
    static inline Two drawn(Raw x, Raw stored, Two base, U word, int32_t limit) {
        const H drop = reinterpret_cast<H>(word) > reinterpret_cast<H>(all((uint32_t(limit) & 0xffffu) * 0x10001u));
        const Two kept = split(reinterpret_cast<U>(drop ? reinterpret_cast<H>(stored) : reinterpret_cast<H>(x)));
        return {kept.a - base.a, kept.b - base.b};
    }
};

// --- one row, from where it lies

struct Row {
    const char* sources[MOST];
    const char* base;
    int64_t start;
    int64_t elements;  // a multiple of STEP
};

template <class T> inline void ahead(const char* from, int64_t at) {
    if (T::size * STEP >= 64 || at % (2 * STEP) == 0) __builtin_prefetch(from + at * T::size + AHEAD);
}

template <class T, int K, bool FUSE> void weighted_row(const Program& p, const Row& row, char* __restrict out) {
    constexpr int ROOM = K ? K : MOST;
    const int count = K ? K : p.count;
    const char* from[ROOM];
    float factors[ROOM];
    for (int s = 0; s < count; ++s) from[s] = row.sources[s], factors[s] = p.sources[s].factor;
    const bool divide = p.divide != 0;
    const float divisor = p.divisor;
    for (int64_t at = 0; at < row.elements; at += STEP) {
        const int64_t here = at * T::size;
        Two sum{};
        for (int s = 0; s < count; ++s) {
            const V factor = all(factors[s]);
            ahead<T>(from[s], at);
            const Two x = T::split(T::read(from[s] + here));
            if (s == 0)
                sum = {x.a * factor, x.b * factor};
            else if (FUSE)
                sum = {multiply_add(x.a, factor, sum.a), multiply_add(x.b, factor, sum.b)};
            else
                sum = {sum.a + x.a * factor, sum.b + x.b * factor};
        }
        if (divide) sum = {sum.a / all(divisor), sum.b / all(divisor)};
        T::write(out + here, sum);
    }
}

inline V shrink(V d, float bound) {  // keeps what is no number
    const V size = number(bits(d) & all(0x7fffffffu));
    // As whole numbers, which magnitudes order by and which leaves the units for floats to the rest.
    return keep_where(reinterpret_cast<I>(bits(size)) > reinterpret_cast<I>(bits(all(bound))), d);
}

inline I above_zero(V x) { return reinterpret_cast<I>(x) > I{}; }  // and what is no number

template <class T, int K, int FAMILY, bool DIVIDE, int TRIM>
void task_row(const Program& p, const Row& row, char* __restrict out) {
    constexpr int ROOM = K ? K : MOST;
    const int count = K ? K : p.count;
    const char* base_at = row.base;
    const float scale = p.scale, divisor = p.divisor;
    const char* from[ROOM];
    float factors[ROOM], weights[ROOM], bounds[ROOM];
    MaskKeys keys[ROOM];
    int32_t limits[ROOM];
    for (int s = 0; s < count; ++s) {
        const Source& source = p.sources[s];
        from[s] = row.sources[s];
        factors[s] = source.factor;
        weights[s] = source.weight;
        if (TRIM == MAGNITUDE) bounds[s] = row.start > source.last ? source.above : source.from;
        if (TRIM == MASK) {
            keys[s] = mask_keys(source.key, row.start / SEGMENT);
            keys[s].first += uint32_t(row.start % SEGMENT / 2);
            limits[s] = int32_t(source.level) - 1 - 0x8000;
        }
    }
    // Elections go in groups, one stage at a time: by itself a processor sees too few elements ahead to overlap the
    // stages of one with those of the next.
    constexpr int64_t GROUP = FAMILY == ELECT ? 8 : 1;
    // Arrays of V, because structs of two are copied piece by piece through other registers.
    V terms_a[GROUP][ROOM], terms_b[GROUP][ROOM], bases_a[GROUP], bases_b[GROUP], sums_a[GROUP], sums_b[GROUP];
    for (int64_t first = 0; first < row.elements; first += GROUP * STEP) {
        const int64_t left = (row.elements - first) / STEP, steps = left < GROUP ? left : GROUP;
        for (int64_t g = 0; g < steps; ++g) {
            const int64_t at = first + g * STEP, here = at * T::size;
            ahead<T>(base_at, at);
            const typename T::Raw stored = T::read(base_at + here);
            const Two base = TRIM == MASK ? T::paired(stored) : T::split(stored);
            Two sum{};
            for (int s = 0; s < count; ++s) {
                ahead<T>(from[s], at);
                const typename T::Raw x = T::read(from[s] + here);
                Two d;
                if (TRIM == MASK) {
                    const U number = T::words() + all(keys[s].first + uint32_t(at / 2));
                    d = T::drawn(x, stored, base, mask_word(number, all(keys[s].second)), limits[s]);
                } else {
                    const Two wide = T::split(x);
                    d = {wide.a - base.a, wide.b - base.b};
                    if (TRIM == MAGNITUDE) d = {shrink(d.a, bounds[s]), shrink(d.b, bounds[s])};
                }
                const V factor = all(factors[s]);
                const Two term = {d.a * factor, d.b * factor};
                sum = s ? Two{sum.a + term.a, sum.b + term.b} : term;
                if (FAMILY == ELECT) terms_a[g][s] = term.a, terms_b[g][s] = term.b;
            }
            bases_a[g] = base.a, bases_b[g] = base.b;
            sums_a[g] = sum.a, sums_b[g] = sum.b;
        }
        for (int64_t g = 0; FAMILY == ELECT && g < steps; ++g) {
            // Where the sign of the sum is s: the terms of that sign, over the sum of their weights.
            const V none = all(0.0f), one = all(1.0f);
            Two sum = {sums_a[g], sums_b[g]};
            const U sign_a = bits(sum.a) & all(0x80000000u), sign_b = bits(sum.b) & all(0x80000000u);
            Two share{};
            for (int s = 0; s < count; ++s) {
                const V a = number(bits(terms_a[g][s]) ^ sign_a), b = number(bits(terms_b[g][s]) ^ sign_b);
                const Two agreed = {at_least_zero(a), at_least_zero(b)};
                sum = s ? Two{sum.a + agreed.a, sum.b + agreed.b} : agreed;
                if (DIVIDE) {
                    const V weight = all(weights[s]);
                    const Two more = {keep_where(above_zero(a), weight), keep_where(above_zero(b), weight)};
                    share = s ? Two{share.a + more.a, share.b + more.b} : more;
                }
            }
            sum = {number(bits(sum.a) ^ sign_a), number(bits(sum.b) ^ sign_b)};
            if (DIVIDE) {
                share = {share.a + keep_where(share.a == none, one), share.b + keep_where(share.b == none, one)};
                sum = {sum.a / share.a, sum.b / share.b};
            }
            sums_a[g] = sum.a, sums_b[g] = sum.b;
        }
        for (int64_t g = 0; g < steps; ++g) {
            Two sum = {sums_a[g], sums_b[g]};
            const Two base = {bases_a[g], bases_b[g]};
            if (FAMILY == SUM && DIVIDE) sum = {sum.a / all(divisor), sum.b / all(divisor)};
            if (scale != 1.0f) sum = {sum.a * all(scale), sum.b * all(scale)};
            sum = {sum.a + base.a, sum.b + base.b};
            char* to = out + (first + g * STEP) * T::size;
            if (TRIM == MASK)
                T::write_paired(to, sum);
            else
                T::write(to, sum);
        }
    }
}

template <class T, int K, int FAMILY, bool DIVIDE> void task_row_by_trim(const Program& p, const Row& row, char* out) {
    if (p.trim == KEEP) return task_row<T, K, FAMILY, DIVIDE, KEEP>(p, row, out);
    if (p.trim == MAGNITUDE) return task_row<T, K, FAMILY, DIVIDE, MAGNITUDE>(p, row, out);
    return task_row<T, K, FAMILY, DIVIDE, MASK>(p, row, out);
}

template <class T, int K> void row_of(const Program& p, const Row& row, char* out) {
    if (p.family == FUSED) return weighted_row<T, K, true>(p, row, out);
    if (p.family == PLAIN) return weighted_row<T, K, false>(p, row, out);
    if (p.family == SUM && p.divide) return task_row_by_trim<T, K, SUM, true>(p, row, out);
    if (p.family == SUM) return task_row_by_trim<T, K, SUM, false>(p, row, out);
    if (p.divide) return task_row_by_trim<T, K, ELECT, true>(p, row, out);
    return task_row_by_trim<T, K, ELECT, false>(p, row, out);
}

template <class T> void merge_row(const Program& p, const Row& row, char* out) {
    switch (p.count) {
        case 1: return row_of<T, 1>(p, row, out);
        case 2: return row_of<T, 2>(p, row, out);
        case 3: return row_of<T, 3>(p, row, out);
        case 4: return row_of<T, 4>(p, row, out);
        case 8: return row_of<T, 8>(p, row, out);
        default: return row_of<T, 0>(p, row, out);
    }
}

// --- rows that are copied first

void copied_row(const Program& p, int64_t start, int64_t n, float* out, float* room) {
    Program plain = p;
    Row row;
    row.start = start;
    row.elements = (n + STEP - 1) / STEP * STEP;
    float* base = room;
    if (p.base) widen(p.base, p.base_type, start, n, base);
    row.base = reinterpret_cast<const char*>(base);
    for (int s = 0; s < p.count; ++s) {
        const Source& source = p.sources[s];
        float* x = room + (s + 1) * ROW;
        widen(source.data, source.type, start, n, x);
        row.sources[s] = reinterpret_cast<const char*>(x);
        if (p.trim == LISTED && source.dropped)
            for (int64_t i = 0; i < n; ++i) x[i] = source.dropped[start + i] ? base[i] : x[i];
        if (p.trim != MAGNITUDE) continue;
        for (int64_t i = 0; i < n; ++i) {
            const float bound = start + i > source.last ? source.above : source.from;
            x[i] = std::fabs(x[i] - base[i]) <= bound ? base[i] : x[i];  // a difference of 0 is one dropped
        }
    }
    if (p.trim != MASK) plain.trim = KEEP;
    merge_row<Float>(plain, row, reinterpret_cast<char*>(out));
}

bool is_uniform(const Program& p) {
    if (p.type == F16 || (p.rounded != p.type && p.rounded != F32) || (p.base && p.base_type != p.type)) return false;
    for (int s = 0; s < p.count; ++s)
        if (p.sources[s].type != p.type) return false;
    return true;
}

bool trims_by_element(const Program& p, int64_t start) {  // such as where a bound changes within this row
    if (p.trim == LISTED) return true;
    if (p.trim == MAGNITUDE)
        for (int s = 0; s < p.count; ++s)
            if (p.sources[s].last >= start && p.sources[s].last < start + ROW - 1) return true;
    return false;
}

}  // namespace

// Merges elements [start, stop) into `target`, whose first element is element `start`, a multiple of ROW.
// Returns 0, or 1 for a program that this file does not know.
extern "C" int meiosis_merge(const Program* program, int64_t start, int64_t stop, char* target) {
    const Program& p = *program;
    if (start % ROW || p.count < 1 || p.count > MOST || p.family < FUSED || p.family > ELECT) return 1;
    alignas(64) static thread_local float room[(MOST + 1) * ROW];
    alignas(64) float out[ROW];
    const bool uniform = is_uniform(p);
    const int64_t size = p.type == F32 ? 4 : 2;
    for (int64_t at = start; at < stop; at += ROW) {
        const int64_t n = stop - at < ROW ? stop - at : ROW;
        char* here = target + (at - start) * size;
        if (!uniform || n % STEP || trims_by_element(p, at)) {
            copied_row(p, at, n, out, room);
            store(p, out, here, n);
            continue;
        }
        Row row;
        row.start = at;
        row.elements = n;
        row.base = p.base ? static_cast<const char*>(p.base) + at * size : nullptr;
        for (int s = 0; s < p.count; ++s) row.sources[s] = static_cast<const char*>(p.sources[s].data) + at * size;
        if (p.type == F32)
            merge_row<Float>(p, row, here);
        else
            merge_row<Bfloat>(p, row, here);
    }
    return 0;
}
