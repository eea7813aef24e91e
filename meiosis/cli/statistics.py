"""`meiosis statistics`."""

from __future__ import annotations

from pathlib import Path

import click

from meiosis.cli.common import debug_option, json_option, note, out, print_json


@click.command(
    "statistics",
    epilog="Example: meiosis statistics samples/text/python --data samples/text/data/python/search.jsonl "
    "--kind fisher python.fisher.safetensors",
)
@click.argument("model")
@click.argument("file", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Texts of the model's own task.")
@click.option(
    "--kind",
    "kinds",
    required=True,
    multiple=True,
    type=click.Choice(["fisher", "gram"]),
    help="What to collect: fisher for the operator fisher, gram for regmean. May be given twice.",
)
@click.option("--items", type=click.IntRange(min=1), help="Read at most so many items (default: all).")
@click.option("--field", default="text", show_default=True, help="Key of the text in JSONL lines.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens that the model reads at once.")
@click.option("--device", default="auto", show_default=True, help="Where the model runs: auto, cpu, cuda, ...")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace a file of statistics that is at OUT.")
@json_option
@debug_option
def command(
    model: str,
    file: Path,
    data: Path,
    kinds: tuple[str, ...],
    items: int | None,
    field: str,
    max_tokens: int | None,
    device: str,
    dtype: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Collect from MODEL what operators such as fisher and regmean need, and write it to OUT.

    MODEL is a checkpoint folder or hub id. Recipes name OUT under models.NAME.statistics.
    """
    from search.statistics.collect import collect_statistics

    found = collect_statistics(
        model,
        data,
        file,
        kinds=tuple(dict.fromkeys(kinds)),  # type: ignore[arg-type]  # click.Choice
        items=items,
        field=field,
        max_tokens=max_tokens,
        device=device,
        dtype=dtype,  # type: ignore[arg-type]  # click.Choice
        overwrite=overwrite,
        report=note,
    )
    facts = {"file": str(found.path), "tensors": found.tensors, "items": found.items, "tokens": found.tokens}
    if as_json:
        print_json({**facts, "kinds": list(kinds), "sha256": found.sha256})
    else:
        out().print(
            f"{' and '.join(kinds)} statistics of {found.tensors} tensors from {found.items} items "
            f"({found.tokens} tokens): {found.path}",
            soft_wrap=True,
        )
