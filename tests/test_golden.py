"""Every case of the golden data, through our public functions.

The data are outputs of the official PyTorch code with random weights, float32 on CPU:

    pytest tests/test_golden.py --golden-dir=DIR

runs any set of the same layout, whatever its sizes. A case kind that no runner knows fails.
"""

import golden_audio
import golden_diffusion
import golden_diffusion_decoder
import golden_lora
import golden_sampling
import golden_text_features
import golden_text_lm
import golden_tiling
import golden_transformer
import golden_upsampler
import golden_video_vae
import jax
import numpy as np
import pytest
from golden_case import Case

# Groups of parts that are not built yet. Their cases are reported as skipped, under this reason.
NOT_YET_BUILT = {
    "pipeline": "sampling pipelines",
}

RUNNERS = (
    golden_diffusion.RUNNERS
    | golden_transformer.RUNNERS
    | golden_video_vae.RUNNERS
    | golden_audio.RUNNERS
    | golden_upsampler.RUNNERS
    | golden_diffusion_decoder.RUNNERS
    | golden_lora.RUNNERS
    | golden_sampling.RUNNERS
)


def run_vae(case: Case):
    """Whole clips and tiles: two runners of one group."""
    runner = golden_tiling.run_tiled if "/tiled_" in case.name else golden_video_vae.run_vae
    return runner(case)


def run_text(case: Case):
    """The language model by itself, and what is made of its hidden states."""
    lm = "hidden_states" in case.name
    return (golden_text_lm.run_text_lm if lm else golden_text_features.run_text_features)(case)


RUNNERS |= {"vae": run_vae, "text": run_text}


def test_golden_case(golden_case: Case):
    if golden_case.group in NOT_YET_BUILT:
        pytest.skip(f"not yet built: {NOT_YET_BUILT[golden_case.group]}")
    assert golden_case.group in RUNNERS, f"unknown case group {golden_case.group!r}"
    with jax.default_matmul_precision("highest"):
        got = RUNNERS[golden_case.group](golden_case)
    expected = golden_case.expected()
    assert set(got) == set(expected)
    tolerance = golden_case.spec["tolerance"]
    for name, want in expected.items():
        have = np.asarray(got[name])
        subsample = golden_case.spec.get("subsample", {}).get(name)
        if subsample:
            have = have[tuple(slice(*s) if s else slice(None) for s in subsample["slices"])]
        have = np.broadcast_to(have, (want.shape[0], *have.shape[1:])) if want.ndim else have
        np.testing.assert_allclose(have, want, err_msg=name, **tolerance)


def test_every_group_is_either_built_or_listed():
    assert not set(RUNNERS) & set(NOT_YET_BUILT)
