"""One file, no list: a system that is copied into the package appears everywhere, with no other edit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from regard.contract.catalogue import catalogue

PACKAGE = Path(regard.__file__).parent
REPOSITORY = PACKAGE.parents[1]
SYSTEM = '''"""Planted: softmax attention under another name.

    out = softmax(q k') v
"""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense
from regard.patterns import Bound, Pattern

CARD = OpCard(
    slug="planted",
    title="A planted system",
    paper="A paper on planting",
    exports=("planted_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("pattern",),
    padding=True,
    documents=True,
    decode="kv",
    engines=("dense",),
)


@operator(CARD)
def planted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    engine: str | None = None,
) -> Tensor:
    """Attend."""
    return dense(q, k, v, pattern, is_causal=is_causal, q_offset=q_offset, engine=engine).out
'''


class Tree:
    """A copy of the repository with one more file. ask: run code there, and give back what it prints as JSON."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, *arguments: str) -> str:
        # -S: an editable install would put the package itself in front of the copy
        path = os.pathsep.join((str(self.folder / "src"), *(p for p in sys.path if p.endswith("site-packages"))))
        done = subprocess.run(
            [sys.executable, "-S", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, code: str):
        return json.loads(self.run("-c", f"import json, regard; {code}").splitlines()[-1])


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Tree:
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(PACKAGE, folder / "src" / "regard", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "README.md", folder)
    (folder / "src" / "regard" / "ops" / "planted.py").write_text(SYSTEM)
    return Tree(folder)


def test_the_copy_is_what_is_asked(tree):
    assert tree.ask("print(json.dumps(regard.__file__))") == str(tree.folder / "src" / "regard" / "__init__.py")
    assert "planted" not in catalogue()


def test_catalogue(tree):
    names = tree.ask("from regard.contract.catalogue import catalogue; print(json.dumps(list(catalogue())))")
    assert set(names) == {*catalogue(), "planted"}


def test_public_names(tree):
    code = "from regard import planted_attention as p; print(json.dumps([p.card.slug, p is regard.get('planted')]))"
    assert tree.ask(code) == ["planted", True]


def test_list(tree):
    rows = json.loads(tree.run("-m", "regard.cli.main", "list", "--json"))
    assert "planted" in [row["name"] for row in rows]


def test_battery(tree):
    code = (
        "from regard.checks import battery as b; "
        "pairs = [(s.name, c.name) for s in b.every_subject() for c in b.checks() if c.kind == s.card.kind]; "
        "print(json.dumps([p for p in pairs if 'planted' in p[0]]))"
    )
    pairs = {tuple(pair) for pair in tree.ask(code)}
    assert ("ops/planted", "axes") in pairs and ("mixers/planted", "prefill_and_step") in pairs
    report = tree.ask("r = regard.check('planted'); print(json.dumps([r.ok, str(r)]))")
    assert report[0], report[1]


def test_stub(tree):
    text = tree.ask("from regard.contract.stubs import stub; print(json.dumps(stub()))")
    assert "from regard.ops.planted import planted_attention as planted_attention\n" in text


def test_docs(tree):
    tree.run("docs/generate.py")
    assert "planted" in (tree.folder / "README.md").read_text()
    assert "A paper on planting" in (tree.folder / "docs" / "catalogue.md").read_text()
    assert "planted_attention" in (tree.folder / "src" / "regard" / "__init__.pyi").read_text()


def test_mixer_and_compare(tree):
    code = (
        "from regard.bench.compare import Settings, plan; "
        "print(json.dumps([list(plan(Settings())), type(regard.mixer('planted', 16, 4)).__name__]))"
    )
    systems, layer = tree.ask(code)
    assert "planted" in systems and layer == "OpAttention"


@pytest.mark.parametrize("place", ["ops/sprout", "mixers/tokens/sapling"])
def test_what_new_writes_passes_the_battery(tree, place):
    tree.run("-m", "regard.cli.main", "new", place)
    slug = place.rpartition("/")[2]
    report = tree.ask(f"r = regard.check({slug!r}); print(json.dumps([r.ok, str(r)]))")
    assert report[0], report[1]
