"""A map of patterns: every head's table of weights as a point, so that heads that look alike lie together.

points = encoder(w / max w),      told by an autoencoder, or along principal components; clusters by k-means
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.errors import OptionError, ShapeError
from regard.contract.optional import need
from regard.hosts.tape import Tape


@dataclass(frozen=True, eq=False)
class PatternMap:
    """Tables of weights placed by their likeness: points (R, latent), tables (R, N, N), origin: (image, layer, head) of each.

    An image of -1 is the mean over images. error: the mean squared error of the tables, each scaled to 1 at most, when they are
    told from their points.
    """

    points: Tensor
    tables: Tensor
    origin: tuple[tuple[int, int, int], ...]
    error: float

    @staticmethod
    def fit(
        weights: Tape | Sequence[Tensor],
        *,
        latent: int = 2,
        arch: Literal["conv", "mlp", "pca"] = "conv",
        per_image: bool = False,
        steps: int = 400,
        seed: int = 0,
    ) -> PatternMap:
        """Place every head of every layer; with per_image, of every image too (a mean hides heads that follow the image).

        weights: a tape with full weights, or a tuple over layers of (B, H, N, N). latent: numbers of a point. arch: an
        autoencoder of convolutions or of one hidden layer, or principal components. steps: of its training, on all tables.
        Raises ShapeError, OptionError; MissingExtra for "pca".
        """
        if arch not in ("conv", "mlp", "pca"):
            raise OptionError(f'arch is "conv", "mlp" or "pca", not {arch!r}')
        tables, origin = _flat(tables_of(weights), per_image)
        if latent < 1 or len(tables) <= latent:
            raise OptionError(f"{len(tables)} tables cannot be placed by {latent} numbers each")
        # what the pattern is, not how sharp it is
        scaled = tables / tables.amax((1, 2), keepdim=True).clamp(min=1e-12)
        if arch == "pca":
            found = need("sklearn.decomposition", "explain").PCA(latent, random_state=seed)
            points = torch.from_numpy(found.fit_transform(scaled.flatten(1).numpy()))
            told = torch.from_numpy(found.inverse_transform(points.numpy())).view_as(scaled)
        else:
            points, told = _autoencode(scaled, latent, arch, steps, seed)
        return PatternMap(points.float(), tables, origin, float((told - scaled).square().mean()))

    def clusters(self, count: int, *, seed: int = 0) -> Tensor:
        """Which of `count` groups each table is in, int64 (R,), by k-means. Raises OptionError, MissingExtra."""
        if not 1 <= count <= len(self.points):
            raise OptionError(f"{len(self.points)} tables make 1 to {len(self.points)} clusters, not {count}")
        found = need("sklearn.cluster", "explain").KMeans(count, n_init=10, random_state=seed)
        return torch.from_numpy(found.fit_predict(self.points.numpy())).long()

    def representatives(self, count: int, *, seed: int = 0) -> list[int]:
        """For each cluster the table that is nearest to its middle."""
        groups = self.clusters(count, seed=seed)
        found = []
        for group in range(count):
            inside = (groups == group).nonzero()[:, 0]
            middle = self.points[inside].mean(0)
            found.append(int(inside[(self.points[inside] - middle).norm(dim=1).argmin()]))
        return found

    def figure(self, count: int = 4, *, seed: int = 0) -> Any:
        """A plotly figure: the first two numbers of every table, coloured by cluster, and a table of each cluster."""
        go, subplots = need("plotly.graph_objects", "explain"), need("plotly.subplots", "explain")
        groups, examples = self.clusters(count, seed=seed), self.representatives(count, seed=seed)
        specs: list[list[Any]] = [[{"colspan": count}, *[None] * (count - 1)], [{}] * count]
        titles = ["", *(f"cluster {g}: {_called(self.origin[i])}" for g, i in enumerate(examples))]
        figure = subplots.make_subplots(2, count, specs=specs, subplot_titles=titles, row_heights=[0.6, 0.4])
        points = F.pad(self.points, (0, max(2 - self.points.shape[1], 0)))
        scatter = go.Scatter(
            x=points[:, 0].numpy(), y=points[:, 1].numpy(), mode="markers", text=[_called(o) for o in self.origin],
            marker={"color": groups.numpy(), "colorscale": "Turbo"}, showlegend=False,
        )  # fmt: skip
        figure.add_trace(scatter, 1, 1)
        for place, example in enumerate(examples):
            heat = go.Heatmap(z=self.tables[example].numpy(), colorscale="Viridis", showscale=False)
            figure.add_trace(heat, 2, place + 1)
        figure.update_yaxes(autorange="reversed", row=2)
        return figure


def tables_of(weights: Tape | Sequence[Tensor]) -> list[Tensor]:
    """The weights (B, H, N, N) of every layer. Raises ShapeError, OptionError."""
    layers = list(weights.attentions()) if isinstance(weights, Tape) else list(weights)
    if not layers:
        raise OptionError('there are no weights: record with sites=("weights",)')
    for layer, table in enumerate(layers):
        if table.dim() != 4 or table.shape[2] != table.shape[3]:
            raise ShapeError(f"the weights of layer {layer} are {tuple(table.shape)}; they must be (B, H, N, N)")
    return layers


def _flat(layers: Sequence[Tensor], per_image: bool) -> tuple[Tensor, tuple[tuple[int, int, int], ...]]:
    """All tables (R, N, N), and which image, layer and head each is of."""
    if len({table.shape[-1] for table in layers}) > 1:
        raise ShapeError("the layers differ in tokens; place those of one size together")
    tables, origin = [], []
    for layer, weights in enumerate(layers):
        some = weights.detach().float().cpu()
        some = some if per_image else some.mean(0, keepdim=True)
        for image, of_image in enumerate(some):
            tables.append(of_image)
            origin += [(image if per_image else -1, layer, head) for head in range(len(of_image))]
    return torch.cat(tables), tuple(origin)


def _autoencode(tables: Tensor, latent: int, arch: str, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points (R, latent) and the tables told from them, after training on all tables."""
    n = tables.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, decoder = _networks(n, latent, arch)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
        with torch.enable_grad():
            for _ in range(steps):
                loss = F.mse_loss(decoder(encoder(tables)), tables)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    with torch.no_grad():
        points = encoder(tables)
        return points, decoder(points)


def _networks(n: int, latent: int, arch: str) -> tuple[nn.Module, nn.Module]:
    if arch == "mlp":
        code: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(n * n, 64), nn.GELU(), nn.Linear(64, latent))
    else:
        code = nn.Sequential(
            nn.Unflatten(1, (1, n)), nn.Conv2d(1, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.GELU(),
            nn.Flatten(), nn.LazyLinear(latent),
        )  # fmt: skip
        code(torch.zeros(1, n, n))
    return code, nn.Sequential(nn.Linear(latent, 64), nn.GELU(), nn.Linear(64, n * n), nn.Unflatten(1, (n, n)))


def _called(origin: tuple[int, int, int]) -> str:
    image, layer, head = origin
    return f"layer {layer}, head {head}" + ("" if image < 0 else f", image {image}")
