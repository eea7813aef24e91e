"""`meiosis export`."""

from __future__ import annotations

from pathlib import Path

import click

from meiosis.cli.budget import places_option
from meiosis.cli.common import debug_option, find_run, json_option, note, out, print_json, results_option
from meiosis.cli.hub import push_options


@click.command("export", epilog="Example: meiosis export first merged --trial 17")
@click.argument("run")
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--trial", type=int, help="Candidate to export; by default the winner, or the best so far.")
@click.option(
    "--pick",
    metavar="WANTED",
    help="Choose from the front instead: bounds and one goal, such as 'accuracy >= 0.9, min asr', or knee.",
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is in OUT.")
@push_options
@places_option
@results_option
@json_option
@debug_option
def command(
    run: str,
    folder: Path,
    trial: int | None,
    pick: str | None,
    overwrite: bool,
    push: str | None,
    private: bool,
    places: tuple[Path, ...],
    results: Path,
    as_json: bool,
) -> None:
    """Write the best (or any) trial of RUN as a Hugging Face checkpoint to OUT.

    --pick chooses among the trials that nothing else beats in every term of the objective and every metric it names, on
    the select items where there are results of them and on the search items before that.
    """
    from evaluators.errors import UserError
    from search.gguf import gguf_ready
    from search.pareto.pick import parse_pick
    from search.progress import Watcher
    from search.push import check_repository, push_folder
    from search.run import export_trial

    if pick is not None:
        if trial is not None:
            raise UserError("--trial and --pick both say which trial; leave one of them out")
        parse_pick(pick)
    repository = check_repository(push, private)
    found = find_run(results, run)
    chosen = export_trial(found, folder, trial, Watcher(note), overwrite=overwrite, places=places, pick=pick)
    missing = gguf_ready(folder)
    address = push_folder(folder, repository) if repository is not None else None
    if as_json:
        pushed = {"pushed": address} if address else {}
        told = {"model": str(folder), "trial": chosen.id, "origin": chosen.origin, "gguf_missing": missing}
        print_json({**told, **pushed})
        return
    for line in missing:
        note(f"not ready for GGUF: {line}")
    out().print(f"Exported trial {chosen.id} ({chosen.origin}): {folder}", soft_wrap=True)
    if address is not None:
        out().print(f"Pushed to: {address}", soft_wrap=True)
