"""The scales of a path, folded into its weights: a plain checkpoint that computes the same.

Layer t of a path takes x = s_t h, where h is what the layer before it gave, and gives x + f(N(x)) for each of its
two blocks. With c_t = s_1 s_2 ... s_t and g = h / c_t this is

    g_t = g_{t-1} + f(sign(c_t) N(g_{t-1})) / c_t

since N(c g) = sign(c) N(g), but for the norm's epsilon. So the weights and biases by which blocks add to the hidden
state are divided by c_t, the weights of the norms before them have the sign of c_t, and the last norm that of the
last c. (The paths are those of Akiba 2025, https://doi.org/10.1038/s42256-024-00975-8, which exports none.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any

from search.grouping import LAYER
from search.paths.families import Family, family_of
from search.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


class Fold:
    """What every tensor of a path is multiplied with.

    Args:
        family: of the models.
        scales: (n_layers,) of the path, none of them 0.
    """

    def __init__(self, family: Family, scales: Sequence[float]) -> None:
        self._family, self._products = family, tuple(accumulate(scales, mul))

    def factor(self, name: str) -> float:
        """The factor on a tensor of the output."""
        match = LAYER.match(name)
        if match is None:
            final = self._family.final_norm
            last = name == final or name.endswith(f".{final}")
            return math.copysign(1.0, self._products[-1]) if last else 1.0
        product, rest = self._products[int(match["index"])], match["rest"]
        if rest in self._family.norms:
            return math.copysign(1.0, product)
        module, _, parameter = rest.rpartition(".")
        return 1.0 / product if module in self._family.outputs and parameter in ("weight", "bias") else 1.0

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the output as it is written: itself where nothing changes, or a copy."""
        factor = self.factor(name)
        return tensor if factor == 1.0 else tensor * factor


def fold_of(recipe: Recipe, config: Mapping[str, Any]) -> Fold | None:
    """The fold of a recipe with scales, None for others; `config` is that of its donor.

    Raises:
        RecipeError: see `family_of`.
    """
    return None if recipe.scales is None else Fold(family_of(config), recipe.scales)
