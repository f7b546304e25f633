"""What this process does with memory: whether malloc keeps large blocks, which memory lies in huge
pages, and the most it has held.

The allocator can be half of a CPU latency (see `keep_allocations`), so every report names its
state.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# mallopt's parameter numbers (glibc's malloc.h), and the values that make it keep large blocks.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEP_MMAP_BYTES, _KEEP_MMAP_BYTES_OLD_GLIBC, _KEEP_TOP_PAD_BYTES = 1 << 30, 32 << 20, 64 << 20
_HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # of Linux 6.1 and newer
_kept_mmap_bytes = 0  # what keep_allocations() has set in this process; glibc has no call to ask


def keep_allocations() -> bool:
    """Tell glibc's malloc to keep large freed blocks for the life of this process. Returns whether
    that is now so.

    glibc maps every block above a threshold (128 KiB, growing to 32 MiB) afresh and gives it back
    at once, so each large activation is page-faulted again on every call; that can double a
    convolutional network's latency. This is `mallopt` (see mallopt(3)) with M_MMAP_THRESHOLD = 1
    GiB (32 MiB where glibc refuses more), M_TRIM_THRESHOLD = never and M_TOP_PAD = 64 MiB; the
    environment variables MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ do the
    same at start.

    The price: memory that was once used isn't returned before the process ends. Nothing in this
    package calls it on import. Where malloc isn't glibc's (musl, macOS, Windows, a preloaded
    jemalloc or tcmalloc) it changes nothing and returns False; `allocator_state()` says so.
    """
    global _kept_mmap_bytes
    if _glibc_version() is None or _preloaded_malloc() is not None:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    for threshold in (_KEEP_MMAP_BYTES, _KEEP_MMAP_BYTES_OLD_GLIBC):
        if mallopt(_MMAP_THRESHOLD, threshold):  # 1 is success
            mallopt(_TRIM_THRESHOLD, -1)
            mallopt(_TOP_PAD, _KEEP_TOP_PAD_BYTES)
            _kept_mmap_bytes = threshold
            return True
    return False


def give_back() -> None:
    """Return freed memory to the system, where malloc is glibc's and wasn't told to keep it."""
    if _glibc_version() is not None and _preloaded_malloc() is None and not _kept_mmap_bytes:
        ctypes.CDLL(None).malloc_trim(0)


def allocator_state() -> str:
    """One line: which malloc this process uses and whether it keeps large blocks."""
    preloaded = _preloaded_malloc()
    if preloaded is not None:
        return f"{preloaded} (preloaded), its own settings"
    version = _glibc_version()
    if version is None:
        return "not glibc, system default (keep_allocations does nothing here)"
    if _kept_mmap_bytes:
        return (
            f"{version}, keeps large blocks (mmap threshold {_kept_mmap_bytes >> 20} MiB, no "
            f"trimming)"
        )
    names = (
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
        "MALLOC_TOP_PAD_",
        "GLIBC_TUNABLES",
    )
    given = [f"{n}={os.environ[n]}" for n in names if os.environ.get(n)]
    if given:
        return f"{version}, set by the environment: {' '.join(given)}"
    return f"{version}, default (returns large blocks)"


def use_huge_pages(blocks: Iterable[tuple[int, int]]) -> int:
    """Move memory that is read again and again into huge pages, where Linux gives them.

    A decoder reads all its weights for every token. In pages of 4 KiB each of them has to be
    looked up in tables, in a virtual machine in two of them, and no prefetch goes beyond its end.
    Blocks that lie close together become one; a page that isn't wholly inside stays as it is.
    Contents and addresses stay too. Where the system refuses, nothing happens.

    Args:
        blocks: address and bytes of each.

    Returns:
        Bytes that lie in huge pages now.

    Source: MADV_COLLAPSE of madvise(2).
    """
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        refused = "[never]" in setting.read_text()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return 0
    if refused:
        return 0
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = 0
    for start, end in _whole_pages(blocks):
        if madvise(start, end - start, _MADV_COLLAPSE) == 0:
            moved += end - start
    return moved


def _whole_pages(blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Start and end of the huge pages that blocks fill, those with less than a page between them
    taken together.
    """
    joined: list[list[int]] = []
    for start, size in sorted(blocks):
        if joined and start - joined[-1][1] < _HUGE_PAGE:
            joined[-1][1] = max(joined[-1][1], start + size)
        else:
            joined.append([start, start + size])
    for start, end in joined:
        first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        last = end // _HUGE_PAGE * _HUGE_PAGE
        if first < last:
            yield first, last


def peak_rss_mb() -> float | None:
    """Most memory that this process has had resident, in MiB; None where the system doesn't tell.

    Linux: VmHWM, because `ru_maxrss` of a child starts at the size of the process that started it.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(
            int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")
        )
    except (OSError, StopIteration):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def _glibc_version() -> str | None:
    """`"glibc 2.36"`, or None where the C library is another one."""
    if not hasattr(os, "confstr"):
        return None
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (OSError, ValueError):
        return None


def _preloaded_malloc() -> str | None:
    preload = os.environ.get("LD_PRELOAD", "")
    return next((name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in preload), None)
