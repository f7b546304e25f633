"""The compiled step: what is kept, what of it is trusted, and what happens where it can't be
had.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import threading
import time
from pathlib import Path

import pytest
import torch
from fresh import Python

from quantize.models import DecoderConfig, DecoderLM
from quantize.native import build, cache, isa, toolchain
from quantize.run.decoding import for_decoding, structs
from quantize.run.decoding.structs import KERNELS
from quantize.run.generate import generate

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


STEP = KERNELS.code(isa.levels()[-1])


def decoder() -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(
        DecoderConfig(vocab_size=61, width=32, layers=2, heads=4, max_length=64)
    ).eval()


@pytest.fixture(scope="module")
def content() -> bytes:
    """The compiled library, taken from the user's cache where it lies there."""
    if build.library(STEP).note is None:
        path, folder = cache.open_folder()
        os.close(folder)
        name = toolchain.kept_name(STEP, tuple(build.compiler()))
        return toolchain.opened((path / name).read_bytes())
    return toolchain.compiled(STEP, build.compiler())


class Compiler:
    """Stands for the compiler: gives the content at once and counts how often it was asked."""

    def __init__(self, content: bytes):
        self.content, self.calls, self.seconds = content, 0, 0.0

    def __call__(self, code: build.Code, command: list[str]) -> bytes:
        self.calls += 1
        time.sleep(self.seconds)
        return self.content


@pytest.fixture
def compiler(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    """An empty cache folder in `tmp_path`, a process that has loaded nothing, and a compiler that
    counts.
    """
    stand_in = Compiler(content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_outcomes", {})
    monkeypatch.setattr(toolchain, "compiled", stand_in)
    return stand_in


def load(monkeypatch: pytest.MonkeyPatch, **options: bool) -> build.Library | None:
    """What a new process would get."""
    monkeypatch.setattr(build, "_outcomes", {})
    return build.library(STEP, **options)


def kept_file(folder: Path) -> Path:
    (path,) = (folder / "quantize").iterdir()
    return path


def test_one_file_is_kept_and_used_again(compiler, monkeypatch, tmp_path):
    """The second process compiles nothing; folder and file are this user's alone, whatever the
    umask.
    """
    before = os.umask(0)
    try:
        assert load(monkeypatch).note is None
    finally:
        os.umask(before)
    assert load(monkeypatch).functions and compiler.calls == 1
    assert kept_file(tmp_path).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "quantize").stat().st_mode & 0o777 == 0o700


def damaged(content: bytes) -> dict[str, bytes]:
    """Files that aren't what was kept, by what happened to them."""
    with_digest = content + hashlib.sha256(content).digest()
    other = bytearray(with_digest)
    other[len(other) // 2] ^= 1
    text = b"int x;"
    return {
        "empty": b"",
        "cut short": with_digest[: len(with_digest) // 3],
        "one bit": bytes(other),
        "no digest": content,
        "digest of something that is no library": text + hashlib.sha256(text).digest(),
    }


@pytest.mark.parametrize("fault", damaged(b"anything"))
def test_a_damaged_file_is_compiled_again(fault, compiler, content, monkeypatch, tmp_path):
    """Nothing of it is mapped, and the next process finds a whole one."""
    load(monkeypatch)
    kept_file(tmp_path).write_bytes(damaged(content)[fault])
    assert load(monkeypatch, compile_now=False) is None
    assert load(monkeypatch).note is None and compiler.calls == 2
    assert load(monkeypatch, compile_now=False) is not None and compiler.calls == 2


@pytest.mark.parametrize("kind", ["pipe", "link", "writable by others", "of another user"])
def test_a_file_that_is_not_this_users_alone_is_not_read(
    kind, compiler, content, monkeypatch, tmp_path
):
    """Right content doesn't help; what can be replaced is."""
    load(monkeypatch)
    path = kept_file(tmp_path)
    if kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    if kind == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    if kind == "writable by others":
        path.chmod(0o666)
    if kind == "of another user":
        monkeypatch.setattr(cache, "fault", _other_user_for_files)
    assert load(monkeypatch).functions and compiler.calls == 2
    assert path.is_file() and not path.is_symlink()


def _other_user_for_files(status: os.stat_result) -> str | None:
    return None if status.st_mode & 0o40000 else "belongs to user 1, not to 2"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_to_is_not_used(mode, compiler, monkeypatch, tmp_path):
    """Not to read from and not to write to; the result says so and runs."""
    load(monkeypatch)
    (tmp_path / "quantize").chmod(mode)
    file = kept_file(tmp_path).stat()
    found = load(monkeypatch)
    assert (
        found.functions
        and f"may be written by others (mode {mode:o})" in found.note
        and compiler.calls == 2
    )
    assert kept_file(tmp_path).stat().st_mtime_ns == file.st_mtime_ns


def test_a_folder_of_another_user_is_not_used(compiler, monkeypatch, tmp_path):
    """As when somebody made it before us in a place where all may write."""
    load(monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert "belongs to user" in load(monkeypatch).note and compiler.calls == 2


def test_where_nothing_can_be_kept(compiler, monkeypatch, tmp_path):
    """A file where the folder should be, a full disk, no home: native code runs, and the reason is
    given.
    """
    (tmp_path / "quantize").touch()
    monkeypatch.setattr(build, "_has_warned", False)
    with pytest.warns(UserWarning) as warned:
        assert "File exists" in load(monkeypatch).note
        load(monkeypatch)
    (told,) = (str(warning.message) for warning in warned)  # once in a process
    assert str(tmp_path / "quantize") in told and "XDG_CACHE_HOME" in told
    (tmp_path / "quantize").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        note = load(monkeypatch).note
    assert "No space left on device" in note and str(tmp_path / "quantize") in note
    assert not list((tmp_path / "quantize").iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: Path("/proc/no/such/home"))
    assert "compiled for this process only" in load(monkeypatch).note
    assert not Path("relative").exists()
    # for `generate`, which asks only where it pays
    assert load(monkeypatch, compile_now=False) is None


def test_libraries_of_another_version_are_refused(content, monkeypatch, compiler):
    """Structs of other sizes, and a library without the function."""
    monkeypatch.setitem(structs._STRUCTS, "pass_bytes", structs.Model)
    with pytest.raises(OSError, match="structs of"):
        load(monkeypatch)
    with pytest.raises(OSError, match="lacks a symbol"):
        structs.read(__import__("ctypes").CDLL(None))


def test_threads_and_processes_share_one_compilation(compiler, monkeypatch, tmp_path):
    """Threads of a process wait for the first; another process finds what it kept, under the lock
    of the folder.
    """
    libraries, compiler.seconds = [], 0.2
    threads = [
        threading.Thread(target=lambda: libraries.append(build.library(STEP))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, libraries))) == 1 and compiler.calls == 1
    kept_file(tmp_path).unlink()
    path, folder = cache.open_folder()
    with cache.one_builder(folder, toolchain.COMPILER_S):  # another process compiles
        monkeypatch.setattr(build, "_outcomes", {})
        waiting = threading.Thread(target=build.library, args=(STEP,))
        waiting.start()
        time.sleep(0.3)
        name = toolchain.kept_name(STEP, tuple(build.compiler()))
        assert waiting.is_alive() and cache.keep(compiler.content, path / name) is None
    os.close(folder)
    waiting.join()
    assert compiler.calls == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "seconds", "reason"),
    [
        ("sleep 60 & sleep 60", 1.0, "took over 1 s and was stopped"),
        ("echo broken >&2; exit 1", 60.0, "can't compile step.cpp: broken"),
    ],
)
def test_a_compiler_that_hangs_or_fails(script, seconds, reason, monkeypatch, tmp_path):
    """It and what it started are stopped, it isn't asked twice, and TorchScript runs with the
    reason.
    """
    os.mkfifo(tmp_path / "alive")
    # ends when nobody is left who could write
    alive = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    program = tmp_path / "compiler"
    program.write_text(
        f"#!/bin/sh\necho started >> {tmp_path}/log\nexec 9> {tmp_path}/alive\n{script}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "COMPILER_S", seconds)
    monkeypatch.setattr(build, "_outcomes", {})
    for _ in range(2):
        fast = for_decoding(decoder())
        assert fast.backend == "torchscript" and reason in fast.reason
    with pytest.raises(ValueError, match="backend 'native' can't run this model"):
        for_decoding(decoder(), backend="native")
    assert len((tmp_path / "log").read_text().splitlines()) <= len(isa.levels())
    assert os.read(alive, 1) == b""
    os.close(alive)


def test_without_a_compiler(monkeypatch):
    """Then TorchScript runs, unless native was asked for; `generate` runs the model as it is."""
    monkeypatch.setattr(build, "_outcomes", {})
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    fast = for_decoding(decoder())
    assert fast.backend == "torchscript" and "no C++ compiler" in fast.reason
    with pytest.raises(ValueError, match=r"no C\+\+ compiler"):
        for_decoding(decoder(), backend="native")
    assert generate(decoder(), torch.tensor([[1, 2]]), max_new_tokens=4).shape == (1, 6)


@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
def test_processes_at_once_and_a_file_cut_under_a_running_one(content, tmp_path):
    """Two processes that compile at once, with a compiler that has compiled before, agree; a
    library that is emptied while mapped doesn't reach who has mapped it.
    """
    code = (
        "import pathlib, sys, torch, quantize\n"
        "from quantize import for_decoding\n"
        "net = quantize.DecoderLM(quantize.DecoderConfig(vocab_size=61, width=32, layers=1, "
        "heads=4)).eval()\n"
        "fast = for_decoding(net, backend='native')\n"
        "for path in pathlib.Path(sys.argv[1]).rglob('*.so'): path.write_bytes(b'')\n"
        "print(quantize.generate(fast, torch.tensor([[1, 2]]), max_new_tokens=4).tolist())\n"
    )
    library, quick = tmp_path / "library", tmp_path / "compiler"
    library.write_bytes(content)
    script = f"""#!/bin/sh
case "$*" in *" -o "*) ;; *) exec {shlex.join(build.compiler())} "$@" ;; esac
while [ "$1" != -o ]; do shift; done
echo compiled >> {tmp_path}/log
sleep 0.5
cp {library} "$2"
"""
    quick.write_text(script)
    quick.chmod(0o755)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(quick)}
    running = [Python("-c", code, tmp_path, environment=environment) for _ in range(2)]
    first, second = (process.ended() for process in running)
    assert first.returncode == second.returncode == 0, (first, second)
    assert first.stdout == second.stdout != ""
    assert (tmp_path / "log").exists()
