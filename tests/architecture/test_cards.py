"""Cards are literals that are read, not run, and one file is all that a system needs."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from regard.contract.card import CARDS
from regard.contract.catalogue import CardError, catalogue, index, read_card, walk
from regard.contract.stubs import stub

ROOT = Path(regard.__file__).parent
REPOSITORY = Path(__file__).resolve().parents[2]
GOOD = '''"""A synthetic op: plain softmax under another name."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense
from regard.patterns import Bound, Pattern

CARD = OpCard(
    slug="synthetic",
    title="A synthetic op",
    paper="None, but one is required",
    exports=("synthetic_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self"),
    accepts=("pattern", "scale"),
    decode="kv",
    padding=True,
    documents=True,
    engines=("dense",),
)


@operator(CARD)
def synthetic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
    engine: str | None = None,
) -> Tensor:
    """Softmax attention."""
    return dense(q, k, v, pattern, is_causal=is_causal, scale=scale, q_offset=q_offset, engine=engine).out
'''


def test_one_new_file_appears_everywhere_and_no_list_is_edited(tmp_path):
    package = tmp_path / "regard"
    shutil.copytree(ROOT, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "ops" / "synthetic.py").write_text(GOOD)
    script = """
import json, runpy, sys
import regard
from regard.bench.compare import Settings, plan
from regard.checks.battery import every_subject
from regard.contract.catalogue import catalogue
from regard.contract.stubs import stub
docs = runpy.run_path(sys.argv[1])
print(json.dumps({
    "file": regard.__file__,
    "list": list(catalogue()),
    "battery": [s.name for s in every_subject()],
    "compare": plan(Settings()),
    "stub": stub(),
    "table": docs["table"](catalogue()),
    "pages": docs["pages"](catalogue()),
    "by name": regard.synthetic_attention.card.title,
}))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    generate = str(REPOSITORY / "docs" / "generate.py")
    done = subprocess.run(
        [sys.executable, "-c", script, generate], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["file"].startswith(str(tmp_path))
    assert "synthetic" in seen["list"]
    assert {"ops/synthetic", "mixers/synthetic"} <= set(seen["battery"])
    assert "synthetic" in seen["compare"]
    assert "from regard.ops.synthetic import synthetic_attention as synthetic_attention" in seen["stub"]
    assert "`synthetic`" in seen["table"] and "regard.synthetic_attention" in seen["pages"]
    assert seen["by name"] == "A synthetic op"


@pytest.mark.parametrize("name", catalogue())
def test_the_card_in_the_text_is_the_card_of_the_module(name):
    entry = catalogue()[name]
    entry.load()
    assert sys.modules[entry.module].CARD == read_card(entry.path)


@pytest.mark.parametrize("name", catalogue())
def test_exports_exist_and_say_what_they_do(name):
    for public, value in catalogue()[name].exports().items():
        assert getattr(regard, public) is value
        assert (value.__doc__ or "").strip(), public


@pytest.mark.parametrize(
    "change, text",
    [
        (('    title="A synthetic op",\n', ""), "title"),
        (('    title="A synthetic op",\n', '    title="A", titel="B",\n'), "unknown field 'titel'.*'title'"),
        (('engines=("dense",)', "engines=tuple(ENGINES)"), "field 'engines' is not a literal"),
        (('engines=("dense",)', 'engines=["dense"]'), "field 'engines'.*must be a tuple"),
        (('"causal_self"),', '"causal_slef"),'), "'attends'.*'causal_slef'"),
        (('slug="synthetic"', 'slug="other"'), "'slug' is 'other'.*'synthetic'"),
        (('paper="None, but one is required"', 'paper=""'), "names no paper"),
        (("CARD = OpCard(", "CARD = OpsCard("), "OpsCard is not a card"),
        (("CARD = OpCard(\n", "CARD = OpCard(  \n"), "must be written as"),
    ],
)
def test_a_bad_card_is_refused_naming_file_and_field(tmp_path, change, text):
    path = tmp_path / "synthetic.py"
    assert change[0] in GOOD
    path.write_text(GOOD.replace(*change))
    with pytest.raises(CardError, match=f"(?s){path.name}.*{text}"):
        read_card(path)


def test_names_are_unique_over_all_rooms(tmp_path):
    for room in ("ops", "mixers"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "synthetic.py").write_text(GOOD)
    with pytest.raises(CardError, match="'synthetic' is taken"):
        index(walk(tmp_path))
    (tmp_path / "mixers" / "synthetic.py").unlink()
    (tmp_path / "ops" / "second.py").write_text(GOOD.replace('slug="synthetic"', 'slug="second"'))
    with pytest.raises(CardError, match="export 'synthetic_attention' is taken"):
        index(walk(tmp_path))


def test_a_part_names_an_owner_that_exists(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "synthetic.py").write_text(GOOD.replace('paper="None', 'part_of="nobody", paper="None'))
    with pytest.raises(CardError, match="part_of names 'nobody'"):
        index(walk(tmp_path))


def test_every_kind_of_card_knows_its_kind():
    assert sorted(card.kind for card in CARDS.values()) == ["mixer", "model", "op", "task"]


def test_the_stub_covers_every_public_name():
    text = stub()
    for name in regard.__all__:
        assert f" as {name}\n" in text or name == "__version__"


def test_the_committed_stub_is_what_type_checkers_read():
    text = (ROOT / "__init__.pyi").read_text(encoding="utf-8")
    assert text == runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))["stub"]()
