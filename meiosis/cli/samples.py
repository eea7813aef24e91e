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
    and torch's C++ headers. A family that is already there is kept, and so is its search.yaml where you edited it.
    """
    from meiosis.samples.config_file import make_with_config
    from meiosis.samples.text import make_text_family

    def make() -> str:
        make_text_family(folder, seed=seed, report=note)
        return Path(meiosis.samples.__file__).with_name("text.yaml").read_text(encoding="utf-8")

    _show(folder, make_with_config(folder, make, note), as_json)


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
    is already there is kept, and so is its search.yaml where you edited it.
    """
    from meiosis.samples.config_file import make_with_config
    from meiosis.samples.vision import make_vision_family
    from meiosis.samples.vision_card import search_config

    def make() -> str:
        return search_config(tuple(make_vision_family(folder, data=data, seed=seed, report=note).tasks))

    _show(folder, make_with_config(folder, make, note), as_json)


def _show(folder: Path, config: Path, as_json: bool) -> None:
    if as_json:
        print_json({"models": str(folder), "config": str(config)})
        return
    console = out()
    console.print(f"Sample models: {folder}", soft_wrap=True)
    console.print(f"Search them with: meiosis search {config}", soft_wrap=True)
