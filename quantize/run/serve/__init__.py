"""Serving models over HTTP: `app(models)` is an ASGI app, `quantize serve` runs it.

Protocols: the Open Inference Protocol v2 for tensors, OpenAI's for texts, vectors and scores. Each
process of the app calls its models in one thread, in batches of what waits. Left out: TLS, many
users with limits of their own, GPUs.
"""

from quantize.run.serve.application import app
from quantize.run.serve.served import Served, open_served, serve_model
from quantize.run.serve.settings import Settings

__all__ = ["Served", "Settings", "app", "open_served", "serve_model"]
