"""The walk over the tensors of a recipe: merged block by block, in place, and only what changed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from search.errors import RecipeError, nearest
from search.grouping import depths
from search.merge.check import BoundRule, bind_rule, check_common
from search.merge.inputs import RecentValues, Scratch, TensorInputs
from search.merge.kernels import Mode, chosen_mode, gpu
from search.merge.kernels.native import NativeMerge, Stored, plan
from search.merge.operator import ACCELERATOR_BLOCK_ELEMENTS, BLOCK_ELEMENTS, ROW_ELEMENTS, Apply
from search.merge.prepared import Prepared, PreparedFolder
from search.merge.sources import TensorSource
from search.merge.task_vectors import TaskVectors
from search.merge.tensor_checks import MERGED_DTYPES, check_dtypes, check_shapes, copy_identical
from search.merge.weighted_sums import WeightedSum
from search.merge.writing import count_write, version_of, write_range
from search.recipe import Recipe, Value

CACHED_VALUES = 1 << 16
"""Thresholds and norms kept between candidates; each takes about 200 bytes."""

KNOWN_RULES = 1 << 12
"""Checked rules kept between candidates."""


@dataclass(frozen=True)
class MergeStats:
    """What one merge did: tensors written and left alone, time, and bytes of sources read."""

    written: int
    skipped: int
    seconds: float
    bytes_read: int


class _Written(NamedTuple):
    """What a target holds, and where. The tensor is kept, so that its memory cannot become another one's."""

    fingerprint: tuple[object, ...]
    target: Tensor
    place: tuple[object, ...]
    version: int


def _place_of(target: Tensor) -> tuple[object, ...]:
    return target.data_ptr(), target.shape, target.stride(), target.dtype, target.device


class Merger:
    """Merges recipes over a fixed set of models.

    The result depends on the recipe and the models alone: not on what the targets held before, on the
    block size, on the number of threads or on earlier merges. Not for use by several threads at once.

    Args:
        models: model name -> tensors. Must not change while the merger lives.
        device: where `merge_tensors` computes; `merge_into` computes where each target is.
        block_elements: elements per block, rounded up to a multiple of 1024; by default what is
            fastest on the device.
        prepared_folder: node-local folder in which workers share what operators prepare.
        identity: model name -> content hash. Without one for a model, what is prepared for it stays
            in this process.
        names: the tensors of the output, in order; by default those of the recipe's donor.
        statistics: model name -> its statistics, tensors named `kind/tensor`.
        keep_prepared: whether what operators prepare is kept for the next merge; a single merge lets go
            of it tensor by tensor.
        dtypes: tensors of the output -> dtype, where it is not that in which the donor's tensor is given.
        read_as: tensor of the output -> the name under which all models have it, and by which operators know it, where
            that is another one. May grow while the merger lives.
        kernels: `torch` for plain torch alone; by default what `MEIOSIS_KERNELS` says. The bits are the same.
    """

    def __init__(
        self,
        models: Mapping[str, TensorSource],
        *,
        device: str | torch.device = "cpu",
        block_elements: int | None = None,
        prepared_folder: Path | None = None,
        identity: Mapping[str, str] | None = None,
        names: Iterable[str] | None = None,
        statistics: Mapping[str, TensorSource] | None = None,
        keep_prepared: bool = True,
        dtypes: Mapping[str, torch.dtype] | None = None,
        read_as: Mapping[str, str] | None = None,
        kernels: Mode | None = None,
    ) -> None:
        self._models = dict(models)
        self._names = {model: frozenset(source.names) for model, source in self._models.items()}
        self._device = torch.device(device)
        self._block_elements = block_elements
        self._folder = PreparedFolder(Path(prepared_folder)) if prepared_folder is not None else None
        self._identity = dict(identity or {})
        self._output_names = None if names is None else tuple(names)
        self._statistics = dict(statistics or {})
        self._dtypes = dict(dtypes or {})
        self._read_as: Mapping[str, str] = {} if read_as is None else read_as
        self._keep_prepared = keep_prepared
        self._kernels = chosen_mode() if kernels is None else kernels
        self._depth_of: Mapping[str, float] | None = None
        self._scratch = Scratch()
        self._caches: dict[tuple[str, str | None], RecentValues] = {}
        self._prepared: dict[tuple[object, ...], Prepared] = {}
        self._written: dict[str, _Written] = {}
        self._bound = RecentValues(KNOWN_RULES)
        self._latest: tuple[Recipe, list[BoundRule], dict[str, int]] | None = None
        self._assigned: tuple[tuple[object, ...], dict[str, int]] = ((), {})

    def merge_into(
        self, recipe: Recipe, targets: Mapping[str, Tensor], names: Iterable[str] | None = None
    ) -> MergeStats:
        """Write the merge into given tensors, leaving alone those that hold it already.

        Args:
            targets: tensor name -> tensor of the right shape, with any dtype, device and strides, such
                as a live model's parameters and views into them. A subset of the donor's tensors.
            names: all tensors that the rules of this recipe are about; by default those of the output.

        Raises:
            RecipeError: the recipe does not fit its operators or its models.
            CheckpointError: tensors whose shapes differ, or that are stored in a type not merged yet.
        """
        began = time.perf_counter()
        rules = self._assign(recipe, targets, names)
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
        fingerprints = self._fingerprints(rules, dtype)
        written = bytes_read = 0
        with torch.no_grad():
            for name, rule in rules.items():
                fingerprint = fingerprints[name]
                if self._holds(name, fingerprint, targets[name]):
                    continue
                self._written.pop(name, None)  # a merge that fails half-way leaves nothing to trust
                bytes_read += self._merge(name, rule, targets[name], dtype)
                written += 1
                self._written[name] = _Written(fingerprint, targets[name], _place_of(targets[name]), -2)
            # Views of one parameter count their writes together, so versions are taken at the end.
            for name in rules if written else ():
                version = version_of(targets[name])
                if self._written[name].version != version:
                    self._written[name] = self._written[name]._replace(version=version)
        return MergeStats(written, len(rules) - written, time.perf_counter() - began, bytes_read)

    def merge_tensors(
        self, recipe: Recipe, names: Iterable[str] | None = None, every: Iterable[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The merged tensors one by one, each newly allocated, with the bits of `merge_into`.

        Args:
            names: which tensors of the output; by default all, in order. The dtype is the recipe's, or
                else that of the donor's tensor, or of the first source where the donor has none.
            every: as `names` of `merge_into`.

        Raises: as `merge_into`.
        """
        wanted = list(self._names_of(recipe) if names is None else names)
        rules = self._assign(recipe, wanted, every)
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
        for name in wanted:
            own = self._read_as.get(name, name)
            like = self._get(recipe.donor if own in self._names[recipe.donor] else rules[name].sources[0], own)
            keep = dtype is None or not like.dtype.is_floating_point
            stored = self._dtypes.get(name, like.dtype) if keep else dtype
            merged = torch.empty(like.shape, dtype=stored, device=self._device)
            with torch.no_grad():
                self._merge(name, rules[name], merged, None)
            yield name, merged

    def fingerprints(
        self, recipe: Recipe, names: Iterable[str], every: Iterable[str] | None = None
    ) -> dict[str, tuple[object, ...]]:
        """Tensor -> what decides its bits, beside the models: equal for two recipes exactly where they make it alike.

        Args:
            every: see `merge_into`.

        Raises: as `merge_into`, for what is wrong with the recipe alone.
        """
        return self._fingerprints(
            self._assign(recipe, names, every), getattr(torch, recipe.dtype) if recipe.dtype else None
        )

    @staticmethod
    def _fingerprints(rules: Mapping[str, BoundRule], dtype: torch.dtype | None) -> dict[str, tuple[object, ...]]:
        known = {id(rule): (*rule.fingerprint, dtype) for rule in {id(r): r for r in rules.values()}.values()}
        return {name: known[id(rule)] for name, rule in rules.items()}

    def invalidate(self) -> None:
        """Forget what the targets hold: the next merge writes every tensor."""
        self._written.clear()

    def _assign(self, recipe: Recipe, names: Iterable[str], every: Iterable[str] | None) -> dict[str, BoundRule]:
        """Tensor name -> checked rule, for `names`, in their order; `every`: all tensors of this recipe."""
        if self._latest is None or self._latest[0] is not recipe:
            self._latest = (recipe, self._checked(recipe), self._rules_of(recipe, every))
        _, rules, index = self._latest
        try:
            return {name: rules[index[name]] for name in names}
        except KeyError as error:
            unknown = str(error.args[0])
            raise RecipeError(f"model '{recipe.donor}' has no tensor '{unknown}'{nearest(unknown, index)}") from None

    def _checked(self, recipe: Recipe) -> list[BoundRule]:
        """The rules, for the models that are here."""
        rules = self._bind(recipe)
        for model, ref in recipe.models.items():
            held = self._identity.get(self._known(model))
            if held is not None and ref.sha256 is not None and held != ref.sha256:
                raise RecipeError(
                    f"models.{model}.sha256: the recipe wants the weights {ref.sha256[:12]}, "
                    f"those here are {held[:12]}; point it at the model it was made from"
                )
        return rules

    def _rules_of(self, recipe: Recipe, every: Iterable[str] | None) -> dict[str, int]:
        """Tensor of the output -> number of its rule."""
        names = None if every is None else tuple(every)
        key = (recipe.donor, names, *(rule.tensors for rule in recipe.rules))
        if key != self._assigned[0]:
            position = {id(rule): index for index, rule in enumerate(recipe.rules)}
            assigned = recipe.assign(self._names_of(recipe) if names is None else names)
            self._assigned = (key, {name: position[id(rule)] for name, rule in assigned.items()})
        return self._assigned[1]

    def _bind(self, recipe: Recipe) -> list[BoundRule]:
        """The rules, checked. Those that an earlier recipe had are known: most candidates change few."""
        check_common(recipe)
        statistics = sorted((name, ref.statistics or "") for name, ref in recipe.models.items())
        common = (recipe.base, recipe.seed, recipe.compute, recipe.input_dtype, *statistics)
        rules = []
        for index, rule in enumerate(recipe.rules):
            sources = tuple((source, _values(values)) for source, values in rule.sources.items())
            key = (common, rule.operator, sources, _values(rule.parameters))
            if key not in self._bound:
                self._bound[key] = bind_rule(recipe, index)
            rules.append(self._bound[key])
        return rules

    def _names_of(self, recipe: Recipe) -> tuple[str, ...]:
        """The tensors of the output, in order."""
        donor = self._models[self._known(recipe.donor)]
        return tuple(donor.names) if self._output_names is None else self._output_names

    def _holds(self, name: str, fingerprint: tuple[object, ...], target: Tensor) -> bool:
        """Whether the last merge left just this in this memory, and nobody wrote there since."""
        last = self._written.get(name)
        return (
            last is not None
            and last.fingerprint == fingerprint
            and last.place == _place_of(target)
            and last.version == version_of(target)
        )

    def _merge(self, name: str, rule: BoundRule, target: Tensor, dtype: torch.dtype | None) -> int:
        """Merge one tensor, rounded to `dtype` on the way if given; returns the bytes read."""
        name = self._read_as.get(name, name)
        tensors = {model: self._get(model, name) for model in rule.models}
        check_shapes(name, tensors, tuple(target.shape))
        target = target.detach()
        if not any(tensor.dtype.is_floating_point for tensor in tensors.values()):
            return copy_identical(name, tensors, target)
        check_dtypes(name, tensors)
        device = target.device
        prepared = self._prepare(name, rule, tensors, device)
        inputs = self._inputs(name, rule, rule.sources, tensors, device)
        apply = rule.operator.bind(inputs, prepared, rule.per_source, rule.shared)
        if not self._merge_at_once(apply, inputs, target, dtype):
            _merge_by_blocks(apply, inputs, target, dtype, widens=rule.operator.widens)
        return inputs.bytes_read

    def _merge_at_once(self, apply: Apply, inputs: TensorInputs, target: Tensor, dtype: torch.dtype | None) -> bool:
        """Merge by a kernel that reads the sources as they are stored, if there is one for this."""
        if inputs.stored is None or inputs.dtype == torch.float64 or inputs.device.type not in ("cpu", "cuda"):
            return False
        stored = Stored(*inputs.stored)
        narrow = inputs.dtype != torch.float32  # `compute: inputs`
        if narrow and (not isinstance(apply, WeightedSum | TaskVectors) or dtype not in (None, inputs.dtype)):
            return False
        rounded = inputs.dtype if narrow else dtype
        kernel: NativeMerge | gpu.TritonMerge | None
        if target.is_cuda:
            kernel = gpu.plan(self._kernels, apply, stored, target.dtype, rounded, target.device)
        else:
            kernel = plan(self._kernels, apply, stored, target.dtype, rounded)
        if kernel is None:
            return False
        inputs.count_bytes(*stored.sources, *(() if stored.base is None else (stored.base,)))
        if target.is_contiguous():
            kernel.write(0, inputs.numel, target)
            count_write(target)
            return True
        for start, stop in inputs.ranges():
            out = self._scratch.get("kernel output", target.dtype, inputs.device, stop - start)
            kernel.write(start, stop, out)
            write_range(target, start, out)
        return True

    def _inputs(
        self,
        name: str,
        rule: BoundRule,
        sources: tuple[str, ...],
        tensors: Mapping[str, Tensor],
        device: torch.device,
    ) -> TensorInputs:
        default = BLOCK_ELEMENTS if device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS
        rows = -(-(self._block_elements or default) // ROW_ELEMENTS)
        return TensorInputs(
            name=name,
            models=sources,
            sources=tuple(tensors[source] for source in sources),
            base=rule.base,
            base_tensor=None if rule.base is None else tensors[rule.base],
            seed=rule.seed or 0,
            device=device,
            block_elements=rows * ROW_ELEMENTS,
            scratch=self._scratch,
            cache=self._cache_of(rule),
            compute=rule.compute,
            input_dtype=None if rule.input_dtype is None else getattr(torch, rule.input_dtype),
            depth=self._depths(rule.models[-1]).get(name),
            kernels=self._kernels,
            statistics=lambda kind, index: self._statistic(f"{kind}/{name}", sources[index]),
        )

    def _cache_of(self, rule: BoundRule) -> RecentValues:
        if not self._keep_prepared:  # some values are as large as the tensor
            return RecentValues(CACHED_VALUES)
        return self._caches.setdefault((rule.compute, rule.input_dtype), RecentValues(CACHED_VALUES))

    def _depths(self, model: str) -> Mapping[str, float]:
        """Where tensors stand in their stack of layers, by name, for the output or else one of the models."""
        if self._depth_of is None:
            # Tensors that are read under other names are known to operators by those.
            own = self._output_names is None or bool(self._read_as)
            self._depth_of = depths(self._models[model].names if own else self._output_names or ())
        return self._depth_of

    def _statistic(self, key: str, model: str) -> Tensor | None:
        source = self._statistics.get(model)
        return source.get(key) if source is not None and key in source.names else None

    def _prepare(
        self, name: str, rule: BoundRule, tensors: Mapping[str, Tensor], device: torch.device
    ) -> tuple[Mapping[str, Tensor], ...]:
        """What the operator prepared for this tensor, computed or loaded when first asked for."""
        match rule.operator.prepares:
            case "nothing":
                return ()
            case "each_source":
                sets: list[tuple[str, ...]] = [(source,) for source in rule.sources]
            case "all_sources":
                sets = [rule.sources]
        if rule.operator.preparation_optional and not self._keep_prepared:
            return ({},) * len(sets)
        prepared = []
        for sources in sets:
            key = (rule.name, sources, rule.base, rule.compute, rule.input_dtype)
            if key not in self._prepared:
                self._prepared[key] = self._load_prepared(rule, sources, device)
            known = self._prepared[key]
            found = known.get(name)
            if found is None:
                found = rule.operator.prepare(self._inputs(name, rule, sources, tensors, device))
                if self._keep_prepared:
                    known[name] = found
            prepared.append(found)
        return tuple(prepared)

    def _load_prepared(self, rule: BoundRule, sources: tuple[str, ...], device: torch.device) -> Prepared:
        """What the node has for these sources, all tensors at once; empty where it is not shared."""
        models = sources if rule.base is None else (*sources, rule.base)
        if self._folder is None or any(model not in self._identity for model in models):
            return {}
        kind = type(rule.operator)
        facts = {
            "operator": f"{kind.__module__}.{kind.__qualname__}",
            "version": kind.prepared_version,
            "sources": [self._identity[source] for source in sources],
            "base": self._identity[rule.base] if rule.base is not None else None,
            "compute": rule.compute,
            "input_dtype": rule.input_dtype,
            "statistics": [self._identity.get(f"{source}.statistics") for source in sources],
            **({} if device.type == "cpu" else {"device": device.type}),  # decompositions differ in their last bits
        }

        def compute() -> Iterator[tuple[str, dict[str, Tensor]]]:
            shared = set.intersection(*(set(self._names[model]) for model in models))
            for name in (name for name in self._models[sources[0]].names if name in shared):
                tensors = {model: self._get(model, name) for model in models}
                mergeable = all(tensor.dtype in MERGED_DTYPES for tensor in tensors.values())
                if mergeable and len({tensor.shape for tensor in tensors.values()}) == 1:
                    yield name, rule.operator.prepare(self._inputs(name, rule, sources, tensors, device))

        return self._folder.load(facts, compute)

    def _known(self, model: str) -> str:
        if model not in self._models:
            raise RecipeError(f"models: no model called '{model}' was opened{nearest(model, self._models)}")
        return model

    def _get(self, model: str, name: str) -> Tensor:
        if name not in self._names[self._known(model)]:
            raise RecipeError(
                f"model '{model}' has no tensor '{name}', which the recipe merges from it; "
                "take that tensor by a rule of its own from models that have it"
            )
        return self._models[model].get(name)


def _values(values: Mapping[str, Value]) -> tuple[object, ...]:
    """Equal for the same values of the same types: 1 is not True."""
    return tuple([(name, type(value), value) for name, value in values.items()])


def _merge_by_blocks(
    apply: Apply, inputs: TensorInputs, target: Tensor, dtype: torch.dtype | None, *, widens: bool
) -> None:
    made = torch.promote_types(inputs.dtype, torch.float32) if widens else inputs.dtype
    rounded = dtype is not None and dtype not in (target.dtype, made)
    direct = target.dtype == made and target.is_contiguous() and not rounded
    for block in inputs.blocks():
        if direct:
            apply(block, target.view(-1)[block.start : block.stop])
            continue
        out = inputs.output(block.stop - block.start, made)
        apply(block, out)
        write_range(target, block.start, out.to(dtype) if rounded else out)
