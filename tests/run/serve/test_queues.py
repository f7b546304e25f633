"""What waits together, what is let through of a text, what is kept of prompts: without a server."""

from __future__ import annotations

import asyncio
import ctypes
import math
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import decoder
from hypothesis import given
from hypothesis import strategies as st
from served_models import WORDS, net, write_folder
from starlette.testclient import TestClient
from transformers import BertConfig, BertModel

from quantize import quantize_dynamic, save
from quantize.models import ConvNet, ConvNetConfig
from quantize.run.decoding.passes import NativePasses
from quantize.run.generate.reader import CHUNK
from quantize.run.serve import Settings, app, open_served
from quantize.run.serve.batching import Batcher, Compute, Job, choose
from quantize.run.serve.metrics import Metrics
from quantize.run.serve.prefixes import LEAST, Prefixes
from quantize.run.serve.sequence import Sequence
from quantize.run.serve.served import Served
from quantize.run.serve.stopping import StopStrings
from quantize.run.serve.tensors import TensorModel
from quantize.run.serve.workers import in_a_thread


def jobs(*sizes: tuple[int, int, str]) -> list[Job]:
    """Jobs of (rows, length, key)."""

    async def make() -> list[Job]:
        return [Job(None, rows, length, key) for rows, length, key in sizes]

    return asyncio.run(make())


def test_the_oldest_goes_first_with_its_nearest():
    """Shortest first within the batch; padding counts; other shapes and lengths wait."""
    waiting = jobs((1, 30, "a"), (1, 90, "a"), (1, 28, "a"), (1, 30, "b"), (1, 27, "a"))
    assert choose(waiting, 70) == [waiting[2], waiting[0]]
    assert choose(waiting, 1) == [waiting[0]]
    assert choose(waiting, 10**6) == [waiting[i] for i in (4, 2, 0)]
    short = jobs((1, 2, "a"), (1, 4, "a"), (1, 5, "a"), (1, 3, "a"))
    assert choose(short, 10**6) == [short[i] for i in (0, 3, 1)]


@pytest.mark.parametrize(("short", "batches"), [(False, [10, 10, 5]), (True, [6, 4, 3])])
def test_a_batch_takes_no_longer_than_it_should(
    short: bool, batches: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Of many that wait, as many go as took so long before, or a quarter; fewer hold up the event
    loop; what is far too large goes alone.
    """
    sizes = []

    def run(batch: list[Job]) -> list[int]:
        sizes.append(len(batch))
        return [0] * len(batch)

    async def work() -> None:
        batcher = Batcher(run, Compute(), Settings(), short=lambda: short)
        batcher._note_pace([Job(None, 1, 10)], 0.01)  # 1000 a second: 100 in BATCH_S, 20 in SOON_S
        monkeypatch.setattr(batcher, "_note_pace", lambda jobs, seconds: None)
        await batcher.submit([Job(None, 1, 10) for _ in range(25)])
        await batcher.submit([Job(None, 4, 200)])
        batcher.compute.shutdown()

    asyncio.run(work())
    assert sizes[:3] == batches and sum(sizes) == 26 and sizes[-1] == 1


def test_what_is_soon_done_runs_in_the_event_loop():
    """Unless a call is under way already; what takes longer has its thread, and so have many rows
    whose pace nobody knows, and a model whose calls aren't short.
    """
    threads: list[str] = []

    def run(batch: list[Job]) -> list[int]:
        threads.append(threading.current_thread().name)
        return [0] * len(batch)

    async def work() -> None:
        compute = Compute()
        batcher = Batcher(run, compute, Settings())
        await batcher.submit([Job(None, 6, 1)])
        batcher._pace = math.inf
        await batcher.submit([Job(None, 5, 1)])
        batcher._pace = 1000.0
        await batcher.submit([Job(None, 1, 100)])
        batcher._pace = 1000.0
        await batcher.submit([Job(None, 1, 1)])
        batcher._pace = 1000.0
        released = threading.Event()
        under_way = asyncio.ensure_future(compute.run(released.wait))
        submitted = asyncio.ensure_future(batcher.submit([Job(None, 1, 1)]))
        while compute._calls < 2 and not submitted.done():
            await asyncio.sleep(0)
        released.set()
        await asyncio.gather(under_way, submitted)
        longer = Batcher(run, compute, Settings(), short=lambda: False)
        longer._pace = 1000.0
        await longer.submit([Job(None, 1, 1)])
        compute.shutdown()

    asyncio.run(work())
    own = threading.current_thread().name
    assert [name == own for name in threads] == [False, True, False, True, False, False]


def test_a_batch_is_chosen_from_the_oldest():
    """However near the lengths of those are that came after them."""
    waiting = jobs((1, 40, "a"), *[(1, 42, "a")] * 2, *[(1, 40, "a")] * 2, (1, 44, "a"))
    assert choose(waiting, 130) == [waiting[i] for i in (0, 1, 2)]
    assert choose(waiting, 170) == [waiting[i] for i in (0, 3, 1, 2)]


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_however_the_text_is_cut(text: str, stops: list[str]):
    """What is let through ends before the first stop string; pieces of one character or whole."""
    places = [text.find(stop) for stop in stops if stop in text]
    expected = text[: min(places)] if places else text
    for pieces in (list(text), [text]):
        strings = StopStrings(stops)
        passed = "".join([*map(strings.feed, pieces), strings.rest()])
        # A stop string that ends earlier is found before one that begins earlier.
        assert text.startswith(passed) and len(passed) >= len(expected)
        assert strings.stopped == bool(places)
    assert passed == expected


def test_prompts_are_kept_whole_or_in_whole_pieces():
    """What is found has the same logits as reading it again, within a budget of bytes."""
    model = decoder(max_length=3 * CHUNK)
    first = torch.arange(CHUNK + 50) % 61
    prefixes = Prefixes(1 << 30)

    def read(ids: torch.Tensor, kept: Prefixes | None) -> tuple[list[int], torch.Tensor]:
        text = Sequence(model, ids.tolist(), prefixes=kept, max_new_tokens=4)
        pieces = []
        while text.reading:
            pieces.append(text.read_piece())
        return pieces, text._logits

    assert read(first, prefixes)[0] == [CHUNK, 50]
    assert read(first, prefixes)[0] == [0]
    other = torch.cat((first[:-10], torch.tensor([3, 4, 5])))
    pieces, logits = read(other, prefixes)
    assert pieces == [43] and torch.equal(logits, read(other, None)[1])
    assert read(first[:CHUNK], prefixes)[0] == [CHUNK]  # no logits are known there
    small = Prefixes(prefixes.nbytes // 3)
    for i in range(20):
        read((torch.arange(LEAST) + i) % 61, small)
        assert small.nbytes <= small.most_bytes
    assert small.nbytes


def test_integer_layers_share_any_part_of_a_prompt():
    """With the logits, bit for bit, of reading all of it."""
    model = quantize_dynamic(decoder(max_length=400), prefer="size", embeddings=True)
    prefixes = Prefixes(1 << 30)
    passes = NativePasses(model)

    def read(ids: list[int], kept: Prefixes | None) -> tuple[int, torch.Tensor]:
        text = Sequence(model, ids, prefixes=kept, passes=passes, max_new_tokens=4)
        count = 0
        while text.reading:
            count += text.read_piece()
        return count, text._logits

    first = [i % 61 for i in range(90)]
    read(first, prefixes)
    other = [*first[:70], 5, 4, 3]
    count, logits = read(other, prefixes)
    assert count == 3 and torch.equal(logits, read(other, None)[1])


def test_rows_that_see_each_other_are_never_joined():
    """A model that mixes its rows is run by itself for each request."""

    class Centred(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    example = torch.tensor([[1.0, 2.0], [5.0, 9.0]])
    mixing, apart = Centred(), torch.nn.Linear(2, 2).eval()
    assert TensorModel(mixing, torch.randn(1, 2)).batches is False
    assert TensorModel(apart, example).batches


def test_numbers_of_all_workers_are_added():
    """A histogram's buckets count what is at most their bound."""
    metrics = Metrics(["m"], workers=2)
    for row in (0, 1):
        metrics.take_row(row)
        metrics.add("quantize_answers_total", "m", 2)
        metrics.observe("quantize_batch_rows", "m", 4)
        metrics.put("quantize_waiting", "m", 3)
    metrics.take_row(1)
    lines = metrics.text().splitlines()
    assert 'quantize_answers_total{model="m"} 4.0' in lines
    assert 'quantize_waiting{model="m"} 3.0' in lines  # of a worker that is gone: none
    assert 'quantize_batch_rows_bucket{model="m",le="2"} 0.0' in lines
    assert 'quantize_batch_rows_bucket{model="m",le="4"} 2.0' in lines
    assert 'quantize_batch_rows_sum{model="m"} 8.0' in lines


def test_a_short_reader_is_timed_too(tmp_path: Path):
    """A model of fewer positions than a usual text has tokens is opened and timed."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(WORDS), intermediate_size=16, max_position_embeddings=6, **small
    )
    folder = write_folder(tmp_path / "short", BertModel(config).eval())
    assert open_served(folder, "short").call_s > 0.0


def test_other_threads_than_the_calls_compute_alone():
    """libgomp keeps threads for each thread that ever computed on several; see `batching`."""
    seen: list[int] = []

    async def work() -> None:
        starlette = app({"net": net()}).app
        async with starlette.router.lifespan_context(starlette):
            seen.append(torch.get_num_threads())
            compute = Compute(2)
            seen.append(await compute.run(torch.get_num_threads))
            seen.append(await compute.run(torch.get_num_threads, 3))
            seen.append(torch.get_num_threads())
            compute.shutdown()

    before = torch.get_num_threads()
    asyncio.run(work())
    assert seen == [1, 2, 3, 1] and torch.get_num_threads() == before


def test_models_that_cannot_be_served_are_refused():
    """None, in training mode, without example inputs."""
    net = ConvNet(ConvNetConfig())
    for models, message in (
        ({}, "at least one"),
        ({"net": net.train()}, "training mode"),
        ({"net": torch.nn.Linear(2, 2).eval()}, "give --inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            app(models)
    for models in ([net], net, "net.safetensors", [None]):
        with pytest.raises(TypeError, match=r"give (paths|a list), "):
            app(models)


def test_paths_are_served_under_their_last_part(tmp_path):
    """As models by name are, and paths by name."""
    save(net(), tmp_path / "digits.safetensors")
    path = tmp_path / "digits.safetensors"
    for models, name in (([path], "digits"), ({"cnn": str(path)}, "cnn")):
        starlette = app(models).app
        with TestClient(starlette) as client:
            assert client.get(f"/v2/models/{name}").json()["name"] == name


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_thread_that_loads_is_gone_from_the_system():
    """Python says that it has ended before what it holds is given back, here for 0.2 s: a child
    forked then would wait for it for ever.
    """

    def threads() -> set[str]:
        return {thread.name for thread in Path("/proc/self/task").iterdir()}

    def load() -> list[Served]:
        libc.pthread_setspecific(key, ctypes.c_void_p(200_000))
        return []

    libc, key = ctypes.CDLL(None), ctypes.c_uint()
    libc.pthread_key_create(ctypes.byref(key), libc.usleep)
    before = threads()
    assert in_a_thread(load) == []
    assert threads() <= before
