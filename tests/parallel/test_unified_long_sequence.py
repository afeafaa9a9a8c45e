"""Attention over grids of processes, and templates that say what an op is."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from regard.contract.card import OpCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.names import op
from regard.contract.operator import operator
from regard.parallel import all_to_all_heads, grid_attention, shard
from regard.parallel.unified_long_sequence import CARD, template
from regard.primitives.mixing_matrix import mixing_matrix
from tests.oracles import normal
from tests.parallel.sent import Sent
from tests.parallel.test_ring_self_attention import N, allowed, near, split, whole
from tests.parallel.worlds import facts


def grids(size) -> list[tuple[int, int]]:
    """(P_h, P_s)."""
    return [(h, size // h) for h in range(1, size + 1) if size % h == 0]


def check_equals_one_process(rank, size):
    q, k, v = (x.requires_grad_() for x in normal((2, 12, N, 8), (2, 12, N, 8), (2, 12, N, 6)))
    grouped = [q, *(x.detach()[:, : (12 // (3 if size == 3 else 2))].clone().requires_grad_() for x in (k, v))]
    for heads, parts in grids(size):
        mesh = init_device_mesh("cpu", (parts, heads), mesh_dim_names=("seq", "head"))
        call = partial(grid_attention, head_group=mesh.get_group("head"), seq_group=mesh.get_group("seq"))
        for causal in (False, True):
            for given in ((q, k, v), grouped):
                if given[1].shape[1] % heads == 0:
                    found = split(partial(call, is_causal=causal), *given)
                    near(found, whole(*given, allowed(N, causal)), what=f"{heads} x {parts} {causal}")


def check_all_to_all_undoes_itself(rank, size):
    (x,) = normal((2, 12, 4, 3), seed=rank)
    x.requires_grad_()
    there = all_to_all_heads(x)
    assert there.shape == (2, 12 // size, 4 * size, 3)
    back = all_to_all_heads(there, scatter=2, gather=1)
    assert torch.equal(back, x)
    (grad,) = torch.autograd.grad((back * x.detach()).sum(), x)
    assert torch.equal(grad, x.detach())
    # the heads of this process, of all parts in their order
    (whole_sequence,) = normal((1, 12, 4 * size, 3))
    mine = all_to_all_heads(shard(whole_sequence))
    assert torch.equal(mine, whole_sequence[:, rank * (12 // size) : (rank + 1) * (12 // size)])
    with Sent() as sent:
        all_to_all_heads(x)
    assert len(sent.names) == (size > 1)


def check_bad_input(rank, size):
    q, k, v = (x for x in normal((1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8)))
    if size == 1:
        return
    with pytest.raises(OptionError, match="both of its groups"):
        grid_attention(q, k, v)
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("seq", "head"))
    groups = {"head_group": mesh.get_group("head"), "seq_group": mesh.get_group("seq")}
    if size > 2:
        with pytest.raises(ShapeError, match=f"{'2 kv' if size == 4 else '4 query'} heads cannot be split over {size}"):
            grid_attention(q, k, v, **groups)
    with pytest.raises(ShapeError, match=f"5 heads cannot be split over {size} ranks"):
        all_to_all_heads(torch.zeros(1, 5, 4, 2))


def made(slug: str, mix):
    """An op of q, k, v that mixes tokens by a function."""
    card = OpCard(
        slug=slug, title="A synthetic op", baseline=True, exports=("mixed",), spec=CARD.spec, time="n", memory="n",
        example="b=1 h=2 g=2 n=10 m=10 d=4 e=4", attends=("self", "causal_self"),
    )  # fmt: skip

    @operator(card)
    def mixed(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, engine: str | None = None) -> Tensor:
        """Mix."""
        return mix(q, k, v)

    return mixed


def fourier(q, k, v):
    """FNet along the sequence: the real part of the Fourier transform."""
    return torch.fft.fft(v, dim=2).real


def cyclic(q, k, v):
    return v + 0.5 * v.roll(1, 2) - 0.2 * v.roll(-2, 2)


def causal_filter(q, k, v):
    return v + 0.5 * torch.nn.functional.pad(v, (0, 0, 1, 0))[:, :, :-1]


def gated_shift(q, k, v):
    """A convolution whose filter follows the data (Orchid's kind)."""
    kernel = torch.fft.fft(k.mean(-1, keepdim=True), dim=2)
    return torch.fft.ifft(torch.fft.fft(v, dim=2) * kernel, dim=2).real


@pytest.mark.parametrize(
    "given, causal, source, structure",
    [
        ("softmax", False, "data", "dense"),
        ("softmax", True, "data", "dense"),
        ("sliding_window", False, "data", "sparse"),
        ("linear", False, "data", "low_rank"),
        ("linear", True, "data", "semiseparable"),
        ("based", True, "data", "semiseparable"),
        ("lightning", True, "data", "semiseparable"),
        (made("fnet", fourier), False, "fixed", "dense"),
        (made("cyclic", cyclic), False, "fixed", "circulant"),
        (made("filter", causal_filter), True, "fixed", "toeplitz"),
        (made("gated_shift", gated_shift), False, "data", "circulant"),
    ],
)
def test_template(given, causal, source, structure):
    found = template(given, is_causal=causal)
    assert (found.source, found.structure, found.causal) == (source, structure, causal)
    run = op(given) if isinstance(given, str) else given
    assert (found.time, found.memory) == (run.card.time, run.card.memory)
    if isinstance(given, str):
        assert found.name == given


def test_fixed_mixing_is_linear_in_the_tokens():
    """As an op of X alone, through q, k and v."""
    x, y = normal((1, 2, 16, 4), (1, 2, 16, 4))

    def is_linear(run) -> bool:
        both = run(x + 2 * y, x + 2 * y, x + 2 * y)
        return bool(((run(x, x, x) + 2 * run(y, y, y) - both).abs() < 1e-9).all())

    for name in ("fnet", "cyclic", "filter", "gated_shift"):
        run = made(name, {"fnet": fourier, "cyclic": cyclic, "filter": causal_filter, "gated_shift": gated_shift}[name])
        assert is_linear(run) == (template(run).source == "fixed"), name
    assert not is_linear(op("softmax")) and template("softmax").source == "data"


def test_circulant_mixing_commutes_with_turning():
    q, k, v = normal((1, 2, 16, 4), (1, 2, 16, 4), (1, 2, 16, 4))
    for name, mix in (("fnet", fourier), ("cyclic", cyclic), ("filter", causal_filter)):
        run = made(name, mix)
        commutes = bool(((run(q, k, v.roll(3, 2)) - run(q, k, v).roll(3, 2)).abs() < 1e-9).all())
        assert commutes == (template(run).structure == "circulant"), name


def test_low_rank_is_the_rank_of_the_matrix():
    q, k = normal((1, 4, 40, 3), (1, 2, 40, 3))
    matrix = mixing_matrix(op("linear"), q, k, 8)
    singular = torch.linalg.svdvals(matrix)
    # the width of the features, whatever the length
    assert bool((singular[..., 2] > 1e-6).all()) and bool((singular[..., 3:] < 1e-12).all())
    assert template("linear").rank == 4 and template("linear", n=32).rank == 4
    # 1 + 4 + 10 packed features of width 4
    assert template("based", is_causal=False).rank == 15


def test_template_refuses():
    with pytest.raises(OptionError, match="at least 8"):
        template("softmax", n=4)
    with pytest.raises(OptionError, match="no card"):
        template(fourier)
    with pytest.raises(Unsupported, match="not linear in v"):
        template(made("squared", lambda q, k, v: v**2))


test_fact = facts(sys.modules[__name__].__name__)
