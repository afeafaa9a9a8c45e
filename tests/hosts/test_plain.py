"""What is recorded of named modules is what they did, and the model is as before."""

import pytest
import torch
from torch import nn

from regard import OptionError, Unsupported
from regard.hosts.plain import record_modules, recording_modules


class Net(nn.Module):
    """A part that works in place, one that is called twice, one with two outputs, one with a keyword."""

    def __init__(self, inplace=True):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.pair = Pair()
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.relu(self.first(x))
        x, scale = self.pair(x=x)
        x = self.relu(self.second(x)) * scale
        return self.head(x.mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x):
        return x * 2, x.amax()


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]


NAMES = ("first", "relu", "pair", "second", "head", "")


@pytest.fixture
def images():
    return torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("side", ["output", "input"])
def test_recording_changes_no_bit_and_leaves_nothing(images, grads, side):
    model = Net()
    names = NAMES if side == "output" else NAMES[:-1]
    with torch.no_grad():
        wanted = model(images)
    before = dict(vars(model))
    tape = record_modules(model, images, names, side=side, grads=grads)
    assert torch.equal(tape.output, wanted)
    assert not any(hooks(model)) and vars(model).keys() == before.keys()
    assert tape.meta["modules"] == names


def test_the_values_are_those_of_the_modules_though_the_next_works_in_place(images):
    model = Net()
    tape = record_modules(model, images, NAMES)
    inner = Net(inplace=False)
    inner.load_state_dict(model.state_dict())
    with torch.no_grad():
        first = inner.first(images)
        second = inner.second(first.relu() * 2)
    assert (first < 0).any() and torch.equal(tape["first", 0], first)
    assert torch.equal(tape["relu", 0], first.relu()) and torch.equal(tape["pair", 0], first.relu() * 2)
    assert torch.equal(tape["relu", 0, 1], second.relu())
    assert torch.equal(tape["", 0], tape.output) and not tape["first", 0].requires_grad
    taken = record_modules(model, images, ("second", "pair", "relu"), side="input")
    assert torch.equal(taken["second", 0], tape["pair", 0]) and torch.equal(taken["pair", 0], tape["relu", 0])
    assert torch.equal(taken["relu", 0], first) and torch.equal(taken["relu", 0, 1], second)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_plain_graph(images, frozen):
    model = Net()
    plain = Net(inplace=False)
    plain.load_state_dict(model.state_dict())
    model.requires_grad_(not frozen)
    tape = record_modules(model, images, ("first", "pair"), grads=True)
    tape.backward(lambda output: output[:, 2].sum())
    first = plain.first(images)
    hidden, scale = plain.pair(first.relu())
    first.retain_grad()
    hidden.retain_grad()
    plain.head((plain.second(hidden).relu() * scale).mean((2, 3)))[:, 2].sum().backward()
    # the second value of the pair is not on the tape, but it leads back to the first module
    torch.testing.assert_close(tape.grad("pair", 0), hidden.grad)
    torch.testing.assert_close(tape.grad("first", 0), first.grad)


def test_keywords_and_several_passes(images):
    model = Net()
    with recording_modules(model, ("relu",)) as tape, torch.no_grad():
        model(images)
        model(x=images * 2)
    assert tape.steps() == 4
    assert torch.equal(record_modules(model, {"x": images * 2}, ("relu",))["relu", 0], tape["relu", 0, 2])


def test_nothing_is_left_after_an_error(images):
    model = Net()
    with pytest.raises(RuntimeError):
        record_modules(model, images[:, :2], ("first",))
    with pytest.raises(ValueError, match="mine"), recording_modules(model, ("first",)):
        raise ValueError("mine")
    assert not any(hooks(model))


@pytest.mark.parametrize(
    "names, options, error, message",
    [
        (("frist",), {}, OptionError, "Net has no module 'frist'.*'first'"),
        (("first",), {"side": "outside"}, OptionError, 'side is "output" or "input"'),
        (("first", "second"), {"limit_bytes": 100}, Unsupported, "more than .* GiB: name fewer"),
    ],
)
def test_what_cannot_be_recorded_is_refused(images, names, options, error, message):
    with pytest.raises(error, match=message):
        record_modules(Net(), images, names, **options)


def test_a_part_that_handles_no_tensor_is_refused():
    class Named(nn.Module):
        def forward(self, x):
            return {"x": x}

    model = nn.Sequential(nn.Identity(), Named())
    with pytest.raises(Unsupported, match="the module '1' handles a dict"):
        record_modules(model, torch.ones(1), ("1",))
    assert not any(hooks(model))
