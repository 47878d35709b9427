"""Fine-tunes of the quickstart's model on two CPU cores, a few minutes each.

    python -m ltx2_jax.train --config=configs/quickstart_lora.py:v2a

trains adapters (rank 16, 600 steps) beside the weights of `configs/quickstart.py`, written by

    python -m ltx2_jax.convert workdir/quickstart workdir/quickstart/model.safetensors

    variant    trained on           streams
    night      a ball by night      both, as the quickstart has them
    official   a ball by night      both, the official recipe: noise levels apart, shifted
    shared     a ball by night      both, the other public recipe: one noise level, uniform
    video      a ball by night      video alone, without sound
    v2a        the quickstart's     sound, for a video that is given
    a2v        the quickstart's     video, for a sound that is given

docs/finetuning.md says how the clips of a ball by night are made, and what came of each.
"""

import dataclasses
from pathlib import Path

from ltx2_jax.config import CheckpointConfig, Config, LoraConfig, StreamConfig, TuneConfig, load
from ltx2_jax.errors import UserError
from ltx2_jax.weights.lora_targets import TARGETS

BASE = Path("workdir/quickstart")
NIGHT = "workdir/night/records"
FROZEN, ABSENT = StreamConfig("frozen"), StreamConfig("absent")
SHARED = {"shared_sigma_prob": 1.0, "sigma": "uniform", "sigma_min": 1e-3, "sigma_max": 0.999}

# Dataset, changes to `flow`, targets of the adapters.
VARIANTS = {
    "night": (NIGHT, {}, "short"),
    "official": (NIGHT, {"shared_sigma_prob": 0.0}, "short"),
    "shared": (NIGHT, SHARED, "short"),
    "video": (NIGHT, {"audio": ABSENT}, "attn1_attn2"),
    "v2a": (str(BASE / "data/records"), {"video": FROZEN}, "audio_and_video_to_audio"),
    "a2v": (str(BASE / "data/records"), {"audio": FROZEN}, "short"),
}


def get_config(arg: str | None = None) -> Config:
    if arg not in VARIANTS:
        raise UserError(f"variants are {', '.join(f':{x}' for x in VARIANTS)}")
    path, flow, targets = VARIANTS[arg]
    base = load(str(Path(__file__).with_name("quickstart.py")))
    clip_norm = 10.0 if arg == "shared" else 1.0
    return dataclasses.replace(
        base,
        workdir=f"workdir/quickstart-{arg}",
        data=dataclasses.replace(base.data, path=path),
        flow=dataclasses.replace(base.flow, **flow),
        optim=dataclasses.replace(base.optim, ema_decay=None, clip_norm=clip_norm),
        checkpoint=CheckpointConfig(every_steps=300),
        sample=dataclasses.replace(base.sample, num_clips=8, preview_step=None),
        init_from=str(BASE / "model.safetensors"),
        tune=TuneConfig(lora=LoraConfig(TARGETS[targets], rank=16)),
        num_steps=600,
    )
