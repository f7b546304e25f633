"""What the machine is, how many cores it leaves, how threads wait, what malloc keeps."""

from __future__ import annotations

import gc
import json
import math
import re
from pathlib import Path

import pytest
import torch
from fresh import python

from quantize import allocator, host
from quantize.allocator import allocator_state, keep_allocations, use_huge_pages
from quantize.host import (
    cpu_quota,
    default_threads,
    describe_machine,
    machine,
    waiting_policy,
    with_waiting,
)

ROOT = Path(__file__).parents[1]


def test_machine_is_json_and_complete():
    """Every fact a report needs, as JSON, and a few lines for people."""
    host = machine()
    json.dumps(host, allow_nan=False)
    assert (
        host["cpu"]
        and host["torch"] == torch.__version__
        and host["threads"] == torch.get_num_threads()
    )
    assert host["usable_cores"] is None or 1 <= host["usable_cores"] <= host["logical_cores"]
    if host["architecture"] == "x86_64":
        assert set(host["instruction_sets"]) == {"AVX2", "AVX-512", "VNNI", "BF16", "AMX"}
    text = "\n".join(describe_machine({**host, "usable_cores": 1, "threads": 2}))
    assert "1 usable core, 2 threads" in text and host["waiting"] in text
    assert host["cpu"] in text and host["allocator"] in text


def test_machine_survives_a_machine_that_tells_nothing(monkeypatch):
    """No /proc, no cpuinfo, no libc version, an unknown architecture: still a dict, and still
    lines.
    """

    def fail(*args, **kwargs):
        raise OSError("nothing here")

    for target in (
        "torch.cpu.get_capabilities",
        "os.cpu_count",
        "os.sched_getaffinity",
        "os.confstr",
        "os.sysconf",
    ):
        monkeypatch.setattr(target, fail)
    for target in ("machine", "platform", "processor", "freedesktop_os_release", "release"):
        monkeypatch.setattr(f"platform.{target}", fail)
    monkeypatch.setattr(Path, "read_text", fail)
    host = machine()
    assert host["architecture"] == "unknown" and host["instruction_sets"] == {}
    assert describe_machine(host) and describe_machine({})


@pytest.mark.parametrize(
    ("architecture", "flags", "present"),
    [
        (
            "aarch64",
            {"neon": True, "dot": True, "i8mm": True, "bf16": False},
            {"NEON", "DOTPROD", "I8MM"},
        ),
        ("AMD64", {"avx2": True, "avx_vnni": True}, {"AVX2", "VNNI"}),
        ("riscv64", {"v": True}, set()),
    ],
)
def test_instruction_sets_by_architecture(monkeypatch, architecture, flags, present):
    """Each architecture names its own; an unknown one names none."""
    monkeypatch.setattr("platform.machine", lambda: architecture)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: flags)
    assert {name for name, there in machine()["instruction_sets"].items() if there} == present


def test_other_mallocs_are_left_alone_and_named(monkeypatch):
    """musl, macOS and preloaded allocators: nothing is called, False comes back, the state says
    so.
    """
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert keep_allocations() is False and "jemalloc" in allocator_state()
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr("os.confstr", lambda name: None)
    assert keep_allocations() is False and "not glibc" in allocator_state()


@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
def test_kept_blocks_are_not_returned(tmp_path):
    """In a process of its own: after the call, a freed 256 MiB block stays resident; before it, it
    doesn't.
    """
    code = """if True:
        import torch
        from quantize.allocator import allocator_state, keep_allocations
        resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
        def left():
            before = resident()
            block = torch.ones(64 << 20)
            del block
            return resident() - before
        before = left(), allocator_state().split(", ")[1]
        kept = keep_allocations()
        print(*before, kept, left(), allocator_state().split(", ")[1], sep="|")
    """
    if not keep_allocations():
        pytest.skip(allocator_state())
    gc.collect()
    before, state, kept, after, kept_state = python("-c", code).stdout.strip().split("|")
    assert int(before) < 50 and "default" in state and kept == "True"
    assert int(after) > 200 and "keeps large blocks" in kept_state


@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
def test_freed_blocks_are_given_back_unless_they_are_kept():
    """In a process of its own: 128 MiB in small blocks, below one that stays."""
    code = """if True:
        import torch
        from quantize.allocator import give_back, keep_allocations
        resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
        def given_back():
            blocks = [torch.ones(1 << 14) for _ in range(2049)]
            del blocks[:-1]
            before = resident()
            give_back()
            return before - resident()
        print(given_back(), keep_allocations(), given_back(), sep="|")
    """
    if not keep_allocations():
        pytest.skip(allocator_state())
    gc.collect()
    first, kept, then = python("-c", code).stdout.strip().split("|")
    assert int(first) > 100 and kept == "True" and int(then) < 10


def groups(folder: Path, files: dict[str, str]) -> Path:
    """A tree of control groups in `folder`."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("process", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, math.inf),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3.0),
        ("0::/elsewhere\n", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/a\n", {"unified/a/cpu.max": "200000 50000"}, 4.0),
        (
            "4:memory:/m\n3:cpu,cpuacct:/box\n0::/\n",
            {
                "cpu,cpuacct/box/cpu.cfs_quota_us": "250000",
                "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
            2.5,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_quota_of_control_groups(tmp_path, process, files, cores):
    """Versions 1, 2 and both at once; the tightest limit on the way up counts; a container's own
    root too.
    """
    assert cpu_quota(process, groups(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("quota", "usable"), [(math.inf, 4), (8.0, 4), (2.0, 2), (1.5, 2), (0.2, 1)]
)
def test_threads_fit_affinity_and_quota(monkeypatch, quota, usable):
    """The smaller of the two, a part of a core as one; who sets OMP_NUM_THREADS is obeyed."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(host, "cpu_quota", lambda groups: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert default_threads() == 64
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert default_threads() == usable == machine()["usable_cores"]


def test_waiting_is_bounded_unless_somebody_chose(monkeypatch):
    """A new process gets a spin count; any variable of the user's wins, and is what the report
    says.
    """
    assert with_waiting({"HOME": "/"}) == {"HOME": "/", "GOMP_SPINCOUNT": host.SPIN_COUNT}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        assert with_waiting({name: "7"}) == {name: "7"}
        monkeypatch.delenv(name, raising=False)
    assert waiting_policy().startswith("default")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert waiting_policy() == "OMP_WAIT_POLICY=ACTIVE" == machine()["waiting"]


@pytest.mark.parametrize("script", ["train.py", "fusion.py", "kv_cache.py"])
def test_scripts_bound_waiting_before_torch_is_imported(script):
    """With the count of `quantize.host`: libgomp reads it when torch is imported, and never
    again.
    """
    text = (ROOT / script).read_text()
    found = re.search(r'setdefault\("GOMP_SPINCOUNT", "(\d+)"\)', text)
    assert found and found[1] == host.SPIN_COUNT
    assert found.start() < min(text.index("import torch"), text.index("from quantize"))


def test_huge_pages_keep_addresses_and_values():
    """Where the system gives them, the pages that lie wholly inside; neighbours are joined."""
    data = torch.arange(4 << 20, dtype=torch.int32)
    address, expected = data.data_ptr(), data.clone()
    assert use_huge_pages([(address, data.nbytes)]) <= data.nbytes
    assert data.data_ptr() == address and torch.equal(data, expected)
    page = 2 << 20
    halves = [(page + 5, page), (2 * page + 9, 2 * page), (9 * page, page - 1)]
    assert list(allocator._whole_pages(halves)) == [(2 * page, 4 * page)]
