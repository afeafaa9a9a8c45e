"""Checks of pools: modules with weights, the tokens of a row to one vector."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from regard.checks.battery import Subject, demand, demand_near, demand_refused, verifies
from regard.checks.tolerances import HALF_LAYER, SAME
from regard.contract.errors import ShapeError


def build(subject: Subject, dtype: torch.dtype = torch.float64) -> Any:
    """A new pool by the card's example, in evaluation mode, its weights moved off their start; always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = subject.main(subject.card.sizes["c"], **subject.card.options).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return module.to(dtype).eval()


def tokens(card: Any, *, grad: bool = False) -> Tensor:
    """Random tokens by the card's example, (b, n, c) or (b, l, n, c)."""
    shape = [card.sizes[axis] for axis in "blnc" if axis in card.sizes]
    return torch.randn(shape, dtype=torch.float64).requires_grad_(grad)


def some(x: Tensor) -> Tensor:
    """Padding of tokens x, bool (b, n): other tokens in every row, at the ends too; a row has one or more."""
    b, n = x.shape[0], x.shape[-2]
    return (torch.arange(n) + torch.arange(b)[:, None]) % 3 > 0


@verifies("pool")
def pool_is_described(subject: Subject) -> None:
    """It says what it does; it is made from (dim, *, own options), forward takes (x, *, padding); no **kwargs."""
    demand((subject.main.__doc__ or "").strip(), f"{subject.main.__name__} has no docstring")
    for what, function, first in (("the constructor", subject.main, "dim"), ("forward", build(subject).forward, "x")):
        parameters = list(inspect.signature(function).parameters.values())
        names = [parameter.name for parameter in parameters]
        demand(names[:1] == [first], f"{what} takes {', '.join(names)}; it must start with {first}")
        for parameter in parameters[1:]:
            demand(parameter.kind is parameter.KEYWORD_ONLY, f"{what}'s {parameter.name} is not keyword-only")
        demand(first == "dim" or "padding" in names, "forward takes no padding")


@verifies("pool")
def tokens_to_one_vector(subject: Subject) -> None:
    """Any number of tokens gives (b, c) of their dtype, rows alone, the same bits twice, inputs left as they were."""
    card = subject.card
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module, x = build(subject, dtype), tokens(card).to(dtype)
        for given in (x, x[..., :1, :]):
            kept, out = given.clone(), module(given)
            shape = (card.sizes["b"], card.sizes["c"])
            demand(tuple(out.shape) == shape, f"tokens {tuple(given.shape)} gave {tuple(out.shape)}, not {shape}")
            demand(out.dtype is dtype, f"tokens of {dtype} gave {out.dtype}")
            demand(out.isfinite().all(), f"{given.shape[-2]} tokens gave a result that is not finite")
            demand(torch.equal(out, module(given)), "two calls differ")
            demand(torch.equal(given, kept), "the tokens were written to")
    module, x = build(subject), tokens(card)
    out = module(x)
    demand_near(module(x[:1]), out[:1], SAME[torch.float64], "one row of the batch alone")
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    demand_near(module(strided), out, SAME[torch.float64], "transposed tokens")


@verifies("pool")
def pads_are_left_out(subject: Subject) -> None:
    """Pads on the left, on the right and in between change nothing, whatever they hold, and get no gradient."""
    module, x = build(subject), tokens(subject.card, grad=True)
    n = x.shape[-2]
    expected = module(x)
    demand_near(
        module(x, padding=torch.ones(x.shape[0], n, dtype=torch.bool)), expected, SAME[torch.float64], "no pads"
    )
    noise = torch.full_like(x[..., :2, :], torch.nan)
    valid = torch.zeros(x.shape[0], n + 2, dtype=torch.bool)
    for side, parts, first in (("left", (noise, x), 2), ("right", (x, noise), 0)):
        there = valid.clone()
        there[:, first : first + n] = True
        demand_near(module(torch.cat(parts, -2), padding=there), expected, SAME[torch.float64], f"pads on the {side}")
    valid = some(x)
    out = module(x, padding=valid)
    for row, taken in enumerate(valid):
        alone = module(x[row : row + 1][..., taken, :])
        demand_near(out[row : row + 1], alone, SAME[torch.float64], "pads in between, against the tokens alone")
    (grad,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    reached = grad.abs().amax(-1).flatten(1, -2).amax(1) if grad.dim() > 3 else grad.abs().amax(-1)
    demand((reached[~valid] == 0).all(), "a pad gets a gradient")
    demand((reached.amax(1) > 0).all(), "no token of a row gets a gradient")


@verifies("pool")
def a_row_without_tokens_is_0(subject: Subject) -> None:
    """A row of pads alone gives exactly 0 and the gradient 0, and leaves the other rows as they were."""
    module, x = build(subject), tokens(subject.card, grad=True)
    valid = torch.ones(x.shape[0], x.shape[-2], dtype=torch.bool)
    valid[0] = False
    out = module(x, padding=valid)
    demand((out[0] == 0).all(), f"a row of pads gave numbers up to {float(out[0].detach().abs().max()):.1e}")
    demand_near(out[1:], module(x)[1:], SAME[torch.float64], "the other rows")
    grads = torch.autograd.grad((out * torch.randn_like(out)).sum(), [x, *module.parameters()], allow_unused=True)
    demand(all(g is None or g.isfinite().all() for g in grads), "a gradient is not finite")
    demand((grads[0][0] == 0).all(), "a row of pads gets a gradient")


@verifies("pool")
def gradient_reaches_the_pool(subject: Subject) -> None:
    """A finite gradient, not all 0, reaches every parameter."""
    module, x = build(subject), tokens(subject.card)
    out = module(x, padding=some(x))
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        demand(grad is not None and grad.abs().max() > 0, f"no gradient reaches {name}")
        demand(grad is not None and grad.isfinite().all(), f"the gradient of {name} is not finite")


@verifies("pool")
def pool_in_half_precision(subject: Subject) -> None:
    """In bfloat16 many tokens are summed as in float32: it is near float32 with the same (rounded) weights."""
    dtype = torch.bfloat16
    low, high = build(subject, dtype), build(subject, torch.float32)
    high.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    # so many that sums in bfloat16 stop growing
    x = (torch.cat([tokens(subject.card) for _ in range(200)], -2) + 1).to(dtype)
    expected = high(x.float())
    demand_near(low(x), expected.to(dtype), HALF_LAYER[dtype], f"{dtype} against float32")


@verifies("pool")
def pool_names_wrong_tokens(subject: Subject) -> None:
    """Tokens of another width or without a batch, and padding of another shape or dtype, are refused, naming the width."""
    module, x = build(subject), tokens(subject.card)
    text = demand_refused(ShapeError, "wider tokens", module, torch.cat((x, x[..., :1]), -1))
    demand(str(subject.card.sizes["c"]) in text, f"the error does not name the width: {text}")
    demand_refused(ShapeError, "tokens without a batch", module, x[0])
    good = torch.ones(x.shape[0], x.shape[-2], dtype=torch.bool)
    for what, padding in {"a float padding": good.double(), "a padding that is too long": good.repeat(1, 2)}.items():
        demand_refused(ShapeError, what, module, x, padding=padding)
