from __future__ import annotations

import pytest
import torch

from regard import OptionError, ShapeError, Unsupported, combiner_attention, softmax_attention
from regard.engines.dense import dense
from regard.ops import combiner
from tests.oracles import normal, softmax_row

SHAPE = (3, 4)
CAUSAL = {
    "fixed": {"segment": 3},
    "log": {},
    "axial_vertical": {"shape": SHAPE},
    "axial_horizontal": {"shape": SHAPE},
    "axial_mixture": {"shape": SHAPE},
}


def qkv(n=12, seed=0):
    return normal((2, 4, n, 6), (2, 2, n, 6), (2, 2, n, 5), seed=seed)


def grid_spans(variant, i, shape):
    """(direct, spans) of token i of a grid, from the definition."""
    columns = shape[1]
    u, c = divmod(i, columns)
    direct = [r * columns + c for r in range(u)] + [u * columns + x for x in range(c + 1)]
    vertical = [[r * columns + x for r in range(u)] for x in range(columns) if x != c]
    sides = [range(c), range(c + 1, columns)]
    horizontal = [[r * columns + x for x in side] for r in range(u) for side in sides]
    both = {"vertical": vertical, "horizontal": horizontal, "mixture": vertical + horizontal}
    return direct, [span for span in both[variant.removeprefix("axial_")] if span]


def spans_of(variant, i, n, segment=None, shape=None, is_causal=True, official=False):
    """(direct, spans): which tokens are met one by one, which together."""
    if variant == "log":
        levels = [level for level in range(i.bit_length()) if i >> level & 1]
        return [i], [list(range(((i >> x) - 1) << x, (i >> x) << x)) for x in levels]
    if variant.startswith("axial"):
        return grid_spans(variant, i, shape)
    segments = [list(range(s, min(s + segment, n))) for s in range(0, n, segment)]
    own = i // segment
    if is_causal:
        return [j for j in segments[own] if j <= i], segments[:own]
    return segments[own], [s for at, s in enumerate(segments) if at != own or official]


def pooled(x, pool):
    return x.amax(0) if pool == "max" else x.mean(0)


def weights_of(q, k, variant, *, pool="max", scale=None, **options):
    """p(j|i) of one head, token by token: (N, N)."""
    n = len(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    table = torch.zeros(n, n, dtype=q.dtype)
    for i in range(n):
        direct, spans = spans_of(variant, i, n, **options)
        scores = [q[i] @ k[j] for j in direct] + [q[i] @ pooled(k[s], pool) for s in spans]
        p = softmax_row(torch.stack(scores) * scale)
        for j, weight in zip(direct, p, strict=False):
            table[i, j] += weight
        for span, weight in zip(spans, p[len(direct) :], strict=True):
            inside = softmax_row(k[span] @ pooled(q[span], pool) * scale)
            table[i, span] += weight * inside
    return table


def expanded(q, k, variant, **options):
    """p(j|i) of all heads: (B, H, N, N)."""
    share = q.shape[1] // k.shape[1]
    rows = [[weights_of(q[b, h], k[b, h // share], variant, **options) for h in range(q.shape[1])] for b in range(2)]
    return torch.stack([torch.stack(row) for row in rows])


CASES = [
    *((variant, {**options, "is_causal": True}) for variant, options in CAUSAL.items()),
    ("fixed", {"segment": 5, "is_causal": True}),
    ("fixed", {"segment": 5, "is_causal": False}),
    ("fixed", {"segment": 4, "is_causal": False}),
    ("fixed", {"segment": 5, "is_causal": False, "official": True}),
]


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("variant, options", CASES)
def test_it_is_the_expanded_table_of_weights_times_the_values(variant, options, pool):
    q, k, v = qkv()
    p = expanded(q, k, variant, pool=pool, scale=0.7, **_oracle(options, variant))
    out = combiner_attention(q, k, v, variant=variant, pool=pool, scale=0.7, **options)
    torch.testing.assert_close(out, p @ v.repeat_interleave(2, 1))


@pytest.mark.parametrize("variant, options", CASES)
def test_the_expanded_weights_are_a_distribution_over_exactly_the_past(variant, options):
    q, k, _ = qkv()
    values = torch.eye(12).double().expand(2, 2, 12, 12)
    p = combiner_attention(q, k, values, variant=variant, **options)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4, 12).double())
    seen = torch.ones(12, 12, dtype=torch.bool).tril() if options["is_causal"] else torch.ones(12, 12, dtype=torch.bool)
    assert ((p > 0) == seen).all()
    torch.testing.assert_close(p, expanded(q, k, variant, **_oracle(options, variant)))


@pytest.mark.parametrize("variant", [v for v in CAUSAL if v != "axial_mixture"])
def test_every_past_token_is_direct_or_in_one_span(variant):
    n = 12
    for i in range(n):
        direct, spans = spans_of(variant, i, n, **CAUSAL[variant])
        assert sorted(direct + [j for s in spans for j in s]) == list(range(i + 1))


def test_the_mixture_reaches_a_far_token_by_two_spans():
    direct, spans = spans_of("axial_mixture", 9, 12, shape=SHAPE)
    counts = [sum(j in span for span in spans) for j in range(10)]
    assert counts == [0 if j in direct else 2 for j in range(10)]


@pytest.mark.parametrize("segment", [1, 12])
def test_segments_of_one_token_and_of_all_are_causal_attention(segment):
    q, k, v = qkv()
    out = combiner_attention(q, k, v, segment=segment, is_causal=True)
    torch.testing.assert_close(out, softmax_attention(q, k, v, is_causal=True))


def test_without_scores_a_far_token_has_the_share_of_its_span():
    n, segment = 12, 4
    q, k = torch.zeros(1, 1, n, 4).double(), torch.zeros(1, 1, n, 4).double()
    p = combiner_attention(q, k, torch.eye(n).double()[None, None], segment=segment, is_causal=True)[0, 0]
    for i in range(n):
        direct, spans = i % segment + 1, i // segment
        for j in range(i - i % segment):
            assert p[i, j].item() == pytest.approx(1 / ((direct + spans) * segment), rel=1e-12)


@pytest.mark.parametrize("variant", CAUSAL)
def test_no_output_depends_on_a_later_token(variant):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = combiner_attention(q, k, v, variant=variant, is_causal=True, **CAUSAL[variant])
    for i in range(12):
        grads = torch.autograd.grad((out[:, :, i] * torch.randn_like(out[:, :, i])).sum(), (q, k, v), retain_graph=True)
        for grad in grads:
            assert (grad[:, :, i + 1 :] == 0).all()
        assert (grads[2][:, :, : i + 1].abs().amax((0, 1, 3)) > 0).all()


@pytest.mark.parametrize("n", [1, 2, 7, 16, 31])
def test_the_logarithmic_variant_scores_as_many_keys_as_the_position_has_bits(n, monkeypatch):
    counted = []

    def watch(q, k, v, *args, mask=None, **options):
        if mask is not None:
            counted.append(mask.expand(q.shape[0], 1, 1, -1).sum(-1).flatten())
        return dense(q, k, v, *args, mask=mask, **options)

    monkeypatch.setattr(combiner, "dense", watch)
    q, k, v = normal((1, 1, n, 4), (1, 1, n, 4), (1, 1, n, 4))
    combiner_attention(q, k, v, variant="log", is_causal=True)
    assert counted[0].tolist() == [i.bit_count() + 1 for i in range(n)]


@pytest.mark.parametrize("n", [2, 7, 13])
@pytest.mark.parametrize("variant, options", [("log", {}), ("fixed", {"segment": 2}), ("fixed", {})])
def test_lengths_that_are_not_powers_of_two_or_multiples(n, variant, options):
    q, k, v = qkv(n)
    known = {"segment": 4 if n > 9 else 3 if n > 4 else 2, **options} if variant == "fixed" else {}
    p = expanded(q, k, variant, **known)
    out = combiner_attention(q, k, v, variant=variant, is_causal=True, **options)
    torch.testing.assert_close(out, p @ v.repeat_interleave(2, 1))


def test_the_number_of_scores_grows_with_the_root_of_the_length():
    # by gradient of the values: an output holds one share of every span, but the table is never made
    q, k, v = normal((1, 1, 4096, 8), (1, 1, 4096, 8), (1, 1, 4096, 8), dtype=torch.float32)
    sizes = []

    def watch(q, k, v, *args, **options):
        sizes.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return dense(q, k, v, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combiner, "dense", watch)
        combiner_attention(q, k, v, is_causal=True)
    assert sum(sizes) <= 3 * 4096 * 64


@pytest.mark.parametrize("variant, options", CASES)
def test_gradients_are_those_of_finite_differences(variant, options):
    options = {**options, **({"shape": (2, 3)} if "shape" in options else {})}
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 6, 3), (1, 1, 6, 3), (1, 1, 6, 2)))
    assert torch.autograd.gradcheck(lambda q, k, v: combiner_attention(q, k, v, variant=variant, **options), (q, k, v))


@pytest.mark.parametrize("variant", ["log", "axial_mixture"])
def test_variants_compile_as_one_graph(variant):
    q, k, v = (x.float() for x in qkv())
    torch._dynamo.reset()
    run = torch.compile(
        lambda q, k, v: combiner_attention(q, k, v, variant=variant, is_causal=True, **CAUSAL[variant]),
        fullgraph=True,
        backend="aot_eager",
    )
    want = combiner_attention(q, k, v, variant=variant, is_causal=True, **CAUSAL[variant])
    torch.testing.assert_close(run(q, k, v), want, rtol=1e-5, atol=1e-5)


def test_a_segment_that_does_not_fit_is_refused():
    q, k, v = qkv()
    for segment in (0, 13):
        with pytest.raises(OptionError, match=f"segments of {segment} tokens do not fit 12 tokens"):
            combiner_attention(q, k, v, segment=segment, is_causal=True)


def test_a_grid_that_does_not_fit_is_refused():
    q, k, v = qkv()
    with pytest.raises(ShapeError, match="3 rows and 5 columns does not have 12 tokens"):
        combiner_attention(q, k, v, variant="axial_vertical", shape=(3, 5), is_causal=True)
    with pytest.raises(OptionError, match=r"need shape=\(rows, columns\)"):
        combiner_attention(q, k, v, variant="axial_vertical", is_causal=True)
    with pytest.raises(OptionError, match="others have none"):
        combiner_attention(q, k, v, shape=SHAPE, is_causal=True)


def test_what_a_variant_does_not_have_is_refused():
    q, k, v = qkv()
    with pytest.raises(Unsupported, match="'log' is causal only"):
        combiner_attention(q, k, v, variant="log")
    with pytest.raises(OptionError, match="is for the variant 'fixed', not for 'log'"):
        combiner_attention(q, k, v, variant="log", segment=4, is_causal=True)
    with pytest.raises(OptionError, match="official="):
        combiner_attention(q, k, v, official=True, is_causal=True)
    with pytest.raises(OptionError, match="it is one of fixed, log"):
        combiner_attention(q, k, v, variant="rows", is_causal=True)
    with pytest.raises(OptionError, match="'max' or 'mean'"):
        combiner_attention(q, k, v, pool="sum", is_causal=True)
    with pytest.raises(ShapeError, match="12 queries and 9 keys"):
        combiner_attention(q, k[:, :, :9], v[:, :, :9], is_causal=True)


def _oracle(options, variant):
    return options if variant == "fixed" else {n: x for n, x in options.items() if n == "shape"}
