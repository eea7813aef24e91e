# mypy: ignore-errors
# ruff: noqa: N803, PLR0124, PLR0912
# (Kernels are in the language of Triton, which checkers take for Python.)
"""One pass over tensors on a GPU: read the sources, merge in float32, round, store.

The arithmetic is that of the torch path, operation by operation, so that both give the same bits: launch with
`enable_fp_fusion=False`, which rounds products before they are added but where `tl.fma` says otherwise.
bfloat16 comes and goes as int16, and is widened and rounded here: Triton's interpreter cuts it off instead.

BLOCK is search.merge.operator.ROW_ELEMENTS, so that a block never spans two segments of masks. ROUNDED says what
results are rounded to before they are stored: 0 nothing else, 1 bfloat16, 2 float16. TRIM is 0 for none, 1 by
magnitude, 2 by masks, as in native_code/merge.cpp. Of the sources, each an argument of its own, COUNT are looked at.
"""

import triton
import triton.language as tl


@triton.jit
def _widened(stored):
    """Stored values as float32."""
    if stored.dtype == tl.int16:
        values = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        values = stored.to(tl.float32)
    return values


@triton.jit
def _bfloat_bits(values):
    """int16: the nearest bfloat16, of two equally near ones the even one."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(values == values, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def _store(place, values, inside, ROUNDED: tl.constexpr):
    if ROUNDED == 1:
        values = _widened(_bfloat_bits(values))
    elif ROUNDED == 2:
        values = values.to(tl.float16).to(tl.float32)
    if place.dtype.element_ty == tl.int16:
        tl.store(place, _bfloat_bits(values), mask=inside)
    else:
        tl.store(place, values.to(place.dtype.element_ty), mask=inside)


@triton.jit
def weighted_sum(
    target,
    start: tl.int64,
    elements: tl.int64,
    source_0,
    source_1,
    source_2,
    source_3,
    source_4,
    source_5,
    source_6,
    source_7,
    factor_0,
    factor_1,
    factor_2,
    factor_3,
    factor_4,
    factor_5,
    factor_6,
    factor_7,
    divisor,
    COUNT: tl.constexpr,
    FUSED: tl.constexpr,
    DIVIDE: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`search.merge.weighted_sums.WeightedSum` for `elements` elements from `start` on; `target` is where these go."""
    sources = (source_0, source_1, source_2, source_3, source_4, source_5, source_6, source_7)
    factors = (factor_0, factor_1, factor_2, factor_3, factor_4, factor_5, factor_6, factor_7)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = begin + lane < elements
    total = _widened(tl.load(source_0 + (start + begin) + lane, mask=inside)) * tl.cast(factor_0, tl.float32)
    for s in tl.static_range(1, COUNT):
        values = _widened(tl.load(sources[s] + (start + begin) + lane, mask=inside))
        factor = tl.cast(factors[s], tl.float32)
        if FUSED:
            total = tl.fma(values, tl.broadcast_to(factor, [BLOCK]), total)
        else:
            total += values * factor
    if DIVIDE:
        total = tl.div_rn(total, tl.cast(divisor, tl.float32))
    _store(target + begin + lane, total, inside, ROUNDED)


@triton.jit
def _mask_words(key, position, BLOCK: tl.constexpr):
    """(BLOCK,) int32: u of the elements from `position` (a multiple of BLOCK) on; see search.merge.masks."""
    segment = (position >> 20).to(tl.uint64)
    z = key.to(tl.uint64) + (segment + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    first = (z & 0xFFFFFFFF).to(tl.uint32)
    second = (z >> 32).to(tl.uint32)
    pair = ((position & 0xFFFFF) >> 1).to(tl.uint32) + tl.arange(0, BLOCK // 2).to(tl.uint32)
    x = first + pair
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x ^= second
    x *= 0x735A2D97
    x ^= x >> 15
    x ^= 0x80008000
    return tl.reshape(tl.join(x & 0xFFFF, x >> 16), [BLOCK]).to(tl.int32)


@triton.jit(do_not_specialize=[f"number_{index}" for index in range(8)])
def task_vectors(
    target,
    start: tl.int64,
    elements: tl.int64,
    base,
    source_0,
    source_1,
    source_2,
    source_3,
    source_4,
    source_5,
    source_6,
    source_7,
    factor_0,
    factor_1,
    factor_2,
    factor_3,
    factor_4,
    factor_5,
    factor_6,
    factor_7,
    weight_0,
    weight_1,
    weight_2,
    weight_3,
    weight_4,
    weight_5,
    weight_6,
    weight_7,
    bound_0,
    bound_1,
    bound_2,
    bound_3,
    bound_4,
    bound_5,
    bound_6,
    bound_7,
    number_0: tl.int64,
    number_1: tl.int64,
    number_2: tl.int64,
    number_3: tl.int64,
    number_4: tl.int64,
    number_5: tl.int64,
    number_6: tl.int64,
    number_7: tl.int64,
    divisor,
    scale,
    COUNT: tl.constexpr,
    ELECTS: tl.constexpr,
    DIVIDE: tl.constexpr,
    TRIM: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`search.merge.task_vectors.TaskVectors` for `elements` elements from `start` on; `target` is where these go.

    MAGNITUDE: smaller magnitudes than `bound` are zeroed, and those equal to it beyond the flat index `number`; all
    where `number` is below -1. MASK: `bound` is the level of the mask (exact in float32), `number` its key.
    """
    sources = (source_0, source_1, source_2, source_3, source_4, source_5, source_6, source_7)
    factors = (factor_0, factor_1, factor_2, factor_3, factor_4, factor_5, factor_6, factor_7)
    weights = (weight_0, weight_1, weight_2, weight_3, weight_4, weight_5, weight_6, weight_7)
    bounds = (bound_0, bound_1, bound_2, bound_3, bound_4, bound_5, bound_6, bound_7)
    numbers = (number_0, number_1, number_2, number_3, number_4, number_5, number_6, number_7)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    position = tl.cast(start, tl.int64) + begin
    lane = tl.arange(0, BLOCK)
    inside = begin + lane < elements
    origin = _widened(tl.load(base + position + lane, mask=inside))
    terms = ()
    total = origin
    for s in tl.static_range(COUNT):
        delta = _widened(tl.load(sources[s] + position + lane, mask=inside)) - origin
        bound, number = tl.cast(bounds[s], tl.float32), tl.cast(numbers[s], tl.int64)
        if TRIM == 1:
            size = tl.abs(delta)
            # Equals are kept up to `number`: one bound serves all of a block but for that in which they end.
            below = (bound.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
            delta = tl.where(size <= tl.where(number < position, bound, below), 0.0, delta)
            last = tl.minimum(tl.maximum(number - position, -1), BLOCK).to(tl.int32)
            if (last >= 0) & (last < BLOCK):
                delta = tl.where((lane > last) & (size <= bound), 0.0, delta)
            if number < -1:
                delta = tl.where(inside, 0.0, delta)
        elif TRIM == 2:
            delta = tl.where(_mask_words(number, position, BLOCK) < bound.to(tl.int32), delta, 0.0)
        term = delta * tl.cast(factors[s], tl.float32)
        if s == 0:
            total = term
        else:
            total += term
        terms = terms + (term,)  # noqa: RUF005 - Triton knows no other way
    if ELECTS:
        # With s the sign of the sum, the terms of that sign, over the sum of their weights.
        sign = total.to(tl.uint32, bitcast=True) & 0x80000000
        share = total
        for s in tl.static_range(COUNT):
            agreed = (terms[s].to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
            agreed = tl.maximum(agreed, 0.0, propagate_nan=tl.PropagateNan.ALL)
            more = tl.where(agreed > 0.0, tl.cast(weights[s], tl.float32), 0.0)
            if s == 0:
                total = agreed
                share = more
            else:
                total += agreed
                share += more
        total = (total.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        if DIVIDE:
            total = tl.div_rn(total, tl.where(share == 0.0, 1.0, share))
    elif DIVIDE:
        total = tl.div_rn(total, tl.cast(divisor, tl.float32))
    _store(target + begin + lane, total * tl.cast(scale, tl.float32) + origin, inside, ROUNDED)
