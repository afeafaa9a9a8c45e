"""Halo attention: the queries of a block share one window, the block with a rim around it.

    s_ij = D^-1/2 q_i.k_j + q_i.r_h[dy] + q_i.r_w[dx],   j in the (block + 2 halo)^2 places around the block of i

Departs from the paper, whose code was never published: borders are masked; `border="zero"` is timm's form, in which the
rim outside the map takes part with keys and values of 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, ShapeError
from regard.engines.block_sparse import block_sparse
from regard.engines.precision import accumulator
from regard.layers.grids import check_grid, head_width
from regard.patterns import Halo
from regard.patterns.tiled import Tiled, block_cells
from regard.primitives.biases import Indexed

CARD = MixerCard(
    slug="halonet",
    part_of="halonet",
    title="Halo attention",
    exports=("HaloAttention",),
    example="b=2 y=4 x=6 c=16 h=4",
    options={"block": 2, "halo": 1},
    attends=("self",),
    time="n w c",
    memory="n w",
)


class HaloAttention(nn.Module):
    """Attention of blocks to blocks with a rim: (B, H, W, dim) -> (B, H / stride, W / stride, dim_out), section 2.

    block, halo: places of a block and of the rim around it, on each side; the block divides the grid. stride: 2 keeps
    every second query on each axis. dim_out: of the values, all heads together, dim if None; there is no output
    projection. head_dim: of queries and keys, dim_out / heads if None. border: "mask" hides what is outside the map,
    "zero" lets it take part with keys and values of 0. scale_rel: the relative term is scaled as the products are.
    strided: in the relative tables, neighbouring queries of stride 2 are two "pixels" apart, or, as in timm, one of the
    "queries". Raises OptionError, ShapeError.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        dim_out: int | None = None,
        head_dim: int | None = None,
        border: Literal["mask", "zero"] = "mask",
        scale_rel: bool = False,
        strided: Literal["pixels", "queries"] = "pixels",
        bias: bool = False,
    ):
        super().__init__()
        if block < 1 or halo < 0:
            raise OptionError(f"a block has at least 1 place and a halo at least 0, not block {block} and halo {halo}")
        if stride not in (1, 2):
            raise OptionError(f"the stride is {stride}; it is 1 or 2")
        if block % stride:
            raise OptionError(f"a block of {block} places does not divide by the stride {stride}")
        if border not in ("mask", "zero"):
            raise OptionError(f"border is {border!r}; it is 'mask' or 'zero'")
        if strided not in ("pixels", "queries"):
            raise OptionError(f"strided is {strided!r}; it is 'pixels' or 'queries'")
        dim_out = dim if dim_out is None else dim_out
        self.dim, self.heads, self.value_dim = dim, heads, head_width(dim_out, heads)
        self.head_dim = head_width(dim_out, heads, head_dim)
        self.block, self.halo, self.stride = block, halo, stride
        self.border, self.scale_rel, self.strided = border, scale_rel, strided
        self.q = nn.Linear(dim, heads * self.head_dim, bias=bias)
        # keys and values of one head beside each other, as in timm
        self.kv = nn.Linear(dim, heads * (self.head_dim + self.value_dim), bias=bias)
        places = 2 * self.window - 1
        self.rel_height = nn.Parameter(torch.empty(places, self.head_dim))
        self.rel_width = nn.Parameter(torch.empty(places, self.head_dim))
        self.reset_parameters()

    @property
    def window(self) -> int:
        """Places of the window on a side."""
        return self.block + 2 * self.halo

    def reset_parameters(self) -> None:
        """Projections start with deviation dim^-1/2, relative tables with head_dim^-1/2, biases at 0."""
        for linear in (self.q, self.kv):
            nn.init.trunc_normal_(linear.weight, std=self.dim**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for table in (self.rel_height, self.rel_width):
            nn.init.trunc_normal_(table, std=self.head_dim**-0.5)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, padding: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix the places of a grid. Raises ShapeError; Unsupported for a context, padding or a causal call."""
        check_grid("HaloAttention", self.dim, x, context, padding, is_causal=is_causal)
        height, width = x.shape[1:3]
        if height % self.block or width % self.block:
            raise ShapeError(
                f"a grid of {height}x{width} does not divide into blocks of {self.block}: pad to a multiple of block or "
                "choose block"
            )
        pattern = Halo((height, width), self.block, self.halo)
        tiled = Tiled.best(pattern, cells=block_cells(x.device), stride=(self.stride, self.stride))
        q = self.q(x[:, :: self.stride, :: self.stride]).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.kv(x.flatten(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, kv = tiled.to_queries(q), tiled.to_keys(kv)
        rows, keys = (tiled.places(of_queries=of, device=x.device) for of in (True, False))
        indexed = [
            self._relative(q, table, row, key)
            for table, row, key in zip((self.rel_height, self.rel_width), rows, keys, strict=True)
        ]
        sinks = None if self.border == "mask" else self._outside(indexed, rows, (height, width))
        k, v = kv.split((self.head_dim, self.value_dim), -1)
        out = block_sparse(q, k, v, tiled, indexed=indexed, sinks=sinks).out
        out = tiled.from_queries(out).transpose(1, 2).flatten(2)
        return out.unflatten(1, (height // self.stride, width // self.stride))

    def _relative(self, q: Tensor, table: Tensor, row: Tensor, key: Tensor) -> Indexed:
        """The term of one axis; row, key: coordinates of queries and keys on it."""
        scores = q @ table.t()
        if self.scale_rel:
            scores = scores * self.head_dim**-0.5
        return Indexed(scores, key.int(), self._first(row).int())

    def _first(self, row: Tensor) -> Tensor:
        """Where on the axis the key of the table's first entry lies, for each query."""
        inside = row % self.block
        step = inside if self.strided == "pixels" else inside // self.stride
        # entry = place of the key in the window - place of the query in the block + window - 1
        return row - inside - self.halo + step - (self.window - 1)

    def _outside(self, indexed: list[Indexed], rows: list[Tensor], shape: tuple[int, int]) -> Tensor:
        """The log of what the places outside the map add to the denominator of each row, (B, H, N)."""
        inside, outside = [], []
        kind = accumulator(indexed[0].table.dtype)
        for term, row, length in zip(indexed, rows, shape, strict=True):
            place = (row // self.block * self.block - self.halo)[:, None] + torch.arange(self.window, device=row.device)
            entry = (place - term.query_index[:, None]).clamp(0, term.table.shape[3] - 1)
            scores = term.table.gather(3, entry.expand(*term.table.shape[:2], -1, -1)).to(kind)
            there = (place >= 0) & (place < length)
            inside.append(_log_sum(scores, there))
            outside.append(_log_sum(scores, ~there))
        above = outside[0] + _log_add(inside[1], outside[1])
        beside = inside[0] + outside[1]
        return _log_add(above, beside)


def _log_sum(scores: Tensor, kept: Tensor) -> Tensor:
    """log of the sum of exp over the kept entries, -inf for none, with gradients that are finite."""
    none = ~kept.any(-1)
    filled = torch.where(kept, scores, float("-inf")).masked_fill(none[:, None], 0.0)
    return torch.logsumexp(filled, -1).masked_fill(none, float("-inf"))


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b); both may be -inf."""
    none = torch.isneginf(a) & torch.isneginf(b)
    return torch.logaddexp(a.masked_fill(none, 0.0), b.masked_fill(none, 0.0)).masked_fill(none, float("-inf"))
