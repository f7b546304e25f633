"""Fused models answer as the model does, with its own types, at every size."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import python
from fusion_models import Image, randomized, same_at_other_sizes
from helpers import ZOO, assert_close, randn, run, zoo
from torch import nn

from quantize.run.fusion import fold, fuse, torchscript
from quantize.run.fusion.equality import difference, outputs
from quantize.run.fusion.sizes import other_sizes

pytestmark = [
    pytest.mark.usefixtures("no_clock"),
    pytest.mark.filterwarnings(
        "error:.*torch.jit.*:FutureWarning", "error:.*torch.jit.*:DeprecationWarning"
    ),
]


# Equality.


@pytest.mark.parametrize("name", ZOO)
def test_zoo_is_equal_at_every_size(name: str, tmp_path: Path) -> None:
    """The saved file of each architecture answers like eager at other batch sizes and lengths, or
    refuses the size.
    """
    model, inputs = zoo(name, shallow=True)
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
@pytest.mark.xdist_group("fresh")
def test_file_needs_only_torch(tmp_path: Path) -> None:
    """A process that never imports this package loads the file and gets the same numbers."""
    model, x = randomized(Image()), randn(2, 3, 16, 16)
    fuse(model, x).save(tmp_path / "fused.pt")
    torch.save((x, model(x)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "x, y = torch.load('expected.pt')\n"
        "z = torch.jit.load('fused.pt')(x)\n"
        "assert 'quantize' not in sys.modules\n"
        "print((z - y).abs().max().item() / y.abs().max().item())"
    )
    done = python("-c", code, where=tmp_path)
    assert done.returncode == 0, done.stderr
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


class Bags(nn.Module):
    """Sums of a table's rows, as recommenders have them: where each begins is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(64, 32, mode="sum"), nn.Linear(32, 4)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids, offsets)).relu()


def test_offsets_ascend_in_inputs_of_other_sizes() -> None:
    """What torch gives where they don't is no answer to compare with."""
    inputs = torch.arange(40) % 64, torch.tensor([0, 3, 3, 29])
    assert all(bool((offsets.diff() >= 0).all()) for _, offsets in other_sizes(inputs))
    model = Bags().eval()
    fused = fuse(model, inputs)
    same_at_other_sizes(fused, model, inputs, refusal="must be")
