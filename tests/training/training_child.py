"""A process that trains: `kill STATE` says each step, `ranks WEIGHTS` is one rank of several."""

import sys
from dataclasses import replace

import torch
from training_models import RECIPE, batches, digest, network, two_rank_task

from quantize import training
from quantize.training import classification_loss, fit


def main(how: str, path: str) -> None:
    """Train, and say or save what came out."""
    with training.distributed() as (rank, world):
        if how == "kill":
            recipe = replace(RECIPE, steps=120)
            model = fit(
                network(),
                batches,
                classification_loss,
                recipe,
                checkpoint_path=path,
                checkpoint_seconds=0,
                resume=True,
                on_progress=lambda at: print(at.step, flush=True),
            )
            print(digest(model))
            return
        model = fit(*two_rank_task(rank, world), bf16=False)
        if rank == 0:
            torch.save(model.state_dict(), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
