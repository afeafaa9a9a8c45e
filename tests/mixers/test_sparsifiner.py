from __future__ import annotations

import math

import pytest
import torch

import regard
from regard import Connectivity, OptionError, ShapeError, SparsifinerAttention, Unsupported, connectivity_topk
from regard.contract.collect import add_loss, collect_losses
from regard.engines.gather import gather
from tests.oracles import attention, coin, normal


def layer(n=19, *, dim=16, heads=4, **options):
    torch.manual_seed(0)
    made = SparsifinerAttention(dim, heads, num_tokens=n, **{"reduce_n": 4, **options}).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.3 * torch.randn_like(p)
    return made


def heads_of(a, x):
    return [to(x).unflatten(-1, (a.heads, -1)).transpose(1, 2) for to in (a.to_q, a.to_k, a.to_v)]


def brute_estimate(c, q, k, *, raw=False, valid=None):
    """coef @ basis, one row and one column of the low-rank table after the other."""
    batch, heads, n, _ = q.shape
    rank = c.down.shape[1]
    out = torch.zeros(batch, heads, n - c.prefix, n, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            narrow = [c.to_k(k[b, h, j]) for j in range(n)]
            seen = [j for j in range(n) if valid is None or valid[b, j]]
            columns = [sum((c.down[j, r] * narrow[j] for j in seen), torch.zeros(())) for r in range(rank)]
            for i in range(c.prefix, n):
                logits = torch.stack([c.scale * (c.to_q(q[b, h, i]) * column).sum() for column in columns])
                coef = logits.exp() / logits.exp().sum()
                basis = c.up.T
                if not raw:
                    if c.coef_topk is not None:
                        least = coef.sort(descending=True).values[min(c.coef_topk, rank) - 1]
                        coef = torch.where(coef >= least, coef, 0.0)
                    else:
                        coef = torch.where(coef > c.coef_threshold, coef, 0.0)
                    basis = torch.where(basis.abs() > c.basis_threshold, basis.abs(), 0.0)
                out[b, h, i - c.prefix] = sum(coef[r] * basis[r] for r in range(rank))
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coef_topk": 2},
        {"coef_topk": 1, "prefix": 0},
        {"coef_topk": None, "coef_threshold": 0.25},
        {"basis_threshold": 0.4, "prefix": 2},
        {"shared": True, "reduce_c": 1, "scale": 1.0},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_the_estimate_is_coefficients_times_basis(options, padded):
    torch.manual_seed(0)
    c = Connectivity(11, 3, 6, **{"reduce_n": 3, **options}).double()
    with torch.no_grad():
        for p in c.parameters():
            p += 0.3 * torch.randn_like(p)
    q, k = normal((2, 3, 11, 6), (2, 3, 11, 6))
    valid = coin(2, 11) if padded else None
    for raw in (False, True):
        expected = brute_estimate(c, q, k, raw=raw, valid=valid)
        torch.testing.assert_close(c.estimate(q, k, key_valid=valid, raw=raw), expected)
    assert c.scale == options.get("scale", 3**-0.5)
    assert (c.up is c.down) is options.get("shared", False)


def test_only_the_deployed_estimate_takes_magnitudes():
    c = layer(coef_topk=None, basis_threshold=0.0).connectivity
    q, k = normal((2, 4, 19, 4), (2, 4, 19, 4))
    assert c.estimate(q, k, raw=True).min() < 0 <= c.estimate(q, k).min()
    with torch.no_grad():
        c.up.abs_()
    torch.testing.assert_close(c.estimate(q, k), c.estimate(q, k, raw=True))


@pytest.mark.parametrize("keep, n", [(0.25, 19), (0.1, 30), (0.25, 16), (0.01, 19), (0.99, 19), (1.0, 19)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_every_row_has_its_count_of_keys_and_the_prefix_has_all(keep, n, prefix):
    c = layer(n, prefix=prefix).connectivity
    q, k = normal((2, 4, n, 4), (2, 4, n, 4))
    mask = connectivity_topk(q, k, c, keep).dense(n, n)
    # 0.1 * 30 is 3, in spite of floating point
    count = 3 if (keep, n) == (0.1, 30) else math.ceil(keep * n)
    assert mask.shape == (2, 4, n, n)
    assert (mask[:, :, :prefix].sum(-1) == n).all() and (mask[:, :, prefix:].sum(-1) == count).all()
    estimate = c.estimate(q, k)
    least = estimate.masked_fill(~mask[:, :, prefix:], math.inf).amin(-1)
    most = estimate.masked_fill(mask[:, :, prefix:], -math.inf).amax(-1)
    assert (least >= most).all()


def test_equal_estimates_choose_the_earlier_key():
    c = layer(coef_topk=None).connectivity
    with torch.no_grad():
        c.up.zero_()
    q, k = normal((2, 4, 19, 4), (2, 4, 19, 4))
    mask = connectivity_topk(q, k, c, 0.25).dense(19, 19)
    assert mask[:, :, 1:, :5].all() and not mask[:, :, 1:, 5:].any()


def test_a_threshold_chooses_what_lies_above_it():
    c = layer().connectivity
    q, k = normal((2, 4, 19, 4), (2, 4, 19, 4))
    estimate = c.estimate(q, k)
    tau = estimate.median().item()
    mask = connectivity_topk(q, k, c, None, threshold=tau).dense(19, 19)
    assert torch.equal(mask[:, :, 1:], estimate > tau) and mask[:, :, 0].all()
    assert len(mask[:, :, 1:].sum(-1).unique()) > 2
    a, (x,) = layer(keep=None, threshold=1e9), normal((2, 19, 16))
    out = a(x)
    assert (out[:, 1:] == a.to_out.bias).all() and (out[:, 0] != a.to_out.bias).all()


@pytest.mark.parametrize("padded", [False, True])
def test_keep_all_is_dense_attention(padded):
    (x,) = normal((2, 19, 16))
    valid = coin(2, 19) if padded else None
    allowed = None if valid is None else valid[:, None, None]
    for keep in (1.0, 0.99):
        a = layer(keep=keep)
        out, _ = attention(*heads_of(a, x), allowed=allowed)
        expected = a.to_out(out.transpose(1, 2).flatten(2))
        if valid is not None:
            expected = expected * valid[..., None]
        torch.testing.assert_close(a(x, padding=valid), expected)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_gathering_is_masked_dense_attention(prefix, padded):
    a, (x, seed) = layer(prefix=prefix, keep=0.3), normal((2, 19, 16), (2, 19, 16))
    valid = coin(2, 19) if padded else None
    q, k, v = heads_of(a, x)
    mask = connectivity_topk(q, k, a.connectivity, 0.3, key_valid=valid).dense(19, 19)
    out, _ = attention(q, k, v, allowed=mask)
    expected = a.to_out(out.transpose(1, 2).flatten(2))
    if valid is not None:
        expected = expected * valid[..., None]
    torch.testing.assert_close(a(x, padding=valid), expected)
    # gradients against autograd through the masked table
    given = [t.detach().requires_grad_() for t in (q, k, v)]
    scores = (given[0] @ given[1].transpose(2, 3) / 2).masked_fill(~mask, -math.inf)
    table = torch.where(mask.any(-1, keepdim=True), torch.softmax(scores, -1), 0.0)
    seeds = seed.unflatten(-1, (4, -1)).transpose(1, 2)
    wanted = torch.autograd.grad((torch.where(mask, table, 0.0) @ given[2] * seeds).sum(), given)
    chosen = connectivity_topk(q, k, a.connectivity, 0.3, key_valid=valid)
    found = torch.autograd.grad((gather(*given, chosen).out * seeds).sum(), given)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_pruned_tokens_give_exactly_zero_and_are_nobodys_key():
    a, (x,) = layer(keep=0.3), normal((2, 19, 16))
    valid = coin(2, 19)
    # fewer tokens are left than a row would read
    valid[1] = torch.arange(19) < 3
    q, k, _ = heads_of(a, x)
    mask = connectivity_topk(q, k, a.connectivity, 0.3, key_valid=valid).dense(19, 19)
    assert not (mask & ~(valid[:, None, None] & valid[:, None, :, None])).any()
    counts = mask[:, :, 1:].sum(-1)
    kept = valid.sum(1).clamp(max=6)[:, None, None].expand_as(counts)
    assert torch.equal(counts, torch.where(valid[:, None, 1:], kept, 0))
    x.requires_grad_()
    out = a(x, padding=valid)
    assert (out[~valid] == 0).all() and out.isfinite().all() and (out[valid] != 0).all()
    (grad,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    assert (grad[~valid] == 0).all() and grad.isfinite().all() and (grad[valid] != 0).any(-1).all()


def test_a_call_leaves_nothing_behind():
    a, (x,) = layer(keep=0.5), normal((2, 19, 16))
    first, before = a(x), dict(a.connectivity.__dict__)
    a(x, padding=torch.arange(19).expand(2, 19) < 2)
    assert torch.equal(a(x), first)
    assert {n: v for n, v in a.connectivity.__dict__.items() if not n.startswith("_")} == {
        n: v for n, v in before.items() if not n.startswith("_")
    }
    assert torch.equal(x, normal((2, 19, 16))[0])


def test_the_choice_has_no_gradient_and_the_error_reaches_its_parameters_only():
    a, (x,) = layer(), normal((2, 19, 16))
    x.requires_grad_()
    with collect_losses() as losses:
        out = a(x)
    (out * torch.randn_like(out)).sum().backward(retain_graph=True)
    own = dict(a.connectivity.named_parameters())
    assert set(own) == {"down", "up", "to_q.weight", "to_q.bias", "to_k.weight", "to_k.bias"}
    assert all(p.grad is None for p in own.values())
    a.zero_grad()
    x.grad = None
    (loss,) = losses["sparsifiner"]
    loss.backward()
    assert all(p.grad.abs().max() > 0 and p.grad.isfinite().all() for p in own.values())
    assert x.grad is None
    assert all(p.grad is None for n, p in a.named_parameters() if not n.startswith("connectivity"))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prefix", [0, 1])
def test_the_loss_is_the_square_error_against_the_own_dense_attention(prefix, padded):
    a, (x,) = layer(prefix=prefix), normal((2, 19, 16))
    valid = coin(2, 19) if padded else torch.ones(2, 19, dtype=torch.bool)
    with collect_losses() as losses:
        a(x, padding=valid if padded else None)
    q, k, _ = heads_of(a, x)
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(~valid[:, None, None], -math.inf)
    table = torch.softmax(scores, -1)[:, :, prefix:]
    error = (brute_estimate(a.connectivity, q, k, valid=valid) - table).square()
    both = valid[:, None, prefix:, None] & valid[:, None, None]
    torch.testing.assert_close(losses["sparsifiner"][0], (error * both).sum())
    with collect_losses() as losses:
        layer(keep=1.0)(x)
    assert not losses


def test_a_loss_that_nobody_collects_is_not_computed():
    called = []
    add_loss("a", lambda: called.append(1) or torch.ones(()))
    assert not called
    with collect_losses() as losses:
        add_loss("a", lambda: torch.full((), 2.0))
        add_loss("a", torch.full((), 3.0))
    assert [float(t) for t in losses["a"]] == [2.0, 3.0]


def test_bad_use_is_refused():
    a, (x,) = layer(), normal((2, 19, 16))
    with pytest.raises(ShapeError, match=r"20 tokens came, 19 are required: .* resize P, P_back"):
        a(torch.randn(2, 20, 16).double())
    q, k = normal((2, 4, 20, 4), (2, 4, 20, 4))
    with pytest.raises(ShapeError, match="bound to positions: resize P, P_back"):
        connectivity_topk(q, k, a.connectivity, 0.25)
    for keep, threshold in ((None, None), (0.5, 0.1)):
        with pytest.raises(OptionError, match="give one of the two"):
            layer(keep=keep, threshold=threshold)
        with pytest.raises(OptionError, match="give one of the two"):
            connectivity_topk(q, k, a.connectivity, keep, threshold=threshold)
    for options, error in (
        ({"keep": 0.0}, r"keep is a share of the keys in \(0, 1\]"),
        ({"keep": 1.5}, r"keep is a share of the keys in \(0, 1\]"),
        ({"reduce_n": 20}, "reduce_n divides 19: it is 1 to 19"),
        ({"reduce_c": 0}, "reduce_c divides 4: it is 1 to 4"),
        ({"prefix": 20}, "0 to 19, not 20"),
        ({"coef_topk": 0}, "coef_topk is a number of coefficients"),
    ):
        with pytest.raises(OptionError, match=error):
            layer(**options)
    with pytest.raises(Unsupported, match="reads no context and is not causal"):
        a(x, x)
    with pytest.raises(Unsupported, match="reads no context and is not causal"):
        a(x, is_causal=True)
    with pytest.raises(OptionError, match="does not divide into 3 heads"):
        layer(heads=3)


def test_the_named_mixer_is_the_layer():
    made = regard.mixer("sparsifiner", 16, 4, num_tokens=19)
    assert isinstance(made, SparsifinerAttention) and made.connectivity.keep == 0.25
    assert isinstance(made.connectivity, Connectivity)
