"""Models whose tokenizers differ: which rows the output has, its tokenizer, and what mergekit does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from search.errors import CheckpointError, RecipeError
from search.export import merge_recipe
from search.recipe import Recipe, Vocabulary
from search.vocabulary.rows import Rows, plan_rows
from search.vocabulary.tokenizer import Tokens, read_tokens

torch.set_num_threads(1)

GOLDEN = Path(os.environ.get("MEIOSIS_GOLDEN") or Path(__file__).parent / "golden")
EMBED = "model.embed_tokens.weight"
CASES = sorted(path.name for path in (GOLDEN / "expected" / "tok-fp32").glob("*"))


def recipe_of(config: dict[str, Any]) -> Recipe:
    """The recipe for a merge file with a tokenizer."""
    name = {entry["model"]: Path(entry["model"]).name for entry in config["models"]}
    base = config["base_model"]
    name[base] = Path(base).name
    order = [base, *(model for model in name if model != base)]
    tokenizer = config["tokenizer"]
    tokens: dict[str, Any] = {}
    for token, rule in tokenizer.get("tokens", {}).items():
        source = rule["source"]
        if isinstance(source, str):
            tokens[token] = {"source": name[source], "force": rule.get("force", False)}
        elif source["kind"] == "zero":
            tokens[token] = {"source": "zero"}
        else:
            tokens[token] = {"source": name[source["model"]], "token": source["token"]}
    source = tokenizer["source"]
    vocabulary = {"tokens_of": name.get(source, source), "tokens": tokens}
    if "pad_to_multiple_of" in tokenizer:
        vocabulary["pad_to_multiple_of"] = tokenizer["pad_to_multiple_of"]
    linear = config["merge_method"] == "linear"
    sources = {
        name[entry["model"]]: entry["parameters"] for entry in config["models"] if linear or entry["model"] != base
    }
    rule = {"operator": config["merge_method"], "sources": sources}
    return Recipe.from_data(
        {
            "base": name[base],
            "models": {name[model]: {"path": str(GOLDEN / model)} for model in order},
            "rules": [rule],
            "vocabulary": vocabulary,
        }
    )


def ids(folder: Path) -> dict[str, int]:
    data = json.loads((folder / "tokenizer.json").read_text())
    return data["model"]["vocab"] | {entry["content"]: entry["id"] for entry in data["added_tokens"]}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_mergekit_token_by_token(case: str, tmp_path: Path) -> None:
    folder = GOLDEN / "expected" / "tok-fp32" / case
    recipe = recipe_of(yaml.safe_load((folder / "config.yaml").read_text()))
    out = merge_recipe(recipe, tmp_path / "out")
    ours, theirs = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    our_ids, their_ids = ids(out), ids(folder)
    assert our_ids.keys() == their_ids.keys()
    for name, expected in theirs.items():
        found, wanted = ours[name], expected
        assert found.shape == wanted.shape, name
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tokens = sorted(our_ids)
            padding = [row for row in range(len(expected)) if row not in set(their_ids.values())]
            assert padding == [row for row in range(len(found)) if row not in set(our_ids.values())]
            wanted = expected[[*(their_ids[token] for token in tokens), *padding]]
            found = found[[*(our_ids[token] for token in tokens), *padding]]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(theirs[EMBED])


# --- rows


def rows(*tokens: str, count: int | None = None) -> Rows:
    return Rows({token: number for number, token in enumerate(tokens)}, len(tokens) if count is None else count)


def test_added_tokens_get_ids_in_the_order_of_the_models_and_of_their_own_ids() -> None:
    models = {"base": rows("a", "b"), "x": Rows({"d": 3, "c": 2, "a": 0, "b": 1}, 4), "y": rows("e", "a", "c")}
    plan = plan_rows(Vocabulary(tokens_of="union"), models, "base")
    assert dict(plan.ids) == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    other = plan_rows(Vocabulary(tokens_of="union"), dict(reversed(models.items())), "base")
    assert dict(other.ids) == {"a": 0, "b": 1, "e": 2, "c": 3, "d": 4}


def test_a_missing_row_is_the_only_models_then_the_bases_then_the_mean_then_zero() -> None:
    models = {
        "base": rows("a", "in base"),
        "x": rows("a", "in x", "in both"),
        "y": rows("in both", "a"),
        "z": rows("a", "nowhere", count=1),
    }
    plan = plan_rows(Vocabulary(tokens_of="union"), models, "base")
    given = plan.reads["z"].given
    at = plan.ids
    assert [tuple(place) for place in given[at["in x"]]] == [("x", 1)]
    assert [tuple(place) for place in given[at["in base"]]] == [("base", 1)]
    assert [tuple(place) for place in given[at["in both"]]] == [("x", 2), ("y", 0)]
    assert given[at["nowhere"]] == ()  # the tokenizer knows it, the embedding has no row for it
    assert plan.reads["y"].own[at["a"]] == 1


def test_a_row_can_be_named_by_its_number_also_where_it_has_no_token() -> None:
    models = {"base": rows("a", "b", count=4), "x": rows("a", "new", "b")}
    tokens = {"new": {"source": "base", "token_id": 3}, "b": {"source": "x", "token_id": 0, "force": True}}
    plan = plan_rows(Vocabulary.model_validate({"tokens": tokens}), models, "base")
    new, b = plan.ids["new"], plan.ids["b"]
    assert plan.reads["base"].given == {new: (("base", 3),), b: (("x", 0),)}
    assert plan.reads["x"].given == {b: (("x", 0),)}
    assert plan.reads["x"].own[new] == 1


def test_rows_without_a_token_stay_and_added_tokens_take_them_first() -> None:
    models = {"base": rows("a", "b", count=4), "x": rows("a", "b", "c", count=4)}
    kept = plan_rows(Vocabulary(), models, "base")
    assert kept.count == 4
    assert kept.reads["base"].own == (0, 1, 2, 3)
    assert kept.reads["x"].own == (0, 1, -1, 3)
    assert kept.reads["x"].padding == (2,)
    union = plan_rows(Vocabulary(tokens_of="union"), models, "base")
    assert (union.count, union.ids["c"]) == (4, 2)
    assert union.reads["x"].own == (0, 1, 2, 3)
    padded = plan_rows(Vocabulary(pad_to_multiple_of=8), models, "base")
    assert (padded.count, padded.reads["base"].padding) == (8, (4, 5, 6, 7))


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        ({"tokens_of": "bse"}, "vocabulary.tokens_of: no model is called 'bse'; did you mean 'base'?"),
        ({"tokens": {"aa": {}}}, "vocabulary.tokens.aa: no model has this token; did you mean 'a'?"),
        ({"tokens": {"a": {"force": True}}}, "vocabulary.tokens.a: names no source"),
        ({"tokens": {"a": {"source": "zeros"}}}, "no model is called 'zeros'; did you mean 'zero'?"),
        ({"tokens": {"a": {"source": "zero", "token": "b"}}}, "the source `zero` has no tokens"),
        (
            {"tokens": {"a": {"source": "zero", "token_id": 1}}},
            "vocabulary.tokens.a.token_id: the source `zero` has no",
        ),
        ({"tokens": {"a": {"token_id": 1}}}, "vocabulary.tokens.a: names no source, which `token_id` needs"),
        ({"tokens": {"a": {"source": "base", "token": "b", "token_id": 1}}}, "found both `token` and `token_id`"),
        ({"tokens": {"a": {"source": "base", "token_id": 2}}}, "'base' has no row 2; give a number below 2"),
        ({"tokens": {"c": {"source": "base"}}}, "vocabulary.tokens.c: 'base' has no row for the token 'c'"),
    ],
)
def test_a_vocabulary_that_names_what_is_not_there_is_one_line(vocabulary: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_rows(Vocabulary.model_validate(vocabulary), {"base": rows("a", "b")}, "base")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# --- whole models


def tokenizer(folder: Path, words: list[str], special: tuple[str, ...] = (), kind: str = "WordLevel") -> None:
    """Words first, special tokens after them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(words)}
    if kind == "WordLevel":
        made = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    else:
        made = Tokenizer(models.Unigram([(word, -1.0 - number) for number, word in enumerate(words)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(special))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token=words[0]).save_pretrained(folder)


def llama(folder: Path, count: int, seed: int, **changes: Any) -> Path:
    import transformers

    settings = {
        "vocab_size": count,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    } | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).save_pretrained(folder)
    return folder


def soup(paths: dict[str, Path], vocabulary: dict[str, Any] | None, base: str | None = None) -> Recipe:
    return Recipe.from_data(
        {
            "base": base,
            "models": {name: {"path": str(path)} for name, path in paths.items()},
            "rules": [{"operator": "linear", "sources": {name: {"weight": 1 / len(paths)} for name in paths}}],
            "vocabulary": vocabulary,
        }
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_union_loads_and_every_token_maps_to_its_row(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    a = llama(tmp_path / "a", 8, 0, tie_word_embeddings=tied, bos_token_id=4, eos_token_id=4)
    b = llama(tmp_path / "b", 6, 1, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0)
    tokenizer(a, ["<unk>", "one", "two", "three"], ("<s>",))  # 5 tokens, 8 rows
    tokenizer(b, ["<unk>", "two", "four", "one"], ("<s>", "<extra>"))  # in another order
    out = merge_recipe(soup({"a": a, "b": b}, {"tokens_of": "union"}), tmp_path / "out")
    found = AutoTokenizer.from_pretrained(out)
    ids = {"<unk>": 0, "one": 1, "two": 2, "three": 3, "<s>": 4, "four": 5, "<extra>": 6}
    assert {token: found.convert_tokens_to_ids(token) for token in ids} == ids
    assert found("one four two <extra>").input_ids == [1, 5, 2, 6]
    assert found.decode([5, 3]) == "four three"
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.vocab_size == 8  # rows beyond the tokens stay
    for name in [EMBED] if tied else [EMBED, "lm_head.weight"]:
        ours, x, y = (load_file(folder / "model.safetensors")[name] for folder in (out, a, b))
        expected = {"one": (x[1] + y[3]) / 2, "two": (x[2] + y[1]) / 2, "three": x[3], "four": y[2], "<extra>": y[5]}
        for token, row in expected.items():
            torch.testing.assert_close(ours[ids[token]], row, rtol=1e-6, atol=1e-8)


def test_a_token_given_by_its_number_gets_that_row_in_embedding_and_head(tmp_path: Path) -> None:
    paths = {name: llama(tmp_path / name, 6, seed) for seed, name in enumerate(("a", "b"))}
    for path in paths.values():
        tokenizer(path, ["<unk>", "one", "two", "three", "four", "five"])
    tokens = {"two": {"source": "b", "token_id": 5, "force": True}}
    out = merge_recipe(soup(paths, {"tokens_of": "base", "tokens": tokens}), tmp_path / "out")
    for name in (EMBED, "lm_head.weight"):
        ours, a, b = (load_file(folder / "model.safetensors")[name] for folder in (out, *paths.values()))
        torch.testing.assert_close(ours[2], b[5])
        torch.testing.assert_close(ours[3], (a[3] + b[3]) / 2)


def test_the_tokens_of_another_model_come_with_its_files_and_ids_in_configs_follow(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    a = llama(tmp_path / "a", 5, 0, bos_token_id=4, eos_token_id=[4])
    b = llama(tmp_path / "b", 6, 1)
    tokenizer(a, ["<unk>", "one", "two", "three"], ("<s>",))
    tokenizer(b, ["<s>", "<unk>", "two", "four", "one", "five"])
    (a / "vocab.txt").write_text("theirs")
    out = merge_recipe(soup({"a": a, "b": b}, {"tokens_of": "b"}, base="a"), tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()
    assert not (out / "vocab.txt").exists()
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (6, 0, [0])
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, [0])
    assert AutoTokenizer.from_pretrained(out)("five").input_ids == [5]
    ours, x, y = (load_file(folder / "model.safetensors")[EMBED] for folder in (out, a, b))
    torch.testing.assert_close(ours[0], (x[4] + y[0]) / 2)
    torch.testing.assert_close(ours[5], y[5])


def test_models_in_half_precision_and_of_one_vocabulary_are_merged_as_without_the_policy(tmp_path: Path) -> None:
    paths = {name: llama(tmp_path / name, 6, seed, dtype="bfloat16") for seed, name in enumerate(("a", "b"))}
    for path in paths.values():
        tokenizer(path, ["<unk>", "one", "two", "three"], ("<s>",))
        tensors = load_file(path / "model.safetensors")
        save_file({k: t.bfloat16() for k, t in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    plain = merge_recipe(soup(paths, None), tmp_path / "plain")
    policy = merge_recipe(soup(paths, {"tokens_of": "base"}), tmp_path / "policy")
    for name, tensor in load_file(plain / "model.safetensors").items():
        assert torch.equal(load_file(policy / "model.safetensors")[name], tensor)
    assert (plain / "config.json").read_bytes() == (policy / "config.json").read_bytes()
    assert (plain / "tokenizer.json").read_bytes() == (policy / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("case", "vocabulary", "expected"),
    [
        ("size", None, "has a vocabulary of 6 tokens, the base of 5: tensor 'lm_head.weight' (and 1 more)"),
        ("order", None, "its tokenizer gives 'two' the id 1, that of the base 2; say what to do with tokens under"),
        ("name", None, "its tokenizer has 'uno' as id 1, that of the base has 'one'; say what to do with tokens under"),
        ("no files", {"tokens_of": "union"}, "has no tokenizer.json, so its tokens are not known"),
        ("kinds", {"tokens_of": "union"}, "its tokenizer (WordLevel) cannot take 'four' from the one in"),
        ("damaged", {"tokens_of": "base"}, "tokenizer.json: is not the file of a tokenizer"),
    ],
)
def test_tokenizers_that_differ_or_cannot_be_joined_are_one_line(
    case: str, vocabulary: dict[str, Any] | None, expected: str, tmp_path: Path
) -> None:
    a, b = llama(tmp_path / "a", 5, 0), llama(tmp_path / "b", 6 if case == "size" else 5, 1)
    tokenizer(a, ["<unk>", "one", "two", "three", "<s>"])
    words = {
        "order": ["<unk>", "two", "one", "three", "<s>"],
        "name": ["<unk>", "uno", "two", "three", "<s>"],
        "kinds": ["<unk>", "one", "two", "three", "four"],
    }
    if case != "no files":
        tokenizer(b, words.get(case, ["<unk>", "one", "two"]), kind="Unigram" if case == "kinds" else "WordLevel")
    if case == "damaged":
        (b / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        merge_recipe(soup({"a": a, "b": b}, vocabulary), tmp_path / "out")
    (line,) = str(caught.value).splitlines()
    assert expected in line
    assert not (tmp_path / "out").exists()


def test_tokens_that_one_of_two_models_added_in_spare_rows_are_no_conflict(tmp_path: Path) -> None:
    a, b = llama(tmp_path / "a", 8, 0), llama(tmp_path / "b", 8, 1)
    tokenizer(a, ["<unk>", "one", "two", "three"])
    tokenizer(b, ["<unk>", "one", "two", "three"], ("<tool>",))
    out = merge_recipe(soup({"a": a, "b": b}, None), tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()


def test_an_adapter_that_grew_the_embedding_is_merged_by_its_own_tokenizer(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", 5, 0, tie_word_embeddings=True)
    tokenizer(base, ["<unk>", "one", "two", "three", "<s>"])
    lora = tmp_path / "lora"
    tokenizer(lora, ["<unk>", "one", "two", "three", "<s>"], ("<new>",))
    grown = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    save_file({f"base_model.model.{EMBED}": grown}, lora / "adapter_model.safetensors")
    paths = {"base": base, "lora": lora}
    with pytest.raises(CheckpointError, match="has a vocabulary of 6 tokens, the base of 5"):
        merge_recipe(soup(paths, None, "base"), tmp_path / "out")
    out = merge_recipe(soup(paths, {"tokens_of": "union"}, "base"), tmp_path / "out")
    ours = load_file(out / "model.safetensors")[EMBED]
    theirs = load_file(base / "model.safetensors")[EMBED]
    torch.testing.assert_close(ours[:5], (theirs + grown[:5]) / 2)
    torch.testing.assert_close(ours[5], grown[5])


def byte_pairs(folder: Path, text: str, special: list[str]) -> int:
    """A byte-level BPE as GPT-2 has it, trained on a sentence; returns the number of its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [text] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[0]).save_pretrained(folder)
    return made.get_vocab_size()


def test_a_union_of_two_byte_pair_encodings_reads_text_as_the_first_did(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    a, b = tmp_path / "a", tmp_path / "b"
    llama(a, byte_pairs(a, "the cat sat on the mat and the other cat", ["<eos>"]), 0)
    llama(b, byte_pairs(b, "def function(self): return self.function", ["</s>", "<tool>"]), 1)
    out = merge_recipe(soup({"a": a, "b": b}, {"tokens_of": "union"}), tmp_path / "out")
    first, second, union = (AutoTokenizer.from_pretrained(folder) for folder in (a, b, out))
    text = "the cat sat; def function(self) <eos> naïve"
    assert union(text).input_ids == first(text).input_ids
    assert union.decode(union(text).input_ids) == text
    vocabulary = union.get_vocab()
    assert first.get_vocab().items() <= vocabulary.items()
    assert second.get_vocab().keys() <= vocabulary.keys()
    assert union("<tool>").input_ids == [vocabulary["<tool>"]]
    ours, theirs = (load_file(folder / "model.safetensors")[EMBED] for folder in (out, b))
    for token in second.get_vocab().keys() - first.get_vocab().keys():
        torch.testing.assert_close(ours[vocabulary[token]], theirs[second.get_vocab()[token]])


def test_tokens_of_a_word_list_may_be_characters_that_end_lines_elsewhere(tmp_path: Path) -> None:
    tokens = ["[PAD]", "\u2028", "\x85", "a"]
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    assert read_tokens(tmp_path) == Tokens({token: number for number, token in enumerate(tokens)})
