"""Chromium without a window, steered through its DevTools protocol: looks at pages, clicks, takes pictures of them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new",
    "--no-first-run",
    "--disable-gpu-sandbox",
    "--use-angle=swiftshader",  # WebGL without a GPU
    "--enable-unsafe-swiftshader",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
PATIENCE_S = 240.0
TAB_PATIENCE_S = 10.0
TEXT = "(document.body?.innerText ?? '')"  # a page has no body before it is loaded
FIND = """(() => {
    const all = [...document.querySelectorAll('button, [role=tab], label, input, a')];
    const found = all.filter(e => (e.innerText || e.value || '').trim() === %s && e.offsetParent !== null);
    if (!found.length) return null;
    found[0].scrollIntoView({block: 'nearest'});
    const box = found[0].getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
})()"""


def find_chromium() -> str | None:
    """The browser's command, if it is installed."""
    return next((found for found in map(shutil.which, NAMES) if found), None)


class Page:
    """One page of a browser.

    Args:
        connection: to its DevTools.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command of the protocol."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=PATIENCE_S))
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description", script))
        return result["result"].get("value")

    def text(self) -> str:
        """All that can be read on the page."""
        return self.evaluate(TEXT)

    def wait_for(self, script: str, timeout_s: float = PATIENCE_S, every_s: float = 0.2) -> Any:
        """The value of an expression as soon as it is true; `TimeoutError` after some time."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            value = self.evaluate(script)
            if value:
                return value
            time.sleep(every_s)
        raise TimeoutError(f"{script} is not true after {timeout_s:g} s; the page says: {self.text()[:2000]}")

    def wait_for_text(self, text: str, timeout_s: float = PATIENCE_S, every_s: float = 0.2) -> None:
        self.wait_for(f"{TEXT}.includes({json.dumps(text)})", timeout_s, every_s)

    def place_of(self, label: str) -> tuple[float, float]:
        """The middle of the visible button, tab or label with this text, in pixels."""
        x, y = self.wait_for(FIND % json.dumps(label))
        return x, y

    def click(self, target: str | tuple[float, float]) -> None:
        """Clicks on what has a text, or on a place."""
        place = self.place_of(target) if isinstance(target, str) else target
        self.drag(place, place)

    def open(self, tab: str, holds: str) -> None:
        """Clicks on a tab until what it holds is there: a page that is still moving puts the pointer beside it."""
        for _ in range(int(PATIENCE_S // TAB_PATIENCE_S)):
            self.click(tab)
            try:
                self.wait_for(FIND % json.dumps(holds), TAB_PATIENCE_S)
                return
            except TimeoutError:
                continue
        raise TimeoutError(f"the tab {tab!r} never shows {holds!r}; the page says: {self.text()[:2000]}")

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Presses the pointer at one place and lets it go at another."""
        self._mouse("mouseMoved", start, 0)
        self._mouse("mousePressed", start, 1)
        if end != start:
            for i in range(1, 6):
                self._mouse("mouseMoved", tuple(a + (b - a) * i / 5 for a, b in zip(start, end, strict=True)), 1)
        self._mouse("mouseReleased", end, 0)

    def _mouse(self, kind: str, place: tuple[float, ...], buttons: int) -> None:
        self.send(
            "Input.dispatchMouseEvent",
            type=kind,
            x=place[0],
            y=place[1],
            button="none" if kind == "mouseMoved" and not buttons else "left",
            buttons=buttons,
            clickCount=0 if kind == "mouseMoved" else 1,
        )

    def picture(self) -> Image.Image:
        """What the page looks like."""
        data = self.send("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


@contextlib.contextmanager
def open_page(url: str, size: tuple[int, int] = (1280, 720)) -> Iterator[Page]:
    """A page in a browser of its own, which ends with the block.

    Args:
        size: of the window in pixels.
    """
    command = find_chromium()
    if command is None:
        raise RuntimeError("there is no chromium: install it")
    with tempfile.TemporaryDirectory() as folder:
        options = [*OPTIONS, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")
        browser = subprocess.Popen([command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _devtools_port(Path(folder), browser)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=PATIENCE_S) as answer:
                pages = [entry for entry in json.load(answer) if entry["type"] == "page"]
            with connect(pages[0]["webSocketDebuggerUrl"], max_size=None, open_timeout=PATIENCE_S) as connection:
                page = Page(connection)
                page.send(
                    "Emulation.setDeviceMetricsOverride",
                    width=size[0],
                    height=size[1],
                    deviceScaleFactor=1,
                    mobile=False,
                )
                page.send("Page.navigate", url=url)
                yield page
        finally:
            browser.terminate()
            try:
                browser.wait(20)
            except subprocess.TimeoutExpired:
                browser.kill()
                browser.wait()


def _devtools_port(folder: Path, browser: subprocess.Popen) -> int:
    file, end = folder / "DevToolsActivePort", time.monotonic() + PATIENCE_S
    while time.monotonic() < end and browser.poll() is None:
        if file.is_file() and file.read_text().strip():
            return int(file.read_text().split()[0])
        time.sleep(0.1)
    raise RuntimeError("chromium did not start")
