"""Errors that end a command with one line for the person who reads it.

The message says what was found, what was expected, where, and what to do. `exit_status` is the
status of the command line: 2 for a mistake in what the user wrote, 1 for a failure.
"""

import difflib
from collections.abc import Iterable


class MeiosisError(Exception):
    """A failure that is explained to the user without a traceback."""

    exit_status = 1


class UserError(MeiosisError):
    """A mistake in what the user wrote or pointed at: config, recipe, checkpoint, data, arguments."""

    exit_status = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there is {', '.join(names)}" if names else "; there is none"
