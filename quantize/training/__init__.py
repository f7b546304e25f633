"""Train any module, judge it on held-out data, go on after an interruption."""

from quantize.training.config import TrainConfig
from quantize.training.evaluation import evaluate_images, evaluate_text
from quantize.training.loop import Batches, Judge, Loss, autocast, fit
from quantize.training.losses import classification_loss, next_token_loss
from quantize.training.optimizers import BatchedMuon, split_parameters
from quantize.training.progress import Progress, ProgressPrinter
from quantize.training.ranks import distributed, ranks
from quantize.training.resuming import TrainingError

__all__ = [
    "BatchedMuon",
    "Batches",
    "Judge",
    "Loss",
    "Progress",
    "ProgressPrinter",
    "TrainConfig",
    "TrainingError",
    "autocast",
    "classification_loss",
    "distributed",
    "evaluate_images",
    "evaluate_text",
    "fit",
    "next_token_loss",
    "ranks",
    "split_parameters",
]
