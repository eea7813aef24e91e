"""Text as a causal language model sees it: its tokenizer, its beginning token, how much it can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evaluators.base import Context
from evaluators.errors import UserError
from evaluators.items import DataOptions

Tokens = NDArray[np.int64]

DEFAULT_MAX_TOKENS = 1024
CAUSAL_ARCHITECTURES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How classes of models that predict the next token are called; some multimodal ones are among the last."""


class TextOptions(DataOptions):
    """Options of evaluators that read likelihoods of text."""

    max_tokens: int | None = Field(
        None,
        ge=1,
        description=f"most tokens that the model reads at once (default {DEFAULT_MAX_TOKENS}, or the model's "
        "number of positions if that is less)",
    )
    batch_tokens: int = Field(2048, ge=1, description="tokens per batch, padding included: trades memory for speed")
    add_bos: bool | None = Field(
        None,
        description="whether texts start with the beginning-of-sequence token (default: ask the tokenizer)",
    )


class TextEncoder:
    """Tokens of texts for the model of a worker.

    Attributes:
        max_tokens: most tokens that the model reads at once.
        bos: the token that texts start with, None for none.
        prefix: a token to read before an empty text: beginning or, failing that, end of sequence.

    Raises:
        UserError: no tokenizer in the model's folder, or options that the model cannot fulfil.
    """

    def __init__(self, context: Context, options: TextOptions) -> None:
        self._folder = context.model_folder
        self._tokenizer = load_tokenizer(self._folder)
        config = _text_config(self._folder)
        self._vocabulary: int | None = getattr(config, "vocab_size", None)
        positions: int | None = getattr(config, "max_position_embeddings", None)
        if options.max_tokens and positions and options.max_tokens > positions:
            raise UserError(
                f"max_tokens is {options.max_tokens}, but the model in {self._folder} has {positions} "
                f"positions; set max_tokens to at most {positions}"
            )
        self.max_tokens = options.max_tokens or min(positions or DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS)
        bos: int | None = self._tokenizer.bos_token_id
        if options.add_bos and bos is None:
            raise UserError(f"add_bos is true, but the tokenizer in {self._folder} has no beginning-of-sequence token")
        wanted = self._puts_bos(bos) if options.add_bos is None else options.add_bos
        self.bos = bos if wanted else None
        self.prefix: int | None = bos if bos is not None else self._tokenizer.eos_token_id

    def _puts_bos(self, bos: int | None) -> bool:
        return bos is not None and list(self._tokenizer("a")["input_ids"])[:1] == [bos]

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of every text, without any special tokens around it.

        Raises:
            UserError: the tokenizer gives tokens that the model does not know.
        """
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        found = [np.asarray(tokens, np.int64) for tokens in encoded]
        largest = max((int(tokens.max()) for tokens in found if len(tokens)), default=0)
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise UserError(
                f"{self._folder}: the tokenizer gives token {largest}, but the model knows only "
                f"{self._vocabulary} tokens; is it the tokenizer of this model?"
            )
        return found


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint folder. Runs no code from the folder and asks no hub.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise on bad files
        raise UserError(
            f"{folder}: its tokenizer cannot be loaded: {_first_line(error)}; expected tokenizer.json or the "
            "like in this folder, as the model's author publishes it"
        ) from error
    # For some model types transformers makes up an empty tokenizer where the files are missing.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(
            f"{folder}: no tokenizer in this folder; expected tokenizer.json or the like, as the model's "
            "author publishes it"
        )
    tokenizer.model_max_length = 10**9  # texts are cut into windows here; do not warn about long ones
    return tokenizer


def _text_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{folder}: config.json cannot be read: {_first_line(error)}") from error
    if config.is_encoder_decoder:
        raise UserError(f"{folder}: an encoder-decoder model; expected one that predicts the next token of a text")
    return config.get_text_config()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" :.") if lines else type(error).__name__
