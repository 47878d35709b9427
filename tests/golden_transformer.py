"""Golden cases of the dual-stream transformer."""

import json
import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_case import Case, file_of, load

from ltx2_jax.diffusion import flow
from ltx2_jax.models.transformer.streams import Keep, Modality
from ltx2_jax.models.transformer.transformer import LTX2Transformer


@cache
def load_transformer(folder: Path) -> LTX2Transformer:
    """The transformer of a golden folder, in the single-file or in the split layout."""
    return load(file_of(folder, "transformer"), "transformer", dtype="float32")


def modality(inputs: dict[str, np.ndarray], stream: str, **changes) -> Modality:
    """Inputs named `v_...` or `a_...` -> Modality; timesteps may end with an axis of size 1."""
    x = {name[2:]: v for name, v in inputs.items() if name[:2] == f"{stream}_"}
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
            fields["context_mask"] = inputs[shared]
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
    masks = {name: np.ones((batch, layers), np.float32) for name in PERTURBATIONS.values()}
    for kind, blocks in perturbations:
        if blocks is not None:  # a rule for released models may name blocks that a small one lacks
            blocks = [block for block in blocks if block < layers]
        masks[PERTURBATIONS[kind]][samples, slice(None) if blocks is None else blocks] = 0
    return Keep(**masks)


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
    inputs = case.inputs()
    attention = block(model, case.args["block"]).video_self
    rope = tuple(inputs[name].swapaxes(1, 2) for name in ("cos", "sin"))

    @nnx.jit
    def run(attention, hidden):
        return {
            "out": attention(hidden, rope=rope),
            "out_perturbed": attention(hidden, rope=rope, keep=jnp.zeros(hidden.shape[0])),
        }

    return run(attention, inputs["hidden"])


@partial(jax.jit, static_argnames="graphdef")
def embed(graphdef, params, video, audio):
    return nnx.merge(graphdef, params).embed(video, audio)


@partial(jax.jit, static_argnames="graphdef")
def run_block(graphdef, params, i, *given):
    """Block `i` of the stacked ones: one program for all."""
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[i], params))(*given, Keep())


def run_prepared(model, video, audio):
    v, a, video_cond, audio_cond = embed(*nnx.split(model), video, audio)
    outputs = {}
    for prefix, x, cond in (("v", v, video_cond), ("a", a, audio_cond)):
        outputs |= {
            f"{prefix}_x": x,
            f"{prefix}_context": cond.prepared.context,
            f"{prefix}_timesteps": cond.modulation,
            f"{prefix}_embedded_timestep": cond.embedded_timestep,
            f"{prefix}_cross_scale_shift_timestep": cond.cross_modulation,
            f"{prefix}_cross_gate_timestep": cond.cross_gate,
            f"{prefix}_prompt_timestep": cond.prompt_modulation,
        }
    # The reference flattens modulation rows: [B, T, R, D] -> [B, T, R * D].
    outputs = {k: x for k, x in outputs.items() if x is not None}
    outputs = jax.tree.map(np.asarray, outputs)
    return {k: x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x for k, x in outputs.items()}


def run_blocks(model, video, audio):
    v, a, *conds = embed(*nnx.split(model), video, audio)
    outputs, blocks = {}, nnx.split(model.blocks)
    for i in range(model.cfg.num_layers):
        v, a = run_block(*blocks, i, v, a, *conds)
        outputs |= {f"v_block{i}": v, f"a_block{i}": a}
    return outputs


RUNNERS = {"transformer": run_transformer}
