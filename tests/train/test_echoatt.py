"""Pairs of student and teacher, and the loss of EchoAtt: definitions, and what it recovers."""

import copy
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from regard import OptionError, ShapeError, share_attention_
from regard.bench.proving.notes import source
from regard.hosts.transformers.specimens import make, prompt
from regard.train.distillation.echoatt import EchoLoss
from regard.train.distillation.matching import FeatureMSE, HardTargets, Pair, SoftTargets, Tap, evaluating, match
from tests.oracles import normal

REAL = torch.tensor([[False, True, True], [True, True, True]])


def test_distances_equal_loops_over_real_tokens():
    student, teacher = normal((2, 3, 5), (2, 3, 5), dtype=torch.float32)
    mse, soft, hard = [], [], []
    for b in range(2):
        for i in range(3):
            if REAL[b, i]:
                s, t = student[b, i], teacher[b, i]
                p, q = (t / 3).softmax(0), (s / 3).softmax(0)
                mse.append(((s - t) ** 2).mean())
                soft.append(9 * (p * (p / q).log()).sum())
                hard.append(-s.log_softmax(0)[t.argmax()])
    for distance, wanted in ((FeatureMSE(), mse), (SoftTargets(3.0), soft), (HardTargets(), hard)):
        torch.testing.assert_close(distance(student, teacher, REAL), torch.stack(wanted).mean())
    for distance in (FeatureMSE(), SoftTargets(2.0)):
        assert distance(teacher, teacher, None) == 0


def test_losses_of_pairs_are_read_at_their_places():
    teacher, student = make("llama"), make("llama", seed=1)
    batch = {**prompt(length=8, padded=3), "labels": prompt(length=8)["input_ids"]}
    mask = batch["attention_mask"].bool()
    pairs = [
        Pair("streams", Tap("resid_post", 0), Tap("resid_post", 1), FeatureMSE(), 2.0),
        Pair("streams", Tap("resid_post", -1), Tap("resid_post", -1), FeatureMSE(), 0.5),
        Pair("logits", Tap("logits"), Tap("logits"), SoftTargets(1.0)),
    ]
    found = match(pairs, student, teacher, batch)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    # what comes after layer i; the last one is before the final norm
    ours, theirs = (streams(model, given) for model in (student, teacher))
    wanted = 2 * FeatureMSE()(ours[0], theirs[1], mask) + 0.5 * FeatureMSE()(ours[2], theirs[2], mask)
    torch.testing.assert_close(found["streams"], wanted)
    wanted = SoftTargets(1.0)(student(**given).logits, teacher(**given).logits, mask)
    torch.testing.assert_close(found["logits"], wanted)


def streams(model, given):
    kept = []
    hooks = [layer.register_forward_hook(lambda m, a, out: kept.append(out)) for layer in model.model.layers]
    model(**given)
    for hook in hooks:
        hook.remove()
    return kept


def test_an_objective_leaves_both_models_as_they_are():
    teacher, student = make("llama").train(), make("llama", seed=1)
    before = {name: x.clone() for name, x in student.state_dict().items()}
    losses = EchoLoss(teacher)(student, prompt(length=8), step=3)
    assert set(losses) == {"ce", "kl", "mid"}
    assert teacher.training and not student.training
    assert all(p.grad is None for p in [*teacher.parameters(), *student.parameters()])
    sum(losses.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())
    assert not student._forward_hooks and not teacher._forward_hooks


def test_each_part_of_the_teacher_keeps_its_mode():
    teacher = make("llama").train()
    teacher.model.layers[1].eval()
    modes = [module.training for module in teacher.modules()]
    EchoLoss(teacher)(make("llama", seed=1), prompt(length=8))
    assert [module.training for module in teacher.modules()] == modes
    with evaluating(teacher):
        assert not any(module.training for module in teacher.modules())
    assert [module.training for module in teacher.modules()] == modes


def test_a_student_like_its_teacher_loses_nothing_but_its_teachers_doubt():
    teacher, ids = make("llama"), prompt(length=8)["input_ids"]
    losses = EchoLoss(teacher, alpha_ce=1.0, temperature=3.0)(copy.deepcopy(teacher), ids)
    assert losses["kl"].abs() < 1e-6 and losses["mid"] == 0
    logits = teacher(ids).logits
    torch.testing.assert_close(losses["ce"], F.cross_entropy(logits.flatten(0, 1), logits.argmax(-1).flatten()))


def test_each_loss_is_that_of_its_definition():
    teacher, student, batch = make("llama"), make("llama", seed=1), prompt(length=8, padded=3)
    losses = EchoLoss(teacher, alpha_ce=0.5, alpha_kl=2.0, alpha_mid=3.0, temperature=1.5)(student, batch)
    mask = batch["attention_mask"].bool()
    ours, theirs = (model(**batch).logits[mask] for model in (student, teacher))
    torch.testing.assert_close(losses["ce"], 0.5 * F.cross_entropy(ours, theirs.argmax(-1)))
    p, log_q = (theirs / 1.5).softmax(-1), (ours / 1.5).log_softmax(-1)
    torch.testing.assert_close(losses["kl"], 2.0 * 1.5**2 * (p * (p.log() - log_q)).sum(-1).mean())
    pairs = zip(streams(student, batch), streams(teacher, batch), strict=True)
    apart = [(a[mask] - b[mask]).square().mean() for a, b in pairs]
    assert len(apart) == 3
    torch.testing.assert_close(losses["mid"], 3.0 * sum(apart) / 3)


def test_weights_scale_their_losses_and_zero_leaves_one_out():
    teacher, student, batch = make("llama"), make("llama", seed=1), prompt(length=8)
    once = EchoLoss(teacher, alpha_ce=1.0)(student, batch)
    twice = EchoLoss(teacher, alpha_ce=2.0, alpha_kl=0.0, alpha_mid=3.0)(student, batch)
    assert set(twice) == {"ce", "mid"}
    torch.testing.assert_close(twice["ce"], 2 * once["ce"])
    torch.testing.assert_close(twice["mid"], 3 * once["mid"])


@pytest.mark.parametrize("options", [{"alpha_ce": -1.0}, {"alpha_ce": 0.0, "alpha_kl": 0.0, "alpha_mid": 0.0}])
def test_settings_that_cannot_be_are_refused(options):
    with pytest.raises(OptionError, match="weights are at least 0"):
        EchoLoss(make("llama"), **options)
    with pytest.raises(OptionError, match="temperature is above 0"):
        EchoLoss(make("llama"), temperature=0.0)
    with pytest.raises(ShapeError, match="features of the student"):
        FeatureMSE()(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), None)


# ---- behaviour


def llama(layers, dim):
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=256, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def batches(split, rows, length, seed):
    text, draw = np.asarray(source(split)), np.random.default_rng(seed)
    while True:
        starts = draw.integers(0, len(text) - length, rows)
        yield torch.from_numpy(np.stack([text[s : s + length] for s in starts]).astype(np.int64))


def plain(model, ids):
    return {"loss": model(ids, labels=ids).loss}


def train(model, objective, steps, rate, seed, rows=16, length=96):
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01)
    stream = batches("train", rows, length, seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        loss = sum(objective(model, next(stream)).values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


@torch.no_grad()
def held_out(model):
    stream = batches("test", 16, 96, seed=7)
    return float(np.mean([float(plain(model, next(stream))["loss"]) for _ in range(8)]))


def test_a_student_comes_back_to_its_teacher():
    teacher = make("llama")
    student = share_attention_(copy.deepcopy(teacher), ((0, 1, 2),)).train()
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.v_proj.weight += torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) / 4
    loss, optimizer = EchoLoss(teacher, alpha_ce=0.0), torch.optim.Adam(student.parameters(), 1e-3)
    draw, values = torch.Generator().manual_seed(0), []
    for _ in range(80):
        losses = loss(student, torch.randint(2, 50, (8, 12), generator=draw))
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append({name: float(x.detach()) for name, x in losses.items()})
    assert values[-1]["kl"] < 0.5 * values[0]["kl"] and values[-1]["mid"] < 0.5 * values[0]["mid"]


@pytest.mark.slow
def test_a_shared_model_comes_back_by_distillation(record):
    start = time.process_time()
    teacher = train(llama(6, 64), plain, 700, 3e-3, seed=0).eval()
    whole = held_out(teacher)
    blocks, steps = ((1, 2), (3, 4)), 100
    jumped = held_out(share_attention_(copy.deepcopy(teacher), blocks))
    ways = {
        "echo": EchoLoss(teacher),
        "plain": plain,
        # without the teacher's likeliest tokens, and with as much weight on them as on its distribution
        "echo, alpha_ce 0": EchoLoss(teacher, alpha_ce=0.0),
        "echo, alpha_ce 1": EchoLoss(teacher, alpha_ce=1.0),
    }
    after = {name: {} for name in ways}
    for name, objective in ways.items():
        for rate in (1e-3, 3e-3):
            student = share_attention_(copy.deepcopy(teacher), blocks).train()
            after[name][rate] = held_out(train(student, objective, steps, rate, seed=1).eval())
    recovered = {name: (jumped - min(losses.values())) / (jumped - whole) for name, losses in after.items()}
    record(
        {
            "blocks": blocks, "steps": steps, "loss": {"teacher": whole, "shared": jumped},
            "loss after, by learning rate": after, "share of the jump recovered, best rate": recovered,
            "cpu_s": round(time.process_time() - start, 1),
        }
    )  # fmt: skip
    assert jumped > whole + 0.1
    assert recovered["echo"] >= 0.8
    assert recovered["echo, alpha_ce 0"] > recovered["plain"] + 0.01
