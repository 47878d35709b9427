"""What the commands share: how they run and end, and the types of their arguments."""

import argparse
import contextlib
import faulthandler
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

from ltx2_jax import hosts, stop_signals
from ltx2_jax.errors import UserError


def run(
    name: str,
    work: Callable[[], int | None],
    *,
    interrupted: str = "",
    stopped: int = hosts.INTERRUPTED,
) -> int:
    """Runs `work` as the command `name`; returns its exit code.

    That is what `work` returns, or 0; 2 after one line about what the user can fix, 3 if a training
    diverged; 42 if it is to be started again; 130 after Ctrl-C, which `interrupted` goes on about.
    SIGTERM and a closed terminal are Ctrl-C too, but for the code, which is `stopped`.

    If `work` has joined other processes (`on_hosts`) it does not return: all end together.
    """
    # What a terminal or a log cannot show is escaped: no reason to lose the work that was done.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # Of scientific users' environments: it would make every draw another one.
    jax.config.update("jax_enable_x64", False)
    ended = f"{name}: interrupted{'; ' if interrupted else ''}{interrupted}"
    try:
        with stop_signals.termination_interrupts(stopped, ended), hosts.together(name):
            code, line = work() or 0, ""
            if hosts.count() > 1:  # signals are heard until the last host is here
                hosts.end(code)
    except UserError as error:
        code, line = error.exit_code, f"{name}: error: {error}"
    except hosts.LostError as error:
        code, line = hosts.LOST, f"{name}: error: {error}"
    except KeyboardInterrupt:
        code, line = stop_signals.exit_code(), ended
    except BrokenPipeError:  # of `| head`: nobody reads on, and the exit would print about it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as stop:
        if hosts.count() == 1:
            raise
        code, line = stop.code or 0, ""
    if hosts.count() > 1:
        if code in (hosts.INTERRUPTED, hosts.STOPPED):
            hosts.end(code, line)
        hosts.fail(code, line)
    if line:
        print(line, file=sys.stderr)
    return code


def on_hosts(argv: Sequence[str] | None, work: Callable[[], int | None]) -> int | None:
    """`work`, after this process has joined the others that the flags of `host_flags` name."""
    argv = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"} & set(argv):
        flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        host_flags(flags)
        given, _ = flags.parse_known_args(argv)
        hosts.start(
            given.coordinator,
            given.num_processes,
            given.process_id,
            seconds=given.start_timeout,
            heartbeat=given.heartbeat,
        )
        stop_signals.of_all_hosts()
        # What a host does that seems to hang, for who looks from outside.
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    return work()


def host_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which other processes there are."""
    group = parser.add_argument_group(
        "several hosts",
        "the same command on each; on TPU VMs, in GKE and under SLURM without these",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num-processes", type=count, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=_index, metavar="I", help="which this one is, from 0")
    group.add_argument(
        "--start-timeout", type=positive, metavar="SECONDS", default=300.0,
        help="to wait for the others (300)",
    )  # fmt: skip
    group.add_argument(
        "--heartbeat", type=positive, metavar="SECONDS", default=60.0,
        help="without a sign of life, until a host is lost (60)",
    )  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """One of several hosts may be the only one whose flags are wrong; all are to end then."""

    def error(self, message: str) -> NoReturn:
        if hosts.count() > 1:
            raise UserError(message)
        super().error(message)


def parser(name: str, description: str, epilog: str, **settings: str) -> argparse.ArgumentParser:
    """The parser of `python -m ltx2_jax.NAME`; texts are printed as they stand."""
    return _Parser(
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


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
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
