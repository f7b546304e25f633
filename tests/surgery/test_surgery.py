"""Finding, replacing and resizing modules, and the record that repeats it on a fresh model."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from quantize import surgery


# clone
def test_clone_is_equal_and_shares_no_memory(net):
    """Same tensors, other storage."""
    twin = surgery.clone(net)
    assert twin.state_dict().keys() == net.state_dict().keys()
    for name, tensor in twin.state_dict().items():
        assert (
            torch.equal(tensor, net.state_dict()[name])
            and tensor.data_ptr() != net.state_dict()[name].data_ptr()
        )


def test_clone_keeps_ties_and_shared_modules(net):
    """What was one tensor, or one module, in the original is one in the copy, and another one than
    the original's.
    """
    twin = surgery.clone(net)
    assert twin.head.weight is twin.embed.weight and twin.head.weight is not net.head.weight
    assert twin.again is twin.body[2]


def test_clone_keeps_flags_and_hooks(net):
    """training, requires_grad and hooks survive in the copy and stay as they were in the
    original.
    """
    calls = []
    net.body[0].register_forward_hook(lambda *_: calls.append(1))
    net.norm.eval()
    net.body[0].weight.requires_grad_(False)
    twin = surgery.clone(net)
    for model in (net, twin):
        assert [m.training for m in model.modules()] == [m.training for m in net.modules()]
        assert model.training and not model.norm.training
        assert not model.body[0].weight.requires_grad and model.body[0].bias.requires_grad
    twin(torch.zeros(2, dtype=torch.long))
    assert calls == [1]


def test_what_is_empty_in_a_clone_is_its_own(net):
    """An empty dictionary or set is a new one, once where modules share it, also inside another
    copy; what is added to it later is seen in no other model.
    """
    net.log, net.body.log, net.seen = (log := {}), log, set()
    memo = {}
    for twin in (surgery.clone(net), surgery.deepcopy(net, memo)):
        assert twin.log is twin.body.log and twin.log == {} and twin.seen == set()
        twin.log["calls"] = 1
        twin.body[0].register_forward_hook(lambda *_: None)
        assert not net.log and not net.body[0]._forward_hooks and not twin.head._forward_hooks
    assert copy.deepcopy([net, log], memo) == [twin, twin.log]


class Anew(nn.Module):
    """Makes itself anew from what it was made of when it is copied, as einops' layers do."""

    def __init__(self, axes: int = 1) -> None:
        super().__init__()
        self.axes = axes

    def __getstate__(self) -> dict[str, int]:
        return {"axes": self.axes}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def test_clone_keeps_the_mode_of_modules_that_make_themselves_anew():
    twin = surgery.clone(nn.Sequential(nn.Linear(2, 2), Anew(3)).eval())
    assert not any(module.training for module in twin.modules())
    assert twin[1].axes == 3


def test_clone_refuses_what_it_cannot_edit(net):
    """TorchScript and things that are no module are a TypeError that says so."""
    with pytest.raises(TypeError, match=r"must be an .*Module, got dict"):
        surgery.clone({})
    with pytest.warns(FutureWarning):
        scripted = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match="TorchScript"):
        surgery.clone(scripted)
    net.body[0] = scripted
    with pytest.raises(TypeError, match=r"'body.0' is a TorchScript module"):
        surgery.clone(net)


# skip
@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["head"], ["body.0", "body.2"]),
        (["body"], ["head"]),
        (["*.2"], ["body.0", "head"]),
        (["b?dy.*", "h*"], []),
        ([nn.Sequential], ["head"]),
        ([nn.Linear], []),
        (["nothing*"], ["body.0", "body.2", "head"]),
        ([], ["body.0", "body.2", "head"]),
    ],
)
def test_skip_takes_names_globs_and_types(net, skip, left):
    """A skipped name or type takes what is inside it along."""
    skipped = surgery.skip_filter(net, skip)
    linears = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    assert [name for name, module in linears.items() if not skipped(name, module)] == left


@pytest.mark.parametrize(
    ("skip", "error", "named"),
    [
        (["hed"], ValueError, "'hed'"),
        ("head", TypeError, "'head'"),
        ([3], TypeError, "3"),
        (nn.Linear, TypeError, "Linear"),
    ],
)
def test_skip_refuses_what_means_nothing(net, skip, error, named):
    """A misspelt name, a bare string or type, a number: an error naming it, never a skip that
    silently does nothing.
    """
    with pytest.raises(error, match=named):
        surgery.skip_filter(net, skip)


# replace
def test_replace_reaches_every_place(net):
    """A module held twice is replaced in both places."""
    new = nn.Linear(6, 4)
    assert surgery.replace(net, {net.again: new}) is net
    assert net.body[2] is new and net.again is new


def test_replace_the_root(net):
    """The root itself can be replaced: the new one is returned."""
    new = nn.Identity()
    assert surgery.replace(net, {net: new}) is new


def test_replace_by_a_wrapper_around_the_old(net):
    """The replacement may hold what it replaces; it isn't replaced again inside."""
    old = net.head
    surgery.replace(net, {old: nn.Sequential(old)})
    assert net.head[0] is old


def test_clone_of_results_is_their_values(net):
    """A module that keeps a result with a history is copied: the copy keeps the value, a shared one
    stays shared.
    """
    net.kept = torch.ones(2, requires_grad=True) * 3
    net.twice = net.kept
    copied = surgery.clone(net)
    assert (
        torch.equal(copied.kept, net.kept)
        and copied.kept.grad_fn is None
        and copied.twice is copied.kept
    )


def test_clone_names_what_cannot_be_copied(net):
    """Something that Python can't copy is refused with the module that holds it."""
    holder = nn.Sequential(nn.Identity(), net)
    net.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"module '1' .*can't be copied"):
        surgery.clone(holder)
