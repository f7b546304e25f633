"""The models of the contract, by name: the zoo that others wrote, our own, torch's own
transformers, and the odd ones.

`build(name)` gives a model and example inputs, the same for the same seed. A second seed gives a
fresh instance with other weights, as `quantize.load(path, model=...)` asks for.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from helpers import ZOO, randn, zoo
from torch import nn

from contract import odd_calls as calls
from contract import odd_layers as layers
from contract import odd_state as state
from quantize.models import MLP, ConvNet, ConvNetConfig, DecoderConfig, DecoderLM, MLPConfig

Made = tuple[nn.Module, Any]
Maker = Callable[[], Made]

ROWS = 4


def _ids(length: int = 12, vocabulary: int = 96) -> torch.Tensor:
    return (torch.arange(2 * length).reshape(2, length) * 5 + 1) % vocabulary


def _on_rows(cls: Callable[..., nn.Module], *arguments: Any, width: int = 32) -> Maker:
    """A maker of `cls(*arguments)` that is called with one tensor [ROWS, width]."""
    return lambda: (cls(*arguments), randn(ROWS, width, seed=1))


# ---------------------------------------------------------------------------------------------- the
# zoo


def _clip() -> Made:
    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
        "eos_token_id": 2,
    }
    sight = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=sight, projection_dim=32)
    inputs = {"input_ids": _ids(8), "pixel_values": randn(2, 3, 16, 16, seed=1)}
    return transformers.CLIPModel(config), inputs


def _mamba() -> Made:
    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=1, use_cache=False
    )
    return transformers.MambaForCausalLM(config), {"input_ids": _ids(6)}


_OTHERS: dict[str, Maker] = {"clip": _clip, "mamba": _mamba}


# ------------------------------------------------------------------------------------- ours and
# torch's


def _decoder() -> Made:
    config = DecoderConfig(vocab_size=96, width=32, layers=1, heads=4, kv_heads=2, max_length=64)
    return DecoderLM(config), _ids()


def _tied_decoder() -> Made:
    config = DecoderConfig(
        vocab_size=96, width=32, layers=1, heads=4, qk_norm=True, tied_head=True, max_length=64
    )
    return DecoderLM(config), _ids()


def _conv_net() -> Made:
    return ConvNet(ConvNetConfig(widths=(32, 64))), randn(ROWS, 1, 8, 8, seed=1)


def _mlp() -> Made:
    return MLP(MLPConfig(in_features=32, hidden=(64, 64))), randn(ROWS, 32, seed=1)


def _transformer() -> Made:
    model = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)
    return model, (randn(2, 6, 32, seed=1), randn(2, 5, 32, seed=2))


def _encoder() -> Made:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 1), randn(2, 6, 32, seed=1)


_OWN: dict[str, Maker] = {
    "decoder": _decoder,
    "tied decoder": _tied_decoder,
    "conv net": _conv_net,
    "mlp": _mlp,
    "nn.Transformer": _transformer,
    "nn.TransformerEncoder": _encoder,
}


# --------------------------------------------------------------------------------------------- odd
# ones


def _after_gradients(cls: Callable[..., nn.Module], *arguments: Any) -> Maker:
    """A model that has run with gradients: computed weights and kept activations are no leaves of
    the graph.
    """

    def make() -> Made:
        model, inputs = cls(*arguments), randn(ROWS, 32, seed=1)
        with torch.enable_grad():
            model(inputs).sum().backward()
        return model, inputs

    return make


def _in_dtype(dtype: torch.dtype) -> Maker:
    return lambda: (layers.Perceptron().to(dtype), randn(ROWS, 32, seed=1).to(dtype))


def _lazy() -> Made:
    return nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.LazyLinear(8)), randn(ROWS, 32, seed=1)


def _lazy_after_a_run() -> Made:
    model, inputs = _lazy()
    model(inputs)
    return model, inputs


def _compiled() -> Made:
    return torch.compile(layers.Perceptron(), backend="eager"), randn(ROWS, 32, seed=1)


def _compiled_in_place() -> Made:
    model = layers.Perceptron()
    model.compile(backend="eager")
    return model, randn(ROWS, 32, seed=1)


def _training() -> Made:
    return state.Regularized(), randn(ROWS, 32, seed=1)


def _partly_training() -> Made:
    return state.PartlyFrozenNorm(), randn(ROWS, 32, seed=1)


def _many_arguments() -> Made:
    xs = [randn(ROWS, 32, seed=1), randn(ROWS, 32, seed=2)]
    return calls.ManyArguments(), {
        "xs": xs,
        "extra": {"more": randn(ROWS, 32, seed=3)},
        "flag": True,
    }


def _replaced_forward() -> Made:
    model = layers.Perceptron()
    model.up = nn.Sequential(model.up, nn.ReLU(), nn.Linear(64, 64))
    model.mid.forward = functools.partial(layers.OwnLinear.forward, model.mid)
    return model, randn(ROWS, 32, seed=1)


_ODD: dict[str, Maker] = {
    "alias": _on_rows(layers.Alias),
    "unused layer": _on_rows(layers.Unused),
    "called twice": _on_rows(layers.CalledTwice),
    "shared weight": _on_rows(layers.SharedWeight),
    "tied": lambda: (layers.Tied(), _ids()),
    "tied transpose": _on_rows(layers.TiedTranspose),
    "weight_norm": _on_rows(layers.Computed, "weight_norm"),
    "spectral_norm": _on_rows(layers.Computed, "spectral_norm"),
    "prune mask": _on_rows(layers.Computed, "prune"),
    "weight_norm after a step": _after_gradients(layers.Computed, "weight_norm"),
    "spectral_norm after a step": _after_gradients(layers.Computed, "spectral_norm"),
    "prune mask after a step": _after_gradients(layers.Computed, "prune"),
    "parametrized weight_norm": _on_rows(layers.Computed, "new weight_norm"),
    "parametrized spectral_norm": _on_rows(layers.Computed, "new spectral_norm"),
    "parametrized orthogonal": _on_rows(layers.Computed, "orthogonal"),
    "reads dtype": _on_rows(layers.ReadsDtype),
    "reads first parameter": _on_rows(layers.ReadsFirst),
    "cosine head": _on_rows(layers.CosineHead),
    "lora": _on_rows(layers.Adapted, layers.LowRankAdapter),
    "merging lora": _on_rows(layers.Adapted, layers.MergingAdapter),
    "experts": lambda: (layers.Experts(), randn(16, 32, seed=1)),
    "dense experts": lambda: (layers.DenseExperts(), randn(16, 32, seed=1)),
    "conv1d of gpt2": _on_rows(layers.Gpt2Layer),
    "lstm": lambda: (layers.Recurrent(nn.LSTM), randn(ROWS, 6, 32, seed=1)),
    "gru": lambda: (layers.Recurrent(nn.GRU, True), randn(ROWS, 6, 32, seed=1)),
    "group norm": lambda: (layers.GroupNormed(), randn(ROWS, 3, 8, 8, seed=1)),
    "sound": lambda: (layers.Sound(), randn(ROWS, 4, 32, seed=1)),
    "custom function": _on_rows(layers.CustomFunction),
    "own linear": _on_rows(layers.HasOwnLinear),
    "bare parameter": _on_rows(layers.BareParameter),
    "sparse": lambda: (layers.SparseBag(), _ids()),
    "transposed view": _on_rows(layers.TransposedView),
    "frozen": _on_rows(state.Frozen),
    "gradients": _on_rows(state.WithGradients),
    "replaced forward": _replaced_forward,
    "bare linear": _on_rows(nn.Linear, 32, 64),
    "bare attention": lambda: (calls.SelfAttention(), randn(2, 6, 32, seed=1)),
    "convolutions": lambda: (calls.ImageAndFlag(), randn(ROWS, 3, 8, 8, seed=1)),
    "assigns buffer": _on_rows(state.AssignsBuffer),
    "changes buffer": _on_rows(state.ChangesBuffer),
    "running mean": _on_rows(state.RunningMean),
    "counts calls": _on_rows(state.CountsCalls),
    "lists calls": _on_rows(state.ListsCalls),
    "plain tensor": _on_rows(state.PlainTensor),
    "changes plain tensor": _on_rows(state.ChangesPlainTensor),
    "keeps activation": _on_rows(state.KeepsActivation),
    "hidden buffers": _on_rows(state.HiddenBuffers),
    "lazy cache": _on_rows(state.LazyCache),
    "adds hook": _on_rows(state.AddsHook),
    "noisy": _on_rows(state.Noisy),
    "training": _training,
    "partly training": _partly_training,
    "uncopyable": _on_rows(state.Uncopyable),
    "forward hook": _on_rows(state.Hooked, "forward"),
    "pre-hook": _on_rows(state.Hooked, "pre"),
    "keyword hooks": _on_rows(state.Hooked, "keywords"),
    "counting hook": _on_rows(state.Hooked, "counting"),
    "backward hook": _on_rows(state.Hooked, "backward"),
    "state hook": _on_rows(state.Hooked, "state"),
    "root hooks": _on_rows(state.Hooked, "root"),
    "in place": _on_rows(calls.InPlace),
    "in-place activation": _on_rows(calls.InPlaceActivation),
    "data dependent": _on_rows(calls.DataDependent),
    "loops": _on_rows(calls.Loops),
    "keywords only": lambda: (
        calls.KeywordsOnly(),
        {"x": randn(ROWS, 32, seed=1), "scale": randn(ROWS, 1, seed=2)},
    ),
    "many arguments": _many_arguments,
    "dict": _on_rows(calls.AnswersDict),
    "dataclass": _on_rows(calls.AnswersDataclass),
    "nested": _on_rows(calls.AnswersNested),
    "scalar": _on_rows(calls.AnswersScalar),
    "answers input": _on_rows(calls.AnswersInput),
    "own sequential": _on_rows(calls.ListOfLayers),
    "delegating": _on_rows(calls.Delegating),
    "float64": _in_dtype(torch.float64),
    "bfloat16": _in_dtype(torch.bfloat16),
    "float16": _in_dtype(torch.float16),
    "lazy": _lazy,
    "lazy after a run": _lazy_after_a_run,
    "compiled": _compiled,
    "compiled in place": _compiled_in_place,
}

ODD = (*_OWN, *_ODD)
FOREIGN = (*ZOO, *_OTHERS)
MODELS = (*ODD, *FOREIGN)


def build(name: str, seed: int = 0) -> Made:
    """A model with the random weights of `seed` and example inputs; in eval mode, but for those
    about training mode.
    """
    if name in ZOO:
        return zoo(name, seed, shallow=True)
    makers = _OWN | _ODD | _OTHERS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = makers[name]()
    if name != "training":
        model.eval()
    if name == "partly training":
        model.norm.train()
    return model, inputs


def batches(inputs: Any) -> list[Any]:
    """Calibration: the example inputs, and others of their form."""
    return [copy.deepcopy(inputs), _other(inputs)]


def _other(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _other(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_other(part) for part in value)
    if isinstance(value, torch.Tensor):
        return value.flip(0) if value.dtype == torch.bool else value.roll(1, -1)
    return value
