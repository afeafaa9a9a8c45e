"""Routing attention: tokens are sorted into clusters by online k-means, and attend inside their cluster.

    cluster c:  the `window` tokens of the largest x mu_c, in order of position, see each other (causally)
    mu:         moving averages of the tokens nearest to them;   loss = beta mean (x - mu_nearest)^2

x are queries and keys after a layer norm without weights; a layer mixes local heads and routing heads.
Departs from the paper: a token in several clusters gets the exact mean (the released code divides by count + 0.01:
`legacy_eps`); counts start at 1, where the released code starts at 0 and so throws rare centroids far out at the first
step; queries and keys of their own update the averages together, not one after the other; masks go by position also
where queries and keys are chosen apart (by rank, as released, they leak). selection="prefix" is added: a token belongs
to its nearest cluster alone and sees the last `window` members of it, so that nothing depends on later tokens and
decoding equals training. With "global", the paper's, a later token can push an earlier one out of a cluster.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.collect import add_loss
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.engines.block_sparse import block_sparse
from regard.engines.gather import gather
from regard.engines.precision import accumulator, without_autocast
from regard.layers.attention import Attention, check_tokens
from regard.layers.caches import KVState, PerHeadState
from regard.patterns import BlockLocal, Bound, Causal, Documents, Full, KeyValid, Pattern, Permuted, TokenSelection
from regard.primitives.state import State

CARD = MixerCard(
    slug="routing",
    title="Routing attention",
    paper="Efficient Content-Based Sparse Attention with Routing Transformers",
    exports=("RoutingAttention", "routing_attention", "Routing", "Centroids"),
    example="b=2 n=14 c=16 h=4",
    options={"clusters": 3, "window": 4, "selection": "prefix", "local_window": 3},
    attends=("causal_self",),
    padding=True,
    documents=True,
    decode=True,
    constant_state=True,
    time="n (w + k) c",
    memory="n (w + k)",
)

Selecting = Literal["global", "prefix"]


@dataclass(frozen=True)
class Routing:
    """Who may meet whom. selection: for the engines. query_cluster, key_cluster: the nearest centroid, int64 (B, H, N)."""

    selection: Permuted | TokenSelection
    query_cluster: Tensor
    key_cluster: Tensor

    @property
    def causal(self) -> bool:
        """Whether no row depends on a later token."""
        return isinstance(self.selection, TokenSelection)


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    *,
    window: int,
    is_causal: bool = False,
    selection: Selecting = "global",
    reduce: Literal["mean", "lse"] = "mean",
    key_valid: Tensor | None = None,
    scale: float | None = None,
    legacy_eps: float = 0.0,
    engine: str | None = None,
) -> tuple[Tensor, Routing]:
    """Attend inside clusters (section 4): (out (B, H, N, E), who met whom).

    q, k (B, H, N, D), v (B, H, N, E); pass q as k to share them. centroids: (H, C, D). window: tokens a cluster, at
    least 1; more than N is cut to N with a warning. selection: "global", the paper's, or "prefix", which is causal and
    needs is_causal=True. reduce: of a token in several clusters, the "mean" of its outputs or one softmax ("lse"). A
    token in no cluster gives 0. key_valid: bool (B, N), False = padding, in no cluster. scale: D^-1/2 if None (the
    released code: 1). legacy_eps: the mean divides by the count of clusters plus this (released: 0.01).
    Raises ShapeError, OptionError.
    """
    _check(q, k, v, centroids, key_valid)
    _check_window(window)
    if selection not in ("global", "prefix"):
        raise OptionError(f"selection is {selection!r}; it is 'global' or 'prefix'")
    _check_reduce(reduce, legacy_eps)
    if selection == "prefix" and not is_causal:
        raise OptionError("selection='prefix' looks back only: pass is_causal=True, or selection='global'")
    queries, keys = _affinity(q, centroids), _affinity(k, centroids)
    nearest = queries.argmax(2), keys.argmax(2)
    if selection == "prefix":
        chosen: Permuted | TokenSelection = _members(nearest[0], _hide(nearest[1], key_valid), window, 0)
    else:
        chosen = _clusters(queries, keys, window, key_valid, Causal() if is_causal else Full(), reduce)
    routing = Routing(chosen, *nearest)
    return _attend(q, k, v, chosen, scale, legacy_eps, engine), routing


class Centroids(nn.Module):
    """Online k-means: moving averages of the counts and the sums of the tokens nearest to each centroid (section 4.1).

    heads, clusters, dim: `values` is (H, C, D). decay: share of the old averages, in [0, 1). eps: Laplace smoothing of
    the counts. They move by `update` alone, without gradient. Raises OptionError.
    """

    values: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, heads: int, clusters: int, dim: int, *, decay: float = 0.999, eps: float = 1e-5):
        super().__init__()
        if clusters < 1:
            raise OptionError(f"routing needs at least 1 cluster, not {clusters}")
        if not 0 <= decay < 1:
            raise OptionError(f"decay is the share of the old averages, in [0, 1), not {decay}")
        self.decay, self.eps = decay, eps
        start = F.layer_norm(torch.randn(heads, clusters, dim), (dim,))
        self.register_buffer("values", start)
        self.register_buffer("counts", torch.ones(heads, clusters))
        self.register_buffer("sums", start.clone())

    @torch.no_grad()
    def update(self, *routed: tuple[Tensor, Tensor], valid: Tensor | None = None) -> None:
        """Move towards tokens (B, H, N, D) with their nearest centroids (B, H, N); all pairs together are one step.

        valid: bool (B, N), False = padding. Under a process group counts and sums are added up over all processes.
        """
        counts, sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        for x, nearest in routed:
            belongs = F.one_hot(nearest, self.counts.shape[1]).to(counts.dtype)
            if valid is not None:
                belongs = belongs * valid[:, None, :, None]
            counts += belongs.sum((0, 2))
            sums += torch.einsum("bhnc,bhnd->hcd", belongs, x.to(sums.dtype))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        whole = self.counts.sum(-1, keepdim=True)
        smooth = (self.counts + self.eps) / (whole + self.counts.shape[1] * self.eps) * whole
        self.values.copy_(self.sums / smooth[..., None])

    def extra_repr(self) -> str:
        return f"clusters={self.counts.shape[1]}, decay={self.decay}"

    def _apply(self, fn: Any, recurse: bool = True) -> Centroids:
        super()._apply(fn, recurse)
        for name, average in self.named_buffers():
            # half precision would round the small steps of a moving average away
            self._buffers[name] = average.to(accumulator(average.dtype))
        return self


@dataclass(frozen=True)
class RoutingState(State):
    """near: what the local heads keep, or None; far: what the routing heads keep, or None, marked with clusters.

    real: int64 (B,), tokens so far that are not padding.
    """

    near: KVState | None
    far: PerHeadState | None
    real: Tensor
    seen: int = 0


class RoutingAttention(Attention):
    """Causal attention with local heads and heads that route tokens into clusters (sections 4 and 5).

    clusters: a routing head. window: tokens a cluster sees, about length / clusters. selection: "prefix" (causal in
    all, decodes) or "global" (the paper's: training looks at the whole row to fill a cluster, and it cannot decode).
    local_heads: half of the heads if None; each sees its own block of local_window tokens (window if None) and the one
    before. share_qk: keys of routing heads are their queries. decay: of the centroids, which move in training mode
    only. beta: of the loss that is handed to the collector as "routing". reduce, scale, legacy_eps: as in
    `routing_attention`. skip_first: that many first layers have local heads alone; layer, layers: which of how many
    this is. A recomputed forward pass (activation checkpointing) would move the centroids twice. The other options are
    those of the attention layer. Raises OptionError.
    """

    crosses = False

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        clusters: int,
        window: int,
        selection: Selecting,
        local_heads: int | None = None,
        local_window: int | None = None,
        share_qk: bool = True,
        decay: float = 0.999,
        beta: float = 1e-4,
        reduce: Literal["mean", "lse"] = "mean",
        scale: float | None = None,
        legacy_eps: float = 0.0,
        skip_first: int = 0,
        layer: int = 0,
        layers: int = 1,
        head_dim: int | None = None,
        bias: bool = False,
        rotary: bool = True,
        rotary_base: float = 1e4,
    ):
        super().__init__(dim, heads, head_dim=head_dim, bias=bias, rotary=rotary, rotary_base=rotary_base)
        _check_window(window)
        if selection not in ("global", "prefix"):
            raise OptionError(f"selection is {selection!r}; it is 'global' or 'prefix'")
        _check_reduce(reduce, legacy_eps)
        local_heads = heads // 2 if local_heads is None else local_heads
        if not 0 <= local_heads <= heads:
            raise OptionError(f"of {heads} heads, {local_heads} cannot be local")
        if not 0 <= layer < layers:
            raise OptionError(f"layer {layer} is not one of {layers} layers, counted from 0")
        self.local_heads = heads if layer < skip_first else local_heads
        self.local_window = window if local_window is None else local_window
        BlockLocal(self.local_window, 1, 0)
        self.clusters, self.window, self.selection = clusters, window, selection
        self.share_qk, self.beta, self.reduce = share_qk, beta, reduce
        self.scale, self.legacy_eps = scale, legacy_eps
        routed = heads - self.local_heads
        own_keys = self.local_heads if share_qk else heads
        self.to_k = nn.Linear(dim, own_keys * self.head_dim, bias=bias) if own_keys else None  # type: ignore[assignment]
        self.centroids = Centroids(routed, clusters, self.head_dim, decay=decay) if routed else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C) causally. padding: bool (B, N), True = takes part. reset: bool (B, N), document starts.

        In training mode the centroids move. Raises Unsupported for a context, for is_causal=False, and for reset= with
        selection="global"; ShapeError.
        """
        if context is not None:
            raise Unsupported("routing mixes a sequence with itself and reads no context; softmax does")
        if not is_causal:
            raise Unsupported("routing is causal only: pass is_causal=True; softmax works both ways")
        if reset is not None and self.selection == "global":
            raise Unsupported(
                "routing with selection='global' fills clusters from the whole row; 'prefix' takes reset="
            )
        check_tokens(type(self).__name__, self.dim, x, None, padding, reset, is_causal)
        near, far, v = self._split(x)
        outs = []
        if self.local_heads:
            q, k = self._rotate(*near, 0)
            pattern = _near_pattern(self.local_window, k, padding, reset, None)
            outs.append(block_sparse(q, k, v[:, : self.local_heads], pattern).out)
        if self.centroids is not None:
            outs.append(self._route(self.centroids, *far, v[:, self.local_heads :], padding, reset))
        return self._merge_heads(torch.cat(outs, 1))

    def init_state(  # type: ignore[override]
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> RoutingState:
        """The state before the first token. Raises Unsupported with selection="global"."""
        if self.selection == "global":
            raise Unsupported(
                "routing with selection='global' fills clusters from the whole row and cannot go on from a state; "
                "selection='prefix' can"
            )
        weight = self.to_q.weight
        dtype, device = dtype or weight.dtype, device or weight.device
        near = torch.empty(batch, self.local_heads, 0, self.head_dim, dtype=dtype, device=device)
        far = torch.empty(batch, self.heads - self.local_heads, 0, self.head_dim, dtype=dtype, device=device)
        none = torch.empty(far.shape[:3], dtype=torch.int32, device=device)
        return RoutingState(
            KVState(near, near) if self.local_heads else None,
            PerHeadState(far, far, none, none) if self.centroids is not None else None,
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def prefill(  # type: ignore[override]
        self, x: Tensor, state: RoutingState, *, padding: Tensor | None = None
    ) -> tuple[Tensor, RoutingState]:
        """N >= 1 tokens after the state. padding: bool (B, N), for left padding. The centroids stay where they are."""
        check_tokens(type(self).__name__, self.dim, x, None, padding, None, True)
        near, far, v = self._split(x)
        n, outs = x.shape[1], []
        kept, members = state.near, state.far
        if kept is not None:
            q, k = self._rotate(*near, state.seen)
            past = kept.k.shape[2]
            whole = kept.append(k, v[:, : self.local_heads], padding)
            valid = whole.valid
            before = state.real - (past if kept.valid is None else kept.valid.sum(1))
            pattern = _near_pattern(self.local_window, whole.k, valid, None, before if state.seen else None)
            outs.append(block_sparse(q, whole.k, whole.v, pattern, q_offset=past).out)
            # the own block and the one before, wherever blocks begin in each row
            kept = whole.last(2 * self.local_window - 1)
        if members is not None and self.centroids is not None:
            (q, k), past = far, members.keys.shape[2]
            clusters = [_affinity(y, self.centroids.values).argmax(2).int() for y in (q, k)]
            q, k = self._rotate(q, k, state.seen)
            marks = _hide(clusters[1], padding)
            grown = members.append(k, v[:, self.local_heads :], padding, marks)
            assert grown.marks is not None
            chosen = _members(clusters[0], grown.marks, self.window, past)
            outs.append(_attend(q, grown.keys, grown.values, chosen, self.scale, 0.0, None))
            room = self.clusters * self.window
            members = grown if grown.keys.shape[2] <= room else grown.keep(_last(grown.marks, self.window, room))
        real = state.real + (n if padding is None else padding.sum(1))
        return self._merge_heads(torch.cat(outs, 1)), RoutingState(kept, members, real, state.seen + n)

    def step(self, x: Tensor, state: RoutingState) -> tuple[Tensor, RoutingState]:  # type: ignore[override]
        """One token (B, 1, C)."""
        return self.prefill(x, state)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens without padding: it stops growing when all clusters can be full."""
        size = self.to_q.weight.element_size()
        near = self.local_heads * min(length, 2 * self.local_window - 1) * 2 * self.head_dim * size
        slots = min(length, self.clusters * self.window)
        far = (self.heads - self.local_heads) * slots * (2 * self.head_dim * size + 8)
        return batch * (near + far + 8)

    def _split(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """(q, k) of the local heads, (q, k) of the routing heads after their norm, v of all."""
        local = self.local_heads
        q, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_v))
        k = q[:, :0] if self.to_k is None else self.to_k(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        far = F.layer_norm(q[:, local:], (self.head_dim,))
        far_k = far if self.share_qk else F.layer_norm(k[:, local:], (self.head_dim,))
        return (q[:, :local], k[:, :local]), (far, far_k), v

    def _route(
        self, centroids: Centroids, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, reset: Tensor | None
    ) -> Tensor:
        sides = (q,) if self.share_qk else (q, k)
        closeness = [_affinity(y, centroids.values) for y in sides]
        nearest = [a.argmax(2) for a in closeness]
        losses = [_distance(y, centroids.values, c, padding) for y, c in zip(sides, nearest, strict=True)]
        add_loss(CARD.slug, self.beta * torch.stack(losses).sum())
        chosen: Permuted | TokenSelection
        if self.selection == "global":
            chosen = _clusters(closeness[0], closeness[-1], self.window, padding, Causal(), self.reduce)
        else:
            apart = 0 if reset is None else reset.cumsum(1)[:, None] * self.clusters
            chosen = _members(nearest[0] + apart, _hide(nearest[-1] + apart, padding), self.window, 0)
        if self.training:
            centroids.update(*zip(sides, nearest, strict=True), valid=padding)
        q, k = self._rotate(q, k, 0)
        return _attend(q, k, v, chosen, self.scale, self.legacy_eps, None)


def _check(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, key_valid: Tensor | None) -> None:
    batch, heads, n, width = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ShapeError(
            f"routing_attention: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; all have one B, H and N, "
            "and k is as wide as q: clusters are of one sequence, each head has its own"
        )
    if centroids.dim() != 3 or centroids.shape[0] != heads or centroids.shape[2] != width:
        raise ShapeError(
            f"routing_attention: the centroids are {tuple(centroids.shape)}; they must be (H, C, D) = ({heads}, C, {width})"
        )
    if key_valid is not None and (key_valid.dtype != torch.bool or key_valid.shape != (batch, n)):
        raise ShapeError(
            f"routing_attention: key_valid is {key_valid.dtype} {tuple(key_valid.shape)}; it must be bool {(batch, n)}"
        )


def _check_window(window: int) -> None:
    if window < 1:
        raise OptionError(f"routing needs a window of at least 1 token a cluster, not {window}")


def _check_reduce(reduce: str, legacy_eps: float) -> None:
    if reduce not in ("mean", "lse"):
        raise OptionError(f"reduce is {reduce!r}; it is 'mean' or 'lse'")
    if legacy_eps and reduce != "mean":
        raise OptionError("legacy_eps belongs to the mean over clusters: it goes with reduce='mean'")


def _affinity(x: Tensor, centroids: Tensor) -> Tensor:
    """x mu' without gradient: (B, H, C, N)."""
    kind = accumulator(x.dtype)
    with without_autocast(x.device):
        return torch.einsum("bhnd,hcd->bhcn", x.detach().to(kind), centroids.detach().to(kind))


def _distance(x: Tensor, centroids: Tensor, nearest: Tensor, valid: Tensor | None) -> Tensor:
    """Mean square difference of tokens that are not padding and their centroids, which have no gradient."""
    heads = torch.arange(centroids.shape[0], device=x.device)[:, None]
    error = (x.to(accumulator(x.dtype)) - centroids[heads, nearest].detach()).square().mean(-1)
    if valid is None:
        return error.mean()
    return (error * valid[:, None]).sum() / (valid.sum() * x.shape[1]).clamp(min=1)


def _hide(labels: Tensor, valid: Tensor | None) -> Tensor:
    return labels if valid is None else labels.masked_fill(~valid[:, None], -1)


def _clusters(
    queries: Tensor,
    keys: Tensor,
    window: int,
    valid: Tensor | None,
    inner: Pattern,
    reduce: Literal["mean", "lse"],
) -> Permuted:
    """The `window` queries and keys nearest to each centroid, from affinities (B, H, C, N)."""
    n = queries.shape[3]
    if window > n:
        warnings.warn(f"a window of {window} tokens a cluster is cut to the {n} there are", stacklevel=3)
    q_index = _top(queries, min(window, n), valid)
    k_index = q_index if keys is queries else _top(keys, min(window, n), valid)
    return Permuted(q_index, k_index, inner, reduce)


def _top(affinity: Tensor, window: int, valid: Tensor | None) -> Tensor:
    """Positions of the largest affinities, ascending, -1 where there are fewer real tokens: int32 (B, H, C, window)."""
    n = affinity.shape[3]
    if valid is not None:
        affinity = affinity.masked_fill(~valid[:, None, None], float("-inf"))
    best, index = affinity.topk(window, -1)
    index = index.masked_fill(torch.isneginf(best), n).sort(-1).values
    return index.masked_fill(index == n, -1).int()


def _members(queries: Tensor, keys: Tensor, window: int, start: int) -> TokenSelection:
    """For queries at start, start + 1, …: the last `window` keys up to each that have its cluster.

    queries (B, H, N), keys (B, H, M): clusters, -1 for a key that belongs to none.
    """
    n, m = queries.shape[2], keys.shape[2]
    places = torch.arange(m, device=keys.device)
    # sorted by cluster, then by position
    code, order = (keys.long() * m + places).sort(-1)
    rows = torch.arange(start, start + n, device=keys.device).clamp(max=m - 1)
    first = queries.long() * m
    stop = torch.searchsorted(code, first + rows, right=True)
    begin = torch.searchsorted(code, first)
    rank = stop[..., None] - 1 - torch.arange(min(window, m), device=keys.device)
    index = order[:, :, None].expand(*rank.shape[:3], m).gather(-1, rank.clamp(min=0))
    return TokenSelection(index.masked_fill(rank < begin[..., None], -1).int(), within=Causal())


def _last(clusters: Tensor, window: int, room: int) -> Tensor:
    """The slots that hold one of the last `window` members of a cluster: int64 (B, H, room), ascending, -1 = none."""
    m = clusters.shape[2]
    places = torch.arange(m, device=clusters.device)
    whole = clusters.long() * m
    code = (whole + places).sort(-1).values
    behind = torch.searchsorted(code, whole + m - 1, right=True) - torch.searchsorted(code, whole + places, right=True)
    kept = torch.where((clusters >= 0) & (behind < window), places, -1)
    return kept.sort(-1).values[..., -room:]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Permuted | TokenSelection,
    scale: float | None,
    legacy_eps: float,
    engine: str | None,
) -> Tensor:
    if isinstance(chosen, TokenSelection):
        return gather(q, k, v, chosen, scale=scale, q_offset=k.shape[2] - q.shape[2], engine=engine).out
    out = block_sparse(q, k, v, chosen, scale=scale, engine=engine).out
    if not legacy_eps:
        return out
    counts = chosen.memberships(q.shape[2])[..., None]
    return out * (counts / (counts + legacy_eps)).to(out.dtype)


def _near_pattern(
    window: int, k: Tensor, valid: Tensor | None, reset: Tensor | None, before: Tensor | None
) -> Pattern | Bound:
    """The own block of real tokens and the one before. before: real tokens of each row ahead of the first key."""
    if valid is None and reset is None and before is None:
        return Causal() & BlockLocal(window, 1, 0)
    real = k.new_ones(k.shape[0], k.shape[2], dtype=torch.int64) if valid is None else valid.long()
    count = real.cumsum(1) if before is None else real.cumsum(1) + before[:, None]
    apart: Tensor | int = 0
    if reset is not None:
        count = count - torch.where(reset, count - real, 0).cummax(1).values
        apart = reset.cumsum(1) * (k.shape[2] + 2)
    block = (count - 1) // window
    # neighbouring blocks are one document of the even pairs or of the odd ones
    pairs = Documents("even") | Documents("odd")
    pattern = Causal() & pairs.bind(even=block // 2 + apart, odd=(block + 1) // 2 + apart)
    return pattern if valid is None else pattern & KeyValid().bind(key_valid=valid)
