"""A decoder made ready to write one token at a time."""

from quantize.decoding.ready import BACKENDS, DecodingLM, for_decoding

__all__ = ["BACKENDS", "DecodingLM", "for_decoding"]
