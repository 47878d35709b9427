"""Types of command-line arguments that several commands take."""

import argparse
import contextlib
import math


def count(text: str) -> int:
    """A whole number above 0, for the `type` of an argument."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def positive(text: str) -> float:
    """A number above 0, for the `type` of an argument."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def finite(text: str) -> float:
    """A number, for the `type` of an argument."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number")


def seed_flag(text: str) -> int:
    """A whole number of 32 bits, for the `type` of an argument."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def mesh_flag(text: str) -> tuple[int, int, int]:
    """ "16,2,2": the sizes of data, model and sequence, for the `type` of an argument."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.removeprefix("-").isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not data,model,sequence, such as 16,2,2")
    data, model, sequence = map(int, parts)
    return data, model, sequence
