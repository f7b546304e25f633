"""`distill`: what is matched, what is left alone, resuming, memory."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from distillation_models import distance, inputs, labelled, net
from helpers import run
from torch import nn

from quantize import (
    training,
)
from quantize.compression.distillation import (
    distill,
)
from quantize.training import TrainConfig, TrainingError


def test_alpha_zero_is_plain_training():
    """Bit for bit what `fit` does with the task loss, the teacher not even run."""

    class Unusable(nn.Module):
        def forward(self, x):
            raise AssertionError("the teacher ran")

    student, data, recipe = net(), labelled(), TrainConfig(steps=6, warmup=2)

    def batches(step: int) -> tuple:
        return data[step % 4]

    taught = distill(
        student, Unusable(), batches, steps=6, alpha=0, loss=F.cross_entropy, recipe=recipe
    )
    plain = training.fit(copy.deepcopy(student), batches, training.classification_loss, recipe)
    for a, b in zip(taught.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_given_is_changed():
    """Parameters, buffers, flags and hooks of student and teacher, and the random numbers, are as
    before.
    """

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.norm, self.drop = net(32), nn.BatchNorm1d(5), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.norm(self.net(x))) + 1e-3 * torch.rand(1)

    teacher, student = Noisy(), Noisy()
    teacher.norm.eval()
    before = [copy.deepcopy(m.state_dict()) for m in (teacher, student)]
    flags = [[m.training for m in model.modules()] for model in (teacher, student)]
    state = torch.get_rng_state()
    result = distill(student, teacher, inputs(), steps=3, hidden=["net.2"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [[m.training for m in model.modules()] for model in (teacher, student)] == flags
    for model, old in zip((teacher, student), before, strict=True):
        assert all(torch.equal(model.state_dict()[k], v) for k, v in old.items())
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())
    assert not any(m._forward_hooks for m in result.modules())
    assert not any(m.training for m in result.modules())


def test_student_of_another_width_learns_outputs_and_hidden_states():
    """A learned projection stands between widths 16 and 32 and isn't in what comes back."""
    teacher, student, data = net(32), net(16, seed=5), inputs(8, 64)
    result = distill(student, teacher, data, steps=60, hidden={"2": "2"})
    assert result.state_dict().keys() == student.state_dict().keys()
    assert distance(result, teacher, data[0]) < 0.3 * distance(student, teacher, data[0])


def test_regression_is_matched_by_squared_error():
    """A single output can't be a distribution."""
    teacher, student, data = net(32, classes=1), net(8, classes=1, seed=3), inputs(8, 64)
    result = distill(student, teacher, data, steps=80)
    gap = [F.mse_loss(run(m, data[0]), run(teacher, data[0])).item() for m in (student, result)]
    assert gap[1] < 0.5 * gap[0]


def test_select_chooses_what_is_matched():
    """Outputs of any type, matched where `select` points."""

    class Two(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.a, self.b = net(seed=seed), net(seed=seed + 1)

        def forward(self, x):
            return {"a": self.a(x), "b": [self.b(x)]}

    teacher, student, data = Two(0), Two(7), inputs()
    result = distill(student, teacher, data, steps=20, select=lambda output: output["b"][0])
    assert all(
        torch.equal(p, q)
        for p, q in zip(result.a.parameters(), student.a.parameters(), strict=True)
    )
    assert distance(result.b, teacher.b, data[0]) < distance(student.b, teacher.b, data[0])


def test_killed_run_goes_on_where_it_was(tmp_path):
    """Interrupted and resumed, the student has the bits of an uninterrupted run, projections
    included.
    """
    teacher, student, data = net(32), net(16, seed=5), inputs()
    options = {"steps": 8, "hidden": {"2": "2"}, "recipe": TrainConfig(steps=8, warmup=2)}
    whole = distill(student, teacher, data, **options)
    path = tmp_path / "state"

    class Stop(Exception):
        pass

    def stop(at):
        if at.step == 5:
            raise Stop

    with pytest.raises(Stop):
        distill(
            student,
            teacher,
            data,
            **options,
            checkpoint_path=path,
            checkpoint_seconds=0.0,
            on_progress=stop,
        )
    resumed = distill(student, teacher, data, **options, checkpoint_path=path, resume=True)
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True)
    )
    with pytest.raises(TrainingError, match=r"another run: identity\.distillation\.temperature"):
        distill(
            student, teacher, data, **options, temperature=3.0, checkpoint_path=path, resume=True
        )


def test_no_graph_of_the_teacher_is_kept():
    """The teacher runs in inference mode, and what is saved for the way back doesn't grow with
    it.
    """

    def saved(teacher: nn.Module) -> int:
        count = 0

        def pack(x):
            nonlocal count
            count += x.numel()
            return x

        modes = []
        teacher[0].register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            distill(net(), teacher, inputs(), steps=1)
        assert modes and not any(modes)
        return count

    assert saved(net(512)) == saved(net(16))


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that torch had allocated while running, beyond what it had before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_teacher():
    """A teacher ten times as deep costs no more than its largest activation, and its weights aren't
    there twice.
    """

    def teacher(depth: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(8, 256), *(nn.Linear(256, 256) for _ in range(depth)), nn.Linear(256, 5)
        )

    data, student = inputs(1, 2048), net()

    def peak(t: nn.Module) -> int:
        return peak_bytes(lambda: distill(student, t, data, steps=2, bf16=False))

    peaks = [peak(teacher(depth)) for depth in (3, 30)]
    activation = 2048 * 256 * 4
    assert peaks[1] - peaks[0] < activation / 2  # thirty of them are kept if there is a graph
    assert peaks[1] < 4 * activation < sum(4 * p.numel() for p in teacher(35).parameters())
