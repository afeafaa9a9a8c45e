"""Flow attention: queries and keys as sinks and sources of a flow that is conserved, so that keys compete without softmax.

    I_i = q_i . sum k        O_j = k_j . sum q                             incoming and outgoing flow
    I'_i = q_i . sum k/O     O'_j = clamp(k_j . sum q/I, -1, 1)            the same with the other side held at 1
    out_i = sigmoid(I'_i N/M) (q_i / I_i) sum_j k_j (M softmax_j(O') v_j)',    q, k after a sigmoid

Causal: every sum runs over the prefix, and 1/O, 1/I, O' and I' carry the number of positions so far. `eps` stands in
both factors of each flow, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import Unsupported
from regard.contract.operator import operator
from regard.engines.precision import accumulator, without_autocast
from regard.engines.scan import ScanState, as_scan, linear_scan
from regard.patterns import Bound, Pattern
from regard.primitives.state import State

CARD = OpCard(
    slug="flow",
    title="Flow attention",
    paper="Flowformer: Linearizing Transformers with Conservation Flows",
    exports=("flow_attention", "flow_attention_step"),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross"),
    accepts=("pattern",),
    padding=True,
    decode="state",
    time="n d e",
    memory="n d",
    engines=("scan",),
)


@dataclass(frozen=True)
class FlowState(State):
    """What a causal flow keeps: the scan and the sums of k, q, k j/O, q j/I (B, H, D) and exp O' (B, H); count (B,)."""

    scan: ScanState
    keys: Tensor
    queries: Tensor
    refined_keys: Tensor
    refined_queries: Tensor
    competition: Tensor
    count: Tensor
    seen: int = 0


@operator(CARD)
def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    eps: float = 1e-6,
    engine: str | None = None,
) -> Tensor:
    """Flow attention (section 3.2, equations 4 to 8; causal form of the appendix).

    pattern: an intersection of Causal() and KeyValid(). Every query takes part in the sources' competition, so in the
    other direction nothing is hidden: without Causal() each output depends on all queries. Raises Unsupported,
    ShapeError.
    """
    is_causal, key_valid, reset = as_scan(pattern, is_causal, "flow")
    if reset is not None:
        raise Unsupported("flow sums over the whole prefix and does not separate documents; linear and lightning do")
    if is_causal:
        return flow_attention_step(q, k, v, key_valid=key_valid, eps=eps, engine=engine)[0]
    kind = accumulator(q.dtype)
    with without_autocast(q.device):
        query, key, value = _prepare(q, k, v, kind, key_valid)
        keys = key.shape[2] if key_valid is None else key_valid.sum(-1).clamp(min=1)[:, None, None].to(kind)
        incoming = _flow(query, key.sum(2, keepdim=True), eps)
        outgoing = _flow(key, query.sum(2, keepdim=True), eps)
        allocation = torch.sigmoid(
            _flow(query, (key / outgoing[..., None]).sum(2, keepdim=True), eps) * (q.shape[2] / keys)
        )
        received = _flow(key, (query / incoming[..., None]).sum(2, keepdim=True), eps).clamp(-1, 1)
        if key_valid is not None:
            received = received.masked_fill(~key_valid[:, None], float("-inf"))
            # a row of no keys has no maximum
            received = received.masked_fill(~key_valid.any(-1)[:, None, None], 0.0)
        value = value * (torch.softmax(received, -1) * keys)[..., None]
        out = linear_scan(query / incoming[..., None], key, value, is_causal=False, engine=engine)[0]
        return (out * allocation[..., None]).to(q.dtype)


def flow_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: FlowState | None = None,
    key_valid: Tensor | None = None,
    eps: float = 1e-6,
    engine: str | None = None,
) -> tuple[Tensor, FlowState]:
    """Continue causal `flow_attention` by any N >= 1 steps from a state (None: from the start): (out, new state)."""
    if q.shape[2] != k.shape[2]:
        raise Unsupported(f"causal flow needs as many queries as keys; there are {q.shape[2]} and {k.shape[2]}")
    kind = accumulator(q.dtype)
    with without_autocast(q.device):
        query, key, value = _prepare(q, k, v, kind, key_valid)
        if key_valid is not None:
            query = query * key_valid[:, None, :, None]
        if state is None:
            batch, heads, _, d = query.shape
            state = flow_state(batch, heads, d, value.shape[3], dtype=kind, device=q.device)
        step = torch.ones_like(key[:, 0, :, 0]) if key_valid is None else key_valid.expand(len(q), -1).to(kind)
        place = (state.count[:, None].to(kind) + step.cumsum(-1)).clamp(min=1)[:, None]
        keys, queries = _running(key, state.keys), _running(query, state.queries)
        incoming, outgoing = _flow(query, keys, eps), _flow(key, queries, eps)
        refined_keys = _running(key * (place / outgoing)[..., None], state.refined_keys)
        refined_queries = _running(query * (place / incoming)[..., None], state.refined_queries)
        allocation = torch.sigmoid(_flow(query, refined_keys, eps) / place)
        rise = torch.exp((_flow(key, refined_queries, eps) / place).clamp(-1, 1)) * step[:, None]
        competition = _running(rise, state.competition)
        value = value * (rise / torch.where(competition == 0, 1.0, competition) * place)[..., None]
        out, scan = linear_scan(query / incoming[..., None], key, value, initial_state=state.scan, engine=engine)
        last = FlowState(
            scan, keys[:, :, -1], queries[:, :, -1], refined_keys[:, :, -1], refined_queries[:, :, -1],
            competition[:, :, -1], state.count + step.sum(-1).to(state.count.dtype), state.seen + q.shape[2],
        )  # fmt: skip
        return (out * allocation[..., None]).to(q.dtype), last


def flow_state(
    batch: int, heads: int, d: int, e: int, *, dtype: torch.dtype, device: torch.device | None = None
) -> FlowState:
    """The state before the first token: zeros."""
    vector = torch.zeros(batch, heads, d, dtype=dtype, device=device)
    scan = ScanState(torch.zeros(batch, heads, d, e, dtype=dtype, device=device))
    count = torch.zeros(batch, dtype=torch.int64, device=device)
    return FlowState(scan, vector, vector, vector, vector, vector[..., 0], count)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, kind: torch.dtype, key_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k after the sigmoid and v, one key head a query head, hidden keys at 0 after the map."""
    repeats = q.shape[1] // k.shape[1]
    query, key = torch.sigmoid(q.to(kind)), torch.sigmoid(k.to(kind)).repeat_interleave(repeats, 1)
    value = v.to(kind).repeat_interleave(repeats, 1)
    if key_valid is not None:
        keep = key_valid[:, None, :, None]
        key, value = key * keep, value.masked_fill(~keep, 0.0)
    return query, key, value


def _flow(x: Tensor, total: Tensor, eps: float) -> Tensor:
    return ((x + eps) * (total + eps)).sum(-1)


def _running(x: Tensor, before: Tensor) -> Tensor:
    return before[:, :, None] + x.cumsum(2)
