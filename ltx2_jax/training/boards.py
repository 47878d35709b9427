"""Where a training is watched beside its own files: TensorBoard, and Weights & Biases.

Both get the numbers of every step and the clips that are made on the way, from process 0 alone.
What one of them cannot take is told once and left out: a training goes on without it.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ltx2_jax import hosts
from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.fields import to_json
from ltx2_jax.files import in_bucket, location, reason, replacing
from ltx2_jax.media.gif import gif
from ltx2_jax.media.media import Clip

CLIPS = 8  # of those made after a step, the first so many are shown
RUNS = "wandb.json"  # in a workdir: {project: id of its run there}
# Seconds after which the end of a run waits no more for Weights & Biases.
PATIENCE = 120.0


@dataclasses.dataclass(frozen=True)
class Shown:
    """Clips that were made after a step, on process 0; elsewhere there are none."""

    clips: Sequence[Clip] = ()
    prompts: Sequence[str] = ()  # one a clip
    sheet: bytes | None = None  # a PNG of them
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)  # what they are worth


class TensorBoard:
    """Event files, by tensorboardX; one that can write no more is left alone."""

    def __init__(self, writer: Any):
        """Takes a `SummaryWriter`."""
        self._writer = writer

    @classmethod
    def opened(cls, folder: Path, start_step: int) -> "TensorBoard | None":
        """One that writes into a folder, from a step on; None if tensorboardX is not installed."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return None
        # purge_step hides what a killed run logged beyond the step this one resumes from.
        return cls(SummaryWriter(str(folder), purge_step=start_step + 1))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step; those that are not finite are left out."""
        for name, value in values.items():
            if math.isfinite(value) and self._alive():  # tensorboardX warns of the others
                self._writer.add_scalar(name, value, step)

    def show(self, step: int, shown: Shown) -> None:
        """The clips: pictures as GIFs, because that is what it plays, and sounds beside them."""
        if not self._alive():
            return
        if shown.sheet is not None:
            height, width = _size(shown.sheet)
            self._image("clips/sheet", shown.sheet, height, width, step)
        pairs = zip(shown.clips, shown.prompts, strict=True)
        for number, (clip, prompt) in enumerate(itertools.islice(pairs, CLIPS)):
            if len(clip.video) and self._alive():
                self._image(f"clips/{number}/picture", *gif(clip.video, clip.fps), step, prompt)
            if clip.audio is not None and self._alive():
                sound = np.clip(clip.audio, -1, 1)
                self._writer.add_audio(f"clips/{number}/sound", sound, step, clip.sample_rate)

    def _image(
        self, tag: str, file: bytes, height: int, width: int, step: int, about: str = ""
    ) -> None:
        """An image as it is encoded: `add_image` takes no GIF, and `add_video` needs moviepy."""
        from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file)
        metadata = SummaryMetadata(summary_description=about)
        value = Summary.Value(tag=tag, image=image, metadata=metadata)
        self._writer.file_writer.add_summary(Summary(value=[value]), step)

    def close(self) -> None:
        if self._alive():
            self._writer.close()

    def _alive(self) -> bool:
        """Whether the thread that writes for it lives: one that met a full disk does not.

        Its queue takes ten more values, and then waits for ever.
        """
        events = getattr(getattr(self._writer, "file_writer", None), "event_writer", None)
        thread = getattr(events, "_worker", None)
        return thread is None or thread.is_alive()


def _size(png: bytes) -> tuple[int, int]:
    """Height and width, from the file's first bytes."""
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    return height, width


# ------------------------------------------------------------------------------- Weights & Biases


class WeightsAndBiases:
    """A run there. The first thing that fails ends the sending, not the training."""

    def __init__(self, library: Any, run: Any):
        """Takes the package wandb, and what its `init` gave."""
        self._library, self._run, self._told = library, run, False
        # A step that is taken again after a restart comes twice; by its own count the board would
        # leave out all steps up to the one that the killed run had reached.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        self._send(lambda: {**values, "step": step})

    def show(self, step: int, shown: Shown) -> None:
        """The clips with their sound as mp4, sounds without a picture, and the sheet."""
        with tempfile.TemporaryDirectory() as folder:  # wandb copies what it is given
            self._send(lambda: {**self._media(Path(folder), step, shown), "step": step})

    def _media(self, folder: Path, step: int, shown: Shown) -> dict[str, Any]:
        films, sounds = [], []
        pairs = zip(shown.clips, shown.prompts, strict=True)
        for number, (clip, prompt) in enumerate(itertools.islice(pairs, CLIPS)):
            caption = f"step {step}: {prompt}"
            if len(clip.video):
                path = folder / f"{number}.mp4"
                clip.save(path)
                films.append(self._library.Video(str(path), caption=caption, format="mp4"))
            elif clip.audio is not None:
                sounds.append(self._library.Audio(clip.audio, clip.sample_rate, caption=caption))
        found = {name: them for name, them in (("clips", films), ("sounds", sounds)) if them}
        if shown.sheet is not None:
            from PIL import Image

            picture = Image.open(io.BytesIO(shown.sheet))
            found["sheet"] = self._library.Image(picture, caption=f"step {step}")
        return found

    def _send(self, made: Any) -> None:
        if self._told:
            return
        try:
            self._run.log(made())
        except Exception as error:  # its own, of the network, of a process that is gone
            tell(f"Weights & Biases gets no more of this run ({reason(error)[:300]})")
            self._told = True

    def close(self, exit_code: int = 0) -> None:
        """Waits until all is sent, or for `PATIENCE` seconds."""
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            tell(f"Weights & Biases may lack the end of this run ({reason(error)[:300]})")


@contextlib.contextmanager
def weights_and_biases(config: Config) -> Iterator[WeightsAndBiases | None]:
    """The run of `metrics.wandb`, on process 0; None elsewhere, and where none is asked for.

    The first start in a workdir begins one, and later starts go on with it. A later start that
    cannot reach it is told so, and trains without.

    Raises:
      UserError: wandb is not installed, or a run cannot begin: no login, no network.
    """
    project = config.metrics.wandb
    if project is None or hosts.index() != 0:
        yield None
        return
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"metrics.wandb={project}: wandb is not installed: pip install 'ltx2_jax[wandb]'"
        ) from None
    board = _begun(wandb, project, config)
    try:
        yield board
    except BaseException:
        if board is not None:
            board.close(1)
        raise
    if board is not None:
        board.close()


def _begun(library: Any, project: str, config: Config) -> WeightsAndBiases | None:
    workdir = location(config.workdir)
    runs = _known_runs(workdir / RUNS)
    entity, _, name = project.rpartition("/")
    number = runs.get(project) or secrets.token_hex(4)
    folder = tempfile.mkdtemp(prefix="ltx2-jax-wandb-") if in_bucket(workdir) else str(workdir)
    try:
        run = library.init(
            project=name,
            entity=entity or None,
            id=number,
            name=workdir.name,
            resume="allow",
            dir=folder,
            config=json.loads(to_json(config)),
            allow_val_change=True,
            # What is printed stays here: a progress bar is no log.
            settings=library.Settings(console="off", finish_timeout=PATIENCE),
        )
        board = WeightsAndBiases(library, run)
    except Exception as error:
        why = f"metrics.wandb={project}: no run can begin there ({reason(error)[:300]})"
        if project not in runs:
            raise UserError(
                f"{why}; `wandb login` gives it a key, and WANDB_MODE=offline keeps it on this disk"
            ) from None
        tell(f"{why}; this start trains without it")
        return None
    if project not in runs:
        with replacing(workdir / RUNS) as temporary:
            temporary.write_text(json.dumps(runs | {project: number}) + "\n")
    return board


def _known_runs(path: Any) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
        return {str(name): str(number) for name, number in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def tell(text: str) -> None:
    """A line above the progress bar."""
    tqdm.write(text, file=sys.stderr)
