"""Copies of models and data on a node that does not see them: what moves, what is kept, what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import meiosis, short, write_config
from family import config_of
from safetensors.numpy import save_file

from cluster import copies as copies_module
from cluster import receiving
from cluster.copies import Copies
from cluster.handshake import identity
from cluster.parcels import Offer, Parcel, ParcelFile, difference, parcels_of
from cluster.receiving import PIECE_BYTES, PIECES_AHEAD, Located, LostError, locate
from cluster.sending import files_of, source_class
from cluster.shards import shard_refs
from evaluators.base import EvaluatorSpec
from search.checkpoints.fingerprint import fingerprint
from search.checkpoints.reading import open_checkpoint
from search.errors import WorkerError
from search.pool import WorkerPlan
from search.recipe import ModelRef
from search.store.copied import Copied, note_copied, read_copied

PIECE = 1 << 16


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEIOSIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(receiving, "PIECE_BYTES", PIECE)


class Near:
    """The way to a source in this process; it can break off after some pieces."""

    def __init__(self, offer: Offer, breaks_after: int = 1 << 30) -> None:
        self.source = source_class()(files_of(offer.parcels))
        self.left, self.taken, self.most_ahead, self._ahead = breaks_after, 0, 0, 0

    def ask(self, parcel: Parcel, file: ParcelFile, offset: int, length: int) -> Any:
        self._ahead += 1
        self.most_ahead = max(self.most_ahead, self._ahead)
        return parcel.key, file.name, offset, length

    def take(self, asked: Any) -> bytes | str:
        self._ahead -= 1
        if self.left == 0:
            self.left, self._ahead = 1 << 30, 0
            raise LostError("the connection broke")
        self.left -= 1
        self.taken += 1
        piece: bytes | str = self.source.read(*asked)
        return piece

    def tell(self, event: Mapping[str, Any]) -> None:
        self.source.tell(dict(event))


def model(folder: Path, elements: int = 100_000, value: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["A"]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never sent")
    weights = np.arange(elements, dtype=np.float32) + value
    save_file({"a": weights, "b": np.ones(3, np.float32)}, folder / "model.safetensors")
    return folder


def plan(tmp_path: Path, **more: Any) -> WorkerPlan:
    names = {"base": 0, "code": 1}
    for name, value in names.items():
        if not (tmp_path / "models" / name).exists():
            model(tmp_path / "models" / name, value=value)
    models = {name: ModelRef(path=str(tmp_path / "models" / name)) for name in names}
    return WorkerPlan(models, "base", **{"evaluators": (), **more})


def offer_of(plan: WorkerPlan, *, always: bool = True) -> Offer:
    shards = shard_refs(plan.models, plan.base)
    return Offer(shards, identity(), parcels_of(plan, shards), always)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_copies_are_the_same_files_without_pickles_and_are_made_once(tmp_path: Path) -> None:
    given = plan(tmp_path)
    offer = offer_of(given)
    channel = Near(offer)
    located = locate(offer, channel, node_id="abc")
    for name, checkpoint in located.checkpoints.items():
        theirs = content(tmp_path / "models" / name)
        assert theirs.pop("pytorch_model.bin")
        assert content(checkpoint.folder) == theirs
        assert checkpoint.folder.is_relative_to(tmp_path / "cache" / "shards")
    ended = channel.source.news()[-1]
    assert (ended["state"], ended["node_id"], ended["moved"]) == ("ended", "abc", sum(p.nbytes for p in offer.parcels))
    assert channel.most_ahead == PIECES_AHEAD, "more would not be bounded memory"
    assert PIECE_BYTES * PIECES_AHEAD <= 16 << 20

    again = Near(offer)
    assert locate(offer, again).checkpoints == located.checkpoints
    assert (again.taken, again.source.news()) == (0, [])
    assert not list((tmp_path / "cache" / "shards").glob("*.partial"))


def test_a_node_that_sees_the_same_files_gets_nothing(tmp_path: Path) -> None:
    given = plan(tmp_path)
    offer = offer_of(given, always=False)
    channel = Near(offer)
    located = locate(offer, channel)
    assert (channel.taken, dict(located.moved)) == (0, {})
    assert located.plan(given) is given
    os.utime(tmp_path / "models" / "code" / "model.safetensors", (1, 1))
    assert locate(offer, channel).moved == {}, "a copy with other times has the same bytes"
    assert not (tmp_path / "cache" / "shards").exists()


@pytest.mark.parametrize("what", ["weights", "config", "file missing", "folder missing"])
def test_what_is_other_here_is_noticed(tmp_path: Path, what: str) -> None:
    offer = offer_of(plan(tmp_path), always=False)
    parcel = next(parcel for parcel in offer.parcels if parcel.what == "model 'code'")
    folder = tmp_path / "models" / "code"
    assert difference(parcel, folder) is None
    if what == "weights":
        shutil.rmtree(folder)
        model(folder, value=7)
        assert "hash to" in str(difference(parcel, folder))
    elif what == "config":
        (folder / "config.json").write_text('{"architectures": ["B"]}')
        assert "config.json has another content" in str(difference(parcel, folder))
    else:
        path = folder / "tokenizer.json" if what == "file missing" else folder
        path.rename(tmp_path / "away")
        assert "No such file or directory" in str(difference(parcel, folder))


def test_a_transfer_that_breaks_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    offer = offer_of(plan(tmp_path))
    whole = Near(offer)
    locate(offer, whole, Copies(tmp_path / "one"))
    broken = Near(offer, breaks_after=5)
    locate(offer, broken, Copies(tmp_path / "two"))
    assert broken.taken == whole.taken, "no piece twice"


class Dies(Near):
    """Kills the process that receives, in the middle of a file."""

    def take(self, asked: Any) -> bytes | str:
        if self.left == 1:
            os._exit(9)
        return super().take(asked)


def test_a_receiver_that_is_killed_leaves_what_the_next_one_goes_on_with(tmp_path: Path) -> None:
    offer = offer_of(plan(tmp_path))
    context = multiprocessing.get_context("fork")
    process = context.Process(target=locate, args=(offer, Dies(offer, breaks_after=8)))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert list((tmp_path / "cache" / "shards").glob("*.partial"))
    assert [copy.what for copy in Copies().listing()].count("a transfer that was cut off") == 1
    rest = Near(offer)
    located = locate(offer, rest)
    assert {name: fingerprint(found).sha256 for name, found in located.checkpoints.items()} == {
        name: ref.sha256 for name, ref in offer.shards.items()
    }
    whole = Near(offer)
    locate(offer, whole, Copies(tmp_path / "other"))
    assert 0 < rest.taken < whole.taken
    ended = rest.source.news()[-1]
    assert ended["moved"] < ended["total"]


def test_what_was_left_and_is_damaged_is_fetched_anew(tmp_path: Path) -> None:
    offer = offer_of(plan(tmp_path))
    copies = Copies()
    parcel = offer.parcels[0]
    for file in parcel.files:
        path = parcel.file_at(copies.partial(parcel), file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(file.size))
    assert locate(offer, Near(offer)).checkpoints["base"].folder == copies.place(parcel)


def test_a_copy_that_was_damaged_later_is_made_again(tmp_path: Path) -> None:
    offer = offer_of(plan(tmp_path))
    first = locate(offer, Near(offer))
    file = first.checkpoints["code"].files[0]
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(damaged)
    channel = Near(offer)
    assert fingerprint(locate(offer, channel).checkpoints["code"]).sha256 == offer.shards["code"].sha256
    assert channel.taken > 0


def test_what_the_driver_sends_must_be_what_it_had_at_the_start(tmp_path: Path) -> None:
    offer = offer_of(plan(tmp_path))
    shutil.rmtree(tmp_path / "models" / "code")
    model(tmp_path / "models" / "code", value=5)
    with pytest.raises(WorkerError, match=r"model .code. is .* cannot be copied: .* was changed since"):
        locate(offer, Near(offer))


def test_bytes_that_change_on_the_way_are_not_kept(tmp_path: Path) -> None:
    class Wrong(Near):
        def take(self, asked: Any) -> bytes | str:
            piece = super().take(asked)
            assert isinstance(piece, bytes)
            return piece[:-1] + bytes([piece[-1] ^ 1]) if asked[1].endswith(".safetensors") else piece

    offer = offer_of(plan(tmp_path))
    with pytest.raises(WorkerError, match=r"model 'base': what came from the driver is damaged: "):
        locate(offer, Wrong(offer))
    assert not list((tmp_path / "cache" / "shards").glob("*/"))


def test_no_file_can_be_read_that_was_not_offered(tmp_path: Path) -> None:
    offer = offer_of(plan(tmp_path))
    (tmp_path / "models" / "base" / "secret.json").write_text("{}")
    source = source_class()(files_of(offer.parcels))
    for name in ("secret.json", "../../secret", "/etc/passwd"):
        assert source.read(offer.parcels[0].key, name, 0, 10) == f"{name} was not offered"


def _wait_and_locate(offer: Offer, barrier: Any, results: Any) -> None:
    channel = Near(offer)
    barrier.wait()
    located = locate(offer, channel)
    results.put((channel.taken, sorted(str(one.folder) for one in located.checkpoints.values())))


def test_of_the_workers_of_a_node_one_fetches_and_the_others_wait(tmp_path: Path) -> None:
    offer = offer_of(plan(tmp_path))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_wait_and_locate, args=(offer, barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = sorted(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert [taken > 0 for taken, _ in found] == [False, False, True]
    assert len({tuple(folders) for _, folders in found}) == 1


def test_data_and_statistics_travel_too_and_the_plan_names_where_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").write_text("not data")
    (folder / "a.txt").write_text("one")
    (folder / "more" / "b.txt").write_text("two")
    for pool in ("search", "select", "certify"):
        (tmp_path / f"{pool}.jsonl").write_text(json.dumps({"text": pool}))
    (tmp_path / "own.py").write_text("def score(model): return 1.0")
    save_file({"fisher/a": np.ones(4, np.float32)}, tmp_path / "code.statistics")
    pools = {pool: str(tmp_path / f"{pool}.jsonl") for pool in ("search", "select", "certify")}
    evaluators = (
        EvaluatorSpec("texts", "perplexity", {"data": str(folder), "batch_tokens": 64}),
        EvaluatorSpec("lines", "perplexity", {"data": pools}),
        EvaluatorSpec("own", "python", {"function": f"{tmp_path / 'own.py'}:score"}),
    )
    given = plan(tmp_path, evaluators=evaluators)
    code = given.models["code"].model_copy(update={"statistics": str(tmp_path / "code.statistics")})
    given = replace(given, models={**given.models, "code": code})
    offer = offer_of(given)
    here = locate(offer, Near(offer)).plan(given)
    cache = tmp_path / "cache" / "shards"
    statistics = Path(str(here.models["code"].statistics))
    assert statistics.is_relative_to(cache)
    assert statistics.read_bytes() == (tmp_path / "code.statistics").read_bytes()
    texts, lines, own = (spec.options for spec in here.evaluators)
    assert content(Path(str(texts["data"]))) == {"a.txt": b"one", "more/b.txt": b"two"}
    assert texts["batch_tokens"] == 64
    places = [Path(path) for path in lines["data"].values()]  # type: ignore[attr-defined]
    assert [place.name for place in places] == ["search.jsonl", "select.jsonl", "certify.jsonl"]
    assert all(place.is_relative_to(cache) for place in places)
    place, _, name = str(own["function"]).rpartition(":")
    assert (Path(place).read_text(), name) == ("def score(model): return 1.0", "score")
    assert all(Path(ref.path).is_relative_to(cache) for ref in here.models.values())
    (folder / "c.txt").write_text("three")
    parcel = next(parcel for parcel in offer.parcels if parcel.path == str(folder))
    assert "other files" in str(difference(parcel, folder))


def test_a_disk_without_room_is_refused_before_anything_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies_module, "SPARE_BYTES", 1 << 62)
    monkeypatch.setattr(copies_module, "SPARE_SHARE", 1.0)
    offer = offer_of(plan(tmp_path))
    channel = Near(offer)
    with pytest.raises(WorkerError) as caught:
        locate(offer, channel)
    assert "has room for 0.0 MiB and needs 0.8 MiB for copies" in str(caught.value)
    assert "MEIOSIS_CACHE" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert channel.taken == 0


def test_copies_that_nobody_uses_make_room_and_those_in_use_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = offer_of(plan(tmp_path))
    copies = Copies()
    old, new = offer.parcels
    for parcel in (old, new):
        locate(replace(offer, parcels=(parcel,), shards={}), Near(offer))
    os.utime(copies.folder / f"{old.key}.lock", (1, 1))
    with monkeypatch.context() as full, copies.alone():
        full.setattr(Copies, "room", lambda self: 100 if (self.folder / old.key).exists() else 10_000)
        assert [copy.key for copy in copies.make_room(5_000, keep=())] == [old.key]
    held = locate(offer, Near(offer)).copies
    monkeypatch.setattr(Copies, "room", lambda self: 100)
    with copies.alone(), pytest.raises(WorkerError):
        copies.make_room(5_000, keep=())
    assert len(copies.listing()) == 2
    assert held is not None


def test_the_command_shows_and_clears_what_no_process_uses(tmp_path: Path) -> None:
    empty = meiosis("cache")
    assert (empty.status, empty.out) == (0, f"{tmp_path / 'cache' / 'shards'}: 0 copies, 0.0 MiB.\n")
    assert meiosis("cache", "--clear").status == 0
    offer = offer_of(plan(tmp_path))
    locate(offer, Near(offer))
    located: Located | None = locate(replace(offer, parcels=offer.parcels[:1], shards={}), Near(offer))
    shown = meiosis("cache")
    assert "model 'base'" in shown.out
    assert "in use" in shown.out
    cleared = meiosis("cache", "--clear", "--json").json
    assert [copy["what"] for copy in cleared["kept"]] == ["model 'base'"]
    assert [copy["what"] for copy in cleared["removed"]] == ["model 'code'"]
    assert located is not None
    assert open_checkpoint(located.moved[str(tmp_path / "models" / "base")])
    with Copies().alone():
        busy = meiosis("cache", "--clear")
    assert (busy.status, "a copy is being made there" in busy.err) == (1, True)
    del located
    assert [copy["what"] for copy in meiosis("cache", "--clear", "--json").json["removed"]] == ["model 'base'"]


def test_the_command_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; sys.argv = ['meiosis', 'cache']\n"
        "from meiosis.cli.main import main\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ})


def test_what_was_copied_is_noted_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "copied.jsonl"
    assert read_copied(file) == []
    one = Copied("gpu7", "abcd", 5, 1.5, "/cache")
    note_copied(file, one)
    with file.open("a") as lines:
        lines.write('{"node": "torn')
    assert read_copied(file) == [one]


def test_status_says_how_much_was_copied_to_which_node(family: Path, tmp_path: Path) -> None:
    config = write_config(short(config_of(family, tmp_path / "runs")), tmp_path)
    assert meiosis("search", config, "--run", "first").status == 0
    file = tmp_path / "runs" / "first" / "workers" / "copied.jsonl"
    for node_id in ("abcdef0123456", "abcdef0123456", "fedcba9876543"):
        note_copied(file, Copied("gpu7", node_id, 3 << 20, 1.5, "/cache"))
    status = meiosis("status", "first", "--results", tmp_path / "runs")
    assert "Copied to node gpu7 (abcdef01): 6.0 MiB of models and data" in status.out
    assert "Copied to node gpu7 (fedcba98): 3.0 MiB of models and data" in status.out


def test_an_adapter_travels_with_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "lora"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    (folder / "config.json").write_text("{}")
    save_file({"a.lora_A.weight": np.ones((2, 4), np.float32)}, folder / "adapter_model.safetensors")
    given = plan(tmp_path)
    given = replace(given, models={**given.models, "lora": ModelRef(path=str(folder))})
    offer = offer_of(given)
    found = locate(offer, Near(offer)).checkpoints["lora"]
    assert found.kind == "adapter"
    assert content(found.folder) == content(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 8}')
    parcel = next(parcel for parcel in offer.parcels if parcel.what == "model 'lora'")
    assert difference(parcel, folder) is not None
