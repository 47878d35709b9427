"""LoRA fine-tunes of a release, in every mode of the official trainer.

    python -m ltx2_jax.train --config=configs/lora.py:i2v \\
        --config.init_from=ltx-2.3-22b-dev.safetensors \\
        --config.data.path=data/clips --config.workdir=workdir/i2v

    mode              video      audio      given, and how often
    t2v               generated  generated
    t2v_low_vram      generated  generated  (rank 16, the first moments in bfloat16)
    i2v               generated  generated  first frame, half of the clips
    a2v               generated  frozen     the sound
    v2a               frozen     generated  the video
    video_extend      generated  generated  the first 8 latent frames
    video_suffix      generated  generated  the last 8 latent frames
    video_inpainting  generated             where the sample's mask says
    video_outpainting generated             288 x 576 pixels from the corner at the top left
    v2v_ic            generated             a reference; the first frame of a fifth of the clips
    av2av_ic          generated  generated  a reference for each
    t2a                          generated
    audio_extend                 generated  the first 8 latents, a third of a second
    audio_suffix                 generated  the last 8
    audio_inpainting             generated  where the sample's mask says
    a2a_ic                       generated  a reference
    t2v_shared_sigma  generated  generated  (see below)

`:i2v-2.0` and `:i2v-2.5` tune the other releases. Rank, targets, rate and length are those of the
official file of the same name: rank 32, a rate of 1e-4 over 2,000 steps, and 2e-4 over 3,000 where
there is a reference or sound alone. Noise levels are drawn for each stream by itself, shifted by
its length. `:t2v_shared_sigma` is what another public trainer calls the reference recipe: one noise
level for both streams, uniform, a constant rate of 2e-5, gradients clipped at 10.

A batch is one clip. More chips want more clips (`--config.data.batch_size=4`), or share the tokens
of one (`--config.mesh.sequence=4 --config.mesh.data=1`). Masks and references are fields of the
dataset: docs/finetuning.md.
"""

import dataclasses
from pathlib import Path

from ltx2_jax.config import (
    CheckpointConfig,
    Condition,
    Config,
    FlowConfig,
    LoraConfig,
    OptimConfig,
    StreamConfig,
    TuneConfig,
    load,
)
from ltx2_jax.errors import UserError
from ltx2_jax.weights.lora_targets import TARGETS

RELEASES = {  # the config of its networks, and a file of its weights
    "2.3": ("ltx2_3_22b.py", "ltx-2.3-22b-dev.safetensors"),
    "2.0": ("ltx2_19b.py", "ltx-2-19b-dev.safetensors"),
    "2.5": ("ltx2_5_22b.py", "ltx-2.5-22b-dev.safetensors"),
}
GENERATED, FROZEN, ABSENT = (StreamConfig(role) for role in ("generated", "frozen", "absent"))
HALF_FIRST, FIFTH_FIRST = (Condition("first_frame", p) for p in (0.5, 0.2))
PREFIX, SUFFIX = Condition("prefix", length=8), Condition("suffix", length=8)
MASK, REFERENCE = Condition("mask"), Condition("reference")
CORNER = Condition("spatial_crop", region=(0, 0, 288, 576))


def given(*conditions: Condition) -> StreamConfig:
    return StreamConfig(conditions=conditions)


# Video, audio, targets, rate, steps.
MODES = {
    "t2v": (GENERATED, GENERATED, "short", 1e-4, 2000),
    "t2v_low_vram": (GENERATED, GENERATED, "short", 1e-4, 2000),
    "i2v": (given(HALF_FIRST), GENERATED, "short", 1e-4, 2000),
    "a2v": (GENERATED, FROZEN, "short", 1e-4, 2000),
    "v2a": (FROZEN, GENERATED, "audio_and_video_to_audio", 1e-4, 2000),
    "video_extend": (given(PREFIX), GENERATED, "short", 1e-4, 2000),
    "video_suffix": (given(SUFFIX), GENERATED, "short", 1e-4, 2000),
    "video_inpainting": (given(MASK), ABSENT, "attn1_attn2", 1e-4, 2000),
    "video_outpainting": (given(CORNER), ABSENT, "attn1_attn2", 1e-4, 2000),
    "v2v_ic": (given(REFERENCE, FIFTH_FIRST), ABSENT, "attn1_attn2_ff", 2e-4, 3000),
    "av2av_ic": (given(REFERENCE), given(REFERENCE), "short", 2e-4, 3000),
    "t2a": (ABSENT, GENERATED, "audio", 2e-4, 3000),
    "audio_extend": (ABSENT, given(PREFIX), "audio", 2e-4, 3000),
    "audio_suffix": (ABSENT, given(SUFFIX), "audio", 2e-4, 3000),
    "audio_inpainting": (ABSENT, given(MASK), "audio", 2e-4, 3000),
    "a2a_ic": (ABSENT, given(REFERENCE), "audio", 2e-4, 3000),
    "t2v_shared_sigma": (GENERATED, GENERATED, "short", 2e-5, 2000),
}


def get_config(arg: str | None = None) -> Config:
    mode, _, release = (arg or "t2v").partition("-")
    release = release or "2.3"
    if mode not in MODES or release not in RELEASES:
        modes, releases = (", ".join(f":{x}" for x in MODES), ", ".join(RELEASES))
        raise UserError(f"modes are {modes}; after one, -RELEASE of {releases}")
    video, audio, targets, rate, steps = MODES[mode]
    networks, weights = RELEASES[release]
    base = load(str(Path(__file__).with_name(networks)))
    flow = FlowConfig(video, audio)
    optim = OptimConfig(learning_rate=rate, schedule="linear", decays="all")
    rank, form = 32, None
    if mode == "t2v_low_vram":
        rank, optim = 16, dataclasses.replace(optim, first_moment_dtype="bfloat16")
        form = "int8"
    if mode == "t2v_shared_sigma":
        flow = dataclasses.replace(
            flow, shared_sigma_prob=1.0, sigma="uniform", sigma_min=1e-3, sigma_max=0.999
        )
        optim = dataclasses.replace(optim, schedule="constant", clip_norm=10.0)
    return dataclasses.replace(
        base,
        workdir=f"workdir/{arg or mode}",
        model=dataclasses.replace(base.model, remat="attention"),
        data=dataclasses.replace(base.data, batch_size=1),
        flow=flow,
        optim=optim,
        checkpoint=CheckpointConfig(every_steps=250, keep=2),
        init_from=weights,
        tune=TuneConfig(lora=LoraConfig(TARGETS[targets], rank, float(rank)), quantize=form),
        num_steps=steps,
    )
