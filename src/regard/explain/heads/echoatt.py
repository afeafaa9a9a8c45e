"""How alike the attention of a model's layers is, and which of them could share it.

S(l, m) = mean over texts and heads of the cosine of the attention matrices A_l and A_m
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.optional import need
from regard.hosts.tape import Tape
from regard.primitives.attention_stats import layer_similarity

CARD = ExplanationCard(
    slug="echoatt",
    title="Similarity of attention across layers",
    part_of="echoatt",
    paper="EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
    exports=("attention_similarity", "propose_blocks", "LayerSimilarity"),
    reads="llama",
    takes={"tape": "tape"},
    figure=True,
)


@dataclass(frozen=True, eq=False)
class LayerSimilarity:
    """values: (L, L), symmetric, 1 on the diagonal where a layer attends at all."""

    values: Tensor

    def figure(self) -> Any:
        """The table as a plotly figure. Raises MissingExtra without plotly."""
        graphs = need("plotly.graph_objects", "bench")
        figure = graphs.Figure(graphs.Heatmap(z=self.values.tolist(), zmin=0, zmax=1))
        return figure.update_layout(title="Cosine of attention", xaxis_title="layer", yaxis_title="layer")


def attention_similarity(tape: Tape, *, step: int = 0) -> LayerSimilarity:
    """The similarity of all layers of a tape that holds full weights; pads count as nothing (section 2).

    Raises OptionError for a tape without full weights of layers 0, 1, 2, …; ShapeError for layers of different shapes.
    """
    layers = tape.layers("weights", step)
    if len(layers) < 2 or layers != list(range(len(layers))):
        raise OptionError(f'the tape holds full weights of layers {layers}: record all of them, with reduce="full"')
    shapes = {tuple(weights.shape) for weights in tape.attentions(step)}
    if len(shapes) > 1:
        raise ShapeError(f"layers of different heads or lengths cannot be compared: {sorted(shapes)}")
    weights, padding = tape.stack("weights", step=step), tape.meta.get("padding")
    return LayerSimilarity(layer_similarity(weights, None if padding is None else padding[:, : weights.shape[-1]]))


def propose_blocks(similarity: LayerSimilarity, k: int, *, head: int = 1, tail: int = 1) -> list[tuple[int, ...]]:
    """The layers between the first `head` and the last `tail`, cut into as few blocks of at most k as can be.

    Of all such cuts the one whose followers are most like their leaders. Raises OptionError.
    """
    layers = len(similarity.values)
    if k < 1 or head < 0 or tail < 0 or layers - head - tail < 1:
        raise OptionError(
            f"k is at least 1 and layers lie between head and tail; of {layers} given {k}, {head}, {tail}"
        )
    table, inner = similarity.values.tolist(), layers - head - tail
    # best[count][length]: (sum of followers' similarity, block sizes) of the first `length` inner layers in `count` blocks
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(-(-inner // k)):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for length, (worth, sizes) in best.items():
            leader = head + length
            for size in range(1, min(k, inner - length) + 1):
                gained = worth + sum(table[leader][leader + i] for i in range(1, size))
                if length + size not in longer or gained > longer[length + size][0]:
                    longer[length + size] = gained, (*sizes, size)
        best = longer
    sizes = best[inner][1]
    return [tuple(range(head + end - size, head + end)) for end, size in zip(accumulate(sizes), sizes, strict=True)]
