"""The gates of SeerAttention learn what a frozen model attends to."""

from __future__ import annotations

import copy

import pytest
import torch

from regard import Causal, KeyValid, OptionError, Unsupported
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from regard.primitives.positions import rope
from regard.train.distillation.seerattention import GateDistillation, block_targets
from tests.oracles import normal


def model(dim=32, heads=4, kv_heads=2, depth=2, vocab=64, std=None, mixer="softmax"):
    torch.manual_seed(0)
    options = {mixer: {"kv_heads": kv_heads}} if mixer == "softmax" else {}
    return SequenceModel(
        SequenceSettings(
            vocab=vocab, dim=dim, depth=depth, heads=heads, mixer=mixer, options=options, hidden=64, std=std
        )
    )


def ids(n=40, rows=2, vocab=64, seed=0):
    return torch.randint(vocab, (rows, n), generator=torch.Generator().manual_seed(seed))


def dense_weights(q, k, allowed):
    share = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(share, 1).transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1).nan_to_num(0.0)


def tile_maxima(weights, block):
    count = -(-weights.shape[-1] // block)
    out = torch.zeros(*weights.shape[:2], count, count, dtype=weights.dtype)
    for a in range(count):
        for c in range(count):
            out[:, :, a, c] = weights[:, :, a * block : (a + 1) * block, c * block : (c + 1) * block].amax((2, 3))
    return out


@pytest.mark.parametrize("n, block", [(40, 8), (37, 8), (130, 64), (9, 1), (5, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_are_the_largest_weights_of_the_tiles(n, block, dtype):
    q, k = normal((2, 4, n, 16), (2, 2, n, 16), dtype=dtype)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    largest = tile_maxima(dense_weights(q, k, causal), block)
    target = block_targets(q, k, block=block)
    torch.testing.assert_close(target, largest / largest.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(target.sum(-1), torch.ones_like(target[..., 0]))
    assert not target.triu(1).any()


def test_targets_of_padding_are_nothing():
    q, k = normal((2, 4, 40, 16), (2, 2, 40, 16))
    valid = torch.arange(40).expand(2, 40) >= torch.tensor([[16], [3]])
    allowed = torch.ones(40, 40, dtype=torch.bool).tril() & valid[:, None, None] & valid[:, None, :, None]
    largest = tile_maxima(dense_weights(q, k, allowed), 8)
    target = block_targets(q, k, block=8, pattern=Causal() & KeyValid(rows=True).bind(key_valid=valid))
    total = largest.sum(-1, keepdim=True)
    torch.testing.assert_close(target, largest / torch.where(total == 0, 1.0, total), atol=1e-6, rtol=1e-5)
    assert not target[0, :, :2].any() and (target[0, :, 2:].sum(-1) > 0.99).all()


def by_hand(made, distil, x, block, skip, official=False):
    """KL of every layer from the model's own modules, one row after the other."""
    total = 0.0
    h = made.embed(x)
    for i, layer in enumerate(made.blocks):
        a = layer.mixer
        seen = layer.norm_mixer(h)
        q, k = (to(seen).unflatten(-1, (count, -1)).transpose(1, 2) for to, count in ((a.to_q, 4), (a.to_k, 2)))
        n = x.shape[1]
        turned = [rope(t, torch.arange(n)) for t in (q, k)]
        largest = tile_maxima(dense_weights(*turned, torch.ones(n, n, dtype=torch.bool).tril()), block)
        target = largest / largest.sum(-1, keepdim=True)
        logits = distil.gates[f"blocks/{i}/mixer"](q, k)
        first = int(target.shape[2] * skip)
        rows = []
        for b in range(len(x)):
            for head in range(4):
                for r in range(first, target.shape[2]):
                    t, log_p = target[b, head, r, : r + 1], torch.log_softmax(logits[b, head, r, : r + 1], -1)
                    rows.append((t * (t.log() - log_p)).sum())
        rows = torch.stack(rows)
        total = total + (rows.sum() / (len(rows) * target.shape[2]) if official else rows.mean())
        h = layer(h, padding=None, reset=None, is_causal=True)
    return total


@pytest.mark.parametrize("n, skip", [(40, 0.25), (37, 0.0), (64, 0.5)])
@pytest.mark.parametrize("official", [False, True])
def test_the_loss_is_the_divergence_of_each_row(n, skip, official):
    made = model()
    reduction = "official" if official else "rows"
    distil = GateDistillation(made, block=8, hidden=16, skip=skip, reduction=reduction)
    loss = distil(made, ids(n))["gate_kl"]
    torch.testing.assert_close(loss, by_hand(made, distil, ids(n), 8, skip, official), atol=1e-5, rtol=1e-4)


def test_the_official_reduction_is_torchs_mean_over_all_elements():
    made = model(depth=1)
    distil = GateDistillation(made, block=8, hidden=16, reduction="official")
    (target,) = normal((2, 4, 5, 5))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    target = target.abs() * causal / (target.abs() * causal).sum(-1, keepdim=True)
    (logits,) = normal((2, 4, 5, 5), seed=1)
    masked = logits.masked_fill(~causal, -1e9)
    expected = torch.nn.KLDivLoss()(torch.log_softmax(masked[:, :, 1:], -1), target[:, :, 1:])
    torch.testing.assert_close(distil._loss(logits.masked_fill(~causal, float("-inf")), target), expected)


def test_only_the_gates_get_a_gradient_and_the_model_stays_as_it_was():
    made = model()
    distil = GateDistillation(made, block=8, hidden=16)
    before = copy.deepcopy(made.state_dict())
    plain = made(ids())
    distil(made, ids())["gate_kl"].backward()
    assert all(p.grad is None for p in made.parameters())
    assert len(list(distil.parameters())) == 4
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in distil.parameters())
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
    assert torch.equal(made(ids()), plain)
    assert not any(m._forward_hooks for m in made.modules())


def test_the_hooks_are_gone_after_an_error():
    made = model()
    distil = GateDistillation(made, block=8, hidden=16)
    with pytest.raises(OptionError, match="5 tokens are shorter than a block of 8"):
        distil(made, ids(5))
    assert not any(m._forward_hooks for m in made.modules())


def test_padding_on_the_left_is_left_out_of_the_loss():
    made = model().double()
    distil = GateDistillation(made, block=8, hidden=16, skip=0.0).double()
    x = ids(40)
    alone = distil(made, x)["gate_kl"]
    padded = torch.cat((torch.full((2, 16), 5), x), 1)
    padding = torch.arange(56).expand(2, 56) >= 16
    torch.testing.assert_close(distil(made, {"ids": padded, "padding": padding})["gate_kl"], alone)


def test_gates_of_another_model_are_refused():
    distil = GateDistillation(model(depth=1), block=8)
    with pytest.raises(OptionError, match="the gates are for layers blocks/0/mixer"):
        distil(model(), ids())
    with pytest.raises(Unsupported, match="no attention layer over the softmax op"):
        GateDistillation(model(mixer="lightning"))
    for options, text in (({"skip": 1.0}, "in \\[0, 1\\)"), ({"reduction": "mean"}, "'rows' or 'official'")):
        with pytest.raises(OptionError, match=text):
            GateDistillation(model(), **options)


def recalled(scores, target, kept):
    """Of each row's `kept` largest targets, how many are among its `kept` largest scores (rows with a choice only)."""
    rows = range(2 * kept, target.shape[2])
    hits = [
        torch.isin(scores[b, h, r, : r + 1].topk(kept).indices, target[b, h, r, : r + 1].topk(kept).indices)
        for b in range(target.shape[0])
        for h in range(target.shape[1])
        for r in rows
    ]
    return float(torch.stack(hits).float().mean())


@torch.no_grad()
def recall_of(made, distil, x, block, kept):
    """Mean over layers: the gates, and products of mean-pooled queries and keys, before and after rotation."""
    found = {"gate": 0.0, "mean-pooled q.k": 0.0, "mean-pooled q.k, rotated": 0.0}
    h = made.embed(x)
    for i, layer in enumerate(made.blocks):
        a = layer.mixer
        seen = layer.norm_mixer(h)
        plain = [to(seen).unflatten(-1, (4, -1)).transpose(1, 2) for to in (a.to_q, a.to_k)]
        turned = [rope(t, torch.arange(x.shape[1])) for t in plain]
        target = block_targets(*turned, block=block)
        scores = {"gate": distil.gates[f"blocks/{i}/mixer"](*plain)}
        for name, pair in (("mean-pooled q.k", plain), ("mean-pooled q.k, rotated", turned)):
            q, k = (t.unflatten(2, (-1, block)).mean(3) for t in pair)
            scores[name] = q @ k.transpose(-1, -2)
        for name, score in scores.items():
            found[name] += recalled(score, target, kept) / len(made.blocks)
        h = layer(h, padding=None, reset=None, is_causal=True)
    return found


def rare_and_frequent(rows, n, vocab, seed):
    """Tokens whose frequency falls with their rank, as in text."""
    frequency = 1 / torch.arange(1, vocab + 1).float()
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(frequency, rows * n, replacement=True, generator=generator).view(rows, n)


def distilled(steps, n, block, kept, vocab=256, rows=4, lr=1e-2):
    made = model(dim=64, kv_heads=4, std=0.1, vocab=vocab)
    distil = GateDistillation(made, block=block, hidden=32)
    optimizer = torch.optim.Adam(distil.parameters(), lr=lr)
    held = rare_and_frequent(8, n, vocab, 10**6)
    with torch.no_grad():
        start = float(distil(made, held)["gate_kl"])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        loss = distil(made, rare_and_frequent(rows, n, vocab, step + 1))["gate_kl"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        end = float(distil(made, held)["gate_kl"])
    return {
        "divergence at the start": start,
        "divergence at the end": end,
        **recall_of(made, distil, held, block, kept),
    }


def test_a_few_steps_bring_the_gates_nearer():
    figures = distilled(steps=12, n=64, block=8, kept=2)
    assert figures["divergence at the end"] < 0.9 * figures["divergence at the start"]


@pytest.mark.slow
def test_gates_learn_where_the_large_weights_are(record):
    figures = {
        "model": "2 layers of width 64, 4 heads, random weights of deviation 0.1, frozen",
        "task": "256 tokens of 256 kinds, blocks of 16; recall of the 4 largest of a row's 9 to 16 blocks, held out",
        **distilled(steps=500, n=256, block=16, kept=4),
    }
    record(figures)
    assert figures["divergence at the end"] <= figures["divergence at the start"] / 2
    assert figures["gate"] >= figures["mean-pooled q.k"] + 0.1
    assert figures["gate"] >= figures["mean-pooled q.k, rotated"] + 0.03
