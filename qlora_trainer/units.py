"""Bytes and seconds to and from what people read; the only place that prints units.

Sizes are binary (1 GiB = 2**30 bytes), as the CUDA driver and `nvidia-smi` count.
"""

import re

_POWERS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def format_bytes(size_bytes: int | float) -> str:
    """Write a size with the largest unit that keeps it at or above one.

    >>> format_bytes(25_125_558_682)
    '23.4 GiB'
    >>> format_bytes(512)
    '512 B'
    """
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parse_bytes(text: str | int) -> int:
    """Read a size: a plain number of bytes, binary units (`GiB`) or decimal ones (`GB`).

    Raises:
        ValueError: The text is not a size, or is negative.

    >>> parse_bytes("1.5 GiB")
    1610612736
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = (match.group(2) or "B").upper() if match else ""
    factor = _POWERS.get(unit) or _DECIMAL.get(unit)
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write for example '7.5 GiB'")
    return int(float(match.group(1)) * factor)


def format_seconds(seconds: float) -> str:
    """Write a duration in its two largest units.

    >>> format_seconds(3725)
    '1 h 02 min'
    >>> format_seconds(7.25)
    '7.2 s'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
