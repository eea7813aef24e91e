"""Hidden states kept from one candidate to the next, in a bounded amount of memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CANDIDATES = 16
"""So many candidates' states shall fit, if only one of several layers each: an archive of parents, say."""


class StateCache:
    """States by signature of what computed them, and by the input of the forward pass.

    Signatures are chained, so their set is a trie: the nodes of a candidate are a path from its root. What was not
    used for longest goes first, and of two nodes of one candidate the deeper one, which fewer others share.

    Args:
        capacity: most bytes.

    Attributes:
        used: bytes of the states that are kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self._nodes: OrderedDict[bytes, dict[bytes, tuple[Tensor, int]]] = OrderedDict()

    def __len__(self) -> int:
        """How many states there are."""
        return sum(map(len, self._nodes.values()))

    def deepest(self, chain: Sequence[bytes], key: bytes) -> tuple[int, Tensor] | None:
        """The state of this input that enters the highest layer of a chain, and the number of that layer."""
        found = None
        for depth in range(len(chain) - 1, 0, -1):
            node = self._nodes.get(chain[depth])
            if node is None or key not in node:
                continue
            self._nodes.move_to_end(chain[depth])  # the deepest first, so that it is the first to go
            if found is None:
                state, version = node[key]
                if state._version == version:
                    found = depth, state
                else:  # somebody wrote into it
                    self._drop(chain[depth], key)
        return found

    def keep(self, chain: Sequence[bytes], key: bytes, states: dict[int, Tensor]) -> None:
        """Keep states of one input by the layer that each enters, as far as there is room."""
        for depth in sorted(states, reverse=True):
            state = states[depth]
            nbytes = state.untyped_storage().nbytes()
            if nbytes > self.capacity:
                continue
            node = self._nodes.setdefault(chain[depth], {})
            if key in node:
                self._drop(chain[depth], key)
                node = self._nodes.setdefault(chain[depth], {})
            node[key] = state, state._version
            self._nodes.move_to_end(chain[depth])
            self.used += nbytes
        while self.used > self.capacity:
            oldest = next(iter(self._nodes))
            self._drop(oldest, next(iter(self._nodes[oldest])))

    def clear(self) -> None:
        """Let go of all."""
        self._nodes.clear()
        self.used = 0

    def _drop(self, signature: bytes, key: bytes) -> None:
        node = self._nodes[signature]
        state, _ = node.pop(key)
        self.used -= state.untyped_storage().nbytes()
        if not node:
            del self._nodes[signature]


def boundaries(layers: int, capacity: int, state_bytes: int) -> frozenset[int]:
    """The layers (1 to `layers`) at whose entry states are kept: all, or evenly spaced ones where memory is short.

    Args:
        capacity: bytes in all.
        state_bytes: bytes of one layer's states over all inputs of a candidate.
    """
    most = layers if state_bytes <= 0 else capacity // (CANDIDATES * state_bytes)
    count = max(1, min(layers, most))
    # In the middles of equal parts: the best places for a first difference that is anywhere equally likely.
    if count == layers:
        return frozenset(range(1, layers + 1))
    return frozenset(max(1, round(layers * (2 * part + 1) / (2 * count))) for part in range(count))
