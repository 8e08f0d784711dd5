"""Bytes, rates and times as people read them.

Memory *sizes* are shown in binary units (1 KiB = 1024 bytes), because buffer
sizes are powers of two and tables come out even.  *Rates* (bytes per second,
FLOP per second) use decimal prefixes (1 TB/s = 10¹² bytes/s), because data
sheets do.  Both are named, so that no reader has to guess.

Lowest layer: imports nothing of labkit, loads neither torch nor Triton.
"""

from __future__ import annotations

import math

__all__ = ["GIB", "KIB", "MIB", "format_bytes", "format_rate", "format_seconds", "significant"]

KIB, MIB, GIB = 2**10, 2**20, 2**30
_BINARY = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")


def significant(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, no exponent, no trailing zeros.

    >>> significant(1536 / 1024), significant(192.0), significant(0.0123456)
    ('1.5', '192', '0.0123')
    """
    if value == 0 or not math.isfinite(value):
        return str(value if value else 0)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_bytes(count: float, digits: int = 3) -> str:
    """A size in binary units.

    >>> format_bytes(2**20), format_bytes(1.5 * 2**30), format_bytes(12)
    ('1 MiB', '1.5 GiB', '12 bytes')
    """
    sign = "−" if count < 0 else ""
    size = abs(count)
    step = 0
    while size >= 1024 and step < len(_BINARY) - 1:
        size /= 1024
        step += 1
    return f"{sign}{significant(size, max(digits, len(str(int(size)))))} {_BINARY[step]}"


def format_rate(per_second: float, unit: str, digits: int = 3) -> str:
    """A rate in decimal units; ``unit`` is ``"B/s"`` or ``"FLOP/s"``.

    >>> format_rate(4.8e12, "B/s"), format_rate(989.4e12, "FLOP/s")
    ('4.8 TB/s', '989 TFLOP/s')
    """
    step = 0
    while abs(per_second) >= 1000 and step < len(_DECIMAL) - 1:
        per_second /= 1000
        step += 1
    return f"{significant(per_second, digits)} {_DECIMAL[step]}{unit}"


def format_seconds(seconds: float, digits: int = 3) -> str:
    """A duration in s, ms, µs or ns.

    >>> format_seconds(0.0021), format_seconds(5e-7)
    ('2.1 ms', '500 ns')
    """
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= scale:
            return f"{significant(seconds / scale, digits)} {unit}"
    return f"{significant(seconds / 1e-9, digits)} ns"
