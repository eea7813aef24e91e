"""What workers say is plain data: it comes back as it was sent, and what is wrong with it is refused, not run."""

from __future__ import annotations

import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_bodies import OwnError, job

from cluster.handshake import Package, identity
from cluster.messages import Alive, Built, Greeting, Message, StartError, decode, encode
from evaluators.base import Scores
from search.errors import CheckpointError, ConfigError, MeiosisError, UserError
from search.outcome_check import checked
from search.pool import Failure, Outcome

KINDS: tuple[type[Message], ...] = (Greeting, Built, StartError, Alive, Outcome)
names = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters=":"), min_size=1, max_size=8)
floats = st.floats(width=64, allow_nan=False, allow_infinity=False)
GOOD = Outcome(
    3,
    "search",
    scores={"e": Scores(("a", "ü"), {"x": np.array([1.0, -0.0]), "y": np.array([5e-324, 1e308])}, np.ones(2))},
    metrics={"e.x": 0.1 + 0.2},
    weights_sha256="0" * 64,
    merge_seconds=0.25,
    evaluate_seconds=1.5,
    bytes_read=7,
)


def same(one: Outcome, other: Outcome) -> bool:
    """Whether they are the same bit for bit."""

    def flat(outcome: Outcome) -> object:
        scores = {
            name: (block.items, block.weights.tobytes(), {key: row.tobytes() for key, row in block.values.items()})
            for name, block in outcome.scores.items()
        }
        return list(scores.items()), [(k, v.hex()) for k, v in outcome.metrics.items()], outcome.failure, outcome.key

    return flat(one) == flat(other)


@st.composite
def blocks(draw: st.DrawFn) -> Scores:
    items = draw(st.lists(names, unique=True, max_size=4))
    row = st.lists(floats, min_size=len(items), max_size=len(items)).map(np.array)
    return Scores(tuple(items), draw(st.dictionaries(names, row, max_size=3)), np.ones(len(items)))


@given(scores=st.dictionaries(names, blocks(), max_size=3), metrics=st.dictionaries(names, floats, max_size=5))
@settings(max_examples=60, deadline=None)
def test_an_outcome_comes_back_bit_for_bit(scores: dict[str, Scores], metrics: dict[str, float]) -> None:
    sent = replace(GOOD, scores=scores, metrics=metrics)
    found = decode(encode(sent), Outcome)
    assert isinstance(found, Outcome)
    assert same(found, sent)
    assert same(checked(found, job(3)), sent)
    for block in found.scores.values():
        assert all(row.flags.writeable and row.flags.aligned for row in (block.weights, *block.values.values()))


def test_a_failure_and_numbers_that_are_not_finite_come_back_as_they_were() -> None:
    failed = Outcome(3, "search", failure=Failure("error", "böse", "Traceback\n  …"), merge_seconds=0.5)
    found = decode(encode(failed), Outcome)
    assert isinstance(found, Outcome)
    assert (found.failure, found.merge_seconds, found.metrics) == (failed.failure, 0.5, {})
    odd = decode(encode(replace(GOOD, metrics={"e.x": float("nan"), "e.y": float("-inf")})), Outcome)
    assert checked(odd, job(3)).failure == Failure("not_finite", "e.x is nan")
    stopped = decode(encode(replace(GOOD, censored=True)), Outcome)
    assert isinstance(stopped, Outcome)
    assert stopped.censored


def test_what_a_worker_runs_and_that_it_is_there_come_back() -> None:
    for message in (
        Greeting(identity(), "a" * 56, os.getpid(), 0.25),
        Built("node", {"e": Package("/some/where", "0" * 64)}),
        Built("node", {}, layout={"device_map": {"model.layers.0": "cuda:1"}, "bytes": {"cuda:0": 0, "cuda:1": 12}}),
        Alive(),
    ):
        assert decode(encode(message), type(message)) == message


class Explosive:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_a_pickle_is_refused_and_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for data in (pickle.dumps(Explosive()), pickle.dumps(GOOD), b"", b"MEI1"):
        with pytest.raises(ValueError, match="no message of this Meiosis; install the same version on every node"):
            decode(data, *KINDS)
    with pytest.raises(TypeError, match="sent Explosive, expected bytes"):
        decode(Explosive(), *KINDS)
    assert list(tmp_path.iterdir()) == []


def raw(fields: object, floats: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<4sI", b"MEI1", len(text)) + text + floats


def fields_of(message: Message) -> dict[str, Any]:
    data = encode(message)
    fields = json.loads(data[8 : 8 + struct.unpack_from("<I", data, 4)[0]])
    assert isinstance(fields, dict)
    return fields


GREETING = Greeting(identity(), "a" * 56, 17, 1.5)
FAULTS: dict[str, tuple[object, str]] = {
    "a list": ([1], "the message is list, expected dict"),
    "another message": (fields_of(Alive()), "sent 'Alive', expected Outcome or Greeting"),
    "no message": ({"is": ["Outcome"]}, "sent \\['Outcome'\\], expected"),
    "without parts": ({"is": "Outcome"}, "Outcome without 'scores'"),
    "scores as list": (fields_of(GOOD) | {"scores": []}, "scores is list"),
    "items as text": (fields_of(GOOD) | {"scores": {"e": {"items": "ab", "values": []}}}, "items is str"),
    "no floats": (fields_of(GOOD), "scores of 'e' are cut off"),
    "a billion items": (fields_of(GOOD) | {"scores": {"e": {"items": [1] * 9, "values": ["x"] * 9}}}, "cut off"),
    "failure as text": (fields_of(GOOD) | {"scores": {}, "failure": "error"}, "failure is str"),
    "pid": (fields_of(GREETING) | {"pid": True}, "pid is True"),
    "identity": (fields_of(GREETING) | {"identity": None}, "identity is NoneType"),
    "node": (fields_of(GREETING) | {"node_id": "\x1b[2J"}, "node_id is '.x1b.2J', expected at most 500 printable"),
    "long node": (fields_of(GREETING) | {"node_id": "a" * 501}, "expected at most 500 printable"),
    "surrogate": (fields_of(GREETING) | {"node_id": "\ud800"}, "printable"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_message_is_refused_in_words(fault: str) -> None:
    fields, said = FAULTS[fault]
    with pytest.raises((TypeError, ValueError), match=said):
        decode(raw(fields), Outcome, Greeting)


def test_bytes_too_many_and_depth_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match="8 bytes more than its message has"):
        decode(encode(GOOD) + bytes(8), Outcome)
    with pytest.raises(ValueError, match="1 bytes more"):
        decode(encode(Alive()) + b"x", Alive)
    deep = b'{"a":' * 100_000
    with pytest.raises(ValueError, match="nested too deep"):
        decode(struct.pack("<4sI", b"MEI1", len(deep)) + deep, Alive)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_refused_or_pass_the_check_of_outcomes(data: st.DataObject) -> None:
    """Nothing but the two kinds of errors that the driver expects, whatever is changed."""
    message = bytearray(encode(data.draw(st.sampled_from([GOOD, GREETING, Alive()]))))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(message)) | st.just(len(message)))
    try:
        found = decode(bytes(message[:cut]), *KINDS)
        if isinstance(found, Outcome):
            checked(found, job(3))
    except (TypeError, ValueError):
        pass


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(field=st.sampled_from(sorted(fields_of(GOOD))), value=anything)
@settings(max_examples=200, deadline=None)
def test_a_field_of_any_other_type_is_refused_or_passes_the_check_of_outcomes(field: str, value: object) -> None:
    plain = replace(GOOD, scores={})
    try:
        found = checked(decode(raw(fields_of(plain) | {field: value}), Outcome), job(3))
    except (TypeError, ValueError):
        return
    assert type(found.candidate) is int
    assert found.key == (3, "search")
    assert all(type(metric) is float for metric in found.metrics.values())


class PickyError(CheckpointError):
    """Has a constructor of its own."""

    def __init__(self, file: str, line: int) -> None:
        super().__init__(f"{file}:{line}")


def told(error: MeiosisError) -> MeiosisError:
    message = decode(encode(StartError("m", "d", error)), StartError)
    assert isinstance(message, StartError)
    assert message.explained is not None
    return message.explained


def test_an_error_for_the_user_is_of_its_own_class_again() -> None:
    error = ConfigError("a.yaml:3: first\na.yaml:4: second")
    error.add_note("a note")
    again = told(error)
    assert (type(again), str(again), again.exit_status, again.__notes__) == (ConfigError, str(error), 2, ["a note"])
    own = told(OwnError("mine"))
    assert (type(own), str(own), own.exit_status) == (OwnError, "mine", 7)


def test_an_error_whose_class_cannot_be_made_of_a_text_is_of_the_nearest_that_can() -> None:
    again = told(PickyError("a.json", 3))
    assert (type(again), str(again), again.exit_status) == (CheckpointError, "a.json:3", 2)


def test_an_error_of_an_unknown_class_imports_nothing_and_keeps_its_exit_status(tmp_path: Path) -> None:
    explained = {"classes": ["antigravity:Up", "os:system", "builtins:exec", 3], "text": "x", "notes": []}
    fields = {"is": "StartError", "message": "m", "detail": "d"}
    found = decode(raw(fields | {"explained": explained | {"exit_status": 2}}), StartError)
    assert isinstance(found, StartError)
    assert (type(found.explained), str(found.explained)) == (MeiosisError, "x")
    assert found.explained is not None
    assert found.explained.exit_status == 2
    assert UserError("x").exit_status == 2
    with pytest.raises(ValueError, match="exit_status is 0"):
        decode(raw(fields | {"explained": explained | {"exit_status": 0}}), StartError)
