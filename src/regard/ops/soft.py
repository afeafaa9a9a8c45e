"""Softmax-free attention: a Gaussian kernel in place of exp(q k'), approximated through landmarks.

    out = C B^+ C' v,      C = k(q, landmarks), B = k(landmarks, landmarks), k(x, y) = exp(-|x - y|^2 / 2)

Keys are the queries. B^+ is the inverse of B + ridge I by Newton's iteration, whose gradient is that of an inverse; on
the reference it is that of the iteration itself. The paper's q is divided by D^(1/4) before it comes here.
Departs from the released code: distances are computed by products around the mean of the landmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.operator import operator
from regard.engines.precision import accumulator, without_autocast
from regard.engines.scan import as_scan
from regard.patterns import Bound, Pattern

CARD = OpCard(
    slug="soft",
    title="Softmax-free attention",
    paper="Softmax-free Linear Transformers",
    exports=("soft_attention", "newton_inverse"),
    spec="q: b h n d, v: b h m e, landmarks: b h l d -> b h n e",
    example="b=2 h=4 n=10 m=10 d=3 e=6 l=3",
    attends=("self",),
    accepts=("pattern",),
    padding=True,
    time="n l d",
    memory="n l",
)

# the iteration starts from the row sums of B, not of B + ridge I: with more it may leave its region of convergence
_MAX_RIDGE = 0.05


@operator(CARD)
def soft_attention(
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    symmetric_norm: bool = False,
    newton_iters: int = 20,
    ridge: float = 0.01,
    engine: str | None = None,
) -> Tensor:
    """Softmax-free attention (section 3.2). Weights are not negative and not normalised; their table is symmetric.

    landmarks: L points among the queries. pattern: KeyValid(). symmetric_norm: B^+ becomes R B^+ R with
    R = diag(row sums of B)^-1/2 (SOFT++). newton_iters: steps of Newton's iteration, at least 1. ridge: in [0, 0.05].
    Raises OptionError, ShapeError, Unsupported.
    """
    _check(newton_iters, ridge)
    if not 0 <= ridge <= _MAX_RIDGE:
        raise OptionError(f"ridge is {ridge}; it is in [0, {_MAX_RIDGE}], beyond which the iteration may not converge")
    _, key_valid, _ = as_scan(pattern, is_causal, "soft")
    kind = accumulator(q.dtype)
    with without_autocast(q.device):
        points, value = landmarks.to(kind), v.to(kind)
        # distances do not change, but the squares that cancel in them become small
        centre = points.mean(2, keepdim=True).detach()
        points = points - centre
        to_landmarks, between = _gaussian(q.to(kind) - centre, points), _gaussian(points, points)
        if engine == "reference":
            inverse = _newton(between, newton_iters, ridge)
        else:
            inverse = newton_inverse(between, iters=newton_iters, ridge=ridge)
        if symmetric_norm:
            root = between.sum(-1).rsqrt()
            inverse = root[..., None] * inverse * root[..., None, :]
        if key_valid is not None:
            value = value.masked_fill(~key_valid[:, None, :, None], 0.0)
        return (to_landmarks @ (inverse @ (to_landmarks.transpose(-1, -2) @ value))).to(q.dtype)


def newton_inverse(matrix: Tensor, *, iters: int = 20, ridge: float = 0.0) -> Tensor:
    """The inverse of P = matrix + ridge I by Newton's iteration X <- 2 X - X P X (section 3.3): (…, L, L) to the same.

    matrix: symmetric, positive definite with its ridge. X starts at 1.8 P / (largest row sum of |matrix|)^2; the error
    squares at every step, which 20 steps bring below 1e-6 for conditions up to 100 or so, while smaller eigenvalues are
    left damped. The iteration has no gradient: the derivative of a result X by P is dX = -X dP X, the second derivative
    likewise, exact where it has converged. Raises OptionError, ShapeError.
    """
    _check(iters, ridge)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ShapeError(f"newton_inverse takes square matrices (…, L, L), not {tuple(matrix.shape)}")
    kind = accumulator(matrix.dtype)
    with without_autocast(matrix.device):
        whole = matrix.to(kind)
        inverse = _newton(whole.detach(), iters, ridge)
        # 0 with the derivatives of the matrix: the first terms of the series of (P + dP)^-1 around P
        step = inverse @ (whole - whole.detach())
        return (inverse - step @ inverse + step @ step @ inverse).to(matrix.dtype)


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :]
    return torch.exp(x @ y.transpose(-1, -2) - squares / 2)


def _newton(matrix: Tensor, iters: int, ridge: float) -> Tensor:
    largest = matrix.abs().sum(-1).amax(-1)[..., None, None]
    whole = matrix + ridge * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # divided one by one: the square may leave the range of the dtype
    inverse = 1.8 * whole / largest / largest
    for _ in range(iters):
        inverse = 2 * inverse - inverse @ whole @ inverse
    return inverse


def _check(iters: int, ridge: float) -> None:
    if iters < 1:
        raise OptionError(f"Newton's iteration takes at least 1 step, not {iters}")
    if ridge < 0:
        raise OptionError(f"ridge is added to the diagonal and is at least 0, not {ridge}")
