"""Karcher mean: the direction with the least squared angles to all models, with the mean of their norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from search.merge.operator import Apply, Inputs, Operator, Parameter

if TYPE_CHECKING:
    from torch import Tensor

OPPOSITE = -1.0 + 1e-14
"""A point whose cosine with the mean is below this pulls in no direction."""

TINY_ANGLE = 1e-15
"""A point nearer to the mean than this pulls no further, whatever the tolerance."""


class Karcher(Operator):
    """The mean on the sphere of u_i = x_i / norm(x_i), times the mean of the norms.

    From the normalised mean u of the points (from the first point, where that vanishes), steps of
    g = mean_i th_i / sin th_i (u_i - cos th_i u), u <- cos norm(g) u + sin norm(g) g / norm(g), until g is
    shorter than `tol`. Tensors of a norm up to `tol` have no direction, but count in the mean of the norms. A
    point opposite to u is left out: every direction leads there.
    """

    help = "mean of models on the sphere (Riemannian centre of mass), unweighted"
    source = "Karcher 1977, Riemannian center of mass, https://doi.org/10.1002/cpa.3160300502"
    parameters: ClassVar = (
        Parameter("max_iter", "shared", "int", 10, "steps at most", 0),
        Parameter("tol", "shared", "float", 1e-5, "step below which it ends, in radians; norm that counts as 0", 0.0),
    )
    needs_base = False
    prepares = "all_sources"

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

        tol, steps = float(shared["tol"]), int(shared["max_iter"])
        dots: list[list[float]] = prepared[0]["dots"].tolist()
        norms = [math.sqrt(dots[index][index]) for index in range(len(dots))]
        points = [index for index, norm in enumerate(norms) if norm > tol]
        if not points:
            return combine(inputs, [0.0] * len(norms))
        if inputs.compute == "inputs":
            rounding = _Rounded([inputs.whole(index).reshape(-1) for index in points])
            return copy_result(_mean(rounding, steps, tol) * rounding.size(len(norms)))
        size = math.fsum(norms[index] for index in points) / len(norms)
        space = _Coefficients([[dots[i][j] / norms[i] / norms[j] for j in points] for i in points])
        factors = [0.0] * len(norms)
        for index, factor in zip(points, _mean(space, steps, tol).tolist(), strict=True):
            factors[index] = factor * size / norms[index]
        return combine(inputs, factors)


class _Coefficients:
    """Vectors as linear combinations of the points, by the points' cosines; exact for all that matters."""

    def __init__(self, cosines: Sequence[Sequence[float]]) -> None:
        import torch

        self._cosines = torch.tensor(cosines, dtype=torch.float64)
        self.points: list[Tensor] = list(torch.eye(len(cosines), dtype=torch.float64))
        self.share = 1.0 / len(self.points)

    def dot(self, first: Tensor, second: Tensor) -> float:
        return math.fsum((first.outer(second) * self._cosines).flatten().tolist())

    def length(self, vector: Tensor) -> float:
        return math.sqrt(max(self.dot(vector, vector), 0.0))

    def number(self, value: float) -> float:
        return value

    def of(self, function: str, value: float) -> float:
        result: float = getattr(math, function)(value)
        return result


class _Rounded:
    """Vectors as they are, each operation rounded to their dtype, as mergekit computes it; norms are float32."""

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        import torch

        from search.merge.rows import rounded, wide

        self._dtype = vectors[0].dtype
        self._wide = wide(self._dtype)
        self._copy = torch.empty(vectors[0].shape, dtype=self._wide, device=vectors[0].device)
        self.share = rounded(1.0 / len(vectors), self._wide)
        self._lengths = [self.length(vector) for vector in vectors]
        self.points = [vector / length for vector, length in zip(vectors, self._lengths, strict=True)]

    def dot(self, first: Tensor, second: Tensor) -> float:
        from search.torch_threads import one_thread

        with one_thread():
            return float(first.dot(second))

    def length(self, vector: Tensor) -> float:
        from search.merge.rows import torch_norm

        return float(torch_norm(self._copy.copy_(vector)))

    def number(self, value: float) -> float:
        from search.merge.rows import rounded

        return rounded(value, self._dtype)

    def of(self, function: str, value: float) -> float:
        import torch

        return self.number(float(getattr(torch, function)(torch.tensor(value, dtype=self._wide))))

    def size(self, count: int) -> float:
        """The sum of the norms over `count`."""
        import torch

        return self.number(float(sum(torch.tensor(self._lengths, dtype=self._wide) * (1.0 / count))))


_Space = _Coefficients | _Rounded


def _mean(space: _Space, steps: int, tol: float) -> Tensor:
    """The unit vector at the mean of the points of a space."""
    import torch

    from search.merge.rows import pieces

    mean = torch.zeros_like(space.points[0])
    for point in space.points:
        for m, p in pieces(mean, point):
            m.add_(space.share * p)
    size = space.length(mean)
    if size < tol or not size:
        mean.copy_(space.points[0])
    else:
        mean.div_(size)
    step = torch.empty_like(mean)
    for _ in range(steps):
        step.zero_()
        for point in space.points:
            cosine = space.number(max(-1.0, min(1.0, space.dot(mean, point))))
            angle = space.of("acos", cosine)
            if angle < max(tol, TINY_ANGLE) or cosine < OPPOSITE:
                continue
            factor = space.number(space.share * space.number(angle / space.of("sin", angle)))
            for s, p, m in pieces(step, point, mean):
                s.add_((cosine * m).neg_().add_(p).mul_(factor))
        size = space.length(step)
        if size < tol or not size:
            break
        cosine, sine = space.of("cos", size), space.of("sin", size)
        for m, s in pieces(mean, step):
            m.mul_(cosine).add_(s.div_(size).mul_(sine))
        mean.div_(space.length(mean))
    return mean


PLUGIN = Karcher()
