"""A small model starts a larger one: what keeps the function, what does not, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import meiosis
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from search.checkpoints.reading import open_checkpoint
from search.errors import CheckpointError, UserError
from search.recycling.growth import GrowthOptions, layer_origins, plan_growth
from search.recycling.write import make_tensors, write_recycled

VOCABULARY = 40
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = {
    **COMMON,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 36,
    "max_position_embeddings": 32,
}
BERT = {**{key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"}, "layer_norm_eps": 1e-5}


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(**COMMON | {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32} | changes)
    )


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "gpt2 untied": lambda: gpt2(tie_word_embeddings=False),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8)),
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "bert with next sentence": lambda: BertForPreTraining(BertConfig(**BERT)),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model of each kind, made once; vectors are random too."""
    made: dict[str, tuple[Path, Any]] = {}
    parent = tmp_path_factory.mktemp("growth")

    def get(kind: str) -> tuple[Path, Any]:
        if kind not in made:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = MODELS[kind]().eval()
                for name, parameter in model.named_parameters():
                    if parameter.ndim == 1:
                        norm = name.endswith("weight")
                        parameter.data.normal_(1.0 if norm else 0.0, 0.2)
            folder = parent / kind.replace(" ", "-")
            model.save_pretrained(folder)
            made[kind] = folder, model
        return made[kind]

    return get


def grow(folder: Path, model: Any, out: Path, **options: Any) -> Any:
    """The grown model as stock transformers loads it, nothing missing and nothing left over."""
    write_recycled(plan_growth(open_checkpoint(folder), GrowthOptions(**options)), out)
    grown, loading = type(model).from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    return grown.eval()


def outputs(model: Any) -> list[torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=ids)
    return [found[name] for name in ("logits", "prediction_logits", "seq_relationship_logits") if name in found]


def difference(a: Any, b: Any) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(outputs(a), outputs(b), strict=True))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("asymmetry", [0.0, 0.5])
def test_a_wider_model_by_copies_computes_the_same(kind: str, asymmetry: float, small: Any, tmp_path: Path) -> None:
    folder, model = small(kind)
    grown = grow(folder, model, tmp_path / "out", hidden=48, asymmetry=asymmetry)
    assert difference(model, grown) < 1e-5
    assert grown.config.hidden_size == 48
    assert grown.config.num_attention_heads == 8


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_three_times_as_wide_with_any_mlp_computes_the_same(kind: str, small: Any, tmp_path: Path) -> None:
    folder, model = small(kind)
    grown = grow(folder, model, tmp_path / "out", hidden=72, mlp=301, asymmetry=0.3)
    assert difference(model, grown) < 2e-5


@pytest.mark.parametrize("kind", [kind for kind in MODELS if not kind.startswith("bert")])
@pytest.mark.parametrize("layers", [3, 5])
def test_identity_layers_change_nothing_at_all(kind: str, layers: int, small: Any, tmp_path: Path) -> None:
    folder, model = small(kind)
    grown = grow(folder, model, tmp_path / "out", layers=layers, depth="identity")
    assert difference(model, grown) == 0.0
    assert grown.config.num_hidden_layers == layers


def test_deeper_and_wider_at_once_computes_the_same(small: Any, tmp_path: Path) -> None:
    folder, model = small("llama")
    grown = grow(folder, model, tmp_path / "out", layers=4, hidden=48, depth="identity", asymmetry=0.5)
    assert difference(model, grown) < 1e-5


@settings(max_examples=10, deadline=None)
@given(
    factor=st.integers(1, 3),
    extra=st.integers(0, 40),
    layers=st.integers(2, 5),
    asymmetry=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_any_size_that_growing_reaches_keeps_the_function(
    small: Any,
    tmp_path_factory: pytest.TempPathFactory,
    factor: int,
    extra: int,
    layers: int,
    asymmetry: float,
    seed: int,
) -> None:
    folder, model = small("gpt2")
    mlp = 96 * factor + extra
    if (factor, extra, layers) == (1, 0, 2):
        return
    options = {"hidden": 24 * factor, "mlp": mlp, "layers": layers, "depth": "identity", "seed": seed}
    out = tmp_path_factory.mktemp("any") / "out"
    assert difference(model, grow(folder, model, out, **options, asymmetry=asymmetry)) < 2e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize(("depth", "order"), [("stack", [0, 1, 0, 1, 0]), ("interlace", [0, 0, 0, 1, 1])])
def test_stacked_and_interlaced_layers_are_those_of_the_source(
    kind: str, depth: str, order: list[int], small: Any, tmp_path: Path
) -> None:
    folder, model = small(kind)
    assert layer_origins(2, 5, depth) == order  # type: ignore[arg-type]
    grown = grow(folder, model, tmp_path / "out", layers=5, depth=depth)
    old, new = (
        next(module for name, module in m.named_modules() if name.endswith((".h", ".layers", ".layer")))
        for m in (model, grown)
    )
    for layer, origin in zip(new, order, strict=True):
        theirs = old[origin].state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in layer.state_dict().items())
    assert difference(model, grown) > 0.01


def test_interlacing_twice_as_deep_is_layer_l_div_2() -> None:
    assert layer_origins(3, 6, "interlace") == [0, 0, 1, 1, 2, 2]
    assert layer_origins(3, 6, "stack") == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_aki_takes_new_rows_from_the_next_layer_and_says_that_the_function_changes(
    kind: str, small: Any, tmp_path: Path
) -> None:
    folder, model = small(kind)
    assert difference(model, grow(folder, model, tmp_path / "out", hidden=48, width="aki")) > 0.01
    report = json.loads((tmp_path / "out" / "recycling.json").read_text())
    assert report["preserving"].startswith("another function (aki")


def test_aki_by_hand(small: Any) -> None:
    folder, model = small("gpt2")
    made = make_tensors(plan_growth(open_checkpoint(folder), GrowthOptions(hidden=48, width="aki")))
    here, above = (model.transformer.h[i].mlp.c_fc for i in (0, 1))
    weight = made["transformer.h.0.mlp.c_fc.weight"]  # input x output
    expected = torch.cat([here.weight, above.weight], dim=1) / 2
    assert torch.equal(weight, torch.cat([expected, expected]))
    assert torch.equal(made["transformer.h.0.mlp.c_fc.bias"], torch.cat([here.bias, above.bias]))
    # The last layer has none above it, and embeddings none at all: copies.
    assert torch.equal(made["transformer.h.1.mlp.c_fc.bias"], torch.cat([above.bias, above.bias]))
    assert torch.equal(made["transformer.wte.weight"], torch.cat([model.transformer.wte.weight] * 2, dim=1))


def test_the_fused_attention_of_gpt2_grows_by_whole_heads(small: Any) -> None:
    folder, model = small("gpt2")
    made = make_tensors(plan_growth(open_checkpoint(folder), GrowthOptions(hidden=48)))
    query, key, value = model.transformer.h[0].attn.c_attn.bias.chunk(3)
    expected = torch.cat([query, query, key, key, value, value])
    assert torch.equal(made["transformer.h.0.attn.c_attn.bias"], expected)


def test_a_tied_output_halves_the_last_norm_and_an_untied_one_its_own_columns(small: Any) -> None:
    tied, untied = (
        make_tensors(plan_growth(open_checkpoint(small(kind)[0]), GrowthOptions(hidden=48)))
        for kind in ("gpt2", "gpt2 untied")
    )
    norm = small("gpt2")[1].transformer.ln_f
    for name in ("weight", "bias"):
        assert torch.equal(tied[f"transformer.ln_f.{name}"], torch.cat([getattr(norm, name)] * 2) / 2)
    model = small("gpt2 untied")[1]
    assert torch.equal(untied["transformer.ln_f.weight"], torch.cat([model.transformer.ln_f.weight] * 2))
    assert torch.equal(untied["lm_head.weight"], torch.cat([model.lm_head.weight] * 2, dim=1) / 2)
    assert "lm_head.weight" not in tied


def test_uneven_columns_sum_to_the_source_and_let_copies_part(small: Any, tmp_path: Path) -> None:
    folder, model = small("gpt2")
    ids = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    apart = {}
    for asymmetry in (0.0, 0.5):
        grown = grow(folder, model, tmp_path / str(asymmetry), hidden=48, asymmetry=asymmetry)
        columns = grown.transformer.h[0].mlp.c_fc.weight[:, :96]
        torch.testing.assert_close(columns[:24] + columns[24:], model.transformer.h[0].mlp.c_fc.weight)
        grown(input_ids=ids, labels=ids).loss.backward()
        gradient = grown.transformer.wte.weight.grad
        apart[asymmetry] = float((gradient[:, :24] - gradient[:, 24:]).abs().max() / gradient.abs().max())
    assert apart[0.0] < 1e-4
    assert apart[0.5] > 1e-2


def test_the_seed_decides_the_uneven_columns(small: Any) -> None:
    source = open_checkpoint(small("llama")[0])
    a, b, c = (
        make_tensors(plan_growth(source, GrowthOptions(hidden=48, asymmetry=0.5, seed=seed))) for seed in (0, 0, 1)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a[name], c[name])


def test_a_grown_checkpoint_in_bfloat16_stays_in_bfloat16(small: Any, tmp_path: Path) -> None:
    _, model = small("llama")
    LlamaForCausalLM(model.config).to(torch.bfloat16).save_pretrained(tmp_path / "small")
    grown = grow(tmp_path / "small", model, tmp_path / "out", hidden=48, layers=3, depth="identity")
    assert grown.dtype == torch.bfloat16
    assert {info.dtype for info in open_checkpoint(tmp_path / "out").tensors.values()} == {"BF16"}


def test_kinds_of_layers_follow_their_layers(small: Any, tmp_path: Path) -> None:
    _, model = small("qwen2")
    settings_ = json.loads(json.dumps(model.config.to_dict()))
    settings_ |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    settings_["layer_types"] = ["full_attention", "sliding_attention"]
    mixed = Qwen2ForCausalLM(Qwen2Config(**settings_)).eval()
    mixed.save_pretrained(tmp_path / "small")
    grown = grow(tmp_path / "small", mixed, tmp_path / "out", layers=4, depth="identity")
    assert grown.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert difference(mixed, grown) == 0.0


def test_the_command_grows_and_reports(small: Any, tmp_path: Path) -> None:
    ended = meiosis("recycle", small("gpt2")[0], tmp_path / "out", "--layers", 4, "--hidden", 48, "--json")
    assert ended.status == 0, ended.err
    assert ended.json["method"].startswith("grown from 2 to 4 layers (stack), hidden 24 to 48")
    assert any("gradients" in note for note in ended.json["notes"])
    shown = meiosis("recycle", small("gpt2")[0], tmp_path / "no", "--layers", 4, "--dry-run")
    assert "layer copied" in shown.out
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("gpt2", ["--hidden", "12"], "--hidden 12: .* has 24, and growing cannot shrink it"),
        ("gpt2", ["--layers", "1"], "--layers 1: .* cannot shrink"),
        ("gpt2", ["--mlp", "10"], "--mlp 10: .* cannot shrink"),
        ("llama", ["--hidden", "40"], "expected a multiple of 24.*nearest are 24 and 48"),
        ("llama", ["--layers", "2"], "already; ask for more"),
        ("bert", ["--layers", "4", "--depth", "identity"], "normalises after each sub-layer"),
        ("gpt2", ["--hidden", "48", "--asymmetry", "1"], "--asymmetry 1: expected at least 0 and less than 1"),
        ("gpt2", ["--hidden", "48", "--positions", "64"], "--positions: needs --to"),
        ("gpt2", ["--to", "gpt2"], "is a GPT2LMHeadModel, expected a BERT"),
    ],
)
def test_sizes_that_growing_does_not_reach_are_one_line(
    kind: str, options: list[str], says: str, small: Any, tmp_path: Path
) -> None:
    ended = meiosis("recycle", small(kind)[0], tmp_path / "out", *options)
    assert (ended.status, len(ended.err.splitlines())) == (2, 1), ended.err
    assert re.search(says, ended.err), ended.err
    assert not (tmp_path / "out").exists()


def test_an_mlp_as_wide_as_the_source_is_refused_only_where_it_would_shrink(small: Any, tmp_path: Path) -> None:
    folder, model = small("llama")
    grown = grow(folder, model, tmp_path / "out", hidden=48, mlp=36)
    assert difference(model, grown) < 1e-5


def test_unknown_architectures_and_tensors_are_refused(small: Any, tmp_path: Path) -> None:
    folder, _ = small("llama")
    settings_ = json.loads((folder / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps(settings_ | {"architectures": ["GemmaForCausalLM"]}))
    with pytest.raises(CheckpointError, match="is a GemmaForCausalLM, expected one that can grow"):
        plan_growth(open_checkpoint(tmp_path / "other"), GrowthOptions(hidden=48))
    config.write_text(
        json.dumps(settings_ | {"architectures": ["GPT2LMHeadModel"], "n_embd": 24, "n_layer": 2, "n_head": 4})
    )
    with pytest.raises(CheckpointError, match="is none that a GPT2LMHeadModel is known to have"):
        plan_growth(open_checkpoint(tmp_path / "other"), GrowthOptions(hidden=48))


def test_attention_scaled_by_the_number_of_the_layer_cannot_get_deeper(tmp_path: Path) -> None:
    gpt2(scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx"):
        plan_growth(open_checkpoint(tmp_path / "small"), GrowthOptions(layers=3))
