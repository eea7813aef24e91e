"""Opening, mapping, comparing and fingerprinting sound checkpoints."""

import hashlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from search.checkpoints.compatibility import check_compatible
from search.checkpoints.fingerprint import fingerprint, hash_tensors, refuse_non_finite
from search.checkpoints.reading import Checkpoint, CheckpointTensors, open_checkpoint
from search.checkpoints.tensor_bytes import TORCH_NAMES
from search.errors import CheckpointError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8}
LLAMA = {
    "model.embed_tokens.weight": torch.arange(32.0).reshape(8, 4),
    "model.layers.0.mlp.up_proj.weight": torch.ones(6, 4),
    "model.norm.weight": torch.ones(4),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MEIOSIS_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def single(folder: Path, tensors: dict[str, torch.Tensor] = LLAMA, **config: object) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


def sharded(folder: Path, tensors: dict[str, torch.Tensor] = LLAMA) -> Checkpoint:
    """One tensor per shard, written by the library."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor.clone()}, folder / weight_map[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return open_checkpoint(folder)


def independent_hash(tensors: dict[str, torch.Tensor]) -> str:
    """The documented formula, with every element's bytes taken one by one."""
    names = {getattr(torch, theirs): ours for ours, theirs in TORCH_NAMES.items()}
    lines = ""
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        content = bytes(tensor.untyped_storage())[tensor.storage_offset() * tensor.element_size() :]
        content = content[: tensor.numel() * tensor.element_size()]
        described = [name, names[tensor.dtype], list(tensor.shape), hashlib.sha256(content).hexdigest()]
        lines += json.dumps(described) + "\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def test_a_single_file_and_its_shards_open_as_the_same_tensors(tmp_path: Path) -> None:
    one, many = single(tmp_path / "one"), sharded(tmp_path / "many")
    assert list(one.tensors) == list(many.tensors) == sorted(LLAMA)
    assert (len(one.files), len(many.files)) == (1, 3)
    assert one.nbytes == many.nbytes == sum(tensor.nbytes for tensor in LLAMA.values())
    assert one.architecture == "LlamaForCausalLM"
    for checkpoint in (one, many):
        with CheckpointTensors(checkpoint) as tensors:
            assert tensors.names == tuple(sorted(LLAMA))
            for name, expected in LLAMA.items():
                assert torch.equal(tensors.get(name), expected)
                info = checkpoint.tensors[name]
                raw = info.file.read_bytes()[info.start : info.stop]
                assert raw == expected.numpy().tobytes()


@pytest.mark.parametrize("length", [640, 1152])
def test_a_header_whose_length_looks_like_the_beginning_of_a_pickle_is_read(length: int, tmp_path: Path) -> None:
    data = torch.ones(4).numpy().tobytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, len(data)]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + data)
    assert torch.equal(load_file(file)["a"], torch.ones(4))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_opening_does_not_load_torch() -> None:
    code = (
        "import sys, search.checkpoints.reading, search.checkpoints.writing, cluster.shards;"
        "print([name for name in ('torch', 'ray', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_may_be_relative_and_its_checkpoint_is_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("model").folder == tmp_path / "model"


def test_files_of_the_hub_cache_are_links_and_open(tmp_path: Path) -> None:
    blobs = single(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert fingerprint(open_checkpoint(snapshot)) == fingerprint(blobs)


def test_an_unknown_tensor_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    with (
        CheckpointTensors(single(tmp_path / "model")) as tensors,
        pytest.raises(CheckpointError, match=r"did you mean 'model\.norm\.weight'"),
    ):
        tensors.get("model.norm.wieght")


def test_writing_to_a_view_by_mistake_does_not_reach_the_file(tmp_path: Path) -> None:
    checkpoint = single(tmp_path / "model")
    CheckpointTensors(checkpoint).get("model.norm.weight").fill_(9)
    assert torch.equal(load_file(checkpoint.files[0])["model.norm.weight"], torch.ones(4))
    assert fingerprint(checkpoint).sha256 == hash_tensors(LLAMA)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_reading_every_tensor_takes_no_private_memory(tmp_path: Path) -> None:
    """The pages are shared with every other process that maps the file, here one more."""
    size = 96 << 20
    checkpoint = single(tmp_path / "model", {f"layer.{i}": torch.ones(size // 16) for i in range(4)})
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_READER, str(checkpoint.files[0])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mapped\n"
        tensors = CheckpointTensors(checkpoint)
        views = [tensors.get(name) for name in tensors.names[:1]]
        assert float(views[0][:8].sum()) == 8  # torch's own first allocations are not what is measured
        before = memory()
        views = [tensors.get(name) for name in tensors.names]
        assert sum(float(view.sum(dtype=torch.float64)) for view in views) == size / 4
        after = memory()
    finally:
        other.communicate()
    assert after["private"] - before["private"] < size / 20
    assert after["rss"] - before["rss"] > size / 2, "the pages were not read"


OTHER_READER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    sum(mapping[i] for i in range(0, len(mapping), 4096))
    print("mapped", flush=True)
    sys.stdin.read()
"""


def memory() -> dict[str, int]:
    """Private and resident bytes of this process."""
    rows = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if " kB" in line)
    kilobytes = {key: int(value.split()[0]) for key, value in rows.items()}
    return {
        "private": 1024 * (kilobytes["Private_Dirty"] + kilobytes["Private_Clean"]),
        "rss": 1024 * kilobytes["Rss"],
    }


ALL_DTYPES = sorted(TORCH_NAMES)


def sample(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Finite numbers of any dtype, with every bit in use where that is possible."""
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(np.asarray(rng.uniform(1, 100, shape)))
    return values.to(getattr(torch, TORCH_NAMES[dtype]))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_dtype_hashes_as_the_formula_says_from_file_and_from_memory(dtype: str, tmp_path: Path) -> None:
    tensors = {"b": sample(dtype, (3, 5)), "a": sample(dtype, ()), "z": sample(dtype, (0, 2))}
    if dtype == "F8_E8M0":  # the library's torch writer does not know it yet
        pytest.importorskip("torch", "2.7")
        from search.checkpoints.writing import write_checkpoint

        checkpoint = open_checkpoint(write_checkpoint(tensors, single(tmp_path / "donor"), tmp_path / "model"))
    else:
        checkpoint = single(tmp_path / "model", tensors)
    found = fingerprint(checkpoint)
    assert found.sha256 == hash_tensors(tensors) == independent_hash(tensors)
    assert found.non_finite == ()
    opened = CheckpointTensors(checkpoint)
    for name, expected in tensors.items():
        assert opened.get(name).dtype == expected.dtype
        assert hash_tensors({"x": opened.get(name)}) == hash_tensors({"x": expected})


def test_the_hash_does_not_depend_on_sharding_order_or_layout_in_memory(tmp_path: Path) -> None:
    one, many = single(tmp_path / "one"), sharded(tmp_path / "many")
    strided = {name: tensor.t().contiguous().t() for name, tensor in reversed(LLAMA.items()) if tensor.ndim == 2}
    strided["model.norm.weight"] = torch.ones(8)[::2]
    assert fingerprint(one).sha256 == fingerprint(many).sha256 == hash_tensors(strided) == hash_tensors(LLAMA)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_hash_changes_with_any_name_dtype_shape_or_bit(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4, unique=True))
    tensors = {name: torch.from_numpy(np.arange(12, dtype=np.int32)) + i for i, name in enumerate(names)}
    before = hash_tensors(tensors)
    assert before == independent_hash(tensors)
    name = data.draw(st.sampled_from(names))
    change = data.draw(st.sampled_from(["name", "dtype", "shape", "bit", "swap"]))
    changed = dict(tensors)
    if change == "name":
        changed[name + "'"] = changed.pop(name)
    elif change == "dtype":
        changed[name] = changed[name].view(torch.uint32)
    elif change == "shape":
        changed[name] = changed[name].reshape(3, 4)
    elif change == "bit":
        changed[name] = changed[name] ^ (torch.arange(12) == data.draw(st.integers(0, 11)))
    else:
        changed = dict(zip(names, [tensors[names[-1]], *[tensors[n] for n in names[:-1]]], strict=True))
        if len(names) == 1:
            return
    assert hash_tensors(changed) != before


@pytest.mark.parametrize("dtype", [name for name in ALL_DTYPES if name.startswith(("F", "BF", "C"))])
def test_non_finite_elements_are_counted_as_torch_counts_them(dtype: str, tmp_path: Path) -> None:
    """Every bit pattern of the 8- and 16-bit types, random and special ones of the wider types."""
    torch_dtype = getattr(torch, TORCH_NAMES[dtype])
    rng = np.random.default_rng(0)
    width = torch.empty(0, dtype=torch_dtype).element_size()
    if width == 1:
        patterns = torch.arange(256, dtype=torch.uint8).view(torch_dtype)
    elif width == 2:
        patterns = torch.from_numpy(np.arange(1 << 16).astype(np.uint16)).view(torch_dtype)
    else:
        special = torch.tensor([np.nan, -np.nan, np.inf, -np.inf, np.finfo(np.float32).max, 0.0, 1e-45])
        noise = torch.from_numpy(rng.integers(0, 256, 80_000 * width, dtype=np.uint8)).view(torch_dtype)
        patterns = torch.cat([noise, special.to(torch_dtype)])
    real = torch.view_as_real(patterns).double() if dtype == "C64" else patterns.double()
    nans, infinities = int(real.isnan().sum()), int(real.isinf().sum())
    assert nans + infinities > 0
    from search.checkpoints.writing import write_checkpoint

    tensors = {"bad": patterns, "good": torch.ones(3)}
    found = fingerprint(open_checkpoint(write_checkpoint(tensors, single(tmp_path / "donor"), tmp_path / "model")))
    assert (found.nans, found.infinities, found.non_finite) == (nans, infinities, ("bad",))
    with pytest.raises(CheckpointError, match=r"model 'mine'.*in 1 tensor, first in 'bad'"):
        refuse_non_finite("mine", found)


def test_a_non_finite_element_is_found_wherever_it_lies(tmp_path: Path) -> None:
    """Chunks of a large tensor must meet without a gap."""
    donor = single(tmp_path / "donor")
    size = (1 << 18) // 4 * 3 + 5
    for number, position in enumerate([0, (1 << 16) - 1, 1 << 16, size - 1]):
        tensor = torch.zeros(size)
        tensor[position] = float("inf")
        found = fingerprint(single(tmp_path / f"model{number}", {"a": tensor}))
        assert (found.non_finite, found.infinities) == (("a",), 1)
    refuse_non_finite("donor", fingerprint(donor))


def test_progress_comes_in_tenths_and_only_where_it_takes_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = sharded(tmp_path / "model", {f"layer.{i}": torch.ones(1 << 17) for i in range(7)})
    lines: list[str] = []
    fingerprint(checkpoint, cache=False, report=lines.append)
    assert lines == []
    monkeypatch.setattr("search.checkpoints.byte_progress.QUIET_BYTES", 0)
    for _ in range(2):  # hashed, then from the cache
        lines.clear()
        fingerprint(checkpoint, report=lines.append)
        assert 5 <= len(lines) <= 10
        assert lines[-1] == f"hashing {checkpoint.folder}: 100% of 0.0 GiB"


def test_the_cache_is_used_until_the_file_changes(tmp_path: Path) -> None:
    checkpoint = single(tmp_path / "model")
    first = fingerprint(checkpoint)
    cache = tmp_path / "cache" / "fingerprints.json"
    content = json.loads(cache.read_text())
    (entry,) = content["files"].values()
    entry["tensors"]["model.norm.weight"][0] = "0" * 64
    cache.write_text(json.dumps(content))
    assert fingerprint(checkpoint).sha256 != first.sha256, "the cache was not asked"
    assert fingerprint(checkpoint, cache=False) == first
    file, status = checkpoint.files[0], checkpoint.files[0].stat()
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # the change time still tells
    changed = fingerprint(checkpoint)
    assert changed.sha256 == hash_tensors(load_file(file)) != first.sha256


@pytest.mark.parametrize(
    "spoil",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 99, "files": {}}',
        '{"version": 1, "files": {"PATH": 3}}',
        '{"version": 1, "files": {"PATH": {"identity": IDENTITY, "tensors": {"model.norm.weight": 1}}}}',
        '{"version": 1, "files": []}',
        "\x80",
    ],
)
def test_a_spoilt_cache_is_ignored_and_made_anew(spoil: str, tmp_path: Path) -> None:
    checkpoint = single(tmp_path / "model")
    first = fingerprint(checkpoint)
    cache = tmp_path / "cache" / "fingerprints.json"
    ((path, entry),) = json.loads(cache.read_text())["files"].items()
    cache.write_bytes(spoil.replace("PATH", path).replace("IDENTITY", json.dumps(entry["identity"])).encode("latin-1"))
    assert fingerprint(checkpoint) == first
    assert json.loads(cache.read_text())["files"] == {path: entry}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = single(tmp_path / "model")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEIOSIS_CACHE", str(tmp_path / "file" / "below"))
    assert fingerprint(checkpoint).sha256 == hash_tensors(LLAMA)


def test_files_that_are_gone_leave_the_cache(tmp_path: Path) -> None:
    old = single(tmp_path / "old")
    fingerprint(old)
    old.files[0].unlink()
    fingerprint(single(tmp_path / "new"))
    files = json.loads((tmp_path / "cache" / "fingerprints.json").read_text())["files"]
    assert list(files) == [str(tmp_path / "new" / "model.safetensors")]


def test_a_fine_tune_in_another_float_dtype_is_compatible(tmp_path: Path) -> None:
    base = single(tmp_path / "base")
    half = single(tmp_path / "half", {name: tensor.bfloat16() for name, tensor in LLAMA.items()})
    check_compatible(base, {"half": half, "same": sharded(tmp_path / "same")})


def replaced(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    named = {
        "embed": "model.embed_tokens.weight",
        "up": "model.layers.0.mlp.up_proj.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
    }
    tensors = LLAMA | {named[key]: value for key, value in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        (LLAMA, {"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel', the base"),
        (LLAMA, {"architectures": None}, "architecture None, the base"),
        (LLAMA, {"model_type": "mistral"}, "model_type 'mistral', the base"),
        (replaced(up=torch.ones(5, 4)), {}, ".up_proj.weight' has shape [5, 4], the base has [6, 4]"),
        (replaced(norm=None), {}, "has no tensor 'model.norm.weight' of shape [4], which the base has"),
        (LLAMA | {"score.weight": torch.ones(2, 4)}, {}, "has an extra tensor 'score.weight' of shape [2, 4]"),
        (replaced(norm=torch.ones(4).int()), {}, "norm.weight' of shape [4] holds I32, the base holds F32"),
        (replaced(embed=torch.ones(9, 4)), {"vocab_size": 9}, "a vocabulary of 9 tokens, the base of 8"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "is quantised ('gptq')"),
    ],
)  # fmt: skip
def test_a_source_that_does_not_fit_is_one_line_with_its_name(
    tensors: dict[str, torch.Tensor], config: dict[str, object], expected: str, tmp_path: Path
) -> None:
    base = single(tmp_path / "base")
    with pytest.raises(CheckpointError) as caught:
        check_compatible(base, {"good": base, "odd": single(tmp_path / "odd", tensors, **config)})
    (line,) = str(caught.value).splitlines()
    assert line.startswith("source 'odd': ")
    assert expected in line


def test_the_faults_of_all_sources_come_at_once_and_are_limited(tmp_path: Path) -> None:
    many = {f"layer.{i}": torch.ones(4) for i in range(20)}
    base = single(tmp_path / "base", many)
    wide = single(tmp_path / "wide", {name: torch.ones(5) for name in many})
    less = single(tmp_path / "less", {name: many[name] for name in list(many)[1:]})
    with pytest.raises(CheckpointError) as caught:
        check_compatible(base, {"wide": wide, "less": less})
    lines = str(caught.value).splitlines()
    assert [line.split("'")[1] for line in lines] == ["wide"] * 6 + ["less"]
    assert "and 15 more" in lines[5]


def test_mapping_shows_the_file_not_a_copy(tmp_path: Path) -> None:
    """The address of a view lies in a mapping of the file."""
    checkpoint = single(tmp_path / "model", {"a": torch.ones(mmap.PAGESIZE)})
    tensors = CheckpointTensors(checkpoint)
    address = tensors.get("a").data_ptr()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux")
    for line in maps.read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            assert line.endswith(str(checkpoint.files[0]))
            return
    raise AssertionError("the tensor lies in no mapping")
