"""Pictures in pages and figures: as addresses of PNGs, and beside each other with cells of a grid marked."""

from __future__ import annotations

import base64
import colorsys
from io import BytesIO
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.optional import need

# the longer side of a picture, in pixels
SIDE = 224
# from one picture of a figure to the next, in widths of a picture
APART = 1.15


def address(image: Tensor) -> str:
    """A picture (C, Y, X) as the address of a PNG: values as they are where they lie in 0 to 1, else stretched to that.

    Raises MissingExtra.
    """
    x = image.detach().float().cpu()
    x = x if len(x) == 3 else x.mean(0, keepdim=True).expand(3, -1, -1)
    if float(x.min()) < 0 or float(x.max()) > 1:
        x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12)
    if max(x.shape[1:]) > SIDE:
        size = [max(side * SIDE // max(x.shape[1:]), 1) for side in x.shape[1:]]
        x = F.interpolate(x[None], size=size, mode="bilinear", antialias=True)[0]
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    png = BytesIO()
    need("PIL.Image", "explain").fromarray(pixels.numpy()).save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def colour(cell: int, grid: int) -> str:
    """Of a cell of the query: hue by column, lightness by row."""
    row, column = divmod(cell, grid)
    red, green, blue = colorsys.hls_to_rgb(column / grid, 0.5 + 0.25 * row / grid, 0.85)
    return f"rgb({round(255 * red)},{round(255 * green)},{round(255 * blue)})"


def middle(cell: int | Tensor, grid: int) -> tuple[float, float]:
    """x and y of a cell's middle in a picture of side 1, y upwards."""
    row, column = divmod(int(cell), grid)
    return (column + 0.5) / grid, 1 - (row + 0.5) / grid


def draw(figure: Any, place: int, image: Tensor, cells: Tensor, colours: Tensor, grid: int, title: str) -> None:
    """Draw a picture and mark cells of it, coloured as the query's cells `colours`."""
    left = place * APART
    figure.add_layout_image(
        source=address(image), xref="x", yref="y", x=left, y=1, sizex=1, sizey=1, sizing="stretch", layer="below"
    )
    middles = [middle(cell, grid) for cell in cells.tolist()]
    marker = {
        "symbol": "square-open", "size": 14, "line": {"width": 3},
        "color": [colour(cell, grid) for cell in colours.tolist()],
    }  # fmt: skip
    figure.add_scatter(
        x=[left + x for x, _ in middles], y=[y for _, y in middles], mode="markers", marker=marker, hoverinfo="skip"
    )
    figure.add_annotation(x=left + 0.5, y=1.02, yanchor="bottom", text=title, showarrow=False)


def finish(figure: Any, count: int) -> Any:
    """Set the frame of a figure of so many pictures; the figure itself."""
    axis = {"visible": False, "fixedrange": True}
    figure.update_xaxes(range=[-0.02, (count - 1) * APART + 1.02], **axis)
    figure.update_yaxes(range=[-0.02, 1.15], scaleanchor="x", **axis)
    figure.update_layout(
        showlegend=False, plot_bgcolor="rgba(0,0,0,0)", width=40 + 230 * count, height=300,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
    )  # fmt: skip
    return figure
