"""Load hostile and damaged files and folders, and count: loaded, refused, and what must not happen.

    uv run python benchmarks/hostile.py --files 1400

None may run code, kill the process, take over 10 s of the CPU or 200 MB beyond its own size, or
raise anything but CheckpointError. What loads is decoded from too, where C++ trusts its sizes.
Writes one row per kind to benchmarks/results/hostile.csv; exit code 1 if anything happened that
must not. Needs Linux (/proc) for the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import rows

from quantize.checkpoint import CheckpointError

TESTS = Path(__file__).parent.parent / "tests"
SECONDS, MEGABYTES = 10, 200
OUTCOMES = ("loaded", "refused")


def work(numbers: range, size: int, home: Path) -> None:
    """Load these files one after the other and print two lines for each; whoever reads sees where
    it stops.
    """
    sys.path.insert(0, str(TESTS))
    import hostile

    hostile.SIZE = size
    os.chdir(home)
    hostile.use(hostile.models()["plain"])  # compiles what it needs
    for number in numbers:
        kind, path = hostile.make(number, home)
        print(json.dumps({"number": number, "kind": kind}), flush=True)
        print(json.dumps(examine(hostile, path)), flush=True)


def examine(hostile: ModuleType, path: Path) -> rows.Row:
    """What became of a file or folder."""
    files = path.iterdir() if path.is_dir() else [path]
    own = sum(file.stat().st_size for file in files)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start, model = peak(), time.process_time(), None
    try:
        model = hostile.load(path)
        outcome = "loaded"
    except CheckpointError:
        outcome = "refused"
    except Exception as error:
        outcome = f"raised {type(error).__name__}"
    seconds, megabytes = time.process_time() - start, (peak() - before - own) / 1e6
    try:
        if model is not None:
            hostile.use(model)
    except Exception as error:
        outcome = f"raised {type(error).__name__}, loaded"
    ran = Path(hostile.MARK).exists()
    return {"outcome": outcome, "seconds": seconds, "megabytes": megabytes, "ran": ran}


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def collect(arguments: argparse.Namespace) -> list[rows.Row]:
    """One row per file, from a worker process that is started again where a file killed it."""
    found: list[rows.Row] = []
    while len(found) < arguments.files:
        command = [sys.executable, __file__, "--threads", "1", "--worker", str(len(found))]
        command += ["--files", str(arguments.files), "--size", str(arguments.size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise RuntimeError(done.stderr[-1000:])
        starts, ends = lines[::2], lines[1::2]
        if len(ends) < len(starts):
            died = {"outcome": f"died ({done.returncode})", "ran": False}
            ends.append(died | {"seconds": 0, "megabytes": 0})
        found += [start | end for start, end in zip(starts, ends, strict=True)]
    return found


def row(kind: str, found: list[rows.Row]) -> rows.Row:
    """The counts of a kind of file."""
    mine = [each for each in found if each["kind"] == kind]
    outcomes = [each["outcome"] for each in mine]
    counts = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
    return {
        "kind": kind,
        "files": len(mine),
        **counts,
        "slowest_s": max(each["seconds"] for each in mine),
        "most_mb": max(each["megabytes"] for each in mine),
        "other": len(mine) - sum(counts.values()),
        "ran_code": sum(each["ran"] for each in mine),
    }


def main() -> None:
    parser = rows.Parser(__doc__, "hostile.csv")
    parser.flag("--files", "how many", 1400)
    parser.flag("--size", "bytes of bulk files", 4_000_000)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse()
    if arguments.worker is not None:
        with tempfile.TemporaryDirectory() as home:
            work(range(arguments.worker, arguments.files), arguments.size, Path(home))
        return
    found = collect(arguments)
    kinds = dict.fromkeys(each["kind"] for each in found)
    rows.write(arguments.out, [row(kind, found) for kind in kinds])
    wrong = [r for r in found if r["ran"] or r["outcome"] not in OUTCOMES]
    wrong += [r for r in found if r["seconds"] > SECONDS or r["megabytes"] > MEGABYTES]
    for each in wrong:
        print("WRONG", each)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
