"""Each way in which a checkpoint can be damaged ends in a line of its own that names the file."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import meiosis, write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from search.checkpoints.fingerprint import fingerprint, refuse_non_finite
from search.checkpoints.reading import CheckpointTensors, open_checkpoint
from search.errors import CheckpointError, UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEIOSIS_CACHE", str(tmp_path / "cache"))


def tensors() -> dict[str, np.ndarray]:
    return {
        "embed.weight": np.arange(32, dtype=np.float32).reshape(8, 4),
        "norm.weight": np.ones(4, np.float16),
        "steps": np.arange(3, dtype=np.int64),
    }


def write_single(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), folder / WEIGHTS)


def write_sharded(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    values = tensors()
    save_file({"embed.weight": values["embed.weight"]}, folder / FIRST)
    save_file({"norm.weight": values["norm.weight"], "steps": values["steps"]}, folder / SECOND)
    write_index(folder, {"embed.weight": FIRST, "norm.weight": SECOND, "steps": SECOND})


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def parts(file: Path) -> tuple[dict, bytes]:
    """Header and data of a sound file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put(file: Path, header: bytes | dict, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A damage done to the header of the single file."""

    def damage(folder: Path) -> None:
        header, data = parts(folder / WEIGHTS)
        change(header)
        put(folder / WEIGHTS, header, data)

    return damage


def entry(**changes: object) -> Callable[[Path], None]:
    """A damage done to what the header says of the embedding."""
    return edit(lambda header: header["embed.weight"].update(changes))


def content(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def values(**changes: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: save_file(tensors() | {"embed.weight": changes["embed"]}, folder / WEIGHTS)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        change(weight_map)
        write_index(folder, weight_map)

    return damage


def overlapping(folder: Path) -> None:
    header, data = parts(folder / WEIGHTS)
    header["norm.weight"]["data_offsets"] = [n - 4 for n in header["norm.weight"]["data_offsets"]]
    put(folder / WEIGHTS, header, data)


def hole(folder: Path) -> None:
    header, data = parts(folder / WEIGHTS)
    last = max(header, key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [n + 8 for n in header[last]["data_offsets"]]
    put(folder / WEIGHTS, header, data + bytes(8))


def twice_in_header(folder: Path) -> None:
    header, data = parts(folder / WEIGHTS)
    text = json.dumps(header)
    put(folder / WEIGHTS, (text[:-1] + ', "steps": ' + json.dumps(header["steps"]) + "}").encode(), data)


def twice_in_shards(folder: Path) -> None:
    save_file({name: tensors()[name] for name in ("embed.weight", "steps")}, folder / FIRST)


def shard_not_in_index(folder: Path) -> None:
    save_file({"embed.weight": tensors()["embed.weight"], "more": np.ones(1)}, folder / FIRST)


def index_twice(folder: Path) -> None:
    (folder / INDEX).write_text(f'{{"weight_map": {{"steps": "{FIRST}", "steps": "{SECOND}"}}}}')


def only_bin(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def only_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")


def a_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def infinite(kind: float) -> np.ndarray:
    return np.where(np.arange(32) == 17, np.float32(kind), np.float32(1)).reshape(8, 4)


SINGLE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "empty file": (content(lambda b: b""), WEIGHTS, "is empty (0 bytes)"),
    "shorter than a length": (content(lambda b: b[:5]), WEIGHTS, "has 5 bytes, the length of the header"),
    "truncated header": (content(lambda b: b[:60]), WEIGHTS, "truncated in the header"),
    "truncated data": (content(lambda b: b[:-7]), WEIGHTS, "truncated in the data"),
    "trailing bytes": (content(lambda b: b + b"xyz"), WEIGHTS, "3 bytes follow the last tensor"),
    "absurd header length": (
        content(lambda b: b"\xff" * 7 + b"\x7f" + b[8:]),
        WEIGHTS,
        "absurd header length of 9223372036854775807 bytes",
    ),
    "header not JSON": (
        content(lambda b: b[:20] + b"\0" + b[21:]),
        WEIGHTS,
        "header is not JSON (Invalid control character at character",
    ),
    "header nested too deeply": (
        lambda f: put(f / WEIGHTS, b'{"a":' + b"[" * 100_000, b""),
        WEIGHTS,
        "nested too deeply",
    ),
    "tensor twice in the header": (twice_in_header, WEIGHTS, "the header has 'steps' twice"),
    "metadata no text": (
        edit(lambda h: h.update(__metadata__={"a": 1})),
        WEIGHTS,
        "__metadata__ in the header",
    ),
    "incomplete entry": (
        edit(lambda h: h["steps"].pop("shape")),
        WEIGHTS,
        "expected dtype, shape and data_off",
    ),
    "wrong dtype": (entry(dtype="F31"), WEIGHTS, "unknown dtype 'F31'; did you mean 'F32'?"),
    "packed dtype": (entry(dtype="F4"), WEIGHTS, "dtype F4, which cannot be merged"),
    "shape does not fit dtype": (
        entry(shape=[8, 5]),
        WEIGHTS,
        "takes 128 bytes, but F32 of shape [8, 5] needs 160",
    ),
    "negative shape": (entry(shape=[-8, -4]), WEIGHTS, "expected a list of whole numbers"),
    "impossible shape": (entry(shape=[1 << 62, 1 << 62, 0]), WEIGHTS, "which no memory can hold"),
    "backward offsets": (entry(data_offsets=[8, 0]), WEIGHTS, "expected 0 <= start <= stop"),
    "odd offsets": (entry(data_offsets=[0, 1.5]), WEIGHTS, "expected [start, stop]"),
    "overlapping": (overlapping, WEIGHTS, "overlaps tensor"),
    "hole": (hole, WEIGHTS, "belong to no tensor"),
    "no tensors": (lambda f: put(f / WEIGHTS, {}, b""), "model", "hold no tensor at all"),
    "LFS pointer": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1"),
        WEIGHTS,
        "is a Git LFS pointer",
    ),
    "pickle renamed": (
        content(lambda b: b"PK\x03\x04" + b),
        WEIGHTS,
        "pickle under the name of a safetensors",
    ),
    "pipe": (a_pipe, WEIGHTS, "is not a regular file"),
    "missing config": (remove("config.json"), "model", "has no config.json"),
    "broken config": (
        content(lambda b: b[:-2], "config.json"),
        "config.json",
        "config.json: is not valid JSON",
    ),
    "config is a list": (content(lambda b: b"[1]", "config.json"), "config.json", "holds a JSON list"),
    "only a pickle": (only_bin, "pytorch_model.bin", "and pickle is never loaded; convert it once"),
    "adapter": (only_adapter, "adapter_config.json", "names no peft_type"),
    "no weights": (remove(WEIGHTS), "model", "has a config.json, but neither"),
    "NaN weights": (values(embed=infinite(np.nan)), WEIGHTS, "1 NaN values in 1 tensor"),
    "infinite weights": (values(embed=infinite(-np.inf)), WEIGHTS, "1 infinite values in 1 tensor"),
}

SHARDED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "missing shard": (remove(SECOND), SECOND, "is missing, model.safetensors.index.json names it"),
    "missing index": (remove(INDEX), FIRST, f"has {FIRST}, but neither"),
    "index above the folder": (index(lambda m: m.update(steps=f"../{SECOND}")), INDEX, "names '../"),
    "index absolute": (index(lambda m: m.update(steps="/etc/passwd")), INDEX, "names '/etc/passwd'"),
    "index is the folder above": (index(lambda m: m.update(steps="..")), INDEX, "names '..'"),
    "index with backslash": (index(lambda m: m.update(steps="..\\a.safetensors")), INDEX, "names '..\\\\"),
    "index names a pickle": (index(lambda m: m.update(steps="a.bin")), INDEX, "names 'a.bin', expected"),
    "index broken": (content(lambda b: b[:-9], INDEX), INDEX, f"{INDEX}: is not valid JSON"),
    "index without map": (lambda f: write_index(f, ["steps"]), INDEX, "has no weight_map"),
    "index twice": (index_twice, INDEX, f"{INDEX}: has 'steps' twice"),
    "tensor not in its shard": (index(lambda m: m.update(steps=FIRST)), FIRST, "has no tensor 'steps'"),
    "tensor not in the index": (shard_not_in_index, FIRST, "tensor 'more' is not in"),
    "tensor in two shards": (twice_in_shards, FIRST, "tensor 'steps' is in several shards"),
    "truncated shard": (content(lambda b: b[:-2], SECOND), SECOND, "truncated in the data"),
}
SAME_KIND = {"truncated data": "truncated shard"}
"""The same damage to another file: the file's name tells them apart."""


def check(folder: Path) -> None:
    """All that is checked before a search spends anything."""
    refuse_non_finite("mine", fingerprint(open_checkpoint(folder)))


@pytest.mark.parametrize("name", [*SINGLE, *SHARDED])
def test_a_damaged_checkpoint_ends_in_one_line_of_its_own(name: str, tmp_path: Path) -> None:
    damage, file, phrase = (SINGLE | SHARDED)[name]
    folder = tmp_path / "model"
    (write_single if name in SINGLE else write_sharded)(folder)
    check(folder)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        check(folder)
    message = str(caught.value)
    assert caught.value.exit_status == 2
    assert "\n" not in message
    assert len(message.replace(str(folder), "")) < 300
    assert file in message
    assert str(folder) in message
    assert phrase in message
    same = {name, SAME_KIND.get(name), *(key for key, value in SAME_KIND.items() if value == name)}
    for other, (_, _, their_phrase) in (SINGLE | SHARDED).items():
        assert other in same or their_phrase not in message, f"the message is also that of '{other}'"


@pytest.mark.parametrize("name", [*SINGLE, *SHARDED])
def test_a_damaged_source_ends_the_command_in_one_line_and_status_2(name: str, tmp_path: Path) -> None:
    damage, file, phrase = (SINGLE | SHARDED)[name]
    folder = tmp_path / "model"
    write = write_single if name in SINGLE else write_sharded
    write(tmp_path / "base")
    write(folder)
    (tmp_path / "score.py").write_text("def score(model):\n    return 1.0\n")
    config = {
        "name": "damaged",
        "models": {"base": "base", "sources": {"mine": "model"}},
        "space": {"operator": "linear"},
        "evaluators": {"own": {"use": "python", "function": "score.py:score"}},
        "objectives": ["own.score"],
    }
    path = write_config(config, tmp_path)
    if name in ("empty file", "missing shard"):  # nothing but the damage is wrong
        assert meiosis("plan", path).status == 0
    damage(folder)
    ended = meiosis("plan", path)
    assert ended.status == 2, ended.err
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert file in line
    assert str(folder) in line
    assert phrase in line


def test_a_missing_folder_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    write_single(tmp_path / "prose-expert")
    with pytest.raises(CheckpointError, match="no such folder; did you mean 'prose-expert'"):
        open_checkpoint(tmp_path / "prose-exprt")
    with pytest.raises(CheckpointError, match="nor is there a folder"):
        open_checkpoint(str(tmp_path / "nowhere" / "model"))


def test_a_typo_of_a_local_folder_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    write_single(tmp_path / "models" / "code-expert")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("models/code-expert").folder == tmp_path / "models" / "code-expert"
    with pytest.raises(CheckpointError, match="did you mean 'code-expert'"):
        open_checkpoint("models/code-exprt")


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    write_single(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is a file, expected a model folder"):
        open_checkpoint(tmp_path / "model" / WEIGHTS)


def test_the_folder_above_a_checkpoint_points_at_it(tmp_path: Path) -> None:
    write_single(tmp_path / "checkpoint-500")
    with pytest.raises(CheckpointError, match=r"has no config.json.*did you mean .*checkpoint-500\?"):
        open_checkpoint(tmp_path)


def test_a_hub_id_that_cannot_be_had_is_one_line_with_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("nobody-at-all/not-a-model")
    message = str(caught.value)
    assert "'nobody-at-all/not-a-model': no such folder, and no model of the hub" in message
    assert "give the folder of a local copy" in message
    assert "\n" not in message


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    write_single(tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).unlink()
    (tmp_path / "model" / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path / "model")


def test_weights_that_change_under_a_search_are_noticed(tmp_path: Path) -> None:
    write_single(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    save_file({"embed.weight": np.ones((2, 2), np.float32)}, tmp_path / "model" / WEIGHTS)
    with pytest.raises(CheckpointError, match="was changed since it was opened"):
        fingerprint(checkpoint)
    with CheckpointTensors(checkpoint) as opened, pytest.raises(CheckpointError, match="was changed while"):
        opened.get("embed.weight")
    (tmp_path / "model" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="cannot be mapped"):
        CheckpointTensors(checkpoint)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_header_is_a_checkpoint_error_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    """What we let pass must also be what the library reads."""
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    write_single(folder)
    content = bytearray((folder / WEIGHTS).read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (folder / WEIGHTS).write_bytes(content)
    message = outcome(folder)
    assert message is None or (len(message.splitlines()) == 1 and str(folder) in message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 200) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(["dtype", "shape", "data_offsets", None]), value=JSON, name=st.text(max_size=4))
def test_any_value_in_a_header_is_a_checkpoint_error_or_harmless(
    key: str | None, value: object, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    write_single(folder)
    header, data = parts(folder / WEIGHTS)
    if key is None:
        header[name] = value
    else:
        header["embed.weight"][key] = value
    put(folder / WEIGHTS, header, data)
    message = outcome(folder)
    assert message is None or (len(message.splitlines()) == 1 and str(folder) in message)


def outcome(folder: Path) -> str | None:
    """What is said of a checkpoint; None if it opens, and then the library must read every tensor."""
    try:
        opened = open_checkpoint(folder)
        check(folder)
        with CheckpointTensors(opened) as read:
            for name in read.names:
                assert tuple(read.get(name).shape) == opened.tensors[name].shape
    except CheckpointError as error:
        return str(error)
    return None
