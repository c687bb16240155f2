"""A real browser: Chromium without a window, asked through the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--no-first-run", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
_TIMEOUT_SEC = 60  # for an answer, on a busy machine


class Browser:
    """Started once for a file of tests; `open` gives a page."""

    def __init__(self, program: str, folder: Path):
        ours, theirs = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (ours[0], theirs[1])]
        self._to, self._from = ours[1], theirs[0]
        # Chromium reads commands from file descriptor 3 and answers on 4.
        shell = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        command = ["bash", "-c", shell, "bash", program, *_FLAGS, f"--user-data-dir={folder}/profile", "about:blank"]
        with (folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(command, pass_fds=ends, stdout=log, stderr=log)
        for end in (*ends, ours[0], theirs[1]):
            os.close(end)
        self._last, self._unread = 0, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **values: Any) -> dict[str, Any]:
        """The answer to a command. Raises RuntimeError with what the browser says."""
        self._last += 1
        number = self._last
        command = {"id": number, "method": method, "params": values} | ({"sessionId": session} if session else {})
        os.write(self._to, json.dumps(command).encode() + b"\0")
        answer = self.wait_for(lambda message: message.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def wait_for(self, is_it: Any) -> dict[str, Any]:
        """The next message that `is_it`; the others are kept as events."""
        until = time.monotonic() + _TIMEOUT_SEC
        while time.monotonic() < until:
            while b"\0" in self._unread:
                raw, _, self._unread = self._unread.partition(b"\0")
                message: dict[str, Any] = json.loads(raw)
                if is_it(message):
                    return message
                self.events.append(message)
            if select.select([self._from], [], [], 1)[0]:
                more = os.read(self._from, 1 << 16)
                if not more:
                    raise RuntimeError("Chromium has ended")
                self._unread += more
        raise TimeoutError("Chromium does not answer")

    def open(self, address: str, width: int = 1280, height: int = 900) -> Page:
        """A page, loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.load(address)
        return page

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self.call("Browser.close")
        os.close(self._to)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **values)

    def load(self, address: str) -> None:
        """Go to an address and wait until it is drawn."""
        self.call("Page.navigate", url=address)
        self._browser.wait_for(
            lambda one: one.get("sessionId") == self._session and one["method"] == "Page.loadEventFired"
        )

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_until(self, expression: str, seconds: float = 30) -> None:
        """Ask until it is true."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(RuntimeError):  # the page is being loaded
                if self.ask(expression):
                    return
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.1)

    def choose(self, name: str, value: str) -> None:
        """Set a control of the page as a user does."""
        self.ask(
            f"""(() => {{
                const input = document.querySelector('#controls [name={name}]');
                input.value = {json.dumps(value)};
                input.dispatchEvent(new Event('input', {{bubbles: true}}));
            }})()"""
        )

    def drag(self, selector: str, start: float, end: float) -> None:
        """Drag the mouse over an element, from one share of its width to another."""
        box = self.ask(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
            "one.scrollIntoView({block: 'center'}); return one.getBoundingClientRect().toJSON(); })()"
        )
        at = {"y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        left, right = (box["x"] + share * box["width"] for share in (start, end))
        for kind, x in (("mouseMoved", left), ("mousePressed", left), ("mouseMoved", right), ("mouseReleased", right)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, buttons=int(kind != "mouseReleased"), **at)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def errors(self) -> list[str]:
        """What the page has complained about so far: exceptions, console, refused requests, policy violations."""
        self.ask("0")  # what comes before its answer is read
        found = []
        for event in self._browser.events:
            method, values = event.get("method"), event.get("params", {})
            if event.get("sessionId") != self._session:
                continue
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(values["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(values["args"]))
            elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
                found.append(values["entry"]["text"])
        return found


def start_browser(folder: Path) -> Browser:
    """Start Chromium, or skip with the reason."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium here: the Debian package chromium-headless-shell has it")
    return Browser(program, folder)
