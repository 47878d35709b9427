"""Fine-tunes of the quickstart's model on two CPU cores, a few minutes each.

    python -m ltx2_jax.train --config=configs/quickstart_lora.py:night

trains adapters of rank 32 beside the weights of `configs/quickstart.py`, written by

    python -m ltx2_jax.convert workdir/quickstart workdir/quickstart/model.safetensors

to make a ball by night, which the quickstart never saw:

    variant    noise levels and streams
    night      most often one level for both streams
    official   the official recipe: levels apart
    shared     the other public recipe: one level, uniform
    video      video alone, without sound

Half of the examples are the quickstart's own clips, so that those are not forgotten: with the new
ones alone every ball bounces in the dark. docs/finetuning.md says how the clips of a ball by night
are made, and what came of each.
"""

import dataclasses
from pathlib import Path

from ltx2_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    FlowConfig,
    LoraConfig,
    StreamConfig,
    TuneConfig,
    load,
)
from ltx2_jax.errors import UserError
from ltx2_jax.weights.lora_targets import TARGETS

BASE = Path("workdir/quickstart")
OWN, NIGHT = str(BASE / "data/records"), "workdir/night/records"

# Changes to `flow`, targets of the adapters, steps.
UNIFORM = {"shared_sigma_prob": 1.0, "sigma": "uniform", "sigma_min": 1e-3, "sigma_max": 0.999}
VARIANTS = {
    "night": ({}, "short", 1500),
    "official": ({"shared_sigma_prob": 0.0}, "short", 1500),
    "shared": (UNIFORM, "short", 1500),
    "video": ({"audio": StreamConfig("absent")}, "attn1_attn2", 600),
}


def get_config(arg: str | None = None) -> Config:
    if arg not in VARIANTS:
        raise UserError(f"variants are {', '.join(f':{x}' for x in VARIANTS)}")
    flow, targets, steps = VARIANTS[arg]
    base = load(str(Path(__file__).with_name("quickstart.py")))
    clip_norm = 10.0 if arg == "shared" else 1.0
    return dataclasses.replace(
        base,
        workdir=f"workdir/quickstart-{arg}",
        data=DataConfig(mixture=((NIGHT, 0.5), (OWN, 0.5)), batch_size=16),
        flow=FlowConfig(**{"shared_sigma_prob": 0.85, "caption_dropout": 0.1} | flow),
        # Not the quickstart's own: what docs/finetuning.md has measured.
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
