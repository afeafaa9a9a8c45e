"""A layer of the cache that gives up keys: what stays where, and what such a cache cannot do."""

import pytest
import torch
from transformers import cache_utils

from regard import OptionError, SnapKV, Unsupported, steer
from regard.hosts.transformers.kept_layer import KeptLayer
from regard.hosts.transformers.specimens import make, prompt
from tests.hosts.test_session import Drop, Scores


def filled(tokens=6, batch=2, heads=3):
    torch.manual_seed(0)
    layer, k, v = KeptLayer(), torch.randn(batch, heads, tokens, 4), torch.randn(batch, heads, tokens, 5)
    layer.update(k, v)
    return layer, k, v


def test_heads_and_rows_keep_keys_of_their_own_and_new_ones_follow():
    layer, k, v = filled()
    layer.marks["worth"] = torch.arange(6.0).expand(2, 3, 6).clone()
    index = torch.tensor([[[0, 2, 5], [1, -1, -1], [3, 4, -1]], [[5, -1, -1], [0, 1, 2], [2, 3, 4]]])
    layer.keep(index)
    new = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 5)
    keys, values = layer.update(*new)
    for row in range(2):
        for head in range(3):
            for place, old in enumerate(index[row, head].tolist()):
                if old >= 0:
                    assert torch.equal(keys[row, head, place], k[row, head, old])
                    assert torch.equal(values[row, head, place], v[row, head, old])
                    assert layer.marks["worth"][row, head, place] == old
    assert torch.equal(keys[:, :, 3:], new[0]) and torch.equal(values[:, :, 3:], new[1])
    assert torch.equal(layer.positions[..., :3], index)
    assert (layer.positions[..., 3:] == torch.tensor([6, 7])).all() and (layer.marks["worth"][..., 3:] == 0).all()
    # the sequence goes on where it was, and masks are as wide as all that came
    assert layer.get_seq_length() == 8 and layer.get_mask_sizes(2) == (10, 0)
    assert layer.nbytes == 2 * 3 * 5 * (4 + 5) * 4
    again = layer.positions.clone()
    layer.keep(torch.tensor([4, 0]).expand(2, 3, 2))
    assert torch.equal(layer.positions, again[..., [4, 0]])


def test_rows_move_with_all_that_is_known_of_them():
    for move, rows in (
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ):
        layer, k, v = filled()
        layer.marks["worth"] = torch.arange(2.0).view(2, 1, 1).expand(2, 3, 6).clone()
        index = torch.tensor([[[0, 1]], [[4, 5]]]).expand(2, 3, 2)
        layer.keep(index)
        move(layer)
        assert torch.equal(layer.positions, index[rows])
        assert torch.equal(layer.marks["worth"][:, 0, 0], torch.tensor(rows).float())
        for at, row in enumerate(rows):
            assert torch.equal(layer.keys[at], k[row][:, index[row, 0]])
            assert torch.equal(layer.values[at], v[row][:, index[row, 0]])


def test_a_layer_that_was_reset_is_new():
    layer, _, _ = filled()
    layer.keep(torch.zeros(2, 3, 1, dtype=torch.int64))
    layer.marks["worth"] = torch.ones(2, 3, 1)
    layer.reset()
    assert (layer.positions, layer.seen, layer.marks) == (None, 0, {})


def test_places_that_are_not_there_cannot_be_kept():
    layer, _, _ = filled()
    for index, message in (
        (torch.zeros(2, 2, 1, dtype=torch.int64), r"\(B, G, K\) = \(2, 3\)"),
        (torch.zeros(2, 1, dtype=torch.int64), r"\(B, G, K\)"),
        (torch.full((2, 3, 1), 6), "places 0 to 5"),
        (torch.full((2, 3, 1), -2), "-1 to fill up"),
    ):
        with pytest.raises(OptionError, match=message):
            layer.keep(index)
    assert layer.positions is None and layer.keys.shape[2] == 6


class Rounded(cache_utils.QuantizedLayer):
    """A layer that keeps its keys in some other form."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, given):
        return given


def test_quantised_layers_are_refused_whatever_they_are_called():
    model, inputs = make("llama"), prompt(length=12)
    cache = cache_utils.Cache(layers=[Rounded() for _ in range(3)])
    with steer(model, SnapKV(budget=8, window=3)), pytest.raises(Unsupported, match="Rounded cannot give up keys"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("options", [{"assistant": True}, {"prompt_lookup_num_tokens": 2}])
def test_ways_that_take_tokens_back_are_refused(options):
    model, inputs = make("llama"), {name: x[:1] for name, x in prompt(length=12).items()}
    options = {"assistant_model": make("llama", seed=1)} if "assistant" in options else options
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with steer(model, SnapKV(budget=8, window=3)), pytest.raises(Unsupported, match="gives no tokens back: write with"):
        model.generate(**inputs, **asked, **options)


def test_dropped_tokens_have_no_labels():
    model, inputs = make("llama"), prompt(length=9)
    labels = inputs["input_ids"]
    plain = model(**inputs, labels=labels).loss
    with steer(model, Drop(1, torch.tensor([0, 3, 8]))):
        with pytest.raises(Unsupported, match="call it without labels"):
            model(**inputs, labels=labels)
        assert model(**inputs).logits.shape[1] == 3
    # where none is dropped they are as ever
    with steer(model, Drop(9, torch.tensor([0]))):
        assert torch.equal(model(**inputs, labels=labels).loss, plain)


class DropOfPieces:
    """Lets other tokens of each piece of a prompt go on from layer 1."""

    card = Drop.card

    def __init__(self, *keep):
        self.keep = dict(keep)

    def on_tokens(self, step, layer, x):
        return self.keep[step.start].expand(x.shape[0], -1) if layer == 1 else None


class HideOfPieces:
    """The oracle: from layer 1 on, nobody sees the dropped tokens of any piece."""

    card = Scores.card

    def __init__(self, hidden):
        self.hidden = hidden

    def on_scores(self, call, scores):
        if call.layer < 1:
            return scores
        hidden = [place for place in self.hidden if place < scores.shape[-1]]
        return scores.index_fill(-1, torch.tensor(hidden), float("-inf"))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_tokens_dropped_from_several_pieces_stand_where_they_stood(name):
    model, ids = make(name), prompt(length=20)["input_ids"]
    pieces = (0, 9), (9, 16), (16, 20)
    keep = (0, torch.tensor([0, 3, 4, 8])), (9, torch.tensor([1, 6])), (16, torch.tensor([0, 2, 3]))
    gone = [start + i for (start, kept), (_, end) in zip(keep, pieces, strict=True) for i in range(end - start)
            if i not in kept.tolist()]  # fmt: skip

    def read(*ways):
        with torch.no_grad(), steer(model, *ways):
            cache, found = None, []
            for start, end in (*pieces, (20, 21), (21, 22)):
                given = ids[:, start:end] if start < 20 else torch.full((2, 1), start)
                out = model(given, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                found.append(out.logits[:, -1])
            return torch.stack(found), cache.layers

    ours, layers = read(DropOfPieces(*keep))
    wanted, _ = read(HideOfPieces(gone))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    there = [place for place in range(22) if place not in gone]
    assert layers[0].positions is None
    assert all((layer.positions == torch.tensor(there)).all() and layer.seen == 22 for layer in layers[1:])


@pytest.mark.parametrize("name, layers", [("llama", [0, 1, 2]), ("gemma3", [1, 2])])
def test_a_report_names_the_layers_of_the_model(name, layers):
    model, inputs = make(name), prompt(length=12)
    chosen = SnapKV(budget=8, window=3, layers=(2,))
    with steer(model, chosen) as session:
        assert session.report() == []
        model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        report = session.report()
    assert [row["layer"] for row in report] == layers
    assert [row["kept"] for row in report] == [[14.0, 14.0]] * (len(layers) - 1) + [[10.0, 10.0]]
