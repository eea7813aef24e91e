// What all native kernels share: how they are called, the stored types, and the random numbers of masks.
//
// The arithmetic is that of the torch path, operation by operation, so that both give the same bits: products are
// rounded before they are added (compile with -ffp-contract=off) but where an operation is fused by name. Plain C
// ABI, no dependencies.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t ROW = 1024;                  // search.merge.operator.ROW_ELEMENTS: `start` is a multiple
constexpr int64_t SEGMENT = int64_t(1) << 20;  // search.merge.masks: elements that share a pair of keys
constexpr int64_t STEP = 16;                   // elements at a time
constexpr int64_t AHEAD = 1536;                // bytes that are asked for ahead, in each stream
constexpr int MOST = 64;                       // sources

enum Type : int32_t { F32 = 0, BF16 = 1, F16 = 2 };
enum Trim : int32_t { KEEP = 0, MAGNITUDE = 1, MASK = 2, LISTED = 3 };
constexpr uint32_t LEVELS = 1u << 16;  // search.merge.masks: a mask of this level drops nothing
enum Family : int32_t { FUSED = 0, PLAIN = 1, SUM = 2, ELECT = 3 };

}  // namespace

extern "C" {

struct Source {
    const void* data;
    const uint8_t* dropped;  // LISTED: 1 for each element that is dropped, or null
    uint64_t key;            // MASK: of the stream
    int64_t last;            // MAGNITUDE: elements up to here keep abs > from, those beyond abs > above
    int32_t type;
    uint32_t level;          // MASK: elements with u < level stay
    float from, above;
    float factor;            // of the values, or of the trimmed task vector
    float weight;            // ELECT with `divide`: what an element that agrees adds to the divisor
    float rescale;           // narrow merges: a product with the trimmed task vector before that with `factor`
    int32_t rounded;         // passes: type that differences are rounded to, F32 for none
};

struct Program {
    const Source* sources;
    const void* base;  // null for weighted sums
    int32_t base_type;
    int32_t count;     // of sources, 1 to MOST
    int32_t family;
    int32_t trim;      // of all sources
    int32_t divide;    // by `divisor`; ELECT: by the sum of the weights that agree
    float divisor;
    float scale;       // of what is added to the base
    int32_t rounded;   // type that results are rounded to before they become `type`
    int32_t type;      // of the output
    int32_t narrow;    // meiosis_merge_narrow: the type that every step is rounded to
};

}  // extern "C"

namespace {

template <class X> inline X load(const void* from) {
    X x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
template <class X> inline void save(void* to, X x) { std::memcpy(to, &x, sizeof x); }

// --- random numbers of masks

struct MaskKeys {
    uint32_t first, second;
};

inline MaskKeys mask_keys(uint64_t key, int64_t segment) {  // the finaliser of SplitMix64
    uint64_t z = key + (uint64_t(segment) + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return {uint32_t(z), uint32_t(z >> 32)};
}

template <class W> inline W mask_word(W x, W second) {
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    x ^= x >> 15;
    x ^= second;
    x *= 0x735a2d97u;
    x ^= x >> 15;
    return x;
}

// The words of a row: two elements each, the even one below.
inline void mask_row(uint64_t key, int64_t start, uint32_t* __restrict words) {
    const MaskKeys keys = mask_keys(key, start / SEGMENT);
    for (int64_t i = 0; i < ROW / 2; ++i)
        words[i] = mask_word(keys.first + uint32_t(start % SEGMENT / 2 + i), keys.second) ^ 0x80008000u;
}

// --- stored types

inline float from_bits(uint32_t bits) { return load<float>(&bits); }
inline uint32_t to_bits(float x) { return load<uint32_t>(&x); }

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));  // exact, subnormal numbers too
}

inline uint16_t float_to_half(float x) {
    const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds beyond the largest
    if (rest < 0x38800000u)                                    // subnormal: the addition rounds to even
        return uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000u));
    return uint16_t(sign | (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13);
}

inline uint16_t float_to_bfloat(float x) {
    const uint32_t bits = to_bits(x);
    return uint16_t(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void widen(const void* data, int32_t type, int64_t start, int64_t n, float* __restrict out) {
    const uint16_t* narrow = static_cast<const uint16_t*>(data) + start;
    int64_t i = 0;
    if (type == F32) {
        std::memcpy(out, static_cast<const float*>(data) + start, size_t(n) * 4);
    } else if (type == BF16) {
        for (; i < n; ++i) out[i] = from_bits(uint32_t(narrow[i]) << 16);
    } else {
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(load<__m128i>(narrow + i)));
#endif
        for (; i < n; ++i) out[i] = half_to_float(narrow[i]);
    }
}

inline void narrow(const float* in, int32_t type, int64_t n, uint16_t* __restrict out) {
    int64_t i = 0;
    if (type == BF16) {
        for (; i < n; ++i) out[i] = float_to_bfloat(in[i]);
    } else {
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8) save(out + i, _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; i < n; ++i) out[i] = float_to_half(in[i]);
    }
}

inline void round_row(float* values, int32_t type, int64_t n) {
    uint16_t halves[ROW];
    if (type == F32) return;
    narrow(values, type, n, halves);
    widen(halves, type, 0, n, values);
}

inline void store(const Program& p, float* values, char* target, int64_t n) {
    uint16_t halves[ROW];
    if (p.rounded != p.type) round_row(values, p.rounded, n);
    if (p.type == F32) {
        std::memcpy(target, values, size_t(n) * 4);
        return;
    }
    narrow(values, p.type, n, halves);
    std::memcpy(target, halves, size_t(n) * 2);
}

}  // namespace
