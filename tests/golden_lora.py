"""Golden cases of LoRA files fused into the transformer."""

import warnings
from functools import partial

import jax
from flax import nnx
from golden_case import Case, file_of, release_of
from golden_transformer import forward, streams

from ltx2_jax.weights import mapping
from ltx2_jax.weights.lora import fuse, read_lora
from ltx2_jax.weights.names import transformer

# Into float32 weights, or into the weights as stored: matrices in bfloat16.
KINDS = {"fused_float32": "float32", "fused_bfloat16_official": None}


def run_lora(case: Case) -> dict[str, jax.Array]:
    kind = case.name.partition("/")[2]
    assert kind in KINDS, f"unknown LoRA case {kind!r}"
    release = release_of(file_of(case.folder, "transformer"))
    cfg, params = release.load("transformer", dtype="float32", param_dtype=KINDS[kind])
    with warnings.catch_warnings():  # that tensors for the text side are left out, as officially
        warnings.simplefilter("ignore")
        lora = read_lora(case.folder / case.args["file"])
    params, _ = fuse(params, [(lora, case.args["strength"])], cfg)
    model = mapping.build(partial(transformer.create, cfg), params)
    v, a = forward(*nnx.split(model), *streams(case.inputs()), None)
    # The first weight that such files adapt.
    example = params["blocks"]["video_self"]["to_q"]["weight"][0]
    return {"v_velocity": v, "a_velocity": a, "fused_example": example}


RUNNERS = {"lora": run_lora}
