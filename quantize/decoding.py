"""`quantize.decoding.for_decoding`, an older path of `quantize.for_decoding`."""

from quantize.run.decoding import BACKENDS, DecodingLM, for_decoding

__all__ = ["BACKENDS", "DecodingLM", "for_decoding"]
