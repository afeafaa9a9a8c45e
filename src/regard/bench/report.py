"""The report of `regard compare`: one self-contained page that opens offline."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from regard.bench.results import write_atomically
from regard.bench.summary import (
    COSTS,
    METRICS,
    Fit,
    Score,
    Summary,
    amount,
    chosen_runs,
    digits,
    score_text,
    settings_of,
    summarise,
)
from regard.contract.optional import need

# light and dark colour: at least 0.10 apart in OKLab, also as seen with protanopia, deuteranopia and tritanopia
# (a test measures it), and never alone: every system also has its symbol
PALETTE = (
    ("#0f1294", "#a4cafd"),
    ("#b4670c", "#976914"),
    ("#45b199", "#9bfcf1"),
    ("#b42e60", "#faa9b2"),
    ("#521a08", "#d47b5f"),
    ("#a092fc", "#7763e5"),
    ("#495200", "#bccb3c"),
    ("#b4a139", "#fedf98"),
    ("#3e74f3", "#8c8cb5"),
    ("#780754", "#ad2f66"),
    ("#8b6eab", "#c08efe"),
    ("#2e50aa", "#3364a2"),
)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "pentagon", "star", "hexagon", "triangle-down", "x")
DASHES = ("solid", "dash", "dot")

_CURVE_AXES = {
    "text": (("tokens", "training tokens"), ("seconds", "training time (s)")),
    "recall": (("tokens", "training tokens"),),
}
_COST_NAMES = {
    "prefill_ms": ("Reading a prompt", "time for all tokens (ms)"),
    "decode_ms": ("Writing one token", "time a token (ms)"),
    "state_bytes": ("State kept between tokens", "size of one sequence"),
    "peak_mib": ("Peak memory of reading", "rise above the start (MiB)"),
}


def write_report(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the page of a results file's lines, whatever part of the run they hold.

    Raises MissingExtra without jinja2 and plotly, WriteError if it cannot be written (an older page stays).
    """
    write_atomically(path, page(lines).encode())


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The text of the page. Raises MissingExtra."""
    jinja2, offline = need("jinja2", "bench"), need("plotly.offline", "bench")
    summary = summarise(lines)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(short=short, held=_held)
    template = environment.from_string((files("regard.bench") / "report.html.j2").read_text(encoding="utf-8"))
    styles = {row.system: style(index) for index, row in enumerate(summary.rows)}
    return template.render(
        summary=summary,
        styles=styles,
        figures=_figures(summary, lines, styles),
        columns=_columns(summary),
        exponents=_exponents(summary),
        data=next((line["data"] for line in lines if line["kind"] == "run"), ""),
        matched=next((line["matched"] for line in lines if line["kind"] == "run"), ""),
        settings={name: _setting(value) for name, value in settings_of(lines).items() if value not in (None, "", [])},
        machine=_machine(lines),
        training=[_training(lines, task) for task in METRICS],
        options=_options(lines),
        hardware=", ".join(sorted({line["hardware"] for line in lines if line.get("hardware")})),
        versions=_versions(lines),
        plotly=offline.get_plotlyjs(),
    )


def style(index: int) -> dict[str, str]:
    """light, dark, symbol and dash of the index-th system; colours come back with another dash and symbol."""
    light, dark = PALETTE[index % len(PALETTE)]
    return {
        "light": light,
        "dark": dark,
        "symbol": SYMBOLS[index % len(SYMBOLS)],
        "dash": DASHES[index // len(PALETTE) % len(DASHES)],
    }


def short(tokens: int) -> str:
    """A length for an axis: 512, 2k, 16k (k is 1,024)."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def _held(text: str) -> str:
    """The text with numbers held together with their units and spreads at line ends."""
    return re.sub(r"(?<=\d) (?=[A-Za-z±%])|(?<=±) ", "\u00a0", text)


def _figures(summary: Summary, lines: Sequence[dict[str, Any]], styles: dict[str, dict[str, str]]) -> dict[str, Any]:
    """name -> {traces, axes}. A trace with `system` takes that system's colour when the page is drawn."""
    figures: dict[str, Any] = {}
    for task in METRICS:
        curves = {row.system: curve for row in summary.rows if (curve := _curve(lines, task, row.system))}
        if curves:
            unit = "bits per byte, validation part" if task == "text" else "accuracy, validation part"
            scope = _curve_range(curves.values()) if task == "text" else [-0.03, 1.03]
            for name, what in _CURVE_AXES[task]:
                figures[f"{task}_{name}"] = {
                    "traces": [t for slug, curve in curves.items() for t in _curve_traces(slug, curve, name, styles)],
                    "x": {"title": what, "rangemode": "tozero"},
                    "y": {"title": unit, "range": scope},
                }
    final = [row for row in summary.rows if row.text and row.text.mean is not None]
    if final:
        figures["text_final"] = _final(final, styles)
    for length in summary.fronts:
        figures[f"recall_state_{length}"] = _recall_state(summary, length, styles)
    for cost in COSTS:
        traces = [t for row in summary.rows if (t := _cost_trace(row, cost, styles))]
        if traces:
            figures[cost] = {
                "traces": traces,
                "x": _log_axis("length (tokens)", summary.lengths, lambda low, high: summary.lengths, short),
                "y": _cost_axis(cost, [y for trace in traces for y in trace["y"]]),
            }
    return figures


def _curve(lines: Sequence[dict[str, Any]], task: str, slug: str) -> dict[str, Any] | None:
    """Mean and range over seeds at the points that all reached; of the longest setting where there are several."""
    runs = [run for run in chosen_runs(lines, task, slug)[0] if len(run["curve"])]
    if not runs:
        return None
    part = max((run["length"], run["task"]) for run in runs)
    tables = [np.array(run["curve"], dtype=np.float64) for run in runs if (run["length"], run["task"]) == part]
    longest = max(tables, key=len)
    end = min(table[-1, 0] for table in tables)
    tokens = longest[longest[:, 0] <= end, 0]
    seconds = np.mean([np.interp(tokens, table[:, 0], table[:, 1]) for table in tables], axis=0)
    values = np.array([np.interp(tokens, table[:, 0], table[:, 2]) for table in tables])
    columns = {
        "tokens": tokens,
        "seconds": seconds,
        "mean": values.mean(0),
        "low": values.min(0),
        "high": values.max(0),
    }
    curve: dict[str, Any] = {name: [float(f"{v:.6g}") for v in column] for name, column in columns.items()}
    return curve | {"diverged": any(run["value"] is None for run in runs)}


def _curve_range(curves: Iterable[dict[str, Any]]) -> list[float] | None:
    # the first steps fall from far above; the eye needs the rest
    known = list(curves)
    low = min(min(curve["mean"]) for curve in known)
    quarter = 0.25 * max(curve["tokens"][-1] for curve in known)
    reached = [curve for curve in known if curve["tokens"][-1] >= quarter] or known
    high = max(float(np.interp(quarter, curve["tokens"], curve["mean"])) for curve in reached)
    # where a run broke off is worth seeing, unless it had risen far away by then
    ends = [curve["mean"][-1] for curve in known if curve["diverged"]]
    high = max([high, *(end for end in ends if end < 1.5 * high)])
    pad = 0.05 * (high - low)
    return [low - pad, high + pad] if high > low else None


def _curve_traces(
    slug: str, curve: dict[str, Any], x: str, styles: dict[str, dict[str, str]]
) -> Iterable[dict[str, Any]]:
    if curve["low"] != curve["high"]:
        yield {
            "system": slug,
            "role": "band",
            "x": curve[x] + curve[x][::-1],
            "y": curve["high"] + curve["low"][::-1],
            "mode": "lines",
            "fill": "toself",
            "hoverinfo": "skip",
        }
    unit = "%{x:,.0f} tokens" if x == "tokens" else "%{x:,.1f} s"
    yield {
        "system": slug,
        "role": "line",
        "x": curve[x],
        "y": curve["mean"],
        "mode": "lines" if len(curve[x]) > 1 else "markers",
        "line": {"dash": styles[slug]["dash"]},
        "hovertemplate": f"<b>{html.escape(slug)}</b><br>%{{y:.3f}} after {unit}<extra></extra>",
    }
    if curve["diverged"]:
        yield {
            "system": slug,
            "role": "point",
            "x": curve[x][-1:],
            "y": curve["mean"][-1:],
            "mode": "markers",
            "marker": {"symbol": "x-thin-open"},
            "hovertemplate": f"<b>{html.escape(slug)}</b><br>diverged after {unit}<extra></extra>",
        }


def _final(rows: Sequence[Any], styles: dict[str, dict[str, str]]) -> dict[str, Any]:
    ordered = sorted(rows, key=lambda row: -row.text.mean)
    traces: list[dict[str, Any]] = []
    for place, row in enumerate(ordered):
        score: Score = row.text
        name = html.escape(row.system)
        if len(score.values) > 1:
            traces.append(
                {
                    "system": row.system,
                    "role": "seeds",
                    "x": list(score.values),
                    "y": [place] * len(score.values),
                    "mode": "lines+markers",
                    "hovertemplate": f"<b>{name}</b>, one seed<br>%{{x:.4f}} bits per byte<extra></extra>",
                }
            )
        traces.append(
            {
                "system": row.system,
                "role": "point",
                "x": [score.mean],
                "y": [place],
                "mode": "markers",
                "marker": {"symbol": styles[row.system]["symbol"]},
                "hovertemplate": f"<b>{name}</b><br>{score_text(score, 'text')} bits per byte<extra></extra>",
            }
        )
    labels = [html.escape(row.system) + (" *" if not row.text.whole else "") for row in ordered]
    return {
        "traces": traces,
        "rows": len(ordered),
        "x": {"title": "bits per byte, test part"},
        "y": {"tickvals": list(range(len(ordered))), "ticktext": labels, "range": [-0.6, len(ordered) - 0.4]},
    }


def _recall_state(summary: Summary, length: int, styles: dict[str, dict[str, str]]) -> dict[str, Any]:
    points = {
        row.system: (cost.state_bytes, row.recall)
        for row in summary.rows
        if row.recall and row.recall.mean is not None
        if (cost := row.costs.get(length)) and cost.state_bytes is not None
    }
    # a log axis has no zero; a system without state stands at one byte
    front = [(max(points[name][0], 1), points[name][1].mean) for name in summary.fronts[length]]
    sizes = [max(size, 1) for size, _ in points.values()]
    traces: list[dict[str, Any]] = [
        {
            "role": "front",
            "x": [x for x, _ in front] + [max(sizes) * 2],
            "y": [y for _, y in front] + [front[-1][1]],
            "mode": "lines",
            "line": {"shape": "hv"},
            "hoverinfo": "skip",
        }
    ]
    for name, (size, score) in points.items():
        spread = [score.spread] if score.spread is not None else [0]
        text = f"{score_text(score, 'recall')} accuracy<br>{amount(size)} at {length:,} tokens"
        traces.append(
            {
                "system": name,
                "role": "point",
                "label": name,
                "x": [max(size, 1)],
                "y": [score.mean],
                "error_y": {"type": "data", "array": spread, "visible": score.spread is not None},
                "mode": "markers",
                "marker": {"symbol": styles[name]["symbol"]},
                "hovertemplate": f"<b>{html.escape(name)}</b><br>{text}<extra></extra>",
            }
        )
    chance = next((score.chance for _, score in points.values() if score.chance is not None), None)
    return {
        "traces": traces,
        "x": _log_axis(f"state at {length:,} tokens, one sequence", [min(sizes) / 2, max(sizes) * 4], _powers, amount),
        "y": {"title": "recall accuracy", "range": [-0.06, 1.18], "tickvals": [0, 0.25, 0.5, 0.75, 1]},
        "chance": chance,
    }


def _cost_trace(row: Any, cost: str, styles: dict[str, dict[str, str]]) -> dict[str, Any] | None:
    # a log axis has no zero
    points = [(n, value) for n, c in row.costs.items() if (value := getattr(c, cost))]
    if not points:
        return None
    unit = {"state_bytes": "", "peak_mib": " MiB"}.get(cost, " ms")
    texts = [f"{amount(v) if cost == 'state_bytes' else digits(v)}{unit} at {n:,} tokens" for n, v in points]
    return {
        "system": row.system,
        "role": "line",
        "x": [n for n, _ in points],
        "y": [value for _, value in points],
        "text": texts,
        "mode": "lines+markers",
        "line": {"dash": styles[row.system]["dash"]},
        "marker": {"symbol": styles[row.system]["symbol"]},
        "hovertemplate": f"<b>{html.escape(row.system)}</b><br>%{{text}}<extra></extra>",
    }


def _cost_axis(cost: str, values: Sequence[float]) -> dict[str, Any]:
    title = _COST_NAMES[cost][1]
    if cost == "state_bytes":
        return _log_axis(title, values, _powers, amount)
    return _log_axis(title, values, _nice, lambda value: f"{value:,.10g}")


def _log_axis(
    title: str,
    values: Sequence[float],
    place: Callable[[float, float], Sequence[float]],
    text: Callable[[Any], str],
) -> dict[str, Any]:
    low, high = math.log10(min(values)), math.log10(max(values))
    # a flat cost must look flat: less than a factor of two is not spread over the whole height
    pad = max(0.06 * (high - low), (0.3 - (high - low)) / 2, 0.03)
    ticks = place(10 ** (low - pad), 10 ** (high + pad))
    return {
        "title": title,
        "type": "log",
        "range": [low - pad, high + pad],
        "tickvals": list(ticks),
        "ticktext": [text(tick) for tick in ticks],
    }


def _powers(low: float, high: float) -> list[float]:
    """Powers of two from low to high, at most seven."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first) / 6))
    return [2.0**n for n in range(first + -first % step, last + 1, step)]


def _nice(low: float, high: float) -> list[float]:
    """Round numbers from low to high, at most seven unless there are more decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 4, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [tick for n in decades for m in steps if low <= (tick := float(f"{m}e{n}")) <= high]
        if len(ticks) <= 7:
            break
    return ticks


def _columns(summary: Summary) -> list[dict[str, Any]]:
    """The table by columns: name, unit, length (None: always shown) and one cell (text, sort key) a row."""
    rows = summary.rows
    columns = [
        _column("Text", "bits per byte", None, [_score_cell(row.text, "text") for row in rows]),
        _column("Recall", "accuracy", None, [_score_cell(row.recall, "recall") for row in rows]),
        _column("Training", "tokens/s", None, [_cell(row.train_tokens_per_s, digits) for row in rows]),
    ]
    shown = (
        ("prefill_tokens_per_s", "Prefill", "tokens/s, ", digits),
        ("decode_ms", "Decode", "ms/token, ", digits),
        ("state_bytes", "State", "at ", amount),
        ("peak_mib", "Peak", "MiB, ", digits),
    )
    for length in summary.lengths:
        for name, title, unit, text in shown:
            cells = [_cell(getattr(row.costs.get(length), name, None), text) for row in rows]
            columns.append(_column(title, unit + short(length), length, cells))
    sizes = [_cell(row.parameters, lambda value: f"{value:,}") for row in rows]
    columns.append(_column("Parameters", "count", None, sizes))
    return columns


def _column(name: str, unit: str, length: int | None, cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "unit": unit, "length": length, "cells": cells}


def _cell(value: float | None, text: Callable[[Any], str]) -> dict[str, Any]:
    return {"text": "–" if value is None else text(value), "sort": value, "note": ""}


def _score_cell(score: Score | None, task: str) -> dict[str, Any]:
    if score is None:
        return _cell(None, str)
    star = "" if score.whole or score.mean is None else " *"
    rates = ", ".join(f"{lr:g}" for lr in score.lrs)
    return {"text": score_text(score, task) + star, "sort": score.mean, "note": f"lr {rates}"}


def _exponents(summary: Summary) -> dict[str, Any]:
    def text(found: Fit | None) -> str:
        if found is None:
            return "–"
        error = f" ± {found.error:.2f}" if found.error is not None else ""
        return f"{found.exponent:.2f}".replace("-0.00", "0.00").replace("-", "−") + error

    rows = [row for row in summary.rows if row.fits]
    points = sorted({found.points for row in rows for found in row.fits.values()})
    return {
        "names": [_COST_NAMES[cost][0] for cost in COSTS],
        "rows": [(row.system, [(text(row.fits.get(c)), row.fits.get(c)) for c in COSTS]) for row in rows],
        "points": "–".join(str(p) for p in (points if len(points) < 2 else (points[0], points[-1]))),
    }


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_setting(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _machine(lines: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    found = next((line for line in reversed(list(lines)) if line["kind"] == "machine"), None)
    if found is None:
        return []
    named = (
        ("cpu", "Processor", ""),
        ("cores", "Cores", ""),
        ("threads", "Threads of torch", ""),
        ("memory_gib", "Memory", " GiB"),
        ("gemm_gflops", "Matrix product, float32", " GFLOP/s"),
        ("copy_gb_s", "Copying memory", " GB/s"),
        ("read_gb_s", "Reading memory", " GB/s"),
        ("allocator", "Allocator", ""),
        ("os", "System", ""),
        ("python", "Python", ""),
        ("torch", "torch", ""),
    )
    return [(title, f"{found[key]}{unit}") for key, title, unit in named if found.get(key) is not None]


def _training(lines: Iterable[dict[str, Any]], task: str) -> dict[str, Any] | None:
    """What all training runs of a task had in common, read from the lines."""
    runs = [line for line in lines if line.get("metric") == METRICS[task]]
    if not runs:
        return None

    def span(name: str) -> str:
        values = sorted({run[name] for run in runs})
        return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"

    return {
        "task": task,
        "names": ", ".join(sorted({f"{run['task']} (version {run['task_version']})" for run in runs})),
        "length": span("length"),
        "tokens": span("tokens"),
        "steps": span("steps"),
        "rates": ", ".join(f"{lr:g}" for lr in sorted({run["lr"] for run in runs})),
        "seeds": ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs})),
        "chance": next((run["chance"] for run in runs if run.get("chance") is not None), None),
        "engines": ", ".join(sorted({str(run["engine"]) for run in runs})),
    }


def _options(lines: Iterable[dict[str, Any]]) -> dict[str, str]:
    about: dict[str, Any] = next((line["systems"] for line in lines if line["kind"] == "run"), {})
    return {
        slug: ", ".join(f"{name}={value}" for name, value in facts["options"].items())
        for slug, facts in about.items()
        if facts.get("options")
    }


def _versions(lines: Iterable[dict[str, Any]]) -> str:
    found = sorted({(line["regard"], line["torch"]) for line in lines if line.get("regard")})
    return "; ".join(f"regard {regard}, torch {torch}" for regard, torch in found)
