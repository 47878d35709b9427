"""Released codecs from files: one interface, any number of devices, clear refusals."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_codec
from safetensors.numpy import load_file, save_file

from ltx2_jax.codecs.audio import AudioCodec
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.diffusion.geometry import AudioClock
from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs import diffusion_tiling
from ltx2_jax.models.codecs.audio_vae import AudioVAEConfig
from ltx2_jax.models.codecs.inputs import to_uint8
from ltx2_jax.models.codecs.mel import MelConfig
from ltx2_jax.models.codecs.tiling import TileSizes
from ltx2_jax.models.codecs.vocoder import VOCODER_2_0, VOCODER_2_3
from ltx2_jax.weights.tensor_files import TensorFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("codec")


@pytest.fixture(scope="module")
def paths(folder):
    return tiny_codec.write(folder)


@pytest.fixture(scope="module")
def codec(paths):
    return load_codec(*paths, devices=jax.devices()[:1], dtype="float32")


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (2, 9, 64, 128, 3), np.uint8)


def test_the_interface_tells_the_geometry_of_the_release(codec):
    assert codec.release == "2.0"
    assert (codec.video.strides, codec.video.channels) == ((8, 32, 32), 4)
    assert (codec.audio.sample_rate, codec.audio.output_sample_rate) == (16000, 24000)
    assert (codec.audio.bins, codec.audio.channels) == (16, 2)
    assert codec.audio.latents_per_second == 25


def test_the_devices_and_the_dtype_are_those_asked_for(paths):
    wide, usual = (
        load_codec(*paths, devices=jax.devices()[2:4], **more)
        for more in ({"dtype": "float32"}, {})
    )
    assert (wide.video.config.dtype, usual.video.config.dtype) == ("float32", "bfloat16")
    assert wide.audio.device == jax.devices()[2]
    for leaf in jax.tree.leaves(wide.audio.params):
        assert leaf.devices() == {jax.devices()[2]}
    assert wide.video.devices == jax.devices()[2:4]


def test_the_release_is_that_of_the_pictures(tmp_path):
    """Its latents are what a model is trained on; the sound may come from an older file."""
    older, newer = tmp_path / "older", tmp_path / "newer"
    older.mkdir()
    newer.mkdir()
    _, audio = tiny_codec.write(older, split=True, version="2.3.0")
    video, _ = tiny_codec.write(newer, split=True, version="2.5.1")
    assert load_codec(audio, video).release == "2.5"


def test_uint8_pixels_are_scaled_to_plus_minus_one(codec, pixels):
    latents = codec.video.encode(pixels)
    assert (latents.shape, latents.dtype) == ((2, 2, 2, 4, 4), np.float32)
    scaled = pixels / np.float32(127.5) - 1
    np.testing.assert_allclose(codec.video.encode(scaled), latents, atol=1e-5)


def test_pixels_become_the_nearest_bytes_and_none_wraps_around():
    pixels = np.float32([-3, -1.001, -1, -0.001, 0.001, 0.99, 1, 1.001, 3])
    np.testing.assert_array_equal(to_uint8(pixels), [0, 0, 0, 127, 128, 254, 255, 255, 255])


def test_frames_beyond_a_legal_number_change_nothing(codec, pixels):
    longer = np.concatenate([pixels, pixels[:, :5]], axis=1)
    np.testing.assert_array_equal(codec.video.encode(longer), codec.video.encode(pixels))


def test_decoded_pixels_stay_within_their_range(codec):
    latents = 30 * np.random.default_rng(1).normal(size=(1, 2, 2, 2, 4))
    decoded = codec.video.decode(latents)
    assert decoded.shape == (1, 9, 64, 64, 3)
    assert abs(decoded).max() == 1


@pytest.mark.parametrize("count", [2, 8])
def test_devices_share_a_clip_without_changing_it(paths, codec, pixels, count):
    shared = load_codec(*paths, devices=jax.devices()[:count], dtype="float32")
    one = pixels[:1]
    sizes = dict(shared.video.mesh_of(one.shape[1:4]).shape)
    assert sizes["columns"] * sizes["rows"] == count
    latents = codec.video.encode(one)
    np.testing.assert_allclose(shared.video.encode(one), latents, atol=1e-5)
    np.testing.assert_allclose(shared.video.decode(latents), codec.video.decode(latents), atol=1e-5)


def test_clips_are_split_before_pictures_and_what_does_not_divide_is_copied(paths, codec, pixels):
    shared = load_codec(*paths, devices=jax.devices()[:6], dtype="float32")
    assert dict(shared.video.mesh_of((9, 64, 128), 2).shape) == {
        "clips": 2, "rows": 1, "columns": 1, "copies": 3}  # fmt: skip
    np.testing.assert_allclose(shared.video.encode(pixels), codec.video.encode(pixels), atol=1e-5)


def test_a_picture_too_small_for_all_devices_is_the_same(paths, codec, pixels):
    shared, one = load_codec(*paths, devices=jax.devices(), dtype="float32"), pixels[:1, :, :, :64]
    assert dict(shared.video.mesh_of(one.shape[1:4]).shape) == {
        "clips": 1, "rows": 2, "columns": 2, "copies": 2}  # fmt: skip
    np.testing.assert_allclose(shared.video.encode(one), codec.video.encode(one), atol=1e-5)


def test_weights_are_read_under_whatever_mesh(paths, codec, mesh_context):
    with mesh_context(2, 1, 1):
        found = load_codec(*paths, devices=jax.devices()[:2], dtype="float32")
        read = found.video.params, found.audio.params
    want = codec.video.params, codec.audio.params
    jax.tree.map(np.testing.assert_array_equal, read, want)


def test_what_a_clip_becomes_does_not_depend_on_its_place(codec, pixels, monkeypatch):
    """A batch goes in calls of so many clips; that of the last one is filled up."""
    monkeypatch.setattr(type(codec.video), "at_once", lambda self, shape: 2)
    three = np.concatenate([pixels, pixels[:1]])
    latents = codec.video.encode(three)
    assert len(latents) == 3
    np.testing.assert_array_equal(latents[2], latents[0])
    # And what is decoded comes back in the order of the batch.
    monkeypatch.setattr(
        type(codec.video), "decode_chunks", lambda _, part: iter((part[:, :1], part[:, 1:]))
    )
    np.testing.assert_array_equal(codec.video.decode(latents), latents)


def test_tiles_come_in_time_order_and_add_up_to_the_clip(paths, pixels):
    tiling = TileSizes(frames=(16, 8), height=(0, 0), width=(0, 0))
    tiled = load_codec(*paths, devices=jax.devices()[:1], dtype="float32", tiling=tiling)
    latents = np.random.default_rng(2).normal(size=(1, 5, 2, 2, 4)).astype(np.float32)
    chunks = list(tiled.video.decode_chunks(latents))
    assert len(chunks) > 1
    assert sum(chunk.shape[1] for chunk in chunks) == 33
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), tiled.video.decode(latents))


def test_every_tile_of_a_clip_has_noise_of_its_own(paths, monkeypatch):
    """For the decoders that read some; the same every time."""
    tiling = TileSizes(frames=(16, 8), height=(0, 0), width=(0, 0))
    tiled = load_codec(*paths, devices=jax.devices()[:1], tiling=tiling).video
    keys = []

    def keep_key(self, program, tile, pixels, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return np.zeros((len(tile), *pixels, 3), np.float32)

    monkeypatch.setattr(type(tiled), "_on_devices", keep_key)
    for _ in range(2):
        list(tiled.decode_chunks(np.zeros((1, 5, 2, 2, 4))))
    first, again = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    assert first == again
    assert len(set(first)) == len(first) > 1


def test_long_clips_are_tiled_by_themselves_and_more_devices_take_larger_tiles(paths):
    one = load_codec(*paths, devices=jax.devices()[:1]).video
    eight = load_codec(*paths, devices=jax.devices()).video
    clip = (1, 481, 704, 1280, 3)
    small, large = one.largest_tile(clip), eight.largest_tile(clip)
    assert max(small[0], large[0]) <= 80 + 8
    assert small[1] * small[2] < 704 * 1280
    assert large[1:] == (704, 1280)
    # As long a clip as one likes is cut into tiles of the same size, or a little smaller.
    assert one.largest_tile((1, 4801, 704, 1280, 3))[0] <= 80 + 8


def test_a_call_has_as_many_clips_as_fill_a_tile_for_every_device(paths):
    tile = TileSizes()
    frames, height, width = tile.frames[0], tile.height[0], tile.width[0]
    for devices, counts in ((1, (1, 1, 2, 32)), (2, (1, 2, 4, 64))):
        video = load_codec(*paths, devices=jax.devices()[:devices]).video
        sizes = ((2 * frames, height), (frames, height), (frames, height // 2), (10, height // 4))
        found = [video.at_once((9, f, h, width, 3)) for f, h in sizes]
        assert tuple(found) == counts


def test_the_rate_of_a_sound_is_that_of_the_last_network_that_makes_it():
    def made(vae, vocoder):
        return AudioCodec(vae, vocoder, lambda _: ())

    mel = MelConfig(sample_rate=8000, hop=100)
    other = made(AudioVAEConfig(mel=mel), VOCODER_2_3)
    assert (other.sample_rate, other.output_sample_rate) == (8000, 48000)
    assert (other.latents_per_second, other.clock) == (20, AudioClock(8000, 100, 4))
    assert made(AudioVAEConfig(), VOCODER_2_0).output_sample_rate == 24000
    assert made(AudioVAEConfig(mel=mel), None).output_sample_rate == 8000


def test_the_split_pack_loads_as_the_single_file_does(codec, tmp_path, pixels):
    split = load_codec(
        *tiny_codec.write(tmp_path, split=True, version="2.5.1"),
        devices=jax.devices()[:1],
        dtype="float32",
    )
    assert split.release == "2.5"
    np.testing.assert_array_equal(split.video.encode(pixels), codec.video.encode(pixels))


def test_silence_has_finite_latents_and_mono_is_doubled(codec):
    latents = codec.audio.encode(np.zeros((1, 6400, 2)))
    assert latents.shape == (1, 10, 16, 2)
    assert np.isfinite(latents).all()
    mono = np.random.default_rng(3).uniform(-1, 1, (1, 6400, 1))
    np.testing.assert_array_equal(
        codec.audio.encode(mono), codec.audio.encode(np.repeat(mono, 2, axis=2))
    )


def test_a_very_short_sound_is_one_latent(codec):
    assert codec.audio.encode(np.zeros((1, 640 // 3, 2))).shape == (1, 1, 16, 2)


def test_sound_lasts_as_long_as_asked(codec):
    latents = codec.audio.encode(np.random.default_rng(4).uniform(-1, 1, (1, 6400, 2)))
    assert codec.audio.decode(latents).shape == (1, 9600, 2)
    longer = codec.audio.decode(latents, 10000)
    assert (longer[:, 9600:] == 0).all()
    np.testing.assert_array_equal(codec.audio.decode(latents, 100), longer[:, :100])


def test_a_saved_reference_leads_to_the_released_files(codec, paths, tmp_path, pixels, monkeypatch):
    codec.save(tmp_path / "codec.safetensors")
    assert (tmp_path / "codec.safetensors").stat().st_size < 2000
    monkeypatch.chdir(paths[0].parent)
    load_codec(paths[0].name).save(tmp_path / "by_name.safetensors")
    monkeypatch.chdir(tmp_path)
    for name in ("by_name", "codec"):
        assert load_codec(tmp_path / f"{name}.safetensors").paths == [paths[0].resolve()]
    again = load_codec(tmp_path / "codec.safetensors", devices=jax.devices()[:1], dtype="float32")
    assert again.release == codec.release
    np.testing.assert_array_equal(again.video.encode(pixels), codec.video.encode(pixels))


def test_a_reference_to_files_that_moved_or_changed_is_refused(tmp_path):
    (path,) = tiny_codec.write(tmp_path)
    load_codec(path).save(tmp_path / "codec.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\0" if content[-1:] != b"\0" else content[:-1] + b"\1")
    with pytest.raises(UserError, match=r"all\.safetensors is not the file"):
        load_codec(tmp_path / "codec.safetensors")
    path.unlink()
    with pytest.raises(UserError, match=r"names .*all\.safetensors, which is not there"):
        load_codec(tmp_path / "codec.safetensors")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"vae": tiny_codec.VIDEO_VAE | {"encoder_blocks": [["res_z", {}]]}},
            "'res_z' is not supported",
        ),
        ({"vae": tiny_codec.VIDEO_VAE | {"norm_layer": "group_norm"}}, "norm_layer='group_norm'"),
        ({"vocoder": tiny_codec.VOCODER | {"resblock": "7"}}, "resblock='7'"),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_by_name(tmp_path, sections, message):
    with pytest.raises(UserError, match=message):
        load_codec(*tiny_codec.write(tmp_path, **sections))


def test_files_without_a_network_or_with_two_are_refused(tmp_path, paths):
    video, audio = tiny_codec.write(tmp_path, split=True)
    with pytest.raises(UserError, match=r"no audio_vae and no vocoder in .*video\.safetensors"):
        load_codec(video)
    with pytest.raises(UserError, match=r"holds a video_vae, and so does"):
        load_codec(*paths, video)
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        load_codec(tmp_path / "gone.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match=r"text\.safetensors: not a readable safetensors file"):
        load_codec(video, audio, tmp_path / "text.safetensors")


@pytest.fixture(scope="module")
def halves(paths, tmp_path_factory):
    """The codec without its encoders, and without its decoders and the vocoder."""
    folder = tmp_path_factory.mktemp("halves")
    (path,) = paths
    with TensorFile(path) as file:
        metadata = file.metadata
    for name, left_out in (("decoder", (".encoder.",)), ("encoder", (".decoder.", "vocoder."))):
        kept = {k: v for k, v in load_file(path).items() if not any(x in k for x in left_out)}
        save_file(kept, folder / name, metadata)
    return tuple(
        load_codec(folder / name, devices=jax.devices()[:1], dtype="float32")
        for name in ("decoder", "encoder")
    )


def test_half_a_codec_does_what_it_can(halves, codec, pixels):
    decoder, encoder = halves
    sound = np.random.default_rng(6).uniform(-1, 1, (1, 6400, 2))
    latents, heard = encoder.video.encode(pixels), encoder.audio.encode(sound)
    np.testing.assert_array_equal(latents, codec.video.encode(pixels))
    np.testing.assert_array_equal(heard, codec.audio.encode(sound))
    np.testing.assert_array_equal(decoder.video.decode(latents), codec.video.decode(latents))
    np.testing.assert_array_equal(decoder.audio.decode(heard), codec.audio.decode(heard))
    for call, message in (
        (lambda: decoder.video.encode(pixels), "video VAE has no encoder"),
        (lambda: encoder.video.decode(latents), "video VAE has no decoder"),
        (lambda: next(encoder.video.decode_chunks(latents)), "video VAE has no decoder"),
        (lambda: decoder.audio.encode(sound), "audio VAE has no encoder"),
        (lambda: encoder.audio.decode(heard), "audio VAE has no decoder"),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 9, 60, 64, 3), "height 60 is not a multiple of the codec's stride 32; 64 would be"),
        ((1, 9, 64, 65, 3), "width 65 is not a multiple of the codec's stride 32; 64 would be"),
        ((1, 9, 20, 64, 3), "height 20 is not a multiple of the codec's stride 32; 32 would be"),
        ((1, 9, 64, 90, 3), "width 90 is not a multiple of the codec's stride 32; 96 would be"),
        ((1, 0, 64, 64, 3), "F >= 1"),
        ((1, 9, 64, 64, 4), r"expected \[B, F, H, W, 3\]"),
    ],
)
def test_pictures_of_an_illegal_size_are_refused(codec, shape, message):
    with pytest.raises(UserError, match=message):
        codec.video.encode(np.zeros(shape, np.uint8))


def test_sound_that_is_empty_or_not_finite_is_refused(codec):
    with pytest.raises(UserError, match="audio is empty"):
        codec.audio.encode(np.zeros((1, 0, 2)))
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(UserError, match="not finite"):
            codec.audio.encode(np.full((1, 6400, 2), value))
    with pytest.raises(UserError, match=r"expected \[B, samples, 2\] or mono"):
        codec.audio.encode(np.zeros((1, 6400, 6)))


def test_latents_of_another_codec_are_refused(codec):
    with pytest.raises(UserError, match=r"expected \[B, F', H', W', 4\]"):
        codec.video.decode(np.zeros((1, 2, 2, 2, 128)))


def test_the_diffusion_decoder_is_shared_by_devices_and_repeats_its_noise(monkeypatch):
    split = Path(__file__).parents[1] / "golden" / "v2.5" / "split"
    paths = split / "video_vae_diffusion.safetensors", split / "audio_vae.safetensors"
    one, two = (load_codec(*paths, devices=jax.devices()[:n], dtype="float32") for n in (1, 2))
    assert one.release == "2.5"
    latents = np.random.default_rng(5).normal(size=(1, 1, 3, 4, one.video.channels))
    pixels = one.video.decode(latents)
    assert pixels.shape == (1, 1, 96, 128, 3)
    np.testing.assert_array_equal(one.video.decode(latents), pixels)
    np.testing.assert_allclose(two.video.decode(latents), pixels, atol=1e-4)
    # Every draw for a clip is another one, and what is decoded stays within its range.
    shape, seen = (1, 1, 2, 3, 50), []  # two devices do not divide 3 columns

    def chunks(decoder, raw, draw, tiling):
        seen.append((raw, tiling))
        return map(draw, (shape, shape))

    monkeypatch.setattr(diffusion_tiling, "decode_chunks", chunks)
    for codec in (one, two):
        first, second = codec.video.decode_chunks(latents)
        assert (first != second).mean() > 0.5
        assert max(np.abs(first).max(), np.abs(second).max()) == 1
    # It reads latents as the network knows them, in tiles as large as the devices can hold.
    statistics = one.video.params["statistics"]
    raw = latents * np.asarray(statistics["std"]) + np.asarray(statistics["mean"])
    np.testing.assert_allclose(seen[0][0], raw, atol=1e-5)
    assert np.abs(raw - latents).max() > 0.1
    monkeypatch.setattr(diffusion_tiling, "MAX_CELLS", 16_000)
    large = np.zeros((1, 1, 24, 48, one.video.channels))
    for number, codec in enumerate((one, two), 1):
        list(codec.video.decode_chunks(large))
        want = diffusion_tiling.automatic_tiling(
            one.video.decoder_config, large.shape, number * 16_000
        )
        assert seen[-1][1] == want
    assert seen[-1][1] != seen[-2][1]


def test_a_diffusion_decoder_alone_decodes(tmp_path):
    split = Path(__file__).parents[1] / "golden" / "v2.5" / "split"
    path, audio = split / "video_vae_diffusion.safetensors", split / "audio_vae.safetensors"
    with TensorFile(path) as file:
        metadata = file.metadata
    kept = {k: v for k, v in load_file(path).items() if not k.startswith("encoder.")}
    save_file(kept, tmp_path / "decoder.safetensors", metadata)
    half, whole = (
        load_codec(video, audio, devices=jax.devices()[:1], dtype="float32")
        for video in (tmp_path / "decoder.safetensors", path)
    )
    assert half.video.strides == whole.video.strides
    latents = np.random.default_rng(5).normal(size=(1, 1, 1, 1, whole.video.channels))
    np.testing.assert_array_equal(half.video.decode(latents), whole.video.decode(latents))
    with pytest.raises(UserError, match="video VAE has no encoder"):
        half.video.encode(np.zeros((1, 1, 32, 32, 3), np.uint8))
