"""What was seen at a model's sites during one or more passes: recorded by `record`, read by `explain`.

Weights can be kept whole, in rows or heads, or as sums, entropies and largest entries, which the engines read in tiles:
then nothing of N x N numbers is ever made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from regard.contract.attach import HIDDEN, AttentionCall, Seen, Step, open_session
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, Unsupported, near
from regard.engines.automatic import attend
from regard.engines.readout import Top, readout
from regard.hosts.calls import one_pattern

Reduce = Literal["full", "last_row", "column_sum", "entropy", "sink_mass", "top_k"]
# TransformerLens's names of the same places
_LENS_NAMES = {
    "embed": "hook_embed", "resid_pre": "blocks.{}.hook_resid_pre", "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post", "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out", "mlp_hidden": "blocks.{}.mlp.hook_post", "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k", "v": "blocks.{}.attn.hook_v", "scores": "blocks.{}.attn.hook_attn_scores",
    "weights": "blocks.{}.attn.hook_pattern", "z": "blocks.{}.attn.hook_z", "final": "ln_final.hook_normalized",
}  # fmt: skip
# and back: what its names say in short, as in `cache["pattern", 3]`
_LENS_KINDS = {name.rpartition("hook_")[2]: kind for kind, name in _LENS_NAMES.items()}
_OF_CALL = ("q", "k", "v", "scores", "weights", "z")
KINDS = (*_OF_CALL, *HIDDEN, "router", "logits")
# those of no layer
_ONCE = ("embed", "final", "logits")


@dataclass
class Tape:
    """Recorded values by kind, layer and step, and what is known of the model and its input.

    Shapes: q (B, H, N, D), k, v (B, G, M, D), scores and weights (B, H, N, M) or as `reduce` says, z (B, N, H, E), streams
    (B, N, C), mlp_hidden (B, N, F), router: logits, weights, experts of all tokens, logits (B, N, V). k and v are after
    positions and cache. step: 0 for the first pass, then 1, 2, …; of a module, how often it ran before. meta: ids,
    image_tokens (where ids are those of an image), padding, heads, key_heads, scale, layers, grid, reduce and count. output:
    what the model returned, where `record` ran it.
    """

    meta: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    _values: dict[tuple[str, int, int], Any] = field(default_factory=dict)

    def __getitem__(self, address: str | tuple[str, int] | tuple[str, int, int]) -> Any:
        """By kind and layer, and step if not the first; or by a name: "logits", of a module, or TransformerLens's."""
        if isinstance(address, tuple):
            kind, layer, *step = address
            return self.get(kind, layer, step=step[0] if step else 0)
        if address == "logits" and ("logits", 0, 0) not in self._values and hasattr(self.output, "logits"):
            return self.output.logits
        if "hook_" in address:
            return self.get(*self.place(address))
        if address in _ONCE:
            return self.get(address)
        if address in KINDS:
            raise OptionError(f"{address!r} stands in every layer: write tape[{address!r}, 3]")
        return self.module(address)

    def get(self, kind: str, layer: int = 0, *, head: int | None = None, step: int = 0) -> Any:
        """What was recorded of a kind at a layer (negative from the last) and step. Raises OptionError."""
        count = self.meta.get("layers", 0)
        place = (kind, layer + count if layer < 0 else layer, step)
        if place not in self._values and kind in _LENS_KINDS:
            kind = _LENS_KINDS[kind]
            place = (kind, *place[1:])
        if place not in self._values:
            there = sorted({k for k, _, _ in self._values})
            raise OptionError(
                f"nothing of {kind!r} at layer {layer}, step {step}, is on the tape{near(kind, there)}; it holds "
                f"{', '.join(there) or 'nothing'}, layers {sorted({la for _, la, _ in self._values})}, steps 0 to "
                f"{max((s for _, _, s in self._values), default=0)}"
            )
        value = self._values[place]
        if head is None:
            return value
        if kind not in _OF_CALL:
            raise OptionError(f"{kind!r} has no heads")
        return value.select(2 if kind == "z" else 1, head)

    def __contains__(self, address: tuple[str, int]) -> bool:
        return (*address, 0) in self._values

    def module(self, name: str, *, step: int = 0) -> Any:
        """What a module gave out, by its name in the model: one of `modules=`, or one whose output is a site on the tape."""
        place = self.meta.get("places", {}).get(name)
        for kind, layer in ((name, 0), *(() if place is None else (place,))):
            if (kind, layer, step) in self._values:
                return self._values[kind, layer, step]
        raise OptionError(
            f"nothing of a module {name!r}, step {step}, is on the tape: record with modules=({name!r},)"
            + ("" if place is None else f", or sites=({place[0]!r},)")
        )

    def layers(self, kind: str, step: int = 0) -> list[int]:
        """The layers of which a kind was recorded."""
        return sorted(layer for k, layer, s in self._values if (k, s) == (kind, step))

    def steps(self) -> int:
        """How many passes were recorded."""
        passes = [step for kind, _, step in self._values if kind.partition(":")[0] in KINDS]
        return 1 + max(passes or [step for _, _, step in self._values], default=-1)

    def stack(self, kind: str, *, step: int = 0) -> Tensor:
        """All layers of a kind, (L, …)."""
        return torch.stack([self._values[kind, layer, step] for layer in self.layers(kind, step)])

    def attentions(self, step: int = 0) -> tuple[Tensor, ...]:
        """The weights (B, H, N, M) of all layers, as `output_attentions` gives them and bertviz takes them."""
        return tuple(self._values["weights", layer, step] for layer in self.layers("weights", step))

    def grad(self, kind: str, layer: int, *, step: int = 0) -> Tensor:
        """The gradient of what `backward` was called on. Raises OptionError where there is none."""
        value = self.get(kind, layer, step=step)
        if value.grad is None:
            raise OptionError(
                f"there is no gradient of {kind!r}: record with grads=True and without heads=, rows= and reduce=, then call "
                "tape.backward"
            )
        return value.grad

    def backward(self, target: Callable[[Any], Tensor]) -> None:
        """Differentiate a number, `target(output)`, for everything on the tape."""
        target(self.output).backward()

    def items(self) -> Iterator[tuple[tuple[str, int, int], Any]]:
        """((kind, layer, step), value) of everything."""
        yield from self._values.items()

    @staticmethod
    def name(kind: str, layer: int = 0, *, of: Literal["transformer_lens"] = "transformer_lens") -> str:
        """What another tool calls the same place; its q and k are before rotation, as ours are with rotated=False."""
        if kind not in _LENS_NAMES:
            raise OptionError(f"{of} has no name for {kind!r}{near(kind, _LENS_NAMES)}")
        return _LENS_NAMES[kind].format(layer)

    @staticmethod
    def place(name: str) -> tuple[str, int]:
        """The kind and layer of what TransformerLens calls so. Raises OptionError for a name that has none."""
        layer = re.search(r"(?<=^blocks\.)\d+", name)
        at = 0 if layer is None else int(layer[0])
        for kind, theirs in _LENS_NAMES.items():
            if theirs.format(at) == name:
                return kind, at
        raise OptionError(f"no kind is called {name!r}{near(name, [x.format(at) for x in _LENS_NAMES.values()])}")

    def _know(self, ids: Tensor | None) -> None:
        """Note the ids of the first pass, and which of them stand for parts of an image."""
        if ids is not None and self.meta.get("ids") is None:
            self.meta["ids"] = ids
            if self.meta.get("image_token") is not None:
                self.meta["image_tokens"] = ids == self.meta["image_token"]


def record(model: Any, inputs: Mapping[str, Any] | Tensor, **options: Any) -> Tape:
    """Run a model once and return the tape; the options are those of `recording`.

    inputs: the model's keywords, or its input ids.
    """
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    with recording(model, **options) as tape, torch.set_grad_enabled(bool(options.get("grads"))):
        tape.output = model(**given)
    tape._know(given.get("input_ids"))
    return tape


@contextmanager
def recording(
    model: Any,
    *,
    sites: Sequence[str] = ("weights",),
    modules: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    reduce: Reduce | Callable[[Tensor], Tensor] | Sequence[Reduce | Callable[[Tensor], Tensor]] = "full",
    count: int = 8,
    grads: bool = False,
    steps: bool = True,
    rotated: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    limit_bytes: int = 2 << 30,
) -> Iterator[Tape]:
    """Record what every pass inside the block makes at some sites; the model's output stays the same.

    sites: of `KINDS`. modules: names of modules whose output (of several the first) is kept besides, as `named_modules` says
    them. layers, heads: of which, None for all. rows: query rows of weights, scores, q and z (negative from the end).
    reduce: what is kept of weights: "full" (B, H, N, M), "last_row" (B, H, 1, M), "column_sum" (B, H, M), "entropy" and
    "sink_mass" on the first `count` keys (B, H, N), "top_k" the `count` largest, or a function of the whole of a layer; with
    several, the kinds on the tape are called "weights:entropy" and so on. grads: keep the graph, so that `tape.backward` and
    `tape.grad` work. steps: record every pass, or only the first. rotated: q and k as they meet, or as they were before
    the layer turned them by their places. device, dtype: where and as what floats are kept.
    limit_bytes: more than this is refused. Raises OptionError for unknown sites and modules; Unsupported for sites that the
    model lacks, and beyond the limit.
    """
    for site in sites:
        if site not in KINDS:
            raise OptionError(f"{site!r} is not recorded{near(site, KINDS)}; what is: {', '.join(KINDS)}")
    reduces = (reduce,) if isinstance(reduce, str) or callable(reduce) else tuple(reduce)
    for kind in reduces:
        if not callable(kind) and kind not in get_args(Reduce):
            raise OptionError(f"weights are not kept as {kind!r}{near(kind, get_args(Reduce))}")
    if rows is not None and set(reduces) != {"full"}:
        raise OptionError("rows= chooses rows of full weights; leave reduce out")
    if grads and (device is not None or dtype is not None):
        raise OptionError("gradients reach what the model goes on with; leave device= and dtype= out")
    if grads and not rotated:
        raise OptionError("gradients reach what the model goes on with; leave rotated=False out")
    tape = Tape()
    recorder = _Recorder(
        tape,
        tuple(sites),
        None if layers is None else tuple(layers),
        heads,
        rows,
        reduces,
        count,
        grads,
        steps,
        limit_bytes,
        (device, dtype),
    )
    recorder.needs_rotation = not rotated
    session = open_session(model, (recorder,))
    recorder.find(modules, session)
    with session:
        recorder.open(session)
        yield tape


class _Recorder:
    """The effect behind `recording`."""

    reads_only = True
    needs_rotation = False

    def __init__(
        self, tape: Tape, sites: tuple[str, ...], layers: tuple[int, ...] | None, heads: Sequence[int] | None,
        rows: Sequence[int] | None, reduces: tuple[Reduce | Callable[[Tensor], Tensor], ...], count: int, grads: bool,
        steps: bool, limit: int, kept: tuple[torch.device | str | None, torch.dtype | None],
    ):  # fmt: skip
        self.tape, self.sites, self.layers, self.heads, self.rows = tape, sites, layers, heads, rows
        self.reduces, self.count, self.grads, self.steps, self.limit, self.held = reduces, count, grads, steps, limit, 0
        self.kept, self.modules, self.calls = kept, dict[str, nn.Module](), dict[str, int]()
        self.passes = -1
        self._last: Step | None = None
        needed = [s for s in sites if s not in HIDDEN]
        self.card = InterventionCard(
            slug="record", title="record", exports=("record",), baseline=True, sites=tuple(needed)
        )
        self.hidden_sites = tuple(s for s in sites if s in HIDDEN)
        if not set(sites) & set(_OF_CALL) - {"z"}:
            self.on_read = None  # type: ignore[assignment]
        if "router" not in sites:
            self.on_router = None  # type: ignore[assignment]
        if "logits" not in sites:
            self.on_output = None  # type: ignore[assignment]
        if not (grads and {"scores", "weights"} & set(sites)):
            self.on_weights = None  # type: ignore[assignment]
        if "z" not in sites:
            self.on_z = None  # type: ignore[assignment]

    def on_weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        """Nothing changes, but what is recorded is then what the model goes on with, and gradients reach it."""
        return weights

    def on_z(self, call: AttentionCall, z: Tensor) -> Tensor:
        if not call.main or not self._keeps(call.layer, call.step):
            return z
        turned = self._part(z, 2).transpose(1, 2)
        self._put("z", call.layer, self.passes, turned)
        # what is turned back again is what gradients reach
        return turned.transpose(1, 2) if self.grads and self.heads is None and self.rows is None else z

    def find(self, names: Sequence[str], session: Any) -> None:
        """Look the modules up, in what was given or in the model inside it."""
        there = {**dict(session.model.named_modules()), **dict(session.outer.named_modules())}
        for name in names:
            if name not in there:
                raise OptionError(f"{type(session.outer).__name__} has no module {name!r}{near(name, there)}")
            self.modules[name] = there[name]
        self.tape.meta["places"] = _places(there, session.anatomy.main)

    def open(self, session: Any) -> None:
        """Note what is known of the model, and resolve layers counted from the last."""
        main = session.anatomy.main
        self.tape.meta |= {"layers": len(main.layers), "reduce": self.reduces, "count": self.count}
        if self.layers is not None:
            self.layers = main.chosen(self.layers)
        self.tape.meta |= session.facts()
        count = self.tape.meta.get("heads")
        if self.heads is not None and isinstance(count, int):
            if any(not -count <= head < count for head in self.heads):
                raise OptionError(f"heads are 0 to {count - 1}, or -1 to -{count}, not {list(self.heads)}")
            self.heads = [head % count for head in self.heads]

    def on_read(self, call: AttentionCall, seen: Seen) -> None:
        if not call.main or not self._keeps(call.layer, call.step):
            return
        self.tape.meta.setdefault("scale", call.scale)
        for site in set(self.sites) & set(_OF_CALL) - {"z"}:
            if site == "weights":
                self._lse: Tensor | None = None
                # what entropies need gives the others the log-sum-exp
                for reduce in sorted(self.reduces, key=lambda reduce: reduce != "entropy"):
                    told = getattr(reduce, "__name__", str(reduce))
                    name = site if len(self.reduces) == 1 else f"{site}:{told}"
                    self._put(name, call.layer, self.passes, self._weights(call, seen.weights, reduce))
            elif site == "scores":
                scores = call.scores() if seen.scores is None else seen.scores
                self._put(site, call.layer, self.passes, self._part(scores, 2))
            else:
                value = getattr(call, site)
                if self.needs_rotation and site != "v":
                    value = call.unrotated()["qk".index(site)]
                self._put(site, call.layer, self.passes, self._part(value, 2) if site == "q" else value)

    def on_hidden(self, step: Step, site: str, layer: int, x: Tensor) -> Tensor:
        if self._keeps(layer, step) or (site == "final" and (self.steps or self.passes == 0)):
            self._put(site, 0 if site in _ONCE else layer, self.passes, x)
        return x

    def on_module(self, name: str, output: Any) -> None:
        call = self.calls[name] = self.calls.get(name, -1) + 1
        x = output[0] if isinstance(output, (tuple, list, Mapping)) and len(output) else output
        if not isinstance(x, Tensor):
            raise Unsupported(f"the module {name!r} gives a {type(x).__name__}; only tensors can be recorded")
        if self.steps or call == 0:
            self._put(name, 0, call, x)

    def on_router(self, step: Step, choice: Any) -> Any:
        if self._keeps(choice.layer, step):
            self._put("router", choice.layer, self.passes, (choice.logits, choice.weights, choice.experts))
        return choice

    def on_output(self, step: Step, output: Any) -> None:
        if self._pass(step) == 0 or self.steps:
            self._put("logits", 0, self.passes, output.logits)

    def _keeps(self, layer: int, step: Step) -> bool:
        first = self._pass(step) == 0
        return (self.layers is None or layer in self.layers) and (self.steps or first)

    def _pass(self, step: Step) -> int:
        """Which pass of the recording this is; several sequences follow each other."""
        if step is not self._last:
            self._last, self.passes = step, self.passes + 1
            self.tape._know(step.ids)
            self.tape.meta.setdefault("padding", step.padding)
        return self.passes

    def _rows(self, n: int) -> list[int] | None:
        """The rows that are kept of n, None for all; of a single one this one, as of a decoding step."""
        if self.rows is None or n == 1:
            return None if self.rows is None else [0]
        if any(not -n <= row < n for row in self.rows):
            raise OptionError(f"rows are 0 to {n - 1}, or -1 to -{n}, not {list(self.rows)}")
        return [row % n for row in self.rows]

    def _part(self, x: Tensor, axis: int) -> Tensor:
        if self.heads is not None:
            x = x[:, list(self.heads)]
        rows = self._rows(x.shape[axis])
        return x if rows is None else x.index_select(axis, torch.tensor(rows, device=x.device))

    def _weights(self, call: AttentionCall, weights: Tensor | None, reduce: Reduce | Callable[[Tensor], Tensor]) -> Any:
        n, m = call.q.shape[2], call.k.shape[2]
        rows = [n - 1] if reduce == "last_row" else self._rows(n)
        chosen = list(range(call.q.shape[1])) if self.heads is None else list(self.heads)
        if callable(reduce):
            return reduce((call.weights() if weights is None else weights)[:, chosen])
        if (
            weights is None
            and not self.grads
            and call.softcap is None
            and call.sinks is None
            and n > 1
            and not call.instead
        ):
            return self._read(call, reduce, rows)
        # one row, or weights that were changed, or that gradients go through: the table itself
        if reduce == "full" and rows is None:
            self._room(call.q.shape[0] * len(chosen) * n * m * call.q.element_size())
        whole = call.weights() if weights is None else weights
        if self.heads is not None:
            whole = whole[:, chosen]
        if rows is not None:
            return whole[:, :, rows]
        return whole if reduce == "full" else _reduced(whole, reduce, self.count)

    def _read(self, call: AttentionCall, reduce: Reduce, rows: list[int] | None) -> Any:
        pattern, offset = one_pattern(call)
        shared: dict[str, Any] = {"bias": call.bias, "scale": call.scale, "q_offset": offset}
        heads = None if self.heads is None else list(self.heads)
        if rows is not None:
            found = readout(call.q, call.k, None, pattern, what="rows", rows=rows, **shared)
            return found.to(call.q.dtype) if heads is None else found[:, heads].to(call.q.dtype)
        if reduce == "full":
            chosen = list(range(call.q.shape[1])) if heads is None else heads
            self._room(call.q.shape[0] * len(chosen) * call.q.shape[2] * call.k.shape[2] * 4)
            return readout(call.q, call.k, None, pattern, what="heads", heads=chosen, **shared).to(call.q.dtype)
        if reduce == "entropy" and call.bias is None:
            found = self._entropy(call, pattern, offset)
        else:
            what: Any = {"column_sum": "column_sums"}.get(reduce, reduce)
            found = readout(call.q, call.k, self._lse, pattern, what=what, count=self.count, **shared)
        if heads is None:
            return found
        return Top(found.weights[:, heads], found.keys[:, heads]) if isinstance(found, Top) else found[:, heads]

    def _entropy(self, call: AttentionCall, pattern: Any, offset: int) -> Tensor:
        """lse - sum_j w_ij s_ij, whose sum is scale q_i times the mean key: one pass with the keys as values."""
        mean = attend(call.q, call.k, call.k, pattern, scale=call.scale, q_offset=offset, return_lse=True)
        assert mean.lse is not None
        self._lse = mean.lse
        entropy = mean.lse - call.scale * (call.q.float() * mean.out.float()).sum(-1)
        return entropy.masked_fill(mean.lse == float("-inf"), 0.0).clamp(min=0)

    def _put(self, kind: str, layer: int, step: int, value: Any) -> None:
        if isinstance(value, Top):
            value = Top(self._held(value.weights), self._held(value.keys))
        else:
            value = tuple(map(self._held, value)) if isinstance(value, tuple) else self._held(value)
        self.tape._values[kind, layer, step] = value

    def _held(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not self.grads:
            device, dtype = self.kept
            x = x.detach().to(device=device, dtype=dtype if x.is_floating_point() else None)
        elif x.requires_grad:
            x.retain_grad()
        self._room(x.nbytes)
        self.held += x.nbytes
        return x

    def _room(self, needed: int) -> None:
        if self.held + needed > self.limit:
            raise Unsupported(
                f"the tape would hold more than {self.limit / 2**30:.1f} GiB: keep fewer layers=, heads= or rows=, or "
                'what is kept of weights by reduce="column_sum", "entropy", "top_k"; or raise limit_bytes='
            )


def _places(modules: Mapping[str, nn.Module], stack: Any) -> dict[str, tuple[str, int]]:
    """Which modules give out what stands at a site: name -> (kind, layer)."""
    sites = {} if stack.final is None else {stack.final: ("final", 0)}
    for layer in stack.layers:
        own = {layer.module: "resid_post", layer.attn_out: "attn_out", layer.mlp_out: "mlp_out"}
        sites |= {module: (kind, layer.index) for module, kind in own.items() if module is not None}
    return {name: sites[module] for name, module in modules.items() if module in sites}


def _reduced(weights: Tensor, reduce: Reduce, count: int) -> Any:
    """The same of a table of weights as the read-outs give."""
    weights = weights.float()
    if reduce == "column_sum":
        return weights.sum(2)
    if reduce == "entropy":
        return torch.special.entr(weights).sum(-1)
    if reduce == "sink_mass":
        return weights[..., :count].sum(-1)
    values, keys = weights.topk(min(count, weights.shape[-1]), -1)
    return Top(values, keys.masked_fill(values == 0, -1))
