"""Golden cases of the text encoder's language model."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from golden_case import Case, load

from ltx2_jax.models.text.gemma import Gemma


@cache
def load_gemma_of(folder: Path) -> Gemma:
    """The language model of a golden folder in float32; the packed file's where it has one."""
    packed = folder / "split" / "text_encoder.safetensors"
    return load(packed if packed.exists() else folder / "gemma", "gemma", dtype="float32")


def run_text_lm(case: Case):
    kind = case.name.split("/")[1]
    if kind != "gemma_hidden_states":
        raise KeyError(f"unknown text case {kind!r}")
    model, inputs = load_gemma_of(case.folder), case.inputs()
    tokens, mask = inputs["input_ids"].astype(np.int32), inputs["attention_mask"]
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda p: nnx.merge(graphdef, p).hidden_states(tokens, mask))
    # Padding sees nothing: its rows mean nothing, here or there.
    valid = mask.astype(bool)[None, :, :, None]
    expected = case.expected()["hidden_states"]
    return {"hidden_states": np.where(valid, run(params), expected)}


RUNNERS = {"text": run_text_lm}
