"""A headless Chromium spoken to over a pipe: what a page logs, asks the network for, and shows."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)


def executable() -> str | None:
    """The path of a Chromium, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. `events` holds everything the browser told."""

    def __init__(self, reading: int, writing: int):
        self._reading, self._writing = reading, writing
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, url: str) -> None:
        """Loads the page and waits until it has."""
        self.call("Page.navigate", url=url)
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self._next()
        time.sleep(0.2)  # what a page asks for after it has loaded
        self.call("Runtime.evaluate", expression="1")

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings that the page or the browser logged."""
        told = [e["params"]["entry"] for e in self.events if e["method"] == "Log.entryAdded"]
        thrown = [str(e["params"]) for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        logged = [str(e["params"]["args"]) for e in self.events if e["method"] == "Runtime.consoleAPICalled"]
        return [f"{entry['level']}: {entry['text']}" for entry in told] + thrown + logged

    def requests(self) -> list[str]:
        """Everything it asked for that was not part of the page itself."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._reading], [], [], 30)[0]:
                raise TimeoutError("the browser has said nothing for 30 s")
            self._buffer += os.read(self._reading, 1 << 16)
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """An empty tab in a browser of its own, which is ended afterwards."""
    to_read, browser_writes = os.pipe()
    browser_reads, to_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [executable(), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # Chromium listens on descriptor 3 and speaks on 4. Both are first moved out of each other's way.
        shell = f'exec 8<&{browser_reads} 9>&{browser_writes}; exec 3<&8 4>&9; exec "$@"'
        process = subprocess.Popen(
            ["bash", "-c", shell, "browser", *command],
            pass_fds=(browser_reads, browser_writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_reads)
        os.close(browser_writes)
        try:
            yield Page(to_read, to_write)
        finally:
            os.close(to_write)  # it ends when nobody listens any more
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(to_read)
