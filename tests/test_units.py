"""Counts, sizes, shares, durations and spans as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm import units
from turbolm.units import Span


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (4096, 4096), ("2M", 2_000_000), ("32k", 32_000), ("32K", 32_000), ("1.5B", 1_500_000_000), ("2G", 2 * 10**9),
        ("1T", 10**12), ("4Ki", 4096), ("1Mi", 2**20), ("3e6", 3_000_000), (3e6, 3_000_000), ("1_000", 1000),
        (" 7 ", 7), ("0.5k", 500), ("2 M", 2_000_000), ("0", 0), (1e22, 10**22),
    ],
)  # fmt: skip
def test_counts(text: object, count: int) -> None:
    assert units.parse_count(text) == count


@pytest.mark.parametrize(
    "bad", ["", "x", "-1", -1, "1.5", 1.5, "2Q", "M", True, None, [], "1e99", "9" * 50, "nan", "1 2"]
)
def test_what_is_no_count(bad: object) -> None:
    with pytest.raises(ValueError):
        units.parse_count(bad)


def test_bytes() -> None:
    assert units.parse_bytes("8GiB") == 8 * 2**30
    assert units.parse_bytes("512MB") == 512 * 10**6
    assert units.parse_bytes(100) == 100
    for bad in ("8G", "1.5", "-1MB"):
        with pytest.raises(ValueError, match="expected a size such as 512MB or 8GiB"):
            units.parse_bytes(bad)


def test_shares() -> None:
    assert units.parse_share("2%") == units.parse_share(0.02) == units.parse_share("0.02") == 0.02
    assert units.parse_share(1) == 1
    assert units.parse_share(1e-05) == 1e-05
    for bad in ("101%", 1.5, -0.1, "2", True, "x", None):
        with pytest.raises(ValueError, match="expected a share such as 2% or 0.02"):
            units.parse_share(bad)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1h30m", 5400), ("45s", 45), ("2d", 172_800), ("01:30:00", 5400), ("1-12:00:00", 129_600), ("90", 90),
        (90, 90), ("1d2h3m4s", 93_784), ("10min", 600), ("5sec", 5), ("1-12:30", 131_400),
    ],
)  # fmt: skip
def test_durations(text: object, seconds: int) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize("bad", ["", " ", "1h30", "x", -1, 1.5, True, None, "1:2:3"])
def test_what_is_no_duration(bad: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        units.parse_duration(bad)


def test_a_clock_of_two_parts_has_two_readings() -> None:
    with pytest.raises(ValueError, match="12:30 is minutes and seconds for Slurm, .* write 12m30s or 12h30m"):
        units.parse_duration("12:30")


def test_spans() -> None:
    assert Span.parse("2M") == Span(2_000_000, "tokens")
    assert Span.parse("200 steps") == Span(200, "steps")
    assert Span.parse("1 step") == Span(1, "steps")
    assert Span.parse("2k steps") == Span(2000, "steps")
    assert Span.parse("2%") == Span(0.02, "share")
    assert [Span.parse(text).tokens(1000, 10) for text in ("5", "5 steps", "5%")] == [5, 50, 50]
    for bad in ("-1", "x", 0.5, None, True, "200%"):
        with pytest.raises(ValueError):
            Span.parse(bad)


@given(st.floats(0, 1) | st.floats(0, 1e-20))
def test_a_share_as_text_is_the_very_same_share(share: float) -> None:
    if share and share < 1e-25:  # smaller than anything that can be written
        return
    assert Span.parse(str(Span(share, "share"))) == Span(share, "share")


@given(st.integers(0, 10**30), st.sampled_from(["tokens", "steps"]))
def test_a_span_as_text_is_the_very_same_span(amount: int, unit: str) -> None:
    assert Span.parse(str(Span(amount, unit))) == Span(amount, unit)


@given(st.integers(0, 10**18), st.sampled_from(["", "k", "M", "B", "Ki"]))
def test_counts_with_a_suffix(number: int, suffix: str) -> None:
    scale = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "Ki": 1024}[suffix]
    assert units.parse_count(f"{number}{suffix}") == number * scale


@given(st.floats(1, 9e14))
def test_formatted_counts_are_close(count: float) -> None:
    text = units.format_count(count)
    number = float(text.rstrip("kMBT")) * {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1)
    assert number == pytest.approx(count, rel=0.006)


def test_formats() -> None:
    counts = [units.format_count(n) for n in (0, 999, 1234567, 999_999, 2e9, 0.5)]
    assert counts == [
        "0",
        "999",
        "1.23M",
        "1M",
        "2B",
        "0.5",
    ]
    assert [units.format_bytes(n) for n in (5, 1536, 2**31)] == ["5 B", "1.5 KiB", "2 GiB"]
    durations = [units.format_duration(n) for n in (2.5, 75, 5400, 90_000)]
    assert durations == ["2.5s", "1m15s", "1h30m", "1d01h"]
    assert [units.format_step(n) for n in (0.0125, 0.25, 0.9999, 2.5)] == ["12.5 ms", "250 ms", "1.0s", "2.5s"]
