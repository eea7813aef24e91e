"""How a worker evaluates a path: every layer that is on it is merged once, however often the path comes by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from search.layer_config import changed_config
from search.layers import find_stack
from search.merge.apply import Merger
from search.merge.live import LiveModel
from search.paths.families import family_of
from search.paths.fold import fold_of
from search.paths.hops import layers_of, on_path
from search.prefix.contents import Contents, digest, plain
from search.recipe import Recipe, Rule

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Merged:
    """A candidate that is in the live model.

    Attributes:
        bytes_read: of the models, for the merge.
        tensors: makes the tensors of the checkpoint that the candidate is; of a path with its scales folded in.
        targets: the tensors of the live model outside of a path.
        made_by: what each of them is made by, see `Merger.fingerprints`.
        along: see `PrefixReuse.watching`.
    """

    bytes_read: int
    tensors: Callable[[], dict[str, torch.Tensor]]
    targets: Mapping[str, torch.Tensor]
    made_by: Mapping[str, object]
    along: Callable[[Contents], Contents] = lambda contents: contents


@dataclass(frozen=True)
class _Unrolled:
    """A path as a merge of the layers that are on it.

    A place is a layer of a bank: the layers of the live model are bank 0.

    Attributes:
        hops: bank and number of the layer of every hop.
        slots: tensor of the output -> name of the tensor that is merged for it.
        recipe: merges those, each once.
    """

    hops: tuple[tuple[int, int], ...]
    slots: dict[str, str]
    recipe: Recipe


class Paths:
    """The paths of one live model.

    A layer of a path is told by its number and by the models that it is merged of. The first such models that come
    by have the layers of the live model, others have further ones, which are kept: a layer whose merge did not
    change is left alone.

    Args:
        live: in which candidates are merged.
        merger: over the models under their own names.
        read_as: that of the merger; filled here.
        targets: those of the live model.
        names: all tensors of the models.

    Raises:
        MeiosisError: a model whose layers cannot form a path.
    """

    def __init__(
        self,
        live: LiveModel,
        merger: Merger,
        read_as: dict[str, str],
        targets: Mapping[str, torch.Tensor],
        names: Iterable[str],
    ) -> None:
        self._model, self._merger, self._read_as = live.model, merger, read_as
        self._config = live.model.config.to_dict()
        self._family = family_of(self._config)
        self._stack = find_stack(names, self._config, type(live.model).__name__)
        self._own = layers_of(live.model, self._family)
        self._targets = dict(targets)
        self._banks: list[tuple[object, ...]] = []
        self._further: dict[tuple[int, int], torch.nn.Module] = {}

    @contextmanager
    def on(self, recipe: Recipe) -> Iterator[Merged]:
        """Merge a path and run a block with the live model on it.

        Args:
            recipe: with layers and scales; each of its layers has one number in all its models.
        """
        assert recipe.layers is not None
        assert recipe.scales is not None
        path = self._unrolled(recipe)
        layers = [self._layer(bank, number) for bank, number in path.hops]
        names = tuple(dict.fromkeys(path.slots.values()))
        live = {name: self._targets[name] for name in names if name in self._targets}
        bytes_read = self._merger.merge_into(path.recipe, live, names).bytes_read

        def tensors() -> dict[str, torch.Tensor]:
            fold = fold_of(recipe, self._config)
            assert fold is not None
            unused = [name for name in names if name not in live]
            merged = {**live, **dict(self._merger.merge_tensors(path.recipe, unused, names))}
            return {ours: fold(ours, merged[slot]) for ours, slot in path.slots.items()}

        depths = dict.fromkeys(recipe.models, len(self._stack.layers))
        configs = dict.fromkeys(recipe.models, self._config)
        config = changed_config(configs, depths, recipe.layers, recipe.donor)
        with on_path(self._model, self._family, layers, recipe.scales, config):
            yield self._merged(recipe, path, names, bytes_read, tensors)

    def _merged(
        self,
        recipe: Recipe,
        path: _Unrolled,
        names: tuple[str, ...],
        bytes_read: int,
        tensors: Callable[[], dict[str, torch.Tensor]],
    ) -> Merged:
        made_by = self._merger.fingerprints(path.recipe, names, names)
        outside = [name for name in (*self._stack.before, *self._stack.after) if name in self._targets]
        layers = tuple(
            digest(scale, *((slot, plain(made_by[slot])) for slot in map(partial(_slot, bank), own.values())))
            for (bank, number), scale in zip(path.hops, recipe.scales or (), strict=True)
            for own in (self._stack.layers[number],)
        )
        return Merged(
            bytes_read,
            tensors,
            {name: self._targets[name] for name in outside},
            {name: made_by[name] for name in outside},
            lambda contents: Contents(contents.before, layers),
        )

    def _unrolled(self, recipe: Recipe) -> _Unrolled:
        stack = self._stack
        outside = (*stack.before, *stack.after)
        hops = [(tuple(layer), next(iter(layer.values()))) for layer in recipe.layers or ()]
        inside = [
            {stack.name(index, rest): own for rest, own in stack.layers[number].items()}
            for index, (_, number) in enumerate(hops)
        ]
        rules = recipe.assign([*outside, *(name for names in inside for name in names)])
        slots = {name: name for name in outside}
        merged: dict[str, Rule] = {name: rules[name] for name in outside}
        places = []
        merges = {id(rule): repr((rule.operator, rule.sources, rule.parameters)) for rule in recipe.rules}
        variants: dict[object, list[tuple[str, ...]]] = {}
        for (models, number), names in zip(hops, inside, strict=True):
            # Recipes made by hand may merge the same layer of the same models in several ways.
            known, ways = variants.setdefault((models, number), []), tuple(merges[id(rules[name])] for name in names)
            if ways not in known:
                known.append(ways)
            bank = self._bank((models, known.index(ways)))
            places.append((bank, number))
            for ours, own in names.items():
                slots[ours] = _slot(bank, own)
                self._read_as[slots[ours]] = own
                merged[slots[ours]] = rules[ours]
        tensors: dict[int, list[str]] = {}
        for slot, rule in merged.items():
            tensors.setdefault(id(rule), []).append(slot)
        distinct = tuple(
            rule.model_copy(update={"tensors": tuple(tensors[id(rule)])})
            for rule in recipe.rules
            if id(rule) in tensors
        )
        plain = recipe.model_copy(update={"rules": distinct, "layers": None, "scales": None})
        return _Unrolled(tuple(places), slots, plain)

    def _bank(self, key: tuple[object, ...]) -> int:
        if key not in self._banks:
            self._banks.append(key)
        return self._banks.index(key)

    def _layer(self, bank: int, number: int) -> torch.nn.Module:
        """A layer of a bank, made when it is first on a path."""
        if bank == 0:
            return self._own[number]
        if (bank, number) not in self._further:
            made = self._further[bank, number] = copy.deepcopy(self._own[number])
            copies = made.state_dict()
            copy_of = {tensor.data_ptr(): copies[name] for name, tensor in self._own[number].state_dict().items()}
            for own in self._stack.layers[number].values():
                if own in self._targets:
                    self._targets[_slot(bank, own)] = copy_of[self._targets[own].data_ptr()]
        return self._further[bank, number]


def _slot(bank: int, name: str) -> str:
    return name if bank == 0 else f"{bank}:{name}"
