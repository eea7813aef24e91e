"""Hidden states of shared first layers: the bits of a candidate are those of a model that never saw another."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from search.grouping import place_of
from search.prefix.contents import contents_of, digest
from search.prefix.reuse import PrefixReuse
from search.prefix.states import boundaries

LAYERS = 3
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
LLAMA = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 32}
MAKE: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=4)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=LAYERS, n_head=2)
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=32)
    ),
}
VERSIONS = 3
Candidate = tuple[int, ...]
"""Which of three versions a candidate has of the embedding, of every layer, and of what comes after them."""
pytestmark = pytest.mark.usefixtures("one_thread")


class Worker:
    """A live model that becomes one candidate after another, as `Evaluation` has it; and the same, cold."""

    def __init__(self, make: Any, dtype: torch.dtype = torch.float32, capacity: int = 1 << 30) -> None:
        self.versions = _versions(make, dtype)
        self.model, self._cold = copy.deepcopy(self.versions[0]), copy.deepcopy(self.versions[0])
        self.reuse = PrefixReuse(capacity)
        generator = torch.Generator().manual_seed(1)
        self.inputs = []
        for rows, length in ((4, 7), (2, 11)):
            ids = torch.randint(0, 40, (rows, length), generator=generator)
            mask = torch.ones_like(ids)
            mask[0, length - 2 :] = 0
            self.inputs.append({"input_ids": ids, "attention_mask": mask, "use_cache": False})

    def become(self, candidate: Candidate, model: nn.Module) -> None:
        with torch.no_grad():
            for name, live in model.state_dict().items():
                live.copy_(self.versions[self.version(name, candidate)].state_dict()[name])

    def version(self, name: str, candidate: Candidate) -> int:
        place = place_of(name)
        if place.layer is not None:
            return candidate[1 + place.layer]
        tied = "embed" in name or "wte" in name or "wpe" in name or self.is_tied(name)
        return candidate[0] if tied else candidate[-1]

    def is_tied(self, name: str) -> bool:
        state = self.model.state_dict()
        return any(
            ("embed" in other or "wte" in other) and tensor.data_ptr() == state[name].data_ptr()
            for other, tensor in state.items()
        )

    def fingerprints(self, candidate: Candidate) -> Mapping[str, object]:
        return {name: ("version", self.version(name, candidate)) for name in self.model.state_dict()}

    def watching(self, candidate: Candidate) -> Any:
        self.become(candidate, self.model)
        return self.reuse.watching(self.model, self.model.state_dict(), self.fingerprints(candidate))

    def run(self, candidate: Candidate, **more: Any) -> list[Tensor]:
        with self.watching(candidate) as watch, torch.no_grad():
            watch.allowed = True
            return [self.model(**inputs, **more).logits.clone() for inputs in self.inputs]

    def cold(self, candidate: Candidate) -> list[Tensor]:
        self.become(candidate, self._cold)
        with torch.no_grad():
            return [self._cold(**inputs).logits for inputs in self.inputs]


@functools.cache
def _versions(make: Any, dtype: torch.dtype) -> list[Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [make().to(dtype).eval().requires_grad_(False) for _ in range(VERSIONS)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def spared(candidates: Sequence[Candidate]) -> int:
    """Layers that the last of them shares with one of the earlier ones, counted by hand."""
    *earlier, last = [candidate[:-1] for candidate in candidates]
    alike = [0]
    for other in earlier:
        first = next((at for at in range(LAYERS + 1) if other[at] != last[at]), LAYERS + 1)
        alike.append(max(0, first - 1))
    return max(alike)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", MAKE)
def test_scores_are_those_of_a_cold_model_in_any_order_of_candidates(family: str, dtype: torch.dtype) -> None:
    @settings(max_examples=5, deadline=None, database=None)
    @given(st.lists(st.tuples(*[st.integers(0, 1)] * (LAYERS + 2)), min_size=2, max_size=4))
    def check(candidates: list[Candidate]) -> None:
        worker = Worker(MAKE[family], dtype)
        verified: set[int] = set()
        for number, candidate in enumerate(candidates):
            assert same(worker.run(candidate), worker.cold(candidate))
            expected = spared(candidates[: number + 1])
            # A depth that is met for the first time is checked with a pass in full.
            again = LAYERS if expected and expected not in verified else 0
            verified |= {expected}
            assert worker.reuse.layers_reused == expected * len(worker.inputs)
            assert worker.reuse.layers_run == (LAYERS - expected) * len(worker.inputs) + again
        assert worker.reuse.trusted

    check()


def test_memory_is_bounded_and_forgotten_states_are_computed_again() -> None:
    state = 4 * 7 * 16 * 4
    worker = Worker(MAKE["llama"], capacity=3 * state)
    generator = torch.Generator().manual_seed(3)
    reused = 0
    for _ in range(30):
        candidate = tuple(torch.randint(0, 2, (LAYERS + 2,), generator=generator).tolist())
        assert same(worker.run(candidate), worker.cold(candidate))
        assert worker.reuse.states.used <= 3 * state
        reused += worker.reuse.layers_reused
    assert reused > 0
    assert worker.reuse.shrink()
    assert (worker.reuse.states.used, worker.reuse.states.capacity) == (0, 3 * state // 2)


def test_without_memory_layers_are_counted_and_all_run() -> None:
    worker = Worker(MAKE["llama"], capacity=0)
    for candidate in [(0,) * 5] * 2:
        assert same(worker.run(candidate), worker.cold(candidate))
        assert (worker.reuse.layers_run, worker.reuse.layers_reused) == (2 * LAYERS, 0)


@pytest.mark.parametrize(
    ("layers", "fit", "expected"), [(4, 9, {1, 2, 3, 4}), (8, 2, {2, 6}), (8, 1, {4}), (1, 0, {1})]
)
def test_where_memory_is_short_the_layers_that_are_kept_are_spread(layers: int, fit: int, expected: set[int]) -> None:
    assert boundaries(layers, fit * 16 * 1000, 1000) == expected
    assert boundaries(layers, 10, 0) == set(range(1, layers + 1)), "nothing is known yet of what a state takes"


# What is left alone


def test_what_an_evaluator_may_ask_for_runs_in_full() -> None:
    worker = Worker(MAKE["llama"])
    candidate, layers = (0,) * 5, LAYERS
    worker.run(candidate)
    cold = copy.deepcopy(worker.model)
    ids = worker.inputs[0]["input_ids"]
    seen: list[Tensor] = []

    def hidden(model: Any) -> list[Tensor]:
        return list(model(**worker.inputs[0], output_hidden_states=True).hidden_states)

    def hooked(model: Any) -> list[Tensor]:
        handle = model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
        found = model(**worker.inputs[0]).logits
        handle.remove()
        return [found, seen.pop()]

    def scaled(model: Any) -> list[Tensor]:
        handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: 2 * output)
        found = model(**worker.inputs[0]).logits
        handle.remove()
        return [found]

    def pruned_copy(model: Any) -> list[Tensor]:
        other = copy.deepcopy(model)
        other.model.layers[0].mlp.up_proj.weight.mul_(0)
        return [other(**worker.inputs[0]).logits]

    def other_weights(model: Any) -> list[Tensor]:
        doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
        return [torch.func.functional_call(model, doubled, (), worker.inputs[0]).logits]

    def with_gradient(model: Any) -> list[Tensor]:
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(ids).requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits
            return list(torch.autograd.grad(logits.sum(), embedded))

    def in_training(model: Any) -> list[Tensor]:
        model.train()
        found = model(**worker.inputs[0]).logits
        model.eval()
        return [found]

    uses: dict[str, tuple[Any, int]] = {
        "labels": (lambda m: [m(**worker.inputs[0], labels=ids).loss, m(**worker.inputs[0], labels=ids).loss], layers),
        "generate": (lambda m: [m.generate(ids, max_new_tokens=3, do_sample=False)], 0),
        "cache": (lambda m: [m(input_ids=ids).logits, m(input_ids=ids, use_cache=True).logits], 0),
        "hidden": (hidden, 0),
        "hooked": (hooked, 0),
        "scaled": (scaled, 0),
        "pruned copy": (pruned_copy, 0),
        "other weights": (other_weights, 0),
        "gradient": (with_gradient, 0),
        "training": (in_training, 0),
        "inference mode": (lambda m: [torch.inference_mode()(lambda: m(**worker.inputs[0]).logits)().clone()], 0),
        "tuple": (lambda m: [m(**worker.inputs[0], return_dict=False)[0]], 0),
        "backbone": (lambda m: [m.model(**worker.inputs[0]).last_hidden_state], 0),
        "as ever": (lambda m: [m(**worker.inputs[0]).logits], layers),
    }
    for name, (use, expected) in uses.items():
        with torch.no_grad():
            wanted = use(cold)
            with worker.watching(candidate) as watch:
                watch.allowed = True
                assert same(use(worker.model), wanted), name
        assert worker.reuse.layers_reused == expected, name
        assert not any("forward" in vars(module) for module in worker.model.modules()), name
        hooks = [hook for module in worker.model.modules() for hook in module._forward_pre_hooks]
        assert not hooks, name


def test_an_evaluator_that_does_not_say_that_it_only_calls_the_model_gets_no_states() -> None:
    worker = Worker(MAKE["llama"])
    worker.run((0,) * 5)
    with worker.watching((0,) * 5), torch.no_grad():
        worker.model(**worker.inputs[0])
    assert (worker.reuse.layers_run, worker.reuse.layers_reused) == (LAYERS, 0)


def test_weights_that_an_evaluator_writes_and_puts_back_are_not_taken_for_the_candidates() -> None:
    worker = Worker(MAKE["llama"])
    worker.run((0,) * 5)
    weight = worker.model.model.layers[0].mlp.up_proj.weight
    before = weight.clone()
    with worker.watching((0,) * 5) as watch, torch.no_grad():
        watch.allowed = True
        weight.zero_()
        changed = worker.model(**worker.inputs[0]).logits
        weight.copy_(before)
    assert not torch.equal(changed, worker.cold((0,) * 5)[0])
    assert worker.reuse.layers_reused == 0


def test_a_pass_that_breaks_off_leaves_the_model_as_it_was() -> None:
    worker = Worker(MAKE["llama"])
    candidate = (0,) * 5
    for stop in (ValueError("no"), KeyboardInterrupt()):
        head, worker.model.lm_head = worker.model.lm_head, _Raises(stop)
        try:
            with pytest.raises(type(stop)):
                worker.run(candidate)
        finally:
            worker.model.lm_head = head
        assert not any("forward" in vars(module) for module in worker.model.modules())
        assert same(worker.run(candidate), worker.cold(candidate))


class _Raises(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, state: Tensor) -> Tensor:
        raise self.error


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, shared: Any) -> Tensor:
        if isinstance(shared, dict):
            hidden_states = hidden_states + shared.get("last", 0)
            shared["last"] = hidden_states
        elif shared is not None:
            hidden_states = hidden_states + shared
        return hidden_states + torch.tanh(self.mix(hidden_states))


class _Odd(nn.Module):
    """A model with a way from layer to layer beside the hidden state: `kind` says which."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(40, 8)
        self.layers = nn.ModuleList([_Layer() for _ in range(LAYERS)])
        self.between = nn.Linear(8, 8)
        self.head = nn.Linear(8, 40)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        state = self.embed(input_ids)
        shared: Any = {} if self.kind == "a dict" else None
        for number, layer in enumerate(self.layers):
            state = layer(state, shared)
            if self.kind == "an argument made of states" and number == 0:
                shared = 0.5 * state
            if self.kind == "another state" and number == 1:
                state = self.between(state)
            if self.kind == "an early head" and number == 0:
                self.head(state)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(state))


@pytest.mark.parametrize("kind", ["a dict", "an argument made of states", "another state", "an early head", "nothing"])
def test_a_model_that_is_not_a_plain_stack_of_layers_is_seen_and_left_alone(kind: str) -> None:
    worker = Worker(lambda: _Odd(kind))
    candidates = [(0, 0, 0, 0, 0), (0, 0, 0, 1, 0), (0, 0, 1, 1, 0), (0, 0, 0, 1, 1), (0, 0, 0, 0, 1)]
    reused = 0
    for candidate in candidates:
        assert same(worker.run(candidate), worker.cold(candidate))
        reused += worker.reuse.layers_reused
    assert worker.reuse.trusted == (kind != "an argument made of states")
    assert (reused > 2 * LAYERS) == (kind in ("nothing", "an early head"))


def test_what_a_layer_is_made_of_is_told_apart_by_every_part_of_its_rules() -> None:
    names = {"embed.weight": "before", "layers.0.w": 0, "layers.1.w": 1, "norm.weight": "after"}
    places: Any = names
    rule = ("linear", ("a", "b"), None, ((("weight", 0.5),), ()), 3, "float32", None, torch.float32)
    base = contents_of(dict.fromkeys(names, rule), places, 2).chain()
    for other in [("slerp", *rule[1:]), (*rule[:4], 4, *rule[5:]), (*rule[:-1], torch.bfloat16), (*rule[:-1], None)]:
        for number, name in enumerate(names):
            changed = contents_of({**dict.fromkeys(names, rule), name: other}, places, 2).chain()
            alike = [mine == theirs for mine, theirs in zip(base, changed, strict=True)]
            assert alike == [place < number for place in range(3)] if number < 3 else all(alike)
    assert len({digest(1), digest(1.0), digest(True), digest("1"), digest(b"1")}) == 5
