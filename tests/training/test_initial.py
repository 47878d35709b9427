"""Training that starts from weights in a file: the right ones, on any mesh, or a plain refusal."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import resume_config
import tiny

from ltx2_jax.errors import UserError
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import initial, loop
from ltx2_jax.training.checkpoint import Checkpoints
from ltx2_jax.training.runs import weights_of_run

GOLDEN = Path(__file__).parents[1] / "golden"
RUN = tiny.config()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights of RUN as an official file."""
    path = tmp_path_factory.mktemp("initial") / "run.safetensors"
    with pytest.warns(UserWarning, match="3 registers"):
        initial.as_export(RUN, tiny.params(RUN)).write(path)
    return path


def changed(config, **fields):
    return dataclasses.replace(config, **fields)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (8, 1, 1)])
def test_weights_are_loaded_onto_the_shards_that_training_wants(file, sizes):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    config = changed(RUN, init_from=str(file))
    initial.check(config)
    got, want = initial.load(config, mesh), tiny.params(RUN, mesh)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(a, b)


def test_training_starts_from_them(tmp_path, monkeypatch):
    """Seen behind a step that changes nothing, in what is saved."""
    config = resume_config.get_config()
    config = changed(
        config,
        num_steps=1,
        workdir=str(tmp_path / "run"),
        init_from=str(tmp_path / "weights.safetensors"),
    )
    before = tiny.params(config)
    with pytest.warns(UserWarning, match="8 registers"):
        initial.as_export(config, before).write(tmp_path / "weights.safetensors")
    metrics = {"loss": np.float32(1), "grad_norm": np.float32(1)}

    def step(state, batch, null_text):
        return state | {"step": state["step"] + 1}, metrics

    one = make_mesh(devices=jax.devices()[:1])  # where less is to be compiled
    monkeypatch.setattr(loop, "make_mesh", lambda *_, **__: one)
    monkeypatch.setattr(loop, "make_train_step", lambda *_: step)
    loop.train(config, make_clips=lambda *_: None)
    _, after, reached = weights_of_run(config.workdir, one)
    assert reached == 1
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), after, before)
    # A run that has begun goes on from its own checkpoint.
    with Checkpoints(config.workdir) as checkpoints:
        assert checkpoints.config(1).init_from == config.init_from


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"num_layers": 3}}, r"is another network \(model.num_layers: 2 -> 3\)"),
        (
            {
                "text": {
                    "video_connector": dataclasses.replace(RUN.text.video_connector, head_dim=2)
                }
            },
            "text.video_connector.head_dim: 4 -> 2",
        ),
        ({"text": {"release": "2.3"}}, "features of 'random', but text.release='2.3'"),
        ({"data": {"release": "2.3"}}, "latents of 'linear', but data.release='2.3'"),
    ],
)
def test_weights_of_another_network_are_refused(file, change, message):
    fields = {name: changed(getattr(RUN, name), **inner) for name, inner in change.items()}
    with pytest.raises(UserError, match=message):
        initial.check(changed(RUN, init_from=str(file), **fields))


def test_a_file_says_whose_text_and_latents_it_reads_and_one_of_before_only_whose_text(tmp_path):
    text = changed(RUN.text, release="2.3")
    with pytest.warns(UserWarning, match="3 registers"):
        export = initial.as_export(changed(RUN, text=text), tiny.params(RUN))
    before = {name: x for name, x in export.metadata.items() if name != "latents_release"}
    changed(export, metadata=before).write(tmp_path / "before.safetensors")
    said = {"text_release": "2.3", "latents_release": "linear"}
    assert {name: export.metadata[name] for name in said} == said
    initial.check(changed(RUN, text=text, init_from=str(tmp_path / "before.safetensors")))


def test_released_weights_want_released_text_features():
    path = GOLDEN / "v2.3" / "checkpoint.safetensors"
    with pytest.raises(UserError, match="is another network"):
        initial.check(changed(RUN, init_from=str(path)))


def test_what_does_not_compute_anything_else_may_differ(file):
    model = changed(RUN.model, dtype="bfloat16", remat="block")
    initial.check(changed(RUN, init_from=str(file), model=model))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"nowhere\.safetensors: no such file"):
        initial.check(changed(RUN, init_from="nowhere.safetensors"))
