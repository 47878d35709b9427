"""Fine-tunes of the quickstart's model on two CPU cores, a few minutes each.

    python -m ltx2_jax.train --config=configs/quickstart_lora.py:v2a

trains adapters of rank 32 beside the weights of `configs/quickstart.py`, written by

    python -m ltx2_jax.convert workdir/quickstart workdir/quickstart/model.safetensors

    variant    learns                             streams
    night      a ball by night                    both, as the quickstart has them
    official   the same                           both, the official recipe: noise levels apart
    shared     the same                           both, the other public recipe: one, uniform
    video      the same                           video alone, without sound
    v2a        sound for a video that is given    video frozen
    extend     how a clip goes on                 both; their first half is given

Half of the examples of the first four are a ball by night, which the quickstart never saw, and half
are the quickstart's own clips, so that those are not forgotten: with the new ones alone every ball
bounces in the dark. The last two learn from the quickstart's clips.
docs/finetuning.md says how the clips of a ball by night are made, and what came of each.
"""

import dataclasses
from pathlib import Path

from ltx2_jax.config import (
    CheckpointConfig,
    Condition,
    Config,
    DataConfig,
    LoraConfig,
    StreamConfig,
    TuneConfig,
    load,
)
from ltx2_jax.errors import UserError
from ltx2_jax.weights.lora_targets import TARGETS

BASE = Path("workdir/quickstart")
OWN, NIGHT = str(BASE / "data/records"), "workdir/night/records"
BOTH = DataConfig(mixture=((NIGHT, 0.5), (OWN, 0.5)))
GIVEN = {  # 13 of 25 frames, and the sound of the same time
    "video": StreamConfig(conditions=(Condition("prefix", 0.8, length=13),)),
    "audio": StreamConfig(conditions=(Condition("prefix", 0.8, length=27),)),
}
RELEASED = {
    "video": StreamConfig(),
    "audio": StreamConfig(),
    "sigma_tokens": None,
    "sigma_uniform_prob": 0.1,
}
UNIFORM = {"shared_sigma_prob": 1.0, "sigma": "uniform", "sigma_min": 1e-3, "sigma_max": 0.999}

# Data, changes to `flow`, targets of the adapters, steps.
VARIANTS = {
    "night": (BOTH, {}, "short", 1500),
    "official": (BOTH, {"shared_sigma_prob": 0.0}, "short", 1500),
    "shared": (BOTH, UNIFORM, "short", 1500),
    "video": (BOTH, {"audio": StreamConfig("absent")}, "attn1_attn2", 600),
    "v2a": (
        DataConfig(path=OWN),
        {"video": StreamConfig("frozen")},
        "audio_and_video_to_audio",
        600,
    ),
    "extend": (DataConfig(path=OWN), GIVEN, "short", 600),
}


def get_config(arg: str | None = None) -> Config:
    if arg not in VARIANTS:
        raise UserError(f"variants are {', '.join(f':{x}' for x in VARIANTS)}")
    data, flow, targets, steps = VARIANTS[arg]
    base = load(str(Path(__file__).with_name("quickstart.py")))
    clip_norm = 10.0 if arg == "shared" else 1.0
    return dataclasses.replace(
        base,
        workdir=f"workdir/quickstart-{arg}",
        data=dataclasses.replace(data, batch_size=16),
        flow=dataclasses.replace(base.flow, **RELEASED | flow),
        # Muon is for matrices of many directions; adapters have few.
        optim=dataclasses.replace(
            base.optim,
            optimizer="adamw",
            learning_rate=3e-3,
            ema_decay=0.995,
            clip_norm=clip_norm,
        ),
        checkpoint=CheckpointConfig(every_steps=300),
        sample=dataclasses.replace(base.sample, num_clips=8, preview_step=None),
        init_from=str(BASE / "model.safetensors"),
        tune=TuneConfig(lora=LoraConfig(TARGETS[targets], rank=32)),
        num_steps=steps,
    )
