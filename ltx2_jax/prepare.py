"""The command that turns clips and captions into a dataset: python -m ltx2_jax.prepare --help."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import jax

from ltx2_jax import command, hosts
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.codecs.interface import Codec
from ltx2_jax.command import count
from ltx2_jax.data.encoding import PrepareConfig, clip_notes, prepare_dataset
from ltx2_jax.data.records import Records
from ltx2_jax.demo.config import LinearCodecConfig, RandomEncoderConfig
from ltx2_jax.demo.linear_codec import LinearCodec
from ltx2_jax.errors import UserError
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.captions import FeatureEncoder, load_caption_encoder, released_encoder
from ltx2_jax.text.encoder import LENGTH

_DESCRIPTION = """\
Encode clips and captions into a dataset for training.

TABLE is a CSV (with a header), JSON (list of objects) or JSONL file with the columns `video` (or
`media_path`) and `caption`; paths are relative to its folder. OUT becomes a folder with the
records, the codec and the text encoder. The codec is that of a release (--codec), or a linear one
fitted on these clips. The text encoder is that of a release or of another dataset (--text-encoder),
or a small one with random weights and a tokenizer trained on these captions. The folder appears
when everything is done, or not at all. Clips that cannot be used are left out and listed.
"""

_EXAMPLE = """\
example:
  python -m ltx2_jax.prepare clips/captions.csv data/clips --num-frames 25 --height 32 --width 32
  python -m ltx2_jax.prepare clips/captions.csv data/clips --num-frames 121 --height 512 \\
      --width 768 --codec ltx-2-19b-dev.safetensors \\
      --text-encoder ltx-2-19b-dev.safetensors gemma-3-12b-it/
"""


def main(args: argparse.Namespace) -> None:
    """Make or load the codec and the text encoder, prepare, report: on the first host."""
    hosts.agree_on_first(lambda: _prepare(args), 7 * 86400, "the first host prepares")


def _prepare(args: argparse.Namespace) -> None:
    codec, text_encoder = _codec(args), _text_encoder(args)
    config = PrepareConfig(
        num_frames=args.num_frames,
        height=args.height,
        width=args.width,
        fps=args.fps,
        text_length=args.text_length or 32,
    )
    records = prepare_dataset(
        args.table,
        args.out,
        config,
        codec=codec,
        text_encoder=text_encoder,
        overwrite=args.overwrite,
    )
    _report(records)


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `command.run`."""
    parser = _parser()
    command.host_flags(parser)
    return command.run(
        "prepare",
        lambda: command.on_hosts(argv, lambda: main(parser.parse_args(argv))),
        interrupted="nothing was written",
    )


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
    return make_mesh(devices=jax.local_devices())


def _parser() -> argparse.ArgumentParser:
    defaults = LinearCodecConfig()
    parser = command.parser("prepare", _DESCRIPTION, _EXAMPLE)
    parser.add_argument("table", metavar="TABLE", help="clips and captions")
    parser.add_argument("out", metavar="OUT", help="folder of the dataset")
    size = parser.add_argument_group("clips")
    size.add_argument("--num-frames", type=count, required=True, help="frames taken of each")
    size.add_argument("--height", type=count, required=True, help="pixels, after resize and crop")
    size.add_argument("--width", type=count, required=True, help="pixels, after resize and crop")
    size.add_argument("--fps", type=float, help="resample to this rate (default: each file's own)")
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
        "--text-length", type=count, help=f"tokens (32; {LENGTH} with a released text encoder)"
    )
    text.add_argument("--vocab-size", type=count, help="at most, of the small one (512)")
    text.add_argument(
        "--text-widths",
        type=_pair,
        metavar="VIDEO,AUDIO",
        help="numbers per token for each stream, of the small one (96,64)",
    )
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
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset made with other settings"
    )
    return parser


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


def _report(records: Records) -> None:
    print(f"{len(records)} records")
    for name, field in records.schema.fields.items():
        if field.shape:
            print(f"  {name:<11} {field}")
    if records.schema.release == LinearCodec.release:
        for name, fraction in LinearCodec.load(records.codec_path).explained.items():
            print(f"  the codec keeps {fraction:.1%} of the {name} variance")
    for note, number in clip_notes(records).items():
        print(f"{number} clip{'s' if number > 1 else ''} {note}")
    for clip in records.skipped:
        print(f"skipped {clip['source']}: {clip['reason']}")
    print(f"in {records.folder}")


if __name__ == "__main__":
    sys.exit(cli())
