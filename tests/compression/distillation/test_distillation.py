"""Distillation against hand-worked values, identities, and models that others wrote."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import assert_close, call, run, zoo
from torch import nn

from quantize import (
    DecoderConfig,
    DecoderLM,
    KVCache,
    generate,
    load,
    quantize_dynamic,
    save,
    training,
)
from quantize.compression.distillation import (
    distill,
    hidden_loss,
    make_student,
    recover,
    relation_loss,
    soft_kl,
)
from quantize.compression.distillation.losses import remoteness, top_kl, top_logits
from quantize.compression.distillation.match import watching
from quantize.compression.distillation.teach import recovery_recipe, student_recipe
from quantize.compression.low_rank import factorize_low_rank
from quantize.compression.pruning import prune_ln_structured
from quantize.training import TrainConfig, TrainingError


def net(width: int = 16, classes: int = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def inputs(count: int = 4, rows: int = 16, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 8, generator=generator) for _ in range(count)]


def labelled(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x, x[:, :5].argmax(-1)) for x in inputs(count)]


def distance(student: nn.Module, teacher: nn.Module, batch: object) -> float:
    s, t = run(student, batch), run(teacher, batch)
    return soft_kl(s, t).item() if s.shape[-1] > 5 or s.ndim == 2 else F.mse_loss(s, t).item()


# ------------------------------------------------------------------------------------------------
# losses


def test_kl_by_hand():
    """At T = 2, logits [2 ln 3, 0] against [0, 0] give 4 (3/4 ln(3/2) + 1/4 ln(1/2))."""
    value = soft_kl(torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]]), temperature=2.0)
    assert value.item() == pytest.approx(
        4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-6
    )


def test_kl_of_equal_logits_is_zero_with_zero_gradient():
    """Nothing to learn where student and teacher agree, to the last bit."""
    logits = torch.randn(3, 7, 11, requires_grad=True)
    value = soft_kl(logits, logits.detach().clone(), 3.0)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == 0
    assert torch.count_nonzero(gradient) == 0


def test_kl_and_its_gradient_are_torchs():
    """The written-out gradient is that of `kl_div` through `log_softmax`."""
    s, t = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9)
    ours = soft_kl(s, t, 2.5)
    theirs = 2.5**2 * F.kl_div(
        (s / 2.5).log_softmax(-1), (t / 2.5).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(3 * ours, s)[0], torch.autograd.grad(3 * theirs, s)[0])


def test_masked_rows_do_not_count():
    """The mean over kept rows is that of a batch without the others; -inf logits of a teacher are
    fine.
    """
    s, t = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    t[..., 0] = -math.inf
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    assert_close(soft_kl(s, t, 2.0, mask), soft_kl(s[mask == 1], t[mask == 1], 2.0))


def test_top_classes_give_the_whole_divergence_when_all_are_kept_and_less_when_not():
    """Merging the unlikely classes can only lower the divergence."""
    s, t = torch.randn(10, 20), 3 * torch.randn(10, 20)
    whole = soft_kl(s, t, 2.0)
    assert_close(top_kl(s, *top_logits(t, 2.0, 20), 2.0), whole, factor=200)  # kept as fp16
    part = top_kl(s, *top_logits(t, 2.0, 8), 2.0)
    assert 0.5 * whole < part < whole


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_loss_is_zero_for_equal_states_and_free_of_the_teachers_scale(kind):
    """0 when equal; scaling both models' states changes nothing."""
    s, t = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    assert hidden_loss(t, t, kind).item() == pytest.approx(0, abs=1e-6)
    assert_close(hidden_loss(100 * s, 100 * t, kind), hidden_loss(s, t, kind))


def test_relation_loss_knows_no_width_and_no_rotation():
    """Relations are dot products: a rotated teacher is the same, and a student of half its width
    can be compared.
    """
    t = torch.randn(2, 5, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert relation_loss(t @ rotation, t, heads=1).item() == pytest.approx(0, abs=1e-6)
    assert relation_loss(torch.randn(2, 5, 4), t, heads=2) > 0


@pytest.mark.parametrize("kind", ["logits", "values"])
def test_remoteness_is_0_for_the_same_answers_and_1_for_the_mean_answer(kind):
    """A student that only knows the mean answer is at 1, one that says the opposite beyond; never
    below 0.

    Where the teacher's rows are alike, the distance is relative to its mean square or to
    log(classes).
    """
    t = 2 * torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    mean = t.softmax(-1).mean(0).log() if kind == "logits" else t.mean(0)
    assert remoteness(t, t, kind) == pytest.approx(0, abs=1e-5)
    assert remoteness(mean.expand_as(t), t, kind) == pytest.approx(1, rel=1e-4)
    assert remoteness(-t, t, kind) > 1
    assert 0 <= remoteness(t + 1e-7 * torch.randn(30, 7), t, kind) < 1e-9
    alike = t[:1].expand_as(t)
    expected = soft_kl(-alike, alike).item() / math.log(7) if kind == "logits" else 4.0
    assert remoteness(-alike, alike, kind) == pytest.approx(expected, rel=1e-4)
    assert remoteness(torch.zeros(3, 7), torch.zeros(3, 7), kind) == 0


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


# -------------------------------------------------------------------------------------------
# distill itself


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


def test_cached_teacher_runs_once_a_batch(tmp_path):
    """From the second round on the teacher isn't run; with all classes kept the student is nearly
    the same.
    """

    teacher, student, data, calls = net(32), net(seed=5), inputs(4), []
    teacher.register_forward_hook(
        lambda _, args, __: (
            calls.append(len(args[0])) if torch.is_inference_mode_enabled() else None
        )
    )
    plain = distill(student, teacher, data, steps=12)
    calls.clear()
    cached = distill(student, teacher, data, steps=12, cache=tmp_path / "teacher", cache_top=5)
    assert len(calls) == 1 + 4  # one to try a step
    assert_close(run(cached, data[0]), run(plain, data[0]), factor=2000)
    with pytest.raises(ValueError, match="holds another teacher's answers"):
        distill(student, net(32, seed=9), data, steps=2, cache=tmp_path / "teacher", cache_top=5)


#
# -------------------------------------------------------------------------------------------------
# the zoo

DEEP = {
    "bert": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 4},
    "llama": {"num_hidden_layers": 4},
    "t5": {"num_layers": 4, "num_decoder_layers": 4},
    "vit": {"num_hidden_layers": 4},
    "resnet": {"depths": [1, 4, 1, 1]},
    "whisper": {"encoder_layers": 4, "decoder_layers": 4},
}


def deep(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model of the zoo with stacks of four blocks; weights larger than at birth, so that answers
    differ.
    """
    model, example = zoo(name)
    config = copy.deepcopy(model.config)
    for key, value in DEEP[name].items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = type(model)(type(config).from_dict(config.to_dict())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    return model, example


@pytest.mark.parametrize("name", DEEP)
def test_two_block_student_comes_nearer_in_30_steps(name):
    """A student of the first and last of four blocks answers more like its teacher after 30
    steps.
    """
    teacher, example = deep(name)
    student = make_student(teacher, depth=2, example_inputs=example)
    assert sum(p.numel() for p in student.parameters()) < sum(
        p.numel() for p in teacher.parameters()
    )
    result = distill(student, teacher, [example], steps=30)
    measure = soft_kl if hasattr(call(teacher, example), "logits") else F.mse_loss
    before, after = (
        measure(run(m, example), run(teacher, example)).item() for m in (student, result)
    )
    assert after < 0.5 * before


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


def test_relations_of_attention_train_a_transformer():
    """MiniLM's value relations bring the student's values nearer to those of a teacher of twice the
    depth and width.
    """
    teacher, example = deep("bert")
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    torch.manual_seed(1)
    student = transformers.BertModel(config)
    names = {"encoder.layer.1.attention.self.value": "encoder.layer.3.attention.self.value"}
    result = distill(
        student,
        teacher,
        [example],
        steps=30,
        relations=names,
        select=lambda output: output.last_hidden_state[..., :32],
    )
    ((name, target),) = names.items()
    before, after = (
        relation_loss(*outputs_of(m, name, teacher, target, example), heads=4).item()
        for m in (student, result)
    )
    assert after < 0.8 * before


def outputs_of(student, name, teacher, target, example):
    """What the two named modules give."""
    with (
        watching(student.eval(), [name]) as seen,
        watching(teacher, [target]) as taught,
        torch.no_grad(),
    ):
        call(student, example), call(teacher, example)
    return seen[name], taught[target]


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


# -------------------------------------------------------------------------------------------------
# recovery


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


# ------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0; allowed: a finite number > 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"alpha": 1.5}, r"alpha is 1.5; allowed: a finite number in \[0, 1\]"),
        ({"alpha": 0.5}, "give loss"),
        ({"steps": 0}, "steps is 0; allowed: an integer >= 1"),
        ({"hidden": ["nowhere"]}, "hidden names 'nowhere', which is no module of the student"),
        ({"hidden": {"2": "nowhere"}}, "hidden names 'nowhere', which is no module of the teacher"),
        (
            {"hidden": {"2": "4"}, "hidden_kind": "l1"},
            "hidden_kind is 'l1'; allowed: 'mse', 'cosine'",
        ),
        ({"kind": "other"}, "kind is 'other'; allowed"),
        ({"relations": ["2"]}, "relations '2': '2'.*need"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    """One line that says which argument, its value, and what is allowed."""
    with pytest.raises(ValueError, match=message):
        distill(net(), net(), inputs(), **{"steps": 2, **options})


def test_batches_that_do_not_fit_are_named():
    """Empty, an iterator, inputs that the models don't take, pairs without a loss."""
    with pytest.raises(ValueError, match="batches is empty"):
        distill(net(), net(), [], steps=1)
    with pytest.raises(TypeError, match="batches must be re-iterable"):
        distill(net(), net(), iter(inputs()), steps=1)
    with pytest.raises(ValueError, match=r"the student .* doesn't run on the first batch"):
        distill(net(), net(), [torch.zeros(3, 4)], steps=1)
    with pytest.raises(ValueError, match="the first batch is empty"):
        distill(net(), net(), [torch.zeros(0, 8)], steps=1)
    with pytest.raises(ValueError, match="give loss too"):
        distill(net(), net(), labelled(), steps=1)
    with pytest.raises(TypeError, match="a batch is a pair"):
        distill(net(), net(), inputs(), steps=1, loss=F.cross_entropy)


def test_other_vocabularies_and_untrainable_students_are_refused():
    """Class counts that differ, int8, 16 bits, frozen, and a forward without gradients."""
    with pytest.raises(
        ValueError, match=r"differ in classes \(or vocabulary\): outputs \[16, 5\] and \[16, 6\]"
    ):
        distill(net(), net(classes=6), inputs(), steps=1)
    with pytest.raises(ValueError, match="holds integers, which can't be trained"):
        recover(quantize_dynamic(net(64)), net(64), inputs(), steps=1)
    with pytest.raises(ValueError, match=r"parameter '0.weight' of the student is torch.float16"):
        distill(net().half(), net(), inputs(), steps=1)
    with pytest.raises(TrainingError, match="nothing to train"):
        distill(net().requires_grad_(False), net(), inputs(), steps=1)

    class Detached(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(TrainingError, match="no gradient reaches the student"):
        distill(Detached(*net()), net(), inputs(), steps=1)


def test_loss_that_is_not_finite_stops_with_the_last_good_student():
    """The error brings the student as it was before the step, running statistics included."""
    student, data = nn.Sequential(net(), nn.BatchNorm1d(5)), inputs(4)
    recipe = TrainConfig(steps=3, warmup=0, cooldown=0)
    good = distill(student, net(), lambda step: data[step % 2], steps=2, recipe=recipe)
    data[2] = torch.full_like(data[2], math.nan)
    with pytest.raises(TrainingError, match=r"step 2: loss nan.*not finite") as caught:
        distill(
            student,
            net(),
            lambda step: data[step % 4] if step < 3 else data[3],
            steps=3,
            recipe=recipe,
        )
    with pytest.raises(
        ValueError, match=r"loss on batch 2 \(held out\) is nan before the first step"
    ):
        distill(student, net(), data, steps=3, recipe=recipe)
    for a, b in zip(
        caught.value.student.state_dict().values(), good.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give depth"),
        ({"depth": 0}, "depth is 0; allowed"),
        ({"depth": 1.5}, "depth is 1.5; allowed"),
        ({"width": 0.0}, "width is 0.0; allowed"),
        ({"depth": 9}, "removes no block of .*has only 4 blocks"),
        (
            {"depth": 2, "example_inputs": torch.zeros(2)},
            "the teacher doesn't run on example_inputs",
        ),
    ],
)
def test_students_that_cannot_be_made_are_named(options, message):
    """Numbers out of range, nothing to remove, inputs that don't run."""
    teacher, example = deep("gpt2")
    with pytest.raises(ValueError, match=message):
        make_student(teacher, **{"example_inputs": example, **options})
