"""Plug and play generative networks: images that a network answers to, found by a walk among a generator's codes.

    d = eps1 (E(G(h)) - h) + eps2 d log p(y | G(h)) / dh + eps4 d context / dh + N(0, eps3^2)
    h = clip(h + lr d / mean |d|),      context = - |known pixels of G(h) - the image's|^2 / 2

G makes an image of a code h, E reads a code off an image, and p(y | image) is of any network, plugged in without training.
The first term is an estimate of d log p(h) / dh by a denoising autoencoder; eps1 = eps3 = 0 is DGN-AM. With pixels as codes,
G the identity and E a denoiser, it is PPGN-x; PPGN-h, whose autoencoder never sees an image, is not here.

Departs from the released code: the gradient of a class is that of its log-probability, there only that of its logit times
1 - p; a unit's score is its activation, not its share among units; codes are within the clip from the start; a chain that
has no direction but noise stops before its step is divided by the size of that noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.optional import need
from regard.hosts.plain import record_modules
from regard.primitives.maps import class_scores, minmax

CARD = ExplanationCard(
    slug="ppgn",
    title="Plug and play generative networks",
    paper="Plug & Play Generative Networks: Conditional Iterative Generation of Images in Latent Space",
    exports=(
        "PPGN",
        "PPGNSamples",
        "PPGNTrace",
        "PPGNTerms",
        "class_condition",
        "unit_condition",
        "caption_condition",
    ),
    reads="cnn",
    takes={"generator": "generator", "encoder": "features", "condition": "condition"},
    calls="PPGN.sample",
    options={"eps": (0.1, 1.0, 0.1, 0.0), "code": (8, 8, 8), "target": 3, "steps": 3},
    figure=True,
)

# (images (B, C, h, w), target) -> (B,), differentiable in the images
Condition: TypeAlias = Callable[[Tensor, Any], Tensor]
# what a figure shows at most
_SHOWN, _ACROSS = 20, 10


@dataclass(frozen=True, eq=False)
class PPGNTerms:
    """What moves codes, before it is weighed by eps; a term that is not asked for is 0.

    scores: log p(y | image), (B,). prior, condition, context: (B, …), as the codes.
    """

    scores: Tensor
    prior: Tensor
    condition: Tensor
    context: Tensor


@dataclass(frozen=True, eq=False)
class PPGNTrace:
    """How T steps of B chains went.

    scores: log p(y | image) before each step and at the end, (T + 1, B). sizes: of each term, "prior", "condition", "context"
    and "noise", the mean magnitude once it is weighed by eps, (T, B). steps: how many each chain took, int64 (B,). stopped:
    why a chain took fewer than were asked for, one text a chain, "" for one that went to the end.
    """

    scores: Tensor
    sizes: Mapping[str, Tensor]
    steps: Tensor
    stopped: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PPGNSamples:
    """Images (B, C, h, w) of the last codes (B, …), as the encoder and the condition see them, and how they came about.

    `sample(…, init=samples.codes)` goes on from here.
    """

    images: Tensor
    codes: Tensor
    trace: PPGNTrace

    def figure(self) -> Any:
        """A plotly figure: the images of the first 20 chains, above their scores step by step. Raises MissingExtra."""
        graphs, subplots = need("plotly.graph_objects", "explain"), need("plotly.subplots", "explain")
        shown = min(len(self.images), _SHOWN)
        across, scores = min(shown, _ACROSS), self.trace.scores.float().cpu()
        down = -(-shown // across)
        titles = [f"chain {i}" for i in range(shown)]
        figure = subplots.make_subplots(
            down + 1, across, specs=[[{}] * across] * down + [[{"colspan": across}, *[None] * (across - 1)]],
            subplot_titles=[*titles, *[""] * (down * across - shown), "score, step by step"],
            row_heights=[1.0] * down + [1.5], vertical_spacing=0.2 / (down + 1), horizontal_spacing=0.01,
        )  # fmt: skip
        for i, image in enumerate(_pixels(self.images[:shown])):
            row, column = divmod(i, across)
            figure.add_trace(graphs.Image(z=image.numpy(), hoverinfo="skip"), row + 1, column + 1)
            line = graphs.Scatter(y=scores[:, i].tolist(), mode="lines", name=f"chain {i}", showlegend=False)
            figure.add_trace(line, down + 1, 1)
        for row in range(down):
            for column in range(across):
                figure.update_xaxes(visible=False, row=row + 1, col=column + 1)
                figure.update_yaxes(visible=False, row=row + 1, col=column + 1)
        return figure.update_layout(height=150 * (down + 2), width=max(500, 110 * across))


@dataclass(frozen=True, eq=False)
class PPGN:
    """Chains of codes whose images a condition answers to (equation 11).

    generator: codes (B, …) -> images (B, C, H, W). encoder: images (B, C, h, w) -> codes; None where eps1 is 0. condition:
    (images, target) -> (B,), such as `class_condition`. All run as they stand (eval mode is the caller's). eps: weights of
    prior, condition, noise and context, 0 or more; with normalize_step they only count beside each other. clip: codes stay
    within; None for anywhere. normalize_step: a step's mean magnitude over a code is lr. crop: (h, w), what is cut out of the
    middle of an image for encoder and condition. code: the shape of a code, that of `generator.code` if None. Raises
    OptionError, ShapeError.
    """

    generator: Callable[[Tensor], Tensor]
    encoder: Callable[[Tensor], Tensor] | None
    condition: Condition
    eps: tuple[float, float, float, float] = (1e-5, 1.0, 1e-17, 0.0)
    clip: tuple[float, float] | None = (0.0, 30.0)
    normalize_step: bool = True
    crop: tuple[int, int] | None = None
    code: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.eps) != 4 or not min(self.eps) >= 0:
            raise OptionError(f"eps are weights of prior, condition, noise and context, 0 or more, not {self.eps}")
        if self.encoder is None and self.eps[0]:
            raise OptionError("the prior reads codes off images: give an encoder, or eps=(0, …) to go without a prior")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise OptionError(f"clip is (low, high), not {self.clip}")

    def sample(
        self,
        target: Any,
        steps: int = 200,
        *,
        lr: tuple[float, float] = (1.0, 1.0),
        init: Tensor | None = None,
        mask: Tensor | None = None,
        image: Tensor | None = None,
        seed: int = 0,
    ) -> PPGNSamples:
        """Walk, one chain a row of the target.

        target: what the condition takes; one that is no tensor, or has no axis, holds for all rows of init, or for one. lr:
        size of the first step and what later ones tend to, linearly. init: codes (B, …) to start from; drawn from N(0, 1) if
        None. mask: bool, broadcast to (B, C, h, w), True where pixels of `image` (of the crop's size) are known: encoder and
        condition see these in place of the generator's, and eps4 draws the generator's to them. A chain stops where nothing
        but noise is left to move it (with normalize_step; else where nothing is), or where a term is not finite. Same
        seed, same chains. Raises OptionError where no gradient reaches the codes, or lr or steps cannot be; ShapeError.
        """
        if steps < 1 or not min(lr) >= 0:
            raise OptionError(f"steps is at least 1 and lr 0 or more, not {steps} and {lr}")
        h = self._start(target, init, seed)
        # apart from the start, so that a chain that goes on draws what one that begins draws
        draw = torch.Generator(h.device).manual_seed(seed + 1)
        going = torch.ones(len(h), dtype=torch.bool, device=h.device)
        taken, why = torch.zeros(len(h), dtype=torch.int64, device=h.device), [""] * len(h)
        scores, sizes = [], []
        for i in range(steps):
            terms = self.terms(h, target, mask=mask, image=image)
            noise = torch.randn(h.shape, generator=draw, device=h.device, dtype=h.dtype) * self.eps[2]
            weighed = [
                e * t for e, t in zip(self._shares(), (terms.prior, terms.condition, terms.context), strict=True)
            ]
            move = weighed[0] + weighed[1] + weighed[2]
            finite, moved = move.flatten(1).isfinite().all(1), (move != 0).flatten(1).any(1)
            moved = moved if self.normalize_step or not self.eps[2] else torch.ones_like(moved)
            for row in (going & ~(finite & moved)).nonzero().flatten().tolist():
                reason = "no gradient" if bool(finite[row]) else "not finite"
                why[row] = f"{reason} at step {i}"
            going = going & finite & moved
            scores.append(terms.scores)
            if not bool(going.any()):
                break
            sizes.append(torch.stack([_size(t) for t in (*weighed, noise)]))
            taken += going
            h = torch.where(_wide(going, h), self._stepped(h, move + noise, lr[0] + (lr[1] - lr[0]) * i / steps), h)
        with torch.no_grad():
            images, _, last = self._look(h, target, _context(mask, image))
        if len(scores) == len(sizes):
            scores.append(last)
        table = torch.stack(sizes) if sizes else h.new_zeros(0, 4, len(h))
        trace = PPGNTrace(
            torch.stack(scores),
            dict(zip(("prior", "condition", "context", "noise"), table.unbind(1), strict=True)),
            taken,
            tuple(why),
        )
        return PPGNSamples(images, h, trace)

    def terms(self, h: Tensor, target: Any, *, mask: Tensor | None = None, image: Tensor | None = None) -> PPGNTerms:
        """What would move these codes (B, …); arguments as of `sample`. Raises OptionError, ShapeError."""
        known = _context(mask, image)
        wants = (self.eps[1] > 0, self.eps[3] > 0 and known is not None)
        with torch.enable_grad():
            h = h.detach().requires_grad_(any(wants))
            images, seen, scores = self._look(h, target, known)
            condition = _slope(scores, h, "the condition") if wants[0] else torch.zeros_like(h)
            context = torch.zeros_like(h)
            if wants[1] and known is not None:
                off = torch.where(known[0], images - known[1], torch.zeros_like(images))
                context = _slope(-off.square().flatten(1).sum(1) / 2, h, "the generator")
        with torch.no_grad():
            prior = self._prior(h, seen) if self.eps[0] else torch.zeros_like(h)
        return PPGNTerms(scores.detach(), prior, condition, context)

    def _shares(self) -> tuple[float, float, float]:
        return self.eps[0], self.eps[1], self.eps[3]

    def _start(self, target: Any, init: Tensor | None, seed: int) -> Tensor:
        rows = len(target) if isinstance(target, Tensor) and target.dim() else None
        if init is None:
            shape = getattr(self.generator, "code", None) if self.code is None else self.code
            if shape is None:
                raise OptionError("the shape of a code is not known: give PPGN code=, or init=")
            weight = next(self.generator.parameters(), None) if isinstance(self.generator, nn.Module) else None
            like = torch.zeros(()) if weight is None else weight
            draw = torch.Generator(like.device).manual_seed(seed)
            size = (rows or 1, *((shape,) if isinstance(shape, int) else shape))
            init = torch.randn(size, generator=draw, device=like.device, dtype=like.dtype)
        if not init.is_floating_point() or init.dim() < 2 or (rows is not None and len(init) != rows):
            raise ShapeError(
                f"init is {tuple(init.shape)} of {init.dtype}; it must be codes (B, …), a row for each of the targets"
            )
        h = init.detach().clone()
        return h if self.clip is None else h.clamp(*self.clip)

    def _look(self, h: Tensor, target: Any, known: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Cropped images, what encoder and condition see of them, and the condition's scores."""
        images = self._cropped(self.generator(h), len(h))
        seen = images
        if known is not None:
            try:
                seen = torch.where(known[0], known[1].to(images), images)
            except RuntimeError as error:
                shapes = [tuple(t.shape) for t in known]
                raise ShapeError(
                    f"mask and image are {shapes}; they must fit images of {tuple(images.shape)}"
                ) from error
            if seen.shape != images.shape:
                raise ShapeError(f"mask and image make {tuple(seen.shape)} of images of {tuple(images.shape)}")
        scores = self.condition(seen, target)
        if not isinstance(scores, Tensor) or scores.shape != (len(h),):
            came = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ShapeError(f"the condition gives {came}; it must give ({len(h)},), one score a row")
        return images, seen, scores

    def _cropped(self, images: Tensor, rows: int) -> Tensor:
        if images.dim() != 4 or len(images) != rows:
            raise ShapeError(f"the generator gives {tuple(images.shape)}; it must give images ({rows}, C, H, W)")
        if self.crop is None:
            return images
        spare = [have - want for have, want in zip(images.shape[2:], self.crop, strict=True)]
        if min(spare) < 0 or min(self.crop) < 1:
            raise ShapeError(
                f"a crop of {self.crop[0]}x{self.crop[1]} does not fit into the generator's images of "
                f"{images.shape[2]}x{images.shape[3]}"
            )
        top, left = spare[0] // 2, spare[1] // 2
        return images[:, :, top : top + self.crop[0], left : left + self.crop[1]]

    def _prior(self, h: Tensor, seen: Tensor) -> Tensor:
        assert self.encoder is not None
        read = self.encoder(seen)
        if read.shape != h.shape:
            raise ShapeError(f"the encoder gives {tuple(read.shape)} for codes of {tuple(h.shape)}")
        prior = read - h
        # what is left by rounding is no direction, and would become a whole step
        rounding = 8 * torch.finfo(h.dtype).eps * h.abs().flatten(1).amax(1)
        return torch.where(_wide(prior.abs().flatten(1).amax(1) <= rounding, h), torch.zeros_like(h), prior)

    def _stepped(self, h: Tensor, move: Tensor, lr: float) -> Tensor:
        if self.normalize_step:
            # by its largest number first, so that the mean of tiny ones is not 0
            move = move / _wide(move.abs().flatten(1).amax(1), h)
            move = move / _wide(_size(move), h)
        h = h + lr * move
        return h if self.clip is None else h.clamp(*self.clip)


def class_condition(classifier: Callable[[Tensor], Any]) -> Condition:
    """log p(class | image) of a network that gives logits (B, classes), or has them as `.logits`.

    Its targets: a class, or one a row, int64 (B,). Raises OptionError for a class that is not there.
    """

    def score(images: Tensor, target: Any) -> Tensor:
        output = classifier(images)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        chosen, _ = class_scores(output, _chosen(target))
        assert logits is not None
        return chosen - logits.logsumexp(-1)

    return score


def unit_condition(model: nn.Module, layer: str, *, place: tuple[int, int] | None = None) -> Condition:
    """The activation of a unit inside a network.

    layer: the name of a module that gives (B, C), or (B, C, h, w), of which `place` (y, x) is read. Its targets: a unit, or
    one a row, int64 (B,). Raises OptionError, ShapeError, Unsupported.
    """

    def score(images: Tensor, target: Any) -> Tensor:
        tape = record_modules(model, images, (layer,), grads=True)
        if tape.steps() != 1:
            raise Unsupported(f"the module {layer!r} ran {tape.steps()} times in one pass; name one that runs once")
        value = tape[layer, 0]
        if value.dim() == 4:
            value = _at(value, place, layer)
        elif place is not None or value.dim() != 2:
            raise ShapeError(f"{layer!r} gives {tuple(value.shape)}; it must give (B, C), or (B, C, h, w) and place=")
        return class_scores(value, _chosen(target))[0]

    return score


def caption_condition(next_word: Callable[[Tensor, Tensor], Tensor], *, start: int = 0) -> Condition:
    """log p(caption | image), the sum over its words.

    next_word: (images, words so far int64 (B, L)) -> logits (B, L, V) of the word after each, causal. start: the word before
    the first. Its targets: captions int64 (B, L), with the word that ends them where there is one. Raises OptionError,
    ShapeError.
    """

    def score(images: Tensor, target: Any) -> Tensor:
        words = torch.as_tensor(target, device=images.device)
        if words.dim() != 2 or len(words) != len(images) or words.is_floating_point() or not words.numel():
            raise ShapeError(f"captions are {tuple(words.shape)} {words.dtype}; they must be int64 ({len(images)}, L)")
        before = torch.cat((words.new_full((len(words), 1), start), words[:, :-1]), 1)
        logits = next_word(images, before)
        if logits.dim() != 3 or logits.shape[:2] != words.shape:
            raise ShapeError(f"next_word gives {tuple(logits.shape)} for words of {tuple(words.shape)}")
        if int(words.min()) < 0 or int(words.max()) >= logits.shape[2]:
            raise OptionError(f"there are words 0 to {logits.shape[2] - 1}; the captions have others")
        return logits.log_softmax(-1).gather(2, words[..., None])[..., 0].sum(1)

    return score


def _chosen(target: Any) -> Any:
    if target is None or (callable(target) and not isinstance(target, Tensor)):
        raise OptionError("the target is a number, or one a row, int64 (B,)")
    return target


def _at(maps: Tensor, place: tuple[int, int] | None, layer: str) -> Tensor:
    height, width = maps.shape[2:]
    if place is None or not (0 <= place[0] < height and 0 <= place[1] < width):
        raise OptionError(f"{layer!r} gives maps of {height}x{width}: give place=(y, x) within, not {place}")
    return maps[:, :, place[0], place[1]]


def _context(mask: Tensor | None, image: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if mask is None and image is None:
        return None
    if mask is None or image is None:
        raise OptionError("mask= says which pixels of image= are known: give both, or neither")
    if mask.dtype != torch.bool:
        raise ShapeError(f"mask is of {mask.dtype}; it must be bool, True where a pixel is known")
    return mask, image


def _slope(scores: Tensor, h: Tensor, through: str) -> Tensor:
    """d scores / d h; rows do not mix, so that the sum keeps their gradients apart."""
    if scores.requires_grad:
        (gradient,) = torch.autograd.grad(scores.sum(), h, retain_graph=True, allow_unused=True)
        if gradient is not None:
            return gradient
    raise OptionError(
        f"no gradient reaches the codes through {through}: what is plugged in must be differentiable, without detach, "
        "no_grad or argmax"
    )


def _size(x: Tensor) -> Tensor:
    return x.abs().flatten(1).mean(1)


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.view(-1, *(1,) * (like.dim() - 1))


def _pixels(images: Tensor) -> Tensor:
    """uint8 (B, h, w, 3), each image from its darkest to its brightest; grey levels unless there are three channels."""
    x = (
        images.float().cpu()
        if images.shape[1] == 3
        else images.float().cpu().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    )
    levels = minmax(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
    return (255 * levels).round().to(torch.uint8).permute(0, 2, 3, 1)
