"""Multi-layer pooling against loops, and the names under which it was released."""

import pytest
import torch

from regard import LastLayerPool, LatentAttentionPool, MultiLayerPool, OptionError, ShapeError
from tests.mixers.test_nv_embed import attend, feed, moved, norm_of
from tests.oracles import coin, normal

# the released attn_pool of the paper's models: 32 layers of width 4096, 768 latents, 32 heads of 2048
RELEASED = {
    "latents": (768, 4096),
    "pos_emb.weight": (32, 4096),
    "cross_attend_blocks.0.fn.to_kv.weight": (131072, 4096),
    "cross_attend_blocks.0.fn.to_out.weight": (4096, 65536),
    "cross_attend_blocks.0.fn.to_q.weight": (65536, 4096),
    "cross_attend_blocks.0.norm.bias": (4096,),
    "cross_attend_blocks.0.norm.weight": (4096,),
    "cross_attend_blocks.0.norm_context.bias": (4096,),
    "cross_attend_blocks.0.norm_context.weight": (4096,),
    "cross_attend_blocks.1.fn.net.0.bias": (32768,),
    "cross_attend_blocks.1.fn.net.0.weight": (32768, 4096),
    "cross_attend_blocks.1.fn.net.2.bias": (4096,),
    "cross_attend_blocks.1.fn.net.2.weight": (4096, 16384),
    "cross_attend_blocks.1.norm.bias": (4096,),
    "cross_attend_blocks.1.norm.weight": (4096,),
}


def loop(pool, x, padding, heads, of="mean"):
    """Latent by latent, by the words of the paper: latents are queries, layers keys and values."""
    w = pool.state_dict()
    rows = []
    for layers, taken in zip(x, padding, strict=True):
        found = [tokens[taken].mean(0) if of == "mean" else tokens[taken][-1] for tokens in layers]
        found = [vector + w["pos_emb.weight"][i] for i, vector in enumerate(found)]
        source = torch.stack([norm_of(w, "0.norm", vector) for vector in found])
        k, v = (source @ w["cross_attend_blocks.0.fn.to_kv.weight"].T).chunk(2, -1)
        outs = []
        for latent in w["latents"]:
            q = w["cross_attend_blocks.0.fn.to_q.weight"] @ norm_of(w, "0.norm_context", latent)
            u = latent + w["cross_attend_blocks.0.fn.to_out.weight"] @ attend(q, k, v, heads)
            outs.append(u + feed(w, u))
        rows.append(sum(outs) / len(outs))
    return torch.stack(rows)


def made(**options):
    return moved(MultiLayerPool(12, **{"num_layers": 3, "num_latents": 5, "heads": 2, **options}))


@pytest.mark.parametrize("of", ["mean", "last"])
@pytest.mark.parametrize("head_dim", [None, 5])
def test_it_equals_a_loop_over_latents(of, head_dim):
    pool = made(of=of, head_dim=head_dim)
    (x,) = normal((2, 3, 9, 12))
    padding = coin(2, 9)
    torch.testing.assert_close(pool(x, padding=padding), loop(pool, x, padding, 2, of), rtol=1e-10, atol=1e-10)


def test_one_layer_without_its_vector_is_latent_queries_on_the_mean():
    pool = made(num_layers=1)
    torch.nn.init.zeros_(pool.pos_emb.weight)
    x, other = normal((2, 1, 9, 12), (2, 1, 4, 12))
    w, mean = pool.state_dict(), x[:, 0].mean(1)
    # attention to one key is its value, whatever is asked
    for row, vector in zip(pool(x), mean, strict=True):
        value = (w["cross_attend_blocks.0.fn.to_kv.weight"] @ norm_of(w, "0.norm", vector))[12:]
        us = [latent + w["cross_attend_blocks.0.fn.to_out.weight"] @ value for latent in w["latents"]]
        wanted = torch.stack([u + feed(w, u) for u in us]).mean(0)
        torch.testing.assert_close(row, wanted, rtol=1e-10, atol=1e-10)
    last = moved(LastLayerPool(12, num_latents=5, heads=2))
    last.load_state_dict({name: value for name, value in w.items() if name != "pos_emb.weight"})
    torch.testing.assert_close(last(mean[:, None]), pool(x), rtol=1e-10, atol=1e-10)
    # tokens with the same mean give the same vector
    other = torch.cat((other, 5 * x.mean(2, keepdim=True) - other.sum(2, keepdim=True)), 2)
    torch.testing.assert_close(pool(other), pool(x), rtol=1e-10, atol=1e-10)


def test_the_last_layer_alone_equals_a_loop_and_reads_no_pads():
    pool = moved(LastLayerPool(12, num_latents=5, heads=2))
    (x,) = normal((2, 9, 12))
    padding = coin(2, 9)
    w = pool.state_dict()
    rows = []
    for tokens, taken in zip(x, padding, strict=True):
        source = torch.stack([norm_of(w, "0.norm", token) for token in tokens[taken]])
        k, v = (source @ w["cross_attend_blocks.0.fn.to_kv.weight"].T).chunk(2, -1)
        outs = []
        for latent in w["latents"]:
            q = w["cross_attend_blocks.0.fn.to_q.weight"] @ norm_of(w, "0.norm_context", latent)
            u = latent + w["cross_attend_blocks.0.fn.to_out.weight"] @ attend(q, k, v, 2)
            outs.append(u + feed(w, u))
        rows.append(sum(outs) / len(outs))
    found = pool(x.masked_fill(~padding[..., None], torch.nan), padding=padding)
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-10, atol=1e-10)
    padding[0] = False
    assert (pool(x, padding=padding)[0] == 0).all()


def test_latents_have_no_order_and_layers_have_one_through_their_vectors():
    pool = made()
    (x,) = normal((2, 3, 9, 12))
    before = pool(x)
    with torch.no_grad():
        pool.latents.copy_(pool.latents[torch.tensor([3, 0, 4, 1, 2])])
    torch.testing.assert_close(pool(x), before, rtol=1e-10, atol=1e-10)
    swapped = x[:, [2, 0, 1]]
    assert (pool(swapped) - before).abs().max() > 1e-3
    torch.nn.init.zeros_(pool.pos_emb.weight)
    torch.testing.assert_close(pool(swapped), pool(x), rtol=1e-10, atol=1e-10)


def test_the_gradient_reaches_every_layer():
    pool = made()
    x = normal((2, 3, 9, 12))[0].requires_grad_()
    out = pool(x)
    (grad,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    assert (grad.abs().amax((2, 3)) > 0).all()


def test_it_has_the_names_and_shapes_of_the_released_weights():
    with torch.device("meta"):
        pool = MultiLayerPool(4096, num_layers=32, head_dim=2048)
        pool.load_state_dict({name: torch.empty(shape) for name, shape in RELEASED.items()}, strict=True, assign=True)
    assert {name: tuple(x.shape) for name, x in pool.state_dict().items()} == RELEASED


@pytest.mark.parametrize("kind", ["multilayer", "last"])
def test_a_label_in_a_middle_layer_is_found_by_all_layers_alone(kind):
    # the label stands in the tokens of layer 1 of 4; what layer 3 holds was drawn without it
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(2, (400,), generator=generator)
    x = torch.randn(400, 4, 6, 8, generator=generator)
    x[:, 1, :, 0] += 2.0 * (2 * labels - 1)[:, None]
    torch.manual_seed(0)
    if kind == "multilayer":
        pool = MultiLayerPool(8, num_layers=4, num_latents=4, heads=2)
    else:
        pool, x = LatentAttentionPool(8, num_latents=4, heads=2), x[:, -1]
    head = torch.nn.Linear(8, 2)
    optimiser = torch.optim.AdamW([*pool.parameters(), *head.parameters()], lr=1e-2, weight_decay=0.1)
    for step in range(60):
        rows = torch.arange(100 * (step % 2), 100 * (step % 2) + 100)
        loss = torch.nn.functional.cross_entropy(head(pool(x[rows])), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    score = float((head(pool(x[200:])).argmax(-1) == labels[200:]).float().mean())
    assert score > 0.95 if kind == "multilayer" else score < 0.6


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: MultiLayerPool(12, num_layers=3, heads=5), OptionError, "12 does not divide into 5 heads"),
        (lambda: MultiLayerPool(12, num_layers=3, heads=2, of="first"), OptionError, "'first'"),
        (lambda: made()(torch.randn(2, 4, 9, 12).double()), ShapeError, r"\(B, 3, N, C\) with C = 12"),
        (lambda: made()(torch.randn(2, 9, 12).double()), ShapeError, r"\(B, 3, N, C\)"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
