"""Nearest neighbours that are ranked again by patches that correspond, and by the places a person finds important.

    c_p = cos(f_p, g_m(p)),    score = mean of the five largest c_p s_p,    s_p: f_p . sum of g is high within the picture
    answer = the majority of the k with the highest scores among the n nearest pictures by cos of mean features

f, g: features of a grid of cells of the picture asked about and of a neighbour, m: a matcher of cells. An edit puts one choice
of cells in place of s, and the score is then the mean of c_p s_p over all cells. Nothing is computed again for it.

Departs from the released code: cells are row and column everywhere (there, matches are found at the mirrored cells of both
pictures); both networks see the same picture, not different crops; a point on the far border belongs to the last cell; a
map s that is the same everywhere leaves every cell in (there, none); of equal scores the nearer picture comes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.optional import need
from regard.engines.key_index import KeyIndex
from regard.explain.examples.marked_pictures import APART, SIDE, address, colour, draw, finish, middle
from regard.primitives.maps import minmax
from regard.primitives.similarity import cosine, mutual

CARD = ExplanationCard(
    slug="chm_corr",
    title="CHM-Corr: neighbours ranked by corresponding patches",
    paper=(
        "Allowing humans to interactively guide machines where to look does not always improve a human-AI team's "
        "classification accuracy"
    ),
    exports=("CorrespondenceClassifier", "LearnedPictures", "ComparedPictures", "Prediction", "Correspondence"),
    reads="cnn",
    takes={"feature_fn": "features", "images": "images", "x": "one image"},
    calls="CorrespondenceClassifier.fit.predict",
    options={"labels": (1, 3), "grid": 8, "n": 2, "k": 1},
    figure=True,
)

# similarities are multiples of this, so that sums of them are exact in any order, in a browser as well
_STEP = 2.0**-30
# pictures of which features are made at once
_BATCH = 64


@runtime_checkable
class PictureMatcher(Protocol):
    """A network that matches pictures themselves, such as `CHMNet`."""

    def cells(self, image: Tensor, others: Tensor, grid: tuple[int, int]) -> Tensor:
        """int64 (n, h w): the cell of each other picture (n, C, Y, X) that each cell of a picture (C, Y, X) is found at."""
        ...


# features (D, h, w) of a picture and (n, D, h, w) of others to int64 (n, h w), cells row by row
FeatureMatcher = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CorrespondenceClassifier:
    """A classifier that answers by examples.

    feature_fn: pictures (B, C, Y, X) to features (B, D, grid, grid), run as it stands (eval mode is the caller's). matcher:
    "mutual_cosine", cells that prefer each other; a network with a method `cells`, such as a trained `CHMNet`; or a function of
    features (D, h, w) and (n, D, h, w) that gives int64 (n, h w), cells row by row. n: neighbours that are looked at, any of
    those equally near at the end; k: how many of them vote. threshold: of the importance of a cell, 0 to 1. top: how many
    cells a score is the mean of. Raises OptionError.
    """

    feature_fn: Callable[[Tensor], Tensor]
    matcher: Literal["mutual_cosine"] | PictureMatcher | FeatureMatcher = "mutual_cosine"
    grid: int = 7
    n: int = 50
    k: int = 20
    threshold: float = 0.55
    top: int = 5

    def __post_init__(self) -> None:
        if self.matcher == "chm":
            raise OptionError('matcher="chm" has no weights of its own: give a CHMNet, matcher=net')
        if (
            self.matcher != "mutual_cosine"
            and not callable(self.matcher)
            and not isinstance(self.matcher, PictureMatcher)
        ):
            raise OptionError(
                f'matcher is "mutual_cosine", a network such as CHMNet or a function, not {self.matcher!r}'
            )
        if self.grid < 1 or not 1 <= self.k <= self.n:
            raise OptionError(f"grid {self.grid} and k {self.k} are at least 1, and k at most n, which is {self.n}")
        if not 1 <= self.top <= self.grid**2 or not 0 <= self.threshold <= 1:
            raise OptionError(
                f"top {self.top} is a number of the {self.grid**2} cells and threshold {self.threshold} lies in 0 to 1"
            )

    def fit(self, images: Tensor, labels: Tensor | Sequence[int], *, names: Sequence[str] = ()) -> LearnedPictures:
        """Learn pictures (N, C, Y, X) by heart: features of all are held. labels: (N,), 0 or more; names: of the classes.

        Raises OptionError, ShapeError.
        """
        if labels is None:
            raise OptionError("pictures that are to vote need labels: give labels=, (N,)")
        held = torch.as_tensor(labels).cpu()
        if images.dim() != 4 or held.shape != images.shape[:1] or held.is_floating_point():
            raise ShapeError(
                f"images are {tuple(images.shape)} and labels {tuple(held.shape)} {held.dtype}; they must be (N, C, Y, X) "
                "and whole numbers (N,)"
            )
        if len(images) < self.n:
            raise OptionError(f"there are {len(images)} pictures; n={self.n} neighbours cannot be found among them")
        if int(held.min()) < 0:
            raise OptionError(f"{int((held < 0).sum())} pictures have no label (below 0): leave them out")
        if names and len(names) <= int(held.max()):
            raise OptionError(f"there are {len(names)} names, and a class {int(held.max())}")
        features = torch.cat([self.features(some) for some in images.split(_BATCH)])
        index = KeyIndex.build(F.normalize(features.mean((2, 3)), dim=-1), kind="flat")
        return LearnedPictures(self, images, held.long(), features, index, tuple(names))

    def features(self, images: Tensor) -> Tensor:
        """(B, D, grid, grid) on the CPU, in float32 at least. Raises ShapeError for another grid."""
        with torch.no_grad():
            found = self.feature_fn(images)
        if found.dim() != 4 or len(found) != len(images) or found.shape[2:] != (self.grid, self.grid):
            raise ShapeError(
                f"feature_fn gives {tuple(found.shape)} of {len(images)} pictures; ({len(images)}, D, {self.grid}, "
                f"{self.grid}) is required: pool the features, or set grid="
            )
        return found.detach().to("cpu", torch.promote_types(found.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class LearnedPictures:
    """Pictures (N, C, Y, X) learned by heart: labels (N,), features (N, D, h, w), an index of their means."""

    settings: CorrespondenceClassifier
    images: Tensor
    labels: Tensor
    features: Tensor
    index: KeyIndex
    names: tuple[str, ...] = ()

    def predict(self, x: Tensor, mask: Tensor | Sequence[Sequence[int]] | None = None) -> Prediction:
        """The answer for a picture (C, Y, X), and why. mask: see `Prediction.edit`. Raises OptionError, ShapeError."""
        if x.dim() != 3:
            raise ShapeError(f"x is {tuple(x.shape)}; it is one picture, (C, Y, X)")
        settings = self.settings
        mine = settings.features(x[None])[0]
        found = self.index.search(F.normalize(mine.mean((1, 2)), dim=-1)[None], settings.n)[0][0].sort().values
        # the index is in float32 and does not order equal ones
        means = self.features[found].double().mean((2, 3))
        cosines = cosine(mine.double().mean((1, 2))[None], means)[0]
        nearest = cosines.sort(descending=True, stable=True)
        ids = found[nearest.indices]
        theirs, images = self.features[ids], self.images[ids.to(self.images.device)]
        tables = cosine(mine.double().flatten(1).T, theirs.double().flatten(2).mT)
        pairs = _matched(settings, x, images, mine, theirs, tables)
        side = (settings.grid, settings.grid)
        similarities = (tables.gather(-1, pairs[..., None]).squeeze(-1) / _STEP).round() * _STEP
        near = ComparedPictures(
            x, images, ids, self.labels[ids], nearest.values, similarities.unflatten(1, side), pairs.unflatten(1, side),
            _importance(mine, theirs), settings, self.names,
        )  # fmt: skip
        return near.judge(mask)


@dataclass(frozen=True, eq=False)
class ComparedPictures:
    """The n pictures nearest to one, nearest first, and how cells correspond; all that an edit needs.

    query: (C, Y, X). images: (n, C, Y, X). ids: (n,), their places among all. labels: (n,). cosines: (n,), of mean features.
    similarities: (n, h, w) of each cell of the query with its match, multiples of 2^-30 between -1 and 1. pairs: int64
    (n, h, w), the cell that each is matched with, row by row. heat: (n, h, w), importance of the query's cells, 0 to 1.
    """

    query: Tensor
    images: Tensor
    ids: Tensor
    labels: Tensor
    cosines: Tensor
    similarities: Tensor
    pairs: Tensor
    heat: Tensor
    settings: CorrespondenceClassifier
    names: tuple[str, ...] = ()

    @property
    def automatic(self) -> Tensor:
        """bool (n, h, w): the cells of the query that count without an edit."""
        return self.heat >= self.settings.threshold

    def judge(self, mask: Tensor | Sequence[Sequence[int]] | None = None) -> Prediction:
        """Rank and vote; see `Prediction.edit`. Raises OptionError, ShapeError."""
        settings, chosen = self.settings, None if mask is None else _mask(mask, self.settings.grid)
        counted = (self.similarities * (self.automatic if chosen is None else chosen)).flatten(1)
        if chosen is None:
            scores = counted.topk(settings.top).values.sum(1) / settings.top
        else:
            scores = counted.sum(1) / counted.shape[1]
        ranked = scores.sort(descending=True, stable=True)
        votes = _votes(self.labels[ranked.indices[: settings.k]])
        return Prediction(next(iter(votes)), votes, ranked.values, ranked.indices, chosen, self)


@dataclass(frozen=True, eq=False)
class Prediction:
    """An answer and the neighbours that gave it, best first.

    label: the class with most votes, the smallest of equal ones. votes: class to votes among the first k, most first. scores:
    (n,), falling; of equal ones the nearer picture is first. order: (n,), places in `near`. mask: bool (h, w) of an edit,
    None where each neighbour's own importance decides. near: what was found and compared.
    """

    label: int
    votes: dict[int, int]
    scores: Tensor
    order: Tensor
    mask: Tensor | None
    near: ComparedPictures

    @property
    def neighbours(self) -> Tensor:
        """(n,): which of the pictures learned by heart, best first."""
        return self.near.ids[self.order]

    @property
    def pairs(self) -> Tensor:
        """int64 (n, h, w): the cell of each neighbour that each cell of the query is matched with."""
        return self.near.pairs[self.order]

    @property
    def heat(self) -> Tensor:
        """(n, h, w): how important each cell of the query is for each neighbour, 0 to 1."""
        return self.near.heat[self.order]

    @property
    def similarities(self) -> Tensor:
        """(n, h, w): the cosine of each cell of the query with its match."""
        return self.near.similarities[self.order]

    @property
    def nearest_votes(self) -> dict[int, int]:
        """Votes of the k nearest, without patches."""
        return _votes(self.near.labels[: self.near.settings.k])

    @property
    def selected(self) -> Tensor:
        """bool (h, w): the cells of the edit, or else those that count for at least half of the neighbours that vote."""
        if self.mask is not None:
            return self.mask
        k = self.near.settings.k
        return 2 * self.near.automatic[self.order[:k]].sum(0) >= k

    def edit(self, mask: Tensor | Sequence[Sequence[int]] | None) -> Prediction:
        """The answer where a person chooses the cells of the query that count: bool (h, w), or 0 and 1, not all 0.

        None gives the choice back to the neighbours' own importance. Raises OptionError, ShapeError.
        """
        return self.near.judge(mask)

    def correspondence(self, rank: int = 0) -> Correspondence:
        """The matched cells that count for the neighbour at a rank. Raises OptionError."""
        near, grid = self.near, self.near.settings.grid
        if not 0 <= rank < len(self.order):
            raise OptionError(f"rank is 0 to {len(self.order) - 1}, not {rank}")
        place = int(self.order[rank])
        counts = (near.automatic[place] if self.mask is None else self.mask).flatten()
        c = near.similarities[place].flatten()
        best = c.masked_fill(~counts, -torch.inf).sort(descending=True, stable=True).indices[: int(counts.sum())]
        cells = best[: near.settings.top] if self.mask is None else best
        label = int(near.labels[place])
        return Correspondence(
            near.query, near.images[place], int(near.ids[place]), label, float(self.scores[rank]), grid, cells,
            near.pairs[place].flatten()[cells], c[cells], _name(near.names, label),
        )  # fmt: skip

    def figure(self, count: int = 5) -> Any:
        """A plotly figure: the query and its first neighbours, matched cells in the same colour. Raises MissingExtra."""
        go = need("plotly.graph_objects", "explain")
        shown = [self.correspondence(rank) for rank in range(min(count, len(self.order)))]
        figure, grid, top = go.Figure(), self.near.settings.grid, self.near.settings.top
        chosen = torch.cat([pair.cells[:top] for pair in shown]).unique()
        name = _name(self.near.names, self.label)
        draw(figure, 0, self.near.query, chosen, chosen, grid, f"<b>{name}</b>, {self.votes[self.label]} votes")
        for i, pair in enumerate(shown, 1):
            draw(figure, i, pair.image, pair.matches[:top], pair.cells[:top], grid, f"{pair.name}: {pair.score:.3f}")
        return finish(figure, len(shown) + 1)

    def write(self, path: str | Path) -> None:
        """One page that needs no network: a click on a cell changes what counts, and the answer. Raises MissingExtra."""
        jinja2 = need("jinja2", "bench")
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        text = (files("regard.explain.examples") / "chm_corr.html.j2").read_text(encoding="utf-8")
        near, settings = self.near, self.near.settings
        labels = sorted(set(near.labels.tolist()))
        data = {
            "grid": settings.grid, "k": settings.k, "top": settings.top, "ids": near.ids.tolist(),
            "labels": near.labels.tolist(), "names": {label: _name(near.names, label) for label in labels},
            "similarities": (near.similarities.flatten(1) / _STEP).long().tolist(), "step": _STEP,
            "automatic": near.automatic.flatten(1).int().tolist(), "pairs": near.pairs.flatten(1).tolist(),
            "mask": None if self.mask is None else self.mask.flatten().int().tolist(),
            "query": address(near.query), "images": [address(image) for image in near.images],
        }  # fmt: skip
        page = environment.from_string(text).render(data=data, small=max(near.query.shape[1:]) < SIDE)
        Path(path).write_text(page, encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Matched cells of a query (C, Y, X) and one neighbour `image`, number `id`, most alike first.

    cells, matches: (P,), numbers of cells in both, row by row in a grid of `grid` x `grid`; similarities: (P,), their cosines.
    """

    query: Tensor
    image: Tensor
    id: int
    label: int
    score: float
    grid: int
    cells: Tensor
    matches: Tensor
    similarities: Tensor
    name: str

    def figure(self) -> Any:
        """A plotly figure: both pictures, a line for each pair. Raises MissingExtra."""
        go = need("plotly.graph_objects", "explain")
        figure = go.Figure()
        draw(figure, 0, self.query, self.cells, self.cells, self.grid, "asked about")
        draw(figure, 1, self.image, self.matches, self.cells, self.grid, f"{self.name}: {self.score:.3f}")
        ends = [(middle(c, self.grid), middle(m, self.grid)) for c, m in zip(self.cells, self.matches, strict=True)]
        for cell, (start, end), c in zip(self.cells.tolist(), ends, self.similarities.tolist(), strict=True):
            line = {"color": colour(cell, self.grid), "width": 2}
            figure.add_scatter(
                x=[start[0], end[0] + APART], y=[start[1], end[1]], mode="lines", line=line, hoverinfo="text", text=f"{c:.3f}"
            )  # fmt: skip
        return finish(figure, 2)


def _matched(
    settings: CorrespondenceClassifier, x: Tensor, images: Tensor, mine: Tensor, theirs: Tensor, tables: Tensor
) -> Tensor:
    """int64 (n, h w): the cell of each neighbour that each cell is matched with. tables: cosines of all cells."""
    matcher, count = settings.matcher, settings.grid**2
    if matcher == "mutual_cosine":
        return mutual(tables.clamp(min=0)).argmax(-1)
    if isinstance(matcher, PictureMatcher):
        found = matcher.cells(x, images, (settings.grid, settings.grid))
    else:
        assert not isinstance(matcher, str)
        found = matcher(mine, theirs)
    if found.shape != (len(images), count) or found.is_floating_point():
        raise ShapeError(
            f"the matcher gives {tuple(found.shape)} {found.dtype}; int64 {(len(images), count)} is required"
        )
    if int(found.min()) < 0 or int(found.max()) >= count:
        raise OptionError(
            f"the matcher names cells {int(found.min())} to {int(found.max())}; there are 0 to {count - 1}"
        )
    return found.long().cpu()


def _importance(mine: Tensor, theirs: Tensor) -> Tensor:
    """(n, h, w): inner products of features (D, h, w) with the sums of (n, D, h, w), each map between 0 and 1."""
    maps = torch.einsum("dhw,nd->nhw", mine.double(), theirs.double().sum((2, 3)))
    spread = maps.amax((1, 2), keepdim=True) - maps.amin((1, 2), keepdim=True)
    # differences of rounding make no cell more important than another
    same = spread <= 1e-9 * maps.abs().amax((1, 2), keepdim=True)
    return torch.where(same, torch.ones_like(maps), minmax(maps))


def _mask(mask: Tensor | Sequence[Sequence[int]], grid: int) -> Tensor:
    chosen = torch.as_tensor(mask).cpu()
    if chosen.shape != (grid, grid):
        raise ShapeError(f"the mask is {tuple(chosen.shape)}; it must be ({grid}, {grid}), a choice for each cell")
    if not bool(((chosen == 0) | (chosen == 1)).all()):
        raise OptionError("the mask is True or 1 for cells that count and False or 0 for others, nothing between")
    if not bool(chosen.any()):
        raise OptionError("the mask is empty: choose at least one cell, or None for the automatic choice")
    return chosen.bool()


def _votes(labels: Tensor) -> dict[int, int]:
    return dict(sorted(Counter(labels.tolist()).items(), key=lambda pair: (-pair[1], pair[0])))


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if names else str(label)
