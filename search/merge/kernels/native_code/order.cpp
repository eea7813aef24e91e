// Which elements torch's sort and topk would put into a range of ranks, without sorting the rest.
//
// A stable sort leaves nothing open. The others order equal numbers by how their algorithm moves them: std::sort
// (median of three, sections of up to 16 left to insertion) and std::nth_element of the C++ library. Only sections in
// which a wanted rank falls need to be followed. search.merge.kernels.order compares the outcome with torch's before it is used.

#include "common.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace {

struct Item {
    uint32_t key;  // bits of a magnitude: they order as the numbers do, and what is no number comes last
    uint32_t index;
};

struct Ascending {
    bool operator()(const Item& x, const Item& y) const { return x.key < y.key; }
};
struct Descending {
    bool operator()(const Item& x, const Item& y) const { return x.key > y.key; }
};

template <class Before> Item* median(Item* a, Item* b, Item* c, Before before) {
    if (before(*a, *b)) return before(*b, *c) ? b : before(*a, *c) ? c : a;
    return before(*a, *c) ? a : before(*b, *c) ? c : b;
}

// Where the second of two sections begins; none of the first comes after the pivot, none of the second before it.
template <class Before> Item* split(Item* first, Item* last, Before before) {
    std::swap(*first, *median(first + 1, first + (last - first) / 2, last - 1, before));
    const Item pivot = *first;
    Item *low = first + 1, *high = last;
    for (;; ++low) {
        while (before(*low, pivot)) ++low;
        do --high;
        while (before(pivot, *high));
        if (low >= high) return low;
        std::swap(*low, *high);
    }
}

// Brings [first, last) into the order of std::sort, as far as it decides what lies before the ranks.
template <class Before>
void sort_around(Item* first, Item* last, Item* low, Item* high, int depth, Before before) {
    const auto wanted = [&](Item* from, Item* to) { return (from < low && low < to) || (from < high && high < to); };
    while (last - first > 16) {
        if (depth-- == 0) return std::partial_sort(first, last, last, before);
        Item* const middle = split(first, last, before);
        if (wanted(middle, last)) sort_around(middle, last, low, high, depth, before);
        if (!wanted(first, middle)) return;
        last = middle;
    }
    std::stable_sort(first, last, before);
}

int twice_log2(int64_t n) {
    int depth = 0;
    for (; n > 1; n >>= 1) depth += 2;
    return depth;
}

}  // namespace

// Sets dropped[i] to 0 for the elements whose magnitudes have ranks [low, high) in the order of torch's sort, and to 1
// for all others. `order`: 0 ascending, 1 descending, 2 ascending and stable. Returns 1 without memory, else 0.
extern "C" int meiosis_sorted(const float* values, int64_t n, int64_t low, int64_t high, int32_t order,
                              uint8_t* dropped) {
    static_assert(sizeof(Item) == sizeof(uint64_t), "items take the room of whole numbers");
    const std::unique_ptr<uint64_t[]> room(new (std::nothrow) uint64_t[size_t(n)]);
    if (!room) return 1;
    std::memset(dropped, 1, size_t(n));
    if (order == 2) {
        uint64_t *const first = room.get(), *const last = first + n;
        for (int64_t i = 0; i < n; ++i) first[i] = uint64_t(to_bits(values[i])) << 32 | uint64_t(i);
        if (high < n) std::nth_element(first, first + high, last);
        if (low < high) std::nth_element(first, first + low, first + high);
        for (int64_t i = low; i < high; ++i) dropped[first[i] & 0xffffffffu] = 0;
        return 0;
    }
    Item *const first = reinterpret_cast<Item*>(room.get()), *const last = first + n;
    for (int64_t i = 0; i < n; ++i) first[i] = {to_bits(values[i]), uint32_t(i)};
    if (order == 1)
        sort_around(first, last, first + low, first + high, twice_log2(n), Descending());
    else
        sort_around(first, last, first + low, first + high, twice_log2(n), Ascending());
    for (int64_t i = low; i < high; ++i) dropped[first[i].index] = 0;
    return 0;
}

// As meiosis_sorted, for the `count` largest as torch's topk finds them; 64 times as many are more than there are.
extern "C" int meiosis_largest_of(const float* values, int64_t n, int64_t count, uint8_t* dropped) {
    const std::unique_ptr<Item[]> items(new (std::nothrow) Item[size_t(n)]);
    if (!items) return 1;
    for (int64_t i = 0; i < n; ++i) items[i] = {to_bits(values[i]), uint32_t(i)};
    Item* const first = items.get();
    if (count * 64 <= n)
        std::partial_sort(first, first + count, first + n, Descending());
    else if (count > 0)
        std::nth_element(first, first + count - 1, first + n, Descending());
    std::memset(dropped, 1, size_t(n));
    for (int64_t i = 0; i < count; ++i) dropped[items[i].index] = 0;
    return 0;
}
