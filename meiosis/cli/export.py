"""`meiosis export`."""

from __future__ import annotations

from pathlib import Path

import click

from meiosis.cli.common import debug_option, json_option, note, out, print_json, results_option


@click.command("export", epilog="Example: meiosis export first merged --trial 17")
@click.argument("run")
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--trial", type=int, help="Candidate to export; by default the winner, or the best so far.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is in OUT.")
@results_option
@json_option
@debug_option
def command(run: str, folder: Path, trial: int | None, overwrite: bool, results: Path, as_json: bool) -> None:
    """Write the best (or any) trial of RUN as a Hugging Face checkpoint to OUT."""
    from search.run import Watcher, export_trial
    from search.store.run_folder import RunFolder

    chosen = export_trial(RunFolder.find(results, run), folder, trial, Watcher(note), overwrite=overwrite)
    if as_json:
        print_json({"model": str(folder), "trial": chosen.id, "origin": chosen.origin})
    else:
        out().print(f"Exported trial {chosen.id} ({chosen.origin}): {folder}", soft_wrap=True)
