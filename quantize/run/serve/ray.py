"""The same app on many machines: Ray Serve places replicas, adds some where requests wait, and
replaces those that die.

    serve run quantize.run.serve.ray:build paths=/models/int8 replicas=2 most_replicas=8
    quantize serve --ray /models/int8 --workers 2

Every machine has to find the models under the same paths. Each replica is a process that loads them
itself; its batches, limits and metrics are its own. Deploying again replaces one replica after the
other, each once it has answered what it accepted. The pages of weights are not shared between
replicas of a machine: there, `--workers` of one replica's `quantize serve` takes less memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantize.host import default_threads
from quantize.run.serve.application import app
from quantize.run.serve.guard import Guard
from quantize.run.serve.served import default_name, open_served
from quantize.run.serve.settings import Settings

NAME = "quantize"
DRAIN_S = 60.0
KNOWN = {
    "paths": "",
    "names": "",
    "replicas": "1",
    "most_replicas": "",
    "threads": "",
    "ongoing": "16",
    "up_s": "30",
    "down_s": "600",
}


def build(arguments: Mapping[str, str]) -> Any:
    """A Ray Serve application, for `serve run` and `serve deploy`.

    Args:
        arguments: texts, as `serve run` passes them. paths, names: of the models, separated by
            commas. replicas: how many there are at least, each with `threads` cores (default: all
            that are usable here). most_replicas: how many there may be (default: replicas); one is
            added where more than `ongoing` requests a replica are under way for `up_s` seconds, and
            taken away where fewer would do for `down_s`.

    Returns:
        The application.

    Raises:
        ValueError: an unknown argument, no path, or names that don't fit the paths.
    """
    unknown = arguments.keys() - KNOWN.keys()
    if unknown:
        raise ValueError(f"no argument {', '.join(unknown)}; allowed: {', '.join(KNOWN)}")
    given = KNOWN | dict(arguments)
    paths = [Path(path).resolve() for path in given["paths"].split(",") if path]
    names = [name for name in given["names"].split(",") if name]
    names = names or [default_name(path) for path in paths]
    if not paths or len(names) != len(paths):
        raise ValueError(f"names {names} for {len(paths)} paths")
    least, threads = int(given["replicas"]), int(given["threads"] or default_threads())
    most = max(least, int(given["most_replicas"] or least))
    settings = Settings(threads=threads)
    delays = float(given["up_s"]), float(given["down_s"])
    return deployment(paths, names, settings, (least, most), int(given["ongoing"]), delays)


def deployment(
    paths: list[Path],
    names: list[str],
    settings: Settings,
    replicas: tuple[int, int],
    ongoing: int,
    delays: tuple[float, float] = (30.0, 600.0),
) -> Any:
    """The app of models as a Ray Serve application.

    Args:
        paths, names: of the models.
        settings: of each replica.
        replicas: the least and the most.
        ongoing: requests under way of a replica beyond which another one is added.
        delays: seconds until one is added, and until one is taken away.
    """
    serve: Any = importlib.import_module("ray.serve")

    def make() -> Guard:  # runs in the replica
        torch.set_num_threads(settings.threads or default_threads())
        pairs = zip(paths, names, strict=True)
        return app([open_served(path, name) for path, name in pairs], settings)

    least, most = replicas
    scaling = {
        "min_replicas": least,
        "initial_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": ongoing,
        "upscale_delay_s": delays[0],
        "downscale_delay_s": delays[1],
    }
    options = serve.deployment(
        name=NAME,
        autoscaling_config=scaling,
        max_ongoing_requests=settings.max_queue + settings.most_active,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={"num_cpus": settings.threads or 1},
    )
    return options(serve.ingress(make)()).bind()


def run(application: Any, host: str, port: int, *, blocking: bool = True) -> None:
    """Deploy on the Ray cluster at hand, or on one of this machine, and serve.

    Args:
        application: what `build` or `deployment` gives.
        host, port: of every machine's proxy.
        blocking: whether to return only on Ctrl-C.
    """
    serve: Any = importlib.import_module("ray.serve")
    serve.start(http_options={"host": host, "port": port})
    serve.run(application, name=NAME, route_prefix="/", blocking=blocking)
