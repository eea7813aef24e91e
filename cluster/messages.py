"""What workers say to the driver, as plain data: JSON, and rows of floats behind it.

A worker runs evaluators of other people, so nothing that comes from one is unpickled: it can be wrong, but
it cannot bring code along, and what is wrong with it is a `ValueError` or a `TypeError`. What the numbers of
an outcome are worth is for `search.outcome_check` to say.

A message is `MEI1`, the length of the JSON (4 bytes, least first), the JSON, and the floats of an outcome (8 bytes
each, least first): for every evaluator in the order of the JSON the weights of its items, then its values.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from cluster.handshake import Identity, Package
from evaluators.base import Scores
from search.errors import MeiosisError
from search.local_pool import Preparation
from search.outcome_check import check_size, printable
from search.pool import Failure, Outcome

_HEAD = struct.Struct("<4sI")
_MAGIC = b"MEI1"
NAME_CHARACTERS = 500
"""Longest name of a machine, a package, a library or an evaluator."""
TEXT_CHARACTERS = 100_000

T = TypeVar("T")


@dataclass(frozen=True)
class Greeting:
    """The first word of a worker: what it runs, on which node of Ray, in which process, after how many seconds."""

    identity: Identity
    node_id: str
    pid: int
    seconds: float


@dataclass(frozen=True)
class Built:
    """A worker can take jobs: on which node, and with which evaluators, see `handshake.evaluator_sources`.

    Attributes:
        layout: what of its model is on which of several GPUs, see `search.device_map.Layout.as_data`; None on one.
    """

    node: str
    evaluators: Mapping[str, Package]
    took: Preparation = field(default_factory=Preparation)
    layout: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class StartError:
    """Why a body could not be constructed; `explained` is the error if it is one for the user."""

    message: str
    detail: str
    explained: MeiosisError | None


@dataclass(frozen=True)
class Alive:
    """A worker is there."""


Message = Greeting | Built | StartError | Alive | Outcome


def encode(message: Message) -> bytes:
    """The bytes of a message.

    Raises:
        TypeError, ValueError: it holds something that is no plain data, or an outcome is too large.
    """
    floats: list[bytes] = []
    match message:
        case Greeting():
            ours = message.identity
            fields: dict[str, Any] = {
                "identity": {**vars(ours), "packages": _plain(ours.packages), "libraries": dict(ours.libraries)},
                "node_id": message.node_id,
                "pid": message.pid,
                "seconds": message.seconds,
            }
        case Built():
            fields = {
                "node": message.node,
                "evaluators": _plain(message.evaluators),
                "took": vars(message.took),
                "layout": message.layout,
            }
        case StartError():
            fields = {**vars(message), "explained": _described(message.explained)}
        case Alive():
            fields = {}
        case Outcome():
            for scores in message.scores.values():
                floats += [
                    np.ascontiguousarray(row, "<f8").tobytes() for row in (scores.weights, *scores.values.values())
                ]
            fields = {
                "candidate": message.candidate,
                "items": message.items,
                "scores": {
                    name: {"items": scores.items, "values": list(scores.values)}
                    for name, scores in message.scores.items()
                },
                "metrics": dict(message.metrics),
                "failure": None if message.failure is None else vars(message.failure),
                "weights_sha256": message.weights_sha256,
                "merge_seconds": message.merge_seconds,
                "evaluate_seconds": message.evaluate_seconds,
                "bytes_read": message.bytes_read,
                "layers_run": message.layers_run,
                "layers_reused": message.layers_reused,
                "worker": message.worker,
                "censored": message.censored,
            }
    text = json.dumps({"is": type(message).__name__, **fields}).encode()
    data = b"".join((_HEAD.pack(_MAGIC, len(text)), text, *floats))
    check_size(data)
    return data


def decode(data: object, *expected: type[Message]) -> Message:
    """The message in `data`, which must be one of those expected now. Nothing is imported or called by its name.

    Raises:
        TypeError, ValueError: it is no message, another one, or its parts have other types than they should.
    """
    if type(data) is not bytes:
        raise TypeError(f"the worker sent {type(data).__name__}, expected bytes")
    check_size(data)
    if len(data) < _HEAD.size or data[:4] != _MAGIC:
        raise ValueError("the worker sent no message of this Meiosis; install the same version on every node")
    end = _HEAD.size + _HEAD.unpack_from(data)[1]
    if end > len(data):
        raise ValueError("the worker sent half a message")
    try:
        fields = _of(dict, "the message", json.loads(data[_HEAD.size : end]))
    except RecursionError as error:
        raise ValueError("the worker sent a message that is nested too deep") from error
    what = fields.pop("is", None)
    if what not in [kind.__name__ for kind in expected]:
        raise ValueError(
            f"the worker sent {printable(repr(what))[:NAME_CHARACTERS]}, "
            f"expected {' or '.join(kind.__name__ for kind in expected)}"
        )
    if what != Outcome.__name__ and end != len(data):
        raise ValueError(f"the worker sent {len(data) - end} bytes more than its message has")
    try:
        return _READERS[what](fields, data, end)
    except KeyError as error:
        raise ValueError(f"the worker sent {what} without {error}") from error


def _greeting(fields: dict[str, Any], data: bytes, end: int) -> Greeting:
    found = _of(dict, "identity", fields["identity"])
    libraries = _of(dict, "libraries", found["libraries"])
    identity = Identity(
        node=_name("node", found["node"]),
        version=_name("version", found["version"]),
        packages=_packages("packages", found["packages"]),
        libraries={_name("library", name): _name(name, version) for name, version in libraries.items()},
    )
    pid = fields["pid"]
    if type(pid) is not int or not 0 < pid < 2**31:
        raise ValueError(f"pid is {pid!r:.50}, expected the number of a process")
    return Greeting(identity, _name("node_id", fields["node_id"]), pid, _seconds("seconds", fields["seconds"]))


def _built(fields: dict[str, Any], data: bytes, end: int) -> Built:
    layout, took = fields["layout"], _of(dict, "took", fields["took"])
    return Built(
        _name("node", fields["node"]),
        _packages("evaluators", fields["evaluators"]),
        Preparation(**{part.name: _seconds(part.name, took[part.name]) for part in dataclasses.fields(Preparation)}),
        None if layout is None else _layout(_of(dict, "layout", layout)),
    )


def _layout(fields: dict[str, Any]) -> dict[str, Any]:
    """A layout, for the log alone."""
    places, nbytes = _of(dict, "device_map", fields["device_map"]), _of(dict, "bytes", fields["bytes"])
    return {
        "device_map": {_name("module", module): _name("device", device) for module, device in places.items()},
        "bytes": {_name("device", device): _of(int, "bytes", number) for device, number in nbytes.items()},
    }


def _start_error(fields: dict[str, Any], data: bytes, end: int) -> StartError:
    explained = fields["explained"]
    return StartError(
        _text("message", fields["message"]),
        _text("detail", fields["detail"]),
        None if explained is None else _rebuilt(_of(dict, "explained", explained)),
    )


def _outcome(fields: dict[str, Any], data: bytes, end: int) -> Outcome:
    """Types of numbers and texts are left to `outcome_check`, which looks at outcomes of this process too."""
    scores, at = {}, end
    for name, block in _of(dict, "scores", fields["scores"]).items():
        items = tuple(_of(list, "items", block["items"] if isinstance(block, dict) else None))
        columns = [_of(str, "values", column) for column in _of(list, "values", block["values"])]
        if at + 8 * len(items) * (1 + len(columns)) > len(data):
            raise ValueError(f"the scores of {name!r:.50} are cut off")
        rows = []
        for _ in range(1 + len(columns)):
            rows.append(np.frombuffer(data, "<f8", len(items), at).astype(np.float64))  # a copy, aligned
            at += 8 * len(items)
        scores[name] = Scores(items, dict(zip(columns, rows[1:], strict=True)), rows[0])
    if at != len(data):
        raise ValueError(f"the worker sent {len(data) - at} bytes more than its message has")
    failure = fields["failure"]
    if failure is not None:
        failure = Failure(**{name: _of(dict, "failure", failure)[name] for name in ("kind", "message", "detail")})
    censored = _of(bool, "censored", fields["censored"])
    return Outcome(scores=scores, failure=failure, censored=censored, **{name: fields[name] for name in _PLAIN})


_PLAIN = (
    "candidate",
    "items",
    "metrics",
    "weights_sha256",
    "merge_seconds",
    "evaluate_seconds",
    "bytes_read",
    "layers_run",
    "layers_reused",
)
_READERS: dict[str, Callable[[dict[str, Any], bytes, int], Message]] = {
    Greeting.__name__: _greeting,
    Built.__name__: _built,
    StartError.__name__: _start_error,
    Alive.__name__: lambda fields, data, end: Alive(),
    Outcome.__name__: _outcome,
}


def _described(error: MeiosisError | None) -> dict[str, Any] | None:
    """An error by the names of its classes, nearest first."""
    if error is None:
        return None
    return {
        "classes": [_class_name(cls) for cls in type(error).__mro__ if issubclass(cls, MeiosisError)],
        "text": str(error),
        "notes": [str(note) for note in getattr(error, "__notes__", ())],
        "exit_status": error.exit_status,
    }


def _rebuilt(fields: dict[str, Any]) -> MeiosisError:
    """The error, of the nearest of its classes that this process knows and that is made of a text alone."""
    text = _text("text", fields["text"])
    known = {_class_name(cls): cls for cls in _subclasses(MeiosisError)}
    made = None
    for name in _of(list, "classes", fields["classes"]):
        made = _made(known[name], text) if isinstance(name, str) and name in known else None
        if made is not None:
            break
    error = made or MeiosisError(text)
    status = fields["exit_status"]
    if type(status) is not int or not 0 < status < 256:
        raise ValueError(f"exit_status is {status!r:.50}, expected 1 to 255")
    if error.exit_status != status:
        error.exit_status = status
    for note in _of(list, "notes", fields["notes"]):
        error.add_note(_text("notes", note))
    return error


def _made(cls: type[MeiosisError], text: str) -> MeiosisError | None:
    try:
        error = cls(text)
    except Exception:  # noqa: BLE001 - it has a constructor of its own
        return None
    return error if str(error) == text else None


def _subclasses(cls: type[MeiosisError]) -> list[type[MeiosisError]]:
    return [cls, *(below for child in cls.__subclasses__() for below in _subclasses(child))]


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _plain(packages: Mapping[str, Package]) -> dict[str, dict[str, str]]:
    return {name: vars(package) for name, package in packages.items()}


def _packages(what: str, value: object) -> dict[str, Package]:
    found = {}
    for name, package in _of(dict, what, value).items():
        fields = _of(dict, what, package)
        found[_name(what, name)] = Package(_text("folder", fields["folder"]), _name("sha256", fields["sha256"]))
    return found


def _of(kind: type[T], what: str, value: object) -> T:
    if type(value) is not kind:
        raise TypeError(f"{what} is {type(value).__name__}, expected {kind.__name__}")
    return value


def _seconds(what: str, value: object) -> float:
    seconds = _of(float, what, value)
    if not 0 <= seconds < 1e9:
        raise ValueError(f"{what} is {seconds:g}, expected a time")
    return seconds


def _name(what: str, value: object) -> str:
    """A text that may stand in a line as it is."""
    name = _of(str, what, value)
    if len(name) > NAME_CHARACTERS or not name.isprintable():
        raise ValueError(f"{what} is {name[:50]!r}, expected at most {NAME_CHARACTERS} printable characters")
    return name


def _text(what: str, value: object) -> str:
    """A text for people, shortened, that a terminal shows and does not obey."""
    return printable(_of(str, what, value)[:TEXT_CHARACTERS])
