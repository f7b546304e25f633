"""`generate` decodes natively by itself: the same tokens as the model's own forward, whatever is
done to the model.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import helpers
import pytest
import torch
from helpers import assert_close
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import quantize
from quantize.models import DecoderLM
from quantize.native import build
from quantize.run.decoding import native, passes
from quantize.run.decoding.build import STEP
from quantize.run.generate import generate, generate_stream
from quantize.run.kv_cache import KVCache

decoder = partial(helpers.decoder, noise=0.2)
pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
PROMPT = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    build.library(STEP)


def eager(model: nn.Module, prompt: object = PROMPT, **options: object) -> torch.Tensor:
    """What `generate` gives when the model's own forward runs every pass: a hook has to be
    called.
    """
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(lambda *_: None)
    run = generate_stream(hooked, prompt, **{"max_new_tokens": 20} | options)
    list(run)
    assert "hooks" in run.reason
    return run.result


def check(model: nn.Module, reason: str | None = None, **options: object) -> None:
    """The tokens are those of the model's own forward, and native code runs, or doesn't for
    `reason`.
    """
    run = generate_stream(model, PROMPT, **{"max_new_tokens": 20} | options)
    list(run)
    assert run.reason is None if reason is None else reason in (run.reason or "")
    assert torch.equal(run.result, eager(model, **options))


def test_the_fast_path_is_taken_and_gives_the_same():
    """Greedy, sampled, ragged, penalized, with drafts and caches of each kind; logits are equal to
    rounding.
    """
    model = decoder(qk_norm=True)
    check(model)
    check(quantize.quantize_dynamic(model))
    for options in (
        {"temperature": 1.0, "seed": 3},
        {"repetition_penalty": 1.5},
        {"draft": "lookup", "draft_tokens": 3},
        {"draft": decoder(1), "draft_tokens": 2},
        {"cache": torch.bfloat16},
        {"cache": KVCache.for_model(model, window=9)},
    ):
        fresh = {name: copy.deepcopy(value) for name, value in options.items()}
        run = generate_stream(model, PROMPT, max_new_tokens=20, **fresh)
        list(run)
        assert run.reason is None and torch.equal(run.result, eager(model, **options))
    texts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    for ours, theirs in zip(
        generate(model, texts, max_new_tokens=9), eager(model, texts, max_new_tokens=9), strict=True
    ):
        assert torch.equal(ours, theirs)
    scores = [
        generate(m, PROMPT, max_new_tokens=20, log_probs=True)[1] for m in (model, _hooked(model))
    ]
    assert_close(*scores)


def _hooked(model: nn.Module) -> nn.Module:
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(lambda *_: None)
    return hooked


def _half(model: DecoderLM) -> None:
    model.bfloat16()


def _new_head(model: DecoderLM) -> None:
    model.head = decoder(7).head


def _new_weight(model: DecoderLM) -> None:
    model.blocks[0].ffn.up.weight = nn.Parameter(0.3 * torch.randn(48, 32))


def _in_place(model: DecoderLM) -> None:
    with torch.no_grad():
        model.blocks[1].attention.q.weight.mul_(-1.5)


def _data(model: DecoderLM) -> None:
    model.blocks[1].ffn_norm.weight.data.mul_(-1)


def _other_data(model: DecoderLM) -> None:
    model.norm.weight.data = torch.randn(32)


def _other_config(model: DecoderLM) -> None:
    model.config = replace(model.config, rope_theta=3.0)


class _Tripled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def _other_class(model: DecoderLM) -> None:
    model.blocks[0].ffn.down.__class__ = _Tripled


CHANGES: dict[str, Callable[[DecoderLM], None]] = {
    "in place": _in_place,
    ".data in place": _data,
    ".data replaced": _other_data,
    "weight replaced": _new_weight,
    "module replaced": _new_head,
    "class replaced": _other_class,
    "config replaced": _other_config,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_change_between_two_calls_is_seen(change, tied):
    """Of float weights and of those that are converted on the way (16-bit norms), by every road
    that torch has.
    """
    for kind in (lambda m: m, lambda m: m.bfloat16().float(), quantize.quantize_dynamic):
        model = kind(decoder(tied_head=tied and change != "module replaced"))
        if change == "weight replaced" and not isinstance(model.blocks[0].ffn.up, nn.Linear):
            continue
        if change in ("in place", "class replaced") and not isinstance(
            model.blocks[1].attention.q, nn.Linear
        ):
            continue
        before = generate(model, PROMPT, max_new_tokens=20)
        CHANGES[change](model)
        check(model, "_Tripled" if change == "class replaced" else None)
        assert not torch.equal(generate(model, PROMPT, max_new_tokens=20), before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_under_way_is_seen(change):
    """Between two tokens of a stream, as the model's own forward sees it; `for_decoding` follows
    too.
    """
    ready = decoder()
    models = [decoder(), _hooked(decoder()), quantize.for_decoding(ready, backend="native")]
    streams = [generate_stream(model, PROMPT, max_new_tokens=20) for model in models]
    for stream in streams:
        for _ in range(6):
            next(stream)
    for model in (*models[:2], ready):
        torch.manual_seed(1)
        CHANGES[change](model)
    for stream in streams:
        list(stream)
    assert (streams[0].reason is None) == (change != "class replaced") and streams[
        1
    ].reason is not None
    assert torch.equal(streams[0].ids, streams[1].ids) and torch.equal(
        streams[2].ids, streams[1].ids
    )


def test_a_hook_under_way_is_called():
    """A hook that is registered between two tokens is called from the next one on, and native code
    comes back after it.
    """
    model, calls = decoder(), []
    stream = generate_stream(model, PROMPT, max_new_tokens=20)
    next(stream), next(stream)
    assert stream.reason is None
    handle = model.blocks[1].ffn.register_forward_pre_hook(lambda *_: calls.append(1))
    next(stream), next(stream)
    assert len(calls) == 2 and "blocks.1.ffn has hooks" in stream.reason
    handle.remove()
    next(stream)
    assert len(calls) == 2 and stream.reason is None


def _parametrized(model: DecoderLM) -> None:
    parametrize.register_parametrization(model.blocks[0].ffn.up, "weight", nn.Tanh())


def _own_forward(model: DecoderLM) -> None:
    layer = model.blocks[0].ffn.up
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)


class _Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _subclass(model: DecoderLM) -> None:
    model.blocks[0].ffn.up.__class__ = _Doubled


class _Shown(torch.Tensor):
    """A tensor class of somebody else's: its memory needn't hold its numbers."""


def _tensor_class(model: DecoderLM) -> None:
    layer = model.blocks[0].ffn.up
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(_Shown))


def _eps(model: DecoderLM) -> None:
    model.blocks[0].ffn_norm.eps = 0.5


class _Wrapped(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *arguments: object) -> torch.Tensor:
        return 0.5 * self.block(*arguments)


def _wrapped(model: DecoderLM) -> None:
    model.blocks[1] = _Wrapped(model.blocks[1])


def _query_norm(model: DecoderLM) -> None:
    model.blocks[1].attention.q_norm = nn.LayerNorm(8)


STRANGE = {
    "a norm of queries": (_query_norm, "a LayerNorm stands where a Identity should"),
    "a wrapped block": (_wrapped, "it isn't made as a DecoderLM is"),
    "parametrized": (_parametrized, "ParametrizedLinear"),
    "a forward of its own": (_own_forward, "forward of its own"),
    "a subclass": (_subclass, "_Doubled"),
    "another tensor class": (_tensor_class, "another layout or class"),
    "float64": (lambda m: m.double(), "float64"),
    "another eps": (_eps, "eps"),
    "a layer in training mode": (lambda m: m.blocks[0].train(), "training mode"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_native_code_does_not_know_runs_by_itself(kind):
    """The model's own forward runs, whatever was done to a module, and the reason is given."""
    change, reason = STRANGE[kind]
    model = decoder()
    generate(model, PROMPT, max_new_tokens=3)
    change(model)
    if reason != "training mode":
        model.eval()
    run = generate_stream(model, PROMPT, max_new_tokens=20)
    list(run)
    assert reason in run.reason
    assert torch.equal(run.ids, generate(model, PROMPT, max_new_tokens=20, cache=False))


def test_replaced_methods_are_called(monkeypatch):
    """A method that somebody puts into a class of this package is what runs."""
    model, calls = decoder(), []
    forward = type(model.blocks[0].ffn).forward
    monkeypatch.setattr(
        type(model.blocks[0].ffn), "forward", lambda self, x: calls.append(1) or forward(self, x)
    )
    generate(model, PROMPT, max_new_tokens=5)
    assert len(calls) == 2 * 5


def test_those_who_watch_operators_see_them():
    """Autocast casts, a mode that counts floating-point operations counts them, a hook on every
    module is called.
    """
    model = decoder()
    cache = KVCache.for_model(model)
    with torch.no_grad():
        model(PROMPT, cache)
    run = passes.NativePasses(model)
    assert run(PROMPT[:, :1], cache, 1) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert run(PROMPT[:, :1], cache, 1) is None
    with FlopCounterMode(display=False):
        assert run(PROMPT[:, :1], cache, 1) is None
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert run(PROMPT[:, :1], cache, 1) is None
    handle.remove()
    assert run(PROMPT[:, :1], cache, 1) is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_defaults_do_not_matter(dtype):
    """Another default dtype, another default device, inference mode: the same tokens and
    log-probabilities in float32.
    """
    model, before = decoder(), torch.get_default_dtype()
    expected = generate(model, PROMPT, max_new_tokens=20, temperature=1.0, seed=0)
    torch.set_default_dtype(dtype)
    try:
        got, scores = generate(
            model, PROMPT, max_new_tokens=20, temperature=1.0, seed=0, log_probs=True
        )
        with torch.device("meta"), torch.inference_mode():
            rows = generate(model, [PROMPT[0].tolist()], max_new_tokens=20, temperature=1.0, seed=0)
            generate(model, [[1, 2], [3]], max_new_tokens=2, temperature=1.0)
    finally:
        torch.set_default_dtype(before)
    assert (
        torch.equal(got, expected)
        and torch.equal(rows[0], expected[0])
        and scores.dtype is torch.float32
    )


def test_a_model_made_in_inference_mode_runs():
    """Its tensors count no changes, and don't need to: they are read where they are."""
    with torch.inference_mode():
        model = decoder()
    expected = eager(model)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=20), expected)


def test_the_model_stays_as_it_was():
    """No attribute, no reference that outlives the run, no part in copies, pickles and states."""
    model = decoder()
    attributes, state = set(model.__dict__), {n: t.clone() for n, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    plain = pickle.dumps(model)
    stream = generate_stream(model, PROMPT, max_new_tokens=9)
    list(stream)
    assert set(model.__dict__) == attributes and len(pickle.dumps(model)) == len(plain)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    check(copy.deepcopy(model))
    check(pickle.loads(pickle.dumps(model)))
    weight, model_alive = weakref.ref(model.head.weight), weakref.ref(model)
    del model, stream
    gc.collect()
    assert weight() is None and model_alive() is None


def test_a_training_model_keeps_its_mode():
    """`generate` and `for_decoding`, in both back ends, leave every module's mode as it was."""
    model = decoder().train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    generate(model, PROMPT, max_new_tokens=3)
    for backend in ("native", "torchscript"):
        fast = quantize.for_decoding(model, backend=backend)
        assert torch.equal(
            generate(fast, PROMPT, max_new_tokens=9), generate(model, PROMPT, max_new_tokens=9)
        )
        assert not fast.training
    assert [module.training for module in model.modules()] == modes


def test_eight_threads_on_one_model():
    """Each gets its own tokens, from the model and from one made for decoding."""
    model = decoder()
    prompts = [torch.tensor([[i, i + 1, i + 2]]) for i in range(8)]
    expected = [eager(model, prompt) for prompt in prompts]
    for shared in (
        model,
        quantize.for_decoding(model),
        quantize.for_decoding(model, backend="torchscript"),
    ):
        results: dict[int, torch.Tensor] = {}

        def work(
            i: int, shared: nn.Module = shared, results: dict[int, torch.Tensor] = results
        ) -> None:
            results[i] = generate(shared, prompts[i], max_new_tokens=20)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(results[i], expected[i]) for i in range(8))


def test_a_forked_child_decodes_too():
    """With one thread, as torch's own operators need it after a fork."""
    model = decoder()
    expected = generate(model, PROMPT, max_new_tokens=9)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            code = int(not torch.equal(generate(model, PROMPT, max_new_tokens=9), expected))
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_compiling_waits_until_it_pays(monkeypatch, tmp_path):
    """Short texts don't start the compiler, until they have cost as much; what is kept is used at
    once.
    """
    compiled, content = [], b"not a library"
    monkeypatch.setattr(build, "_outcomes", {})
    monkeypatch.setattr(build, "_compile", lambda code, command: compiled.append(1) or content)
    monkeypatch.setattr(passes, "_run_without", 0)
    monkeypatch.setattr(passes, "WORTH_COMPILING", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = decoder()
    for _ in range(3):
        run = generate_stream(model, PROMPT, max_new_tokens=15)  # 14 passes of 2 layers
        list(run)
        assert not compiled and "doesn't pay" in run.reason
    run = generate_stream(model, PROMPT, max_new_tokens=15)
    list(run)
    assert (compiled and "invalid ELF header" in run.reason) or "file too short" in run.reason


def test_a_cache_of_another_model_is_refused():
    """By its own error, before native code writes into it: fewer layers, other heads, another
    width, more rows.
    """
    fast = quantize.for_decoding(decoder(), backend="native")
    with torch.no_grad():
        for other in (decoder(layers=1), decoder(kv_heads=1), decoder(head_dim=16)):
            cache = KVCache.for_model(other)
            other(PROMPT, cache)
            with pytest.raises(ValueError, match="another model"):
                fast(PROMPT[:, :1], cache)
        cache = KVCache.for_model(fast, batch=2)
        fast(PROMPT.expand(2, -1), cache)
        with pytest.raises(ValueError, match="don't fit a cache made for 2 rows"):
            fast(PROMPT[:, :1], cache)


def test_a_forked_cache_is_written_on_its_own_memory():
    """Copies of one row that share memory are taken apart before native code writes, whoever writes
    first.
    """
    model = decoder()
    fast, cache = quantize.for_decoding(model, backend="native"), KVCache.for_model(model)
    with torch.no_grad():
        model(PROMPT, cache)
        twin, expected = cache.fork(3), KVCache.for_model(model, batch=3)
        model(PROMPT.expand(3, -1), expected)
        fast(PROMPT[:, :1], cache)
        tokens = torch.tensor([[7], [8], [9]])
        assert_close(fast(tokens, twin), model(tokens, expected))
        assert twin.length == 6


def test_padding_longer_than_the_text_is_left_to_the_model():
    """A row that is nothing but padding sees itself there; natively it would see nothing."""
    model = decoder()
    fast = quantize.for_decoding(model, backend="native")
    pad, texts = torch.tensor([4, 0]), PROMPT.expand(2, -1)
    caches = [KVCache.for_model(model, batch=2) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            cache.reset(batch=2, pad=pad)
        for i in range(5):
            got, expected = (
                m(texts[:, i : i + 1], c) for m, c in zip((fast, model), caches, strict=True)
            )
            assert_close(got, expected)


def test_step_checks_every_tensor_of_the_cache():
    """A tensor of another dtype or shape is never handed to C++ as what it isn't."""
    model = decoder()
    step = native.Step(model)
    for spoil in (
        lambda layer: layer.tensors.update(k=layer.tensors["k"].double()),
        lambda layer: layer.tensors.update(v=layer.tensors["v"][:, :1]),
        lambda layer: layer.tensors.pop("v"),
        lambda layer: setattr(layer, "first", -3),
    ):
        cache = KVCache.for_model(model, block=64)
        with torch.no_grad():
            model(PROMPT, cache)
        spoil(cache._layers[1])
        assert step(PROMPT[:, :1], cache, 1) is None
