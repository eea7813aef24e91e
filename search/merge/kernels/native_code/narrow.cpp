// Sums of task vectors rounded to a 16-bit type at every step, as search.merge.narrow does it: differences, products,
// quotients and the last sum are rounded one by one, sums over the sources once.

#include "common.h"

namespace {

void trim_row(const Source& source, int64_t start, int64_t n, float* x) {
    if (source.dropped)
        for (int64_t i = 0; i < n; ++i) x[i] = source.dropped[start + i] ? 0.0f : x[i];
    if (source.level == LEVELS) return;
    uint32_t words[ROW / 2];
    mask_row(source.key, start, words);
    // A product with 0 leaves the sign, as in torch.
    for (int64_t i = 0; i < n; ++i) x[i] *= (words[i / 2] >> 16 * (i % 2) & 0xffffu) < source.level ? 1.0f : 0.0f;
}

// The terms of a row, and their sum.
void add_terms(const Program& p, int64_t start, int64_t n, const float* base, float* terms, float* sum) {
    const int32_t type = p.narrow;
    for (int s = 0; s < p.count; ++s) {
        const Source& source = p.sources[s];
        float* x = terms + s * ROW;
        widen(source.data, source.type, start, n, x);
        for (int64_t i = 0; i < n; ++i) x[i] -= base[i];
        round_row(x, type, n);
        trim_row(source, start, n, x);
        if (source.rescale != 1.0f) {
            for (int64_t i = 0; i < n; ++i) x[i] *= source.rescale;
            round_row(x, type, n);
        }
        for (int64_t i = 0; i < n; ++i) x[i] *= source.factor;
        round_row(x, type, n);
        for (int64_t i = 0; i < n; ++i) sum[i] = s ? sum[i] + x[i] : x[i];
    }
    round_row(sum, type, n);
}

// Replaces the sum by that of the terms of its sign.
void elect_row(const Program& p, int64_t n, const float* terms, float* sum) {
    uint32_t sign[ROW];  // all ones where the sum is below 0, or no number
    float share[ROW];
    for (int64_t i = 0; i < n; ++i) sign[i] = sum[i] >= 0.0f ? 0u : ~0u;
    for (int s = 0; s < p.count; ++s) {
        const float* x = terms + s * ROW;
        const float weight = p.sources[s].weight;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t kept = (x[i] > 0.0f ? ~sign[i] : 0u) | (x[i] < 0.0f ? sign[i] : 0u);
            const float term = from_bits(to_bits(x[i]) & kept), more = from_bits(to_bits(weight) & kept);
            sum[i] = s ? sum[i] + term : term;
            share[i] = s ? share[i] + more : more;
        }
    }
    round_row(sum, p.narrow, n);
    if (!p.divide) return;
    round_row(share, p.narrow, n);
    for (int64_t i = 0; i < n; ++i) sum[i] /= share[i] == 0.0f ? 1.0f : share[i];
    round_row(sum, p.narrow, n);
}

}  // namespace

// As meiosis_merge, for a program whose `narrow` is a 16-bit type: that of all its tensors. `factor`, `weight`,
// `rescale` and `divisor` are numbers of that type.
extern "C" int meiosis_merge_narrow(const Program* program, int64_t start, int64_t stop, char* target) {
    const Program& p = *program;
    if (start % ROW || p.count < 1 || p.count > MOST || p.narrow == F32 || p.family < SUM || p.family > ELECT) return 1;
    alignas(64) static thread_local float terms[MOST * ROW];
    alignas(64) float base[ROW];
    alignas(64) float sum[ROW];
    const int64_t size = p.type == F32 ? 4 : 2;
    for (int64_t at = start; at < stop; at += ROW) {
        const int64_t n = stop - at < ROW ? stop - at : ROW;
        widen(p.base, p.base_type, at, n, base);
        add_terms(p, at, n, base, terms, sum);
        if (p.family == ELECT) {
            elect_row(p, n, terms, sum);
        } else if (p.divide) {
            for (int64_t i = 0; i < n; ++i) sum[i] /= p.divisor;
            round_row(sum, p.narrow, n);
        }
        if (p.scale != 1.0f) {
            for (int64_t i = 0; i < n; ++i) sum[i] *= p.scale;
            round_row(sum, p.narrow, n);
        }
        for (int64_t i = 0; i < n; ++i) sum[i] += base[i];
        round_row(sum, p.narrow, n);
        store(p, sum, target + (at - start) * size, n);
    }
    return 0;
}
