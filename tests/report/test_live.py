"""The server of a live report: what it answers, and that it answers nothing else."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.report.made import make_run, step_line, write, write_lines
from tests.report.page import chart_data
from turbolm.errors import UserError
from turbolm.report.live import ReportServer, follow


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write(folder / "attempts/1/start.json", {"unix_time": 1.0})
    (folder / "secret").write_text("secret")
    write_lines(folder, [step_line(step) for step in range(1, 11)])
    return folder


@pytest.fixture
def server(run: Path) -> Iterator[ReportServer]:
    with ReportServer(run, 0) as started:
        threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield started
        started.shutdown()


def ask(server: ReportServer, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    """Status and text of an answer to a path that is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    for name, value in ({"Host": f"127.0.0.1:{server.server_port}"} | headers).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def cursor_of(page: str) -> dict[str, Any]:
    start = '<script id="live" type="application/json">'
    found: dict[str, Any] = json.loads(page.partition(start)[2].partition("</script>")[0])
    return found


def news(server: ReportServer, cursor: dict[str, Any]) -> dict[str, Any]:
    status, text = ask(server, f"/{server.secret}/lines?{urlencode(cursor)}")
    assert status == 200, text
    found: dict[str, Any] = json.loads(text)
    return found


def test_what_was_served_in_parts_is_the_whole(server: ReportServer, run: Path) -> None:
    """A page and what it was sent later hold the same points as a page that is loaded at the end."""
    page = ask(server, f"/{server.secret}/")[1]
    assert "connect-src &#39;self&#39;" in page or "connect-src 'self'" in page
    points = {title: [list(zip(one["x"], one["y"], *one["others"].values(), strict=True)) for one in chart["curves"]]
              for title, chart in chart_data(page).items()}  # fmt: skip
    cursor = cursor_of(page)
    assert news(server, cursor)["charts"] == []
    for first in (11, 14):
        write_lines(run, [step_line(step) for step in range(first, first + 3)])
        answer = news(server, cursor)
        cursor = answer["cursor"]
        for chart in answer["charts"]:
            for known, one in zip(points[chart["title"]], chart["curves"], strict=True):
                known += list(zip(one["x"], one["y"], *one["others"].values(), strict=True))
    assert dict(answer["tiles"])["steps"] == "16"
    whole = chart_data(ask(server, f"/{server.secret}/")[1])
    for title, chart in whole.items():
        curves = [one for one in chart["curves"] if one["style"] != "dashed"]
        assert [list(zip(one["x"], one["y"], *one["others"].values(), strict=True)) for one in curves] == points[title]
    assert whole["Loss"]["curves"][0]["others"]["time"] == [2.0 * step for step in range(1, 17)]


def test_a_torn_line_waits_until_it_is_complete(server: ReportServer, run: Path) -> None:
    cursor, text = cursor_of(ask(server, f"/{server.secret}/")[1]), json.dumps(step_line(11)) + "\n"
    with (run / "metrics.jsonl").open("a") as file:
        file.write(text[:40])
        file.flush()
        answer = news(server, cursor)
        assert (answer["charts"], answer["cursor"]) == ([], cursor)
        file.write(text[40:])
    assert dict(news(server, cursor)["tiles"])["steps"] == "11"


@pytest.mark.parametrize("change", ["attempt", "repeat", "anomaly", "end", "fresh"])
def test_what_changes_more_than_the_curves_loads_the_page_anew(server: ReportServer, run: Path, change: str) -> None:
    cursor = cursor_of(ask(server, f"/{server.secret}/")[1])
    if change == "attempt":
        (run / "attempts/2").mkdir()
    elif change == "repeat":
        write_lines(run, [step_line(8, 2)])
    elif change == "anomaly":
        write_lines(run, [{"step": 10, "attempt": 1, "anomaly": "loss_spike", "anomaly/to_step": 5}])
    elif change == "end":
        write(run / "attempts/1/outcome.json", {"status": "stopped"})
    else:
        (run / "metrics.jsonl").write_text("")
    assert news(server, cursor) == {"reload": True}


def test_a_long_file_comes_in_parts(server: ReportServer, run: Path) -> None:
    cursor = cursor_of(ask(server, f"/{server.secret}/")[1])
    write_lines(run, [step_line(step) for step in range(11, 2011)])
    seen = []
    while (answer := news(server, cursor))["charts"]:
        cursor = answer["cursor"]
        seen += answer["charts"][0]["curves"][0]["others"]["steps"]
    assert seen == list(range(11, 2011)) and not answer["more"]


@pytest.mark.parametrize(
    "path",
    ["/secret", "/metrics.jsonl", "/../run/secret", "/..%2fsecret", "//secret", "/%2e%2e/%2e%2e/etc/passwd",
     "/", "/lines?offset=0&attempt=1&sec=0&seen=", "/SECRET", "/SECRET/secret", "/SECRET/../secret",
     "/SECRET/lines/../secret", "secret", "/.git/config", "/x/"],
)  # fmt: skip
def test_no_other_file_is_served(server: ReportServer, path: str) -> None:
    status, text = ask(server, path.replace("SECRET", server.secret))
    assert status in (400, 404) and text.startswith(("there is nothing here", "not a request"))


def test_only_reads_from_this_machine_are_answered(server: ReportServer, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert server.server_address[0] == "127.0.0.1"
    assert [ask(server, f"/{server.secret}/", method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")] == [
        501
    ] * 4
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[x"):
        assert ask(server, f"/{server.secret}/", Host=host)[0] in (400, 403), host
    assert ask(server, f"/{server.secret}/", Host="localhost:9999")[0] == 200, "through a tunnel from another port"
    for query in (
        "",
        "offset=-1&attempt=1&sec=0&seen=x",
        "offset=1&attempt=1&sec=nan&seen=x",
        "offset=x&attempt=1&sec=0&seen=",
    ):
        assert ask(server, f"/{server.secret}/lines?{query}")[0] == 400, query
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_only_a_bad_request_is_called_one(
    server: ReportServer, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What fails while the page is made is not the browser's fault: it has its traceback where the server runs."""
    write(run / "results.json", {"evaluations": [{}]})
    status, page = ask(server, f"/{server.secret}/")
    assert status == 200 and "Damaged evaluations in the results, which are not shown: 1" in page

    def unreadable(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "results.json")

    monkeypatch.setattr("turbolm.report.live.read_run", unreadable)
    status, text = ask(server, f"/{server.secret}/")
    assert (status, text.partition(":")[0]) == (503, "the run cannot be read now") and "Permission denied" in text
    monkeypatch.setattr("turbolm.report.live.read_run", lambda *_: {}["a bug"])
    with pytest.raises(http.client.RemoteDisconnected):
        ask(server, f"/{server.secret}/")
    assert "KeyError: 'a bug'" in capfd.readouterr().err


def test_a_run_that_has_not_begun_is_followed(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    with ReportServer(tmp_path, 0) as server:
        page = server.page()
        assert cursor_of(page) == {"offset": 0, "attempt": 1, "sec": 0.0, "seen": f"{tmp_path}, no attempt yet"}


def test_no_run_and_no_port_are_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="typo: there is no such folder"):
        follow(tmp_path / "typo", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: Address already in use; --port 0 takes any free one"):
            follow(run, port)


def test_the_command_says_where_and_ends_with_control_c(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 10)
    command = [sys.executable, "-m", "turbolm.cli", "report", str(run), "--follow", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's job in the background ignores it
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        said = process.stdout.readline()
        with urlopen(said.split()[1], timeout=20) as page:
            assert b"<h1>run</h1>" in page.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and process.stderr.read() == ""
    assert not (run / "report.html").exists()
