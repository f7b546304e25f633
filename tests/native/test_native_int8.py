"""The native int8 linear against the same arithmetic in stock PyTorch, bit for bit, on every
instruction set that this machine has.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from helpers import randn
from torch import Tensor

from quantize.native import build, cache, int8, int8_library, isa, toolchain
from quantize.nn import int8_kernels as kernels
from quantize.nn.int8 import Int8Linear

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

# Odd widths, several panels of outputs, several chunks of rows, rows below and above a tile.
SHAPES = [(1, 1, 1), (3, 5, 7), (17, 100, 33), (33, 70, 17), (40, 1030, 50), (600, 1000, 48)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 weight [n, k], scale [n], bias [n]."""
    return *kernels.quantize_weight(randn(n, k, seed=1)), randn(n, seed=2)


def stock(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return kernels.STOCK["reference"](x, weight, scale, bias)


@pytest.fixture(params=isa.levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels are those of one instruction set."""
    monkeypatch.setenv(isa.SWITCH, request.param)
    int8_library.functions.cache_clear()
    yield request.param
    int8_library.functions.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_stock_operations(level: str, shape: tuple[int, int, int], dtype: torch.dtype):
    """The same bits as the reference, with a bias and without, on one-sided rows too."""
    m, k, n = shape
    weight, scale, bias = weights(n, k)
    x = randn(m, k).to(dtype)
    x[m // 2 :] = x[m // 2 :].abs() + 1
    for b in (bias, None):
        assert torch.equal(int8.linear(x, weight, scale, b), stock(x, weight, scale, b))


def test_largest_sums(level: str):
    """Rows of 255 steps on weights of 127, where sums of 16 bits saturate, and their opposites."""
    weight = torch.full((40, 512), 127, dtype=torch.int8)
    weight[1::2] = -127
    x = torch.ones(20, 512)
    x[1::2] = -1
    y = int8.linear(x, weight, torch.ones(40), None)
    assert torch.equal(y, stock(x, weight, torch.ones(40), None))
    assert y[0, 0] > 127 * 511


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_batch_or_threads(level: str, dtype: torch.dtype, monkeypatch):
    """A row alone, in batches of every size up to two tiles, and on one to three threads."""
    weight, scale, bias = weights(100, 96)
    x = randn(67, 96).to(dtype)
    monkeypatch.setattr(int8, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = int8.linear(x, weight, scale, bias)
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for rows in (1, 3, 8, 16, 17, 33, 67):
            assert torch.equal(int8.linear(x[:rows], weight, scale, bias), expected[:rows])


def test_bad_rows_spoil_only_themselves(level: str):
    """NaN and infinities, at any place of a row, give a row of NaN; rows of zeros, of denormals and
    of the largest numbers give what the reference gives.
    """
    weight, scale, bias = weights(20, 37)
    x = randn(12, 37)
    x[1, 0], x[2, 36], x[3, 20] = math.nan, math.inf, -math.inf
    x[4] = 0
    x[5] = 1e-42
    x[6] = 3e38
    x[7] = -3e38
    x[8, ::2], x[8, 1::2] = 3e38, -3e38
    x[9] = -0.0
    y, expected = int8.linear(x, weight, scale, bias), stock(x, weight, scale, bias)
    assert y[1:4].isnan().all() and expected[1:4].isnan().all()
    good = [0, *range(4, 12)]
    assert torch.equal(y[good], expected[good])
    assert torch.equal(y[[4, 5, 9]], bias.expand(3, 20))


def test_half_to_even(level: str):
    """Values in the middle between two steps go to the even one, as torch.round has it."""
    x = torch.arange(-128, 128).float().repeat(2, 1)
    x[1] += 0.5
    x[1, 0], x[1, -1] = -127.5, 127.5
    weight = torch.eye(256, dtype=torch.int8)
    ones = torch.ones(256)
    assert torch.equal(int8.linear(x, weight, ones, None), stock(x, weight, ones, None))


def inputs(x: Tensor) -> dict[str, Tensor]:
    """Tensors of all kinds that end in 32 features."""
    return {
        "transposed": x.t().contiguous().t(),
        "sliced": randn(8, 64)[:, 7:39],
        "expanded": x[0].expand(5, 32),
        "expanded in the last axis": x[:, :1].expand(8, 32),
        "three axes": x.view(2, 4, 32),
        "one axis": x[0],
        "no rows": x[:0],
        "no rows, three axes": x[:0].view(2, 0, 32),
        "float64": x.double(),
        "needs a gradient": x.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(x.clone()),
        "negated lazily": torch.complex(x, x).conj().imag,
    }


@pytest.mark.parametrize("name", inputs(randn(8, 32)))
def test_inputs_of_all_kinds(name: str):
    """Whatever the layer is given, it gives what the reference gives, in the same dtype and
    shape.
    """
    weight, scale, bias = weights(16, 32)
    x = inputs(randn(8, 32))[name]
    with kernels.kernel("native"):
        y = kernels.linear(x, weight, scale, bias)
    expected = stock(x, weight, scale, bias)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], 16)
    assert torch.equal(y, expected)


def test_surroundings_do_not_matter():
    """Another default dtype, autocast, inference and grad mode, weights made in inference mode, and
    biases of other dtypes.
    """
    weight, scale, bias = weights(16, 32)
    x = randn(8, 32)
    expected = stock(x, weight, scale, bias)
    with kernels.kernel("native"):
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(kernels.linear(x, weight, scale, bias), expected)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(kernels.linear(x, weight, scale, bias), expected)
        with torch.inference_mode():
            assert torch.equal(kernels.linear(x + 0, weight, scale, bias), expected)
            own = weight.clone()
            assert torch.equal(kernels.linear(x, own, scale, bias), expected)
        assert torch.equal(kernels.linear(x, own, scale, bias), expected)
        for dtype in (torch.bfloat16, torch.float64):
            other = bias.to(dtype)
            y = kernels.linear(x, weight, scale, other)
            assert torch.equal(y, stock(x, weight, scale, other.float()))
        strided = torch.stack((bias, bias), 1)[:, 0]
        assert torch.equal(kernels.linear(x, weight, scale, strided), expected)


def test_integer_inputs_are_refused():
    """By name, as the stock kernels do."""
    weight, scale, bias = weights(16, 32)
    with kernels.kernel("native"), pytest.raises(TypeError, match=r"got torch\.int64"):
        kernels.linear(torch.ones(2, 32, dtype=torch.int64), weight, scale, bias)


def test_modes_see_stock_operations():
    """Where a mode watches operations, or a transform wraps the tensors, none is hidden in a
    call.
    """
    weight, scale, bias = weights(16, 32)
    x = randn(8, 32)
    expected = stock(x, weight, scale, bias)
    with kernels.kernel("native"):
        graph = torch.fx.experimental.proxy_tensor.make_fx(
            lambda x: kernels.linear(x, weight, scale, bias)
        )(x)
        assert "_int_mm" in graph.code or "mm" in graph.code
        assert torch.equal(graph(x), expected)
        one_by_one = torch.vmap(lambda row: kernels.linear(row, weight, scale, bias))(x)
        assert torch.equal(one_by_one, expected)
        with torch.device("cpu"):
            assert torch.equal(kernels.linear(x, weight, scale, bias), expected)


def test_the_operator():
    """`quantize::int8_linear` passes torch's own checks of registered operators, and a compiled
    layer calls it.
    """
    weight, scale, bias = weights(16, 32)
    x = randn(2, 4, 32)
    operator = torch.ops.quantize.int8_linear.default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, (x, weight, scale, bias), test_utils=tests)
    torch.library.opcheck(operator, (x, weight, scale, None), test_utils=tests)
    assert torch.equal(operator(x, weight, scale, bias), stock(x, weight, scale, bias))
    graphs = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    layer = Int8Linear(weight, scale, bias)
    compiled = torch.compile(layer, backend=keep, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert "quantize.int8_linear" in graphs[0].code


def test_a_changed_weight_is_packed_anew():
    """In place, by another tensor in its place, and at the address of one that died."""
    weight, scale, _ = weights(16, 32)
    x = randn(4, 32)
    for _ in range(3):
        assert torch.equal(int8.linear(x, weight, scale, None), stock(x, weight, scale, None))
        weight.neg_()
    weight.data = weights(16, 32)[0].neg_()
    assert torch.equal(int8.linear(x, weight, scale, None), stock(x, weight, scale, None))
    for seed in range(5):
        fresh = kernels.quantize_weight(randn(16, 32, seed=seed))[0]
        assert torch.equal(int8.linear(x, fresh, scale, None), stock(x, fresh, scale, None))
        del fresh


def test_packed_weights_die_with_their_weights():
    """Nothing is kept of a weight that is gone."""
    weight, scale, _ = weights(16, 32)
    x = randn(1, 32)
    int8.linear(x, weight, scale, None)
    int8.prefer(x, weight, scale, None)
    key = id(weight)
    packed = weakref.ref(int8.KNOWN[key])
    del weight
    assert key not in int8.KNOWN and packed() is None


def test_eight_threads_at_once(level: str):
    """Each gets what it gets alone, though all pack the same weight and some compute in
    parallel.
    """
    weight, scale, bias = weights(64, 128)
    inputs = [randn(40 * i + 1, 128, seed=i) for i in range(8)]
    expected = [stock(x, weight, scale, bias) for x in inputs]
    results: list[list[Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        for _ in range(10):
            results[i].append(int8.linear(inputs[i], weight, scale, bias))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, wanted in zip(results, expected, strict=True):
        assert len(found) == 10 and all(torch.equal(y, wanted) for y in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes(level: str, monkeypatch):
    """After the parent computed on two threads, which the child doesn't have."""
    monkeypatch.setattr(int8, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    weight, scale, bias = weights(64, 64)
    x = randn(64, 64)
    expected = int8.linear(x, weight, scale, bias)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(not torch.equal(int8.linear(x, weight, scale, bias), expected))
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_the_switch(monkeypatch):
    """QUANTIZE_ISA caps the instruction set; another value is refused by name."""
    monkeypatch.setenv(isa.SWITCH, "generic")
    assert isa.levels() == ["generic"]
    monkeypatch.setenv(isa.SWITCH, "sse9")
    with pytest.raises(ValueError, match=r"QUANTIZE_ISA must be one of .* got 'sse9'"):
        isa.levels()
    monkeypatch.delenv(isa.SWITCH)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_int8": True})
    assert isa.levels() == ["generic"]


def test_without_a_compiler(monkeypatch):
    """The layer gives the same bits from stock operations; to force native code says why not."""
    weight, scale, bias = weights(24, 40)
    x = randn(5, 40)
    expected = stock(x, weight, scale, bias)
    int8_library.functions.cache_clear()
    monkeypatch.setattr(build, "_outcomes", {})
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(kernels, "_chosen", {})
    try:
        assert torch.equal(kernels.linear(x, weight, scale, bias), expected)
        assert kernels.native not in kernels._chosen.values()
        fresh = weight.clone()
        with kernels.kernel("native"), pytest.raises(OSError, match=r"no C\+\+ compiler"):
            kernels.linear(x, fresh, scale, bias)
    finally:
        int8_library.functions.cache_clear()


def test_a_library_of_another_version_is_refused(monkeypatch):
    """A struct of another size, and a library without the functions."""
    with pytest.raises(OSError, match="lacks a symbol"):
        int8_library.read(ctypes.CDLL(None))
    code = int8_library.KERNELS.code("generic")
    if build.library(code).note is None:  # the compiler would make of it what is kept
        _, folder = cache.open_folder()
        content = cache.kept(folder, toolchain.kept_name(code, tuple(build.compiler())))
        os.close(folder)
        monkeypatch.setattr(toolchain, "compiled", lambda *_: content)
    monkeypatch.setattr(int8_library.ctypes, "sizeof", lambda kind: 8)
    monkeypatch.setattr(build, "_outcomes", {})
    with pytest.raises(OSError, match=r"structs of \[96, .*, not of \[8, "):
        build.library(code)
