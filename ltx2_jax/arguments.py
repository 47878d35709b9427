"""Types of command-line arguments that several commands take."""

import argparse


def count(text: str) -> int:
    """A whole number above 0, for the `type` of an argument."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
