"""Cached features are those of the encoder, and the encoder is built only when one is missing."""

import shutil
import threading
import weakref
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ltx2_jax.errors import UserError
from ltx2_jax.models.layers import Rngs
from ltx2_jax.text.cache import TextCache, encoder_fingerprint
from ltx2_jax.text.encoder import TextEncoder
from ltx2_jax.weights.tensor_files import read_metadata

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTH = 32
PROMPTS = ["A quiet fox walks.", "", "Лиса идёт по мосту <eos>", "a" * 99, "雨の港"]


def files_of(version):
    return GOLDEN / version / "checkpoint.safetensors", GOLDEN / version / "gemma"


@cache
def encoder(version):
    return TextEncoder.load(*files_of(version), length=LENGTH)


def no_encoder():
    raise AssertionError("a cached prompt does not need the encoder")


def opened(folder, build=no_encoder, **identity):
    identity = {"encoder": "e", "release": "2.3", "length": LENGTH} | identity
    return TextCache(folder, build, **identity)


def assert_same_bits(have, want):
    for a, b in zip(have, want, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


class FakeEncoder:
    """Features that can be told apart, and the prompts that they were asked for."""

    def __init__(self, batch_size=2):
        self.length, self.batch_size, self.asked = LENGTH, batch_size, []
        self.mesh = SimpleNamespace(is_multi_process=False)
        self.model = nnx.Linear(2, 2, rngs=Rngs(0))

    def features(self, prompts):
        self.asked.append(list(prompts))
        counts = np.array([1 + len(prompt) for prompt in prompts])
        mask = np.arange(LENGTH) >= LENGTH - counts[:, None]
        rngs = [np.random.default_rng([1, *prompt.encode()]) for prompt in prompts]
        video = np.stack([rng.normal(size=(LENGTH, 8)) for rng in rngs]).astype(ml_dtypes.bfloat16)
        video = np.where(mask[..., None], video, np.array(-0.0, video.dtype))
        return video, -video[..., :4], mask


# ---- what is stored ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v2.0", "v2.3"])
def test_cached_features_are_those_of_the_encoder_bit_for_bit(version, tmp_path):
    want = encoder(version).features(PROMPTS)
    assert np.asarray(want[0]).dtype == ml_dtypes.bfloat16
    assert np.asarray(want[2]).sum(1).tolist()[3] == LENGTH  # one without padding
    assert_same_bits(opened(tmp_path, lambda: encoder(version)).features(PROMPTS), want)
    assert_same_bits(opened(tmp_path).features(PROMPTS), want)


def test_only_the_rows_of_tokens_and_one_of_padding_are_stored(tmp_path):
    for version, streams in (("v2.0", {"video"}), ("v2.3", {"video", "audio"})):
        opened(tmp_path / version, lambda v=version: encoder(v)).features(PROMPTS)
        counts = encoder(version).tokens(PROMPTS)[1].sum(1)
        for prompt, count in zip(PROMPTS, counts, strict=True):
            stored = load_file(opened(tmp_path / version).path(prompt))
            assert set(stored) == streams | {"tokens"}
            assert {len(stored[name]) for name in streams} == {min(count + 1, LENGTH)}


def test_rows_that_are_no_padding_are_kept_whatever_their_mask(tmp_path):
    class Odd(FakeEncoder):
        def features(self, prompts):
            video, audio, mask = super().features(prompts)
            video[:, 3] = 7  # a padded row unlike the others
            audio[:] = np.nan
            return video, audio, mask

    want = Odd().features(["fox"])
    assert_same_bits(opened(tmp_path, Odd).features(["fox"]), want)
    assert_same_bits(opened(tmp_path).features(["fox"]), want)


# ---- when the encoder runs -----------------------------------------------------------------------


def test_every_missing_prompt_is_encoded_once_in_full_batches(tmp_path):
    fake = FakeEncoder(batch_size=2)
    cached = opened(tmp_path, lambda: fake)
    video, _, mask = cached.features(["a", " bb ", "a\n", "ccc"])
    assert fake.asked == [["a", "bb"], ["ccc", "ccc"]]
    assert mask.sum(1).tolist() == [2, 3, 2, 4]
    np.testing.assert_array_equal(video[0], video[2])
    cached.features(["ccc", "dddd", "bb"])
    assert fake.asked[2:] == [["dddd", "dddd"]]
    assert_same_bits(opened(tmp_path).features(["a", "bb", "a", "ccc"])[:1], [video])


def test_a_batch_that_is_done_is_kept_when_a_later_one_fails(tmp_path):
    fake = FakeEncoder(batch_size=1)
    run = fake.features
    fake.features = lambda prompts: run(prompts) if prompts != ["bad"] else 1 / 0
    with pytest.raises(ZeroDivisionError):
        opened(tmp_path, lambda: fake).features(["good", "bad"])
    opened(tmp_path).features(["good"])


def test_release_frees_the_weights_and_the_next_missing_prompt_loads_them_again(tmp_path):
    built = []

    def build():
        built.append(FakeEncoder())
        return built[-1]

    cached = opened(tmp_path, build)
    cached.free()  # nothing to do
    first = cached.features(["fox"])
    weights, gone = nnx.state(built[0].model), weakref.ref(built[0])
    cached.free()
    assert [leaf.is_deleted() for leaf in jax.tree.leaves(weights)] == [True, True]
    built.clear()
    assert gone() is None
    assert_same_bits(cached.features(["fox"]), first)
    assert not built
    cached.features(["hare"])
    assert len(built) == 1


# ---- what else can be in the folder --------------------------------------------------------------


def test_other_encoders_releases_and_lengths_do_not_meet(tmp_path):
    paths = [opened(tmp_path).path("fox")] + [
        opened(tmp_path, **{name: value}).path("fox")
        for name, value in {"encoder": "f", "release": "2.0", "length": 64}.items()
    ]
    assert len(set(paths)) == 4
    assert paths[2].parent == tmp_path / "2.0"
    assert opened(tmp_path).path(" fox\n") == paths[0] != opened(tmp_path).path("Fox")


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, _: b"",
        lambda data, _: b"hello",
        lambda data, _: data[: len(data) // 2],
        lambda data, _: flip(data, len(data) - 3),
        lambda data, _: flip(data, data.index(b"fox") + 1),
        lambda data, _: (2).to_bytes(8, "little") + b"[]",
        lambda data, other: other,
    ],
)
def test_a_damaged_file_is_a_warning_and_written_again(damage, tmp_path):
    want = opened(tmp_path, FakeEncoder).features(["fox", "a hare"])
    path = opened(tmp_path).path("fox")
    path.write_bytes(damage(path.read_bytes(), opened(tmp_path).path("a hare").read_bytes()))
    with pytest.warns(UserWarning, match=rf"{path.name}: damaged \(.*\): its prompt is encoded"):
        have = opened(tmp_path, FakeEncoder).features(["fox", "a hare"])
    assert_same_bits(have, want)
    assert_same_bits(opened(tmp_path).features(["fox", "a hare"]), want)


def test_many_can_write_and_read_one_folder_at_once(tmp_path):
    prompts = ["x" * n for n in range(12)]
    want, problems, start = FakeEncoder().features(prompts), [], threading.Barrier(6)

    def work():
        try:
            start.wait()
            for _ in range(3):
                have = opened(tmp_path, FakeEncoder).features(prompts)
                assert_same_bits(have[2:], want[2:])
                assert_same_bits(have, opened(tmp_path).features(prompts))
        except Exception as error:  # raised again below: a thread would swallow it
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert sorted(tmp_path.rglob("*.*")) == sorted(
        {tmp_path / "2.3", *(opened(tmp_path).path(prompt) for prompt in prompts)}
    )


# ---- a released model ----------------------------------------------------------------------------


def test_a_released_models_cache_is_its_encoder(tmp_path, monkeypatch):
    cached = TextCache.load(tmp_path, *files_of("v2.3"), length=LENGTH)
    want = encoder("v2.3").features(PROMPTS)
    assert_same_bits(cached.features(PROMPTS), want)
    assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} == {"2.3"}
    monkeypatch.setattr(TextEncoder, "load", no_encoder)
    again = TextCache.load(tmp_path, *files_of("v2.3"), length=LENGTH)
    assert_same_bits(again.features(PROMPTS), want)


def test_the_fingerprint_tells_what_decides_features_from_what_does_not(tmp_path):
    checkpoint, gemma = files_of("v2.3")
    name = encoder_fingerprint(checkpoint, gemma)
    assert name == encoder_fingerprint(str(checkpoint), str(gemma), dtype="bfloat16")
    different = [
        encoder_fingerprint(checkpoint, gemma, dtype="float32"),
        encoder_fingerprint(checkpoint, gemma, last_layer_only=True),
        encoder_fingerprint(checkpoint, gemma, quantize="int8"),
        encoder_fingerprint(checkpoint, gemma, tokenizer=GOLDEN / "v2.5" / "gemma"),
    ]

    tensors = load_file(checkpoint)
    metadata = {"config": read_metadata(checkpoint)["config"]}

    def changed(key, rows=slice(None)):
        path, value = tmp_path / "checkpoint.safetensors", tensors[key].copy()
        value[rows] = -value[rows]
        save_file(tensors | {key: value}, path, metadata)
        return encoder_fingerprint(path, gemma)

    connector = "model.diffusion_model.video_embeddings_connector.learnable_registers"
    assert changed(connector) == name
    projection = "text_embedding_projection.video_aggregate_embed.weight"
    middle = len(tensors[projection]) // 2
    different += [changed(projection, rows) for rows in (0, middle, -1, slice(None))]

    other = tmp_path / "gemma"
    shutil.copytree(gemma, other)
    assert encoder_fingerprint(checkpoint, other) == name
    weights = load_file(other / "model.safetensors")
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file(weights | {key: -weights[key]}, other / "model.safetensors")
    different.append(encoder_fingerprint(checkpoint, other))
    assert len({name, *different}) == 1 + len(different)


def test_what_decides_features_decides_their_place_and_reaches_the_encoder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        TextEncoder, "load", lambda *files, **given: asked.append(given) or FakeEncoder()
    )
    words = GOLDEN / "v2.5" / "gemma"
    settings = [
        {}, {"dtype": "float32"}, {"last_layer_only": True}, {"tokenizer": words},
        {"quantize": "int8"},
    ]  # fmt: skip
    paths = set()
    for given in settings:
        cached = TextCache.load(tmp_path, *files_of("v2.3"), length=LENGTH, mesh="mesh", **given)
        paths.add(cached.path("fox"))
        cached.features(["fox"])
        whole = {"length": LENGTH, "mesh": "mesh", **given}
        assert asked[-1].items() >= whole.items()
    assert len(paths) == len(asked) == len(settings)
    assert not cached.shared
    assert TextCache.load(tmp_path, *files_of("v2.0")).shared


# ---- mistakes ------------------------------------------------------------------------------------


def test_what_cannot_be_encoded_is_refused_before_the_encoder_is_built(tmp_path):
    features = opened(tmp_path).features
    with pytest.raises(UserError, match="prompt 1 has a NUL"):
        features(["fine", "a\0"])
    with pytest.raises(UserError, match="prompt 0 is not valid Unicode"):
        features(["\ud800"])
    with pytest.raises(UserError, match="no prompts"):
        features([])
    with pytest.raises(TypeError, match="not one string"):
        features("fox")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(UserError, match="be written"):
        opened(tmp_path / "file", FakeEncoder).features(["fox"])


def test_an_encoder_of_several_processes_is_refused(tmp_path):
    fake = FakeEncoder()
    fake.mesh.is_multi_process = True
    with pytest.raises(UserError, match=r"devices of one process: .* jax\.local_devices"):
        opened(tmp_path, lambda: fake).features(["fox"])


def test_files_that_are_not_there_are_named_at_once(tmp_path):
    checkpoint, gemma = files_of("v2.3")
    load = partial(TextCache.load, tmp_path)
    with pytest.raises(UserError, match=r"none\.safetensors"):
        load(tmp_path / "none.safetensors", gemma)
    with pytest.raises(UserError, match="none: no such file or folder"):
        load(checkpoint, tmp_path / "none")
    with pytest.raises(UserError, match="none: no tokenizer there"):
        load(checkpoint, gemma, tokenizer=tmp_path / "none")
