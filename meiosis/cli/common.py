"""What the commands share: options, output, and the pool that a config asks for."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from rich.console import Console

    from search.store.run_folder import RunFolder

F = TypeVar("F", bound=Callable[..., Any])

_PLAIN_WIDTH = 160
"""Columns of tables where there is no terminal whose width would count."""


def debug_option(function: F) -> F:
    """`--debug`: `main` looks for it in the arguments, the command itself does not need it."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(function)


def json_option(function: F) -> F:
    """`--json`: one JSON document on stdout instead of text for people."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def run_command(function: F) -> F:
    """A command that makes a run or goes on with one: the log of the run tells what came before it as well."""

    @functools.wraps(function)
    def logged(*args: Any, **options: Any) -> Any:
        from search.run_log import before_the_log, emit, process_started_at

        with before_the_log():
            emit("command", process_started_at=process_started_at())
            return function(*args, **options)

    return cast(F, logged)


def out() -> Console:
    """Console for results, on stdout as it was when the command started."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False, markup=False)


def print_json(data: object) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(data, indent=2, default=str))


def note(line: str) -> None:
    """A line for the person who waits, on stderr."""
    click.echo(line, err=True)


def say(line: str) -> None:
    """`note`, for the log of the run as well."""
    from search.run_log import emit

    emit("message", text=line)
    note(line)


def check_new_file(path: Path | None) -> None:
    """Raise `UserError` if a file cannot be made there, before any work for it is done; None is standard output."""
    from evaluators.errors import UserError

    if path is None:
        return
    if path.exists():
        raise UserError(f"{path}: exists, and nothing is overwritten; choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")


def write_text(path: Path | None, text: str) -> None:
    """Write a file that `check_new_file` found free, or to standard output."""
    from evaluators.errors import UserError
    from search.store.atomic import write_atomic

    if path is None:
        click.echo(text, nl=False)
        return
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; choose another place") from error


def results_option(function: F) -> F:
    """`--results`: where runs are looked for."""
    return click.option(
        "--results",
        default="results",
        show_default=True,
        type=click.Path(path_type=Path),
        callback=_folder,
        help="Folder of the runs. One at a URL is named by it in full: URL/RUN.",
    )(function)


def _folder(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    from search.errors import UserError

    if re.match(r"[a-z][a-z0-9+.-]+:/", str(value)):
        raise UserError("--results is a folder; a run at a URL is named by it in full, as in: meiosis status URL/RUN")
    return value


def find_run(results: Path, run: str) -> RunFolder:
    """The run of that name, at that path, or at that URL, from which it is brought here."""
    from search.store.run_folder import RunFolder
    from search.store.urls import is_url

    if is_url(run):
        from search.store.remote_run import fetch

        return fetch(run)
    return RunFolder.find(results, run)
