"""Sizes and durations as text."""

import pytest

from ctxstore.units import (
    describe_size,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GiB", 4 << 30),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("1.5 GiB", 3 << 29),
        ("64kib", 65536),
        ("64KB", 64_000),
        ("2TiB", 2 << 40),
        (" 4096 ", 4096),
        ("1_000_000", 1_000_000),
        ("0", 0),
        ("17B", 17),
        (123, 123),
        (0, 0),
        ("0.1GB", 100_000_000),
    ],
)
def test_parse_size(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4GiBs", "unknown unit"),
        ("4 potatoes", "unknown unit"),
        ("GiB", "not a size"),
        ("", "not a size"),
        ("-1", "not a size"),
        ("1e9", "not a size"),
        ("٤GiB", "not a size"),
        (-1, "negative"),
        (True, "not a size"),
        (1.5, "not a size"),
        (None, "not a size"),
        ("1.5B", "whole number of bytes"),
        ("9999999999TiB", "2\\^63"),
    ],
)
def test_parse_size_refuses(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_size(text)


def test_unknown_unit_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown unit 'GiX' in size '4GiX'; known: .*gib"):
        parse_size("4GiX")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (1500, "1500B"), (1024, "1KiB"), (3 << 29, "1536MiB"), (4 << 30, "4GiB")],
)
def test_format_size(count, text):
    assert format_size(count) == text
    assert parse_size(text) == count


def test_format_size_refuses_negative():
    with pytest.raises(ValueError, match="negative"):
        format_size(-1)


def test_describe_size_rounds():
    assert describe_size(1_500_000) == "1.43 MiB"
    assert describe_size(4 << 30) == "4 GiB"
    assert describe_size(17) == "17 B"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10.0),
        ("5m", 300.0),
        ("5min", 300.0),
        ("250ms", 0.25),
        ("100ms", 0.1),
        ("30us", 30e-6),
        ("2h", 7200.0),
        ("1d", 86400.0),
        ("1.5s", 1.5),
        ("3", 3.0),
        (0.5, 0.5),
        (2, 2.0),
    ],
)
def test_parse_duration(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["5 weeks", "s", "-1s", -1, float("nan"), float("inf"), True, []])
def test_parse_duration_refuses(text):
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(300.0, "5m"), (0.25, "250ms"), (90.0, "90s"), (3e-5, "30us"), (86400, "1d"), (0.0, "0.0s")],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
    assert parse_duration(text) == seconds


def test_format_duration_refuses():
    with pytest.raises(ValueError, match="finite"):
        format_duration(float("inf"))
