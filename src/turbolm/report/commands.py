"""The commands `report` and `compare` of the command line. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from turbolm.errors import UserError

_DEFAULT_PORT = 8788


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, such as runs/quickstart")],
    follow: Annotated[
        bool, Option("--follow", help="serve a page that goes on while the run trains; read-only, this machine alone")
    ] = False,
    port: Annotated[
        int | None,
        Option(min=0, max=65535, help=f"with --follow: of 127.0.0.1; 0: any free one; default: {_DEFAULT_PORT}"),
    ] = None,
    out: Annotated[Path | None, Option(help="without --follow: the page to write; default: RUN/report.html")] = None,
) -> None:
    """Write a page with the run's curves, or serve it while the run trains."""
    if follow and out is not None:
        raise UserError("--out: --follow serves the page and writes none; leave out one of the two")
    if port is not None and not follow:
        raise UserError("--port: nothing is served without --follow; add it, or leave out --port")
    if follow:
        from turbolm.report.live import follow as serve

        serve(run, _DEFAULT_PORT if port is None else port)
        return
    from turbolm.report.html import write_report
    from turbolm.report.runs import check_runs

    check_runs([run])
    print(write_report(run, out))


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories, also copied from elsewhere")],
    html: Annotated[Path, Option(help="the page to write")] = Path("compare.html"),
    as_json: Annotated[bool, Option("--json", help="one JSON object with stable keys, and no page")] = False,
) -> None:
    """Compare runs: loss by step, tokens and time, speed, memory, configuration, planned against measured."""
    from turbolm.files import write_atomic
    from turbolm.report.compare import compare_runs
    from turbolm.report.compare_page import render_html, render_table

    found = compare_runs(runs)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1, default=str))
        return
    print(render_table(found))
    write_atomic(html, render_html(found))
    print(f"\npage: {html}")
