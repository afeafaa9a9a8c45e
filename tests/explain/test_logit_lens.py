"""What is read after each layer, and parts that add up."""

import pytest
import torch

from regard import LogitLens, OptionError, ShapeError, lens, logit_lens, stream_parts, tiny
from regard import record as record_tape
from regard.hosts.contributions import freeze_norm
from regard.hosts.transformers.specimens import make, prompt
from tests.explain.induction_model import induction_model

SITES = ("embed", "resid_post", "attn_out", "mlp_out", "z", "resid_mid")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_stages_are_the_lens_of_streams_and_the_last_is_the_model(name):
    model, inputs = make(name), prompt(length=7)
    tape = record_tape(model, inputs, sites=SITES)
    targets = torch.randint(60, (2, 7))
    found = logit_lens(model, tape, targets)
    assert found.stages == ("embed", "layer 0", "layer 1", "layer 2")
    for stage, stream in enumerate((tape["embed"], *(tape["resid_post", layer] for layer in range(3)))):
        p = lens(model, stream).softmax(-1)
        assert torch.equal(found.top[stage], p.argmax(-1))
        torch.testing.assert_close(found.probability[stage], p.amax(-1), rtol=1e-4, atol=1e-6)
        for row in range(2):
            for place in range(7):
                mine = p[row, place, targets[row, place]]
                torch.testing.assert_close(found.target_probability[stage, row, place], mine, rtol=1e-4, atol=1e-7)
                assert found.target_rank[stage, row, place] == (p[row, place] > mine).sum()
    said = tape.output.logits.softmax(-1)
    torch.testing.assert_close(found.probability[-1], said.amax(-1), rtol=1e-3, atol=1e-5)
    one = logit_lens(model, tape, targets[:, 3])
    assert torch.equal(one.target_rank[:, :, 3], found.target_rank[:, :, 3])
    assert logit_lens(model, tape).target_rank is None


def test_a_model_that_copies_says_so_after_the_layer_that_copies():
    model = induction_model()
    ids = torch.tensor([[5, 9, 3, 7, 1, 5, 9, 3]])
    tape = record_tape(model, ids, sites=("embed", "resid_post"))
    found = logit_lens(model, tape, torch.tensor([7]))
    assert found.stages == ("embed", "layer 0", "layer 1") and found.settled()[0, -1] == 2
    # before it all of its 32 tokens are alike
    torch.testing.assert_close(found.target_probability[:2, 0, -1], torch.full((2,), 1 / 32))
    assert found.top[2, 0, -1] == 7 and found.target_probability[2, 0, -1] > 3 / 32


def test_settled_is_the_first_stage_that_stays():
    # said in the end from the start; never before; left again in between; once before the end
    top = torch.tensor([[[7, 1, 7, 1]], [[7, 2, 3, 1]], [[7, 3, 7, 7]], [[7, 7, 7, 7]]])
    found = LogitLens(("embed", "layer 0", "layer 1", "layer 2"), top, torch.ones(4, 1, 4))
    assert found.settled().tolist() == [[0, 3, 2, 2]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen2"])
@pytest.mark.parametrize("heads", [False, True])
def test_parts_add_up_to_the_streams(name, heads):
    model, inputs = make(name).double(), prompt(length=7)
    tape = record_tape(model, inputs, sites=SITES)
    parts = stream_parts(model, tape, heads=heads)
    grown = parts.accumulated()
    near = {"rtol": 1e-5, "atol": 1e-5} if name == "gemma3" else {"rtol": 1e-9, "atol": 1e-9}
    for layer in range(3):
        after = parts.names.index(f"{layer}.mlp")
        torch.testing.assert_close(grown[after], tape["resid_post", layer], **near)
        torch.testing.assert_close(grown[after - 1], tape["resid_mid", layer], **near)
    assert torch.equal(parts["1.mlp"], tape["mlp_out", 1])
    assert len(parts.names) == (1 + 3 * 6 if heads else 1 + 3 * 2)
    # what the parts say of a token, as direct attribution reads it
    final = model.model.norm if name != "gpt2" else model.transformer.ln_f
    frozen = freeze_norm(final, tape["resid_post", -1])
    said = torch.stack([lens(model, frozen(part), norm=False) for part in parts.values]).sum(0)
    wanted = tape.output.logits - lens(model, frozen.bias, norm=False)
    torch.testing.assert_close(said, wanted, rtol=1e-4, atol=1e-4)


def test_what_is_missing_is_asked_for():
    model = make("llama")
    some = record_tape(model, prompt(length=5), sites=("embed", "resid_post"), layers=(1,))
    with pytest.raises(OptionError, match=r"the tape lacks embed, resid_post of some layers: record with sites="):
        logit_lens(model, some)
    whole = record_tape(model, prompt(length=5), sites=("embed", "resid_post"))
    with pytest.raises(OptionError, match="the tape lacks mlp_out, z"):
        stream_parts(model, whole, heads=True)
    with pytest.raises(ShapeError, match=r"targets are \(3,\); ids \(2,\) or \(2, 5\)"):
        logit_lens(model, whole, torch.tensor([1, 2, 3]))
    with pytest.raises(OptionError, match="row is 2; there are 2"):
        logit_lens(model, whole).figure(2)
    parts = stream_parts(model, record_tape(model, prompt(length=5), sites=SITES))
    with pytest.raises(OptionError, match=r"no part '3\.mlp'"):
        parts["3.mlp"]


def test_the_figure_names_what_is_said():
    model, tokenizer = tiny.lm()
    ids = tokenizer("def f", return_tensors="pt")["input_ids"]
    found = logit_lens(model, record_tape(model, ids, sites=("embed", "resid_post")))
    heat = found.figure(tokenizer=tokenizer).data[0]
    assert (
        heat.z.shape == (4, ids.shape[1])
        and heat.text[3][1] == tokenizer.convert_ids_to_tokens([int(found.top[3, 0, 1])])[0]
    )
    assert found.figure().data[0].text[0][0] == str(int(found.top[0, 0, 0]))
