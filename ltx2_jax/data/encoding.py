"""Films and captions to a dataset: table -> codec, text encoder -> records, in one folder.

The work is cut into shards of rows and of captions (`data.staging`), which may be done by several
processes and in several runs; the folder appears when all are done.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from ltx2_jax import hosts
from ltx2_jax.blobs import content_hash
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.data.clips import PrepareConfig
from ltx2_jax.data.fetching import open_in_bucket
from ltx2_jax.data.merging import CLIPS_NAME, adopt, finish, made_of
from ltx2_jax.data.records import INDEX_NAME, Linked, Records, open_records
from ltx2_jax.data.staging import READY, Staging, tidy
from ltx2_jax.data.survey import Survey
from ltx2_jax.data.table import Row, read_table
from ltx2_jax.data.uploading import BucketStaging, tidy_bucket
from ltx2_jax.data.work import NoneUsableError, Work, may_succeed_now
from ltx2_jax.demo.config import LinearCodecConfig, RandomEncoderConfig
from ltx2_jax.diffusion.geometry import video_latent_shape
from ltx2_jax.errors import UserError
from ltx2_jax.fields import flat
from ltx2_jax.files import in_bucket, location, read_bytes
from ltx2_jax.media.clip_files import fingerprints
from ltx2_jax.media.media import check_even
from ltx2_jax.media.scenes import RULE
from ltx2_jax.text.captions import FeatureEncoder


class OtherDataset(UserError):
    """The folder holds a dataset that was made with other settings."""


def prepare_dataset(
    table: str | os.PathLike,
    out: str | os.PathLike,
    config: PrepareConfig,
    *,
    codec: Codec | LinearCodecConfig | None = None,
    text_encoder: FeatureEncoder | RandomEncoderConfig | None = None,
    overwrite: bool = False,
    process: int = 0,
    processes: int = 1,
    later: bool = False,
) -> Records | None:
    """Makes a dataset of the clips and captions in `table`, in one folder, all or nothing.

    What was done when it is interrupted is kept beside the folder, and the same call goes on with
    it. A dataset that is there already and was made with the same settings is returned as it is,
    but for clips that could not be used then and may be now: those that are there by now, or have
    changed, are added. The settings include the table's rows; clips that were used must not have
    changed under their names since, and those that are gone do not matter.

    Args:
      table: see `read_table`.
      out: the folder to make, of a disk or a bucket (gs://bucket/folder).
      config: sizes of the clips, text and batch.
      codec: any codec of `ltx2_jax.codecs`, or a `LinearCodecConfig` to fit a linear one on these
        clips; None fits one with the defaults. The dataset takes its release from it.
      text_encoder: of a release or of another dataset, or a `RandomEncoderConfig` to make one for
        these captions; None makes one with the defaults.
      overwrite: replace a dataset made with other settings.
      process, processes: which of how many are at work on it; all are called alike, on one disk or
        with `out` in a bucket.
      later: clips are decoded and encoded when they are first read, see `data.films`; of a codec
        that is given, on a disk. `OtherDataset` if films are gone, too.

    Returns:
      The dataset, of a bucket without its records (`open_in_bucket`); None for processes other than
      the first, when their part is done.

    Raises:
      UserError: what `read_table` raises; a size that the codec's strides do not fit; no usable
        clip; `out` holds something else, or another call is at work on it. `OtherDataset` if that
        is one made with other settings or of other clips.
    """
    codec = LinearCodecConfig() if codec is None else codec
    text_encoder = RandomEncoderConfig() if text_encoder is None else text_encoder
    config = _resolved(config, codec, text_encoder)
    rows = read_table(table)
    settings = _settings(rows, config, codec, text_encoder)
    place = location(out)
    remote = in_bucket(place)
    made = None if overwrite else _made(place)
    if made is not None:
        if not isinstance(made, Records):
            raise OtherDataset(f"{out}: holds a dataset of a .precomputed; choose another folder")
        _check_settings(made, settings)
        if process == 0:
            tidy_bucket(place) if remote else tidy(Path(os.path.abspath(out)))
        if later and made.films.changed():
            raise OtherDataset(f"{out}: films have changed, or are gone, since it was made")
        if not _check_clips(made, rows):
            if process == 0:
                text = f"{len(made)} records are there already, made with the same settings"
                hosts.say(f"{out}: {text}")
            return made
    read = [row.triggered(config.trigger) for row in rows]
    given = read, config, codec, text_encoder, process, processes
    work = Survey(table, *given) if later else Work(*given)
    kind = BucketStaging if remote else Staging
    with kind(out, settings, process=process, overwrite=overwrite) as staging:
        try:
            if process == 0 and made is not None and staging.read_json(READY) is None:
                adopt(staging, made)
            work.make(staging)
            if process > 0:
                return None
            work.wait_for_all(staging)
            finish(staging, work, settings, overwrite or made is not None)
        except UserError as error:
            nothing = isinstance(error, NoneUsableError) or staging.read_json(READY) is None
            if process == 0 and made is None and nothing:
                staging.remove()  # there is nothing to go on with
            raise
    return open_in_bucket(place) if remote else Records(out)


def _made(place: epath.Path) -> Records | Linked | None:
    """The dataset that is there."""
    if in_bucket(place):
        return open_in_bucket(place)
    return open_records(place) if (place / INDEX_NAME).exists() else None


def clip_notes(records: Records) -> dict[str, int]:
    """What a user should know of the clips a dataset was made of: how many each thing is true of.

    Empty for a dataset of a version that did not note it.
    """
    return _clips_of(records)["notes"]


def _clips_of(records: Records) -> dict[str, dict]:
    try:
        return json.loads(read_bytes(records.folder / CLIPS_NAME).decode())
    except (OSError, ValueError):
        return {"files": {}, "notes": {}}


# ---- settings ------------------------------------------------------------------------------------


def _resolved(
    config: PrepareConfig,
    codec: Codec | LinearCodecConfig,
    text_encoder: FeatureEncoder | RandomEncoderConfig,
) -> PrepareConfig:
    """With what codec and text encoder decide, checked."""
    if not isinstance(text_encoder, RandomEncoderConfig):
        config = dataclasses.replace(
            config, text_length=text_encoder.length, text_release=text_encoder.release
        )
    return checked(config, codec)


def checked(config: PrepareConfig, codec: Codec | LinearCodecConfig) -> PrepareConfig:
    """With the release of the codec; UserError for what it cannot encode."""
    fits = isinstance(codec, LinearCodecConfig)
    config = dataclasses.replace(config, release="linear" if fits else codec.release)
    strides = codec.video_strides if fits else codec.video.strides
    for bucket in config.sizes:
        video_latent_shape(*bucket, strides)
        check_even(bucket.height, bucket.width)
    if config.fps is not None and not 0 < config.fps < float("inf"):
        raise UserError(f"fps {config.fps} must be above 0")
    for name in ("text_length", "batch_size", "reference_downscale", "reference_slowdown"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} {getattr(config, name)} must be at least 1")
    if config.stride is not None and config.stride < 1:
        raise UserError(f"stride {config.stride} must be at least 1")
    return config


_ONCE = {"buckets": (), "stride": None, "scenes": False, "incomplete": False,
         "reference_downscale": 1, "reference_slowdown": 1, "trigger": None}  # fmt: skip


def _settings(
    rows: Sequence[Row],
    config: PrepareConfig,
    codec: Codec | LinearCodecConfig,
    text_encoder: FeatureEncoder | RandomEncoderConfig,
) -> dict[str, Any]:
    """What a dataset's contents depend on, as JSON values."""
    plain = [[row.name, row.caption] for row in rows]
    more = [str(dataclasses.replace(row, path=Path())) for row in rows if row.has_more]
    names_and_captions = json.dumps(plain + more)
    settings = {
        "table": hashlib.sha256(names_and_captions.encode()).hexdigest()[:16],
        **dataclasses.asdict(config),
        "codec": _identity(codec),
        "text_encoder": _identity(text_encoder),
    }
    del settings["batch_size"]
    for name, neutral in _ONCE.items():  # as datasets of version 2 have them: not at all
        if settings[name] == neutral:
            del settings[name]
    if config.scenes:
        settings["scenes"] = RULE
    return json.loads(json.dumps(settings))  # Tuples become lists, as in the file.


def _identity(maker: Any) -> Any:
    """Of a codec or text encoder: the hash of its file, or the config that one is made from."""
    if dataclasses.is_dataclass(maker):
        return dataclasses.asdict(maker)
    with tempfile.TemporaryDirectory() as folder:
        maker.save(Path(folder) / "maker.safetensors")
        return content_hash(Path(folder) / "maker.safetensors")


def _check_settings(records: Records, settings: dict[str, Any]) -> None:
    found, settings = flat(records.settings), flat(settings)
    for name in sorted(found.keys() | settings.keys()):
        ours, theirs = settings.get(name), found.get(name)
        if ours == theirs:
            continue
        # Of the table and of makers that are files, only hashes are known.
        hashes = name in ("table", "codec", "text_encoder")
        held = f"another {name}" if hashes else f"{name} {theirs!r}, not {ours!r}"
        raise OtherDataset(
            f"{records.folder}: holds a dataset with {held}; "
            "choose another folder or overwrite it (--overwrite)"
        )


def _check_clips(records: Records, rows: Sequence[Row]) -> bool:
    """Whether clips that could not be used may be now.

    Raises:
      OtherDataset: a clip that was used is another file now.
    """
    then, made = _clips_of(records)["files"], made_of(records) or {"parts": []}
    failures = [f for part in made["parts"] for f in part["about"].get("failures", [])]
    failed = {rows[f["row"]].name for f in failures}
    for row, now in zip(rows, fingerprints(row.path for row in rows), strict=True):
        before = then.get(row.name)  # None: it could not be told
        if now is None or row.name in failed or before is None or now == before:
            continue
        raise OtherDataset(
            f"{records.folder}: {row.name} was another file when this dataset was made; "
            "choose another folder or make it anew (--overwrite)"
        )
    return may_succeed_now(failures, rows)
