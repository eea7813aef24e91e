"""Writing checkpoints: whole or not at all, and such that stock transformers loads them."""

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from search.checkpoints.fingerprint import fingerprint, hash_tensors
from search.checkpoints.reading import Checkpoint, CheckpointTensors, open_checkpoint
from search.checkpoints.shard_writer import Planned
from search.checkpoints.staging import staging_folder
from search.checkpoints.tensor_bytes import TORCH_NAMES, dtype_name
from search.checkpoints.writing import write_checkpoint
from search.errors import MeiosisError, UserError

TENSORS = {
    "embed.weight": torch.arange(32.0).reshape(8, 4),
    "up.weight": torch.arange(24.0).reshape(6, 4),
    "norm.weight": torch.ones(4),
    "steps": torch.tensor(7),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MEIOSIS_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def donor(tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "donor"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "text_config": {"dtype": "float32"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(TENSORS, folder / "model.safetensors")
    return open_checkpoint(folder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", sorted(TORCH_NAMES))
def test_what_is_written_opens_as_it_was(dtype: str, donor: Checkpoint, tmp_path: Path) -> None:
    kind = getattr(torch, TORCH_NAMES[dtype])
    tensors = {
        "matrix": torch.rand(5, 3, generator=torch.Generator().manual_seed(0)).mul(9).to(kind),
        "number": torch.tensor(1.0).to(kind),
        "nothing": torch.empty(0, 4).to(kind),
        "strided": torch.arange(12.0).reshape(3, 4).to(kind).t(),
        "byte": torch.tensor([3], dtype=torch.uint8),  # of another width, so that alignment matters
    }
    checkpoint = open_checkpoint(write_checkpoint(tensors, donor, tmp_path / "out"))
    assert checkpoint.tensors["matrix"].dtype == dtype
    opened = CheckpointTensors(checkpoint)
    for name, expected in tensors.items():
        found = opened.get(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert hash_tensors({"x": found}) == hash_tensors({"x": expected})
    assert fingerprint(checkpoint).sha256 == hash_tensors(tensors)
    marker = json.loads((tmp_path / "out" / "meiosis.json").read_text())
    assert marker["weights_sha256"] == hash_tensors(tensors)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    shard=st.integers(1, 200),
    as_stream=st.booleans(),
)
def test_sharding_changes_nothing_but_the_files(
    sizes: list[int], shard: int, as_stream: bool, donor: Checkpoint, tmp_path: Path
) -> None:
    tensors = {f"t{i}": torch.arange(n, dtype=torch.float32) + i for i, n in enumerate(sizes)}
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    given_tensors = iter(tensors.items()) if as_stream else tensors
    checkpoint = open_checkpoint(write_checkpoint(given_tensors, donor, tmp_path / "out", max_shard_bytes=shard))
    assert fingerprint(checkpoint).sha256 == hash_tensors(tensors)
    assert all(torch.equal(found, tensors[name]) for name, found in read(tmp_path / "out").items())
    for file in checkpoint.files:
        inside = [info.nbytes for info in checkpoint.tensors.values() if info.file == file]
        assert sum(inside) <= shard or len(inside) == 1 or sum(inside) == max(inside)
    has_index = (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert has_index == (len(checkpoint.files) > 1)
    if has_index:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == checkpoint.nbytes
        assert {file.name for file in checkpoint.files} == {
            f"model-{i + 1:05}-of-{len(checkpoint.files):05}.safetensors" for i in range(len(checkpoint.files))
        }


def test_tensors_that_share_memory_are_written_each_for_itself(donor: Checkpoint, tmp_path: Path) -> None:
    tied = torch.ones(3, 3)
    write_checkpoint({"embed": tied, "head": tied}, donor, tmp_path / "out")
    assert {name: tensor.sum().item() for name, tensor in read(tmp_path / "out").items()} == {
        "embed": 9,
        "head": 9,
    }


def test_files_follow_the_umask_and_say_that_they_are_of_pytorch(donor: Checkpoint, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = write_checkpoint(TENSORS, donor, tmp_path / "new" / "out", extra_files={"recipe.yaml": "a: 1"})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o640}
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (out / "recipe.yaml").read_text() == "a: 1"


def test_the_donor_gives_what_loading_needs_and_nothing_else(donor: Checkpoint, tmp_path: Path) -> None:
    wanted = [
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
        "vocab.txt",
    ]
    unwanted = [
        "README.md",
        "modeling_x.py",
        "optimizer.pt",
        "pytorch_model.bin",
        "state.pkl",
        "tokenizer.py",
    ]
    unwanted += ["training_args.bin", "trainer_state.json", "vocab.pt", "meiosis.json"]
    for name in wanted + unwanted:
        (donor.folder / name).write_text(name)
    (donor.folder / "additional_chat_templates").mkdir()
    (donor.folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (donor.folder / "tokenizer_link.json").symlink_to(donor.folder / "README.md")
    out = write_checkpoint(TENSORS, donor, tmp_path / "out", extra_files={"vocab.txt": "ours"})
    ours = [
        "additional_chat_templates",
        "config.json",
        "meiosis.json",
        "model.safetensors",
        "tokenizer_link.json",
    ]
    assert names(out) == sorted(wanted + ours)
    assert not (out / "tokenizer_link.json").is_symlink()
    assert (out / "additional_chat_templates" / "tool.jinja").read_text() == "tool"
    assert (out / "vocab.txt").read_text() == "ours"
    assert (out / "config.json").read_bytes() == (donor.folder / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "BF16"])
def test_another_dtype_is_written_and_told_in_the_config(dtype: str, donor: Checkpoint, tmp_path: Path) -> None:
    out = write_checkpoint(TENSORS, donor, tmp_path / "out", dtype=dtype)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    found = read(out)
    assert found["steps"].dtype == torch.int64
    expected = {n: t.bfloat16() if t.is_floating_point() else t for n, t in TENSORS.items()}
    assert hash_tensors(found) == hash_tensors(expected) == fingerprint(open_checkpoint(out)).sha256


def test_tensors_that_already_have_another_dtype_correct_the_config(donor: Checkpoint, tmp_path: Path) -> None:
    out = write_checkpoint({"a": torch.ones(4, dtype=torch.float16)}, donor, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


def test_a_dtype_that_is_unknown_or_too_narrow_is_refused(donor: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown dtype 'bfloat61' for the weights; did you mean 'bfloat16'"):
        write_checkpoint(TENSORS, donor, tmp_path / "out", dtype="bfloat61")
    with pytest.raises(UserError, match="tensor 'a': 2 values do not fit into float16"):
        write_checkpoint({"a": torch.tensor([1.0, 1e9, -1e9])}, donor, tmp_path / "out", dtype="float16")
    assert names(tmp_path) == ["donor"]


def test_a_folder_in_use_is_left_alone(donor: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty, and nothing is overwritten"):
        write_checkpoint(TENSORS, donor, tmp_path / "precious")
    with pytest.raises(UserError, match="not a model that Meiosis wrote"):
        write_checkpoint(TENSORS, donor, tmp_path / "precious", overwrite=True)
    with pytest.raises(UserError, match="is not empty"):
        write_checkpoint(TENSORS, donor, donor.folder)
    with pytest.raises(UserError, match="is a file"):
        write_checkpoint(TENSORS, donor, tmp_path / "precious" / "thesis.txt")
    assert names(tmp_path) == ["donor", "precious"]
    assert names(tmp_path / "precious") == ["thesis.txt"]


def test_a_model_of_ours_is_replaced_when_asked_for(donor: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is free to take
    out = write_checkpoint(TENSORS, donor, tmp_path / "out", extra_files={"old.txt": "x"})
    with pytest.raises(UserError, match="nothing is overwritten"):
        write_checkpoint(TENSORS, donor, out)
    mapped = CheckpointTensors(open_checkpoint(out))
    doubled = {name: 2 * mapped.get(name) for name in mapped.names}
    write_checkpoint(doubled, donor, out, overwrite=True)
    assert "old.txt" not in names(out)
    assert torch.equal(read(out)["up.weight"], 2 * TENSORS["up.weight"])
    assert torch.equal(mapped.get("up.weight"), TENSORS["up.weight"]), "who has the old one open keeps it"
    assert names(tmp_path) == ["donor", "out"]


def test_a_stream_that_fails_leaves_nothing_behind(donor: Checkpoint, tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(100)
        yield "b", torch.ones(100)
        raise RuntimeError("merge failed")

    with pytest.raises(RuntimeError, match="merge failed"):
        write_checkpoint(stream(), donor, tmp_path / "out", max_shard_bytes=10)
    with pytest.raises(ValueError, match="'a' comes twice"):
        write_checkpoint([("a", torch.ones(1)), ("a", torch.ones(1))], donor, tmp_path / "out")
    with pytest.raises(ValueError, match="complex128"):
        write_checkpoint({"a": torch.ones(1, dtype=torch.complex128)}, donor, tmp_path / "out")
    assert names(tmp_path) == ["donor"]


@pytest.mark.parametrize("name", ["../recipe.yaml", "..", "/etc/x", "a/b", "more.safetensors", "config.json", ""])
def test_an_extra_file_is_a_plain_name(name: str, donor: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a plain file name"):
        write_checkpoint(TENSORS, donor, tmp_path / "out", extra_files={name: "x"})


def test_a_model_larger_than_the_disk_is_refused_before_anything_is_written(donor: Checkpoint, tmp_path: Path) -> None:
    huge = torch.ones(1).expand(1 << 50)
    with pytest.raises(MeiosisError, match=r"the model takes 4294967296\.0 MiB, the disk has") as caught:
        write_checkpoint({"huge": huge}, donor, tmp_path / "out")
    assert caught.value.exit_status == 1
    assert names(tmp_path) == ["donor"]


def test_a_write_that_the_system_cuts_off_leaves_nothing_behind(donor: Checkpoint, tmp_path: Path) -> None:
    """The limit on file size stands for a quota: the first bytes go through, the rest does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(MeiosisError, match=r"out: the disk is full or a quota is used up") as caught:
            write_checkpoint({"big": torch.ones(1 << 20)}, donor, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["donor"]


FULL_DISK = """
mount -t tmpfs -o size=1m tmpfs "$1" || exit 77
exec "$2" - "$1" "$3" <<'END'
import pathlib, sys, torch
from search.checkpoints.reading import open_checkpoint
from search.checkpoints.writing import write_checkpoint
from search.errors import MeiosisError
def stream():  # larger than the donor, so that the check for space cannot know
    for i in range(8):
        yield str(i), torch.ones(1 << 16)
disk, donor = pathlib.Path(sys.argv[1]), open_checkpoint(sys.argv[2])
try:
    write_checkpoint(stream(), donor, disk / "out", max_shard_bytes=1 << 18)
except MeiosisError as error:
    print(type(error.__cause__).__name__, error.__cause__.errno, list(disk.iterdir()), error)
END
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs a file system of its own")
def test_a_disk_that_fills_up_on_the_way_is_one_line_and_left_clean(donor: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    command = [
        "unshare",
        "-Urm",
        "sh",
        "-c",
        FULL_DISK,
        "sh",
        tmp_path / "disk",
        sys.executable,
        donor.folder,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("not allowed to mount here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"OSError {errno.ENOSPC} [] ")
    assert "the disk is full" in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_the_users_mistake(donor: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        write_checkpoint(TENSORS, donor, tmp_path / "locked" / "out")


def test_a_path_through_a_file_is_the_users_mistake(donor: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: "):
        write_checkpoint(TENSORS, donor, tmp_path / "file" / "out")


@pytest.mark.parametrize("shard", [5 * 10**9, 4000])
@pytest.mark.parametrize("tied", [True, False])
def test_stock_transformers_loads_what_is_written(tied: bool, shard: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    original = LlamaForCausalLM(config).eval()
    original.save_pretrained(tmp_path / "donor")
    donor = open_checkpoint(tmp_path / "donor")
    live = {name: tensor for name, tensor in original.state_dict().items() if name in donor.tensors}
    assert fingerprint(donor).sha256 == hash_tensors(live)
    out = write_checkpoint(live, donor, tmp_path / "out", max_shard_bytes=shard, extra_files={"README.md": "card"})
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, original(tokens).logits)
    half = write_checkpoint(live, donor, tmp_path / "half", max_shard_bytes=shard, dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16


# Streams whose layout is known beforehand


def layout_of(tensors: dict[str, torch.Tensor]) -> list[Planned]:
    return [Planned(name, dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(["float32", "bfloat16", "uint8"])), min_size=1, max_size=8
    ),
    shard=st.integers(1, 300),
)
def test_a_stream_with_a_layout_writes_the_same_files_as_the_tensors_at_once(
    sizes: list[tuple[int, str]], shard: int, donor: Checkpoint, tmp_path: Path
) -> None:
    tensors = {f"t{i}": torch.arange(n).to(getattr(torch, dtype)) for i, (n, dtype) in enumerate(sizes)}
    for name in ("once", "stream"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    once = write_checkpoint(tensors, donor, tmp_path / "once", max_shard_bytes=shard)
    stream = write_checkpoint(
        iter(tensors.items()), donor, tmp_path / "stream", layout=layout_of(tensors), max_shard_bytes=shard
    )
    assert names(once) == names(stream)
    assert all((once / name).read_bytes() == (stream / name).read_bytes() for name in names(once))


def test_a_stream_is_taken_as_it_is_written_not_a_shard_at_a_time(donor: Checkpoint, tmp_path: Path) -> None:
    alive = most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal alive, most

        def gone() -> None:
            nonlocal alive
            alive -= 1

        for i in range(40):
            tensor = torch.full((1 << 16,), float(i))
            alive += 1
            most = max(most, alive)
            weakref.finalize(tensor.untyped_storage(), gone)
            yield str(i), tensor
            del tensor

    layout = [Planned(str(i), "F32", (1 << 16,)) for i in range(40)]
    write_checkpoint(stream(), donor, tmp_path / "out", layout=layout)
    assert most <= 6


@pytest.mark.parametrize("fault", ["other shape", "too few", "too many", "other order"])
def test_a_stream_that_is_not_its_layout_is_a_fault_and_leaves_nothing(
    fault: str, donor: Checkpoint, tmp_path: Path
) -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(4)}
    layout = layout_of(tensors)
    given_tensors = {
        "other shape": {"a": torch.ones(3), "b": torch.ones(5)},
        "too few": {"a": torch.ones(3)},
        "too many": {**tensors, "c": torch.ones(1)},
        "other order": {"b": tensors["b"], "a": tensors["a"]},
    }[fault]
    with pytest.raises(ValueError, match="layout"):
        write_checkpoint(iter(given_tensors.items()), donor, tmp_path / "out", layout=layout)
    assert names(tmp_path) == ["donor"]


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (float("-inf"), "bfloat16")])
def test_a_tensor_that_is_not_finite_is_refused_where_that_is_asked_for(
    value: float, dtype: str, donor: Checkpoint, tmp_path: Path
) -> None:
    tensors = {"good": torch.ones(3), "bad": torch.tensor([1.0, value, value]).to(getattr(torch, dtype))}
    with pytest.raises(UserError, match=f"tensor 'bad': 2 merged values are NaN or infinite in {dtype}"):
        write_checkpoint(tensors, donor, tmp_path / "out", finite=True)
    assert names(tmp_path) == ["donor"]
    write_checkpoint(tensors, donor, tmp_path / "out")


def test_files_that_depend_on_the_tensors_are_made_after_them(donor: Checkpoint, tmp_path: Path) -> None:
    seen: list[str] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in TENSORS.items():
            seen.append(name)
            yield name, tensor

    out = write_checkpoint(stream(), donor, tmp_path / "out", extra_files=lambda: {"seen.txt": " ".join(seen)})
    assert (out / "seen.txt").read_text() == " ".join(TENSORS)
    with pytest.raises(ValueError, match="expected a plain file name"):
        write_checkpoint(TENSORS, donor, tmp_path / "bad", extra_files=lambda: {"../x": ""})
    assert names(tmp_path) == ["donor", "out"]


def test_a_staging_folder_that_another_process_takes_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, opened = [], os.open

    def gone_once(path: Path, *rest: int, **more: int | None) -> int:
        if not taken:
            taken.append(path)
            path.rmdir()
        return opened(path, *rest, **more)

    monkeypatch.setattr(os, "open", gone_once)
    with staging_folder(tmp_path / "out") as folder:
        assert folder.is_dir()
        assert folder != taken[0]
    assert names(tmp_path) == []
