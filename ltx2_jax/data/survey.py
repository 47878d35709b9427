"""Films to a dataset without their latents: what it will hold, by what files say of themselves.

The work of `data.work`, but for the clips: `data.films` makes those when they are first read.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ltx2_jax import hosts
from ltx2_jax.blobs import content_hash
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.data.clips import (
    IMAGE_FPS,
    SOUND_FPS,
    Failure,
    Item,
    PrepareConfig,
    is_image,
    items_of,
)
from ltx2_jax.data.films import clip_name, to_json
from ltx2_jax.data.schema import BucketFields, Field
from ltx2_jax.data.staging import CLIPS, Staging
from ltx2_jax.data.table import Row
from ltx2_jax.data.work import CODEC_NAME, Work
from ltx2_jax.diffusion.geometry import audio_latent_length, video_latent_shape
from ltx2_jax.errors import UserError
from ltx2_jax.files import in_bucket, is_passing
from ltx2_jax.media.clip_files import fingerprints
from ltx2_jax.media.media import FileSize, file_size


class Survey(Work):
    """The work for a dataset of films whose clips are made later."""

    def __init__(self, table: str | os.PathLike, *work: Any):
        """`table`: where the rows are from; the others as of `Work`, the codec one that is made."""
        super().__init__(*work)
        # From wherever it is read later.
        self._table = os.fspath(table if in_bucket(table) else os.path.abspath(table))
        self._found: list[list[tuple[Item, BucketFields] | Failure]] = []

    def make(self, staging: Staging) -> None:
        """As `Work` has it; films are looked at first, which takes no time beside the captions."""
        with ThreadPoolExecutor(8) as pool:
            self._found = list(pool.map(self._look, range(len(self.rows))))
        found = [one for row in self._found for one in row]
        failures = [one for one in found if isinstance(one, Failure)]
        if len(failures) == len(found):
            raise self.none_usable(failures)
        hosts.say(
            f"films    {len(found) - len(failures)} clips of {len(self.rows)} rows; encoding "
            f"{len(self.captions)} captions"
        )
        super().make(staging)

    def index(self, clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What `data.films` reads."""
        return {
            "films": {"table": self._table, "clips": [c for part in clips for c in part["clips"]]}
        }

    def _look(self, index: int) -> list[tuple[Item, BucketFields] | Failure]:
        row = self.rows[index]
        try:
            items = items_of(index, row, self.config)
            size = file_size(row.path)
            for column, path in row.others.items():
                try:
                    file_size(path)
                except UserError as error:
                    raise UserError(f"{column} {error}") from error
            return [
                one if isinstance(one, Failure)
                else (one, foreseen(one, row, size, self.config, self._codec))
                for one in items
            ]  # fmt: skip
        except UserError as error:
            reason = str(error).removeprefix(f"{row.path}: ")
            return [Failure(index, reason, passing=is_passing(error))]

    def _make_shard(self, staging: Staging, shard: int, rows: range) -> None:
        prints = fingerprints(self.rows[row].path for row in rows)
        made, failures, clips = {}, {}, []
        codec_hash = content_hash(staging.folder / CODEC_NAME)
        for row in rows:
            for window, one in enumerate(self._found[row]):
                if isinstance(one, Failure):
                    failures[row, window] = one
                    continue
                item, made[row, window] = one
                name = clip_name(item, self.rows[row], self.config, codec_hash)
                clips.append((to_json(item), name))
        about = self._about(rows, prints, made, failures)
        staging.finish(CLIPS, shard, (), about | {"clips": clips})


def foreseen(
    item: Item, row: Row, size: FileSize, config: PrepareConfig, codec: Codec
) -> BucketFields:
    """The size of the record that a clip will have, of a file that says `size`.

    Raises:
      UserError: what it says is not enough for a clip.
    """
    bucket, per_second, image = item.bucket, codec.audio.latents_per_second, is_image(row.path)
    fps, latents = config.fps or SOUND_FPS, round(item.seconds * per_second)
    if bucket is not None:
        fps, latents = (IMAGE_FPS, 0) if image else (config.fps or size.fps, 0)
        heard = not image and (size.has_sound or "audio" in row.others)
        if not image and (frames := int((size.seconds - item.start) * fps + 1e-3)) < bucket[0]:
            raise UserError(f"has only {frames} frames; the shortest bucket has {bucket[0]}")
        if not heard and not config.incomplete:
            raise UserError("an image; --incomplete takes it" if image else "no sound")
        if heard and not (latents := audio_latent_length(bucket[0], fps, per_second)):
            raise UserError("too short for one audio latent")
    fields = {"id": Field("int64"), "fps": Field("float32"), "source": Field("str")}
    if bucket is not None:
        grid = video_latent_shape(*bucket, codec.video.strides)
        fields["video"] = pictures = Field("float32", (*grid, codec.video.channels))
        if "reference_video" in row.others:
            fields |= {"video_reference": pictures, "video_reference_fps": fields["fps"]}
        if "video_mask" in row.others:
            fields["video_mask"] = Field("bool", grid)
    if latents:
        fields["audio"] = sound = Field(
            "float32", (latents, codec.audio.bins, codec.audio.channels)
        )
        if "reference_audio" in row.others:
            fields["audio_reference"] = sound
        if "audio_mask" in row.others:
            fields["audio_mask"] = Field("bool", (latents,))
    return BucketFields(*(bucket or (0, 0, 0)), fps=float(np.float32(fps)), fields=fields)
