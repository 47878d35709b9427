"""The way from prompts to context, and which text encoder belongs to which checkpoint."""

import re
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ltx2_jax import tokenizer
from ltx2_jax.errors import UserError
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.text.connectors import AUDIO_CONNECTOR_2_3, VIDEO_CONNECTOR_2_3, Connectors
from ltx2_jax.models.text.features import FEATURES_2_3, TextFeatures
from ltx2_jax.models.text.gemma import GEMMA_3_12B, Gemma
from ltx2_jax.models.text.model import TextModel
from ltx2_jax.sharding import abstract_mesh, make_mesh
from ltx2_jax.text.encoder import TextEncoder
from ltx2_jax.weights.names.text import check_text_encoder
from ltx2_jax.weights.sources import open_release
from ltx2_jax.weights.tensor_files import read_metadata

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT, GEMMA = GOLDEN / "v2.3" / "checkpoint.safetensors", GOLDEN / "v2.3" / "gemma"
SPLIT = GOLDEN / "v2.5" / "split"
PACKED = SPLIT / "transformer.safetensors", SPLIT / "text_encoder.safetensors"
PROMPTS = ["A quiet fox walks.", "", "  Лиса идёт по мосту <eos> ", "a" * 99, "雨の港"]


@cache
def encoder(**settings):
    return TextEncoder.load(CHECKPOINT, GEMMA, dtype="float32", length=32, **settings)


@cache
def contexts():
    return [np.asarray(x) for x in encoder().encode(PROMPTS)[:2]]


def test_the_two_halves_make_the_whole():
    video, audio, mask = encoder().features(PROMPTS)
    assert (video.shape, audio.shape) == ((5, 32, 40), (5, 32, 16))
    np.testing.assert_array_equal(mask, encoder().tokens(PROMPTS)[1])
    assert mask.sum(1).tolist()[1] == 1  # the empty prompt is a BOS
    got = encoder().connect(video, audio, mask)
    assert got[2] is None
    for have, want in zip(got[:2], contexts(), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5)


def test_many_prompts_run_in_batches_without_seeing_each_other():
    got = encoder(batch_size=2).encode(PROMPTS)
    for have, want in zip(got[:2], contexts(), strict=True):
        assert have.shape == want.shape
        np.testing.assert_allclose(have, want, atol=1e-5)


def test_a_mesh_does_not_change_the_context():
    mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    got = encoder(batch_size=3, mesh=mesh).encode(PROMPTS)
    for have, want in zip(got[:2], contexts(), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-5)


def test_without_registers_the_mask_comes_along():
    bare = encoder(registers=0, last_layer_only=True)
    video, audio, mask = bare.encode(PROMPTS)
    counts = bare.tokens(PROMPTS)[1].sum(1)
    np.testing.assert_array_equal(mask, np.arange(32) < counts[:, None])
    assert not np.asarray(video)[~np.asarray(mask)].any()
    assert not np.asarray(audio)[~np.asarray(mask)].any()
    assert np.abs(np.asarray(video)[1, 0] - contexts()[0][1, 0]).max() > 0.1


def test_a_saved_encoder_says_of_which_states_its_features_are(tmp_path):
    for last, said in ((True, "True"), (False, "False")):
        bare = encoder(registers=0, last_layer_only=True) if last else encoder()
        bare.save(tmp_path / "e.safetensors")
        metadata = read_metadata(tmp_path / "e.safetensors")
        assert (metadata["last_layer_only"], metadata["dtype"], metadata["length"]) == (
            said, "float32", "32"
        )  # fmt: skip


def test_an_encoder_is_on_one_device_and_in_the_dtype_and_form_asked_for():
    wide = encoder()
    usual = TextEncoder.load(CHECKPOINT, GEMMA, connect=False)
    small = TextEncoder.load(CHECKPOINT, GEMMA, connect=False, quantize="int8")
    for one, dtype in ((wide, "float32"), (usual, "bfloat16"), (small, "int8")):
        assert one.mesh.size == 1
        matrices = [x for x in jax.tree.leaves(nnx.state(one.model.gemma.groups)) if x.ndim > 2]
        assert dtype in {str(x.dtype) for x in matrices}
        assert dtype == "int8" or len({x.dtype for x in matrices}) == 1
    assert [one.model.text_features.cfg.dtype for one in (wide, usual)] == ["float32", "bfloat16"]
    connectors = wide.model.connectors
    assert connectors.video.cfg.dtype == connectors.audio.cfg.dtype == "float32"
    assert usual.model.connectors is None


def test_another_tokenizer_may_be_given(tmp_path):
    tokenizer.train(["a fox walks", "a hare runs"], tmp_path / "tokenizer.model", 300)
    given = TextEncoder.load(
        CHECKPOINT, GEMMA, connect=False, length=8, tokenizer=tmp_path / "tokenizer.model"
    )
    want = tokenizer.Tokenizer(tmp_path / "tokenizer.model").encode(["a fox"], 8)[0]
    np.testing.assert_array_equal(given.tokens(["a fox"])[0], want)
    assert (want != tokenizer.Tokenizer(GEMMA).encode(["a fox"], 8)[0]).any()


def test_the_12b_encoder_runs_split_and_never_stacks_its_hidden_states():
    with jax.sharding.use_abstract_mesh(abstract_mesh(8, 4, 1)):
        graphdef, params = nnx.split(nnx.eval_shape(full_size))
        tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
        mask = jax.ShapeDtypeStruct((8, 1024), jnp.bool)

        def trace(run):
            program = jax.make_jaxpr(
                lambda p, *x: run(nnx.merge(graphdef, p), *x), return_shape=True
            )
            return program(params, tokens, mask)

        program, (video, audio, left) = trace(lambda model, *x: model(*x))
        stacked, _ = trace(lambda model, *x: model.gemma.hidden_states(*x))
    assert (video.shape, audio.shape, left) == ((8, 1024, 4096), (8, 1024, 2048), None)
    stack = re.compile(r"\[4[89],8[^\]]*,1024,3840\]")
    assert stack.search(str(stacked))
    assert not stack.search(str(program))


def full_size():
    rngs = Rngs(0)
    connectors = Connectors(VIDEO_CONNECTOR_2_3, AUDIO_CONNECTOR_2_3, rngs=rngs)
    return TextModel(
        Gemma(GEMMA_3_12B, rngs=rngs), TextFeatures(FEATURES_2_3, rngs=rngs), connectors
    )


def test_a_packed_text_encoder_brings_its_tokenizer_and_projections():
    pytest.importorskip("tokenizers")
    loaded = TextEncoder.load(*PACKED, length=32)
    assert loaded.tokenizer.encode(["<bos>a"], 4)[1].sum() == 2
    assert loaded.model.text_features.video.kernel.shape == (5, 32, 32)
    assert loaded.model.gemma.cfg.dtype == "bfloat16"


def test_what_is_no_prompt_is_refused():
    with pytest.raises(UserError, match="no prompts"):
        encoder().encode([])
    with pytest.raises(UserError, match="prompt 1 has a NUL"):
        encoder().encode(["fine", "a\0"])
    with pytest.raises(TypeError, match="not one string"):
        encoder().encode("fox")


# ---- which text encoder --------------------------------------------------------------------------


def test_another_generation_of_text_encoder_is_refused_before_it_is_read(tmp_path):
    other = GOLDEN / "v2.5" / "gemma"
    with pytest.raises(UserError, match=r"gemma: .* needs a Gemma 3 text encoder"):
        TextEncoder.load(CHECKPOINT, other)
    with pytest.raises(UserError, match="gemma_version='gemma4-tiny-a', this one is None"):
        TextEncoder.load(PACKED[0], GEMMA)
    shutil.copytree(GEMMA, tmp_path / "gemma")
    (tmp_path / "gemma" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        TextEncoder.load(CHECKPOINT, tmp_path / "gemma")
    for name in tokenizer.FILES:
        (tmp_path / "gemma" / name).unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        TextEncoder.load(CHECKPOINT, tmp_path / "gemma")


GEMMA_3 = {"model_type": "gemma3"}
GEMMA_4 = {"model_type": "gemma4_unified", "gemma_version": "a"}


@pytest.mark.parametrize(
    ("metadata", "config"),
    [
        ({}, GEMMA_3),
        ({"model_version": "2.3.rc1"}, GEMMA_3),
        ({"model_version": "2.3"}, GEMMA_3 | {"gemma_version": "b"}),
        ({"gemma_source_checkpoint": {"gemma_version": "a"}, "model_version": "2.5"}, GEMMA_4),
        ({"gemma_source_checkpoint": {"gemma_version": "a"}}, GEMMA_4),
    ],
)
def test_text_encoders_that_belong_to_the_checkpoint_are_accepted(metadata, config):
    check_text_encoder(metadata, config, "gemma")


@pytest.mark.parametrize(
    ("metadata", "config", "message"),
    [
        ({"gemma_source_checkpoint": {"gemma_version": "b"}}, GEMMA_4, "='b', this one is 'a'"),
        ({"gemma_source_checkpoint": {"gemma_version": "b"}}, GEMMA_3, "='b', this one is None"),
        ({"model_version": "2.4.0"}, GEMMA_4, "does not say which text encoder it needs"),
        ({"model_version": "2.4-rc2"}, GEMMA_4, "does not say which text encoder it needs"),
        ({"model_version": "2.3.9"}, GEMMA_4, "needs a Gemma 3 .* model_type='gemma4_unified'"),
        ({}, {}, "needs a Gemma 3 .* model_type=None"),
    ],
)
def test_text_encoders_of_another_checkpoint_are_refused(metadata, config, message):
    with pytest.raises(UserError, match=message):
        check_text_encoder(metadata, config, "gemma")


def test_a_pair_that_says_nothing_is_accepted_with_a_warning():
    with pytest.warns(UserWarning, match="make sure that they belong together"):
        check_text_encoder({"model_version": "2.5.1"}, {"model_type": "gemma4_unified"}, "gemma")


def test_parts_that_do_not_fit_each_other_are_refused():
    good = encoder()
    with open_release(GOLDEN / "v2.0" / "checkpoint.safetensors") as release:
        narrow = release.module("text_projection")
    model = TextModel(good.model.gemma, narrow, good.model.connectors)
    with pytest.raises(UserError, match=r"read features of width 40 .* give 32 and 32"):
        TextEncoder(good.tokenizer, model)
    large = tokenizer.Tokenizer(GEMMA)
    large.vocab_size = good.model.gemma.cfg.vocab_size + 1
    with pytest.raises(UserError, match="641 ids, the language model knows 640"):
        TextEncoder(large, good.model)


def test_a_checkpoint_without_projections_is_told_where_they_are(tmp_path):
    tensors, path = load_file(CHECKPOINT), tmp_path / "c.safetensors"
    with open_release(CHECKPOINT) as release:
        metadata = release.files[0].metadata
    save_file({k: v for k, v in tensors.items() if "aggregate" not in k}, path, metadata)
    with pytest.raises(UserError, match=r"c\.safetensors: has no text projection .*split pack"):
        TextEncoder.load(path, GEMMA)
