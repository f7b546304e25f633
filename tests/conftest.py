"""One thread, here and in the processes that tests start: small models are fastest so, and results
don't depend on cores.
"""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
# Graphs of one or two layers hardly repeat an operation: looking for each in a cache of thousands
# takes a fifth of an export here.
os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"
# Dozens of tests start a Python that imports torch: compiled modules are kept for the next one,
# also where the environment says otherwise.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A run that a script starts in the background ignores Ctrl-C, and so would the processes that tests
# send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Thousands of small files, none of which must outlive a power cut.
os.fsync = lambda descriptor: None


# Of the models that others wrote (helpers.ZOO) these are met with the slow tests only; a text
# encoder and a decoder are met always; other tests have a residual network and a Llama of our own.
SLOWER_MODELS = {
    "convnext",
    "llama",
    "mistral",
    "mobilenet_v2",
    "qwen2",
    "resnet",
    "t5",
    "vit",
    "whisper",
}
# Of the cases of these tests that aren't slow by themselves, a quick run (-m "not slow") has one in
# so many; they take half of its time and ask one question of many layers, models or settings.
ONE_CASE_IN = {
    7: {
        "test_a_change_between_two_calls_is_seen",
        "test_a_draft_changes_no_token",
        "test_a_folder_gives_the_model_back",
        "test_activation_joins_the_convolution",
        "test_padding_by_name_becomes_numbers",
        "test_pair",
        "test_promises",
        "test_pruned_equals_masked",
        "test_same_logits_and_tokens",
        "test_the_graph_is_the_same",
    },
    5: {
        "test_a_recipe_is_its_functions_in_a_row",
        "test_batch_norm_disappears",
        "test_changes_of_what_is_reached_count",
        "test_classifiers_are_one_program",
        "test_graphs",
        "test_layers_that_do_more",
        "test_mistakes_on_the_command_line",
        "test_models_that_read_weights",
        "test_native_equals_a_pass_without_a_cache",
        "test_padding_moves_into_the_convolution",
        "test_steps_are_told_with_the_time_left",
        "test_the_bits_of_the_steps",
        "test_ticks_of_the_cache_chart_are_plain_numbers",
    },
    3: {
        "test_a_change_under_way_is_seen",
        "test_a_compressed_model_refuses_to_become_a_folder",
        "test_changes_of_the_module_count",
        "test_default_dtype_of_the_caller_does_not_matter",
        "test_each_row_is_what_it_is_alone",
        "test_every_refusal_is_a_checkpoint_error",
        "test_few_outputs_are_held_at_once",
        "test_grad_mode_of_the_caller_does_not_matter",
        "test_inputs_of_little_rank",
        "test_joined_batches_are_the_given_ones_in_a_row",
        "test_layers_whose_weight_is_computed_are_left",
        "test_native_takes_any_width",
        "test_only_dead_values_are_overwritten",
        "test_other_forwards_run_as_they_are",
        "test_outputs_that_moved_by_half_are_told",
        "test_plot_is_an_image_for_any_number_of_rows",
        "test_random_model",
        "test_state_in_tensors_is_carried_from_call_to_call",
        "test_summary_is_the_same_in_a_copy_and_in_a_file",
        "test_texts_written_together_are_those_written_alone",
        "test_transform_elsewhere",
        "test_two_block_student_comes_nearer_in_30_steps",
        "test_what_native_code_does_not_know_runs_by_itself",
        "test_zoo_gets_smaller_and_still_runs",
        "test_zoo_is_equal_at_every_size",
    },
}
SERVERS = {"running", "command"}  # fixtures that take seconds: all their tests run in one worker


def pytest_configure(config: pytest.Config) -> None:
    """Set torch up, but in a process that only hands tests out to workers: these wait for it, and
    it runs none.
    """
    if config.getoption("tx", None) and not hasattr(config, "workerinput"):
        return
    import torch

    # What messages about a graph would show is the test's own stack, taken at each operation.
    torch.fx.config.do_not_emit_stack_traces = True
    # Seeds of devices that aren't there would be queued, with the text of a deep call stack,
    # thousands of times (see quantize/seeding.py).
    torch.manual_seed = torch.default_generator.manual_seed


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark as slow what is parametrized by one of the slower models, and most cases of the tests
    that have many; start servers once.
    """
    for item in items:
        for server in SERVERS.intersection(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(server))
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value in SLOWER_MODELS for value in parameters):
            item.add_marker(pytest.mark.slow)
    for share, names in ONE_CASE_IN.items():
        for name in names:
            cases = [item for item in items if item.originalname == name]
            quick = [case for case in cases if case.get_closest_marker("slow") is None]
            for i, case in enumerate(quick):
                if i % share:
                    case.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Leave what is imported by now to itself, to the end, and collect cycles less often: tracing
    makes many objects, and a third of all time went into looking for cycles among them.
    """
    from hypothesis.internal.entropy import deterministic_PRNG
    from nurseries import choose_without_a_clock

    choose_without_a_clock()
    gc.freeze()
    with deterministic_PRNG():
        pass  # the first one looks for cycles among all that there is by then
    gc.set_threshold(500_000, 20, 20)


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests take the most rewritten way, not the fastest one on a busy machine, and kernels for
    layers of any size.
    """
    from nurseries import rewrite_most

    rewrite_most(monkeypatch)


@pytest.fixture
def no_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have an empty picture: drawing one takes longer than most tests."""
    monkeypatch.setattr("quantize.measuring.report.pareto_plot", lambda rows: b"")


@pytest.fixture(scope="session")
def _nurseries() -> Iterator[Any]:
    """Pythons that children are forked from, which are gone at the end."""
    from nurseries import Nurseries

    with Nurseries() as nurseries:
        yield nurseries
    assert nurseries.are_reaped()


@pytest.fixture(scope="module")
def one_nursery(_nurseries: Any) -> Iterator[None]:
    """Comparisons of a module fork their children from one Python, and so do other modules'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.measuring.turns.Nursery", _nurseries)
        patch.setattr("quantize.compression.search.finding.Nursery", _nurseries)
        yield
