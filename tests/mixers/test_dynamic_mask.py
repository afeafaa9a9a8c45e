from __future__ import annotations

import pytest
import torch

import regard
from regard import DynamicMaskAttention, OptionError, Unsupported
from regard.bench.recall.zoology import MQAR
from regard.bench.training import Recipe, train
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from regard.ops.dynamic_mask import dynamic_mask_score
from regard.primitives.positions import rope
from tests.ops.test_dynamic_mask import sets
from tests.oracles import attention, normal


def layer(window=5, **options):
    torch.manual_seed(0)
    made = DynamicMaskAttention(16, 4, kv_heads=2, window=window, **options).double()
    torch.nn.init.normal_(made.a)
    return made


def expected(layer, x, valid=None):
    q, k, v = (to(x).unflatten(-1, (-1, 4)) for to in (layer.to_q, layer.to_k, layer.to_v))
    rms = lambda y, norm: norm.weight * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    q, k, v = rms(q, layer.norm_q).transpose(1, 2), rms(k, layer.norm_k).transpose(1, 2), v.transpose(1, 2)
    score = dynamic_mask_score(v, layer.to_score.weight, layer.a, exp=layer.exp)
    places = torch.arange(x.shape[1])
    out, _ = attention(
        rope(q, places), rope(k, places), v, bias=score.repeat_interleave(2, 1)[:, :, None],
        allowed=sets(score.detach(), layer.window, valid=valid).repeat_interleave(2, 1),
    )  # fmt: skip
    return layer.to_out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("exp", [True, False])
@pytest.mark.parametrize("window", [1, 5, 40])
def test_it_is_attention_to_the_keys_whose_values_score_best(window, exp):
    a, (x,) = layer(window, exp=exp), normal((2, 23, 16))
    torch.testing.assert_close(a(x, is_causal=True), expected(a, x))


def test_padding_is_never_chosen():
    a, (x,) = layer(), normal((2, 23, 16))
    valid = torch.ones(2, 23, dtype=torch.bool)
    valid[0, :6], valid[1, 9] = False, False
    out, want = a(x, padding=valid, is_causal=True), expected(a, x, valid)
    torch.testing.assert_close(out[valid], want[valid])
    assert out[0, :6].abs().max() == 0


@pytest.mark.parametrize("pieces", [(1,) * 23, (3, 1, 12, 7), (20, 1, 1, 1)])
@pytest.mark.parametrize("padded", [0, 4])
def test_a_cache_of_the_window_decodes_the_parallel_form(pieces, padded):
    a, (x,) = layer(), normal((2, 23, 16))
    valid = torch.ones(2, 23, dtype=torch.bool)
    valid[0, :padded] = False
    state, outs, at = a.init_state(2), [], 0
    for n in pieces:
        piece = slice(at, at + n)
        out, state = a.prefill(x[:, piece], state, padding=valid[:, piece] if padded > at else None)
        outs.append(out)
        at += n
        assert state.keys.shape[2] == min(at, 5)
    whole = a(x, padding=valid, is_causal=True)
    torch.testing.assert_close(torch.cat(outs, 1)[valid], whole[valid])


def test_the_cache_holds_the_best_keys_of_each_head_and_nothing_else():
    a, (x,) = layer(), normal((2, 23, 16))
    _, state = a.prefill(x, a.init_state(2))
    score = dynamic_mask_score(
        a.to_v(x).unflatten(-1, (-1, 4)).transpose(1, 2), a.to_score.weight, a.a
    )  # fmt: skip
    held = torch.zeros(2, 2, 23, dtype=torch.bool).scatter(-1, state.positions.long(), True)
    assert torch.equal(held, sets(score.detach(), 5)[:, :, -1])
    assert not torch.equal(held[:, 0], held[:, 1])
    assert state.size_bytes == a.state_bytes(2, 23) == a.state_bytes(2, 1000)


def test_a_new_layer_prefers_no_key():
    a, (x,) = DynamicMaskAttention(16, 4, window=40).double(), normal((2, 23, 16))
    assert torch.equal(a.a, torch.zeros(4).double())
    state = a.prefill(x, a.init_state(2))[1]
    assert torch.equal(state.marks, torch.ones_like(state.marks))


def test_the_learned_scores_get_gradients():
    a, (x,) = layer(), normal((2, 23, 16))
    a(x, is_causal=True).square().sum().backward()
    assert a.a.grad.abs().min() > 0
    assert a.to_score.weight.grad.abs().max() > 0


def test_bad_use_is_refused():
    with pytest.raises(OptionError, match="window of at least 1 key"):
        layer(0)
    a, (x,) = layer(), normal((2, 7, 16))
    with pytest.raises(Unsupported, match="pass is_causal=True"):
        a(x)
    with pytest.raises(Unsupported, match="reads no context"):
        a(x, x)


def recall(mixer, steps, tmp_path, task, dim=64, **options):
    torch.manual_seed(0)
    model = SequenceModel(
        SequenceSettings(
            vocab=task.vocab_size, dim=dim, depth=2, heads=4, mixer=("short_conv", mixer), options={mixer: options},
            hidden=0,
        )
    )  # fmt: skip
    recipe = Recipe(steps, 64, 1e-2, 0, "accuracy", "recall", 256, 1000, early_stop=True)
    outcome = train(model, task, recipe, checkpoint=tmp_path / mixer)
    return {"accuracy": outcome.value, "steps": outcome.steps, "seconds": outcome.seconds}


@pytest.mark.slow
def test_dynamic_mask_recalls_beyond_a_window(tmp_path, record):
    task = MQAR(256, 64, 8)
    figures = {
        "task": "MQAR vocab 256, length 64, 8 pairs; both see 16 keys; 64 rows a step, lr 1e-2, at most 1000 steps",
        "conv + dynamic_mask (16)": recall("dynamic_mask", 1000, tmp_path, task, window=16),
        "conv + sliding_window (16)": recall("sliding_window", 1000, tmp_path, task, window=16),
        "chance": task.chance,
    }
    record(figures)
    assert (
        figures["conv + dynamic_mask (16)"]["accuracy"] - figures["conv + sliding_window (16)"]["accuracy"] >= 0.2
    )  # fmt: skip


def test_the_named_mixer_is_the_layer():
    assert isinstance(regard.mixer("dynamic_mask", 16, 4, window=3), DynamicMaskAttention)
