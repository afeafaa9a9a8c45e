"""A two-layer model that copies by construction: one head carries the previous token, one finds what followed.

The stream holds, side by side: the token, its position, the token before (written by head 0 of layer 0), and the answer
(written by head 0 of layer 1, which looks for "what came after a token like me"). Head 1 of layer 1 looks for its own token.
All other heads are noise.
"""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

VOCAB, LENGTH, HEADS, WIDTH = 32, 64, 4, 64
TOKEN, PLACE = slice(0, VOCAB), slice(VOCAB, VOCAB + LENGTH)
BEFORE = slice(VOCAB + LENGTH, 2 * VOCAB + LENGTH)
ANSWER = slice(2 * VOCAB + LENGTH, 3 * VOCAB + LENGTH)
# a score that leaves nothing to any other key
SURE = 60.0
PREVIOUS, COPYING, DUPLICATE = (0, 0), (1, 0), (1, 1)


def induction_model(seed: int = 0) -> GPT2LMHeadModel:
    """Greedy, without an end; ids below VOCAB, at most LENGTH of them."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=LENGTH, n_embd=HEADS * WIDTH, n_head=HEADS, n_layer=2, n_inner=8, bos_token_id=None,
        eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    eye = torch.eye(WIDTH)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name:
                continue
            noise = 0.02 if "c_attn.weight" in name else 0.0
            parameter.copy_(noise * torch.randn_like(parameter))
        base = model.transformer
        base.wte.weight[:, TOKEN] = torch.eye(VOCAB)
        base.wpe.weight[:, PLACE] = torch.eye(LENGTH)
        # a query at place i asks for the key of place i - 1
        _set(base.h[0], 0, "q", PLACE, torch.roll(eye, -1, 1))
        _set(base.h[0], 0, "k", PLACE, eye)
        _set(base.h[0], 0, "v", TOKEN, torch.eye(VOCAB))
        base.h[0].attn.c_proj.weight[:VOCAB, BEFORE] = torch.eye(VOCAB)
        for head, seen in ((0, BEFORE), (1, TOKEN)):
            _set(base.h[1], head, "q", TOKEN, torch.eye(VOCAB))
            _set(base.h[1], head, "k", seen, torch.eye(VOCAB))
        _set(base.h[1], 0, "v", TOKEN, torch.eye(VOCAB))
        base.h[1].attn.c_proj.weight[:VOCAB, ANSWER] = torch.eye(VOCAB)
        model.lm_head.weight[:, ANSWER] = torch.eye(VOCAB)
    return model


def _set(block, head, part, rows, table):
    """Let a head read a part of the stream by a table, and nothing else."""
    start = "qkv".index(part) * HEADS * WIDTH + head * WIDTH
    weight = block.attn.c_attn.weight
    weight[:, start : start + WIDTH] = 0
    weight[rows, start : start + table.shape[1]] = table * (SURE**0.5 if part in "qk" else 1.0)
