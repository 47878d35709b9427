"""The text encoder beside the records: what it tells apart, what its file keeps and refuses."""

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ltx2_jax.demo.config import RandomEncoderConfig
from ltx2_jax.demo.random_encoder import RandomEncoder
from ltx2_jax.errors import UserError
from ltx2_jax.models.text.gemma import GEMMA_SMALL
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.cache import TextCache
from ltx2_jax.text.captions import caption_features, load_caption_encoder, tell_cut
from ltx2_jax.text.encoder import TextEncoder, write_reference

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = RandomEncoderConfig(video_dim=24, audio_dim=16)
CAPTIONS = ["a red ball bounces once", "a blue ball bounces twice", "a green lamp flashes"]
LENGTH = 48


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "text_encoder.safetensors"
    RandomEncoder.make(path, CONFIG, CAPTIONS, LENGTH)
    return path


@cache
def loaded(path):
    return load_caption_encoder(path)


def metadata(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def test_features_have_the_widths_and_padding_that_records_store(path):
    found = caption_features(loaded(path), [*CAPTIONS, ""])
    shapes = {name: (value.shape, value.dtype.name) for name, value in found.items()}
    assert shapes == {
        "video_text": ((4, LENGTH, 24), "float32"),
        "audio_text": ((4, LENGTH, 16), "float32"),
        "text_mask": ((4, LENGTH), "bool"),
    }
    mask = found["text_mask"]
    assert mask.sum(1).tolist()[3] == 1  # the empty caption is a BOS
    assert (np.sort(mask, axis=1) == mask).all()
    assert not found["video_text"][~mask].any()
    assert 0.5 < found["video_text"][mask].std() < 2


def test_a_word_changes_the_features_of_what_follows_it_and_of_nothing_before(path):
    encoder = loaded(path)
    captions = ["a red ball bounces once", "a red ball bounces twice"]
    found, tokens = (
        caption_features(encoder, captions),
        encoder.tokenizer.encode(captions, LENGTH)[0],
    )
    counts = found["text_mask"].sum(1)
    rows = [x[-n:] for x, n in zip(found["video_text"], counts, strict=True)]
    ids = [x[-n:] for x, n in zip(tokens, counts, strict=True)]
    same = int(np.argmin(ids[0][: min(counts)] == ids[1][: min(counts)]))
    assert 4 < same < min(counts)
    # Positions differ by the padding in front, which rotary attention does not see.
    np.testing.assert_allclose(rows[0][:same], rows[1][:same], atol=1e-3)
    assert np.abs(rows[0][same:] - rows[1][same : counts[0]]).max() > 0.5


def test_the_file_alone_gives_the_same_features_also_under_a_mesh(path, tmp_path):
    want = caption_features(loaded(path), CAPTIONS)
    loaded(path).save(tmp_path / "copy.safetensors")
    with jax.set_mesh(make_mesh(2, 2, 2)):
        got = caption_features(load_caption_encoder(tmp_path / "copy.safetensors"), CAPTIONS)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)


def test_the_seed_decides_the_weights(path, tmp_path):
    for seed, equal in ((0, True), (1, False)):
        again = tmp_path / f"{seed}.safetensors"
        RandomEncoder.make(again, dataclasses.replace(CONFIG, seed=seed), CAPTIONS, LENGTH)
        tensors = load_file(again)
        same = [np.array_equal(value, tensors[name]) for name, value in load_file(path).items()]
        assert all(same) == equal


def test_features_can_be_shared_or_of_the_last_state_alone(path, tmp_path):
    config = dataclasses.replace(CONFIG, audio_dim=None, last_layer_only=True)
    encoder = RandomEncoder.make(tmp_path / "e.safetensors", config, CAPTIONS, LENGTH)
    assert caption_features(encoder, CAPTIONS).keys() == {"video_text", "text_mask"}
    shape = {name: value.shape for name, value in load_file(tmp_path / "e.safetensors").items()}
    assert shape["text_features.video.kernel"] == (1, GEMMA_SMALL.width, 24)


def test_a_released_encoder_is_found_again_and_a_changed_one_refused(tmp_path):
    shutil.copytree(GOLDEN / "v2.3" / "gemma", tmp_path / "gemma")
    checkpoint = GOLDEN / "v2.3" / "checkpoint.safetensors"
    encoder = TextEncoder.load(
        checkpoint, tmp_path / "gemma", connect=False, dtype="float32", length=20
    )
    assert encoder.release == "2.3"
    encoder.save(tmp_path / "e.safetensors")
    again = load_caption_encoder(tmp_path / "e.safetensors")
    assert (again.length, again.release) == (20, "2.3")
    want, got = caption_features(encoder, CAPTIONS), caption_features(again, CAPTIONS)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    # Through a cache: the same, and the second time without the weights.
    for build in ("TextEncoder.load", None):
        cached = load_caption_encoder(tmp_path / "e.safetensors", cache=tmp_path / "cache")
        if build is None:
            cached._build = None
        got = caption_features(cached, CAPTIONS)
        assert got.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value)
    assert (cached.length, cached.release) == (20, "2.3")
    cached.save(tmp_path / "again.safetensors")
    assert metadata(tmp_path / "again.safetensors") == metadata(tmp_path / "e.safetensors")
    weights = tmp_path / "gemma" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"model\.safetensors is not the file"):
        load_caption_encoder(tmp_path / "e.safetensors")
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors, which is not there"):
        load_caption_encoder(tmp_path / "e.safetensors")


def test_a_released_encoder_is_used_as_it_was_where_it_was(tmp_path, monkeypatch):
    """By paths that hold in any folder."""
    monkeypatch.chdir(GOLDEN / "v2.3")
    asked = {"length": 20, "dtype": "float32", "last_layer_only": True}
    write_reference(tmp_path / "e.safetensors", "checkpoint.safetensors", "gemma", **asked)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextEncoder, "load", lambda *files, **given: (files, given))
    mesh = make_mesh(devices=jax.devices()[:2])
    files, given = load_caption_encoder(tmp_path / "e.safetensors", mesh)
    assert [Path(name) for name in files] == [
        GOLDEN / "v2.3" / name for name in ("checkpoint.safetensors", "gemma")
    ]
    assert given == {**asked, "mesh": mesh, "connect": False}
    monkeypatch.setattr(TextCache, "load", lambda *files, **given: (files, given))
    cached = load_caption_encoder(tmp_path / "e.safetensors", mesh, tmp_path / "cache")
    assert cached == ((tmp_path / "cache", *files), given)


def test_captions_beyond_a_batch_are_encoded_as_those_within_it(path, monkeypatch):
    encoder = RandomEncoder.load(path)
    want = encoder.features(CAPTIONS)
    monkeypatch.setattr(encoder, "batch_size", 2)
    for have, expect in zip(encoder.features(CAPTIONS), want, strict=True):
        np.testing.assert_allclose(have, expect, atol=1e-5)


def test_only_captions_without_any_padding_are_said_to_be_cut(capsys):
    masks = np.asarray([[False, True, True], [True, True, True], [False, False, True]])
    tell_cut(masks[[0, 2]], "captions", "--text-length")
    assert capsys.readouterr().out == ""
    tell_cut(masks, "captions", "--text-length")
    assert "captions that fill all 3 tokens: 1; what is longer is cut (--text-length)" in (
        capsys.readouterr().out
    )


def test_what_is_no_encoder_is_refused_by_name(path, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_caption_encoder(tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(1)}, other, {"kind": "something"})
    with pytest.raises(UserError, match=r"other\.safetensors: kind something, not ltx2_jax"):
        load_caption_encoder(other)
    tensors, kept = load_file(path), metadata(path)
    without = {name: value for name, value in tensors.items() if name != "gemma.embedding"}
    save_file(without, other, kept)
    with pytest.raises(UserError, match=r"damaged .*gemma\.embedding.*; run prepare again"):
        load_caption_encoder(other)
    wide = json.loads(kept["config"]) | {"video_dim": 25}
    save_file(tensors, other, kept | {"config": json.dumps(wide)})
    with pytest.raises(UserError, match=r"shape \(5, 64, 24\), not \(5, 64, 25\)"):
        load_caption_encoder(other)


def test_impossible_sizes_are_named():
    gemma = dataclasses.replace(GEMMA_SMALL, num_heads=3)
    with pytest.raises(UserError, match=r"num_heads=3 is not a multiple of gemma\.sliding\.kv_he"):
        RandomEncoderConfig(gemma=gemma)
    gemma = dataclasses.replace(GEMMA_SMALL, layers=("global",))
    with pytest.raises(UserError, match=r"gemma\.layers: 'global' is not one of sliding, full"):
        RandomEncoderConfig(gemma=gemma)
