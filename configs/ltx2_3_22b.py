"""LTX-2.3 22B on a TPU slice: gated attention, text modulated by the noise level.

    python -m ltx2_jax.train --config=configs/ltx2_3_22b.py \\
        --config.data.path=/data/clips --config.workdir=/checkpoints/run

is the launch line, on every host of the slice (`launch/tpu.sh` gives it to all of them);
`--config.init_from=ltx-2.3-22b-dev.safetensors` starts from released weights. Variants, after a
colon, differ in mesh, batch and remat policy alone; each is for one slice, of the accelerator type
that stands in `ltx2_19b.py`. What plan says of them, compiled, not measured,
with `--config.optim.reduce_dtype=bfloat16`:

    (none)   v5p:4x4x4    121 frames of 1280x704    91.6 of 95.7 GiB   5.65 s a step, 62.2% MFU
    :v5p256  v5p:4x4x8    121 frames of 1280x704    88.4 of 95.7 GiB   5.66 s a step, 62.1% MFU
    :v5p512  v5p:4x8x8    121 frames of 1280x704    not compiled; should be as :v5p256
    :v6e256  v6e:16x16    121 frames of 1280x704    16.4 of 31.2 GiB   3.23 s a step, 27.2% MFU
    :v7x128  tpu7x:4x4x4  121 frames of 1280x704    88.0 of 94.8 GiB   2.75 s a step, 50.9% MFU
    :20s     v5p:8x8x8    481 frames of 1280x704    81.8 of 95.7 GiB  10.3 s a step, 59.0% MFU
"""

import dataclasses
from pathlib import Path

from ltx2_jax.config import Config, MeshConfig, TextConfig, load
from ltx2_jax.models.text.connectors import AUDIO_CONNECTOR_2_3, VIDEO_CONNECTOR_2_3
from ltx2_jax.models.transformer.config import LTX2_3_22B


def get_config(arg: str | None = None) -> Config:
    base = load(str(Path(__file__).with_name("ltx2_19b.py")) + (f":{arg}" if arg else ""))
    config = dataclasses.replace(
        base,
        workdir="workdir/ltx2_3_22b",
        model=dataclasses.replace(LTX2_3_22B, remat=base.model.remat),
        text=TextConfig(
            release="2.3",
            video_connector=VIDEO_CONNECTOR_2_3,
            audio_connector=AUDIO_CONNECTOR_2_3,
        ),
        data=dataclasses.replace(base.data, release="2.3"),
        sample=dataclasses.replace(base.sample, steps=30),
    )
    if arg == "v6e256":
        # A clip on every chip, as the 19B trains, is 0.2 GiB too much.
        data = dataclasses.replace(config.data, batch_size=128)
        config = dataclasses.replace(config, data=data, mesh=MeshConfig(sequence=2))
    return config
