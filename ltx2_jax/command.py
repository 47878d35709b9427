"""What the commands share: how they run and end, and the types of their arguments."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable

import jax

from ltx2_jax.errors import UserError
from ltx2_jax.stop_signals import termination_interrupts


def run(name: str, work: Callable[[], int | None], *, interrupted: str = "") -> int:
    """Runs `work` as the command `name`; returns its exit code.

    That is what `work` returns, or 0; 2 after one line about what the user can fix; 130 after
    Ctrl-C, which `interrupted` goes on about. SIGTERM and a closed terminal are Ctrl-C too.
    """
    # What a terminal or a log cannot show is escaped: no reason to lose the work that was done.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # Of scientific users' environments: it would make every draw another one.
    jax.config.update("jax_enable_x64", False)
    try:
        with termination_interrupts():
            return work() or 0
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted{'; ' if interrupted else ''}{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `| head`: nobody reads on, and the exit would print about it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def parser(name: str, description: str, epilog: str, **settings: str) -> argparse.ArgumentParser:
    """The parser of `python -m ltx2_jax.NAME`; texts are printed as they stand."""
    return argparse.ArgumentParser(
        prog=f"python -m ltx2_jax.{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **settings,
    )


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
