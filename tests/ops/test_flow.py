from __future__ import annotations

import pytest
import torch

import regard
from regard import Causal, Documents, KeyValid, Unsupported, flow_attention
from regard.ops.flow import flow_attention_step
from tests.oracles import coin, normal


def literal(q, k, v, eps=1e-6):
    """The N x M form for one head each: q (N, D), k (M, D), v (M, E), written by its flows."""
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    n, m = len(q), len(k)

    def flow(a, b):
        return ((a + eps) * (b + eps)).sum()

    incoming = torch.stack([flow(q[i], k.sum(0)) for i in range(n)])
    outgoing = torch.stack([flow(k[j], q.sum(0)) for j in range(m)])
    conserved_in = torch.stack([flow(q[i], (k / outgoing[:, None]).sum(0)) for i in range(n)])
    conserved_out = torch.stack([flow(k[j], (q / incoming[:, None]).sum(0)) for j in range(m)])
    value = m * torch.softmax(conserved_out.clamp(-1, 1), 0)[:, None] * v
    weights = q @ k.T / incoming[:, None]
    return torch.sigmoid(conserved_in * n / m)[:, None] * (weights @ value), conserved_in, conserved_out


def literal_causal(q, k, v, eps=1e-6):
    """Each position by the sums over its own prefix."""
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    outs, incoming, outgoing, received = [], [], [], []
    for i in range(len(q)):
        incoming.append(((q[i] + eps) * (k[: i + 1].sum(0) + eps)).sum())
        outgoing.append(((k[i] + eps) * (q[: i + 1].sum(0) + eps)).sum())
        refined_k = sum(k[j] * (j + 1) / outgoing[j] for j in range(i + 1))
        refined_q = sum(q[j] * (j + 1) / incoming[j] for j in range(i + 1))
        allocation = torch.sigmoid(((q[i] + eps) * (refined_k + eps)).sum() / (i + 1))
        received.append((((k[i] + eps) * (refined_q + eps)).sum() / (i + 1)).clamp(-1, 1))
        shares = torch.stack([received[j].exp() / torch.stack(received[: j + 1]).exp().sum() for j in range(i + 1)])
        weights = torch.stack([q[i] @ k[j] * shares[j] * (j + 1) for j in range(i + 1)]) / incoming[i]
        outs.append(allocation * (weights[:, None] * v[: i + 1]).sum(0))
    return torch.stack(outs)


def qkv(n=12, m=12):
    return normal((2, 4, n, 5), (2, 2, m, 5), (2, 2, m, 6))


@pytest.mark.parametrize("n, m", [(12, 12), (5, 9), (1, 1)])
def test_it_is_the_literal_form(n, m):
    q, k, v = qkv(n, m)
    out = flow_attention(q, k, v)
    for b in range(2):
        for h in range(4):
            torch.testing.assert_close(out[b, h], literal(q[b, h], k[b, h // 2], v[b, h // 2])[0])


@pytest.mark.parametrize("n", [1, 2, 70])
def test_the_causal_form_sums_over_the_prefix(n):
    q, k, v = qkv(n, n)
    out = flow_attention(q, k, v, is_causal=True)
    for h in range(4):
        torch.testing.assert_close(out[1, h], literal_causal(q[1, h], k[1, h // 2], v[1, h // 2]))


def test_flows_are_conserved():
    (q, k, v) = normal((20, 8), (30, 8), (30, 3))
    _, conserved_in, conserved_out = literal(q, k, v, eps=0.0)
    torch.testing.assert_close(conserved_in.sum(), torch.tensor(30.0, dtype=torch.float64))
    torch.testing.assert_close(conserved_out.sum(), torch.tensor(20.0, dtype=torch.float64))


def test_the_order_of_keys_does_not_matter():
    q, k, v = qkv(7, 11)
    order = torch.randperm(11)
    torch.testing.assert_close(flow_attention(q, k[:, :, order], v[:, :, order]), flow_attention(q, k, v))


def test_without_competition_and_allocation_it_is_normalised_linear_attention(monkeypatch):
    q, k, v = qkv(7, 11)
    monkeypatch.setattr(torch, "softmax", lambda x, dim: torch.full_like(x, 1 / x.shape[dim]))
    out = flow_attention(q, k, v, eps=0.0)
    phi_q, phi_k = torch.sigmoid(q), torch.sigmoid(k).repeat_interleave(2, 1)
    weights = phi_q @ phi_k.transpose(-1, -2)
    outgoing = (phi_k * phi_q.sum(2, keepdim=True)).sum(-1)
    allocation = torch.sigmoid((phi_q * (phi_k / outgoing[..., None]).sum(2, keepdim=True)).sum(-1) * 7 / 11)
    linear = weights @ v.repeat_interleave(2, 1) / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out / allocation[..., None], linear)


def test_hidden_keys_are_as_good_as_absent():
    q, k, v = qkv(6, 12)
    valid = torch.arange(12) < 8
    out = flow_attention(q, k, v, pattern=KeyValid().bind(key_valid=valid.expand(2, 12)))
    torch.testing.assert_close(out, flow_attention(q, k[:, :, :8], v[:, :, :8]))


def test_left_padding_changes_no_real_position():
    q, k, v = qkv(12, 12)
    valid = (torch.arange(12) >= 5).expand(2, 12)
    out = flow_attention(q, k, v, pattern=Causal() & KeyValid().bind(key_valid=valid))
    alone = flow_attention(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], is_causal=True)
    torch.testing.assert_close(out[:, :, 5:], alone)


def test_no_position_reads_a_later_one():
    q, k, v = (x.requires_grad_() for x in qkv(9, 9))
    flow_attention(q, k, v, is_causal=True)[:, :, 4].sum().backward()
    for x in (q, k, v):
        assert (x.grad[:, :, 5:] == 0).all()
        assert (x.grad[:, :, :4] != 0).any(-1).all()


def test_steps_continue_the_sequence():
    q, k, v = qkv()
    valid = coin(2, 12)
    want = flow_attention(q, k, v, pattern=Causal() & KeyValid().bind(key_valid=valid))
    outs, state = [], None
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        part = slice(begin, end)
        out, state = flow_attention_step(
            q[:, :, part], k[:, :, part], v[:, :, part], state=state, key_valid=valid[:, part]
        )
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), want)
    assert state.seen == 12
    assert torch.equal(state.count, valid.sum(-1))


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 5, 3), (1, 1, 5, 3), (1, 1, 5, 2)))
    for causal in (True, False):
        assert torch.autograd.gradcheck(lambda q, k, v, c=causal: flow_attention(q, k, v, is_causal=c), (q, k, v))


def test_what_it_cannot_do_is_refused():
    q, k, v = qkv(5, 9)
    with pytest.raises(Unsupported, match="5 and 9"):
        flow_attention(q, k, v, is_causal=True)
    q, k, v = qkv()
    doc = torch.zeros(2, 12, dtype=torch.int64)
    with pytest.raises(Unsupported, match="does not separate documents"):
        flow_attention(q, k, v, pattern=Causal() & Documents().bind(doc=doc))
    layer = regard.mixer("flow", 16, 4)
    with pytest.raises(Unsupported, match="does not separate documents"):
        layer(torch.randn(2, 5, 16), is_causal=True, reset=torch.zeros(2, 5, dtype=torch.bool))


def test_the_layers_state_does_not_grow():
    layer = regard.mixer("flow", 16, 4)
    x = torch.randn(2, 300, 16)
    state = layer.prefill(x, layer.init_state(2))[1]
    assert state.size_bytes == layer.init_state(2).size_bytes == layer.state_bytes(2, 300)
