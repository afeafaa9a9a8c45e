"""How much a map depends on the class that it explains, and a step of learning that makes it depend more.

    class sensitivity   correlation of the maps of the likeliest and the least likely class, low is good
    meta-saliency       map after  w <- w - lr d cross-entropy(class) / d w,  the weights then put back

Both take any method, a function (model, images, classes) -> maps (B, 1, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError
from regard.contract.optional import need
from regard.primitives.maps import class_scores

CARD = ExplanationCard(
    slug="meta_saliency",
    title="Meta-saliency and class sensitivity of maps",
    part_of="normgrad",
    paper="There and Back Again: Revisiting Backpropagation Saliency Methods",
    exports=("meta_saliency", "class_sensitivity", "ClassSensitivity"),
    reads="cnn",
    takes={"method": "method", "model": "model", "x": "images"},
    options={"lr": 0.1},
)

Inputs = Mapping[str, Any] | Tensor
Method = Callable[[Any, Any, Any], Tensor]


def meta_saliency(
    method: Method,
    model: nn.Module,
    x: Inputs,
    target: int | Tensor | None = None,
    *,
    lr: float = 1e-4,
    steps: int = 1,
    difference: bool = False,
) -> Tensor:
    """What a method says after steps of gradient descent on the cross-entropy of the target (section 5).

    method: `partial(normgrad, layer="layer4")`, or any (model, x, classes) -> (B, 1, h, w). Each row is learned by itself, in
    eval mode; then weights, buffers and modes are as before, bit for bit, also after an error. lr: 0 is the method itself.
    difference: what changed, updated - plain. Raises OptionError.
    """
    if lr < 0 or steps < 1:
        raise OptionError(f"lr is 0 or more and steps at least 1, not {lr} and {steps}")
    if callable(target) and not isinstance(target, Tensor):
        raise OptionError("the cross-entropy needs classes: target= cannot be a function here")
    maps = []
    with _restored(model) as restore:
        model.eval()
        with torch.no_grad():
            classes = class_scores(_run(model, x), target)[1]
        assert classes is not None
        for i in range(len(classes)):
            row, label = _row(x, i), classes[i : i + 1]
            plain = method(model, row, label) if difference else None
            for _ in range(steps):
                _descend(model, row, label, lr)
            after = method(model, row, label)
            maps.append(after if plain is None else after - plain)
            restore()
    return torch.cat(maps)


@dataclass(frozen=True, eq=False)
class ClassSensitivity:
    """How alike the maps of the likeliest and the least likely class are: correlation (B,), -1 to 1, low is sensitive.

    most, least: these classes, (B,). Two maps without any contrast are alike (1), one of them is not (0).
    """

    correlation: Tensor
    most: Tensor
    least: Tensor

    @property
    def mean(self) -> float:
        """The mean over rows."""
        return float(self.correlation.mean())

    def figure(self) -> Any:
        """A histogram over rows. Raises MissingExtra without plotly."""
        graphs = need("plotly.graph_objects", "bench")
        figure = graphs.Figure(
            graphs.Histogram(x=self.correlation.tolist(), xbins={"start": -1, "end": 1, "size": 0.1})
        )
        return figure.update_layout(
            title="Maps of the likeliest and the least likely class", xaxis_title="correlation", yaxis_title="images"
        )


def class_sensitivity(method: Method, model: nn.Module, x: Inputs) -> ClassSensitivity:
    """Compare a method's maps for the likeliest and the least likely class (section 5). method: as of `meta_saliency`."""
    with torch.no_grad():
        output = _run(model, x)
        _, most = class_scores(output)
        logits = output if isinstance(output, Tensor) else output.logits
        least = logits.argmin(-1)
    assert most is not None
    first, second = (method(model, x, classes).flatten(1).double() for classes in (most, least))
    first, second = (m - m.mean(1, keepdim=True) for m in (first, second))
    # a map whose spread is rounding says nothing
    flat = [m.norm(dim=1) <= 1e-12 * (1 + m.abs().amax(1)) for m in (first, second)]
    cosine = F.cosine_similarity(first, second, dim=1, eps=0.0)
    correlation = torch.where(flat[0] | flat[1], (flat[0] & flat[1]).double(), cosine)
    return ClassSensitivity(correlation.float(), most, least)


def _run(model: Any, x: Inputs) -> Any:
    if not isinstance(x, Tensor):
        return model(**x)
    return model(x)


def _row(x: Inputs, i: int) -> Inputs:
    if isinstance(x, Tensor):
        return x[i : i + 1]
    return {name: value[i : i + 1] if isinstance(value, Tensor) else value for name, value in x.items()}


def _descend(model: nn.Module, x: Inputs, label: Tensor, lr: float) -> None:
    output = _run(model, x)
    parameters = list(model.parameters())
    loss = F.cross_entropy(output if isinstance(output, Tensor) else output.logits, label)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(gradient, alpha=lr)


@contextmanager
def _restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Weights that all require gradients; the function given, and leaving the block, bring the values back."""
    parameters = list(model.parameters())
    buffers = [(module, name, b) for module in model.modules() for name, b in module._buffers.items() if b is not None]
    tensors = [*parameters, *(b for _, _, b in buffers)]
    values = [tensor.detach().clone() for tensor in tensors]
    wanted, modes = [p.requires_grad for p in parameters], [(m, m.training) for m in model.modules()]

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for module, name, buffer in buffers:
            module._buffers[name] = buffer

    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(parameter.is_floating_point())
            yield restore
    finally:
        restore()
        for parameter, want in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(want)
        for module, mode in modes:
            module.training = mode
