"""The vision samples: what the pictures promise, and a family trained for a few steps and searched."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from command_line import meiosis

from evaluators.base import ITEM_POOLS
from evaluators.errors import UserError
from meiosis.samples.pictures import SPLITS, make_album
from meiosis.samples.training import Phase
from meiosis.samples.vision import make_vision_family
from meiosis.samples.vision_card import VisionPlan, VisionShape, search_config
from search.config import parse_config
from search.yaml_source import YamlSource

TINY = VisionPlan(
    shape=VisionShape(size=16, patch=4, hidden=32, layers=2, heads=2, mlp=48),
    base=Phase(steps=100, batch=32, learning_rate=3e-3),
    task=Phase(steps=60, batch=32, learning_rate=2e-3),
    train=600,
    search=30,
    select=20,
    certify=250,
)


@pytest.fixture(scope="module")
def album():
    return make_album(None, size=16, items=TINY.items, train=600, seed=0)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A family of a few steps, and the lines that its making reported."""
    folder = tmp_path_factory.mktemp("samples") / "vision"
    lines: list[str] = []
    card = make_vision_family(folder, seed=3, report=lines.append, plan=TINY)
    return folder, card, lines


def test_there_are_eight_tasks_with_pictures_in_every_split(album):
    assert len(album.tasks) == 8
    for task in album.tasks.values():
        for split in SPLITS:
            part = task.parts[split]
            assert len(part) == {**TINY.items, "train": 600}[split]
            assert part.x.shape == (len(part), 16, 16, 3)
            assert part.x.dtype == np.uint8
            assert set(part.y) <= set(range(task.classes))


def test_no_picture_of_one_split_is_in_another(album):
    for name, task in album.tasks.items():
        found = {split: {picture.tobytes() for picture in task.parts[split].x} for split in SPLITS}
        for one, other in combinations(SPLITS, 2):
            assert not found[one] & found[other], name


def test_the_same_seed_gives_the_same_pictures_and_another_others(album):
    same, other = (make_album(None, size=16, items=TINY.items, train=600, seed=seed) for seed in (0, 1))
    for name, task in album.tasks.items():
        assert np.array_equal(task.parts["search"].x, same.tasks[name].parts["search"].x)
        assert not np.array_equal(task.parts["search"].x, other.tasks[name].parts["search"].x)


def test_every_fine_tune_is_better_at_its_task_than_the_base(family):
    _, card, _ = family
    found = card.accuracy["certify"]
    better = [found[task][task] - found["base"][task] for task in card.tasks]
    assert np.mean(better) > 0.02
    assert np.mean([gain > 0 for gain in better]) >= 0.6


def test_the_card_says_what_the_evaluators_find(family):
    from evaluators.base import Context, EvaluatorSpec, Scores
    from evaluators.registry import make_evaluator
    from search.merge.live import build_live_model

    folder, card, _ = family
    model = build_live_model(folder / "turns", device="cpu", dtype=None).model
    for task in ("turns", "noisy"):
        data = {pool: str(folder / "data" / task / f"{pool}.npz") for pool in ITEM_POOLS}
        options = {"data": data, "head": str(folder / "heads" / f"{task}.safetensors"), "pool": "mean"}
        evaluator = make_evaluator(EvaluatorSpec(task, "image_classification", options))
        evaluator.prepare(Context(folder / "base"))
        scores = Scores.join(list(evaluator.evaluate(model, evaluator.items("certify"))))
        expected = card.accuracy["certify"]["turns"][task]
        assert evaluator.aggregate(scores)["accuracy"] == pytest.approx(expected, abs=0.02)


def test_a_family_that_is_there_is_kept_and_a_damaged_one_made_anew(family):
    folder, card, _ = family
    lines: list[str] = []
    assert make_vision_family(folder, seed=3, report=lines.append, plan=TINY) == card
    assert lines == [f"{folder}: up to date"]


def test_the_config_beside_the_family_is_valid_and_searches(family, tmp_path):
    folder, card, _ = family
    (folder / "search.yaml").write_text(search_config(tuple(card.tasks)))
    settings = ["cluster.pool=local", "search.budget=22", "search.finalists=2", f"results={tmp_path}"]
    settings.append("search.baselines=[uniform_soup, {tsv_m: {scales: [0.7, 1]}}, {iso_c: {scales: [1]}}]")
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = meiosis("search", str(folder / "search.yaml"), "--run", "r", "--json", *arguments)
    assert done.status == 0, done.err
    labels = {row["label"].split(" ")[0] for row in done.json["verdict"]["rows"]}
    assert {"base", "uniform_soup", "tsv_m", "iso_c", *(f"parent:{task}" for task in card.tasks)} <= labels


def test_the_example_is_the_config_of_the_family_with_photographs():
    tasks = ("digits", "negatives", "overlays", "scans", "animals", "vehicles", "edges", "turns")
    example = Path(__file__).parent.parent / "examples" / "vision.yaml"
    assert example.read_text() == search_config(tasks, "../samples/vision")
    assert parse_config(YamlSource.read(example), example.parent).config.name == "vision"


def test_what_is_missing_or_foreign_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"mnist/train\.npz: no such file; the data folder holds"):
        make_vision_family(tmp_path / "v", data=tmp_path, plan=TINY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="not empty and holds no sample models"):
        make_vision_family(tmp_path / "mine", plan=TINY)


def data_of_noise(folder, labels):
    """Data of the right form; the pictures themselves are noise. The files of real data lie class by class."""
    import io

    import PIL.Image

    random = np.random.default_rng(0)
    for name in ("mnist", "cifar10_jpeg"):
        (folder / name).mkdir()
    for split, count in {"train": 80, "test": 60}.items():
        digits = random.integers(256, size=(count, 28, 28), dtype=np.uint8)
        np.savez(folder / "mnist" / f"{split}.npz", x=digits, y=labels(count))
        files = []
        for _ in range(count):
            buffer = io.BytesIO()
            PIL.Image.fromarray(random.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
            files.append(buffer.getvalue())
        np.savez(
            folder / "cifar10_jpeg" / f"{split}.npz",
            jpeg=np.frombuffer(b"".join(files), np.uint8),
            offset=np.cumsum([0, *map(len, files)]),
            label=labels(count),
        )


def test_a_folder_of_data_gives_digits_and_photographs(tmp_path):
    data_of_noise(tmp_path, lambda count: np.arange(count) % 10)
    album = make_album(tmp_path, size=32, items={"search": 5, "select": 5, "certify": 9}, train=20, seed=0)
    assert len(album.tasks) == 8
    assert {task.classes for task in album.tasks.values()} == {4, 6, 10}
    for task in album.tasks.values():
        # Classes are missing in such a small test set, so that some tasks have fewer pictures than asked for.
        assert all(
            0 < len(task.parts[split]) <= {"train": 20, "search": 5, "select": 5, "certify": 9}[split]
            for split in SPLITS
        )


def test_every_class_is_trained_alike_where_the_files_lie_class_by_class(tmp_path):
    data_of_noise(tmp_path, lambda count: np.sort(np.arange(count) % 10))
    album = make_album(tmp_path, size=32, items={"search": 5, "select": 5, "certify": 9}, train=10, seed=0)
    photographs = np.bincount(album.general["photos"].parts["train"].y, minlength=10)
    assert photographs.sum() == 3 * 10
    assert photographs.tolist() == [3] * 10
