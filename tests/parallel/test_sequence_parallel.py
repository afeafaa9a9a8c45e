"""Whole models on split sequences: the numbers of one process, and no run that is silently wrong."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.contract.errors import OptionError, Unsupported
from regard.contract.split import current
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from regard.parallel import SequenceParallel, position_ids, ring_attention, shard, sum_gradients
from regard.parallel.exchange import gather
from regard.parallel.sequence_parallel import SPLIT
from regard.primitives.positions import rope
from tests.oracles import normal
from tests.parallel.sent import Sent
from tests.parallel.worlds import facts

N, VOCAB = 24, 11
LAYOUTS = ("contiguous", "zigzag")
DOCUMENTS = regard.Documents().bind(doc=torch.zeros(1, 6, dtype=torch.long))
OPTIONS = {"sliding_window": {"window": 5}, "based": {"feature_dim": 3}, "softmax": {"kv_heads": 2}}


def ids(n=N) -> Tensor:
    return torch.randint(VOCAB, (2, n), generator=torch.Generator().manual_seed(1))


def hybrid(positions="sinusoid", **settings) -> SequenceModel:
    """Three scans and a softmax."""
    torch.manual_seed(2)
    mixers = ("linear", "lightning", "based", "softmax")
    given = {"mixer": mixers, "depth": 4, "hidden": 24, "positions": positions, "options": OPTIONS, **settings}
    return SequenceModel(SequenceSettings(vocab=VOCAB, dim=16, heads=4, **given)).double()


def whole_loss(model: nn.Module, tokens: Tensor, **options) -> Tensor:
    """The mean loss of the next token, over the whole sequence."""
    logits = model(tokens, **options)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def split_loss(model: nn.Module, tokens: Tensor, layout="contiguous", **options) -> Tensor:
    """This process's share of it: its own sum over the count of all."""
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    logits = model(shard(tokens, 1, layout=layout), **options)
    wanted = shard(targets, 1, layout=layout)
    total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
    return total / (targets != -100).sum()


def summed(x: Tensor) -> Tensor:
    return torch.stack(gather(x.detach())).sum(0)


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def compare(model, layout="contiguous", attention="ring", padding=None, tolerance=1e-11) -> None:
    tokens = ids()
    options = {} if padding is None else {"padding": padding}
    own = {} if padding is None else {"padding": shard(padding, 1, layout=layout)}
    expected = whole_loss(model, tokens, **options)
    expected.backward()
    wanted = grads(model)
    with SequenceParallel(model, layout=layout, attention=attention) as split:
        loss = split_loss(model, tokens, layout, **own)
    loss.backward()
    split.sum_gradients()
    assert abs(summed(loss) - expected) <= tolerance
    for name, grad in grads(model).items():
        error = (grad - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error <= tolerance, f"{name}: off by {error:.1e}"


def check_hybrid_equals_one_process(rank, size):
    for attention in ("ring", "gather"):
        compare(hybrid(), attention=attention)


def check_every_mixer_that_can_be_split(rank, size):
    for mixer, layout in itertools.product(SPLIT, LAYOUTS):
        model = hybrid(mixer=mixer, depth=2)
        if layout == "zigzag" and mixer in ("linear", "lightning", "based"):
            with (
                SequenceParallel(model, layout=layout),
                pytest.raises(Unsupported, match="prefix of states needs contiguous"),
            ):
                split_loss(model, ids(), layout)
            continue
        compare(model, layout)


def check_learned_angles(rank, size):
    compare(hybrid(mixer="lightning", options={"lightning": {"lrpe": True}}))


def check_encoders_and_padding(rank, size):
    padding = torch.ones(2, N, dtype=torch.bool)
    padding[0, -7:] = False
    padding[1, :3] = False
    compare(hybrid(mixer=("softmax", "sliding_window"), is_causal=False), "zigzag", padding=padding)
    compare(hybrid(), padding=padding)


class Plain(nn.Module):
    """A block of torch alone: positions and attention written by hand."""

    def __init__(self, layout: str, fused: bool):
        super().__init__()
        self.layout, self.fused = layout, fused
        self.norm, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.qkv, self.head, self.embed = nn.Linear(16, 48), nn.Linear(16, VOCAB), nn.Embedding(VOCAB, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        n = x.shape[1]
        positions = position_ids(N, layout=self.layout) if n < N else torch.arange(n)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        q, k = rope(q, positions), rope(k, positions)
        attend = F.scaled_dot_product_attention if self.fused else regard.attend
        x = x + attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x + self.mlp(x))


def check_models_of_torch_alone(rank, size):
    for layout, fused in itertools.product(LAYOUTS, (False, True)):
        torch.manual_seed(4)
        compare(Plain(layout, fused).double(), layout)


def check_the_same_loss_curve(rank, size):
    """LayerNorm, ring and MLP, trained for 20 steps on all processes and on one."""
    curves = []
    for split in (False, True):
        torch.manual_seed(4)
        model = Plain("zigzag", fused=True).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        curve = []
        for _ in range(20):
            optimizer.zero_grad()
            if split:
                with SequenceParallel(model, layout="zigzag"):
                    loss = split_loss(model, ids(), "zigzag")
                loss.backward()
                sum_gradients(model)
                curve.append(float(summed(loss)))
            else:
                loss = whole_loss(model, ids())
                loss.backward()
                curve.append(float(loss.detach()))
            optimizer.step()
        curves.append(torch.tensor(curve))
    assert (curves[0] - curves[1]).abs().max() < 1e-6
    assert curves[0][-1] < 0.9 * curves[0][0]


def check_parameters_of_few_processes(rank, size):
    """A parameter that one process alone used has the same gradient on all afterwards."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]).double()
    (x,) = normal((3, 2))
    model[0](x).sum().backward()
    if rank == 0:
        model[1](x).sum().backward()
    sum_gradients(model)
    assert torch.equal(model[0].weight.grad, size * x.sum(0).expand(2, 2))
    assert torch.equal(model[1].weight.grad, x.sum(0).expand(2, 2))


def check_the_ring_by_hand_inside_the_block(rank, size):
    q, k, v = (shard(x) for x in normal((1, 2, N, 4), (1, 2, N, 4), (1, 2, N, 4)))
    with SequenceParallel(nn.Identity()):
        inside = ring_attention(q, k, v)
    assert torch.equal(inside, ring_attention(q, k, v))


def check_leaving_restores(rank, size):
    model = hybrid()
    tokens = shard(ids(), 1)
    before = model(tokens)
    with SequenceParallel(model):
        model(tokens)
    assert current() is None and torch.equal(model(tokens), before)
    with pytest.raises(IndexError), SequenceParallel(model):
        model(tokens + VOCAB)
    assert current() is None and torch.equal(model(tokens), before)
    with Sent() as sent:
        model(tokens)
        F.scaled_dot_product_attention(*normal((1, 2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4)))
    assert not sent.names


@pytest.mark.parametrize("name", ["aaren", "flow", "selective_temperature", "short_conv"])
def test_systems_that_mix_otherwise_are_refused(name):
    layer = regard.mixer(name, 16, 4)
    with pytest.raises(Unsupported, match=f"{name}, which cannot be split.*softmax"), SequenceParallel(layer):
        raise AssertionError("it was entered")


def test_ops_that_mix_otherwise_are_refused():
    q, k, v = normal((1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4))
    layer = regard.mixer("sigmoid", 16, 4, length=8).double()
    (x,) = normal((1, 6, 16))
    with SequenceParallel(layer):
        with pytest.raises(Unsupported, match="sigmoid cannot be split"):
            layer(x)
        with pytest.raises(Unsupported, match="flow cannot be split"):
            regard.op("flow")(q, k, v)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.1), "dropout"),
        (lambda q: F.scaled_dot_product_attention(q, q, q, torch.ones(6, 6, dtype=torch.bool)), "mask"),
        (lambda q: regard.attend(q, q, q, bias=torch.zeros(6, 6)), "a bias"),
        (lambda q: regard.attend(q, q, q, pattern=regard.Causal(strict=True)), "pattern"),
        (lambda q: regard.attend(q, q, q, pattern=DOCUMENTS), "pattern"),
        (lambda q: regard.attend(q, q, q, pattern=regard.Causal(), q_offset=3), "q_offset"),
        (lambda q: regard.attend(q, q, q, normaliser=regard.Sigmoid()), "normaliser is Sigmoid"),
        (lambda q: regard.op("softmax")(q, q, q, engine="reference"), "engine='reference'"),
        (lambda q: regard.op("linear")(q, q, q, pattern=regard.Causal() & DOCUMENTS), "document"),
        (lambda q: nn.Conv1d(4, 4, 3).double()(q[0].transpose(1, 2)), "a convolution"),
        (lambda q: nn.GRU(4, 4).double()(q[0]), "a recurrent layer"),
        (lambda q: nn.BatchNorm1d(4).double()(q[0].transpose(1, 2)), "a norm over tokens"),
        (lambda q: nn.MultiheadAttention(4, 2, batch_first=True).double()(q[0], q[0], q[0]), "nn.MultiheadAttention"),
        (lambda q: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()(q[0]), "nn.MultiheadAttention"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_split_are_refused(call, text):
    (q,) = normal((1, 2, 6, 4))
    call(q)
    with SequenceParallel(nn.Identity()), pytest.raises(Unsupported, match=text):
        call(q)


def test_decoding_is_refused():
    model = hybrid(mixer="softmax", positions="none")
    with SequenceParallel(model), pytest.raises(Unsupported, match="leave SequenceParallel"):
        model.step(ids()[:, :1], model.prefill(ids(), model.init_state(2))[1])
    model = hybrid(mixer="lightning", positions="none")
    with SequenceParallel(model), pytest.raises(Unsupported, match="leave SequenceParallel"):
        model.prefill(ids(), model.init_state(2))


def test_settings_are_checked():
    with pytest.raises(OptionError, match="attention is 'tree'"):
        SequenceParallel(nn.Identity(), attention="tree")
    with pytest.raises(OptionError, match="in order"):
        SequenceParallel(nn.Identity(), attention="gather", layout="zigzag")


test_fact = facts(sys.modules[__name__].__name__)
