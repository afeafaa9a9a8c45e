"""Layer-wise relevance propagation: a score shared out, layer by layer, among what it was made of.

    epsilon    R_i = x_i sum_j w_ij R_j / (z_j + eps sign z_j),   z = W x + b
    zplus      the same with positive contributions alone, no bias;   alphabeta  alpha zplus - beta its negative twin
    zb         R_i = sum_j (x_i w_ij - l w+_ij - h w-_ij) R_j / z_j, for pixels between l and h
    winner     all to the largest;   pass  as it comes, through ReLU

Nothing is hooked: the network is traced, run part by part, and walked back. Departs from the released code: zplus also
serves negative inputs, eps has z's sign, and the normalisation of batches is merged into the layer before it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, Unsupported, near
from regard.explain.saliency.map_view import MapView
from regard.primitives.maps import Target, class_scores, minmax

CARD = ExplanationCard(
    slug="lrp",
    title="Layer-wise relevance propagation",
    part_of="salient_relevance",
    paper="Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise relevance "
    "propagation",
    exports=("lrp", "Relevance"),
    reads="cnn",
    takes={"model": "model", "x": "images"},
    figure=True,
    builds_on=("map_view",),
)

# a rule's name, (name, its settings …), or a function (module, x, output, relevance of output) -> relevance of x
Rule = str | tuple[Any, ...] | Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

_LINEAR = (nn.Linear,)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_MEANS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_PASSED = (nn.ReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_SHAPED = (nn.Flatten, nn.Unflatten)
_PAPER = {"linear": "zplus", "conv": "epsilon", "max": "winner", "mean": "epsilon"}
_RULES = ("epsilon", "zplus", "alphabeta", "zb", "winner", "pass")
# functions and methods that a traced network may call
_ADDED = {operator.add, operator.iadd, torch.add, "add", "add_"}
_JOINED = {torch.cat, torch.concat}
_PASSED_CALLS = {torch.relu, F.relu, F.dropout, "relu", "contiguous", "clone"}
_SHAPED_CALLS = {torch.flatten, "flatten", "view", "reshape", "squeeze", "unsqueeze", torch.squeeze, torch.unsqueeze}
_MEAN_CALLS = {torch.mean, "mean", F.avg_pool2d, F.adaptive_avg_pool2d}
_MAX_CALLS = {F.max_pool2d, F.adaptive_max_pool2d}


@dataclass(frozen=True, eq=False)
class Relevance:
    """Relevance of the input, its shape; score: (B,) what was explained; classes: (B,), None for a function's score.

    layers: the sum of relevance that reached each module, (B,), by name, from the output on. What biases and eps took is
    score - relevance.sum().
    """

    relevance: Tensor
    score: Tensor
    classes: Tensor | None
    layers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def pixels(self) -> Tensor:
        """The pixel map of the paper: absolute value of the sum over channels, each map between 0 and 1, (B, 1, H, W)."""
        return minmax(self.relevance.sum(1, keepdim=True).abs())

    def figure(self) -> Any:
        """The sum over channels, a heat map a row of the batch. Raises MissingExtra without plotly."""
        return MapView(self.relevance.sum(1, keepdim=True)).figure()


def lrp(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    *,
    rules: Literal["paper"] | Mapping[str, Rule] = "paper",
    eps: float = 1e-9,
) -> Relevance:
    """Share a score out among the input's entries, by the rules of every layer.

    model: in eval mode, one that torch.fx can trace: convolutions, linear layers, pooling, ReLU, sums, joins; nothing of it is
    changed. x: (B, …). target: a class, one a row, a function of the output that gives (B,), or None for the likeliest class.
    rules: "paper" is zplus for linear layers, epsilon for convolutions and means, winner for maxima; or what differs from
    that by kind ("linear", "conv", "max", "mean"), by a module's class ("GELU") or name ("features.0"), the name first. A rule
    is "epsilon", "zplus", "alphabeta" or ("alphabeta", alpha, beta) with alpha - beta = 1, 2 and 1 if not given, "zb" or
    ("zb", low, high), the input's own range if not given, "winner", "pass", or a function. eps: keeps denominators from 0,
    with their sign. Raises Unsupported for a part without a rule, OptionError.
    """
    if eps < 0:
        raise OptionError(f"eps is 0 or more, not {eps}")
    chosen = _checked({} if isinstance(rules, str) and rules == "paper" else rules)
    walk = _Walk(model, _traced(model, chosen), chosen, eps)
    with torch.no_grad():
        output = walk.forward(x)
    with torch.enable_grad():
        end = output.detach().requires_grad_()
        score, classes = class_scores(end, target)
        (slope,) = torch.autograd.grad(score.sum(), end)
    with torch.no_grad():
        # a class's logit stands where it came out; of other scores, the part that is linear in the output
        relevance = walk.backward(end.detach() * slope)
    return Relevance(relevance, score.detach(), classes, walk.sums)


class _Tracer(fx.Tracer):
    """Stops at modules that have a rule by name or class, whatever they hold."""

    def __init__(self, rules: Mapping[str, Rule]):
        super().__init__()
        self.rules = rules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        named = module_qualified_name in self.rules or type(m).__name__ in self.rules
        return named or super().is_leaf_module(m, module_qualified_name)


def _checked(rules: Any) -> dict[str, Rule]:
    if not isinstance(rules, Mapping):
        raise OptionError(f'rules is "paper" or a mapping such as {{"conv": "zplus"}}, not {rules!r}')
    for where, rule in rules.items():
        name, *settings = rule if isinstance(rule, tuple) else (rule,)
        if callable(name):
            continue
        if name not in _RULES:
            raise OptionError(f"there is no rule {name!r}{near(str(name), _RULES)}, given for {where!r}")
        if len(settings) not in ((0, 2) if name in ("alphabeta", "zb") else (0,)):
            raise OptionError(f"the rule {name!r} takes no such settings: {settings}")
        if name == "alphabeta" and settings and abs(settings[0] - settings[1] - 1) > 1e-9:
            raise OptionError(f"alpha - beta is 1, so that relevance is kept, not {settings[0]} - {settings[1]}")
        if name == "zb" and settings and not settings[0] <= 0 <= settings[1]:
            raise OptionError(f"zb needs low <= 0 <= high, not {settings}")
    return dict(rules)


def _traced(model: nn.Module, rules: Mapping[str, Rule]) -> fx.Graph:
    names, classes = dict(model.named_modules()), {type(m).__name__ for m in model.modules()}
    known = {*_PAPER, *names, *classes}
    for where in rules:
        if where not in known:
            raise OptionError(f"rules name {where!r}, which is no kind, module or class here{near(where, known)}")
    for name, module in names.items():
        if module.training and isinstance(module, (*_NORMS, nn.modules.dropout._DropoutNd)):
            raise OptionError(f"the module {name!r} is in training mode; call model.eval() first")
    try:
        return _Tracer(rules).trace(model)
    except Exception as error:
        raise Unsupported(
            f"torch.fx cannot trace {type(model).__name__}, so that its layers are not known: {error}"
        ) from error


class _Walk:
    """One pass through a traced network, and the way back with what came out."""

    def __init__(self, model: nn.Module, graph: fx.Graph, rules: Mapping[str, Rule], eps: float):
        self.model, self.graph, self.rules, self.eps = model, graph, rules, eps
        self.modules = dict(model.named_modules())
        self.values: dict[fx.Node, Any] = {}
        self.sums: dict[str, Tensor] = {}
        # batch norm -> the layer before it, which it is merged into
        self.merged = {n.args[0]: n for n in graph.nodes if self._is(n, _NORMS) and self._only_for(n)}

    def forward(self, x: Tensor) -> Tensor:
        """What the network returns; every value on the way is kept."""
        given = iter((x,))
        for node in self.graph.nodes:
            args, kwargs = (fx.node.map_arg(a, lambda n: self.values[n]) for a in (node.args, node.kwargs))
            if node.op == "placeholder":
                if (value := next(given, None)) is None:
                    if not node.args:
                        raise Unsupported(
                            f"{type(self.model).__name__} takes more than one input; relevance is for one"
                        )
                    value = node.args[0]
            elif node.op == "get_attr":
                value = operator.attrgetter(node.target)(self.model)
            elif node.op == "output":
                value = args[0]
            else:
                if _in_place(node) and not node.users:
                    raise Unsupported(
                        f"{node.target} changes a value in place without a name for it: write x = x.{node.target}"
                    )
                # parts that work in place would change what is kept
                args, kwargs = (fx.node.map_aggregate(a, _copied) for a in (args, kwargs))
                value = self._call(node, args, kwargs)
            self.values[node] = value
        if not isinstance(value, Tensor):
            raise Unsupported(f"{type(self.model).__name__} returns a {type(value).__name__}; one tensor is needed")
        return value

    def backward(self, relevance: Tensor) -> Tensor:
        """The input's share of the output's relevance."""
        reached: dict[fx.Node, Tensor] = {}

        def give(node: Any, share: Tensor) -> None:
            if isinstance(node, fx.Node):
                reached[node] = reached[node] + share if node in reached else share

        for node in reversed(self.graph.nodes):
            if node.op == "output":
                give(node.args[0], relevance)
            if node.op in ("output", "placeholder", "get_attr") or node not in reached:
                continue
            r = reached.pop(node)
            if node.op == "call_module":
                self.sums[node.name if node.target in self.sums else node.target] = r.flatten(1).sum(1)
                give(node.args[0] if node.args else next(iter(node.kwargs.values())), self._of_module(node, r))
            else:
                for source, share in self._of_call(node, r):
                    give(source, share)
        entry = next(node for node in self.graph.nodes if node.op == "placeholder")
        return reached.get(entry, torch.zeros_like(self.values[entry]))

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            return self.modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _is(self, node: Any, kinds: tuple[type, ...]) -> bool:
        return (
            isinstance(node, fx.Node) and node.op == "call_module" and isinstance(self.modules[str(node.target)], kinds)
        )

    def _only_for(self, norm: fx.Node) -> bool:
        before = norm.args[0] if norm.args else None
        return self._is(before, (*_LINEAR, *_CONVOLUTIONS)) and len(before.users) == 1  # type: ignore[union-attr]

    def _of_module(self, node: fx.Node, r: Tensor) -> Tensor:
        name, module = str(node.target), self.modules[str(node.target)]
        x = self.values[node.args[0] if node.args else next(iter(node.kwargs.values()))]  # type: ignore[index]
        kind = type(module).__name__
        if name in self.rules or kind in self.rules:
            rule = self.rules[name] if name in self.rules else self.rules[kind]
        elif isinstance(module, _PASSED) or (isinstance(module, _NORMS) and node in self.merged.values()):
            rule = "pass"
        elif isinstance(module, _SHAPED):
            return _pulled(module, x, r)
        else:
            kinds = {"linear": _LINEAR, "conv": _CONVOLUTIONS, "max": _MAXIMA, "mean": _MEANS}
            of = next((k for k, members in kinds.items() if isinstance(module, members)), None)
            if of is None:
                reason = (
                    "it follows no layer that it can be merged into" if isinstance(module, _NORMS) else "it is none of "
                )
                reason += "" if isinstance(module, _NORMS) else "convolution, linear layer, pooling, ReLU"
                raise Unsupported(
                    f"there is no relevance rule for {kind}, the module {name!r}: {reason}; pass "
                    f'rules={{"{kind}": "epsilon"}}, "pass", or a function (module, x, output, relevance)'
                )
            rule = self.rules.get(of, _PAPER[of])
        if callable(rule):
            return rule(module, x, self.values[node], r)
        word, *settings = rule if isinstance(rule, tuple) else (rule,)
        if word == "pass":
            if self.values[node].shape != x.shape:
                raise OptionError(f'"pass" needs a module that keeps the shape; {name!r} does not')
            return r
        if word == "winner":
            if not isinstance(module, _MAXIMA):
                raise OptionError(f'"winner" is a rule for maxima; {name!r} is a {kind}')
            return _pulled(module, x, r)
        if not isinstance(module, (*_LINEAR, *_CONVOLUTIONS)):
            if word != "epsilon":
                raise OptionError(f"{word!r} is a rule for weights; {name!r} is a {kind}")
            return self._epsilon(module, x, r)
        layer, weight, bias = self._weights(node, module)
        if word == "epsilon":
            return self._epsilon(lambda t: layer(t, weight, bias), x, r)
        if word == "zb":
            return self._bounded(layer, weight, x, r, settings)
        return self._signed(layer, weight, x, r, *(settings or {"zplus": (1.0, 0.0), "alphabeta": (2.0, 1.0)}[word]))

    def _of_call(self, node: fx.Node, r: Tensor) -> list[tuple[Any, Tensor]]:
        target: Any = node.target
        if target in _ADDED and not node.kwargs:
            s = self._quotient(r, self.values[node])
            parts = [(n, self.values[n]) for n in node.args[:2] if isinstance(n, fx.Node)]
            return [(n, (value * s).sum_to_size(value.shape)) for n, value in parts if isinstance(value, Tensor)]
        if target in _JOINED:
            nodes: Any = node.args[0]
            axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            sizes = [self.values[n].shape[axis] for n in nodes]
            return list(zip(nodes, r.split(sizes, axis), strict=True))
        source: Any = node.args[0] if node.args else None

        def again(t: Tensor) -> Tensor:
            rest: Any = fx.node.map_arg(node.args[1:], lambda n: self.values[n])
            kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: self.values[n])
            return self._call(node, (t, *rest), {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs)

        if target in _PASSED_CALLS:
            return [(source, r)]
        if target in _SHAPED_CALLS or target in _MAX_CALLS:
            return [(source, _pulled(again, self.values[source], r))]
        if target in _MEAN_CALLS:
            return [(source, self._epsilon(again, self.values[source], r))]
        name = getattr(target, "__name__", target)
        raise Unsupported(
            f"there is no relevance rule for the call of {name}; make it a module, and pass rules= for it"
        )

    def _weights(self, node: fx.Node, module: Any) -> tuple[Callable[..., Tensor], Tensor, Tensor | None]:
        """(function of x, weight, bias), the batch norm behind it merged in."""
        linear = isinstance(module, _LINEAR)
        layer = F.linear if linear else module._conv_forward
        norm = self.merged.get(node)
        if norm is None:
            return layer, module.weight, module.bias
        n: Any = self.modules[str(norm.target)]
        if n.running_mean is None:
            raise Unsupported(f"the batch norm {norm.target!r} has no running statistics to merge")
        fuse = fuse_linear_bn_weights if linear else fuse_conv_bn_weights
        weight, bias = fuse(module.weight, module.bias, n.running_mean, n.running_var, n.eps, n.weight, n.bias)
        return layer, weight, bias

    def _quotient(self, r: Tensor, z: Tensor) -> Tensor:
        """r / z, the denominator kept from 0; what has no denominator at all is lost."""
        z = z + self.eps * torch.where(z < 0, -1.0, 1.0).to(z.dtype)
        return torch.where(z == 0, torch.zeros_like(r), r / torch.where(z == 0, torch.ones_like(z), z))

    def _epsilon(self, function: Callable[[Tensor], Tensor], x: Tensor, r: Tensor) -> Tensor:
        return x * _pulled(function, x, lambda z: self._quotient(r, z))

    def _signed(
        self, layer: Callable[..., Tensor], weight: Tensor, x: Tensor, r: Tensor, alpha: float, beta: float
    ) -> Tensor:
        """alpha times the shares of positive contributions, less beta times those of negative ones."""
        positive = [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]
        z = _summed(layer, positive)
        if beta == 0:
            return _shared(layer, positive, self._quotient(alpha * r, z))
        negative = [(x.clamp(min=0), weight.clamp(max=0)), (x.clamp(max=0), weight.clamp(min=0))]
        below = _summed(layer, negative)
        # where all contributions have one sign, they get everything
        for_positive = torch.where(below == 0, r, torch.where(z == 0, torch.zeros_like(r), alpha * r))
        given = _shared(layer, positive, self._quotient(for_positive, z))
        return given + _shared(layer, negative, self._quotient(r - for_positive, below))

    def _bounded(
        self, layer: Callable[..., Tensor], weight: Tensor, x: Tensor, r: Tensor, bounds: Sequence[float]
    ) -> Tensor:
        low, high = bounds or (min(float(x.min()), 0.0), max(float(x.max()), 0.0))
        # minus the bound times a weight is the bound times minus the weight
        parts = [
            (x, weight),
            (torch.full_like(x, low), -weight.clamp(min=0)),
            (torch.full_like(x, high), -weight.clamp(max=0)),
        ]
        return _shared(layer, parts, self._quotient(r, _summed(layer, parts)))


def _summed(layer: Callable[..., Tensor], parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([layer(x, weight, None) for x, weight in parts]).sum(0)


def _shared(layer: Callable[..., Tensor], parts: Sequence[tuple[Tensor, Tensor]], s: Tensor) -> Tensor:
    """The sum over parts of x times s through the transposed layer."""
    return torch.stack([x * _pulled(partial(layer, weight=weight, bias=None), x, s) for x, weight in parts]).sum(0)


def _in_place(node: fx.Node) -> bool:
    return node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _pulled(function: Callable[[Tensor], Tensor], x: Tensor, s: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
    """s, or s of function(x), through the transposed derivative of a function at x."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        # the function may work in place
        z = function(at.clone())
        return torch.autograd.grad(z, at, s if isinstance(s, Tensor) else s(z.detach()))[0]
