"""`for_decoding`: a `DecoderLM` whose passes over a few tokens run outside of Python.

At one token per pass, the arithmetic of a layer is a few short products that take as long as their
weights take to arrive from memory, and what surrounds them in eager PyTorch (a Python call per
module and operation, kernels made for many rows) takes longer. So such a pass runs as one call,
with the model's own weights:

- `native`: C++ that reads each weight once at the speed of memory (step.cpp), compiled in seconds
  on the machine that decodes. `generate` takes it by itself (see `passes`). Where layers
  multiply integers it reads prompts too, and rounds alike however a text is cut into passes; and
  those of bfloat16 layers, where the CPU has no instructions for them.
- `torchscript`: the pass of a single token as one traced graph of stock operations, for machines
  without a compiler.

Longer passes, and what a back end doesn't know, run as before: same weights, same answers.
"""

from __future__ import annotations

from torch import Tensor, nn

from quantize import check
from quantize.models import DecoderLM
from quantize.run.decoding import recognition, torchscript
from quantize.run.decoding.passes import NativePasses, is_watched
from quantize.run.decoding.sizes import contradictions
from quantize.run.decoding.structs import KERNELS
from quantize.run.kv_cache import KVCache
from quantize.saying import Say, silent

BACKENDS = ("native", "torchscript")


def for_decoding(
    model: DecoderLM,
    *,
    backend: str | None = None,
    progress: Say | None = None,
) -> DecodingLM:
    """`model`, compressed or not, ready for `generate`: the same ids to the same logits, faster for
    a few tokens.

    `generate` decodes a `DecoderLM` natively by itself; this is for choosing the back end, for
    calling the model without `generate`, and for float16 weights (`to_half`), which native then
    reads in 16 bits. The result shares the model's weights; integers and float16 weights lie in
    memory once, as native code reads them, and are computed for whoever else asks (see `lazy` and
    `HalfLinear.hold_stored`). Not for training or saving; a CUDA model runs as it is.

    Args:
        model: a `DecoderLM`, compressed or not. It isn't changed, its mode included.
        backend: "native" compiles a C++ file when first asked for (6 s; kept in the user's cache
            folder) and follows later changes of the model, but for those made through the `.data`
            of float16 weights that somebody else holds too. "torchscript" traces the first token
            and follows none. None takes native where there is a compiler and every layer is of a
            kind that it knows, else torchscript.
        progress: called with a line for people before each piece of work. With it, weights are
            packed now, not by the first pass.

    Returns:
        A model in eval mode; its `.backend` and `.reason` say which back end and why. With native,
        the reason says why compiled code isn't kept for the next process, or is None.

    Raises:
        TypeError: something else than a `DecoderLM`.
        ValueError: another back end, native where it can't run, or a model whose layers don't fit
            each other.
    """
    if not isinstance(model, DecoderLM):
        raise TypeError(f"for_decoding takes a DecoderLM, got {type(model).__name__}")
    check.one_of("backend", backend, (None, *BACKENDS))
    say = progress or silent
    say(f"checking {len(model.blocks)} blocks")
    for reason in contradictions(model):
        raise ValueError(f"the model contradicts itself: {reason}")
    obstacle: str | None = "asked for"
    if backend != "torchscript":
        obstacle = recognition.obstacle(model, compile_now=False)
    if obstacle == recognition.NOT_YET:
        say("compiling step.cpp, which takes some seconds, once")
        obstacle = recognition.obstacle(model)
    if backend == "native" and obstacle:
        raise ValueError(f"backend 'native' can't run this model: {obstacle}")
    if obstacle:
        say(f"left to TorchScript, as native code can't run: {obstacle}")
        return DecodingLM(model, "torchscript", obstacle)
    ready = DecodingLM(model, "native", KERNELS.best().note)
    if progress is not None:
        say(f"packing the weights of {len(model.blocks)} blocks")
        ready.pack()
    return ready


class DecodingLM(nn.Module):
    """See `for_decoding`. Token ids [B, T] -> logits [B, T, V], or [B, logits_to_keep, V]."""

    def __init__(self, model: DecoderLM, backend: str, reason: str | None):
        super().__init__()
        self.config, self.backend, self.reason = model.config, backend, reason
        self.model = model
        self.training = False  # of this module alone: the others are the caller's
        self._passes: NativePasses | torchscript.Step | None = None

    def forward(self, ids: Tensor, cache: KVCache | None = None, logits_to_keep: int = 0) -> Tensor:
        if type(cache) is KVCache and ids.device.type == "cpu" and not is_watched():
            logits = self._made_passes()(ids, cache, logits_to_keep)
            if logits is not None:
                return logits
        return self.model(ids, cache, logits_to_keep)

    def pack(self) -> None:
        """Do what the first native pass would begin with."""
        passes = self.native_passes()
        if passes is not None:
            passes.look()

    def native_passes(self) -> NativePasses | None:
        """Those that run for this model; None with another back end."""
        passes = self._made_passes()
        return passes if isinstance(passes, NativePasses) else None

    def _made_passes(self) -> NativePasses | torchscript.Step:
        if self._passes is None:
            native = self.backend == "native"
            self._passes = (
                NativePasses(self.model, narrow=True) if native else torchscript.Step(self.model)
            )
        return self._passes

    def rope_frequencies(self) -> Tensor:
        return self.model.rope_frequencies()

    def _apply(self, fn, recurse=True):
        self._passes = None  # it holds the tensors that are about to change
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return self.__dict__ | {
            "_passes": None
        }  # pointers and graphs can't be copied; the next pass makes them again
