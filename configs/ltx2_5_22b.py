"""LTX-2.5 22B on a TPU slice: the 2.3 model without feed-forward bias in the video stream.

    python -m ltx2_jax.train --config=configs/ltx2_5_22b.py \\
        --config.data.path=/data/clips --config.workdir=/checkpoints/run

A keyframe embedding marks latent frame 0, in training as in sampling. Variants, meshes and batches
are those of `ltx2_3_22b.py`, and so is the cost, but for the biases; no variant has been compiled.
"""

import dataclasses
from pathlib import Path

from ltx2_jax.config import Config, load
from ltx2_jax.models.transformer.config import LTX2_5_22B


def get_config(arg: str | None = None) -> Config:
    base = load(str(Path(__file__).with_name("ltx2_3_22b.py")) + (f":{arg}" if arg else ""))
    return dataclasses.replace(
        base,
        workdir="workdir/ltx2_5_22b",
        model=dataclasses.replace(LTX2_5_22B, remat=base.model.remat),
        text=dataclasses.replace(base.text, release="2.5"),
        data=dataclasses.replace(base.data, release="2.5"),
    )
