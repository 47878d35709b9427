"""What goes through a codec comes out with its frames, rates and length."""

import dataclasses
from types import SimpleNamespace

import film
import jax
import numpy as np
import pytest
import tiny_codec

from ltx2_jax.codecs import clips
from ltx2_jax.codecs.codec import load_codec
from ltx2_jax.demo.config import LinearCodecConfig, SyntheticConfig
from ltx2_jax.demo.linear_codec import LinearCodec
from ltx2_jax.demo.synthetic import render
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import Clip, read_clip
from ltx2_jax.models.codecs.tiling import TileCounts

SYNTHETIC = SyntheticConfig(num_frames=18, height=32, width=64, fps=12.0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny_codec.write(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def codec(paths):
    return load_codec(*paths, devices=jax.devices()[:1], dtype="float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "source.mp4"
    render(SYNTHETIC, 0).clip.save(path)
    return path


@pytest.mark.parametrize("frames", range(1, 19))
def test_an_mp4_comes_back_with_its_legal_frames_rates_and_length(
    codec, source, tmp_path, capsys, frames
):
    clip = read_clip(source, num_frames=frames)
    legal = (frames - 1) // 8 * 8 + 1
    video, audio = clips.encode_clip(codec, clip)
    assert video.shape == ((legal - 1) // 8 + 1, 1, 2, 4)
    assert audio.shape == (round(legal / 12 * 25), 16, 2)
    told = f"{frames} frames are not 8 k + 1: the first {legal} are encoded\n"
    assert capsys.readouterr().out == ("" if frames == legal else told)

    clips.write_clip(tmp_path / "copy.mp4", codec, video, audio, clip.fps)
    copy = read_clip(tmp_path / "copy.mp4")
    assert copy.video.shape == (legal, 32, 64, 3)
    assert copy.fps == clip.fps == 12.0
    assert copy.sample_rate == codec.audio.output_sample_rate
    assert copy.audio.shape == (round(legal / 12 * 24000), 2)


def test_a_written_clip_is_the_decoded_one_in_pieces(paths, tmp_path, source):
    tiling = TileCounts(frames=(2, 1))
    tiled = load_codec(*paths, devices=jax.devices()[:1], dtype="float32", tiling=tiling)
    clip = read_clip(source, num_frames=17)
    latents = clips.encode_clip(tiled, clip)
    decoded = clips.decode_clip(tiled, *latents, clip.fps)
    decoded.save(tmp_path / "whole.mp4")
    clips.write_clip(tmp_path / "pieces.mp4", tiled, *latents, clip.fps)
    film.assert_same(tmp_path / "whole.mp4", tmp_path / "pieces.mp4")


def test_a_written_clip_is_as_fine_as_asked(tmp_path):
    frames = np.random.default_rng(0).uniform(-1, 1, (1, 9, 32, 64, 3)).astype(np.float32)
    video = SimpleNamespace(strides=(8, 32, 32), decode_chunks=lambda _: iter([frames]))
    noise = SimpleNamespace(video=video, audio=SimpleNamespace(output_sample_rate=24000))
    sizes = []
    for crf in (5, 18, 40):
        path = tmp_path / f"{crf}.mp4"
        clips.write_clip(path, noise, np.zeros((2, 1, 2, 4)), None, 12.0, crf=crf)
        sizes.append(path.stat().st_size)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < sizes[1] / 2 < sizes[0] / 2


def test_a_linear_codec_goes_the_same_way(source, tmp_path):
    config = LinearCodecConfig(video_strides=(4, 8, 8), video_channels=4, audio_channels=4)
    linear = LinearCodec.fit(config, [render(SYNTHETIC, i).clip for i in range(3)])
    clip = read_clip(source)
    video, audio = clips.encode_clip(linear, clip)
    clips.write_clip(tmp_path / "copy.mp4", linear, video, audio, clip.fps)
    assert len(read_clip(tmp_path / "copy.mp4").video) == 17


@pytest.mark.parametrize("rate", [44100, 48000, 16000])
def test_sound_of_any_rate_is_encoded_for_the_same_time(codec, rate):
    seconds = np.arange(round(9 / 12 * rate)) / rate
    tone = np.sin(2 * np.pi * 440 * seconds).astype(np.float32)[:, None].repeat(2, axis=1)
    clip = Clip(np.zeros((9, 32, 32, 3), np.uint8), 12.0, tone, rate)
    _, latents = clips.encode_clip(codec, clip)
    at_codec_rate = dataclasses.replace(
        clip,
        audio=np.sin(2 * np.pi * 440 * np.arange(12000) / 16000)[:, None].repeat(2, axis=1),
        sample_rate=16000,
    )
    _, expected = clips.encode_clip(codec, at_codec_rate)
    assert latents.shape == expected.shape == (19, 16, 2)
    # The filter rings at the ends.
    np.testing.assert_allclose(latents[2:-3], expected[2:-3], atol=0.02 * abs(expected).max())


def test_a_sound_that_ends_before_its_picture_is_followed_by_silence(codec):
    clip = Clip(np.zeros((9, 32, 32, 3), np.uint8), 12.0, np.ones((3000, 2)), 16000)
    longer = np.concatenate([clip.audio, np.zeros((9160, 2))])  # 19 latents
    _, latents = clips.encode_clip(codec, clip)
    _, expected = clips.encode_clip(codec, dataclasses.replace(clip, audio=longer))
    assert latents.shape == (19, 16, 2)
    np.testing.assert_array_equal(latents, expected)


def test_silent_tracks_and_missing_ones_are_different(codec):
    clip = Clip(np.zeros((9, 32, 32, 3), np.uint8), 12.0, np.zeros((12000, 2)), 16000)
    video, audio = clips.encode_clip(codec, clip)
    assert np.isfinite(audio).all()
    video, audio = clips.encode_clip(codec, dataclasses.replace(clip, audio=None))
    assert audio is None
    assert clips.decode_clip(codec, video, audio, 12.0).audio is None


def test_what_cannot_be_encoded_is_refused(codec):
    clip = Clip(np.zeros((9, 32, 32, 3), np.uint8), 12.0, np.zeros((12000, 2)), 16000)
    with pytest.raises(UserError, match="height 31"):
        clips.encode_clip(codec, dataclasses.replace(clip, video=clip.video[:, 1:]))
    with pytest.raises(UserError, match="audio is empty"):
        clips.encode_clip(codec, dataclasses.replace(clip, audio=clip.audio[:0]))
    with pytest.raises(UserError, match="not finite"):
        clips.encode_clip(codec, dataclasses.replace(clip, audio=clip.audio * np.nan))
    with pytest.raises(UserError, match="too short for one audio latent"):
        clips.encode_clip(codec, dataclasses.replace(clip, video=clip.video[:1], fps=60.0))


def test_a_clip_that_cannot_be_written_leaves_nothing(codec, tmp_path):
    video = np.zeros((2, 1, 2, 4), np.float32)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"copy\.mp4: cannot be written"):
        clips.write_clip(tmp_path / "file" / "copy.mp4", codec, video, None, 12.0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
