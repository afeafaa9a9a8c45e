"""Seer on a model: which blocks a prompt reads, that nothing else changes, and gates trained on a pretrained model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import regard
from regard import OptionError, Seer, Unsupported, recording, steer
from regard import record as record_once
from regard.bench.proving.notes import source
from regard.bench.proving.rows import note_row, text_row
from regard.hosts.transformers.specimens import make, prompt
from regard.layers.seerattention import SeerGate, seer_select
from regard.steer.scores import seerattention as file
from regard.train.distillation.seerattention import GateDistillation, block_targets
from tests.hosts.test_rotation import Projections, Reader
from tests.oracles import attention
from tests.steer.test_snapkv import generate


def gates(layers=(0, 1, 2), block=4):
    torch.manual_seed(5)
    return {layer: SeerGate(4, 2, 8, block=block, hidden=6) for layer in layers}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def selections(monkeypatch):
    """Every selection that goes to the engine from here on."""
    found, engine = [], file.block_sparse

    def noted(q, k, v, pattern, **options):
        found.append((pattern, q.shape[2]))
        return engine(q, k, v, pattern, **options)

    monkeypatch.setattr(file, "block_sparse", noted)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("choice", [{"ratio": 0.4}, {"threshold": 0.2}])
def test_a_prompt_reads_what_its_gates_choose(name, choice):
    model, inputs, made = make(name), prompt(length=26), gates()
    truth = Projections(model)
    truth.tokens = 26
    with torch.no_grad(), steer(model, Seer(made, **choice, dense_last=1, block=4)):
        tape = record_once(model, inputs, sites=("q", "k", "v", "z"))
    sparse = 0
    for layer in range(3):
        with torch.no_grad():
            scores = made[layer](truth.out["q", layer][0], truth.out["k", layer][0])
        seen = seer_select(scores, block=4, **choice, dense_last=1).dense(26, 26)
        q, k, v = (tape[kind, layer] for kind in "qkv")
        wanted = attention(q, k, v, allowed=seen, scale=tape.meta["scale"])[0]
        torch.testing.assert_close(tape["z", layer].transpose(1, 2), wanted.float(), rtol=1e-4, atol=1e-4)
        sparse += int((seen.sum(-1) < torch.arange(1, 27)).sum())
    assert sparse > 100


def test_with_all_blocks_the_engine_gives_the_dense_model():
    model, inputs = make("llama"), prompt(length=26, padded=3)
    plain, real = logits(model, inputs), inputs["attention_mask"].bool()
    for choice in ({"threshold": 1e-30}, {"ratio": 0.1, "dense_last": 99}):
        with steer(model, Seer(gates(), **choice, block=4)):
            torch.testing.assert_close(logits(model, inputs)[real], plain[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", [{"threshold": 0.0}, {"ratio": 1.0}, {"ratio": 0.1, "block": 32}])
def test_nothing_to_leave_out_is_the_model_to_the_bit(choice):
    model, inputs = make("llama"), prompt(length=26, padded=3)
    plain = generate(model, inputs)
    with steer(model, Seer(**{"block": 4, **choice})):
        ours = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))


@pytest.mark.parametrize("ratio, kept", [(0.2, 1), (0.36, 2), (0.6, 3), (0.84, 6)])
def test_a_row_reads_as_many_blocks_as_the_ratio_says(monkeypatch, ratio, kept):
    found, n = selections(monkeypatch), 40
    with steer(make("llama"), Seer(gates(), ratio=ratio, dense_last=2, block=4)) as session:
        logits(session.model, prompt(length=n))
    assert len(found) == 3
    for selection, _ in found:
        blocks = selection.dense(n, n)[:, :, ::4, ::4].sum(-1)
        assert blocks.tolist() == [[[min(r + 1, kept) if r < 8 else r + 1 for r in range(10)]] * 4] * 2


class Shy(SeerGate):
    """Never chooses the own block by itself."""

    def forward(self, q, k, *, key_valid=None):
        found = super().forward(q, k, key_valid=key_valid)
        return found.masked_fill(torch.eye(found.shape[-1], dtype=torch.bool), -1e4)


@pytest.mark.parametrize("choice", [{"ratio": 0.3}, {"threshold": 0.3}, {"threshold": 2.0}])
def test_a_row_always_reads_its_own_block(monkeypatch, choice):
    found = selections(monkeypatch)
    with steer(make("llama"), Seer({1: Shy(4, 2, 8, block=4, hidden=6)}, **choice, dense_last=0, block=4)) as session:
        logits(session.model, prompt(length=26))
    (selection, _), own = found[0], torch.arange(26) // 4
    seen = selection.dense(26, 26)
    assert len(found) == 1
    assert seen[..., (own[:, None] == own) & torch.ones(26, 26, dtype=torch.bool).tril()].all()
    if choice == {"threshold": 2.0}:
        assert not seen[..., own[:, None] != own].any()


@pytest.mark.parametrize("padded", [3, 4, 23])
@pytest.mark.parametrize("choice", [{"ratio": 0.4}, {"threshold": 0.2}])
def test_pads_on_the_left_shift_nothing(padded, choice):
    model, inputs, way = make("llama"), prompt(length=26, padded=padded), Seer(gates(), **choice, block=4)
    with steer(model, way):
        together = generate(model, inputs, 3)
        for row in (0, 1):
            start = padded if row == 0 else 0
            alone = generate(model, {name: x[row : row + 1, start:] for name, x in inputs.items()}, 3)
            for a, b in zip(alone.logits, together.logits, strict=True):
                torch.testing.assert_close(a[0], b[row], rtol=1e-4, atol=1e-4)


def test_what_is_written_reads_the_whole_cache():
    model, inputs = make("llama"), prompt(length=26)
    with torch.no_grad(), steer(model, Seer(gates(), ratio=0.2, dense_last=0, block=4)):
        cache = model(**inputs).past_key_values
        mask = torch.cat((inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)), 1)
        tape = record_once(
            model,
            {"input_ids": torch.full((2, 1), 7), "attention_mask": mask, "past_key_values": cache},
            sites=("q", "k", "v", "z"),
        )
    step = tape.steps() - 1
    for layer in range(3):
        q, k, v = (tape.get(kind, layer, step=step) for kind in "qkv")
        wanted = attention(q, k, v, scale=tape.meta["scale"])[0].transpose(1, 2)
        assert k.shape[2] == 27
        torch.testing.assert_close(tape.get("z", layer, step=step), wanted.float(), rtol=1e-4, atol=1e-4)


def test_with_blocks_of_one_token_too_what_is_written_reads_the_whole_cache():
    model, inputs = make("llama"), prompt(length=26)
    with steer(model, Seer(ratio=0.3, dense_last=0, block=1)), recording(model, sites=("q", "k", "v", "z")) as tape:
        generate(model, inputs, 3)
    for step, layer in ((1, 0), (1, 2), (2, 1)):
        q, k, v = (tape.get(kind, layer, step=step) for kind in "qkv")
        assert (q.shape[2], k.shape[2]) == (1, 26 + step)
        wanted = attention(q, k, v, scale=tape.meta["scale"])[0].transpose(1, 2)
        torch.testing.assert_close(tape.get("z", layer, step=step), wanted.float(), rtol=1e-4, atol=1e-4)


def test_layers_without_a_gate_are_left_alone():
    model, inputs = make("gemma3"), prompt(length=26)
    plain = record_once(model, inputs, sites=("z",))
    for given, first in ((gates((2,)), 2), (None, 1)):
        with steer(model, Seer(given, ratio=0.3, block=4)):
            tape = record_once(model, inputs, sites=("z",))
        assert all(torch.equal(tape["z", layer], plain["z", layer]) for layer in range(first))
        assert not torch.allclose(tape["z", first], plain["z", first])
    with steer(model, Seer(gates((0,)), ratio=0.3, block=4)), pytest.raises(Unsupported, match="leave its gate out"):
        logits(model, inputs)


def test_without_gates_averages_are_compared(monkeypatch):
    found, model = selections(monkeypatch), make("llama")
    with steer(model, Seer(ratio=0.4, dense_last=0, block=4)):
        tape = record_once(model, prompt(length=24), sites=("q", "k"))
    q, k = (tape[name, 0].unflatten(2, (-1, 4)).mean(3) for name in ("q", "k"))
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), float("-inf"))
    wanted = seer_select(scores, block=4, ratio=0.4, dense_last=0).dense(24, 24)
    assert torch.equal(found[0][0].dense(24, 24), wanted)


@pytest.mark.parametrize(
    "make_it, message",
    [
        (lambda: Seer(gates()), "ratio= or by threshold="),
        (lambda: Seer(gates(), ratio=0.5, threshold=0.1, block=4), "give one of them"),
        (lambda: Seer(ratio=0.0), "in \\(0, 1\\]"),
        (lambda: Seer(threshold=-0.1), "at least 0"),
        (lambda: Seer(ratio=0.5, dense_last=-1), "dense_last is"),
        (lambda: Seer(ratio=0.5, block=0), "at least 1 token"),
        (lambda: Seer(gates(block=8), ratio=0.5, block=4), "layer 0 has block 8, and Seer has block=4"),
        (lambda: steer(make("llama"), Seer(gates((1, 3)), ratio=0.5, block=4)).__enter__(), "layers 3; .* 0 to 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(make_it, message):
    with pytest.raises(OptionError, match=message):
        make_it()


def test_what_it_cannot_read_is_refused():
    model, inputs = make("llama"), prompt(length=26)
    with torch.no_grad(), steer(model, Seer(gates(), ratio=0.3, block=4)):
        cache = model(**inputs).past_key_values
        with pytest.raises(Unsupported, match="cannot come in pieces"):
            model(inputs["input_ids"], past_key_values=cache)
        mask = inputs["attention_mask"].clone()
        mask[0, -3:] = 0
        with pytest.raises(Unsupported, match="pad on the left"):
            model(inputs["input_ids"], attention_mask=mask)
    with steer(make("bert"), Seer(ratio=0.3, block=4)) as session, pytest.raises(Unsupported, match="not causal"):
        session.model(**inputs)


# ---- gates learn from a pretrained model


def test_gates_of_a_pretrained_model_learn_its_own_maps():
    model, inputs = make("llama"), prompt(length=30)
    distil = GateDistillation(model, block=4, hidden=6)
    assert list(distil.gates) == ["0", "1", "2"] and distil.gates["0"].rotary_base == 1e4
    truth = Projections(model)
    truth.tokens = 30
    weights = record_once(model, inputs, sites=("weights",))
    loss = distil(model, inputs["input_ids"])["gate_kl"]
    total = 0.0
    for layer in range(3):
        padded = torch.nn.functional.pad(weights["weights", layer], (0, 2, 0, 2))
        target = padded.unflatten(2, (8, 4)).unflatten(4, (8, 4)).amax((3, 5))
        target = (target / target.sum(-1, keepdim=True))[:, :, 2:]
        scores = distil.gates[str(layer)](truth.out["q", layer][-1], truth.out["k", layer][-1])[:, :, 2:]
        log_p = torch.log_softmax(scores, -1).masked_fill(target == 0, 0.0)
        total = total + (torch.special.xlogy(target, target) - target * log_p).sum() / (2 * 4 * 6)
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-4)


def test_only_gates_are_trained_and_the_model_stays_as_it_was():
    model = make("qwen3")
    distil, inputs = GateDistillation(model, block=4, hidden=6), prompt(length=24, padded=5)
    before, plain = {name: x.clone() for name, x in model.state_dict().items()}, logits(model, inputs)
    distil(model, inputs)["gate_kl"].backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in distil.parameters())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert torch.equal(logits(model, inputs), plain)


def test_only_full_layers_get_gates_and_other_models_are_refused():
    assert list(GateDistillation(make("gemma3"), block=4).gates) == ["1", "2"]
    with pytest.raises(OptionError, match="the gates are for layers 1, 2; the model has 0, 1, 2"):
        GateDistillation(make("gemma3"), block=4)(make("llama"), prompt()["input_ids"])
    with pytest.raises(OptionError, match="12 tokens are shorter than a block of 64"):
        GateDistillation(make("llama"))(make("llama"), prompt()["input_ids"])
    with pytest.raises(Unsupported, match="causal attention of whole texts"):
        GateDistillation(make("bert"), block=4)(make("bert"), prompt())
    with pytest.raises(Unsupported, match="no attention layer over the softmax op"):
        GateDistillation(torch.nn.Linear(2, 2))


def rows_of(make_row, rows, length, seed):
    return torch.from_numpy(np.stack([make_row(np.random.default_rng([seed, i]), length)[0] for i in range(rows)]))


def texts(rows, length, seed):
    """Held-out source text."""
    return rows_of(lambda rng, n: text_row(rng, n, source("test")), rows, length, seed)


def trained(model, steps, *, length, block, rows=8, lr=1e-2, hidden=32):
    """Gates of a frozen model after some steps on its own training rows: (distillation, held-out loss before, after)."""
    distil = GateDistillation(model, block=block, hidden=hidden)
    optimizer = torch.optim.Adam(distil.parameters(), lr=lr)
    held = rows_of(note_row, 16, length, 10**6)
    with torch.no_grad():
        start = float(distil(model, held)["gate_kl"])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        loss = distil(model, rows_of(note_row, rows, length, step))["gate_kl"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return distil, start, float(distil(model, held)["gate_kl"])


def recalls(model, gates_of, ids, block, kept):
    """Of a row's largest `kept` blocks, how many are among its best `kept` scores; rows with a choice, mean over layers."""
    reader, found = Reader(), {}
    with torch.no_grad(), steer(model, reader):
        model(ids, use_cache=False)
        for (_, layer), (q, k) in reader.seen.items():
            call = reader.calls[0, layer]
            target = block_targets(call.q, call.k, block=block)[:, :, 2 * kept :]
            scores = {"gates": gates_of[str(layer)](q, k)}
            pairs = {"averages": (q, k), "averages, rotated": (call.q, call.k)}
            scores |= {name: file._averages(block)(*pair) for name, pair in pairs.items()}
            best = torch.zeros_like(target).scatter(-1, target.topk(kept).indices, 1.0)
            for name, score in scores.items():
                hits = best.gather(-1, score[:, :, 2 * kept :].topk(kept).indices).mean()
                found[name] = found.get(name, 0.0) + float(hits) / len(reader.seen)
    return found


class Ways:
    """What is compared at the same number of blocks, as gates of any layer: the last blocks and the first, drawn ones."""

    def __init__(self, block, drawn):
        self.block, self.drawn = block, drawn

    def __call__(self, q, k):
        count = -(-q.shape[2] // self.block)
        blocks = torch.arange(count)
        scores = torch.rand(*q.shape[:2], count, count) if self.drawn else blocks.masked_fill(blocks == 0, 10**6)
        later = blocks > blocks[:, None]
        return scores.float().expand(*q.shape[:2], count, count).masked_fill(later, float("-inf"))


def scored(model, cases, text):
    """(share of notes found, nats a token of source text)."""
    with torch.no_grad():
        right = torch.cat([some.right(model(some.ids, use_cache=False).logits) for some in cases.split(8)])
        out = [model(some, use_cache=False).logits[:, :-1].flatten(0, 1) for some in text.split(8)]
    return float(right.float().mean()), float(F.cross_entropy(torch.cat(out), text[:, 1:].flatten()))


def test_a_few_steps_bring_gates_nearer():
    model = regard.tiny.lm()[0].requires_grad_(False)
    _, start, end = trained(model, 8, length=128, block=16, rows=4)
    assert end < 0.6 * start


@pytest.mark.slow
def test_gates_of_tiny_lm_choose_better_than_windows(record, monkeypatch):
    block, length, steps, kept = 16, 512, 300, 4
    model = regard.tiny.lm()[0].requires_grad_(False)
    distil, start, end = trained(model, steps, length=length, block=block, hidden=64)
    found = recalls(model, distil.gates, rows_of(note_row, 16, length, 10**6 + 1), block, kept)
    cases, text = regard.tiny.note_cases(96, length, gap=64), texts(32, length, 7)
    kinds = {
        "gates": distil.gates,
        "averages": None,
        "last and first blocks": {layer: Ways(block, False) for layer in range(3)},
        "drawn blocks": {layer: Ways(block, True) for layer in range(3)},
    }
    read, table = selections(monkeypatch), []

    def line(name, ratio, last):
        read.clear()
        with steer(model, Seer(kinds[name], ratio=ratio, dense_last=last, block=block)):
            right, nats = scored(model, cases, text)
        blocks = read[0][0].dense(length, length)[:, :, block - 1 :: block, ::block]
        share = float(blocks.sum(dtype=torch.float64) / (blocks[..., 0].numel() * (length // block + 1) / 2))
        table.append(
            {"way": name, "ratio": ratio, "dense_last": last, "share of blocks": share, "notes": right, "nats": nats}
        )
        return right, nats

    made = {(name, ratio): line(name, ratio, 0) for ratio in (0.2, 0.36, 0.6) for name in kinds}
    line("gates", 0.2, 2)
    line("last and first blocks", 0.2, 2)
    right, nats = scored(model, cases, text)
    record(
        {
            "task": f"tiny-lm, frozen; {length} tokens in blocks of {block}; 8 notes, chance 0.125; nats a token of text",
            "training": f"{steps} steps of 8 rows of notes, hidden 64",
            "divergence, summed over layers": {"before": start, "after": end},
            f"recall of the {kept} largest blocks of a row": found,
            "dense": {"notes": right, "nats": nats},
            "sparse": table,
        }
    )
    assert end <= start / 2
    assert found["gates"] >= found["averages"] + 0.1 and found["gates"] >= found["averages, rotated"] + 0.02
    for ratio in (0.2, 0.36, 0.6):
        others = [made[name, ratio] for name in kinds if name != "gates"]
        assert made["gates", ratio][0] >= max(right for right, _ in others) + 0.1
        assert made["gates", ratio][1] <= min(nats for _, nats in others)
    assert len({round(entry["share of blocks"], 6) for entry in table if not entry["dense_last"]}) == 3
