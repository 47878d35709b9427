"""Large numbers for people."""


def parameters(count: float) -> str:
    """18881000000 -> "18.88 B"."""
    return _scaled(count, (("B", 1e9), ("M", 1e6), ("k", 1e3)))


def flops(count: float) -> str:
    """1847800000000000 -> "1,847.80 T"."""
    return _scaled(count, (("T", 1e12), ("G", 1e9), ("M", 1e6)))


def _scaled(count: float, units: tuple[tuple[str, float], ...]) -> str:
    for unit, size in units:
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:.0f}"
