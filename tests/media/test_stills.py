"""Images in, frames out, and what a clip says of itself."""

import json

import av
import numpy as np
import pytest
import soundfile

from ltx2_jax.errors import UserError
from ltx2_jax.media import media
from ltx2_jax.media.picture import covering

RNG = np.random.default_rng(0)


def picture(height=48, width=64):
    """Blocks of colour, as films have them rather than noise."""
    blocks = RNG.integers(0, 255, (height // 8, width // 8, 3)).astype(np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)


def test_frames_are_written_as_they_are(tmp_path):
    frames = np.stack([picture(), picture(), picture()])
    files = media.write_pngs(tmp_path / "a.png", [frames[:2], frames[2:]])
    assert [file.name for file in files] == ["a-00000.png", "a-00001.png", "a-00002.png"]
    for file, frame in zip(files, frames, strict=True):
        np.testing.assert_array_equal(media.read_image(file), frame)
    media.Clip(frames, 8.0).save(tmp_path / "b.png")
    np.testing.assert_array_equal(media.read_image(tmp_path / "b-00002.png"), frames[2])


def test_an_image_through_h264_is_that_of_a_film_of_this_quality():
    image = picture(49, 65)[:47, :63]
    kept = image[:46, :62].astype(float)
    loss = [np.abs(media.through_h264(image, crf) - kept).mean() for crf in (1, 20, 45)]
    assert media.through_h264(image, 18).shape == (46, 62, 3)
    assert loss[0] < loss[1] < loss[2] < 40


def test_what_made_a_clip_is_in_its_file(tmp_path):
    about = json.dumps({"prompt": "ein Hund bellt — „wuff“", "more": "x" * 100_000})
    clip = media.Clip(picture()[None].repeat(3, 0), 8.0, about=about)
    clip.save(tmp_path / "a.mp4")
    media.stream_mp4(tmp_path / "b.mp4", [clip.video], fps=8.0, about=about)
    assert media.read_about(tmp_path / "a.mp4") == media.read_about(tmp_path / "b.mp4") == about
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == about
    media.write_mp4(tmp_path / "c.mp4", media.Clip(clip.video, 8.0))
    assert media.read_about(tmp_path / "c.mp4") == ""


def test_sound_is_read_from_films_and_from_files_of_sound(tmp_path):
    sound = (0.2 * np.sin(np.arange(4000) / 8))[:, None].repeat(2, 1).astype(np.float32)
    media.write_mp4(tmp_path / "a.mp4", media.Clip(picture()[None].repeat(2, 0), 8.0, sound, 16000))
    for suffix in ("wav", "flac", "ogg"):
        soundfile.write(tmp_path / f"a.{suffix}", sound, 16000)
    for name, error in (("a.wav", 1e-4), ("a.flac", 1e-4), ("a.ogg", 0.1), ("a.mp4", 0.1)):
        samples, rate = media.read_whole_sound(tmp_path / name)
        assert (samples.shape, rate) == ((4000, 2), 16000), name
        assert np.abs(samples[500:-500] - sound[500:-500]).max() < error, name
    media.write_pngs(tmp_path / "still.png", [picture()[None]])
    with pytest.raises(UserError, match="has no sound"):
        media.read_whole_sound(tmp_path / "still-00000.png")
    with pytest.raises(UserError, match="no such file"):
        media.read_whole_sound(tmp_path / "none.wav")


def test_sound_of_many_channels_is_mixed_and_that_of_a_file_alone_ends_with_it(tmp_path):
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, (47 * 1024, 6)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", audio, 48000, subtype="FLOAT")
    mixed, rate = media.read_whole_sound(tmp_path / "a.wav")
    np.testing.assert_allclose(mixed, media.to_stereo(audio), atol=1e-6)
    with av.open(str(tmp_path / "a.m4a"), "w") as container:  # which soundfile does not read
        stream = container.add_stream("aac", rate=48000, layout="stereo")
        planes = np.ascontiguousarray(audio[:, :2].T)
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout="stereo")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    alone, rate = media.read_whole_sound(tmp_path / "a.m4a")
    assert rate == 48000
    assert len(alone) >= len(audio)
    assert len(alone) % 1024 == 0  # whole frames of AAC, and nothing behind them


def test_a_sound_without_picture_shows_itself():
    shown = media.Clip(np.zeros((0, 0, 0, 3), np.uint8), 24.0, np.zeros((8, 2), np.float32))
    assert shown._repr_html_().startswith("<audio controls")
    assert shown.duration == 8 / 16000


@pytest.mark.parametrize("size", [(48, 64), (24, 32), (96, 128), (32, 64), (48, 16), (40, 40)])
def test_a_picture_covers_a_size_from_its_middle(size):
    """A plane stays a plane under bilinear scaling, so every value is known."""
    rows, columns = np.mgrid[0:48, 0:64].astype(np.float32)
    image = np.stack([rows, columns, 2 * rows - columns], -1)
    got = covering(image, *size)
    assert got.shape == (*size, 3)
    scale = max(size[0] / 48, size[1] / 64)
    full = [int(np.ceil(round(side * scale, 6))) for side in (48, 64)]
    at = [
        np.clip((np.arange(n) + (f - n) // 2 + 0.5) * side / f - 0.5, 0, side - 1)
        for n, f, side in zip(size, full, (48, 64), strict=True)
    ]
    y, x = np.meshgrid(*at, indexing="ij")
    np.testing.assert_allclose(got, np.stack([y, x, 2 * y - x], -1), atol=1e-3)
