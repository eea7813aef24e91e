"""Task vectors as matrices: what the closed-form methods decompose, and how their result is added to the base.

Decompositions run in float64 on the device of the merge, on one thread where that is the CPU: the sums inside
LAPACK and BLAS depend on the number of threads, and what is prepared must not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from search.grouping import place_of
from search.merge.operator import Apply, Block, Inputs

CUTOFF = 1e-6
"""Singular values below this share of the largest count as zero."""

_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_CONV1D = re.compile(r"(^|\.)(?P<layer>c_attn|c_fc|c_proj|q_attn)\.weight$")


def is_matrix(inputs: Inputs) -> bool:
    """Whether a tensor maps vectors to vectors: two or more dimensions, none of them empty, and no embedding.

    Rows of an embedding (of tokens, positions or patches) are looked up, not multiplied with an input. The
    decompositions of its task vectors would be those of the vocabulary, at the cost of all other layers together.
    """
    return len(inputs.shape) > 1 and inputs.numel > 0 and place_of(inputs.name).kind != "embedding"


def as_matrices(tensor: Tensor, name: str) -> Tensor:
    """A tensor of two or more dimensions as (n, rows, columns), a view.

    Linear layers are one matrix. The experts of a mixture that are stored as one tensor of three dimensions are
    one each; any other kernel, of a convolution say, is (out, the rest).
    """
    if tensor.dim() == 3 and _EXPERTS.search(name):
        return tensor
    return tensor.reshape(1, tensor.shape[0], -1)


def has_inputs_first(name: str, shape: tuple[int, ...]) -> bool:
    """Whether matrices are stored as (inputs, outputs), not as `nn.Linear` does.

    So are the `Conv1D` of GPT-2, which its names and the shapes tell (a square `c_proj` is taken for one), and the
    experts of a mixture that are stored as one tensor.
    """
    if len(shape) == 3 and _EXPERTS.search(name):
        return True
    match = _CONV1D.search(name)
    if match is None or len(shape) != 2:
        return False
    return shape[0] >= shape[1] if match["layer"] == "c_proj" else shape[1] >= shape[0]


def task_matrices(inputs: Inputs) -> list[Tensor]:
    """d_i = x_i - base for every source, (n, rows, columns) each, in float64 on the device."""
    base = as_matrices(inputs.whole(None), inputs.name).double()
    return [as_matrices(inputs.whole(i), inputs.name).double() - base for i in range(len(inputs.models))]


class Factors(NamedTuple):
    """A = left diag(values) right with orthonormal columns of `left` and rows of `right`; values fall."""

    left: Tensor
    values: Tensor
    right: Tensor

    def first(self, count: int) -> Factors:
        return Factors(self.left[:, :count], self.values[:count], self.right[:count])


def factors(matrix: Tensor, scale: float = 0.0) -> Factors:
    """The singular value decomposition of a matrix (rows, columns), without what is next to zero.

    By the eigenvectors of M M^T or M^T M, whichever is smaller: several times as fast as `torch.linalg.svd`, on a
    GPU far more, and as good in float64 for all that is left. Directions below `CUTOFF` of the largest are left
    out: they are rounding errors of float32 weights, which LAPACK turns at will. So the number of values is the
    numerical rank, 0 for a matrix of zeros.

    Args:
        scale: size of the matrices that this one is a sum or difference of, whose rounding errors it has.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    rising, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    squares = rising.flip(0)
    rank = int((squares > squares[:1].clamp_min(scale**2) * CUTOFF**2).sum())
    values, vectors = squares[:rank].sqrt(), vectors.flip(1)[:, :rank]
    if wide:
        return Factors(vectors, values, vectors.T @ matrix / values[:, None])
    return Factors(matrix @ vectors / values, values, vectors.T)


def largest_norm(matrices: Sequence[Tensor]) -> float:
    """The largest Frobenius norm among matrices: `scale` of their sum."""
    return max(float(matrix.norm()) for matrix in matrices)


def nearest_isometry(matrix: Tensor) -> Tensor:
    """P Q^T for matrix = P D Q^T: the solution of the orthogonal Procrustes problem, on the range of the matrix
    where its columns (or rows) are not independent."""
    found = factors(matrix)
    return found.left @ found.right


def finished(inputs: Inputs, matrices: Sequence[Tensor]) -> Tensor:
    """Merged matrices (rows, columns) as one tensor to keep: on the CPU, in `Inputs.dtype`, of the shape of the
    output."""
    return torch.stack(list(matrices)).reshape(inputs.shape).to("cpu", inputs.dtype)


def isotropic(parts: Factors) -> Tensor:
    """left right times the mean of the values; zeros where there are none."""
    product = parts.left @ parts.right
    return product * parts.values.mean() if len(parts.values) else product


def add_prepared(inputs: Inputs, prepared: tuple[Mapping[str, Tensor], ...], scale: float) -> Apply:
    """base + scale * the one `delta` that was prepared, or the mean of the task vectors where none was."""
    (found,) = prepared
    return add_deltas(inputs, [found["delta"]], [scale]) if found else add_mean(inputs, scale)


def add_deltas(inputs: Inputs, deltas: Sequence[Tensor], scales: Sequence[float]) -> Apply:
    """base + sum_i scales_i deltas_i, for deltas of the shape of the output."""
    flat = [delta.reshape(-1) for delta in deltas]

    def apply(block: Block, out: Tensor) -> None:
        term = inputs.scratch("delta")[: out.numel()]
        for index, (delta, scale) in enumerate(zip(flat, scales, strict=True)):
            target = term if index else out
            part = delta[block.start : block.stop]
            if part.device == out.device:
                torch.mul(part, scale, out=target)
            else:
                target.copy_(part).mul_(scale)
            if index:
                out.add_(term)
        out.add_(block.base)

    return apply


def add_mean(inputs: Inputs, scale: float, weights: Sequence[float] | None = None) -> Apply:
    """base + scale * sum_i w_i d_i / T: what the methods do with vectors and embeddings."""
    count = len(inputs.models)
    given = [1.0] * count if weights is None else weights
    divisor = torch.tensor(float(count), dtype=inputs.dtype, device=inputs.device)

    def apply(block: Block, out: Tensor) -> None:
        delta = inputs.scratch("delta")[: out.numel()]
        for index, (source, weight) in enumerate(zip(block.sources, given, strict=True)):
            target = delta if index else out
            torch.sub(source, block.base, out=target)
            if weight != 1.0:
                target.mul_(weight)
            if index:
                out.add_(delta)
        out.div_(divisor)
        if scale != 1.0:
            out.mul_(scale)
        out.add_(block.base)

    return apply


def latest(inputs: Inputs, operator: str, parameters: Hashable, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` gave for this tensor, kept until the parameters change: one tensor for every set of models."""
    place = ("latest", operator, inputs.name, inputs.models, inputs.base, inputs.dtype, str(inputs.device))
    found = inputs.cache.get(place)
    if found is None or found[0] != parameters:
        found = inputs.cache[place] = (parameters, compute())
    tensor: Tensor = found[1]
    return tensor
