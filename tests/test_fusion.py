"""Fused models give the model's answers, at every size, from a file that needs nothing of this package."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ZOO, assert_close, call, first_tensor, run, zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import quantize
from quantize import surgery
from quantize.fusion import compare, fold, folding, fuse, graph, kernels, plan, torchscript
from quantize.fusion.equality import difference, other_sizes, outputs
from quantize.fusion.folded import Folded

pytestmark = [
    pytest.mark.usefixtures("no_clock"),
    pytest.mark.filterwarnings("error:.*torch.jit.*:FutureWarning", "error:.*torch.jit.*:DeprecationWarning"),
]


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and BatchNorm statistics, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model.eval()


def rand(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def counts(model: nn.Module, inputs: Any) -> dict[str, int]:
    return dict(plan(model, inputs).after)


class Image(nn.Module):
    """Convolution, BatchNorm and activation with a residual add: what every CNN is made of."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor] = F.relu):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.bn1(self.stem(x)))
        x = self.activation(self.bn2(self.depthwise(x)) + x)
        return self.head(self.dropout(x.mean((2, 3))))


# Equality.

FAST = ("bert", "llama", "resnet", "mobilenet_v2")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_zoo_is_equal_at_every_size(name: str, tmp_path: Path) -> None:
    """The saved file of each architecture answers like eager at other batch sizes and lengths, or refuses the size."""
    model, inputs = zoo(name)
    fuse(model, inputs).save(tmp_path / "fused.pt")
    fused = torchscript.load(str(tmp_path / "fused.pt"))
    assert_close(run(fused, inputs), run(model, inputs), factor=2)
    answered = 0
    for other in other_sizes(inputs):
        try:
            expected = outputs(model, other)
        except Exception:
            continue
        try:
            actual = outputs(fused, other)
        except torch.jit.Error as error:
            assert "must" in str(error) and "dimension" in str(error)
            continue
        assert difference(actual, expected) <= 2e-5
        answered += 1
    assert answered >= 2  # twice the batch and a batch of one, at least


@pytest.mark.parametrize("activation", [F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, torch.tanh, torch.sigmoid])
def test_activation_joins_the_convolution(activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Each activation runs inside the kernel of the convolution before it; after the residual add, only ReLU has one."""
    model, x = seeded(Image(activation)), rand(2, 3, 16, 16)
    made = plan(model, x)
    assert_close(made.fused(x), model(x), factor=4)
    assert made.after["mkldnn._convolution_pointwise"] == made.after["mkldnn._convolution_pointwise.binary"] == 1
    assert made.after.total() == 4 + (activation is not F.relu)


def test_extreme_values_pass_through() -> None:
    """Zeros, tiny and huge inputs give what eager gives."""
    model = seeded(Image())
    fused = fuse(model, rand(2, 3, 16, 16))
    for scale in (0.0, 1e-30, 1e6, 1e30):
        x = rand(2, 3, 16, 16) * scale
        assert difference(outputs(fused, x), outputs(model, x)) <= 4e-5


@pytest.mark.slow
def test_file_needs_only_torch(tmp_path: Path) -> None:
    """A process that never imports this package loads the file and gets the same numbers."""
    model, x = seeded(Image()), rand(2, 3, 16, 16)
    fuse(model, x).save(tmp_path / "fused.pt")
    torch.save((x, model(x)), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "x, y = torch.load('expected.pt')\n"
        "z = torch.jit.load('fused.pt')(x)\n"
        "assert 'quantize' not in sys.modules\n"
        "print((z - y).abs().max().item() / y.abs().max().item())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) <= 2e-5


def test_loaded_file_can_be_saved_again(tmp_path: Path) -> None:
    """Packed weights come back from a second generation of the file."""
    model, x = seeded(Image()), rand(2, 3, 16, 16)
    fuse(model, x).save(tmp_path / "a.pt")
    torchscript.load(str(tmp_path / "a.pt")).save(tmp_path / "b.pt")
    assert torch.equal(torchscript.load(str(tmp_path / "a.pt"))(x), torchscript.load(str(tmp_path / "b.pt"))(x))


# The passes.

SMALL = st.integers(1, 3)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 3), per_in=st.integers(1, 3), per_out=st.integers(1, 3), bias=st.booleans(), transposed=st.booleans()
)
def test_scaled_output_is_the_layer_then_the_affine_map(
    groups: int, per_in: int, per_out: int, bias: bool, transposed: bool
) -> None:
    """`scaled_output` equals running the convolution and then scaling and shifting its channels."""
    inputs, out = groups * per_in, groups * per_out
    weight = rand(*((inputs, per_out) if transposed else (out, per_in)), 2, 2).double()
    b = rand(out, seed=2).double() if bias else None
    scale, shift, x = rand(out, seed=3).double(), rand(out, seed=4).double(), rand(2, inputs, 4, 4, seed=5).double()
    conv = F.conv_transpose2d if transposed else F.conv2d
    expected = conv(x, weight, b, groups=groups) * scale[:, None, None] + shift[:, None, None]
    assert_close(
        conv(x, *folding.scaled_output(weight, b, scale, shift, transposed=transposed, groups=groups), groups=groups), expected
    )


@settings(max_examples=30, deadline=None)
@given(groups=SMALL, per_in=SMALL, per_out=SMALL, bias=st.booleans())
def test_scaled_input_is_the_affine_map_then_the_layer(groups: int, per_in: int, per_out: int, bias: bool) -> None:
    """`scaled_input` equals scaling and shifting the channels of the input first."""
    weight = rand(groups * per_out, per_in, 2, 2).double()
    b = rand(groups * per_out, seed=2).double() if bias else None
    scale, shift = rand(groups * per_in, seed=3).double(), rand(groups * per_in, seed=4).double()
    x = rand(2, groups * per_in, 4, 4, seed=5).double()
    expected = F.conv2d(x * scale[:, None, None] + shift[:, None, None], weight, b, groups=groups)
    assert_close(F.conv2d(x, *folding.scaled_input(weight, b, scale, shift, groups=groups), groups=groups), expected)


NORMED = {
    "conv then norm": (nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "grouped conv then norm": (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "conv1d then norm": (nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
    "conv3d then norm": (nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 2, 4, 4, 4)),
    "linear then norm": (nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6)), (3, 5)),
    "transposed conv then norm": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "norm then conv without padding": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), (2, 4, 5, 5)),
    "norm then linear": (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6)), (3, 5)),
    "norm without weights": (nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)), (2, 4, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMED)
def test_batch_norm_disappears(name: str) -> None:
    """BatchNorm folds into the layer before it, or after it, with equal results."""
    model, size = NORMED[name]
    model, x = seeded(copy.deepcopy(model)), rand(*size)
    made = plan(model, x)
    assert_close(made.fused(x), model(x))
    assert not any("norm" in op for op in made.after)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)),  # the padding is zeros after the norm, not before
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),  # uses the batch's statistics
    ],
)
def test_batch_norm_stays_where_folding_would_be_wrong(model: nn.Module) -> None:
    """Norm before a padded convolution, and norm by the batch's own statistics, are kept and equal."""
    model, x = seeded(copy.deepcopy(model)), rand(2, 4, 5, 5)
    made = plan(model, x)
    assert_close(made.fused(x), model(x))
    assert any("norm" in op for op in made.after)


class Branch(nn.Module):
    """The convolution's own output is used as well: the norm after it must not change it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) * torch.relu_(y)


def test_shared_intermediate_results_stay_what_they_were() -> None:
    """A convolution with two readers, one of them in place, isn't changed for one of them."""
    model, x = seeded(Branch()), rand(2, 3, 4, 4)
    assert_close(fuse(model, x)(x), model(x))


@pytest.mark.parametrize("pad", [(1, 1, 1, 1), (0, 1, 0, 1), (2, 0, 1, 3), (0, 0, 0, 0)])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_moves_into_the_convolution(pad: tuple[int, ...], stride: int) -> None:
    """Explicit zero padding, even or uneven, becomes part of the convolution after it."""
    model = seeded(nn.Sequential(nn.ZeroPad2d(pad), nn.Conv2d(3, 4, 3, stride=stride, padding=1)))
    for size in (8, 9):
        x = rand(2, 3, size, size)
        made = plan(model, x)
        assert_close(made.fused(x), model(x))
        assert not any("pad" in op.split(".")[1] for op in made.after)


@pytest.mark.parametrize("word", ["same", "valid"])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (2, 1), (3, 2), (4, 1)])
@pytest.mark.parametrize(
    ("conv", "norm", "size"),
    [
        (nn.Conv1d, nn.BatchNorm1d, (2, 4, 9)),
        (nn.Conv2d, nn.BatchNorm2d, (2, 4, 8, 9)),
        (nn.Conv3d, nn.BatchNorm3d, (1, 4, 5, 6, 7)),
    ],
)
def test_padding_by_name_becomes_numbers(
    word: str, kernel: int, dilation: int, conv: type, norm: type, size: tuple[int, ...]
) -> None:
    """`padding="same"`, also where it is uneven, and `"valid"`: the norm folds all the same."""
    model = seeded(nn.Sequential(conv(4, 6, kernel, dilation=dilation, padding=word, groups=2), norm(6)))
    made = plan(model, rand(*size))
    assert_close(made.fused(rand(*size, seed=2)), model(rand(*size, seed=2)))
    assert not any("norm" in op or "pad" in op.split(".")[1] for op in made.after)


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.squeeze, self.excite, self.gate = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.expand(x))
        weights = self.gate(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return self.project(y * weights) + x


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid()])
def test_layers_on_one_pixel_become_linear(gate: nn.Module) -> None:
    """Squeeze and excitation runs as two linear layers with their activations inside, without copies between them."""
    model, x = seeded(Gated(gate)), rand(2, 4, 6, 6)
    made = plan(model, x)
    assert_close(made.fused(rand(5, 4, 7, 3)), model(rand(5, 4, 7, 3)))
    assert made.after["mkldnn._linear_pointwise"] == 2 and made.after["mkldnn._convolution_pointwise"] == 1
    assert made.after["aten.reshape"] == 2 and made.after.total() == 8


class Normed(nn.Module):
    """RMSNorm by torch, and as Llama's authors spell it, each before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight = nn.RMSNorm(16), nn.Parameter(torch.ones(16))
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a(self.norm(x))
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.b(self.weight * y)


def test_rms_norms_take_one_reduction() -> None:
    """RMSNorm, built in or spelt out, becomes one reduction; its scale goes into the linear layer; extremes agree."""
    model = seeded(Normed())
    made = plan(model, rand(3, 5, 16))
    assert made.after["aten.linalg_vector_norm"] == 2 and not any("rms_norm" in op or "pow" in op for op in made.after)
    assert any("2 norm and layer scales folded" in note for note in made.notes)
    for scale in (0.0, 1e-30, 1e-4, 1.0, 1e6, 1e30):
        x = rand(2, 7, 16) * scale
        assert difference(outputs(made.fused, x), outputs(model, x)) <= 1e-5


def test_small_linear_layers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is computed faster than a packed kernel starts keeps its operator."""
    monkeypatch.setattr(kernels, "SMALL", 1 << 19)
    model, x = seeded(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4096))), rand(4, 64)
    after = plan(model, x).after
    assert after["aten.linear"] == 1 and after["mkldnn._linear_pointwise"] == 1


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)
        self.out = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        k, v = self.k(y).repeat(1, 1, 2), self.v(y).repeat(1, 1, 2)
        return x + self.scale * self.out(torch.sigmoid(self.q(y) * k) * v)


def test_projections_merge_and_scales_fold() -> None:
    """Three projections of one input become one linear layer; norm and layer scales go into the weights."""
    model, x = seeded(Projections()), rand(2, 5, 16)
    made = plan(model, x)
    assert_close(made.fused(x), model(x))
    assert sum(n for op, n in made.after.items() if "linear" in op) == 2
    assert "aten.layer_norm" in made.after and made.after["aten.mul.Tensor"] == 2


def test_written_out_activations_are_recognised() -> None:
    """GPT-2's GELU and x * sigmoid(x), spelt in operators, run inside the linear kernel."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            x = 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))
            x = self.b(x)
            return x * torch.sigmoid(x)

    model, x = seeded(Net()), rand(3, 8)
    made = plan(model, x)
    assert_close(made.fused(x), model(x))
    assert set(made.after) == {"mkldnn._linear_pointwise"}


def test_constants_are_computed_once_and_small() -> None:
    """What depends on weights only (here a weight norm) is computed at fusing time."""
    model = seeded(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))))
    x = rand(3, 6)
    made = plan(model, x)
    assert_close(made.fused(x), model(x))
    assert set(made.after) == {"mkldnn._linear_pointwise"}


def test_without_packed_kernels_the_passes_still_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without oneDNN gets the simplified graph."""
    monkeypatch.setattr(kernels, "available", lambda: False)
    model, x = seeded(Image()), rand(2, 3, 16, 16)
    made = plan(model, x)
    assert made.way == "simplified" and "aten.batch_norm" not in made.after
    assert_close(made.fused(x), model(x))


# Inputs and outputs.


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    loss: torch.Tensor | None = None


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor], flag: bool = False) -> Answer:
        y = self.layer(x) + pair[0] * pair[1]
        return Answer(logits=-y if flag else y, hidden=(x, y))


def test_dataclass_output_becomes_a_dict_of_tensors() -> None:
    """Fields keep their names, nested ones get dotted names, None is left out; constants are checked."""
    model, inputs = seeded(Structured()), {"x": rand(2, 4), "pair": (rand(2, 4), rand(2, 4)), "flag": True}
    fused = fuse(model, inputs)
    result, expected = fused(**inputs), model(**inputs)
    assert list(result) == ["logits", "hidden.0", "hidden.1"]
    assert_close(result["logits"], expected.logits)
    with pytest.raises(torch.jit.Error, match="flag"):
        fused(**{**inputs, "flag": False})


def test_fold_returns_what_the_model_returns() -> None:
    """An ordinary module with the model's own output type."""
    model, inputs = seeded(Structured()), (rand(2, 4), (rand(2, 4), rand(2, 4)))
    folded = fold(model, inputs)
    result = folded(*inputs)
    assert isinstance(folded, nn.Module) and isinstance(result, Answer) and result.loss is None
    assert_close(result.logits, model(*inputs).logits)


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_containers_come_back_as_they_were(kind: type) -> None:
    """Tuples, lists and dicts of tensors, in and out."""

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"a": x + 1, "b": x * 2} if kind is dict else kind((x + 1, x * 2))

    x = rand(3, 2)
    result = fuse(Net().eval(), (x,))(x)
    assert type(result) is kind
    assert difference(outputs(lambda _: result, x), [x + 1, x * 2]) == 0


def test_fixed_sizes_are_refused_by_name_and_free_ones_are_free() -> None:
    """A size that the model's code depends on can't be changed silently; the batch can, even from an example of one."""

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in range(x.shape[1]):
                x = x + i
            return x

    fused = fuse(Net().eval(), rand(1, 3))
    assert torch.equal(fused(torch.zeros(5, 3)), torch.full((5, 3), 3.0))
    with pytest.raises(torch.jit.Error, match="dimension 1 must be 3"):
        fused(torch.zeros(1, 4))


# What is refused.


class Deciding(nn.Module):
    def forward(self, x: torch.Tensor, **unused: Any) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class Choosing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class Caching(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
        return x, type("SomeCache", (), {})()


def test_control_flow_on_data_is_refused_or_compiled() -> None:
    """Python deciding on a tensor's value is refused; what TorchScript can compile follows the data."""
    with pytest.raises(ValueError, match=r"Deciding.*data-dependent control flow"):
        fuse(Deciding().eval(), rand(3))
    fused = fuse(Choosing().eval(), torch.ones(3))
    assert torch.equal(fused(-torch.ones(3)), -torch.ones(3) - 1)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (nn.Linear(2, 2), rand(1, 2), ValueError, r"training mode.*model\.eval"),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout().train()), rand(1, 2), ValueError, "'1' .Dropout. is in training mode"),
        (nn.Linear(2, 2).eval(), torch.empty(1, 2, device="meta"), ValueError, "tensor 0 .* on meta and the model on cpu"),
        (nn.Linear(2, 2).eval(), (), ValueError, "no tensor"),
        (nn.Linear(2, 2).eval(), object(), TypeError, "example_inputs.* object"),
        (Caching().eval(), rand(2), (TypeError, ValueError), "SomeCache.*use_cache=False"),
        ("model", rand(2), TypeError, "nn.Module"),
    ],
)
def test_bad_input_is_named(model: Any, inputs: Any, error: Any, message: str) -> None:
    """What can't be fused says what and why."""
    if message.startswith("'1'"):
        model.train(False)[1].train()
    with pytest.raises(error, match=message):
        fuse(model, inputs)


def test_unknown_and_absent_back_ends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt back end, and one whose package isn't there."""
    model, x = seeded(Image()), rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="'tensorrt'; allowed: auto, torchscript"):
        fuse(model, x, backend="tensorrt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs openvino"):
        fuse(model, x, backend="openvino")


@pytest.mark.slow
def test_a_torch_without_torchscript_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` goes on with the other back ends and says why TorchScript is out."""
    monkeypatch.setattr(torchscript, "available", lambda: False)
    model, x = seeded(Image()), rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="no TorchScript: use backend='auto'"):
        fuse(model, x)
    monkeypatch.setattr("quantize.fusion.backends.build", lambda program, name, tensors: Folded(program))
    rows = {r.backend: r for r in compare(model, x, names=("torchscript", "inductor"))}
    assert "no TorchScript" in rows["torchscript"].reason and rows["inductor"].latency_ms is not None
    assert_close(fuse(model, x, backend="auto")(x), model(x))


# The model stays as it is; compressed models.


def test_model_and_random_state_are_untouched() -> None:
    """Fusing changes neither weights, flags, hooks nor torch's random state."""
    model, x = seeded(Image()), rand(2, 3, 16, 16)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    flags = [p.requires_grad for p in model.parameters()]
    fuse(model, x)
    fold(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert flags == [p.requires_grad for p in model.parameters()] and not any(m.training for m in model.modules())


def test_hooks_are_fused_too() -> None:
    """A forward hook that changes the output changes the fused output."""
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    x = rand(2, 4)
    assert_close(fuse(model, x)(x), model(x))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    """A head tied to the embedding doesn't double the file."""
    config = quantize.DecoderConfig(vocab_size=512, width=64, layers=1, heads=2, tied_head=True)
    model, ids = seeded(quantize.DecoderLM(config)), torch.arange(24).reshape(2, 12)
    fuse(model, ids).save(tmp_path / "fused.pt")
    tensors = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / "fused.pt").stat().st_size < tensors + 60_000


def test_int8_stays_int8() -> None:
    """A quantized model's fused file multiplies in int8, by what the profiler sees, and gives the same answers."""
    model = seeded(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)))
    x = rand(4, 64)
    int8 = quantize.quantize_dynamic(model)
    fused = fuse(int8, x)
    assert_close(fused(x), int8(x))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(x)
    ran = {e.key for e in profile.key_averages()}
    assert any("int_mm" in k or "qlinear" in k for k in ran) and not ran & {"aten::linear", "aten::addmm", "aten::mm"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_stay_half_in_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """16-bit weights are stored in 16 bits, whatever they are computed in."""
    model = seeded(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)))
    half, x = quantize.to_half(model, dtype), rand(4, 256)
    fuse(half, x).save(tmp_path / "fused.pt")
    assert_close(torchscript.load(str(tmp_path / "fused.pt"))(x), half(x), dtype=dtype)
    assert (tmp_path / "fused.pt").stat().st_size < 0.6 * sum(p.numel() * 4 for p in model.parameters())


def test_folded_model_is_saved_and_loaded(tmp_path: Path) -> None:
    """`quantize.save` keeps a folded model; loading rebuilds the graph from a fresh instance."""
    model, x = seeded(Image()), rand(2, 3, 16, 16)
    folded = fold(model, x)
    quantize.save(folded, tmp_path / "folded.pth")
    loaded = quantize.load(tmp_path / "folded.pth", model=seeded(Image(), seed=7))
    assert torch.equal(loaded(x), folded(x))
    assert torch.equal(copy.deepcopy(folded)(x), folded(x))


def test_weights_packed_for_a_folded_model_follow_changes() -> None:
    """A changed weight is seen, although the kernel reads a packed copy."""
    model, x = seeded(nn.Sequential(nn.Linear(4, 4))), rand(2, 4)
    folded = fold(model, x)
    before = folded(x)
    with torch.no_grad():
        for tensor in folded.buffers():
            tensor.mul_(2)
    assert_close(folded(x), before * 2)


def test_structure_record_of_a_folded_model_is_json() -> None:
    """The record names the builder and plain arguments, the edits before it included."""
    model = quantize.to_half(seeded(Image()))
    edits = surgery.structure(fold(model, rand(1, 3, 16, 16)))
    assert [e["builder"] for e in edits] == ["folded"]
    assert edits[0]["arguments"]["inputs"] == {"dict": {"x": {"tensor": [1, 3, 16, 16], "dtype": "float32"}}}
    assert {e["builder"] for e in edits[0]["arguments"]["edits"]} == {"half"}


# The script.


def test_script_reports_a_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file, a broken one and a flag out of range: one line, exit code 2, nothing written."""
    import fusion

    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    out = tmp_path / "out"
    for flags in (["--model", str(tmp_path / "none.pth")], ["--model", str(broken)], ["--batch", "0"], ["--backend", "x"]):
        assert fusion.main([*flags, "--out", str(out)]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.err.startswith("fusion.py: ")
    assert not out.exists()


@pytest.mark.slow
def test_script_fuses_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script writes the fused file, its numbers and a chart, and what it prints is what it measured."""
    import json

    import fusion

    model = seeded(quantize.ConvNet(quantize.ConvNetConfig(widths=(8, 16))))
    quantize.save(model, tmp_path / "model.pth")
    assert fusion.main(["--out", str(tmp_path), "--batch", "2"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"model.pth", "model_fused.pt", "model_fused.json", "model_fused.png"}
    report = json.loads((tmp_path / "model_fused.json").read_text())
    assert report["kernel_calls"]["fused"] < report["kernel_calls"]["eager"]
    assert max(report["difference"].values()) <= 1e-5
    x = fusion.example(model, 2)
    assert_close(torchscript.load(str(tmp_path / "model_fused.pt"))(x), first_tensor(call(model, x)))
    assert "BatchNorm layers folded" in capsys.readouterr().out


def test_capture_names_a_model_that_changes_its_buffers() -> None:
    """A model that counts its calls can't be a pure graph; it still runs as TorchScript compiles it."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x + self.calls

    with pytest.raises(graph.CaptureError, match="changes"):
        graph.capture(Counting().eval(), rand(2))
