"""Golden cases of token geometry, schedules and the small functions around the network."""

import jax.numpy as jnp
import numpy as np
from golden_case import Case

from ltx2_jax.diffusion import geometry, schedules
from ltx2_jax.models.layers import timestep_embedding
from ltx2_jax.models.rope import apply_rope, frequency_grid, rope_tables


def run_timestep_embedding(case: Case):
    assert case.args["flip_sin_to_cos"]
    assert case.args["downscale_freq_shift"] == 0
    timesteps = jnp.asarray(case.inputs()["timesteps"])
    return {"embedding": timestep_embedding(timesteps, case.args["embedding_dim"])}


def run_shapes(case: Case):
    if case.name == "shapes/latent_from_pixels":
        for row in case.data:
            # The official code cuts off what a latent does not fill; we refuse it.
            height, width = (row[side] // 32 * 32 for side in ("height", "width"))
            frames = geometry.snap_frames(row["frames"])
            video = geometry.video_latent_shape(frames, height, width)
            assert list(video) == row["video_latent"], row
            audio = geometry.audio_latent_length(row["frames"], row["fps"])
            assert audio == row["audio_latent_frames"], row
        return {}
    if case.name == "shapes/frame_helpers":
        for num, frames, positions in case.data["evenly_spaced"]:
            assert list(geometry.evenly_spaced_keyframes(num, frames)) == positions
        for frames, snapped in case.data["snap"]:
            assert geometry.snap_frames(frames) == snapped
        for seconds, fps, low, high, frames in case.data["seconds"]:
            assert geometry.seconds_to_frames(seconds, fps, low, high) == frames
        return {}
    raise KeyError(case.name)


def run_positions(case: Case):
    args = case.args
    if case.name.startswith("positions/audio"):
        positions = geometry.audio_positions(
            args["frames"],
            geometry.AudioClock(
                args.get("sample_rate", 16000),
                args.get("hop_length", 160),
                args.get("downsample", 4),
            ),
            shift=args.get("shift", 0),
            causal=args["is_causal"],
        )
        return {"positions": positions}
    shape, strides = (args["frames"], args["height"], args["width"]), tuple(args["scale"])
    return {
        "grid_bounds": geometry.grid_bounds(shape),
        "pixel_bounds": geometry.pixel_bounds(shape, strides),
        "pixel_bounds_no_causal_fix": geometry.pixel_bounds(shape, strides, causal=False),
        "positions": geometry.video_positions(shape, args["fps"], strides),
    }


def run_patchify(case: Case):
    latent = jnp.asarray(case.inputs()["latent"])
    if case.name == "patchify/audio":
        return {"tokens": geometry.patchify_audio(latent.transpose(0, 2, 3, 1))}
    channels_last = latent.transpose(0, 2, 3, 4, 1)
    tokens = geometry.patchify_video(channels_last, case.args["patch_size"])
    return {"tokens": tokens}


def run_rope(case: Case):
    args, inputs = case.args, {k: jnp.asarray(v) for k, v in case.inputs().items()}
    if case.name.startswith("rope/freq_grid"):
        dims = {name: value.size for name, value in case.expected().items()}
        axes = {"video3": 3, "audio1": 1, "real_size_video3": 3, "real_size_audio1": 1}
        return {
            name: frequency_grid(
                2 * axes[name] * size, axes[name], args["theta"], args["precision"]
            )
            for name, size in dims.items()
        }
    if case.name.startswith("rope/apply"):
        interleaved = args["rope_type"] == "interleaved"
        x = inputs["x"].reshape(*inputs["x"].shape[:2], args["heads"], -1)
        half = [from_official_table(inputs[n], args, args["heads"]) for n in ("cos", "sin")]
        return {"y": apply_rope(x, half, interleaved=interleaved).reshape(inputs["x"].shape)}
    positions = inputs["positions"]
    assert (positions.ndim == 4) == args["use_middle"]
    cos, sin = rope_tables(
        positions,
        heads=args["heads"],
        width=args["dim"],
        max_pos=tuple(args["max_pos"]),
        theta=args["theta"],
        precision=args["frequency_precision"],
    )
    return {"cos": to_official_table(cos, args), "sin": to_official_table(sin, args)}


def to_official_table(table, args):
    """[B, T, N, H/2] -> split: [B, N, T, H/2]; interleaved: every entry twice, [B, T, N * H]."""
    if args["rope_type"] == "split":
        return table.swapaxes(1, 2)
    return jnp.repeat(table.reshape(*table.shape[:2], -1), 2, axis=-1)


def from_official_table(table, args, heads):
    if args["rope_type"] == "split":
        return table.swapaxes(1, 2)
    return table[..., ::2].reshape(*table.shape[:2], heads, -1)


def run_sigmas(case: Case):
    args = case.args
    kind = case.name.split("/")[1]
    if kind.startswith("ltx2"):
        names = {"max_shift", "base_shift", "stretch", "terminal", "tokens"}
        options = {name: value for name, value in args.items() if name in names}
        return {"sigmas": schedules.ltx2_sigmas(args["steps"], **options)}
    if kind.startswith("linear_quadratic"):
        return {
            "sigmas": schedules.linear_quadratic_sigmas(
                args["steps"], args["threshold_noise"], args["linear_steps"]
            )
        }
    if kind.startswith("beta"):
        return {"sigmas": schedules.beta_sigmas(args["steps"], args["alpha"], args["beta"])}
    if kind == "distilled":
        return {
            "stage1": np.asarray(schedules.DISTILLED_SIGMAS, np.float32),
            "stage2": np.asarray(schedules.STAGE_2_SIGMAS, np.float32),
            "stage2_tdp": np.asarray(schedules.STAGE_2_TILED_SIGMAS, np.float32),
        }
    raise KeyError(case.name)


RUNNERS = {
    "timestep_embedding": run_timestep_embedding,
    "shapes": run_shapes,
    "positions": run_positions,
    "patchify": run_patchify,
    "rope": run_rope,
    "sigmas": run_sigmas,
}
