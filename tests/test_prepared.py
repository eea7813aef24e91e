"""The folder in which the workers of a node share what operators prepare, also where it cannot be used."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.shards import node_folder
from search.errors import WorkerError
from search.merge.prepared import KEEP_SECONDS, Prepared, PreparedFolder, Tensors

FACTS = {"operator": "slerp", "sources": ["a", "b"]}


def whole() -> Prepared:
    return {"w": {"dot": torch.tensor([0.5]), "counts": torch.arange(5000)}, "v": {"dot": torch.tensor([2.0])}}


def content() -> Iterator[tuple[str, Tensors]]:
    yield from whole().items()


def same(one: Prepared, other: Prepared) -> bool:
    def plain(prepared: Prepared) -> dict[str, dict[str, list[float]]]:
        return {name: {item: t.tolist() for item, t in items.items()} for name, items in prepared.items()}

    return plain(one) == plain(other)


def never() -> Iterator[tuple[str, Tensors]]:
    raise AssertionError("it is there already")


def test_what_one_process_prepared_another_finds(tmp_path: Path) -> None:
    assert same(PreparedFolder(tmp_path / "new" / "folder").load(FACTS, content), whole())
    assert same(PreparedFolder(tmp_path / "new" / "folder").load(FACTS, never), whole())


def test_where_there_can_be_no_folder_it_is_prepared_in_memory_and_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder = PreparedFolder(tmp_path / "file")
        for facts in (FACTS, {**FACTS, "operator": "ties"}):
            assert same(folder.load(facts, content), whole())
    assert [warning.category for warning in said] == [RuntimeWarning]
    assert str(said[0].message).startswith(f"{tmp_path / 'file'}: cannot be used (")
    assert (tmp_path / "file").read_text() == "in the way"


def _on_a_full_disk(folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # Python ignores the signal, so writing fails
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = PreparedFolder(folder).load(FACTS, content)
    results.put((same(found, whole()), [str(warning.message) for warning in said]))


def test_on_a_full_disk_it_is_prepared_in_memory_and_nothing_is_left_half_written(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    process = context.Process(target=_on_a_full_disk, args=(tmp_path, results))
    process.start()
    right, said = results.get(timeout=60)
    process.join()
    assert right
    assert len(said) == 1
    assert "every worker prepares the models for itself" in said[0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_what_preparing_raises_passes_through(tmp_path: Path) -> None:
    def unreadable() -> Iterator[tuple[str, Tensors]]:
        raise OSError("a model cannot be read")

    with pytest.raises(OSError, match="a model cannot be read"):
        PreparedFolder(tmp_path).load(FACTS, unreadable)
    assert same(PreparedFolder(tmp_path).load(FACTS, content), whole())


def test_files_that_nobody_used_for_long_go_when_another_is_written(tmp_path: Path) -> None:
    folder = PreparedFolder(tmp_path)
    for name in ("old", "used", "young"):
        folder.load({**FACTS, "operator": name}, content)
    (tmp_path / "notes.txt").write_text("not ours")
    long_ago = time.time() - KEEP_SECONDS - 60
    for path in tmp_path.iterdir():
        os.utime(path, (long_ago, long_ago))
    kept = folder.load({**FACTS, "operator": "used"}, never)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    folder.load({**FACTS, "operator": "new"}, content)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert same(folder.load({**FACTS, "operator": "used"}, never), kept)
    assert (tmp_path / "notes.txt").exists()


def test_a_file_in_the_place_of_the_folder_of_a_node_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = tmp_path / f"meiosis-{os.getuid()}"
    place.write_text("in the way")
    with pytest.raises(WorkerError) as caught:
        node_folder()
    assert f"{place}: expected a folder" in str(caught.value)
    assert "there is a file of that name" in str(caught.value)
    place.unlink()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(WorkerError, match=r"cannot be made \(No such file or directory\); .* set TMPDIR"):
        node_folder()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert node_folder() == place
    assert place.stat().st_mode & 0o777 == 0o700


def test_large_contents_are_written_in_parts_and_found_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.merge.prepared.PART_BYTES", 100)
    many = {f"t{i}": {"x": torch.full((20,), float(i)), "y": torch.tensor([i])} for i in range(7)}
    folder = PreparedFolder(tmp_path)
    assert same(folder.load(FACTS, lambda: iter(many.items())), many)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same(PreparedFolder(tmp_path).load(FACTS, never), many)
    next(tmp_path.glob("*p1.safetensors")).write_bytes(b"")
    assert same(PreparedFolder(tmp_path).load(FACTS, lambda: iter(many.items())), many)
    assert same(PreparedFolder(tmp_path).load(FACTS, never), many)
