"""Text from a language model: `generate` and `generate_stream`, and the stages they are made of.

`prefill` reads a prompt, `decode` one token more, `sampling` chooses the next one, `drafts` guesses
several ahead. The model is any module that maps token ids [B, T] to logits [B, T, V] (or to an
object with `.logits`); if its `forward` takes a `cache`, each token is computed once, otherwise the
whole text is computed again for every token.

Left out: beam search, serving many requests that come and go, constrained output.
"""

from quantize.run.generate.loop import Generation, generate, generate_stream
from quantize.run.generate.reader import decode, prefill

__all__ = ["Generation", "decode", "generate", "generate_stream", "prefill"]
