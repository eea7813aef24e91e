"""`meiosis merge`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meiosis.cli.common import debug_option, json_option, note, out, print_json
from meiosis.cli.hub import push_options

if TYPE_CHECKING:
    from rich.progress import Progress

    from search.checkpoints.byte_progress import Meter
    from search.merge_plan import MergePlan

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(ctx: click.Context, param: click.Parameter, value: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match and match[2].upper() in UNITS else 0
    if size < 1:
        raise click.BadParameter(f"found '{value}', expected a size such as 5GB, 500MB or 2GiB", ctx, param)
    return size


@click.command("merge", epilog="Example: meiosis merge examples/recipe.yaml merged --dry-run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show what would be read, done and written; do nothing.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is in OUT.")
@click.option("--dtype", help="Store the weights in this dtype, whatever the recipe says: bfloat16, float32, ...")
@click.option("--device", default="cpu", show_default=True, help="Where to merge: cpu, cuda, cuda:1, auto.")
@click.option("--shard-size", callback=_bytes, default="5GB", show_default=True, help="Largest file of the output.")
@click.option("--threads", type=click.IntRange(1), help="Threads; by default one for every core the process may use.")
@click.option(
    "--hash", "hash_models", is_flag=True, help="Hash the models, so that the recipe in OUT says which bytes they had."
)
@push_options
@json_option
@debug_option
def command(
    recipe: Path,
    folder: Path,
    dry_run: bool,
    overwrite: bool,
    dtype: str | None,
    device: str,
    shard_size: int,
    threads: int | None,
    hash_models: bool,
    push: str | None,
    private: bool,
    as_json: bool,
) -> None:
    """Carry out the merge of a RECIPE file and write the checkpoint to OUT.

    RECIPE is one of Meiosis or a merge file of mergekit. Relative model paths in it start at its folder.
    The models may be larger than the memory: a few tensors are in it at a time.
    """
    # Read by torch when it first takes memory: large tensors, each new, come in pages of 2 MiB.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from search import export
    from search.devices import usable_device
    from search.push import check_repository, push_folder
    from search.recipe_file import read_recipe

    repository = check_repository(push, private)
    device = usable_device(device)
    read = read_recipe(recipe, note)
    where = recipe.resolve().parent
    if dry_run:
        plan = export.dry_run(
            read,
            folder,
            folder=where,
            overwrite=overwrite,
            dtype=dtype,
            max_shard_bytes=shard_size,
            hash_models=hash_models,
        )
        if as_json:
            print_json({**asdict(plan), "bytes_written": plan.bytes_written})
        else:
            _show(plan, folder)
        return
    with _meter(quiet=as_json) as meter:
        export.merge_recipe(
            read,
            folder,
            folder=where,
            overwrite=overwrite,
            dtype=dtype,
            device=device,
            max_shard_bytes=shard_size,
            threads=threads or len(os.sched_getaffinity(0)),
            hash_models=hash_models,
            meter=meter,
        )
    from search.gguf import gguf_ready

    missing = gguf_ready(folder)
    address = push_folder(folder, repository) if repository is not None else None
    if as_json:
        print_json({"model": str(folder), "gguf_missing": missing, **({"pushed": address} if address else {})})
        return
    for line in missing:
        note(f"not ready for GGUF: {line}")
    out().print(f"Merged model: {folder}", soft_wrap=True)
    if address is not None:
        out().print(f"Pushed to: {address}", soft_wrap=True)


def _show(plan: MergePlan, folder: Path) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("model", "folder", "size", "dtype", "hash"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for model in plan.models:
        table.add_row(model.name, str(model.folder), _size(model.nbytes), model.dtype, model.hash)
    console = out()
    console.print(table)
    operators = ", ".join(f"{name} {count}" for name, count in plan.operators.items())
    console.print(f"\nTensors: {plan.tensors} (by operator: {operators})", soft_wrap=True)
    console.print(
        f"Output: {_size(plan.bytes_written)} in {len(plan.shards)} file{'s' * (len(plan.shards) > 1)}: {folder}",
        soft_wrap=True,
    )
    console.print(f"To read: {_size(plan.bytes_read)} to merge, {_size(plan.bytes_hashed)} to hash in the same pass")
    console.print(
        f"Memory beside Python and torch: about {_size(plan.peak_bytes)}; up to {_size(plan.peak_bytes_whole)} "
        "for operators that need whole matrices"
    )
    console.print("Nothing was written.")


def _size(nbytes: int) -> str:
    unit = next((unit for unit in ("KiB", "MiB") if nbytes < 1024 * UNITS[unit.upper()]), "GiB")
    return f"{nbytes / UNITS[unit.upper()]:.1f} {unit}"


@contextmanager
def _meter(quiet: bool) -> Iterator[Meter | None]:
    """A bar on stderr where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    with Progress(
        TextColumn("{task.fields[done]}/{task.fields[tensors]} tensors"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        yield _Bar(bar)


class _Bar:
    """A `Meter` that is a bar of rich."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._done = bar, 0
        self._task = bar.add_task("merge", total=None, done=0, tensors="?")

    def start(self, tensors: int, nbytes: int) -> None:
        self._bar.update(self._task, total=nbytes, tensors=tensors)

    def wrote(self, nbytes: int) -> None:
        self._done += 1
        self._bar.update(self._task, advance=nbytes, done=self._done)
