"""Leaving out blocks: which ones can go, and that the rest computes what it did."""

from __future__ import annotations

import pytest
import torch
import transformers
from compression.search.test_search import by_bytes
from torch import nn

import quantize
from quantize.compression.blocks import drop_blocks, find_blocks
from quantize.compression.recipe import Drop, Int8, Prune, Recipe
from quantize.compression.search import strategy

__all__ = ["by_bytes"]  # a fixture for the search below
INPUTS = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """x + out(relu(x)), of other widths where asked for."""

    def __init__(self, width: int = 16, out: int = 16) -> None:
        super().__init__()
        self.lin = nn.Linear(width, out)
        self.inner = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(self.inner(x))
        return x + y if x.shape == y.shape else y


class Residual(nn.Module):
    """Three blocks of one width, one that changes it, and one that runs twice."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block(), Block(16, 8)])
        self.twice = nn.ModuleList([Block(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        for block in [*self.twice, *self.twice]:
            x = block(x)
        return x


def test_blocks_are_what_gives_a_tensor_of_its_inputs_shape():
    """Not what is inside one, has no weights, changes the width or runs twice; nor plain layers in
    a sequence.
    """
    assert find_blocks(Residual().eval(), INPUTS) == ["blocks.0", "blocks.1", "blocks.2"]
    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    assert find_blocks(plain.eval(), INPUTS) == []


def test_models_that_write_with_a_cache_keep_their_layers():
    """A cache counts them."""
    config = quantize.DecoderConfig(width=16, layers=2, heads=2, max_length=8)
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert find_blocks(quantize.DecoderLM(config).eval(), ids) == []
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    assert find_blocks(gpt2, ids) == []


def test_the_rest_computes_what_it_did(tmp_path):
    """As the model with the blocks skipped by hand; kept by a file, under int8 too."""
    model = Residual().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = drop_blocks(model, ["blocks.0", "blocks.2"])
    with torch.no_grad():
        x = model.blocks[3](model.blocks[1](INPUTS))
        expected = model.twice[0](model.twice[0](x))
        assert torch.equal(small(INPUTS), expected)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert set(quantize.summary(small).done) == {"blocks.0", "blocks.2"}
    recipe = Drop(("blocks.0", "blocks.2")) >> Int8()
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.name == "dropped+int8"
    made = recipe(model)
    quantize.save(made, tmp_path / "small.safetensors")
    loaded = quantize.load(tmp_path / "small.safetensors", model=Residual())
    assert torch.equal(loaded(INPUTS), made(INPUTS))
    with pytest.raises(ValueError, match=r"no module 'blocks\.9'"):
        drop_blocks(model, ["blocks.9"])
    with pytest.raises(ValueError, match="no block is named"):
        drop_blocks(model, [])


@pytest.mark.slow
def test_a_search_leaves_out_what_hardly_matters(by_bytes, tmp_path):
    """Two blocks that add next to nothing go, and the fastest model is one without them."""
    model = Residual().eval()
    with torch.no_grad():
        for block in model.blocks[1:3]:
            block.lin.weight.mul_(1e-4)
            block.lin.bias.zero_()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(32, 16, generator=generator) for _ in range(2)]
    options = {"calibration": batches, "budget": {"max_loss": "3%"}, "progress": False}
    result = quantize.compress(model, INPUTS, **options, out=tmp_path)
    chosen = next(row for row in result.rows if row["name"] == result.file.stem)
    assert chosen["recipe"][0]["step"] == "Drop" and chosen["within"]
    assert {"blocks.1", "blocks.2"} <= set(chosen["recipe"][0]["blocks"])
    assert chosen["speedup"] == max(row["speedup"] for row in result.rows if row["within"])


@pytest.mark.slow
@pytest.mark.parametrize(("most", "count"), [(10.0, 3), (1e-9, 0)])
def test_a_search_leaves_out_as_much_as_a_target_needs(most, count, by_bytes, tmp_path):
    """No block is free, and nothing reaches the target: all but one go, if the loss allows it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4))).eval()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(32, 16, generator=generator) for _ in range(2)]
    budget = {"speedup": 1000, "max_loss": most}
    options = {"calibration": batches, "progress": False, "out": tmp_path}
    result = quantize.compress(model, INPUTS, **options, budget=budget)
    dropped = [len(strategy.dropped(row["recipe"])) for row in result.rows]
    assert not result.met and max(dropped) == count


@pytest.mark.slow
def test_a_folder_of_transformers_keeps_what_was_left_out(tmp_path):
    """Their own format would read random blocks back: it is refused, and ours opens again."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, vocab_size=32)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.arange(8)[None]
    blocks = find_blocks(model, ids)
    assert blocks == [f"bert.encoder.layer.{i}" for i in range(3)]
    small = drop_blocks(model, blocks[1:])
    with pytest.raises(ValueError, match="read back"):
        small.save_pretrained(tmp_path / "theirs")
    quantize.save_folder(small, tmp_path / "ours")
    opened = quantize.open_model(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, small(ids).logits)
        assert not torch.equal(model(ids).logits, small(ids).logits)
    pruned = (Drop(tuple(blocks[1:])) >> Prune(0.5))(
        model, quantize.Given(example_inputs=ids, calibration=[ids])
    )
    assert pruned.bert.encoder.layer[0].intermediate.dense.out_features == 16
