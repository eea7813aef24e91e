"""Errors of a search, by what went wrong. See `evaluators.errors` for the two bases."""

from evaluators.errors import MeiosisError, UserError, nearest

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DeviceLostError",
    "HistoryError",
    "InterruptedRun",
    "MeiosisError",
    "RecipeError",
    "RunError",
    "UserError",
    "WorkerError",
    "nearest",
]


class ConfigError(UserError):
    """Faults in a config file, one line each, all of them at once."""


class RecipeError(UserError):
    """A recipe that cannot be carried out on its models."""


class CheckpointError(UserError):
    """A model folder that is damaged, or does not fit the other models."""


class RunError(MeiosisError):
    """A run folder that cannot be used as asked: locked, missing, of other code or sources."""


class HistoryError(MeiosisError):
    """A history that is damaged beyond a torn tail, or does not replay."""


class WorkerError(MeiosisError):
    """Workers that cannot be started or kept alive."""


class InterruptedRun(MeiosisError):  # noqa: N818 - an interruption is a normal ending, not an error
    """The user stopped the search; the message says what was saved and how to go on."""

    exit_status = 130


class DeviceLostError(BaseException):
    """The accelerator fails whatever this process asks of it: after an assertion in a kernel, say.

    Not an `Exception`, which pools take for what a candidate did: this must end the process. The pool on Ray
    replaces a worker whose call raises it; in the process of the driver it ends the run, which can go on.
    """
