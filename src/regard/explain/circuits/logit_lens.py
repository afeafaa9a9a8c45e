"""The logit lens: what a model would say if it ended after each of its layers, and the parts that its stream is a sum of.

stage l: softmax(W_U norm(stream after layer l)),      stream = embed + sum over layers of (heads + biases + mlp)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.optional import need
from regard.hosts.contributions import head_outputs
from regard.hosts.lens import lens
from regard.hosts.tape import Tape

CARD = ExplanationCard(
    slug="logit_lens",
    title="The logit lens, and the parts of a stream",
    exports=("logit_lens", "LogitLens", "stream_parts", "StreamParts"),
    reads="llama",
    takes={"model": "model", "tape": "tape"},
    figure=True,
    baseline=True,
)


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What is read after each stage, "embed", "layer 0", …: top ids (S, B, N), the likeliest, their probability (S, B, N).

    target_probability, target_rank: (S, B, N) of the ids asked for, rank 0 the likeliest; None without any.
    """

    stages: tuple[str, ...]
    top: Tensor
    probability: Tensor
    target_probability: Tensor | None = None
    target_rank: Tensor | None = None

    def settled(self) -> Tensor:
        """int64 (B, N): the first stage from which the likeliest token stays the one that is said in the end."""
        same = (self.top == self.top[-1]).flip(0).long().cumprod(0)
        return len(self.stages) - same.sum(0)

    def figure(self, row: int = 0, *, tokenizer: Any = None) -> Any:
        """A plotly figure of a row: stages upwards, places across, what is said there. Raises MissingExtra, OptionError."""
        if not -self.top.shape[1] <= row < self.top.shape[1]:
            raise OptionError(f"row is {row}; there are {self.top.shape[1]}")
        go = need("plotly.graph_objects", "explain")
        ids = self.top[:, row].tolist()
        said = [[str(i) for i in line] if tokenizer is None else tokenizer.convert_ids_to_tokens(line) for line in ids]
        heat = go.Heatmap(
            z=self.probability[:, row].float().cpu().numpy(), y=list(self.stages), zmin=0, zmax=1, colorscale="Viridis",
            text=said, texttemplate="%{text}", hovertemplate="%{y}, place %{x}: %{text}, %{z:.3f}<extra></extra>",
        )  # fmt: skip
        return go.Figure(heat).update_layout(title="what would be said after each layer", xaxis_title="place")


@torch.no_grad()
def logit_lens(model: Any, tape: Tape, targets: Tensor | None = None) -> LogitLens:
    """Read every stage of the streams on a tape (nostalgebraist, 2020).

    tape: with embed and resid_post of all layers. targets: ids whose probability and rank are told, int64 (B,) or (B, N).
    Raises OptionError, ShapeError; Unsupported for a model without output embeddings or final norm.
    """
    _need(tape, "embed", "resid_post")
    streams = [tape["embed", 0], *(tape["resid_post", layer] for layer in range(tape.meta["layers"]))]
    batch, count = streams[0].shape[:2]
    wanted = None
    if targets is not None:
        wanted = targets[:, None].expand(-1, count) if targets.dim() == 1 else targets
        if wanted.shape != (batch, count):
            raise ShapeError(f"targets are {tuple(targets.shape)}; ids ({batch},) or ({batch}, {count}) are needed")
    top, probability, mine, ranks = [], [], [], []
    for stream in streams:
        p = lens(model, stream).float().softmax(-1)
        best = p.max(-1)
        top.append(best.indices)
        probability.append(best.values)
        if wanted is not None:
            own = p.gather(-1, wanted[..., None])
            mine.append(own[..., 0])
            ranks.append((p > own).sum(-1))
    stages = ("embed", *(f"layer {layer}" for layer in range(len(streams) - 1)))
    told = (torch.stack(mine), torch.stack(ranks)) if wanted is not None else (None, None)
    return LogitLens(stages, torch.stack(top), torch.stack(probability), *told)


@dataclass(frozen=True, eq=False)
class StreamParts:
    """What a stream is the sum of: values (P, B, N, C) of `names`: "embed", "0.head 1" or "0.attn", "0.biases", "0.mlp", …"""

    names: tuple[str, ...]
    values: Tensor

    def accumulated(self) -> Tensor:
        """The stream after each part, (P, B, N, C); the last is the whole."""
        return self.values.cumsum(0)

    def __getitem__(self, name: str) -> Tensor:
        """One part, (B, N, C). Raises OptionError."""
        if name not in self.names:
            raise OptionError(f"there is no part {name!r}; there are {', '.join(self.names)}")
        return self.values[self.names.index(name)]


@torch.no_grad()
def stream_parts(model: Any, tape: Tape, *, heads: bool = False) -> StreamParts:
    """Tell apart what joined the stream, in the order in which it did.

    tape: with embed, mlp_out, and attn_out, or with heads z. heads: every head, and the biases of the output projection, by
    themselves. The parts of a layer whose heads and feed-forward part read the same stream stand behind each other too.
    Raises OptionError, Unsupported.
    """
    _need(tape, "embed", "mlp_out", "z" if heads else "attn_out")
    names, values = ["embed"], [tape["embed", 0]]
    for layer in range(tape.meta["layers"]):
        if heads:
            parts = head_outputs(model, tape, layer)
            names += [f"{layer}.head {head}" for head in range(parts.heads.shape[2])]
            values += [*parts.heads.unbind(2), parts.rest]
            names.append(f"{layer}.biases")
        else:
            names.append(f"{layer}.attn")
            values.append(tape["attn_out", layer])
        names.append(f"{layer}.mlp")
        values.append(tape["mlp_out", layer])
    return StreamParts(tuple(names), torch.stack(values))


def _need(tape: Tape, *sites: str) -> None:
    count = tape.meta.get("layers", 0)
    missing = [s for s in sites if len(tape.layers(s)) != (1 if s == "embed" else count)]
    if missing:
        raise OptionError(f"the tape lacks {', '.join(missing)} of some layers: record with sites={sites}")
