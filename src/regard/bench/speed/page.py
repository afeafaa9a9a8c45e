"""The page of `regard speed`: time against length for every pattern, beside the machine's limits; opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from regard.bench.results import write_atomically
from regard.contract.optional import need

# one colour a rival, one dash a dtype
_COLOURS = ("#2e50aa", "#b4670c", "#45b199", "#b42e60", "#495200", "#a092fc", "#521a08")
_DASHES = {"fp32": "solid", "bf16": "dash", "fp16": "dot"}


def write_page(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the page of a results file's lines. Raises MissingExtra without jinja2 and plotly, WriteError."""
    jinja2, offline = need("jinja2", "bench"), need("plotly.offline", "bench")
    timings = [line for line in lines if line["kind"] == "timing"]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((files("regard.bench.speed") / "page.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        figures=_figures(timings),
        rows=[row(line) for line in timings],
        machine=next((line for line in lines if line["kind"] == "machine"), None),
        facts=timings[0] if timings else None,
        layouts=next((line["ms"] for line in lines if line["kind"] == "layout"), {}),
        memory=[line for line in lines if line["kind"] == "memory"],
        plotly=offline.get_plotlyjs(),
    )
    write_atomically(path, page.encode())


def row(line: dict[str, Any]) -> dict[str, Any]:
    """A timing line for a table: the work, the fastest engine of ours, its share of the rate, ratios to the others."""
    ours = {name: t for name, t in line["ms"].items() if ":" in name}
    best = min(ours, key=lambda name: ours[name]) if ours else None
    others = {name: t for name, t in line["ms"].items() if name not in ours}
    return {
        "work": line["key"],
        "engine": best,
        "ms": ours.get(best) if best else None,
        "share": line["share"].get(best) if best else None,
        "gb_per_s": line["gb_per_s"].get(best) if best else None,
        "ratios": {name: round(t / ours[best], 2) for name, t in others.items()} if best else {},
        "refused": line["refused"],
    }


def _figures(timings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One figure a pattern and direction, as plotly has them: log time against log length."""
    names = list(dict.fromkeys(name for line in timings for name in line["ms"]))
    figures = []
    for pattern, backward in dict.fromkeys((line["pattern"], line["backward"]) for line in timings):
        kind = [t for t in timings if (t["pattern"], t["backward"], t["dim"]) == (pattern, backward, 64)]
        kind = [t for t in kind if t["normaliser"] == "softmax" and t["bias"] is None]
        traces = []
        for dtype in dict.fromkeys(line["dtype"] for line in kind):
            mine = sorted((t for t in kind if t["dtype"] == dtype), key=lambda t: t["length"])
            for name in names:
                points = [(t["length"], t["ms"][name]) for t in mine if name in t["ms"]]
                traces += [_trace(f"{name}, {dtype}", points, _COLOURS[names.index(name) % len(_COLOURS)], dtype)]
            ideal = [(t["length"], t["flops"] / t["fma_gflops"] / 1e6) for t in mine if t["fma_gflops"]]
            traces += [_trace(f"limit of the registers, {dtype}", ideal, "#8a8f98", dtype)]
        if any(t["x"] for t in traces):
            title = f"{pattern}, {'forward and backward' if backward else 'forward'}"
            figures.append({"title": title, "traces": [t for t in traces if t["x"]]})
    return figures


def _trace(name: str, points: list[tuple[int, float]], colour: str, dtype: str) -> dict[str, Any]:
    line = {"color": colour, "dash": _DASHES[dtype]}
    return {
        "name": name, "x": [x for x, _ in points], "y": [y for _, y in points],
        "mode": "lines+markers", "line": line, "hovertemplate": "%{y:.3~g} ms at %{x}<extra>" + name + "</extra>",
    }  # fmt: skip
