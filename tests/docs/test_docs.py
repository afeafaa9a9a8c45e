"""What the documents say is true: their code runs, their tables are fresh, their commands exist."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from regard.cli.main import commands, parser
from regard.contract.catalogue import catalogue

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_runs_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)


def test_the_commands_of_the_readme_exist():
    lines = [line for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    calls = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ regard ")]
    assert len(calls) >= 3
    for call in calls:
        assert call[1] in commands()
        parser().parse_args(call[1:])


@pytest.mark.parametrize("name", ["catalogue.md", "README.md", "__init__.pyi"])
def test_generated_files_are_fresh(name):
    for path, text in runpy.run_path(str(ROOT / "docs" / "generate.py"))["files"]().items():
        if path.name == name:
            assert path.read_text(encoding="utf-8") == text, "run: make docs"
            return
    raise AssertionError(f"{name} is not generated")


def test_the_table_names_every_owner():
    for entry in catalogue().values():
        assert entry.card.part_of or f"[`{entry.name}`]" in README
