"""Every case of the golden training data, through our public functions.

The data are outputs of the official trainer and its preprocessing scripts:

    pytest tests/test_golden_training.py --golden-training-dir=DIR --golden-dir=DIR

runs any set of the same layout; `--golden-dir` holds the checkpoints that some cases name. A kind
of case that no runner knows fails. A runner takes a `Case` and checks it, or returns the outputs.
"""

import golden_training_data
import golden_training_lora
import golden_training_objective
import jax
import numpy as np
from golden_case import Case

RUNNERS = {
    "objective": golden_training_objective.run_objective,
    "sigma_sampler": golden_training_objective.run_sigma_sampler,
    "lr_schedule": golden_training_objective.run_lr_schedule,
    "lora_targets": golden_training_lora.run_lora_targets,
    "lora_export": golden_training_lora.run_lora_export,
    "train_step": golden_training_lora.run_train_step,
    "precomputed": golden_training_data.run_precomputed,
    "preprocess": golden_training_data.run_preprocess,
}


def test_golden_training_case(golden_training_case: Case):
    case = golden_training_case
    assert case.group in RUNNERS, f"unknown case group {case.group!r}"
    with jax.default_matmul_precision("highest"):
        got = RUNNERS[case.group](case)
    if got is None:  # the runner has compared by itself
        return
    expected = case.expected()
    assert set(got) == set(expected)
    for name, want in expected.items():
        np.testing.assert_allclose(got[name], want, err_msg=name, **case.spec["tolerance"])
