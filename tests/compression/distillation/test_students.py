"""Students of others' models: made, taught, saved, recovered."""

import math

import pytest
import torch
import torch.nn.functional as F
from distillation_models import DEEP, deep, distance, inputs, net
from helpers import call, run
from torch import nn

from quantize import (
    DecoderConfig,
    DecoderLM,
    KVCache,
    generate,
    load,
    save,
)
from quantize.compression.distillation import (
    distill,
    make_student,
    recover,
    soft_kl,
)
from quantize.compression.distillation.teach import recovery_recipe, student_recipe
from quantize.compression.low_rank import factorize_low_rank
from quantize.compression.pruning import prune_ln_structured
from quantize.training import TrainConfig


def test_near_students_are_trained_at_lower_rates():
    """Rates of recovery fall with the root of the distance, down to a 64th; those of smaller
    students half as fast.
    """
    full = TrainConfig(steps=100)
    distances = (math.inf, 1, 1 / 16, 0)
    assert [recovery_recipe(100, far).muon_lr / full.muon_lr for far in distances] == [
        1,
        1,
        1 / 4,
        1 / 64,
    ]
    assert [student_recipe(100, far).lr / full.lr for far in distances] == [1, 1, 1 / 2, 1 / 64]


def test_a_new_student_with_batch_norms_starts_from_projections_that_fit():
    """Hidden states are those of training, not of running statistics that have seen nothing yet;
    those stay as they are.
    """

    def model(width: int) -> nn.Sequential:
        torch.manual_seed(width)
        return nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 5)
        )

    teacher, student, data = model(32), model(16), [100 * x for x in inputs(4, 64)]
    losses: list[float] = []
    pairs = [(x, x[:, 0]) for x in data]
    distill(
        student, teacher, pairs, steps=1, hidden={"2": "2"}, alpha=0, loss=lambda o, _: 0 * o.sum(),
        on_progress=lambda at: losses.append(at.loss),
    )  # fmt: skip
    assert losses[0] < 1  # relative to the teacher's mean square
    assert student[1].num_batches_tracked == 0


@pytest.mark.parametrize("name", DEEP)
def test_two_block_student_comes_nearer_in_30_steps(name):
    """A student of the first and last of four blocks answers more like its teacher after 30
    steps, and but for batch norms after 15.
    """
    teacher, example = deep(name)
    student = make_student(teacher, depth=2, example_inputs=example)
    assert sum(p.numel() for p in student.parameters()) < sum(
        p.numel() for p in teacher.parameters()
    )
    result = distill(student, teacher, [example], steps=30 if name == "resnet" else 15)
    measure = soft_kl if hasattr(call(teacher, example), "logits") else F.mse_loss
    before, after = (
        measure(run(m, example), run(teacher, example)).item() for m in (student, result)
    )
    assert after < 0.5 * before


@pytest.mark.slow
def test_shorter_narrower_student_is_saved_and_loaded(tmp_path):
    """`make_student` leaves a record from which a fresh teacher becomes the student; layers are
    numbered anew.
    """
    teacher, example = deep("llama")
    student = make_student(teacher, depth=2, width=0.5, example_inputs=example)
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    taught = distill(student, teacher, [example], steps=3)
    save(taught, tmp_path / "student.safetensors")
    again = load(tmp_path / "student.safetensors", model=deep("llama")[0])
    assert torch.equal(run(again, example), run(taught, example))


def test_student_of_the_own_decoder_loads_by_itself_and_decodes_with_a_cache(tmp_path):
    """Blocks taken out are numbered anew, so that a key-value cache finds its layers; the file
    needs no model.
    """
    torch.manual_seed(0)
    teacher = DecoderLM(DecoderConfig(width=32, layers=4, heads=2))
    nn.init.normal_(teacher.head.weight)
    ids = torch.arange(12)[None]
    save(make_student(teacher, depth=2, width=0.5, example_inputs=ids), tmp_path / "student.pth")
    student = load(tmp_path / "student.pth")
    cached = generate(student, ids, max_new_tokens=8, cache=KVCache.for_model(student))
    assert torch.equal(cached, generate(student, ids, max_new_tokens=8, cache=False))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pruned", "low rank"])
def test_recovery_keeps_the_structure_and_closes_most_of_the_gap(how, tmp_path):
    """The recovered model has the pruned or factorized shapes, is saved and loaded, and is nearer
    to the teacher.
    """
    teacher, data = net(64).eval(), inputs(16, 64)
    small = (
        prune_ln_structured(teacher, data[0], amount=0.5, round_to=1)
        if how == "pruned"
        else factorize_low_rank(teacher, ratio=0.5, skip=["4"])
    )
    recovered = recover(small, teacher, data, steps=100)
    assert [p.shape for p in recovered.parameters()] == [p.shape for p in small.parameters()]
    assert distance(recovered, teacher, data[0]) < 0.5 * distance(small, teacher, data[0])
    save(recovered, tmp_path / "recovered.pth")
    assert torch.equal(
        run(load(tmp_path / "recovered.pth", model=net(64)), data[0]), run(recovered, data[0])
    )
