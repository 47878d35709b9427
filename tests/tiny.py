"""A tiny but complete run for tests: the wiring of 2.5, eight heads, eight-way shapes."""

import dataclasses
import warnings
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np

from ltx2_jax.config import Config, DataConfig, FlowConfig, OptimConfig, TextConfig, load
from ltx2_jax.models.text.connectors import ConnectorConfig
from ltx2_jax.models.transformer.config import LTX2_5_22B
from ltx2_jax.sharding import abstract_state, make_mesh
from ltx2_jax.training import initial, loop
from ltx2_jax.training.checkpoint import Checkpoints
from ltx2_jax.training.state import init_state

SMALL = Path(__file__).parent / "resume_config.py"
STRIDES = (4, 8, 8)

MODEL = dataclasses.replace(
    LTX2_5_22B,
    num_layers=2,
    num_heads=8,
    head_dim=4,
    audio_num_heads=8,
    audio_head_dim=2,
    in_channels=8,
    out_channels=8,
    audio_in_channels=16,
    audio_out_channels=16,
    context_dim=32,
    audio_context_dim=16,
    rope_theta=100.0,
    dtype="float32",
)


CONNECTOR = ConnectorConfig(
    num_layers=2, num_heads=8, gated_attention=True, registers=3, dtype="float32"
)
TEXT = TextConfig(
    length=6,
    video_connector=dataclasses.replace(CONNECTOR, head_dim=4),
    audio_connector=dataclasses.replace(CONNECTOR, head_dim=2),
)


def config(**changes) -> Config:
    base = Config(
        workdir="unused",
        model=MODEL,
        text=TEXT,
        data=DataConfig(batch_size=8),
        flow=FlowConfig(shared_sigma_prob=0.5, first_frame_prob=0.5, caption_dropout=0.3),
        optim=OptimConfig(learning_rate=1e-2, ema_decay=0.9),
        num_steps=10,
    )
    return dataclasses.replace(base, **changes)


def batch(size: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Latents of 2 x 2 x 4 = 16 video tokens and 5 audio tokens, with two frame rates."""
    rng = np.random.default_rng(seed)
    return {
        "video": rng.normal(size=(size, 2, 2, 4, 8)).astype(np.float32),
        "audio": rng.normal(size=(size, 5, 1, 16)).astype(np.float32),
        "video_text": rng.normal(size=(size, 6, 32)).astype(np.float32),
        "audio_text": rng.normal(size=(size, 6, 16)).astype(np.float32),
        "text_mask": np.arange(6) >= rng.integers(0, 6, (size, 1)),
        "fps": np.where(np.arange(size) % 2, 24.0, 12.5).astype(np.float32),
    }


def null_text() -> dict[str, np.ndarray]:
    """Text fields of the empty caption: one token."""
    fields = {name: value[0] for name, value in batch(1, seed=9).items() if "text" in name}
    return fields | {"text_mask": np.arange(6) == 5}


@cache
def _homes(config: Config, mesh: jax.sharding.Mesh):
    """Shapes, dtypes and shardings of a train state."""
    create, key = partial(init_state, config=config), jax.eval_shape(jax.random.key, 0)
    return abstract_state(create, key, mesh=mesh)


def params(config: Config, mesh=None):
    """Parameters all of whose entries count: nothing starts at zero. The same on every mesh.

    Drawn by numpy, because compiling the initialisers takes longer than most tests.
    """
    homes = _homes(config, mesh or make_mesh(devices=jax.devices()[:1]))["params"]
    rng = np.random.default_rng(1)

    def value(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(size=leaf.shape, scale=0.2).astype(np.float32)
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(value, homes)


def state(config: Config, mesh=None):
    """The train state of step 0 around `params`, without compiling anything."""
    homes = _homes(config, mesh or make_mesh(devices=jax.devices()[:1]))
    state = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), homes
    )
    for name in {"params", "ema"} & set(homes):
        state[name] = params(config, mesh)
    return state


def workdir(folder):
    """What train leaves of an untrained model in `folder`, with a checkpoint at step 3."""
    given = load(str(SMALL), {"workdir": str(folder)})
    loop.keep_assets(loop.dataset(given), folder / "assets")
    with jax.set_mesh(make_mesh()), Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(3, state(given, make_mesh()), given)
    return folder


def base_file(path, config: Config):
    """Weights to tune, as an official file; its path."""
    with warnings.catch_warnings():  # of a number of registers that official code does not read
        warnings.simplefilter("ignore")
        initial.as_export(config, params(config)).write(path)
    return path
