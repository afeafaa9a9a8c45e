"""How long work tells a terminal how it goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regard.contract.optional import need


class Progress:
    """A bar a part, and a line when it is done. console: rich's."""

    def __init__(self, console: Any):
        self.console = console
        self._bar: Any = None
        self._task: Any = None

    @contextmanager
    def part(self, text: str, steps: int) -> Iterator[None]:
        progress = need("rich.progress", "bench")
        columns = (
            progress.TextColumn("{task.description:<36}"), progress.BarColumn(), progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(), progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with progress.Progress(*columns, console=self.console) as self._bar:
            self._task = self._bar.add_task(text, total=steps, note="")
            yield

    def advance(self, step: int, note: str) -> None:
        self._bar.update(self._task, completed=step, note=note)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)
