"""The evaluator of image models, on real tiny ViTs and ResNets and the digits of scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from evaluators.base import ITEM_POOLS, Context, EvaluatorSpec, Scores
from evaluators.errors import UserError
from evaluators.registry import make_evaluator
from evaluators.testing import EvaluatorContract


def digits(count: int = 120) -> tuple[np.ndarray, np.ndarray]:
    found = load_digits()
    return (found.images[:count] * 15.9).astype(np.uint8), found.target[:count].astype(np.int64)


def write_digits(path: Path, count: int = 120) -> Path:
    x, y = digits(count)
    np.savez(path, x=x, y=y)
    return path


def make_model(kind: str, folder: Path, **settings: Any) -> torch.nn.Module:
    """A random model for images of 8 x 8 in one channel, as a checkpoint folder and loaded from it."""
    import transformers

    common = {"num_channels": 1, **settings}
    if kind.startswith("ViT"):
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8,
            patch_size=4, initializer_range=0.3, **common,
        )  # fmt: skip
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], **common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, kind)(config).save_pretrained(folder)
    return getattr(transformers, kind).from_pretrained(folder, local_files_only=True).eval()


def write_head(path: Path, features: int, classes: int = 10, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    weight, bias = random.normal(size=(classes, features)), random.normal(size=classes)
    save_file({"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}, path)
    return path


def evaluator_of(folder: Path, **options: Any) -> Any:
    return make_evaluator(EvaluatorSpec("images", "image_classification", options), folder)


def score(evaluator: Any, model: torch.nn.Module, folder: Path, pool: Any = "search") -> Scores:
    evaluator.check()
    evaluator.prepare(Context(folder))
    with torch.no_grad():
        return Scores.join(list(evaluator.evaluate(model, evaluator.items(pool))))


class ImagesContract(EvaluatorContract):
    use = "image_classification"
    kind: ClassVar[str]
    features: ClassVar[int | None] = None

    def make_evaluator(self, folder: Path) -> Any:
        options: dict[str, Any] = {"data": str(write_digits(folder / "digits.npz")), "batch_size": 32}
        if self.features:
            options["head"] = str(write_head(folder / "head.safetensors", self.features))
        return evaluator_of(folder, **options)

    def make_model(self, folder: Path) -> torch.nn.Module:
        return make_model(self.kind, folder, **({} if self.features else {"num_labels": 10}))


class TestContractOfViTClassifier(ImagesContract):
    kind = "ViTForImageClassification"


class TestContractOfViTBackbone(ImagesContract):
    kind = "ViTModel"
    features = 16


class TestContractOfResNetBackbone(ImagesContract):
    kind = "ResNetModel"
    features = 12


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ResNetForImageClassification"])
def test_a_classifier_gets_the_scores_of_its_own_logits(kind: str, tmp_path: Path) -> None:
    model = make_model(kind, tmp_path / "model", num_labels=10)
    evaluator = evaluator_of(tmp_path, data=str(write_digits(tmp_path / "d.npz")), batch_size=7)
    found = score(evaluator, model, tmp_path / "model")
    x, y = digits()
    rows = [int(item.rpartition(":")[2]) for item in found.items]
    with torch.no_grad():
        logits = model(pixel_values=torch.from_numpy(x[rows]).float()[:, None] / 127.5 - 1).logits.double().numpy()
    likelihoods = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.array_equal(found.values["accuracy"], (logits.argmax(1) == y[rows]).astype(float))
    np.testing.assert_allclose(found.values["nll"], -np.log(likelihoods[np.arange(len(rows)), y[rows]]), rtol=1e-4)


@pytest.mark.parametrize(("kind", "pool"), [("ViTModel", "mean"), ("ViTModel", "cls"), ("ResNetModel", "auto")])
def test_a_fitted_head_reads_the_features_that_it_was_fitted_on(kind: str, pool: str, tmp_path: Path) -> None:
    """The head is scikit-learn's, whose own accuracy on the same features is the reference."""
    model = make_model(kind, tmp_path / "model")
    x, y = digits(600)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    with torch.no_grad():
        output = model(pixel_values=torch.from_numpy(x).float()[:, None] / 127.5 - 1)
    if pool == "auto":
        features = output.pooler_output[:, :, 0, 0].numpy()
    else:
        features = (
            output.last_hidden_state[:, 1:].mean(1) if pool == "mean" else output.last_hidden_state[:, 0]
        ).numpy()
    fitted = LogisticRegression(max_iter=500).fit(features, y)
    head = tmp_path / "head.safetensors"
    weight = np.ascontiguousarray(fitted.coef_, dtype=np.float32)  # safetensors writes the memory as it lies
    save_file({"weight": weight, "bias": fitted.intercept_.astype(np.float32)}, head)
    evaluator = evaluator_of(tmp_path, data="d.npz", head=str(head), pool=pool)
    found = score(evaluator, model, tmp_path / "model")
    rows = [int(item.rpartition(":")[2]) for item in found.items]
    assert found.values["accuracy"].mean() == pytest.approx(fitted.score(features[rows], y[rows]), abs=0.005)
    assert found.values["accuracy"].mean() > 0.3


def test_three_pools_from_three_places_and_the_same_pictures_as_files(tmp_path: Path) -> None:
    import PIL.Image

    model = make_model("ViTForImageClassification", tmp_path / "model", num_labels=10)
    x, y = digits(90)
    for number, pool in enumerate(ITEM_POOLS):
        part = slice(30 * number, 30 * number + 30)
        np.savez(tmp_path / f"{pool}.npz", x=x[part], y=y[part])
        for index, (image, label) in enumerate(zip(x[part], y[part], strict=True)):
            (tmp_path / pool / str(label)).mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image).save(tmp_path / pool / str(label) / f"{index}.png")
    arrays = evaluator_of(tmp_path, data={pool: f"{pool}.npz" for pool in ITEM_POOLS})
    names = [str(digit) for digit in range(10)]
    files = evaluator_of(tmp_path, data={pool: pool for pool in ITEM_POOLS}, classes=names)
    assert [len(arrays.items(pool)) for pool in ITEM_POOLS] == [30, 30, 30]
    for pool in ITEM_POOLS:
        one, other = (score(evaluator, model, tmp_path / "model", pool) for evaluator in (arrays, files))
        np.testing.assert_allclose(np.sort(one.values["nll"]), np.sort(other.values["nll"]), rtol=1e-6)
    assert {path.name for path in arrays.files()} == {"search.npz", "select.npz", "certify.npz"}


def test_images_are_scaled_and_coloured_as_the_model_wants_them(tmp_path: Path) -> None:
    model = make_model("ViTForImageClassification", tmp_path / "model", num_labels=10, num_channels=3)
    x, y = digits()
    np.savez(tmp_path / "large.npz", x=x.repeat(2, axis=1).repeat(2, axis=2)[..., None].repeat(3, axis=3), y=y)
    write_digits(tmp_path / "small.npz")
    large, small = (
        evaluator_of(tmp_path, data={"search": name, "select": name, "certify": name})
        for name in ("large.npz", "small.npz")
    )
    # The same data in all pools is refused, so give them by hand.
    with pytest.raises(UserError, match="the same content"):
        small.check()
    large, small = (evaluator_of(tmp_path, data=name) for name in ("large.npz", "small.npz"))
    found = {}
    for evaluator in (large, small):
        evaluator.prepare(Context(tmp_path / "model"))
        scores = Scores.join(list(evaluator.evaluate(model, [i for pool in ITEM_POOLS for i in evaluator.items(pool)])))
        found[evaluator] = dict(
            zip((int(i.rpartition(":")[2]) for i in scores.items), scores.values["nll"], strict=True)
        )
    # A block of four equal pixels is that pixel again, but for what antialiasing takes from its neighbours.
    one, other = ([found[evaluator][row] for row in range(120)] for evaluator in (large, small))
    assert np.corrcoef(one, other)[0, 1] > 0.95


def test_the_data_hash_sees_images_labels_and_head(tmp_path: Path) -> None:
    def hash_of(change: str) -> str:
        x, y = digits()
        if change == "pixel":
            x[3, 2, 2] ^= 1
        if change == "label":
            y[3] = (y[3] + 1) % 10
        np.savez(tmp_path / "d.npz", x=x, y=y)
        write_head(tmp_path / "h.safetensors", 16, seed=int(change == "head"))
        return evaluator_of(tmp_path, data="d.npz", head="h.safetensors").data_sha256()

    found = [hash_of(change) for change in ("", "pixel", "label", "head", "")]
    assert len(set(found)) == 4
    assert found[0] == found[4]


def test_mistakes_in_the_data_are_named_in_one_line(tmp_path: Path) -> None:
    x, y = digits()
    head = str(write_head(tmp_path / "five.safetensors", 16, classes=5))
    np.savez(tmp_path / "good.npz", x=x, y=y)
    np.savez(tmp_path / "float.npz", x=x / 255, y=y)
    np.savez(tmp_path / "flat.npz", x=x.reshape(len(x), -1), y=y)
    np.savez(tmp_path / "short.npz", x=x, y=y[:-1])
    np.savez(tmp_path / "negative.npz", x=x, y=y - 1)
    np.savez(tmp_path / "names.npz", images=x, labels=y)
    np.savez(tmp_path / "words.npz", x=x, y=y.astype(str))
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for data, message in {
        "float.npz": "float64, expected uint8",
        "flat.npz": r"shape \(120, 64\), expected",
        "short.npz": "120 images and 119 labels",
        "negative.npz": "label -1 of image 0 is negative",
        "names.npz": "no array 'x'; .* found 'images', 'labels'",
        "words.npz": "expected whole numbers",
        "torn.npz": "cut short",
        "empty.npz": "cut short",
        "absent.npz": "no such file",
        "folder": "no sub-folders",
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            evaluator_of(tmp_path, data=data).check()
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"label \d, but the head .* has 5 classes: 0 to 4"):
        evaluator_of(tmp_path, data="good.npz", head=head).check()


def test_mistakes_in_the_head_are_named_in_one_line(tmp_path: Path) -> None:
    write_digits(tmp_path / "d.npz")
    model = make_model("ViTModel", tmp_path / "model")
    good = write_head(tmp_path / "good.safetensors", 16)
    (tmp_path / "torn.safetensors").write_bytes(good.read_bytes()[:100])
    save_file({"weight": np.zeros((10, 16), np.float32), "bias": np.zeros(9, np.float32)}, tmp_path / "b.safetensors")
    save_file({"kernel": np.zeros((10, 16), np.float32)}, tmp_path / "k.safetensors")
    save_file({"weight": np.full((10, 16), np.nan, np.float32)}, tmp_path / "n.safetensors")
    for head, message in {
        "torn.safetensors": "not a readable safetensors file",
        "b.safetensors": r"'bias' has shape \(9,\)",
        "k.safetensors": "holds kernel; expected 'weight'",
        "n.safetensors": "not finite",
        "absent.safetensors": "no such file",
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            evaluator_of(tmp_path, data="d.npz", head=head).check()
        assert "\n" not in str(raised.value)
    write_head(tmp_path / "wide.safetensors", 17)
    with pytest.raises(UserError, match="takes 17 features, the model gives 16"):
        score(evaluator_of(tmp_path, data="d.npz", head="wide.safetensors"), model, tmp_path / "model")


def test_a_head_is_for_backbones_and_none_for_classifiers(tmp_path: Path) -> None:
    write_digits(tmp_path / "d.npz")
    write_head(tmp_path / "h.safetensors", 16)
    assert "ViTModel".endswith(evaluator_of(tmp_path, data="d.npz", head="h.safetensors").architectures)
    assert not "ViTModel".endswith(evaluator_of(tmp_path, data="d.npz").architectures)
    assert "ViTForImageClassification".endswith(evaluator_of(tmp_path, data="d.npz").architectures)


def test_folders_with_other_classes_than_the_first_are_refused(tmp_path: Path) -> None:
    import PIL.Image

    for pool, names in {"search": "ab", "select": "ab", "certify": "ac"}.items():
        for name in names:
            (tmp_path / pool / name).mkdir(parents=True)
            PIL.Image.fromarray(np.full((4, 4), 9 * len(pool) + ord(name), np.uint8)).save(
                tmp_path / pool / name / "1.png"
            )
    with pytest.raises(UserError, match=r"class 'c' and .*search has none"):
        evaluator_of(tmp_path, data={pool: pool for pool in ITEM_POOLS}).check()
    (tmp_path / "search" / "a" / "1.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"1\.png: not a readable picture"):
        evaluator_of(tmp_path, data={pool: pool for pool in ITEM_POOLS}).check()
