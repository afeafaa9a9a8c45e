"""Linear attention, state space models and gated recurrences as one thing: a linear system with changing coefficients.

    h_i = Lam_i h_{i-1} + B_i v_i,   y_i = C_i h_i + D_i v_i
    P_ij = C_i (Lam_i ... Lam_{j+1}) B_j,   and D_i more where i = j

All transitions here are diagonal. A mixer that keeps a state is read by its own step: from unit states, and values 0 and
1, a step gives Lam, B and C. Softmax has such a form only with its exponential cut to a Taylor polynomial.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.optional import need
from regard.contract.shapes import parse
from regard.layers.attention import check_tokens
from regard.layers.scanning import ScanMixer
from regard.primitives.state import State

CARD = ExplanationCard(
    slug="dynamical_systems",
    title="Mixers as dynamical systems",
    paper="Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural "
    "Networks",
    exports=("as_dynamical_system", "DSF", "selective_state_space", "gated_recurrence"),
    reads="ops/linear",
    takes={"system": "model", "x": "queries", "k": "queries"},
    figure=True,
)

# heads that a figure shows at most
_SHOWN = 8

Step = Callable[[int, Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True, eq=False)
class DSF:
    """A linear system, the same for every channel of the values (section 3). All float64.

    transition (Lam), inputs (B), outputs (C): (B, H, N, S), the transition's S may be 1. direct (D): (B, H, N) or None.
    Raises ShapeError.
    """

    transition: Tensor
    inputs: Tensor
    outputs: Tensor
    direct: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.inputs.shape
        fits = self.transition.shape in (shape, (*shape[:3], 1)) and self.outputs.shape == shape and len(shape) == 4
        if not fits or (self.direct is not None and self.direct.shape != shape[:3]):
            given = [tuple(t.shape) for t in (self.transition, self.inputs, self.outputs)]
            direct = None if self.direct is None else tuple(self.direct.shape)
            raise ShapeError(
                f"transition, inputs and outputs are {given}, direct {direct}; they must be (B, H, N, S) and (B, H, N)"
            )

    @property
    def state_size(self) -> int:
        """Numbers of the state, for each channel of the values."""
        return self.inputs.shape[3]

    def mixing_matrix(self) -> Tensor:
        """P of y = P v: (B, H, N, N), lower triangular."""
        batch, heads, n, size = self.inputs.shape
        left = self.inputs.new_zeros(batch, heads, n, size)
        rows = []
        for i in range(n):
            left = left * self.transition[:, :, i, None]
            left = torch.cat((left[:, :, :i], self.inputs[:, :, i : i + 1], left[:, :, i + 1 :]), 2)
            rows.append((left * self.outputs[:, :, i, None]).sum(-1))
        matrix = torch.stack(rows, 2) if rows else self.inputs.new_zeros(batch, heads, 0, 0)
        return matrix if self.direct is None else matrix + torch.diag_embed(self.direct)

    def decay_spectrum(self) -> Tensor:
        """|Lam| of every step, the slowest first: (B, H, N, S)."""
        return self.transition.abs().expand_as(self.inputs).sort(-1, descending=True).values

    def effective_memory(self, eps: float = 1e-3) -> Tensor:
        """Of how many steps, the own one among them, at least eps is left in the state: int64 (B, H, N).

        What is left of step j at step i is the largest |Lam_i ... Lam_{j+1}|. eps: in (0, 1]. Raises OptionError.
        """
        if not 0 < eps <= 1:
            raise OptionError(f"eps is the share that must be left, in (0, 1], not {eps}")
        decay = self.transition.abs()
        n = decay.shape[2]
        left = torch.ones_like(decay[:, :, :1]).expand(-1, -1, n, -1)
        counts = []
        for i in range(n):
            # only steps up to i - 1 have something that may decay
            left = torch.cat((left[:, :, :i] * decay[:, :, i : i + 1], left[:, :, i:]), 2)
            counts.append((left[:, :, : i + 1].amax(-1) >= eps).sum(-1))
        return torch.stack(counts, -1) if counts else decay.new_zeros(*decay.shape[:2], 0, dtype=torch.int64)

    def figure(self, row: int = 0) -> Any:
        """A plotly figure of a row of the batch: of the first 8 heads the matrix, above what each number of the state keeps.

        Raises MissingExtra, OptionError.
        """
        graphs, subplots = need("plotly.graph_objects", "explain"), need("plotly.subplots", "explain")
        batch, heads = self.inputs.shape[:2]
        if not 0 <= row < batch:
            raise OptionError(f"row is 0 to {batch - 1}, not {row}")
        shown = min(heads, _SHOWN)
        figure = subplots.make_subplots(
            2, shown, subplot_titles=[f"head {head}" for head in range(shown)], row_heights=[0.7, 0.3],
            shared_xaxes="columns", shared_yaxes="rows", horizontal_spacing=0.02, vertical_spacing=0.1,
        )  # fmt: skip
        for head, matrix in enumerate(self.mixing_matrix()[row, :shown]):
            decay = self.decay_spectrum()[row, head].T
            hover = "%{y} reads %{x}: %{z:.3g}<extra></extra>", "%{z:.3g} left at step %{x}<extra></extra>"
            hidden = matrix.masked_fill(torch.ones_like(matrix, dtype=torch.bool).triu(1), math.nan)
            for place, (table, told) in enumerate(zip((hidden, decay), hover, strict=True), 1):
                axis = "coloraxis" if place == 1 else "coloraxis2"
                trace = graphs.Heatmap(z=table.cpu().numpy(), coloraxis=axis, hovertemplate=told)
                figure.add_trace(trace, place, head + 1)
            figure.update_xaxes(title_text="step", row=2, col=head + 1)
        figure.update_yaxes(autorange="reversed", showgrid=False)
        figure.update_yaxes(title_text="step that reads", row=1, col=1)
        figure.update_yaxes(title_text="number of the state", row=2, col=1, dtick=max(self.state_size // 4, 1))
        scale = {"colorscale": "RdBu", "cmid": 0, "colorbar": {"title": "P", "y": 0.7, "len": 0.6}}
        most = max(1.0, float(self.transition[row].abs().max()))
        kept = {"colorscale": "Viridis", "cmin": 0, "cmax": most, "colorbar": {"title": "|Λ|", "y": 0.13, "len": 0.35}}
        figure.update_layout(coloraxis=scale, coloraxis2=kept, plot_bgcolor="white")
        return figure.update_xaxes(showgrid=False).update_layout(height=460, width=160 + 220 * shown)

    def rescaled(self, eta: Tensor) -> DSF:
        """The same matrix by the state h / eta: Lam_i eta_{i-1} / eta_i, B / eta, C eta. eta: (B, H, N), not 0.

        With eta the normaliser of linear attention, division moves from the output into the recurrence (section 4.1).
        """
        if eta.shape != self.inputs.shape[:3]:
            raise ShapeError(f"eta is {tuple(eta.shape)}; it must be (B, H, N) = {tuple(self.inputs.shape[:3])}")
        eta = eta.to(self.inputs)[..., None]
        before = torch.cat((torch.ones_like(eta[:, :, :1]), eta[:, :, :-1]), 2)
        return replace(
            self, transition=self.transition * before / eta, inputs=self.inputs / eta, outputs=self.outputs * eta
        )


@torch.no_grad()
def as_dynamical_system(
    system: Any,
    x: Tensor,
    k: Tensor | None = None,
    *,
    order: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> DSF:
    """A causal mixer on some input as a linear system in its values.

    system: an op that decodes from a state, then x is q (B, H, N, D), k (B, G, N, D) and options the op's own,
    further tensors of its spec among them; or a layer on a scan, then x are its tokens (B, N, C) and the values of the system
    those behind its value projection. order: for softmax, the degree of the Taylor polynomial in place of exp; the
    state has C(D + order, order) numbers. Calls the step N times on S + 1 values. Raises Unsupported where there is no
    causal state space form; OptionError, ShapeError.
    """
    options = dict(options or {})
    if isinstance(system, nn.Module):
        if k is not None or order is not None or options:
            raise OptionError("a layer is read from its tokens alone; k, order and options belong to ops")
        return _read(*_layer_step(system, x))
    card = getattr(system, "card", None)
    if card is None:
        raise Unsupported("as_dynamical_system reads ops with a card and layers on a scan; write the DSF yourself")
    if k is None or x.dim() != 4 or k.dim() != 4 or k.shape[2] != x.shape[2]:
        given = None if k is None else tuple(k.shape)
        raise ShapeError(f"q is {tuple(x.shape)}, k {given}; they must be (B, H, N, D) and (B, G, N, D)")
    if "causal_self" not in card.attends:
        raise Unsupported(
            f"{card.slug} has no causal state space form: it is not causal; linear and lightning have one"
        )
    if card.slug == "softmax":
        return _taylor_softmax(x, k, order, options)
    if order is not None:
        raise OptionError(f"order is the degree of softmax's polynomial; {card.slug} has none")
    if card.decode != "state":
        raise Unsupported(
            f"{card.slug} has no causal state space form: its state grows with the sequence; linear, lightning, based "
            "and flow have one, softmax with order="
        )
    return _read(*_op_step(system, x, k, options))


def selective_state_space(delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> DSF:
    """S6 (Mamba): Lam = exp(-delta a), B = delta b, C = c, one head a channel (section 3.2).

    delta (B, H, N), after its softplus; a (H, S), at least 0; b, c (B, N, S).
    """
    delta, a, b, c = (t.to(torch.float64) for t in (delta, a, b, c))
    step = delta[..., None]
    inputs = step * b[:, None]
    return DSF(torch.exp(-step * a[:, None]), inputs, c[:, None].expand_as(inputs))


def gated_recurrence(rate: Tensor, recurrence: Tensor, gate: Tensor, *, sharpness: float = 8.0) -> DSF:
    """RG-LRU: Lam = exp(-c softplus(rate) sigmoid(recurrence)), B = sqrt(1 - Lam^2) sigmoid(gate), C = 1 (section 3.3).

    rate (H,), recurrence, gate (B, H, N), before their sigmoids. sharpness: c.
    """
    rate, recurrence, gate = (t.to(torch.float64) for t in (rate, recurrence, gate))
    log = -sharpness * F.softplus(rate)[:, None] * torch.sigmoid(recurrence)
    inputs = torch.sqrt(-torch.expm1(2 * log)) * torch.sigmoid(gate)
    return DSF(log.exp()[..., None], inputs[..., None], torch.ones_like(inputs)[..., None])


def _op_step(op: Any, q: Tensor, k: Tensor, options: dict[str, Any]) -> tuple[Step, int, int]:
    (name,) = (export for export in op.card.exports if export.endswith("_step"))
    step = getattr(sys.modules[op.__module__], name)
    timed: dict[str, tuple[Tensor, int]] = {}
    for tensor, axes in parse(op.card.spec).inputs[3:]:
        if tensor not in options:
            raise OptionError(f"{op.card.slug} also takes {tensor} ({' '.join(axes)}): pass {tensor} in options")
        timed[tensor] = options.pop(tensor).double(), next(i for i, axis in enumerate(axes) if axis in "nm")
    for option in ("pattern", "is_causal", "state", "key_valid", "reset"):
        if option in options:
            raise OptionError(f"{option} cannot be given: the system is the causal form of one whole document")
    options = {**op.card.options, **options}
    q, k = q.double(), k.double()

    def run(t: int, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        at = slice(t, t + 1)
        more = [tensor.narrow(axis, t, 1) for tensor, axis in timed.values()]
        values = v.expand(k.shape[0], k.shape[1], 1, -1)
        result: tuple[Tensor, Any] = step(q[:, :, at], k[:, :, at], values, *more, state=state, **options)
        return result

    return run, q.shape[1], q.shape[2]


def _layer_step(layer: nn.Module, x: Tensor) -> tuple[Step, int, int]:
    if not isinstance(layer, ScanMixer) or type(layer)._run is not ScanMixer._run:
        raise Unsupported(
            f"{type(layer).__name__} has no causal state space form that can be read: it is no layer on a linear scan "
            "(linear, lightning, based and flow are)"
        )
    check_tokens(type(layer).__name__, layer.dim, x, None, None, None, True)
    wide = copy.deepcopy(layer).double()
    q, k = (to(x.double()).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for to in (wide.to_q, wide.to_k))

    def run(t: int, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        at = slice(t, t + 1)
        values = v.expand(*k.shape[:2], 1, -1)
        return wide.scan(q[:, :, at], k[:, :, at], values, state=state, key_valid=None, reset=None)

    return run, q.shape[1], q.shape[2]


def _read(step: Step, heads: int, n: int) -> DSF:
    """Lam, B and C of every step, from a state of one-hot rows beside a value of 1."""
    if n == 0:
        raise ShapeError("a system needs at least one step")
    one = torch.ones(1, dtype=torch.float64)
    with_one, without = (_tensors(step(0, value, None)[1]) for value in (one, 0 * one))
    changed = [i for i, (a, b) in enumerate(zip(with_one, without, strict=True)) if not torch.equal(a, b)]
    if len(changed) != 1 or with_one[changed[0]].dim() != 4:
        raise Unsupported("the values reach several parts of the state, or none: it is no linear state space form")
    place, size = changed[0], with_one[changed[0]].shape[2]
    units = torch.eye(size, size + 1, dtype=torch.float64)
    values = torch.cat((torch.zeros(size, dtype=torch.float64), one))
    # the state before the first step is all zeros
    state = replace(step(0, values, None)[1]._map(torch.zeros_like), seen=0)
    found = []
    for t in range(n):
        held = _tensors(state)[place]
        out, state = step(t, values, _replaced(state, place, units.expand_as(held)))
        new = _tensors(state)[place]
        lam, b = new[..., :size], new[..., size]
        if not torch.equal(lam, torch.diag_embed(lam.diagonal(dim1=-2, dim2=-1))):
            raise Unsupported("its transition is not diagonal; only diagonal systems are read")
        share = heads // lam.shape[1]
        lam, b = (x.repeat_interleave(share, 1) for x in (lam.diagonal(dim1=-2, dim2=-1), b))
        found.append((lam, b, out[:, :, 0, :size] / lam))
    lam, b, c = (torch.stack(parts, 2) for parts in zip(*found, strict=True))
    same = bool((lam == lam[..., :1]).all())
    return DSF(lam[..., :1] if same else lam, b, c)


def _tensors(state: State) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    state._map(keep)
    return found


def _replaced(state: State, place: int, value: Tensor) -> State:
    left = iter(range(len(_tensors(state))))
    return state._map(lambda t: value if next(left) == place else t)


def _taylor_softmax(q: Tensor, k: Tensor, order: int | None, options: dict[str, Any]) -> DSF:
    if order is None:
        raise OptionError("softmax has a state space form only with its exponential cut short: pass order=")
    if order < 0:
        raise OptionError(f"order is the degree of a polynomial, at least 0, not {order}")
    if set(options) - {"scale"}:
        raise OptionError(f"softmax as a system takes scale alone, not {', '.join(sorted(set(options) - {'scale'}))}")
    scale = options.get("scale")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    share = q.shape[1] // k.shape[1]
    left = _monomials(q.double() * scale, order)
    right = _monomials(k.double(), order).repeat_interleave(share, 1)
    eta = (left * right.cumsum(2)).sum(-1, keepdim=True)
    return DSF(torch.ones_like(left[..., :1]), right, left / eta)


def _monomials(x: Tensor, order: int) -> Tensor:
    """phi with phi(x).phi(y) = sum over r <= order of (x.y)^r / r!: every product of r channels over sqrt(its count)."""
    found = [torch.ones_like(x[..., 0])]
    for degree in range(1, order + 1):
        for channels in combinations_with_replacement(range(x.shape[-1]), degree):
            repeats = math.prod(math.factorial(channels.count(c)) for c in set(channels))
            found.append(x[..., list(channels)].prod(-1) * repeats**-0.5)
    return torch.stack(found, -1)
