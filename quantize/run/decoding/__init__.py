"""A decoder made ready to write one token at a time."""

from quantize.run.decoding.ready import BACKENDS, DecodingLM, for_decoding

__all__ = ["BACKENDS", "DecodingLM", "for_decoding"]
