"""MultiSLERP: the direction of a weighted mean of unit vectors, with the weighted mean of the norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor

TINY_MEAN = 2e-8
"""Mean directions shorter than this are nothing but rounding: the dot products are good to its square."""


class MultiSlerp(Operator):
    """sum_i w_i norm(y_i) times the unit vector of sum_i w_i u_i, with u_i = y_i / (norm(y_i) + eps).

    y_i are the models, or with `task_vectors` their differences from the base, to which the result is
    added. This is one step of the mean on the sphere from the normalised mean m: the step itself,
    sum_i w_i (u_i - <u_i, m> m), is zero but for rounding, which is followed only with `compute: inputs`.
    Where the mean direction vanishes (below `eps`) two sources are blended linearly and more are refused. One
    source is given back as it is; tensors that are all zero stay so.
    """

    help = "several models or task vectors averaged by direction and by norm"
    source = (
        "Buss 2001, Spherical averages and applications to spherical splines, https://doi.org/10.1145/502122.502124"
    )
    parameters: ClassVar = (
        Parameter("weight", "source", "float", None, "weight of the model", search=(0.0, 1.0, 0.5)),
        Parameter("normalize_weights", "shared", "bool", True, "divide the weights by their sum"),
        Parameter("eps", "shared", "float", 1e-8, "added to norms, and the norm below which a mean vanishes", 0.0),
        Parameter("task_vectors", "shared", "bool", False, "average the differences from the base"),
    )
    needs_base = False
    prepares = "all_sources"

    def uses_base(self, shared: Mapping[str, Any]) -> bool:
        return bool(shared["task_vectors"])

    def check(self, per_source: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> str | None:
        from search.merge.parameter_faults import zero_sum_fault

        # One source is given back as it is, whatever its weight.
        return zero_sum_fault(per_source) if shared["normalize_weights"] and len(per_source) > 1 else None

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        from search.merge.spherical import dot_products

        return {"dots": dot_products(inputs)}

    def bind(
        self,
        inputs: Inputs,
        prepared: tuple[Mapping[str, Tensor], ...],
        per_source: tuple[Mapping[str, Any], ...],
        shared: Mapping[str, Any],
    ) -> Apply:
        from search.merge.spherical import combine, copy_result

        weights, eps = [float(values["weight"]) for values in per_source], float(shared["eps"])
        if len(weights) == 1:
            return copy_result(inputs.whole(0))
        if shared["normalize_weights"]:
            weights = [weight / math.fsum(weights) for weight in weights]
        dots: list[list[float]] = prepared[0]["dots"].tolist()
        norms = [math.sqrt(dots[index][index]) for index in range(len(weights))]
        scaled = [weight / (norm + eps) if norm else 0.0 for weight, norm in zip(weights, norms, strict=True)]
        indices = range(len(weights))
        square = math.fsum(scaled[i] * scaled[j] * dots[i][j] for i in indices for j in indices)
        length = math.sqrt(max(square, 0.0))
        if not any(norms):
            return combine(inputs, [0.0] * len(weights))
        vanishes = length < max(eps, TINY_MEAN)
        if inputs.compute == "inputs" and not vanishes:
            result = _by_steps(inputs, [float(values["weight"]) for values in per_source], shared)
            if result is not None:
                return copy_result(result)
            vanishes = True
        if vanishes:
            if len(weights) == 2:
                return combine(inputs, weights)
            self._refuse(inputs)
        size = math.fsum(weight * norm for weight, norm in zip(weights, norms, strict=True))
        return combine(inputs, [factor * size / length for factor in scaled])

    @staticmethod
    def _refuse(inputs: Inputs) -> None:
        from search.errors import RecipeError

        raise RecipeError(
            f"operator 'multislerp' at tensor '{inputs.name}': the weighted directions of {', '.join(inputs.models)} "
            "cancel, so their mean has none; change a weight or leave a source out"
        )


def _by_steps(inputs: Inputs, given: Sequence[float], shared: Mapping[str, Any]) -> Tensor | None:
    """The same with every step rounded to the dtype of the inputs, as mergekit computes it; flat. None where the
    mean vanishes."""
    import torch

    from search.merge.rows import pieces, torch_norm, torch_sum, whole_task_vector, wide

    dtype, eps, count = inputs.dtype, float(shared["eps"]), len(given)
    weights = torch.tensor(given, dtype=dtype)
    if shared["normalize_weights"]:
        weights = weights / weights.sum()
    shares: list[float] = weights.tolist()
    vectors = [whole_task_vector(inputs, index) for index in range(count)]
    norms = torch.stack([torch_norm(vector) for vector in vectors]).cpu()
    divisors = [float(value) or 1.0 for value in norms + eps]

    def mean(out: Tensor, terms: Iterable[Tensor]) -> None:
        summed = torch.zeros(out.shape, dtype=wide(dtype), device=out.device)
        for term, share in zip(terms, shares, strict=True):
            summed += term.mul_(share)
        out.copy_(summed)

    middle, other = (torch.empty_like(vectors[0]) for _ in range(2))
    for out, *parts in pieces(middle, *vectors):
        mean(out, (part / divisor for part, divisor in zip(parts, divisors, strict=True)))
    length = float(torch_norm(middle))
    if length < eps or not length:
        return None
    middle.div_(length)
    dots = []
    for vector, divisor in zip(vectors, divisors, strict=True):
        for out, m, v in pieces(other, middle, vector):
            torch.mul(v / divisor, m, out=out)
        dots.append(float(torch_sum(other)))
    for out, m, *parts in pieces(other, middle, *vectors):
        steps = zip(parts, divisors, dots, strict=True)
        mean(out, ((part / divisor).sub_(m * dot) for part, divisor, dot in steps))
    angle = torch_norm(other).cpu() + eps
    turn = float(torch.sin(angle) / angle) if float(angle) else 1.0
    cosine, size = float(torch.cos(angle)), float((norms * weights).sum())
    for m, tangent in pieces(middle, other):
        m.mul_(cosine).add_(tangent.mul_(turn)).mul_(size)
    return middle if inputs.base is None else middle.add_(inputs.whole(None).reshape(-1))


PLUGIN = MultiSlerp()
