"""The flags of `sample`: what they are, and what they ask of a `Pipeline`."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ltx2_jax import command
from ltx2_jax.command import count, finite, mesh_flag, positive, seed_flag
from ltx2_jax.diffusion.schedules import SCHEDULES
from ltx2_jax.models.quantized import CHOICES
from ltx2_jax.sampling.recipes import RECIPES
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


def read(argv: Sequence[str], remembered: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """The arguments, words told apart into the model and prompts; exits at what cannot be.

    `remembered` are those of another clip, which hold where none are given.
    """
    parser = make_parser()
    parser.set_defaults(**(remembered or {}))
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


def make_parser() -> argparse.ArgumentParser:
    """All flags of the command."""
    # Of so many flags, argparse's own line would hide an error behind a page.
    usage = "python -m ltx2_jax.sample MODEL PROMPT [--flags]; --help lists them"
    parser = command.parser("sample", DESCRIPTION, EXAMPLE, usage=usage)
    add = parser.add_argument
    add("words", metavar="MODEL PROMPT", nargs="*", help="the model (unless a flag names it), and "
        "what to see and hear")  # fmt: skip
    for group in (_model, _task, _given, _guidance, _resources, _output, _workdir):
        group(parser)
    parser.set_defaults(changes={}, given={}, model=[], texts=[], text_encoder=None)
    command.host_flags(parser)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    for name in ("checkpoint", "distilled-checkpoint", "transformer", "text-encoder", "video-vae",
                 "audio-vae", "duration-head", "spatial-upsampler"):  # fmt: skip
        what = f"file of the {name.replace('-', ' ')}"
        add(f"--{name}-path", type=_place, metavar="FILE", help=what)
    add("--gemma-root", type=_place, metavar="FOLDER", help="the text encoder's folder")
    add("--lora", **_several("PATH [STRENGTH]", _lora), help="STRENGTH "
        "is a number or VIDEO,AUDIO,CROSS, and stages may have their own: 1/0.5")  # fmt: skip
    add("--distilled-lora", nargs="+", action=_one_of("PATH [STRENGTH]", _distilled),
        metavar="PATH", help="that later stages need")  # fmt: skip
    for number in (1, 2):
        add(f"--distilled-lora-strength-stage-{number}", type=finite, metavar="STRENGTH",
            help=f"of it in stage {number}")  # fmt: skip
    add("--recipe", choices=RECIPES, help="default: by the model and what is given with it")
    add("--skip-stage-2", action="store_true", help="the first stage alone, at its size")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of activations")
    add("--quantize", choices=CHOICES, help="keep the large matrices in eight or four bits, and "
        "multiply in eight if it says products")  # fmt: skip


def _task(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the clip").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to see and hear")
    add("--prompts", metavar="FILE", help="a line a clip: a prompt, or a JSON object with "
        "the names of Pipeline.make")  # fmt: skip
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
    add("--offload", action="store_true", help="weights wait in the host's memory, and come to the "
        "devices a layer ahead of their use")  # fmt: skip
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
    "changes", "given", "model", "texts", "text_encoder",
}  # fmt: skip


# ---------------------------------------------------------------------------- what they ask for


def wishes(args: argparse.Namespace) -> dict[str, Any]:
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
