"""How numbers are written in README and docs."""


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A rounded number with a true minus, and a plus if `sign`; a dash for None."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 1) -> str:
    """A rounded number with its sign."""
    return number(value, digits, sign=True)


def counted(count: int, one: str, many: str = "") -> str:
    """A number of things: `one training`, `3 trainings`, `7 classes`."""
    return f"one {one}" if count == 1 else f"{count:,} {many or one + 's'}"
