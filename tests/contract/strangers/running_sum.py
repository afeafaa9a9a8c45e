"""A stranger's model: a running sum of embeddings."""

from dataclasses import dataclass

from torch import Tensor, nn

from regard.contract.card import ModelCard
from regard.primitives.state import State

CARD = ModelCard(
    slug="running_sum",
    title="A running sum of embeddings",
    baseline=True,
    exports=("Model",),
    example="b=2 n=9 v=11",
    options={"vocab": 11},
    task="token ids to logits",
    decode=True,
)


@dataclass(frozen=True)
class Settings:
    """Width and vocabulary."""

    dim: int
    vocab: int = 11


SIZES = {"tiny": Settings(dim=8)}


@dataclass(frozen=True)
class Total(State):
    """What was summed so far."""

    total: Tensor
    seen: int = 0


class Model(nn.Module):
    """A running sum of embeddings."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.embed = nn.Embedding(settings.vocab, settings.dim)
        self.head = nn.Linear(settings.dim, settings.vocab)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self._mix(ids, 0)[0])

    def init_state(self, batch: int) -> Total:
        return Total(self.head.weight.new_zeros(batch, self.head.in_features))

    def prefill(self, ids: Tensor, state: Total) -> tuple[Tensor, Total]:
        mixed, total = self._mix(ids, state.total)
        return self.head(mixed), Total(total, state.seen + ids.shape[1])

    def step(self, ids: Tensor, state: Total) -> tuple[Tensor, Total]:
        return self.prefill(ids, state)

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * self.head.in_features * self.head.weight.element_size()

    def _mix(self, ids: Tensor, before: Tensor | float) -> tuple[Tensor, Tensor]:
        embedded = self.embed(ids).cumsum(1)
        mixed = embedded + (before[:, None] if isinstance(before, Tensor) else before)
        return mixed.tanh(), mixed[:, -1]
