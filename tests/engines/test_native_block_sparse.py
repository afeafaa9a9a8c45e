"""The native block-sparse kernels against attention over the whole table in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.engines import native
from regard.engines.native import block_sparse
from regard.engines.philox import keep
from regard.patterns import Causal, SlidingWindow
from regard.primitives.biases import Indexed
from regard.primitives.normalisers import L1, Linear, Normaliser, ReLUOverN, Sharpen, Sigmoid, Softmax
from tests.oracles import block_layout

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")

ISAS = native.isas() if native.missing() is None else ()
# largest difference over largest value; bfloat16 rounds the weights and what it is given back
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
NORMALISERS = (Softmax(), Sigmoid(bias=-2.0), L1("softplus"), L1("exp"), L1("relu", 1e-3), ReLUOverN(), Linear())


@pytest.fixture(autouse=True)
def poisoned():
    native.poison(True)
    yield
    native.poison(False)


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    dout: Tensor
    dlse: Tensor | None = None
    normaliser: Normaliser = field(default_factory=Softmax)
    bias: Tensor | None = None
    indexed: tuple[Indexed, ...] = ()
    sinks: Tensor | None = None
    dropout: tuple[float, int] = (0.0, 0)
    scale: float | None = None
    q_offset: int = 0

    @property
    def options(self) -> dict:
        return {
            "scale": self.scale, "bias": self.bias, "indexed": self.indexed, "normaliser": self.normaliser,
            "sinks": self.sinks, "dropout": self.dropout,
        }  # fmt: skip

    def run(self, isa: str | None = None) -> list[Tensor | None]:
        layout = block_layout(self.mask, self.q_offset)
        out, lse = block_sparse.forward(self.q, self.k, self.v, layout, isa=isa, **self.options)
        grads = block_sparse.backward(
            self.dout, self.dlse, self.q, self.k, self.v, out, lse, layout, isa=isa, **self.options
        )
        return [out, lse, *grads[:4], *grads[4], grads[5]]

    def expected(self, noise: float = 0.0) -> list[Tensor | None]:
        """The same by autograd over the whole table in float64; noise: relative, in what a row has in common."""
        leaves = [None if x is None else x.double().requires_grad_() for x in (self.q, self.k, self.v, self.bias)]
        q, k, v, bias = leaves
        tables = [x.table.double().requires_grad_() for x in self.indexed]
        sinks = None if self.sinks is None else self.sinks.double().requires_grad_()
        batch, heads, n, d = q.shape
        share, m = heads // k.shape[1], k.shape[2]
        mask = self.mask.expand(batch, heads, n, m)
        scale = d**-0.5 if self.scale is None else self.scale
        s = scale * (q @ k.repeat_interleave(share, 1).mT)
        if bias is not None:
            mask = mask & ~torch.isneginf(bias)
            s = s + torch.where(torch.isneginf(bias), 0.0, bias)
        for table, x in zip(tables, self.indexed, strict=True):
            s = s + Indexed(table, x.key_index, x.query_index).dense()
        empty = ~mask.any(-1)
        lse = None
        if isinstance(self.normaliser, Softmax):
            filled = torch.where(mask, s, float("-inf"))
            logits = torch.where((empty if sinks is None else torch.zeros_like(empty))[..., None], 0.0, filled)
            if sinks is not None:
                logits = torch.cat((logits, sinks.expand(batch, heads, n)[..., None]), -1)
            lse = torch.logsumexp(logits, -1)
            weights = torch.where(mask, (s - shaken(lse, noise)[..., None]).clamp(max=700).exp(), 0.0)
        elif isinstance(self.normaliser, L1):
            phi = {"softplus": torch.nn.functional.softplus, "exp": torch.exp, "relu": torch.relu}[self.normaliser.phi]
            weights = torch.where(mask, phi(s), 0.0)
            total = weights.sum(-1, keepdim=True)
            weights = weights / (shaken(torch.where(total == 0, 1.0, total), noise) + self.normaliser.eps)
        else:
            weights = self.normaliser(s, mask, mask.sum(-1))
        if self.dropout[0]:
            p, seed = self.dropout
            b, h = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(-1, 1, 1)
            i, j = torch.arange(n).view(-1, 1) + self.q_offset, torch.arange(m)
            weights = weights * keep(torch.tensor(seed), p, b, h, i, j) / (1 - p)
        out = weights @ v.repeat_interleave(share, 1)
        loss = (out * self.dout.double()).sum()
        if lse is not None and self.dlse is not None:
            gone = empty if sinks is None else torch.zeros_like(empty)
            loss = loss + torch.where(gone, 0.0, lse * self.dlse.double()).sum()
        wanted = [x for x in (*leaves, *tables, sinks) if x is not None]
        found = dict(zip(map(id, wanted), torch.autograd.grad(loss, wanted, allow_unused=True), strict=True))
        grads = [None if x is None else found[id(x)] for x in (*leaves, *tables, sinks)]
        if lse is not None and sinks is None:
            lse = lse.masked_fill(empty, float("-inf"))
        return [out.detach(), None if lse is None else lse.detach(), *grads]

    def check(self, isa: str | None = None) -> None:
        names = ["out", "lse", "dq", "dk", "dv", "dbias", *("dtable" for _ in self.indexed), "dsinks"]
        for at, (name, found, wanted) in enumerate(zip(names, self.run(isa), self.expected(), strict=True)):
            if wanted is None:
                assert name == "lse" or found is None, name
                continue
            assert found is not None and found.shape == wanted.shape, name
            assert not found.isnan().any(), name
            finite = wanted.isfinite()
            assert (found.isfinite() == finite).all(), name
            if not finite.any():
                continue
            # gradients have the dtype of what they belong to
            tolerance = max(TOLERANCE[self.q.dtype], TOLERANCE.get(found.dtype, 0.0))
            top = max(wanted[finite].abs().max().item(), 1.0)
            error = (found.double() - wanted)[finite].abs().max().item()
            if error <= tolerance * top:
                continue
            # where a sum cancels or a denominator is tiny, rounding moves the exact result, too: by as much as the most
            # of these, since one draw may happen to cancel
            moved = [self.perturbed(tolerance / 4).expected(tolerance / 4)[at] for _ in range(4)]
            noise = max((x - wanted)[finite].abs().max().item() for x in moved)
            assert error <= tolerance * top + 4 * noise, f"{name}: {error:.2e} of {top:.2e}, noise {noise:.2e}"

    def perturbed(self, by: float) -> Case:
        def move(x: Tensor) -> Tensor:
            return x.double() * (1 + by * torch.randn(x.shape, dtype=torch.float64))

        bias = None if self.bias is None else move(self.bias)
        q, k, v, dout = (move(x) for x in (self.q, self.k, self.v, self.dout))
        return replace(self, q=q, k=k, v=v, dout=dout, bias=bias)


def shaken(x: Tensor, noise: float) -> Tensor:
    """x, with noise in its gradient."""
    y = x.view_as(x)
    if noise:
        y.register_hook(lambda g: g * (1 + noise * torch.randn(g.shape, dtype=g.dtype)))
    return y


def strided(x: Tensor, order: int) -> Tensor:
    """The same values, laid out as (B, N, H, D), with a gap between rows, or with another last axis."""
    if order == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if order == 2:
        return torch.cat((x, torch.full_like(x, float("nan"))), -1)[..., : x.shape[-1]]
    return x.mT.contiguous().mT if order == 3 else x


def masks(rng: random.Random, batch: int, heads: int, n: int, m: int) -> Tensor:
    kind = rng.randrange(6)
    i, j = torch.arange(n)[:, None], torch.arange(m)
    b, h = rng.choice((1, batch)), rng.choice((1, heads))
    if kind == 0:
        return torch.rand(b, h, n, m) < rng.choice((0.02, 0.5, 0.97))
    if kind == 1:
        return (j <= i + rng.randrange(-3, 70))[None, None]
    if kind == 2:
        return ((i - j).abs() < rng.randrange(1, 90))[None, None]
    if kind == 3:
        blocks = torch.rand(b, h, -(-n // 64), -(-m // 64)) < 0.6
        return blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :n, :m]
    if kind == 4:
        return torch.ones(1, 1, n, m, dtype=torch.bool)
    # rows and keys that meet nothing
    return (torch.rand(b, h, n, 1) < 0.5) & (torch.rand(b, h, 1, m) < 0.5) & (i // 64 != 1)


def make(rng: random.Random, dtype: torch.dtype, normaliser: Normaliser | None = None) -> Case:
    torch.manual_seed(rng.randrange(2**31))
    batch, groups, share = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 3)
    heads = groups * share
    n, m = (rng.choice((1, 2, 63, 64, 65, rng.randint(1, 300), rng.randint(1, 300))) for _ in range(2))
    d, e = (rng.choice((16, 32, 48, 64, 80, 128, rng.randint(1, 144), 256)) for _ in range(2))
    shapes = ((batch, heads, n, d), (batch, groups, m, d), (batch, groups, m, e), (batch, heads, n, e))
    q, k, v, dout = (strided(torch.randn(s).to(dtype), rng.randrange(4)) for s in shapes)
    case = Case(q, k, v, masks(rng, batch, heads, n, m), dout, normaliser=normaliser or Softmax())
    if isinstance(case.normaliser, Softmax) and rng.random() < 0.5:
        case.dlse = torch.randn(batch, heads, n)
    if rng.random() < 0.3:
        case.scale = rng.choice((-1.0, 0.0, 2.0)) * d**-0.5
    return case


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_whole_table(isa, dtype):
    rng = random.Random(f"{isa} {dtype}")
    for _ in range(25):
        make(rng, dtype).check(isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normaliser", NORMALISERS, ids=repr)
def test_options_equal_the_whole_table(isa, normaliser):
    rng = random.Random(f"{isa} {normaliser}")
    for dtype in (torch.float32, torch.float32, torch.float32, torch.bfloat16):
        for _ in range(4):
            case = make(rng, dtype, normaliser)
            batch, heads, n, _ = case.q.shape
            m = case.k.shape[2]
            if rng.random() < 0.6:
                shape = [rng.choice((1, size)) for size in (batch, heads, n, m)][rng.choice((0, 0, 1, 2)) :]
                case.bias = torch.randn(shape).to(rng.choice((torch.float32, torch.bfloat16, torch.float16)))
                if rng.random() < 0.5 and case.bias.shape[-1] > 1:
                    case.bias[torch.rand(shape) < 0.1] = float("-inf")
            if rng.random() < 0.5:
                case.indexed = (relative(rng, batch, heads, n, m), *decomposed(rng, batch, heads, n, m))
            if isinstance(normaliser, Softmax) and rng.random() < 0.5:
                case.sinks = torch.randn([rng.choice((1, size)) for size in (batch, heads, n)]) * 3
            if rng.random() < 0.4:
                case.dropout = (rng.choice((0.1, 0.7)), rng.randrange(2**62))
                case.q_offset = rng.randrange(1000)
            case.check(isa)


def relative(rng: random.Random, batch: int, heads: int, n: int, m: int) -> Indexed:
    table = torch.randn(rng.choice((1, batch)), rng.choice((1, heads)), 1, n + m)
    return Indexed(table, torch.arange(m, dtype=torch.int32) + n, torch.arange(n, dtype=torch.int32) + 1)


def decomposed(rng: random.Random, batch: int, heads: int, n: int, m: int) -> tuple[Indexed, ...]:
    # coordinates of a grid of width 7
    one = Indexed(torch.randn(batch, heads, n, 7), torch.arange(m, dtype=torch.int32) % 7, torch.zeros(n).int())
    rows = -(-m // 7)
    two = Indexed(
        torch.randn(1, rng.choice((1, heads)), n, rows), torch.arange(m, dtype=torch.int32) // 7, torch.zeros(n).int()
    )
    return rng.choice(((), (one,), (one, two)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch, groups, share", [(1, 1, 1), (1, 1, 3), (1, 3, 2), (2, 2, 1)])
def test_any_number_of_threads_gives_the_same_bits(batch, groups, share, dtype):
    torch.manual_seed(0)
    heads, n = groups * share, 500
    q, k, v, dout = (torch.randn(batch, h, n, 32).to(dtype) for h in (heads, groups, groups, heads))
    mask = (Causal() & SlidingWindow(150)).dense(n, n)
    plain = Case(q, k, v, mask, dout, dlse=torch.randn(batch, heads, n))
    table = torch.randn(1, heads, 1, 2 * n)
    options = (
        {},
        {"bias": torch.randn(1, 1, n, n), "dropout": (0.3, 7)},
        {"bias": torch.randn(batch, 1, 1, n), "normaliser": Sigmoid(), "dlse": None},
        {"indexed": (Indexed(table, torch.arange(n) + n, torch.arange(n)),)},
        {
            "indexed": (Indexed(table, torch.arange(n) + n, torch.arange(n)),),
            "bias": torch.randn(1, 1, n, n),
        },
    )
    for option in options:
        case = replace(plain, **option)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                found.append(case.run())
            finally:
                torch.set_num_threads(1)
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert a is b is None or torch.equal(a, b)
        case.check()


def test_a_row_without_keys_is_zero_and_harmless():
    case = Case(
        *(torch.randn(1, 2, 130, 16) for _ in range(3)), torch.zeros(1, 1, 130, 130).bool(), torch.ones(1, 2, 130, 16)
    )
    case.mask[..., 70:, :5] = True
    for isa in ISAS:
        out, lse, *grads = case.run(isa)
        assert (out[:, :, :70] == 0).all() and (lse[:, :, :70] == float("-inf")).all()
        assert (grads[0][:, :, :70] == 0).all() and (grads[1][:, :, 5:] == 0).all() and (grads[2][:, :, 5:] == 0).all()
        case.check(isa)


def test_huge_scores():
    torch.manual_seed(0)
    case = Case(
        *(torch.randn(1, 1, 100, 32) for _ in range(3)), torch.rand(1, 1, 100, 100) < 0.5, torch.randn(1, 1, 100, 32)
    )
    case.q, case.scale = case.q * 40, 1.0
    for isa in ISAS:
        found, wanted = case.run(isa), case.expected()
        # with scores of hundreds their own rounding counts
        for a, b, tolerance in zip(found[:5], wanted[:5], (1e-4, 1e-6, 1e-3, 1e-3, 1e-4), strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_tensors_without_elements(shape):
    batch, heads, n, m = shape
    q, k, v = torch.randn(batch, heads, n, 16), torch.randn(batch, heads, m, 16), torch.randn(batch, heads, m, 16)
    layout = block_layout(torch.ones(1, 1, n, m, dtype=torch.bool))
    out, lse = block_sparse.forward(q, k, v, layout)
    assert out.shape == (batch, heads, n, 16) and (out == 0).all() and (lse == float("-inf")).all()
    dq, dk, dv, *_ = block_sparse.backward(out, lse, q, k, v, out, lse, layout)
    assert (dq == 0).all() and (dk == 0).all() and (dv == 0).all()
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)


def test_what_it_cannot_do_has_reasons():
    x = torch.randn(1, 4, 70, 16)
    layout = Causal().layout(70, 70)
    with pytest.raises(Unsupported, match=r"torch.float64"):
        block_sparse.forward(x.double(), x.double(), x.double(), layout)
    wide = torch.randn(1, 4, 70, 257)
    with pytest.raises(Unsupported, match="head width of q and k is 257"):
        block_sparse.forward(wide, wide, x, layout)
    with pytest.raises(Unsupported, match="normaliser Sharpen"):
        block_sparse.forward(x, x, x, layout, normaliser=Sharpen(Softmax()))
    with pytest.raises(Unsupported, match="sinks belong to Softmax"):
        block_sparse.forward(x, x, x, layout, normaliser=Sigmoid(), sinks=torch.zeros(4, 1))
    with pytest.raises(Unsupported, match="64 x 64, not 128 x 128"):
        block_sparse.forward(x, x, x, Causal().layout(70, 70, block=(128, 128)))
    with pytest.raises(ShapeError, match="for 71 queries and 70 keys; there are 70 and 70"):
        block_sparse.forward(x, x, x, Causal().layout(71, 70))
    with pytest.raises(ShapeError, match="multiple of G"):
        block_sparse.forward(x, x[:, :3], x[:, :3], layout)
    with pytest.raises(ShapeError, match="batch 2 and 1 heads"):
        block_sparse.forward(x, x, x, block_layout(torch.ones(2, 1, 70, 70, dtype=torch.bool)))
    with pytest.raises(OptionError, match="no instruction set 'sse9'"):
        block_sparse.forward(x, x, x, layout, isa="sse9")
    out, lse = block_sparse.forward(x, x, x, layout, normaliser=Sigmoid())
    assert lse is None
    with pytest.raises(Unsupported, match="Sigmoid has no log-sum-exp"):
        block_sparse.backward(out, torch.zeros(1, 4, 70), x, x, x, out, None, layout, normaliser=Sigmoid())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 70, 70), (1, 3, 1, 70), (1, 3, 70, 1)], ids=str)
def test_a_bias_that_is_nan_where_a_pair_may_meet_is_refused(isa, dtype, shape):
    q, k, v = (torch.randn(1, 3, 70, 16) for _ in range(3))
    bias = torch.zeros(shape, dtype=dtype)
    bias[:, 1, -1, -1] = float("nan")
    with pytest.raises(OptionError, match="holds NaN"):
        block_sparse.forward(q, k, v, Causal().layout(70, 70), bias=bias, isa=isa)
    hidden = bias.nan_to_num(0.0)
    hidden[:, 1, -1, -1] = float("-inf")
    block_sparse.forward(q, k, v, Causal().layout(70, 70), bias=hidden, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "heads, groups, n, per_head", [(8, 2, 1, False), (3, 3, 1, True), (4, 1, 2, False), (2, 2, 5, True)]
)
def test_few_queries_against_many_keys(isa, dtype, heads, groups, n, per_head):
    torch.manual_seed(0)
    m = 2500
    q, k, v = torch.randn(2, heads, n, 48), torch.randn(2, groups, m, 48), torch.randn(2, groups, m, 80)
    q, k, v = (strided(x.to(dtype), 1) for x in (q, k, v))
    mask = torch.rand(2, heads if per_head else 1, n, m) < 0.3
    mask[..., 600:1900] = False
    mask[:, :, n // 2, 64:] = False
    case = Case(q, k, v, mask, torch.randn(2, heads, n, 80).to(dtype), sinks=torch.randn(heads, 1))
    case.check(isa)
    replace(case, sinks=None, scale=-0.2).check(isa)


def test_one_step_is_the_last_row_of_all():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 1500, 64), torch.randn(1, 2, 1500, 64), torch.randn(1, 2, 1500, 64)
    whole, lse = block_sparse.forward(q, k, v, Causal().layout(1500, 1500))
    step, step_lse = block_sparse.forward(q[:, :, -1:], k, v, Causal().layout(1, 1500, q_offset=1499))
    assert (step - whole[:, :, -1:]).abs().max() < 1e-6
    assert (step_lse - lse[:, :, -1:]).abs().max() < 1e-5
    torch.set_num_threads(2)
    again, _ = block_sparse.forward(q[:, :, -1:], k, v, Causal().layout(1, 1500, q_offset=1499))
    torch.set_num_threads(1)
    assert torch.equal(step, again)
