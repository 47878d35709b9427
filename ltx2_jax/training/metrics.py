"""Training metrics: a progress bar, `metrics.jsonl`, and the boards that show them.

Everything here takes floats. Reading a loss off the device waits for its step to finish, so the
training loop logs each step one step late; waiting inside the logger would undo that.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ltx2_jax.errors import UserError
from ltx2_jax.files import Mirror, location, reason, replacing
from ltx2_jax.training.boards import Shown, TensorBoard, WeightsAndBiases, tell

FILE_NAME = "metrics.jsonl"
# Bytes at the end of the file in which its last row is: it may be large, and far away.
_TAIL = 1 << 16
# What the progress bar has room for; the files get everything.
SHOWN = ("loss", "video_loss", "audio_loss", "step_time", "mfu")


class MetricsLogger:
    """Writes each step's metrics on process 0 and does nothing on the others.

    `metrics.jsonl` in `folder` gets one line `{"step": n, name: value, ...}` per call, on disk when
    `log` returns; what clips of a step are worth is a line of its own. TensorBoard gets the same
    where tensorboardX is installed, and so does the run `wandb`, which stays open. A resumed run
    starts at `start_step`: rows beyond it, which the killed run logged and this one will log again,
    are dropped, and so is a last line cut off half-way. A value that is not finite is written as
    null, under its name. What belongs into a bucket is written on a disk and sent as a whole, every
    minute and at the end. Raises UserError when an existing file has a line in its middle that is
    not JSON. Use as a context manager, so that the files are closed, and sent, however the run
    ends. `bar`: whether progress is shown.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        total_steps: int,
        start_step: int = 0,
        process_index: int = 0,
        wandb: WeightsAndBiases | None = None,
        bar: bool = True,
    ):
        self._file = self._bar = self._tensorboard = self._mirror = self._wandb = None
        if process_index != 0:
            return
        self._told = False
        self._mirror = Mirror(folder, [FILE_NAME])
        folder = self._mirror.folder
        path = folder / FILE_NAME
        try:
            _truncate(path, start_step)
        except UserError:
            self._mirror.close()
            raise
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = TensorBoard.opened(folder / "tensorboard", start_step)
        self._wandb = wandb
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not bar,
            dynamic_ncols=True,
            # A log file keeps every redraw as a line of its own.
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of `step`: names to floats."""
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        safe = {name: value if math.isfinite(value) else None for name, value in values.items()}
        # One write of one line: a kill between two writes would leave a line without its end.
        self._write(json.dumps({"step": step, **safe}, allow_nan=False) + "\n")
        for board in self._boards:
            board.log(step, values)
        if shown := {name: f"{values[name]:.4g}" for name in SHOWN if name in values}:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def show(self, step: int, shown: Shown) -> None:
        """Clips that were made after `step`, with what they are worth."""
        if self._file is None or not shown.clips:
            return
        if shown.metrics:
            self.log(step, shown.metrics)
        for board in self._boards:
            try:
                board.show(step, shown)
            except Exception as error:  # of an image library, a disk: a run is worth more
                tell(f"warning: the clips of step {step} cannot be shown ({reason(error)[:300]})")

    @property
    def _boards(self) -> list[TensorBoard | WeightsAndBiases]:
        return [board for board in (self._tensorboard, self._wandb) if board is not None]

    def _write(self, line: str) -> None:
        """A full disk is told once; a run goes on without its rows rather than end."""
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            if not self._told:
                self.note(f"{self._file.name}: a row cannot be written ({reason(error)})")
            self._told = True

    def note(self, text: str) -> None:
        """Print a line above the progress bar, on process 0."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close the files and the bar; calling it again does nothing."""
        for part in (self._bar, self._tensorboard, self._file, self._mirror):
            if part is not None:
                with contextlib.suppress(OSError):  # a full disk was told
                    part.close()
        self._file = self._bar = self._tensorboard = self._mirror = self._wandb = None

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of `folder`'s metrics.jsonl, one a step, oldest first; [] without a file.

    Each is `{"step": int, name: float or None}`, None where the value was not finite. A last line
    that was cut off is left out; any other line that is not a row raises UserError.
    """
    rows: list[dict[str, Any]] = []
    for line in _lines(location(folder) / FILE_NAME):
        if rows and rows[-1]["step"] == line["step"]:
            rows[-1] |= line
        else:
            rows.append(line)
    return rows


def _lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; of a step there may be several."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):  # not ended by a newline: the write was interrupted
                break
            raise UserError(
                f"{path}:{number} is not a row of metrics: remove the line or move the file away"
            ) from None
        rows.append(row)
    return rows


def last_row(folder: str | os.PathLike) -> dict[str, Any]:
    """The last whole row of `folder`'s metrics.jsonl; {} without rows.

    Steps after a checkpoint have no time: that of the step before holds for them.
    """
    path = location(folder) / FILE_NAME
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    last: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            same = last.get("step") == int(row["step"])
            held = {name: last[name] for name in last if same or name in StepTimer.NAMES}
            last = {**held, **row, "step": int(row["step"])}
    return last


class StepTimer:
    """Wall time of training steps, and tokens per second and MFU from it.

    `tokens_per_step` and `flops_per_step` are of the global batch; `peak_flops` is FLOP/s of all
    devices together, or None where the peak is unknown, which leaves the MFU out.
    """

    NAMES = ("step_time", "tokens_per_second", "mfu")

    def __init__(
        self,
        *,
        tokens_per_step: float,
        flops_per_step: float,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        self.peak_flops = peak_flops
        self._clock = clock
        self._last: float | None = None

    def tick(self, steps: int = 1) -> dict[str, float]:
        """Metrics of the `steps` steps since the last tick; call when a step has finished.

        Gives "step_time" in seconds, "tokens_per_second", and "mfu" as a share of 1. The first
        tick, and the first after `restart`, gives {}: before it lies compilation or other work.
        """
        now, last = self._clock(), self._last
        self._last = now
        if last is None or now <= last:
            return {}
        seconds = (now - last) / steps
        metrics = {"step_time": seconds, "tokens_per_second": self.tokens_per_step / seconds}
        if self.peak_flops is not None:
            metrics["mfu"] = self.flops_per_step / seconds / self.peak_flops
        return metrics

    def of(self, *, tokens_per_step: float, flops_per_step: float) -> None:
        """What the steps since the last tick were on: clips of another size than those before."""
        self.tokens_per_step, self.flops_per_step = tokens_per_step, flops_per_step

    def restart(self) -> None:
        """Leave what happened since the last tick out: sampling, evaluation, a checkpoint."""
        self._last = None


def _truncate(path: Path, start_step: int) -> None:
    """Drop the rows after `start_step` and a half-written last line, in one atomic replacement."""
    if not path.exists():
        return
    kept = [row for row in _lines(path) if row["step"] <= start_step]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
