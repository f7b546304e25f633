"""The data that the scripts train on: text as bytes, images as floats.

Text comes from the Python standard library or from the reader's own files, images are
scikit-learn's digits or any folder in MNIST's format. Left out: tokenizers (a byte is a token),
downloading, anything larger than memory.
"""

from quantize.training.data.batches import ImageBatches, TextBatches
from quantize.training.data.images import ImageData, load_images, read_idx
from quantize.training.data.reading import DataError
from quantize.training.data.text import TextData, compression_baselines, load_text

__all__ = [
    "DataError",
    "ImageBatches",
    "ImageData",
    "TextBatches",
    "TextData",
    "compression_baselines",
    "load_images",
    "load_text",
    "read_idx",
]
