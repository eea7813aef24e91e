"""mergekit's merge methods, as data: their parameters, what they do with a base, and our operators for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from search.recipe import Value

Base = Literal["task vectors", "may be", "first source", "a source", "none"]
"""What `base_model` is to a method: where task vectors start, or may start; the first of two points; one more
model that is merged; of no meaning."""


@dataclass(frozen=True)
class Method:
    """One merge method of mergekit 0.1.5.

    Attributes:
        per_model, shared: parameter -> default; None where one must be given.
        no_effect: parameters that mergekit reads without any effect on the result, -> whether per model.
        float32_inside: whether it computes in float32 and rounds once, whatever the inputs are stored in.
        float32_out: whether its output is float32 where the inputs are narrower and `out_dtype` is not given.
    """

    name: str
    base: Base
    per_model: Mapping[str, Value | None] = field(default_factory=dict)
    shared: Mapping[str, Value | None] = field(default_factory=dict)
    no_effect: Mapping[str, bool] = field(default_factory=dict)
    float32_inside: bool = False
    float32_out: bool = False

    @cached_property
    def of_models(self) -> frozenset[str]:
        """Parameters that may stand with one model."""
        return frozenset((*self.per_model, *(name for name, per_model in self.no_effect.items() if per_model)))

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Every parameter that mergekit reads for this method -> bool, int or float."""
        names = (*self.per_model, *self.shared, *self.no_effect)
        return {name: "bool" if name in _BOOLS else "int" if name in _INTS else "float" for name in names}

    @cached_property
    def elsewhere(self) -> frozenset[str]:
        """Parameters of other methods; files that were made from others have them without any effect."""
        return frozenset(name for method in METHODS.values() for name in method.kinds) - frozenset(self.kinds)


_BOOLS = frozenset(
    ("normalize", "rescale", "int8_mask", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights")
)
_INTS = frozenset(("max_iter",))

_WEIGHT: dict[str, Value | None] = {"weight": None}
_SPARSE: dict[str, Value | None] = {"weight": None, "density": 1.0}
_INT8 = {"int8_mask": False}


def _task(
    name: str, per_model: Mapping[str, Value | None], *, normalize: bool, rescale: bool, no_rescale: bool = False
) -> Method:
    shared: dict[str, Value | None] = {"normalize": normalize, "rescale": rescale, "lambda": 1.0}
    ignored = dict(_INT8)
    if no_rescale:
        del shared["rescale"]
        ignored |= {"rescale": False, "density": True}
    return Method(name, "task vectors", per_model, shared, ignored)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", "a source", _WEIGHT, {"normalize": True}, float32_inside=True),
        Method("slerp", "first source", {}, {"t": None}, float32_inside=True),
        Method("nuslerp", "may be", _WEIGHT, {"nuslerp_flatten": True, "nuslerp_row_wise": False}),
        Method("multislerp", "may be", _WEIGHT, {"normalize_weights": True, "eps": 1e-8}),
        Method("karcher", "a source", {}, {"max_iter": 10, "tol": 1e-5}),
        Method("passthrough", "none", {"scale": 1.0}),
        _task("task_arithmetic", _WEIGHT, normalize=False, rescale=False, no_rescale=True),
        _task("ties", _SPARSE, normalize=True, rescale=False),
        _task("dare_linear", _SPARSE, normalize=False, rescale=True),
        _task("dare_ties", _SPARSE, normalize=False, rescale=True),
        _task("breadcrumbs", {**_SPARSE, "gamma": 0.01}, normalize=False, rescale=False),
        _task("breadcrumbs_ties", {**_SPARSE, "gamma": 0.01}, normalize=False, rescale=False),
        _task("della", {**_SPARSE, "epsilon": 0.15}, normalize=True, rescale=True),
        _task("della_linear", {**_SPARSE, "epsilon": 0.15}, normalize=False, rescale=True),
        Method("model_stock", "task vectors", {}, {"filter_wise": False}),
        Method("nearswap", "task vectors", {}, {"t": None}),
        Method("sce", "task vectors", {}, {"select_topk": 1.0}, _INT8),
        Method("ram", "task vectors", {}, {"epsilon": 1e-5}),
        Method("ramplus_tl", "task vectors", {}, {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}, float32_out=True),
        Method("arcee_fusion", "task vectors", float32_out=True),
    )
}
"""By name. Our operators have the same names and, where they have them, the same parameters."""

TASK_VECTORS = "task_vectors"
"""The parameter by which our nuslerp and multislerp work on differences from the base."""
