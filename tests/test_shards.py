"""What the processes of a node share: references to checkpoints, and files that are read ahead once."""

import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.shards import (
    FRESH_SECONDS,
    attach,
    node_folder,
    shard_ref,
    shard_refs,
    warm,
    warm_stamp,
)
from search.checkpoints.fingerprint import fingerprint
from search.checkpoints.reading import Checkpoint, open_checkpoint
from search.errors import CheckpointError, WorkerError
from search.recipe import ModelRef


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEIOSIS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "node").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def model(folder: Path, value: float = 1.0, **shapes: tuple[int, ...]) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["A"]}')
    shapes = shapes or {"a": (8, 4), "b": (3,)}
    save_file({n: np.full(shape, value, np.float32) for n, shape in shapes.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


def test_a_worker_gets_the_checkpoints_of_the_driver_from_plain_data(tmp_path: Path) -> None:
    checkpoints = {name: model(tmp_path / name, value) for name, value in [("base", 1.0), ("code", 2.0)]}
    refs = {name: shard_ref(each, fingerprint(each)) for name, each in checkpoints.items()}
    message = pickle.dumps(refs)
    assert len(message) < 2000, "references must not carry weights"
    assert attach(pickle.loads(message)) == checkpoints  # noqa: S301 - the message is our own


def test_the_driver_refers_to_the_models_of_its_plan_with_their_hashes(tmp_path: Path) -> None:
    checkpoints = {name: model(tmp_path / name, value) for name, value in [("base", 1.0), ("code", 2.0)]}
    plans = {name: ModelRef(path=str(each.folder)) for name, each in checkpoints.items()}
    refs = shard_refs(plans)
    assert {name: ref.sha256 for name, ref in refs.items()} == {
        name: fingerprint(each).sha256 for name, each in checkpoints.items()
    }
    hashed = {name: plan.model_copy(update={"sha256": refs[name].sha256}) for name, plan in plans.items()}
    assert shard_refs(hashed) == refs
    assert attach(refs) == checkpoints
    assert shard_refs({}) == {}
    assert attach({}) == {}


def test_a_model_that_changed_since_the_plan_was_made_is_refused_by_the_driver(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "code")
    planned = ModelRef(path=str(checkpoint.folder), sha256=fingerprint(checkpoint).sha256)
    shutil.rmtree(tmp_path / "code")
    model(tmp_path / "code", 2.0)
    with pytest.raises(CheckpointError, match=r"model 'code': the weights in .* hash to .* changed since"):
        shard_refs({"code": planned})


def test_a_model_that_this_node_lacks_is_told_with_node_model_and_folder(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "code")
    ref = shard_ref(checkpoint, fingerprint(checkpoint))
    shutil.move(tmp_path / "code", tmp_path / "away")
    with pytest.raises(WorkerError, match=r"node .*: model 'code': no folder .*code, which the driver has"):
        attach({"code": ref})


def test_a_file_that_is_missing_or_damaged_here_is_told(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "code")
    ref = shard_ref(checkpoint, fingerprint(checkpoint))
    file = checkpoint.files[0]
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    with pytest.raises(WorkerError, match=r"model 'code': .*model\.safetensors: truncated in the data"):
        attach({"code": ref})
    file.rename(file.with_name("model-1.safetensors"))
    with pytest.raises(WorkerError, match=r"has model-1\.safetensors, but neither"):
        attach({"code": ref})
    (tmp_path / "code" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}'
    )
    (tmp_path / "code" / "model-1.safetensors").write_bytes(content)
    with pytest.raises(WorkerError, match="is missing on"):
        attach({"code": ref})


def test_a_file_of_another_size_or_header_is_told(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "code")
    ref = shard_ref(checkpoint, fingerprint(checkpoint))
    shutil.rmtree(tmp_path / "code")
    model(tmp_path / "code", a=(8, 4), b=(5,))
    with pytest.raises(WorkerError, match=r"has \d+ bytes, the driver saw \d+ bytes"):
        attach({"code": ref})
    shutil.rmtree(tmp_path / "code")
    model(tmp_path / "code", a=(4, 8), b=(3,))
    with pytest.raises(WorkerError, match="has another header"):
        attach({"code": ref})


def test_a_copy_with_other_times_is_the_same_only_with_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "code")
    ref = shard_ref(checkpoint, fingerprint(checkpoint))
    os.utime(checkpoint.files[0], (1, 1))
    assert attach({"code": ref}) == {"code": checkpoint}
    shutil.rmtree(tmp_path / "code")
    model(tmp_path / "code", 1.5)
    with pytest.raises(WorkerError, match=r"model 'code': with .*model\.safetensors its weights hash to"):
        attach({"code": ref})


def test_warming_reads_every_byte_once_per_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = model(tmp_path / "code", a=(300, 1000))
    size = checkpoint.files[0].stat().st_size
    monkeypatch.setattr("search.checkpoints.byte_progress.QUIET_BYTES", 0)
    lines: list[str] = []
    assert warm(checkpoint.files, lines.append, tmp_path / "node") == size
    assert lines == ["reading the models into memory: 100% of 0.0 GiB"]
    assert warm(checkpoint.files, lines.append, tmp_path / "node") == 0
    assert len(lines) == 1
    (stamp,) = (tmp_path / "node").iterdir()
    assert stamp == warm_stamp(checkpoint.files, tmp_path / "node")
    assert stamp.read_text() == f"process {os.getpid()} read {size} bytes\n"
    long_ago = time.time() - FRESH_SECONDS - 1
    os.utime(stamp, (long_ago, long_ago))
    assert warm(checkpoint.files, None, tmp_path / "node") == size, "the kernel may have dropped the pages"
    os.utime(checkpoint.files[0], (1, 1))
    assert warm(checkpoint.files, None, tmp_path / "node") == size, "another file in the same place"


def _warm(files: tuple[Path, ...], folder: Path, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    results.put(warm(files, None, folder))  # type: ignore[attr-defined]


def test_of_many_workers_that_start_together_one_reads(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "code", a=(2000, 1000))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    workers = [
        context.Process(target=_warm, args=(checkpoint.files, tmp_path / "node", barrier, results)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    read = sorted(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert read == [0, 0, 0, checkpoint.files[0].stat().st_size]


def test_warming_an_empty_or_missing_file_is_harmless_or_told(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert warm([tmp_path / "empty"], None, tmp_path / "node") == 0
    with pytest.raises(WorkerError, match=r"no-such-file: cannot be read \(No such file"):
        warm([tmp_path / "no-such-file"], None, tmp_path / "node")


def test_the_folder_of_a_node_belongs_to_its_user_alone(tmp_path: Path) -> None:
    folder = node_folder()
    assert folder == node_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path / "node")
    with pytest.raises(WorkerError, match="belongs to somebody else"):
        node_folder()
