"""What the files of a run say about it, from any machine: no device is touched."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ltx2_jax.errors import UserError
from ltx2_jax.files import STALE, clock_time, location, read_run, reason
from ltx2_jax.training import goodput, metrics, saved
from ltx2_jax.training.goodput import duration


def status(workdir: str | Path, clock: Callable[[], float] = time.time) -> str:
    """Lines about a run: where it is, how fast, what it saved, how long it will take.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    place = location(workdir)
    try:
        starts, row = goodput.read_starts(place), metrics.last_row(place)
        run, checkpoint = read_run(place), saved.newest_saved(place)
    except UserError:
        raise
    except Exception as error:  # of a bucket, each library's own
        raise UserError(f"--status: {workdir}: cannot be read ({reason(error)})") from None
    if not starts and not row and run is None and checkpoint is None:
        raise UserError(f"--status: {workdir}: no run there")
    start, now = starts[-1] if starts else None, clock()
    running = run is not None and now - run["refreshed"] < STALE
    step = max([0, *(found["step"] for found in (start, row) if found)])
    lines = [f"{workdir}: {_state(run, running, start, now)}"]
    number = f"{step:,} of {start['num_steps']:,}" if start else f"{step:,}"
    lines.append(f"  step        {number}")
    if row.get("loss") is not None:
        lines.append(f"  loss        {row['loss']:.4g}")
    if speed := _speed(row):
        lines.append(f"  speed       {speed}")
    if row.get("slowest_host") is not None:
        wait = row.get("slowest_data_wait")
        waits = f", waits {duration(wait)} a step for data" if wait else ""
        lines.append(f"  slowest     host {row['slowest_host']:.0f}{waits}")
    lines.append(f"  checkpoint  {_checkpoint(checkpoint, now)}")
    if start and running and (left := _left(start, row, step)) is not None:
        lines.append(f"  time left   {duration(left)}")
    if starts:
        lines.append(f"  {goodput.total(starts)}")
    return "\n".join(lines)


def _state(
    run: dict[str, Any] | None, running: bool, start: dict[str, Any] | None, now: float
) -> str:
    if run is not None:
        who = f"{run['host']}, process {run['pid']}"
        since, sign = clock_time(run["since"]), duration(max(0.0, now - run["refreshed"]))
        if running:
            return f"running on {who}, since {since}, last sign {sign} ago"
        return f"no sign for {sign} of the run on {who}, since {since}: killed, or cut off"
    if start is None:
        return "not running"
    end = start["end"] or "stopped without a word"
    first, _, why = end.partition(": ")
    return f"{first} {clock_time(start['now'])}, {duration(max(0.0, now - start['now']))} ago" + (
        f": {why}" if why else ""
    )


def _speed(row: dict[str, Any]) -> str:
    parts = []
    if row.get("step_time"):
        parts.append(f"{duration(row['step_time'])} a step")
    if row.get("tokens_per_second"):
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row.get("mfu"):
        parts.append(f"{100 * row['mfu']:.1f} % MFU")
    return ", ".join(parts)


def _checkpoint(found: tuple[int, float] | None, now: float) -> str:
    if found is None:
        return "none yet"
    step, written = found
    return f"step {step:,}" + (f", {duration(max(0.0, now - written))} ago" if written else "")


def _left(start: dict[str, Any], row: dict[str, Any], step: int) -> float | None:
    """Seconds to the last step, at the pace of this start, with all that comes between steps."""
    taken, pace = start["step"] - start["first"], row.get("step_time")
    if taken > 0:
        often = ("step", "data", "checkpoint")
        pace = sum(start["seconds"][name] for name in often) / taken
    return None if not pace else (start["num_steps"] - step) * pace
