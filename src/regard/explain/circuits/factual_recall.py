"""How a model recalls a fact: what each part says of the answer, what a feed-forward part makes of the heads, what comes last.

    logit(answer) = sum over parts of W_answer norm(part) + bias,      norm with its scale kept
    m_i           = sum_h alpha_h o_hi + beta r_i + c + rest_i          over prompts i, by least squares

o and r are heads' outputs and the earlier stream as the feed-forward part gets them, behind its norm: alpha_h > 0 amplifies
what head h says, alpha_h < 0 erases it; c is what it says to all prompts alike.
Departs from the paper: its regressors could not be checked in the released code (notebooks); here one number a source,
shared by all prompts, and always an r2 of prompts that were not fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from regard.contract.attach import open_session
from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.optional import need
from regard.hosts.contributions import FrozenNorm, freeze_norm, head_outputs
from regard.hosts.lens import lens
from regard.hosts.tape import Tape

CARD = ExplanationCard(
    slug="factual_recall",
    title="Mechanisms of factual recall",
    paper="Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models",
    exports=(
        "direct_logit_attribution",
        "LogitAttribution",
        "decompose_mlp",
        "fit_sources",
        "MLPDecomposition",
        "last_layer_shift",
        "LastLayerShift",
    ),
    reads="llama",
    takes={"model": "model", "tape": "tape", "tokens": "next tokens"},
    figure=True,
)

Sources = Literal["heads", "heads+resid"]
# norms before the attention, which the feed-forward part shares where both read the same stream
_SHARED_NORMS = ("input_layernorm", "ln_1", "layernorm_before", "norm1")


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What the parts of a model say of a token, or of its difference to another, each (B, …); their sum is the logit.

    embed (B,), heads (B, L, H), biases (B, L) of the output projections, mlp (B, L), bias (B,) of final norm and output.
    """

    embed: Tensor
    heads: Tensor
    biases: Tensor
    mlp: Tensor
    bias: Tensor

    @property
    def total(self) -> Tensor:
        """The logit, or the difference of two, (B,)."""
        return self.embed + self.heads.sum((1, 2)) + self.biases.sum(1) + self.mlp.sum(1) + self.bias

    @property
    def accumulated(self) -> Tensor:
        """What the embeddings alone say, and with each layer added, (B, L + 1); the last and `bias` are the total."""
        layers = self.heads.sum(2) + self.biases + self.mlp
        return torch.cat((self.embed.unsqueeze(1), layers), 1).cumsum(1)

    def figure(self) -> Any:
        """A plotly figure of the mean over rows: layers down, heads and then feed-forward across. Raises MissingExtra."""
        go = need("plotly.graph_objects", "explain")
        values = torch.cat((self.heads.mean(0), self.mlp.mean(0)[:, None]), 1).float().cpu()
        most = float(values.abs().max())
        names = [*(f"head {h}" for h in range(values.shape[1] - 1)), "mlp"]
        figure = go.Figure(go.Heatmap(z=values.numpy(), x=names, colorscale="RdBu", zmin=-most, zmax=most))
        figure.update_yaxes(title="layer", autorange="reversed", dtick=1)
        return figure


@dataclass(frozen=True, eq=False)
class MLPDecomposition:
    """A feed-forward part as a sum of its sources.

    coefficients (S,) of `sources`: "head 0", …, and "resid". intercept (C,): what it says to all prompts alike. r2, held_out:
    the share of its variance over prompts that is explained, of the prompts fitted and of others. parallel: the part does not
    read its layer's heads, and stands on the earlier stream alone.
    """

    sources: tuple[str, ...]
    coefficients: Tensor
    intercept: Tensor
    r2: float
    held_out: float
    parallel: bool = False

    def figure(self) -> Any:
        """A plotly figure: a bar for each source. Raises MissingExtra."""
        go = need("plotly.graph_objects", "explain")
        figure = go.Figure(go.Bar(x=list(self.sources), y=self.coefficients.tolist()))
        figure.update_layout(title=f"r2 {self.r2:.2f}, held out {self.held_out:.2f}", yaxis={"title": "coefficient"})
        return figure


@dataclass(frozen=True, eq=False)
class LastLayerShift:
    """What the last layer makes of an answer, and what it would be without one of its parts.

    stages: "before", "attention", "mlp": probability and rank (B, 3), rank 0 the likeliest, after each. parts: "head 0", …,
    "attention", "mlp": probability_without, rank_without (B, P), the last stream without that part.
    """

    stages: tuple[str, ...]
    probability: Tensor
    rank: Tensor
    parts: tuple[str, ...]
    probability_without: Tensor
    rank_without: Tensor

    @property
    def suppression(self) -> Tensor:
        """How much likelier the answer is without each part, the mean over rows (P,): above 0, it is held down."""
        return (self.probability_without - self.probability[:, -1:]).mean(0)

    def figure(self) -> Any:
        """A plotly figure: the mean probability after each stage and without each part. Raises MissingExtra."""
        go = need("plotly.graph_objects", "explain")
        figure = go.Figure()
        for names, values in ((self.stages, self.probability), (self.parts, self.probability_without)):
            kind = "after" if names is self.stages else "without"
            figure.add_trace(go.Bar(x=[f"{kind} {name}" for name in names], y=values.mean(0).tolist(), name=kind))
        figure.update_layout(yaxis={"title": "probability of the answer"})
        return figure


@torch.no_grad()
def direct_logit_attribution(
    model: Any, tape: Tape, tokens: Tensor, wrong: Tensor | None = None, *, position: int = -1
) -> LogitAttribution:
    """What each part says of a token at one place: the final norm's scale is kept, so that parts add up.

    tape: with embed, z, mlp_out, resid_post, logits. tokens: int64 (B,). wrong: int64 (B,), whose logit is taken away.
    Raises OptionError, ShapeError; Unsupported for a model whose parts do not add up to its logits.
    """
    _need(tape, "embed", "z", "mlp_out", "resid_post", "logits")
    last = tape["resid_post", -1][:, position]
    direction = _answers(model, tokens, len(last))
    output = model.get_output_embeddings()
    bias = getattr(output, "bias", None)
    said = torch.zeros(len(last), dtype=last.dtype, device=last.device) if bias is None else bias[tokens]
    if wrong is not None:
        direction = direction - _answers(model, wrong, len(last))
        said = said if bias is None else said - bias[wrong]
    norm = freeze_norm(open_session(model, ()).anatomy.main.final, last)
    heads, biases, mlps = [], [], []
    for layer in range(tape.meta["layers"]):
        parts = head_outputs(model, tape, layer)
        heads.append(_said(norm, parts.heads[:, position], direction))
        biases.append(_said(norm, parts.rest[:, position], direction))
        mlps.append(_said(norm, tape["mlp_out", layer][:, position], direction))
    made = LogitAttribution(
        _said(norm, tape["embed", 0][:, position], direction), torch.stack(heads, 1), torch.stack(biases, 1),
        torch.stack(mlps, 1), said + direction @ norm.bias,
    )  # fmt: skip
    logits = tape["logits", 0][:, position]
    rows = torch.arange(len(logits), device=logits.device)
    true = logits[rows, tokens] - (0 if wrong is None else logits[rows, wrong])
    allowed = max(1e-3, 8 * torch.finfo(logits.dtype).eps)
    if (made.total - true).abs().max() > allowed * logits.abs().max():
        raise Unsupported(
            f"the parts of {type(model).__name__} add up to {made.total[0]:.4g}, and its logit is {true[0]:.4g}: it scales "
            "streams or logits by something that is not known here"
        )
    return made


@torch.no_grad()
def decompose_mlp(
    model: Any,
    tape: Tape,
    layer: int,
    *,
    position: int = -1,
    sources: Sources = "heads+resid",
    held_out: float = 0.25,
    seed: int = 0,
) -> MLPDecomposition:
    """Write what the feed-forward part of a layer says at one place as a sum of the heads of its layer and the rest.

    tape: of several prompts of one form, with z, resid_pre, mlp_out, and resid_mid where the model has it. sources: the
    heads of the layer, and the stream before it (with the bias of the projection). held_out: the share of prompts that are
    not fitted, drawn by `seed`. A part that reads the stream beside attention is written by the stream before both
    (`parallel`). Raises OptionError for too few prompts; Unsupported.
    """
    if sources not in get_args(Sources):
        raise OptionError(f'sources is "heads" or "heads+resid", not {sources!r}')
    _need(tape, "z", "resid_pre", "mlp_out")
    stack = open_session(model, ()).anatomy.main
    place = stack.layers[layer]
    parts = head_outputs(model, tape, layer)
    parallel = _is_parallel(model, tape, layer, parts.heads.sum(2) + parts.rest)
    before, heads, rest = tape["resid_pre", layer][:, position], parts.heads[:, position], parts.rest[:, position]
    norm: nn.Module | None = place.before_mlp
    if norm is None:
        norm = next((m for n in _SHARED_NORMS if isinstance(m := getattr(place.module, n, None), nn.Module)), None)
    if norm is None:
        raise Unsupported(f"{type(model).__name__} has no norm before its feed-forward part that was recognised")
    if parallel:
        given = freeze_norm(norm, before)(before).unsqueeze(1)
        names: tuple[str, ...] = ("resid",)
    else:
        frozen = freeze_norm(norm, before + heads.sum(1) + rest)
        given = FrozenNorm(frozen.gain, frozen.bias, frozen.scale.unsqueeze(1), frozen.centred)(heads)
        names = tuple(f"head {h}" for h in range(heads.shape[1]))
        if sources == "heads+resid":
            given = torch.cat((given, frozen(before + rest).unsqueeze(1)), 1)
            names = (*names, "resid")
    found = fit_sources(tape["mlp_out", layer][:, position], given, held_out=held_out, seed=seed)
    return MLPDecomposition(names, found.coefficients, found.intercept, found.r2, found.held_out, parallel)


def fit_sources(outputs: Tensor, sources: Tensor, *, held_out: float = 0.25, seed: int = 0) -> MLPDecomposition:
    """Least squares of outputs (B, C) on sources (B, S, C): one number a source, and an intercept (C,), in float64.

    Raises ShapeError, OptionError where fewer prompts than numbers to find are left to be fitted.
    """
    if sources.dim() != 3 or outputs.shape != (len(sources), sources.shape[2]):
        raise ShapeError(
            f"outputs are {tuple(outputs.shape)}, sources {tuple(sources.shape)}: (B, C), (B, S, C) are needed"
        )
    if not 0 < held_out < 1:
        raise OptionError(f"held_out is a share of the prompts, above 0 and below 1, not {held_out}")
    count = len(outputs)
    kept_out = max(2, round(held_out * count))
    numbers = sources.shape[1] + 1
    if count - kept_out < numbers:
        raise OptionError(
            f"{count} prompts, {kept_out} of them held out, are too few for {numbers - 1} sources and an intercept: at least "
            f"{numbers} must be fitted"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(outputs.device)
    fitted, others = order[kept_out:], order[:kept_out]
    y, x = outputs.double(), sources.double().transpose(1, 2)
    mean_y, mean_x = y[fitted].mean(0), x[fitted].mean(0)
    table = (x[fitted] - mean_x).flatten(0, 1)
    # sources that never change are left to the intercept
    solution = torch.linalg.lstsq(table.cpu(), (y[fitted] - mean_y).flatten()[:, None].cpu(), driver="gelsd").solution
    coefficients = solution[:, 0].to(x.device)
    intercept = mean_y - mean_x @ coefficients

    def explained(rows: Tensor) -> float:
        missed = (y[rows] - x[rows] @ coefficients - intercept).square().sum()
        spread = (y[rows] - y[rows].mean(0)).square().sum()
        return float(1 - missed / spread) if spread > 0 else float(missed == 0)

    names = tuple(f"source {i}" for i in range(sources.shape[1]))
    return MLPDecomposition(names, coefficients, intercept, explained(fitted), explained(others))


@torch.no_grad()
def last_layer_shift(model: Any, tape: Tape, answers: Tensor | None = None, *, position: int = -1) -> LastLayerShift:
    """Probability and rank of an answer through the last layer, and without each of its parts.

    tape: with z, resid_pre, attn_out, mlp_out, resid_post. answers: int64 (B,); the likeliest token of the model if None.
    Raises OptionError, ShapeError; Unsupported for a model that cannot be read by the lens.
    """
    _need(tape, "z", "resid_pre", "attn_out", "mlp_out", "resid_post")
    last = tape["resid_post", -1][:, position]
    attention, mlp = (tape[site, -1][:, position] for site in ("attn_out", "mlp_out"))
    heads = head_outputs(model, tape, -1).heads[:, position]
    if answers is None:
        answers = lens(model, last).argmax(-1)
    elif answers.shape != (len(last),):
        raise ShapeError(f"answers are {tuple(answers.shape)}; one a row is needed, ({len(last)},)")
    after = torch.stack((last - mlp - attention, last - mlp, last), 1)
    without = torch.cat((last[:, None] - heads, (last - attention)[:, None], (last - mlp)[:, None]), 1)
    probability, rank = _read(model, after, answers)
    probability_without, rank_without = _read(model, without, answers)
    parts = (*(f"head {h}" for h in range(heads.shape[1])), "attention", "mlp")
    return LastLayerShift(("before", "attention", "mlp"), probability, rank, parts, probability_without, rank_without)


def _need(tape: Tape, *sites: str) -> None:
    missing = [site for site in sites if not tape.layers(site)]
    if missing:
        raise OptionError(f"the tape lacks {', '.join(missing)}: record with sites={sites}")


def _answers(model: Any, tokens: Tensor, rows: int) -> Tensor:
    """The directions (B, C) along which tokens are read."""
    output = model.get_output_embeddings()
    if output is None:
        raise Unsupported(f"{type(model).__name__} has no output embeddings to read a stream with")
    if tokens.shape != (rows,):
        raise ShapeError(f"tokens are {tuple(tokens.shape)}; one a row is needed, ({rows},)")
    return output.weight[tokens]


def _said(norm: FrozenNorm, part: Tensor, direction: Tensor) -> Tensor:
    """What parts (B, …, C) say along directions (B, C)."""
    if part.dim() == 3:
        norm, direction = (
            FrozenNorm(norm.gain, norm.bias, norm.scale.unsqueeze(1), norm.centred),
            direction.unsqueeze(1),
        )
    return (norm(part) * direction).sum(-1)


def _is_parallel(model: Any, tape: Tape, layer: int, attention: Tensor) -> bool:
    """Whether the feed-forward part reads the stream beside attention (B, N, C), and not behind it."""
    if not tape.layers("resid_mid"):
        return True
    before, middle = tape["resid_pre", layer], tape["resid_mid", layer]
    allowed = max(1e-3, 8 * torch.finfo(before.dtype).eps) * middle.abs().max()
    if (middle - before).abs().max() <= allowed:
        return True
    if (middle - before - attention).abs().max() > allowed:
        raise Unsupported(f"what the feed-forward part of a {type(model).__name__} reads was not recognised")
    return False


def _read(model: Any, streams: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and rank (B, P) of the answers in streams (B, P, C)."""
    log_p = lens(model, streams).float().log_softmax(-1)
    mine = log_p.gather(-1, answers[:, None, None].expand(-1, streams.shape[1], 1))
    return mine[..., 0].exp(), (log_p > mine).sum(-1)
