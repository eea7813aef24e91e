"""A small real family for tests: a base language model and three fine-tunes, trained here in seconds."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

DOMAINS = ("python", "english", "cpp")


def _texts() -> dict[str, list[str]]:
    """Real text of three kinds, (about 60 passages each)."""
    import argparse
    import pydoc_data.topics
    import textwrap

    import torch

    source = inspect.getsource(argparse) + inspect.getsource(textwrap)
    topics = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    include = Path(torch.__file__).parent / "include" / "c10" / "util"
    headers = "".join(path.read_text(errors="replace") for path in sorted(include.glob("[A-F]*.h")))
    cut = {"python": source, "english": topics, "cpp": headers}
    return {name: [text[i : i + 240] for i in range(2000, 2000 + 60 * 240, 240)] for name, text in cut.items()}


def _train(model: Any, tokenizer: Any, texts: list[str], steps: int, rate: float) -> None:
    import torch

    ids = tokenizer("".join(texts), return_tensors="pt").input_ids[0]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 65, (8,), generator=generator)
        batch = torch.stack([ids[s : s + 64] for s in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with base, python, english, cpp (checkpoints) and data/<domain>/<pool>.jsonl."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("family")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    texts = _texts()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text for domain in DOMAINS for text in texts[domain][:30]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>", bos_token="<eos>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        base = LlamaForCausalLM(config)
        _train(base, tokenizer, [text for domain in DOMAINS for text in texts[domain][:30]], 60, 5e-3)
        base.save_pretrained(folder / "base")
        for domain in DOMAINS:
            model = LlamaForCausalLM.from_pretrained(folder / "base")
            _train(model, tokenizer, texts[domain][:30], 30, 2e-3)
            model.save_pretrained(folder / domain)
    for name in ("base", *DOMAINS):
        tokenizer.save_pretrained(folder / name)
    for domain in DOMAINS:
        pools = {
            "search": texts[domain][30:38],
            "select": texts[domain][38:46],
            "certify": texts[domain][46:60],
        }
        for pool, passages in pools.items():
            path = folder / "data" / domain / f"{pool}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [json.dumps({"id": f"{domain}-{pool}-{i}", "text": text}) for i, text in enumerate(passages)]
            path.write_text("\n".join(rows) + "\n")
    torch.set_num_threads(threads)
    return folder


def config_of(family: Path, results: Path) -> dict[str, Any]:
    """A config over the family that searches in seconds, in this process."""
    return {
        "name": "tiny",
        "seed": 0,
        "models": {"base": str(family / "base"), "sources": {name: str(family / name) for name in DOMAINS}},
        "space": {
            "operator": "task_arithmetic",
            "layers_per_group": 1,
            "split": ["embedding"],
            "parameters": {"weight": {"low": -0.2, "high": 1.2, "initial": 0.4}},
        },
        "evaluators": {
            name: {
                "use": "perplexity",
                "data": {
                    pool: str(family / "data" / name / f"{pool}.jsonl") for pool in ("search", "select", "certify")
                },
            }
            for name in DOMAINS
        },
        "objectives": {"terms": [f"{name}.nll" for name in DOMAINS], "normalize": "none"},
        "search": {"budget": 26, "finalists": 2, "optimizer": "diagonal_cma"},
        "cluster": {"pool": "local", "workers": 2, "threads": 1},
        "results": str(results),
    }


@pytest.fixture
def family_config(family: Path, tmp_path: Path) -> dict[str, Any]:
    """`config_of` with results in the test's own folder; free to be changed."""
    return config_of(family, tmp_path / "results")


def copy_of(folder: Path, to: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    shutil.copytree(folder, to)
    return to
