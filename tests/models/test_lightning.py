from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import LightningAttention, OptionError, SequenceModel, SequenceSettings, TransNormer
from regard.bench.text.corpus import read_corpus
from regard.bench.training import Recipe, train
from regard.models.sequence.lightning import SIZES
from regard.ops.lightning import lightning_decay
from regard.primitives.positions import lrpe
from tests.oracles import normal
from tests.pairs import nats_of_pairs

# the paper's table of model variants
PUBLISHED = {"transnormer_385m": 384_974_848, "transnormer_1b": 992_165_888, "transnormer_7b": 6_780_547_072}


def made(dtype=torch.float64, **options):
    torch.manual_seed(0)
    small = {"vocab": 11, "dim": 16, "depth": 3, "heads": 4, "hidden": 24, **options}
    return TransNormer(dataclasses.replace(SIZES["transnormer_385m"], **small)).to(dtype).eval()


def normed(x):
    return x / x.norm(dim=-1, keepdim=True) * x.shape[-1] ** 0.5


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_published_parameters(name):
    s = SIZES[name]
    with torch.device("meta"):
        model = regard.build(name)
    count = sum(p.numel() for p in model.parameters())
    # four projections and an output, three of the gated unit, one table of tokens, one of angles; no norm has a gain
    assert count == s.depth * (5 * s.dim**2 + 3 * s.dim * s.hidden) + s.vocab * s.dim + s.dim
    # the table has up to two vectors a layer more, as of angles in every layer
    assert 0 <= PUBLISHED[name] - count <= 2 * s.depth * s.dim


def test_it_is_its_equations():
    model, ids = made(), torch.randint(11, (2, 9))
    x = model.embed.weight[ids] * 4
    i, j = torch.arange(9)[:, None], torch.arange(9)
    for place, block in enumerate(model.blocks):
        a, h = block.mixer, normed(x)
        q, k, v = (to(h).view(2, 9, 4, 4).transpose(1, 2) for to in (a.to_q, a.to_k, a.to_v))
        scores = F.silu(q)[:, :, :, None] * F.silu(k)[:, :, None]
        if place == 0:
            scores = scores * torch.cos((i - j)[..., None] * a.theta[:, None, None])
        powers = lightning_decay(4, place, 3)[:, None, None] ** (i - j).clamp(min=0) * (j <= i)
        out = ((scores.sum(-1) * powers) @ v).transpose(1, 2).flatten(2)
        x = x + (normed(out) * (h @ a.to_gate.weight.T)) @ a.to_out.weight.T
        h = normed(x)
        x = x + ((h @ block.mlp.gate.weight.T) * (h @ block.mlp.up.weight.T)) @ block.mlp.down.weight.T
    torch.testing.assert_close(model(ids), normed(x) @ model.embed.weight.T)


def test_only_the_first_layer_has_angles_and_they_begin_as_published():
    model = made()
    assert [block.mixer.theta is None for block in model.blocks] == [False, True, True]
    index = torch.arange(16).double().view(4, 4)
    torch.testing.assert_close(model.blocks[0].mixer.theta, 1e4 ** (-2 * index / 16), rtol=1e-6, atol=0)


def test_no_norm_has_a_gain_and_all_leave_an_rms_of_one():
    model, (x,) = made(), normal((3, 16))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)]
    assert len(norms) == 3 * 3 + 1
    assert not any(list(m.parameters()) for m in norms)
    for norm in norms:
        torch.testing.assert_close(norm(1e3 * x).square().mean(-1), torch.ones(3).double())


def test_weights_begin_with_the_published_deviation():
    model = made(torch.float32, dim=128, hidden=256)
    assert all(abs(p.std().item() / 0.02 - 1) < 0.05 for name, p in model.named_parameters() if "theta" not in name)


def test_relative_positions_make_scores_depend_on_the_distance_alone():
    (theta,) = normal((3, 5))
    q, k = normal((1, 3, 1, 5), (1, 3, 1, 5), seed=1)
    for distance in (0, 1, 7, -4):
        scores = [
            (lrpe(q, torch.tensor([i]), theta) * lrpe(k, torch.tensor([i - distance]), theta)).sum(-1)
            for i in (10, 50, 10**6)
        ]
        want = (q * k * torch.cos(distance * theta[:, None])).sum(-1)
        for score in scores:
            torch.testing.assert_close(score, want, rtol=1e-7, atol=1e-8)


def test_relative_positions_double_the_width_and_keep_the_length():
    (x,) = normal((2, 3, 7, 5))
    out = lrpe(x, torch.arange(7), normal((3, 5))[0])
    assert out.shape == (2, 3, 7, 10)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(out[:, :, 0], F.pad(x[:, :, 0], (0, 5)))


def test_float32_positions_hold_a_million_tokens_out():
    (theta,) = normal((1, 4), dtype=torch.float32)
    q, k = normal((1, 1, 1, 4), (1, 1, 1, 4), dtype=torch.float32)
    near, far = ((lrpe(q, torch.tensor([p]), theta) * lrpe(k, torch.tensor([p - 3]), theta)).sum() for p in (3, 10**6))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", [lambda a, x: a(x, x), lambda a, x: a(x, x, is_causal=True)])
def test_relative_positions_are_refused_with_a_context(call):
    with pytest.raises(regard.Unsupported, match="reads no context"):
        call(LightningAttention(16, 4, lrpe=True).double(), normal((2, 9, 16))[0])


@pytest.mark.parametrize("pieces", [(250,), (150, 100), (192, 50, *([1] * 8))])
@pytest.mark.parametrize("training", [True, False])
def test_decoding_after_three_chunks_equals_the_parallel_form(pieces, training):
    model, ids = made().train(training), torch.randint(11, (2, 250))
    with torch.no_grad():
        want, state, outs, at = model(ids), model.init_state(2), [], 0
        for n in pieces:
            out, state = model.prefill(ids[:, at : at + n], state)
            outs.append(out)
            at += n
        torch.testing.assert_close(torch.cat(outs, 1), want)
        assert state.size_bytes == model.state_bytes(2, 250) == model.state_bytes(2, 10**6)
        # the position is the state's, not the model's
        torch.testing.assert_close(model(ids), want)


def test_padding_in_front_changes_no_real_logit():
    model, ids = made(), torch.randint(11, (1, 6))
    padded = F.pad(ids, (3, 0), value=5)
    padding = torch.arange(9)[None] >= 3
    torch.testing.assert_close(model(padded, padding=padding)[:, 3:], model(ids))


def test_the_first_layer_decays_as_its_slopes_and_the_last_almost_not_at_all():
    decays = [block.mixer.decay for block in made(depth=24, heads=8).blocks]
    slopes = torch.tensor(decays[0]).double().log() / -(1 + 1e-5)
    torch.testing.assert_close(slopes, 2.0 ** -torch.arange(1, 9).double())
    assert all(1 - 1e-5 < d < 1 for d in decays[-1])
    assert all(a < b for before, after in itertools.pairwise(decays) for a, b in zip(before, after, strict=True))
    assert made(depth=1).blocks[0].mixer.decay == tuple(lightning_decay(4, 0, 1).tolist())


def test_half_precision_is_near_float32():
    model = made(torch.bfloat16)
    exact, ids = made(torch.float32), torch.randint(11, (2, 40))
    exact.load_state_dict(model.state_dict())
    out, want = model(ids).float(), exact(ids)
    assert (out - want).norm() < 0.03 * want.norm()


def test_an_encoder_is_refused():
    with pytest.raises(OptionError, match="no encoder form"):
        made(is_causal=False)


def stack(name, **options):
    torch.manual_seed(0)
    small = {"vocab": 257, "dim": 64, "depth": 2, "heads": 2, "hidden": 168, **options}
    if name == "transnormer":
        return TransNormer(dataclasses.replace(SIZES["transnormer_385m"], **small))
    return SequenceModel(SequenceSettings(**small))


def step_seconds(model, n, rows):
    """Processor time of one training step, a token."""
    ids = torch.randint(257, (rows, n))
    start = time.process_time()
    model(ids).square().mean().backward()
    return (time.process_time() - start) / (n * rows)


def best_times(models, lengths, repeats, tokens):
    """The least time a token of every model at every length, in turns, so that a busy machine slows all."""
    best = {(name, n): float("inf") for name in models for n in lengths}
    for _ in range(repeats):
        for name, model in models.items():
            for n in lengths:
                best[name, n] = min(best[name, n], step_seconds(model, n, max(tokens // n, 1)))
    return best


def explicit(model):
    """With attention as a table of all pairs, as torch's own math does it."""
    for block in model.blocks:
        block.mixer.op = functools.partial(block.mixer.op, engine="reference")
    return model


def test_timing_a_training_step_costs_a_token_the_same_at_any_length():
    best = best_times({"transnormer": stack("transnormer", depth=1)}, (512, 2048), 5, 2048)
    assert best["transnormer", 2048] / best["transnormer", 512] < 1.5


@pytest.mark.slow
def test_transnormer_trains_at_constant_speed(record):
    lengths = (512, 1024, 2048, 4096, 8192)
    models = {"transnormer": stack("transnormer"), "softmax, all pairs": explicit(stack("softmax"))}
    best = best_times({"transnormer": models["transnormer"]}, (*lengths, 16384), 3, 16384)
    best |= best_times({"softmax, all pairs": models["softmax, all pairs"]}, lengths[:4], 2, 4096)
    record(
        {
            "task": "one training step of 2 layers, width 64, 2 heads: processor time a token, microseconds",
            **{name: {n: round(t * 1e6, 2) for (m, n), t in best.items() if m == name} for name in models},
        }
    )
    for name, limit in (("transnormer", 1.5), ("softmax, all pairs", None)):
        growth = best[name, 4096] / best[name, 1024]
        assert growth < limit if limit else growth > 2.5, (name, growth)
    assert best["transnormer", 16384] / best["transnormer", 1024] < 1.5


@pytest.mark.slow
def test_transnormer_on_text(tmp_path, record):
    corpus = read_corpus(seq_len=256)
    figures = {
        "task": "bytes of the Python standard library, length 256, width 64, 2 layers, 2 heads, 250 steps of 8 rows"
    }
    for name in ("transnormer", "softmax"):
        outcome = train(
            stack(name), corpus, Recipe(250, 8, 3e-3, 0, "bits_per_byte", name, 32, 128), checkpoint=tmp_path / name
        )
        figures[name] = {"bits_per_byte": outcome.value, "seconds": outcome.seconds}
    rows = corpus.build("test", 128)
    asked = rows.targets >= 0
    nats = nats_of_pairs(corpus, rows.inputs[asked], rows.targets[asked])
    figures["table of pairs"] = {"bits_per_byte": nats / math.log(2)}
    record(figures)
    assert figures["transnormer"]["bits_per_byte"] < figures["table of pairs"]["bits_per_byte"]
