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
    _show(folder, config, as_json)


@command.command("vision", epilog="Example: meiosis samples vision samples/vision --data DATA")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of data and training.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder with mnist/ and cifar10_jpeg/ (train.npz and test.npz each); by default scikit-learn's digits.",
)
@json_option
@debug_option
def vision(folder: Path, seed: int, data: Path | None, as_json: bool) -> None:
    """Train an image backbone and a fine-tune for each of eight tasks into DIR; a few minutes.

    Every task has a head that is fitted to the base and frozen, so that the backbones can be merged. A family that
    is already there is kept.
    """
    from meiosis.samples.vision import make_vision_family
    from meiosis.samples.vision_card import search_config

    config = folder / "search.yaml"
    # What the user made of the config survives when the models are trained anew.
    kept = config.read_text() if config.exists() else None
    card = make_vision_family(folder, data=data, seed=seed, report=note)
    config.write_text(kept or search_config(tuple(card.tasks)))
    _show(folder, config, as_json)


def _show(folder: Path, config: Path, as_json: bool) -> None:
    if as_json:
        print_json({"models": str(folder), "config": str(config)})
        return
    console = out()
    console.print(f"Sample models: {folder}", soft_wrap=True)
    console.print(f"Search them with: meiosis search {config}", soft_wrap=True)
