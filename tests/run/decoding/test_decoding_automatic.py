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

import pytest
import torch
from decoding_models import PROMPT, check, decoder, eager, hooked
from helpers import assert_close, in_int8
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quantize
from quantize.native import build, toolchain
from quantize.run.decoding import passes
from quantize.run.generate import generate, generate_stream
from quantize.run.kv_cache import KVCache

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("compiled"),
]


def test_the_fast_path_is_taken_and_gives_the_same():
    """Greedy, sampled, ragged, penalized, with drafts and caches of each kind; logits are equal to
    rounding.
    """
    model = decoder(qk_norm=True)
    check(model)
    check(in_int8(model))
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
        generate(m, PROMPT, max_new_tokens=20, log_probs=True)[1] for m in (model, hooked(model))
    ]
    assert_close(*scores)


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


@pytest.mark.slow
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
    monkeypatch.setattr(toolchain, "compiled", lambda code, command: compiled.append(1) or content)
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
