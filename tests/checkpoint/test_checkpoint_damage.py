"""Nothing but a whole, unaltered file is loaded, and a write that fails leaves the old one."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_models import SUFFIXES, Net, Tiny, TinyConfig, both, net
from helpers import in_a_fork
from torch import nn

from quantize.checkpoint import (
    CheckpointError,
    atomic_write,
    contents,
    load,
    read_metadata,
    read_record,
    save,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@both
def test_every_flipped_bit_is_caught(tmp_path, suffix):
    """Each of 600 random bit flips, in tensors, names, padding and zip directory, is a
    CheckpointError.
    """
    path = tmp_path / f"m{suffix}"
    save(Tiny(TinyConfig(width=3)), path, metadata={"a": 1})
    whole, draw = path.read_bytes(), random.Random(1)
    for bit in draw.sample(range(8 * len(whole)), 600):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="m" + suffix):
            load(path)


@both
def test_every_truncation_is_caught(tmp_path, suffix):
    """So is each of 300 cuts, the empty file and the last byte among them, and bytes appended or
    put in front.
    """
    path = tmp_path / f"m{suffix}"
    save(Tiny(TinyConfig(width=3)), path)
    whole, draw = path.read_bytes(), random.Random(2)
    cuts = {0, 1, 7, 8, len(whole) - 1, *draw.sample(range(len(whole)), 295)}
    for damaged in [
        *(whole[:cut] for cut in cuts),
        whole + b"\0",
        whole + whole,
        b"\0" + whole,
        whole[:-64] + b"\0" + whole[-64:],
    ]:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load(path)
        with pytest.raises(CheckpointError):
            read_metadata(path)


@both
def test_newer_version_says_so(tmp_path, suffix, monkeypatch):
    """A file of a later format says that it is newer, whoever wrote it."""
    path = tmp_path / f"m{suffix}"
    with monkeypatch.context() as patch:
        patch.setattr(contents, "VERSION", 7)
        save(Tiny(TinyConfig()), path)
    with pytest.raises(
        CheckpointError, match=r"newer quantize \(format version 7; this one reads up to 2\)"
    ):
        load(path)
    if suffix == ".pth":  # not our bytes any more, but the version can still be told
        content = torch.load(path, weights_only=True)
        torch.save(content | {"version": 12}, path)
        with pytest.raises(CheckpointError, match="format version 12"):
            load(path)


def header(text: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADERS = {
    "length 2**60": header(b"{}", 2**60),
    "length 2**64-1": header(b"{}", 2**64 - 1),
    "longer than the file": header(b"{}", 1000),
    "no header": b"",
    "seven bytes": bytes(7),
    "empty object": header(b"{}"),
    "a list": header(b"[]"),
    "not UTF-8": header(b'{"\xff\xfe":1}'),
    "deep nesting": header(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "key twice": header(b'{"__metadata__":{"record":"","record":""}}'),
    "huge integer": header(b'{"__metadata__":' + b"9" * 10_000 + b"}"),
    "metadata a list": header(b'{"__metadata__":["quantize_version","record"]}'),
    "version no number": header(b'{"__metadata__":{"quantize_version":"x","record":"{}"}}'),
    "record no object": header(b'{"__metadata__":{"quantize_version":"1","record":"[]"}}'),
    "plain safetensors": safetensors.torch.save({"weight": torch.zeros(2, 2)}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(tmp_path, name):
    """Each malformed .safetensors header is refused."""
    (tmp_path / "m.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        load(tmp_path / "m.safetensors", nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"data_offsets":[0,36]', b'"data_offsets":[0,99]'),
        (b'"data_offsets":[0,36]', b'"data_offsets":[-9,3]'),
        (b'"data_offsets":[0,36]', b'"data_offsets":["",]'),
        (b'"shape":[3,3],"data', b'"shape":[9,1],"data'),
        (b'"dtype":"F32"', b'"dtype":"I32"'),
    ],
)
def test_safetensors_offsets_are_checked(tmp_path, old, new):
    """Offsets outside the data, or a header that contradicts the record, are refused."""
    path = tmp_path / "m.safetensors"
    save(nn.Linear(3, 3, bias=False), path)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(CheckpointError):
        load(path, nn.Linear(3, 3, bias=False))


@both
def test_things_that_are_no_file(tmp_path, suffix):
    """Missing, a folder, a pipe (which must not block), a device, a wrong container: one line with
    path and reason.
    """
    path = tmp_path / f"m{suffix}"
    with pytest.raises(CheckpointError, match=rf"m{suffix}: No such file"):
        load(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_metadata(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(path)
    path.unlink()
    other = tmp_path / f"m{SUFFIXES[1 - SUFFIXES.index(suffix)]}"
    save(net(), other)
    other.rename(path)
    with pytest.raises(CheckpointError):
        load(path, Net())


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    """An error or Ctrl-C in the middle: the old content stays, the temporary file goes."""
    path = tmp_path / "report.json"
    path.write_text("old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as file:
            file.write(b"half")
            raise error
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_killed_writer_is_cleaned_up_after(tmp_path):
    """SIGKILL in the middle leaves the old file; the next write removes the remains, but not those
    of a live writer.
    """
    path = tmp_path / "m.bin"
    path.write_bytes(b"old")
    code = (
        "import importlib.util, os, signal, sys\n"
        "spec = importlib.util.spec_from_file_location('atomic', sys.argv[1]); m = "
        "importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
        "with m.atomic_write(sys.argv[2]) as f:\n    f.write(b'half'); f.flush(); "
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    source = Path(sys.modules["quantize.atomic"].__file__)
    assert subprocess.run([sys.executable, "-c", code, source, path]).returncode == -9
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    with atomic_write(path) as outer:
        outer.write(b"outer")
        with atomic_write(path) as inner:
            inner.write(b"inner")
    assert path.read_bytes() == b"outer" and len(list(tmp_path.iterdir())) == 1


def test_written_files_follow_umask_and_links(tmp_path):
    """The mode is what open() would give, and a link stays a link."""
    save(net(), tmp_path / "m.pth")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "m.pth").stat().st_mode) == 0o666 & ~mask
    (tmp_path / "link.pth").symlink_to("m.pth")
    save(nn.Linear(2, 2), tmp_path / "link.pth")
    assert (tmp_path / "link.pth").is_symlink()
    assert read_record(tmp_path / "m.pth")["architecture"]["name"] == "Linear"


@both
def test_folder_that_cannot_be_written(tmp_path, suffix):
    """An OSError that names the file asked for, not the temporary one."""
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path / "missing" / f"m{suffix}",
        tmp_path / "file" / f"m{suffix}",
        Path(f"/proc/m{suffix}"),
    ):
        with pytest.raises(OSError, match=rf"'{path}'"):
            save(net(), path)
    (tmp_path / f"d{suffix}").mkdir()
    with pytest.raises(IsADirectoryError):
        save(net(), tmp_path / f"d{suffix}")


@both
def test_full_disk_leaves_the_old_file(tmp_path, suffix):
    """When the system refuses the bytes, the error is the system's, the old file is whole, nothing
    else is left.
    """
    path = tmp_path / f"m{suffix}"
    save(Tiny(TinyConfig()), path)
    large = nn.Linear(500, 500)

    def write() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            save(large, path)
        except OSError as error:
            return error.errno
        return 0

    assert in_a_fork(write) == errno.EFBIG  # a file-size limit stands in for a full disk
    assert type(load(path)) is Tiny
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
