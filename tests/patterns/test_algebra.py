"""All atoms against their definition pair by pair, what they claim of themselves, the operators, the integer code."""

from __future__ import annotations

import math

import pytest
import torch

from regard.contract.errors import OptionError, ShapeError
from regard.patterns import (
    Axial,
    Band,
    BlockCausal,
    BlockGrid,
    BlockLocal,
    Blocks,
    Causal,
    CoreContext,
    DilatedWindow,
    Documents,
    Empty,
    Explicit,
    Full,
    Geometry,
    GridWindow,
    Halo,
    KeyValid,
    Neighborhood,
    PerHead,
    Prefix,
    SinkBand,
    Sinks,
    SlidingWindow,
    Strided,
    StridedBlocks,
    Window,
    decode,
)
from tests.oracles import coin
from tests.patterns.atoms import ATOMS, neighbours, sizes

NAMES = list(ATOMS)


@pytest.mark.parametrize("name", NAMES)
def test_the_dense_mask_is_the_definition_at_every_pair(name):
    pattern, rule = ATOMS[name]
    heads = pattern.heads or 1
    for n, m, q_offset in sizes(pattern):
        mask = pattern.dense(n, m, q_offset=q_offset)
        assert mask.dtype == torch.bool and mask.shape == (1, heads, n, m)
        want = [[[bool(rule(h, q_offset + r, j)) for j in range(m)] for r in range(n)] for h in range(heads)]
        assert torch.equal(mask, torch.tensor(want).view(1, heads, n, m))


@pytest.mark.parametrize("length", range(1, 10))
def test_neighbourhoods_of_every_small_size(length):
    for kernel in range(1, length + 1):
        for dilation in range(1, length // kernel + 1):
            for stride in range(1, kernel + 1):
                for causal in (False, True):
                    mask = Neighborhood((length,), kernel, dilation, stride, causal).dense(length, length)[0, 0]
                    for x in range(length):
                        want = neighbours(length, kernel, stride, dilation, causal, x)
                        assert mask[x].nonzero().flatten().tolist() == want
                        assert x in want
                        assert causal or len(want) == kernel
                        if causal and x // dilation >= kernel - 1:
                            assert kernel - stride + 1 <= len(want) <= kernel


def test_neighbourhoods_and_windows():
    for length, kernel in ((12, 4), (12, 3), (9, 9), (10, 5)):
        grid, window = (length,), Window((length,), kernel)
        for causal in (False, True):
            mask = Neighborhood(grid, kernel, 1, kernel, causal).dense(length, length)
            want = window & Causal() if causal else window
            assert torch.equal(mask, want.dense(length, length))
    # a last short group looks back to keep its keys
    mask = Neighborhood((10,), 4, 1, 4).dense(10, 10)
    assert not torch.equal(mask, Window((10,), 4).dense(10, 10))
    assert mask[0, 0, 9].nonzero().flatten().tolist() == [6, 7, 8, 9]
    for stride in range(1, 8):
        assert Neighborhood((7, 7), 7, 1, stride).dense(49, 49).all()


def test_shifted_windows_are_those_of_a_rolled_grid_with_its_regions():
    shape, w, s = (8, 12), 4, 1
    cells = torch.arange(96).view(shape)
    rolled = cells.roll((-s, -s), (0, 1))
    windows = rolled.unfold(0, w, w).unfold(1, w, w).reshape(-1, w * w)
    region = torch.zeros(shape, dtype=torch.int64)
    for a, ys in enumerate((slice(0, -w), slice(-w, -s), slice(-s, None))):
        for b, xs in enumerate((slice(0, -w), slice(-w, -s), slice(-s, None))):
            region[ys, xs] = 3 * a + b
    kinds = region.unfold(0, w, w).unfold(1, w, w).reshape(-1, w * w)
    want = torch.zeros(96, 96, dtype=torch.bool)
    for window, kind in zip(windows, kinds, strict=True):
        want[window[:, None], window] = kind[:, None] == kind
    assert torch.equal(Window(shape, w, w - s).dense(96, 96)[0, 0], want)


def test_a_halo_of_nothing_is_a_window_and_a_wide_one_is_everything():
    assert torch.equal(Halo((6, 8), 2, 0).dense(48, 48), Window((6, 8), 2).dense(48, 48))
    assert Halo((6, 8), 2, 6).dense(48, 48).all()


def test_core_context_covers_every_earlier_position_once():
    for group, window, length in ((4, 8, 50), (3, 7, 40), (5, 2, 33), (1, 6, 20), (16, 4, 30)):
        cores = length // group
        mask = CoreContext(group, window, cores=cores).dense(length, cores + length)[0, 0].long()
        far, near = mask[:, :cores].repeat_interleave(group, 1), mask[:, cores:]
        covered = torch.nn.functional.pad(far, (0, length - far.shape[1])) + near
        assert torch.equal(covered, torch.ones(length, length).tril().long())
        parts = [
            CoreContext(group, window, part).dense(length, m) for part, m in (("cores", cores), ("tokens", length))
        ]
        assert torch.equal(torch.cat(parts, 3)[0, 0].long(), mask)
    assert torch.equal(CoreContext(4, 20, "tokens").dense(20, 20), Causal().dense(20, 20))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_pattern_says_of_itself_holds(name):
    pattern = ATOMS[name][0]
    n = min(pattern.tokens or 45, 60)
    mask = pattern.dense(n, n)[0]
    if pattern.causal:
        assert not mask.triu(1).any()
    if pattern.translation is not None:
        p = pattern.translation
        assert p >= 1
        assert torch.equal(mask[:, p:, p:], mask[:, : max(n - p, 0), : max(n - p, 0)])
    for h in range(len(mask)):
        for j in range(n):
            seen = mask[h, :, j].nonzero().flatten()
            assert not len(seen) or seen.max() <= pattern.needed_after(h, j)
            if pattern.kv_efficient:
                later = mask[h, j:, j].long()
                assert (later.diff() <= 0).all()
    assert pattern.batch_scope is False
    if pattern.head_scope == "all":
        assert (mask == mask[:1]).all()


def test_claims_are_made_where_they_can_be():
    assert Causal().causal and StridedBlocks(homo=True).causal and Band(3, 0).causal and BlockCausal(1).causal
    assert Neighborhood((4, 4), 3, is_causal=True).causal
    assert Neighborhood((4, 4), (3, 1), is_causal=(True, False)).causal
    assert not Neighborhood((4, 4), 3, is_causal=(True, False)).causal
    assert not (~Causal(strict=True)).causal and not Causal().on(prefix=1).causal
    assert (Causal() - SlidingWindow(3)).causal
    assert (Blocks(4) & Strided(6, of="key")).translation == 12
    assert (Causal() & Sinks(1)).translation is None
    assert Window((8, 6), 2).translation == 12
    assert Neighborhood((8, 6), 3, is_causal=True).translation == 6
    assert Neighborhood((8, 6), 3).translation is None
    assert (Causal() & SlidingWindow(4)).kv_efficient and not Strided(3).kv_efficient
    assert PerHead([Causal(), Full()]).head_scope == "head"
    assert PerHead([Causal(), Causal(), Full(), Full()], kv_heads=2).head_scope == "kv"
    assert PerHead([Causal(), Causal()]).head_scope == "all"
    assert (Causal() & PerHead([Full(), Causal()])).head_scope == "head"
    assert StridedBlocks(heads=4, kv_heads=2).head_scope == "kv" and StridedBlocks(homo=True).head_scope == "all"
    assert Explicit().head_scope == "head"
    for bound in (Documents(), KeyValid() & Causal(), ~Explicit()):
        assert bound.batch_scope


def test_needed_after_is_exact_where_a_cache_can_use_it():
    assert Band(5, 2).needed_after(0, 10) == 15
    assert DilatedWindow(4, 3).needed_after(0, 10) == 19
    assert Blocks(4).needed_after(0, 5) == 7
    assert BlockLocal(4, 2, 0).needed_after(0, 5) == 15
    assert SinkBand(4, 1, 2).needed_after(0, 5) == 11 and SinkBand(4, 1, 2).needed_after(0, 3) == math.inf
    assert Empty().needed_after(0, 3) == -1
    shards = StridedBlocks(16, 2, 4, heads=4)
    for h in range(4):
        for j in range(0, 128, 8):
            kept = (j // 16 + h) % 4 == 0
            assert shards.needed_after(h, j) == (math.inf if kept else (j // 16 + 2) * 16 - 1)
    assert CoreContext(4, 8, "tokens").needed_after(0, 5) == 14
    for pattern in (Neighborhood((9, 8), (4, 3), (2, 1), (3, 2)), Halo((9, 8), 2, 1), Window((9, 8), 4, 1),
                    Neighborhood((9, 8), 3, 1, 2, True), Axial((9, 8), 1), GridWindow((9, 8), (3, 4))):  # fmt: skip
        mask = pattern.dense(72, 72)[0, 0]
        for j in range(72):
            assert mask[:, j].nonzero().max() == pattern.needed_after(0, j)


@pytest.mark.parametrize("kv_heads, vstride, step", [(8, 8, "cover"), (8, 16, "official"), (4, 4, "official"),
                                                     (4, 8, 2), (3, 9, 3), (4, 2, "cover")])  # fmt: skip
def test_shards_cover_if_they_say_so(kv_heads, vstride, step):
    pattern = StridedBlocks(16, 1, vstride, step=step, heads=kv_heads)
    union = pattern.dense(320, 320)[0].any(0)
    assert pattern.covers() == torch.equal(union, Causal().dense(320, 320)[0, 0])


def test_the_official_step_fails_to_cover_with_grouped_heads():
    assert not StridedBlocks(vstride=16, step="official", heads=32, kv_heads=8).covers()
    assert StridedBlocks(vstride=16, heads=32, kv_heads=16).covers()
    assert StridedBlocks(vstride=16, dense_heads=1, heads=8).covers()
    assert not StridedBlocks(vstride=2, homo=True).covers() and StridedBlocks(vstride=1, homo=True).covers()


def test_shards_become_causal_attention():
    for pattern in (StridedBlocks(16, 4, 8, heads=2), StridedBlocks(16, 0, 1, heads=2)):
        assert torch.equal(pattern.dense(64, 64), Causal().dense(64, 64).expand(1, 2, 64, 64))


def test_minus_and_prefixes():
    valid = coin(2, 9)
    bound = KeyValid().bind(key_valid=valid)
    assert torch.equal((Causal() - bound).dense(9, 9), Causal().dense(9, 9) & ~bound.dense(9, 9))
    assert torch.equal((bound - Causal()).dense(9, 9), bound.dense(9, 9) & ~Causal().dense(9, 9))
    assert Window((2, 3), 1).on(prefix=2).tokens == 8 == Geometry((2, 3), 2).tokens
    assert torch.equal(Causal().on(prefix=0).dense(9, 9), Causal().dense(9, 9))


def test_heads_of_patterns():
    pattern = PerHead([Causal(), Full()]) & SlidingWindow(3)
    assert pattern.heads == 2
    assert pattern.for_head(1) == Full() & SlidingWindow(3)
    bound = (pattern & KeyValid()).bind(key_valid=coin(3, 9))
    assert bound.dense(9, 9).shape == (3, 2, 9, 9)
    for h in range(2):
        assert torch.equal(pattern.dense(9, 9)[:, h : h + 1], pattern.for_head(h).dense(9, 9))
    grid = BlockGrid((4, 4), 2, 2, 4)
    assert grid.patterns[1] == Window((4, 4), 2) and grid.patterns[2] == GridWindow((4, 4), 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_goes_through_integers(name):
    pattern = ATOMS[name][0]
    code = pattern.code()
    assert all(type(number) is int for number in code)
    assert decode(code) == pattern
    assert decode(list(code)) == pattern


def test_a_code_keeps_labels_and_apart_what_differs():
    pattern = (Documents("page") | KeyValid(rows=True, label="größe")) & Strided(3, 1, "key")
    assert decode(pattern.code()) == pattern
    codes = [ATOMS[name][0].code() for name in NAMES]
    assert len(set(codes)) == len(codes)
    for bad in ((), (1, 2, 3), (*Causal().code(), 0), Causal().code()[:-1]):
        with pytest.raises(OptionError, match="integers"):
            decode(bad)


def test_codes_and_masks_trace():
    torch._dynamo.reset()

    def f(x, w):
        pattern = Causal() & SlidingWindow(w) | Sinks(2) - Strided(3, of="key")
        return x + pattern.dense(8, 8)[0, 0] + len(pattern.code()) + pattern.code()[-1]

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    x = torch.zeros(8, 8)
    for w in (3, 4):
        assert torch.equal(compiled(x, w), f(x, w))
    labelled = torch.compile(
        lambda x, ids: x + Documents("page").bind(page=ids).dense(8, 8)[0, 0] + sum(Documents("page").code()),
        fullgraph=True,
        backend="aot_eager",
    )
    ids = torch.arange(8)[None] // 3
    assert torch.equal(
        labelled(x, ids), x + Documents("page").bind(page=ids).dense(8, 8)[0, 0] + sum(Documents("page").code())
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_repr_can_be_read_back(name):
    pattern = ATOMS[name][0]
    assert eval(repr(pattern).removesuffix(" [causal]")) == pattern


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Band(-1, 2), "at least 0 keys on each side"),
        (lambda: DilatedWindow(0, 2), "window of at least 1, not 0"),
        (lambda: DilatedWindow(2, 0), "dilation of at least 1"),
        (lambda: Strided(0), "stride of at least 1"),
        (lambda: Strided(3, 3), "offset from 0 to stride - 1 = 2"),
        (lambda: Strided(3, of="query"), "of='key', not 'query'"),
        (lambda: Blocks(0), "size of at least 1"),
        (lambda: BlockLocal(4, -1, 0), "before of at least 0"),
        (lambda: BlockCausal(0), "size of at least 1"),
        (lambda: SinkBand(4, 1, 0), "band_blocks of at least 1"),
        (lambda: StridedBlocks(local=0, homo=True), "first rows without keys"),
        (lambda: StridedBlocks(block=48, homo=True), "power of two"),
        (lambda: StridedBlocks(block=8, homo=True), "power of two from 16"),
        (lambda: StridedBlocks(heads=8, kv_heads=2, dense_heads=3), "cannot make 3 of 2"),
        (lambda: StridedBlocks(homo=True, dense_heads=1), "contradicts"),
        (lambda: StridedBlocks(), "needs heads="),
        (lambda: StridedBlocks(heads=6, kv_heads=4), "multiple of kv_heads"),
        (lambda: StridedBlocks(step="all", homo=True), "'official' or a number"),
        (lambda: CoreContext(0, 4, "tokens"), "group of at least 1"),
        (lambda: CoreContext(4, 0, "tokens"), "window of at least 1"),
        (lambda: CoreContext(4, 8), "needs cores="),
        (lambda: CoreContext(4, 8, "keys"), "'tokens' and 'both'"),
        (lambda: Window((4, 4), 0), "window of at least 1"),
        (lambda: Window((4, 4), (2, 2, 2)), "has 2 axes.*window has 3"),
        (lambda: Window((4, 4), 2, 2), "shift from 0 to window - 1"),
        (lambda: Window((), 2), "at least one cell"),
        (lambda: GridWindow((6, 8), 4), "does not divide"),
        (lambda: BlockGrid((6, 8), 2, 2, 3), "even number of heads"),
        (lambda: Axial((4, 4), 2), "axis of a grid with 2"),
        (lambda: Halo((4, 4), 0, 1), "block of at least 1"),
        (lambda: Halo((4, 4), 2, -1), "halo of at least 0"),
        (lambda: Neighborhood((6, 6), 3, (1, 3)), r"kernel\*dilation exceeds the input: 3 \* 3 > 6 on axis 1"),
        (lambda: Neighborhood((6, 6), 7), r"7 \* 1 > 6 on axis 0"),
        (lambda: Neighborhood((6, 6), 3, 1, 4), "stride of 4 needs a kernel"),
        (lambda: Neighborhood((6, 6), 0), "kernel of at least 1"),
        (lambda: Neighborhood((6, 6), 3, 0), "dilation of at least 1"),
        (lambda: Neighborhood((6, 6), 3, 1, 0), "stride of at least 1"),
        (lambda: Neighborhood((6, 6), (3, 3, 3)), "kernel has 3"),
        (lambda: Neighborhood((6, 6), 3, is_causal=(True,)), "is_causal has 1"),
        (lambda: PerHead([]), "none was given"),
        (lambda: PerHead([Causal(), KeyValid().bind(key_valid=coin(1, 4))]), "without bound data"),
        (lambda: PerHead([Causal(), Full()], kv_heads=1), "do not fall into 1 groups"),
        (lambda: PerHead([Causal(), Full()]) & PerHead([Causal()] * 3), "different numbers of heads"),
        (lambda: PerHead([PerHead([Causal()] * 3), Full()]), "different numbers of heads"),
        (lambda: Causal().on(prefix=-1), "at least 0 tokens"),
        (lambda: Documents().on(prefix=1), "bound by position"),
        (lambda: Causal() - coin(4, 4), "combines with patterns only"),
        (lambda: Geometry((0, 3)), "at least one cell"),
        (lambda: Geometry((2, 3), -1), "at least 0 tokens"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(make, text):
    with pytest.raises(OptionError, match=text):
        make()


def test_positions_beyond_the_grid_are_refused():
    for n, m, q_offset in ((37, 36, 0), (36, 37, 0), (1, 36, 36)):
        with pytest.raises(ShapeError, match="has 36 positions"):
            Neighborhood((6, 6), 3).dense(n, m, q_offset=q_offset)
    assert Neighborhood((6, 6), 3).dense(1, 36, q_offset=35).shape == (1, 1, 1, 36)
    assert Neighborhood((6, 6), 3).on(prefix=2).dense(38, 38).shape == (1, 1, 38, 38)
    with pytest.raises(ShapeError, match="closed groups"):
        CoreContext(4, 8, cores=2).dense(20, 22)


def test_a_key_band_of_one_is_allowed():
    assert torch.equal(Neighborhood((1, 5), (1, 3)).dense(5, 5), Neighborhood((5,), 3).dense(5, 5))
    assert torch.equal(Neighborhood((5,), 1).dense(5, 5)[0, 0], torch.eye(5, dtype=torch.bool))
    assert Prefix(5).dense(5, 5).all()
