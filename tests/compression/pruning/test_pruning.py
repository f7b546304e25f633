"""Structured pruning: the smaller model is the masked one, whatever the architecture."""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import ZOO, assert_close, cosine, in_int8, run, zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quantize
from quantize import (
    ConvNet,
    ConvNetConfig,
    DecoderConfig,
    DecoderLM,
    generate,
    load,
    save,
    to_half,
)
from quantize.calibration import InputStatistics
from quantize.compression.distillation import make_student
from quantize.compression.low_rank import factorize_low_rank
from quantize.compression.pruning import prune_ln_structured, scores, summary
from quantize.compression.pruning.budget import share_out


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def mlp() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 3)
        )
    )


class Branches(nn.Module):
    """A model of parts: subclasses give the layers and the forward."""

    def __init__(self):
        super().__init__()
        self.build()


class Concat(Branches):
    def build(self):
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.out = nn.Conv2d(24, 5, 1)

    def forward(self, x):
        return self.out(torch.cat([self.a(x).relu(), self.b(x).sigmoid()], 1))


class Residual(Branches):
    def build(self):
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.prelu, self.head = nn.PReLU(16), nn.Linear(16 * 16, 4)

    def forward(self, x):
        x = self.bn0(self.stem(x)).relu()
        x = self.prelu(x + self.bn1(self.conv(x)))
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Depthwise(Branches):
    def build(self):
        self.expand, self.depth = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.grouped, self.norm = nn.Conv2d(32, 48, 3, groups=8), nn.GroupNorm(12, 48)
        self.squeeze, self.excite = nn.Linear(48, 8), nn.Linear(8, 48)
        self.out = nn.Conv2d(48, 5, 1)

    def forward(self, x):
        x = self.norm(self.grouped(self.depth(self.expand(x).relu()).relu())).relu()
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return self.out(x * gate[:, :, None, None])


class Shuffle(Branches):
    """ShuffleNet's channel split and shuffle, then pixel shuffle and a transposed convolution."""

    def build(self):
        self.stem, self.branch = nn.Conv2d(3, 32, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.up = nn.Conv2d(32, 64, 1), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        a, b = self.stem(x).relu().chunk(2, 1)
        x = torch.cat([a, self.branch(b).relu()], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.out(self.up(F.pixel_shuffle(self.wide(x), 2)).relu())


class Gated(Branches):
    """A fused gate-and-up projection, a scale per channel and a tied reader."""

    def build(self):
        self.both, self.down = nn.Linear(8, 64), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x):
        a, b = self.both(x).chunk(2, -1)
        return self.down(F.gelu(a) * b * self.scale)


class Attention(Branches):
    """Fused QKV, matmul attention, and the number of heads written down in an attribute."""

    def build(self):
        self.num_heads, self.head_dim = 4, 8
        self.qkv, self.proj = nn.Linear(16, 96), nn.Linear(32, 16)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(b, t, 3, self.num_heads, self.head_dim)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        scores = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


class Tied(Branches):
    """Input and output embedding share a weight; the residual stream has no norm, so it can
    shrink.
    """

    def build(self):
        self.embed, self.position = nn.Embedding(20, 16), nn.Parameter(torch.randn(1, 6, 16))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) + self.position
        return self.head(x + self.down(self.up(x).relu()))


class WrittenSize(Branches):
    """Has a size in its code: the first layer's channels can't go, the second's can."""

    def build(self):
        self.first, self.second, self.third = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.third(self.second(self.first(x).reshape(-1, 32)).relu())


class Padded(Branches):
    """Padding along two axes, of which one carries channels: of a linear's outputs, and of a
    convolution's.
    """

    def build(self):
        self.linear, self.conv = nn.Linear(8, 16), nn.Conv2d(3, 16, 3)
        self.read_linear, self.read_conv = nn.Linear(18, 4), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        wide = F.pad(self.linear(x), (1, 1, 1, 1))
        deep = F.pad(self.conv(x), (0, 0, 1, 1, 0, 8))
        return self.read_linear(wide).sum() + self.read_conv(deep)


class Blended(Branches):
    """A parameter meets channels and inputs in one operation: the channels stay, and the search for
    that ends.
    """

    def build(self):
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 4)
        self.shift = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.third(self.second(torch.addcmul(self.shift, self.first(x), x)).relu())


IMAGES = randn(2, 3, 8, 8)
SMALL = {
    "mlp": (mlp, randn(4, 8)),
    "concat": (Concat, IMAGES),
    "residual": (Residual, IMAGES),
    "depthwise": (Depthwise, IMAGES),
    "shuffle": (Shuffle, IMAGES),
    "gated": (Gated, randn(2, 5, 8)),
    "attention": (Attention, randn(2, 5, 16)),
    "tied": (Tied, torch.arange(12).view(2, 6)),
    "written_size": (WrittenSize, randn(4, 8)),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), randn(2, 5, 16)),
    "decoder": (
        lambda: DecoderLM(DecoderConfig(64, 32, 2, 4, 2, qkv_bias=True, qk_norm=True)),
        torch.arange(16).view(2, 8),
    ),
    "convnet": (lambda: ConvNet(ConvNetConfig(widths=(16, 32))), randn(2, 1, 8, 8)),
    "padded": (Padded, IMAGES),
    "blended": (Blended, randn(4, 8)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 16, 3, padding=1), nn.GELU(), nn.Conv1d(16, 4, 3)),
        randn(2, 3, 9),
    ),
}


def small(name: str):
    build, inputs = SMALL[name]
    model = seeded(build)
    for p in model.parameters():  # layers that start as zeros would hide a wrong cut
        if not p.detach().any():
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(2))
    return model, inputs


def state(model: nn.Module):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    flags = [m.training for m in model.modules()]
    return [(n, t.detach().clone(), t.requires_grad) for n, t in tensors], flags


def untouched(model: nn.Module, before) -> bool:
    after = state(model)
    return after[1] == before[1] and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(after[0], before[0], strict=True)
    )


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_pruned_equals_masked(name, calibrated):
    """The smaller model computes what the full one computes with zeros in the removed places."""
    model, inputs = small(name)
    before = state(model)
    options = {"amount": 0.5, "calibration": [inputs] if calibrated else None}
    pruned = prune_ln_structured(model, inputs, **options)
    masked = prune_ln_structured(model, inputs, masked=True, **options)
    assert size(pruned) < size(model) == size(masked)
    assert_close(run(pruned, inputs), run(masked, inputs), factor=10)
    assert untouched(model, before)


LARGEST = ("mobilenet_v2", "t5", "whisper")


def zoo_cases():
    """Every model at two amounts; without the slow tests the smaller ones at one."""
    for name in ZOO:
        marks = [pytest.mark.slow] if name in LARGEST else []
        yield pytest.param(name, 0.25, marks=pytest.mark.slow)
        yield pytest.param(name, 0.5, marks=marks)


@pytest.mark.parametrize(("name", "amount"), list(zoo_cases()))
def test_zoo(name, amount, tmp_path):
    """Models that others wrote: pruned equals masked, and the file loads into a fresh instance."""
    model, inputs = zoo(name)
    pruned = prune_ln_structured(model, inputs, amount=amount)
    masked = prune_ln_structured(model, inputs, amount=amount, masked=True)
    assert size(pruned) < size(model)
    assert_close(run(pruned, inputs), run(masked, inputs), factor=10)
    save(pruned, tmp_path / "pruned.pth")
    again = load(tmp_path / "pruned.pth", model=zoo(name, seed=1)[0])
    assert_close(run(again, inputs), run(pruned, inputs))


def test_groups():
    """Tied layers shrink together: the residual stream with its norms, gates with their pairs,
    heads with their queries.
    """
    model, inputs = small("residual")
    (group,) = summary(prune_ln_structured(model, inputs)).pruned
    assert group.layers == ["stem", "conv"] and (group.before, group.after) == (16, 8)
    model, inputs = small("decoder")
    pruned = prune_ln_structured(model, inputs)
    block = pruned.blocks[0]
    assert (
        block.attention.q.out_features,
        block.attention.k.out_features,
        block.attention.out.in_features,
    ) == (16, 8, 16)
    assert block.ffn.gate.out_features == block.ffn.up.out_features == block.ffn.down.in_features
    assert "averages over the channels" in summary(pruned).left["embedding"]
    model, inputs = small("depthwise")
    pruned = prune_ln_structured(model, inputs)
    assert (pruned.depth.groups, pruned.depth.in_channels, pruned.depth.out_channels) == (8, 8, 16)
    assert (pruned.grouped.groups, pruned.grouped.in_channels) == (4, 16)


def test_attributes_follow():
    """An attribute that counts heads is changed where the code needs it."""
    model, inputs = small("attention")
    pruned = prune_ln_structured(model, inputs)
    assert (pruned.num_heads, pruned.head_dim, pruned.qkv.out_features) == (2, 8, 48)


def test_written_size_is_left():
    """Where a size stands in the code, the group stays and the summary says so; asked for by name,
    it raises.
    """
    model, inputs = small("written_size")
    pruned = prune_ln_structured(model, inputs)
    assert pruned.first.out_features == 32 and pruned.second.out_features == 8
    assert "size written in" in summary(pruned).left["first"]
    with pytest.raises(ValueError, match=r"first.*size written in"):
        prune_ln_structured(model, inputs, amount={"first": 0.5})


@pytest.mark.parametrize("n", [1, 2, 3.5, math.inf])
def test_keeps_the_largest_norms(n):
    """The rows that stay are those with the largest Ln norm, as torch's ln_structured chooses."""
    model = mlp()
    norms = torch.linalg.vector_norm(model[0].weight, n, dim=1)
    pruned = prune_ln_structured(model, randn(2, 8), amount={"0": 0.5}, n=n)
    assert torch.equal(pruned[0].weight, model[0].weight[norms.topk(16).indices.sort().values])


def test_amounts():
    """0 changes nothing; a dict prunes what it names, by name or glob; skip leaves a layer's
    outputs whole.
    """
    model, x = mlp(), randn(4, 8)
    assert torch.equal(prune_ln_structured(model, x, amount=0.0)(x), model(x))
    widths = lambda m: (m[0].out_features, m[2].out_features)  # noqa: E731
    assert widths(prune_ln_structured(model, x, amount={"0": 0.25, "2": 0.5})) == (24, 12)
    assert widths(prune_ln_structured(model, x, amount={"[02]": 0.75})) == (8, 6)
    assert widths(prune_ln_structured(model, x, skip=["0"])) == (32, 12)
    assert widths(prune_ln_structured(model, x, amount=0.999)) == (4, 2)
    assert widths(prune_ln_structured(model, x, amount=0.4, round_to=16)) == (16, 16)


def test_global_scope_removes_more_where_less_matters():
    """With scope="global" a layer of small weights loses more than a layer of varied ones."""
    model, x = mlp(), randn(4, 8)
    with torch.no_grad():
        model[0].weight[:24] *= 1e-3
    pruned = prune_ln_structured(model, x, amount=0.4, scope="global")
    assert pruned[0].out_features < 16 and pruned[2].out_features > 16


class Stack(Branches):
    """Residual MLPs of one shape, of which the second does next to nothing."""

    def build(self):
        self.ups = nn.ModuleList(nn.Linear(8, 64) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(64, 8) for _ in range(3))
        self.downs[1].weight.data *= 1e-3

    def forward(self, x):
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(up(x).relu())
        return x


def test_alike_layers_share_what_is_removed():
    """With calibration, layers of one shape lose more where it costs less, together as much; named
    one by one, what is said.
    """
    model, x = seeded(Stack), randn(128, 8)
    plain = prune_ln_structured(model, x)
    widths = lambda m: [up.out_features for up in m.ups]  # noqa: E731
    assert widths(plain) == [32, 32, 32]
    shared = prune_ln_structured(model, x, calibration=[x])
    assert size(shared) == size(plain) and min(widths(shared)) == widths(shared)[1] == 8
    assert widths(prune_ln_structured(model, x, calibration=[x], scope="layer")) == [32, 32, 32]
    by_name = prune_ln_structured(
        model, x, calibration=[x], amount={f"ups.{i}": 0.5 for i in range(3)}
    )
    assert widths(by_name) == [32, 32, 32]
    error = lambda m: (run(m, x) - run(model, x)).square().mean()  # noqa: E731
    assert error(shared) < error(by_name)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=2, max_size=3),
    st.integers(1, 6),
)
@settings(deadline=None, derandomize=True)
def test_sharing_out_is_optimal_for_convex_costs(slopes, total):
    """The greedy walk finds the cheapest way to give `total` units where each further unit of a
    group costs no less.
    """
    costs = [torch.tensor([0.0, *sorted(s)]).cumsum(0) for s in slopes]
    given_ = share_out(costs, total, 1)
    ways = [w for w in itertools.product(range(5), repeat=len(costs)) if sum(w) == total]
    assert sum(given_) == total
    assert float(sum(c[k] for c, k in zip(costs, given_, strict=True))) == min(
        float(sum(c[k] for c, k in zip(costs, w, strict=True))) for w in ways
    )


def test_reconstruction_costs_are_what_a_refit_leaves():
    """The cost of removing k units is the least-squares error that remains without them, as the
    metric weighs it.
    """
    x, weight, half = (
        randn(200, 10).double() @ randn(10, 10).double(),
        randn(4, 10).double(),
        randn(4, 4).double(),
    )
    seen = InputStatistics()
    seen.update(x)
    reader = scores.Reader(weight, torch.arange(10).view(5, 2), seen, half.T @ half)
    order, costs = scores.reconstruction([reader], 3, ridge=0.0)
    for k in range(4):
        stays = torch.ones(10, dtype=torch.bool)
        stays[reader.places[order.argsort()[:k]].flatten()] = False
        target = x @ weight.T
        rest = target - x[:, stays] @ torch.linalg.lstsq(x[:, stays], target).solution
        assert_close(costs[k], (rest @ half.T).square().sum(), dtype=torch.float32, factor=100)


@pytest.mark.parametrize("size", [1, 3])
def test_units_go_in_the_order_of_the_plain_elimination(size):
    """Block by block, the factorization gives the order and the costs of inverting what is left
    after each removal.
    """
    units, step = 40, 2
    x = randn(300, units * size).double() @ randn(units * size, units * size).double()
    weight = randn(6, units * size).double()
    seen = InputStatistics()
    seen.update(x)
    reader = scores.Reader(weight, torch.arange(units * size).view(units, size), seen)
    score, costs = scores.reconstruction([reader], 30, ridge=1e-3, rounds=15)
    moment = seen.second_moment
    moment = moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment), dtype=x.dtype)
    scale = ((weight @ moment) * weight).sum()
    stays = torch.ones(units, dtype=torch.bool)

    def cost_of(gone: torch.Tensor) -> float:
        kept = ~gone.repeat_interleave(size)
        cross = weight @ moment[:, kept]
        fitted = torch.linalg.solve(moment[kept][:, kept], cross.T).T
        return float(((weight @ moment) * weight).sum() - (fitted * cross).sum()) / float(scale)

    for done in range(0, 30, step):
        tried = torch.full((units,), math.inf, dtype=torch.float64)
        for unit in stays.nonzero().flatten():
            gone = ~stays
            gone[unit] = True
            tried[unit] = cost_of(gone)
        chosen = tried.argsort()[:step]
        assert set(chosen.tolist()) == set(score.argsort()[done : done + step].tolist())
        stays[chosen] = False
        assert costs[done + step] == pytest.approx(cost_of(~stays), rel=1e-4)


def test_wide_convolutions_are_scored_by_whole_channels(monkeypatch):
    """Channels that are multiples of others cost nothing: half of them go, and nothing changes."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(2, 16, 5), nn.ReLU(), nn.Conv1d(16, 4, 7), nn.ReLU(), nn.Conv1d(4, 3, 1)]
    model, x = nn.Sequential(*layers).eval(), randn(4, 2, 64)
    with torch.no_grad():
        model[0].weight[8:] = 0.5 * model[0].weight[:8]
        model[0].bias[8:] = 0.5 * model[0].bias[:8]
    monkeypatch.setattr("quantize.compression.pruning.readers.WIDEST", 20)
    lines: list[str] = []
    pruned = prune_ln_structured(
        model, x, amount={"0": 0.5}, calibration=[x], round_to=1, progress=lines.append
    )
    assert pruned[2].in_channels == 8
    assert cosine(pruned(x), model(x)) > 1 - 1e-6
    assert any("by whole channels" in line and line.endswith(": 2") for line in lines)


def test_calibration_is_streamed():
    """One batch at a time is alive, and what is kept of them has the size of the layers."""
    model, alive = mlp(), []

    class Batches:
        def __iter__(self):
            for i in range(6):
                batch = randn(32, 8) + i
                alive.append(weakref.ref(batch))
                assert (
                    sum(ref() is not None for ref in alive) <= 2
                )  # the one in use, until the name is bound again
                yield batch

    prune_ln_structured(model, X, calibration=Batches())
    assert len(alive) > 6 and not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("score", ["activation", "reconstruction", "taylor"])
def test_dead_neurons_go_first(score):
    """Neurons that never fire are removed first, whatever their norm, and nothing changes."""
    model, x = mlp(), randn(64, 8)
    with torch.no_grad():
        model[0].weight[::2] *= 10
        model[0].bias[::2] = -1000.0
    loss = (lambda m, batch: m(batch).square().mean()) if score == "taylor" else None
    pruned = prune_ln_structured(
        model, x, amount={"0": 0.5}, calibration=[x], score=score, loss=loss
    )
    assert_close(pruned(x), model(x))


def test_repair_is_exact_for_redundant_channels():
    """Where removed channels are combinations of kept ones, the refit gives the same function
    back.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 3)).eval()  # 32 channels of rank 4
    x = randn(64, 4)
    pruned = prune_ln_structured(model, x, amount={"0": 0.5}, calibration=[x[:32], x[32:]])
    assert_close(pruned(x), model(x), factor=100)
    plain = prune_ln_structured(model, x, amount={"0": 0.5})
    assert cosine(plain(x), model(x)) < 0.95


@pytest.mark.parametrize("name", ["mlp", "residual", "decoder", "gated", "depthwise"])
def test_repair_helps(name):
    """On fresh data the repaired model is nearer to the original than the plain Ln choice."""
    model, example = small(name)
    draw = torch.Generator().manual_seed(3)

    def batch():
        if name == "decoder":
            return torch.randint(0, 64, (16, 8), generator=draw)
        return torch.randn(256, *example.shape[1:], generator=draw)

    calibration, fresh = [batch() for _ in range(4)], batch()
    plain = prune_ln_structured(model, example)
    repaired = prune_ln_structured(model, example, calibration=calibration)
    error = lambda m: (run(m, fresh) - run(model, fresh)).square().mean()  # noqa: E731
    assert error(repaired) < 0.8 * error(plain)


def test_constant_inputs():
    """A singular second moment (one row, dead inputs) gives a finite model."""
    model = mlp()
    x = torch.ones(1, 8)
    pruned = prune_ln_structured(model, x, calibration=[x, torch.zeros(1, 8)])
    assert torch.isfinite(pruned(x)).all()


def test_flags_and_type_stay():
    """The input keeps its training flags and gradients flags; the result is in eval mode with the
    same classes.
    """
    model, inputs = small("residual")
    model.train()
    model.stem.weight.requires_grad_(False)
    before = state(model)
    pruned = prune_ln_structured(model, inputs, calibration=[inputs])
    assert untouched(model, before) and model.training and not pruned.training
    assert [type(m) for m in pruned.modules()] == [type(m) for m in model.modules()]
    assert not pruned.stem.weight.requires_grad and pruned.conv.weight.requires_grad
    pruned.train()(inputs).sum().backward()


def test_twice(tmp_path):
    """A pruned model can be pruned again, saved and loaded into a fresh original."""
    model, inputs = small("attention")
    twice = prune_ln_structured(prune_ln_structured(model, inputs), inputs)
    assert twice.num_heads == 1 and twice.qkv.out_features == 24
    save(twice, tmp_path / "twice.safetensors")
    assert_close(
        run(load(tmp_path / "twice.safetensors", model=Attention()), inputs), run(twice, inputs)
    )


class Dynamic(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.b(self.a(-x))


X = randn(4, 8)
BAD = {
    "amount 1": ({"amount": 1.0}, ValueError, r"amount is 1.0; allowed: \[0, 1\)"),
    "amount negative": ({"amount": -0.1}, ValueError, "amount is -0.1"),
    "amount nan": ({"amount": math.nan}, ValueError, "amount is nan"),
    "amount text": ({"amount": "half"}, TypeError, "half"),
    "amount bool": ({"amount": True}, TypeError, "True"),
    "amount in dict": ({"amount": {"0": 2}}, ValueError, r"amount\['0'\] is 2"),
    "no names": ({"amount": {}}, ValueError, "empty dict"),
    "unknown name": ({"amount": {"layer": 0.5}}, ValueError, "'layer', which is not a module"),
    "no match": ({"amount": {"conv*": 0.5}}, ValueError, "conv"),
    "output layer": ({"amount": {"4": 0.5}}, ValueError, "'4'.*output of the model"),
    "no channels": ({"amount": {"1": 0.5}}, ValueError, "'1'.*no output channels"),
    "n 0": ({"n": 0}, ValueError, "n is 0"),
    "n negative": ({"n": -2}, ValueError, "n is -2"),
    "n nan": ({"n": math.nan}, ValueError, "n is nan"),
    "n text": ({"n": "fro"}, TypeError, "fro"),
    "skip unknown": ({"skip": ["nope"]}, ValueError, "nope"),
    "skip all": ({"skip": [nn.Linear]}, ValueError, "nothing in Sequential can be pruned"),
    "empty": ({"calibration": []}, ValueError, "calibration is empty"),
    "iterator": ({"calibration": iter([X])}, TypeError, "re-iterable"),
    "tensor": ({"calibration": X}, TypeError, "sequence of batches"),
    "wrong shape": ({"calibration": [randn(4, 9)]}, ValueError, "calibration"),
    "not finite": ({"calibration": [X * math.nan]}, ValueError, "not finite"),
    "score": ({"score": "best"}, ValueError, "best"),
    "score without data": ({"score": "activation"}, ValueError, "needs calibration"),
    "taylor without loss": ({"score": "taylor", "calibration": [X]}, ValueError, "loss"),
    "scope": ({"scope": "all"}, ValueError, "all"),
    "scope without data": ({"scope": "alike"}, ValueError, "scope='alike'.*needs calibration"),
    "weights not finite": (
        {"amount": {"2": 0.5}, "calibration": [X * 1e38 * 1e38]},
        ValueError,
        "not finite",
    ),
    "round_to": ({"round_to": 0}, ValueError, "round_to is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    """Bad input is refused with an error that names it, and the model stays as it was."""
    options, kind, message = BAD[case]
    model = mlp()
    before = state(model)
    with pytest.raises(kind, match=message):
        prune_ln_structured(model, X, **options)
    assert untouched(model, before)


@pytest.mark.parametrize(
    ("build", "inputs", "kind", "message"),
    [
        (
            lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 4)),
            X,
            ValueError,
            "'0'.*no shape yet",
        ),
        (mlp, randn(4, 9), ValueError, "doesn't run on example_inputs"),
        (mlp, 3, TypeError, "example_inputs"),
        (Dynamic, X, ValueError, "can't be exported"),
        (
            lambda: nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)),
            X,
            ValueError,
            "nothing in Sequential can be pruned",
        ),
        (nn.ReLU, X, ValueError, "nothing in ReLU can be pruned"),
        (lambda: "model", X, TypeError, "nn.Module"),
    ],
)
def test_bad_models(build, inputs, kind, message):
    """A model that doesn't run, can't be followed or has nothing to prune is refused by name."""
    with pytest.raises(kind, match=message):
        prune_ln_structured(build(), inputs)


def test_int8_is_refused():
    """Pruning comes before int8."""
    with pytest.raises(ValueError, match="prune before quantiz"):
        prune_ln_structured(in_int8(mlp()), X)


class FixedFilter(nn.Module):
    """A product with a buffer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(48, 3)
        self.register_buffer("fixed", torch.randn(48, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.linear(self.first(x).relu(), self.fixed).relu())


@pytest.mark.parametrize("score", ["magnitude", "taylor"])
def test_weights_kept_in_buffers_are_cut_too(score):
    """A fixed filter is pruned as the weight that it is."""
    model = seeded(FixedFilter)
    options = {"calibration": [X], "loss": lambda m, x: m(x).sum()} if score == "taylor" else {}
    options |= {"score": score, "repair": False}
    pruned, masked = (
        prune_ln_structured(model, X, masked=full, **options) for full in (False, True)
    )
    assert pruned.fixed.shape == (24, 16) and not pruned.fixed.requires_grad
    assert_close(pruned(X), masked(X))


def test_integer_buffers_are_no_weights():
    """A mask that is kept as bytes doesn't make a model one that was quantized."""
    model, x = mlp(), torch.randn(2, 8)
    model.register_buffer("mask", torch.ones(8, 8, dtype=torch.uint8))
    plain, masked = (quantize.prune_ln_structured(m, x, amount=0.5) for m in (mlp(), model))
    assert torch.equal(masked(x), plain(x))


def test_composes_with_low_rank(tmp_path):
    """Low-rank pairs shrink on their outside and keep their rank; pruned models can be factorized;
    both save and load.
    """

    def build():
        return seeded(
            lambda: nn.Sequential(
                nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 48)
            )
        )

    x = randn(64, 64)
    pairs = factorize_low_rank(build(), ratio=0.5)
    rank = pairs[0].rank
    pruned = prune_ln_structured(pairs, x, calibration=[x])
    assert (pruned[0].rank, pruned[0].out_features, pruned[2].in_features) == (rank, 48, 48)
    after = factorize_low_rank(prune_ln_structured(build(), x), ratio=0.5)
    for i, model in enumerate((pruned, after)):
        save(model, tmp_path / f"{i}.pth")
        assert_close(load(tmp_path / f"{i}.pth", model=build())(x), model(x))


def test_composes_with_int8(tmp_path):
    """A pruned and repaired model can be quantized, saved and loaded into a fresh original."""

    def build():
        return seeded(
            lambda: nn.Sequential(
                nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 48)
            )
        )

    x = randn(64, 64)
    pruned = prune_ln_structured(build(), x, calibration=[x])
    small = in_int8(pruned)
    save(small, tmp_path / "small.pth")
    again = load(tmp_path / "small.pth", model=build())
    assert cosine(small(x), pruned(x)) > 0.999
    assert_close(again(x), small(x))


def test_layers_with_unlike_heads_decode():
    """Where layers keep different numbers of heads, cached tokens are still the uncached ones."""
    model, inputs = small("decoder")
    with torch.no_grad():
        model.blocks[0].attention.out.weight *= 1e-3
    amount = {"blocks.0.attention.k": 0.5, "blocks.*.ffn.up": 0.5}
    pruned = prune_ln_structured(model, inputs, amount=amount, calibration=[inputs])
    assert [b.attention.k.out_features for b in pruned.blocks] == [8, 16]
    tokens = [generate(pruned, inputs, max_new_tokens=6, cache=cache) for cache in (True, False)]
    assert torch.equal(*tokens)


@dataclasses.dataclass
class Answer:
    y: torch.Tensor
    parts: tuple[torch.Tensor, ...]


class Odd(Branches):
    """Counts its calls, keeps a running mean and an activation, works in place on its input, draws
    random numbers, has an alias, reads a layer's weight itself, and has a layer that runs only when
    asked. Returns a dataclass.
    """

    def build(self):
        self.block = nn.Sequential(nn.Linear(8, 32), nn.ReLU(inplace=True), nn.Linear(32, 24))
        self.alias, self.read, self.last, self.idle = (
            self.block,
            nn.Linear(24, 32),
            nn.Linear(32, 4),
            nn.Linear(4, 4),
        )
        self.calls, self.history = 0, []
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, *, x, idle=False):
        self.calls += 1
        self.history.append(self.calls)
        self.mean.mul_(0.9).add_(x.mean(0) + torch.rand(8) * 0.1)
        x.sub_(self.mean)
        self.kept = F.linear(self.alias(x).relu(), self.read.weight, self.read.bias)
        y = self.last(self.kept) * self.calls
        return Answer(self.idle(y) if idle else y, (y.sum(),))


@pytest.mark.parametrize("calibrated", [False, True])
def test_state_stays(calibrated):
    """A model whose forward changes its state, its inputs and the random state stays as it is; the
    result starts there.
    """
    model, batch = Odd().eval(), {"x": randn(16, 8)}
    model(x=batch["x"].clone()).y.sum().backward()
    before, batch_before, random = state(model), batch["x"].clone(), torch.get_rng_state()
    options = {"calibration": [batch, batch]} if calibrated else {}
    pruned = prune_ln_structured(model, batch, **options)
    masked = prune_ln_structured(model, batch, **options, masked=True)
    assert untouched(model, before) and torch.equal(batch["x"], batch_before)
    assert torch.equal(torch.get_rng_state(), random)
    for result in (pruned, masked):
        assert (result.calls, result.history) == (model.calls, model.history) == (1, [1])
        assert torch.equal(result.mean, model.mean)
    assert set(quantize.summary(pruned).done) == {"block.0", "block.2", "read"}
    for seed in range(3):  # several calls, one after the other
        torch.manual_seed(seed)
        expected = masked(x=batch["x"].clone()).y
        torch.manual_seed(seed)
        assert_close(pruned(x=batch["x"].clone()).y, expected, factor=10)


class Experts(Branches):
    """Of two experts, one runs when asked."""

    def build(self):
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(2)
        )

    def forward(self, x, both=True):
        y = self.experts[0](x)
        return y + self.experts[1](x) if both else y


def test_what_calibration_never_reaches_is_left():
    """A layer whose readers no batch runs keeps its channels, by name; only when nothing else is
    left it is an error.
    """
    model, example, batches = Experts(), (X, True), [(X, False)]
    pruned = prune_ln_structured(model, example, calibration=batches)
    assert [e[0].out_features for e in pruned.experts] == [16, 32]
    assert "never reaches layer 'experts.1.2'" in quantize.summary(pruned).left["experts.1.0"]
    with pytest.raises(ValueError, match=r"never reaches layer 'experts.1.2'"):
        prune_ln_structured(model, example, calibration=batches, amount={"experts.1.0": 0.5})


PARAMETRIZED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "mask": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "parametrization": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_layers_whose_weight_is_computed_are_left(kind, stepped):
    """Under a parametrization, old or new, a layer stays, by name, with what it reads; other layers
    are pruned.
    """
    model = mlp()
    model[0] = PARAMETRIZED[kind](model[0])
    if stepped:
        model(X).sum().backward()
    pruned = prune_ln_structured(model, X, calibration=[X])
    notes = quantize.summary(pruned)
    assert set(notes.done) == {"2"} and "weight is computed" in notes.left["0"]
    assert_close(
        run(pruned, X),
        run(prune_ln_structured(model, X, calibration=[X], masked=True), X),
        factor=10,
    )


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("place", ["0.weight", "2.weight", "2.bias"])
def test_weights_that_are_not_finite_name_the_layer(place, value):
    """Channels with infinite weights or NaN are neither scored nor cut."""
    model = mlp()
    model.get_parameter(place).data.view(-1)[3] = value
    with pytest.raises(ValueError, match=f"layer '{place[0]}' has weights that are not finite"):
        prune_ln_structured(model, X)


def test_progress_names_layers():
    """Calibrated pruning says what it does, layer by layer."""
    lines = []
    prune_ln_structured(mlp(), X, calibration=[X], progress=lines.append)
    assert any("inputs of 2, 4" in line for line in lines) and any(
        "repairing 2" in line for line in lines
    )


def test_notes():
    """Every layer with channels is in the notes, as pruned or left, with the distance of the
    result's outputs.
    """
    model, inputs = small("written_size")
    pruned = prune_ln_structured(model, inputs)
    (step,) = quantize.summary(pruned).steps
    assert step.technique == "pruned" and step.done == {"second": "16 -> 8 channels"}
    assert set(step.left) == {"first", "third"} and summary(pruned).left == step.left
    distance = (run(pruned, inputs) - run(model, inputs)).norm() / run(model, inputs).norm()
    assert step.distance == pytest.approx(distance.item(), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["gpt2", pytest.param("llama"), pytest.param("t5", marks=pytest.mark.slow)]
)
def test_models_with_a_cache(name):
    """A decoder is pruned as it comes, with its cache on; where all layers agree, its config builds
    the pruned shapes.
    """
    model, inputs = zoo(name)
    model.config.use_cache = True
    feed_forward = {"gpt2": "*.c_fc", "llama": "*", "t5": "*.wi"}[name]
    pruned = prune_ln_structured(model, inputs, amount={feed_forward: 0.5})
    assert pruned.config.use_cache and model.config.use_cache
    with torch.device("meta"):
        built = type(pruned)(pruned.config)
    shapes = lambda m: {name: p.shape for name, p in m.named_parameters()}  # noqa: E731
    assert shapes(built) == shapes(pruned) != shapes(model)


class StepsOfFixedSize(nn.Module):
    """Keeps a state for generation, as a model of transformers does, of a size that only its config
    knows.
    """

    class config:
        use_cache = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        y = y + torch.zeros(32) if self.config.use_cache else y
        return self.third(self.second(y).relu())


@pytest.mark.parametrize(
    "shrink", [prune_ln_structured, lambda m, x: make_student(m, width=0.5, example_inputs=x)]
)
def test_a_cache_of_a_fixed_size_keeps_its_channels(shrink):
    """What only a call with the cache would show is tried too: the pruned model runs in both
    ways.
    """
    result = shrink(seeded(StepsOfFixedSize), X)
    assert result(X).shape == (len(X), 4)
    assert (result.first.out_features, result.second.out_features) == (32, 16)


def test_composes_with_half():
    """A model stored in 16 bits can be pruned."""
    half = to_half(mlp())
    pruned = prune_ln_structured(half, X, calibration=[X])
    masked = prune_ln_structured(half, X, calibration=[X], masked=True)
    assert size(pruned) < size(half)
    assert_close(run(pruned, X), run(masked, X), dtype=torch.float16)
