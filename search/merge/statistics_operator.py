"""What the operators share that weigh models by statistics of their inputs: Fisher averaging and RegMean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from search.merge.operator import Operator, Parameter


class StatisticsOperator(Operator):
    """An average of models with weights, one per source, that must not cancel; `lambda` other than 1 scales its
    difference from the base, which is read only then."""

    needs_base = False
    LAMBDA: ClassVar = Parameter(
        "lambda",
        "shared",
        "float",
        1.0,
        "factor of the merged task vector; not 1: needs a base",
        search=(0.0, 2.0, 1.0),
    )

    def uses_base(self, shared: Mapping[str, Any]) -> bool:
        return bool(shared["lambda"] != 1.0)

    def check(self, per_source: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> str | None:
        from search.merge.parameter_faults import zero_sum_fault

        return zero_sum_fault(per_source)
