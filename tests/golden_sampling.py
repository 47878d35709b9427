"""Golden cases of sampling: steps, guidance, conditions, and the loop of a stage."""

import dataclasses
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_case import Case
from golden_transformer import load_transformer

from ltx2_jax.diffusion import conditioning, flow, guidance, steppers
from ltx2_jax.diffusion.conditioning import Conditions
from ltx2_jax.diffusion.guidance import Guidance
from ltx2_jax.diffusion.sampler import Given, Latents
from ltx2_jax.sampling import programs
from ltx2_jax.sampling.programs import Pass, Request, make_sampler

STRIDES = (8, 32, 32)


def channels_last(latent):
    """[B, C, F, H, W] or [B, C, A, M] -> [B, F, H, W, C] or [B, A, M, C]."""
    return np.moveaxis(latent, 1, -1)


def channels_first(latent):
    return np.moveaxis(np.asarray(latent), -1, 1)


# ------------------------------------------------------------------------------------------- steps


def run_step(case: Case):
    x, args, kind = case.inputs(), case.args, case.name.split("/")[1]
    if kind == "res2s_coefficients":
        for row in case.data:
            got = steppers.res2s_coefficients(row["h"])
            want = [row[name] for name in ("a21", "b1", "b2")]
            np.testing.assert_allclose(got, want, **case.spec["tolerance"])
        return {}
    if kind == "to_velocity_denoised":
        sample, other = x["sample"], x["other"]
        return {
            "velocity": flow.to_velocity(sample, other, args["sigma"]),
            "denoised_scalar": flow.to_x0(sample, other, args["sigma"]),
            "denoised_per_token": flow.to_x0(sample, other, x["sigma_per_token"]),
        }
    if kind == "post_process":
        mask = jnp.asarray(x["mask"][..., 0])
        given = Conditions(x["clean"], 1 - mask, None, None, None, mask.shape[1])
        timesteps = conditioning.levels(given, jnp.asarray(args["sigma"]))["timesteps"]
        blended = conditioning.keep_given(given, x["denoised"])
        return {"blended": blended, "timesteps": timesteps[..., None]}
    sigmas = jnp.asarray(x["sigmas"])
    i = args["step_index"]
    found = steppers.Found(x["denoised"], x.get("uncond_denoised"))
    if kind.startswith("res2s_sde"):
        update = x["denoised"] - x["sample"]
        numbers = {"noise": x["noise"], "eta": args["eta"]}
        return {"next": steppers.renoised(x["sample"], update, sigmas[i], sigmas[i + 1], **numbers)}
    if kind.startswith("euler_ancestral"):
        stepper = steppers.AncestralEuler(args["eta"], args["s_noise"])
    elif kind.startswith("euler_cfg_pp"):
        stepper = steppers.EulerCFGPlusPlus(args["eta"], args["s_noise"])
    else:
        assert kind.startswith("euler_"), f"unknown step {kind!r}"
        stepper = steppers.Euler()
    row = {name: values[i] for name, values in stepper.rows(sigmas).items()}
    sample = jnp.asarray(x["sample"])
    memory = stepper.begin(sample)
    return {"next": stepper.step(row, sample, found, memory, x.get("noise"), None)[0]}


# ---------------------------------------------------------------------------------------- guidance


def run_guider(case: Case):
    x, args, kind = case.inputs(), case.args, case.name.split("/")[1]
    if kind == "sigma_bins":
        spelt = case.spec["what"].split("{")[1].split("}")[0]
        pairs = (pair.split(":") for pair in spelt.split(","))
        values = {float(bound): float(value) for bound, value in pairs}
        sigmas, want = np.transpose(case.data)
        np.testing.assert_array_equal(guidance.binned(values, sigmas), want)
        return {}
    if kind == "skip_steps":
        for skip, step, want in case.data:
            assert bool(guidance.skipped(step, skip)) == want
        return {}
    cond = jnp.asarray(x["cond"])
    if kind.startswith("multimodal"):
        others = [x[f"uncond_{name}"] for name in ("text", "perturbed", "modality")]
        strengths = (
            args.get("cfg_scale", 1.0) - 1,
            args.get("stg_scale", 0.0),
            args.get("modality_scale", 1.0) - 1,
        )
        pred = guidance.moved_away(cond, others, strengths)
        factor = args.get("rescale_scale", 0.0)
        return {"guided": guidance.rescale(pred, cond, factor, per_sample=False)}
    if kind == "apg_stateful":
        numbers = {"eta": args["eta"], "norm": args["norm_threshold"]}
        first, second = cond - x["uncond1"], cond - x["uncond2"]
        deltas = [first, args["momentum"] * first + second]
        return {
            f"delta{i}": args["scale"] * guidance.apg(cond, delta, **numbers)
            for i, delta in enumerate(deltas, 1)
        }
    if kind == "cfg_star":
        coef = guidance.projection(cond, jnp.asarray(x["uncond"]))
        delta = (args["scale"] - 1) * guidance.star(cond, x["uncond"])
        return {"delta": delta, "coef": coef.reshape(-1, 1)}
    if kind.startswith("apg"):
        numbers = {"eta": args.get("eta", 1.0), "norm": args.get("norm_threshold", 0.0)}
        return {"delta": (args["scale"] - 1) * guidance.apg(cond, cond - x["uncond"], **numbers)}
    if kind == "cfg":
        return {"delta": guidance.cfg(cond, x["uncond"], args["scale"]) - cond}
    assert kind == "stg", f"unknown guidance {kind!r}"
    return {"delta": guidance.moved_away(cond, [x["uncond"]], [args["scale"]]) - cond}


# -------------------------------------------------------------------------------------- conditions


def bare(case: Case, x) -> Conditions:
    """The stream of a case before anything is given of it."""
    args = case.args
    if "channels" not in args:
        latents = np.zeros((1, args["frames"], args.get("mel_bins", 16), args.get("z_channels", 1)))
        return conditioning.of_audio(latents)
    shape = (1, args["frames"], args["height"], args["width"], args["channels"])
    latents = (
        channels_last(x["initial_latent"]) if "initial_latent" in x else np.zeros(shape, np.float32)
    )
    return conditioning.of_video(latents, args["fps"], STRIDES, marked=True)


def conditioned(case: Case, x) -> Conditions:
    args, kind, c = case.args, case.name.split("/")[1], bare(case, x)
    latents = {name: channels_last(v) for name, v in x.items() if np.ndim(v) == 5}
    place = {"fps": args.get("fps"), "strides": STRIDES}
    if kind.startswith("image_frame0") or kind == "clip_latent_idx1":
        strength = args.get("strength", 0.7 if "soft" in kind else 1.0)
        given = latents.get("image_latent", latents.get("clip_latent"))
        return conditioning.frames(c, given, args.get("latent_idx", 0), strength)
    if kind.startswith("keyframe") and kind != "keyframe_slots":
        numbers = {"strength": args["strength"], **place}
        return conditioning.keyframe(c, latents["keyframe_latent"], args["frame_idx"], **numbers)
    if kind == "image_and_keyframe":
        c = conditioning.frames(c, latents["image_latent"], 0, args["image_strength"])
        numbers = {"strength": args["keyframe_strength"], **place}
        return conditioning.keyframe(c, latents["keyframe_latent"], args["frame_idx"], **numbers)
    if kind.startswith("reference"):
        numbers = {"strength": args["strength"], **place}
        numbers |= {"spatial_scale": args["downscale_factor"]}
        numbers |= {"temporal_scale": args["temporal_scale_factor"]}
        return conditioning.reference_video(c, latents["reference_latent"], **numbers)
    if kind == "attention_strength":
        (first, second), (strength, spelt) = args["frame_idx"], args["attention_strength"]
        assert spelt == "linspace(0,1,H*W)"
        by_token = np.linspace(0, 1, args["height"] * args["width"], dtype=np.float32)
        c = conditioning.keyframe(c, latents["keyframe_latent"], first, **place, attention=strength)
        scale = args.get("downscale_factor", 1)
        c = conditioning.reference_video(
            c, latents["reference_latent"], **place, spatial_scale=scale
        )
        return conditioning.keyframe(
            c, latents["keyframe2_latent"], second, **place, attention=by_token
        )
    if kind == "mask":
        return conditioning.masked(c, x["mask"], latents["latent_in"], args["strength"])
    if kind.startswith("temporal_region"):
        return conditioning.outside_time(c, args["start_time"], args["end_time"])
    if kind == "audio_reference":
        tokens = x["reference_tokens"]
        numbers = {"strength": args["strength"]}
        return conditioning.append(c, tokens, x["reference_positions"], **numbers)
    if kind == "keyframe_slots":
        initial = latents["initial_keyframes"]
        frames = args["pixel_frame_indices"]
        return conditioning.keyframe_slots(c, frames, **place, latents=initial)
    assert kind.startswith("initial_"), f"unknown condition {kind!r}"
    return c


def run_conditioning(case: Case):
    x = case.inputs()
    if case.name.endswith("audio_reference"):  # sizes that its arguments leave out
        case = dataclasses.replace(case, spec=case.spec | {"args": case.args | {
            "z_channels": x["reference_tokens"].shape[2] // 16}})  # fmt: skip
    c = conditioned(case, x)
    if case.name.endswith("_noised"):
        return {"latent": conditioning.noised(c, x["noise"], case.args["noise_scale"])}
    strength = np.zeros(c.clean.shape[:2]) if c.strength is None else c.strength
    found = {
        "latent": c.start,
        "clean_latent": c.clean,
        "denoise_mask": 1 - np.asarray(strength, np.float32)[..., None],
        "positions": c.positions,
        "keyframes_mask": None if c.marks is None else c.marks[..., None],
        "attention_mask": c.attention,
    }
    return {name: found[name] for name in case.expected()}


# ------------------------------------------------------------------------------------------- loops


class Direct(nnx.Module):
    """A transformer whose text is its own context, in the place of `LTX2`."""

    def __init__(self, transformer):
        self.transformer = transformer

    def context(self, text):
        return text["video_text"], text["audio_text"], None


@cache
def direct(folder: Path):
    return nnx.split(Direct(load_transformer(folder)))


def passes_of(video: dict, audio: dict) -> tuple[tuple[Pass, ...], tuple, tuple]:
    """Passes, strengths and rescaling factors of the settings of both streams."""
    passes, strengths = [], []

    def add(new: Pass, name: str, off: float):
        pair = [s.get(name, off) - off for s in (video, audio)]
        if any(pair):
            passes.append(new)
            strengths.append(tuple(map(np.float32, pair)))

    add(programs.EMPTY_CAPTION, "cfg", 1.0)
    blocks = [tuple(s.get("stg_blocks", ())) if s.get("stg") else () for s in (video, audio)]
    add(Pass(skipped=blocks[0], audio_skipped=blocks[1]), "stg", 0.0)
    add(Pass(exchange=False), "modality", 1.0)
    rescales = tuple(np.float32(s.get("rescale", 0.0)) for s in (video, audio))
    return tuple(passes), tuple(strengths), rescales


def settings_of(case: Case) -> tuple[dict, dict]:
    """Guidance of video and of audio."""
    found = case.args.get("guidance") or {}
    if "cfg" in case.args:
        found = {"video_cfg": case.args["cfg"], "audio_cfg": case.args["cfg"]}
    if "video" in found:
        return found["video"], found["audio"]
    shared = {name: v for name, v in found.items() if name in ("rescale", "stg", "modality")}
    return tuple(shared | {"cfg": found.get(f"{s}_cfg", 1.0)} for s in ("video", "audio"))


def given_of(case: Case, x) -> Given:
    args = case.args
    rows, _, channels = x["v_noise"].shape
    shape = (rows, args["frames"], args["height"], args["width"], channels)
    place = {"fps": args["fps"], "strides": STRIDES}
    video = conditioning.of_video(np.zeros(shape, np.float32), **place, marked=True)
    if "image_latent" in x:
        image = channels_last(x["image_latent"])
        video = conditioning.frames(video, image, 0, args.get("image_strength", 1.0))
    if "keyframe_latent" in x:
        numbers = {"strength": args["keyframe_strength"], **place}
        keyframe = channels_last(x["keyframe_latent"])
        video = conditioning.keyframe(video, keyframe, args["keyframe_idx"], **numbers)
    if "reference_latent" in x:
        numbers = {"attention": args["attention_strength"], **place}
        reference = channels_last(x["reference_latent"])
        video = conditioning.reference_video(video, reference, **numbers)
    if "pixel_frame_indices" in args:
        video = conditioning.keyframe_slots(video, args["pixel_frame_indices"], **place)
    if "a_noise" not in x:
        return Given(video, None)
    size = x["a_noise"].shape
    if "a_initial_latent" in x:
        return Given(video, conditioning.freeze(
            conditioning.of_audio(channels_last(x["a_initial_latent"]))))  # fmt: skip
    bins = bins_of(case)
    silence = np.zeros((size[0], size[1], bins, size[2] // bins), np.float32)
    return Given(video, conditioning.of_audio(silence))


def bins_of(case: Case) -> int:
    """Mel bins of the audio latents."""
    return case.spec["shapes"]["outputs"].get("a_latent", [16])[-1]


def stepper_of(case: Case) -> steppers.Stepper:
    args, kind = case.args, case.name.split("/")[1]
    if kind.startswith("res2s"):
        rounds = args["bongmath_max_iter"] if args["bongmath"] else 0
        return steppers.Res2s(args["eta"], rounds, by_token=not args["legacy_mode"])
    if kind == "ancestral":
        return steppers.AncestralEuler(args["eta"], args["s_noise"])
    if kind == "cfg_pp":
        return steppers.EulerCFGPlusPlus(args["eta"], args["s_noise"])
    if kind == "gradient_estimation":
        return steppers.GradientEstimation(args["ge_gamma"])
    assert not {"eta", "s_noise", "ge_gamma"} & set(args), f"unknown sampler of {case.name}"
    return steppers.Euler()


def noises_of(x) -> tuple[Latents, Latents | None]:
    """Those that the streams start from, and those of the calls, zeros for the last."""
    video = np.concatenate(
        [x["v_noise"], *([x["v_extra_noise"]] if "v_extra_noise" in x else [])], 1
    )
    first = Latents(video, x["a_noise"] if "a_noise" in x else None)
    if "sde_noise" not in x:
        return first, None
    return first, Latents(*(
        np.stack([*x["sde_noise"][i::2], np.zeros_like(x["sde_noise"][i])]) for i in range(2)
    ))  # fmt: skip


def texts_of(x) -> tuple[dict, dict]:
    """Of the prompt and of no prompt; a stream that is missing has the other's size."""

    def fields(kind):
        video = x.get(f"v_{kind}", x["v_context"])
        audio = x[f"a_{kind}"] if f"a_{kind}" in x else video
        return {"video_text": video, "audio_text": audio, "text_mask": np.ones(video.shape[:2])}

    return fields("context"), fields("negative_context")


def run_loop(case: Case):
    x, args = case.inputs(), case.args
    graphdef, params = direct(case.folder)
    passes, strengths, rescales = passes_of(*settings_of(case))
    bins = bins_of(case)
    audio = x.get("a_noise", np.zeros((1, 1, bins)))
    request = Request(
        (args["frames"], args["height"], args["width"]), audio.shape[1], bins, STRIDES, args["fps"]
    )
    given, noises = given_of(case, x), noises_of(x)
    if case.name.endswith("first_step"):
        return first_step(
            graphdef, params, x, request, passes, strengths, rescales, given, noises[0]
        )
    skip = (args.get("guidance") or {}).get("skip_step", 0)
    clean = make_sampler()(
        params, texts_of(x), np.arange(x["v_noise"].shape[0]), jax.random.key(0),
        x["sigmas"], strengths, rescales if passes else None, given, None, noises,
        graphdef=graphdef, request=request, passes=passes, stepper=stepper_of(case),
        guidance=Guidance(per_sample=False, skip_steps=(skip, skip)),
    )  # fmt: skip
    names = ("v_latent", "a_latent", "keyframes")
    return {n: channels_first(a) for n, a in zip(names, clean, strict=False) if a is not None}


def first_step(graphdef, params, x, request, passes, strengths, rescales, given, noise):
    """The passes one by one, and what the guide makes of them."""
    seen = {}

    @jax.jit
    def run(params, noise):
        model = nnx.merge(graphdef, params)
        rows = jnp.arange(noise.video.shape[0])
        guide = programs._guide(
            model, texts_of(x), rows, strengths, rescales, request, passes,
            Guidance(per_sample=False), given,
        )  # fmt: skip
        row = {"sigma": jnp.asarray(x["sigmas"])[0]}
        estimates = guide.passes(noise, row["sigma"])
        once = dataclasses.replace(guide, passes=lambda *_: estimates)
        return estimates, once.find(noise, row, once.begin(noise))[0].x0

    estimates, combined = run(params, noise)
    for name, found in zip(
        ("cond", "uncond", "perturbed", "isolated", "guided"), (*estimates, combined), strict=True
    ):
        seen |= {f"v_{name}": found.video, f"a_{name}": found.audio}
    return seen


RUNNERS = {
    "step": run_step,
    "guider": run_guider,
    "conditioning": run_conditioning,
    "loop": run_loop,
}
