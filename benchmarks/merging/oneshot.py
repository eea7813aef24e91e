"""One-shot merges of checkpoints on disk: ours, mergekit's, and a plain copy of the same files.

Both tools are given the same merge file of mergekit; ours also the same merge as a recipe. Every figure is the
fastest of some repeats, taken in turn, on files that are in the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from merging.mergekit_peer import Peer
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("a", "b", "c")
START = "import sys; sys.path.insert(0, {root!r}); from meiosis.cli.main import main; main()"

TASK = {"weight": 0.4}
SPARSE = {"weight": 0.4, "density": 0.5}
METHODS: Mapping[str, tuple[int, bool, Mapping[str, Any], Mapping[str, Any]]] = {
    "linear": (3, False, {"weight": 0.4}, {}),
    "slerp": (2, True, {}, {"t": 0.4}),
    "nuslerp": (2, False, {"weight": 0.4}, {}),
    "multislerp": (3, False, {"weight": 0.4}, {}),
    "karcher": (3, False, {}, {}),
    "task_arithmetic": (3, True, TASK, {}),
    "ties": (3, True, SPARSE, {}),
    "dare_linear": (3, True, SPARSE, {}),
    "dare_ties": (3, True, SPARSE, {}),
    "breadcrumbs": (3, True, {**SPARSE, "gamma": 0.01}, {}),
    "breadcrumbs_ties": (3, True, {**SPARSE, "gamma": 0.01}, {}),
    "della": (3, True, {**SPARSE, "epsilon": 0.1}, {}),
    "della_linear": (3, True, {**SPARSE, "epsilon": 0.1}, {}),
    "model_stock": (3, True, {}, {}),
    "nearswap": (1, True, {}, {"t": 0.001}),
    "passthrough": (1, False, {}, {}),
    "sce": (3, True, {}, {"select_topk": 0.5}),
    "arcee_fusion": (1, True, {}, {}),
    "ram": (3, True, {}, {}),
    "ramplus_tl": (3, True, {}, {}),
}
"""mergekit's name -> number of sources, whether there is a base beside them, parameters per model and shared."""


@dataclass(frozen=True)
class Shape:
    """A Llama-like model."""

    hidden: int
    layers: int
    vocabulary: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        wide = self.hidden * 11 // 4
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            where = f"model.layers.{layer}"
            for name in "qkvo":
                yield f"{where}.self_attn.{name}_proj.weight", (self.hidden, self.hidden)
            yield f"{where}.mlp.gate_proj.weight", (wide, self.hidden)
            yield f"{where}.mlp.up_proj.weight", (wide, self.hidden)
            yield f"{where}.mlp.down_proj.weight", (self.hidden, wide)
            yield f"{where}.input_layernorm.weight", (self.hidden,)
            yield f"{where}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
        }


TINY = Shape(32, 2, 64)
"""What a merge of takes no time: the rest is the start of the process."""


def shape_of(millions: int) -> Shape:
    """A model of about so many million parameters."""
    hidden = 1024 if millions >= 60 else 256
    layer = 4 * hidden**2 + 3 * hidden * (hidden * 11 // 4)
    return Shape(hidden, max(1, round((millions * 1e6 - 2 * 16_000 * hidden) / layer)), 16_000)


def make_family(folder: Path, shape: Shape, dtype: str) -> int:
    """Base and fine-tunes with random numbers; returns the number of parameters."""
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(size, generator=generator) for name, size in shape.tensors()}
    for model in ("base", *SOURCES):
        tuned = {
            name: tensor if model == "base" else tensor + 0.002 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
        (folder / model).mkdir(parents=True)
        stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tuned.items()}
        save_file(stored, folder / model / "model.safetensors", {"format": "pt"})
        (folder / model / "config.json").write_text(json.dumps({**shape.config, "torch_dtype": dtype}))
    return sum(tensor.numel() for tensor in base.values())


def merge_file(folder: Path, method: str, dtype: str) -> tuple[Path, list[str]]:
    """A merge file for both tools, and the models that it reads."""
    count, base, per_model, shared = METHODS[method]
    names = list(SOURCES[:count])
    entries = [
        {"model": str(folder / name), **({"parameters": dict(per_model)} if per_model else {})} for name in names
    ]
    content: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": dtype}
    if base:
        names.append("base")
        content["base_model"] = str(folder / "base")
        if method == "slerp":  # the base is the first of its two points
            names.remove("b")
            del entries[1]
            entries.insert(0, {"model": str(folder / "base")})
    if shared:
        content["parameters"] = dict(shared)
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump(content))
    return path, names


def recipe_file(folder: Path, method: str, dtype: str) -> Path:
    """The same merge as a recipe, which computes in float32 and rounds once."""
    count, base, per_model, shared = METHODS[method]
    names = ["base", "a"] if method == "slerp" else list(SOURCES[:count])
    content: dict[str, Any] = {
        "models": {name: {"path": str(folder / name)} for name in dict.fromkeys([*(["base"] if base else []), *names])},
        "rules": [{"operator": method, "sources": {n: dict(per_model) for n in names}, "parameters": dict(shared)}],
        "seed": 0,
        "dtype": dtype,
    }
    if base:
        content["base"] = "base"
    path = folder / f"{method}-recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@dataclass(frozen=True)
class Ran:
    """One process: wall time, most resident memory (with mapped pages) and most private memory, both sampled.

    Not the kernel's `ru_maxrss`: that begins with what the process that starts it has.
    """

    seconds: float
    peak_bytes: int
    private_bytes: int
    failed: str = ""


def run(command: Sequence[object], environment: Mapping[str, str] | None = None) -> Ran:
    """Run a command and watch its memory."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    most, over = {"VmHWM": 0, "RssAnon": 0}, threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                name = line.partition(":")[0]
                if name in most:
                    most[name] = max(most[name], int(line.split()[1]) * 1024)

    said: list[str] = []
    threads = [threading.Thread(target=watch), threading.Thread(target=lambda: said.extend(process.stderr or ()))]
    for thread in threads:
        thread.start()
    code = process.wait()
    seconds = time.perf_counter() - began
    over.set()
    for thread in threads:
        thread.join()
    failed = (said[-1].strip() if said else f"status {code}") if code else ""
    return Ran(seconds, most["VmHWM"], most["RssAnon"], failed)


def copy_seconds(files: Sequence[Path], output: int, folder: Path) -> tuple[float, float]:
    """Seconds of `cp` of the files and of one as large as the output: as it returns, and until all is on the disk."""
    folder.mkdir()
    like = next(file for file in files if file.stat().st_size >= output * 0.9)
    os.sync()
    began = time.perf_counter()
    for number, file in enumerate([*files, like]):
        subprocess.run(["cp", file, folder / str(number)], check=True)
    returned = time.perf_counter() - began
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    synced = time.perf_counter() - began
    shutil.rmtree(folder)
    return returned, synced


def measure(
    folder: Path,
    *,
    millions: int,
    dtypes: Sequence[str],
    peer: Peer,
    threads: int,
    repeats: int = 2,
    methods: Sequence[str] = tuple(METHODS),
    tiny: bool = False,
) -> list[dict[str, Any]]:
    """Rows by dtype and method.

    Columns: seconds of our merge of that file (`ours`: rounded as mergekit rounds), of the same merge as a recipe
    (`recipe`), of mergekit and of the copy; `start` is what a merge of a tiny model takes.
    """
    rows = []
    out, cache = folder / "out", folder / "cache"
    environment = {"MEIOSIS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}

    def ours(path: Path, *options: str) -> Ran:
        shutil.rmtree(cache, ignore_errors=True)  # of the hashes of an earlier merge
        start = [sys.executable, "-c", START.format(root=str(ROOT))]
        ran = run([*start, "merge", path, out, "--threads", threads, "--json", *options], environment)
        shutil.rmtree(out, ignore_errors=True)
        return ran

    def theirs(path: Path) -> Ran:
        ran = run([*peer.command, path, out, "--no-copy-tokenizer", "-j", threads], environment)
        shutil.rmtree(out, ignore_errors=True)
        return ran

    for dtype in dtypes:
        here, small = folder / dtype, folder / f"tiny-{dtype}"
        parameters = make_family(here, TINY if tiny else shape_of(millions), dtype)
        make_family(small, TINY, dtype)
        file, _ = merge_file(small, "linear", dtype)
        starts: dict[str, list[Any]] = {"start": [ours(file) for _ in range(repeats + 1)]}
        if peer.command:
            starts["mergekit_start"] = [theirs(file) for _ in range(repeats + 1)]
        for method in methods:
            file, names = merge_file(here, method, dtype)
            inputs = [here / name / "model.safetensors" for name in names]
            found: dict[str, list[Any]] = {name: list(runs) for name, runs in starts.items()}
            for _ in range(repeats):
                output = parameters * getattr(torch, dtype).itemsize
                found.setdefault("copy", []).append(copy_seconds(inputs, output, folder / "copy"))
                found.setdefault("ours", []).append(ours(file))
                found.setdefault("recipe", []).append(ours(recipe_file(here, method, dtype)))
                if peer.command:
                    found.setdefault("mergekit", []).append(theirs(file))
            rows.append(
                {"dtype": dtype, "method": method, "models": len(names), "parameters": parameters, **_row(found)}
            )
            print(f"{dtype} {method}: {rows[-1]}", file=sys.stderr, flush=True)
        shutil.rmtree(here)
        shutil.rmtree(small)
    return rows


def _row(found: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "copy_s": min(returned for returned, _ in found["copy"]),
        "copy_synced_s": min(synced for _, synced in found["copy"]),
    }
    for name, runs in found.items():
        if name == "copy":
            continue
        failed = next((ran.failed for ran in runs if ran.failed), "")
        best = min(runs, key=lambda ran: ran.seconds)
        row |= {f"{name}_s": None if failed else best.seconds, f"{name}_failed": failed}
        row |= {f"{name}_peak": best.peak_bytes, f"{name}_private": best.private_bytes}
    return row
