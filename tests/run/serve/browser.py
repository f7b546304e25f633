"""Headless Chromium, driven through its own protocol over two pipes; no other package is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")


class Page:
    """A page of a browser of its own.

    Source: the Chrome DevTools Protocol; messages are JSON, each ended by a zero byte.
    """

    def __init__(self, url: str, profile: Path) -> None:
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        self._to, self._from = write_here, read_here

        def wire() -> None:  # the browser reads from descriptor 3 and writes to 4
            os.dup2(read_there, 3)
            os.dup2(write_there, 4)

        command = [PROGRAM or "", *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=wire, pass_fds=(3, 4), stderr=subprocess.DEVNULL
        )
        os.close(read_there)
        os.close(write_there)
        self._held, self._count, self._session = b"", 0, None
        target = self._ask("Target.createTarget", url=url)["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def run(self, script: str) -> Any:
        """What a JavaScript expression gives, once it is no promise any more."""
        options = {"returnByValue": True, "awaitPromise": True}
        result = self._ask("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            reply = json.loads(self._next())
            if reply.get("id") == self._count:
                assert "error" not in reply, reply
                return reply["result"]

    def _next(self) -> bytes:
        while b"\0" not in self._held:
            part = os.read(self._from, 1 << 16)
            assert part, "the browser has ended"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return message

    def close(self) -> None:
        os.close(self._to)
        self._process.terminate()
        self._process.wait(10)
        os.close(self._from)
