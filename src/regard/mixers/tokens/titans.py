"""Neural long-term memory: a small network that learns keys and values while it reads, by momentum and forgetting.

    S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2,      M_t = (1 - alpha_t) M_{t-1} + S_t,      y_t = M_t(q_t)

Gradients are taken at the memory before the chunk of `chunk_size` tokens, which is the training form of section 3.2;
chunk_size=1 is the recurrence. Every gradient is an outer product, so a chunk is written and read by products of
chunk by chunk tables, one for each layer of the network: the memory of no single token is ever made. Training keeps
the memory before every chunk.
Departs from the paper: it leaves the network's activation, the output's gate and the sizes of the gates open; here
SiLU, a sigmoid, and theta_t = theta_max sigmoid(.), alpha starting at 0.01.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.engines.precision import accumulator, without_autocast
from regard.engines.scan_affine import affine_scan
from regard.layers.attention import check_tokens
from regard.layers.caches import ConvState
from regard.layers.causal_conv import CausalConv1d
from regard.primitives.state import State

CARD = MixerCard(
    slug="titans",
    title="Titans: neural long-term memory",
    paper="Titans: Learning to Memorize at Test Time",
    exports=("NeuralMemory", "neural_memory", "NeuralMemoryState", "MemoryState"),
    example="b=2 n=10 c=16 h=4",
    options={"chunk_size": 4},
    attends=("causal_self",),
    decode=True,
    constant_state=True,
    time="n c^2",
    memory="n c^2",
)

# of a token's squared gradient, below which it is not divided by
LEAST = 1e-12


@dataclass(frozen=True)
class MemoryState(State):
    """A network for each row and head: weights, layer by layer, (B, H, D_in, D_out), float32 at least.

    momentum: of the weights, or None. anchor: the weights before the open chunk, at which gradients are taken.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...] | None
    anchor: tuple[Tensor, ...]
    seen: int = 0

    @classmethod
    def start(cls, weights: tuple[Tensor, ...], batch: int, *, momentum: bool = True) -> Self:
        """The state before the first token, from weights (H, D_in, D_out) that all rows share."""
        own = tuple(w.to(accumulator(w.dtype)).expand(batch, *w.shape).clone() for w in weights)
        return cls(own, tuple(map(torch.zeros_like, own)) if momentum else None, own)


@dataclass(frozen=True)
class NeuralMemoryState(State):
    """What the layer keeps: the memory, and the last inputs of the convolutions of q, k and v."""

    memory: MemoryState
    convs: tuple[ConvState, ...]
    seen: int = 0


class NeuralMemory(nn.Module):
    """The memory as a layer, LMM (sections 3 and 4.4): (B, N, C) -> (B, N, C), causal, in a state of fixed size.

    dim: model width C. heads: memories. head_dim: of keys and values, dim / heads if None. depth: layers of the memory,
    at least 1 (a matrix). expansion: its inner width over head_dim. chunk_size: tokens whose gradients are taken at one
    memory. kernel: tokens of the convolutions of q, k and v. momentum, forgetting: False for eta = 0, alpha = 0.
    theta_max: the largest step, (0, inf); a unit key alone is learned at once by 1/2, and the steps of a chunk add up.
    max_grad_norm: a token's gradient is scaled down to this norm, over all layers of a head. Raises OptionError.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        head_dim: int | None = None,
        depth: int = 2,
        expansion: int = 4,
        chunk_size: int = 16,
        kernel: int = 4,
        momentum: bool = True,
        forgetting: bool = True,
        theta_max: float = 0.1,
        max_grad_norm: float | None = None,
    ):
        super().__init__()
        if heads < 1 or (head_dim is None and dim % heads):
            raise OptionError(f"a width of {dim} does not divide into {heads} heads: give head_dim=")
        for name, value in (("depth", depth), ("expansion", expansion), ("chunk_size", chunk_size)):
            if value < 1:
                raise OptionError(f"a neural memory needs a {name} of at least 1, not {value}")
        if not theta_max > 0 or (max_grad_norm is not None and not max_grad_norm > 0):
            raise OptionError(f"theta_max and max_grad_norm are above 0, not {theta_max} and {max_grad_norm}")
        width = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.head_dim, self.chunk_size = dim, heads, width, chunk_size
        self.kernel, self.momentum, self.forgetting = kernel, momentum, forgetting
        self.theta_max, self.max_grad_norm = theta_max, max_grad_norm
        self.to_q = nn.Linear(dim, heads * width, bias=False)
        self.to_k = nn.Linear(dim, heads * width, bias=False)
        self.to_v = nn.Linear(dim, heads * width, bias=False)
        self.convs = nn.ModuleList(CausalConv1d(heads * width, kernel) for _ in range(3))
        # theta, then eta and alpha where there are any
        starts = [0.0] + [0.0] * momentum + [math.log(0.01 / 0.99)] * forgetting
        self.to_rates = nn.Linear(dim, heads * len(starts), bias=False)
        self.rates_bias = nn.Parameter(torch.tensor(starts)[:, None].repeat(1, heads))
        widths = [width, *[expansion * width] * (depth - 1), width]
        # an empty memory answers 0
        self.weights = nn.ParameterList(
            torch.randn(heads, a, b) * (a**-0.5 if i < depth - 1 else 0.0) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.to_gate = nn.Linear(dim, heads * width, bias=False)
        self.to_out = nn.Linear(heads * width, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C) causally. Raises Unsupported for a context, padding, reset and is_causal=False."""
        if context is not None or not is_causal:
            raise Unsupported("a neural memory is causal and reads no context: pass is_causal=True; softmax does both")
        refuse_masks(padding, reset)
        check_tokens(type(self).__name__, self.dim, x, None, None, None, True)
        return self._run(x, self.init_state(x.shape[0], dtype=x.dtype, device=x.device))[0]

    def init_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> NeuralMemoryState:
        """The state before the first token; a memory of float32 at least, whatever dtype is asked for."""
        start = MemoryState.start(tuple(self.weights), batch, momentum=self.momentum)
        start = start if device is None else start.to(device)
        return NeuralMemoryState(start, tuple(c.init_state(batch, dtype=dtype, device=device) for c in self.convs))  # type: ignore[operator]

    def prefill(
        self, x: Tensor, state: NeuralMemoryState, *, padding: Tensor | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """N >= 1 tokens after the state. Raises Unsupported for padding: chunks are counted from the first token."""
        refuse_masks(padding, None)
        check_tokens(type(self).__name__, self.dim, x, None, None, None, True)
        return self._run(x, state)

    def step(self, x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, NeuralMemoryState]:
        """One token (B, 1, C)."""
        return self.prefill(x, state)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state: the same for every length."""
        weight = self.to_k.weight
        inputs = 3 * (self.kernel - 1) * weight.shape[0] * weight.element_size()
        copies = 3 if self.momentum else 2
        return batch * (inputs + copies * sum(w.numel() for w in self.weights) * accumulator(weight.dtype).itemsize)

    def recall(self, x: Tensor, weights: tuple[Tensor, ...], state: ConvState) -> tuple[Tensor, ConvState]:
        """What a memory of these weights (B, H, D_in, D_out) answers to tokens (B, N, C), without writing.

        state: of the convolution of q on these tokens.
        """
        q, state = self._conv(0, self.to_q(x), state)
        with without_autocast(x.device):
            out = _unit(q).to(weights[0].dtype)
            for i, w in enumerate(weights):
                out = (F.silu(out) if i else out) @ w
        return self._read_out(out, x), state

    def _run(self, x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, NeuralMemoryState]:
        projected = (to(x) for to in (self.to_q, self.to_k, self.to_v))
        parts = [self._conv(i, y, state.convs[i]) for i, y in enumerate(projected)]
        (q, _), (k, _), (v, _) = parts
        rates = self.to_rates(x).unflatten(-1, (-1, self.heads)).permute(2, 0, 3, 1)
        with without_autocast(x.device):
            kind = accumulator(v.dtype)
            rates = torch.sigmoid(rates.to(kind) + self.rates_bias.to(kind)[:, None, :, None])
            out, memory = neural_memory(
                _unit(q), _unit(k), v, self.theta_max * rates[0], eta=rates[1] if self.momentum else None,
                alpha=rates[-1] if self.forgetting else None, state=state.memory, chunk_size=self.chunk_size,
                max_grad_norm=self.max_grad_norm,
            )  # fmt: skip
        convs = tuple(conv for _, conv in parts)
        return self._read_out(out, x), NeuralMemoryState(memory, convs, state.seen + x.shape[1])

    def _conv(self, i: int, x: Tensor, state: ConvState) -> tuple[Tensor, ConvState]:
        x, state = self.convs[i].prefill(x, state)  # type: ignore[operator]
        return F.silu(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), state

    def _read_out(self, out: Tensor, x: Tensor) -> Tensor:
        y = self.norm(out.to(x.dtype)).transpose(1, 2).flatten(2)
        return self.to_out(y * torch.sigmoid(self.to_gate(x)))


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    *,
    state: MemoryState,
    eta: Tensor | None = None,
    alpha: Tensor | None = None,
    chunk_size: int = 16,
    max_grad_norm: float | None = None,
) -> tuple[Tensor, MemoryState]:
    """Write (k, v) into the memories of a state and read them by q, token by token: (out (B, H, N, E), new state).

    q, k (B, H, N, D), v (B, H, N, E). theta (B, H, N): step, at least 0. eta: momentum in [0, 1], 0 if None, as the
    state has none then. alpha: forgetting in [0, 1], 0 if None. Keys are taken as they are: the memory is stable while
    the theta |k|^2 of similar keys in a chunk stay below 1 in sum, or with max_grad_norm. A memory of one layer is
    linear. Derivatives of any order. Raises ShapeError, OptionError.
    """
    _check(q, k, v, theta, eta, alpha, state, chunk_size)
    batch, heads, n, _ = q.shape
    phase = state.seen % chunk_size
    # tokens that change nothing fill the first chunk and the last, unless there is only a part of one
    front, back, size = (0, 0, n) if phase + n <= chunk_size else (phase, -(phase + n) % chunk_size, chunk_size)

    def cut(x: Tensor, fill: float = 0.0) -> Tensor:
        """(B, H, N, …) -> (chunks, B H, size, …)."""
        x = F.pad(x.to(kind), (0, 0) * (x.dim() - 3) + (front, back), value=fill)
        return x.unflatten(2, (-1, size)).movedim(2, 0).flatten(1, 2).contiguous()

    def rows(ws: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(w.flatten(0, 1) for w in ws)

    def unrows(ws: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(w.unflatten(0, (batch, heads)) for w in ws)

    with without_autocast(q.device):
        kind = state.weights[0].dtype
        real = cut(torch.ones(1, 1, n, device=q.device))
        past = (None if eta is None else cut(eta, 1.0)), (None if alpha is None else cut(alpha))
        tables = _tables(cut(theta), *past, real)
        anchor = rows(state.anchor)
        # below the weights of every layer stands their momentum, so that one product moves or reads both
        parts = (state.weights,) if state.momentum is None else (state.weights, state.momentum)
        joint = tuple(torch.cat(ws, 1) for ws in zip(*map(rows, parts), strict=True))
        outs = []
        tokens = zip(*(cut(x).unbind(0) for x in (q, k, v)), strict=True)
        for i, ((q_now, k_now, v_now), table) in enumerate(zip(tokens, tables, strict=True)):
            inputs, errors = _errors(k_now, v_now, anchor, max_grad_norm)
            out, joint = _chunk(q_now, table, inputs, errors, joint)
            outs.append(out)
            if phase + n >= (i + 1) * chunk_size:
                anchor = tuple(j[:, : w.shape[1]] for j, w in zip(joint, anchor, strict=True))
        out = torch.stack(outs).unflatten(1, (batch, heads)).movedim(0, 2).flatten(2, 3)[:, :, front : front + n]
        halves = [unrows(j.chunk(len(parts), 1)) for j in joint]
        weights = tuple(half[0] for half in halves)
        momentum = None if state.momentum is None else tuple(half[1] for half in halves)
        return out.to(v.dtype), MemoryState(weights, momentum, unrows(anchor), state.seen + n)


class _Table(NamedTuple):
    """What the memory is made of in a chunk of b tokens, R rows; c = 2 with momentum, [weights, momentum], else 1.

    gain (R, b, b): of the error at a token (column) in the weights at another (row). held (R, b, c): of what came
    before the chunk in the weights at a token. ends (R, b, c): of the error at a token, mix (R, c, c): of what came
    before, in what the chunk leaves (second axis c of `ends`, rows of `mix`).
    """

    gain: Tensor
    held: Tensor
    ends: Tensor
    mix: Tensor


def _tables(theta: Tensor, eta: Tensor | None, alpha: Tensor | None, real: Tensor) -> list[_Table]:
    """theta, eta, alpha (chunks, R, b), real (chunks, 1, b). The update is linear in the past: scans of unit vectors."""
    count, rows, b = theta.shape
    keep = (torch.ones_like(theta) if alpha is None else 1 - alpha).flatten(0, 1)
    # the error stands for half of the gradient
    moved = torch.diag_embed(-2 * theta.flatten(0, 1))
    if eta is not None:
        moved = F.pad(moved, (1, 0))
        moved = affine_scan(eta.flatten(0, 1), moved, _first_unit(moved))
    slowed = moved[:, -1:]
    if eta is not None:
        # a momentum goes on moving the weights, but not at tokens that are none
        moved = (moved.unflatten(0, (count, rows)) * real[..., None]).flatten(0, 1)
    moved = F.pad(moved, (1, 0))
    kept = affine_scan(keep, moved, _first_unit(moved))
    c = kept.shape[2] - b
    last = kept[:, -1:] if eta is None else torch.cat((kept[:, -1:], F.pad(slowed, (1, 0))), 1)
    tables = kept[..., c:], kept[..., :c], last[..., c:].transpose(1, 2), last[..., :c]
    return [_Table(*t) for t in zip(*(x.unflatten(0, (count, rows)).unbind(0) for x in tables), strict=True)]


def _first_unit(x: Tensor) -> Tensor:
    return F.pad(torch.zeros_like(x[:, 0, 1:]), (1, 0), value=1.0)


def _chunk(
    q: Tensor, table: _Table, inputs: list[Tensor], errors: list[Tensor], joint: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """q (R, b, D) read, token by token, while inputs and errors are written: (out, joint (R, c D_in, D_out))."""
    new = []
    out = q
    for i, (j, x, error) in enumerate(zip(joint, inputs, errors, strict=True)):
        if i:
            out = F.silu(out)
        met = torch.bmm(out, x.transpose(1, 2)) * table.gain
        before = (out[:, :, None] * table.held[..., None]).flatten(2)
        out = torch.baddbmm(torch.bmm(met, error), before, j)
        past = torch.bmm(table.mix, j.view(*table.mix.shape[:2], -1)).view_as(j)
        new.append(torch.baddbmm(past, (x[:, :, None] * table.ends[..., None]).flatten(2).transpose(1, 2), error))
    return out, tuple(new)


def _errors(
    k: Tensor, v: Tensor, anchor: tuple[Tensor, ...], max_grad_norm: float | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs (R, b, D_in) and errors (R, b, D_out) of every layer; gradients are 2 input' error, token by token."""
    inputs, slopes, out = [k], [], torch.bmm(k, anchor[0])
    for w in anchor[1:]:
        half = torch.sigmoid(out)
        x = out * half
        slopes.append(torch.addcmul(half, x, 1 - half))
        inputs.append(x)
        out = torch.bmm(x, w)
    errors = [out - v]
    for w, slope in zip(anchor[:0:-1], slopes[::-1], strict=True):
        errors.insert(0, torch.bmm(errors[0], w.transpose(1, 2)) * slope)
    if max_grad_norm is not None:
        pairs = zip(inputs, errors, strict=True)
        squared = sum(4 * x.square().sum(-1, True) * e.square().sum(-1, True) for x, e in pairs)
        assert isinstance(squared, Tensor)
        scale = (max_grad_norm**2 / squared.clamp(min=LEAST)).sqrt().clamp(max=1)
        errors = [e * scale for e in errors]
    return inputs, errors


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(accumulator(x.dtype)), dim=-1)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: MemoryState,
    chunk_size: int,
) -> None:
    if chunk_size < 1:
        raise OptionError(f"a neural memory needs a chunk_size of at least 1, not {chunk_size}")
    wide, narrow = state.weights[0].shape, state.weights[-1].shape
    want = {"q": (*q.shape[:3], wide[2]), "k": (*q.shape[:3], wide[2]), "v": (*q.shape[:3], narrow[3])}
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[:2] != wide[:2] or x.shape != want[name]:
            raise ShapeError(
                f"neural_memory: {name} is {tuple(x.shape)}; it must be (B, H, N, D) with B = {wide[0]}, "
                f"H = {wide[1]}, N as of q, D = {want[name][-1]}, to fit the state"
            )
    for name, rate in (("theta", theta), ("eta", eta), ("alpha", alpha)):
        if rate is not None and rate.shape != q.shape[:3]:
            raise ShapeError(f"neural_memory: {name} is {tuple(rate.shape)}; it must be {tuple(q.shape[:3])}")
    if (eta is None) is not (state.momentum is None):
        raise OptionError("eta is for a state with momentum: MemoryState.start(…, momentum=eta is not None)")


def refuse_masks(padding: Tensor | None, reset: Tensor | None) -> None:
    """Raise Unsupported: chunks are counted from the first token."""
    for name, given in (("padding", padding), ("reset", reset)):
        if given is not None:
            raise Unsupported(f"titans counts chunks from the first token and takes no {name}; softmax does")
