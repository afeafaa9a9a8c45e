"""tiny-lm: a LlamaForCausalLM of 0.6 M parameters that recalls, repeats, finds notes and writes source text; its recipe.

    python -m regard.bench.proving.tiny_lm            trains it into out/tiny-lm: minutes of one core, goes on when killed

Stage 1, rows of 64 tokens, until asked values are right: pairs k v k v … whose keys come again, and repeated segments.
Stage 2, rows of 128, 256, 512 tokens: longer pairs, repeats of every period, notes in source text, source text alone.
The loss is a sum of means, asked values + text + repeats / 2: in one mean over all tokens text would drown the answers.
Muon for the matrices inside layers, AdamW for the rest; bfloat16 autocast where the processor has it. Weights are rounded to
bfloat16, then scored; the recipe fails where a score that FLOORED names is below 0.95. Text is this machine's standard
library, split by file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard._version import __version__
from regard.bench.checkpoint import load_checkpoint, save_checkpoint
from regard.bench.machine import hardware
from regard.bench.progress import Progress
from regard.bench.proving.notes import BEGIN, KEYS, PAD, VALUES, VOCAB, note_cases, source
from regard.bench.proving.rows import (
    ASKED,
    NOTHING,
    REPEATED,
    TEXT,
    Row,
    first_stage,
    recall_row,
    repeat_row,
    second_stage,
    text_row,
)
from regard.bench.results import write_atomically
from regard.contract.errors import OptionError, RegardError
from regard.contract.optional import need

WEIGHTS = Path(__file__).parent / "tiny-lm"
# lines of the score sheet: kind, what of that kind, length, rows
SHEET: tuple[tuple[str, int | str, int, int], ...] = (
    ("notes", 8, 256, 96), ("notes", 8, 512, 96), ("notes", 8, 1024, 48), ("notes", 8, 2048, 24),
    ("notes", 16, 512, 96), ("notes", 16, 1024, 48),
    ("recall", 8, 256, 48), ("recall", 32, 256, 48), ("recall", 48, 256, 48),
    ("repeats", "any", 256, 48), ("repeats", "any", 512, 24), ("text", "source", 512, 96),
)  # fmt: skip
FLOOR = 0.95
# the lines that must reach it, without their rows
FLOORED = (("notes", 8, 256), ("notes", 8, 512), ("recall", 8, 256), ("recall", 32, 256), ("repeats", "any", 256))
_WEIGHT = {ASKED: 1.0, TEXT: 1.0, REPEATED: 0.5}
_SAVE_EVERY_S = 20.0
_WARM_UP = 50


class NotLearned(RegardError):
    """A training run that did not reach what the recipe promises."""


@dataclass(frozen=True)
class Plan:
    """How long it trains. tokens: of a step, 512 at least. Stage 1 ends when the running accuracy on asked values passes
    `learned`, and fails after `most` steps; stage 2 has `steps`.
    """

    seed: int = 0
    tokens: int = 4096
    learned: float = 0.95
    most: int = 1100
    steps: int = 1200


@dataclass(frozen=True)
class Run:
    """Where a run stands. first: steps of stage 1, once it is over; asked: running accuracy; cpu_s: processor time."""

    step: int = 0
    first: int | None = None
    asked: float = 0.0
    cpu_s: float = 0.0


def untrained(seed: int) -> Any:
    """A LlamaForCausalLM of tiny-lm's shape with random weights. Raises MissingExtra without transformers."""
    library = need("transformers", "hf")
    config = library.LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=False, bos_token_id=BEGIN, eos_token_id=None, pad_token_id=PAD,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return library.LlamaForCausalLM(config)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model (in evaluation mode) and tokenizer of a folder that `write` made. Raises MissingExtra without transformers."""
    library = need("transformers", "hf")
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, library.AutoTokenizer.from_pretrained(folder)


def tokenizer() -> Any:
    """Bytes are their own ids; <begin>, <note>, <ask>, <k0> … <k63>, <v0> … <v63>, <pad> stand for the others."""
    parts, library = need("tokenizers", "hf"), need("transformers", "hf")
    letters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in letters]
    # the byte-level alphabet: bytes that are no letters stand behind the last byte, in order
    alphabet = {chr(byte): byte for byte in letters} | {chr(256 + i): byte for i, byte in enumerate(others)}
    made = parts.Tokenizer(parts.models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = parts.decoders.ByteLevel()
    made.add_special_tokens([parts.AddedToken("<begin>", normalized=False)])
    own = ["<note>", "<ask>", *(f"<k{i}>" for i in range(len(KEYS))), *(f"<v{i}>" for i in range(len(VALUES)))]
    made.add_tokens([parts.AddedToken(text, normalized=False) for text in own])
    made.add_special_tokens([parts.AddedToken("<pad>", normalized=False)])
    made.post_processor = parts.processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", BEGIN)])
    return library.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<begin>", pad_token="<pad>", padding_side="left"
    )


def train(
    plan: Plan, *, checkpoint: Path, on_step: Callable[[Run, float], None] = lambda run, loss: None
) -> tuple[Any, Run]:
    """Train a new model, or go on from the checkpoint of the same plan; a resumed run ends with the same weights.

    checkpoint: file that is rewritten every 20 s and at the end. on_step(run, loss of the step). Raises NotLearned.
    """
    model = untrained(plan.seed).train()
    optimizers = _optimizers(model)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    facts = load_checkpoint(checkpoint, model, optimizers, repr(plan))
    run = Run(**facts) if facts else Run()
    saved, start = time.perf_counter(), time.process_time()
    while run.first is None or run.step < run.first + plan.steps:
        if run.first is None and run.step >= plan.most:
            raise NotLearned(
                f"after {run.step} steps of stage 1 the running accuracy is {run.asked:.2f}, not {plan.learned}: "
                "try another seed"
            )
        ids, why = _batch(plan, run)
        factor = _schedule(plan, run)
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        loss, right = _loss(model, ids, why)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        now = time.process_time()
        asked = run.asked if right is None else 0.95 * run.asked + 0.05 * right
        first = run.step + 1 if run.first is None and asked > plan.learned else run.first
        run = Run(run.step + 1, first, asked, run.cpu_s + now - start)
        start = now
        on_step(run, float(loss.detach()))
        if time.perf_counter() - saved > _SAVE_EVERY_S:
            save_checkpoint(checkpoint, model, optimizers, repr(plan), asdict(run))
            saved = time.perf_counter()
    save_checkpoint(checkpoint, model, optimizers, repr(plan), asdict(run))
    return model.eval(), run


def score(model: Any, kind: str, of: int | str, length: int, rows: int = 96, seed: int = 1) -> dict[str, Any]:
    """A line of the score sheet, on held-out rows. kind and of: "notes" and how many (all asked for at the end), "recall" and
    how many pairs, "repeats" and the period or "any", "text" and "source".

    value: the share of right tokens, `chance` beside it; for text, bits per byte.
    """
    chance = {
        "notes": lambda: 1 / int(of),
        "recall": lambda: 1 / int(of),
        "repeats": lambda: 1 / 128,
        "text": lambda: 8.0,
    }
    if kind not in chance:
        raise OptionError(f"there is no score of {kind!r}; there are {', '.join(chance)}")
    if kind == "notes":
        cases = note_cases(rows, length, notes=int(of), asks=int(of), seed=seed)
        right = torch.cat([some.right(_logits(model, some.ids)) for some in cases.split(8)])
        value, count = float(right.float().mean()), right.numel()
    else:
        value, count = _held_out(model, [_row(kind, of, length, np.random.default_rng([seed, i])) for i in range(rows)])
    made = {"kind": kind, "of": of, "length": length, "rows": rows, "counted": count}
    return {**made, "value": round(value, 4), "chance": round(chance[kind](), 4)}


def scores(model: Any) -> list[dict[str, Any]]:
    """The whole score sheet."""
    return [score(model, *line) for line in SHEET]


def below(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a score sheet that FLOORED names and that do not reach FLOOR."""
    return [line for line in lines if (line["kind"], line["of"], line["length"]) in FLOORED and line["value"] < FLOOR]


def write(folder: Path, model: Any, lines: Sequence[dict[str, Any]], plan: Plan, run: Run, command: str) -> None:
    """Weights in bfloat16, configuration, tokenizer and score sheet, for `load` and for transformers' Auto classes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    facts = {
        "command": command,
        "seed": plan.seed,
        "regard": __version__,
        "torch": torch.__version__,
        "transformers": need("transformers", "hf").__version__,
        "python": sys.version.split()[0],
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "arithmetic": "bfloat16 autocast" if _has_bfloat16() else "float32",
        "precision": "weights rounded to bfloat16, scored in float32",
        "steps": {"stage 1": run.first, "stage 2": plan.steps},
        "tokens": run.step * plan.tokens,
        "training_cpu_s": round(run.cpu_s, 1),
        "scores": lines,
    }
    write_atomically(folder / "scores.json", (json.dumps(facts, indent=1) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, score and write; 1 if it did not learn what the recipe promises."""
    parser = argparse.ArgumentParser(prog="python -m regard.bench.proving.tiny_lm", description="Train tiny-lm.")
    parser.add_argument("--out", type=Path, default=Path("out/tiny-lm"), help="folder of weights and scores")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    # matrices so small gain nothing from a second thread, and one gives the same numbers everywhere
    torch.set_num_threads(1)
    watcher = Progress(need("rich.console", "bench").Console())
    plan = Plan(seed=given.seed)
    checkpoint = given.out / "checkpoint.safetensors"
    given.out.mkdir(parents=True, exist_ok=True)

    def on_step(run: Run, loss: float) -> None:
        stage, done = (1, run.step) if run.first is None else (2, plan.most + run.step - run.first)
        note = f"stage {stage}, step {run.step}, loss {loss:.2f}, asked {run.asked:.2f}, {run.cpu_s:.0f} s of processor"
        watcher.advance(done, note)
        if run.step % 100 == 0:
            watcher.say(note)

    try:
        with watcher.part("tiny-lm", plan.most + plan.steps):
            model, run = train(plan, checkpoint=checkpoint, on_step=on_step)
    except KeyboardInterrupt:
        watcher.say(f"stopped; the same command goes on from {checkpoint}")
        return 130
    except NotLearned as error:
        watcher.say(str(error))
        return 1
    _round(model)
    lines = scores(model)
    for line in lines:
        watcher.say("{kind} {of}, length {length}: {value} (chance {chance})".format(**line))
    if below(lines):
        watcher.say(f"nothing is written: {len(below(lines))} of these are below {FLOOR}; try another --seed")
        return 1
    command = f"python -m regard.bench.proving.tiny_lm --seed {plan.seed}"
    write(given.out, model, lines, plan, run, command)
    checkpoint.unlink()
    watcher.say(f"written to {given.out}")
    return 0


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    inner = {name: p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2}
    tables = [p for name, p in model.named_parameters() if name not in inner and p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": tables, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    muon = torch.optim.Muon(inner.values(), lr=2e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))]


def _schedule(plan: Plan, run: Run) -> float:
    left = 1.0 if run.first is None else (run.first + plan.steps - run.step) / max(plan.steps, 1)
    return min((run.step + 1) / _WARM_UP, left / 0.3, 1.0)


def _batch(plan: Plan, run: Run) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng([plan.seed, run.step])
    if run.first is None:
        length, make = 64, first_stage
    else:
        done = (run.step - run.first) / plan.steps
        length, make = 128 if done < 0.25 else 256 if done < 0.6 else 512, second_stage
    rows = [make(rng, length) for _ in range(plan.tokens // length)]
    ids, why = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return ids, why


def _loss(model: Any, ids: Tensor, why: Tensor) -> tuple[Tensor, float | None]:
    """The sum of the kinds' mean losses, and the accuracy on asked values (None where nothing is asked)."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=_has_bfloat16()):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    total, right = torch.zeros(()), None
    for kind, weight in _WEIGHT.items():
        here = why[:, 1:] == kind
        if here.any():
            some, wanted = logits[here].float(), ids[:, 1:][here]
            total = total + weight * F.cross_entropy(some, wanted)
            if kind == ASKED:
                right = float((some.argmax(-1) == wanted).float().mean())
    return total, right


@torch.no_grad()
def _round(model: nn.Module) -> None:
    """What storing in bfloat16 does; unlike `.to`, it leaves the rotary frequencies, which are not stored."""
    for p in model.parameters():
        p.copy_(p.bfloat16())


def _has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; where it does not, float32 is several times faster."""
    # an older torch cannot tell
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _row(kind: str, of: int | str, length: int, rng: np.random.Generator) -> Row:
    if kind == "recall":
        return recall_row(rng, length, int(of))
    if kind == "repeats":
        return repeat_row(rng, length, None if of == "any" else int(of))
    return text_row(rng, length, source("test"))


def _held_out(model: Any, rows: Sequence[Row]) -> tuple[float, int]:
    """The share of right tokens, or bits per byte of text; and how many tokens that counts."""
    ids, why = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    nats = hits = 0.0
    for some, reason in zip(ids.split(8), why.split(8), strict=True):
        here = reason[:, 1:] != NOTHING
        logits, wanted = _logits(model, some)[:, :-1][here], some[:, 1:][here]
        nats += float(F.cross_entropy(logits, wanted, reduction="sum"))
        hits += int((logits.argmax(-1) == wanted).sum())
    count = int((why[:, 1:] != NOTHING).sum())
    is_text = bool((why == TEXT).any())
    return (nats / math.log(2) if is_text else hits) / count, count


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


if __name__ == "__main__":
    sys.exit(main())
