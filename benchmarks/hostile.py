"""Load hostile and damaged files and folders, and count: loaded, refused, and what must not happen.

    uv run python benchmarks/hostile.py --files 1400

None may run code, kill the process, take over 10 s of the CPU or 200 MB beyond its own size, or
raise anything but CheckpointError. What loads is decoded from too, where C++ trusts its sizes.
Writes one row per kind to benchmarks/results/hostile.csv; exit code 1 if anything happened that
must not. Needs Linux (/proc) for the memory.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "hostile.csv"
SECONDS, MEGABYTES = 10, 200


def work(numbers: range, size: int, home: Path) -> None:
    """Load these files one after the other and print a line for each; whoever reads sees where it
    stops.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import hostile
    import torch

    from quantize.checkpoint import CheckpointError

    hostile.SIZE = size
    torch.set_num_threads(1)
    os.chdir(home)
    hostile.use(hostile.models()["plain"])  # compiles what it needs
    for number in numbers:
        kind, path = hostile.make(number, home)
        files = path.iterdir() if path.is_dir() else [path]
        own = sum(file.stat().st_size for file in files)
        print(json.dumps({"number": number, "kind": kind}), flush=True)
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
        if model is not None:
            try:
                hostile.use(model)
            except Exception as error:
                outcome = f"loaded, then {type(error).__name__}"
        ran = (home / hostile.MARK).exists()
        print(
            json.dumps(
                {"outcome": outcome, "seconds": seconds, "megabytes": megabytes, "ran": ran}
            ),
            flush=True,
        )


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def collect(files: int, size: int) -> list[dict]:
    """One row per file, from a worker process that is started again where a file killed it."""
    rows: list[dict] = []
    while len(rows) < files:
        command = [
            sys.executable,
            __file__,
            "--worker",
            str(len(rows)),
            "--files",
            str(files),
            "--size",
            str(size),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise RuntimeError(done.stderr[-1000:])
        starts, ends = lines[::2], lines[1::2]
        rows += [start | end for start, end in zip(starts, ends, strict=False)]
        if len(ends) < len(starts):
            rows.append(
                starts[-1]
                | {
                    "outcome": f"died ({done.returncode})",
                    "seconds": 0,
                    "megabytes": 0,
                    "ran": False,
                }
            )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=1400, help="how many (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=4_000_000, help="bytes of bulk files (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="CSV file (default: %(default)s)"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker is not None:
        with tempfile.TemporaryDirectory() as home:
            work(range(arguments.worker, arguments.files), arguments.size, Path(home))
        return

    rows = collect(arguments.files, arguments.size)
    table = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        counts = collections.Counter(row["outcome"].split(" (")[0].split(", ")[0] for row in mine)
        worst = {
            "slowest_s": max(r["seconds"] for r in mine),
            "most_mb": max(r["megabytes"] for r in mine),
        }
        worst = {name: round(value, 2) for name, value in worst.items()}
        ran = sum(row["ran"] for row in mine)
        table.append(
            {
                "kind": kind,
                "files": len(mine),
                "refused": counts["refused"],
                "loaded": counts["loaded"],
            }
            | worst
        )
        table[-1] |= {"other": len(mine) - counts["refused"] - counts["loaded"], "ran_code": ran}
        print(*table[-1].items(), flush=True)
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    wrong = [r for r in rows if r["ran"] or r["seconds"] > SECONDS or r["megabytes"] > MEGABYTES]
    wrong += [r for r in rows if not r["outcome"].startswith(("loaded", "refused"))]
    for row in wrong:
        print("WRONG", row)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
