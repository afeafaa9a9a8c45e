"""Wrong: the state is updated in place, under the feet of whoever holds it."""

from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import Unsupported
from regard.engines.scan import ScanState

CAUGHT_BY = "states_are_values"
CARD = MixerCard(
    slug="writes_into_the_state",
    title="A culprit",
    baseline=True,
    exports=("Mixer",),
    example="b=2 n=10 c=16 h=4",
    attends=("causal_self",),
    decode=True,
    constant_state=True,
)


class Mixer(nn.Module):
    """Mix tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.project = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, padding: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if context is not None or not is_causal:
            raise Unsupported("causal only")
        return self.project(x).cumsum(1)

    def init_state(self, batch: int) -> ScanState:
        return ScanState(self.project.weight.new_zeros(batch, self.project.out_features))

    def prefill(self, x: Tensor, state: ScanState, *, padding: Tensor | None = None) -> tuple[Tensor, ScanState]:
        out = self.project(x).cumsum(1) + state.s[:, None]
        state.s.copy_(out[:, -1].detach())
        return out, ScanState(state.s, None, state.seen + x.shape[1])

    def step(self, x: Tensor, state: ScanState) -> tuple[Tensor, ScanState]:
        return self.prefill(x, state)

    def state_bytes(self, batch: int, length: int) -> int:
        return batch * self.project.out_features * self.project.weight.element_size()
