"""The matching network: kernels that share weights, Hough convolution, and parity with a plain network of the released form."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regard
from regard import CHMNet, CHMSettings, HoughConv, OptionError, ShapeError

SMALL = CHMSettings(stem_dim=8, dims=(8, 16), depths=(1, 1), side=32)
# ResNet-101 of torchvision has 44,549,160 weights, its last stage 14,964,736 and its head 2,049,000
TRUNK = 44_549_160 - 14_964_736 - 2_049_000


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind, shared", [("psi", (220, 55)), ("iso", (45, 15)), ("full", (5625, 625))])
def test_sizes_have_the_parameters_of_the_released_networks(kind, shared):
    with torch.device("meta"):
        model = regard.build(f"chm_{kind}")
        tied = regard.build(f"chm_{kind}", tied=True)
    assert (model.hough6.weight.numel(), model.hough4.weight.numel()) == shared
    narrow = 3 * 9 * 1024 * 256
    assert count(model) == 2 * TRUNK + narrow + sum(shared) + 2
    assert count(tied) == count(model) - TRUNK


def test_a_trunk_of_the_released_size_gives_maps_of_one_sixteenth():
    with torch.device("meta"):
        model = regard.build("chm_psi")
        maps = model.trunks[0].features(torch.empty(1, 3, 240, 240))[-1]
        assert maps.shape == (1, 1024, 15, 15)


def shares(kind, place):
    """What the weights of a place have in common, by distances told from the middle of a kernel of side 5."""
    (a, b, c, d) = (i - 2 for i in place)
    tail, head, apart = a**2 + b**2, c**2 + d**2, (a - c) ** 2 + (b - d) ** 2
    return apart if kind == "iso" else (max(tail, head), min(tail, head), apart)


@pytest.mark.parametrize("kind", ["psi", "iso"])
def test_places_share_a_weight_when_they_have_the_same_distances(kind):
    conv = HoughConv(kind)
    kernel = conv.kernel().detach()
    places = list(itertools.product(range(5), repeat=4))
    for scale in (kernel[4], kernel[0], kernel[1]):
        values: dict = {}
        for place in places:
            values.setdefault(shares(kind, place), set()).add(float(scale[place]))
        assert all(len(v) == 1 for v in values.values())
        assert len({v for some in values.values() for v in some}) == len(values) == conv.weight.shape[1]
    same = [[0, 8], [2, 6], [1, 3, 5, 7]] + ([[0, 4]] if kind == "iso" else [])
    for group in same:
        assert all(torch.equal(kernel[group[0]], kernel[i]) for i in group)
    assert torch.equal(kernel[0], kernel[4]) == (kind == "iso") and not torch.equal(kernel[1], kernel[2])
    # a weight is shared out: the kernel sums to the sum of weights
    torch.testing.assert_close(kernel.sum(), conv.weight.sum().detach())


@pytest.mark.parametrize("kind", ["psi", "full"])
@pytest.mark.parametrize("scales", [True, False])
def test_hough_convolution_equals_loops(kind, scales):
    conv = HoughConv(kind, window=3, scales=scales).double()
    with torch.no_grad():
        conv.weight.normal_()
        conv.bias.fill_(0.3)
    s, sides = 2, (3, 2, 2, 4)
    x = torch.randn(2, s, s, *sides, dtype=torch.float64)
    reach = 3 if scales else 1
    kernel = conv.kernel().unflatten(0, (reach, reach)).detach()
    expected = torch.full_like(x, 0.3)
    steps = [range(reach)] * 2 + [range(3)] * 4
    for place in itertools.product(range(s), range(s), *map(range, sides)):
        for step in itertools.product(*steps):
            middle = (reach // 2,) * 2 + (1,) * 4
            near = [p + o - m for p, o, m in zip(place, step, middle, strict=True)]
            if all(0 <= i < size for i, size in zip(near, (s, s, *sides), strict=True)):
                expected[(slice(None), *place)] += kernel[step] * x[(slice(None), *near)]
    torch.testing.assert_close(conv(x).detach(), expected)


class Block(nn.Module):
    """A bottleneck of a residual network for two pictures at once, a group each."""

    def __init__(self, channels, inner, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 1, groups=2, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=2, bias=False)
        self.conv3 = nn.Conv2d(inner, 4 * inner, 1, groups=2, bias=False)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(inner), nn.BatchNorm2d(inner), nn.BatchNorm2d(4 * inner)
        self.downsample = None
        if stride > 1 or channels != 4 * inner:
            conv = nn.Conv2d(channels, 4 * inner, 1, stride, groups=2, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * inner))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Plain(nn.Module):
    """The released form, by its names of weights, written down without sharing any code."""

    def __init__(self, dims, depths, kind):
        super().__init__()
        backbone = nn.Module()
        backbone.conv1, backbone.bn1 = nn.Conv2d(6, 16, 7, 2, 3, groups=2, bias=False), nn.BatchNorm2d(16)
        before = 16
        for number, (dim, depth) in enumerate(zip(dims, depths, strict=True), 1):
            blocks = [
                Block(before if i == 0 else 2 * dim, dim // 2, 2 if number > 1 and i == 0 else 1) for i in range(depth)
            ]
            setattr(backbone, f"layer{number}", nn.Sequential(*blocks))
            before = 2 * dim
        # what the network does not read
        backbone.layer4, backbone.fc = nn.Sequential(nn.Conv2d(2, 2, 1)), nn.Linear(3, 4)
        learner = nn.Module()
        learner.conv2ds = nn.ModuleList(nn.Conv2d(dims[-1], dims[-1] // 4, 3, padding=1, bias=False) for _ in range(3))
        learner.chm6d, learner.chm4d = nn.Module(), nn.Module()
        sizes = {"psi": (4, 55), "iso": (3, 15)}
        if kind == "full":
            learner.chm6d.param = nn.Parameter(torch.randn(1, 1, 3, 3, 5, 5, 5, 5))
            learner.chm4d.weight = nn.Parameter(torch.randn(1, 1, 5, 5, 5, 5))
            learner.chm4d.bias = nn.Parameter(torch.tensor(0.4))
        else:
            groups, classes = sizes[kind]
            learner.chm6d.param = nn.ParameterList(nn.Parameter(torch.randn(classes)) for _ in range(groups))
            learner.chm4d.weight = nn.Parameter(torch.randn(classes))
            learner.chm4d.bias = nn.Parameter(torch.tensor([0.4]))
        learner.chm6d.bias = nn.Parameter(torch.tensor([-0.2]))
        self.backbone, self.learner, self.kind, self.stages = backbone, learner, kind, len(dims)

    def kernels(self):
        """(3, 3, 5, 5, 5, 5) and (5, 5, 5, 5)."""
        if self.kind == "full":
            return self.learner.chm6d.param[0, 0], self.learner.chm4d.weight[0, 0]
        groups = [[4], [0, 8], [2, 6], [1, 3, 5, 7]] if self.kind == "psi" else [[0, 4, 8], [2, 6], [1, 3, 5, 7]]
        places: dict = {}
        for place in itertools.product(range(5), repeat=4):
            places.setdefault(shares(self.kind, place), []).append(place)
        six, four = torch.zeros(9, 5, 5, 5, 5).double(), torch.zeros(5, 5, 5, 5).double()
        for number, members in enumerate(places.values()):
            for place in members:
                four[place] = self.learner.chm4d.weight[number] / len(members)
                for group, values in zip(groups, self.learner.chm6d.param, strict=True):
                    for scale in group:
                        six[(scale, *place)] = values[number] / len(members) / len(group)
        return six.view(3, 3, 5, 5, 5, 5), four

    def forward(self, source, target):
        x = self.backbone.bn1(self.backbone.conv1(torch.cat((source, target), 1)))
        x = F.max_pool2d(F.relu(x), 3, 2, 1)
        for i in range(self.stages):
            x = getattr(self.backbone, f"layer{i + 1}")(x)
        side = x.shape[-1]
        features = []
        for f in x.chunk(2, 1):
            sizes = [(round(side * scale**0.5),) * 2 for scale in (0.5, 1, 2)]
            grown = [F.interpolate(f, s, mode="bilinear", align_corners=True) for s in sizes]
            features.append([conv(g) for conv, g in zip(self.learner.conv2ds, grown, strict=True)])
        c = x.new_zeros(len(x), 3, 3, side, side, side, side)
        for i, f in enumerate(features[0]):
            for j, g in enumerate(features[1]):
                dots = torch.einsum("bchw,bcyx->bhwyx", f, g)
                lengths = f.norm(dim=1)[..., None, None] * g.norm(dim=1)[:, None, None]
                c[:, i, j] = resized(dots / lengths, side).clamp(min=0)
        six, four = self.kernels()
        votes = torch.sigmoid(self.learner.chm6d.bias + correlated(c, six))
        votes = resized(votes.amax((1, 2)), 2 * side)
        votes = F.softplus(self.learner.chm4d.bias + correlated(votes, four)).flatten(3).flatten(1, 2)
        return votes**3 / votes.amax(1, keepdim=True) / votes.amax(2, keepdim=True)


def line(new, old):
    """A matrix (new, old) that interpolates between places, ends kept."""
    matrix = torch.zeros(new, old).double()
    for i in range(new):
        at = i * (old - 1) / max(new - 1, 1)
        low = min(int(at), old - 1)
        matrix[i, low] += 1 - (at - low)
        if low + 1 < old:
            matrix[i, low + 1] += at - low
    return matrix


def resized(c, side):
    m, n = line(side, c.shape[1]), line(side, c.shape[3])
    return torch.einsum("bhwyx,Hh,Ww,Yy,Xx->bHWYX", c, m, m, n, n)


def correlated(x, kernel):
    """Cross-correlation over all axes but the first, zeros beyond the borders."""
    halves = [k // 2 for k in kernel.shape]
    padded = F.pad(x, [h for half in reversed(halves) for h in (half, half)])
    out = torch.zeros_like(x)
    for step in itertools.product(*map(range, kernel.shape)):
        out += kernel[step] * padded[(slice(None), *(slice(i, i + n) for i, n in zip(step, x.shape[1:], strict=True)))]
    return out


@pytest.mark.parametrize("kind", ["psi", "iso", "full"])
def test_with_weights_of_the_released_form_the_votes_are_its_votes(kind):
    plain = Plain(SMALL.dims, SMALL.depths, kind).double().eval()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    model = CHMNet(replace(SMALL, kernel=kind)).double().eval()
    model.load_released(plain.state_dict())
    source, target = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        votes = model(torch.cat((source, target), 1))
        torch.testing.assert_close(votes, plain(source, target))
    assert votes.shape == (2, 64, 64) and float(votes.min()) >= 0


def test_points_move_by_the_votes_near_their_best():
    model = CHMNet(replace(SMALL, spread=1.5)).double().eval()
    source, target = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        nn.init.uniform_(model.hough4.weight, 0, 40)
        votes = model(torch.cat((source, target), 1))[0]
        points = torch.tensor([[-1.0, -1.0], [0.1, -0.4], [1.0, 0.8]], dtype=torch.float64)
        found = model.transfer(source, target, points)[0]
    side, step = 8, 2 / 7
    places = [(-1 + step * y, -1 + step * x) for y in range(side) for x in range(side)]
    moved = []
    for row in votes:
        best = int(row.argmax())
        near = [((i // side - best // side) ** 2 + (i % side - best % side) ** 2) for i in range(side**2)]
        chances = torch.softmax(
            torch.stack([v * torch.exp(torch.tensor(-d / 4.5)) for v, d in zip(row, near, strict=True)]), 0
        )
        moved.append(sum(float(c) * torch.tensor(p) for c, p in zip(chances, places, strict=True)))
    for point, end in zip(points.tolist(), found, strict=True):
        weights = []
        for y, x in places:
            far = ((y - point[0]) ** 2 + (x - point[1]) ** 2 + 1e-5) ** 0.5
            weights.append(max(1.45 * step - far, 0))
        expected = sum(w * m for w, m in zip(weights, moved, strict=True)) / sum(weights)
        torch.testing.assert_close(end.float(), expected.float(), rtol=0, atol=1e-5)


def test_the_middles_of_cells_are_asked_for_and_the_far_border_is_the_last_cell(monkeypatch):
    model = CHMNet(SMALL).eval()
    asked = []

    def same_place(source, target, points):
        asked.append(points)
        return points.expand(len(target), -1, -1)

    monkeypatch.setattr(model, "transfer", same_place)
    others = torch.rand(3, 3, 20, 20)
    assert torch.equal(model.cells(torch.rand(3, 20, 20), others, (7, 7)), torch.arange(49).expand(3, 49))
    assert torch.equal(model.cells(torch.rand(3, 20, 20), others, (2, 5)), torch.arange(10).expand(3, 10))
    torch.testing.assert_close(asked[-1][:, 0], torch.tensor([-0.5] * 5 + [0.5] * 5))
    torch.testing.assert_close(asked[-1][:5, 1], torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8]))
    for end, cell in ((1.0, 48), (-1.0, 0)):
        monkeypatch.setattr(model, "transfer", lambda s, t, p, end=end: torch.full((len(t), len(p), 2), end))
        assert torch.equal(model.cells(torch.rand(3, 20, 20), others, (7, 7)), torch.full((3, 49), cell))
    # y is the row: a point in the upper right corner is cell 6, not 42
    monkeypatch.setattr(model, "transfer", lambda s, t, p: torch.tensor([-1.0, 1.0]).expand(len(t), len(p), 2))
    assert torch.equal(model.cells(torch.rand(3, 20, 20), others, (7, 7)), torch.full((3, 49), 6))


def test_many_pictures_are_matched_as_one_by_one():
    model = CHMNet(SMALL).eval()
    with torch.no_grad():
        nn.init.uniform_(model.hough4.weight, 0, 40)
    image, others = torch.rand(3, 30, 30), torch.rand(10, 3, 40, 40)
    together = model.cells(image, others, (7, 7))
    assert torch.equal(together, torch.cat([model.cells(image, o[None], (7, 7)) for o in others]))


def test_a_tied_network_reads_both_pictures_with_the_same_weights():
    model = CHMNet(replace(SMALL, tied=True)).eval()
    x, y = torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad():
        forth, back = model(torch.cat((x, y), 1)), model(torch.cat((y, x), 1))
    # psi kernels do not tell the two pictures apart
    torch.testing.assert_close(forth, back.mT)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kernel": "psy"}, "did you mean 'psi'"),
        ({"window": 4}, "is odd, not 4"),
        ({"depths": (1,)}, "one entry a stage"),
        ({"scales": ()}, "one scale at least"),
        ({"spread": 0.0}, "must be above 0"),
        ({"reach": 0.5}, "has none near it"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(OptionError, match=message):
        CHMNet(replace(SMALL, **change))


def test_pictures_that_are_no_pairs_are_refused():
    model = CHMNet(SMALL)
    with pytest.raises(ShapeError, match=r"\(B, 6, Y, Y\), square"):
        model(torch.randn(1, 6, 32, 48))
    with pytest.raises(ShapeError, match=r"\(B, 6, Y, Y\), square"):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ShapeError, match=r"must be \(P, 2\)"):
        model.transfer(torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32), torch.zeros(3))


def test_weights_that_do_not_fit_are_refused():
    weights = Plain(SMALL.dims, SMALL.depths, "iso").state_dict()
    with pytest.raises(OptionError, match="tied=False"):
        CHMNet(replace(SMALL, tied=True)).load_released(weights)
    with pytest.raises(ShapeError, match=r"hough6.weight must be \(4, 55\)"):
        CHMNet(SMALL).load_released(weights)
    del weights["learner.conv2ds.1.weight"]
    with pytest.raises(OptionError, match=r"without a source: \['narrow.1.weight'\]"):
        CHMNet(replace(SMALL, kernel="iso")).load_released(weights)


@pytest.mark.slow
def test_a_matching_network_learns_how_pictures_are_shifted(record):
    """Pictures of 56 x 56 cut from one texture up to 16 pixels apart, with noise; cells of 8 x 8 pixels."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    settings = CHMSettings(stem_dim=16, dims=(32, 64), depths=(1, 1), tied=True, side=56, spread=4.0)
    model = CHMNet(settings)
    middles = (torch.arange(7) + 0.5) / 7 * 2 - 1
    points = torch.cartesian_prod(middles, middles)

    def draw(count):
        world = F.interpolate(torch.rand(count, 3, 22, 22, generator=generator), (88, 88), mode="bilinear")
        shifts = torch.randint(-16, 17, (count, 2), generator=generator)
        cut = [w[:, 16 + y : 72 + y, 16 + x : 72 + x] for w, (y, x) in zip(world, shifts.tolist(), strict=True)]
        target = torch.stack(cut) + 0.1 * torch.randn(count, 3, 56, 56, generator=generator)
        ends = points - shifts[:, None] / 28
        return world[:, :, 16:72, 16:72], target, ends, (ends.abs() < 1).all(-1)

    def within_a_cell():
        model.eval()
        right = []
        for _ in range(8):
            source, target, ends, inside = draw(8)
            with torch.no_grad():
                found = model.transfer(source, target, points)
            right.append((found - ends).norm(dim=-1)[inside] < 2 / 7)
        model.train()
        return round(float(torch.cat(right).float().mean()), 3)

    before = within_a_cell()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = 250
    for _ in range(steps):
        source, target, ends, inside = draw(8)
        loss = (model.transfer(source, target, points) - ends).square().sum(-1)[inside].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = within_a_cell()
    record({"points_within_a_cell": {"untrained": before, "trained": after}, "steps": steps, "batch": 8})
    assert before < 0.2 and after > 0.75
