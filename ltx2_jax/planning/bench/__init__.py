"""What `python -m ltx2_jax.bench` measures: each part has its flags and prints its table."""

from types import ModuleType

from ltx2_jax.planning.bench import codec, data, step, train, weights

BENCHES: dict[str, tuple[ModuleType, str]] = {
    "codec": (codec, "encoding and decoding of a clip"),
    "data": (data, "films to pixels and sound, records to batches"),
    "step": (step, "one denoising step, and the parts of its blocks"),
    "train": (train, "training steps"),
    "weights": (weights, "loading of an official file"),
}
