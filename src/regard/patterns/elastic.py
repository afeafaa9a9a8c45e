"""Elastic windows: a band for every layer and head whose width grows with the length by a rule of its own.

    band(N) = max(1, int(alpha // block + beta ceil(N / block))) blocks, behind one block of sinks

MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression, section 3.2; the released code's
rounding, which rounds alpha // block on its own. A last block that is not full counts as one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from regard.contract.errors import OptionError, near
from regard.patterns.algebra import PerHead
from regard.patterns.atoms import Causal, SinkBand

SINK_BLOCKS = 1


@dataclass(frozen=True)
class MoAPlan:
    """A rule for every layer and head: alphas[layer][head] tokens and betas[layer][head] tokens per token of length.

    block: tokens, at least 1. alphas: finite. betas: at least 0. Raises OptionError.
    """

    alphas: tuple[tuple[float, ...], ...]
    betas: tuple[tuple[float, ...], ...]
    block: int = 64

    def __post_init__(self) -> None:
        for name in ("alphas", "betas"):
            object.__setattr__(self, name, _table(name, getattr(self, name)))
        counts = [len(row) for row in self.alphas], [len(row) for row in self.betas]
        if not counts[0] or not counts[0][0] or counts[0] != counts[1] or len(set(counts[0])) > 1:
            raise OptionError(
                f"the alphas are for {counts[0]} heads of each layer, the betas for {counts[1]}; both must be for the "
                "same number of heads in every layer"
            )
        for alpha, beta in zip(sum(self.alphas, ()), sum(self.betas, ()), strict=True):
            check_rule(alpha, beta)
        if type(self.block) is not int or self.block < 1:
            raise OptionError(f"block is a number of tokens, at least 1, not {self.block!r}")

    @property
    def layers(self) -> int:
        return len(self.alphas)

    @property
    def heads(self) -> int:
        return len(self.alphas[0])

    def band_blocks(self, layer: int, length: int) -> tuple[int, ...]:
        """Width of the band of each head in blocks, the query's own among them. Raises OptionError."""
        if not 0 <= layer < self.layers:
            raise OptionError(f"the plan has layers 0 to {self.layers - 1}, but not {layer}")
        rules = zip(self.alphas[layer], self.betas[layer], strict=True)
        return tuple(band_blocks(alpha, beta, length, self.block) for alpha, beta in rules)

    def pattern(self, layer: int, length: int) -> PerHead:
        """What the heads of a layer see among `length` tokens. Raises OptionError."""
        bands = self.band_blocks(layer, length)
        return PerHead(tuple(Causal() & SinkBand(self.block, SINK_BLOCKS, band) for band in bands))

    def density(self, length: int) -> float:
        """Mean over all heads of the blocks that the last row sees over the blocks there are."""
        seen = [
            seen_blocks(band, length, self.block)
            for layer in range(self.layers)
            for band in self.band_blocks(layer, length)
        ]
        return sum(seen) / (len(seen) * block_count(length, self.block))

    def to_json(self) -> str:
        """The plan as text: {"alphas": [[…]], "betas": [[…]], "block": 64}."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MoAPlan:
        """Read `to_json`, or a plan of the released code, which has blocks of 64. Raises OptionError."""
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise OptionError(f"the plan is not JSON: {error}") from error
        known = [f.name for f in fields(cls)]
        if not isinstance(found, dict) or not {"alphas", "betas"} <= set(found):
            raise OptionError(f"a plan is an object with alphas and betas, not {text[:60]!r}")
        for name in found:
            if name not in known:
                raise OptionError(f"a plan has no field {name!r}{near(name, known)}; it has {', '.join(known)}")
        return cls(**found)


def band_blocks(alpha: float, beta: float, length: int, block: int) -> int:
    """Width of the band of a rule in blocks, the query's own among them."""
    return max(1, int(alpha // block + beta * block_count(length, block)))


def seen_blocks(band: int, length: int, block: int) -> int:
    """How many blocks the row that sees most attends to, sinks included."""
    return min(SINK_BLOCKS + band, block_count(length, block))


def block_count(length: int, block: int) -> int:
    """How many blocks a length has. Raises OptionError."""
    if length < 1:
        raise OptionError(f"a length is at least 1 token, not {length}")
    return -(-length // block)


def check_rule(alpha: float, beta: float) -> None:
    """Raise OptionError for a rule that is no width."""
    if not (math.isfinite(alpha) and math.isfinite(beta) and beta >= 0):
        raise OptionError(f"a rule has a finite alpha and a finite beta of at least 0, not {alpha} and {beta}")


def _table(name: str, rows: Iterable[Iterable[float]]) -> tuple[tuple[float, ...], ...]:
    try:
        return tuple(tuple(float(value) for value in row) for row in rows)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} must be numbers, a row for every layer and one for every head in it") from error
