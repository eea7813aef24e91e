"""`meiosis samples`."""

from __future__ import annotations

from pathlib import Path

import click

import meiosis.samples
from meiosis.cli.common import debug_option, json_option, note, out, print_json


@click.group("samples", no_args_is_help=False, epilog="Example: meiosis samples text samples/text")
def command() -> None:
    """Train small sample models to try Meiosis on."""


@command.command("text", epilog="Example: meiosis samples text samples/text")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of split and training.")
@json_option
@debug_option
def text(folder: Path, seed: int, as_json: bool) -> None:
    """Train a base language model and three specialists of it into DIR; a few minutes on two cores.

    The text is what every machine with Meiosis has: Python's standard library, the language reference
    and torch's C++ headers. A family that is already there is kept.
    """
    from meiosis.samples.text import make_text_family

    config = folder / "search.yaml"
    # What the user made of the config survives when the models are trained anew.
    source = config if config.exists() else Path(meiosis.samples.__file__).with_name("text.yaml")
    text_of_config = source.read_text()
    make_text_family(folder, seed=seed, report=note)
    config.write_text(text_of_config)
    if as_json:
        print_json({"models": str(folder), "config": str(config)})
        return
    console = out()
    console.print(f"Sample models: {folder}", soft_wrap=True)
    console.print(f"Search them with: meiosis search {config}", soft_wrap=True)
