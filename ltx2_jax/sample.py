"""Clips from a released or a trained model: python -m ltx2_jax.sample --help."""

import argparse
import dataclasses
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from ltx2_jax import command, hosts
from ltx2_jax.command import count, finite, mesh_flag, positive, seed_flag
from ltx2_jax.config import Config, SampleConfig
from ltx2_jax.demo import synthetic
from ltx2_jax.diffusion.schedules import SCHEDULES
from ltx2_jax.errors import UserError
from ltx2_jax.evaluation.sync import sync_report
from ltx2_jax.files import location
from ltx2_jax.media.media import read_about
from ltx2_jax.models.quantized import FORMS
from ltx2_jax.sampling.output import SUFFIXES, Made, read_latents, save_latents, write_clips
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sampling.recipes import RECIPES
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.captions import read_prompts
from ltx2_jax.training.checkpoint import ASSETS

DESCRIPTION = """\
Make clips with a released model, or with the model that train left in a workdir.

MODEL is a file or folder of a release, its name on the Hugging Face Hub, or a workdir. Flags that
ltx_pipelines has mean the same here.

    text                 -> picture and sound    MODEL "prompt"
    text                 -> picture or sound     --picture-only, --sound-only
    image, keyframes     -> picture and sound    --image FILE FRAME STRENGTH, --keyframe ...
    sound                -> picture              --audio-path FILE
    picture              -> sound                --video-path FILE
    retake of a span     -> picture and sound    --video-path FILE --start-time S --end-time S
    a longer clip        -> picture and sound    --video-path FILE --extend S, --extend-before S
    video with IC-LoRA   -> picture and sound    --video-conditioning FILE STRENGTH --lora FILE
    new words, same lips -> picture and sound    --reference-video FILE --lora FILE

Of a workdir without such flags: one clip for each PROMPT; without any, a model of the synthetic
clips gets fresh captions of their grammar. Into the output folder go samples/000.mp4 and on,
sample.mp4 (the first clip) and samples.png (frames and sound of the first four); of more than a
gigabyte of pixels, only the clips. A folder that holds clips is never written over.
"""

EXAMPLE = """\
example:
  python -m ltx2_jax.sample ltx-2.3-22b-distilled-1.1.safetensors "a dog barks twice" \\
      --gemma-root gemma-3-12b-it/ --output-path dog.mp4 \\
      --spatial-upsampler-path ltx-2.3-spatial-upscaler-x2-1.1.safetensors
  python -m ltx2_jax.sample --again dog.mp4 --seed 11 --output-path dog2.mp4
  python -m ltx2_jax.sample --workdir=workdir/quickstart \\
      "a red ball bounces twice at a fast tempo, each impact a high note"

The same prompts, settings and seed give the same clips. Every number of a recipe can be replaced:
--stage1.steps=20 --stage2.sigmas=0.9,0.5,0 --stage1.video.cfg=4 --image_crf=0. Settings of a
workdir that are not given are those of the config that the model was trained with.
"""

# Bytes of pixels from which clips are written as they are decoded, without a picture of them.
LARGE = 2**30
# Not part of what made a clip: where it goes, and how this machine works on it.
ASIDE = {"words", "out", "prompts", "num_clips"}
GUIDANCE = {
    "cfg_guidance_scale": ("cfg", "away from what the negative prompt gives; 1 = off"),
    "stg_guidance_scale": ("stg", "away from skipped self-attention; 0 = off"),
    "rescale_scale": ("rescale", "back to the contrast without guidance; 0 = off"),
    "stg_blocks": ("stg_blocks", "blocks whose self-attention is skipped"),
    "skip_step": ("skip_step", "steps between two guided ones"),
}
# Other flags of numbers of the first stage; those of workdirs mean the same.
OF_STAGES = {
    "steps": ("num_inference_steps", "steps"),
    "schedule": ("schedule",),
    "video.cfg": ("video_guidance",),
    "audio.cfg": ("audio_guidance",),
}
MODALITY = {"a2v_guidance_scale": "video", "v2a_guidance_scale": "audio"}


def main(args: argparse.Namespace, argv: Sequence[str] = ()) -> None:
    """Load, sample, write, report. `argv` is what `args` were read from."""
    if args.again:
        args = _again(args, argv)
    if args.workdir and args.quantize:
        raise UserError("--quantize: for released models, not for what train left in a workdir")
    if args.workdir and not _asks_for_a_task(args):
        return _from_workdir(args)
    return _released(args)


# ------------------------------------------------------------------------- of a released model


def _released(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    if args.from_latents:
        made = [read_latents(path) for path in args.from_latents]
        prompts = [clip.prompt for clip in made]
    else:
        prompts = _prompts(args)
    paths = output_paths(args, len(prompts))
    pipe = _pipeline(args)
    if not args.from_latents:
        made = pipe.make(prompts, **_wishes(args))
    if hosts.index() != 0:
        return
    for path, clip in zip(paths, made, strict=True):
        clip.about["command"] = _remembered(args, clip)
        if args.save_latents:
            name = Path(args.save_latents)
            save_latents(name if len(made) == 1 else _numbered(name, paths.index(path)), clip)
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
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    """All prompts; a file of them has one a line.

    Raises:
      UserError: none, a blank one, a file that cannot be read.
    """
    prompts = [*args.prompt, *args.texts]
    if args.prompts:
        prompts += read_prompts(args.prompts, "--prompts")
    if not prompts:
        raise UserError("give a prompt: PROMPT, --prompt or --prompts FILE")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"prompt {number} is blank")
    return prompts


def output_paths(args: argparse.Namespace, number: int) -> list[Path]:
    """A file for each clip, all of which can be written.

    Raises:
      UserError: a suffix that is not written; a place that cannot be written to.
    """
    if args.output_path is None and args.out is None:
        suffix = ".wav" if args.sound_only else ".mp4"
        names = (Path(f"clip-{i:03d}{suffix}") for i in itertools.count(1))
        first = next(name for name in names if not name.exists())
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
        probe = path.with_name(f".{path.name}.probe")
        probe.touch()
        probe.unlink()
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be written ({error.strerror})") from None


def _wishes(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Pipeline.make`."""
    changes = dict(args.changes)
    for stream in ("video", "audio"):
        for flag, (field, _) in GUIDANCE.items():
            if (value := getattr(args, f"{stream}_{flag}")) is not None:
                changes.setdefault(f"stage1.{stream}.{field}", str(value))
    for flag, stream in MODALITY.items():
        if (value := getattr(args, flag)) is not None:
            changes.setdefault(f"stage1.{stream}.modality", str(value))
    for field, names in OF_STAGES.items():
        value = next((v for n in names if (v := getattr(args, n)) is not None), None)
        if value is not None:
            changes.setdefault(f"stage1.{field}", str(value))
    for number in (1, 2):
        if (value := getattr(args, f"distilled_lora_strength_stage_{number}")) is not None:
            changes.setdefault(f"stage{number}.distilled_lora", str(value))
    dub = args.reference_video and (args.reference_video, args.reference_strength)
    plain = ("num_frames", "height", "width", "duration", "extend", "extend_before", "retake",
             "num_generated_keyframes", "seed", "recipe", "negative_prompt", "skip_stage_2",
             "enhance_prompt", "auto_duration")  # fmt: skip
    return {
        **{name: getattr(args, name) for name in plain},
        "enhancer": args.prompt_enhancer_gemma_root,
        "fps": args.frame_rate,
        "image": [image for image in args.image if image[1] == 0] or None,
        # As in the released pipelines, images at other frames stand beside the clip.
        "keyframes": [*(image for image in args.image if image[1] != 0), *args.keyframe],
        "audio": args.audio_path,
        "audio_start": args.audio_start_time,
        "audio_max_duration": args.audio_max_duration,
        "video": args.video_path,
        "start": args.start_time,
        "end": args.end_time,
        "references": args.video_conditioning,
        "dub": dub,
        "voice": args.voice,
        "picture": not args.sound_only,
        "sound": not args.picture_only,
        "changes": changes,
        "batch_size": args.max_batch_size,
    }


def _remembered(args: argparse.Namespace, clip: Made) -> dict[str, Any]:
    """The settings that make a clip again."""
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ASIDE and name in REMEMBERED and value not in (None, [], False)
    }
    return {**settings, "texts": [], "prompt": [clip.prompt], "seed": clip.about.get("seed")}


def _again(args: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the clip `--again`, under those that are given now."""
    try:
        about = json.loads(read_about(args.again) or "{}")
        settings = about["command"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--again: {args.again} does not say what made it") from None
    known = {name: value for name, value in settings.items() if name in REMEMBERED}
    # Lists of flags are lists of tuples, which JSON does not know.
    known = {
        name: [tuple(v) if isinstance(v, list) else v for v in value]
        if isinstance(value, list)
        else value
        for name, value in known.items()
    }
    parser = _parser()
    parser.set_defaults(**known)
    return _parsed(parser, argv)


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
    new = {*REMEMBERED, "output_path", "from_latents", "save_latents", "prompts"}
    new -= {"workdir", "checkpoint_step", "texts", "seed", *OF_WORKDIRS, "model", "dtype"}
    plain = _parser().parse_args([])
    return any(getattr(args, name) != getattr(plain, name) for name in new if hasattr(plain, name))


# -------------------------------------------------------------------------------------- the flags


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `command.run`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    work = lambda: main(_parsed(_parser(), argv), argv)  # noqa: E731
    return command.run("sample", lambda: command.on_hosts(argv, work))


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, words told apart into the model and prompts; exits at what cannot be."""
    args, rest = parser.parse_known_args(argv)
    changes = dict(args.changes or {})
    for word in rest:
        found = re.fullmatch(r"--(image_crf|sound_of|stage\d+\.[\w.]+)=(.*)", word)
        if found is None:
            parser.error(f"unrecognized arguments: {word}")
        changes[found[1]] = found[2]
    args.changes = changes
    words, model = list(args.words), [path for path in _model_files(args) if path]
    if args.workdir is None and not model and words:
        first = words.pop(0)
        if _is_workdir(first):
            args.workdir = first
        else:
            model = [first]
    args.model = model or args.model or []
    args.texts = words or args.texts or []
    if args.text_encoder_path or args.gemma_root:
        args.text_encoder = args.text_encoder_path or args.gemma_root
    if args.again:
        return args
    if args.workdir is None and not args.model:
        parser.error("give MODEL, or --workdir=FOLDER")
    given = args.texts or args.prompt or args.prompts or args.from_latents
    if args.workdir is None and not given:
        parser.error(f"{args.model[0]}: give MODEL and a PROMPT, or --workdir=FOLDER")
    return args


def _model_files(args: argparse.Namespace) -> list[str | None]:
    parts = (args.transformer_path, args.video_vae_path, args.audio_vae_path,
             args.duration_head_path)  # fmt: skip
    if args.transformer_path and args.text_encoder_path:
        parts = (*parts, args.text_encoder_path)
    return [args.checkpoint_path, args.distilled_checkpoint_path, *parts]


def _is_workdir(name: str) -> bool:
    return (Path(name) / ASSETS).is_dir()


def _parser() -> argparse.ArgumentParser:
    # Of so many flags, argparse's own line would hide an error behind a page.
    usage = "python -m ltx2_jax.sample MODEL PROMPT [--flags]; --help lists them"
    parser = command.parser("sample", DESCRIPTION, EXAMPLE, usage=usage)
    add = parser.add_argument
    add("words", metavar="MODEL PROMPT", nargs="*", help="the model (unless a flag names it), and "
        "what to see and hear")  # fmt: skip
    for flags in (_model, _task, _given, _guidance, _resources, _output, _workdir):
        flags(parser)
    parser.set_defaults(changes={}, model=[], texts=[], text_encoder=None)
    command.host_flags(parser)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    for name in ("checkpoint", "distilled-checkpoint", "transformer", "text-encoder", "video-vae",
                 "audio-vae", "duration-head", "spatial-upsampler"):  # fmt: skip
        what = f"file of the {name.replace('-', ' ')}"
        add(f"--{name}-path", type=_place, metavar="FILE", help=what)
    add("--gemma-root", type=_place, metavar="FOLDER", help="the text encoder's folder")
    add("--lora", **_several("PATH [STRENGTH]", _lora), help="fused into the weights; STRENGTH "
        "is a number or VIDEO,AUDIO,CROSS, and stages may have their own: 1/0.5")  # fmt: skip
    add("--distilled-lora", nargs="+", action=_one_of("PATH [STRENGTH]", _distilled),
        metavar="PATH", help="that later stages need")  # fmt: skip
    for number in (1, 2):
        add(f"--distilled-lora-strength-stage-{number}", type=finite, metavar="STRENGTH",
            help=f"of it in stage {number}")  # fmt: skip
    add("--recipe", choices=RECIPES, help="default: by the model and what is given with it")
    add("--skip-stage-2", action="store_true", help="the first stage alone, at its size")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of activations")
    add("--quantize", choices=tuple(FORMS), help="keep the large matrices in eight or four bits")


def _task(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the clip").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to see and hear")
    add("--prompts", metavar="FILE", help="a prompt a line, a clip each")
    add("--negative-prompt", metavar="TEXT", help="what not to see and hear")
    add("--enhance-prompt", action="store_true", help="have a Gemma write the prompt out")
    add("--prompt-enhancer-gemma-root", type=_place, metavar="FOLDER", help="which Gemma")
    add("--seed", type=seed_flag, help="of the noise (default: 10)")
    add("--height", type=count, metavar="PIXELS", help="default: by the recipe")
    add("--width", type=count, metavar="PIXELS", help="default: by the recipe")
    add("--num-frames", type=count, metavar="N", help="8 k + 1 (default: 121)")
    add("--duration", type=positive, metavar="SECONDS", help="instead of --num-frames")
    add("--auto-duration", nargs="*", type=positive, metavar="SECONDS",
        help="the model chooses (2.5), from MIN to MAX if given")  # fmt: skip
    add("--frame-rate", type=positive, metavar="FPS", help="default: 24, or that of a given clip")
    add("--picture-only", action="store_true", help="no sound")
    add("--sound-only", action="store_true", help="no picture: write to .wav")
    add("--num-inference-steps", type=count, metavar="N", help="of the first stage")


def _given(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is given").add_argument
    what = "PATH FRAME STRENGTH [CRF]"
    add("--image", **_several(what, _picture), help="in the place of a frame; repeatable")
    add("--keyframe", **_several(what, _picture), help="beside the clip, at any frame; repeatable")
    add("--num-generated-keyframes", type=count, default=0, metavar="N", help="made first (2.5)")
    add("--audio-path", type=_place, metavar="FILE", help="sound that the picture is made for")
    add("--audio-start-time", type=finite, default=0.0, metavar="SECONDS", help="where it begins")
    add("--audio-max-duration", type=positive, metavar="SECONDS", help="how much of it")
    add("--video-path", type=_place, metavar="FILE", help="a clip that gets sound, is retaken, or "
        "extended")  # fmt: skip
    add("--start-time", type=finite, metavar="SECONDS", help="of the span to be retaken")
    add("--end-time", type=finite, metavar="SECONDS", help="of the span to be retaken")
    add("--retake", choices=("both", "video", "audio"), default="both", help="what of the span")
    add("--extend", type=positive, metavar="SECONDS", help="more of the clip, after it")
    add("--extend-before", type=positive, metavar="SECONDS", help="more of the clip, before it")
    add("--video-conditioning", **_several("PATH STRENGTH", _reference), help="what an IC-LoRA "
        "reads; repeatable")  # fmt: skip
    add("--reference-video", type=_place, metavar="FILE", help="a clip to be dubbed")
    add("--reference-strength", type=finite, default=1.0, metavar="STRENGTH", help="of it")
    add("--voice", type=_place, metavar="FILE", help="a sound whose voice is to be heard")


def _guidance(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("guidance of the first stage").add_argument
    for stream in ("video", "audio"):
        for flag, (_, text) in GUIDANCE.items():
            kind = {"skip_step": count, "stg_blocks": _blocks}.get(flag, finite)
            name = f"--{stream}-{flag.replace('_', '-')}"
            add(name, type=kind, metavar="NUMBER", help=f"{stream}: {text}")
    for flag, stream in MODALITY.items():
        add(f"--{flag.replace('_', '-')}", type=finite, metavar="NUMBER",
            help=f"{stream}: away from what is seen without the other stream; 1 = off")  # fmt: skip


def _resources(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the machine").add_argument
    add("--mesh", type=mesh_flag, metavar="DATA,MODEL,SEQUENCE", help="how the devices share the "
        "work; -1 takes what is left (default: -1,1,1, MODEL larger if needed)")  # fmt: skip
    add("--max-batch-size", type=count, default=1, metavar="N", help="clips at a time")
    add("--keep", action="store_true", default=None, help="text encoder, transformer and decoder "
        "stay in memory (default: if they fit together)")  # fmt: skip
    add("--text-cache", metavar="FOLDER", help="keeps features of prompts; a released text encoder "
        "is loaded for new ones only")  # fmt: skip


def _output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the files").add_argument
    add("--output-path", metavar="FILE", help=".mp4; .png: a file a frame, and a .wav; .wav; or a "
        "folder (default: clip-001.mp4, or the next free number)")  # fmt: skip
    add("--crf", type=int, choices=range(52), default=19, metavar="0..51", help="of H.264 "
        "(default: 19)")  # fmt: skip
    add("--save-latents", metavar="FILE", help="keeps what the decoder gets")
    add("--from-latents", nargs="+", default=[], metavar="FILE", help="decodes that, and no more")
    add("--again", metavar="FILE.mp4", help="makes a clip as this one was; other flags change it")


def _workdir(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("of a workdir").add_argument
    add("--workdir", type=_place, metavar="FOLDER", help="what train wrote")
    add("--checkpoint-step", type=int, metavar="STEP", help="the checkpoint to take (default: the "
        "newest)")  # fmt: skip
    add("--out", metavar="FOLDER", help="default: out-001 in the workdir, or the next free number")
    add("--num-clips", type=int, metavar="N", help="clips in all, from the prompts in turn "
        "(default: one for each prompt)")  # fmt: skip
    add("--steps", type=int, metavar="N", help="calls of the model for each clip")
    add("--schedule", metavar="NAME", help=", ".join(SCHEDULES))
    add("--video-guidance", type=finite, metavar="SCALE", help="how close to the prompt; 1 = off")
    add("--audio-guidance", type=finite, metavar="SCALE", help="the same for the sound")


# ------------------------------------------------------------------------- values of the flags


def _place(text: str) -> str:
    """A file as its full path, so that what a clip remembers holds in any folder; or a Hub name."""
    return str(Path(text).resolve()) if Path(text).exists() else text


def _blocks(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _picture(words: list[str]) -> tuple[Any, ...]:
    path, frame, strength, *crf = words
    return _place(path), int(frame), float(strength), *map(int, crf)


def _reference(words: list[str]) -> tuple[Any, ...]:
    path, strength = words
    return _place(path), float(strength)


def _lora(words: list[str]) -> tuple[Any, ...]:
    path, *strength = words
    if len(strength) > 1:
        raise ValueError
    return _place(path), *strength


def _distilled(words: list[str]) -> tuple[Any, ...]:
    path, *strength = words
    return _place(path), *map(float, strength[:1])


def _several(what: str, read: Callable[[list[str]], Any]) -> dict[str, Any]:
    """Of a flag that takes several words and may be repeated."""
    action = _appending(what, read)
    return {"nargs": "+", "action": action, "default": [], "metavar": what.split()[0]}


def _appending(what: str, read: Callable[[list[str]], Any]) -> type[argparse.Action]:
    class Appending(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            try:
                value = read(values)
            except (ValueError, TypeError):
                parser.error(f"argument {option_string}: {' '.join(values)!r} is not {what}")
            setattr(namespace, self.dest, [*getattr(namespace, self.dest), value])

    return Appending


def _one_of(what: str, read: Callable[[list[str]], Any]) -> type[argparse.Action]:
    class One(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            try:
                setattr(namespace, self.dest, read(values))
            except (ValueError, TypeError):
                parser.error(f"argument {option_string}: {' '.join(values)!r} is not {what}")

    return One


def _dests(*groups: Callable[[argparse.ArgumentParser], None]) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    for group in groups:
        group(parser)
    return {name for name in vars(parser.parse_args([]))}


OF_WORKDIRS = {"out", "num_clips", "steps", "schedule", "video_guidance", "audio_guidance"}
REMEMBERED = _dests(_model, _task, _given, _guidance, _workdir) | {
    "changes", "model", "texts", "text_encoder",
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli())
