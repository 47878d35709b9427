"""The command that turns clips and captions into a dataset: python -m ltx2_jax.prepare --help."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import jax

from ltx2_jax import command, hosts
from ltx2_jax.codecs.clips import decode_clip
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.command import count
from ltx2_jax.data.buckets import parse_buckets
from ltx2_jax.data.clips import PrepareConfig
from ltx2_jax.data.conversion import from_precomputed, to_precomputed
from ltx2_jax.data.encoding import checked, clip_notes, prepare_dataset
from ltx2_jax.data.fetching import local_dataset, open_in_bucket
from ltx2_jax.data.inspection import describe, foresee, verify
from ltx2_jax.data.latents import rates_of
from ltx2_jax.data.records import Linked, Records, open_records
from ltx2_jax.data.table import read_table
from ltx2_jax.data.uploading import check_place
from ltx2_jax.demo.config import LinearCodecConfig, RandomEncoderConfig
from ltx2_jax.demo.linear_codec import LinearCodec
from ltx2_jax.errors import UserError
from ltx2_jax.evaluation.contact_sheet import contact_sheet
from ltx2_jax.files import in_bucket, location, replacing
from ltx2_jax.media.copies import copied, kept
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.captions import FeatureEncoder, load_caption_encoder, released_encoder
from ltx2_jax.text.encoder import LENGTH

REPORT_NAME = "report.txt"  # in the dataset's folder
SHOWN = 50  # of the clips left out
SHEET_CLIPS = 6

_DESCRIPTION = """\
Encode clips and captions into a dataset for training.

TABLE is a CSV (with a header), JSON (list of objects), JSONL or Parquet file with the columns
`video` (or `media_path`) and `caption`; paths are relative to its folder. Or it is a folder of
films, each with its caption beside it (a.txt of a.mp4). OUT becomes a folder with the records, the
codec and the text encoder. The codec is that of a release (--codec), or a linear one fitted on
these clips. The text encoder is that of a release or of another dataset (--text-encoder), or a
small one with random weights and a tokenizer trained on these captions. The folder appears when
everything is done; until then what is done is kept beside it, and the same command goes on. Clips
that cannot be used are left out and listed; the same command takes them when it can.

OUT may be gs://bucket/folder: every shard is sent there when it is made, and the same command goes
on from any machine. TABLE and films may be in buckets too, and are copied while they are read.
"""

_EXAMPLE = """\
example:
  python -m ltx2_jax.prepare clips/captions.csv data/clips --num-frames 25 --height 32 --width 32
  python -m ltx2_jax.prepare clips/captions.csv data/clips --num-frames 121 --height 512 \\
      --width 768 --codec ltx-2-19b-dev.safetensors \\
      --text-encoder ltx-2-19b-dev.safetensors gemma-3-12b-it/
  python -m ltx2_jax.prepare films.jsonl data/films --buckets 768x512x121,512x768x121 \\
      --stride 121 --incomplete --codec ltx-2-19b-dev.safetensors \\
      --text-encoder ltx-2-19b-dev.safetensors gemma-3-12b-it/
  python -m ltx2_jax.prepare films.jsonl gs://my-bucket/films --buckets 768x512x121 \\
      --codec ltx-2-19b-dev.safetensors \\
      --text-encoder ltx-2-19b-dev.safetensors gemma-3-12b-it/
  python -m ltx2_jax.prepare --inspect data/films
  python -m ltx2_jax.prepare --from-precomputed clips/.precomputed \\
      --codec ltx-2-19b-dev.safetensors \\
      --text-encoder ltx-2-19b-dev.safetensors gemma-3-12b-it/
"""


def main(args: argparse.Namespace) -> int:
    """Prepare, by all processes; or what one of them does alone."""
    made = not (args.inspect or args.verify or args.from_precomputed or args.to_precomputed)
    for flag, given, where in (
        ("--sheet", args.sheet and not (args.inspect or args.verify), "--inspect or --verify"),
        ("--cache", args.cache and made, "--verify, --sheet and --to-precomputed"),
        ("--folders", args.folders and not args.from_precomputed, "--from-precomputed"),
        ("--trigger", args.trigger is not None and not made, "a TABLE of captions"),
    ):
        if given:
            raise UserError(f"{flag}: only with {where}")
    if (args.from_precomputed or args.to_precomputed) and in_bucket(location(args.out or "")):
        raise UserError(f"{args.out}: written to disks alone; copy the folder there then")
    for work, asked in (
        (_look, args.inspect or args.verify),
        (_foresee, args.dry_run),
        (_convert, args.from_precomputed),
        (_export, args.to_precomputed),
        (_prepare, True),
    ):
        if asked:
            with kept():
                return work(args)


def _prepare(args: argparse.Namespace) -> int:
    """Make or load the codec and the text encoder, prepare, report."""
    if args.out is None:
        raise UserError("OUT: give the folder to make")
    hosts.agree(lambda: check_place(args.out))
    jax.local_devices()  # all processes begin with them together; one may wait for others from here
    codec = _codec(args)
    config = _config(args, codec)
    process, processes = args.part or (hosts.index(), hosts.count())
    records = prepare_dataset(
        args.table,
        args.out,
        config,
        codec=codec,
        text_encoder=_text_encoder(args),
        overwrite=args.overwrite,
        process=process,
        processes=processes,
    )
    if process == 0:
        _report(records)
    return 0


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `command.run`."""
    parser = _parser()
    command.host_flags(parser)
    return command.run(
        "prepare",
        lambda: command.on_hosts(argv, lambda: main(parser.parse_args(argv))),
        interrupted="the same command goes on",
        stopped=hosts.STOPPED,
    )


def _config(args: argparse.Namespace, codec: Codec | LinearCodecConfig) -> PrepareConfig:
    """The sizes of the clips, which are those of a codec."""
    one = {name: getattr(args, name) for name in ("num_frames", "height", "width")}
    given = [f"--{name.replace('_', '-')}" for name, value in one.items() if value is not None]
    buckets = ()
    if args.buckets is not None:
        if given:
            raise UserError(f"{', '.join(given)}: --buckets says the sizes")
        buckets = parse_buckets(args.buckets, rates_of(codec).strides)
        one = max(buckets, key=math.prod)._asdict()
    for name, value in one.items():
        if value is None:
            raise UserError(f"--{name.replace('_', '-')}: give the size of the clips, or --buckets")
    return PrepareConfig(
        **one,
        fps=args.fps,
        text_length=args.text_length or 32,
        buckets=buckets,
        stride=args.stride,
        scenes=args.scenes,
        incomplete=args.incomplete,
        reference_downscale=args.reference_downscale,
        reference_slowdown=args.reference_slowdown,
        trigger=args.trigger,
    )


def _look(args: argparse.Namespace) -> int:
    """Prints what a dataset holds; 2 if --verify finds a fault."""
    if args.out is not None:
        raise UserError(f"{args.out}: --inspect and --verify take a dataset and nothing else")
    records = _dataset(args, args.verify or args.sheet)
    for line in describe(records):
        print(line)
    if args.sheet is not None:
        print(f"wrote {_sheet(records, args.sheet)}")
    faults = 0
    for line in verify(records) if args.verify else ():
        print(f"fault: {line}")
        faults += 1
    if args.verify:
        print(f"{len(records)} records read, {faults} faults")
    return 2 if faults else 0


def _dataset(args: argparse.Namespace, whole: bool) -> Records | Linked:
    """The dataset TABLE; one in a bucket is copied first, if it is needed `whole`."""
    place = location(args.table)
    if not in_bucket(place) or whole:
        return open_records(local_dataset(args.table, args.cache, "--cache"))
    if (records := open_in_bucket(place)) is None:
        raise UserError(f"{place}: no dataset here; python -m ltx2_jax.prepare makes one")
    return records


def _sheet(records: Records | Linked, path: str) -> Path:
    """Decodes a few clips, spread over the dataset, as what is trained on looks and sounds."""
    codec = load_codec(records.codec_path)
    step = max(1, len(records) // SHEET_CLIPS)
    chosen = [records[i] for i in range(0, len(records), step)][:SHEET_CLIPS]
    chosen = [record for record in chosen if "video" in record]
    clips = [
        decode_clip(codec, record["video"], record.get("audio"), float(record["fps"]))
        for record in chosen
    ]
    captions = [record["caption"] for record in chosen]
    return contact_sheet(path, clips, captions, title=f"{len(clips)} clips of {records.folder}")


def _foresee(args: argparse.Namespace) -> int:
    """Prints what would be made."""
    codec = _codec(args)
    config, rates = checked(_config(args, codec), codec), rates_of(codec)
    fits = isinstance(codec, LinearCodecConfig)
    channels = codec.video_channels if fits else codec.video.channels
    for line in foresee(read_table(args.table), config, rates, channels):
        print(line)
    return 0


def _convert(args: argparse.Namespace) -> int:
    """Makes a dataset of a `.precomputed`."""
    for name in ("codec", "text_encoder"):
        if not getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')}: give it; a .precomputed does not say what made it"
            )
    records = from_precomputed(
        args.table,
        args.out,
        codec=_codec(args),
        text_encoder=_text_encoder(args),
        sources=args.folders,
        incomplete=args.incomplete,
        overwrite=args.overwrite,
    )
    _report(records)
    return 0


def _export(args: argparse.Namespace) -> int:
    """Writes a dataset as the official trainer reads it."""
    if args.out is None:
        raise UserError("OUT: give the folder to make")
    records = _dataset(args, True)
    if not isinstance(records, Records):
        raise UserError(f"{args.table}: its records are those of a .precomputed already")
    print(f"in {to_precomputed(records, args.out, overwrite=args.overwrite)}")
    return 0


def _codec(args: argparse.Namespace) -> Codec | LinearCodecConfig:
    """The released codec of --codec, or what to fit."""
    linear = {
        name: getattr(args, name)
        for name in ("video_strides", "video_channels", "audio_channels")
        if getattr(args, name) is not None
    }
    if not args.codec:
        return LinearCodecConfig(**linear)
    if linear:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in linear)
        raise UserError(f"{flags}: only for a linear codec; --codec gives a released one")
    return load_codec(*args.codec)


def _text_encoder(args: argparse.Namespace) -> FeatureEncoder | RandomEncoderConfig:
    """The text encoder of --text-encoder, or what to make."""
    paths, default = args.text_encoder, RandomEncoderConfig()
    own = {name: getattr(args, name) for name in ("text_length", "vocab_size", "text_widths")}
    if args.text_cache and not paths:
        raise UserError("--text-cache: for a released text encoder only (--text-encoder)")
    if not paths:
        video, audio = args.text_widths or (default.video_dim, default.audio_dim)
        vocabulary = args.vocab_size or default.gemma.vocab_size
        gemma = dataclasses.replace(default.gemma, vocab_size=vocabulary)
        return dataclasses.replace(default, gemma=gemma, video_dim=video, audio_dim=audio)
    if len(paths) == 2:
        del own["text_length"]
    if given := [name for name, value in own.items() if value is not None]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{flags}: --text-encoder {' '.join(paths)} decides that")
    if len(paths) == 1:
        return load_caption_encoder(paths[0], _mesh(), args.text_cache)
    if len(paths) > 2:
        raise UserError("--text-encoder: one file of a dataset, or a checkpoint and its Gemma")
    return released_encoder(
        *paths, cache=args.text_cache, mesh=_mesh(), length=args.text_length or LENGTH
    )


def _mesh() -> jax.sharding.Mesh:
    """The devices of this process: others have captions of their own."""
    return make_mesh(devices=jax.local_devices())


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("prepare", _DESCRIPTION, _EXAMPLE)
    parser.add_argument("table", metavar="TABLE", help="clips and captions; or a folder to convert")
    parser.add_argument(
        "out", metavar="OUT", nargs="?", help="folder of the dataset, or gs://bucket/folder"
    )
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--dry-run", action="store_true", help="only tell what would be made")
    look.add_argument(
        "--inspect", action="store_true", help="TABLE is a dataset: tell what it holds"
    )
    look.add_argument(
        "--verify", action="store_true", help="TABLE is a dataset: read and check every record"
    )
    parser.add_argument(
        "--sheet", metavar="FILE.png", help="of --inspect and --verify: a few clips, decoded"
    )
    parser.add_argument("--cache", metavar="FOLDER", help="gets a copy of a dataset in a bucket")
    for add in (_clip_flags, _caption_flags, _codec_flags, _official_flags):
        add(parser)
    parser.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="this is process I of N, from 0 on, that run the same command on one disk, or with "
        "OUT in a bucket",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset made with other settings"
    )
    return parser


def _clip_flags(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("clips")
    size.add_argument("--num-frames", type=count, help="frames taken of each")
    size.add_argument("--height", type=count, help="pixels, after resize and crop")
    size.add_argument("--width", type=count, help="pixels, after resize and crop")
    size.add_argument(
        "--buckets",
        metavar="WxHxF,...",
        help="sizes to choose from, width x height x frames: the nearest in aspect, then the "
        "longest that the clip fills",
    )
    size.add_argument(
        "--stride",
        type=count,
        help="frames from one clip of a film to the next (default: one clip)",
    )
    size.add_argument(
        "--scenes",
        action="store_true",
        help="take every scene of a film for a film of its own: no clip holds a cut",
    )
    size.add_argument(
        "--incomplete",
        action="store_true",
        help="take silent films, sound alone (a row with `audio` and no `video`) and images; of "
        "--from-precomputed, clips that lack files",
    )
    size.add_argument(
        "--reference-downscale", type=count, default=1, help="how many times smaller references are"
    )
    size.add_argument(
        "--reference-slowdown", type=count, default=1, help="how many times slower they are"
    )
    size.add_argument("--fps", type=float, help="resample to this rate (default: each file's own)")


def _caption_flags(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("captions")
    text.add_argument(
        "--text-encoder",
        nargs="+",
        metavar="FILE",
        help="released: a checkpoint and its Gemma, folder or packed file; or text_encoder."
        "safetensors of another dataset (default: make a small one with random weights)",
    )
    text.add_argument(
        "--text-cache",
        metavar="FOLDER",
        help="keeps features of captions; a released text encoder is loaded for new ones only",
    )
    text.add_argument(
        "--trigger",
        metavar="WORD",
        type=_word,
        help="put before every caption, for a LoRA that is to hear it; dropped captions are empty",
    )
    text.add_argument(
        "--text-length", type=count, help=f"tokens (32; {LENGTH} with a released text encoder)"
    )
    text.add_argument("--vocab-size", type=count, help="at most, of the small one (512)")
    text.add_argument(
        "--text-widths",
        type=_pair,
        metavar="VIDEO,AUDIO",
        help="numbers per token for each stream, of the small one (96,64)",
    )


def _codec_flags(parser: argparse.ArgumentParser) -> None:
    defaults = LinearCodecConfig()
    codec = parser.add_argument_group("codec")
    codec.add_argument(
        "--codec",
        nargs="+",
        metavar="FILE",
        help="released safetensors: a checkpoint, or its video VAE and its audio VAE "
        "(default: fit a linear codec)",
    )
    codec.add_argument(
        "--video-strides",
        type=_strides,
        metavar="T,H,W",
        help="frames, rows, columns per latent of the linear codec "
        f"({','.join(map(str, defaults.video_strides))})",
    )
    codec.add_argument(
        "--video-channels",
        type=count,
        help=f"numbers per video latent of it ({defaults.video_channels})",
    )
    codec.add_argument(
        "--audio-channels",
        type=count,
        help=f"numbers per audio latent of it ({defaults.audio_channels})",
    )


def _official_flags(parser: argparse.ArgumentParser) -> None:
    official = parser.add_argument_group("the official trainer's format")
    way = official.add_mutually_exclusive_group()
    way.add_argument(
        "--from-precomputed",
        action="store_true",
        help="TABLE is a .precomputed folder, made by --codec and --text-encoder: convert it; "
        "without OUT, only note that beside its files, which are trained on where they are",
    )
    way.add_argument(
        "--to-precomputed",
        action="store_true",
        help="TABLE is a dataset, OUT gets a .precomputed folder that the official trainer reads",
    )
    official.add_argument(
        "--folders",
        nargs="+",
        metavar="NAME",
        help="of --from-precomputed: a clip needs a file in each (default: those there are of "
        "latents, audio_latents and conditions)",
    )


def _word(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a word is needed")
    return text.strip()


def _part(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part like 0/4")
    index, total = map(int, parts)
    if index >= total:
        raise argparse.ArgumentTypeError(f"{text!r}: there are parts 0 to {total - 1}")
    return index, total


def _pair(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not two positive numbers like 96,64")
    return int(parts[0]), int(parts[1])


def _strides(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not three positive numbers like 4,8,8")
    return tuple(int(part) for part in parts)


def _report(records: Records | Linked) -> None:
    """Prints what was made, and writes it beside the records."""
    lines = list(describe(records))
    if records.schema.release == LinearCodec.release:
        path = records.codec_path
        with copied(path) if in_bucket(path) else nullcontext(path) as file:
            codec = LinearCodec.load(file)
        for name, fraction in codec.explained.items():
            lines.append(f"the codec keeps {fraction:.1%} of the {name} variance")
    for note, number in clip_notes(records).items():
        lines.append(f"{number} clip{'s' if number > 1 else ''} {note}")
    skipped = [f"skipped {clip['source']}: {clip['reason']}" for clip in records.skipped]
    path = records.folder / REPORT_NAME
    with replacing(path) as temporary:
        temporary.write_text("\n".join([*lines, *skipped]) + "\n", encoding="utf-8")
    if len(skipped) > SHOWN:
        skipped[SHOWN:] = [f"and {len(skipped) - SHOWN} more, listed in {path}"]
    print("\n".join([*lines, *skipped, f"in {records.folder}"]))


if __name__ == "__main__":
    sys.exit(cli())
