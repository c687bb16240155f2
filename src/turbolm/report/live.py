"""Serve the report of a run on 127.0.0.1 while it trains: the page, and what is new since it was loaded. Torch-free.

Nothing is written, and of the run's files only what the report shows is read; no address names a file. The page asks
for new lines of metrics.jsonl from a byte on. What changes more than the curves (another attempt, a rollback, the end)
makes it load the page anew.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from turbolm.errors import UserError, explain_os_error
from turbolm.files import read_json
from turbolm.report.attempts import attempt_numbers
from turbolm.report.charts import MAX_POINTS
from turbolm.report.html import last_tiles, render_report
from turbolm.report.metrics import SEC, Line, add_times, history, read_new
from turbolm.report.run_charts import Level, run_charts
from turbolm.report.runs import check_runs, read_run

_ANSWER_BYTES = 2**17  # of metrics.jsonl in one answer: fewer lines than a curve is thinned from
_LOCAL_NAMES = {"127.0.0.1", "localhost", "::1"}
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Cursor:
    """How far a page has come: bytes of metrics.jsonl, attempt and training time of its last line, and the state of the
    run that it shows."""

    offset: int
    attempt: int
    sec: float
    seen: str

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> Cursor:
        """Return the cursor of a request. Raises ValueError or KeyError."""
        offset, attempt, sec = int(query["offset"]), int(query["attempt"]), float(query["sec"])
        if not (0 <= offset < 2**63 and math.isfinite(sec)):
            raise ValueError("out of range")
        return cls(offset, attempt, sec, query["seen"])


def follow(run_dir: Path, port: int) -> None:
    """Serve the run's page until Ctrl-C. Raises UserError for a folder that is no run, or a port that is taken."""
    check_runs([run_dir])
    try:
        server = ReportServer(run_dir, port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UserError(f"--port {port}: {error.strerror}; --port 0 takes any free one") from None
    with server:
        print(f"{run_dir}: {server.address} (read-only, from this machine alone; Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


class ReportServer(ThreadingHTTPServer):
    """Answers for one run, on 127.0.0.1 alone, those who know its address. `port` 0 takes a free one."""

    daemon_threads = True

    def __init__(self, run_dir: Path, port: int):
        super().__init__(("127.0.0.1", port), _Handler)
        self.run_dir = run_dir
        self.secret = secrets.token_urlsafe(12)  # a machine may have other users, who cannot read the run's files
        self._levels: dict[str, Level] = {}
        self._lock = threading.Lock()  # a long run's page takes seconds and memory: one at a time

    @property
    def address(self) -> str:
        """Return the address of the page."""
        return f"http://127.0.0.1:{self.server_port}/{self.secret}/"

    def page(self) -> str:
        """Return the page of the run as it is now."""
        with self._lock:
            seen, lines, offset = _seen(self.run_dir), list[Line](), 0
            while True:
                attempt = lines[-1]["attempt"] if lines else 1
                more, end = read_new(self.run_dir / "metrics.jsonl", offset, attempt)
                if end == offset:
                    break
                lines += more
                offset = end
            run = read_run(self.run_dir, lines)
            self._levels = run.levels
            sec = run.metrics[-1][SEC] if run.metrics else 0.0
            return render_report(run, asdict(Cursor(offset, attempt, sec, seen)))

    def news(self, cursor: Cursor) -> dict[str, Any]:
        """Return what is new since `cursor`, or that the page must be loaded anew."""
        path, again = self.run_dir / "metrics.jsonl", {"reload": True}
        if _seen(self.run_dir) != cursor.seen or _size(path) < cursor.offset:
            return again
        lines, end = read_new(path, cursor.offset, cursor.attempt, _ANSWER_BYTES)
        if len(lines) > MAX_POINTS or any("anomaly" in one or one["attempt"] != cursor.attempt for one in lines):
            return again
        metrics = history(lines)
        sec = add_times(metrics, cursor.sec)
        charts = run_charts(metrics, [], self._levels) if metrics else []
        return {
            "charts": [chart for chart in charts if chart["curves"]],
            "tiles": last_tiles(metrics),
            "cursor": asdict(Cursor(end, cursor.attempt, sec, cursor.seen)),
            "state": _state(self.run_dir),
            "more": end - cursor.offset > _ANSWER_BYTES // 2,
        }


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    server_version, sys_version = "turbolm", ""
    timeout = 60

    def do_GET(self) -> None:
        try:
            address = urlsplit(self.path)
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            return self._refuse_request()
        if host not in _LOCAL_NAMES:  # another site's name for this machine
            return self._answer(403, "text/plain", "this page is for http://127.0.0.1 alone")
        if secrets.compare_digest(address.path.encode(), f"/{self.server.secret}/".encode()):
            return self._answer_from_run("text/html", self.server.page)
        if secrets.compare_digest(address.path.encode(), f"/{self.server.secret}/lines".encode()):
            try:
                cursor = Cursor.parse(dict(parse_qsl(address.query)))
            except (ValueError, KeyError):
                return self._refuse_request()
            return self._answer_from_run("application/json", lambda: json.dumps(self.server.news(cursor)))
        if address.path == "/favicon.ico":  # browsers ask for it
            return self._answer(204, "image/x-icon", "")
        return self._answer(404, "text/plain", "there is nothing here; `turbolm report --follow` says the address")

    def _refuse_request(self) -> None:
        self._answer(400, "text/plain", "not a request of this page")

    def _answer_from_run(self, kind: str, make: Callable[[], str]) -> None:
        try:
            text = make()
        except OSError as error:
            return self._answer(503, "text/plain", f"the run cannot be read now: {explain_os_error(error)}")
        return self._answer(200, kind, text)

    def _answer(self, status: int, kind: str, text: str) -> None:
        content = text.encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in {**_HEADERS, "Content-Type": f"{kind}; charset=utf-8"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal shows the address."""


def _seen(run_dir: Path) -> str:
    """The run and what of its state a page shows in words; when it changes, the page is out of date."""
    return f"{run_dir.resolve()}, {_state(run_dir)}"


def _state(run_dir: Path) -> str:
    numbers = attempt_numbers(run_dir)
    if not numbers:
        return "no attempt yet"
    outcome = read_json(run_dir / "attempts" / str(numbers[-1]) / "outcome.json") or {}
    products = ", results" if (run_dir / "results.json").exists() else ""
    return f"attempt {numbers[-1]}: {outcome.get('status', 'no end recorded')}{products}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
