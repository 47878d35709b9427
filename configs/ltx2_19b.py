"""LTX-2 19B (2.0) on a TPU slice: video 14B, audio 5B, trained together.

    python -m ltx2_jax.train --config=configs/ltx2_19b.py \\
        --config.data.path=/data/clips --config.workdir=/checkpoints/run

is the launch line, on every host of the slice (`launch/tpu.sh` gives it to all of them);
`--config.init_from=ltx-2-19b-dev.safetensors` starts from released weights. Variants, after a
colon, differ in mesh, batch and remat policy alone. Each is for one slice, as clouds sell it (the
number in a name counts TensorCores, of which a chip of v5p and v7x has two):

    accelerator type    v5p-128   v5p-256   v5p-512   v5p-1024   v6e-256   tpu7x-128
    slice, in chips     4x4x4     4x4x8     4x8x8     8x8x8      16x16     4x4x4
    variant             (none)    :v5p256   :v5p512   :20s       :v6e256   :v7x128

On several such slices, batch_size grows with them: `--config.data.batch_size=128` on two v5p-128.
`python -m ltx2_jax.plan` with `--hosts` says which rows every host reads. What plan says of the
variants, compiled, not measured, with `--config.optim.reduce_dtype=bfloat16` (:v5p512 with float32,
the default, which gave the same for the second row, and 29.5 GiB, 5.24 s and 33.5% for :v6e256 at
1280x704):

    (none)   v5p:4x4x4    121 frames of 768x512     43.7 of 95.7 GiB   2.26 s a step, 57.6% MFU
    (none)   v5p:4x4x4    121 frames of 1280x704    90.3 of 95.7 GiB   5.54 s a step, 63.3% MFU
    :v5p256  v5p:4x4x8    121 frames of 1280x704    87.0 of 95.7 GiB   5.55 s a step, 63.3% MFU
    :v5p512  v5p:4x8x8    121 frames of 1280x704    85.4 of 95.7 GiB   5.56 s a step, 63.1% MFU
    :v6e256  v6e:16x16    121 frames of 768x512     13.3 of 31.2 GiB   2.06 s a step, 31.5% MFU
    :v6e256  v6e:16x16    121 frames of 1280x704    29.3 of 31.2 GiB   5.17 s a step, 33.9% MFU
    :v7x128  tpu7x:4x4x4  121 frames of 768x512     40.4 of 94.8 GiB   1.05 s a step, 49.3% MFU
    :v7x128  tpu7x:4x4x4  121 frames of 1280x704    86.7 of 94.8 GiB   2.64 s a step, 52.8% MFU
    :20s     v5p:8x8x8    481 frames of 1280x704    81.7 of 95.7 GiB  10.17 s a step, 59.8% MFU
"""

import dataclasses

from ltx2_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    FlowConfig,
    MeshConfig,
    OptimConfig,
    SampleConfig,
    TextConfig,
)
from ltx2_jax.errors import UserError
from ltx2_jax.models.text.connectors import CONNECTOR_2_0
from ltx2_jax.models.transformer.config import LTX2_19B

# Batch, mesh, remat policy.
VARIANTS = {
    None: (64, MeshConfig(), "projections"),
    "v5p256": (128, MeshConfig(), "projections"),
    "v5p512": (256, MeshConfig(), "projections"),
    "v6e256": (256, MeshConfig(), "attention"),
    "v7x128": (128, MeshConfig(), "projections"),
    "20s": (128, MeshConfig(sequence=4), "projections"),
}


def get_config(arg: str | None = None) -> Config:
    if arg not in VARIANTS:
        raise UserError("variants are " + ", ".join(f":{name}" for name in VARIANTS if name))
    batch, mesh, remat = VARIANTS[arg]
    return Config(
        workdir="workdir/ltx2_19b",
        model=dataclasses.replace(LTX2_19B, remat=remat),
        text=TextConfig(
            release="2.0", video_connector=CONNECTOR_2_0, audio_connector=CONNECTOR_2_0
        ),
        data=DataConfig(path="data/clips", release="2.0", batch_size=batch, read_threads=16),
        mesh=mesh,
        flow=FlowConfig(first_frame_prob=0.1, caption_dropout=0.1),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=1000),
        checkpoint=CheckpointConfig(every_steps=1000, keep=3),
        sample=SampleConfig(num_clips=8, batch_size=8, steps=40),
        num_steps=100_000,
    )
