"""Films that a run trains on as they are: a dataset of them, whose latents are made as it goes on.

Codec and text encoder are those of the release that the run starts from, unless it names others.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from ltx2_jax import hosts
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.config import Config, FilmsConfig
from ltx2_jax.data.buckets import Bucket, parse_buckets
from ltx2_jax.data.clips import PrepareConfig
from ltx2_jax.data.encoding import OtherDataset, prepare_dataset
from ltx2_jax.data.fetching import alone
from ltx2_jax.data.precomputed import precomputed_folder
from ltx2_jax.data.records import INDEX_NAME
from ltx2_jax.data.table import TABLES, films_in
from ltx2_jax.errors import UserError
from ltx2_jax.files import in_bucket, location, reason
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.cache import TextCache


def are_films(path: str) -> bool:
    """Whether it names a table, or a folder that holds films and no dataset."""
    place = Path(path)
    if in_bucket(path) or not place.is_dir():
        return place.suffix.lower() in TABLES
    prepared = (place / INDEX_NAME).exists() or precomputed_folder(place) is not None
    return not prepared and bool(films_in(place))


def check(config: Config) -> None:
    """UserError if the config says what to make of films, and names none."""
    paths = [path for path, _ in config.data.folders]
    held_out = [] if config.validation.path is None else [config.validation.path]
    if config.data.films != FilmsConfig() and not any(map(are_films, [*paths, *held_out])):
        raise UserError(
            f"data.films: is for films, and data.path={', '.join(paths) or None} is no table and "
            "no folder of films; leave it out, or name some"
        )


def sizes(films: FilmsConfig, strides: tuple[int, int, int]) -> tuple[Bucket, ...]:
    """Those of `films.buckets`.

    Raises:
      UserError: a bucket that is malformed, or that no latents of these strides have the size of.
    """
    with _of("buckets"):
        return parse_buckets(films.buckets, strides)


def dataset(path: str, config: Config) -> str:
    """The folder of a dataset of films, which is made if it is not there, but for its latents.

    Processes that share the disk wait for each other.

    Raises:
      UserError: what is needed is not given; what `prepare_dataset` raises.
    """
    films, workdir = config.data.films, location(config.workdir)
    if films.buckets is None:
        raise UserError(
            f"{path}: films need data.films.buckets, the sizes that clips are brought to, such as "
            "--config.data.films.buckets=768x512x49"
        )
    if config.data.cache is None and in_bucket(workdir):
        raise UserError(
            f"{path}: latents of films are kept on a disk, and the workdir is in a bucket: name a "
            "folder with --config.data.cache"
        )
    root = Path(config.data.cache or workdir)
    codec, text_encoder = _makers(path, config, root / "text_cache")
    buckets = sizes(films, codec.video.strides)
    settings = PrepareConfig(
        **max(buckets, key=math.prod)._asdict(),
        buckets=buckets,
        **{name: getattr(films, name) for name in ("fps", "stride", "incomplete", "trigger")},
    )
    place = path if in_bucket(path) else os.path.abspath(path)
    about = [place, dataclasses.asdict(films), config.init_from, config.text.length]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    folder = root / "films" / f"{Path(path).stem}-{name}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot be written ({reason(error)})") from None
    given = {"codec": codec, "text_encoder": text_encoder, "later": True}
    with alone(folder.with_name(f"{folder.name}.lock")):
        try:
            records = prepare_dataset(path, folder, settings, **given)
        except OtherDataset:
            records = prepare_dataset(path, folder, settings, **given, overwrite=True)
        finally:
            text_encoder.free()
    for clip in records.skipped:
        # The flag is that of `prepare`.
        why = clip["reason"].replace("--incomplete", "--config.data.films.incomplete=True")
        hosts.say(f"skipped {clip['source']}: {why}")
    return str(folder)


def _makers(path: str, config: Config, text_cache: Path) -> tuple[Codec, TextCache]:
    """Codec and text encoder, of the releases that the config is for; no weights are read yet."""
    films = config.data.films
    given = _paths(films.text_encoder)
    if len(given) == 1 and config.init_from is not None:
        given = config.init_from, *given
    if len(given) != 2:
        raise UserError(
            f"{path}: films need data.films.text_encoder, the Gemma that encodes captions with "
            "init_from; without init_from, a released checkpoint and its Gemma"
        )
    with _of("codec"):
        codec = load_codec(*_paths(films.codec or given[0]), devices=jax.local_devices()[:1])
    with _of("text_encoder"):
        # In the cache where the clips of the run look for their prompts too.
        mesh = make_mesh(devices=jax.local_devices())
        encoder = TextCache.load(
            text_cache, *given, connect=False, mesh=mesh, length=config.text.length
        )
    for name, release, wanted in (
        ("codec", codec.release, config.data.release),
        ("text_encoder", encoder.release, config.text.release),
    ):
        if release != wanted:
            raise UserError(f"data.films.{name}: of {release!r}, and this model is for {wanted!r}")
    return codec, encoder


def _paths(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given or ()


@contextlib.contextmanager
def _of(field: str) -> Iterator[None]:
    """A mistake in the block is one in this field."""
    try:
        yield
    except UserError as error:
        raise UserError(f"data.films.{field}: {error}") from None
