"""What every head of a model does with one input, on one page that opens offline.

Sinks, entropies, kinds of heads and retrieval heads as maps of layers and heads; a click on a head shows its weights between
all tokens. The weights lie in the page, each in one byte by its square root (so 1/65025 is the least that shows), packed; the
browser unpacks a head when it is asked for.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, Unsupported
from regard.contract.optional import need
from regard.explain.heads.kinds import HeadKinds, Kind, head_kinds
from regard.explain.heads.maps import HeadMap, entropy_map, sink_map
from regard.explain.heads.retrieval_heads import Case, HeadScores, NotRecalled, retrieval_scores
from regard.hosts.tape import record

CARD = ExplanationCard(
    slug="overview",
    title="All heads of a model on one page",
    exports=("overview", "Overview"),
    reads="llama",
    takes={"model": "model", "inputs": "one row"},
    figure=True,
    builds_on=("maps", "kinds", "retrieval_heads"),
    baseline=True,
)

_KINDS: dict[Kind, str] = {
    "previous": "previous-token heads", "duplicate": "duplicate-token heads", "induction": "induction heads",
}  # fmt: skip
# tokens beyond which the tables between them are left out of the page
_TABLES = 768


@dataclass(frozen=True, eq=False)
class Overview:
    """What was read of one input.

    name: of the model; parameters: how many. tokens: (N), as they are called. sinks, entropies: (L, H) maps. kinds: of heads,
    None for models that read no text or look ahead. retrieval: scores of heads, or None, and `told` says why or of how many
    needles. weights: (L, H, N, N) of the input, or None where it is too long. grid: (height, width, tokens before the grid)
    of an image.
    """

    name: str
    parameters: int
    tokens: tuple[str, ...]
    sinks: HeadMap
    entropies: HeadMap
    kinds: HeadKinds | None
    retrieval: HeadScores | None
    told: str
    weights: Tensor | None
    grid: tuple[int, int, int] | None = None

    def summary(self) -> dict[str, Any]:
        """The figures as plain data: sizes, the strongest sinks, the mean entropy, the heads of each kind, and retrieval
        heads or why there are none."""
        layers, heads = self.sinks.values.shape
        found: dict[str, Any] = {
            "model": self.name, "parameters": self.parameters, "layers": layers, "heads": heads,
            "tokens": len(self.tokens),
            "sinks": [(*place, round(float(self.sinks.values[place]), 3)) for place in self.sinks.top(5)],
            "mean_entropy_nats": round(float(self.entropies.values.nanmean()), 3),
        }  # fmt: skip
        if self.kinds is not None:
            found["kinds"] = {kind: self.kinds.heads(kind) for kind in _KINDS}
        if self.retrieval is not None:
            found["retrieval_heads"] = self.retrieval.heads
        return found | {"retrieval": self.told}

    def figure(self) -> Any:
        """The map of entropies; the whole is `write`. Raises MissingExtra."""
        return self.entropies.figure()

    def write(self, path: str | Path) -> None:
        """The page. Raises MissingExtra without jinja2 and plotly."""
        jinja2, offline = need("jinja2", "bench"), need("plotly.offline", "bench")
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        text = (files("regard.explain.overview") / "page.html.j2").read_text(encoding="utf-8")
        maps = [
            {"title": "weight on the first token", "unit": "", "most": 1.0, "values": _rows(self.sinks.values)},
            {"title": "entropy of the weights", "unit": "nats", "most": None, "values": _rows(self.entropies.values)},
        ]
        if self.kinds is not None:
            for kind, title in _KINDS.items():
                values = _rows(getattr(self.kinds, kind))
                maps.append({"title": title, "unit": "", "most": 1.0, "values": values})
        if self.retrieval is not None:
            maps.append({"title": "retrieval scores", "unit": "", "most": 1.0, "values": _rows(self.retrieval.scores)})
        page = environment.from_string(text).render(
            facts=self.summary(), kinds=_KINDS, maps=maps, tokens=list(self.tokens), grid=self.grid,
            tables=_packed(self.weights), plotly=offline.get_plotlyjs(),
            threshold=None if self.retrieval is None else self.retrieval.threshold,
        )  # fmt: skip
        Path(path).write_text(page, encoding="utf-8")


def overview(
    model: Any,
    inputs: Mapping[str, Tensor] | Tensor,
    tokens: Sequence[str] | None = None,
    *,
    kinds: bool = True,
    needles: Sequence[Case] = (),
    answer: int = 32,
) -> Overview:
    """Read every head of a model on one input without pads.

    inputs: the model's keywords or ids, one row. tokens: what to call them, ids if None. kinds: whether language models are
    also read on random tokens that come twice. needles: prompts of ids to find retrieval heads by, see `RecallCase`; answer:
    tokens that a model may write to each. Raises OptionError, ShapeError, Unsupported.
    """
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    first = next(iter(given.values()))
    if len(first) != 1:
        raise OptionError(f"the page shows one input, not a batch of {len(first)}")
    mask = given.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise OptionError("leave pads out: the page shows one input")
    length = first.shape[1] if first.dim() == 2 else 0
    long = length > _TABLES
    tape = record(model, given, reduce=("entropy", "sink_mass") if long else "full", count=1)
    sinks, entropies = sink_map(tape), entropy_map(tape)
    weights = None if long else tape.stack("weights")[:, 0]
    count = length if weights is None else weights.shape[-1]
    causal = weights is not None and bool((weights[0].triu(1) == 0).all())
    of_heads = None
    if (
        kinds
        and causal
        and "input_ids" in given
        and getattr(model, "get_output_embeddings", lambda: None)() is not None
    ):
        of_heads = head_kinds(model)
    retrieval, told = _retrieval(model, needles, answer)
    names = _names(tokens, given.get("input_ids"), count)
    parameters = sum(p.numel() for p in model.parameters())
    grid = tape.meta.get("grid")
    if grid is not None and grid[0] * grid[1] + grid[2] != count:
        grid = None
    return Overview(type(model).__name__, parameters, names, sinks, entropies, of_heads, retrieval, told, weights, grid)


def _retrieval(model: Any, needles: Sequence[Case], answer: int) -> tuple[HeadScores | None, str]:
    """(the scores, what is to be said of them)."""
    if not getattr(model, "can_generate", lambda: False)():
        return None, f"{type(model).__name__} writes no text, so it has no retrieval heads"
    if not needles:
        return None, "no needles were given, so retrieval heads were not looked for"
    try:
        found = retrieval_scores(model, None, needles, tokens=answer)
    except NotRecalled:
        return None, "the model did not recall any needle, so no head can be scored"
    except Unsupported as error:
        return None, str(error)
    return found, f"{int(found.counted.sum())} of {len(needles)} needles were recalled"


def _names(tokens: Sequence[str] | None, ids: Tensor | None, count: int) -> tuple[str, ...]:
    if tokens is None:
        tokens = [str(i) for i in (range(count) if ids is None else ids[0].tolist())]
    if len(tokens) != count:
        raise OptionError(f"there are {len(tokens)} names for {count} tokens")
    return tuple(tokens)


def _rows(values: Tensor) -> list[list[float | None]]:
    return [[None if x != x else round(x, 4) for x in row] for row in values.tolist()]


def _packed(weights: Tensor | None) -> list[list[str]]:
    """Every head's table, a byte an entry, deflated, in base 64: [layer][head]."""
    if weights is None:
        return []
    bytes_ = (weights.float().clamp(0, 1).sqrt() * 255).round().to(torch.uint8).cpu().numpy()
    return [[base64.b64encode(zlib.compress(head.tobytes(), 1)).decode() for head in layer] for layer in bytes_]
