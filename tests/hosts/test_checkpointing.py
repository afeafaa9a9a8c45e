"""Gradient checkpointing under sessions: layers run twice, and must be steered both times and be read once."""

import pytest
import torch

from regard import Unsupported, record, recording, steer
from regard.hosts.transformers.specimens import make, prompt
from tests.hosts.test_session import Scale, Scores, card
from tests.hosts.test_wrapped import Stream


class ByLength:
    """Another factor in each pass: one that forgets which pass a layer ran in shows."""

    card = card("z")

    def on_z(self, call, z):
        return z * (0.1 * call.step.tokens)


def gradients(model, effect, *, inside=True, checkpointed=True, reentrant=False):
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with steer(model, effect):
        loss = 0.0
        for length in (9, 6):
            inputs = prompt(length=length)
            loss = loss + model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("effect", [Scale(0.5), Stream(), Scores(), ByLength()], ids=lambda e: type(e).__name__)
def test_gradients_are_those_without_it(effect, reentrant):
    wanted = gradients(make("llama"), effect, checkpointed=False, inside=False)
    found = gradients(make("llama"), effect, reentrant=reentrant)
    assert found.keys() == wanted.keys() and wanted
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("effect", [Scale(0.5), Stream()], ids=lambda e: type(e).__name__)
def test_layers_that_would_run_again_without_the_session_are_refused(effect, reentrant):
    with pytest.raises(Unsupported, match="call backward in the same sessions as forward"):
        gradients(make("llama"), effect, inside=False, reentrant=reentrant)


def test_a_tape_holds_what_ran_first_and_its_gradients():
    sites, name, inputs = ("weights", "z", "resid_post"), "model.layers.1.mlp", prompt(length=9)
    plain = make("llama").train()
    wanted = record(plain, inputs, sites=sites, modules=(name,), grads=True)
    wanted.backward(lambda output: output.logits[0, -1, 7])
    model = make("llama").train()
    model.gradient_checkpointing_enable()
    with recording(model, sites=sites, modules=(name,), grads=True) as tape:
        model(**inputs, use_cache=False).logits[0, -1, 7].backward()
    assert [place for place, _ in tape.items()] == [place for place, _ in wanted.items()]
    for kind, layer, step in (place for place, _ in wanted.items()):
        torch.testing.assert_close(
            tape.grad(kind, layer, step=step), wanted.grad(kind, layer, step=step), rtol=1e-5, atol=1e-6
        )
    again = record(model, inputs, sites=sites, grads=True)
    with pytest.raises(Unsupported, match="use recording"):
        again.backward(lambda output: output.logits[0, -1, 7])
