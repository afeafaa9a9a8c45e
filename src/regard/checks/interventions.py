"""Checks of interventions, on tiny random models of a library that is steered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.checks.battery import Subject, demand, demand_near, demand_refused, verifies
from regard.checks.tolerances import CHANGE, SAME
from regard.checks.untouched import changed, state
from regard.checks.watching import Place, differences, place, run, watch
from regard.contract.attach import steer
from regard.contract.errors import Unsupported
from regard.contract.optional import need

# sites that lie in the attention function, which some families do not let anybody in
_AT_ATTENTION = {"q", "k", "v", "scores", "weights", "kv"}
PROMPT = 24
WRITTEN = 5


def make(subject: Subject, **changes: Any) -> Any:
    """The intervention with the card's options, and others."""
    return subject.main(**{**subject.card.options, **changes})


def model_for(subject: Subject) -> Any:
    """A tiny model that has the sites."""
    need("transformers", "hf")
    from regard.hosts.transformers.specimens import make as specimen

    return specimen("mixtral" if "router" in subject.card.sites else "llama")


def inputs(subject: Subject, padded: int = 0) -> dict[str, Tensor]:
    """A prompt of two rows, the first with pads on the left; that of the card, if it has one."""
    from regard.hosts.transformers.specimens import prompt

    if subject.card.prompt:
        ids = torch.tensor(subject.card.prompt)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return prompt(length=PROMPT, padded=padded)


def write(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The logits of every step that greedy writing takes, (steps, B, V)."""
    out = model.generate(
        **given, max_new_tokens=WRITTEN, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits)


@verifies("intervention")
def is_a_frozen_value(subject: Subject) -> None:
    """The first export is a frozen dataclass with the file's card; equal settings make equal values."""
    cls: Any = subject.main
    params = getattr(cls, "__dataclass_params__", None)
    demand(params is not None and params.frozen, f"{cls.__name__} is no frozen dataclass")
    demand(getattr(cls, "card", None) == subject.card, f"{cls.__name__} does not carry the card: @intervention(CARD)")
    demand(make(subject) == make(subject), "two with equal settings are not equal")


@verifies("intervention")
def changes_something(subject: Subject) -> None:
    """With the card's options a model writes with other logits than without."""
    model = model_for(subject)
    plain = write(model, inputs(subject))
    with steer(model, make(subject)):
        steered = write(model, inputs(subject))
    demand((plain - steered).abs().max() > CHANGE, "the logits are those of the plain model")


@verifies("intervention", lambda card: bool(card.off))
def off_is_the_plain_model(subject: Subject) -> None:
    """With the settings that the card calls off, logits are those of the plain model to the last bit."""
    model = model_for(subject)
    for padded in (0, 5):
        plain = write(model, inputs(subject, padded))
        with steer(model, make(subject, **subject.card.off)):
            steered = write(model, inputs(subject, padded))
        demand(torch.equal(plain, steered), f"logits differ by {(plain - steered).abs().max():.1e} (pads: {padded})")


@verifies("intervention")
def exit_restores(subject: Subject) -> None:
    """After the block, also one left by an error, nothing is left: outputs, weights, hooks, attributes, settings."""
    model = model_for(subject)
    before, plain = state(model), write(model, inputs(subject))
    with steer(model, make(subject)):
        write(model, inputs(subject))
    _demand_untouched(subject, model, before, plain)
    try:
        with steer(model, make(subject)):
            write(model, inputs(subject))
            raise _Stop
    except _Stop:
        pass
    _demand_untouched(subject, model, before, plain)


@verifies("intervention")
def nests_with_a_recording(subject: Subject) -> None:
    """A recording inside the block or around it changes nothing of what is steered, and sees every layer in every pass."""
    from regard.hosts.tape import recording

    model = model_for(subject)
    with steer(model, make(subject)):
        alone = write(model, inputs(subject))
        with recording(model, sites=("resid_post", "z")) as tape:
            demand_near(write(model, inputs(subject)), alone, SAME[torch.float32], "with a recording inside")
        for step in range(tape.steps()):
            unseen = set(tape.layers("resid_post", step)) - set(tape.layers("z", step))
            demand(not unseen, f"a recording sees nothing of attention in layers {sorted(unseen)} at step {step}")
        demand_near(write(model, inputs(subject)), alone, SAME[torch.float32], "after a recording inside")
    with recording(model, sites=("resid_post", "z")), steer(model, make(subject)):
        demand_near(write(model, inputs(subject)), alone, SAME[torch.float32], "with a recording around")


@verifies("intervention")
def a_second_model_is_untouched(subject: Subject) -> None:
    """Another model of the same class in the same process writes as before, inside the block too."""
    model, other = model_for(subject), model_for(subject)
    plain = write(other, inputs(subject))
    with steer(model, make(subject)):
        write(model, inputs(subject))
        demand(torch.equal(write(other, inputs(subject)), plain), "the other model's logits changed")


@verifies("intervention")
def missing_sites_are_refused(subject: Subject) -> None:
    """A module that no host knows, and a model that lacks a site, are refused, naming the site."""
    need("transformers", "hf")
    import transformers as hf

    demand_refused(Unsupported, "steering a plain Linear", lambda: steer(nn.Linear(2, 2), make(subject)).__enter__())
    sites = set(subject.card.sites)
    if sites & _AT_ATTENTION:
        sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = hf.FalconForCausalLM(hf.FalconConfig(**sizes))
        text = demand_refused(
            Unsupported, "a model that does not dispatch its attention", lambda: steer(model, make(subject)).__enter__()
        )
        demand("Falcon" in text, f"the refusal names neither model nor site: {text}")
    if "router" in sites:
        from regard.hosts.transformers.specimens import make as specimen

        model = specimen("llama")
        text = demand_refused(Unsupported, "a model without routers", lambda: steer(model, make(subject)).__enter__())
        demand("router" in text, f"the refusal does not name the site: {text}")


@verifies("intervention", lambda card: bool(card.owns))
def owners_refuse_each_other(subject: Subject) -> None:
    """Two interventions that own the same site do not act together."""
    model = model_for(subject)
    demand_refused(Unsupported, "two that own a site", lambda: steer(model, make(subject), make(subject)).__enter__())
    with steer(model, make(subject)):
        demand_refused(Unsupported, "an owner inside another", lambda: steer(model, make(subject)).__enter__())


@verifies("intervention", lambda card: card.padding)
def rows_do_not_meet(subject: Subject) -> None:
    """A row of a batch, with pads on its left, is written as if it were alone and without pads."""
    model, both = model_for(subject), inputs(subject, 5)
    with steer(model, make(subject)):
        together = write(model, both)[:, :1]
        alone = write(model, {name: x[:1, 5:] for name, x in both.items()})
    demand_near(together, alone, SAME[torch.float32], "the row with pads")


@verifies("intervention")
def changes_its_sites_alone(subject: Subject) -> None:
    """What its methods change, in a prompt and in steps after it, stands at sites that its card names."""
    given = make(subject)
    watched, _ = watch(model_for(subject), given, inputs(subject))
    named = set(given.card.sites)
    strange = sorted({at.site for at, one_of in watched.written.items() if not named & set(one_of)})
    demand(not strange, f"it changes {', '.join(strange)}, and its card names {', '.join(given.card.sites)}")


@verifies("intervention")
def reaches_its_sites(subject: Subject) -> None:
    """Each site that the card names is one that a method changes or gets to read, or settings of the model are changed."""
    given = make(subject)
    watched, _ = watch(model_for(subject), given, inputs(subject))
    reached = watched.met.union(*watched.written.values())
    missing = [site for site in given.card.sites if site not in reached]
    demand(watched.settings or not missing, f"the card names {', '.join(missing)}, which no method of it reaches")


@verifies("intervention")
def nothing_differs_before_it_acts(subject: Subject) -> None:
    """In a prompt and in steps after it nothing differs by a bit before the first place at which it acts."""
    model, given = model_for(subject), make(subject)
    plain = run(model, inputs(subject))
    watched, tape = watch(model, given, inputs(subject))
    first = watched.first(given.card.sites)
    found = differences(plain, tape, first)
    demand(not found, f"{_where(found[0])} differs; it acts at {_where(first)} first" if found else "")


@verifies("intervention", lambda card: bool(card.spares))
def spares_the_first_layer(subject: Subject) -> None:
    """With the settings that the card says spare it, layer 0 is as it was to the bit, and something after it is not."""
    model = model_for(subject)
    plain = run(model, inputs(subject))
    with steer(model, make(subject, **subject.card.spares)):
        tape = run(model, inputs(subject))
    found = differences(plain, tape, place(1 << 30, 1 << 30, "logits"))
    early = [at for at in found if at.layer == 0]
    demand(not early, f"{_where(early[0])} differs" if early else "")
    demand(found, "nothing differs in any layer")


class _Stop(Exception):
    pass


def _demand_untouched(subject: Subject, model: Any, before: dict[str, Any], plain: Tensor) -> None:
    left = changed(before, state(model))
    demand(not left, f"not as before: {', '.join(left[:3])}")
    demand(torch.equal(write(model, inputs(subject)), plain), "logits after the block are not those before it")


def _where(at: Place) -> str:
    layer = f" of layer {at.layer}" if at.site not in ("final", "logits") else ""
    return f"{at.site}{layer} in {f'step {at.step} after the prompt' if at.step else 'the prompt'}"
