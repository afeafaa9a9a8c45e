"""Sessions in ways that nobody plans for: entered twice, left open, in threads, in copies, interrupted. Right or refused."""

import copy
import gc
import pickle
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
import transformers

from regard import (
    Edit,
    OptionError,
    ShapeError,
    SlidingWindow,
    SnapKV,
    Unsupported,
    patch,
    record,
    recording,
    steer,
    swap,
)
from regard.hosts.transformers import attention
from regard.hosts.transformers.specimens import SIZES, make, prompt
from tests.hosts.test_session import Scale, Scores, card, run
from tests.hosts.test_wrapped import COMPILED, Logits, Stream, same, state

WRITE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- entering and leaving


def test_an_open_session_is_not_entered_again_and_a_closed_one_is():
    model, inputs = make("llama"), prompt(length=9)
    plain, session = run(model, inputs), steer(model, Scale(0.5))
    with session:
        once = run(model, inputs)
        with pytest.raises(Unsupported, match="this session is open"):
            session.__enter__()
        assert torch.equal(run(model, inputs), once)
    assert torch.equal(run(model, inputs), plain)
    with session:
        assert torch.equal(run(model, inputs), once)


def test_leaving_twice_takes_nothing_from_others():
    model, inputs = make("llama"), prompt(length=9)
    plain, session = run(model, inputs), steer(model, Scale(0.5))
    session.__exit__(None, None, None)
    session.__enter__()
    session.__exit__(None, None, None)
    with steer(model, Scale(0.5)):
        once = run(model, inputs)
        session.__exit__(None, None, None)
        with steer(model, Scale(1.0)):
            assert torch.equal(run(model, inputs), once)
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("how", COMPILED)
def test_compiled_models_are_left_in_any_order(how, compiler):
    model, inputs = make("llama"), prompt(length=9)
    called = COMPILED[how](model)
    plain = run(called, inputs)
    before = state(called)
    first, second = steer(called, Scale(0.5)), steer(called, Scale(0.5))
    first.__enter__()
    once = run(called, inputs)
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(run(called, inputs), once)
    second.__exit__(None, None, None)
    assert same(before, state(called)) and torch.equal(run(called, inputs), plain)


def test_settings_of_two_sessions_are_put_back_in_any_order():
    model = make("llama")
    model.config.chosen = 1

    class Sets:
        card = card()

        def __init__(self, value):
            self.value = value

        def start(self, session):
            session.change(model.config, "chosen", self.value)
            session.change(model.config, "new", self.value)
            return self

    first, second = steer(model, Sets(2)), steer(model, Sets(3))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (model.config.chosen, model.config.new) == (3, 3)
    second.__exit__(None, None, None)
    assert model.config.chosen == 1 and not hasattr(model.config, "new")


@pytest.mark.parametrize("where", ["start", "on_z"])
def test_an_interruption_leaves_nothing(where):
    model, inputs = make("llama"), prompt(length=9)
    before = state(model)

    def interrupt(self, *given):
        raise KeyboardInterrupt

    effect = type("Interrupted", (), {"card": card("z"), where: interrupt})()
    with pytest.raises(KeyboardInterrupt), steer(model, Scale(0.5), effect):
        run(model, inputs)
    assert same(before, state(model))


def test_a_generator_that_is_closed_or_forgotten_leaves_nothing():
    model, inputs = make("llama"), prompt(length=9)
    before = state(model)

    def outputs():
        with steer(model, Scale(0.5)):
            while True:
                yield run(model, inputs)

    opened = outputs()
    next(opened)
    assert not same(before, state(model))
    opened.close()
    assert same(before, state(model))
    forgotten = recording(model)
    forgotten.__enter__()
    run(model, inputs)
    del forgotten
    gc.collect()
    assert same(before, state(model))


@pytest.mark.parametrize("how", ["steered", "recorded", "left open", "swapped"])
def test_a_model_is_freed_when_nobody_holds_it(how):
    model, inputs = make("llama"), prompt(length=9)
    if how == "steered":
        with steer(model, Scale(0.5)):
            run(model, inputs)
        assert not any(module in attention._OWNERS for module in model.modules())
    elif how == "recorded":
        record(model, inputs, sites=("weights", "resid_pre"))
    elif how == "left open":
        steer(model, Scale(0.5)).__enter__()
    else:
        swap(model, pattern=SlidingWindow(3))
    run(model, inputs)
    alive = weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert alive() is None


# ---- several models, one model several times


def test_a_model_and_a_part_of_it_are_not_steered_at_once():
    model, inputs = make("llama"), prompt(length=9)
    plain = run(model, inputs)
    for outer, inner in ((model, model.model), (model.model, model)):
        with steer(outer, Scale(0.5)):
            with pytest.raises(Unsupported, match="open all sessions on the same of the two"):
                steer(inner, Scale(0.5)).__enter__()
            with steer(outer, Scores()):
                run(model, inputs)
        assert torch.equal(run(model, inputs), plain)


def test_models_that_share_a_config_go_their_own_ways():
    config = transformers.LlamaConfig(**SIZES)
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    assert first.config is second.config
    inputs = prompt(length=9, padded=2)
    plain = run(first, inputs), run(second, inputs)
    with steer(first, Scale(0.5)):
        assert not torch.equal(run(first, inputs), plain[0])
        assert torch.equal(run(second, inputs), plain[1])
        with pytest.raises(Unsupported, match="give each a config of its own"):
            steer(second, Scale(0.5)).__enter__()
        assert not torch.equal(run(first, inputs), plain[0])
    assert torch.equal(run(first, inputs), plain[0]) and torch.equal(run(second, inputs), plain[1])


@pytest.mark.parametrize("effect", [Scale(0.5), Stream(), Logits()], ids=lambda effect: type(effect).__name__)
def test_a_copy_made_inside_is_refused_whatever_acts_and_a_pickle_too(effect):
    model, inputs = make("llama"), prompt(length=9)
    plain = run(model, inputs)
    with steer(model, effect):
        other = copy.deepcopy(model)
        with pytest.raises(Unsupported, match="copy models outside sessions"):
            run(other, inputs)
        with pytest.raises(Unsupported, match="cannot be pickled: use save_pretrained"):
            pickle.dumps(model)
    with pytest.raises(Unsupported, match="copy models outside sessions"):
        run(other, inputs)
    assert torch.equal(run(copy.deepcopy(model), inputs), plain)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), inputs), plain)


def test_a_model_saved_inside_is_the_model(tmp_path):
    model, inputs = make("llama"), prompt(length=9)
    with steer(model, Scale(0.5)):
        model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa" and torch.equal(run(loaded, inputs), run(model, inputs))


def test_an_attention_that_the_user_sets_inside_is_refused_and_kept():
    model, inputs = make("llama"), prompt(length=9)
    with steer(model, Scale(0.5)):
        run(model, inputs)
        model.set_attn_implementation("eager")
        with pytest.raises(Unsupported, match="was set to 'eager' inside a session"):
            run(model, inputs)
    assert model.config._attn_implementation == "eager"
    with steer(model, Scale(0.5)):
        run(model, inputs)
    assert model.config._attn_implementation == "eager"


def test_a_model_may_change_its_precision_inside():
    inputs, wanted = prompt(length=9), make("llama").to(torch.bfloat16)
    with steer(wanted, Scale(0.5)):
        steered = run(wanted, inputs)
    model = make("llama")
    with steer(model, Scale(0.5)):
        run(model, inputs)
        assert torch.equal(run(model.to(torch.bfloat16), inputs), steered)


# ---- threads


def test_two_models_in_two_threads():
    models, inputs, right = [make("llama", seed=seed) for seed in (0, 1)], prompt(length=20), []

    def write(model):
        with steer(model, SnapKV(budget=8, window=3)):
            return model.generate(**inputs, **WRITE)

    wanted = [write(model) for model in models]

    def work(k):
        right.extend(torch.equal(write(models[k]), wanted[k]) for _ in range(3))

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 6


@pytest.mark.parametrize("whole", [True, False])
def test_one_model_in_two_threads_takes_turns_or_is_refused(whole):
    model, inputs = make("llama"), prompt(length=9)
    called = model if whole else model.model
    inside, further, found = threading.Event(), threading.Event(), []

    class Waits:
        card = card("z")

        def on_z(self, call, z):
            inside.set()
            assert further.wait(30)
            return z

    with steer(called, Waits()):
        first = threading.Thread(target=lambda: found.append(run(called, inputs)))
        first.start()
        assert inside.wait(30)
        with pytest.raises(Unsupported, match="two threads run one Llama"):
            run(called, inputs)
        further.set()
        first.join()
        # one after the other
        assert torch.equal(run(called, inputs), found[0])


# ---- what is given


@pytest.mark.parametrize("site", ["steer", "record"])
def test_logits_want_an_output_with_names(site):
    model, inputs = make("llama"), {**prompt(length=9), "return_dict": False}
    with steer(model, Stream()):
        assert isinstance(model(**inputs), tuple)
    with (
        pytest.raises(Unsupported, match="leave return_dict=False out"),
        steer(model, Logits()) if site == "steer" else recording(model, sites=("logits",)),
    ):
        model(**inputs)


def test_arguments_may_come_without_names():
    model, inputs, steps = make("llama").model, prompt(length=9, padded=3), []

    class Tell:
        card = card("z")

        def on_z(self, call, z):
            if call.layer == 0:
                steps.append((call.step.has_pads, call.step.phase, call.step.start))
            return z

    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
    with torch.no_grad(), steer(model, Tell()):
        cache = model(inputs["input_ids"], inputs["attention_mask"]).past_key_values
        model(inputs["input_ids"][:, :1], mask, None, cache)
    assert steps == [(True, "prefill", 0), (True, "decode", 9)]


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("around", [None, Stream, Scores])
def test_a_cache_that_gave_up_keys_goes_on_where_its_positions_are_known(padded, around):
    model, inputs = make("llama"), prompt(length=30, padded=padded)
    token = torch.full((2, 1), 5)
    masks = [torch.ones(2, 30 + n, dtype=torch.long) for n in (1, 2)]
    for mask in masks:
        mask[0, :padded] = 0

    def go_on(cache):
        return model(token, attention_mask=masks[1], past_key_values=cache).logits

    with torch.no_grad():
        with steer(model, SnapKV(budget=8, window=3)):
            cache = model(**inputs, use_cache=True).past_key_values
            model(token, attention_mask=masks[0], past_key_values=cache)
            copied = copy.deepcopy(cache)
            wanted = go_on(cache)
        if around is Scores:
            with steer(model, Scores()):
                torch.testing.assert_close(go_on(copied), wanted, rtol=1e-4, atol=1e-4)
            return
        with (
            nullcontext() if around is None else steer(model, around()),
            pytest.raises(Unsupported, match="this cache has given up keys"),
        ):
            go_on(copied)


# ---- layers, heads, rows that are not there


@pytest.mark.parametrize(
    "act",
    [
        lambda model, inputs: record(model, inputs, layers=(7,)),
        lambda model, inputs: record(model, inputs, rows=(100,)),
        lambda model, inputs: record(model, inputs, sites=("q",), rows=(-10,)),
        lambda model, inputs: record(model, inputs, heads=(4,), reduce="entropy"),
        lambda model, inputs: swap(model, pattern=SlidingWindow(3), layers=(3,)),
        lambda model, inputs: patch(model, [Edit("z", -4, value=0.0)]).__enter__(),
        lambda model, inputs: patch(model, [Edit("final", 2, value=0.0)]).__enter__(),
        lambda model, inputs: _patched(model, inputs, Edit("z", 1, heads=[4], value=0.0)),
        lambda model, inputs: _patched(model, inputs, Edit("resid_pre", 1, positions=[9], value=0.0)),
    ],
)
def test_what_is_not_there_is_said_and_not_taken_for_another(act):
    model, inputs = make("llama"), prompt(length=9)
    before = state(model)
    with pytest.raises(OptionError, match=r"0 to|of no layer|positions in this pass|heads in this pass"):
        act(model, inputs)
    assert same(before, state(model))


def _patched(model, inputs, *edits):
    with patch(model, edits):
        return run(model, inputs)


def test_edits_and_heads_are_counted_from_the_last_too():
    model, inputs = make("llama"), prompt(length=9)
    assert torch.equal(
        _patched(model, inputs, Edit("z", -1, value=0.0)), _patched(model, inputs, Edit("z", 2, value=0.0))
    )
    for reduce in ("full", "entropy", "column_sum"):
        last, third = (record(model, inputs, heads=(head,), reduce=reduce) for head in (-1, 3))
        assert torch.equal(last["weights", 1], third["weights", 1]) and last["weights", 1].shape[1] == 1
    top, whole = (record(model, inputs, heads=heads, reduce="top_k", count=2) for heads in ((2,), None))
    assert torch.equal(top["weights", 1].weights, whole["weights", 1].weights[:, [2]])
    assert torch.equal(top["weights", 1].keys, whole["weights", 1].keys[:, [2]])


def test_a_patch_takes_no_value_of_another_shape():
    model, inputs = make("llama"), prompt(length=9)
    some = record(model, inputs, sites=("z",), heads=(2,))
    with pytest.raises(ShapeError, match="record all heads and rows"):
        _patched(model, inputs, Edit("z", 1, from_tape=some))
    longer = record(model, prompt(length=12), sites=("z",))
    with pytest.raises(ShapeError, match="with as many tokens"):
        _patched(model, inputs, Edit("z", 1, from_tape=longer))
    with pytest.raises(ShapeError, match="cannot stand there"):
        _patched(model, inputs, Edit("z", 1, value=torch.ones(5)))
    with (
        pytest.raises(OptionError, match="step= says of which pass"),
        patch(model, [Edit("z", 1, positions=[5], value=0.0)]),
    ):
        model.generate(**inputs, **WRITE)
    with patch(model, [Edit("z", 1, positions=[5], value=0.0, step=0)]):
        model.generate(**inputs, **WRITE)
    # one row stands for all
    one = record(model, {name: x[1:] for name, x in inputs.items()}, sites=("z",))
    patched = _patched(model, inputs, Edit("z", 0, from_tape=one))
    assert torch.isfinite(patched).all()


def test_several_sequences_on_one_tape_follow_each_other():
    model, first, second = make("llama"), prompt(length=9), prompt(length=7, seed=3)
    with recording(model, sites=("z", "logits", "resid_post")) as tape:
        model.generate(**first, **WRITE)
        model.generate(**second, **{**WRITE, "max_new_tokens": 3})
    assert tape.steps() == 9
    for step, inputs in ((0, first), (6, second)):
        alone = record(model, inputs, sites=("z", "resid_post"))
        assert torch.equal(tape["z", 1, step], alone["z", 1])
        assert torch.equal(tape["resid_post", 1, step], alone["resid_post", 1])
    assert torch.equal(tape.meta["ids"], first["input_ids"])
    with recording(model, sites=("z",), steps=False) as tape:
        run(model, first)
        run(model, second)
    assert tape.steps() == 1 and torch.equal(tape["z", 1], record(model, first, sites=("z",))["z", 1])


@pytest.mark.parametrize("grads", [False, True])
def test_the_heads_of_a_family_that_dispatches_no_attention_are_recorded_too(grads):
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4)
    model, inputs = transformers.BloomForCausalLM(config).eval(), prompt(length=9)
    plain = run(model, inputs)
    tape = record(model, inputs, sites=("z", "attn_out"), grads=grads)
    assert torch.equal(tape.output.logits, plain) and tape.layers("z") == [0, 1]
    without = _patched(model, inputs, Edit("z", 1, value=0.0))
    with patch(model, [Edit("z", 1, value=0.0)]), recording(model, sites=("z",)) as patched:
        run(model, inputs)
    assert (patched["z", 1] == 0).all() and not torch.equal(without, plain)
    assert torch.equal(_patched(model, inputs, Edit("z", 1, from_tape=tape)), plain)
