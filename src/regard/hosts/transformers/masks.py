"""What a model hands to its attention as mask: made only when somebody looks, as a pattern where it is one we know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from regard.contract.errors import Unsupported
from regard.patterns import Causal, KeyValid, Pattern


@dataclass(eq=False)
class LateMask:
    """The arguments of transformers' mask functions, before any table is made of them.

    arguments: of the call. rows: int64 (B, N'), the queries that are left where tokens were dropped, None for all.
    """

    arguments: dict[str, Any]
    rows: Tensor | None = None
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        """The position of the first query."""
        return int(self.arguments["q_offset"]) - int(self.arguments["kv_offset"])

    def as_made_for(self, implementation: str) -> Any:
        """What the function registered for an implementation makes of the arguments; None for "no mask"."""
        if implementation not in self._made:
            make = AttentionMaskInterface()[implementation]
            self._made[implementation] = make(**self.arguments)
        return self._made[implementation]

    def known(self) -> tuple[bool, Any]:
        """Whether the mask is causal or full, with or without padding; and it as a pattern, None where all may meet."""
        if "known" not in self._made:
            kinds: dict[Any, Pattern | None] = {causal_mask_function: Causal(), bidirectional_mask_function: None}
            function = self.arguments["mask_function"]
            known = function in kinds and self.rows is None
            pattern: Any = kinds[function] if known else None
            valid = self._valid() if known else None
            if valid is not None:
                real = KeyValid().bind(key_valid=valid)
                pattern = real if pattern is None else pattern & real
            self._made["known"] = known, pattern
        return self._made["known"]  # type: ignore[no-any-return]

    def dense(self) -> Tensor:
        """The mask itself, bool (B, 1, N, M), True = may attend."""
        if "dense" not in self._made:
            skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            mask = AttentionMaskInterface()["sdpa"](**{**self.arguments, **skips})
            if self.rows is not None:
                mask = mask.gather(2, self.rows[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))
            self._made["dense"] = mask
        return self._made["dense"]

    def taking(self, rows: Tensor) -> LateMask:
        """The mask of some of its queries: int64 (B, N')."""
        return LateMask(self.arguments, rows if self.rows is None else self.rows.gather(1, rows))

    def contiguous(self) -> LateMask:
        """What generate asks of a mask before it fills a cache of fixed size. Raises Unsupported."""
        raise Unsupported("a StaticCache keeps its keys in place and hides its mask; use a DynamicCache")

    def _valid(self) -> Tensor | None:
        padding = self.arguments.get("attention_mask")
        if padding is None or padding.all():
            return None
        start, length = int(self.arguments["kv_offset"]), int(self.arguments["kv_length"])
        padding = torch.nn.functional.pad(padding.bool(), (0, max(start + length - padding.shape[1], 0)))
        return padding[:, start : start + length]


def who_meets(mask: Any, is_causal: bool, n: int) -> tuple[Any, Tensor | None, Tensor | None, int]:
    """(pattern, mask, bias, position of the first query) of what the attention function was given.

    is_causal: of the module, which torch's way applies where there is no mask. Raises Unsupported.
    """
    if mask is None:
        return (Causal() if is_causal and n > 1 else None), None, None, 0
    if isinstance(mask, LateMask):
        known, pattern = mask.known()
        return pattern, (None if known else mask.dense()), None, mask.offset
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise Unsupported(f"a mask of type {type(mask).__name__} cannot be read; give one of 2 or 4 axes")
    if mask.dtype == torch.bool:
        return None, mask, None, 0
    # floats as the library writes them: 0 and the least number; anything else is a bias
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    bias = mask.masked_fill(hidden, 0.0)
    return None, ~hidden, (bias if bias.any() else None), 0
