"""Checks of ops: functions of q, k, v."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from regard.checks.battery import CheckFailed, Subject, demand, demand_near, demand_refused, distance, verifies
from regard.checks.tolerances import CHANGE, GRADIENT, HALF, SAME, SLOPE
from regard.contract.dispatch import engine as engine_module
from regard.contract.dispatch import listen
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.shapes import parse
from regard.patterns import Bound, Causal, Documents, KeyValid

# option -> the word on the card that claims it
OPTIONS = {"pattern": "pattern", "mask": "mask", "bias": "bias", "scale": "scale", "dropout_p": "dropout"}
REFUSED = (Unsupported, OptionError)
# with decompositions, as for the code generators: without them torch 2.13 has the strides of the gradients of
# layer_norm and elu wrong
BACKEND = "aot_eager_decomp_partition"
# random draws over which a dependence is looked for: a sharpened row has keys of weight 0
DRAWS = 4


@dataclass(frozen=True)
class Case:
    """One way to call an op. causal: whether queries see no later keys. sizes: axes that differ from the example's."""

    what: str
    causal: bool
    sizes: dict[str, int]

    @property
    def options(self) -> dict[str, Any]:
        return {"is_causal": True} if self.causal else {}


def cases(card: Any) -> list[Case]:
    """The ways to call an op that its card claims: all keys, causal."""
    found = []
    if "self" in card.attends or "cross" in card.attends:
        cross = "cross" in card.attends
        found.append(Case("with all keys", False, {} if cross else {"m": card.sizes["n"]}))
    if "causal_self" in card.attends:
        found.append(Case("causal", True, {"m": card.sizes["n"]}))
    return found


def inputs(
    card: Any, sizes: dict[str, int], dtype: torch.dtype = torch.float64, *, grad: bool = False, spread: float = 1.0
) -> list[Tensor]:
    """Random tensors by the card's spec and example; drawn in float64, so that every dtype sees the same numbers.

    sizes: axes that differ from the example's. spread: standard deviation.
    """
    whole = {**card.sizes, **sizes}
    return [
        (torch.randn([whole[a] for a in axes], dtype=torch.float64) * spread).to(dtype).requires_grad_(grad)
        for _, axes in parse(card.spec).inputs
    ]


def names(card: Any) -> list[str]:
    """The names of the tensors, in the order of the card's spec."""
    return [name for name, _ in parse(card.spec).inputs]


def along(card: Any, axis: str) -> list[int | None]:
    """Where an axis letter stands in each tensor of the card's spec; None in tensors without it."""
    return [axes.index(axis) if axis in axes else None for _, axes in parse(card.spec).inputs]


def cut(card: Any, tensors: list[Tensor], axes: str, stop: int, start: int = 0) -> list[Tensor]:
    """The tensors, cut from `start` to `stop` along every axis letter of `axes` that they have."""
    for axis in axes:
        places = along(card, axis)
        tensors = [t if p is None else t.narrow(p, start, stop - start) for t, p in zip(tensors, places, strict=True)]
    return tensors


def call(subject: Subject, tensors: list[Tensor], **options: Any) -> Tensor:
    """The op with the options its card says it needs."""
    return subject.main(*tensors, **{**needed(subject.card, tensors[0].shape[1]), **options})


def needed(card: Any, heads: int) -> dict[str, Any]:
    """The options an op cannot do without; one with a value a head is cut to so many heads."""
    whole = card.sizes.get("h")
    return {k: v[:heads] if isinstance(v, tuple) and len(v) == whole else v for k, v in card.options.items()}


def gradients(out: Tensor, tensors: list[Tensor], *, keep: bool = False) -> list[Tensor]:
    """Gradients of a fixed random projection of the output; zeros where there is none."""
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    grads = torch.autograd.grad((out * weight).sum(), tensors, retain_graph=True, create_graph=keep, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)]


def hidden_keys(batch: int, m: int) -> Tensor:
    """A padding mask that differs from row to row and hides keys in the middle and at the end; key 0 is seen."""
    valid = torch.ones(batch, m, dtype=torch.bool)
    valid[:, m // 3] = False
    valid[0, -2:] = False
    return valid


def engine_names(card: Any) -> list[str]:
    """Every implementation of the engine families of the card."""
    return [i.name for family in card.engines for i in engine_module(family).IMPLEMENTATIONS]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN inside the block, so that what is never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def each_engine(subject: Subject, run: Callable[[str | None], Any]) -> Iterator[tuple[str, Any]]:
    """(name, result) of every implementation that can run a call, the automatic choice first."""
    yield "the automatic choice", run(None)
    for name in engine_names(subject.card):
        with listen() as verdicts:
            try:
                result = run(name)
            except Unsupported:
                continue
        chosen = [v.name for v in verdicts if v.chosen]
        demand(chosen and set(chosen) == {name}, f"engine={name!r} was asked for, but {chosen or 'no engine'} ran")
        yield name, result


@verifies("op")
def card_is_attached(subject: Subject) -> None:
    """The function carries the card of its file, exports what it names and says what it does."""
    demand(getattr(subject.main, "card", None) == subject.card, "the function's .card is not the CARD of its file")
    demand(callable(getattr(subject.main, "reference", None)), "the function has no .reference")
    for name, thing in subject.exports.items():
        demand((thing.__doc__ or "").strip(), f"{name} has no docstring")
    steps = [name for name in subject.card.exports if name.endswith("_step")]
    if subject.card.decode == "state":
        demand(steps, 'decode="state" is claimed, but no export ends with _step')
    else:
        demand(not steps, f'{", ".join(steps)} continues from a state, which only decode="state" claims')


@verifies("op")
def signature(subject: Subject) -> None:
    """Tensors first, options by keyword only, every shared option claimed or absent, no **kwargs."""
    parameters = inspect.signature(subject.main).parameters
    tensors = names(subject.card)
    demand(
        list(parameters)[: len(tensors)] == tensors, f"the first parameters are not the spec's: {', '.join(tensors)}"
    )
    for name, parameter in list(parameters.items())[len(tensors) :]:
        demand(parameter.kind is not parameter.VAR_KEYWORD, f"**{name} would swallow a misspelt option")
        demand(parameter.kind is parameter.KEYWORD_ONLY, f"the option {name} is not keyword-only")
    for option, word in OPTIONS.items():
        claimed = word in subject.card.accepts
        demand(
            (option in parameters) is claimed,
            f"the card says {'' if claimed else 'not '}accepts {word!r}, but {option} is "
            f"{'not ' if claimed else ''}a parameter",
        )
    wanted = ["engine"] + (["is_causal"] if "causal_self" in subject.card.attends else [])
    wanted += ["q_offset"] if subject.card.decode == "kv" else []
    for option in wanted:
        demand(option in parameters, f"there is no parameter {option}")


@verifies("op")
def axes(subject: Subject) -> None:
    """The output has the axes of the spec."""
    spec = parse(subject.card.spec)
    for case in cases(subject.card):
        sizes = {**subject.card.sizes, **case.sizes}
        wanted = tuple(sizes[a] for a in spec.outputs[0])
        out = call(subject, inputs(subject.card, case.sizes), **case.options)
        demand(tuple(out.shape) == wanted, f"{case.what}: the output is {tuple(out.shape)}, the spec says {wanted}")


@verifies("op")
def dtype_and_device(subject: Subject) -> None:
    """The output has the dtype and the device of the inputs."""
    for case in cases(subject.card):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            out = call(subject, inputs(subject.card, case.sizes, dtype), **case.options)
            demand(out.dtype is dtype, f"{case.what}: {dtype} came in, {out.dtype} came out")
            demand(out.device.type == "cpu", f"{case.what}: tensors on the CPU came out on {out.device}")


@verifies("op")
def inputs_unwritten(subject: Subject) -> None:
    """No input is written to."""
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes, torch.float32)
        before = [t.clone() for t in tensors]
        call(subject, tensors, **case.options)
        for (name, _), old, new in zip(parse(subject.card.spec).inputs, before, tensors, strict=True):
            demand(torch.equal(old, new), f"{case.what}: {name} was written to")


@verifies("op")
def deterministic(subject: Subject) -> None:
    """Two calls give the same bits, whatever the random numbers in between."""
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes, torch.float32)
        first = call(subject, tensors, **case.options)
        torch.manual_seed(1)
        demand(torch.equal(first, call(subject, tensors, **case.options)), f"{case.what}: two calls differ")


@verifies("op")
def strided(subject: Subject) -> None:
    """Transposed, sliced and expanded inputs give what contiguous ones give."""
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes)
        expected = call(subject, tensors, **case.options)
        layouts = {
            "transposed": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors],
            "sliced": [torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0] for t in tensors],
        }
        for what, views in layouts.items():
            out = call(subject, views, **case.options)
            demand_near(out, expected, SAME[torch.float64], f"{case.what}, {what} inputs")
        same = [t[:1].expand(t.shape) for t in tensors]
        expected = call(subject, [t.contiguous() for t in same], **case.options)
        out = call(subject, same, **case.options)
        demand_near(out, expected, SAME[torch.float64], f"{case.what}, expanded inputs")


@verifies("op")
def size_one(subject: Subject) -> None:
    """Every axis may have size 1, but places of a grid; a row of the batch, or a group of heads, is worked on alone."""
    whole = subject.card.sizes
    # the option shape= says how many places there are
    free = [axis for axis in whole if axis not in ("n", "m") or "shape" not in subject.card.options]
    for case in cases(subject.card):
        sizes = {**whole, **case.sizes}
        tensors = inputs(subject.card, case.sizes)
        out = call(subject, tensors, **case.options)
        alone = call(subject, [t[:1] for t in tensors], **case.options)
        demand_near(alone, out[:1], SAME[torch.float64], f"{case.what}, one row of the batch")
        per_group = sizes["h"] // sizes.get("g", sizes["h"])
        one_group = cut(subject.card, cut(subject.card, tensors, "h", per_group), "g", 1)
        alone = call(subject, one_group, **case.options)
        demand_near(alone, out[:, :per_group], SAME[torch.float64], f"{case.what}, one key head")
        # queries and keys shrink together where they are the same tokens
        together = ["n", "m"] if case.causal or "cross" not in subject.card.attends else []
        for axis in free:
            small = {**sizes, **dict.fromkeys(together if axis in together else [axis], 1)}
            if axis in ("h", "g"):
                small |= {"h": 1, "g": 1}
            out = call(subject, inputs(subject.card, small), **case.options)
            wanted = tuple(small[a] for a in parse(subject.card.spec).outputs[0])
            demand(tuple(out.shape) == wanted, f"{case.what}, {axis}=1: the output is {tuple(out.shape)}, not {wanted}")
            demand(out.isfinite().all(), f"{case.what}, {axis}=1: the output is not finite")


@verifies("op", lambda card: "g" in card.sizes and card.sizes["g"] < card.sizes["h"])
def grouped_heads(subject: Subject) -> None:
    """Query heads that share a key head get what they get from copies of it, in order."""
    repeats = subject.card.sizes["h"] // subject.card.sizes["g"]
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes)
        places = along(subject.card, "g")
        copied = [t if p is None else t.repeat_interleave(repeats, p) for t, p in zip(tensors, places, strict=True)]
        copies = call(subject, copied, **case.options)
        out = call(subject, tensors, **case.options)
        demand_near(out, copies, SAME[torch.float64], f"{case.what}, grouped heads, against copies of the key heads")


def reach(subject: Subject, n: int, m: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Which output depends on which query (n, n), on which key or value (n, m): largest gradients over some draws.

    A further tensor belongs to the queries or the keys by its axis n or m; one without belongs to neither.
    """
    queries, keys = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, m, dtype=torch.float64)
    tables = [
        (queries, of_query) if of_query is not None else (keys, of_key)
        for of_query, of_key in zip(along(subject.card, "n"), along(subject.card, "m"), strict=True)
    ]
    for _ in range(DRAWS):
        tensors = inputs(subject.card, {"n": n, "m": m}, grad=True)
        out = call(subject, tensors, **options)
        for i in range(n):
            grads = torch.autograd.grad(
                (out[:, :, i] * torch.randn_like(out[:, :, i])).sum(), tensors, retain_graph=True, allow_unused=True
            )
            for (table, place), grad in zip(tables, grads, strict=True):
                if grad is not None and place is not None:
                    others = [axis for axis in range(grad.dim()) if axis != place]
                    table[i] = torch.maximum(table[i], grad.abs().amax(others))
    demand(not (queries.isnan().any() or keys.isnan().any()), "a gradient is NaN")
    return queries, keys


@verifies("op", lambda card: "self" in card.attends)
def attends_self(subject: Subject) -> None:
    """By gradient: every output sees its own key, and keys on both sides."""
    n = subject.card.sizes["n"]
    _, keys = reach(subject, n, n)
    demand((keys.diagonal() > 0).all(), "an output does not see its own key")
    demand((keys.triu(1).sum(1)[:-1] > 0).all(), "an output sees no later key, but the card claims more than causal")
    demand((keys.tril(-1).sum(1)[1:] > 0).all(), "an output sees no earlier key")


@verifies("op", lambda card: "causal_self" in card.attends)
def attends_causal_self(subject: Subject) -> None:
    """By gradient: every output sees its own key and earlier ones, and nothing later, also through queries."""
    n = subject.card.sizes["n"]
    queries, keys = reach(subject, n, n, is_causal=True)
    demand((keys.triu(1) == 0).all(), f"an output sees a later key: {worst(keys.triu(1))}")
    demand((queries.triu(1) == 0).all(), f"an output depends on a later query: {worst(queries.triu(1))}")
    demand((keys.diagonal() > 0).all(), "an output does not see its own key")
    demand((keys.tril(-1).sum(1)[1:] > 0).all(), "an output sees no earlier key")


@verifies("op", lambda card: "cross" in card.attends)
def attends_cross(subject: Subject) -> None:
    """By gradient: every output sees every key of another sequence, of any length."""
    for n, m in ((subject.card.sizes["n"], subject.card.sizes["m"]), (subject.card.sizes["m"], 3)):
        _, keys = reach(subject, n, m)
        demand((keys > 0).all(), f"with {n} queries and {m} keys, an output does not see some key: {worst(-keys)}")


@verifies("op", lambda card: "causal_cross" in card.attends)
def attends_causal_cross(subject: Subject) -> None:
    """By gradient: every output sees all keys of another sequence, but no later query."""
    n, m = subject.card.sizes["n"], subject.card.sizes["m"]
    queries, keys = reach(subject, n, m)
    demand((queries.triu(1) == 0).all(), f"an output depends on a later query: {worst(queries.triu(1))}")
    demand((keys > 0).all(), f"an output does not see some key: {worst(-keys)}")


def worst(table: Tensor) -> str:
    i, j = divmod(int(table.argmax()), table.shape[1])
    return f"position {i} and position {j}"


@verifies("op", lambda card: not {"self", "causal_self", "cross"} <= set(card.attends))
def refuses_other_attends(subject: Subject) -> None:
    """The ways to attend that the card does not claim are refused."""
    n, claimed = subject.card.sizes["n"], subject.card.attends
    tries = []
    if "causal_self" not in claimed:
        tries.append(("a causal call", n, {"is_causal": True}))
    if "self" not in claimed and "cross" not in claimed:
        tries.append(("a call with all keys", n, {}))
    if "cross" not in claimed:
        tries.append(("a call with more keys than queries", n + 3, {}))
    for what, m, options in tries:
        tensors = inputs(subject.card, {"n": n, "m": m})
        demand_refused(REFUSED, what, call, subject, tensors, **options)


@verifies("op", lambda card: card.padding)
def padding(subject: Subject) -> None:
    """Keys hidden by KeyValid change nothing, on every engine; hiding the end equals cutting it off."""
    card = subject.card
    for case in cases(card):
        tensors = inputs(card, case.sizes)
        batch, m = tensors[1].shape[0], tensors[1].shape[2]
        valid = hidden_keys(batch, m)
        pattern = _with(case.causal, KeyValid().bind(key_valid=valid))
        noisy = [
            t if place is None else t + torch.randn_like(t) * 30 * ~valid.view(batch, 1, m, *[1] * (t.dim() - 3))
            for t, place in zip(tensors, along(card, "m"), strict=True)
        ]
        run = lambda e: call(subject, tensors, pattern=pattern, engine=e)  # noqa: B023, E731
        for name, out in each_engine(subject, run):
            again = call(subject, noisy, pattern=pattern, engine=None if "choice" in name else name)
            demand_near(again, out, SAME[torch.float64], f"{case.what}, {name}: other values at hidden keys")
        kept = m - 3
        pattern = _with(case.causal, KeyValid().bind(key_valid=torch.arange(m).expand(batch, m) < kept))
        same = case.causal or "cross" not in card.attends
        rows = slice(kept) if same else slice(None)
        expected = call(subject, cut(card, tensors, "mn" if same else "m", kept), **case.options)
        out = call(subject, tensors, pattern=pattern)[:, :, rows]
        demand_near(out, expected, SAME[torch.float64], f"{case.what}: hiding the last keys, against cutting them off")


@verifies("op", lambda card: "pattern" in card.accepts and not (card.padding and card.documents))
def refuses_other_patterns(subject: Subject) -> None:
    """KeyValid and Documents are refused where the card does not claim them."""
    card = subject.card
    for case in cases(card):
        tensors = inputs(card, case.sizes)
        batch, m = tensors[1].shape[0], tensors[1].shape[2]
        unclaimed: dict[str, Bound] = {}
        if not card.padding:
            unclaimed["KeyValid"] = KeyValid().bind(key_valid=hidden_keys(batch, m))
        if not card.documents and m == tensors[0].shape[2]:
            unclaimed["Documents"] = Documents().bind(doc=torch.arange(m).expand(batch, m) // 4)
        for name, pattern in unclaimed.items():
            what = f"{case.what}, {name}"
            demand_refused(REFUSED, what, call, subject, tensors, pattern=_with(case.causal, pattern))


@verifies("op", lambda card: card.documents)
def documents(subject: Subject) -> None:
    """Documents in one sequence equal separate calls, on every engine."""
    card = subject.card
    causal = "causal_self" in card.attends
    n = card.sizes["n"]
    tensors = inputs(card, {"n": n, "m": n})
    # documents of different lengths in every row, one of a single token
    starts = [(0, 1, n // 2), (0, n // 3, n - 2)]
    doc = torch.zeros(tensors[0].shape[0], n, dtype=torch.long)
    for row in range(len(doc)):
        for start in starts[row % 2][1:]:
            doc[row, start:] += 1
    pattern = _with(causal, Documents().bind(doc=doc))
    for name, out in each_engine(subject, lambda e: call(subject, tensors, pattern=pattern, engine=e)):
        for row in range(len(doc)):
            for start, stop in zip(starts[row % 2], (*starts[row % 2][1:], n), strict=True):
                given = [t[row : row + 1] for t in cut(card, tensors, "nm", stop, start)]
                alone = call(subject, given, **({"is_causal": True} if causal else {}))
                what = f"{name}: the document of positions {start} to {stop - 1}"
                demand_near(out[row : row + 1, :, start:stop], alone, SAME[torch.float64], what)


def _with(causal: bool, pattern: Bound) -> Bound:
    return Causal() & pattern if causal else pattern


def _table(tensors: list[Tensor]) -> Tensor:
    """A mask that hides a few pairs, never all of a row."""
    n, m = tensors[0].shape[2], tensors[1].shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(m)[None]
    return ((i + 2 * j) % 3 != 1) | (j == i.clamp(max=m - 1))


@verifies("op", lambda card: "mask" in card.accepts)
def mask_matters(subject: Subject) -> None:
    """A pair hidden by a mask does not meet, every other one does; a mask of the wrong dtype or shape is refused."""
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes, grad=True)
        mask = _table(tensors)
        out = call(subject, tensors, mask=mask, **case.options)
        free = call(subject, tensors, **case.options)
        demand(distance(out, free) > CHANGE, f"{case.what}: the mask changes nothing")
        n, m = mask.shape
        for row in (0, n // 2, n - 1):
            grads = torch.autograd.grad(out[:, :, row].square().sum(), tensors, retain_graph=True)
            places = along(subject.card, "m")
            hidden = [g.movedim(p, 0)[~mask[row]] for g, p in zip(grads, places, strict=True) if p is not None]
            demand(all((g == 0).all() for g in hidden), f"{case.what}: query {row} sees a key that the mask hides")
        demand_refused(ShapeError, "a float mask", call, subject, tensors, mask=mask.double())
        wrong = mask.new_ones(n + 1, m + 1)
        demand_refused(ShapeError, "a mask that is too large", call, subject, tensors, mask=wrong)


@verifies("op", lambda card: "bias" in card.accepts)
def bias_matters(subject: Subject) -> None:
    """A bias is added to the scores with gradient, -inf hides a key, NaN and integers are refused."""
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes, grad=True)
        n, m = tensors[0].shape[2], tensors[1].shape[2]
        bias = torch.randn(1, tensors[0].shape[1], n, m, dtype=torch.float64, requires_grad=True)
        out = call(subject, tensors, bias=bias, **case.options)
        demand(distance(out, call(subject, tensors, **case.options)) > CHANGE, f"{case.what}: the bias changes nothing")
        (grad,) = torch.autograd.grad(out.square().sum(), bias, allow_unused=True)
        demand(grad is not None and grad.abs().max() > 0, f"{case.what}: the bias gets no gradient")
        mask = _table(tensors)
        hiding = torch.zeros(n, m, dtype=torch.float64).masked_fill(~mask, float("-inf"))
        if "mask" in subject.card.accepts:
            masked = call(subject, tensors, mask=mask, **case.options)
            out = call(subject, tensors, bias=hiding, **case.options)
            demand_near(out, masked, SAME[torch.float64], f"{case.what}: a bias of -inf, against a mask")
        wrong = {"a bias with NaN": hiding.fill_(torch.nan), "an integer bias": torch.zeros(n, m, dtype=torch.long)}
        for what, value in wrong.items():
            demand_refused((OptionError, ShapeError), f"{case.what}, {what}", call, subject, tensors, bias=value)


@verifies("op", lambda card: "pattern" in card.accepts)
def pattern_matters(subject: Subject) -> None:
    """Causal() as a pattern is is_causal=True, a pattern changes the result, and both at once are refused."""
    card = subject.card
    for case in cases(card):
        tensors = inputs(card, case.sizes)
        if case.causal:
            out, named = call(subject, tensors, pattern=Causal()), call(subject, tensors, is_causal=True)
            demand_near(out, named, SAME[torch.float64], "pattern=Causal(), against is_causal=True")
            twice = {"pattern": Causal() & Causal(), "is_causal": True}
            demand_refused(OptionError, "is_causal=True with a pattern", call, subject, tensors, **twice)
            if "self" in card.attends:
                demand(distance(out, call(subject, tensors)) > CHANGE, "pattern=Causal() changes nothing")
        elif card.padding:
            hidden = KeyValid().bind(key_valid=hidden_keys(tensors[1].shape[0], tensors[1].shape[2]))
            demand(
                distance(call(subject, tensors, pattern=hidden), call(subject, tensors)) > CHANGE,
                "a pattern that hides keys changes nothing",
            )
        if card.padding:
            unbound = Causal() & KeyValid() if case.causal else KeyValid()
            what = f"{case.what}, a pattern without data"
            text = demand_refused(OptionError, what, call, subject, tensors, pattern=unbound)
            demand("key_valid" in text, f"the error does not name the missing data key_valid: {text}")


@verifies("op", lambda card: "scale" in card.accepts)
def scale_matters(subject: Subject) -> None:
    """scale= multiplies the scores: doubling it equals doubling one factor of every score, on every engine."""
    # the factor is the queries, or a further tensor of their width that stands between queries and keys
    inside = [name for name, axes in parse(subject.card.spec).inputs if "d" in axes and not {"n", "m"} & set(axes)]
    factor = inside[0] if inside else names(subject.card)[0]
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes)
        twice = [2 * t if name == factor else t for name, t in zip(names(subject.card), tensors, strict=True)]
        expected = call(subject, twice, scale=0.3, **case.options)
        run = lambda e: call(subject, tensors, scale=0.6, engine=e, **case.options)  # noqa: B023, E731
        for name, out in each_engine(subject, run):
            what = f"{case.what}, {name}: twice the scale, against twice {factor}"
            demand_near(out, expected, SAME[torch.float64], what)
        plain = call(subject, tensors, **case.options)
        demand(distance(plain, expected) > CHANGE, f"{case.what}: the scale changes nothing")


@verifies("op", lambda card: "dropout" in card.accepts)
def dropout_matters(subject: Subject) -> None:
    """dropout_p= drops weights, by the seed, and keeps the mean; 0 drops nothing."""
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes)
        plain = call(subject, tensors, **case.options)
        none = call(subject, tensors, dropout_p=0.0, **case.options)
        demand(torch.equal(none, plain), f"{case.what}: dropout_p=0 changes the result")
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(call(subject, tensors, dropout_p=0.5, **case.options))
        demand(distance(draws[0], plain) > CHANGE, f"{case.what}: dropout_p=0.5 changes nothing")
        demand(torch.equal(draws[0], draws[1]), f"{case.what}: the same seed drops other weights")
        demand(not torch.equal(draws[0], draws[2]), f"{case.what}: another seed drops the same weights")
        mean = torch.stack([call(subject, tensors, dropout_p=0.5, **case.options) for _ in range(400)]).mean(0)
        # the noise of 400 draws is a quarter of this, a missing factor 1 - p twice of it
        demand(distance(mean, plain) < 0.2, f"{case.what}: the mean over many draws is not the result without dropout")


@verifies("op")
def refuses_unclaimed_options(subject: Subject) -> None:
    """Shared options that the card does not claim are refused, and so is a misspelt one."""
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes)
        n, m = tensors[0].shape[2], tensors[1].shape[2]
        values = {
            "pattern": Causal() if case.causal else KeyValid().bind(key_valid=hidden_keys(tensors[1].shape[0], m)),
            "mask": torch.ones(n, m, dtype=torch.bool),
            "bias": torch.zeros(n, m, dtype=torch.float64),
            "scale": 0.5,
            "dropout_p": 0.1,
        }
        for option, word in OPTIONS.items():
            if word not in subject.card.accepts:
                given = {option: values[option]} | ({} if option == "pattern" else case.options)
                demand_refused(REFUSED, f"{case.what}, {option}=", call, subject, tensors, **given)
        unknown = {"no_such_option": 1, **case.options}
        demand_refused((*REFUSED, TypeError), "an unknown option", call, subject, tensors, **unknown)


@verifies("op", lambda card: card.gradient)
def gradient(subject: Subject) -> None:
    """Gradients of q, k and v agree with finite differences in float64."""
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes, grad=True)
        options = dict(case.options)
        if subject.card.padding:
            options = {"pattern": _with(case.causal, KeyValid().bind(key_valid=hidden_keys(*tensors[1].shape[:3:2])))}
        try:
            torch.autograd.gradcheck(
                lambda *t, given=options: call(subject, list(t), **given), tensors, fast_mode=True, atol=1e-6
            )
        except RuntimeError as error:
            raise CheckFailed(f"{case.what}: {str(error).strip().splitlines()[0]}") from error
        grads = gradients(call(subject, tensors, **options), tensors)
        for (name, _), grad in zip(parse(subject.card.spec).inputs, grads, strict=True):
            demand(grad.abs().max() > 0, f"{case.what}: {name} gets no gradient")


@verifies("op")
def half_precision(subject: Subject) -> None:
    """bfloat16 and float16, forward and backward, are near float32 on the same numbers, for large scores too."""
    for case in cases(subject.card):
        for dtype, tolerance in HALF.items():
            tensors = inputs(subject.card, case.sizes, dtype, grad=True, spread=2.0)
            exact = [t.detach().float().requires_grad_() for t in tensors]
            out, expected = call(subject, tensors, **case.options), call(subject, exact, **case.options)
            demand_near(out, expected.to(dtype), tolerance, f"{case.what}, {dtype} against float32")
            # unit gradients: squares of outputs of this size would leave float16
            found, wanted = gradients(out, tensors), gradients(expected, exact)
            for name, got, want in zip(names(subject.card), found, wanted, strict=True):
                demand_near(got, want, 2 * tolerance, f"{case.what}, {dtype} against float32, gradient of {name}")


@verifies("op")
def autocast(subject: Subject) -> None:
    """Under autocast, float32 inputs and mixed ones give a result near float32, forward and backward."""
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes, torch.float32, grad=True)
        expected = call(subject, tensors, **case.options)
        rounded = [t.detach().to(torch.bfloat16).requires_grad_() for t in tensors[:2]]
        for what, given in (("float32", tensors), ("bfloat16 and float32", [*rounded, *tensors[2:]])):
            with torch.autocast("cpu", torch.bfloat16):
                out = call(subject, given, **case.options)
            what = f"{case.what}, autocast with {what} inputs"
            demand_near(out, expected.to(out.dtype), 2 * HALF[torch.bfloat16], what)
            for name, grad in zip(names(subject.card), gradients(out, given), strict=True):
                demand(grad.isfinite().all(), f"{what}: the gradient of {name} is not finite")


def compiles_with(subject: Subject, backend: str) -> None:
    """Raise CheckFailed unless the op, compiled as one graph by a backend, equals itself, forward and backward."""
    card = subject.card
    for case in cases(card):
        tensors = inputs(card, case.sizes, torch.float32, grad=True)
        valid = hidden_keys(tensors[1].shape[0], tensors[1].shape[2])

        def plain(*given: Tensor, case: Case = case) -> Tensor:
            *tensors, valid = given
            if not card.padding:
                return call(subject, list(tensors), **case.options)
            return call(subject, list(tensors), pattern=_with(case.causal, KeyValid().bind(key_valid=valid)))

        torch._dynamo.reset()
        try:
            out = torch.compile(plain, fullgraph=True, backend=backend)(*tensors, valid)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = (str(error).strip().splitlines() or ["no text"])[0]
            raise CheckFailed(f"{case.what}: it does not compile as one graph: {reason}") from error
        expected = plain(*tensors, valid)
        demand_near(out, expected, SAME[torch.float32], f"{case.what}, compiled")
        for name, got, want in zip(
            names(subject.card), gradients(out, tensors), gradients(expected, tensors), strict=True
        ):
            demand_near(got, want, GRADIENT[torch.float32], f"{case.what}, compiled, gradient of {name}")


@verifies("op")
def compiles(subject: Subject) -> None:
    """torch.compile makes one graph of it that equals eager, forward and backward."""
    compiles_with(subject, BACKEND)


@verifies("op")
def engines_agree(subject: Subject) -> None:
    """Every engine that can run a call equals the reference, forward and backward, with NaN in all fresh memory."""
    card = subject.card
    for case in cases(card):
        for dtype in (torch.float64, torch.float32):
            tensors = inputs(card, case.sizes, dtype, grad=True)
            variants: dict[str, dict[str, Any]] = {"": case.options}
            if card.padding:
                valid = hidden_keys(tensors[1].shape[0], tensors[1].shape[2])
                variants[", hidden keys"] = {"pattern": _with(case.causal, KeyValid().bind(key_valid=valid))}
            for variant, options in variants.items():
                expected = subject.main.reference(*tensors, **{**needed(card, tensors[0].shape[1]), **options})
                wanted = gradients(expected, tensors)
                with poisoned():
                    run = lambda e: call(subject, tensors, engine=e, **options)  # noqa: B023, E731
                    results = [(name, out, gradients(out, tensors)) for name, out in each_engine(subject, run)]
                for name, out, grads in results:
                    what = f"{case.what}{variant}, {dtype}, {name} against the reference"
                    demand_near(out, expected, SAME[dtype], what)
                    for letter, got, want in zip(names(subject.card), grads, wanted, strict=True):
                        demand_near(got, want, GRADIENT[dtype], f"{what}, gradient of {letter}")


@verifies("op", lambda card: card.engines)
def explains_its_engine(subject: Subject) -> None:
    """On tensors without data it says which engine would run, and computes nothing."""
    for case in cases(subject.card):
        tensors = [t.to("meta") for t in inputs(subject.card, case.sizes, torch.float32)]
        with listen() as verdicts:
            out = call(subject, tensors, **case.options)
        demand(out.is_meta, f"{case.what}: tensors without data gave a tensor with data")
        claimed = ", ".join(subject.card.engines)
        demand(any(v.chosen for v in verdicts), f"{case.what}: no engine was asked; the card claims {claimed}")


@verifies("op")
def refuses_unknown_engine(subject: Subject) -> None:
    """An unknown engine is refused, and the error names a near one or all."""
    for case in cases(subject.card):
        tensors = inputs(subject.card, case.sizes)
        for name in (f"{(*subject.card.engines, 'x')[0]}x", "referense"):
            what = f"engine={name!r}"
            text = demand_refused(OptionError, what, call, subject, tensors, engine=name, **case.options)
            for known in ("reference", *subject.card.engines):
                demand(known in text, f"{what}: the error does not name {known!r}: {text}")


@verifies("op", lambda card: card.padding or "mask" in card.accepts)
def empty_rows(subject: Subject) -> None:
    """A row that may attend to nothing gives exactly 0, with gradient exactly 0, on every engine."""
    card = subject.card
    for case in cases(card):
        for dtype in (torch.float64, torch.float32):
            tensors = inputs(card, case.sizes, dtype, grad=True)
            batch, n, m = tensors[0].shape[0], tensors[0].shape[2], tensors[1].shape[2]
            ways: dict[str, tuple[dict[str, Any], Tensor]] = {}
            if card.padding:
                valid = torch.ones(batch, m, dtype=torch.bool)
                valid[0] = False
                empty = (~valid.any(1))[:, None, None, None].expand(-1, 1, n, 1)
                ways["no valid key"] = {"pattern": _with(case.causal, KeyValid().bind(key_valid=valid))}, empty
            if "mask" in card.accepts or "bias" in card.accepts:
                mask = torch.ones(n, m, dtype=torch.bool)
                mask[n // 2] = False
                empty = (~mask.any(1))[None, None, :, None].expand(batch, 1, n, 1)
                if "mask" in card.accepts:
                    ways["a mask without keys"] = {"mask": mask, **case.options}, empty
                if "bias" in card.accepts:
                    bias = torch.zeros(n, m, dtype=dtype).masked_fill(~mask, float("-inf"))
                    ways["a bias of -inf"] = {"bias": bias, **case.options}, empty
            for way, (options, empty) in ways.items():
                run = lambda e: call(subject, tensors, engine=e, **options)  # noqa: B023, E731
                for name, out in each_engine(subject, run):
                    what = f"{case.what}, {dtype}, {way}, {name}"
                    demand((out.masked_select(empty) == 0).all(), f"{what}: the row is not exactly 0")
                    grads = gradients(out, tensors)
                    finite = all(g.isfinite().all() for g in (out, *grads))
                    demand(finite, f"{what}: a result or a gradient is not finite")
                    demand((grads[0].masked_select(empty) == 0).all(), f"{what}: the row's query gets a gradient")
                    grads = gradients(out * empty, tensors)
                    demand(all((g == 0).all() for g in grads), f"{what}: a gradient flows through the empty row")


def _or_refuses(derive: Callable[[], list[Tensor]]) -> list[Tensor] | None:
    """What a derivative is, or None where torch or the library refuses it with an error."""
    try:
        return derive()
    except (RuntimeError, NotImplementedError) as error:
        demand(str(error).strip(), "a derivative is refused without a word")
        return None


@verifies("op", lambda card: card.gradient)
def second_derivatives(subject: Subject) -> None:
    """Second derivatives equal the reference's or raise, on every engine; they are never silently wrong."""
    for case in cases(subject.card):
        for dtype in (torch.float64, torch.float32):
            tensors = inputs(subject.card, case.sizes, dtype, grad=True)

            def twice(engine: str | None, case: Case = case, tensors: list[Tensor] = tensors) -> list[Tensor] | None:
                out = call(subject, tensors, engine=engine, **case.options)

                def derive() -> list[Tensor]:
                    first = gradients(out, tensors, keep=True)
                    if not any(g.requires_grad for g in first):
                        return [torch.zeros_like(t) for t in tensors]
                    parts = [(g * (t.detach() + 1).cos()).sum() for g, t in zip(first, tensors, strict=True)]
                    grads = torch.autograd.grad(torch.stack(parts).sum(), tensors, allow_unused=True)
                    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)]

                return _or_refuses(derive)

            expected = twice("reference")
            if expected is None:
                raise CheckFailed(f"{case.what}: the reference has no second derivatives")
            if dtype is torch.float64:
                _check_reference_twice(subject, tensors, case)
            for name, found in each_engine(subject, twice):
                if found is None:
                    continue
                for letter, got, want in zip(names(subject.card), found, expected, strict=True):
                    what = f"{case.what}, {dtype}, {name}, second derivative by {letter}"
                    demand_near(got, want, 10 * GRADIENT[dtype], what)


def _check_reference_twice(subject: Subject, tensors: list[Tensor], case: Case) -> None:
    options = {**needed(subject.card, tensors[0].shape[1]), **case.options}
    try:
        torch.autograd.gradgradcheck(
            lambda *t: subject.main.reference(*t, **options), tensors, fast_mode=True, atol=1e-5, rtol=1e-3
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckFailed(f"{case.what}: the reference against finite differences: {reason}") from error


@verifies("op", lambda card: card.gradient)
def forward_mode(subject: Subject) -> None:
    """Forward-mode derivatives equal the reference's or raise, on every engine; they are never silently wrong."""
    for case in cases(subject.card):
        for dtype in (torch.float64, torch.float32):
            tensors = inputs(subject.card, case.sizes, dtype)

            def forward(engine: str | None, case: Case = case, tensors: list[Tensor] = tensors) -> list[Tensor] | None:
                def derive() -> list[Tensor]:
                    with forward_ad.dual_level():
                        duals = [forward_ad.make_dual(t, (t + 1).cos()) for t in tensors]
                        out = forward_ad.unpack_dual(call(subject, duals, engine=engine, **case.options))
                        return [torch.zeros_like(out.primal) if out.tangent is None else out.tangent]

                # a refusal of the engine itself means that it cannot run the call
                call(subject, tensors, engine=engine, **case.options)
                return _or_refuses(derive)

            # the reference itself is held against a finite difference along the same direction
            expected = forward("reference")
            if expected is None:
                raise CheckFailed(f"{case.what}: the reference has no forward-mode derivative")
            if dtype is torch.float64:
                step = 1e-6
                ends = [
                    subject.main.reference(
                        *(t + sign * step * (t + 1).cos() for t in tensors),
                        **{**needed(subject.card, tensors[0].shape[1]), **case.options},
                    )
                    for sign in (1, -1)
                ]
                slope = (ends[0] - ends[1]) / (2 * step)
                what = f"{case.what}: the reference's forward mode, against finite differences"
                demand_near(expected[0], slope, SLOPE, what)
            for name, found in each_engine(subject, forward):
                if found is not None:
                    what = f"{case.what}, {dtype}, {name}, forward-mode derivative"
                    demand_near(found[0], expected[0], GRADIENT[dtype], what)


@verifies("op", lambda card: card.decode == "kv")
def decodes_from_a_cache(subject: Subject) -> None:
    """Late queries with q_offset over all keys so far equal their rows of the whole, on every engine."""
    n = subject.card.sizes["n"]
    tensors = inputs(subject.card, {"n": n, "m": n})
    whole = call(subject, tensors, is_causal=True)
    for start, stop in ((n - 1, n), (n - 4, n - 1), (2, 3), (0, 1)):
        given = cut(subject.card, cut(subject.card, tensors, "m", stop), "n", stop, start)
        run = lambda e: call(subject, given, pattern=Causal(), q_offset=start, engine=e)  # noqa: B023, E731
        for name, out in each_engine(subject, run):
            what = f"{name}, queries {start} to {stop - 1} alone"
            demand_near(out, whole[:, :, start:stop], SAME[torch.float64], what)


@verifies("op", lambda card: card.decode == "state")
def continues_from_a_state(subject: Subject) -> None:
    """The sibling _step in pieces, on every engine, equals the whole, with gradients; old states stay as they were."""
    card = subject.card
    (name,) = (export for export in card.exports if export.endswith("_step"))
    n = card.sizes["n"]
    tensors = inputs(card, {"n": n, "m": n}, grad=True)
    whole = call(subject, tensors, is_causal=True)
    options = needed(card, tensors[0].shape[1])

    def pieces(engine: str | None) -> Tensor:
        outs, state, states = [], None, []
        bounds = (0, 3, 4, 5, n)
        for start, stop in pairwise(bounds):
            given = cut(card, tensors, "nm", stop, start)
            out, state = subject.exports[name](*given, state=state, engine=engine, **options)
            outs.append(out)
            states.append(state)
        given = cut(card, tensors, "nm", 4, 3)
        again, _ = subject.exports[name](*given, state=states[0], engine=engine, **options)
        demand(torch.equal(again, outs[1]), "an old state gives another result after later steps")
        return torch.cat(outs, 2)

    for engine_name in (None, "reference", *engine_names(card)):
        try:
            out = pieces(engine_name)
        except Unsupported:
            continue
        what = f"{engine_name or 'the automatic choice'}: pieces, against the whole"
        demand_near(out, whole, SAME[torch.float64], what)
        for letter, got, want in zip(
            names(subject.card), gradients(out, tensors), gradients(whole, tensors), strict=True
        ):
            demand_near(got, want, GRADIENT[torch.float64], f"{what}, gradient of {letter}")


@verifies("op")
def names_wrong_shapes(subject: Subject) -> None:
    """Tensors that do not fit are refused with a ShapeError that names the tensor and the axis."""
    card = subject.card
    case = cases(card)[0]
    spec = parse(card.spec)
    seen: set[str] = set()
    for position, (name, letters) in enumerate(spec.inputs):
        tensors = inputs(card, case.sizes)
        flat = [*tensors[:position], tensors[position][0], *tensors[position + 1 :]]
        options = {**needed(card, card.sizes["h"]), **case.options}
        text = demand_refused(ShapeError, f"{name} without a batch", subject.main, *flat, **options)
        demand(name in text, f"{name} without a batch: the error does not name {name}: {text}")
        for axis, letter in enumerate(letters):
            if letter in seen:
                extra = torch.cat((tensors[position], tensors[position].narrow(axis, 0, 1)), axis)
                wrong = [*tensors[:position], extra, *tensors[position + 1 :]]
                what = f"{name} with another {letter}"
                text = demand_refused(ShapeError, what, call, subject, wrong, **case.options)
                demand(f"axis {letter}" in text and name in text, f"{what}: the error does not say so: {text}")
        seen |= set(letters)
    tensors = inputs(card, case.sizes)
    if "g" in card.sizes:
        places = along(card, "h")
        heads = [t if p is None else torch.cat((t, t.narrow(p, 0, 1)), p) for t, p in zip(tensors, places, strict=True)]
        demand_refused(ShapeError, "heads that do not divide", call, subject, heads, **case.options)
    mixed = [tensors[0], tensors[1].float(), *tensors[2:]]
    demand_refused(ShapeError, "tensors of two dtypes", call, subject, mixed, **case.options)
    demand_refused(ShapeError, "integer tensors", call, subject, [t.long() for t in tensors], **case.options)
