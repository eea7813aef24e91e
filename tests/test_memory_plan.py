"""Memory of a search: what it is planned to take, what it takes, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROOT, meiosis, short, write_config
from family import config_of

from cluster.shards import warm
from meiosis.cli.memory import lines
from search.config import load_config
from search.errors import ConfigError, UserError
from search.machine import gpus_are_hidden, has_gpu, make_probe, visible_gpus
from search.memory import ModelSize, Needs, Node, activation_bytes, model_size, needs_of, plan_memory
from search.memory_sizes import CUDA_CONTEXT_BYTES, LIBRARY_BYTES, SCRATCH_ELEMENTS
from search.merge.operator import ACCELERATOR_BLOCK_ELEMENTS, BLOCK_ELEMENTS
from search.setup import check
from search.worker_plan import worker_plan

GIB = 2**30
NEEDS = Needs(sources=40 * GIB, live=14 * GIB, activations=GIB, merging=GIB, learning=0, on_gpu=False)


def test_what_a_worker_needs_by_hand() -> None:
    assert NEEDS.host == LIBRARY_BYTES + 16 * GIB
    assert NEEDS.gpu == 0
    on_gpu = replace(NEEDS, on_gpu=True)
    assert on_gpu.gpu == CUDA_CONTEXT_BYTES + 16 * GIB
    assert on_gpu.host > 14 * GIB, "the model passes through main memory when it is loaded"
    assert replace(NEEDS, learning=30 * GIB).host == LIBRARY_BYTES + 45 * GIB


def test_activations_by_hand() -> None:
    size = ModelSize(hidden=4096, inner=14336, heads=32, layers=32, vocabulary=128256, positions=8192)
    tokens = 2048
    logits = tokens * 128256 * 2
    softmax = (2**24 // 128256) * 128256 * 10
    layer = tokens * (32 * 4096 + 3 * 14336 * 2)
    attention = tokens * 1024 * (2 * 32 * 2 + 4)
    assert activation_bytes(size, tokens, 1024, 2) == logits + softmax + layer + attention
    assert activation_bytes(size, 16, 1024, 2) == activation_bytes(size, 1024, 1024, 2), "a sequence is never cut"
    assert activation_bytes(size, tokens, 1 << 20, 2) == activation_bytes(size, 8192, 8192, 2)
    assert activation_bytes(size, tokens, 1024, 2, train=True) > 32 * (layer + attention)


def test_sizes_are_found_under_the_names_that_families_use() -> None:
    gpt2 = {"n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257, "n_positions": 1024, "n_inner": None}
    assert model_size(gpt2) == ModelSize(768, 3072, 12, 12, 50257, 1024)
    inside = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 100}
    found = model_size({"vision_config": {}, "text_config": inside})
    assert found is not None
    assert found[:5] == (64, 256, 2, 3, 100)
    assert model_size({"architectures": ["ViTModel"], "hidden_size": 768}) is None
    assert SCRATCH_ELEMENTS == {False: BLOCK_ELEMENTS, True: ACCELERATOR_BLOCK_ELEMENTS}


def test_workers_are_spread_and_the_largest_number_is_named() -> None:
    nodes = [Node("big", 100 * GIB), Node("small", 20 * GIB)]
    plan = plan_memory(NEEDS, nodes, 2)
    assert [share.workers for share in plan.shares] == [1, 1]
    assert plan.fits
    plan.require()
    plan = plan_memory(NEEDS, nodes, 6)
    assert [(share.workers, share.most) for share in plan.shares] == [(3, 6), (3, 1)]
    assert plan.largest == 3, "the fourth goes to the small node"
    with pytest.raises(UserError) as caught:
        plan.require()
    message = str(caught.value)
    assert message.startswith("cluster.workers: on node small 3 workers would need 49.8 GiB of memory, and 20.0 GiB")
    assert "set cluster.workers to at most 3" in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"on node tiny 1 worker would need .*; not even one fits: "):
        plan_memory(NEEDS, [Node("tiny", GIB)], 1).require()
    waits = plan_memory(NEEDS, [Node("one", 100 * GIB, slots=2)], 6)
    assert waits.fits
    assert waits.shares[0].workers == 2, "Ray has no room for more, whatever the memory"


def test_workers_on_gpus_must_fit_there_too() -> None:
    needs = replace(NEEDS, on_gpu=True)
    node = Node("gpus", 500 * GIB, gpus=(80 * GIB, 80 * GIB, 24 * GIB))
    assert plan_memory(needs, [node], 3, gpus_per_worker=1.0).fits
    quarter = plan_memory(needs, [replace(node, slots=12)], 12, gpus_per_worker=0.25)
    assert quarter.shares[0].most == 4 + 4 + 1
    assert quarter.largest == 9
    with pytest.raises(UserError, match=r"17\.0 GiB of GPU memory each, and 80\.0 GiB, 80\.0 GiB, 24\.0 GiB are free"):
        quarter.require()
    large = replace(needs, live=120 * GIB)
    assert plan_memory(large, [node], 1, gpus_per_worker=1.0).largest == 0
    assert plan_memory(large, [replace(node, gpus=(80 * GIB,) * 4)], 2, gpus_per_worker=2.0).fits
    assert plan_memory(needs, [node], 5).shares[0].most == 4, "without a reservation all meet on the first GPU"
    assert plan_memory(needs, [replace(node, gpus=())], 3, gpus_per_worker=1.0).fits, "unknown is not too little"


def test_the_probe_tells_what_this_machine_has_and_lacks(tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"1234")
    found = make_probe()([(str(tmp_path / "here"), 4), (str(tmp_path / "gone"), 7), (str(tmp_path / "here"), 5)])
    assert found["lacks"] == 12
    assert 2**26 < found["memory"] < 2**50
    assert found["name"]


def config_file(family: Path, folder: Path, **cluster: Any) -> Path:
    config = config_of(family, folder / "runs")
    config["cluster"] |= cluster
    return write_config(short(config), folder)


@pytest.mark.parametrize(
    ("named", "seen", "hidden"),
    [
        (None, (10, 20, 30), False),
        ("2", (30,), False),
        ("2, 0", (30, 10), False),
        ("", (), True),
        ("-1", (), True),
        ("GPU-8932f937", (), False),
        ("7", (), False),
    ],
)
def test_a_gpu_that_is_not_ours_to_use_is_not_planned_with(
    named: str | None, seen: tuple[int, ...], hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of a host may be full of somebody else's work."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus((10, 20, 30)) == seen
    assert gpus_are_hidden() == hidden
    assert not (hidden and has_gpu())


def test_plan_names_what_a_node_needs_and_refuses_what_does_not_fit(family: Path, tmp_path: Path) -> None:
    config = config_file(family, tmp_path, pool="ray")
    plan = meiosis("plan", config)
    assert plan.status == 0, plan.err
    for text in ("live model", "of activations", "2 workers need", "that are free", "The config is sound"):
        assert text in plan.out
    memory = meiosis("plan", config, "--json").json["memory_bytes"]
    needed, (node,) = memory["main memory of one worker"], memory["nodes"]
    assert needed > LIBRARY_BYTES + memory["live model of one worker"]
    assert (node["workers"], memory["largest number of workers"]) == (2, 2)

    too_many = ["--set", "cluster.workers=9999"]
    refused = meiosis("plan", config, *too_many)
    assert refused.status == 2
    assert "It does not fit" in refused.out
    (line,) = refused.err.splitlines()
    assert "9999 workers would need" in line
    most = int(line.partition("set cluster.workers to at most ")[2].split()[0])
    assert abs(most - node["free"] // needed) <= 0.2 * most + 1
    for command in ("search", "baselines"):
        search = meiosis(command, config, "--run", "refused", *too_many)
        assert (search.status, search.out) == (2, "")
        assert "set cluster.workers to at most" in search.err
    assert not (tmp_path / "runs").exists(), "nothing was begun"
    assert meiosis("plan", config, *too_many, "--set", "cluster.check_memory=false").status == 0


def test_a_search_that_must_be_tried_all_the_same_says_so(family: Path, tmp_path: Path) -> None:
    """In this process one model is alive, whatever the number of workers, so it takes a config that is too large."""
    config = config_file(family, tmp_path)
    data = yaml.safe_load(config.read_text())
    data["cluster"]["check_memory"] = False
    for evaluator in data["evaluators"].values():
        evaluator["batch_tokens"] = 1 << 40
    config.write_text(yaml.safe_dump(data))
    ended = meiosis("search", config, "--run", "tried")
    assert ended.status == 0, ended.err
    assert "going on all the same: cluster.workers: on node " in ended.err
    assert meiosis("search", config, "--run", "refused", "--set", "cluster.check_memory=true").status == 2


def test_the_estimate_of_activations_is_no_less_than_what_is_taken_and_at_most_three_times_as_much(
    family: Path, tmp_path: Path
) -> None:
    """Blocks of memory go back to the system when they are freed, as those of large models do."""
    config = config_of(family, tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = Path(config["evaluators"]["python"]["data"]["search"]).read_text().splitlines()
    source = "".join(json.loads(line)["text"] for line in lines)
    for number in range(60):
        (texts / f"{number}.txt").write_text(f"{number} {source * 3}")
    evaluator = {"use": "perplexity", "data": str(texts), "batch_tokens": 8192}
    config |= {"evaluators": {"python": evaluator}, "objectives": {"terms": ["python.nll"], "normalize": "none"}}
    file = write_config(config, tmp_path)
    setup = check(load_config(file))
    planned = needs_of(setup, has_gpu=False).activations
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout)
    assert taken > 16 << 20, "too little to be measured"
    assert taken <= planned <= 3 * taken, (taken, planned)


MEASURE = """
import sys
from pathlib import Path
from search.config import load_config
from search.evaluation import Evaluation
from search.machine import has_gpu
from search.setup import check
from search.worker_plan import worker_plan

def status(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
    return int(line.split()[1]) * 1024

if __name__ == "__main__":
    body = Evaluation(worker_plan(check(load_config(Path(sys.argv[1])))))
    evaluator, model = body._evaluators["python"], body._model.model
    items = evaluator.items("search")
    list(evaluator.evaluate(model, items[:1]))  # code is loaded when it is used first
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
    before = status("VmRSS")
    list(evaluator.evaluate(model, items))
    print(status("VmHWM") - before)
"""


# Sources larger than memory


def sparse_model(folder: Path, elements: int) -> Path:
    """A model whose large tensor takes no disk, after a small one with numbers in it."""
    import numpy as np

    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["A"]}')
    header = {
        "small": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]},
        "large": {"dtype": "F32", "shape": [elements], "data_offsets": [4000, 4000 + 4 * elements]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = folder / "model.safetensors"
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text + np.full(1000, 2.0, np.float32).tobytes())
        out.truncate(8 + len(text) + 4000 + 4 * elements)
    return file


def test_sources_larger_than_memory_are_not_read_ahead_and_can_be_merged(tmp_path: Path) -> None:
    import torch

    from search.merge.apply import Merger
    from search.recipe import ModelRef, Recipe, Rule
    from search.sources import open_models, open_sources

    elements = int(make_probe()(())["memory"] / 4 * 1.2)
    try:
        file = sparse_model(tmp_path / "huge", elements)
    except OSError:
        pytest.skip("this file system has no files larger than the memory")
    assert warm([file], None, tmp_path) == 0
    assert not list(tmp_path.glob("warm-*")), "nobody is told that it was read"
    models = {"huge": ModelRef(path=str(tmp_path / "huge"))}
    opened = open_sources(open_models(models, base="huge"), models=models, donor="huge")
    merger = Merger(opened.tensors, device="cpu")
    recipe = Recipe(models=models, rules=(Rule(operator="linear", sources={"huge": {"weight": 0.5}}),))
    merged = dict(merger.merge_tensors(recipe, ["small"]))
    assert torch.equal(merged["small"], torch.full((1000,), 2.0))
    large = opened.tensors["huge"].get("large")
    assert (large.shape, float(large[-1])) == ((elements,), 0.0)
    large[-1] = 1.0
    with file.open("rb") as found:
        found.seek(-4, os.SEEK_END)
        assert found.read() == bytes(4), "a mistake must not reach the file"


def test_merging_takes_memory_of_its_own_for_some_tensors_and_not_for_the_models(tmp_path: Path) -> None:
    """Three models of 96 MiB each are merged into one of 96 MiB; the pages of their files are not counted."""
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 72 << 20, "less than one of the models"


STREAM = """
import sys, threading, time
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from search.merge.apply import Merger
from search.recipe import ModelRef, Recipe, Rule
from search.sources import open_models, open_sources

def private():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024

if __name__ == "__main__":
    folder, models = Path(sys.argv[1]), {}
    values = np.ones(1 << 20, np.float32)
    for name in "abc":
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"architectures": ["A"]}')
        save_file({f"t{i:02}": values for i in range(24)}, folder / name / "model.safetensors")
        models[name] = ModelRef(path=str(folder / name))
    sources = {name: {"weight": 0.25} for name in models}
    recipe = Recipe(models=models, rules=(Rule(operator="linear", sources=sources, parameters={"normalize": False}),))
    opened = open_sources(open_models(models, base="a"), models=models, donor="a")
    merger = Merger(opened.tensors, device="cpu")
    dict(merger.merge_tensors(recipe, ["t00"]))  # compiles what there is to compile
    before, most, count = private(), 0, 0
    for name, tensor in merger.merge_tensors(recipe):
        assert float(tensor[-1]) == 0.75
        most, count = max(most, private()), count + 1
    assert count == 24
    print(most - before)
"""


def test_a_config_for_this_process_knows_no_copies(family: Path, tmp_path: Path) -> None:
    config = config_file(family, tmp_path, shards="copy")
    with pytest.raises(ConfigError, match="pool: local"):
        load_config(config)


# Models over several GPUs


def test_what_each_of_several_gpus_needs_by_hand() -> None:
    needs = replace(NEEDS, on_gpu=True, live=140 * GIB, block=2 * GIB, gpus=4)
    assert needs.gpu == CUDA_CONTEXT_BYTES + (140 + 3 * 2) // 4 * GIB + GIB // 2 + GIB + GIB
    assert needs.beside_live == 2 * GIB
    assert needs.fits([needs.gpu] * 4)
    assert not needs.fits([needs.gpu - GIB] * 4)
    assert needs.fits([needs.gpu - GIB] * 3 + [needs.gpu + 3 * GIB]), "they need not be equal"
    assert replace(needs, gpus=1).gpu == CUDA_CONTEXT_BYTES + 142 * GIB
    # A soup learns in float32, of which each GPU has its share as well; gradients and activations are on every one.
    learning = replace(needs, learning=300 * GIB, learned=280 * GIB)
    assert learning.beside_learning == 21 * GIB
    assert learning.beside_live == 21 * GIB + (280 + 3 * 4) // 4 * GIB
    assert replace(learning, gpus=1).gpu == CUDA_CONTEXT_BYTES + 441 * GIB, "as on one GPU"


def test_a_model_too_large_for_one_gpu_says_over_how_many_it_fits() -> None:
    needs = replace(NEEDS, on_gpu=True, live=140 * GIB, block=2 * GIB)
    node = Node("gpus", 900 * GIB, gpus=(80 * GIB,) * 8)
    with pytest.raises(UserError, match=r"not even one fits: set cluster\.gpus_per_worker to 2, over which a worker"):
        plan_memory(needs, [node], 1, gpus_per_worker=1.0).require()
    two = plan_memory(needs, [node], 4, gpus_per_worker=2.0)
    assert two.fits
    assert (two.needs.gpus, two.shares[0].most) == (2, 4)
    larger = replace(needs, live=300 * GIB)
    with pytest.raises(UserError, match=r"GiB on each of 2 GPUs, and 80\.0 GiB, .*gpus_per_worker to 4, over which"):
        plan_memory(larger, [node], 1, gpus_per_worker=2.0).require()
    with pytest.raises(UserError, match=r"not even one fits: set cluster\.dtype to bfloat16"):
        plan_memory(replace(needs, live=800 * GIB), [node], 1, gpus_per_worker=2.0).require()


def test_the_plan_of_a_worker_leaves_room_on_each_of_its_gpus(family: Path, tmp_path: Path) -> None:
    setup = check(load_config(config_file(family, tmp_path)))
    assert worker_plan(setup).gpus == 1
    assert worker_plan(setup).beside_live is None
    cluster = setup.config.cluster.model_copy(update={"pool": "ray", "gpus_per_worker": 2.0})
    setup = replace(setup, config=setup.config.model_copy(update={"cluster": cluster}))
    needs, plan = needs_of(setup, has_gpu=True), worker_plan(setup)
    assert (needs.gpus, plan.gpus) == (2, 2)
    assert plan.beside_live == needs.beside_live >= needs.activations + needs.merging
    assert plan.beside_learning == needs.beside_learning
    assert 0 < needs.block < needs.live / 2
    assert needs_of(setup, has_gpu=False).gpus == 1, "the CPU has one memory"
    shown = "\n".join(lines(plan_memory(needs, [Node("gpus", 900 * GIB, gpus=(80 * GIB,) * 4)], 2, 2.0), "auto"))
    assert "of each of its 2 GPUs" in shown
    assert "each (free: 80.0 GiB, 80.0 GiB, 80.0 GiB, 80.0 GiB), over 2 of which every worker lays its model" in shown
