"""Checks of mixers: modules with weights, tokens to tokens; also of the attention layer over ops that keep a cache."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from regard.checks.battery import CheckFailed, Subject, demand, demand_near, demand_refused, verifies
from regard.checks.ops import BACKEND, gradients, hidden_keys, worst
from regard.checks.tolerances import GRADIENT, HALF_LAYER, SAME
from regard.contract.collect import collect_losses
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.names import wrap
from regard.primitives.state import State

REFUSED = (Unsupported, OptionError)
STATEFUL = ("init_state", "prefill", "step", "state_bytes")


def build(subject: Subject, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A new module by the card's example, in evaluation mode: in training, statistics may move and dropout acts.

    Weights are moved off their start, where some are 0; always the same ones.
    """
    sizes = subject.card.sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        given = {**subject.card.options, **options}
        if subject.wraps is None:
            module = subject.main(sizes["c"], sizes["h"], **given)
        else:
            module = wrap(subject.wraps, sizes["c"], sizes["h"], **given)
        module = module.double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return module.to(dtype).eval()


def tokens(card: Any, n: int | None = None, *, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    """Random tokens by the card's example: (b, n, c), or a grid (b, y, x, c) where it has a y. n: another length."""
    sizes = card.sizes
    axes = (sizes["y"], sizes["x"]) if "y" in sizes else (sizes["n"] if n is None else n,)
    shape = (sizes["b"], *axes, sizes["c"])
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def modes(card: Any) -> list[tuple[str, dict[str, Any]]]:
    """The ways to mix tokens with themselves that the card claims."""
    found: list[tuple[str, dict[str, Any]]] = []
    if "self" in card.attends:
        found.append(("with all tokens", {}))
    if "causal_self" in card.attends:
        found.append(("causal", {"is_causal": True}))
    return found


def any_length(card: Any) -> bool:
    """Whether a mixer takes any number of tokens; one with the option num_tokens= takes that number."""
    return "num_tokens" not in card.options


def hidden_tokens(x: Tensor) -> Tensor:
    """A padding mask of tokens or of the places of a grid, as `hidden_keys` makes it."""
    return hidden_keys(x.shape[0], x[0, ..., 0].numel()).view(x.shape[:-1])


def reads_context(card: Any) -> bool:
    """Whether a card claims to read from another sequence."""
    return "cross" in card.attends or "causal_cross" in card.attends


def calls(card: Any) -> list[tuple[str, tuple[Tensor, ...], dict[str, Any]]]:
    """(what, tensors, options) of every way to call the mixer that the card claims."""
    found: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = []
    found += [(what, (tokens(card),), options) for what, options in modes(card)]
    if reads_context(card):
        found.append(("with a context", (tokens(card), tokens(card, card.sizes["n"] + 3)), {}))
    return found


@verifies("mixer")
def module_is_described(subject: Subject) -> None:
    """It says what it does, and has the methods of a state exactly if it claims to decode."""
    module = build(subject)
    demand((type(module).__doc__ or "").strip(), f"{type(module).__name__} has no docstring")
    for method in STATEFUL:
        there = callable(getattr(module, method, None))
        demand(
            there is subject.card.decode,
            f"decode={subject.card.decode} on the card, but there is {'a' if there else 'no'} method {method}",
        )


@verifies("mixer")
def signature_of_forward(subject: Subject) -> None:
    """Made from (dim, heads, own options); forward takes (x, context, *, padding, is_causal, …); no **kwargs."""
    module = build(subject)
    functions = {"forward": module.forward}
    if subject.wraps is None:
        functions["the constructor"] = subject.main
        made = list(inspect.signature(subject.main).parameters)
        demand(made[:2] == ["dim", "heads"], f"the constructor takes {', '.join(made)}; it must start with dim, heads")
    for what, function in functions.items():
        for name, parameter in inspect.signature(function).parameters.items():
            kinds = (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            demand(parameter.kind not in kinds, f"{what} has *{name}, which would swallow a misspelt option")
    found = inspect.signature(module.forward).parameters
    demand(list(found)[:2] == ["x", "context"], f"forward takes {', '.join(found)}; it must start with x, context")
    for name in ("padding", "is_causal", *(["reset"] if subject.card.documents else [])):
        demand(name in found, f"forward takes no {name}")
        demand(found[name].kind is found[name].KEYWORD_ONLY, f"forward's {name} is not keyword-only")


@verifies("mixer")
def tokens_to_tokens(subject: Subject) -> None:
    """The output has the shape, the dtype and the device of the tokens."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module = build(subject, dtype)
        for what, given, options in calls(subject.card):
            x = given[0].to(dtype)
            out = module(x, *(t.to(dtype) for t in given[1:]), **options)
            demand(out.shape == x.shape, f"{what}: tokens {tuple(x.shape)} gave {tuple(out.shape)}")
            demand(out.dtype is dtype, f"{what}: tokens of {dtype} gave {out.dtype}")
            demand(out.device == x.device, f"{what}: tokens on {x.device} gave a result on {out.device}")


@verifies("mixer")
def same_bits_twice(subject: Subject) -> None:
    """Two calls give the same bits and leave inputs, weights and buffers as they were."""
    module = build(subject, torch.float32)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for what, given, options in calls(subject.card):
        given = tuple(t.float() for t in given)
        copies = [t.clone() for t in given]
        first = module(*given, **options)
        torch.manual_seed(1)
        demand(torch.equal(first, module(*given, **options)), f"{what}: two calls differ")
        demand(all(torch.equal(a, b) for a, b in zip(given, copies, strict=True)), f"{what}: an input was written to")
    for name, value in module.state_dict().items():
        demand(torch.equal(value, before[name]), f"a call changed {name}")


@verifies("mixer")
def strided_tokens(subject: Subject) -> None:
    """Transposed and sliced tokens give what contiguous ones give; one row and, if any number will do, one token too."""
    module = build(subject)
    for what, given, options in calls(subject.card):
        expected = module(*given, **options)
        for layout, views in {
            "transposed": [t.transpose(0, 1).contiguous().transpose(0, 1) for t in given],
            "sliced": [torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0] for t in given],
        }.items():
            demand_near(module(*views, **options), expected, SAME[torch.float64], f"{what}, {layout} tokens")
        alone = module(*(t[:1] for t in given), **options)
        demand_near(alone, expected[:1], SAME[torch.float64], f"{what}, one row of the batch")
        # a grid may have a least size
        if given[0].dim() > 3 or not any_length(subject.card):
            continue
        one = module(*(t[:, :1] for t in given), **options)
        demand(one.shape == given[0][:, :1].shape, f"{what}: one token gave {tuple(one.shape)}")
        demand(one.isfinite().all(), f"{what}: one token gave a result that is not finite")


@verifies("mixer")
def gradient_reaches_every_parameter(subject: Subject) -> None:
    """Called in every way that is claimed, each parameter gets a finite gradient, not all 0, also by auxiliary losses."""
    module = build(subject)
    card = subject.card
    reached: dict[str, float] = {}
    for what, given, options in calls(card):
        extra = {}
        if card.padding:
            extra["padding"] = hidden_tokens(given[-1])
        module.zero_grad()
        with collect_losses() as losses:
            out = module(*given, **options, **extra)
        demand(out.requires_grad, f"{what}: the output has no gradient at all")
        auxiliary = [loss for found in losses.values() for loss in found]
        torch.stack([(out * torch.randn_like(out)).sum(), *auxiliary]).sum().backward()
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                demand(parameter.grad.isfinite().all(), f"{what}: the gradient of {name} is not finite")
                reached[name] = max(reached.get(name, 0.0), float(parameter.grad.abs().max()))
    lost = [name for name, _ in module.named_parameters() if not reached.get(name)]
    demand(not lost, f"no gradient reaches {', '.join(lost)}")


def reach(module: nn.Module, x: Tensor, context: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Which output depends on which token (n, n), on which token of the context (n, m): largest gradients.

    The tokens of a grid are counted row by row.
    """
    sources = [x.requires_grad_()] + ([context.requires_grad_()] if context is not None else [])
    out = module(*sources, **options).flatten(1, -2)
    tables = [torch.zeros(out.shape[1], s[0, ..., 0].numel(), dtype=torch.float64) for s in sources]
    for i in range(out.shape[1]):
        row = out[:, i]
        grads = torch.autograd.grad((row * torch.randn_like(row)).sum(), sources, retain_graph=True, allow_unused=True)
        for table, grad in zip(tables, grads, strict=True):
            if grad is not None:
                table[i] = grad.flatten(1, -2).abs().amax((0, 2))
    demand(not any(t.isnan().any() for t in tables), "a gradient is NaN")
    return tables[0], tables[1] if context is not None else None


@verifies("mixer", lambda card: "self" in card.attends)
def mixes_self(subject: Subject) -> None:
    """By gradient: every output sees its own token, and tokens on both sides."""
    seen, _ = reach(build(subject), tokens(subject.card))
    demand((seen.diagonal() > 0).all(), "an output does not see its own token")
    demand((seen.triu(1).sum(1)[:-1] > 0).all(), "an output sees no later token, but the card claims more than causal")
    demand((seen.tril(-1).sum(1)[1:] > 0).all(), "an output sees no earlier token")


@verifies("mixer", lambda card: "causal_self" in card.attends)
def mixes_causal_self(subject: Subject) -> None:
    """By gradient: every output sees its own token and earlier ones, and nothing later."""
    seen, _ = reach(build(subject), tokens(subject.card), is_causal=True)
    demand((seen.triu(1) == 0).all(), f"an output sees a later token: {worst(seen.triu(1))}")
    demand((seen.diagonal() > 0).all(), "an output does not see its own token")
    demand((seen.tril(-1).sum(1)[1:] > 0).all(), "an output sees no earlier token")


@verifies("mixer", lambda card: "cross" in card.attends)
def mixes_cross(subject: Subject) -> None:
    """By gradient: every output sees every token of a context, of any length."""
    card = subject.card
    for m in (card.sizes["n"] + 3, 3, card.sizes["n"]):
        _, seen = reach(build(subject), tokens(card), tokens(card, m))
        assert seen is not None
        demand((seen > 0).all(), f"a context of {m}: an output does not see some token of it: {worst(-seen)}")


@verifies("mixer", lambda card: "causal_cross" in card.attends)
def mixes_causal_cross(subject: Subject) -> None:
    """By gradient: every output sees the whole context, but no later token of its own sequence."""
    card = subject.card
    own, seen = reach(build(subject), tokens(card), tokens(card, card.sizes["n"] + 3))
    assert seen is not None
    demand((own.triu(1) == 0).all(), f"an output depends on a later token: {worst(own.triu(1))}")
    demand((seen > 0).all(), f"an output does not see some token of the context: {worst(-seen)}")


@verifies("mixer", lambda card: not {"self", "causal_self", "cross"} <= set(card.attends))
def refuses_other_ways(subject: Subject) -> None:
    """A context, a causal or a two-sided call that the card does not claim is refused."""
    card, module = subject.card, build(subject)
    if "self" not in card.attends:
        demand_refused(REFUSED, "a call with all tokens", module, tokens(card))
    if "causal_self" not in card.attends:
        demand_refused(REFUSED, "a causal call", module, tokens(card), is_causal=True)
    if not reads_context(card):
        for _, options in modes(card) or [("", {})]:
            demand_refused(REFUSED, "a context", module, tokens(card), tokens(card), **options)


@verifies("mixer", lambda card: card.padding)
def padded_tokens(subject: Subject) -> None:
    """Padded tokens change nothing at the others; padding at either end equals cutting it off, also when decoding."""
    card, module = subject.card, build(subject)
    for what, given, options in calls(card):
        *own, source = given
        batch, m = source.shape[:2]
        valid = hidden_tokens(source)
        noise = source + 30 * torch.randn_like(source) * ~valid[..., None]
        out, again = (module(*own, s, padding=valid, **options) for s in (source, noise))
        kept = slice(None) if own else valid
        demand(again.isfinite().all(), f"{what}: a result is not finite")
        demand_near(again[kept], out[kept], SAME[torch.float64], f"{what}: other values at padded tokens")
        # a grid that is cut off is another one
        cuts = (("end", slice(m - 3)), ("start", slice(3, m))) if any_length(card) and source.dim() == 3 else ()
        for end, real in cuts:
            valid = torch.zeros(batch, m, dtype=torch.bool)
            valid[:, real] = True
            out = module(*own, source, padding=valid, **options)
            cut = module(*own, source[:, real], **options)
            rows = slice(None) if own else real
            what_now = f"{what}: padding at the {end}, against cutting it off"
            demand_near(out[:, rows], cut, SAME[torch.float64], what_now)
    if card.decode:
        x = tokens(card)
        valid = torch.ones(x.shape[:2], dtype=torch.bool)
        valid[:, :3] = False
        whole = module(x[:, 3:], is_causal=True)
        first, state = module.prefill(x[:, :5], module.init_state(x.shape[0]), padding=valid[:, :5])
        outs = [first[:, 3:]]
        for t in range(5, x.shape[1]):
            out, state = module.step(x[:, t : t + 1], state)
            outs.append(out)
        demand_near(torch.cat(outs, 1), whole, SAME[torch.float64], "padding at the start, then decoding")


@verifies("mixer", lambda card: not (card.padding and card.documents))
def refuses_unclaimed_masks(subject: Subject) -> None:
    """padding= and reset= are refused where the card does not claim them."""
    card, module = subject.card, build(subject)
    for _, options in modes(card):
        x = tokens(card)
        masks = {}
        if not card.padding:
            masks["padding"] = hidden_tokens(x)
        if not card.documents:
            masks["reset"] = torch.zeros(x.shape[:2], dtype=torch.bool)
        for name, mask in masks.items():
            demand_refused((*REFUSED, TypeError), f"{name}=", module, x, **{name: mask, **options})


@verifies("mixer", lambda card: card.documents)
def resets(subject: Subject) -> None:
    """Documents behind reset= equal separate calls."""
    card, module = subject.card, build(subject)
    n = card.sizes["n"]
    starts = [(0, 1, n // 2), (0, n // 3, n - 2)]
    for what, options in modes(card):
        x = tokens(card)
        reset = torch.zeros(x.shape[:2], dtype=torch.bool)
        for row in range(len(x)):
            reset[row, list(starts[row % 2][row % 2 :])] = True
        out = module(x, reset=reset, **options)
        for row in range(len(x)):
            for start, stop in zip(starts[row % 2], (*starts[row % 2][1:], n), strict=True):
                alone = module(x[row : row + 1, start:stop], **options)
                part = out[row : row + 1, start:stop]
                demand_near(part, alone, SAME[torch.float64], f"{what}: the document of tokens {start} to {stop - 1}")


@verifies("mixer", lambda card: card.decode)
def prefill_and_step(subject: Subject) -> None:
    """Prefill in any pieces, then steps, equals the parallel form in float64, with and without gradients."""
    card, module = subject.card, build(subject)
    n = card.sizes["n"]
    x = tokens(card, n + 4)
    whole = module(x, is_causal=True)
    for with_grad in (False, True):
        with torch.set_grad_enabled(with_grad):
            for bounds in ((0, n), (0, 1, 3, n - 3), (0, 0)):
                state, outs = module.init_state(x.shape[0]), []
                for start, stop in pairwise(bounds):
                    if stop > start:
                        out, state = module.prefill(x[:, start:stop], state)
                        outs.append(out)
                for t in range(bounds[-1], x.shape[1]):
                    out, state = module.step(x[:, t : t + 1], state)
                    outs.append(out)
                what = f"prefill up to {bounds[1:]}, then steps{', with gradients' if with_grad else ''}"
                demand_near(torch.cat(outs, 1), whole, SAME[torch.float64], what)
                seen = getattr(state, "seen", None)
                demand(seen == x.shape[1], f"{what}: state.seen is {seen}, but {x.shape[1]} tokens were read")


def tensors_of(state: State) -> list[Tensor]:
    """Every tensor that a state holds."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    state._map(keep)
    return found


@verifies("mixer", lambda card: card.decode)
def states_are_values(subject: Subject) -> None:
    """An old state stays usable after newer steps, branches do not disturb each other, select gathers beams."""
    card, module = subject.card, build(subject)
    n = card.sizes["n"]
    x, other = tokens(card, n + 3), tokens(card, n + 3)
    for with_grad in (False, True):
        with torch.set_grad_enabled(with_grad):
            _, state = module.prefill(x[:, :n], module.init_state(x.shape[0]))
            name = type(state).__name__
            demand(isinstance(state, State), f"the state is a {name}, not a State of regard.primitives.state")
            held = tensors_of(state)
            copies = [t.clone() for t in held]
            one, left = module.step(x[:, n : n + 1], state)
            two, right = module.step(other[:, n : n + 1], state)
            after_left, _ = module.step(x[:, n + 1 : n + 2], left)
            after_right, _ = module.step(other[:, n + 1 : n + 2], right)
            untouched = all(torch.equal(t, old) for t, old in zip(held, copies, strict=True))
            demand(untouched, "a step wrote into the tensors of an older state")
            branch = torch.cat((x[:, :n], other[:, n:]), 1)
            for what, tokens_, first, second in (
                ("the first branch", x, one, after_left),
                ("a second branch from the same state", branch, two, after_right),
            ):
                expected = module(tokens_[:, : n + 2], is_causal=True)[:, n:]
                demand_near(torch.cat((first, second), 1), expected, SAME[torch.float64], what)
            beams = torch.tensor([1, 0, 1])
            out, _ = module.step(x[:, n : n + 1][beams], state.select(beams))
            demand_near(out, one[beams], SAME[torch.float64], "a step after select([1, 0, 1])")
            again, _ = module.step(x[:, n : n + 1], state)
            demand_near(again, one, SAME[torch.float64], "the same step again from the old state")


@verifies("mixer", lambda card: card.decode)
def state_bytes_are_true(subject: Subject) -> None:
    """state_bytes(batch, length) is what the state really holds, in float32 and float64, for several batches."""
    card = subject.card
    for dtype in (torch.float32, torch.float64):
        module = build(subject, dtype)
        for batch in (1, 2):
            for n in (1, card.sizes["n"], 4 * card.sizes["n"]):
                x = torch.randn(batch, n, card.sizes["c"], dtype=dtype)
                with torch.no_grad():
                    _, state = module.prefill(x, module.init_state(batch))
                said, held = module.state_bytes(batch, n), state.size_bytes
                what = f"{dtype}, batch {batch}, {n} tokens"
                demand(said == held, f"{what}: state_bytes says {said}, the state holds {held}")


@verifies("mixer", lambda card: card.decode)
def state_grows_as_claimed(subject: Subject) -> None:
    """With constant_state the state stops growing beyond any window; without it, it grows."""
    card, module = subject.card, build(subject)
    n = 8 * card.sizes["n"]
    held = []
    for length in (n, 4 * n):
        with torch.no_grad():
            held.append(module.prefill(tokens(card, length), module.init_state(card.sizes["b"]))[1].size_bytes)
    constant = held[0] == held[1]
    demand(
        constant is card.constant_state,
        f"constant_state={card.constant_state} on the card, but the state holds {held[0]} bytes after {n} tokens and "
        f"{held[1]} after {4 * n}",
    )


def compiles_with(subject: Subject, backend: str) -> None:
    """Raise CheckFailed unless the mixer, compiled as one graph by a backend, equals itself, forward and backward."""
    card, module = subject.card, build(subject, torch.float32)
    for what, given, options in calls(card):
        tensors = [t.float().requires_grad_() for t in given]
        if card.padding:
            options = {**options, "padding": hidden_tokens(given[-1])}
        torch._dynamo.reset()
        try:
            out = torch.compile(module, fullgraph=True, backend=backend)(*tensors, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = (str(error).strip().splitlines() or ["no text"])[0]
            raise CheckFailed(f"{what}: it does not compile as one graph: {reason}") from error
        expected = module(*tensors, **options)
        demand_near(out, expected, SAME[torch.float32], f"{what}, compiled")
        wanted = [*tensors, *module.parameters()]
        names = ["x", "context"][: len(tensors)] + [name for name, _ in module.named_parameters()]
        for name, got, want in zip(names, gradients(out, wanted), gradients(expected, wanted), strict=True):
            demand_near(got, want, GRADIENT[torch.float32], f"{what}, compiled, gradient of {name}")


@verifies("mixer")
def module_compiles(subject: Subject) -> None:
    """torch.compile makes one graph of it that equals eager, forward and backward."""
    compiles_with(subject, BACKEND)


@verifies("mixer")
def half_precision_layer(subject: Subject) -> None:
    """In bfloat16 and under autocast it is near float32 with the same (rounded) weights; gradients are finite."""
    card, dtype = subject.card, torch.bfloat16
    low = build(subject, dtype)
    high = build(subject, torch.float32)
    high.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    for what, given, options in calls(card):
        rounded = [t.to(dtype) for t in given]
        expected = high(*(t.float() for t in rounded), **options)
        demand_near(low(*rounded, **options), expected.to(dtype), HALF_LAYER[dtype], f"{what}, {dtype} against float32")
        with torch.autocast("cpu", dtype):
            out = high(*(t.float() for t in rounded), **options)
        demand_near(out, expected.to(out.dtype), HALF_LAYER[dtype], f"{what}, autocast against float32")
        grads = torch.autograd.grad(out.float().square().sum(), list(high.parameters()), allow_unused=True)
        demand(all(g is None or g.isfinite().all() for g in grads), f"{what}, autocast: a gradient is not finite")


@verifies("mixer")
def names_wrong_tokens(subject: Subject) -> None:
    """Tokens of another width, padding of another shape or dtype, and heads that do not divide are refused clearly."""
    card, module = subject.card, build(subject)
    for what, given, options in calls(card):
        *own, source = given
        wide = torch.cat((given[0], given[0][..., :1]), -1)
        text = demand_refused(ShapeError, f"{what}, wider tokens", module, wide, *given[1:], **options)
        demand(str(card.sizes["c"]) in text, f"{what}, wider tokens: the error does not name the width: {text}")
        flat = [given[0][0], *given[1:]]
        demand_refused(ShapeError, f"{what}, tokens without a batch", module, *flat, **options)
        if card.padding:
            good = torch.ones(source.shape[:-1], dtype=torch.bool)
            wrong = {"a float padding": good.double(), "a padding that is too long": torch.cat((good, good), 1)}
            for kind, padding in wrong.items():
                demand_refused(ShapeError, f"{what}, {kind}", module, *own, source, padding=padding, **options)
    if subject.wraps is None and "head_dim" in inspect.signature(subject.main).parameters:
        wrong_heads = card.sizes["c"] - 1
        demand_refused(OptionError, f"{wrong_heads} heads", subject.main, card.sizes["c"], wrong_heads, **card.options)
