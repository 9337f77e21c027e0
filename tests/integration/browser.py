"""Headless Chromium by its DevTools protocol, to look at pages as a reader does.

    python -m tests.integration.browser runs/NAME/report.html docs/report.png

takes a picture of a page. Debian's package is `chromium`.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
START_S, LOAD_S = 60, 60
EVENTS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


class Browser:
    """Context manager around one tab of a browser that runs for it alone."""

    def __enter__(self) -> "Browser":
        assert PROGRAM
        self._folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        flags = ["--headless", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
        flags += ["--no-sandbox"] * (os.geteuid() == 0)  # it refuses to run as root otherwise
        self._process = subprocess.Popen(
            [PROGRAM, *flags, f"--user-data-dir={self._folder.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._connected = contextlib.ExitStack()
        try:
            self._socket = self._connected.enter_context(connect(self._tab(), max_size=None))
        except BaseException:
            self.__exit__()
            raise
        self._number, self._seen = 0, []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error) -> None:
        self._connected.close()
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()

    def _tab(self) -> str:
        """Return the address of the first tab, once the browser is there."""
        told, deadline = Path(self._folder.name, "DevToolsActivePort"), time.monotonic() + START_S
        while not (told.exists() and len(told.read_text().splitlines()) == 2):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{PROGRAM} did not start")
            time.sleep(0.05)
        port = told.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=START_S) as found:
            tabs = json.load(found)
        return next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")

    def call(self, method: str, **parameters) -> dict:
        """Return the answer to a command; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while (answer := self._receive()).get("id") != self._number:
            self._seen.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict:
        return json.loads(self._socket.recv(timeout=LOAD_S))

    def open(self, page: Path, width: int, height: int) -> list[dict]:
        """Load a file in a window of `width` x `height` pixels; return what the console shows."""
        size = {"width": width, "height": height}
        self.call(
            "Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=width < 600
        )
        self._seen.clear()
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self._seen):
            self._seen.append(self._receive())
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return [event["params"] for event in self._seen if event.get("method") in EVENTS]

    def value(self, expression: str):
        """Return the value of a JavaScript expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def picture(self, height: int | None = None) -> bytes:
        """Return the page from its top as PNG, `height` pixels of it or all."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"]}
        shot = self.call(
            "Page.captureScreenshot", clip=clip | {"scale": 1}, captureBeyondViewport=True
        )
        return base64.b64decode(shot["data"])


def main() -> None:
    """Take a picture of a page."""
    page, picture = map(Path, sys.argv[1:3])
    with Browser() as browser:
        browser.open(page, 1100, 900)
        picture.write_bytes(browser.picture(int(sys.argv[3]) if len(sys.argv) > 3 else None))


if __name__ == "__main__":
    main()
