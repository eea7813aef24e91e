// What depends on one task vector: counts and ranks of magnitudes, sums of what masks keep.

#include "common.h"

namespace {

template <class Work> void each_delta(const Source& source, const void* base, int32_t base_type, int64_t start,
                                      int64_t stop, Work work) {
    float x[ROW], b[ROW];
    for (int64_t at = start; at < stop; at += ROW) {
        const int64_t n = stop - at < ROW ? stop - at : ROW;
        widen(source.data, source.type, at, n, x);
        widen(base, base_type, at, n, b);
        for (int64_t i = 0; i < n; ++i) x[i] = std::fabs(x[i] - b[i]);
        round_row(x, source.rounded, n);
        work(at, n, x);
    }
}

}  // namespace

// Adds to counts[upper 15 bits of a magnitude] or, for upper >= 0, to counts[lower 16 bits] where the upper are these.
extern "C" void meiosis_count(const Source* source, const void* base, int32_t base_type, int64_t start, int64_t stop,
                              int32_t upper, int64_t* counts) {
    each_delta(*source, base, base_type, start, stop, [&](int64_t, int64_t n, const float* x) {
        if (upper < 0)
            for (int64_t i = 0; i < n; ++i) ++counts[to_bits(x[i]) >> 16];
        else
            for (int64_t i = 0; i < n; ++i)
                if (to_bits(x[i]) >> 16 == uint32_t(upper)) ++counts[to_bits(x[i]) & 0xffffu];
    });
}

// Flat index of the `rank`-th element, from 1, in order of index, with just this magnitude; -1 if there are fewer.
extern "C" int64_t meiosis_find(const Source* source, const void* base, int32_t base_type, int64_t stop, uint32_t bits,
                                int64_t rank) {
    int64_t found = -1;
    for (int64_t at = 0; at < stop && found < 0; at += 64 * ROW) {
        const int64_t end = at + 64 * ROW < stop ? at + 64 * ROW : stop;
        each_delta(*source, base, base_type, at, end, [&](int64_t first, int64_t n, const float* x) {
            for (int64_t i = 0; i < n; ++i)
                if (to_bits(x[i]) == bits && --rank == 0) found = first + i;
        });
    }
    return found;
}

extern "C" float meiosis_largest(const Source* source, const void* base, int32_t base_type, int64_t start,
                                 int64_t stop) {
    uint32_t largest = 0;  // magnitudes order as their bits do, and what is no number comes last
    each_delta(*source, base, base_type, start, stop, [&](int64_t, int64_t n, const float* x) {
        for (int64_t i = 0; i < n; ++i) largest = to_bits(x[i]) > largest ? to_bits(x[i]) : largest;
    });
    return from_bits(largest);
}

// Adds floor(scale * magnitude) to sums[u / 64] for every element, and to sums[1024] where u < source->level.
extern "C" void meiosis_mask_sums(const Source* source, const void* base, int32_t base_type, int64_t start,
                                  int64_t stop, double scale, int64_t* sums) {
    each_delta(*source, base, base_type, start, stop, [&](int64_t at, int64_t n, const float* x) {
        uint32_t words[ROW / 2];
        mask_row(source->key, at, words);
        int64_t kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t u = words[i / 2] >> 16 * (i % 2) & 0xffffu;
            const int64_t size = int64_t(scale * double(x[i]));
            sums[u >> 6] += size;
            kept += u < source->level ? size : 0;
        }
        sums[1024] += kept;
    });
}

// Magnitudes order as their bits do, and equal ones as they lie: as (bits << 32 | flat index).
//
// Writes the elements whose bits are from `low` to `high` to `found`, and how many lie below to `below`. Returns how
// many were written, or -1 where there are more than `most`.
extern "C" int64_t meiosis_collect(const Source* source, const void* base, int32_t base_type, int64_t start,
                                   int64_t stop, uint32_t low, uint32_t high, int64_t most, uint64_t* found,
                                   int64_t* below) {
    int64_t count = 0, under = 0;
    const uint32_t range = high - low;
    each_delta(*source, base, base_type, start, stop, [&](int64_t at, int64_t n, const float* x) {
        if (count < 0) return;
        uint32_t less = 0;
        for (int64_t i = 0; i < n; ++i) less += to_bits(x[i]) < low;
        under += less;
        for (int64_t first = 0; first < n; first += STEP) {
            const int64_t last = first + STEP < n ? first + STEP : n;
            uint32_t within = 0;
            for (int64_t i = first; i < last; ++i) within += to_bits(x[i]) - low <= range;
            if (!within) continue;
            if (count + STEP > most) {
                count = -1;
                return;
            }
            for (int64_t i = first; i < last; ++i) {
                found[count] = uint64_t(to_bits(x[i])) << 32 | uint64_t(at + i);
                count += to_bits(x[i]) - low <= range;
            }
        }
    });
    *below = under;
    return count;
}

// Sets dropped[i] to 0 for the elements from `low` up to, but without, `high` in that order, and to 1 for all others.
extern "C" void meiosis_list(const Source* source, const void* base, int32_t base_type, int64_t start, int64_t stop,
                             uint64_t low, uint64_t high, uint8_t* dropped) {
    each_delta(*source, base, base_type, start, stop, [&](int64_t at, int64_t n, const float* x) {
        uint8_t* __restrict out = dropped + at;
        const int64_t from = int64_t(low & 0xffffffffu) - at, to = int64_t(high & 0xffffffffu) - at;
        if ((0 < from && from < n) || (0 < to && to < n)) {  // the row in which the equals of a bound end
            for (int64_t i = 0; i < n; ++i) {
                const uint64_t key = uint64_t(to_bits(x[i])) << 32 | uint64_t(at + i);
                out[i] = key < low || key >= high;
            }
            return;
        }
        const uint32_t least = uint32_t(low >> 32) + (from > 0), most = uint32_t(high >> 32) + (to > 0);
        for (int64_t i = 0; i < n; ++i) out[i] = (to_bits(x[i]) < least) | (to_bits(x[i]) >= most);
    });
}
