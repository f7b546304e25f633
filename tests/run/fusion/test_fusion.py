"""Fused models give the model's answers, at every size, from a file that needs nothing of this
package.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_models import Image, randomized, same_at_other_sizes
from helpers import ZOO, assert_close, call, first_tensor, randn, run, zoo
from torch import nn

import quantize
from quantize.run.fusion import compare, fold, fuse, plan, torchscript
from quantize.run.fusion.equality import difference, outputs
from quantize.run.fusion.folded import Folded

pytestmark = [
    pytest.mark.usefixtures("no_clock"),
    pytest.mark.filterwarnings(
        "error:.*torch.jit.*:FutureWarning", "error:.*torch.jit.*:DeprecationWarning"
    ),
]


def counts(model: nn.Module, inputs: Any) -> dict[str, int]:
    return dict(plan(model, inputs).after)


# Equality.

FAST = ("bert", "resnet")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]
)
def test_zoo_is_equal_at_every_size(name: str, tmp_path: Path) -> None:
    """The saved file of each architecture answers like eager at other batch sizes and lengths, or
    refuses the size.
    """
    model, inputs = zoo(name)
    fuse(model, inputs).save(tmp_path / "fused.pt")
    fused = torchscript.load(str(tmp_path / "fused.pt"))
    assert_close(run(fused, inputs), run(model, inputs), factor=2)
    same_at_other_sizes(fused, model, inputs, refusal="dimension")


def test_extreme_values_pass_through() -> None:
    """Zeros, tiny and huge inputs give what eager gives."""
    model = randomized(Image())
    fused = fuse(model, randn(2, 3, 16, 16))
    for scale in (0.0, 1e-30, 1e6, 1e30):
        x = randn(2, 3, 16, 16) * scale
        assert difference(outputs(fused, x), outputs(model, x)) <= 4e-5


@pytest.mark.slow
def test_file_needs_only_torch(tmp_path: Path) -> None:
    """A process that never imports this package loads the file and gets the same numbers."""
    model, x = randomized(Image()), randn(2, 3, 16, 16)
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
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) <= 2e-5


def test_loaded_file_can_be_saved_again(tmp_path: Path) -> None:
    """Packed weights come back from a second generation of the file."""
    model, x = randomized(Image()), randn(2, 3, 16, 16)
    fuse(model, x).save(tmp_path / "a.pt")
    torchscript.load(str(tmp_path / "a.pt")).save(tmp_path / "b.pt")
    assert torch.equal(
        torchscript.load(str(tmp_path / "a.pt"))(x), torchscript.load(str(tmp_path / "b.pt"))(x)
    )


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

    def forward(
        self, x: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor], flag: bool = False
    ) -> Answer:
        y = self.layer(x) + pair[0] * pair[1]
        return Answer(logits=-y if flag else y, hidden=(x, y))


def test_fused_models_return_the_model_own_types(tmp_path: Path) -> None:
    """The fused model returns the dataclass; its file a dict: nested fields under dotted names,
    without None.
    """
    model, inputs = (
        randomized(Structured()),
        {"x": randn(2, 4), "pair": (randn(2, 4), randn(2, 4)), "flag": True},
    )
    fused = fuse(model, inputs)
    expected = model(**inputs)
    for result in (fused(**inputs), copy.deepcopy(fused)(**inputs)):
        assert (
            isinstance(result, Answer) and result.loss is None and isinstance(result.hidden, tuple)
        )
        assert_close(result.logits, expected.logits)
    fused.save(tmp_path / "fused.pt")
    bare = torchscript.load(str(tmp_path / "fused.pt"))(**inputs)
    assert list(bare) == ["logits", "hidden.0", "hidden.1"]
    assert_close(bare["logits"], expected.logits)
    with pytest.raises(torch.jit.Error, match="flag"):
        fused(**{**inputs, "flag": False})


def test_fold_returns_what_the_model_returns() -> None:
    """An ordinary module with the model's own output type."""
    model, inputs = randomized(Structured()), (randn(2, 4), (randn(2, 4), randn(2, 4)))
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

    x = randn(3, 2)
    result = fuse(Net().eval(), (x,))(x)
    assert type(result) is kind
    assert difference(outputs(lambda _: result, x), [x + 1, x * 2]) == 0


def test_fixed_sizes_are_refused_by_name_and_free_ones_are_free() -> None:
    """A size that the model's code depends on can't be changed silently; the batch can, even from
    an example of one.
    """

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in range(x.shape[1]):
                x = x + i
            return x

    fused = fuse(Net().eval(), randn(1, 3))
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


class Counting(nn.Linear):
    """Reads and changes something that isn't in the model."""

    calls = 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.calls += 1
        return super().forward(x) * Counting.calls


@pytest.mark.parametrize("transform", [fuse, fold])
def test_models_that_read_more_than_themselves_are_refused(transform: Any) -> None:
    """A global counter in the code is no rounding error, however small a share of it the next step
    is.
    """
    with pytest.raises(ValueError, match="reads something that isn't in the model"):
        transform(Counting(8, 8).eval(), randn(2, 8))


def test_control_flow_on_data_is_refused_or_compiled() -> None:
    """Python deciding on a tensor's value is refused; what TorchScript can compile follows the
    data.
    """
    with pytest.raises(ValueError, match=r"Deciding.*data-dependent control flow"):
        fuse(Deciding().eval(), randn(3))
    fused = fuse(Choosing().eval(), torch.ones(3))
    assert torch.equal(fused(-torch.ones(3)), -torch.ones(3) - 1)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (nn.Linear(2, 2), randn(1, 2), ValueError, r"training mode.*model\.eval"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.Dropout().train()),
            randn(1, 2),
            ValueError,
            "'1' .Dropout. is in training mode",
        ),
        (
            nn.Linear(2, 2).eval(),
            torch.empty(1, 2, device="meta"),
            ValueError,
            "tensor 0 .* on meta and the model on cpu",
        ),
        (nn.Linear(2, 2).eval(), (), ValueError, "no tensor"),
        (nn.Linear(2, 2).eval(), object(), TypeError, "example_inputs.* object"),
        (Caching().eval(), randn(2), (TypeError, ValueError), "SomeCache.*use_cache=False"),
        ("model", randn(2), TypeError, "nn.Module"),
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
    model, x = randomized(Image()), randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="'tensorrt'; allowed: auto, torchscript"):
        fuse(model, x, backend="tensorrt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs openvino"):
        fuse(model, x, backend="openvino")


@pytest.mark.slow
def test_a_torch_without_torchscript_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` goes on with the other back ends and says why TorchScript is out."""
    monkeypatch.setattr(torchscript, "available", lambda: False)
    model, x = randomized(Image()), randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="no TorchScript: use backend='auto'"):
        fuse(model, x)
    monkeypatch.setattr(
        "quantize.run.fusion.backends.build", lambda program, name, tensors: Folded(program)
    )
    rows = {r.backend: r for r in compare(model, x, names=("torchscript", "inductor"))}
    assert (
        "no TorchScript" in rows["torchscript"].reason and rows["inductor"].latency_ms is not None
    )
    assert_close(fuse(model, x, backend="auto")(x), model(x))


# The model stays as it is; compressed models.


def test_model_and_random_state_are_untouched() -> None:
    """Fusing changes neither weights, flags, hooks nor torch's random state."""
    model, x = randomized(Image()), randn(2, 3, 16, 16)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    flags = [p.requires_grad for p in model.parameters()]
    fuse(model, x)
    fold(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert flags == [p.requires_grad for p in model.parameters()] and not any(
        m.training for m in model.modules()
    )


def test_hooks_are_fused_too() -> None:
    """A forward hook that changes the output changes the fused output."""
    model = randomized(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    x = randn(2, 4)
    assert_close(fuse(model, x)(x), model(x))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    """A head tied to the embedding doesn't double the file."""
    config = quantize.DecoderConfig(vocab_size=512, width=64, layers=1, heads=2, tied_head=True)
    model, ids = randomized(quantize.DecoderLM(config)), torch.arange(24).reshape(2, 12)
    fuse(model, ids).save(tmp_path / "fused.pt")
    tensors = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / "fused.pt").stat().st_size < tensors + 60_000


def test_int8_stays_int8() -> None:
    """A quantized model's fused file multiplies in int8, by what the profiler sees, and gives the
    same answers.
    """
    model = randomized(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)))
    x = randn(4, 64)
    int8 = quantize.quantize_dynamic(model)
    fused = fuse(int8, x)
    assert_close(fused(x), int8(x))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(x)
    ran = {e.key for e in profile.key_averages()}
    assert any("int_mm" in k or "qlinear" in k for k in ran) and not ran & {
        "aten::linear",
        "aten::addmm",
        "aten::mm",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_stay_half_in_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """16-bit weights are stored in 16 bits, whatever they are computed in."""
    model = randomized(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)))
    half, x = quantize.to_half(model, dtype), randn(4, 256)
    fuse(half, x).save(tmp_path / "fused.pt")
    assert_close(torchscript.load(str(tmp_path / "fused.pt"))(x), half(x), dtype=dtype)
    assert (tmp_path / "fused.pt").stat().st_size < 0.6 * sum(
        p.numel() * 4 for p in model.parameters()
    )


def test_folded_models_stay_in_memory(tmp_path: Path) -> None:
    """Saving says that `fuse` gives a file; a file that names the builder of earlier versions is
    refused; copies work.
    """
    model, x = randomized(Image()), randn(2, 3, 16, 16)
    folded = fold(model, x)
    assert torch.equal(copy.deepcopy(folded)(x), folded(x))
    for held in (folded, nn.Sequential(folded)):
        with pytest.raises(TypeError, match=r"fold.*quantize\.fuse"):
            quantize.save(held, tmp_path / "folded.pth")
    model.__dict__["_structure"] = [
        ("folded", {"edits": [], "inputs": {}, "keyword": False, "way": "simplified"}, "")
    ]
    quantize.save(model, tmp_path / "old.pth")
    with pytest.raises(quantize.CheckpointError, match="'folded'"):
        quantize.load(tmp_path / "old.pth", model=Image())


def test_weights_packed_for_a_folded_model_follow_changes() -> None:
    """A changed weight is seen, although the kernel reads a packed copy."""
    model, x = randomized(nn.Sequential(nn.Linear(4, 4))), randn(2, 4)
    folded = fold(model, x)
    before = folded(x)
    with torch.no_grad():
        for tensor in folded.buffers():
            tensor.mul_(2)
    assert_close(folded(x), before * 2)


def test_notes_of_the_model_and_of_fusing_go_with_the_result() -> None:
    """The summary of a fused or folded model has the steps before it, and how far the fused one is
    from the model.
    """
    model, x = quantize.to_half(randomized(Image())), randn(1, 3, 16, 16)
    for made, technique in ((fold(model, x), "fold"), (copy.deepcopy(fuse(model, x)), "fuse")):
        steps = quantize.summary(made).steps
        assert [s.technique for s in steps][-1] == technique and len(steps) == len(
            quantize.summary(model).steps
        ) + 1
        assert steps[-1].distance <= 1e-2


# The script.


def test_script_reports_a_mistake_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing file, a broken one and a flag out of range: one line, exit code 2, nothing
    written.
    """
    import fusion

    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    out = tmp_path / "out"
    for flags in (
        ["--model", str(tmp_path / "none.pth")],
        ["--model", str(broken)],
        ["--batch", "0"],
        ["--backend", "x"],
    ):
        assert fusion.main([*flags, "--out", str(out)]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.err.startswith("fusion.py: ")
    assert not out.exists()


@pytest.mark.slow
def test_script_fuses_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script writes the fused file, its numbers and a chart, and what it prints is what it
    measured.
    """
    import json

    import fusion

    model = randomized(quantize.ConvNet(quantize.ConvNetConfig(widths=(8, 16))))
    quantize.save(model, tmp_path / "model.pth")
    assert fusion.main(["--out", str(tmp_path), "--batch", "2"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.pth",
        "model_fused.pt",
        "model_fused.json",
        "model_fused.png",
    }
    report = json.loads((tmp_path / "model_fused.json").read_text())
    assert report["kernel_calls"]["fused"] < report["kernel_calls"]["eager"]
    assert max(report["difference"].values()) <= 1e-5
    x = model.example_inputs(2)
    assert_close(
        torchscript.load(str(tmp_path / "model_fused.pt"))(x), first_tensor(call(model, x))
    )
    assert "BatchNorm layers folded" in capsys.readouterr().out
