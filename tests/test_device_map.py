"""Models laid over several devices: where the cuts are, and that nothing of a candidate depends on them."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import write_config
from family import DOMAINS, config_of
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import recipe_of
from test_evaluation import CHANGES, found, job, odd_function, perplexity, plan_of
from torch import nn

from evaluators.base import EvaluatorSpec
from search.checkpoints.reading import CheckpointTensors, open_checkpoint
from search.checkpoints.writing import written_sha256
from search.config import load_config
from search.device_map import Layout, add_hooks, lay_out, plan_layout, room_on
from search.devices import worker_devices
from search.errors import ConfigError, MeiosisError, UserError
from search.evaluation import Evaluation
from search.export import merge_recipe
from search.merge.apply import Merger
from search.merge.live import build_live_model
from search.merge.sources import InMemoryTensors
from search.pool import Job
from search.recipe import Recipe
from search.soups.plan import LearnSoup, LossTerm, mixture

SEVERAL_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
THREE = ("cpu", "cpu", "cpu")
"""Hooks and cuts as on three GPUs, where there is none."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it takes layers on the CPU for layers with no room
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Where the cuts are


class Block(nn.Module):
    """A block with parts inside, one of them without any tensor."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inside, self.drop = nn.Sequential(nn.Linear(size, 1, bias=False), nn.LayerNorm(3)), nn.Dropout()
        self.register_buffer("table", torch.zeros(2))


class Body(nn.Module):
    def __init__(self, sizes: Sequence[int], loose: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes[0], 1)
        self.layers = nn.ModuleList(Block(size) for size in sizes[1:-1])
        if loose:
            self.newline = nn.Parameter(torch.zeros(5))


class Toy(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self, sizes: Sequence[int], tied: bool, loose: bool) -> None:
        super().__init__()
        self.body = Body(sizes, loose)
        self.head = nn.Linear(1, sizes[0] if tied else sizes[-1], bias=False)
        if tied:
            self.head.weight = self.body.embed.weight


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def cuts(model: Toy, tied: bool, loose: bool) -> list[int]:
    """Bytes of what stays together, in order; that which must be on the first device comes first."""
    blocks = [bytes_of(block) for block in model.body.layers]
    rest = [] if tied else [bytes_of(model.head)]
    return ([20] if loose else []) + [bytes_of(model.body.embed), *blocks, *rest]


def best_by_trying(sizes: Sequence[int], room: Sequence[int], loose: bool) -> int | None:
    """Bytes on the fullest device of the best of all ways to cut, None if none fits."""
    best = None
    for places in itertools.combinations_with_replacement(range(len(sizes) + 1), len(room) - 1):
        ends = [0, *places, len(sizes)]
        loads = [sum(sizes[a:b]) for a, b in itertools.pairwise(ends)]
        fits = all(load <= free for load, free in zip(loads, room, strict=True))
        if fits and not (loose and ends[1] == 0):
            best = max(loads) if best is None else min(best, max(loads))
    return best


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=3, max_size=8),
    st.lists(st.integers(0, 700), min_size=2, max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_every_tensor_has_one_place_blocks_are_whole_and_no_device_has_more_than_its_room(
    sizes: list[int], room: list[int], tied: bool, loose: bool
) -> None:
    with torch.device("meta"):
        model = Toy(sizes, tied, loose)
    devices = [f"cuda:{index}" for index in range(len(room))]
    best = best_by_trying(cuts(model, tied, loose), room, loose)
    if best is None:
        with pytest.raises(UserError, match=r"cluster\.gpus_per_worker: the live Toy takes .* beside activations"):
            plan_layout(model, devices, room)
        return
    layout = plan_layout(model, devices, room)
    assert max(layout.nbytes) == best, "the fullest device is as empty as can be"
    assert all(nbytes <= free for nbytes, free in zip(layout.nbytes, room, strict=True))
    on = [0] * len(room)
    seen: dict[int, int] = {}
    for name, tensor in itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        (key,) = (key for key in layout.places if name == key or name.startswith(f"{key}."))
        assert seen.setdefault(id(tensor), layout.places[key]) == layout.places[key], "tied weights are in one place"
    for tensor in (*model.parameters(), *model.buffers()):  # without repetition
        on[seen[id(tensor)]] += tensor.nbytes
    assert tuple(on) == layout.nbytes
    assert all(f"body.layers.{index}" in layout.places for index in range(len(sizes) - 2)), "no block is split"
    in_order = [layout.places[f"body.layers.{index}"] for index in range(len(sizes) - 2)]
    assert in_order == sorted(in_order)
    assert not loose or layout.places["body.newline"] == 0


def test_more_room_than_is_needed_changes_nothing() -> None:
    model = Toy([9, 5, 5, 5, 5, 9], False, False)
    layouts = [plan_layout(model, ("cuda:0", "cuda:1"), room) for room in ((10**9, 10**9), (10**6, 10**8))]
    assert layouts[0] == layouts[1]
    assert layouts[0].device_map == {
        "body.embed": "cuda:0",
        "body.layers.0": "cuda:0",
        "body.layers.1": "cuda:0",
        "body.layers.2": "cuda:1",
        "body.layers.3": "cuda:1",
        "head": "cuda:1",
    }
    assert layouts[0].as_data()["bytes"] == {"cuda:0": 140, "cuda:1": 140}


def test_what_does_not_fit_says_what_it_takes_and_how_many_gpus_would_do() -> None:
    with torch.device("meta"):
        model = Toy([1 << 28] * 6, False, False)  # six parts of 1 GiB each
    with pytest.raises(UserError) as caught:
        plan_layout(model, ("cuda:0", "cuda:1"), (2 << 30, 2 << 30))
    message = str(caught.value)
    assert "\n" not in message
    assert "the live Toy takes 6.0 GiB, and 2 GPUs have room for 2.0 GiB, 2.0 GiB beside activations" in message
    assert "set cluster.gpus_per_worker to 6 where GPUs" in message, "a block is a little more than 1 GiB"
    with pytest.raises(UserError, match=r"its largest block takes 1\.0 GiB: set cluster\.dtype"):
        plan_layout(model, ("cuda:0", "cuda:1"), (1 << 20, 1 << 20))


def test_a_class_that_does_not_say_what_its_blocks_are_is_refused() -> None:
    with pytest.raises(UserError, match="does not say where a Linear may be split"):
        plan_layout(nn.Linear(2, 2), ("cuda:0", "cuda:1"), (10**9, 10**9))


def test_room_is_left_for_what_is_known_to_be_needed_or_else_a_tenth() -> None:
    (all_free,), (less,) = room_on(["cpu"], None), room_on(["cpu"], 5 << 30)
    assert 0 < all_free < 1 << 50
    assert less <= all_free / 0.9 - (5 << 30) + (1 << 30)
    assert room_on(["cpu"], 1 << 60) == (0,)


def test_one_gpu_or_none_is_one_device() -> None:
    assert worker_devices("cpu", 4) == ("cpu",)
    if not torch.cuda.is_available():
        assert worker_devices("auto", 4) == ("cpu",)
    else:
        assert worker_devices("auto", 0.5) == worker_devices("cuda", 1) == ("cuda",)
        with pytest.raises(MeiosisError, match=r"cluster\.gpus_per_worker is 99 but this worker sees \d+ GPU"):
            worker_devices("auto", 99)


def test_one_gpu_by_its_number_and_several_exclude_each_other(family: Path, tmp_path: Path) -> None:
    config = config_of(family, tmp_path / "results")
    config["cluster"] |= {"pool": "ray", "device": "cuda:1", "gpus_per_worker": 2}
    with pytest.raises(ConfigError, match="cuda:1 is one GPU and gpus_per_worker is 2; write device: cuda"):
        load_config(write_config(config, tmp_path))


# A real model, its parts on devices of which torch knows only the name


DEVICES = ("cpu:1", "cpu:2")
"""For torch two devices like any; of GPUs that are not there it cannot index tensors."""


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_llama_over_two_gpus_runs_with_a_cache_and_is_merged_where_its_tensors_are(family: Path) -> None:
    """In torch's fake mode tensors have a device but no data; what mixes devices fails as it does on GPUs."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(family / "base")
    # Read before: the mode has no files.
    files = {name: CheckpointTensors(open_checkpoint(family / name)) for name in ("base", *DOMAINS)}
    sources = {model: InMemoryTensors({name: file.get(name) for name in file.names}) for model, file in files.items()}
    # Without gradients: for those torch asks the driver, which is not there.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = LlamaForCausalLM(config).eval()
        layout = plan_layout(model, DEVICES, (10**9, 10**9))
        assert set(layout.device_map.values()) == set(DEVICES)
        assert layout.places["model.layers.0"] == 0
        assert layout.places["model.layers.1"] == 1
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            (key,) = (key for key in layout.places if name == key or name.startswith(f"{key}."))
            module, _, last = name.rpartition(".")  # torch cannot move tensors of this mode in their modules
            there = torch.empty(tensor.shape, device=layout.device_map[key])
            holder = model.get_submodule(module)
            setattr(holder, last, nn.Parameter(there) if last in holder._parameters else there)
        add_hooks(model, layout)
        cache = DynamicCache(config=config)
        for layer, device in zip(cache.layers, DEVICES, strict=True):
            layer.keys = layer.values = torch.empty(2, 2, 3, 16, device=device)
            layer.is_initialized = True
        ids = torch.zeros(2, 7, dtype=torch.long, device=DEVICES[0])
        out = model(input_ids=ids, labels=ids, past_key_values=cache)
        assert str(out.logits.device) == str(out.loss.device) == DEVICES[0], "where the input was"
        kept = [(str(layer.keys.device), tuple(layer.keys.shape)) for layer in out.past_key_values.layers]
        assert kept == [(device, (2, 2, 10, 16)) for device in DEVICES], "each where its layer is"
        with pytest.raises(RuntimeError, match="found at least two devices"):
            nn.functional.linear(torch.ones(1, 32, device=DEVICES[1]), model.model.layers[0].mlp.gate_proj.weight)

        targets = {name: parameter.detach() for name, parameter in model.named_parameters()}
        merger = Merger(sources, device=DEVICES[0], kernels="torch")
        for operator in ("passthrough", "nearswap"):  # which look at no numbers
            stats = merger.merge_into(recipe_of(family, operator), targets)
            assert stats.written == len(targets)


# A real model whose parts are all on the CPU, with the hooks that move what goes between them


@pytest.mark.parametrize("operator", ["task_arithmetic", "ties", "slerp"])
def test_a_candidate_has_the_same_bits_and_scores_whatever_it_is_laid_over(family: Path, operator: str) -> None:
    plan = plan_of(family, perplexity(family))
    plain, laid = Evaluation(plan), Evaluation(plan, THREE)
    assert plain.layout is None
    assert laid.layout is not None
    assert len(set(laid._layouts["live"].places.values())) == 3
    for number, recipe in enumerate([recipe_of(family, operator), recipe_of(family, "linear", weight=0.9)]):
        assert found(laid.run(job(recipe, number))) == found(plain.run(job(recipe, number)))


def test_the_export_has_the_hash_of_the_model_that_was_laid_over_several_devices(family: Path, tmp_path: Path) -> None:
    recipe = recipe_of(family, "dare_ties", dtype="bfloat16")
    laid = Evaluation(replace(plan_of(family), dtype="bfloat16"), THREE)
    merge_recipe(recipe, tmp_path / "out", threads=1)
    assert laid.run(job(recipe)).weights_sha256 == written_sha256(tmp_path / "out")


@pytest.mark.parametrize("change", [*CHANGES, "takes the hooks away"])
def test_an_evaluator_that_changes_a_laid_out_model_is_seen_and_the_model_is_made_again_where_it_was(
    change: str, family: Path, tmp_path: Path
) -> None:
    changes = {**CHANGES, "takes the hooks away": "import accelerate.hooks as h; h.remove_hook_from_submodules(model)"}
    odd, flag = odd_function(tmp_path, changes[change])
    body, recipe = Evaluation(plan_of(family, odd, perplexity(family)), THREE), recipe_of(family, "task_arithmetic")
    before, layout = found(body.run(job(recipe))), body.layout
    flag.touch()
    bad = body.run(job(recipe, 1))
    flag.unlink()
    assert bad.failure is not None
    assert "evaluator 'odd' changed the weights" in bad.failure.message
    assert found(body.run(job(recipe, 2))) == before
    assert body.layout == layout


def test_evaluators_may_work_on_a_copy_and_generate(family: Path, tmp_path: Path) -> None:
    """What they return is compared with that of a plain worker."""
    (tmp_path / "copying.py").write_text(
        "import copy\nimport torch\n"
        "def score(model, device):\n"
        "    ids = torch.arange(1, 9, device=device).view(1, 8)\n"
        "    made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)\n"
        "    slow = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False, pad_token_id=0)\n"
        "    assert made.shape[1] > 9 and made.equal(slow)\n"
        "    own = copy.deepcopy(model).to(torch.float64).to(device)\n"
        "    for parameter in own.parameters():\n"
        "        parameter.data.mul_(0.5)\n"
        "    assert own(ids).logits.dtype == torch.float64 and model(ids).logits.dtype == torch.float32\n"
        "    return float((made * torch.arange(made.shape[1])).sum())\n"
    )
    spec = EvaluatorSpec("copying", "python", {"function": f"{tmp_path / 'copying.py'}:score"})
    recipe = recipe_of(family, "ties")
    assert found(Evaluation(plan_of(family, spec), THREE).run(job(recipe))) == found(
        Evaluation(plan_of(family, spec)).run(job(recipe))
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_tied_weights_stay_tied_and_every_target_is_the_live_tensor(kind: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=4, n_head=2, n_positions=16)
        made: Any = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, tie_word_embeddings=True, **sizes))
    else:
        config = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        made = transformers.T5ForConditionalGeneration(config)
    made.save_pretrained(tmp_path / "m")
    layouts: list[Layout] = []

    def lay(model: nn.Module) -> None:
        layouts.append(plan_layout(model, THREE, (10**6,) * 3))
        lay_out(model, layouts[0])

    plain = build_live_model(tmp_path / "m", device="cpu", dtype=None)
    laid = build_live_model(tmp_path / "m", device="cpu", dtype=None, lay_out=lay)
    assert len(set(layouts[0].places.values())) > 1
    given_, put = laid.model.get_input_embeddings(), laid.model.get_output_embeddings()
    assert given_.weight is put.weight
    names = tuple(open_checkpoint(tmp_path / "m").tensors)
    assert laid.targets(names).keys() == plain.targets(names).keys()
    with torch.no_grad():
        for live in (plain, laid):
            for target in live.targets(names).values():
                target.mul_(1.5)
        ids = torch.arange(6).view(1, 6)
        more = {"decoder_input_ids": ids} if kind == "t5" else {}
        assert torch.equal(plain.model(ids, **more).logits, laid.model(ids, **more).logits)
        other = copy.deepcopy(laid.model)
        other.get_input_embeddings().weight.zero_()
        assert torch.equal(plain.model(ids, **more).logits, laid.model(ids, **more).logits)
        assert not torch.equal(other(ids, **more).logits, laid.model(ids, **more).logits)


def learning_job(family: Path) -> Job:
    models = recipe_of(family, "linear").models
    start = Recipe(base="base", models=models, rules=(mixture(("*",), dict.fromkeys(DOMAINS, 1 / 3)),))
    plan = LearnSoup((LossTerm("python.nll", 1.0, 1.0),), steps=2, rate=0.1, temperature=True)
    return Job(0, start, "search", learn=plan)


def test_a_soup_that_is_learned_over_several_devices_is_the_same(family: Path) -> None:
    plan = plan_of(family, perplexity(family))
    plain, laid = (body.run(learning_job(family)) for body in (Evaluation(plan), Evaluation(plan, THREE)))
    assert plain.failure is None
    assert plain.metrics == laid.metrics
    assert plain.metrics["soup/end"] < plain.metrics["soup/start"]


# Several GPUs


@pytest.mark.gpu
@SEVERAL_GPUS
@pytest.mark.parametrize("operator", ["task_arithmetic", "ties", "slerp"])
def test_a_candidate_over_two_gpus_has_the_bits_of_one_gpu(family: Path, operator: str) -> None:
    plan = replace(plan_of(family, perplexity(family)), device="cuda")
    one, two = Evaluation(plan), Evaluation(replace(plan, gpus=2))
    assert two.layout is not None
    assert set(two.layout["device_map"].values()) == {"cuda:0", "cuda:1"}
    assert {str(target.device) for target in two._targets.values()} == {"cuda:0", "cuda:1"}
    for number, recipe in enumerate([recipe_of(family, operator), recipe_of(family, "linear", weight=0.9)]):
        first, second = one.run(job(recipe, number)), two.run(job(recipe, number))
        assert first.weights_sha256 == second.weights_sha256
        assert first.metrics == pytest.approx(second.metrics, rel=1e-6)


@pytest.mark.gpu
@SEVERAL_GPUS
def test_a_soup_learned_over_two_gpus_is_the_same_every_time(family: Path) -> None:
    plan = replace(plan_of(family, perplexity(family)), device="cuda", gpus=2)
    first, second = (Evaluation(plan).run(learning_job(family)) for _ in range(2))
    assert first.failure is None
    assert first.metrics == second.metrics
    one = Evaluation(replace(plan, gpus=1)).run(learning_job(family))
    assert first.metrics == pytest.approx(one.metrics, abs=2e-3)
