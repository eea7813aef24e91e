"""`meiosis merge` out of core: little memory, whole or nothing, and what it says before and while it works."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import START, Ended, end, meiosis, spawn, wait_until
from safetensors.torch import load_file, save_file

from search.checkpoints.fingerprint import fingerprint, refuse_non_finite
from search.checkpoints.pages import drop_mapped_pages
from search.checkpoints.reading import CheckpointTensors, open_checkpoint
from search.checkpoints.source_hashes import SourceHashes
from search.checkpoints.staging import remove_leftovers
from search.errors import CheckpointError

SLOW_DISK = """
import os, time
write = os.pwrite
def slow(descriptor, data, place):
    time.sleep(0.4)
    return write(descriptor, data, place)
os.pwrite = slow
"""
"""Put before a command: it stays in the middle of its work for some seconds."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEIOSIS_CACHE", str(tmp_path / "cache"))


def model(folder: Path, *, seed: int, tensors: int = 24, shape: tuple[int, int] = (64, 64), dtype: Any = None) -> Path:
    """A checkpoint of random numbers, without a tokenizer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    made = {f"layers.{i}.weight": torch.randn(shape, generator=generator) for i in range(tensors)}
    save_file({name: t.to(dtype or torch.float32) for name, t in made.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 64}))
    return folder


def recipe_file(folder: Path, operator: str = "linear", **changes: Any) -> Path:
    """A merge of the models `a` and `b` of a folder, half and half."""
    recipe = {
        "models": {"a": {"path": "a"}, "b": {"path": "b"}},
        "rules": [{"operator": operator, "sources": {"a": {"weight": 0.5}, "b": {"weight": 0.5}}}],
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        model(tmp_path / name, seed=seed)
    return tmp_path


def sha256(folder: Path) -> str:
    return fingerprint(open_checkpoint(folder), cache=False).sha256


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# Memory

PEAK = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from search.export import merge_recipe
from search.recipe_file import read_recipe
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":")) * 1024
folder = Path(sys.argv[1])
recipe = read_recipe(folder / "recipe.yaml")
merge_recipe(recipe, folder / "warm", folder=folder / "small")  # kernels, threads, imports
peak, done, before = {"RssAnon": 0, "VmRSS": 0}, threading.Event(), {k: status(k) for k in ("RssAnon", "VmRSS")}
def watch():
    while not done.wait(0.002):
        for key in peak:
            peak[key] = max(peak[key], status(key) - before[key])
thread = threading.Thread(target=watch)
thread.start()
merge_recipe(recipe, folder / "out", folder=folder, threads=int(sys.argv[2]))
done.set()
thread.join()
print(peak["RssAnon"], peak["VmRSS"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks the kernel for its memory")
@pytest.mark.parametrize("threads", [1, 8])
def test_memory_is_a_few_tensors_however_large_the_model(threads: int, tmp_path: Path) -> None:
    tensor = 4 << 20
    for seed, name in enumerate("ab"):
        model(tmp_path / name, seed=seed, tensors=40, shape=(1024, 1024))
        model(tmp_path / "small" / name, seed=seed)
    recipe_file(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, str(threads)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    private, resident = map(int, done.stdout.split())
    total = 40 * tensor
    # Four are under way, and there are buffers of blocks; without `return_large_blocks` it can be 25.
    assert private < 8 * tensor, f"{private / tensor:.1f} tensors, of a model of 40"
    assert resident < private + 2 * total, "pages of the sources were let go of on the way"
    assert sha256(tmp_path / "out") != sha256(tmp_path / "a")


def test_pages_that_were_let_go_of_are_read_again(models: Path) -> None:
    checkpoint = open_checkpoint(models / "a")
    mapped = CheckpointTensors(checkpoint)
    views = {name: mapped.get(name) for name in mapped.names}
    before = {name: view.clone() for name, view in views.items()}
    drop_mapped_pages(checkpoint.files)
    assert all(torch.equal(views[name], before[name]) for name in views)


# Whole or nothing


def test_a_killed_merge_leaves_nothing_that_loads_and_the_next_one_cleans_up(models: Path) -> None:
    recipe = recipe_file(models)
    out = models / "out"
    process = spawn("merge", recipe, out, code=SLOW_DISK + START)
    wait_until(lambda: any(path.stat().st_size for path in models.glob(".out.partial-*/shard-1")), process)
    process.send_signal(signal.SIGKILL)
    end(process)
    assert not out.exists()
    (left,) = models.glob(".out.partial-*")
    with pytest.raises(CheckpointError):
        open_checkpoint(left)
    assert meiosis("merge", recipe, out).status == 0
    assert leftovers(models) == []
    expected = {
        n: (t + load_file(models / "b/model.safetensors")[n]) / 2
        for n, t in load_file(models / "a/model.safetensors").items()
    }
    found = load_file(out / "model.safetensors")
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in expected.items())


def test_ctrl_c_ends_with_130_one_line_and_nothing_left(models: Path) -> None:
    process = spawn("merge", recipe_file(models), models / "out", code=SLOW_DISK + START)
    wait_until(lambda: any(models.glob(".out.partial-*/shard-1")), process)
    process.send_signal(signal.SIGINT)
    ended = end(process)
    assert (ended.status, ended.err.strip(), ended.out) == (130, "meiosis: interrupted", "")
    assert leftovers(models) == []
    assert not (models / "out").exists()


def test_two_merges_to_one_place_do_not_disturb_each_other(models: Path) -> None:
    """The second to finish is refused: it may not replace what the first wrote meanwhile."""
    recipe, out = recipe_file(models), models / "out"
    slow = spawn("merge", recipe, out, code=SLOW_DISK + START)
    wait_until(lambda: any(models.glob(".out.partial-*/shard-1")), slow)
    assert meiosis("merge", recipe, out).status == 0
    written = sha256(out)
    ended = end(slow)
    assert ended.status == 2
    assert "is not empty, and nothing is overwritten" in ended.err
    assert sha256(out) == written
    assert leftovers(models) == []


def test_a_model_that_a_killed_process_moved_aside_comes_back(models: Path) -> None:
    assert meiosis("merge", recipe_file(models), models / "out").status == 0
    written = sha256(models / "out")
    (models / "out").rename(models / ".out.replaced-0123")
    remove_leftovers(models / "out")
    assert sha256(models / "out") == written
    shutil.copytree(models / "out", models / ".out.replaced-4567")
    remove_leftovers(models / "out")
    assert leftovers(models) == []


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_source_that_is_not_finite_is_named_and_nothing_is_left(value: str, cached: bool, models: Path) -> None:
    tensors = load_file(models / "b" / "model.safetensors")
    tensors["layers.20.weight"][3, :2] = float(value)
    tensors["layers.23.weight"][0, 0] = float(value)
    save_file(tensors, models / "b" / "model.safetensors")
    if cached:
        fingerprint(open_checkpoint(models / "b"))
    with pytest.raises(CheckpointError) as wanted:
        refuse_non_finite("b", fingerprint(open_checkpoint(models / "b"), cache=False))
    ended = meiosis("merge", recipe_file(models), models / "out")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == f"meiosis: {wanted.value}\n"
    assert leftovers(models) == []
    assert not (models / "out").exists()


@pytest.mark.parametrize("operator", ["tsv_m", "ties", "karcher"])
def test_a_source_that_is_not_finite_is_named_whatever_the_method(operator: str, models: Path) -> None:
    tensors = load_file(models / "b" / "model.safetensors")
    tensors["layers.0.weight"][3, :2] = float("nan")
    save_file(tensors, models / "b" / "model.safetensors")
    model(models / "base", seed=7)
    sources = {name: {} if operator == "karcher" else {"weight": 0.5} for name in "ab"}
    changes: dict[str, Any] = {"rules": [{"operator": operator, "sources": sources}]}
    if operator != "karcher":
        changes |= {"base": "base", "models": {name: {"path": name} for name in ("base", "a", "b")}}
    ended = meiosis("merge", recipe_file(models, **changes), models / "out")
    assert ended.status == 2
    assert ended.err.count("\n") == 1, ended.err
    assert "model 'b'" in ended.err
    assert "layers.0.weight" in ended.err
    assert leftovers(models) == []


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_that_is_not_the_one_of_the_recipe_is_refused(cached: bool, models: Path) -> None:
    recipe = recipe_file(models, models={"a": {"path": "a"}, "b": {"path": "b", "sha256": "0" * 64}})
    if cached:
        fingerprint(open_checkpoint(models / "b"))
    ended = meiosis("merge", recipe, models / "out")
    assert ended.status == 2
    assert ended.err.count("\n") == 1, ended.err
    assert "models.b.sha256" in ended.err
    assert "leave sha256 out" in ended.err
    assert leftovers(models) == []
    assert not (models / "out").exists()


def test_numbers_too_large_for_the_dtype_are_refused_not_written_as_infinity(models: Path) -> None:
    tensors = load_file(models / "a" / "model.safetensors")
    tensors["layers.7.weight"][5, 5] = 1e6
    save_file(tensors, models / "a" / "model.safetensors")
    ended = meiosis("merge", recipe_file(models), models / "out", "--dtype", "float16")
    assert ended.status == 2
    assert ended.err.count("\n") == 1, ended.err
    for text in ("layers.7.weight", "1 merged values", "float16", "bfloat16 or float32"):
        assert text in ended.err
    assert leftovers(models) == []


# What is written


def test_shards_threads_and_dtype_change_what_they_say_and_nothing_else(models: Path) -> None:
    recipe = recipe_file(models)
    whole = meiosis("merge", recipe, models / "whole", "--threads", 1, "--json")
    assert whole.json["model"] == str(models / "whole")
    assert meiosis("merge", recipe, models / "split", "--threads", 2, "--shard-size", "50kB").status == 0
    assert sha256(models / "whole") == sha256(models / "split")
    index = json.loads((models / "split" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-{i:05}-of-00008.safetensors" for i in range(1, 9)}
    assert meiosis("merge", recipe, models / "half", "--dtype", "bfloat16").status == 0
    half, full = (load_file(models / name / "model.safetensors") for name in ("half", "whole"))
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)
    assert yaml.safe_load((models / "half" / "recipe.yaml").read_text())["dtype"] == "bfloat16"
    assert json.loads((models / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_recipe_beside_the_model_has_the_hashes_of_its_sources_where_they_are_asked_for_or_known(
    models: Path,
) -> None:
    assert meiosis("merge", recipe_file(models), models / "plain").status == 0
    written = yaml.safe_load((models / "plain" / "recipe.yaml").read_text())
    assert written["models"] == {name: {"path": str(models / name)} for name in "ab"}
    assert meiosis("merge", recipe_file(models), models / "hashed", "--hash").status == 0
    assert meiosis("merge", recipe_file(models), models / "out").status == 0
    written = yaml.safe_load((models / "out" / "recipe.yaml").read_text())
    assert {n: m["sha256"] for n, m in written["models"].items()} == {n: sha256(models / n) for n in "ab"}
    marker = json.loads((models / "out" / "meiosis.json").read_text())
    assert marker["weights_sha256"] == sha256(models / "out")


def test_a_merge_file_of_mergekit_is_merged_as_it_is(models: Path) -> None:
    merge = """
        merge_method: linear
        models:
          - {model: a, parameters: {weight: 1.0}}
          - {model: b, parameters: {weight: 1.0}}
        dtype: float32
    """
    (models / "merge.yml").write_text(textwrap.dedent(merge))
    ended = meiosis("merge", models / "merge.yml", models / "theirs")
    assert ended.status == 0, ended.err
    assert meiosis("merge", recipe_file(models), models / "ours").status == 0
    ours, theirs = (load_file(models / name / "model.safetensors") for name in ("ours", "theirs"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shards", [False, True])
def test_hashing_beside_the_merge_gives_the_fingerprints(threads: int, shards: bool, models: Path) -> None:
    if shards:
        recipe = recipe_file(models)
        assert meiosis("merge", recipe, models / "c", "--shard-size", "100kB").status == 0
    checkpoints = {name: open_checkpoint(models / name) for name in ("a", "c" if shards else "b")}
    order = list(checkpoints["a"].tensors)
    shutil.rmtree(models / "cache", ignore_errors=True)
    with SourceHashes(checkpoints, order, ["a"], threads) as hashes:
        for name in order:
            hashes.merging(name)
        assert hashes.finish() == {"a": fingerprint(checkpoints["a"], cache=False)}
    shutil.rmtree(models / "cache", ignore_errors=True)
    with SourceHashes(checkpoints, order, checkpoints, threads) as hashes:
        assert hashes.known() == {}
        for name in order:
            hashes.merging(name)
        found = hashes.finish()
    assert found == {name: fingerprint(checkpoint, cache=False) for name, checkpoint in checkpoints.items()}
    with SourceHashes(checkpoints, order, (), threads) as hashes:
        assert hashes.known() == found
        assert hashes.nbytes == 0


# The plan


def test_a_dry_run_tells_the_plan_and_touches_nothing(models: Path) -> None:
    rules = [
        {"tensors": ["layers.0.*"], "operator": "slerp", "sources": {"a": {}, "b": {}}, "parameters": {"t": 0.5}},
        {"operator": "linear", "sources": {"a": {"weight": 1.0}, "b": {"weight": 1.0}}},
    ]
    recipe = recipe_file(models, rules=rules)
    before = sorted(models.rglob("*"))
    ended = meiosis(
        "merge", recipe, models / "out", "--dry-run", "--json", "--dtype", "bfloat16", "--shard-size", "100kB"
    )
    assert ended.status == 0, ended.err
    assert sorted(models.rglob("*")) == before
    plan, tensor = ended.json, 64 * 64
    assert plan["tensors"] == 24
    assert plan["operators"] == {"slerp": 1, "linear": 23}
    assert (plan["bytes_written"], plan["bytes_read"]) == (24 * tensor * 2, 24 * tensor * 4 * 2)
    assert plan["bytes_hashed"] == 0
    assert plan["shards"] == [12 * tensor * 2] * 2
    assert [(m["name"], m["dtype"], m["hash"]) for m in plan["models"]] == [
        ("a", "float32", "not asked for"),
        ("b", "float32", "not asked for"),
    ]
    hashing = meiosis("merge", recipe, models / "out", "--dry-run", "--json", "--hash").json
    assert hashing["bytes_hashed"] == 2 * 24 * tensor * 4
    assert {m["hash"] for m in hashing["models"]} == {"to be taken"}
    options = ["--dtype", "bfloat16", "--shard-size", "100kB", "--hash"]
    assert meiosis("merge", recipe, models / "out", *options).status == 0
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in sorted((models / "out").glob("*.safetensors"))]
    assert sizes == plan["shards"]
    ended = meiosis("merge", recipe, models / "again", "--dry-run")
    assert "Nothing was written." in ended.out
    assert ended.out.count("known") == 2
    assert not (models / "again").exists()


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_mistakes_are_one_line_before_anything_is_read(option: tuple[str, ...], models: Path) -> None:
    def refused(*arguments: object) -> str:
        ended: Ended = meiosis("merge", *arguments, *option)
        assert (ended.status, ended.out) == (2, ""), ended
        assert ended.err.count("\n") == 1, ended.err
        return ended.err

    recipe = recipe_file(models)
    assert "found '5 apples', expected a size" in refused(recipe, models / "out", "--shard-size", "5 apples")
    assert "did you mean 'bfloat16'" in refused(recipe, models / "out", "--dtype", "bfloat61")
    for device in ("cud", "cuda:99", "meta"):
        assert f"device '{device}': cannot be used here" in refused(recipe, models / "out", "--device", device)
    assert "is a folder, expected a YAML file" in refused(models, models / "out")
    (models / "taken").mkdir()
    (models / "taken" / "thesis.txt").write_text("x")
    assert "is not empty" in refused(recipe, models / "taken")
    (models / "a" / "meiosis.json").write_text("{}")
    assert "is the model 'a' of this merge" in refused(recipe, models / "a", "--overwrite")
    (models / "b" / "model.safetensors").write_bytes(b"")
    assert "is empty (0 bytes)" in refused(recipe, models / "out")
    assert leftovers(models) == []


# How it starts, and what it shows


def test_a_merge_starts_without_transformers(models: Path) -> None:
    code = "import sys, atexit\natexit.register(lambda: print('transformers' in sys.modules, file=sys.stderr))\n"
    ended = end(spawn("merge", recipe_file(models), models / "out", code=code + START))
    assert ended.status == 0, ended.err
    assert ended.err.endswith("False\n")


def test_a_bar_is_drawn_on_a_terminal_only(models: Path) -> None:
    assert meiosis("merge", recipe_file(models), models / "out").err.count("tensors") == 0
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", START, "merge", models / "recipe.yaml", models / "bar"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm", "PYTHONPATH": path}
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert done.wait() == 0, shown
    assert b"24/24 tensors" in shown


def test_a_model_without_a_tokenizer_is_said_not_to_be_ready_for_gguf(models: Path) -> None:
    ended = meiosis("merge", recipe_file(models), models / "out")
    assert ended.status == 0
    assert "not ready for GGUF: there is no tokenizer" in ended.err
