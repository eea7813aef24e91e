"""What every evaluator must do, as tests that plug-in authors inherit.

In the test suite of a plug-in:

    from evaluators.testing import EvaluatorContract

    class TestMyEvaluator(EvaluatorContract):
        def make_evaluator(self, folder):
            (folder / "items.jsonl").write_text(...)
            return MyEvaluator(MyEvaluator.Options(data=folder / "items.jsonl"))

pytest then runs all tests below on it, with a tiny random language model; override `make_model` for
evaluators of other models. Needs pytest, which Meiosis itself does not.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from evaluators.base import ITEM_POOLS, Context, Evaluator, Metric, Scores

if TYPE_CHECKING:
    import torch

TINY_CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "A merge of models is a point between them; evolution finds where.",
)
TINY_POSITIONS = 64


def write_tiny_language_model(folder: Path, seed: int = 0) -> Path:
    """A Llama with random weights and 64 positions, and its byte-level tokenizer, as a checkpoint folder.

    The same seed gives the same weights; the global random state is left alone.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TINY_CORPUS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_POSITIONS,
        initializer_range=0.2,  # far from uniform predictions, so that wrong likelihoods show
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load_language_model(folder: Path) -> torch.nn.Module:
    """The model of a checkpoint folder in eval mode, on the CPU."""
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.eval()


def by_item(scores: Scores) -> dict[str, tuple[float, ...]]:
    """Item -> its values and weight, whatever the order of the items."""
    columns = [*(scores.values[name] for name in sorted(scores.values)), scores.weights]
    return {item: tuple(float(column[i]) for column in columns) for i, item in enumerate(scores.items)}


class EvaluatorContract:
    """Subclass it as `Test...` and define `make_evaluator`."""

    def make_evaluator(self, folder: Path) -> Evaluator:
        """A fresh evaluator, not prepared, with items in every pool; `folder` is there for files.

        Called several times for one test: the data must be the same each time.
        """
        raise NotImplementedError

    def make_model(self, folder: Path) -> torch.nn.Module:
        """Write a checkpoint to `folder`, where `Context.model_folder` points, and return its model."""
        return load_language_model(write_tiny_language_model(folder))

    @pytest.fixture
    def model_folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("model")

    @pytest.fixture
    def model(self, model_folder: Path) -> torch.nn.Module:
        import torch

        torch.set_num_threads(1)
        return self.make_model(model_folder)

    @pytest.fixture
    def evaluator(self, tmp_path: Path, model: torch.nn.Module, model_folder: Path) -> Evaluator:
        """Checked and prepared."""
        return self._prepared(tmp_path, model_folder)

    def _prepared(self, folder: Path, model_folder: Path) -> Evaluator:
        evaluator = self.make_evaluator(folder)
        evaluator.check()
        evaluator.prepare(Context(model_folder, device="cpu", seed=7))
        return evaluator

    def _score(self, evaluator: Evaluator, model: torch.nn.Module, items: Sequence[str]) -> Scores:
        import torch

        with torch.no_grad():
            return Scores.join(list(evaluator.evaluate(model, items)))

    def test_metrics_and_options_are_described(self, tmp_path: Path) -> None:
        evaluator = self.make_evaluator(tmp_path)
        assert type(evaluator).help, "set the class attribute `help`"
        assert evaluator.metrics
        for name, metric in evaluator.metrics.items():
            assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name), f"metric name {name!r}"
            assert isinstance(metric, Metric)
        for key, field in type(evaluator).Options.model_fields.items():
            assert field.description, f"option '{key}' has no description"

    def test_options_mean_the_same_after_a_round_trip_in_another_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        evaluator = self.make_evaluator(tmp_path)
        plain = evaluator.options.model_dump(mode="json")
        monkeypatch.chdir(tmp_path.anchor)
        assert type(evaluator).Options.model_validate(plain) == evaluator.options

    def test_check_needs_no_torch(self, tmp_path: Path) -> None:
        evaluator = self.make_evaluator(tmp_path)
        kind = type(evaluator)
        try:
            found = importlib.util.find_spec(kind.__module__) is not None
        except (ImportError, ValueError):  # a test module that pytest loaded by its path
            found = False
        if not found:
            pytest.skip(f"module {kind.__module__} cannot be imported by name")
        program = (
            "import importlib, sys\n"
            f"kind = getattr(importlib.import_module({kind.__module__!r}), {kind.__name__!r})\n"
            "evaluator = kind(kind.Options.model_validate_json(sys.stdin.read()))\n"
            "evaluator.check(); evaluator.data_sha256()\n"
            "heavy = {'torch', 'transformers', 'ray'} & set(sys.modules)\n"
            "sys.exit(f'check() imports {heavy}' if heavy else 0)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=evaluator.options.model_dump_json(),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr

    def test_data_hash_is_the_same_for_the_same_data(self, tmp_path: Path) -> None:
        first, second = (self.make_evaluator(tmp_path).data_sha256() for _ in range(2))
        assert first == second
        assert re.fullmatch("[0-9a-f]{64}", first)

    def test_pools_are_disjoint_and_so_are_their_documents(self, evaluator: Evaluator) -> None:
        items = [item for pool in ITEM_POOLS for item in evaluator.items(pool)]
        assert len(set(items)) == len(items)
        documents = [{evaluator.document_of(item) for item in evaluator.items(pool)} for pool in ITEM_POOLS]
        assert all(documents), "every pool needs items"
        assert sum(map(len, documents)) == len(set().union(*documents))

    def test_items_have_the_same_order_in_every_worker(
        self, evaluator: Evaluator, tmp_path: Path, model_folder: Path
    ) -> None:
        other = self._prepared(tmp_path, model_folder)
        for pool in ITEM_POOLS:
            assert list(evaluator.items(pool)) == list(other.items(pool))

    def test_every_item_is_scored_once_with_every_metric(self, evaluator: Evaluator, model: torch.nn.Module) -> None:
        per_item = {name for name, metric in evaluator.metrics.items() if metric.per_item}
        for pool in ITEM_POOLS:
            scores = self._score(evaluator, model, evaluator.items(pool))
            assert sorted(scores.items) == sorted(evaluator.items(pool))
            assert set(scores.values) == per_item
            assert {len(scores.weights), *map(len, scores.values.values())} == {len(scores.items)}
            assert (scores.weights > 0).all()

    def test_values_are_finite_and_within_the_declared_bounds(
        self, evaluator: Evaluator, model: torch.nn.Module
    ) -> None:
        scores = self._score(evaluator, model, evaluator.items("search"))
        found = {**scores.values, **{k: np.array([v]) for k, v in evaluator.aggregate(scores).items()}}
        for name, values in found.items():
            assert np.isfinite(values).all(), name
            assert evaluator.metrics[name].low is None or (values >= evaluator.metrics[name].low).all(), name
            assert evaluator.metrics[name].high is None or (values <= evaluator.metrics[name].high).all(), name

    def test_metrics_are_weighted_means_of_the_items(self, evaluator: Evaluator, model: torch.nn.Module) -> None:
        scores = self._score(evaluator, model, evaluator.items("search"))
        aggregate = evaluator.aggregate(scores)
        assert set(aggregate) == set(evaluator.metrics)
        for name, metric in evaluator.metrics.items():
            if metric.per_item:
                expected = np.average(scores.values[name], weights=scores.weights)
                assert math.isclose(aggregate[name], expected, rel_tol=1e-9, abs_tol=1e-12)

    def test_a_declared_loss_is_its_metric_and_has_a_gradient(
        self, evaluator: Evaluator, model: torch.nn.Module
    ) -> None:
        if not evaluator.loss_metric:
            return
        import torch

        items = evaluator.items("search")
        expected = evaluator.aggregate(self._score(evaluator, model, items))[evaluator.loss_metric]
        parameters = list(model.parameters())
        before = [parameter.requires_grad for parameter in parameters]
        try:
            model.requires_grad_(True)
            pairs = []
            with torch.enable_grad():
                for loss, weight in evaluator.losses(model, items):
                    loss.backward()
                    pairs.append((float(loss.detach()), weight))
            assert any(parameter.grad is not None for parameter in parameters)
        finally:
            for parameter, wanted in zip(parameters, before, strict=True):
                parameter.requires_grad_(wanted).grad = None
        mean = math.fsum(loss for loss, _ in pairs) / math.fsum(weight for _, weight in pairs)
        assert mean == pytest.approx(expected, rel=1e-4)

    def test_doubling_all_weights_changes_no_metric(self, evaluator: Evaluator, model: torch.nn.Module) -> None:
        """The bootstrap counts an item that is drawn twice by doubling its weight."""
        scores = self._score(evaluator, model, evaluator.items("search"))
        twice = Scores(scores.items, scores.values, 2 * scores.weights)
        assert evaluator.aggregate(twice) == pytest.approx(evaluator.aggregate(scores))

    def test_another_worker_gets_the_same_bits_whatever_its_random_state(
        self, evaluator: Evaluator, model: torch.nn.Module, tmp_path: Path, model_folder: Path
    ) -> None:
        import torch

        items = evaluator.items("search")
        first = by_item(self._score(evaluator, model, items))
        other = self._prepared(tmp_path, model_folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12345)
            assert by_item(self._score(other, model, items)) == first
        assert by_item(self._score(evaluator, model, items)) == first

    def test_the_order_in_which_items_are_given_does_not_change_a_bit(
        self, evaluator: Evaluator, model: torch.nn.Module
    ) -> None:
        items = list(evaluator.items("search"))
        assert by_item(self._score(evaluator, model, items[::-1])) == by_item(self._score(evaluator, model, items))

    def test_an_evaluation_may_be_left_early(self, evaluator: Evaluator, model: torch.nn.Module) -> None:
        items = evaluator.items("search")
        expected = by_item(self._score(evaluator, model, items))
        running = evaluator.evaluate(model, items)
        next(running)
        getattr(running, "close", lambda: None)()
        assert by_item(self._score(evaluator, model, items)) == expected

    def test_the_model_is_left_as_it_was(self, evaluator: Evaluator, model: torch.nn.Module) -> None:
        import torch

        before = {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict().items()}
        state = [(p.requires_grad, p.data_ptr()) for p in model.parameters()]
        modes = [module.training for module in model.modules()]
        self._score(evaluator, model, evaluator.items("search"))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name][0]), name
            assert tensor._version == before[name][1], f"{name} was written to"
        assert [(p.requires_grad, p.data_ptr()) for p in model.parameters()] == state
        assert all(p.grad is None for p in model.parameters())
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
