"""Queries and keys, number by number, against the scores that the model made of them."""

import pytest
import torch

import regard
from regard import OptionError, neuron_view
from regard import record as record_of
from regard.hosts.transformers.specimens import make, prompt


@pytest.fixture(scope="module")
def model():
    return make("llama")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("padded", [0, 3])
def test_products_are_the_scores_and_their_softmax_the_weights(name, padded):
    inputs = prompt(length=9, padded=padded)
    tape = record_of(make(name), inputs, sites=("q", "k", "scores", "weights"))
    for layer, head, place in ((0, 0, -1), (1, 3, 4), (2, 2, 0)):
        found = neuron_view(tape, layer=layer, head=head, place=place)
        count = 9 - padded
        assert found.keys.shape == (count, 8) == found.products.shape and len(found.key_tokens) == count
        row = padded + place % count
        assert torch.equal(found.weights, tape["weights", layer][0, head, row, padded:])
        assert found.token == str(int(inputs["input_ids"][0, row]))
        seen = found.weights > 0
        assert seen.any()
        scores = tape["scores", layer][0, head, row, padded:]
        torch.testing.assert_close(found.scores[seen], scores[seen], rtol=1e-4, atol=1e-5)
        own = found.scores[seen].softmax(0)
        torch.testing.assert_close(own, found.weights[seen], rtol=1e-4, atol=1e-5)


def test_query_heads_of_a_group_share_their_keys(model):
    tape = record_of(model, prompt(length=6), sites=("q", "k", "weights"))
    one, two, other = (neuron_view(tape, layer=1, head=head) for head in (0, 1, 2))
    assert torch.equal(one.keys, two.keys) and not torch.equal(one.query, two.query)
    assert not torch.equal(one.keys, other.keys)


def test_a_step_of_decoding(model):
    with regard.recording(model, sites=("q", "k", "weights")) as tape:
        model.generate(**prompt(length=6, padded=2), max_new_tokens=3, do_sample=False, pad_token_id=0)
    found = neuron_view(tape, layer=2, head=1, step=2)
    assert found.keys.shape == (6, 8) and len(found.key_tokens) == 6
    torch.testing.assert_close(found.scores.softmax(0), found.weights, rtol=1e-4, atol=1e-5)


def test_the_figure_shows_all_four(model):
    tape = record_of(model, prompt(length=6), sites=("q", "k", "weights"))
    found = neuron_view(tape, layer=1, head=2, tokens=list("abcdef"))
    figure = found.figure()
    assert len(figure.data) == 4 and figure.data[2].z.shape == (6, 8)
    assert figure.data[3].y[5] == "5 f" and "'f'" in figure.layout.annotations[0].text
    torch.testing.assert_close(torch.as_tensor(figure.data[2].z), found.products)


def test_what_is_not_there_is_refused(model):
    tape = record_of(model, prompt(length=6), sites=("q", "k", "weights"))
    with pytest.raises(OptionError, match="head is 4; the tape holds 4 of 4"):
        neuron_view(tape, layer=0, head=4)
    with pytest.raises(OptionError, match="place is 6; there are 6"):
        neuron_view(tape, layer=0, head=0, place=6)
    with pytest.raises(OptionError, match='record with sites=\\("q", "k", "weights"\\)'):
        neuron_view(record_of(model, prompt(length=6)), layer=0, head=0)
    with pytest.raises(OptionError, match="the tape holds 2 of 4 heads"):
        neuron_view(record_of(model, prompt(length=6), sites=("q", "k", "weights"), heads=(0, 1)), layer=0, head=0)
