"""The plan of a recycled BERT: options checked, vocabulary, scale of the input, config of the result."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from search.checkpoints.reading import CheckpointTensors
from search.errors import UserError
from search.recycling.bert_parts import POSITION, TYPE, WORD, BertOptions, Mapper, Target, input_std
from search.recycling.bert_source import HEAD, BertSource, read_bert
from search.recycling.bert_to_gpt2 import lay_out_bert, lay_out_gpt2
from search.recycling.mapping import Plan, widen
from search.recycling.vocabulary import Transfer, has_tokenizer, load_tokenizer, plan_transfer

if TYPE_CHECKING:
    from search.checkpoints.reading import Checkpoint

CLASSES: dict[Target, str] = {
    "gpt2": "GPT2LMHeadModel",
    "megatron-bert-causal": "MegatronBertForCausalLM",
    "bert-causal": "BertLMHeadModel",
}
_SAME = {
    "gpt2": "not the function of the source: causal, pre-LN, without the MLM head",
    "megatron-bert-causal": "not the function of the source: causal, pre-LN",
    "bert-causal": "each layer computes what the source's does, but every position sees only itself and what is "
    "before it",
}


def plan_bert(checkpoint: Checkpoint, options: BertOptions) -> Plan:
    """How a BERT checkpoint becomes a decoder.

    Raises:
        UserError: the checkpoint is no BERT, or the options do not fit it.
    """
    bert = read_bert(checkpoint)
    options = _settled(bert, options)
    transfer, special = _vocabulary(bert, options)
    scale = 1.0
    if options.scale_input:
        with CheckpointTensors(checkpoint) as tensors:
            word, position, kind = (widen(tensors.get(bert.names[name])) for name in (WORD, POSITION, TYPE))
            scale = 1 / input_std(word if transfer is None else transfer.apply(word), position + kind[0])
    mapper = Mapper(bert, options, transfer, scale)
    if options.to == "gpt2":
        lay_out_gpt2(mapper)
    else:
        lay_out_bert(mapper)
    used = {name for part in mapper.parts for name in part.sources}
    left_out = {name: why for name, why in mapper.left_out.items() if name not in used}
    dropped = bert.leftovers(used | set(left_out)) | left_out
    if options.to == "gpt2":
        dropped |= _dropped_head(bert)
    notes = [f"bos_token_id {special['bos_token_id']}, eos_token_id {special['eos_token_id']}"]
    if transfer is not None:
        counts = ", ".join(f"{count} {what}" for what, count in transfer.counts.items())
        notes.append(f"vocabulary of {len(transfer.rows)} tokens: {counts}")
    if options.tokenizer is None and not has_tokenizer(checkpoint.folder):
        notes.append("there is no tokenizer beside the source, so the result has none")
    elif transfer is None and mapper.positions > bert.positions:
        notes.append("the tokenizer keeps the source's model_max_length; set it to the new number of positions")
    settings = {**asdict(options), "components": sorted(options.components)}
    settings["tokenizer"] = None if options.tokenizer is None else options.tokenizer.name
    return Plan(
        source=checkpoint,
        method=f"BERT to {options.to}",
        architecture=CLASSES[options.to],
        config=_config(mapper) | special,
        parts=tuple(mapper.parts),
        dropped=dropped,
        settings=settings,
        preserving=_SAME[options.to],
        notes=tuple(notes),
        tokenizer=options.tokenizer,
    )


def _settled(bert: BertSource, options: BertOptions) -> BertOptions:
    """The options with the head decided; those that contradict each other or the source are refused."""
    folder = bert.checkpoint.folder
    if options.positions is not None and options.positions < 1:
        raise UserError(f"--positions {options.positions}: expected at least 1")
    if options.to == "gpt2" and options.keep_head:
        raise UserError(
            "--keep-head: GPT-2 has no place for BERT's output head; keep it with --to megatron-bert-causal "
            "(the same decoder with that head) or --to bert-causal"
        )
    if options.keep_head and not bert.has_head:
        raise UserError(f"--keep-head: {folder} has no MLM head to keep; recycle a BertForMaskedLM, or leave it out")
    if options.scale_input and "embeddings" not in options.components:
        raise UserError("--scale-input: there are no recycled embeddings to scale; add 'embeddings' to --parts")
    if options.to == "bert-causal":
        if options.scale_input:
            raise UserError("--scale-input: bert-causal normalises its input; leave the option out")
        if options.norm_order != "shifted":
            raise UserError("--norms: bert-causal keeps every norm in its place; leave the option out")
    if options.to == "gpt2" or options.keep_head is False:
        return replace(options, components=options.components - {"head"})
    return options


def _vocabulary(bert: BertSource, options: BertOptions) -> tuple[Transfer | None, dict[str, int | None]]:
    """The transfer to another tokenizer, and the special tokens for the config."""
    folder = bert.checkpoint.folder
    config = bert.config
    if options.tokenizer is None:
        special = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if has_tokenizer(folder):
            special = _special(load_tokenizer(folder), bert.vocabulary)
        return None, special
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder}: holds no tokenizer, so its embeddings cannot be given to the tokens of {options.tokenizer}; "
            "put tokenizer.json or vocab.txt beside the weights"
        )
    target = load_tokenizer(options.tokenizer)
    transfer = plan_transfer(load_tokenizer(folder), target, options.vocabulary, options.seed, bert.vocabulary)
    return transfer, _special(target, len(target))


def _special(tokenizer: Any, size: int) -> dict[str, int | None]:
    """Begin, end and padding; [CLS] and [SEP] serve where there is no begin or end."""

    def first(*roles: str) -> int | None:
        ids = [getattr(tokenizer, f"{role}_token_id", None) for role in roles]
        return next((token for token in ids if token is not None and token < size), None)

    return {
        "bos_token_id": first("bos", "cls"),
        "eos_token_id": first("eos", "sep"),
        "pad_token_id": first("pad"),
    }


def _dropped_head(bert: BertSource) -> dict[str, str]:
    """Why GPT-2 does without each tensor of the head."""
    transform = "GPT-2 has no layer before its output; --to megatron-bert-causal and --to bert-causal keep it"
    bias = "GPT-2's output has no bias, and no other tensor can hold it exactly; the other targets keep it"
    return {
        bert.names[name]: bias if name == "cls.predictions.bias" else transform for name in HEAD if name in bert.names
    }


def _config(m: Mapper) -> dict[str, Any]:
    """`config.json` of the result."""
    config, options = m.bert.config, m.options
    dtype = config.get("dtype", config.get("torch_dtype"))
    shared: dict[str, Any] = {
        "architectures": [CLASSES[options.to]],
        "vocab_size": m.vocabulary,
        "initializer_range": m.bert.initial_std,
        "tie_word_embeddings": True,
        "use_cache": True,
        **({} if dtype is None else {"dtype": dtype}),
    }
    eps, act = config.get("layer_norm_eps", 1e-12), config.get("hidden_act", "gelu")
    drop, attention_drop = (config.get(f"{name}_dropout_prob", 0.1) for name in ("hidden", "attention_probs"))
    if options.to == "gpt2":
        return shared | {
            "model_type": "gpt2",
            "n_embd": m.bert.hidden,
            "n_layer": m.bert.layers,
            "n_head": m.bert.heads,
            "n_inner": m.bert.mlp,
            "n_positions": m.positions,
            # BERT's gelu is the exact one; GPT-2's default, gelu_new, is the tanh approximation.
            "activation_function": act,
            "layer_norm_epsilon": eps,
            "embd_pdrop": drop,
            "resid_pdrop": drop,
            "attn_pdrop": attention_drop,
        }
    return shared | {
        "model_type": "bert" if options.to == "bert-causal" else "megatron-bert",
        "hidden_size": m.bert.hidden,
        "num_hidden_layers": m.bert.layers,
        "num_attention_heads": m.bert.heads,
        "intermediate_size": m.bert.mlp,
        "max_position_embeddings": m.positions,
        "type_vocab_size": m.bert.types,
        "hidden_act": act,
        "layer_norm_eps": eps,
        "hidden_dropout_prob": drop,
        "attention_probs_dropout_prob": attention_drop,
        "is_decoder": True,
        "add_cross_attention": False,
    }
