"""Latent attention pooling against loops, and the names under which it was released."""

import math

import pytest
import torch

from regard import LatentAttentionPool, OptionError, ShapeError
from regard.layers.pooling import Pool
from tests.oracles import coin, normal

# the released latent_attention_model: every tensor and its shape, at width 4096 with 512 latents and 8 heads of 4096
RELEASED = {
    "latents": (512, 4096),
    "cross_attend_blocks.0.fn.to_kv.weight": (65536, 4096),
    "cross_attend_blocks.0.fn.to_out.weight": (4096, 32768),
    "cross_attend_blocks.0.fn.to_q.weight": (32768, 4096),
    "cross_attend_blocks.0.norm.bias": (4096,),
    "cross_attend_blocks.0.norm.weight": (4096,),
    "cross_attend_blocks.0.norm_context.bias": (4096,),
    "cross_attend_blocks.0.norm_context.weight": (4096,),
    "cross_attend_blocks.1.fn.net.0.bias": (32768,),
    "cross_attend_blocks.1.fn.net.0.weight": (32768, 4096),
    "cross_attend_blocks.1.fn.net.2.bias": (4096,),
    "cross_attend_blocks.1.fn.net.2.weight": (4096, 16384),
    "cross_attend_blocks.1.norm.bias": (4096,),
    "cross_attend_blocks.1.norm.weight": (4096,),
}


def moved(module):
    """The module in float64, its weights off their start."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def norm(x, weight, bias):
    x = x - x.mean()
    return x / (x.square().mean() + 1e-5).sqrt() * weight + bias


def attend(q, k, v, heads):
    """One query (D H), keys and values (M, D H), head by head."""
    out, width = [], len(q) // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = torch.stack([q[part] @ key[part] for key in k]) / math.sqrt(width)
        weights = (scores - scores.max()).exp()
        out.append((weights / weights.sum()) @ v[:, part])
    return torch.cat(out)


def feed(w, u):
    value, gate = (
        w["cross_attend_blocks.1.fn.net.0.weight"] @ norm_of(w, "1.norm", u) + w["cross_attend_blocks.1.fn.net.0.bias"]
    ).chunk(2)
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return w["cross_attend_blocks.1.fn.net.2.weight"] @ (value * gelu) + w["cross_attend_blocks.1.fn.net.2.bias"]


def norm_of(w, name, x):
    return norm(x, w[f"cross_attend_blocks.{name}.weight"], w[f"cross_attend_blocks.{name}.bias"])


def loop(pool, x, padding, heads):
    """Token by token, by the words of the paper: tokens are queries, latents keys and values."""
    w = pool.state_dict()
    source = torch.stack([norm_of(w, "0.norm_context", latent) for latent in w["latents"]])
    k, v = (source @ w["cross_attend_blocks.0.fn.to_kv.weight"].T).chunk(2, -1)
    rows = []
    for tokens, taken in zip(x, padding, strict=True):
        outs = []
        for token in tokens[taken]:
            q = w["cross_attend_blocks.0.fn.to_q.weight"] @ norm_of(w, "0.norm", token)
            u = token + w["cross_attend_blocks.0.fn.to_out.weight"] @ attend(q, k, v, heads)
            outs.append(u + feed(w, u))
        rows.append(sum(outs) / len(outs))
    return torch.stack(rows)


@pytest.mark.parametrize("heads, head_dim", [(2, None), (3, 5)])
def test_it_equals_a_loop_over_tokens(heads, head_dim):
    pool = moved(LatentAttentionPool(12, num_latents=7, heads=heads, head_dim=head_dim))
    (x,) = normal((3, 9, 12))
    padding = coin(3, 9)
    torch.testing.assert_close(pool(x, padding=padding), loop(pool, x, padding, heads), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ff_mult", [1, 4])
def test_without_output_and_last_feed_forward_it_is_the_mean(ff_mult):
    pool = moved(LatentAttentionPool(12, num_latents=7, heads=2, ff_mult=ff_mult))
    attention, feed_forward = pool.cross_attend_blocks
    (x,) = normal((3, 9, 12))
    padding = coin(3, 9)
    wanted = torch.stack([row[taken].mean(0) for row, taken in zip(x, padding, strict=True)])
    assert (pool(x, padding=padding) - wanted).abs().max() > 1e-2
    for weight in (attention.fn.to_out.weight, feed_forward.fn.net["2"].weight, feed_forward.fn.net["2"].bias):
        torch.nn.init.zeros_(weight)
    torch.testing.assert_close(pool(x, padding=padding), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Pool(12, "mean")(x, padding=padding), wanted, rtol=1e-12, atol=1e-12)


def test_the_order_of_the_latents_does_not_matter_and_their_values_do():
    pool = moved(LatentAttentionPool(12, num_latents=7, heads=2))
    (x,) = normal((3, 9, 12))
    before = pool(x)
    with torch.no_grad():
        pool.latents.copy_(pool.latents[torch.randperm(7)])
    torch.testing.assert_close(pool(x), before, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        pool.latents[0] += torch.randn(12)
    assert (pool(x) - before).abs().max() > 1e-3


def test_tokens_ask_latents_and_not_the_reverse():
    # one latent is a value that every token gets, whatever it asks; a Perceiver would mix the tokens instead
    pool = moved(LatentAttentionPool(12, num_latents=1, heads=2))
    for weight in (pool.cross_attend_blocks[1].fn.net["2"].weight, pool.cross_attend_blocks[1].fn.net["2"].bias):
        torch.nn.init.zeros_(weight)
    x, y = normal((2, 9, 12), (2, 9, 12))
    torch.testing.assert_close(pool(x) - x.mean(1), pool(y) - y.mean(1), rtol=1e-10, atol=1e-10)


def test_it_has_the_names_and_shapes_of_the_released_weights():
    with torch.device("meta"):
        pool = LatentAttentionPool(4096, head_dim=4096)
        pool.load_state_dict({name: torch.empty(shape) for name, shape in RELEASED.items()}, strict=True, assign=True)
    assert {name: tuple(x.shape) for name, x in pool.state_dict().items()} == RELEASED


def test_many_tokens_in_bfloat16_are_averaged_as_in_float32():
    x = (normal((1, 4000, 8))[0] + 3).bfloat16()
    wanted = x.double().mean(1)
    found = Pool(8)(x)
    assert found.dtype is torch.bfloat16
    assert (found.double() - wanted).abs().max() < 0.02


@pytest.mark.parametrize("padded", ["left", "right"])
def test_the_last_token_is_the_last_that_takes_part(padded):
    (x,) = normal((2, 6, 4))
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[0, (slice(3) if padded == "left" else slice(3, None))] = False
    wanted = torch.stack((x[0, -1 if padded == "left" else 2], x[1, -1]))
    assert torch.equal(Pool(4, "last")(x, padding=padding), wanted)
    padding[1] = False
    assert (Pool(4, "last")(x, padding=padding)[1] == 0).all()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: LatentAttentionPool(12, heads=5), OptionError, "12 does not divide into 5 heads"),
        (lambda: Pool(12, "middle"), OptionError, '"mean" or the "last"'),
        (lambda: LatentAttentionPool(12, heads=2)(torch.randn(2, 3, 13)), ShapeError, "C = 12"),
        (lambda: LatentAttentionPool(12, heads=2)(torch.randn(2, 4, 3, 12)), ShapeError, r"\(B, N, C\)"),
        (
            lambda: Pool(12)(torch.randn(2, 3, 12), padding=torch.ones(2, 3)),
            ShapeError,
            r"must be bool \(2, 3\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
