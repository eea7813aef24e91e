"""The registries of this room: operators, baselines and optimisers, all by name."""

from evaluators.registry import Registry
from search.merge.operator import Operator

OPERATORS: Registry[Operator] = Registry("operator", "search.merge.operators", "meiosis.operators")
