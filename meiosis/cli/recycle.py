"""`meiosis recycle`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meiosis.cli.common import debug_option, json_option, out, print_json

if TYPE_CHECKING:
    from search.recycling.mapping import MappingReport, Plan

_TO = ("tokenizer", "vocabulary", "positions", "position_mode", "norm_order", "scale_input", "keep_head", "parts")
_GROWTH = ("layers", "hidden", "mlp", "depth", "width", "asymmetry")
_FLAGS = {"position_mode": "position-mode", "norm_order": "norms", "scale_input": "scale-input"}
_PARTS = ("embeddings", "attention", "mlp", "norms", "head")


@click.command("recycle", epilog="Example: meiosis recycle bert-base-uncased start --to gpt2 --positions 1024")
@click.argument("source")
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["gpt2", "megatron-bert-causal", "bert-causal"]),
    help="BERT to this decoder: GPT-2 (without BERT's output head), the same with that head, or BERT run causally.",
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder of another tokenizer for the result.")
@click.option(
    "--vocabulary",
    type=click.Choice(["mean", "nearest", "random"]),
    help="Embeddings of its new tokens: mean of the source's tokens that spell it (default), softmax-weighted "
    "nearest in spelling, or drawn.",
)
@click.option("--positions", type=click.IntRange(min=1), help="Positions of the result; by default the source's.")
@click.option(
    "--position-mode",
    type=click.Choice(["tile", "interpolate"]),
    help="More positions: the table again from its start (default), or stretched.",
)
@click.option(
    "--norms",
    "norm_order",
    type=click.Choice(["shifted", "same-index"]),
    help="Which norms go where: each sub-layer the one that fed it (default), or those of its own layer.",
)
@click.option("--scale-input", is_flag=True, default=None, help="Unit input embeddings; the output stays as it was.")
@click.option("--keep-head/--no-head", default=None, help="BERT's output head; kept by default where it has a place.")
@click.option("--parts", help=f"What is recycled, of {','.join(_PARTS)}; the rest is initialised.")
@click.option("--layers", type=click.IntRange(min=1), help="Grow to this many layers.")
@click.option("--hidden", type=click.IntRange(min=1), help="Grow to this width, a multiple of the source's.")
@click.option(
    "--mlp", type=click.IntRange(min=1), help="Grow the MLP to this width; by default it grows with --hidden."
)
@click.option(
    "--depth",
    type=click.Choice(["stack", "interlace", "identity"]),
    help="New layers: the stack again (default), copies in between, or copies that do nothing yet.",
)
@click.option(
    "--width",
    type=click.Choice(["fpi", "aki"]),
    help="New units: copies that keep the function (default), or rows of the next layer.",
)
@click.option("--asymmetry", type=float, help="From 0 (default) to 1: how unevenly columns are divided among copies.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn.")
@click.option("--dtype", help="Dtype of the result, such as bfloat16; by default the source's.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is in OUT.")
@click.option("--dry-run", is_flag=True, help="Show the mapping and write nothing.")
@json_option
@debug_option
def command(
    source: str,
    folder: Path,
    seed: int,
    dtype: str | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Initialise a new model, written to OUT, with the weights of the older model SOURCE.

    Either another architecture (--to), or a larger size of the same one (--layers, --hidden, --mlp). The result
    is the starting point of training and loads with stock transformers; recycling.json beside it says for every
    tensor what became of it.
    """
    plan = _plan(source, {name: value for name, value in options.items() if value is not None}, seed)
    if not dry_run:
        from search.recycling.write import write_recycled

        write_recycled(plan, folder, dtype=dtype, overwrite=overwrite)
    report = plan.report()
    if as_json:
        print_json({"model": None if dry_run else str(folder), **report.as_dict()})
    else:
        _show(report)
        out().print("Nothing was written." if dry_run else f"Recycled model: {folder}", soft_wrap=True)


def _plan(source: str, given: dict[str, Any], seed: int) -> Plan:
    from search.checkpoints.reading import open_checkpoint
    from search.errors import UserError

    to = given.pop("to", None)
    mine, other = (_TO, _GROWTH) if to else (_GROWTH, _TO)
    wrong = next((name for name in given if name in other), None)
    if wrong is not None:
        flag = _FLAGS.get(wrong, wrong.replace("_", "-"))
        if to:
            raise UserError(f"--{flag}: grows a model, and --to makes another architecture; do one after the other")
        raise UserError(f"--{flag}: needs --to, the architecture of the result; add --to gpt2")
    if to is None and not {"layers", "hidden", "mlp"} & given.keys():
        raise UserError("nothing to do: give --to (another architecture) or --layers, --hidden, --mlp (a larger size)")
    assert given.keys() <= set(mine)
    checkpoint = open_checkpoint(source)
    if to is None:
        from search.recycling.growth import GrowthOptions, plan_growth

        return plan_growth(checkpoint, GrowthOptions(**given, seed=seed))
    from search.recycling.bert_parts import BertOptions
    from search.recycling.bert_plan import plan_bert

    if "parts" in given:
        given["components"] = _components(given.pop("parts"))
    return plan_bert(checkpoint, BertOptions(to=to, **given, seed=seed))


def _components(text: str) -> frozenset[Any]:
    from search.errors import UserError, nearest

    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in _PARTS:
            raise UserError(f"--parts: no part '{part}'{nearest(part, _PARTS)}")
    if not parts:
        raise UserError(f"--parts: nothing is recycled; give some of {','.join(_PARTS)}")
    return frozenset(parts)


def _show(report: MappingReport) -> None:
    from rich.table import Table

    console = out()
    targets = Table(title=f"{report.architecture}: where every tensor comes from", title_justify="left")
    for column in ("tensor", "shape", "operation", "from", "note"):
        targets.add_column(column, overflow="fold")
    for origin in report.targets:
        shape = "x".join(map(str, origin.shape))
        targets.add_row(origin.name, shape, origin.operation, "\n".join(origin.sources), origin.note)
    console.print(targets)
    sources = Table(title=f"{report.source}: what became of every tensor", title_justify="left")
    for column in ("tensor", "shape", "what", "to, or why not"):
        sources.add_column(column, overflow="fold")
    for use in report.sources:
        shape = "x".join(map(str, use.shape))
        sources.add_row(use.name, shape, use.operation, "\n".join(use.targets) or use.reason)
    console.print(sources)
    for note in report.notes:
        console.print(f"Note: {note}.", soft_wrap=True)
    counts = ", ".join(f"{count} {what}" for what, count in report.counts.items())
    console.print(f"{report.method}: {counts}.", soft_wrap=True)
    console.print(f"Compared with the source: {report.preserving}.", soft_wrap=True)
