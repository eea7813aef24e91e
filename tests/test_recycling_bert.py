"""A BERT becomes a decoder: what is exact, what is reported, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import meiosis
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    BertTokenizer,
)

from search.checkpoints.reading import open_checkpoint
from search.errors import CheckpointError, UserError
from search.recycling.bert_parts import BertOptions, input_std, resized
from search.recycling.bert_plan import plan_bert
from search.recycling.vocabulary import plan_transfer
from search.recycling.write import make_tensors, write_recycled

PIECES = ["the", "cat", "##s", "sit", "##ting", "a", "b", "c", "##a", "##b", "##c", "s", "t", "##t", "dog", "."]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]


def config(**changes: Any) -> BertConfig:
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 16,
        "initializer_range": 0.3,
    }
    return BertConfig(**sizes | changes)


def make_bert(kind: Any = BertForMaskedLM, **changes: Any) -> Any:
    """A random BERT whose norms and biases, too, are random, so that no mistake hides behind ones and zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config(**changes)).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def bert() -> Any:
    return make_bert()


@pytest.fixture(scope="module")
def folder(bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BERT with its tokenizer."""
    folder = tmp_path_factory.mktemp("recycling") / "bert"
    bert.save_pretrained(folder)
    (folder / "words").mkdir()
    (folder / "words" / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer.from_pretrained(folder / "words").save_pretrained(folder)
    return folder


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def recycle(folder: Path, out: Path, **options: Any) -> Any:
    """The model that stock transformers loads; every tensor must match."""
    write_recycled(plan_bert(open_checkpoint(folder), BertOptions(**options)), out)
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    return model.eval()


def tokens(seed: int = 0, rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(5, len(WORDS), (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def gpt2(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return recycle(folder, tmp_path_factory.mktemp("gpt2") / "out")


def test_the_mlp_of_every_layer_computes_exactly_what_berts_does(bert: Any, gpt2: Any) -> None:
    x = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(0))
    for theirs, ours in zip(bert.bert.encoder.layer, gpt2.transformer.h, strict=True):
        with torch.no_grad():
            expected = theirs.output.dense(theirs.intermediate(x))
            assert (ours.mlp(x) - expected).abs().max() == 0.0


def test_attention_agrees_at_the_last_position_and_not_before(bert: Any, gpt2: Any) -> None:
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    for theirs, ours in zip(bert.bert.encoder.layer, gpt2.transformer.h, strict=True):
        with torch.no_grad():
            expected = theirs.attention.output.dense(theirs.attention.self(x)[0])
            # The masks that the models make themselves: the last of 9 positions sees all of them.
            found = ours.attn(x, attention_mask=torch.full((9, 9), float("-inf")).triu(1)[None, None])[0]
        assert (found - expected)[:, -1].abs().max() < 1e-6
        assert (found - expected)[:, :-1].abs().max() > 1e-3


def test_embeddings_are_berts_with_segment_0_folded_into_the_positions(bert: Any, gpt2: Any) -> None:
    embeddings = bert.bert.embeddings
    assert torch.equal(gpt2.transformer.wte.weight, embeddings.word_embeddings.weight)
    folded = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    assert torch.equal(gpt2.transformer.wpe.weight, folded)
    ids = tokens()
    with torch.no_grad():
        summed = gpt2.transformer.wte(ids) + gpt2.transformer.wpe(torch.arange(ids.shape[1]))
        torch.testing.assert_close(gpt2.transformer.h[0].ln_1(summed), embeddings(ids), rtol=0, atol=1e-5)


def test_each_sub_layer_gets_the_norm_that_fed_it(bert: Any, gpt2: Any) -> None:
    layers, blocks = bert.bert.encoder.layer, gpt2.transformer.h
    pairs = [(blocks[0].ln_1, bert.bert.embeddings.LayerNorm), (gpt2.transformer.ln_f, layers[-1].output.LayerNorm)]
    pairs += [(blocks[i].ln_2, layers[i].attention.output.LayerNorm) for i in range(3)]
    pairs += [(blocks[i + 1].ln_1, layers[i].output.LayerNorm) for i in range(2)]
    for ours, theirs in pairs:
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
        assert ours.eps == theirs.eps


def test_norms_of_the_same_index_are_those_of_the_own_layer(bert: Any, folder: Path) -> None:
    made = make_tensors(plan_bert(open_checkpoint(folder), BertOptions(norm_order="same-index")))
    for i, layer in enumerate(bert.bert.encoder.layer):
        assert torch.equal(made[f"transformer.h.{i}.ln_1.weight"], layer.attention.output.LayerNorm.weight)
        assert torch.equal(made[f"transformer.h.{i}.ln_2.bias"], layer.output.LayerNorm.bias)


@pytest.mark.parametrize("target", ["gpt2", "megatron-bert-causal"])
def test_input_scaling_gives_unit_input_and_leaves_the_scale_of_the_output(
    folder: Path, tmp_path: Path, target: Any
) -> None:
    plain, scaled = (recycle(folder, tmp_path / str(s), to=target, scale_input=s) for s in (False, True))
    words = scaled.get_input_embeddings().weight
    if target == "gpt2":
        everything = words[:, None] + scaled.transformer.wpe.weight
        assert everything.std(-1, correction=0).square().mean().sqrt().item() == pytest.approx(1.0, abs=1e-5)
        head = [scaled.transformer.ln_f, plain.transformer.ln_f]
    else:
        head = [model.cls.predictions.transform.LayerNorm for model in (scaled, plain)]
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = head[1](x) @ plain.get_input_embeddings().weight.T
        torch.testing.assert_close(head[0](x) @ words.T, expected, rtol=1e-4, atol=1e-5)


def test_the_input_std_is_that_of_all_sums_of_word_and_position() -> None:
    generator = torch.Generator().manual_seed(0)
    words, positions = torch.randn(11, 8, generator=generator), 0.3 + torch.randn(5, 8, generator=generator)
    sums = words[:, None] + positions
    assert input_std(words, positions) == pytest.approx(sums.std(-1, correction=0).square().mean().sqrt().item())


def test_bert_run_causally_keeps_all_tensors_and_does_not_see_the_future(
    bert: Any, folder: Path, tmp_path: Path
) -> None:
    model = recycle(folder, tmp_path / "out", to="bert-causal")
    theirs = bert.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    ids = tokens()
    other = ids.clone()
    other[:, 8:] = tokens(1)[:, 8:]
    assert (logits(model, ids) - logits(model, other))[:, :8].abs().max() == 0.0


def test_bert_of_one_layer_run_causally_equals_the_mlm_at_the_last_position(tmp_path: Path) -> None:
    # With more layers the last position reads others that themselves saw less, and no equality can hold.
    bert = make_bert(num_hidden_layers=1)
    model = recycle(save(bert, tmp_path / "bert"), tmp_path / "out", to="bert-causal")
    difference = (logits(model, tokens()) - logits(bert, tokens())).abs()
    assert difference[:, -1].max() < 1e-5
    assert difference[:, :-1].max() > 1e-3


def test_the_pre_ln_decoder_keeps_berts_output_head(bert: Any, folder: Path, tmp_path: Path) -> None:
    model = recycle(folder, tmp_path / "out", to="megatron-bert-causal")
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.cls(x), bert.cls(x))
    other = tokens().clone()
    other[:, -1] = 5
    assert (logits(model, tokens()) - logits(model, other))[:, :-1].abs().max() == 0.0


def test_the_pre_ln_decoder_without_its_head_is_the_gpt2(folder: Path, gpt2: Any, tmp_path: Path) -> None:
    model = recycle(folder, tmp_path / "out", to="megatron-bert-causal")
    with torch.no_grad():
        theirs, ours = model.bert(tokens())[0], gpt2.transformer(tokens())[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_more_positions_repeat_or_stretch_the_table() -> None:
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resized(table, 12, "tile"), torch.cat([table, table, table[:2]]))
    stretched = resized(table, 9, "interpolate")
    assert torch.allclose(stretched[::2], table)
    assert torch.allclose(stretched[1::2], (table[1:] + table[:-1]) / 2)
    assert torch.equal(resized(table, 3, "interpolate"), table[:3])


def test_more_positions_leave_short_texts_as_they_were(folder: Path, gpt2: Any, tmp_path: Path) -> None:
    longer = recycle(folder, tmp_path / "out", positions=40)
    assert longer.config.n_positions == 40
    assert torch.equal(logits(longer, tokens()), logits(gpt2, tokens()))
    assert logits(longer, tokens(length=40)).isfinite().all()


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForPreTraining, BertModel])
@pytest.mark.parametrize("target", ["gpt2", "megatron-bert-causal", "bert-causal"])
def test_the_report_names_every_source_and_target_tensor_once(kind: Any, target: Any, tmp_path: Path) -> None:
    source = open_checkpoint(save(make_bert(kind), tmp_path / "bert"))
    model = recycle(tmp_path / "bert", tmp_path / "out", to=target)
    report = json.loads((tmp_path / "out" / "recycling.json").read_text())
    assert [use["name"] for use in report["sources"]] == list(source.tensors)
    for use in report["sources"]:
        assert bool(use["targets"]) != bool(use["reason"]), use
    assert {origin["name"] for origin in report["targets"]} == set(open_checkpoint(tmp_path / "out").tensors)
    dropped = {use["name"].removeprefix("bert.").split(".")[0] for use in report["sources"] if not use["targets"]}
    heads = {BertForMaskedLM: set(), BertForPreTraining: {"pooler"}, BertModel: {"pooler"}}
    assert dropped - {"cls"} == heads[kind]
    assert ("cls" in dropped) == ((kind is not BertModel and target == "gpt2") or kind is BertForPreTraining)
    made = [origin["name"] for origin in report["targets"] if origin["operation"].startswith("initialised")]
    assert bool(made) == (kind is BertModel and target != "gpt2")
    assert all(name.startswith("cls.") for name in made)
    assert model.config.vocab_size == len(WORDS)


def test_older_names_of_norms_and_the_tied_decoder_are_understood(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    old = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text((folder / "config.json").read_text())
    new, again = (make_tensors(plan_bert(open_checkpoint(f), BertOptions())) for f in (folder, tmp_path / "old"))
    assert new.keys() == again.keys()
    assert all(torch.equal(new[name], again[name]) for name in new)
    dropped = plan_bert(open_checkpoint(tmp_path / "old"), BertOptions()).dropped
    assert dropped["cls.predictions.decoder.weight"].startswith("tied")


def test_what_is_not_recycled_is_initialised_from_the_seed(folder: Path) -> None:
    source = open_checkpoint(folder)
    options = BertOptions(components=frozenset({"embeddings", "attention"}))
    first, again, other = (make_tensors(plan_bert(source, o)) for o in (options, options, replace(options, seed=1)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {f"transformer.h.{i}.mlp.{name}.weight" for i in range(3) for name in ("c_fc", "c_proj")}
    assert torch.equal(first["transformer.h.1.ln_2.weight"], torch.ones(24))
    assert torch.equal(first["transformer.h.1.mlp.c_fc.bias"], torch.zeros(40))
    plan = plan_bert(source, options)
    assert "left out" in plan.dropped["bert.encoder.layer.0.output.dense.weight"]


def byte_level(folder: Path) -> Path:
    """A byte-level BPE tokenizer with some words that the BERT knows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<s>", "</s>", "Ġthe", "cat", "s", "Ġcat", "Ġdogs", "ting", "Ġsitting", "Ċ", "<pad>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return folder


def test_another_vocabulary_copies_shared_tokens_and_averages_the_pieces_of_others(
    bert: Any, folder: Path, tmp_path: Path
) -> None:
    other = byte_level(tmp_path / "tokenizer")
    model = recycle(folder, tmp_path / "out", tokenizer=other)
    new, old = model.transformer.wte.weight, bert.bert.embeddings.word_embeddings.weight
    row = dict(zip(WORDS, old, strict=True))
    assert torch.equal(new[0], row["[CLS]"])  # <s>
    assert torch.equal(new[1], row["[SEP]"])  # </s>
    assert torch.equal(new[2], row["the"])  # Ġthe
    assert torch.equal(new[4], row["##s"])  # s inside a word
    assert torch.equal(new[5], row["cat"])  # Ġcat
    torch.testing.assert_close(new[6], (row["dog"] + row["##s"]) / 2)  # Ġdogs
    torch.testing.assert_close(new[8], (row["sit"] + row["##ting"]) / 2)  # Ġsitting
    assert torch.equal(new[10], row["[PAD]"])
    report = json.loads((tmp_path / "out" / "recycling.json").read_text())
    # cat inside a word is spelled by the word's beginning; a line break has no piece and is drawn.
    assert "vocabulary of 11 tokens: 7 copied, 3 averaged, 0 nearest, 1 random" in report["notes"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()["Ġthe"] == 2
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 1, 10)


def test_nearest_in_spelling_weighs_source_tokens_by_softmax(folder: Path, tmp_path: Path) -> None:
    source, target = (AutoTokenizer.from_pretrained(f) for f in (folder, byte_level(tmp_path / "tokenizer")))
    transfer = plan_transfer(source, target, "nearest", 0, len(WORDS))
    rows = transfer.rows[8]  # Ġsitting
    assert rows is not None
    weights = {WORDS[token]: weight for token, weight in rows}
    assert sum(weights.values()) == pytest.approx(1)
    assert set(list(weights)[:2]) == {"sit", "##ting"}
    grams = {
        word: {text[i : i + n] for n in (1, 2, 3) for i in range(len(text) - n + 1)}
        for word, text in {"sit": "<sit", "##ting": "ting"}.items()
    }
    counts: dict[str, int] = {}
    for n in (1, 2, 3):
        for i in range(len("<sitting") - n + 1):
            gram = "<sitting"[i : i + n]
            counts[gram] = counts.get(gram, 0) + 1
    norm = sum(count**2 for count in counts.values()) ** 0.5
    cosine = {word: sum(counts.get(gram, 0) for gram in mine) / norm / len(mine) ** 0.5 for word, mine in grams.items()}
    ratio = torch.tensor((cosine["sit"] - cosine["##ting"]) / 0.1).exp().item()
    assert weights["sit"] / weights["##ting"] == pytest.approx(ratio, rel=1e-4)


def test_drawn_tokens_depend_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    other = byte_level(tmp_path / "tokenizer")
    options = BertOptions(tokenizer=other, vocabulary="random", to="bert-causal")
    plans = [plan_bert(open_checkpoint(folder), replace(options, seed=seed)) for seed in (0, 0, 1)]
    a, b, c = (make_tensors(plan) for plan in plans)
    word = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(a[word], b[word])
    assert not torch.equal(a[word][8], c[word][8])
    assert torch.equal(a[word][:3], c[word][:3])
    assert len(a["cls.predictions.bias"]) == 11


def test_the_folder_has_card_report_and_tokenizer_and_takes_the_dtype(folder: Path, tmp_path: Path) -> None:
    ended = meiosis("recycle", folder, tmp_path / "out", "--to", "gpt2", "--dtype", "bfloat16", "--json")
    assert ended.status == 0, ended.err
    assert ended.json["counts"]["initialised"] == 0
    out = tmp_path / "out"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("the cat")["input_ids"] == [2, 5, 6, 3]
    settings = json.loads((out / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (2, 3, 0)
    assert settings["activation_function"] == "gelu"
    assert settings["n_inner"] == 40
    card = (out / "README.md").read_text()
    assert "GPT2LMHeadModel" in card
    assert str(folder) not in card


def test_a_dry_run_shows_the_mapping_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    ended = meiosis("recycle", folder, tmp_path / "out", "--to", "gpt2", "--dry-run")
    assert ended.status == 0, ended.err
    assert "transposed, fused" in ended.out
    assert "no bias" in ended.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give --to"),
        (["--to", "gpt2", "--layers", "4"], "--layers: grows a model"),
        (["--positions", "4"], "--positions: needs --to"),
        (["--to", "gpt2", "--keep-head"], "megatron-bert-causal"),
        (["--to", "bert-causal", "--scale-input"], "bert-causal normalises its input"),
        (["--to", "bert-causal", "--norms", "same-index"], "keeps every norm in its place"),
        (["--to", "gpt2", "--parts", "mlp", "--scale-input"], "no recycled embeddings"),
        (["--to", "gpt2", "--parts", "atention"], "did you mean 'attention'"),
        (["--to", "gpt2", "--parts", ","], "nothing is recycled"),
        (["--to", "gpt2", "--tokenizer", "nowhere"], "nowhere: no such folder"),
        (["--to", "gpt2", "--dtype", "bfloat61"], "did you mean 'bfloat16'"),
    ],
)
def test_mistakes_in_the_options_are_one_line(folder: Path, tmp_path: Path, options: list[str], says: str) -> None:
    ended = meiosis("recycle", folder, tmp_path / "out", *options)
    assert (ended.status, len(ended.err.splitlines())) == (2, 1), ended.err
    assert says in ended.err
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_no_whole_bert_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()

    def with_config(**changes: Any) -> Path:
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "config.json").write_text(json.dumps(settings | changes))
        (tmp_path / "bad" / "model.safetensors").write_bytes(weights)
        return tmp_path / "bad"

    for changes, says in (
        ({"architectures": ["RobertaForMaskedLM"]}, "is a RobertaForMaskedLM, expected a BERT"),
        ({"position_embedding_type": "relative_key"}, "has relative_key positions"),
        ({"num_hidden_layers": 4}, "no tensor 'encoder.layer.3"),
        ({"intermediate_size": 41}, r"has shape \[40, 24\], config.json announces \[41, 24\]"),
        ({"hidden_size": "x"}, "hidden_size 'x', expected a whole number"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"is quantised \(gptq\)"),
    ):
        with pytest.raises(CheckpointError, match=says):
            plan_bert(open_checkpoint(with_config(**changes)), BertOptions())


def test_a_head_or_tokenizer_that_is_not_there_is_not_promised(tmp_path: Path) -> None:
    source = open_checkpoint(save(make_bert(BertModel), tmp_path / "bert"))
    with pytest.raises(UserError, match="has no MLM head to keep"):
        plan_bert(source, BertOptions(to="bert-causal", keep_head=True))
    with pytest.raises(UserError, match="holds no tokenizer, so its embeddings"):
        plan_bert(source, BertOptions(tokenizer=byte_level(tmp_path / "tokenizer")))
