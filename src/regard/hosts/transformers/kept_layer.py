"""One layer of a key-value cache that can give up keys and still knows where the others stood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from regard.contract.errors import OptionError, Unsupported


class KeptLayer(DynamicLayer):
    """Keys and values (B, G, M, D) of the tokens that were kept, for each key head on its own.

    positions: int64 (B, G, M), where each key stood in the whole sequence, -1 in places that only fill up; None while
    all are there. seen: how many tokens came. marks: name -> (B, G, M), numbers that interventions keep beside the keys
    (new keys get 0). notes: name -> (B, ...), what they keep of each row, and of no key; it goes wherever the row goes.
    """

    is_croppable = False
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.positions: Tensor | None = None
        self.seen = 0
        self.marks: dict[str, Tensor] = {}
        self.notes: dict[str, Tensor] = {}
        # whether the next keys come in a pass that knows of positions
        self.served = False
        self._arriving: tuple[Tensor, int] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.positions is not None and not self.served:
            raise Unsupported(
                "this cache has given up keys: go on with it under steer or record of attention, or begin with a new one"
            )
        self.served = False
        batch, heads, new = key_states.shape[:3]
        came = new if self._arriving is None else self._arriving[1]
        if self._arriving is not None:
            places = self.seen + self._arriving[0].unsqueeze(1).expand(batch, heads, new)
            before = self.positions_of_all() if self.seen else places[..., :0]
            self.positions, self._arriving = torch.cat((before, places), -1), None
        elif self.positions is not None:
            places = torch.arange(self.seen, self.seen + new, device=key_states.device).expand(batch, heads, new)
            self.positions = torch.cat((self.positions, places), -1)
        for name, mark in self.marks.items():
            self.marks[name] = torch.cat((mark, mark.new_zeros(batch, heads, new)), -1)
        self.seen += came
        return super().update(key_states, value_states)

    def keep(self, index: Tensor) -> None:
        """Keep these keys and no others: int64 (B, G, K), places among the keys held, -1 to fill up.

        Heads and rows may keep different numbers of keys; memory is that of the largest. Raises OptionError.
        """
        held = self.keys.shape[2]
        if index.dim() != 3 or index.shape[:2] != self.keys.shape[:2]:
            raise OptionError(
                f"keep takes (B, G, K) = {tuple(self.keys.shape[:2])} and K places, not {tuple(index.shape)}"
            )
        if index.numel() and (int(index.min()) < -1 or int(index.max()) >= held):
            raise OptionError(f"keep takes places 0 to {held - 1}, and -1 to fill up")
        there = index >= 0
        place = index.clamp(min=0)
        self.positions, self.served = self.positions_of_all().gather(2, place).masked_fill(~there, -1), True
        self.keys, self.values = (
            x.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])) for x in (self.keys, self.values)
        )
        self.marks = {name: mark.gather(2, place) for name, mark in self.marks.items()}

    def positions_of_all(self) -> Tensor:
        """positions, written out also while all keys are there."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.seen, device=self.keys.device).expand(*self.keys.shape[:2], self.seen)

    def arrive(self, places: Tensor, tokens: int) -> None:
        """Say where the next keys stand: places (B, N') among `tokens` new tokens, the others of which were dropped."""
        self._arriving = places, tokens

    def get_seq_length(self) -> int:
        # positions of new tokens go on where the sequence is, not where the kept keys end
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.positions, self.seen, self.marks, self.notes = None, 0, {}, {}

    def crop(self, tokens_to_remove: int) -> None:
        raise Unsupported(
            "a cache under steer gives no tokens back: write without a draft model, prompt lookup or other ways that try "
            "tokens out"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def _rows(self, choose: Any) -> None:
        for name in ("keys", "values", "positions"):
            value = getattr(self, name)
            if value is not None and value.numel():
                setattr(self, name, choose(value))
        self.marks = {name: choose(mark) for name, mark in self.marks.items()}
        self.notes = {name: choose(note) for name, note in self.notes.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0
