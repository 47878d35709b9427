"""Every case of the golden data, through our public functions.

The data are outputs of the official PyTorch code with random weights, float32 on CPU:

    pytest tests/test_golden.py --golden-dir=DIR

runs any set of the same layout, whatever its sizes. A case kind that no runner below knows fails.
"""

import json
import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from ltx2_jax.diffusion import flow, geometry, schedules
from ltx2_jax.models.layers import timestep_embedding
from ltx2_jax.models.rope import apply_rope, frequency_grid, rope_tables
from ltx2_jax.models.transformer import Keep, LTX2Transformer, Modality
from ltx2_jax.weights.transformer import PREFIX, from_official, transformer_config

# Groups of parts that are not built yet. Their cases are reported as skipped, under this reason.
NOT_YET_BUILT = {
    "text": "text encoder and connectors",
    "vae": "video VAE",
    "vae_timestep": "video VAE",
    "audio": "audio VAE and vocoder",
    "upsampler": "latent upsamplers",
    "duration_head": "duration head",
    "video_vae_diffusion": "diffusion video decoder",
    "lora": "LoRA files",
    "step": "sampling pipelines",
    "guider": "sampling pipelines",
    "conditioning": "sampling pipelines",
    "loop": "sampling pipelines",
    "pipeline": "sampling pipelines",
}


@dataclass(frozen=True)
class Case:
    folder: Path
    spec: dict

    @property
    def name(self) -> str:
        return self.spec["name"]

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    @property
    def args(self) -> dict:
        return self.spec.get("args", {})

    @property
    def data(self):
        return self.spec["data"]

    def inputs(self) -> dict[str, np.ndarray]:
        return {name: self._fetch(key) for name, key in self.spec["inputs"].items()}

    def expected(self) -> dict[str, np.ndarray]:
        return {name: self._fetch(key) for name, key in self.spec["outputs"].items()}

    def _fetch(self, key):
        io = read_tensors(self.folder / "io.safetensors")
        return [io[k] for k in key] if isinstance(key, list) else io[key]


def load_cases(golden_dir: Path) -> list[Case]:
    files = sorted(golden_dir.glob("*/cases.json"))
    if not files:
        raise pytest.UsageError(f"--golden-dir={golden_dir}: no */cases.json there")
    return [
        Case(file.parent, spec) for file in files for spec in json.loads(file.read_text())["cases"]
    ]


@cache
def read_tensors(path: Path) -> dict[str, np.ndarray]:
    return load_file(path)


@cache
def load_transformer(folder: Path) -> LTX2Transformer:
    """The transformer of a golden folder, in the single-file or in the split layout."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        path = folder / "split" / "transformer.safetensors"
    with safe_open(path, framework="numpy") as file:
        config = json.loads(file.metadata()["config"])["transformer"]
    cfg = transformer_config(config, dtype="float32")
    tensors = {k: v for k, v in read_tensors(path).items() if k.startswith(PREFIX)}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), from_official(tensors, cfg))
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: build(cfg))), params)


def build(cfg) -> LTX2Transformer:
    return LTX2Transformer(cfg, rngs=nnx.Rngs(0))


def modality(inputs: dict[str, np.ndarray], stream: str, **changes) -> Modality:
    """Inputs named `v_...` or `a_...` -> Modality; timesteps may end with an axis of size 1."""
    x = {name[2:]: jnp.asarray(v) for name, v in inputs.items() if name[:2] == f"{stream}_"}
    timesteps = x["timesteps"]
    fields = {
        "latent": x["latent"],
        "sigma": x["sigma"],
        "timesteps": timesteps[..., 0] if timesteps.ndim == 3 else timesteps,
        "positions": x["positions"],
        "context": x["context"],
        "attention_mask": x.get("attention_mask"),
        "keyframes_mask": x["keyframes_mask"][..., 0] if "keyframes_mask" in x else None,
    }
    for shared in ("context_mask", "context_bias"):
        if shared in inputs:
            fields["context_mask"] = jnp.asarray(inputs[shared])
    return Modality(**(fields | changes))


def streams(inputs: dict[str, np.ndarray]) -> tuple[Modality | None, Modality | None]:
    video = modality(inputs, "v") if "v_latent" in inputs else None
    audio = modality(inputs, "a") if "a_latent" in inputs else None
    return video, audio


PERTURBATIONS = {
    "SKIP_VIDEO_SELF_ATTN": "video_self",
    "SKIP_AUDIO_SELF_ATTN": "audio_self",
    "SKIP_A2V_CROSS_ATTN": "audio_to_video",
    "SKIP_V2A_CROSS_ATTN": "video_to_audio",
}


def keep_masks(case: Case, layers: int, batch: int) -> Keep | None:
    samples = slice(None)
    perturbations = case.args.get("perturbations")
    if "perturbations_per_sample" in case.args:
        start, _, others = case.args["perturbations_per_sample"].partition("others ")
        found = re.findall(r"(SKIP_\w+) at (\[[\d, ]*\])", others)
        assert start == "sample 0 none; ", "a per-sample perturbation this test does not know"
        assert len(found) == others.count("SKIP_")
        perturbations = [[kind, json.loads(blocks)] for kind, blocks in found]
        samples = slice(1, None)
    if not perturbations:
        return None
    # All four masks, also those of ones, so that one compiled program serves every case.
    masks = {name: np.ones((layers, batch), np.float32) for name in PERTURBATIONS.values()}
    for kind, blocks in perturbations:
        masks[PERTURBATIONS[kind]][slice(None) if blocks is None else blocks, samples] = 0
    return Keep(**{name: jnp.asarray(mask) for name, mask in masks.items()})


# --------------------------------------------------------------------------- one runner per group


def run_timestep_embedding(case: Case):
    assert case.args["flip_sin_to_cos"]
    assert case.args["downscale_freq_shift"] == 0
    timesteps = jnp.asarray(case.inputs()["timesteps"])
    return {"embedding": timestep_embedding(timesteps, case.args["embedding_dim"])}


def run_shapes(case: Case):
    if case.name == "shapes/latent_from_pixels":
        for row in case.data:
            video = geometry.video_latent_shape(row["frames"], row["height"], row["width"])
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
            shift=args.get("shift", 0),
            sample_rate=args.get("sample_rate", 16000),
            hop=args.get("hop_length", 160),
            downsample=args.get("downsample", 4),
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


@partial(jax.jit, static_argnames="graphdef")
def forward(graphdef, params, video, audio, keep):
    return nnx.merge(graphdef, params)(video, audio, keep)


def run_transformer(case: Case):
    model, inputs = load_transformer(case.folder), case.inputs()
    kind = case.name.split("/")[1]
    if kind == "attention_self":
        return run_attention(model, case)
    video, audio = streams(inputs)
    if kind.startswith("prepared_"):
        return run_prepared(model, video, audio)
    if kind.startswith("block_outputs_"):
        return run_blocks(model, video, audio)
    if kind == "video_disabled":
        video = modality(inputs, "v", enabled=False)
    if kind == "audio_disabled":
        audio = modality(inputs, "a", enabled=False)
    known = ("av_", "pert_", "video_", "audio_", "x0", "keyframes_mask")
    assert kind.startswith(known), f"unknown transformer case {kind!r}"
    batch = (video or audio).latent.shape[0]
    v, a = forward(*nnx.split(model), video, audio, keep_masks(case, model.cfg.num_layers, batch))
    if kind == "x0":
        return {
            "v_denoised": flow.to_x0(video.latent, v, video.timesteps),
            "a_denoised": flow.to_x0(audio.latent, a, audio.timesteps),
        }
    return {k: x for k, x in (("v_velocity", v), ("a_velocity", a)) if x is not None}


def block(model: LTX2Transformer, i: int):
    graphdef, state = nnx.split(model.blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[i], state))


def run_attention(model, case: Case):
    inputs = {k: jnp.asarray(v) for k, v in case.inputs().items()}
    attention = block(model, case.args["block"]).video_self
    rope = tuple(inputs[name].swapaxes(1, 2) for name in ("cos", "sin"))
    hidden = inputs["hidden"]
    return {
        "out": attention(hidden, rope=rope),
        "out_perturbed": attention(hidden, rope=rope, keep=jnp.zeros(hidden.shape[0])),
    }


def run_prepared(model, video, audio):
    v, a, video_in, audio_in = model.prepare(video, audio)
    outputs = {}
    for prefix, x, stream in (("v", v, video_in), ("a", a, audio_in)):
        outputs |= {
            f"{prefix}_x": x,
            f"{prefix}_context": stream.context,
            f"{prefix}_timesteps": stream.modulation,
            f"{prefix}_embedded_timestep": stream.embedded_timestep,
            f"{prefix}_cross_scale_shift_timestep": stream.cross_modulation,
            f"{prefix}_cross_gate_timestep": stream.cross_gate,
            f"{prefix}_prompt_timestep": stream.prompt_modulation,
        }
    # The reference flattens modulation rows: [B, T, R, D] -> [B, T, R * D].
    outputs = {k: x for k, x in outputs.items() if x is not None}
    return {k: x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x for k, x in outputs.items()}


def run_blocks(model, video, audio):
    v, a, video_in, audio_in = model.prepare(video, audio)
    outputs = {}
    for i in range(model.cfg.num_layers):
        v, a = block(model, i)(v, a, video_in, audio_in, Keep())
        outputs |= {f"v_block{i}": v, f"a_block{i}": a}
    return outputs


RUNNERS = {
    "timestep_embedding": run_timestep_embedding,
    "shapes": run_shapes,
    "positions": run_positions,
    "patchify": run_patchify,
    "rope": run_rope,
    "sigmas": run_sigmas,
    "transformer": run_transformer,
}


def test_golden_case(golden_case: Case):
    if golden_case.group in NOT_YET_BUILT:
        pytest.skip(f"not yet built: {NOT_YET_BUILT[golden_case.group]}")
    assert golden_case.group in RUNNERS, f"unknown case group {golden_case.group!r}"
    with jax.default_matmul_precision("highest"):
        got = RUNNERS[golden_case.group](golden_case)
    expected = golden_case.expected()
    assert set(got) == set(expected)
    tolerance = golden_case.spec["tolerance"]
    for name, want in expected.items():
        have = np.asarray(got[name])
        subsample = golden_case.spec.get("subsample", {}).get(name)
        if subsample:
            have = have[tuple(slice(*s) if s else slice(None) for s in subsample["slices"])]
        have = np.broadcast_to(have, (want.shape[0], *have.shape[1:])) if want.ndim else have
        np.testing.assert_allclose(have, want, err_msg=name, **tolerance)


def test_every_group_is_either_built_or_listed():
    assert not set(RUNNERS) & set(NOT_YET_BUILT)
