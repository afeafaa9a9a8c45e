"""Cards are literals that are read, not run."""

import sys

import pytest

import regard
from regard.contract.card import CARDS
from regard.contract.catalogue import CardError, catalogue, index, read_card, walk

GOOD = '''"""A synthetic op: plain softmax under another name."""

from regard.contract.card import OpCard

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
'''


@pytest.mark.parametrize("name", catalogue())
def test_the_card_in_the_text_is_the_card_of_the_module(name):
    entry = catalogue()[name]
    entry.load()
    assert read_card(entry.path) == sys.modules[entry.module].CARD


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
    kinds = ["decoding", "explanation", "intervention", "mixer", "model", "op", "parallel", "pool", "task", "training"]
    assert sorted(card.kind for card in CARDS.values()) == kinds
