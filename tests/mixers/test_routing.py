from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regard
from regard import Centroids, OptionError, RoutingAttention, ShapeError, Unsupported, routing_attention
from regard.contract.collect import collect_losses
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from regard.patterns import BlockLocal, Causal
from regard.primitives.positions import rope
from tests.oracles import attention, coin, normal


def inputs(n=21, heads=3, clusters=4, batch=2):
    q, k, v, centroids = normal((batch, heads, n, 8), (batch, heads, n, 8), (batch, heads, n, 6), (heads, clusters, 8))
    return F.layer_norm(q, (8,)), F.layer_norm(k, (8,)), v, F.layer_norm(centroids, (8,))


def members(x, centroids, window, valid=None):
    """The positions of each cluster by the definition: [b][h][c] -> ascending list."""
    out = []
    for b in range(x.shape[0]):
        real = [i for i in range(x.shape[2]) if valid is None or valid[b, i]]
        out.append(
            [
                [sorted(sorted(real, key=lambda i: -(x[b, h, i] @ mu).item())[:window]) for mu in centroids[h]]
                for h in range(x.shape[1])
            ]
        )
    return out


def globally(q, k, v, centroids, window, *, causal, valid=None, scale=None, eps=0.0):
    """The definition, token by token: softmax inside each cluster by position, then the mean over a token's clusters."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows, columns = members(q, centroids, window, valid), members(k, centroids, window, valid)
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                mine = [c for c in range(centroids.shape[1]) if i in rows[b][h][c]]
                for c in mine:
                    keys = [j for j in columns[b][h][c] if j <= i or not causal]
                    if keys:
                        weights = torch.softmax(scale * (k[b, h, keys] @ q[b, h, i]), 0)
                        out[b, h, i] += weights @ v[b, h, keys]
                if mine:
                    out[b, h, i] /= len(mine) + eps
    return out


def last_members(q, k, centroids, window, valid=None):
    """selection="prefix": bool (B, H, N, N)."""
    own, theirs = (torch.einsum("bhnd,hcd->bhnc", x, centroids).argmax(-1) for x in (q, k))
    batch, heads, n = own.shape
    out = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                keys = [j for j in range(i + 1) if theirs[b, h, j] == own[b, h, i] and (valid is None or valid[b, j])]
                out[b, h, i, keys[-window:]] = True
    return out


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 5, 12])
def test_global_is_the_definition_token_by_token(shared, causal, window):
    q, k, v, centroids = inputs()
    k = q if shared else k
    out, _ = routing_attention(q, k, v, centroids, window=window, is_causal=causal)
    torch.testing.assert_close(out, globally(q, k, v, centroids, window, causal=causal))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("window", [1, 4, 21, 50])
def test_prefix_is_the_definition_token_by_token(shared, window):
    q, k, v, centroids = inputs()
    k = q if shared else k
    out, _ = routing_attention(q, k, v, centroids, window=window, is_causal=True, selection="prefix")
    torch.testing.assert_close(out, attention(q, k, v, allowed=last_members(q, k, centroids, window))[0])


def test_one_cluster_of_all_tokens_is_dense_attention_on_normalised_tokens():
    q, _, v, centroids = inputs(clusters=1)
    for causal in (True, False):
        out, _ = routing_attention(q, q, v, centroids, window=21, is_causal=causal)
        torch.testing.assert_close(out, regard.softmax_attention(q, q, v, is_causal=causal))
    out, _ = routing_attention(q, q, v, centroids, window=21, is_causal=True, selection="prefix")
    torch.testing.assert_close(out, regard.softmax_attention(q, q, v, is_causal=True))


@pytest.mark.parametrize("selection", ["global", "prefix"])
def test_the_selections_name_their_pairs(selection):
    q, k, v, centroids = inputs()
    _, routing = routing_attention(q, k, v, centroids, window=5, is_causal=True, selection=selection)
    if selection == "prefix":
        want = last_members(q, k, centroids, 5)
        pairs = routing.selection.dense(21, 21)
    else:
        rows, columns = members(q, centroids, 5), members(k, centroids, 5)
        want = torch.zeros(2, 3, 21, 21, dtype=torch.bool)
        for b in range(2):
            for h in range(3):
                for c in range(4):
                    for i in rows[b][h][c]:
                        want[b, h, i, [j for j in columns[b][h][c] if j <= i]] = True
        pairs = routing.selection.dense(21, 21)
    assert torch.equal(pairs, want)
    assert routing.causal is (selection == "prefix")


@pytest.mark.parametrize("selection", ["global", "prefix"])
def test_no_query_weighs_a_later_key_also_where_keys_are_chosen_apart(selection):
    # a triangle over ranks, as released, lets rank r of the queries see rank r of the keys, wherever these lie
    q, k, _, centroids = inputs()
    v = torch.eye(21).double().expand(2, 3, 21, 21)
    weights, _ = routing_attention(q, k, v, centroids, window=5, is_causal=True, selection=selection)
    assert weights.triu(1).abs().max() == 0
    assert weights.abs().max() > 0


def changed_before(selection, at):
    q, k, v, centroids = inputs()

    def run(q, k, v):
        return routing_attention(q, k, v, centroids, window=5, is_causal=True, selection=selection)[0]

    before = run(q, k, v)
    q, k, v = (x.clone() for x in (q, k, v))
    # it becomes the nearest token to a centroid
    for x in (q, k):
        x[:, :, at] = 3 * centroids[:, 0]
    v[:, :, at] += 1
    return (run(q, k, v) - before)[:, :, :at].abs().max()


def test_prefix_does_not_depend_on_later_tokens_and_global_does():
    for at in (3, 11, 20):
        assert changed_before("prefix", at) == 0
    # the leak of the paper's selection: a later token pushes an earlier one out of a cluster
    assert changed_before("global", 20) > 1e-3


def test_a_token_in_no_cluster_gives_nothing_and_the_released_mean_is_an_option():
    q, _, v, centroids = inputs(n=40, clusters=2)
    _, routing = routing_attention(q, q, v, centroids, window=4, is_causal=True)
    out, _ = routing_attention(q, q, v, centroids, window=4, is_causal=True)
    counts = torch.zeros(2, 3, 41).scatter_add(
        2, routing.selection.q_index.flatten(2).long() % 41, torch.ones(2, 3, 8)
    )[..., :40]  # fmt: skip
    assert (counts == 0).any() and (counts == 1).any()
    assert out[counts == 0].abs().max() == 0
    legacy, _ = routing_attention(q, q, v, centroids, window=4, is_causal=True, legacy_eps=1e-2)
    torch.testing.assert_close(legacy, globally(q, q, v, centroids, 4, causal=True, eps=1e-2))
    torch.testing.assert_close(legacy[counts == 1], out[counts == 1] / 1.01)


def test_one_softmax_over_all_clusters_counts_a_key_once_for_each():
    q, k, v, centroids = inputs()
    out, _ = routing_attention(q, k, v, centroids, window=12, is_causal=True, reduce="lse")
    times = torch.zeros(2, 3, 21, 21)
    rows, columns = members(q, centroids, 12), members(k, centroids, 12)
    for b in range(2):
        for h in range(3):
            for c in range(4):
                for i in rows[b][h][c]:
                    times[b, h, i, [j for j in columns[b][h][c] if j <= i]] += 1
    assert times.max() > 1
    torch.testing.assert_close(out, attention(q, k, v, allowed=times > 0, bias=times.double().log())[0])


def test_the_scale_of_the_released_code_is_an_option():
    q, k, v, centroids = inputs()
    out, _ = routing_attention(q, k, v, centroids, window=5, is_causal=True, scale=1.0)
    torch.testing.assert_close(out, globally(q, k, v, centroids, 5, causal=True, scale=1.0))


@pytest.mark.parametrize("selection", ["global", "prefix"])
def test_padding_is_in_no_cluster(selection):
    q, k, v, centroids = inputs()
    valid = coin(2, 21)
    noise = [x + 9 * torch.randn_like(x) * ~valid[:, None, :, None] for x in (q, k, v)]
    outs = [
        routing_attention(*x, centroids, window=5, is_causal=True, selection=selection, key_valid=valid)[0]
        for x in ((q, k, v), noise)
    ]
    kept = valid[:, None].expand(2, 3, 21)
    torch.testing.assert_close(outs[1][kept], outs[0][kept])
    if selection == "global":
        want = globally(q, k, v, centroids, 5, causal=True, valid=valid)
    else:
        want = attention(q, k, v, allowed=last_members(q, k, centroids, 5, valid))[0]
    torch.testing.assert_close(outs[0][kept], want[kept])


@pytest.mark.parametrize("selection", ["global", "prefix"])
def test_gradients_are_those_of_the_definition(selection):
    q, k, v, centroids = inputs()
    given = [x.requires_grad_() for x in (q, k, v)]
    (upstream,) = normal(v.shape, seed=3)
    out, _ = routing_attention(*given, centroids, window=5, is_causal=True, selection=selection)
    if selection == "global":
        want = globally(*given, centroids, 5, causal=True)
    else:
        want = attention(*given, allowed=last_members(*given[:2], centroids, 5))[0]
    for got, wanted in zip(
        torch.autograd.grad((out * upstream).sum(), given), torch.autograd.grad((want * upstream).sum(), given), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(got, wanted)


def test_a_window_beyond_the_tokens_is_cut_with_a_warning():
    q, k, v, centroids = inputs()
    with pytest.warns(UserWarning, match="cut to the 21"):
        out, _ = routing_attention(q, k, v, centroids, window=40, is_causal=True)
    torch.testing.assert_close(out, globally(q, k, v, centroids, 21, causal=True))


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"window": 0}, OptionError, "at least 1 token"),
        ({"selection": "local"}, OptionError, "'global' or 'prefix'"),
        ({"selection": "prefix", "is_causal": False}, OptionError, "pass is_causal=True"),
        ({"reduce": "sum"}, OptionError, "'mean' or 'lse'"),
        ({"reduce": "lse", "legacy_eps": 0.01}, OptionError, "goes with reduce='mean'"),
        ({"centroids": torch.zeros(2, 4, 8).double()}, ShapeError, "centroids are"),
        ({"v": torch.zeros(2, 3, 20, 6).double()}, ShapeError, "one B, H and N"),
        ({"key_valid": torch.ones(2, 20, dtype=torch.bool)}, ShapeError, "must be bool"),
    ],
)
def test_bad_calls_are_refused(change, error, text):
    q, k, v, centroids = inputs()
    call = {"q": q, "k": k, "v": v, "centroids": centroids, "window": 5, "is_causal": True, **change}
    with pytest.raises(error, match=text):
        routing_attention(**call)


# the centroids


def test_two_updates_are_the_closed_form():
    torch.manual_seed(0)
    centroids = Centroids(2, 3, 4, decay=0.9).double()
    counts, sums = torch.ones(2, 3).double(), centroids.values.clone()
    torch.testing.assert_close(sums.square().sum(-1).sqrt(), torch.full((2, 3), 2.0).double(), atol=1e-4, rtol=0)
    for seed in (1, 2):
        x, y = normal((2, 2, 9, 4), (2, 2, 9, 4), seed=seed)
        valid = coin(2, 9, seed=seed)
        nearest = [torch.einsum("bhnd,hcd->bhnc", z, centroids.values).argmax(-1) for z in (x, y)]
        new_counts, new_sums = torch.zeros_like(counts), torch.zeros_like(sums)
        for z, c in zip((x, y), nearest, strict=True):
            for b in range(2):
                for h in range(2):
                    for i in range(9):
                        if valid[b, i]:
                            new_counts[h, c[b, h, i]] += 1
                            new_sums[h, c[b, h, i]] += z[b, h, i]
        counts, sums = 0.9 * counts + 0.1 * new_counts, 0.9 * sums + 0.1 * new_sums
        whole = counts.sum(-1, keepdim=True)
        smooth = (counts + 1e-5) / (whole + 3e-5) * whole
        centroids.update((x, nearest[0]), (y, nearest[1]), valid=valid)
        torch.testing.assert_close(centroids.values, sums / smooth[..., None])


def test_a_centroid_without_members_stays_and_none_is_thrown_out():
    torch.manual_seed(0)
    centroids = Centroids(1, 3, 4, decay=0.9).double()
    before = centroids.values.clone()
    (x,) = normal((1, 1, 50, 4))
    for _ in range(20):
        centroids.update((x, torch.zeros(1, 1, 50, dtype=torch.int64)))
    torch.testing.assert_close(centroids.values[:, 1:], before[:, 1:], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(centroids.values[:, 0], before[:, 0], atol=0.1)
    # a rare one: one token in a thousand
    rare = torch.zeros(1, 1, 1000, dtype=torch.int64)
    rare[..., -1] = 1
    (x,) = normal((1, 1, 1000, 4))
    centroids.update((F.layer_norm(x, (4,)), rare))
    assert centroids.values.norm(dim=-1).max() < 4


def test_averages_are_kept_in_full_precision():
    centroids = Centroids(1, 3, 4).bfloat16()
    assert centroids.values.dtype is torch.float32
    assert Centroids(1, 3, 4).double().sums.dtype is torch.float64


def layer(selection="prefix", **options):
    torch.manual_seed(0)
    options = {"clusters": 3, "window": 4, "local_window": 3, **options}
    return RoutingAttention(16, 4, selection=selection, **options).double()


@pytest.mark.parametrize("shared", [True, False])
def test_centroids_move_in_training_by_the_tokens_that_are_real_and_not_in_evaluation(shared):
    a, (x,) = layer(share_qk=shared, decay=0.5), normal((2, 14, 16))
    valid = coin(2, 14)
    before = a.centroids.values.clone()
    a.eval()
    a(x, is_causal=True)
    a.train()
    state = a.init_state(2)
    a.prefill(x, state)
    assert torch.equal(a.centroids.values, before)
    a(x, padding=valid, is_causal=True)
    moved = a.centroids.values.clone()
    assert not torch.allclose(moved, before)
    again = layer(share_qk=shared, decay=0.5)
    again(x + 7 * torch.randn_like(x) * ~valid[..., None], padding=valid, is_causal=True)
    torch.testing.assert_close(again.centroids.values, moved)
    assert not moved.requires_grad


def test_a_compiled_training_step_moves_the_centroids_once():
    a, b, (x,) = layer(decay=0.5), layer(decay=0.5), normal((2, 14, 16))
    torch._dynamo.reset()
    compiled = torch.compile(b, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        outs = a(x, is_causal=True), compiled(x, is_causal=True)
        torch.testing.assert_close(outs[1], outs[0])
        torch.testing.assert_close(b.centroids.values, a.centroids.values)
        outs[1].sum().backward()


@pytest.mark.parametrize("shared", [True, False])
def test_the_commitment_loss_goes_to_the_collector(shared):
    a, (x,) = layer(share_qk=shared, beta=0.25), normal((2, 14, 16))
    valid = coin(2, 14)
    before = a.centroids.values.clone()
    with collect_losses() as losses:
        a(x, padding=valid, is_causal=True)
    (loss,) = losses["routing"]
    heads = lambda y: F.layer_norm(y.unflatten(-1, (-1, 4)).transpose(1, 2)[:, 2:], (4,))  # noqa: E731
    want = 0.0
    for y in (heads(a.to_q(x)),) if shared else (heads(a.to_q(x)), heads(a.to_k(x))):
        nearest = torch.einsum("bhnd,hcd->bhnc", y, before).argmax(-1)
        errors = [
            (y[b, h, i] - before[h, nearest[b, h, i]]).square().mean()
            for b in range(2) for h in range(2) for i in range(14) if valid[b, i]
        ]  # fmt: skip
        want = want + torch.stack(errors).mean()
    torch.testing.assert_close(loss, 0.25 * want)
    assert torch.autograd.grad(loss, a.to_q.weight)[0].abs().max() > 0


# the layer


def expected(a, x, valid=None):
    """Local heads by blocks, routing heads by the definition; both heads see rotated tokens."""
    split = lambda y: y.unflatten(-1, (-1, 4)).transpose(1, 2)  # noqa: E731
    local, n = a.local_heads, x.shape[1]
    q, v = split(a.to_q(x)), split(a.to_v(x))
    k = split(a.to_k(x)) if a.to_k is not None else q[:, :0]
    places = torch.arange(n)
    near = (Causal() & BlockLocal(a.local_window, 1, 0)).dense(n, n)
    outs = [attention(rope(q[:, :local], places), rope(k[:, :local], places), v[:, :local], allowed=near)[0]]
    far = F.layer_norm(q[:, local:], (4,))
    keys = far if a.share_qk else F.layer_norm(k[:, local:], (4,))
    centroids = a.centroids.values
    if a.selection == "prefix":
        pairs = last_members(far, keys, centroids, a.window)
        outs.append(attention(rope(far, places), rope(keys, places), v[:, local:], allowed=pairs)[0])
    else:
        rows, columns = members(far, centroids, a.window), members(keys, centroids, a.window)
        total, counts = torch.zeros_like(v[:, local:]), torch.zeros(*far.shape[:3], 1).double()
        for c in range(centroids.shape[1]):
            pairs = torch.zeros(*far.shape[:3], n, dtype=torch.bool)
            for b in range(x.shape[0]):
                for h in range(far.shape[1]):
                    for i in rows[b][h][c]:
                        pairs[b, h, i, [j for j in columns[b][h][c] if j <= i]] = True
                        counts[b, h, i] += 1
            total = total + attention(rope(far, places), rope(keys, places), v[:, local:], allowed=pairs)[0]
        outs.append(total / counts.clamp(min=1))
    return a.to_out(torch.cat(outs, 1).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("selection", ["prefix", "global"])
@pytest.mark.parametrize("options", [{}, {"share_qk": False}, {"local_heads": 0}, {"local_heads": 3, "window": 1}])
def test_the_layer_is_local_heads_and_routing_heads(selection, options):
    a, (x,) = layer(selection, **options).eval(), normal((2, 14, 16))
    torch.testing.assert_close(a(x, is_causal=True), expected(a, x))


def test_first_layers_may_be_local_altogether():
    a = layer(skip_first=1, layer=0, layers=2)
    assert a.local_heads == 4 and a.centroids is None
    b = layer(skip_first=1, layer=1, layers=2)
    assert b.local_heads == 2
    (x,) = normal((2, 14, 16))
    _, state = a.prefill(x[:, :5], a.init_state(2))
    assert a(x, is_causal=True).shape == x.shape
    assert state.far is None


def test_a_stack_of_them_is_a_language_model_that_decodes():
    torch.manual_seed(0)
    options = {"clusters": 3, "window": 4, "selection": "prefix", "local_window": 3, "skip_first": 1}
    model = SequenceModel(
        SequenceSettings(vocab=11, dim=16, depth=2, heads=4, mixer="routing", options={"routing": options})
    ).double()
    assert [block.mixer.local_heads for block in model.blocks] == [4, 2]
    ids = torch.randint(0, 11, (2, 20), generator=torch.Generator().manual_seed(1))
    with collect_losses() as losses:
        model(ids).sum().backward()
    assert len(losses["routing"]) == 1
    model.eval()
    with torch.no_grad():
        first, state = model.prefill(ids[:, :9], model.init_state(2))
        outs = [first]
        for t in range(9, 20):
            out, state = model.step(ids[:, t : t + 1], state)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), model(ids))


@pytest.mark.parametrize("options", [{}, {"share_qk": False}, {"local_heads": 0}, {"local_heads": 4}, {"window": 1}])
@pytest.mark.parametrize("pieces", [(1,) * 40, (3, 1, 17, 1, 18), (36, 1, 1, 1, 1)])
@pytest.mark.parametrize("padded", [0, 5])
def test_prefix_decodes_the_parallel_form(options, pieces, padded):
    a, (x,) = layer(**options).eval(), normal((2, 40, 16))
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :padded] = False
    state, outs, at = a.init_state(2), [], 0
    for n in pieces:
        piece = slice(at, at + n)
        out, state = a.prefill(x[:, piece], state, padding=valid[:, piece] if padded > at else None)
        outs.append(out)
        at += n
    whole = a(x, padding=valid, is_causal=True)
    torch.testing.assert_close(torch.cat(outs, 1)[valid], whole[valid])


def test_the_state_holds_at_most_full_clusters_and_two_blocks():
    a, (x,) = layer().eval(), normal((2, 40, 16))
    _, state = a.prefill(x, a.init_state(2))
    assert state.far.keys.shape[2] == 3 * 4
    assert state.near.k.shape[2] == 2 * 3 - 1
    own = torch.einsum(
        "bhnd,hcd->bhnc",
        F.layer_norm(a.to_q(x).unflatten(-1, (-1, 4)).transpose(1, 2)[:, 2:], (4,)),
        a.centroids.values,
    ).argmax(-1)
    for b in range(2):
        for h in range(2):
            want = sorted(j for c in range(3) for j in [i for i in range(40) if own[b, h, i] == c][-4:])
            held = state.far.positions[b, h]
            assert held[held >= 0].tolist() == want


def test_bad_use_is_refused():
    (x,) = normal((2, 14, 16))
    with pytest.raises(Unsupported, match="cannot go on from a state"):
        layer("global").init_state(2)
    with pytest.raises(Unsupported, match="'prefix' takes reset="):
        layer("global")(x, reset=torch.zeros(2, 14, dtype=torch.bool), is_causal=True)
    with pytest.raises(Unsupported, match="pass is_causal=True"):
        layer()(x)
    with pytest.raises(Unsupported, match="reads no context"):
        layer()(x, x, is_causal=True)
    for options, text in (
        ({"window": 0}, "at least 1 token"),
        ({"clusters": 0}, "at least 1 cluster"),
        ({"decay": 1.0}, "share of the old averages"),
        ({"local_heads": 5}, "cannot be local"),
        ({"local_window": 0}, "BlockLocal"),
        ({"selection": "suffix"}, "'global' or 'prefix'"),
        ({"layer": 2, "layers": 2}, "not one of 2 layers"),
    ):
        with pytest.raises(OptionError, match=text):
            layer(**{"selection": "prefix", **options})


# four blobs of tokens; one early token of each carries a value, and the last token asks for that of its own blob

BLOBS, VALUES, TOKENS, LOCAL = 4, 8, 64, 8
CENTRES = 3 * torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(5)))[0][:BLOBS]


def blobs(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    blob = torch.randint(0, BLOBS, (rows, TOKENS), generator=generator)
    row = torch.arange(rows)
    # the tokens with values stand before the last two local blocks
    places = torch.rand(rows, TOKENS - 2 * LOCAL, generator=generator).argsort(-1)[:, :BLOBS]
    blob[row[:, None], places] = torch.arange(BLOBS).expand(rows, BLOBS)
    values = torch.randint(0, VALUES, (rows, BLOBS), generator=generator)
    x = torch.zeros(rows, TOKENS, 32)
    x[..., :16] = CENTRES[blob] + 0.3 * torch.randn(rows, TOKENS, 16, generator=generator)
    x[row[:, None], places, 16 + values] = 1.0
    return x, values[row, blob[:, -1]]


def answers(steps, seed=0, **options):
    """Accuracy on new rows of one layer and a linear head."""
    torch.manual_seed(seed)
    mixer = RoutingAttention(32, 2, clusters=BLOBS, local_window=LOCAL, decay=0.95, **options)
    head = nn.Linear(32, VALUES)
    optimizer = torch.optim.Adam([*mixer.parameters(), *head.parameters()], lr=3e-3)
    for step in range(steps):
        x, value = blobs(64, 1000 + step)
        with collect_losses() as losses:
            out = head(mixer(x, is_causal=True)[:, -1])
        loss = F.cross_entropy(out, value) + sum(losses.get("routing", []))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mixer.eval()
    with torch.no_grad():
        x, value = blobs(2000, 7)
        return float((head(mixer(x, is_causal=True)[:, -1]).argmax(-1) == value).float().mean())


@pytest.mark.slow
def test_routing_finds_answers_in_its_cluster(record):
    steps = 400
    figures = {
        "task": f"{BLOBS} blobs of {TOKENS} vectors, {VALUES} values, the answer beyond the local blocks of {LOCAL}; "
        f"one layer of two heads, 64 rows a step, {steps} steps",
        "routing, prefix": answers(steps, window=24, selection="prefix", local_heads=1),
        "routing, global": answers(steps, window=24, selection="global", local_heads=1),
        "local heads alone": answers(steps, window=24, selection="prefix", local_heads=2),
        "chance": 1 / VALUES,
    }
    record(figures)
    assert figures["routing, prefix"] >= 0.95
    assert figures["routing, global"] >= 0.95
    assert abs(figures["local heads alone"] - figures["chance"]) <= 0.03


def test_tokens_of_a_blob_end_in_one_cluster():
    torch.manual_seed(0)
    centroids = Centroids(1, BLOBS, 16, decay=0.8)
    shares = []
    for step in range(30):
        x, _ = blobs(16, step)
        blob = (x[..., :16] @ CENTRES.T).argmax(-1)
        x = F.layer_norm(x[:, None, :, :16], (16,))
        nearest = torch.einsum("bhnd,hcd->bhnc", x, centroids.values).argmax(-1)[:, 0]
        shares.append(min(nearest[blob == g].bincount().max() / (blob == g).sum() for g in range(BLOBS)))
        centroids.update((x, nearest[:, None]))
    assert shares[-1] > 0.95 > shares[0]


@pytest.mark.slow
def test_averages_are_summed_over_processes(tmp_path):
    program = textwrap.dedent(
        """
        import sys, torch
        import torch.distributed as dist
        from regard import Centroids
        rank, file = int(sys.argv[1]), sys.argv[2]
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
        torch.manual_seed(0)
        centroids = Centroids(1, 3, 4, decay=0.5)
        x = torch.randn(2, 1, 9, 4, generator=torch.Generator().manual_seed(2))
        nearest = torch.einsum("bhnd,hcd->bhnc", x, centroids.values).argmax(-1)
        centroids.update((x[rank : rank + 1], nearest[rank : rank + 1]))
        torch.save(centroids.values, f"{file}.{rank}")
        dist.destroy_process_group()
        """
    )
    file = tmp_path / "meeting"
    processes = [subprocess.Popen([sys.executable, "-c", program, str(rank), str(file)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    torch.manual_seed(0)
    alone = Centroids(1, 3, 4, decay=0.5)
    x = torch.randn(2, 1, 9, 4, generator=torch.Generator().manual_seed(2))
    alone.update((x, torch.einsum("bhnd,hcd->bhnc", x, alone.values).argmax(-1)))
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(f"{file}.{rank}", weights_only=True), alone.values)
