"""Clips from a released or a trained model: python -m ltx2_jax.sample --help."""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from ltx2_jax import command, hosts
from ltx2_jax.config import Config, SampleConfig
from ltx2_jax.demo import synthetic
from ltx2_jax.errors import UserError
from ltx2_jax.evaluation.sync import sync_report
from ltx2_jax.files import location
from ltx2_jax.media.media import read_about
from ltx2_jax.sampling import flags, wishes
from ltx2_jax.sampling.output import SUFFIXES, Made, read_latents, save_latents, write_clips
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sampling.wishes import Wish, read_wishes
from ltx2_jax.sharding import make_mesh

# Bytes of pixels from which clips are written as they are decoded, without a picture of them.
LARGE = 2**30
# Not part of what made a clip: where it goes, and how this machine works on it.
ASIDE = {"words", "out", "prompts", "num_clips"}


def main(args: argparse.Namespace, argv: Sequence[str] = ()) -> None:
    """Load, sample, write, report. `argv` is what `args` were read from."""
    if args.again:
        args = _again(args, argv)
    for flag in ("quantize", "offload"):
        if args.workdir and getattr(args, flag):
            raise UserError(f"--{flag}: for released models, not for what train left in a workdir")
    if args.workdir and not _asks_for_a_task(args):
        return _from_workdir(args)
    return _released(args)


# ------------------------------------------------------------------------- of a released model


def _released(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    if args.from_latents:
        made = [read_latents(path) for path in args.from_latents]
        asked = [Wish(clip.prompt) for clip in made]
    else:
        asked = _asked(args)
    paths = output_paths(args, len(asked))
    pipe = _pipeline(args)
    if not args.from_latents:
        made = wishes.make(pipe.maker, asked, **flags.wishes(args))
    if hosts.index() != 0:
        return
    for number, (path, clip, wish) in enumerate(zip(paths, made, asked, strict=True)):
        if wish.given.get("picture") is False:
            path = path.with_suffix(".wav")
        clip.about["command"] = _remembered(args, clip, wish)
        if args.save_latents:
            name = Path(args.save_latents)
            save_latents(name if len(made) == 1 else _numbered(name, number), clip)
        with pipe.phase("decoding"):
            files = clip.write(path, pipe.codec, crf=args.crf)
        seed = f", seed {clip.about['seed']}" if "seed" in clip.about else ""
        more = f" to {files[-1].name} ({len(files)} files)" if len(files) > 1 else ""
        print(f"wrote {files[0]}{more}{seed}")
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in pipe.seconds.items())
    print(f"seconds: {spent}; in all {time.perf_counter() - started:.1f}")


def _pipeline(args: argparse.Namespace) -> Pipeline:
    mesh = make_mesh(*args.mesh) if args.mesh else None
    if args.workdir:
        for name in ("lora", "distilled_lora", "spatial_upsampler_path", "text_encoder"):
            if getattr(args, name):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: is for released models; {args.workdir} is a workdir")
        mesh = mesh or make_mesh()
        return Pipeline.from_workdir(
            args.workdir, step=args.checkpoint_step, mesh=mesh, text_cache=args.text_cache
        )
    return Pipeline.from_pretrained(
        *args.model,
        text_encoder=args.text_encoder,
        mesh=mesh,
        loras=[(source, *strength) for source, *strength in args.lora],
        distilled_lora=args.distilled_lora,
        upsampler=args.spatial_upsampler_path,
        kind="distilled" if args.distilled_checkpoint_path else None,
        text_cache=args.text_cache,
        keep=args.keep,
        dtype=args.dtype,
        quantize=args.quantize,
        offload=args.offload,
    )


def _asked(args: argparse.Namespace) -> list[Wish]:
    """All prompts; a file of them has one a line, with what else its clip is given.

    Raises:
      UserError: none, a blank one, a file that cannot be read.
    """
    asked = []
    for number, text in enumerate((*args.prompt, *args.texts), 1):
        if not text.strip():
            raise UserError(f"prompt {number} is blank")
        with wishes.named("--again" if args.given else ""):
            asked.append(wishes.wish_of({"prompt": text, **args.given}, Path("/")))
    if args.prompts:
        asked += read_wishes(args.prompts, "--prompts")
    if not asked:
        raise UserError("give a prompt: PROMPT, --prompt or --prompts FILE")
    return asked


def output_paths(args: argparse.Namespace, number: int) -> list[Path]:
    """A file for each clip, all of which can be written.

    Raises:
      UserError: a suffix that is not written; a place that cannot be written to.
    """
    if args.output_path is None and args.out is None:
        suffix = ".wav" if args.sound_only else ".mp4"
        names = (Path(f"clip-{i:03d}{suffix}") for i in itertools.count(1))
        # Of several clips, of a sound or of single frames the files are called otherwise.
        first = next(name for name in names if not any(Path().glob(f"{name.stem}[.-]*")))
        paths = [first] if number == 1 else [_numbered(first, i) for i in range(number)]
    else:
        path = Path(args.output_path or args.out)
        if path.suffix == "" or path.is_dir():
            suffix = ".wav" if args.sound_only else ".mp4"
            paths = [path / f"{i:03d}{suffix}" for i in range(number)]
        elif path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"--output-path: cannot write {path.suffix}; use {', '.join(SUFFIXES)} or a folder"
            )
        else:
            paths = [path] if number == 1 else [_numbered(path, i) for i in range(number)]
    if args.save_latents:
        _check_writable(Path(args.save_latents), "--save-latents")
    _check_writable(paths[0], "--output-path")
    return paths


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number:03d}{path.suffix}")


def _check_writable(path: Path, flag: str) -> None:
    """UserError unless a file can be made there; nothing is left of the attempt."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of a name of its own: other hosts may try the same folder at the same time.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be written ({error.strerror})") from None


def _remembered(args: argparse.Namespace, clip: Made, wish: Wish) -> dict[str, Any]:
    """The settings that make a clip again."""
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ASIDE
        and name in flags.REMEMBERED
        # But 0 is a setting, and so is a flag without words, as --auto-duration may be.
        and value is not None
        and value is not False
    }
    given = {name: value for name, value in wish.given.items() if name != "seed"}
    settings |= {"given": given, "texts": [], "prompt": [clip.prompt]}
    return settings | {"seed": clip.about.get("seed")}


def _again(args: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the clip `--again`, under those that are given now."""
    try:
        about = json.loads(read_about(args.again) or "{}")
        settings = about["command"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--again: {args.again} does not say what made it") from None
    known = {name: value for name, value in settings.items() if name in flags.REMEMBERED}
    # Lists of flags are lists of tuples, which JSON does not know.
    known = {
        name: [tuple(v) if isinstance(v, list) else v for v in value]
        if isinstance(value, list)
        else value
        for name, value in known.items()
    }
    if args.prompt or args.prompts:  # in place of that one, not beside it
        known.pop("prompt", None)
    args = flags.read(argv, known)
    # What a line of a file gave it stays, unless a flag says something else now.
    now, none = (flags.wishes(flags.read(words)) for words in (argv, ["--again", args.again]))
    args.given = {name: x for name, x in args.given.items() if now[name] == none[name]}
    return args


# ------------------------------------------------------------------------------ of a workdir


def _from_workdir(args: argparse.Namespace) -> None:
    # The first host names and writes the folder; the others only compute.
    out = hosts.agree(lambda: output_folder(args.workdir, args.out))
    mesh = hosts.agree(lambda: make_mesh(*(args.mesh or (-1, 1, 1))))
    pipeline = Pipeline.from_workdir(
        args.workdir, step=args.checkpoint_step, mesh=mesh, text_cache=args.text_cache
    )
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(SampleConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(pipeline.config.sample, **given)
    prompts = all_prompts(args.texts, args.num_clips, pipeline.config, settings)
    hosts.agree_on_first(lambda: make_folder(out), 300, "the folder of the clips is made")
    if pipeline.clip_bytes * len(prompts) > LARGE:
        paths = [out / "samples" / f"{number:03d}.mp4" for number in range(len(prompts))]
        pipeline.save(prompts, paths, sample=settings)
        hosts.say(f"wrote {len(prompts)} clips in {out}/samples")
        return
    clips = pipeline(prompts, sample=settings)
    if hosts.index() != 0:
        return
    write_clips(clips, prompts, out)
    # One clip has no other to exchange its sound with; the measure is made for the synthetic clips.
    if len(clips) > 1 and all(map(synthetic.is_scripted, prompts)):
        kinds = [synthetic.event_kind(prompt) for prompt in prompts]
        print("generated clips:", sync_report(clips, kinds=kinds))


def output_folder(workdir: str, out: str | None) -> epath.Path:
    """`out`, or the first of out-001, out-002, ... that the workdir does not have.

    Raises:
      UserError: `out` is a file, or holds clips.
    """
    if out is None:
        names = (location(workdir) / f"out-{number:03d}" for number in itertools.count(1))
        return next(name for name in names if not name.exists())
    folder = location(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file")
    if (folder / "sample.mp4").exists() or (folder / "samples").exists():
        raise UserError(f"--out: {folder} holds clips already; choose another folder")
    return folder


def make_folder(out: epath.Path) -> None:
    """UserError unless `out` can be a folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made ({error.strerror})") from None


def all_prompts(
    prompts: Sequence[str], num_clips: int | None, config: Config, settings: SampleConfig
) -> list[str]:
    """One prompt for each clip: those given, in turn, or captions that the model may not know.

    Raises:
      UserError: no prompts for a model of other clips than the synthetic ones; too few clips.
    """
    if not prompts:
        if config.data.folders:
            given = ", ".join(folder for folder, _ in config.data.folders)
            raise UserError(
                f"give a prompt: this model was trained on {given}, and only for the "
                "synthetic clips can captions be made up"
            )
        return synthetic.captions(config.data.synthetic, settings.num_clips, settings.seed)
    count = len(prompts) if num_clips is None else num_clips
    if count < len(prompts):
        raise UserError(f"--num-clips={count} is too few for {len(prompts)} prompts")
    return list(itertools.islice(itertools.cycle(prompts), count))


def _asks_for_a_task(args: argparse.Namespace) -> bool:
    """Whether a workdir's model is to do more than make clips of its captions."""
    new = {*flags.REMEMBERED, "output_path", "from_latents", "save_latents", "prompts"}
    new -= {"workdir", "checkpoint_step", "texts", "seed", *flags.OF_WORKDIRS, "model", "dtype"}
    plain = flags.make_parser().parse_args([])
    return any(getattr(args, name) != getattr(plain, name) for name in new if hasattr(plain, name))


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `command.run`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    work = lambda: main(flags.read(argv), argv)  # noqa: E731
    return command.run("sample", lambda: command.on_hosts(argv, work))


if __name__ == "__main__":
    sys.exit(cli())
