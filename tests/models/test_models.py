import warnings
from dataclasses import asdict

import pytest
import torch
import transformers
from helpers import assert_close, tokens
from torch.export import Dim, export

from quantize.models import (
    MLP,
    ConvNet,
    ConvNetConfig,
    DecoderConfig,
    DecoderLM,
    MLPConfig,
    apply_rope,
    blocked_causal_attention,
    causal_attention,
    rope_table,
)
from quantize.models.published import our_name
from quantize.run.kv_cache import KVCache

TINY = {"vocab_size": 61, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 48}


def decoder(**changes):
    """A tiny decoder with no zero weights, so that every part matters."""
    torch.manual_seed(0)
    model = DecoderLM(DecoderConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


REFERENCES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        {"sliding_window": None},
    ),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
}


@pytest.mark.parametrize("family", REFERENCES)
@pytest.mark.parametrize("tied", [False, True])
def test_decoder_matches_transformers(family, tied):
    """With a transformers model's weights, the decoder gives its logits, for four families."""
    config_class, model_class, extra = REFERENCES[family]
    config = config_class(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        **extra,
    )
    torch.manual_seed(0)
    reference = model_class(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            # biases and norms start at 0 and 1: make them matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    qwen3 = family == "qwen3"
    model = decoder(
        tied_head=tied, qkv_bias=family == "qwen2", qk_norm=qwen3, head_dim=16 if qwen3 else None
    )
    weights = reference.state_dict()
    model.load_state_dict({our_name(name): value for name, value in weights.items()})
    text = tokens(2, 37)
    with torch.no_grad():
        assert (model(text) - reference(text).logits).abs().max() < 1e-4


def test_rope_depends_on_distance_only():
    """The product of a rotated query and key is a function of how far apart they stand."""
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)

    def product(i, j):
        turned = [
            apply_rope(x, *(t.double() for t in rope_table(torch.tensor([p]), 16, 1e4)))
            for x, p in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    assert abs(product(3, 1) - product(103, 101)) < 1e-4
    assert abs(product(3, 1) - product(3, 2)) > 1e-3


@pytest.mark.parametrize("block", [1, 4, 9, 128])
def test_attention_in_blocks_equals_torch(block):
    """Both ways to compute causal attention agree, grouped queries and a short last block included,
    in values and gradients.
    """
    q, k, v = (torch.randn(2, heads, 9, 8, requires_grad=True) for heads in (4, 2, 2))
    outputs = [causal_attention(q, k, v), blocked_causal_attention(q, k, v, block)]
    gradients = [torch.autograd.grad(output.square().sum(), (q, k, v)) for output in outputs]
    for one, other in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert_close(one, other)


@pytest.mark.slow
def test_traced_bfloat16_decoder_holds_for_every_length():
    """What is traced or exported at one length attends rightly at another, longer than a block."""
    model = decoder().bfloat16().requires_grad_(False)
    traced = torch.jit.trace(model, (tokens(1, 12),), check_trace=False)
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (tokens(2, 12),), dynamic_shapes=shapes).module()
    text = tokens(1, 200)
    expected = model.float()(text)
    model.bfloat16()
    for actual in (traced(text), exported(text)):
        assert (actual.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_decoder_is_causal():
    """Changing a token changes no logits before it."""
    model, text = decoder(), tokens(1, 12)
    changed = text.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 61
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_a_cache_changes_nothing(chunk):
    """Fed in pieces through a cache, the decoder gives the logits of the whole sequence."""
    model, text, pieces = decoder(), tokens(2, 15), []
    cache = KVCache.for_model(model, batch=2)
    with torch.no_grad():
        for start in range(0, 15, chunk):
            pieces.append(model(text[:, start : start + chunk], cache))
        assert (torch.cat(pieces, 1) - model(text)).abs().max() < 1e-4


def test_tied_head_is_one_tensor():
    """A tied decoder holds its embedding once."""
    model = decoder(tied_head=True)
    assert model.head.weight is model.embedding.weight
    untied = decoder()
    assert (
        sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in model.parameters())
        == 61 * 32
    )


def test_a_new_decoder_predicts_evenly():
    """Before training, an untied decoder gives every token the same probability."""
    logits = DecoderLM(DecoderConfig(**TINY))(tokens(1, 4))
    assert torch.equal(logits, torch.zeros(1, 4, 61))


class LowRank(torch.nn.Module):
    """A linear in two factors, standing for any replacement of one."""

    def __init__(self, linear, rank=4):
        super().__init__()
        self.first = torch.nn.Linear(linear.in_features, rank, bias=False)
        self.second = torch.nn.Linear(rank, linear.out_features, bias=linear.bias is not None)

    def forward(self, x):
        return self.second(self.first(x))


def shrink(linear, *, rows=None, columns=None):
    """Keep the first rows (outputs) or columns (inputs) of a linear, in place, as structured
    pruning does.
    """
    weight = linear.weight.data[:rows, :columns]
    linear.weight = torch.nn.Parameter(weight.clone())
    linear.out_features, linear.in_features = weight.shape


def variant(kind):
    if kind == "tied bias norm":
        return decoder(tied_head=True, qkv_bias=True, qk_norm=True)
    model = decoder()
    for block in model.blocks:
        if kind == "low rank":
            for parent, name in (
                (block.attention, "q"),
                (block.attention, "out"),
                (block.ffn, "down"),
            ):
                setattr(parent, name, LowRank(getattr(parent, name)))
        elif kind == "pruned":
            (
                shrink(block.ffn.gate, rows=24),
                shrink(block.ffn.up, rows=24),
                shrink(block.ffn.down, columns=24),
            )
            # one of two key-value groups
            (
                shrink(block.attention.q, rows=16),
                shrink(block.attention.out, columns=16),
            )
            shrink(block.attention.k, rows=8), shrink(block.attention.v, rows=8)
    return model.eval()


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        *(
            pytest.param(k, marks=pytest.mark.slow)
            for k in ("tied bias norm", "low rank", "pruned")
        ),
    ],
)
def test_decoder_exports_and_traces_with_free_batch_and_length(kind):
    """torch.export and TorchScript tracing give the eager logits at shapes they have not seen,
    compressed or not.
    """
    model = variant(kind)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)
        exported = export(
            model, (tokens(2, 9),), dynamic_shapes=({0: Dim("batch"), 1: Dim("length")},)
        ).module()
        traced = torch.jit.trace(model, (tokens(2, 9),))
        for shape in ((3, 20), (1, 5)):
            expected = model(tokens(*shape))
            assert (exported(tokens(*shape)) - expected).abs().max() < 1e-5
            assert (traced(tokens(*shape)) - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, inputs",
    [
        (
            ConvNet(ConvNetConfig(in_channels=3, widths=(8, 16, 16), blocks=2)),
            torch.randn(2, 3, 9, 12),
        ),
        (MLP(MLPConfig(in_features=36, hidden=(16,))), torch.randn(2, 1, 6, 6)),
    ],
    ids=["ConvNet", "MLP"],
)
def test_image_models_export_and_trace_with_free_batch(model, inputs):
    """The image models map [N, C, H, W] to [N, classes] in eager, exported and traced form
    alike.
    """
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exported = export(model, (inputs,), dynamic_shapes=({0: Dim("batch")},)).module()
        traced = torch.jit.trace(model, (inputs,))
        more = torch.cat([inputs, inputs.flip(-1), inputs])
        expected = model(more)
        assert expected.shape == (6, 10)
        assert (exported(more) - expected).abs().max() < 1e-5
        assert (traced(more) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        DecoderConfig(),
        DecoderConfig(**TINY),
        ConvNetConfig(widths=(8, 16)),
        MLPConfig(hidden=(4, 5)),
    ],
)
def test_configs_survive_json(config):
    """A config rebuilt from its plain values, lists for tuples, equals the first."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(config).items()
    }
    assert type(config)(**plain) == config


@pytest.mark.parametrize(
    "config_class, wrong",
    [
        (DecoderConfig, {"width": 0}),
        (DecoderConfig, {"layers": 1.5}),
        (DecoderConfig, {"heads": 4, "kv_heads": 3}),
        (DecoderConfig, {"head_dim": 7}),
        (DecoderConfig, {"rope_theta": float("nan")}),
        (DecoderConfig, {"norm_eps": -1e-5}),
        (DecoderConfig, {"tied_head": 1}),
        (ConvNetConfig, {"widths": ()}),
        (ConvNetConfig, {"widths": (8, 0)}),
        (MLPConfig, {"hidden": 256}),
        (MLPConfig, {"classes": 0}),
    ],
)
def test_configs_refuse_what_cannot_be(config_class, wrong):
    """A wrong field is named with the value given."""
    name = list(wrong)[-1]
    with pytest.raises(ValueError, match=rf"{config_class.__name__}\.{name} is"):
        config_class(**wrong)
