"""The text of integer weights is the same, however it is cut into passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import helpers
import pytest
import torch
from helpers import randn, tokens
from torch import nn

import quantize
from quantize import surgery
from quantize.models import DecoderLM
from quantize.native import build, isa
from quantize.nn.int8_outliers import Int8OutlierLinear
from quantize.run.generate import generate
from quantize.run.kv_cache import KVCache

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("compiled"),
    pytest.mark.xdist_group("one arithmetic"),
]
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "int8": partial(quantize.quantize_dynamic, prefer="size"),
    "int4": quantize.quantize_weights,
}
NEW = 256
PROMPTS = [tokens(1, 3 + 12 * i, seed=i) for i in range(10)]


def trained_like() -> DecoderLM:
    """A decoder with outlier channels, as training makes them, and texts that don't repeat."""
    made = helpers.decoder(noise=0.35, width=64, ffn_width=96, head_dim=16, max_length=400)
    with torch.no_grad():
        made.embedding.weight[:, 5] *= 8
        for block in made.blocks:
            block.ffn.down.weight[7] *= 4
    return made


@pytest.fixture(scope="module", params=["int8", pytest.param("int4", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return KINDS[request.param](trained_like())


@pytest.fixture(scope="module")
def expected(model: nn.Module) -> list[torch.Tensor]:
    """The text of each prompt, alone and with a cache."""
    texts = [generate(model, prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    assert min(len(text[0, -NEW:].unique()) for text in texts) > 8
    return texts


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_without_a_cache(model, expected):
    """Every token from the whole text before it; two texts whole, since they take long, and all
    whole as one pass.
    """
    fast = quantize.for_decoding(model, backend="native")
    for i, (prompt, text) in enumerate(zip(PROMPTS, expected, strict=True)):
        new = NEW if i in (0, 5) else 32
        got = generate(model, prompt, max_new_tokens=new, cache=False)
        assert torch.equal(got, text[:, : prompt.shape[1] + new])
        with torch.no_grad():
            logits = fast(text, KVCache.for_model(model))
        assert torch.equal(logits.argmax(-1)[:, -NEW - 1 : -1], text[:, -NEW:])


@pytest.mark.slow
def test_in_a_batch(model, expected):
    """Ten rows of different length at once, with a cache and, some tokens, without."""
    rows = [prompt[0].tolist() for prompt in PROMPTS]
    texts = [text[0] for text in expected]
    together = generate(model, rows, max_new_tokens=NEW)
    assert all(torch.equal(a, b) for a, b in zip(together, texts, strict=True))
    together = generate(model, rows, max_new_tokens=16, cache=False)
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(together, texts, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["lookup", "itself rounded"])
def test_with_a_draft(model, expected, draft):
    """Right and wrong guesses, several in a pass."""
    if draft == "itself rounded":
        draft = copy.deepcopy(model)
        with torch.no_grad():
            draft.embedding.weight.add_(0.05 * randn(*draft.embedding.weight.shape))
    options = {"max_new_tokens": NEW, "draft": draft, "draft_tokens": 5}
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert torch.equal(generate(model, prompt, **options), text)


@pytest.mark.slow
def test_on_one_thread(model, expected, one_thread):
    """The order of sums isn't that of threads."""
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert torch.equal(generate(model, prompt, max_new_tokens=NEW), text)


def test_eight_threads_at_once(model, expected):
    """On one model that nobody has run yet, so that they pack its weights together."""
    shared = copy.deepcopy(model)
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda p: generate(shared, p, max_new_tokens=64), PROMPTS[:8]))
    for text, whole in zip(texts, expected[:8], strict=True):
        assert torch.equal(text, whole[:, : text.shape[1]])


def test_under_another_default_dtype(model, expected):
    """Nothing of a pass is made in the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        text = generate(model, PROMPTS[0], max_new_tokens=64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(text, expected[0][:, : text.shape[1]])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.int8])
def test_pieces_of_a_prompt_and_windows(model, dtype):
    """Bit for bit, whatever the cache's dtype, with and without a window, around every chunk."""
    check_pieces(model, dtype)


@pytest.mark.parametrize("heads, head_dim", [(3, 64), (8, 64), (8, 80)])
def test_without_special_instructions(heads, head_dim, monkeypatch):
    """Bit for bit over an int8 cache, by tiles and by vectors; what isn't a number in one text is
    none there and a number in the other.
    """
    changes = {"width": 64, "heads": heads, "kv_heads": 1, "head_dim": head_dim}
    decoder = helpers.decoder(**changes, max_length=400)
    with torch.no_grad():
        decoder.embedding.weight[60] = torch.nan
    model, ids = KINDS["int8"](decoder), tokens(2, 330).clamp(max=59)
    ids[1, 290] = 60
    best = logits_in_pieces(model, ids)
    monkeypatch.setenv(isa.SWITCH, "generic")
    plain = logits_in_pieces(model, ids)
    torch.testing.assert_close(plain, best, rtol=0, atol=0, equal_nan=True)
    assert best[0].isfinite().all() and best[1, :290].isfinite().all()
    assert best[1, 290:].isnan().all()


def logits_in_pieces(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    fast = quantize.for_decoding(copy.deepcopy(model), backend="native")
    cache = KVCache.for_model(model, batch=len(ids), dtype=torch.int8)
    with torch.no_grad():
        pieces = [fast(piece, cache) for piece in ids.split([270, 17, 1, 3, 1, 38], 1)]
    return torch.cat(pieces, 1)


def test_pieces_with_some_float_layers():
    """Of each dtype among integers; then all layers run natively."""
    skip = ["*.q", "*.down", "*.v"]
    mixed = quantize.quantize_dynamic(trained_like(), prefer="size", skip=skip)
    for dtype, layer in ((torch.float16, "q"), (torch.bfloat16, "v")):
        getattr(mixed.blocks[0].attention, layer).to(dtype)
    check_pieces(mixed, None)


def test_pieces_with_outlier_channels():
    """Layers that count a few channels in float run natively, close to their own forward."""
    model = trained_like()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    replacements = {}
    for i, layer in enumerate(layers):
        factor = 0.5 + randn(layer.in_features, seed=i).abs()
        channels = torch.arange(i % 5) * 3
        replacements[layer] = Int8OutlierLinear.from_outliers(layer.weight, None, factor, channels)
    model = surgery.replace(model, replacements)
    check_pieces(model, None)
    ids, fast = tokens(1, 60), quantize.for_decoding(model, backend="native")
    cache = KVCache.for_model(model)
    with torch.no_grad():
        got = torch.cat([fast(piece, cache) for piece in ids.split([50, 1, 9], 1)], 1)
        assert helpers.cosine(got, model(ids)) > 0.9999


def check_pieces(model: nn.Module, dtype: torch.dtype | None) -> None:
    fast = quantize.for_decoding(model, backend="native")
    ids = tokens(2, 390)
    assert fast.reason is None
    for window in (None, 40):
        found = []
        for sizes in ([390], [200, 190], [5, 251, 2, 1, 17, 1, 113]):
            cache = KVCache.for_model(model, batch=2, dtype=dtype, window=window)
            with torch.no_grad():
                found.append(torch.cat([fast(piece, cache) for piece in ids.split(sizes, 1)], 1))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
