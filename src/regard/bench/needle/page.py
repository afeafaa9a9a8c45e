"""The page of `regard needle`: a heat map of accuracy for every way, and the table; opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from regard.bench.needle.measure import summary
from regard.bench.results import write_atomically
from regard.contract.optional import need


def write_page(lines: Sequence[dict[str, Any]], model: str, path: Path) -> None:
    """Write the page of what `measure` found. Raises MissingExtra without jinja2 and plotly, WriteError."""
    jinja2, offline = need("jinja2", "bench"), need("plotly.offline", "bench")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((files("regard.bench.needle") / "page.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        model=model, rows=summary(lines), figures=_maps(lines), facts=lines[0] if lines else None,
        plotly=offline.get_plotlyjs(),
    )  # fmt: skip
    write_atomically(path, page.encode())


def _maps(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One heat map a way and way of asking: depth down, length across."""
    figures = []
    for way, ask in dict.fromkeys((cell["way"], cell["ask"]) for cell in cells):
        mine = {(c["length"], c["depth"]): c["accuracy"] for c in cells if (c["way"], c["ask"]) == (way, ask)}
        lengths, depths = sorted({n for n, _ in mine}), sorted({d for _, d in mine})
        table = [[mine.get((n, d)) for n in lengths] for d in depths]
        figures.append(
            {
                "title": f"{way}, asked {ask}",
                "trace": {
                    "type": "heatmap", "x": [str(n) for n in lengths], "y": [f"{d:g}" for d in depths], "z": table,
                    "zmin": 0, "zmax": 1, "colorscale": "Viridis", "text": [[_shown(z) for z in row] for row in table],
                    "texttemplate": "%{text}", "hovertemplate": "%{x} tokens, depth %{y}: %{z:.2f}<extra></extra>",
                },
            }
        )  # fmt: skip
    return figures


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
