"""A headless Chromium, spoken to over its debugging pipe: no driver, no port, no network."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


def find_browser() -> str | None:
    """A Chromium on the path."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def start_browser() -> Browser | None:
    """Start it; None where it does not answer, as the stand-ins of some systems' packages."""
    program = find_browser()
    try:
        return None if program is None else Browser(program)
    except (AssertionError, OSError):
        return None


# Puts two descriptors where the browser looks for them, then becomes the browser.
_START = """
import fcntl, os, sys
reading, writing = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(reading, 3)
os.dup2(writing, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of a browser. `events` holds all that the page has reported, oldest first."""

    def __init__(self, program: str) -> None:
        self._home = tempfile.mkdtemp(prefix="spantune-browser-")
        ours, theirs = os.pipe(), os.pipe()  # it reads descriptor 3 and writes 4
        command = [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *("--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run"),
            *("--disable-component-update", "--disable-sync", f"--user-data-dir={self._home}"),
            "about:blank",
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(ours[0]), str(theirs[1]), *command],
            pass_fds=(ours[0], theirs[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._out, self._in = ours[1], theirs[0]
        self._rest, self._count, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in pages if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, *, width: int, height: int = 900, media: str = "screen") -> None:
        """Open a file in a window of this size and wait until it is drawn."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.call("Emulation.setEmulatedMedia", media=media)
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("Page.loadEventFired")

    def dark(self, dark: bool) -> None:
        """Prefer a dark or a light page."""
        value = "dark" if dark else "light"
        feature = {"name": "prefers-color-scheme", "value": value}
        self.call("Emulation.setEmulatedMedia", media="screen", features=[feature])

    def wait_for(self, method: str) -> None:
        """Wait until an event has been reported."""
        while not self.said(method):
            self.events.append(self._next())

    def said(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of all events of these kinds."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path: Path) -> None:
        """Take a picture of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(20)
        os.close(self._out)
        os.close(self._in)
        shutil.rmtree(self._home, ignore_errors=True)

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + 60
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], until - time.monotonic())
            piece = os.read(self._in, 1 << 16) if ready else b""
            assert piece, "the browser does not answer"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
