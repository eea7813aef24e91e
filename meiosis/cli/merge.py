"""`meiosis merge`."""

from __future__ import annotations

from pathlib import Path

import click

from meiosis.cli.common import debug_option, json_option, out, print_json


@click.command("merge", epilog="Example: meiosis merge examples/recipe.yaml merged")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is in OUT.")
@json_option
@debug_option
def command(recipe: Path, folder: Path, overwrite: bool, as_json: bool) -> None:
    """Carry out the merge of a RECIPE file and write the checkpoint to OUT.

    Relative model paths in the recipe start at the folder of the recipe.
    """
    from search.export import merge_recipe
    from search.recipe_file import read_recipe

    merge_recipe(read_recipe(recipe), folder, folder=recipe.resolve().parent, overwrite=overwrite)
    if as_json:
        print_json({"model": str(folder)})
    else:
        out().print(f"Merged model: {folder}", soft_wrap=True)
