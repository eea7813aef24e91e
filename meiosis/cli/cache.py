"""`meiosis cache`."""

from __future__ import annotations

import click

from meiosis.cli.common import debug_option, json_option, out, print_json


@click.command("cache", epilog="Example: meiosis cache --clear")
@click.option("--clear", is_flag=True, help="Remove the copies that no worker uses now.")
@json_option
@debug_option
def command(clear: bool, as_json: bool) -> None:
    """Show or remove the copies of models that this machine keeps for searches on clusters without a shared disk.

    They lie in the folder `shards` of MEIOSIS_CACHE, or of the user's cache folder. Other nodes keep their own.
    """
    from dataclasses import asdict

    from cluster.copies import Copies, age
    from search.memory_sizes import gib

    copies = Copies()
    removed = []
    if clear and copies.folder.is_dir():
        with copies.alone(wait=False):
            removed = copies.clear()
    kept = copies.listing()
    if as_json:
        shown = {"kept": [asdict(copy) for copy in kept], "removed": [asdict(copy) for copy in removed]}
        print_json({"folder": str(copies.folder), **shown})
        return
    console = out()
    for copy in kept:
        used = "in use" if copy.in_use else f"used {age(copy)}"
        console.print(f"{copy.key[:16]}  {gib(copy.nbytes):>10}  {used:<16}  {copy.what}", soft_wrap=True)
    if removed:
        console.print(f"Removed: {len(removed)} copies, {gib(sum(copy.nbytes for copy in removed))}.")
    total = gib(sum(copy.nbytes for copy in kept))
    console.print(f"{copies.folder}: {len(kept)} copies, {total}.", soft_wrap=True)
