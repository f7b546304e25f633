"""`quantize serve` as people start it: two workers that are forked, killed, replaced, told to stop;
curl; a model that is replaced; mistakes in one line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import decoder

import quantize
from quantize.commands import serve

TOKEN = {"Authorization": "Bearer secret"}
LONG = {"model": "lm", "prompt": "go", "max_tokens": 400, "temperature": 0}
# The command, with steps of 5 ms, so that no machine ends a long text before a test looks at it; a
# prompt of one token is never read to its end.
SLOWLY = """
import sys
import time

from quantize.cli import main
from quantize.run.serve import process
from quantize.run.serve.scheduler import Writer

step = Writer.step


def slow_step(self, texts):
    hangs = any(text.prompt_length == 1 for text in texts)
    time.sleep(1000 if hangs else 0.005)
    return step(self, texts)


Writer.step = slow_step
process.ORPHAN_S = 1
sys.exit(main())
"""


class Command:
    """The command under way."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self.log = log
        environment = os.environ | {"QUANTIZE_TOKEN": "secret"}
        command = [sys.executable, "-c", SLOWLY, "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        address = re.search(r"http://\S+", line)
        assert address, log.read_text()
        self.url = address[0]
        self.address = "127.0.0.1", int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, headers=TOKEN, timeout=60)

    def workers(self) -> set[int]:
        """The processes that answer."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return set(map(int, children.split()))


def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def active(command: Command) -> float:
    """Texts that are written now."""
    found = re.search(r'quantize_active{model="lm"} (\S+)', command.client.get("/metrics").text)
    return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("command")
    quantize.save(decoder(vocab_size=256, max_length=600), folder / "lm.safetensors")
    log = folder / "log"
    running = Command(str(folder / "lm.safetensors"), "--workers", "2", log=log)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.mark.slow
def test_curl_and_the_token(command: Command):
    """As the README has it; without the token nothing but health and the page."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    body = json.dumps({"model": "lm", "prompt": "def ", "max_tokens": 4})
    url, header = f"{command.url}/v1/completions", "Authorization: Bearer secret"
    plain = [curl, "-s", "-H", header, url, "-H", "Content-Type: application/json", "-d", body]
    reply = json.loads(subprocess.check_output(plain))
    assert reply["usage"]["completion_tokens"] == 4
    streamed = subprocess.check_output([*plain[:-1], body[:-1] + ', "stream": true}'], text=True)
    assert streamed.endswith("data: [DONE]\n\n") and streamed.count("data: {") >= 1
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        refused = httpx.get(f"{command.url}/v1/models", headers=header)
        assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
        assert httpx.get(f"{command.url}/v2/health/ready", headers=header).status_code == 200
        assert httpx.get(f"{command.url}/", headers=header).status_code == 200


@pytest.mark.slow
def test_logs_have_ids_and_no_prompts(command: Command):
    """A request's id comes back; what isn't fit for a log is replaced."""
    body = {"model": "lm", "prompt": "a secret thing", "max_tokens": 1}
    for given, kept in (("abc-1", True), ("no spaces, please", False), ("x" * 65, False)):
        headers = {"X-Request-Id": given}
        reply = command.client.post("/v1/completions", json=body, headers=headers)
        assert (reply.headers["X-Request-Id"] == given) is kept
    log = command.log.read_text()
    assert "abc-1 POST /v1/completions 200" in log
    assert "secret" not in log and "no spaces" not in log


@pytest.mark.slow
def test_vanished_clients_and_half_bodies(command: Command):
    """They take nothing with them; the next one is answered."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\n"
    huge = head + b"Content-Length: 1073741824\r\n\r\n"
    for request in (
        head + b"Content-Length: 100\r\n\r\n{",
        head,
        b"\x16\x03\x01 garbage \r\n\r\n",
        huge + b"{",
    ):
        with socket.create_connection(command.address) as client:
            client.sendall(request)
            if request.startswith(huge):
                assert client.recv(100).startswith(b"HTTP/1.1 413")
    reply = command.client.post("/v1/completions", json=LONG | {"max_tokens": 1})
    assert reply.status_code == 200


@pytest.mark.slow
def test_workers_share_connections(command: Command):
    """Clients that come at once, and stay, are shared among the workers."""

    def sockets(worker: int) -> int:
        files = Path(f"/proc/{worker}/fd").iterdir()
        return sum(str(file.readlink()).startswith("socket") for file in files)

    before = {worker: sockets(worker) for worker in command.workers()}
    clients = [socket.create_connection(command.address) for _ in range(24)]
    for client in clients:
        client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n")
    for client in clients:
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
    more = [sockets(worker) - count for worker, count in before.items()]
    for client in clients:
        client.close()
    assert sum(more) == 24 and min(more) >= 6


@pytest.mark.slow
def test_a_killed_worker_is_replaced(command: Command):
    """Its clients get an error, streams and others; those of the other worker go on; soon there are
    two again.
    """
    before = command.workers()
    assert len(before) == 2
    answers: list[tuple[int, str]] = []

    def ask(stream: bool) -> None:
        body = LONG | {"max_tokens": 500, "stream": stream}
        with httpx.Client(base_url=command.url, headers=TOKEN, timeout=60) as client:
            reply = client.post("/v1/completions", json=body)
            answers.append((reply.status_code, reply.text))

    askers = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(12)]
    for asker in askers:
        asker.start()
    until(lambda: active(command) == 12)
    os.kill(min(before), signal.SIGKILL)
    for asker in askers:
        asker.join()
    died = [(status, text) for status, text in answers if "has died" in text]
    assert len(answers) == 12 and 0 < len(died) < 12
    for status, text in answers:
        if (status, text) in died:
            streamed = text.endswith("}\n\n") and text.startswith("data: ")
            assert (status == 200 and streamed) or (status == 502 and "server_error" in text)
        else:
            assert status == 200 and (text.endswith("data: [DONE]\n\n") or '"usage"' in text)
    until(lambda: len(command.workers() - before) == 1 and len(command.workers()) == 2)
    reply = command.client.post("/v1/completions", json=LONG | {"max_tokens": 1})
    assert reply.status_code == 200


@pytest.mark.slow
def test_a_replaced_file_is_served(command: Command, tmp_path: Path):
    """Requests under way are answered by the old model, the next ones by the new one."""
    path = next(command.log.parent.glob("lm.safetensors"))

    def text(client: httpx.Client, tokens: int = 20) -> str:
        body = LONG | {"max_tokens": tokens}
        return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    old = text(command.client)
    answers: list[str] = []
    with httpx.Client(base_url=command.url, headers=TOKEN, timeout=60) as other:
        slow = threading.Thread(target=lambda: answers.append(text(other, 400)))
        slow.start()
        before = command.workers()
        quantize.save(decoder(seed=1, vocab_size=256, max_length=600), path)
        until(lambda: len(command.workers()) == 2 and not command.workers() & before)
        slow.join()
    assert answers[0].startswith(old)
    fresh = httpx.Client(base_url=command.url, headers=TOKEN)
    assert text(fresh) != old
    path.write_bytes(b"broken")
    until(lambda: "the changed model isn't served" in command.log.read_text())
    assert text(fresh)


@pytest.mark.slow
def test_sigterm_lets_accepted_requests_finish(command: Command):
    """All of them, whole; then the command ends with 0."""
    results: list[tuple[int, int]] = []

    def ask() -> None:
        with httpx.Client(base_url=command.url, headers=TOKEN, timeout=60) as client:
            reply = client.post("/v1/completions", json=LONG)
            results.append((reply.status_code, reply.json()["usage"]["completion_tokens"]))

    askers = [threading.Thread(target=ask) for _ in range(6)]
    for asker in askers:
        asker.start()
    until(lambda: active(command) == 6)
    command.process.terminate()
    assert command.process.wait(60) == 0
    for asker in askers:
        asker.join()
    assert results == [(200, 400)] * 6


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path: Path):
    """Where it was killed, one whose call never returns as well."""

    def runs(worker: int) -> bool:
        try:
            return " Z " not in Path(f"/proc/{worker}/stat").read_text()
        except FileNotFoundError:
            return False

    path = tmp_path / "lm.safetensors"
    quantize.save(decoder(vocab_size=256, max_length=600), path)
    command = Command(str(path), "--workers", "2", log=tmp_path / "log")
    workers = command.workers()
    with socket.create_connection(command.address) as client:
        body = json.dumps(LONG | {"prompt": "g"})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}"
        client.sendall(f"{head}\r\nAuthorization: Bearer secret\r\n\r\n{body}".encode())
        until(lambda: active(command))
        command.process.kill()
        command.process.wait()
        until(lambda: not any(map(runs, workers)))


def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A missing file, names that don't fit, a port that is none or taken."""
    # a handler would stay, with this test's standard error, which is closed by then
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    model = tmp_path / "m.pth"
    quantize.save(decoder(), model)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in (
            ([str(tmp_path / "none.pth")], "no such file"),
            ([str(model), "--name", "a", "b"], "for 1 models"),
            ([str(model), "--port", "70000"], "not in 0 .. 65535"),
            ([str(model), "--port", port], f"127.0.0.1:{port} can't be listened on"),
        ):
            assert serve.main(arguments) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1
