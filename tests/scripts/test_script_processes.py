"""The scripts as processes: ranks, Ctrl-C, one folder for many."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fresh import Python, in_ranks, python
from script_ranks import train_briefly

import quantize
from quantize import jobs


@pytest.mark.slow
def test_many_ranks_prepare_the_same_folder(tmp_path):
    """Processes that check one folder at the same time don't get into each other's way."""
    out = tmp_path / "out"
    with ThreadPoolExecutor(16) as pool:
        prepared = pool.map(lambda _: jobs.prepare("tiny", task="image", out=out), range(48))
        assert len(list(prepared)) == 48
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
def test_two_ranks_train_and_report(tmp_path):
    """The README's torchrun line, and two ranks without the launcher into the same folder: the same
    weights each time.
    """
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    options = "--threads 1 --task image --preset tiny --steps 2 --variants fp32 --out".split()
    options.append(str(tmp_path))
    done = python(*launcher, "train.py", *options)
    assert done.returncode == 0, done.stderr
    first = quantize.load(tmp_path / "model.pth").state_dict()
    (tmp_path / "model.pth").unlink()
    assert in_ranks(train_briefly, 2, options) == [0, 0]
    second = quantize.load(tmp_path / "model.pth").state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.slow
@pytest.mark.xdist_group("fresh")
def test_ctrl_c_leaves_whole_files_and_says_how_to_go_on(tmp_path):
    """Exit code 130, one line that names --resume, only a whole training state in the folder."""
    line = "--task image --preset tiny --steps 100000 --out".split()
    script = Python("train.py", *line, tmp_path)
    while "\nfp32: step" not in "\n" + script.told():
        assert script.process.is_alive(), script.told()
        time.sleep(0.05)
    os.kill(script.process.pid, signal.SIGINT)
    done = script.ended()
    assert done.returncode == 130
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: stopped; the same command with --resume")
    assert [path.name for path in tmp_path.iterdir()] == ["fp32.state"]
