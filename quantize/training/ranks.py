"""Training in several processes: gradients are averaged by one plain all-reduce."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def ranks() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) outside `torchrun`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def distributed(device: str = "cpu"):
    """Join the processes that `torchrun` started (gloo on CPU, nccl on CUDA) and leave at the end;
    yields `ranks()`.
    """
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joins:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield ranks()
    finally:
        if joins:
            dist.destroy_process_group()


def broadcast(model: nn.Module, world: int) -> None:
    """Start every rank from rank 0's weights."""
    if world > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), 0)


def average(loss: Tensor, parameters: list[nn.Parameter], world: int) -> float:
    """Average loss and gradients over the ranks, in one message; so all ranks also agree on what is
    not finite.
    """
    if world == 1:
        return loss.item()
    own = []
    for parameter in parameters:  # a rank whose batch left a parameter unused still takes part
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        own.append(parameter.grad)
    values = [loss.detach().float().reshape(1)] + [gradient.flatten() for gradient in own]
    flat = torch.cat(values) / world
    dist.all_reduce(flat)
    mean, *gradients = flat.split([value.numel() for value in values])
    for gradient, averaged in zip(own, gradients, strict=True):
        gradient.copy_(averaged.view_as(gradient))
    return mean.item()
