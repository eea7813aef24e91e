"""An exported folder has what the hub and a conversion to GGUF need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Ended, meiosis
from family import copy_of
from recipes import recipe_of


def merged(recipe: dict[str, Any], folder: Path) -> Ended:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return meiosis("merge", path, folder / "out")


@pytest.fixture
def recipe(family: Path) -> dict[str, Any]:
    made: dict[str, Any] = recipe_of(family, "task_arithmetic").model_dump(mode="json", exclude_none=True)
    return made


def test_the_card_is_what_the_hub_reads_and_takes_over_the_license(
    recipe: dict[str, Any], family: Path, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard

    base = copy_of(family / "base", tmp_path / "models" / "base")
    license_ = {"license": "other", "license_name": "llama-x", "license_link": "https://example.org/license"}
    (base / "README.md").write_text(f"---\n{yaml.safe_dump({**license_, 'tags': ['old']})}---\n# Base\n")
    hub = tmp_path / "models--org--english" / "snapshots" / "abc"
    hub.parent.mkdir(parents=True)
    copy_of(family / "english", hub)
    recipe["models"]["base"] = {"path": "models/base"}
    recipe["models"]["english"] = {"path": str(hub)}
    assert merged(recipe, tmp_path).status == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == ["base", "python", "org/english", "cpp"]
    assert data["tags"] == ["merge", "meiosis", "task_arithmetic"]
    assert {key: data[key] for key in license_} == license_
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["base_model_relation"] == "merge"
    card.save(tmp_path / "again.md")
    assert ModelCard.load(tmp_path / "again.md").data.to_dict() == data


@pytest.mark.parametrize(
    "card", ["", "no metadata", "---\n[1, 2\n---\n", "---\n- a\n---\n", "---\nlicense: [mit]\n---\n"]
)
def test_a_base_whose_card_says_no_license_gives_none(
    card: str, recipe: dict[str, Any], family: Path, tmp_path: Path
) -> None:
    base = copy_of(family / "base", tmp_path / "base")
    (base / "README.md").write_text(card)
    recipe["models"]["base"] = {"path": "base"}
    assert merged(recipe, tmp_path).status == 0
    assert "license" not in (tmp_path / "out" / "README.md").read_text()


def _tokenizers() -> dict[str, Any]:
    """Tokenizers of the three kinds that convert_hf_to_gguf.py tells apart most often, of a few tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(97 + i): i for i in range(26)} | {"<s>": 26, "</s>": 27, "ab": 28}
    bpe = Tokenizer(models.BPE(letters, [("a", "b")], unk_token="<s>"))
    bytes_ = Tokenizer(models.BPE(letters, [("a", "b")]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    unigram = Tokenizer(models.Unigram([(token, -1.0) for token in letters], unk_id=26))
    made = {"llama": unigram, "gpt2": bpe, "qwen2": bytes_}
    return {
        name: PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
        )
        for name, tokenizer in made.items()
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_what_a_conversion_to_gguf_needs_comes_along(kind: str, tmp_path: Path) -> None:
    from transformers import (
        AutoTokenizer,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    from search.gguf import gguf_ready

    sizes = {"vocab_size": 32, "bos_token_id": 26, "eos_token_id": 27}
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2}
    make = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, **small)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**sizes, n_embd=8, n_layer=1, n_head=2, n_positions=16)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes, **small)),
    }[kind]
    tokenizer = _tokenizers()[kind]
    for name in "ab":
        make().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    # Older models have their tokens in files of their own.
    others = {"llama": ["tokenizer.model"], "gpt2": ["vocab.json", "merges.txt"], "qwen2": ["added_tokens.json"]}[kind]
    for name in [*others, "special_tokens_map.json"]:
        (tmp_path / "a" / name).write_text("{}")
    recipe = {
        "models": {name: {"path": name} for name in "ab"},
        "rules": [{"operator": "linear", "sources": {name: {"weight": 0.5} for name in "ab"}}],
        "dtype": "bfloat16",
    }
    ended = merged(recipe, tmp_path)
    assert (ended.status, ended.err) == (0, "")
    out = tmp_path / "out"
    assert gguf_ready(out) == []
    written, given = ({path.name for path in folder.iterdir()} for folder in (out, tmp_path / "a"))
    assert given <= written
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(make()).__name__]
    assert config["dtype"] == "bfloat16"
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs("abba").input_ids == tokenizer("abba").input_ids
    assert theirs.chat_template == tokenizer.chat_template
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        (out / name).unlink(missing_ok=True)
    assert "there is no tokenizer" in gguf_ready(out)[0]


def test_more_tokens_than_rows_are_told(family: Path, tmp_path: Path) -> None:
    from search.gguf import gguf_ready

    folder = copy_of(family / "base", tmp_path / "model")
    assert gguf_ready(folder) == []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 300, "architectures": None}))
    assert [line.split(";")[0] for line in gguf_ready(folder)] == [
        "config.json names no architectures",
        "the tokenizer has 320 tokens, the model's vocab_size is 300: rows are missing",
    ]
    (folder / "tokenizer_config.json").unlink()
    assert any("tokenizer_config.json" in line for line in gguf_ready(folder))
