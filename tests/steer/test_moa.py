"""MoA on a model: prompts under the plan's pattern, a cache that holds what the plan sees, and nothing lost by that."""

import pytest
import torch
import torch.nn.functional as F

from regard import Causal, MoA, OptionError, Unsupported, steer
from regard import record as record_once
from regard.hosts.transformers.specimens import make, prompt
from regard.patterns.elastic import MoAPlan
from tests.steer.test_snapkv import generate

ALPHAS = ((4, 4, 8, 8), (4, 8, 4, 8), (8, 8, 8, 4))
ZEROS = ((0, 0, 0, 0),) * 3


def plan(alphas=ALPHAS, betas=ZEROS):
    return MoAPlan(alphas, betas, block=4)


def test_a_prompt_sees_the_pattern_of_the_plan():
    model, inputs = make("llama"), prompt(length=30)
    with steer(model, MoA(plan())):
        tape = record_once(model, inputs)
    for layer in range(3):
        allowed = (Causal() & plan().pattern(layer, 30)).dense(30, 30)
        assert ((tape["weights", layer] > 0) == allowed.expand(2, -1, -1, -1)).all()


def test_writing_from_the_cut_cache_is_one_pass_under_the_mask():
    model, inputs = make("llama"), prompt(length=30)
    with steer(model, MoA(plan(), length=30)) as session:
        out = generate(model, inputs, 12)
        held = [row["kept"] for row in session.report()]
        whole = model(out.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, -12:], rtol=1e-4, atol=1e-4)
    # 41 tokens were read: a block of sinks, the band's whole blocks and the open one; heads of a group keep the wider
    assert held[0][0] < held[0][1] < 41
    assert max(map(max, held)) <= 4 + 12


@pytest.mark.parametrize("length, pieces", [(22, None), (21, 6)])
def test_a_layer_with_a_window_of_its_own_sees_what_lies_in_both(length, pieces):
    model, inputs = make("gemma3"), prompt(length=length)
    narrow = MoAPlan(((4, 4, 6, 2),) * 3, ZEROS, block=2)
    with torch.no_grad(), steer(model, MoA(narrow, length=length)):
        out = generate(model, inputs, 8, prefill_chunk_size=pieces)
        tape = record_once(model, {"input_ids": out.sequences[:, :-1]})
    torch.testing.assert_close(torch.stack(out.logits, 1), tape.output.logits[:, -8:], rtol=1e-4, atol=1e-4)
    n = length + 7
    i, j = torch.arange(n)[:, None], torch.arange(n)
    both = (narrow.pattern(0, length).dense(n, n) & (j <= i)) & (i - j < 4)
    assert ((tape["weights", 0] > 0) == both.expand(2, -1, -1, -1)).all()


def test_longer_prompts_widen_heads_with_beta_alone():
    betas = ((0.5, 0, 0, 0), *ZEROS[1:])
    model = make("llama")
    spans = {}
    for length in (16, 64):
        with steer(model, MoA(plan(betas=betas))):
            tape = record_once(model, prompt(length=length))
        spans[length] = (tape["weights", 0][0, :, -1] > 0).sum(-1)
    assert spans[64][0] > spans[16][0] and spans[64][1] <= spans[16][1] + 4


def test_divergence_from_the_dense_model_falls_with_the_band():
    model, inputs = make("llama"), prompt(length=64)
    plain = model(**inputs).logits.log_softmax(-1)
    found = []
    for alpha in (4, 12, 20, 28, 36, 44, 52, 64):
        with steer(model, MoA(plan(((alpha,) * 4,) * 3))):
            ours = model(**inputs).logits.log_softmax(-1)
        found.append(float(F.kl_div(ours, plain, log_target=True, reduction="batchmean")))
    assert found[-1] == 0 and found == sorted(found, reverse=True) and len(set(found)) == len(found)


def test_the_cache_of_a_plan_that_sees_all_is_whole_to_the_bit():
    model, inputs = make("llama"), prompt(length=20, padded=3)
    plain = generate(model, inputs)
    with steer(model, MoA(plan(((1000,) * 4,) * 3))):
        ours = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))


def test_plans_are_read_from_json_and_fields():
    assert MoA(plan().to_json()) == MoA(plan()) == MoA({"alphas": ALPHAS, "betas": ZEROS, "block": 4})


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="the plan is for 1 layers"):
        steer(make("llama"), MoA(MoAPlan(((4,) * 4,), ((0,) * 4,), block=4))).__enter__()
    model = make("llama")
    with steer(model, MoA(plan())), pytest.raises(Unsupported, match="row by row"):
        generate(model, prompt(length=20, padded=3))
    with pytest.raises(OptionError, match="length is a number"):
        MoA(plan(), length=0)
