"""new: write the skeleton of a system, which passes the structural tests at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from regard.contract.catalogue import ROOT, catalogue
from regard.contract.errors import OptionError, near

_OP = '''"""{title}: one line that says the idea.

    out = softmax(scale q k') v

Departs from the paper: say where, or none.
"""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense
from regard.patterns import Bound, Pattern

CARD = OpCard(
    slug="{slug}",
    title="{title}",
    paper="Title of the paper",
    exports=("{slug}_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("pattern", "mask", "bias", "scale"),
    padding=True,
    documents=True,
    decode="kv",
    time="n m",
    memory="n m",
    engines=("dense",),
)


@operator(CARD)
def {slug}_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
    engine: str | None = None,
) -> Tensor:
    """One sentence, with section or table of the paper.

    Own options with range and unit. Raises OptionError, ShapeError.
    """
    return dense(
        q, k, v, pattern, mask=mask, bias=bias, is_causal=is_causal, scale=scale, q_offset=q_offset, engine=engine
    ).out
'''

_MIXER = '''"""{title}: one line that says the idea.

    the equation

Departs from the paper: say where, or none.
"""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import MixerCard
from regard.layers.attention import AnyPattern, Attention
from regard.ops.softmax import softmax_attention

CARD = MixerCard(
    slug="{slug}",
    title="{title}",
    paper="Title of the paper",
    builds_on=("softmax",),
    exports=("{name}",),
    example="b=2 n=10 c=16 h=4",
    attends=("self", "causal_self", "cross", "causal_cross"),
    padding=True,
    documents=True,
    decode=True,
    time="n m c",
    memory="n c",
)


class {name}(Attention):
    """One sentence, with section or table of the paper.

    Options are those of the attention layer. Raises OptionError.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return softmax_attention(q, k, v, pattern=pattern, q_offset=q_offset)
'''

_KINDS = {"ops": _OP, "mixers/tokens": _MIXER}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", help=f"ROOM/SLUG, with ROOM one of {', '.join(_KINDS)}")
    parser.add_argument("--root", type=Path, default=ROOT, help="the package folder (default: the installed one)")


def run(given: argparse.Namespace) -> int:
    room, _, slug = given.place.rpartition("/")
    if room not in _KINDS:
        raise OptionError(
            f"cannot start a file in {room or given.place!r}{near(room, _KINDS)}; give {' or '.join(_KINDS)}/SLUG"
        )
    if not slug.isidentifier() or slug != slug.lower():
        raise OptionError(f"{slug!r} is not a slug: lower-case letters, digits and _, such as my_attention")
    if any(slug == entry.card.slug for entry in catalogue().values()):
        raise OptionError(f"{slug!r} is taken; 'regard show {slug}' tells by what")
    path = given.root / room / f"{slug}.py"
    if path.exists():
        raise OptionError(f"{path} exists already")
    title = slug.replace("_", " ").capitalize()
    name = "".join(part.capitalize() for part in slug.split("_"))
    path.write_text(_KINDS[room].format(slug=slug, title=title, name=name), encoding="utf-8")
    print(f"{path}\nnext: fill it in, 'regard check {slug}', and its own facts in tests/{room}/test_{slug}.py")
    return 0
