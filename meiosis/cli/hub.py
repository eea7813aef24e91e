"""Options of the commands that can push a model to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def push_options(function: F) -> F:
    """`--push` and `--private`."""
    function = click.option("--private", is_flag=True, help="With --push: only you can see a new repository.")(function)
    return click.option("--push", metavar="ORG/NAME", help="Then upload OUT to this repository of the hub.")(function)
