from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import FIT, FITAR, FITARSettings, FITDenoiser, FITDenoiserSettings, FITSettings, OptionError, ShapeError
from regard.layers.patches import PatchEmbed
from regard.models.sequence.fit import SIZES, Interleaved, group_grid, parse_layers, ungroup_grid
from tests.oracles import normal

SMALL = FITSettings(
    layers="(1)2(1)", tokens=12, groups=3, latents_per_group=2, dim=8, latent_dim=12, heads=2, latent_heads=3
)


def settings(kind=FITSettings, **options):
    return kind(**{**dataclasses.asdict(SMALL), **({"causal": True} if kind is FITARSettings else {}), **options})


def decoder(**options):
    torch.manual_seed(0)
    return FITAR(settings(FITARSettings, vocab=7, **options)).double()


def encoder(**options):
    torch.manual_seed(0)
    return stirred(FIT(settings(**options)).double())


def stirred(model):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def reach(run, x):
    """Which output place depends on which input place, by gradient: (N, N)."""
    x = x.clone().requires_grad_()
    out = run(x)
    table = torch.zeros(out.shape[1], x.shape[1])
    for i in range(out.shape[1]):
        (grad,) = torch.autograd.grad((out[:, i] * torch.randn_like(out[:, i])).sum(), x, retain_graph=True)
        table[i] = grad.abs().amax((0, 2))
    return table


def groups_of(table, groups=3):
    """Whether any place of one group depends on any place of another: (groups, groups)."""
    return table.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).amax((1, 3)) > 0


def test_layer_strings_are_read():
    assert parse_layers("(2)4(3)12(1)") == [(2, 4), (3, 12), (1, 0)]
    assert parse_layers("(5)") == [(5, 0)]
    assert parse_layers("(2)4") == [(2, 4)]


@pytest.mark.parametrize("layers", ["(2)0(2)", "(2)(2)", "(1)2(1)(1)"])
def test_brackets_without_global_layers_between_are_refused(layers):
    with pytest.raises(OptionError, match=r"no global layers between.*'\(2\)4\(2\)4\(2\)'"):
        encoder(layers=layers)


@pytest.mark.parametrize("layers", ["", "4", "(2", "2(4)2", "(2)4(2)x", "(a)2(b)", "((2))4(2)"])
def test_an_unknown_grammar_is_refused_with_an_example(layers):
    with pytest.raises(OptionError, match=r"cannot be read.*'\(2\)4\(2\)4\(2\)'"):
        encoder(layers=layers)


@pytest.mark.parametrize("layers, latents_read", [("(1)2(1)", 1), ("(1)1(1)1(2)", 2), ("(2)1(1)1", 1)])
def test_a_round_is_its_equations(layers, latents_read):
    model, (x,) = encoder(layers=layers), normal((2, 12, 8))
    stack = model.stack
    y = (x.view(2, 3, 4, 8) + stack.positions).view(6, 4, 8)
    z = stack.latents.expand(2, -1, -1, -1)
    given = 0
    for round_ in stack.rounds:
        for layer in round_.local:
            y = y + layer.attention(layer.norm_attention(y))
            y = y + layer.mlp(layer.norm_mlp(y))
        if round_.read is None:
            continue
        z = z.reshape(6, 2, 12)
        z = z + round_.read.attention(round_.read.norm(z), round_.read.norm_context(y))
        z = z.reshape(2, 6, 12)
        for layer in round_.across:
            z = z + layer.attention(layer.norm_attention(z))
            z = z + layer.mlp(layer.norm_mlp(z))
        z = z.view(2, 3, 2, 12)
        if round_.give is not None:
            given += 1
            y = y + round_.give.attention(round_.give.norm(y), round_.give.norm_context(z.reshape(6, 2, 12)))
    assert given == latents_read
    out = model(x)
    torch.testing.assert_close(out.tokens, model.norm(y.view(2, 12, 8)))
    torch.testing.assert_close(out.latents, model.norm_latents(z))


def test_crossing_is_as_wide_as_the_narrower_stream_with_the_fewer_heads():
    cross = encoder().stack.rounds[0].read.attention
    assert (cross.heads, cross.head_dim, cross.to_q.in_features, cross.to_k.in_features) == (2, 4, 12, 8)


def test_no_logit_depends_on_a_later_token_also_over_group_borders():
    model = stirred(decoder())
    model.eval()
    (x,) = normal((1, 12, 8))

    def run(x):
        return model.norm(model.stack(x)[0])

    table = reach(run, x)
    assert (table.triu(1) == 0).all()
    assert (table.diagonal() > 0).all()
    for i in range(12):
        group = i // 4
        # its own group up to itself, and every earlier group
        assert (table[i, : i + 1] > 0).all(), (i, group)


def test_a_changed_token_changes_no_earlier_logit():
    model, ids = stirred(decoder(layers="(1)1(1)2(1)")), torch.randint(7, (2, 12))
    before = model(ids)
    for t in range(12):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % 7
        after = model(other)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


def test_the_first_group_reads_nothing_of_others_but_a_constant():
    model = stirred(decoder(groups=1, tokens=4))
    ids = torch.randint(7, (2, 4))
    before = model(ids)
    with torch.no_grad():
        model.stack.latents += 1
    assert torch.equal(model(ids), before), "one group has no far reach"


def test_shorter_sequences_are_the_start_of_longer_ones():
    model, ids = stirred(decoder()), torch.randint(7, (2, 12))
    whole = model(ids)
    for n in (1, 4, 7):
        torch.testing.assert_close(model(ids[:, :n]), whole[:, :n])


def test_the_embedding_is_tied_and_the_output_has_a_bias():
    model, ids = decoder(), torch.randint(7, (1, 12))
    with torch.no_grad():
        model.bias += torch.arange(7.0)
    x = model.norm(model.stack(model.embed(ids))[0])
    torch.testing.assert_close(model(ids), x @ model.embed.weight.T + torch.arange(7.0).double())


def test_the_global_mask_sees_groups_up_to_the_own_one():
    mask = decoder().stack.rounds[0].across[0].attention.pattern.dense(6, 6)[0, 0]
    group = torch.arange(6) // 2
    assert torch.equal(mask, group[:, None] >= group)


def test_groups_that_change_places_with_their_latents_change_the_places_of_outputs():
    model, (x,) = encoder(layers="(1)2(1)1(1)"), normal((2, 12, 8))
    out = model(x)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        model.stack.latents.copy_(model.stack.latents[order])
    moved = model(x.view(2, 3, 4, 8)[:, order].reshape(2, 12, 8))
    torch.testing.assert_close(moved.tokens, out.tokens.view(2, 3, 4, 8)[:, order].reshape(2, 12, 8))
    torch.testing.assert_close(moved.latents, out.latents[:, order])


def test_local_layers_alone_have_no_latents():
    model, (x,) = encoder(layers="(3)"), normal((2, 12, 8))
    assert not any("latents" in name or "across" in name or "read" in name for name, _ in model.named_parameters())
    out = model(x)
    assert out.latents is None
    y = (x.view(2, 3, 4, 8) + model.stack.positions).view(6, 4, 8)
    for layer in model.stack.rounds[0].local:
        y = layer(y)
    torch.testing.assert_close(out.tokens, model.norm(y.view(2, 12, 8)))
    assert len(model.stack.rounds[0].local) == 3


@pytest.mark.parametrize("layers, far", [("(2)", False), ("(2)2", False), ("(1)1(1)", True)])
def test_a_group_depends_on_another_only_through_global_layers_that_are_read(layers, far):
    model, (x,) = encoder(layers=layers), normal((1, 12, 8))
    seen = groups_of(reach(lambda x: model(x).tokens, x))
    assert torch.equal(seen, torch.ones(3, 3, dtype=torch.bool) if far else torch.eye(3, dtype=torch.bool))
    if layers == "(2)2":
        latents = groups_of(reach(lambda x: model(x).latents.flatten(1, 2), x))
        assert latents.all()


def test_a_grid_is_cut_into_sub_grids_and_put_together_again():
    x = torch.arange(24.0).view(1, 4, 6, 1)
    tokens = group_grid(x, (2, 3))
    assert tokens[0, :4, 0].tolist() == [0, 1, 6, 7]
    assert tokens[0, 4:8, 0].tolist() == [2, 3, 8, 9]
    assert tokens[0, -4:, 0].tolist() == [16, 17, 22, 23]
    assert torch.equal(ungroup_grid(tokens, (2, 3), (4, 6)), x)
    with pytest.raises(ShapeError, match="does not divide into 3 by 2 groups"):
        group_grid(x, (3, 2))


def saved_bytes(model, x):
    """Bytes that a call keeps for its backward pass; explicit attention, which keeps its tables of weights."""
    held = {}

    def keep(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for module in model.modules():
        if hasattr(module, "op"):
            op = module.op
            module.op = lambda *a, op=op, **o: op(*a, **o, engine="reference")
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x)
    return sum(size for place, size in held.items() if place not in owned)


def test_sixty_four_groups_keep_less_than_a_quarter_of_a_flat_transformer():
    options = dict(tokens=1024, dim=32, latent_dim=32, heads=2, latent_heads=2, latents_per_group=2)
    (x,) = normal((1, 1024, 32), dtype=torch.float32)
    grouped = saved_bytes(FIT(FITSettings(layers="(1)1(1)", groups=64, **options)), x)
    flat = saved_bytes(FIT(FITSettings(layers="(3)", groups=1, **options)), x)
    assert grouped < flat / 4, (grouped, flat)


def denoiser(**options):
    torch.manual_seed(0)
    return FITDenoiser(settings(FITDenoiserSettings, latent_dim=24, channels=3, **options)).double()


def test_a_denoiser_predicts_as_many_channels_and_gives_its_latents():
    model, (x, condition) = denoiser(condition=5), normal((2, 12, 3), (2, 4, 5))
    out, latents = model(x, torch.tensor([0.1, 0.9]).double(), condition)
    assert out.shape == x.shape and latents.shape == (2, 3, 2, 24)


def test_time_and_condition_reach_every_token_through_the_latents():
    model, (x, condition) = stirred(denoiser(condition=5)), normal((1, 12, 3), (1, 2, 5))
    time = torch.tensor([0.3]).double()
    out, _ = model(x, time, condition)
    for other in (model(x, time + 0.2, condition)[0], model(x, time, condition + 1)[0]):
        assert ((other - out).abs().amax(-1) > 0).all()
    # condition tokens are a set
    torch.testing.assert_close(model(x, time, condition.flip(1))[0], out)


def test_earlier_latents_enter_through_a_closed_gate():
    model, (x, earlier) = denoiser(self_conditioned=True), normal((1, 12, 3), (1, 3, 2, 24))
    time = torch.tensor([0.3]).double()
    out, _ = model(x, time)
    assert torch.equal(model(x, time, latents=earlier)[0], out)
    with torch.no_grad():
        model.before[1].weight += 1
    assert not torch.allclose(model(x, time, latents=earlier)[0], out)
    model(x, time, latents=earlier)[0].square().sum().backward()
    assert model.before[0].fc1.weight.grad.abs().max() > 0


def test_every_parameter_of_a_denoiser_is_trained():
    model = stirred(denoiser(condition=5, self_conditioned=True))
    x, condition, earlier = normal((2, 12, 3), (2, 4, 5), (2, 3, 2, 24))
    out, _ = model(x, torch.rand(2).double(), condition, earlier)
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_sizes_are_built():
    for made in SIZES.values():
        with torch.device("meta"):
            assert FITAR(made)(torch.zeros(1, made.tokens, dtype=torch.long)).shape == (1, made.tokens, made.vocab)


def test_what_cannot_be_is_refused():
    with pytest.raises(OptionError, match="12 tokens do not divide into 5 groups"):
        encoder(groups=5)
    with pytest.raises(OptionError, match="at least 1 latent"):
        encoder(latents_per_group=0)
    with pytest.raises(OptionError, match="width of 8 does not divide into 3 heads"):
        encoder(heads=3)
    with pytest.raises(ShapeError, match=r"must be \(B, 12, 8\)"):
        encoder()(torch.randn(1, 8, 8).double())
    with pytest.raises(OptionError, match=r"no token reads the last global layers.*'\(2\)4\(2\)'"):
        decoder(layers="(1)2")
    with pytest.raises(OptionError, match="FIT is the encoder"):
        decoder(causal=False)
    with pytest.raises(OptionError, match="at least 1 token, not 0"):
        FITAR(settings(FITARSettings, vocab=0))
    with pytest.raises(ShapeError, match=r"must be \(B, up to 12, 8\)"):
        decoder()(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ShapeError, match="must be integers"):
        decoder()(torch.zeros(1, 12))
    with pytest.raises(OptionError, match="no multiple of 8"):
        FITDenoiser(settings(FITDenoiserSettings, channels=3))
    with pytest.raises(OptionError, match="has global layers"):
        denoiser(layers="(2)")
    with pytest.raises(ShapeError, match=r"must be \(2,\)"):
        denoiser()(torch.randn(2, 12, 3).double(), torch.rand(1).double())
    with pytest.raises(OptionError, match="condition tokens"):
        denoiser()(torch.randn(2, 12, 3).double(), torch.rand(2).double(), torch.randn(2, 1, 5).double())
    with pytest.raises(OptionError, match="self_conditioned=True"):
        denoiser()(torch.randn(1, 12, 3).double(), torch.rand(1).double(), latents=torch.randn(1, 3, 2, 24).double())
    assert isinstance(encoder().stack, Interleaved)


def copier(layers):
    """A decoder of six groups of four tokens, and its accuracy on the second half of rows that repeat the first."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    steps, symbols, half = 400, 8, 12
    model = FITAR(
        FITARSettings(
            vocab=symbols, layers=layers, tokens=2 * half, groups=6, latents_per_group=4, dim=64, latent_dim=64,
            heads=4, latent_heads=4,
        )
    )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        first = torch.randint(symbols, (64, half), generator=generator)
        out = model(torch.cat((first, first), 1))[:, half - 1 : -1]
        loss = F.cross_entropy(out.flatten(0, 1), first.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    first = torch.randint(symbols, (512, half), generator=generator)
    with torch.no_grad():
        out = model(torch.cat((first, first), 1))[:, half - 1 : -1]
    return (out.argmax(-1) == first).float().mean().item()


@pytest.mark.slow
def test_fit_copies_over_groups(record):
    figures = {
        "task": "12 of 8 symbols, then the same again; 6 groups of 4 tokens, 4 latents each; accuracy on the second "
        "half after 400 steps of 64 rows",
        "(2)2(2)": copier("(2)2(2)"),
        "(6), local layers only": copier("(6)"),
        "chance": 1 / 8,
    }
    record(figures)
    assert figures["(2)2(2)"] >= 0.95
    assert figures["(6), local layers only"] <= 0.2


class Reader(nn.Module):
    """Digits by their latents: 16 patches of 2 x 2 pixels in 4 sub-images."""

    def __init__(self):
        super().__init__()
        self.embed = PatchEmbed(32, 2, channels=1)
        self.fit = FIT(
            FITSettings(
                layers="(1)2(1)1", tokens=16, groups=4, latents_per_group=2, dim=32, latent_dim=48, heads=4,
                latent_heads=4,
            )
        )  # fmt: skip
        self.head = nn.Linear(48, 10)

    def forward(self, images):
        return self.head(self.fit(group_grid(self.embed(images), (2, 2))).latents.mean((1, 2)))


@pytest.mark.slow
def test_fit_reads_digits(record):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1347], order[1347:]
    torch.manual_seed(0)
    model, epochs = Reader(), 30
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=epochs * 22)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(64):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(-1) == labels[test]).float().mean().item()
    record({"task": "1347 digits of 8 x 8 pixels, 30 epochs", "accuracy on 450 others": accuracy})
    assert accuracy >= 0.95
