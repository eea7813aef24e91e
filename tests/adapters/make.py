"""Makes the cases of this folder with peft: a base, an adapter with random weights, and what peft merges.

pip install peft transformers torch; python tests/adapters/make.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

HERE = Path(__file__).parent


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=24,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            attention_bias=True,
        )
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=24, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
    )


def resnet() -> Any:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
    )


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"down_proj": 3, r"layers\.1\.self_attn\.q_proj": 1},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 7},
        },
    ),
    "rslora_bias": (llama, {"target_modules": "all-linear", "use_rslora": True, "bias": "all"}),
    "lora_bias": (llama, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "o_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv2d": (resnet, {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}),
    "dora": (llama, {"target_modules": ["q_proj", "up_proj", "down_proj"], "use_dora": True}),
    "dora_conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "dora_embedding": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "dora_conv2d": (resnet, {"target_modules": ["convolution"], "use_dora": True}),
}


def main() -> None:
    bases: dict[str, Path] = {}
    for seed, (name, (make, settings)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        family = make.__name__
        if family not in bases:
            bases[family] = HERE / family
            shutil.rmtree(bases[family], ignore_errors=True)
            model = make()
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(bases[family])
            (bases[family] / "generation_config.json").unlink(missing_ok=True)
        model = type(make()).from_pretrained(bases[family])
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=5, **settings))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink()
        config = folder / "adapter_config.json"
        saved = json.loads(config.read_text()) | {"base_model_name_or_path": family}
        config.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
        merged = adapted.merge_and_unload()
        merged.save_pretrained(folder / "merged")
        for path in (folder / "merged").glob("*.json"):
            path.unlink()


if __name__ == "__main__":
    main()
