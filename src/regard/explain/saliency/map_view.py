"""A look at the maps of any saliency method: heat maps, beside the images that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import ShapeError
from regard.contract.optional import need

CARD = ExplanationCard(
    slug="map_view",
    title="Views of saliency maps",
    exports=("map_view", "MapView"),
    takes={"maps": "maps"},
    figure=True,
    baseline=True,
)


@dataclass(frozen=True, eq=False)
class MapView:
    """Maps (B, 1, h, w) to be looked at, and the images (B, C, H, W) that they belong to, or None."""

    maps: Tensor
    images: Tensor | None = None
    titles: tuple[str, ...] = ()

    def figure(self) -> Any:
        """A plotly figure: images above, maps below, a column a row of the batch; red is negative. Raises MissingExtra."""
        graphs, subplots = need("plotly.graph_objects", "bench"), need("plotly.subplots", "bench")
        rows = 1 if self.images is None else 2
        figure = subplots.make_subplots(rows, len(self.maps), subplot_titles=self.titles or None)
        for column, values in enumerate(self.maps[:, 0].float().cpu(), 1):
            signed = {"colorscale": "RdBu", "zmid": 0} if bool((values < 0).any()) else {"colorscale": "Viridis"}
            figure.add_trace(graphs.Heatmap(z=values.numpy(), showscale=False, **signed), rows, column)
            if self.images is not None:
                # grey levels, so that any number of channels can be shown
                grey = self.images[column - 1].float().mean(0).cpu().numpy()
                figure.add_trace(graphs.Heatmap(z=grey, colorscale="Gray", showscale=False), 1, column)
        figure.update_yaxes(autorange="reversed", constrain="domain")
        return figure


def map_view(maps: Tensor, images: Tensor | None = None, *, titles: Sequence[str] = ()) -> MapView:
    """Maps (B, 1, h, w) of any method, with a figure; titles: one a row. Raises ShapeError."""
    if maps.dim() != 4 or maps.shape[1] != 1 or (images is not None and len(images) != len(maps)):
        came = None if images is None else tuple(images.shape)
        raise ShapeError(f"maps are (B, 1, h, w) and images (B, C, H, W), not {tuple(maps.shape)} and {came}")
    if titles and len(titles) != len(maps):
        raise ShapeError(f"there are {len(titles)} titles for {len(maps)} maps")
    return MapView(maps.detach(), images, tuple(titles))
