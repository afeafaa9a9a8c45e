"""Path patching: what a head sends to chosen receivers, and to nobody else; and how much two circuits share.

    run C   clean tokens, all heads' z kept as on clean tokens but the sender's, which is that on corrupted ones
    run D   clean tokens, the receivers' values kept as in C
    effect  (metric_D - metric_clean) / (metric_corrupt - metric_clean):   0 nothing, 1 all of the difference

Departs from the released code: heads are frozen everywhere, not at the patched place alone, so that what runs through heads
at later places is no direct path (the same where receivers are read at that place); senders reach up to the highest
receiver (there, the lowest one); many senders share a forward pass; norms are not folded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from regard.contract.attach import open_session
from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError, near
from regard.contract.optional import need
from regard.explain.heads.maps import HeadMap
from regard.hosts.patch import Edit, patch
from regard.hosts.tape import Tape, record, recording

CARD = ExplanationCard(
    slug="circuit_reuse",
    title="Path patching and reuse of circuits",
    paper="Circuit Component Reuse Across Tasks in Transformer Language Models",
    exports=(
        "path_patching",
        "joint_effect",
        "activation_patching",
        "PatchEffects",
        "logit_diff",
        "circuit_overlap",
        "CircuitOverlap",
    ),
    reads="llama",
    takes={"model": "model", "clean": "ids", "corrupt": "other ids", "metric": "metric"},
    figure=True,
    builds_on=("maps",),
)

Head: TypeAlias = tuple[int, int]
# ("logits",), (layer, head, "q" | "k" | "v"), or (stream, layer)
Receiver: TypeAlias = tuple[Any, ...]
Metric: TypeAlias = Callable[[Tensor], Any]
Inputs: TypeAlias = Mapping[str, Any] | Tensor
Places: TypeAlias = int | Sequence[int] | Tensor | None
Stream = Literal["resid_pre", "attn_out", "resid_mid", "mlp_hidden", "mlp_out", "resid_post"]
# a sender: heads, and _EMBED for the embeddings
_Node: TypeAlias = tuple[int, int]
_EMBED: _Node = (-1, 0)


@dataclass(frozen=True, eq=False)
class PatchEffects:
    """Effects of patching: values (L, H) of heads, or (L, N) of places of a stream, 0 where nothing can be sent.

    across: what the columns are. clean, corrupt: the metric of both runs. title: what was patched into what.
    """

    values: Tensor
    across: Literal["head", "position"]
    clean: float
    corrupt: float
    title: str = ""

    def top(self, count: int) -> list[tuple[int, int]]:
        """The (layer, column) of the largest effects of either sign, the largest first."""
        return self._sizes().top(count)

    def heads(self, threshold: float) -> list[tuple[int, int]]:
        """Those whose effect is at least `threshold`, of either sign, the largest first."""
        return self._sizes().above(threshold)

    def figure(self) -> Any:
        """A plotly figure: layers down, heads or positions across; effects of both signs. Raises MissingExtra."""
        figure = HeadMap(self.values, self.title, "effect").figure()
        most = float(self.values.abs().max())
        figure.update_traces(colorscale="RdBu", zmin=-most, zmax=most)
        figure.update_xaxes(title=self.across)
        return figure

    def _sizes(self) -> HeadMap:
        return HeadMap(self.values.abs(), self.title)


@dataclass(frozen=True, eq=False)
class CircuitOverlap:
    """Heads of two circuits: in both, in the first alone, in the second alone."""

    both: frozenset[Head]
    first: frozenset[Head]
    second: frozenset[Head]

    @property
    def share(self) -> float:
        """Heads in both over heads in either."""
        return len(self.both) / len(self.both | self.first | self.second)

    @property
    def precision(self) -> float:
        """Of the first circuit, taken as found, the share that the second, taken as known, has; 0 for an empty one."""
        return len(self.both) / max(len(self.both | self.first), 1)

    @property
    def recall(self) -> float:
        """Of the second circuit, taken as known, the share that the first, taken as found, has; 0 for an empty one."""
        return len(self.both) / max(len(self.both | self.second), 1)

    def figure(self) -> Any:
        """A plotly figure: layers down, heads across, coloured by circuit. Raises MissingExtra."""
        go = need("plotly.graph_objects", "explain")
        figure = go.Figure()
        for name, heads in (("both", self.both), ("first", self.first), ("second", self.second)):
            layers, columns = [layer for layer, _ in sorted(heads)], [head for _, head in sorted(heads)]
            figure.add_trace(go.Scatter(x=columns, y=layers, mode="markers", marker={"size": 14}, name=name))
        figure.update_layout(title=f"{self.share:.0%} of the heads are in both", xaxis={"title": "head", "dtick": 1})
        figure.update_yaxes(title="layer", autorange="reversed", dtick=1)
        return figure


def logit_diff(logits: Tensor, correct: Tensor, wrong: Tensor) -> Tensor:
    """logit(correct) - mean logit(wrong), (B,), at the last position: a metric, once `correct` and `wrong` are given.

    logits (B, N, V) or (B, V). correct: int64 (B,). wrong: int64 (B,) or (B, K). Raises ShapeError.
    """
    logits = logits[:, -1] if logits.dim() == 3 else logits
    wrong = wrong.unsqueeze(1) if wrong.dim() == 1 else wrong
    if len(correct) != len(logits) or len(wrong) != len(logits):
        raise ShapeError(f"{len(correct)} correct and {len(wrong)} wrong answers came for {len(logits)} rows")
    return logits.gather(1, correct.unsqueeze(1))[:, 0] - logits.gather(1, wrong).mean(1)


def path_patching(
    model: Any,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    *,
    senders: Literal["all"] | Sequence[Head] = "all",
    receivers: Sequence[Receiver] = (("logits",),),
    position: Places = -1,
    freeze_mlps: bool = False,
    rows: int = 64,
) -> PatchEffects:
    """The effect of each sender on the metric by its path to the receivers alone: (L, H).

    clean, corrupt: the model's keywords or ids (B, N), of the same shape and padding. metric: logits (B, N, V) -> (B,), or a
    number. senders: heads (layer, head). receivers: ("logits",) alone; or (layer, head, "q" | "k" | "v"), where the query
    heads of a key head share its k and v; or a stream and its layer, ("mlp_out", 3). position: where senders are patched and
    receivers read: one, several, int64 (B,) or (B, P) for each row its own, None for everywhere. freeze_mlps: feed-forward
    parts say what they say on clean tokens. rows: at most so many in a forward pass. Where clean and corrupt are the same the
    effects are the changes of the metric. Raises OptionError, ShapeError; Unsupported where the model lacks a site.
    """
    runs = _Runs(model, clean, corrupt, metric, position, freeze_mlps, rows)
    targets = runs.receivers(receivers)
    reach = max(below for below, _ in targets)
    chosen = runs.heads(senders, reach)
    effects = runs.sent([(head,) for head in chosen], targets)
    values = torch.zeros(runs.layers, runs.count)
    for (layer, head), effect in zip(chosen, effects, strict=True):
        values[layer, head] = effect
    names = ", ".join(" ".join(map(str, receiver)) for receiver in receivers)
    return PatchEffects(values, "head", runs.clean, runs.corrupt, f"heads to {names}")


def joint_effect(
    model: Any,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    *,
    senders: Literal["all"] | Sequence[Head] = "all",
    embeddings: bool = False,
    receivers: Sequence[Receiver] = (("logits",),),
    position: Places = -1,
    freeze_mlps: bool = False,
) -> float:
    """As `path_patching`, of all senders at once. embeddings: they are senders too."""
    runs = _Runs(model, clean, corrupt, metric, position, freeze_mlps, 1)
    targets = runs.receivers(receivers)
    group = tuple(runs.heads(senders, max(below for below, _ in targets)))
    return runs.sent([(*group, _EMBED) if embeddings else group], targets)[0]


def activation_patching(
    model: Any,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    *,
    site: Literal["z"] | Stream = "z",
    position: Places = None,
    rows: int = 64,
) -> PatchEffects:
    """The effect on the metric of one value taken from the corrupted run, whichever way it goes.

    site: "z", each head alone at `position`, (L, H); or a stream, each place alone, (L, N). The other settings are those of
    `path_patching`.
    """
    if site != "z" and site not in get_args(Stream):
        raise OptionError(f"{site!r} is not patched{near(site, ('z', *get_args(Stream)))}; z and streams are")
    if site != "z" and position is not None:
        raise OptionError("every place of a stream is patched: position= is for z alone")
    runs = _Runs(model, clean, corrupt, metric, position, False, rows, site)
    columns = runs.count if site == "z" else runs.tokens
    cells = [(layer, column) for layer in range(runs.layers) for column in range(columns)]
    values = torch.tensor(runs.patched(cells, site)).view(runs.layers, columns)
    return PatchEffects(values, "head" if site == "z" else "position", runs.clean, runs.corrupt, f"{site} patched")


def circuit_overlap(
    first: PatchEffects | Iterable[Head], second: PatchEffects | Iterable[Head], threshold: float | None = None
) -> CircuitOverlap:
    """What two circuits share: heads whose effect is at least `threshold` (of either sign), or given sets of heads.

    Raises OptionError.
    """
    sets = []
    for circuit in (first, second):
        if isinstance(circuit, PatchEffects):
            if threshold is None or threshold <= 0:
                raise OptionError(f"threshold is the least effect of a head in the circuit, above 0, not {threshold}")
            if circuit.across != "head":
                raise OptionError("these effects are of positions, not of heads: patch site='z'")
            circuit = circuit.heads(threshold)
        sets.append(frozenset((int(layer), int(head)) for layer, head in circuit))
    if not sets[0] | sets[1]:
        raise OptionError("neither circuit has a head: lower the threshold")
    return CircuitOverlap(sets[0] & sets[1], sets[0] - sets[1], sets[1] - sets[0])


class _Runs:
    """The clean and the corrupted run, and forward passes in between."""

    def __init__(
        self, model: Any, clean: Inputs, corrupt: Inputs, metric: Metric, position: Places, freeze_mlps: bool, rows: int,
        site: str = "z",
    ):  # fmt: skip
        if rows < 1:
            raise OptionError(f"rows is how many go into a forward pass, at least 1, not {rows}")
        self.model, self.metric, self.freeze_mlps = model, metric, freeze_mlps
        self.given, other = _keywords(clean), _keywords(corrupt)
        _check_pair(self.given, other)
        ids = self.given.get("decoder_input_ids", self.given["input_ids"])
        self.batch, self.tokens = ids.shape
        self.at_once = max(1, rows // self.batch)
        sites = tuple(dict.fromkeys((site, "embed", *(("mlp_out",) if freeze_mlps else ()))))
        self.of_clean, self.of_corrupt = (record(model, x, sites=sites) for x in (self.given, other))
        self.places = _places(position, self.batch, self.tokens, ids.device)
        stack = open_session(model, ())
        self.layers, self.count = len(stack.anatomy.main.layers), stack.facts()["heads"]
        self.key_heads = stack.facts()["key_heads"]
        self.clean, self.corrupt = (self.score(t.output.logits) for t in (self.of_clean, self.of_corrupt))
        self.whole = self.corrupt - self.clean
        if _equal(self.given, other):
            self.whole = 1.0
        elif abs(self.whole) <= 1e-6 * max(abs(self.clean), abs(self.corrupt)):
            raise OptionError(
                f"clean and corrupted runs have the same metric, {self.clean:.4g}: there is no difference to explain"
            )

    def score(self, logits: Tensor) -> float:
        value = torch.as_tensor(self.metric(logits), dtype=torch.float64)
        if value.shape not in ((), (self.batch,)):
            raise ShapeError(
                f"the metric gave {tuple(value.shape)}; it must give a number, or one a row, ({self.batch},)"
            )
        if not bool(value.isfinite().all()):
            raise OptionError("the metric is not finite")
        return float(value.mean())

    def receivers(self, given: Sequence[Receiver]) -> list[tuple[int, Receiver]]:
        """Each receiver with layers counted from the first, and how many layers of heads lie below it."""
        found = [self._receiver(receiver) for receiver in given]
        if not found:
            raise OptionError('no receiver was given; the logits are ("logits",)')
        if len(found) > 1 and any(receiver == ("logits",) for _, receiver in found):
            raise OptionError("all that others receive reaches the logits too: give logits alone, or leave them out")
        return found

    def _receiver(self, receiver: Receiver) -> tuple[int, Receiver]:
        kind = receiver[0] if isinstance(receiver, tuple) and receiver else None
        if receiver == ("logits",):
            return self.layers, receiver
        if kind in get_args(Stream) and len(receiver) == 2:
            layer = self._layer(receiver[1])
            return layer + (kind != "resid_pre"), (kind, layer)
        if len(receiver) == 3 and receiver[2] in ("q", "k", "v"):
            layer, head = self._head(receiver[:2])
            if layer == 0:
                raise OptionError(f"{receiver} reads the embeddings alone: no head sends to layer 0")
            return layer, (layer, head, receiver[2])
        raise OptionError(
            f'{receiver!r} receives nothing; write ("logits",), (layer, head, "q"), "k" or "v", or a stream and its layer '
            f"({', '.join(get_args(Stream))})"
        )

    def heads(self, senders: Literal["all"] | Sequence[Head], reach: int) -> list[Head]:
        """The senders, checked to lie below a receiver."""
        if isinstance(senders, str):
            if senders != "all":
                raise OptionError(f'senders are "all" or heads (layer, head), not {senders!r}')
            return [(layer, head) for layer in range(reach) for head in range(self.count)]
        found = [self._head(sender) for sender in senders]
        above = [head for head in found if head[0] >= reach]
        if above:
            raise OptionError(f"{above} lie above every receiver: what they say comes too late to be received")
        return found

    def sent(self, groups: Sequence[tuple[_Node, ...]], targets: list[tuple[int, Receiver]]) -> list[float]:
        """The effect of each group of senders on the receivers."""
        found: list[float] = []
        receivers = [receiver for _, receiver in targets]
        for start in range(0, len(groups), self.at_once):
            some = groups[start : start + self.at_once]
            kinds = {r[2] if len(r) == 3 else r[0] for r in receivers}
            layers = sorted({r[0] if len(r) == 3 else r[1] for r in receivers if r != ("logits",)})
            edits = self._as_sent(some, targets)
            if "logits" in kinds:
                found += self._measured(edits, len(some))
                continue
            with patch(self.model, edits), recording(self.model, sites=tuple(kinds), layers=layers) as tape:
                self._forward(len(some))
            found += self._measured(self._as_received(receivers, tape, len(some)), len(some))
        return found

    def patched(self, cells: Sequence[tuple[int, int]], site: str) -> list[float]:
        """The effect of each cell (layer, head) or (layer, place) taken from the corrupted run."""
        found: list[float] = []
        for start in range(0, len(cells), self.at_once):
            some = cells[start : start + self.at_once]
            edits = [Edit(site, layer, fn=self._one_cell(site, layer, some)) for layer in {la for la, _ in some}]
            found += self._measured(edits, len(some))
        return found

    def _as_sent(self, groups: Sequence[tuple[_Node, ...]], targets: list[tuple[int, Receiver]]) -> list[Edit]:
        """Heads frozen but for those of each group; the groups lie behind each other along the batch."""
        layers, receivers = max(below for below, _ in targets), [receiver for _, receiver in targets]
        edits = [Edit("z", layer, value=self._mixed(layer, groups)) for layer in range(layers)]
        if any(_EMBED in group for group in groups):
            edits.append(Edit("embed", 0, value=self._mixed(_EMBED[0], groups)))
        if self.freeze_mlps:
            kept = [layer for layer in range(layers) if ("mlp_out", layer) not in receivers]
            edits += [
                Edit("mlp_out", layer, value=self.of_clean["mlp_out", layer].repeat(len(groups), 1, 1))
                for layer in kept
            ]
        return edits

    def _mixed(self, layer: int, groups: Sequence[tuple[_Node, ...]]) -> Tensor:
        """(S B, N, …): z of a layer or the embeddings, from the clean run but where a group sends from the corrupted."""
        site, at = ("embed", 0) if layer == _EMBED[0] else ("z", layer)
        clean, corrupt = self.of_clean[site, at], self.of_corrupt[site, at]
        mixed = clean.repeat(len(groups), *[1] * (clean.dim() - 1)).unflatten(0, (len(groups), -1))
        places = self.places.unsqueeze(-1)
        for row, group in enumerate(groups):
            for where, head in group:
                if where == layer and site == "z":
                    mixed[row, :, :, head] = torch.where(places, corrupt[:, :, head], clean[:, :, head])
                elif where == layer:
                    mixed[row] = torch.where(places, corrupt, clean)
        return mixed.flatten(0, 1)

    def _as_received(self, receivers: Sequence[Receiver], tape: Tape, count: int) -> list[Edit]:
        edits = []
        for receiver in receivers:
            if len(receiver) == 3:
                layer, head, site = receiver
                head = head if site == "q" else head // (self.count // self.key_heads)
                edits.append(Edit(site, layer, heads=(head,), fn=self._at_places(tape[site, layer], count)))
            else:
                site, layer = receiver
                edits.append(Edit(site, layer, fn=self._at_places(tape[site, layer], count)))
        return edits

    def _at_places(self, value: Tensor, count: int) -> Callable[[Tensor], Tensor]:
        places = self.places.repeat(count, 1)
        places = places[:, None, :, None] if value.dim() == 4 else places.unsqueeze(-1)
        return lambda x: torch.where(places, value, x)

    def _one_cell(self, site: str, layer: int, cells: Sequence[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
        corrupt = self.of_corrupt[site, layer]

        def change(x: Tensor) -> Tensor:
            new = x.clone().unflatten(0, (len(cells), -1))
            for row, (where, column) in enumerate(cells):
                if where != layer:
                    continue
                if site == "z":
                    kept = new[row, :, :, column]
                    new[row, :, :, column] = torch.where(self.places.unsqueeze(-1), corrupt[:, :, column], kept)
                else:
                    new[row, :, column] = corrupt[:, column]
            return new.flatten(0, 1)

        return change

    def _measured(self, edits: Sequence[Edit], count: int) -> list[float]:
        with patch(self.model, edits):
            logits = self._forward(count).logits
        return [(self.score(some) - self.clean) / self.whole for some in logits.split(self.batch)]

    def _forward(self, count: int) -> Any:
        """The clean tokens `count` times, behind each other along the batch."""
        with torch.no_grad():
            return self.model(**{name: self._repeated(x, count) for name, x in self.given.items()})

    def _repeated(self, x: Any, count: int) -> Any:
        of_rows = isinstance(x, Tensor) and x.dim() and len(x) == self.batch
        return x.repeat(count, *[1] * (x.dim() - 1)) if of_rows else x

    def _layer(self, layer: Any) -> int:
        if not isinstance(layer, int) or not -self.layers <= layer < self.layers:
            raise OptionError(f"layer {layer!r}: there are {self.layers} layers")
        return layer % self.layers

    def _head(self, head: Sequence[Any]) -> Head:
        if len(head) != 2 or not isinstance(head[1], int) or not 0 <= head[1] < self.count:
            raise OptionError(f"{tuple(head)} is no head: there are {self.layers} layers of {self.count} heads")
        return self._layer(head[0]), head[1]


def _keywords(inputs: Inputs) -> dict[str, Any]:
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    if "input_ids" not in given:
        raise OptionError(f"path patching compares tokens: input_ids is missing among {', '.join(given)}")
    return given


def _check_pair(clean: dict[str, Any], corrupt: dict[str, Any]) -> None:
    shapes = tuple(clean["input_ids"].shape), tuple(corrupt["input_ids"].shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise ShapeError(f"clean ids are {shapes[0]}, corrupted ones {shapes[1]}; both must be (B, N), token for token")
    mask, other = clean.get("attention_mask"), corrupt.get("attention_mask")
    if (mask is None) != (other is None) or (mask is not None and other is not None and not torch.equal(mask, other)):
        raise ShapeError("clean and corrupted prompts have different token lengths: their attention masks differ")


def _equal(clean: dict[str, Any], corrupt: dict[str, Any]) -> bool:
    names = ("input_ids", "decoder_input_ids")
    return all(torch.equal(clean[name], corrupt[name]) for name in names if name in clean)


def _places(position: Places, batch: int, tokens: int, device: torch.device) -> Tensor:
    """bool (B, N): where senders are patched and receivers read."""
    if position is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    at = torch.as_tensor(position, device=device)
    if not isinstance(position, Tensor):
        at = at.reshape(1, -1).expand(batch, -1)
    at = at.unsqueeze(1) if at.dim() == 1 else at
    if not at.numel() or bool(((at < -tokens) | (at >= tokens)).any()):
        raise OptionError(f"position is {at.tolist()}: the prompts have {tokens} tokens")
    if at.dtype.is_floating_point or at.shape[:-1] != (batch,):
        raise ShapeError(f"position is {tuple(at.shape)}; a tensor is int64 (B,) or (B, P), a row of the batch each")
    return torch.zeros(batch, tokens, dtype=torch.bool, device=device).scatter_(1, at % tokens, True)
