"""Specimens: tiny transformers models with random weights, one of each family that the host is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

# its configs take more keywords than they declare
hf: Any = transformers

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def _vit() -> Any:
    return hf.ViTModel(hf.ViTConfig(**VISION))


def _bert() -> Any:
    return hf.BertModel(hf.BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}))


def _deepseek() -> Any:
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
            moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=8, v_head_dim=6, n_shared_experts=1,
        )
    )  # fmt: skip


def _gemma() -> Any:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=kinds))


def _qwen_moe() -> Any:
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    )


def _gpt2() -> Any:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=None)
    )


def _t5() -> Any:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def _llava() -> Any:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**SIZES), vision_config=hf.CLIPVisionConfig(**VISION), image_token_id=59
        )
    )


def _qwen_vl() -> Any:
    text: dict[str, Any] = {**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision: dict[str, Any] = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
        "spatial_merge_size": 2,
    }  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=59, video_token_id=58, vision_start_token_id=57
        )
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8)),
    "gemma3": _gemma,
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": _qwen_moe,
    "deepseek": _deepseek,
    "gpt2": _gpt2,
    "t5": _t5,
    "llava": _llava,
    "qwen_vl": _qwen_vl,
    "bert": _bert,
    "vit": _vit,
}
DECODERS = ("llama", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3_moe", "deepseek", "gpt2")


def make(name: str, seed: int = 0) -> Any:
    """A tiny model in eval mode, with weights large enough that attention is not flat."""
    torch.manual_seed(seed)
    model = MAKERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def prompt(batch: int = 2, length: int = 12, *, padded: int = 0, seed: int = 1) -> dict[str, Tensor]:
    """ids and padding mask; the first row has `padded` pads on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 50, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
