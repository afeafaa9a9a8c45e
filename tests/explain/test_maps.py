"""Views show what the tape holds; maps are means over rows that are real."""

import re

import pytest
import torch

import regard
from regard import HeadMap, HeadView, OptionError, ShapeError, entropy_map, head_view, sink_map
from regard import record as record_of
from regard.hosts.transformers.specimens import make, prompt
from tests.explain.induction_model import PREVIOUS, induction_model


@pytest.fixture(scope="module")
def model():
    return make("llama")


def test_a_view_holds_the_weights_of_one_text_without_its_pads(model):
    inputs = prompt(length=9, padded=3)
    tape = record_of(model, inputs)
    view = head_view(tape, row=0)
    assert list(view.weights) == [0, 1, 2]
    for layer, table in view.weights.items():
        assert torch.equal(table, tape["weights", layer][0, :, 3:, 3:])
    assert view.tokens == view.key_tokens == tuple(str(i) for i in inputs["input_ids"][0, 3:].tolist())
    other = head_view(tape, row=1, layers=(-1,), heads=(1, 3))
    assert list(other.weights) == [2] and torch.equal(other.weights[2], tape["weights", 2][1, [1, 3]])


def test_names_come_from_the_tokenizer_or_from_the_caller():
    lm, tokenizer = regard.tiny.lm()
    inputs = tokenizer("def f", return_tensors="pt")
    tape = record_of(lm, {"input_ids": inputs["input_ids"]})
    assert head_view(tape, tokenizer=tokenizer).tokens[:2] == ("<begin>", "d")
    given = [*"abcdef"]
    assert head_view(tape, given).tokens == tuple(given)


def test_weights_of_other_tools_are_viewed_as_they_are():
    attention = tuple(torch.rand(2, 3, 4, 6) for _ in range(2))
    view = head_view(attention, list("abcd"), key_tokens=list("uvwxyz"), row=1)
    assert view.tokens == tuple("abcd") and view.key_tokens == tuple("uvwxyz")
    assert torch.equal(view.weights[1], attention[1][1])
    square = head_view((torch.rand(1, 2, 5, 5),), list("abcde"), sentence_b_start=3)
    assert square.key_tokens == tuple("abcde") and square.boundary == 3


def test_a_step_of_decoding_is_viewed_with_the_last_of_its_names(model):
    inputs = prompt(length=6)
    with regard.recording(model) as tape:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    view = head_view(tape, step=2)
    assert view.weights[0].shape == (4, 1, 8) and len(view.tokens) == 1 and len(view.key_tokens) == 8


def test_the_figure_draws_every_head_and_shows_one_layer(model):
    inputs = prompt(length=7)
    view = head_view(record_of(model, inputs), list("aabbaab"))
    figure = view.figure()
    assert len(figure.data) == 3 * 4
    assert [trace.visible for trace in figure.data] == [True] * 4 + [False] * 8
    # equal names stay apart
    assert len(set(figure.data[0].x)) == 7
    assert torch.equal(torch.as_tensor(figure.data[5].z), view.weights[1][1])
    menu = figure.layout.updatemenus[0].buttons
    assert [b.label for b in menu] == ["layer 0", "layer 1", "layer 2"]
    assert list(menu[2].args[0]["visible"]) == [False] * 8 + [True] * 4


def test_thumbnails_draw_every_head_of_every_layer_at_once(model):
    view = head_view(record_of(model, prompt(length=7)), layers=(0, 2))
    figure = view.thumbnails()
    assert [trace.name for trace in figure.data] == [f"layer {la}, head {h}" for la in (0, 2) for h in range(4)]
    assert torch.equal(torch.as_tensor(figure.data[6].z), view.weights[2][2])
    # each in a cell of its own
    assert len({(trace.xaxis, trace.yaxis) for trace in figure.data}) == 8


def test_cross_attention_of_a_real_model_is_viewed():
    model, inputs = make("t5"), prompt(length=8)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, decoder_input_ids=inputs["input_ids"][:, :5], output_attentions=True)
    view = head_view(out.cross_attentions, list("abcde"), key_tokens=list("stuvwxyz"), row=1)
    for layer, table in enumerate(out.cross_attentions):
        assert torch.equal(view.weights[layer], table[1])
    assert view.weights[0].shape == (4, 5, 8) and view.tokens == tuple("abcde") and view.key_tokens == tuple("stuvwxyz")
    assert view.figure().data[0].z.shape == (5, 8)
    own = head_view(out.encoder_attentions, list("stuvwxyz"))
    assert own.tokens == own.key_tokens and torch.equal(own.weights[0], out.encoder_attentions[0][0])


def test_a_second_sentence_is_drawn_apart():
    figure = head_view((torch.rand(1, 2, 5, 5),), list("abcde"), sentence_b_start=3).figure()
    assert {(line.x0, line.y0) for line in figure.layout.shapes} & {(2.5, 0), (0, 2.5)}
    assert not head_view((torch.rand(1, 2, 5, 5),), list("abcde")).figure().layout.shapes


def test_the_page_needs_no_network(model, tmp_path):
    path = tmp_path / "heads.html"
    head_view(record_of(model, prompt(length=5))).write(path)
    page = path.read_text()
    assert "layer 2, head 3" in page and "Plotly.newPlot" in page
    assert not re.findall(r"<(?:script|link)[^>]*(?:src|href)=", page)


def by_hand(weights, valid, of_row):
    """The mean of a function of (row, keys that are real) over real rows of all texts."""
    found = []
    for b in range(len(weights)):
        keys = valid[b].nonzero()[:, 0]
        found += [of_row(place, weights[b, :, i][:, keys]) for place, i in enumerate(keys)]
    return torch.stack([x for x in found if x is not None]).mean(0)


@pytest.mark.parametrize("padded", [0, 4])
@pytest.mark.parametrize("count", [1, 3])
def test_maps_are_means_over_real_rows(model, padded, count):
    inputs = prompt(length=11, padded=padded)
    tape, valid = record_of(model, inputs), inputs["attention_mask"].bool()
    sinks, entropies = sink_map(tape, count=count), entropy_map(tape)
    assert entropies.unit == "nats" and sinks.values.shape == (3, 4)
    for layer in range(3):
        weights = tape["weights", layer].float()
        wanted = by_hand(weights, valid, lambda i, row: None if i < count else row[:, :count].sum(1))
        torch.testing.assert_close(sinks.values[layer], wanted, rtol=1e-4, atol=1e-5)
        wanted = by_hand(weights, valid, lambda i, row: torch.special.entr(row).sum(1))
        torch.testing.assert_close(entropies.values[layer], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduce", ["entropy", "sink_mass", ("entropy", "sink_mass", "column_sum")])
def test_sums_on_the_tape_give_the_same_maps(model, reduce):
    inputs = prompt(length=70)
    whole, some = record_of(model, inputs), record_of(model, inputs, reduce=reduce, count=2)
    if "entropy" in reduce:
        torch.testing.assert_close(entropy_map(some).values, entropy_map(whole).values, rtol=1e-3, atol=1e-3)
    if "sink_mass" in reduce:
        torch.testing.assert_close(
            sink_map(some, count=2).values, sink_map(whole, count=2).values, rtol=1e-3, atol=1e-4
        )


def test_a_head_that_looks_at_one_key_has_no_entropy():
    tape = record_of(induction_model(), torch.randperm(32)[:20][None])
    values = entropy_map(tape).values
    assert values[PREVIOUS] < 1e-3 and values.flatten().topk(5).values.min() > 1.5


def test_what_is_not_on_the_tape_is_asked_for(model):
    inputs = prompt(length=9, padded=2)
    columns = record_of(model, inputs, reduce="column_sum")
    with pytest.raises(OptionError, match='reduce="entropy"'):
        entropy_map(columns)
    with pytest.raises(OptionError, match='reduce="sink_mass"'):
        sink_map(record_of(model, inputs, rows=(0, -1)))
    with pytest.raises(OptionError, match="first 8 keys, not on 1"):
        sink_map(record_of(model, inputs, reduce="sink_mass"))
    with pytest.raises(OptionError, match="some texts start with pads"):
        sink_map(record_of(model, inputs, reduce="sink_mass", count=1))
    with pytest.raises(OptionError, match="at least 1, not 0"):
        sink_map(columns, count=0)
    with pytest.raises(ShapeError, match="record weights with reduce left out"):
        head_view(columns)
    with pytest.raises(OptionError, match="no weights to view"):
        head_view(record_of(model, inputs, sites=("z",)))


def test_bad_views_are_refused(model):
    tape = record_of(model, prompt(length=9, padded=2))
    with pytest.raises(OptionError, match="row is 2; the batch has 2"):
        head_view(tape, row=2)
    with pytest.raises(ShapeError, match="there are 4 names for 9 tokens, of which 7 are no pads"):
        head_view(tape, list("abcd"))
    wide = HeadView({0: torch.zeros(1, 6000, 6000)}, ("a",) * 6000, ("a",) * 6000)
    with pytest.raises(OptionError, match="too many for one figure"):
        wide.figure()


def test_a_map_knows_its_largest_and_leaves_out_what_is_not_there():
    values = torch.tensor([[0.1, 0.9, float("nan")], [0.5, 0.2, 0.3]])
    drawn = HeadMap(values, "something", "nats")
    assert drawn.top(3) == [(0, 1), (1, 0), (1, 2)]
    figure = drawn.figure()
    assert figure.data[0].z.shape == (2, 3) and figure.layout.title.text == "something"
    with pytest.raises(ShapeError, match=r"must be \(layers, heads\)"):
        HeadMap(torch.zeros(3), "something")
