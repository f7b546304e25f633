"""Foreign and hostile archives and pickles are refused with a reason, and not run."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_models import Reduce, archive, ours
from torch import nn

from quantize.checkpoint import CheckpointError, load, read_metadata


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


BODY = ours()[:-1]  # without STOP


TOUCH = "touch RAN"


STRING = b"X" + struct.pack("<I", len(TOUCH)) + TOUCH.encode()


PICKLES = {
    "reduce os.system": pickle.dumps(Reduce(os.system, (TOUCH,)), 2),
    "protocol 0": pickle.dumps(Reduce(os.system, (TOUCH,)), 0),
    "protocol 4, STACK_GLOBAL and frames": pickle.dumps(Reduce(os.system, (TOUCH,)), 4),
    "nested getattr": pickle.dumps(Reduce(getattr, (Reduce(__import__, ("os",)), "system")), 2),
    "after our own record": BODY + b"0cposix\nsystem\n(" + STRING + b"tR.",
    "in place of a tensor's global": ours().replace(
        b"ctorch._utils\n_rebuild_tensor_v2\n", b"cposix\nsystem\n"
    ),
    "global with a dotted name": BODY + b"0ctorch\nserialization.os.system\n(" + STRING + b"tR.",
    "INST": BODY + b"0(" + STRING + b"iposix\nsystem\n.",
    "OBJ": BODY + b"0(cposix\nsystem\n" + STRING + b"o.",
    "NEWOBJ": BODY + b"0ccollections\nOrderedDict\n)\x81.",
    "BUILD on an allowed global": BODY + b"0ccollections\nOrderedDict\n)R}b.",
    "STACK_GLOBAL from memo": BODY
    + b"0\x8c\x05posix\x94\x8c\x06system\x94\x93"
    + STRING
    + b"\x85R.",
    "extension registry": BODY + b"0\x82\x01.",
    "persistent id as text": BODY + b"0Pcposix\n.",
    "second pickle behind ours": ours() + pickle.dumps(Reduce(os.system, (TOUCH,)), 2),
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "string of 2**60 bytes": b"\x80\x02\x8d" + struct.pack("<Q", 2**60) + b"a.",
    "string of 4 GB": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",
    "integer of 2 GB": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "unhashable and memo nonsense": b"\x80\x02h\xffr\xff\xff\xff\xff}]]s.",
    "no stop": BODY,
    "empty": b"",
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles_are_refused_and_not_run(tmp_path, monkeypatch, name):
    """Inside a zip like torch's, and bare: a CheckpointError, and the command it carries hasn't
    run.
    """
    monkeypatch.chdir(tmp_path)
    for content in (archive(PICKLES[name], {"data/0": bytes(8)}), PICKLES[name]):
        Path("m.pth").write_bytes(content)
        for reader in (load, read_metadata):
            with pytest.raises(CheckpointError, match=r"m\.pth"):
                reader("m.pth")
    assert os.listdir() == ["m.pth"]  # noqa: PTH208


def legacy(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    return file.getvalue()


def scripted() -> bytes:
    file = io.BytesIO()
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


def pickled_by_torch(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def twice() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("archive/data.pkl", ours())
        with pytest.warns(UserWarning, match="Duplicate"):
            z.writestr("archive/data.pkl", PICKLES["reduce os.system"])
    return file.getvalue()


def overlapping() -> bytes:
    content = bytearray(archive(ours(), {"data/0": bytes(8), "data/1": bytes(8)}))
    directory = content.rindex(b"PK\x01\x02")
    before = content.rindex(b"PK\x01\x02", 0, directory)
    content[directory + 42 : directory + 46] = content[before + 42 : before + 46]
    return bytes(content)


def oversized() -> bytes:
    content = bytearray(archive(ours(), {"data/0": bytes(8)}))
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 20 : directory + 28] = struct.pack("<II", 2**31, 2**31)
    return bytes(content)


FILES = {
    "bare state dict": (
        lambda: pickled_by_torch(nn.Linear(2, 2).state_dict()),
        "not written by quantize",
    ),
    "whole module": (lambda: pickled_by_torch(nn.Linear(2, 2)), "its pickle calls"),
    "ordered dict of nothing": (
        lambda: pickled_by_torch(collections.OrderedDict()),
        "not written by quantize",
    ),
    "legacy torch file": (lambda: legacy({"format": "quantize"}), "no zip archive"),
    "tar": (tarred, "no zip archive"),
    "TorchScript": (scripted, "TorchScript"),
    "compressed": (lambda: archive(ours(), compression=zipfile.ZIP_DEFLATED), "compressed"),
    "bomb": (lambda: archive(ours(), {"data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED), "compressed"),
    "zip in a zip": (lambda: archive(ours(), {"data.zip": archive(b"x")}), "unexpected entry"),
    "code": (lambda: archive(ours(), {"code/__torch__.py": b""}), "TorchScript"),
    "path outside": (lambda: archive(ours(), {"../../evil": b""}), "unexpected entry"),
    "two entries of one name": (twice, "two entries"),
    "overlapping entries": (overlapping, "overlap"),
    "oversized entry": (oversized, "truncated"),
    "no pickle": (lambda: archive(ours()).replace(b"data.pkl", b"version2"), "unexpected entry"),
    "empty zip": (lambda: b"PK\x05\x06" + bytes(18), "no zip archive"),
    "text": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "no zip archive"),
}


@pytest.mark.parametrize("name", FILES)
def test_foreign_and_malformed_archives(tmp_path, name):
    """Each is refused with its reason."""
    content, reason = FILES[name]
    path = tmp_path / "m.pth"
    path.write_bytes(content())
    with pytest.raises(CheckpointError, match=reason):
        load(path, nn.Linear(2, 2))
