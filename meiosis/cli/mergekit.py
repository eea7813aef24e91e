"""`meiosis mergekit`."""

from __future__ import annotations

from pathlib import Path

import click

from meiosis.cli.common import debug_option, note


@click.command("mergekit", epilog="Example: meiosis mergekit merged/recipe.yaml -o merge.yml")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write instead of standard output.")
@debug_option
def command(file: Path, output: Path | None) -> None:
    """Convert between our files and those of mergekit.

    FILE is a recipe (or a model folder that has one), which becomes a merge file; a merge file of mergekit,
    which becomes a recipe; or a search file of mergekit-evolve, which becomes a search config. What cannot be
    expressed is told line by line.
    """
    from search.errors import ConfigError, UserError
    from search.mergekit.evolve import is_evolve_file, read_evolve_file
    from search.mergekit.merge_file import is_merge_file
    from search.recipe_file import read_recipe
    from search.yaml_source import YamlSource

    if file.is_dir():
        if not (file / "recipe.yaml").is_file():
            raise ConfigError(f"{file}: has no recipe.yaml; expected a recipe, or the folder of a model we merged")
        file = file / "recipe.yaml"
    if output is not None and output.exists():
        raise UserError(f"{output}: exists, and nothing is overwritten; choose another name")
    source = YamlSource.read(file)
    folder = file.resolve().parent
    incomplete = False
    if is_evolve_file(source.data):
        converted = read_evolve_file(source, folder)
        text, incomplete = converted.text, True
        for line in converted.notes:
            note(line)
    elif is_merge_file(source.data):
        text = read_recipe(file, note).to_yaml()
    else:
        from search.mergekit.writer import write_merge_file

        text = write_merge_file(read_recipe(file), folder, note)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
    if incomplete:
        note("The config lacks evaluators and objectives: fill them in where it says so, then `meiosis plan` it.")
