"""What a search needs of the memory of its nodes, known before anything starts. Loads neither torch nor Ray.

Sources are mapped from their files: all workers of a node share the pages, and what does not fit is read again from
disk. So they need no memory, but are read faster where there is some. Everything else is a worker's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from evaluators.likelihood import SOFTMAX_ELEMENTS
from evaluators.tokens import DEFAULT_MAX_TOKENS
from search.errors import UserError
from search.grouping import place_of
from search.memory_sizes import (
    CUDA_CONTEXT_BYTES,
    CUDA_HOST_BYTES,
    DEFAULT_BATCH_TOKENS,
    KEPT_PLACEBO_BYTES,
    LIBRARY_BYTES,
    REUSE_BYTES,
    SCRATCH_ELEMENTS,
    gib,
)
from search.sources import view_models

if TYPE_CHECKING:
    from evaluators.base import Evaluator
    from search.setup import Setup


class ModelSize(NamedTuple):
    """Sizes of a language model that its activations depend on."""

    hidden: int
    inner: int
    heads: int
    layers: int
    vocabulary: int
    positions: int


@dataclass(frozen=True)
class Needs:
    """Bytes that one worker needs for itself, and `sources`, which the workers of a node share.

    Attributes:
        live: the live model.
        activations: the largest batch of any evaluator, see `activation_bytes`.
        merging: buffers of the merge, and one tensor.
        learning: a baseline that learns by gradient: a float32 model and all its activations.
        placebos: what a worker keeps of placebos of the sources, in main memory whatever the device.
        on_gpu: whether all this is on a GPU; then a worker's main memory holds the live model while it is loaded.
        learned: the float32 model in `learning`.
        block: the largest part of the live model that is not split over GPUs.
        gpus: GPUs of one worker, over which its models are laid.
        reuse: hidden states that are kept; None: they get a part of what is left.
    """

    sources: int
    live: int
    activations: int
    merging: int
    learning: int
    on_gpu: bool
    learned: int = 0
    block: int = 0
    gpus: int = 1
    placebos: int = 0
    reuse: int | None = None

    @property
    def host(self) -> int:
        """Main memory of one worker."""
        return LIBRARY_BYTES + self.placebos + (CUDA_HOST_BYTES + self.live if self.on_gpu else self._work)

    @property
    def gpu(self) -> int:
        """Memory of each of one worker's GPUs."""
        return CUDA_CONTEXT_BYTES + self._share(self.live) + self.beside_live if self.on_gpu else 0

    @property
    def beside_live(self) -> int:
        """What is needed on each GPU beside its share of the live model. Every one holds a batch at a time."""
        learning = self.learning - self.learned + self._share(self.learned)
        return self.merging + (self.reuse or 0) + max(self.activations, learning)

    @property
    def beside_learning(self) -> int:
        """What is needed on each GPU beside its shares of the live model and of the one that learns."""
        return self.merging + (self.reuse or 0) + self.learning - self.learned

    def fits(self, gpus: Sequence[int]) -> bool:
        """Whether one worker fits on GPUs with so many free bytes each."""
        room = sum(max(0, free - CUDA_CONTEXT_BYTES - self.beside_live) for free in gpus)
        return room >= self.live + (len(gpus) - 1) * self.block

    def _share(self, model: int) -> int:
        """Most of a model that one of the GPUs has: cuts are between blocks, so each but the last may lack one."""
        if self.gpus == 1 or not self.live:
            return model
        block = self.block * model // self.live
        return min(model, -(-(model + (self.gpus - 1) * block) // self.gpus))

    @property
    def _work(self) -> int:
        return self.live + self.merging + (self.reuse or 0) + max(self.activations, self.learning)


@dataclass(frozen=True)
class Node:
    """What a node has to give.

    Attributes:
        memory: bytes of main memory that are free.
        gpus: free bytes of every GPU; empty where there is none, or where it is not known.
        slots: workers that its CPUs and GPUs allow.
        lacks: bytes of models and data that would be copied to it.
    """

    name: str
    memory: int
    gpus: tuple[int, ...] = ()
    slots: int = 1 << 30
    lacks: int = 0


@dataclass(frozen=True)
class Share:
    """A node and the workers on it: so many there will be, so many would fit."""

    node: Node
    workers: int
    most: int


@dataclass(frozen=True)
class MemoryPlan:
    """Workers on nodes.

    Attributes:
        workers: how many there shall be; those that the cluster has no room for now are on no node.
        largest: the largest number of workers, at most `workers`, that fits.
    """

    needs: Needs
    shares: tuple[Share, ...]
    workers: int
    largest: int

    @property
    def fits(self) -> bool:
        """Whether every node can hold its workers."""
        return all(share.workers <= share.most for share in self.shares)

    @property
    def reuse(self) -> int:
        """Bytes of hidden states that each worker may keep: what was asked for, or a part of what is left."""
        if self.needs.reuse is not None:
            return self.needs.reuse
        return min((_left(self.needs, share) for share in self.shares), default=0)

    def require(self) -> None:
        """Raise `UserError` unless all fits: how much is there, how much it takes, how many workers would fit."""
        if self.fits:
            return
        share = next(share for share in self.shares if share.workers > share.most)
        needs, node = self.needs, share.node
        if needs.host * share.workers > node.memory:
            what = f"{gib(needs.host * share.workers)} of memory, and {gib(node.memory)} are free"
        else:
            what = f"{gib(needs.gpu)} of GPU memory each"
            if needs.gpus > 1:
                what = f"{gib(needs.gpu)} on each of {needs.gpus} GPUs"
            what += f", and {', '.join(map(gib, node.gpus))} are free"
        workers = f"{share.workers} worker{'s' * (share.workers != 1)}"
        way_out = (
            f"set cluster.workers to at most {self.largest}"
            if self.largest
            else f"not even one fits: set {self._more_gpus()}cluster.dtype to bfloat16, or batch_tokens of the "
            "evaluators to less"
        )
        raise UserError(
            f"cluster.workers: on node {node.name} {workers} would need {what}; {way_out} "
            "(cluster.check_memory: false tries it all the same)"
        )

    def _more_gpus(self) -> str:
        """How many GPUs one worker would need on some node, if that is what it lacks."""
        for gpus in range(self.needs.gpus + 1, max(len(share.node.gpus) for share in self.shares) + 1):
            needs = replace(self.needs, gpus=gpus)
            if any(_most(needs, share.node, gpus) for share in self.shares if len(share.node.gpus) >= gpus):
                return f"cluster.gpus_per_worker to {gpus}, over which a worker lays its model, or "
        return ""


def plan_memory(needs: Needs, nodes: Sequence[Node], workers: int, gpus_per_worker: float = 0.0) -> MemoryPlan:
    """Spread workers over nodes as Ray does, one at a time to the node that has the fewest.

    Args:
        nodes: at least one.
        gpus_per_worker: may be a fraction.
    """
    needs = replace(needs, gpus=max(1, math.ceil(gpus_per_worker)))
    most = [_most(needs, node, gpus_per_worker) for node in nodes]
    given = [0] * len(nodes)
    largest, fits = 0, True
    for _ in range(workers):
        open_nodes = [index for index, node in enumerate(nodes) if given[index] < node.slots]
        if not open_nodes:
            break
        chosen = min(open_nodes, key=lambda index: given[index])
        given[chosen] += 1
        fits = fits and given[chosen] <= most[chosen]
        largest += fits
    shares = tuple(Share(node, count, room) for node, count, room in zip(nodes, given, most, strict=True))
    return MemoryPlan(needs, shares, workers, largest)


def _left(needs: Needs, share: Share) -> int:
    """Of what a node has left, how much each of its workers may keep hidden states in: half, at most `REUSE_BYTES`."""
    if not share.workers:
        return REUSE_BYTES
    if needs.on_gpu:  # states are where the model is; how workers meet on the GPUs is Ray's to say
        per_gpu = max(1, math.ceil(share.workers * needs.gpus / max(1, len(share.node.gpus))))
        room = min(share.node.gpus, default=0) // per_gpu - needs.gpu
    else:
        room = (share.node.memory - needs.sources) // share.workers - needs.host
    return max(0, min(REUSE_BYTES, room // 2))


def _most(needs: Needs, node: Node, gpus_per_worker: float) -> int:
    """How many workers the memory of a node holds."""
    by_host = node.memory // needs.host
    if not needs.on_gpu or not node.gpus:
        return by_host
    if gpus_per_worker > 1:  # a model that is laid over several
        each = needs.gpus
        groups = [node.gpus[at : at + each] for at in range(0, len(node.gpus) - each + 1, each)]
        return min(by_host, sum(needs.fits(group) for group in groups))
    if not gpus_per_worker:  # nothing is reserved: all workers meet on the first
        return min(by_host, node.gpus[0] // needs.gpu)
    per_gpu = int(1 / gpus_per_worker + 1e-6)
    return min(by_host, sum(min(per_gpu, free // needs.gpu) for free in node.gpus))


def needs_of(setup: Setup, *, has_gpu: bool) -> Needs:
    """What one worker of a search needs.

    Args:
        has_gpu: whether a worker that looks for a GPU would find one.
    """
    cluster, base = setup.config.cluster, setup.checkpoints["base"]
    tensors = view_models(setup.checkpoints, donor="base").views["base"].tensors
    sizes = [_tensor_bytes(info.dtype, info.shape, setup.dtype) for info in tensors.values()]
    elements = [math.prod(info.shape) for info in tensors.values()]
    live = sum(sizes)
    if setup.config.space.path is not None:  # at most, the layers on a path: each once for every entry of its pool
        layers = sum(size for name, size in zip(tensors, sizes, strict=True) if place_of(name).layer is not None)
        live += layers * (len(setup.config.space.path.pool) - 1)
    on_gpu = setup.device.startswith("cuda") or (setup.device == "auto" and has_gpu)
    width = _width(setup.dtype or str(base.config.get("dtype") or base.config.get("torch_dtype") or "float32"))
    size = model_size(base.config)
    activations = max((_activations(size, e, width, live) for e in setup.evaluators.values()), default=0)
    learned = learning = 0
    if any(baseline.name == "learned_soup" for baseline in setup.config.search.baselines):
        trained = max((_activations(size, e, 4, live, train=True) for e in setup.evaluators.values()), default=0)
        learned = 4 * sum(elements)
        learning = learned + 4 * max(elements) + trained
    blocks = SCRATCH_ELEMENTS[on_gpu] * 4 * (len(setup.config.models.sources) + 3) * (1 if on_gpu else cluster.threads)
    placebos = 0
    if setup.config.certify.placebo:
        placebos = min(KEPT_PLACEBO_BYTES, 4 * sum(elements) * len(setup.config.models.sources))
    together = cluster.candidates_per_forward
    return Needs(
        sources=sum(checkpoint.nbytes for checkpoint in setup.checkpoints.values()),
        live=live if together == 1 else (1 + together) * live,
        activations=together * activations,
        merging=blocks + max(sizes),
        learning=learning,
        on_gpu=on_gpu,
        learned=learned,
        block=_largest_block(dict(zip(tensors, sizes, strict=True))),
        gpus=max(1, math.ceil(cluster.gpus_per_worker)) if on_gpu else 1,
        placebos=placebos,
        reuse=None if cluster.reuse_gib is None else int(cluster.reuse_gib * 2**30),
    )


def activation_bytes(size: ModelSize, batch_tokens: int, max_tokens: int, width: int, *, train: bool = False) -> int:
    """Most memory that a language model takes beside its weights while it reads one batch; an upper estimate.

    With t tokens in the batch, s of them in a sequence, hidden size h, inner size f, a heads, vocabulary v and
    w bytes for a number, evaluation takes the sum of

        logits      t v w
        softmax     min(t, 2^24 / v) v (w + 8)     a block of logits, the same in float32, and their exponentials
        layer       t (32 h + 3 f w)               residual, norms (float32), queries, keys, values; gate, up, product
        attention   t s (2 a w + 4)                scores and shares where a kernel keeps them, and the mask

    though not all of it at the same time. Training keeps layer and attention of every layer, and 12 t v bytes of
    gradients and float32 logits.

    Args:
        batch_tokens: tokens of a batch, padding included; at least one sequence of `max_tokens` is taken.
        max_tokens: tokens of a sequence.
        width: bytes of a number of the live model.
        train: whether gradients are taken.
    """
    sequence = min(max_tokens, size.positions)
    tokens = max(batch_tokens, sequence)
    logits = tokens * size.vocabulary * width
    softmax = min(tokens, max(1, SOFTMAX_ELEMENTS // size.vocabulary)) * size.vocabulary * (width + 8)
    layer = tokens * (32 * size.hidden + 3 * size.inner * width)
    attention = tokens * sequence * (2 * size.heads * width + 4)
    if train:
        return logits + 12 * tokens * size.vocabulary + size.layers * (layer + attention)
    return logits + softmax + layer + attention


def model_size(config: Mapping[str, Any]) -> ModelSize | None:
    """Sizes of a language model from its `config.json`; None if it is none, or one that says it in other words."""
    inside = config.get("text_config")
    text = inside if isinstance(inside, Mapping) else config
    hidden = _number(text, "hidden_size", "n_embd", "d_model", "dim")
    vocabulary = _number(text, "vocab_size")
    if not hidden or not vocabulary:
        return None
    experts = _number(text, "num_experts_per_tok") * _number(text, "moe_intermediate_size", "intermediate_size")
    inner = _number(text, "intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim") or 4 * hidden
    return ModelSize(
        hidden=hidden,
        inner=max(inner, experts),
        heads=_number(text, "num_attention_heads", "n_head", "n_heads", "num_heads") or max(1, hidden // 64),
        layers=_number(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers") or 1,
        vocabulary=vocabulary,
        positions=_number(text, "max_position_embeddings", "n_positions", "max_seq_len") or 1 << 30,
    )


def _activations(size: ModelSize | None, evaluator: Evaluator, width: int, live: int, *, train: bool = False) -> int:
    """Of one evaluator. What is not known to be a language model is taken to need its own size again."""
    if size is None:
        return live
    batch = getattr(evaluator.options, "batch_tokens", None) or DEFAULT_BATCH_TOKENS
    longest = getattr(evaluator.options, "max_tokens", None) or DEFAULT_MAX_TOKENS
    return activation_bytes(size, batch, longest, width, train=train)


def _largest_block(sizes: Mapping[str, int]) -> int:
    """Bytes of the largest layer, or of the largest tensor outside of layers, by name."""
    blocks: dict[tuple[object, ...], int] = {}
    for name, nbytes in sizes.items():
        place = place_of(name)
        key = (name,) if place.layer is None else (place.stack, place.layer)
        blocks[key] = blocks.get(key, 0) + nbytes
    return max(blocks.values(), default=0)


def _number(config: Mapping[str, Any], *names: str) -> int:
    found: Iterable[Any] = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), 0)


def _width(dtype: str) -> int:
    return 2 if dtype in ("float16", "bfloat16") else 4


def _tensor_bytes(dtype: str, shape: tuple[int, ...], live_dtype: str | None) -> int:
    floating = dtype.startswith(("F", "BF"))
    bits = int("".join(c for c in dtype.split("_", maxsplit=1)[0] if c.isdigit()) or 8)
    return math.prod(shape) * (_width(live_dtype) if live_dtype and floating else bits // 8)
