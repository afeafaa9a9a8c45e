"""What the heads of a layer add to the stream, and what a norm makes of a part of a stream.

    attn_out = sum_h out_h + rest,      norm(x) = sum over parts of frozen(part) + bias

A norm divides by the size of the whole stream. With that size kept it is linear, so that parts can be told apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.contract.attach import open_session
from regard.contract.errors import OptionError, Unsupported
from regard.hosts.tape import Tape

# far above the small number that norms add before they divide
_LARGE = 1e3


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """heads (B, N, H, C): what each head of a layer adds to the stream; rest (B, N, C): biases. Their sum is attn_out."""

    heads: Tensor
    rest: Tensor


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm whose scale (…, 1) is that of one stream. gain, bias (C). centred: it takes the mean away first."""

    gain: Tensor
    bias: Tensor
    scale: Tensor
    centred: bool

    def __call__(self, part: Tensor) -> Tensor:
        """What the norm makes of a part (…, C) of its stream, without the bias."""
        if self.centred:
            part = part - part.mean(-1, keepdim=True)
        return part * self.scale * self.gain


def freeze_norm(norm: nn.Module | None, stream: Tensor) -> FrozenNorm:
    """A norm with its scale kept as it is at `stream` (…, C); None is no norm. Raises Unsupported for what is no norm."""
    probe = torch.ones_like(stream[..., :1, :]).flatten(0, -2)[0]
    if norm is None:
        return FrozenNorm(probe, torch.zeros_like(probe), torch.ones_like(stream[..., :1]), False)
    with torch.no_grad():
        probe[1::2] = -1
        probe = probe - probe.mean()
        bias = norm(torch.zeros_like(probe))
        given = norm(_LARGE * probe) - bias
        moved = norm(_LARGE * (probe + 1)) - bias
        centred = bool((moved - given).abs().max() < 1e-3 * given.abs().max())
        gain = given / probe * probe.square().mean().sqrt()
        out = norm(stream) - bias
        plain = FrozenNorm(gain, bias, torch.ones_like(stream[..., :1]), centred)(stream)
        size = plain.square().sum(-1, keepdim=True)
        scale = (out * plain).sum(-1, keepdim=True) / torch.where(size == 0, torch.ones_like(size), size)
        frozen = FrozenNorm(gain, bias, scale, centred)
        allowed = max(1e-3, 8 * torch.finfo(stream.dtype).eps)
        if (frozen(stream) - out).abs().max() > allowed * out.abs().max():
            raise Unsupported(
                f"{type(norm).__name__} is no norm that divides by a size: its parts cannot be told apart"
            )
    return frozen


@torch.no_grad()
def head_outputs(model: nn.Module, tape: Tape, layer: int, *, step: int = 0) -> HeadOutputs:
    """Each head's part of what attention added to the stream, from a tape with z of all heads.

    layer: of the main stack, negative from the last. Raises OptionError, Unsupported for a model whose projection was not
    recognised.
    """
    stack = open_session(model, ()).anatomy.main
    place = stack.layers[layer]
    z = tape.get("z", layer, step=step)
    if z.shape[2] != tape.meta["heads"]:
        raise OptionError(f"the tape holds {z.shape[2]} heads of {tape.meta['heads']}: record z without heads=")
    if place.out is None:
        raise Unsupported(f"{type(model).__name__} has no output projection that was recognised")
    width = z.shape[2] * z.shape[3]
    bias = place.out(z.new_zeros(1, width))
    table = place.out(torch.eye(width, dtype=z.dtype, device=z.device)) - bias
    heads = torch.einsum("bnhe,hec->bnhc", z, table.unflatten(0, z.shape[2:]))
    rest = bias[0].expand_as(heads[:, :, 0])
    if place.attn_out is not None and place.attn_out is not place.out:
        # a norm stands between the projection and the stream
        after = freeze_norm(place.attn_out, heads.sum(2) + rest)
        heads, rest = (
            FrozenNorm(after.gain, after.bias, after.scale.unsqueeze(2), after.centred)(heads),
            after(rest) + after.bias,
        )
    return HeadOutputs(heads, rest)
