"""A tiny language model with random weights and a tokenizer of its own, as a folder that commands are given."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers as parts
import torch
import transformers

from regard.bench.recall.needle import language_reference

hf: Any = transformers
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@lru_cache(maxsize=1)
def _trained() -> str:
    made = parts.Tokenizer(parts.models.BPE())
    made.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = parts.decoders.ByteLevel()
    letters = parts.pre_tokenizers.ByteLevel.alphabet()
    trainer = parts.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=letters, special_tokens=["<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator([language_reference()[:60_000]], trainer)
    made.post_processor = parts.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return str(made.to_str())


def text_tokenizer(chat: bool = False) -> Any:
    """Byte pairs learned on Python's reference; begin 0, end 1."""
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=parts.Tokenizer.from_str(_trained()), bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATE if chat else None
    return made


def text_lm(positions: int = 600) -> Any:
    """Two layers of four heads of 8, two key heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(
        **sizes, vocab_size=500, num_key_value_heads=2, max_position_embeddings=positions, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def save_text_lm(folder: Path, *, chat: bool = False) -> Path:
    """Write both into a folder."""
    text_lm().save_pretrained(folder)
    text_tokenizer(chat).save_pretrained(folder)
    return folder
