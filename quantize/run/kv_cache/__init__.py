"""Keys and values kept while decoding, and an attention module that uses them.

`KVCache` is the cache, `CachedAttention` a module for one's own decoder. Left out: pages shared
between requests (rows share a prefix through `fork`, copied when first written), and compiled
kernels of our own: what runs is `torch.nn.functional.scaled_dot_product_attention`.
"""

from quantize.run.kv_cache.cache import KVCache
from quantize.run.kv_cache.module import CachedAttention

__all__ = ["CachedAttention", "KVCache"]
