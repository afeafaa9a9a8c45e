"""Results: one JSON line a measurement, appended as it is made, so that a killed run loses none.

Every line has `kind`, `key` (unique: a measurement is made once), and for kinds other than "run" and "machine" also
`system` (slug), `regard`, `torch` (versions) and `hardware` (a short text). The kinds:

    run      what was asked for: `settings` (as `regard.bench.compare.Settings`), `data` (text: where it came from),
             `systems` (slug -> {title, paper, options, parameters, hidden}), `steps` (task -> training steps), `matched`
             (text: how they were made equal)
    machine  the machine's limits: cpu, cores, threads, memory_gib, gemm_gflops, copy_gb_s, read_gb_s, allocator, python,
             torch, os
    train    one training run: task, task_version, metric ("bits_per_byte" or "accuracy"), seed, lr, engine, parameters,
             length, state_bytes (at that length), steps, tokens, seconds, value (test part, final), validation (final),
             chance, curve: [[tokens, seconds, validation value]], stopped ("steps", "solved" or "diverged"), best
             (whether its lr won on the validation part)
    trial    the same without `best`, written as the run ends; the "train" lines follow when a system's rates are chosen
    speed    one system at one length: length, train_tokens_per_s (only at the training length), prefill_tokens_per_s,
             decode_ms (per token), state_bytes, peak_mib (None where it was not measured), reason (why, then)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from regard.contract.errors import OptionError, RegardError


class WriteError(RegardError, OSError):
    """A result that could not be written; everything written before it is still there."""


class Results:
    """The lines of a results file, in order. path: the file; it need not exist yet.

    A last line that was cut by a crash is dropped, and said so in `note`. Raises OptionError for a file that is
    damaged elsewhere.
    """

    def __init__(self, path: Path):
        self.path = path
        self.note = ""
        self.lines: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        if path.exists():
            self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def of(self, kind: str) -> list[dict[str, Any]]:
        """All lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def add(self, line: dict[str, Any]) -> None:
        """Append a line and flush it to disk. Raises WriteError, and leaves the file as it was, if there is no room."""
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            raise WriteError(f"could not write to {self.path}: {error}; all earlier results are kept") from error
        self._take(line)

    def _read(self) -> None:
        data = self.path.read_bytes()
        kept = data[: data.rfind(b"\n") + 1]
        if kept != data:
            self.note = f"the last line of {self.path} was cut off and is measured again"
            os.truncate(self.path, len(kept))
        for number, text in enumerate(kept.splitlines(), 1):
            try:
                line = json.loads(text)
                self._take(line)
            except (ValueError, KeyError, TypeError) as error:
                raise OptionError(
                    f"line {number} of {self.path} is damaged ({error}); remove that line, or choose another --out"
                ) from error

    def _take(self, line: dict[str, Any]) -> None:
        self._keys.add(line["key"])
        self.lines.append(line)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file: to a temporary one beside it, then renamed. Raises WriteError; an older file stays as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(f"could not write {path}: {error}; what was there before is kept") from error
