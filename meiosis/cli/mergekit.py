"""`meiosis mergekit`."""

from __future__ import annotations

from pathlib import Path

import click

from meiosis.cli.common import check_new_file, debug_option, note, write_text


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
    from search.errors import ConfigError
    from search.mergekit.evolve import is_evolve_file, read_evolve_file
    from search.mergekit.merge_file import is_merge_file
    from search.recipe_file import read_recipe
    from search.yaml_source import YamlSource

    if file.is_dir():
        if not (file / "recipe.yaml").is_file():
            raise ConfigError(f"{file}: has no recipe.yaml; expected a recipe, or the folder of a model we merged")
        file = file / "recipe.yaml"
    check_new_file(output)
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
    write_text(output, text)
    if incomplete:
        note("The config lacks evaluators and objectives: fill them in where it says so, then `meiosis plan` it.")
