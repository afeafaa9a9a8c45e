"""Which passes read the prompt and which write: also where generate reads a prompt in pieces."""

import pytest
import torch

from regard import SnapKV, steer
from regard.contract.card import InterventionCard
from regard.hosts.transformers.specimens import make, prompt


class Tell:
    """Notes every pass: phase, tokens before it, tokens in it, decoding passes."""

    card = InterventionCard(slug="tell", title="tell", exports=("x",), baseline=True, sites=("kv",))

    def __init__(self):
        self.steps = []

    def on_read(self, call, seen):
        if call.layer == 0:
            step = call.step
            self.steps.append((step.phase, step.start, step.tokens, step.decoded))


def write(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("padded", [0, 4])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("piece", [None, 6, 17, 1])
def test_all_pieces_of_a_prompt_are_prompt_and_what_follows_is_not(piece, beams, padded):
    model, tell = make("llama"), Tell()
    with steer(model, tell):
        write(model, prompt(length=18, padded=padded), prefill_chunk_size=piece, num_beams=beams)
    size = piece or 18
    pieces = [("prefill", start, size if start + size <= 18 else 18 - start, 0) for start in range(0, 18, size)]
    assert tell.steps == [*pieces, ("decode", 18, 1, 1), ("decode", 19, 1, 2)]


def test_keys_are_given_up_after_the_last_piece_though_it_is_one_token():
    model, inputs = make("llama"), prompt(length=18)
    held = []

    class Look:
        card = Tell.card

        def on_read(self, call, seen):
            if call.layer == 1:
                held.append(call.k.shape[2])

    with steer(model, SnapKV(budget=8, window=3), Look()) as session:
        write(model, inputs, prefill_chunk_size=17)
        assert held == [17, 18, 9, 10]
        assert all(set(row["kept"]) == {10.0} and row["seen"] == 20 for row in session.report())


def test_a_second_turn_of_one_token_is_a_prompt():
    model, inputs, tell = make("llama"), prompt(length=9), Tell()
    with steer(model, tell):
        first = write(model, inputs, return_dict_in_generate=True)
        # the last token that was written is not in the cache yet
        assert first.past_key_values.get_seq_length() == 11
        again = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
        write(model, again, past_key_values=first.past_key_values)
    assert tell.steps[3:] == [("prefill", 11, 1, 0), ("decode", 12, 1, 1), ("decode", 13, 1, 2)]


def test_ones_own_loop_cannot_tell_a_last_piece_of_one_token():
    model, ids, tell = make("llama"), prompt(length=9)["input_ids"], Tell()
    with torch.no_grad(), steer(model, tell):
        out = model(ids[:, :8], use_cache=True)
        model(ids[:, 8:], past_key_values=out.past_key_values)
    assert tell.steps == [("prefill", 0, 8, 0), ("decode", 8, 1, 1)]


def test_a_drafting_model_decodes_at_every_call():
    model, draft, tell = make("llama"), make("llama", seed=1), Tell()
    inputs = {name: x[:1] for name, x in prompt(length=9).items()}
    with steer(draft, tell):
        write(model, inputs, assistant_model=draft)
    assert tell.steps[0][:3] == ("prefill", 0, 9)
    assert all(phase == "decode" for phase, start, tokens, _ in tell.steps if start and tokens == 1)


def test_nothing_of_it_stays():
    model, inputs = make("llama"), prompt(length=9)
    plain = write(model, inputs)
    with steer(model, Tell()), steer(model, Tell()):
        pass
    assert "_prefill" not in vars(model)

    class Fails:
        card = Tell.card

        def on_read(self, call, seen):
            raise ValueError("no")

    tell = Tell()
    with steer(model, tell):
        with pytest.raises(ValueError, match="no"), steer(model, Fails()):
            write(model, inputs)
        # the pass that failed was of a prompt; the next ones are not for that
        out = model(inputs["input_ids"], use_cache=True)
        model(inputs["input_ids"][:, :1], past_key_values=out.past_key_values)
    assert tell.steps[-1] == ("decode", 9, 1, 1)
    assert "_prefill" not in vars(model)
    assert torch.equal(write(model, inputs), plain)
