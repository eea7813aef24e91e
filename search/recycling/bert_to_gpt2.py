"""BERT's weights in a causal language model that stock transformers loads.

Three targets. `gpt2` is GPT-2 itself, which has no place for BERT's output head. `megatron-bert-causal` is the
same pre-LN decoder with that head (`MegatronBertForCausalLM`). `bert-causal` is BERT run causally
(`BertLMHeadModel` with `is_decoder`): post-LN, every weight as it was.

BERT normalises after each sub-layer, GPT-2 before. The shifted map gives each sub-layer the norm that fed it: the
norm of the embeddings goes to `h.0.ln_1`, that after attention to `ln_2`, that after layer l to `h.(l+1).ln_1` and
the last to `ln_f`. What is not exact: BERT's residual stream is normalised, GPT-2's is not.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from search.recycling.bert_parts import TYPE, Mapper
from search.recycling.bert_source import HEAD, LAYER
from search.recycling.mapping import Read

if TYPE_CHECKING:
    from torch import Tensor

    from search.recycling.bert_parts import Component


def lay_out_gpt2(m: Mapper) -> None:
    """GPT-2 stores its matrices input x output (Conv1D), BERT output x input."""
    d, inner = m.bert.hidden, m.bert.mlp
    m.words("transformer.wte.weight")
    m.table("transformer.wpe.weight", fold_type=True)
    for i in range(m.bert.layers):
        here, there = f"encoder.layer.{i}.", f"transformer.h.{i}."
        _norm(m, f"{there}ln_1", _before_attention(m, i))
        for kind in ("weight", "bias"):
            sources = tuple(f"{here}attention.self.{name}.{kind}" for name in ("query", "key", "value"))
            shape = (d, 3 * d) if kind == "weight" else (3 * d,)
            operation = "transposed, fused" if kind == "weight" else "fused"
            initial: Any = "normal" if kind == "weight" else 0.0
            m.add(
                f"{there}attn.c_attn.{kind}",
                shape,
                "attention",
                operation,
                sources,
                _fused(sources),
                "query, key, value side by side",
                initial=initial,
            )
        _transposed(m, f"{there}attn.c_proj", f"{here}attention.output.dense", "attention", (d, d), residual=True)
        _norm(m, f"{there}ln_2", _before_mlp(m, i))
        _transposed(m, f"{there}mlp.c_fc", f"{here}intermediate.dense", "mlp", (d, inner))
        _transposed(m, f"{there}mlp.c_proj", f"{here}output.dense", "mlp", (inner, d), residual=True)
    _norm(m, "transformer.ln_f", f"encoder.layer.{m.bert.layers - 1}.output.LayerNorm", last=True)


def lay_out_bert(m: Mapper) -> None:
    """Both targets that keep BERT's layout of tensors: only the norms have other places."""
    pre_norm = m.options.to == "megatron-bert-causal"
    m.words("bert.embeddings.word_embeddings.weight")
    m.table("bert.embeddings.position_embeddings.weight", fold_type=False)
    scaled: dict[str, Any] = {} if m.scale == 1.0 else {"factor": m.scale, "note": m.scale_note()}
    m.copy("bert." + TYPE, TYPE, "embeddings", **scaled)
    if not pre_norm:
        _norm(m, "bert.embeddings.LayerNorm", "embeddings.LayerNorm")
    for i in range(m.bert.layers):
        here = f"encoder.layer.{i}."
        for name in LAYER:
            if "LayerNorm" not in name:
                mlp = name.startswith(("intermediate.", "output."))
                m.copy(f"bert.{here}{name}", here + name, "mlp" if mlp else "attention")
            elif not pre_norm:
                m.copy(f"bert.{here}{name}", here + name, "norms")
        if pre_norm:
            _norm(m, f"bert.{here}attention.ln", _before_attention(m, i))
            _norm(m, f"bert.{here}ln", _before_mlp(m, i))
    if pre_norm:
        _norm(m, "bert.encoder.ln", f"encoder.layer.{m.bert.layers - 1}.output.LayerNorm")
    for name in HEAD:
        if name == "cls.predictions.bias":
            _output_bias(m, name)
        elif name.endswith("dense.weight"):
            m.add(name, (m.bert.hidden,) * 2, "head", "copied", (name,), partial(_read, name))
        else:
            m.copy(name, name, "head", **(m.unscale() if "LayerNorm" in name else {}))


def _output_bias(m: Mapper, name: str) -> None:
    transfer = m.transfer
    m.add(
        name,
        (m.vocabulary,),
        "head",
        "copied" if transfer is None else "transferred to the other vocabulary",
        (name,),
        lambda read: read(name) if transfer is None else transfer.apply(read(name)),
        initial=0.0,
    )


def _read(name: str, read: Read) -> Tensor:
    return read(name)


def _before_attention(m: Mapper, layer: int) -> str:
    if m.options.norm_order == "same-index":
        return f"encoder.layer.{layer}.attention.output.LayerNorm"
    return f"encoder.layer.{layer - 1}.output.LayerNorm" if layer else "embeddings.LayerNorm"


def _before_mlp(m: Mapper, layer: int) -> str:
    inside = "output.LayerNorm" if m.options.norm_order == "same-index" else "attention.output.LayerNorm"
    return f"encoder.layer.{layer}.{inside}"


def _norm(m: Mapper, name: str, source: str, *, last: bool = False) -> None:
    for kind in ("weight", "bias"):
        m.copy(f"{name}.{kind}", f"{source}.{kind}", "norms", **(m.unscale() if last else {}))


def _transposed(
    m: Mapper, name: str, source: str, component: Component, shape: tuple[int, int], *, residual: bool = False
) -> None:
    weight = f"{source}.weight"
    m.add(
        f"{name}.weight",
        shape,
        component,
        "transposed",
        (weight,),
        lambda read: read(weight).t(),
        initial="residual" if residual else "normal",
    )
    m.copy(f"{name}.bias", f"{source}.bias", component)


def _fused(sources: tuple[str, ...]) -> Any:
    def make(read: Read) -> Tensor:
        import torch

        return torch.cat([read(source).t() for source in sources], dim=-1)  # t() leaves vectors as they are

    return make
