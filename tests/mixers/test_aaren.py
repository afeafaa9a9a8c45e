from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regard
from regard import Aaren, Unsupported
from regard.layers.attention import OpAttention
from tests.oracles import normal


def layer(dim=16, heads=4, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Aaren(dim, heads, **options).to(dtype)


def heads_of(x, heads=4):
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


@pytest.mark.parametrize("head_dim", [None, 6])
def test_it_is_torch_attention_of_the_learned_query_to_every_prefix(head_dim):
    a, (x,) = layer(head_dim=head_dim), normal((2, 9, 16))
    q = heads_of(a.to_q(a.query)[None]).expand(2, 4, 1, -1)
    k, v = heads_of(a.to_k(x)), heads_of(a.to_v(x))
    rows = [F.scaled_dot_product_attention(q, k[:, :, : t + 1], v[:, :, : t + 1]) for t in range(9)]
    want = a.to_out(torch.cat(rows, 2).transpose(1, 2).flatten(2))
    torch.testing.assert_close(a(x, is_causal=True), want)


@pytest.mark.parametrize("pieces", [(100,), (1,) * 100, (70, 1, 29)])
def test_updates_equal_the_parallel_scan(pieces):
    a, (x,) = layer(), normal((2, 100, 16))
    state, outs, at = a.init_state(2), [], 0
    for n in pieces:
        out, state = a.prefill(x[:, at : at + n], state)
        outs.append(out)
        at += n
    torch.testing.assert_close(torch.cat(outs, 1), a(x, is_causal=True))
    assert state.seen == 100


def test_the_weights_rank_the_tokens_alike_at_every_step():
    # a token's weight relative to another does not depend on who asks: an earlier pair keeps its ratio for ever
    a, (x,) = layer(dtype=torch.float64), normal((1, 6, 16))
    scores = (heads_of(a.to_k(x)) * heads_of(a.to_q(a.query)[None])).sum(-1)[0]
    values = nn.Parameter(torch.eye(6).double().expand(1, 4, 6, 6))
    weights = regard.engines.scan.softmax_scan(scores[None], values)[0][0]
    for t in range(2, 6):
        torch.testing.assert_close(weights[:, t, 0] / weights[:, t, 1], weights[:, 1, 0] / weights[:, 1, 1])


def test_the_state_is_as_large_after_a_hundred_thousand_tokens():
    a = layer(dtype=torch.float32)
    with torch.no_grad():
        states = [a.prefill(torch.randn(1, n, 16), a.init_state(1))[1] for n in (10, 10**5)]
    assert states[0].size_bytes == states[1].size_bytes == a.state_bytes(1, 10) == a.state_bytes(1, 10**5)
    assert states[0].size_bytes == 4 * 4 * (4 + 1)


def test_it_has_one_vector_more_than_an_attention_layer():
    count = {
        m: sum(p.numel() for p in m.parameters())
        for m in (Aaren(512, 8), OpAttention(512, 8, op=regard.softmax_attention))
    }
    ours, plain = count.values()
    assert ours == plain + 512


def test_huge_scores_give_finite_outputs_and_gradients():
    a = layer(dtype=torch.float32)
    with torch.no_grad():
        a.to_k.weight.mul_(1e4)
    x = normal((2, 50, 16), dtype=torch.float32)[0].requires_grad_()
    out = a(x, is_causal=True)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in a.parameters())


def test_a_prefix_of_padding_gives_zero_without_gradient():
    a = layer()
    x = normal((1, 6, 16))[0].requires_grad_()
    padding = torch.tensor([[False, False, True, True, False, True]])
    out = a(x, padding=padding, is_causal=True)
    assert (out[:, :2] == 0).all()
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[~padding] == 0).all()
    torch.testing.assert_close(out[padding], a(x[padding][None], is_causal=True)[0])


def test_documents_are_separate():
    a, (x,) = layer(), normal((1, 9, 16))
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[:, [3, 4]] = True
    out = a(x, reset=reset, is_causal=True)
    for start, end in ((0, 3), (3, 4), (4, 9)):
        torch.testing.assert_close(out[:, start:end], a(x[:, start:end], is_causal=True))


def test_gradients_reach_the_query_and_are_those_of_finite_differences():
    a = layer(dim=4, heads=2)
    (x,) = normal((1, 4, 4))

    def run(x, query):
        return torch.func.functional_call(a, {"query": query}, (x,), {"is_causal": True})

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), a.query.detach().clone().requires_grad_()))


def test_it_reads_no_context_and_nothing_that_comes_later():
    a, (x,) = layer(), normal((2, 5, 16))
    with pytest.raises(Unsupported, match="reads no context"):
        a(x, x, is_causal=True)
    with pytest.raises(Unsupported, match="causal only"):
        a(x)


class Classifier(nn.Module):
    """Rows of an image one after the other; the last token answers."""

    def __init__(self, slug):
        super().__init__()
        self.embed, self.places = nn.Linear(8, 48), nn.Parameter(torch.randn(8, 48) * 0.1)
        self.mixers = nn.ModuleList(regard.mixer(slug, 48, 4) for _ in range(2))
        self.units = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in range(2))
        self.head = nn.Linear(48, 10)

    def forward(self, rows):
        x = self.embed(rows) + self.places
        for norm, mixer, unit in zip(self.norms, self.mixers, self.units, strict=True):
            x = x + mixer(norm(x), is_causal=True)
            x = x + unit(x)
        return self.head(x[:, -1])


@pytest.mark.slow
def test_aaren_reads_digits_row_by_row_as_well_as_a_transformer(record):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1347], order[1347:]
    scores = {}
    for slug in ("aaren", "softmax"):
        right = []
        for seed in range(2):
            torch.manual_seed(seed)
            model = Classifier(slug)
            optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
            for _ in range(40):
                for rows in train[torch.randperm(len(train))].split(64):
                    loss = F.cross_entropy(model(images[rows]), labels[rows])
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
            with torch.no_grad():
                right.append((model(images[test]).argmax(-1) == labels[test]).float().mean().item())
        scores[slug] = sum(right) / len(right)
    record({"task": "digits row by row, width 48, 2 layers, 40 epochs, mean accuracy of seeds 0 and 1", **scores})
    assert scores["softmax"] > 0.9
    assert scores["aaren"] > scores["softmax"] - 0.03, scores
