from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import AgentAttention2d, OptionError, ShapeError, Unsupported
from regard.models.vision.vit import ViT, ViTSettings
from tests.oracles import normal


def layer(**options):
    made = AgentAttention2d(8, 2, **{"agents": 4, "grid": (4, 5), **options}).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.3 * torch.randn_like(p)
    return made


def table(bias, height, width):
    """The numbers of one head and agent after the other: (heads, agents, prefix + H W)."""
    coarse = F.interpolate(bias.coarse, size=(height, width), mode="bilinear", align_corners=False)
    places = (coarse + bias.rows + bias.columns).flatten(2)
    return places if bias.front is None else torch.cat((bias.front, places), -1)


def by_hand(made, x, height, width):
    """The layer on tokens (N, C) of one image, head after head."""
    front = made.prefix
    q, k, v = made.qkv(x).chunk(3, -1)
    rows = [slice(0, -(-height // 2)), slice(height // 2, height)]
    columns = [slice(0, -(-width // 2)), slice(width // 2, width)]
    image = q[front:].view(height, width, 8)
    agents = torch.stack([image[r, c].mean((0, 1)) for r in rows for c in columns])
    to_agents, from_agents = table(made.bias_ak, height, width), table(made.bias_qa, height, width)
    out = []
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        gathered = torch.softmax(agents[:, own] @ k[:, own].T / 2 + to_agents[h], -1) @ v[:, own]
        out.append(torch.softmax(q[:, own] @ agents[:, own].T / 2 + from_agents[h].T, -1) @ gathered)
    padded = F.pad(v[front:].view(height, width, 8), (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(0, 3, 1).unfold(1, 3, 1)
    local = torch.einsum("hwcyx,cyx->hwc", windows, made.local.weight[:, 0]) + made.local.bias
    return made.proj(torch.cat(out, -1) + torch.cat((torch.zeros(front, 8).double(), local.flatten(0, 1))))


def test_agents_are_pooled_queries_and_values_are_convolved_too():
    made = layer()
    (x,) = normal((2, 4, 5, 8))
    expected = torch.stack([by_hand(made, row.flatten(0, 1), 4, 5).view(4, 5, 8) for row in x])
    torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(made(x.flatten(1, 2), shape=(4, 5)), expected.flatten(1, 2))


def test_a_class_token_attends_but_is_neither_pooled_nor_convolved():
    made = layer(prefix=1)
    (x,) = normal((2, 21, 8))
    out = made(x, shape=(4, 5))
    torch.testing.assert_close(out, torch.stack([by_hand(made, row, 4, 5) for row in x]))
    changed = x.clone()
    changed[:, 0] += 1
    assert (made(changed, shape=(4, 5)) - out).abs().amax(-1).min() > 1e-4
    (two,) = normal((2, 22, 8))
    assert layer(prefix=2)(two, shape=(4, 5)).shape == two.shape


def test_biases_of_another_grid_are_interpolated():
    made = layer()
    bias = made.bias_ak
    torch.testing.assert_close(bias((4, 5)), table(bias, 4, 5))
    larger = layer(grid=(8, 6))
    larger.load_state_dict(
        {
            **{name: t for name, t in made.state_dict().items()},
            **{
                f"{b}.{name}": F.interpolate(getattr(getattr(made, b), name), size=size, mode="bilinear")
                for b in ("bias_ak", "bias_qa")
                for name, size in (("rows", (8, 1)), ("columns", (1, 6)))
            },
        }
    )
    (x,) = normal((2, 8, 6, 8))
    torch.testing.assert_close(made(x), larger(x))
    # a map smaller than the grid of agents gives some of them the same queries
    assert made(normal((1, 1, 1, 8))[0]).isfinite().all()


def test_padded_places_are_neither_pooled_nor_read():
    made = layer()
    (x,) = normal((2, 4, 5, 8))
    padding = torch.ones(2, 4, 5, dtype=torch.bool)
    # the whole first field of the second image, the last column of both
    padding[1, :2, :3] = False
    padding[:, :, 4] = False
    noise = torch.where(padding[..., None], x, 1e3 * torch.randn_like(x))
    out = made(noise, padding=padding)
    assert (out[~padding] == 0).all() and out.isfinite().all()
    torch.testing.assert_close(made(x, padding=padding), out)

    # agents by hand: means over the places that are there; the first field of the second image has none
    q, k, v = made.qkv(x).chunk(3, -1)
    fields = [
        (slice(0, 2), slice(0, 3)),
        (slice(0, 2), slice(2, 5)),
        (slice(2, 4), slice(0, 3)),
        (slice(2, 4), slice(2, 5)),
    ]
    agents = [q[1][f][padding[1][f]].mean(0) for f in fields[1:]]
    to_agents, from_agents = table(made.bias_ak, 4, 5)[:, 1:], table(made.bias_qa, 4, 5)[:, 1:]
    kept = padding[1].flatten()
    mixed = []
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        a = torch.stack(agents)[:, own]
        keys, values, queries = (t[1].flatten(0, 1)[kept][:, own] for t in (k, v, q))
        gathered = torch.softmax(a @ keys.T / 2 + to_agents[h][:, kept], -1) @ values
        mixed.append(torch.softmax(queries @ a.T / 2 + from_agents[h][:, kept].T, -1) @ gathered)
    local = made.local((v[1] * padding[1][..., None]).permute(2, 0, 1)).permute(1, 2, 0).flatten(0, 1)[kept]
    torch.testing.assert_close(out[1].flatten(0, 1)[kept], made.proj(torch.cat(mixed, -1) + local))


def test_an_image_of_padding_alone_gives_zeros_and_no_gradient():
    made = layer(prefix=1)
    x = normal((2, 21, 8))[0].requires_grad_()
    padding = torch.ones(2, 21, dtype=torch.bool)
    padding[0] = False
    out = made(x, padding=padding, shape=(4, 5))
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert (out[0] == 0).all() and (grad[0] == 0).all() and grad[1].abs().max() > 0 and grad.isfinite().all()
    # a class token without places has no agent to read
    padding[0, 0] = True
    torch.testing.assert_close(made(x, padding=padding, shape=(4, 5))[0, 0], made.proj.bias)


def test_what_it_cannot_do_is_refused():
    made = layer()
    x = torch.randn(2, 4, 5, 8).double()
    with pytest.raises(Unsupported, match="agents pool over all queries"):
        made(x, is_causal=True)
    with pytest.raises(Unsupported, match="reads no context"):
        made(x, x)
    with pytest.raises(Unsupported, match="reads no context"):
        made(x.flatten(1, 2), x.flatten(1, 2), shape=(4, 5))
    with pytest.raises(OptionError, match="50 is not a square"):
        regard.mixer("agent", 8, 2, agents=50)
    with pytest.raises(OptionError, match="prefix is a number of tokens"):
        regard.mixer("agent", 8, 2, prefix=-1)
    with pytest.raises(ShapeError, match=r"\(B, H, W, C\) with C = 8"):
        made(x.flatten(1, 2))
    with pytest.raises(ShapeError, match=r"0 class tokens and 4x4 places must be \(B, 16, 8\)"):
        made(x.flatten(1, 2), shape=(4, 4))
    with pytest.raises(ShapeError, match=r"1 class tokens and 4x5 places must be \(B, 21, 8\)"):
        layer(prefix=1)(x.flatten(1, 2), shape=(4, 5))
    with pytest.raises(ShapeError, match="a grid has no place for 1 class tokens"):
        layer(prefix=1)(x)
    with pytest.raises(ShapeError, match=r"padding is torch.bool \(2, 20\); it must be bool \(2, 4, 5\)"):
        made(x, padding=torch.ones(2, 20, dtype=torch.bool))


@pytest.mark.slow
def test_a_few_agents_read_digits_as_well_as_softmax(record):
    from tests.models.test_dinat import train

    plain = ViTSettings(image=(32, 32), patch=4, dim=48, depth=2, heads=4, classes=10, channels=1)
    found = {}
    for name, changes in {
        "softmax": {},
        "4 agents": {"mixer": "agent", "options": {"agents": 4}},
        "16 agents": {"mixer": "agent", "options": {"agents": 16}},
    }.items():
        torch.manual_seed(0)
        model = ViT(replace(plain, **changes))
        # the published start, deviation 0.02, is one for wider networks: this one hardly leaves it in so few steps
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.normal_(std=module.in_features**-0.5)
            model.positions.table.normal_(std=0.5)
            model.prefix.normal_(std=0.5)
        found[name] = train(model, epochs=10)
    record({"task": "8 x 8 digits, a token a pixel and a class token; 397 test images", "test_accuracy": found})
    assert found["4 agents"] >= 0.95
    assert found["4 agents"] >= found["softmax"] - 0.02
