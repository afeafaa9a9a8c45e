from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from regard import MemoryState, NeuralMemory, OptionError, ShapeError, Unsupported, mixer, neural_memory
from regard.bench.recall.zoology import MQAR
from regard.bench.training import Recipe, train
from regard.engines.delta import delta_rule
from regard.mixers.tokens import titans
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from tests.oracles import normal


def network(weights, x):
    for i, w in enumerate(weights):
        x = (F.silu(x) if i else x) @ w
    return x


def one_by_one(q, k, v, theta, weights, eta, alpha, chunk, clip=None):
    """The equations, a token at a time, with torch's own gradients: (out, weights, momentum, anchor)."""
    outs, finals = [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            w = [layer[h] for layer in weights]
            s = [torch.zeros_like(x) for x in w]
            anchor = w
            for t in range(q.shape[2]):
                at = [x.detach().requires_grad_() for x in anchor]
                loss = (network(at, k[b, h, t]) - v[b, h, t]).square().sum()
                grads = torch.autograd.grad(loss, at)
                if clip is not None:
                    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
                    grads = [g * min(1.0, clip / norm.item()) for g in grads]
                s = [eta[b, h, t] * m - theta[b, h, t] * g for m, g in zip(s, grads, strict=True)]
                w = [(1 - alpha[b, h, t]) * x + m for x, m in zip(w, s, strict=True)]
                outs.append(network(w, q[b, h, t]))
                if (t + 1) % chunk == 0:
                    anchor = w
            finals.append((w, s, anchor))
    layers = range(len(weights))
    last = (tuple(torch.stack([f[i][x] for f in finals]) for x in layers) for i in range(3))
    return torch.stack(outs).view(*q.shape[:3], -1), *last


def given(n=11, depth=2, heads=2, d=5, e=3, batch=2, seed=0):
    """q, k, v, theta, eta, alpha and weights of some memories."""
    widths = [d] + [7] * (depth - 1) + [e]
    q, k, v, *rest = normal(
        (batch, heads, n, d), (batch, heads, n, d), (batch, heads, n, e), *[(batch, heads, n)] * 3,
        *[(heads, a, b) for a, b in pairwise(widths)], seed=seed,
    )  # fmt: skip
    theta, eta, alpha = (x.sigmoid() for x in rest[:3])
    return (
        F.normalize(q, dim=-1),
        F.normalize(k, dim=-1),
        v,
        0.2 * theta,
        eta,
        alpha,
        tuple(w * w.shape[1] ** -0.5 for w in rest[3:]),
    )


def rates(like, theta=0.5):
    return torch.full(like.shape[:3], theta, dtype=like.dtype)


@pytest.mark.parametrize("chunk", [1, 2, 4, 11, 40])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_chunk_is_the_loop_with_gradients_at_its_start(depth, chunk):
    q, k, v, theta, eta, alpha, weights = given(depth=depth)
    out, state = neural_memory(
        q, k, v, theta, eta=eta, alpha=alpha, state=MemoryState.start(weights, 2), chunk_size=chunk
    )
    want, *finals = one_by_one(q, k, v, theta, weights, eta, alpha, chunk)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
    for held, final in zip((state.weights, state.momentum, state.anchor), finals, strict=True):
        for ours, theirs in zip(held, final, strict=True):
            torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=0, atol=1e-10)
    assert state.seen == 11


@pytest.mark.parametrize("momentum, forgetting", [(False, True), (True, False), (False, False)])
def test_without_a_momentum_or_forgetting_their_rates_are_zero(momentum, forgetting):
    q, k, v, theta, eta, alpha, weights = given()
    zero = torch.zeros_like(theta)
    out, _ = neural_memory(
        q, k, v, theta, eta=eta if momentum else None, alpha=alpha if forgetting else None,
        state=MemoryState.start(weights, 2, momentum=momentum), chunk_size=4,
    )  # fmt: skip
    want, *_ = one_by_one(q, k, v, theta, weights, eta if momentum else zero, alpha if forgetting else zero, 4)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)


def test_the_chunk_size_matters_so_the_anchor_is_the_start_of_the_chunk():
    q, k, v, theta, eta, alpha, weights = given()
    outs = [
        neural_memory(q, k, v, theta, eta=eta, alpha=alpha, state=MemoryState.start(weights, 2), chunk_size=c)[0]
        for c in (1, 4, 11)
    ]
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)
    assert not torch.allclose(outs[1], outs[2], atol=1e-3)


def test_a_matrix_from_zero_in_one_chunk_is_causal_linear_attention():
    q, k, v = normal((2, 3, 20, 6), (2, 3, 20, 6), (2, 3, 20, 4))
    start = MemoryState.start((torch.zeros(3, 6, 4).double(),), 2, momentum=False)
    out, _ = neural_memory(q, k, v, rates(q), state=start, chunk_size=64)
    torch.testing.assert_close(out, (q @ k.transpose(-1, -2)).tril() @ v, rtol=0, atol=1e-12)


def test_a_matrix_learned_token_by_token_is_the_delta_rule():
    q, k, v = normal((2, 3, 20, 6), (2, 3, 20, 6), (2, 3, 20, 4))
    k = F.normalize(k, dim=-1)
    start = MemoryState.start((torch.zeros(3, 6, 4).double(),), 2, momentum=False)
    out, state = neural_memory(q, k, v, rates(q), state=start, chunk_size=1)
    want, final = delta_rule(q, k, v, rates(q, 1.0))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state.weights[0], final.s)


def test_full_forgetting_leaves_the_momentum_alone():
    q, k, v, theta, eta, _, weights = given()
    one = torch.ones_like(theta)
    out, state = neural_memory(q, k, v, theta, eta=eta, alpha=one, state=MemoryState.start(weights, 2), chunk_size=4)
    want, *_ = one_by_one(q, k, v, theta, weights, eta, one, 4)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
    for w, s in zip(state.weights, state.momentum, strict=True):
        torch.testing.assert_close(w, s, rtol=0, atol=1e-14)


def test_forgetting_without_writing_fades_the_weights():
    q, k, v, _, _, _, weights = given()
    start = MemoryState.start(weights, 2, momentum=False)
    _, state = neural_memory(q, k, v, rates(q, 0.0), alpha=rates(q, 0.1), state=start, chunk_size=4)
    for w, first in zip(state.weights, start.weights, strict=True):
        torch.testing.assert_close(w, 0.9**11 * first)


def test_strong_forgetting_over_a_long_chunk_does_not_underflow():
    # products of 300 factors of 0.01 are 0 in float32; ratios of such products are not numbers
    q, k, v, theta, eta, alpha, weights = given(n=300)
    alpha = 0.5 + 0.5 * alpha
    results = []
    for kind in (torch.float32, torch.float64):
        start = MemoryState.start(tuple(w.to(kind) for w in weights), 2)
        tensors = [x.to(kind).requires_grad_() for x in (q, k, v, theta, eta, alpha)]
        out, _ = neural_memory(*tensors[:4], eta=tensors[4], alpha=tensors[5], state=start, chunk_size=300)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for low, high in zip(*results, strict=True):
        assert low.isfinite().all()
        torch.testing.assert_close(low.double(), high, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pieces", [(40,), (7, 1, 20, 12), (1,) * 40, (16, 16, 8), (3, 37)])
@pytest.mark.parametrize("momentum", [True, False])
def test_prefill_and_steps_equal_the_parallel_form(pieces, momentum):
    torch.manual_seed(0)
    layer = NeuralMemory(12, 3, chunk_size=8, momentum=momentum).double()
    (x,) = normal((2, 40, 12))
    state, outs = layer.init_state(2), []
    for piece in x.split(pieces, 1):
        out, state = layer.prefill(piece, state) if piece.shape[1] > 1 else layer.step(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x, is_causal=True), rtol=0, atol=1e-12)
    assert state.seen == 40


@pytest.mark.parametrize("momentum", [True, False])
def test_the_state_is_as_large_after_two_thousand_tokens(momentum):
    layer = NeuralMemory(8, 2, head_dim=3, expansion=2, momentum=momentum)
    with torch.no_grad():
        states = [layer.prefill(torch.randn(2, n, 8), layer.init_state(2))[1] for n in (1, 2000)]
    networks = (3 if momentum else 2) * 2 * (3 * 6 + 6 * 3)
    assert states[0].size_bytes == states[1].size_bytes == layer.state_bytes(2, 2000) == 2 * 4 * (networks + 3 * 3 * 6)


def test_the_memory_stays_float32_below_half_precision():
    layer = NeuralMemory(8, 2).bfloat16()
    _, state = layer.prefill(torch.randn(1, 5, 8).bfloat16(), layer.init_state(1))
    assert {w.dtype for w in (*state.memory.weights, *state.memory.momentum)} == {torch.float32}


@pytest.mark.parametrize("depth, chunk, clip", [(1, 2, None), (2, 1, None), (2, 3, None), (2, 3, 0.5)])
def test_gradients_are_those_of_finite_differences(depth, chunk, clip):
    q, k, v, theta, eta, alpha, weights = given(n=5, depth=depth, heads=1, d=3, e=2, batch=1)
    tensors = [x.requires_grad_() for x in (q, k, v, theta, eta, alpha, *weights)]

    def run(q, k, v, theta, eta, alpha, *weights):
        out, state = neural_memory(
            q, k, v, theta, eta=eta, alpha=alpha, state=MemoryState.start(weights, 1), chunk_size=chunk,
            max_grad_norm=clip,
        )  # fmt: skip
        return out, *state.weights, *state.momentum

    assert torch.autograd.gradcheck(run, tensors)


def test_second_derivatives():
    q, k, v, theta, eta, alpha, weights = given(n=3, heads=1, d=2, e=2, batch=1)
    tensors = [x.requires_grad_() for x in (q, k, v, theta, eta, alpha)]

    def run(q, k, v, theta, eta, alpha):
        start = MemoryState.start(weights, 1)
        return neural_memory(q, k, v, theta, eta=eta, alpha=alpha, state=start, chunk_size=2)[0]

    assert torch.autograd.gradgradcheck(run, tensors)


def test_gradients_flow_through_the_state_unless_it_is_detached():
    layer = NeuralMemory(8, 2, chunk_size=4).double()
    first, second = (x.requires_grad_() for x in normal((1, 6, 8), (1, 6, 8)))
    _, state = layer.prefill(first, layer.init_state(1))
    (flows,) = torch.autograd.grad(layer.prefill(second, state)[0].sum(), first, retain_graph=True)
    assert flows.abs().amax(-1).min() > 0
    cut, _ = layer.prefill(second, state.detach())
    assert torch.autograd.grad(cut.sum(), first, allow_unused=True) == (None,)


def retrieval(depth, write, seed=0):
    """Cosines between 16 values and what a memory answers to their unit keys after one reading of them."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 1, 16, 64, generator=generator) for _ in range(2))
    keys = F.normalize(keys, dim=-1)
    widths = [64] + [256] * (depth - 1) + [64]
    weights = tuple(torch.randn(1, a, b, generator=generator) * a**-0.5 for a, b in pairwise(widths))
    if depth == 1 and write:
        weights = (torch.zeros_like(weights[0]),)
    state = MemoryState.start(weights, 1, momentum=False)
    if write:
        _, state = neural_memory(keys, keys, values, rates(keys), state=state, chunk_size=1)
    # theta 0: nothing more is written
    answers, _ = neural_memory(keys, keys, values, rates(keys, 0.0), state=state)
    return F.cosine_similarity(answers, values, dim=-1).flatten()


def test_sixteen_keys_written_once_are_remembered():
    cosines = torch.stack([retrieval(1, write=True, seed=s) for s in range(5)])
    assert cosines.min() > 0.7
    assert cosines.mean() > 0.9


@pytest.mark.parametrize("depth", [1, 2])
def test_what_was_not_written_is_not_known(depth):
    assert retrieval(depth, write=False).abs().mean() < 0.2


def test_a_token_that_is_known_already_writes_nothing():
    q, k, _, theta, _, _, weights = given()
    state = MemoryState.start(weights, 2, momentum=False)
    known = network(state.weights, k)
    _, after = neural_memory(q, k, known, theta, state=state, chunk_size=4)
    for w, first in zip(after.weights, state.weights, strict=True):
        torch.testing.assert_close(w, first, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4])
def test_gradients_are_clipped_token_by_token(chunk):
    q, k, v, theta, eta, alpha, weights = given()
    v = 3 * v
    out, _ = neural_memory(
        q, k, v, theta, eta=eta, alpha=alpha, state=MemoryState.start(weights, 2), chunk_size=chunk, max_grad_norm=1.0
    )
    want, *_ = one_by_one(q, k, v, theta, weights, eta, alpha, chunk, clip=1.0)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
    free, *_ = one_by_one(q, k, v, theta, weights, eta, alpha, chunk)
    assert not torch.allclose(out, free, atol=1e-3)


def test_long_keys_diverge_unless_gradients_are_clipped():
    q, k, v = normal((1, 1, 200, 8), (1, 1, 200, 8), (1, 1, 200, 8), dtype=torch.float32)
    start = MemoryState.start((torch.zeros(1, 8, 8),), 1, momentum=False)
    free, _ = neural_memory(q, 3 * k, v, rates(q), state=start, chunk_size=1)
    clipped, _ = neural_memory(q, 3 * k, v, rates(q), state=start, chunk_size=1, max_grad_norm=1.0)
    assert not free.isfinite().all() or free.abs().max() > 1e6
    assert clipped.abs().max() < 1e3


def test_queries_and_keys_are_unit_vectors_behind_a_convolution(monkeypatch):
    seen = {}

    def spy(q, k, v, theta, **options):
        seen.update(q=q, k=k, v=v, theta=theta, **options)
        return neural_memory(q, k, v, theta, **options)

    monkeypatch.setattr(titans, "neural_memory", spy)
    torch.manual_seed(0)
    layer, (x,) = NeuralMemory(12, 3, theta_max=0.3).double(), normal((2, 9, 12))
    layer(x, is_causal=True)
    for i, (name, to) in enumerate((("q", layer.to_q), ("k", layer.to_k), ("v", layer.to_v))):
        padded = F.pad(to(x).transpose(1, 2), (3, 0))
        conv = layer.convs[i].conv
        want = F.silu(F.conv1d(padded, conv.weight, conv.bias, groups=12)).transpose(1, 2)
        want = want.unflatten(-1, (3, 4)).transpose(1, 2)
        torch.testing.assert_close(seen[name], want if name == "v" else F.normalize(want, dim=-1))
    assert ((seen["theta"] > 0) & (seen["theta"] < 0.3)).all()
    for name in ("eta", "alpha"):
        assert ((seen[name] > 0) & (seen[name] < 1)).all()
    # it starts out forgetting a hundredth, and with an empty memory
    assert seen["alpha"].mean() < 0.02
    assert (layer.weights[-1] == 0).all()


def test_the_first_step_needs_no_earlier_tokens():
    layer, (x,) = NeuralMemory(8, 2, kernel=4).double(), normal((1, 1, 8))
    torch.testing.assert_close(layer.step(x, layer.init_state(1))[0], layer(x, is_causal=True))


def test_heads_may_have_any_width():
    layer, (x,) = NeuralMemory(8, 1, head_dim=5).double(), normal((1, 7, 8))
    assert layer(x, is_causal=True).shape == x.shape
    assert layer.weights[0].shape == (1, 5, 20)


def test_reading_writes_nothing_and_knows_what_was_written():
    layer, (x,) = NeuralMemory(8, 2, chunk_size=4).double(), normal((2, 9, 8))
    out, state = layer.prefill(x, layer.init_state(2))
    again, conv = layer.recall(x, state.memory.weights, layer.init_state(2).convs[0])
    torch.testing.assert_close(again[:, -1], out[:, -1])
    assert not torch.allclose(again[:, 0], out[:, 0])
    torch.testing.assert_close(conv.tail, state.convs[0].tail)


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that are run."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_operations_grow_with_chunks_and_not_with_tokens():
    def operations(n, chunk):
        q, k, v, theta, eta, alpha, weights = given(n=n, batch=1)
        with Counted() as counted, torch.no_grad():
            neural_memory(q, k, v, theta, eta=eta, alpha=alpha, state=MemoryState.start(weights, 1), chunk_size=chunk)
        return counted.count

    assert operations(512, 128) < 512
    assert operations(512, 128) < 1.5 * operations(64, 16)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda m, x: m(x), Unsupported, "pass is_causal=True"),
        (lambda m, x: m(x, x, is_causal=True), Unsupported, "reads no context"),
        (lambda m, x: m(x, padding=torch.ones(2, 9, dtype=torch.bool), is_causal=True), Unsupported, "no padding"),
        (lambda m, x: m(x, reset=torch.ones(2, 9, dtype=torch.bool), is_causal=True), Unsupported, "no reset"),
        (lambda m, x: m(x[..., :3], is_causal=True), ShapeError, "C = 16"),
        (lambda m, x: NeuralMemory(18, 4), OptionError, "give head_dim="),
        (lambda m, x: NeuralMemory(16, 0), OptionError, "0 heads"),
        (lambda m, x: NeuralMemory(16, 4, depth=0), OptionError, "depth of at least 1, not 0"),
        (lambda m, x: NeuralMemory(16, 4, expansion=0), OptionError, "expansion of at least 1, not 0"),
        (lambda m, x: NeuralMemory(16, 4, chunk_size=0), OptionError, "chunk_size of at least 1, not 0"),
        (lambda m, x: NeuralMemory(16, 4, kernel=0), OptionError, "kernel of at least 1 token, not 0"),
        (lambda m, x: NeuralMemory(16, 4, theta_max=0.0), OptionError, "above 0, not 0.0"),
        (lambda m, x: NeuralMemory(16, 4, max_grad_norm=-1.0), OptionError, "above 0, not 0.1 and -1.0"),
    ],
)
def test_what_cannot_be_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(NeuralMemory(16, 4), torch.randn(2, 9, 16))


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"q": (2, 2, 11, 4)}, ShapeError, r"q is \(2, 2, 11, 4\).*D = 5"),
        ({"k": (2, 2, 10, 5)}, ShapeError, r"k is \(2, 2, 10, 5\)"),
        ({"v": (2, 2, 11, 5)}, ShapeError, "v is .*D = 3"),
        ({"q": (2, 11, 5)}, ShapeError, r"q is \(2, 11, 5\)"),
        ({"theta": (2, 2, 1)}, ShapeError, r"theta is \(2, 2, 1\); it must be \(2, 2, 11\)"),
        ({"eta": None}, OptionError, "eta is for a state with momentum"),
        ({"chunk_size": 0}, OptionError, "at least 1, not 0"),
    ],
)
def test_what_does_not_fit_the_state_is_refused(changes, error, text):
    q, k, v, theta, eta, alpha, weights = given()
    options = {"q": q, "k": k, "v": v, "theta": theta, "eta": eta, "alpha": alpha}
    options |= {name: torch.zeros(x).double() if isinstance(x, tuple) else x for name, x in changes.items()}
    with pytest.raises(error, match=text):
        neural_memory(**options, state=MemoryState.start(weights, 2))


def recall(tmp_path, *mixers, steps, task=None, **options):
    """Accuracy of MQAR after training, when it stopped, and the bytes of the state of all layers."""
    torch.manual_seed(0)
    task = MQAR(256, 64, 8) if task is None else task
    model = SequenceModel(
        SequenceSettings(
            vocab=task.vocab_size, dim=64, depth=len(mixers), heads=4, mixer=mixers, options={mixers[-1]: options},
            hidden=0,
        )
    )  # fmt: skip
    recipe = Recipe(steps, 64, 1e-2, 0, "accuracy", "recall", 256, 1000, early_stop=True)
    # a file of its own: a run goes on from a checkpoint that fits
    outcome = train(model, task, recipe, checkpoint=Path(tempfile.mkdtemp(dir=tmp_path)) / "run")
    state = model.state_bytes(1, task.seq_len)
    return {"accuracy": outcome.value, "steps": outcome.steps, "seconds": outcome.seconds, "state_bytes": state}


def test_a_memory_alone_recalls(tmp_path):
    assert recall(tmp_path, "titans", steps=150, task=MQAR(64, 16, 2), depth=1)["accuracy"] > 0.9


@pytest.mark.slow
def test_a_neural_memory_recalls(tmp_path, record):
    figures = {
        "task": "MQAR vocab 256, length 64, 8 pairs; width 64, 4 heads, 64 rows a step, lr 1e-2, at most 600 steps",
        "titans, a matrix": recall(tmp_path, "titans", steps=600, depth=1),
        "conv + titans, a matrix": recall(tmp_path, "short_conv", "titans", steps=600, depth=1),
        "conv + linear (elu + 1)": recall(tmp_path, "short_conv", "linear", steps=600),
        "chance": MQAR(256, 64, 8).chance,
    }
    record(figures)
    assert figures["titans, a matrix"]["accuracy"] >= 0.97
    assert figures["conv + titans, a matrix"]["accuracy"] >= 0.95


def processor_ms(run, times=3):
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return 1e3 * best


@pytest.mark.slow
def test_speed_of_a_neural_memory(record):
    n, dim, heads = 2048, 256, 4
    x = torch.randn(1, n, dim)
    figures = {"task": f"{n} tokens, width {dim}, {heads} heads, processor milliseconds per 1000 tokens, best of 3"}

    def steps(layer):
        state = layer.init_state(1)
        for t in range(128):
            _, state = layer.step(x[:, t : t + 1], state)

    for depth in (1, 2):
        for chunk in (16, 64):
            layer = NeuralMemory(dim, heads, depth=depth, chunk_size=chunk)
            with torch.no_grad():
                forward = processor_ms(lambda layer=layer: layer(x, is_causal=True))
            both = processor_ms(lambda layer=layer: layer(x, is_causal=True).sum().backward())
            figures[f"depth {depth}, chunk {chunk}"] = {"forward": 1e3 * forward / n, "with gradients": 1e3 * both / n}
        with torch.no_grad():
            stepped = processor_ms(lambda layer=layer: steps(layer))
        figures[f"depth {depth}, step by step"] = 1e3 * stepped / 128
    softmax = mixer("softmax", dim, heads)
    with torch.no_grad():
        figures["softmax attention, forward"] = 1e3 * processor_ms(lambda: softmax(x, is_causal=True)) / n
    record(figures)
    for depth in (1, 2):
        chunked = figures[f"depth {depth}, chunk 16"]
        assert figures[f"depth {depth}, step by step"] > 8 * chunked["forward"]
        assert chunked["with gradients"] < 8 * chunked["forward"]
