"""How much the model's output cares about each direction of a layer's output: second moments of
gradients (Fisher).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from quantize.calibration.inputs import call, check_batches, main_output, watching
from quantize.calibration.patches import exact, gram

log = logging.getLogger(__name__)


def fisher_loss(output: Any, *, categories: bool, generator: torch.Generator) -> torch.Tensor:
    """A scalar whose gradients' second moment is the Fisher information of the model's main output.

    categories: the output is logits, and labels are drawn from the model's own distribution
    (Martens, arXiv 1412.1193), in nats summed over rows; otherwise values with unit Gaussian noise,
    so that squared changes of the output count.
    """
    logits = main_output(output).float()
    if not categories:
        noise = torch.randn(logits.shape, generator=generator, dtype=torch.float32).to(
            logits.device
        )
        return (logits * noise).sum()
    logits = logits.reshape(-1, logits.shape[-1])
    labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(
        logits.device
    )
    return F.cross_entropy(logits, labels, reduction="sum")


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    *,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """E[g g^T], [M, M], of the gradients g with respect to each layer's outputs (rows as in
    `rows`), over all batches.

    loss(output, batch) is a scalar summed over its rows; by default `fisher_loss`, with categories
    where the output is named logits or is as wide as a vocabulary embedding. A layer that the loss
    doesn't depend on is missing from the result. No parameter's `.grad` is touched.
    """
    check_batches(batches)
    generator = torch.Generator().manual_seed(seed)
    vocabularies = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    moments: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    outputs: list[tuple[str, torch.Tensor]] = []

    def see(name: str) -> Callable[..., torch.Tensor]:
        def keep(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            outputs.append((name, output))
            return output.clone()  # the original stays as it is when the next layer works in place

        return keep

    hooks = [layer.register_forward_hook(see(name)) for name, layer in layers.items()]
    with watching(hooks, model), torch.enable_grad():
        for batch in batches:
            outputs.clear()
            output = call(model, batch)
            if loss is not None:
                value = loss(output, batch)
            else:
                named = not isinstance(output, torch.Tensor) and hasattr(output, "logits")
                main = main_output(output)
                categories = main.ndim > 0 and (named or main.shape[-1] in vocabularies)
                value = fisher_loss(output, categories=categories, generator=generator)
            if not value.requires_grad or not outputs:
                continue
            gradients = torch.autograd.grad(value, [o for _, o in outputs], allow_unused=True)
            for (name, _), gradient in zip(outputs, gradients, strict=True):
                if gradient is None:
                    continue
                layer = layers[name]
                if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
                    channel = -1 - len(layer.kernel_size)
                    gradient = gradient.movedim(channel, -1)  # [B, M, H, W] to [B, H, W, M]
                g = exact(gradient).reshape(-1, gradient.shape[-1])
                moments[name] = moments.get(name, 0) + gram(g)
                counts[name] = counts.get(name, 0) + g.shape[0]
    return {name: moment / counts[name] for name, moment in moments.items()}


def gradients_if_any(
    model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """`collect_gradients` of the default loss, the finite ones; none where the model has no
    floating output or no gradient.
    """
    try:
        found = collect_gradients(model, batches, layers)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        log.info("no gradients of %s: %s", type(model).__name__, error)
        return {}
    return {name: moment for name, moment in found.items() if torch.isfinite(moment).all()}
