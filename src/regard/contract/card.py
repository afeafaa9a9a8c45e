"""The card: what a system is and what it claims. Every claim switches on a check; what is not claimed is refused.

A card is one literal call at module level, `CARD = OpCard(...)`, so that it can be read without importing its file.
One class per kind of system; all fields are literals.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

ATTENDS = ("self", "causal_self", "cross", "causal_cross")
ACCEPTS = ("pattern", "mask", "bias", "scale", "dropout")
# where something in a model can be read or changed; scores are before mask and normaliser, weights after both and before
# dropout, z are the heads' outputs before the projection, attn_out and mlp_out what joins the stream
SITES = (
    "embed", "q", "k", "v", "scores", "weights", "z", "attn_out", "mlp_hidden", "mlp_out", "resid_pre", "resid_mid",
    "resid_post", "final", "tokens", "kv", "router", "logits", "feature", "gate", "latents", "text", "guidance", "step",
)  # fmt: skip
# what a check can hand to a system, made for the specimen that it is tried on
GIVEN = (
    "model", "inputs", "ids", "other ids", "one row", "prompts", "cases", "answered ids", "next tokens", "metric", "tape",
    "images", "one image", "labelled images", "images and labels", "method", "features", "generator", "condition", "tokens",
    "queries", "weights", "maps", "heads", "other heads",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Card:
    """The head that all cards share.

    slug: the system's one name. title: for people. paper: the title of its source.
    part_of: the slug whose card owns this idea, where the same system lives in several files.
    builds_on: slugs whose code it imports. exports: the public names of the file.
    example: axis sizes for tests ("b=2 h=4 n=12"). options: settings it cannot do without.
    baseline: True for systems outside the catalogue that others are compared with.
    """

    kind: ClassVar[str] = ""

    slug: str
    title: str
    exports: tuple[str, ...]
    paper: str = ""
    part_of: str = ""
    builds_on: tuple[str, ...] = ()
    example: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    baseline: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            kind = str(f.type).partition("[")[0]
            expected = {"str": str, "bool": bool, "tuple": tuple, "dict": dict}[kind]
            if not isinstance(value, expected):
                raise TypeError(f"field {f.name!r} of the card {self.slug!r} is {value!r}; it must be a {kind}")
        for name, allowed in self.vocabulary.items():
            value = getattr(self, name)
            words = value.values() if isinstance(value, dict) else (value,) if isinstance(value, str) else value
            for word in words:
                if word not in allowed:
                    raise ValueError(f"field {name!r} of the card {self.slug!r} holds {word!r}; it may hold {allowed}")
        if not (self.paper or self.baseline or self.part_of):
            raise ValueError(f"the card {self.slug!r} names no paper; only a baseline may do without")

    vocabulary: ClassVar[dict[str, tuple[str, ...]]] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """The example's axis sizes."""
        return {axis: int(size) for axis, size in (pair.split("=") for pair in self.example.split())}


@dataclass(frozen=True, kw_only=True)
class OpCard(Card):
    """A function of q, k, v.

    spec: its shapes. attends: which of the four patterns of the Comprehensive Attention Benchmark it can compute.
    accepts: which shared options it takes. padding: hidden keys (pattern KeyValid) change nothing else.
    documents: the pattern Documents separates documents.
    decode: "" no, "kv" by keeping keys and values, "state" by a sibling `<slug>_step`.
    gradient: gradients of q, k, v are checked in float64. time, memory: growth in the spec's letters.
    engines: the engine families that run it, best first. mixer: settings of the attention layer that wraps it.
    reach: the option that says how many of the last keys a query reads at most, which bounds the layer's cache.
    """

    kind: ClassVar[str] = "op"
    vocabulary: ClassVar[dict[str, tuple[str, ...]]] = {
        "attends": ATTENDS,
        "accepts": ACCEPTS,
        "decode": ("", "kv", "state"),
    }

    spec: str
    attends: tuple[str, ...]
    accepts: tuple[str, ...] = ()
    padding: bool = False
    documents: bool = False
    decode: str = ""
    gradient: bool = True
    time: str = ""
    memory: str = ""
    engines: tuple[str, ...] = ()
    mixer: dict[str, Any] = field(default_factory=dict)
    reach: str = ""


@dataclass(frozen=True, kw_only=True)
class MixerCard(Card):
    """A module with weights, tokens to tokens.

    attends, padding, documents: as for an op. decode: it has init_state, prefill and step.
    constant_state: `state_bytes` does not grow with length (beyond the window, where it has one).
    """

    kind: ClassVar[str] = "mixer"
    vocabulary: ClassVar[dict[str, tuple[str, ...]]] = {"attends": ATTENDS}

    attends: tuple[str, ...]
    padding: bool = False
    documents: bool = False
    decode: bool = False
    constant_state: bool = False
    time: str = ""
    memory: str = ""


@dataclass(frozen=True, kw_only=True)
class PoolCard(Card):
    """A module with weights, the tokens of a row to one vector: (B, N, C) -> (B, C).

    An example with an axis l says that it takes the tokens of all layers, (B, L, N, C).
    """

    kind: ClassVar[str] = "pool"

    time: str = ""
    memory: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelCard(Card):
    """Mixers stacked. task: what goes in and out. decode: it has init_state, prefill and step.

    stands_on: the specimen of the foreign models that it is built on, "" for none; then it takes the model first.
    """

    kind: ClassVar[str] = "model"

    task: str
    decode: bool = False
    stands_on: str = ""


@dataclass(frozen=True, kw_only=True)
class ExplanationCard(Card):
    """A reading of a model or of an op; nothing is changed.

    takes: parameter -> what it is called with (`GIVEN`), beside the options; with neither it is not called. reads: the
    specimen that is read, "" for none. calls: the export that is called, the first if ""; then a method of what came back,
    and so on, "Name.fit.predict", each with those of the parameters that it has. figure: what comes back has `figure()`.
    """

    kind: ClassVar[str] = "explanation"
    vocabulary: ClassVar[dict[str, tuple[str, ...]]] = {"takes": GIVEN}

    reads: str = ""
    takes: dict[str, str] = field(default_factory=dict)
    calls: str = ""
    figure: bool = False


@dataclass(frozen=True, kw_only=True)
class ParallelCard(Card):
    """A function of q, k, v of which every process holds a part of the sequence.

    spec: its shapes, for one process. attends: what is compared with `whole`, the slug of the op that it equals on the
    whole sequence, called with `whole_options`. sends: what a process sends, in blocks of its part.
    """

    kind: ClassVar[str] = "parallel"
    vocabulary: ClassVar[dict[str, tuple[str, ...]]] = {"attends": ATTENDS}

    spec: str
    attends: tuple[str, ...]
    whole: str
    whole_options: dict[str, Any] = field(default_factory=dict)
    time: str = ""
    memory: str = ""
    sends: str = ""


@dataclass(frozen=True, kw_only=True)
class InterventionCard(Card):
    """Something done to a pretrained model, and undone.

    sites: where it reads or writes (`SITES`). owns: those that nobody else may write at the same time.
    off: settings with which it changes nothing, bit for bit. spares: settings with which layer 0 is left as it was.
    padding: rows are steered alone, whatever pads they have. prompt: rows of ids to try it on, where it cannot read any.
    """

    kind: ClassVar[str] = "intervention"
    vocabulary: ClassVar[dict[str, tuple[str, ...]]] = {"sites": SITES, "owns": SITES}

    sites: tuple[str, ...]
    owns: tuple[str, ...] = ()
    off: dict[str, Any] = field(default_factory=dict)
    spares: dict[str, Any] = field(default_factory=dict)
    padding: bool = False
    prompt: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class DecodingCard(Card):
    """A way of writing, handed to `generate(custom_generate=...)` of a pretrained model.

    generate: what generate is told beside it. off: settings with which it writes what the library itself writes when told
    the same. padding: rows are written alone, whatever pads they have.
    """

    kind: ClassVar[str] = "decoding"

    generate: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] = field(default_factory=dict)
    padding: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingCard(Card):
    """A loss, or a method of training that gives one: `loss(model, batch)` -> name -> scalar.

    teacher: the specimen that it is made from, "" for none. student: the one that it is called with, "" for the teacher
    itself; student_options: its settings. batch: what with (`GIVEN`). losses: the names of what comes back. trains:
    patterns (`*`) of names of the parameters that gradients reach, the model's, or behind "self." those of the loss.
    """

    kind: ClassVar[str] = "training"
    vocabulary: ClassVar[dict[str, tuple[str, ...]]] = {"batch": GIVEN}

    batch: str
    losses: tuple[str, ...]
    trains: tuple[str, ...]
    teacher: str = ""
    student: str = ""
    student_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskCard(Card):
    """A benchmark task. version enters every result; chance is the score of guessing, as text."""

    kind: ClassVar[str] = "task"

    version: str
    metric: str
    chance: str


CARDS: dict[str, type[Card]] = {
    c.__name__: c
    for c in (
        OpCard,
        MixerCard,
        PoolCard,
        ParallelCard,
        ModelCard,
        InterventionCard,
        DecodingCard,
        ExplanationCard,
        TrainingCard,
        TaskCard,
    )
}
