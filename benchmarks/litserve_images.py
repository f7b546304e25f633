"""A CNN served by LitServe: a peer of serving_peers.py, which starts it.

python litserve_images.py FILE PORT WORKERS
"""

from __future__ import annotations

import base64
import os
import signal
import sys
import threading
import time
from typing import Any

import litserve
import torch

import quantize


class Images(litserve.LitAPI):
    """Asked with a float32 image in base64, answered with a list; batches as they come.

    Args:
        path: a file of quantize.
    """

    def __init__(self, path: str) -> None:
        super().__init__(max_batch_size=64, batch_timeout=0.0)
        self.path = path

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.model = quantize.load(self.path)

    def decode_request(self, request):  # with a type, it would be looked for in the query
        image = bytearray(base64.b64decode(request["image"]))
        return torch.frombuffer(image, dtype=torch.float32).view(1, 28, 28)

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(inputs)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(x)

    def unbatch(self, output: torch.Tensor) -> list[torch.Tensor]:
        return list(output)

    def encode_response(self, output: torch.Tensor) -> dict[str, Any]:
        return {"output": output.tolist()}


def end_with(parent: int) -> None:
    """End all processes of this group when the one that started it has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    file, port, workers = sys.argv[1:]
    os.setpgrp()
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    print(f"http://127.0.0.1:{port}", flush=True)  # where it will be
    server = litserve.LitServer(Images(file), accelerator="cpu", workers_per_device=int(workers))
    server.run("127.0.0.1", port, generate_client_file=False, log_level="error")
