"""The training-free codec: geometry, exactness of the linear part, sound that keeps its timing."""

import json
from dataclasses import dataclass, replace
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from ltx2_jax.demo.config import LinearCodecConfig
from ltx2_jax.demo.linear_codec import LinearCodec, waveform
from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.mel import log_mel

RATE, FPS, FRAMES, SIZE = 16000, 12.0, 13, 16
SAMPLES = round(FRAMES / FPS * RATE)
CONFIG = LinearCodecConfig(video_strides=(4, 8, 8), video_channels=48, audio_channels=32)


@dataclass
class FakeClip:
    video: np.ndarray
    audio: np.ndarray | None
    fps: float = FPS
    sample_rate: int = RATE


def burst(samples: int, start: float, hz: float, seconds: float = 0.2) -> np.ndarray:
    time = np.arange(samples) / RATE - start
    return 0.5 * np.sin(2 * np.pi * hz * time) * (time >= 0) * (time < seconds)


def bouncing_square(index: int) -> FakeClip:
    """A square that moves over a plain ground, with a beep at a random time and pan."""
    draw = np.random.default_rng(index)
    video = np.full((FRAMES, SIZE, SIZE, 3), draw.integers(0, 100, 3), np.uint8)
    colour, (x, y), (dx, dy) = (
        draw.integers(120, 256, 3),
        draw.uniform(0, 11, 2),
        draw.uniform(-2, 2, 2),
    )
    for frame in video:
        frame[int(y) : int(y) + 5, int(x) : int(x) + 5] = colour
        dx, dy = (
            dx * (-1 if not 0 <= x + dx <= 11 else 1),
            dy * (-1 if not 0 <= y + dy <= 11 else 1),
        )
        x, y = x + dx, y + dy
    mono = burst(SAMPLES, draw.uniform(0.05, 0.8), draw.uniform(200, 2000))
    audio = np.stack([mono * draw.uniform(0.3, 1), mono * draw.uniform(0.3, 1)], axis=1)
    return FakeClip(video, audio.astype(np.float32))


@pytest.fixture(scope="module")
def clips() -> list[FakeClip]:
    return [bouncing_square(index) for index in range(48)]


@pytest.fixture(scope="module")
def codec(clips) -> LinearCodec:
    return LinearCodec.fit(CONFIG, clips)


@pytest.fixture(scope="module")
def videos(clips) -> np.ndarray:
    return np.stack([clip.video for clip in clips]) / np.float32(127.5) - 1


@pytest.fixture(scope="module")
def audios(clips) -> np.ndarray:
    return np.stack([clip.audio for clip in clips])


# ---- geometry ------------------------------------------------------------------------------------


def test_shapes_follow_the_strides(codec, videos, audios):
    assert codec.video.strides == (4, 8, 8)
    video = codec.video.encode(videos[:2])
    audio = codec.audio.encode(audios[:2])
    assert video.shape == (2, 4, 2, 2, codec.video.channels)
    assert audio.shape == (2, 27, codec.audio.bins, codec.audio.channels)
    assert video.dtype == audio.dtype == jnp.float32
    assert codec.video.decode(video).shape == (2, FRAMES, SIZE, SIZE, 3)
    assert codec.audio.decode(audio[:1], SAMPLES).shape == (1, SAMPLES, 2)
    assert codec.audio.decode(audio[:1]).shape == (1, 27 * 640, 2)


@pytest.mark.parametrize("fps", [8, 12, 24, 25, 30, Fraction(30000, 1001)])
def test_audio_latents_agree_with_the_frame_count(codec, fps):
    assert codec.audio.latents_per_second == 25.0
    for frames in range(1, 242, 4):
        seconds = Fraction(frames) / fps  # exact: a float moves some halves, 69 / 30 * 25 is one
        samples = round(seconds * RATE)
        assert codec.config.num_audio_latents(samples) == max(1, round(seconds * 25))


def test_the_first_latent_frame_sees_only_the_first_pixel_frame(codec, videos):
    changed = videos[:1].copy()
    changed[:, 1:] = 0.0
    before, after = codec.video.encode(videos[:1]), codec.video.encode(changed)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert np.abs(before[:, 1:] - after[:, 1:]).max() > 0.1


def test_latent_frame_i_sees_pixel_frames_after_its_predecessor(codec, videos):
    # Pixel frames 5..8 belong to latent frame 2.
    changed = videos[:1].copy()
    changed[:, 5:9] = 0.0
    moved = np.abs(codec.video.encode(videos[:1]) - codec.video.encode(changed))
    assert (moved.max(axis=(0, 2, 3, 4)) > 0.1).tolist() == [False, False, True, False]


def test_an_illegal_frame_count_is_cropped(codec, videos):
    cropped = codec.video.encode(videos[:1, :12])
    np.testing.assert_array_equal(cropped, codec.video.encode(videos[:1, :9]))


def test_every_length_has_the_mel_frames_of_its_latents(codec):
    stride = codec.config.mel_frames_per_latent
    for samples in range(1, 4000):
        latents = codec.config.num_audio_latents(samples)
        assert codec.config.mel.num_frames(samples) >= stride * (latents - 1) + 1
    assert codec.audio.encode(np.zeros((1, 960, 2))).shape == (1, 2, 1, 32)  # a latent and a half


def test_a_very_short_waveform_is_one_latent(codec):
    assert codec.audio.encode(np.zeros((1, 100, 2))).shape == (1, 1, 1, 32)
    assert codec.audio.decode(codec.audio.encode(np.zeros((1, 100, 2)))).shape == (1, 640, 2)


# ---- the linear part -----------------------------------------------------------------------------


def test_with_all_components_the_video_comes_back_exactly():
    draw = np.random.default_rng(0)
    noise = [
        FakeClip(draw.integers(0, 256, (9, 8, 8, 3), np.uint8), draw.standard_normal((9000, 2)))
        for _ in range(60)
    ]
    config = replace(CONFIG, video_strides=(2, 4, 4), video_channels=96)
    codec = LinearCodec.fit(config, noise)
    video = np.stack([clip.video for clip in noise]) / np.float32(127.5) - 1
    np.testing.assert_allclose(codec.video.decode(codec.video.encode(video)), video, atol=1e-4)
    assert codec.explained["video"] == pytest.approx(1.0)


def test_the_error_is_the_variance_that_was_dropped(codec, videos):
    # Principal components, checked without eigenvectors: residual energy of the groups is the sum
    # of the singular values that were cut.
    first = np.repeat(videos[:, :1], 4, axis=1)
    groups = np.concatenate([first, videos[:, 1:]], axis=1).reshape(48, 4, 4, 2, 8, 2, 8, 3)
    rows = groups.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 768).astype(np.float64)
    spectrum = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    assert codec.explained["video"] == pytest.approx(spectrum[:48].sum() / spectrum.sum(), rel=1e-6)
    mean, matrix = codec.video.space.decoder
    rebuilt = np.asarray(codec.video.encode(videos)).reshape(-1, 48) @ matrix + mean
    residual = np.square(rebuilt - rows).sum()
    assert residual == pytest.approx(spectrum[48:].sum(), rel=1e-3)


def test_the_first_frame_is_the_mean_of_what_its_latent_says_of_it(codec):
    latents = np.random.default_rng(0).normal(size=(1, 4, 2, 2, 48)).astype(np.float32) / 4
    mean, matrix = codec.video.space.decoder
    copies = (latents[0, 0, 0, 0] @ matrix + mean).reshape(4, 8, 8, 3)
    assert np.abs(copies).max() < 1
    decoded = np.asarray(codec.video.decode(latents))
    np.testing.assert_allclose(decoded[0, 0, :8, :8], copies.mean(axis=0), atol=1e-5)
    assert np.ptp(copies, axis=0).max() > 0.01


def test_decoding_is_close_and_inside_the_pixel_range(codec, videos):
    decoded = codec.video.decode(codec.video.encode(videos))
    assert np.abs(decoded).max() <= 1.0
    assert 10 * np.log10(4 / np.mean((decoded - videos) ** 2)) > 22.0


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_latents_are_centred_with_unit_mean_square(clips, videos, audios, whitening):
    codec = LinearCodec.fit(replace(CONFIG, whitening=whitening), clips)
    video = np.asarray(codec.video.encode(videos)).reshape(-1, 48)
    audio = np.asarray(codec.audio.encode(audios)).reshape(-1, 32)
    for latents in (video, audio):
        np.testing.assert_allclose(latents.mean(axis=0), 0.0, atol=2e-3)
        assert np.mean(latents**2) == pytest.approx(1.0, rel=1e-2)
        falling = latents.std(axis=0)
        spread = falling[0] / falling[-1]
        assert spread == pytest.approx(1.0, rel=0.02) if whitening == 1.0 else spread > 2.0


def test_a_refit_is_bit_identical_and_the_order_of_video_clips_does_not_matter(clips, codec):
    again = LinearCodec.fit(CONFIG, iter(clips))
    for field in ("mean", "basis", "scale"):
        np.testing.assert_array_equal(
            getattr(again.audio.space, field), getattr(codec.audio.space, field)
        )
    turned = LinearCodec.fit(CONFIG, clips[::-1])
    for field in ("mean", "basis", "scale"):
        np.testing.assert_array_equal(
            getattr(turned.video.space, field), getattr(codec.video.space, field)
        )


def test_clips_of_other_sizes_and_without_sound_can_be_mixed_in(clips):
    silent = FakeClip(np.zeros((5, 24, 8, 3), np.uint8), None)
    mono = FakeClip(clips[0].video, clips[0].audio[:, :1])
    assert LinearCodec.fit(CONFIG, [*clips, silent, mono]).explained["audio"] > 0.9


def test_still_and_silent_clips_come_back_as_they_are():
    still = FakeClip(np.full((5, 8, 8, 3), 30, np.uint8), np.zeros((4000, 2), np.float32))
    codec = LinearCodec.fit(CONFIG, [still])
    video = still.video[None] / np.float32(127.5) - 1
    latents = codec.video.encode(video), codec.audio.encode(still.audio[None])
    np.testing.assert_allclose(codec.video.decode(latents[0]), video, atol=1e-5)
    assert np.abs(codec.audio.decode(latents[1])).max() < 1e-6


# ---- sound ---------------------------------------------------------------------------------------


def loudness(mono: np.ndarray) -> np.ndarray:
    """Root mean square over 2 ms."""
    return np.sqrt(np.convolve(mono**2, np.ones(32) / 32, mode="same"))


@pytest.mark.parametrize(("start", "hz"), [(0.3, 440.0), (0.517, 1200.0), (0.7, 250.0)])
def test_a_burst_keeps_its_time_and_pitch(codec, start, hz):
    mono = burst(SAMPLES, start, hz)
    audio = np.stack([mono, 0.5 * mono], axis=1)[None]
    decoded = np.asarray(codec.audio.decode(codec.audio.encode(audio), SAMPLES))[0]
    level = loudness(decoded[:, 0])
    heard = np.argmax(level > 0.25 * level.max()) / RATE
    assert abs(heard - start) <= 0.010
    tone = decoded[round(start * RATE) :][:3200, 0] * np.hanning(3200)
    peak = np.argmax(np.abs(np.fft.rfft(tone, 32768))) * RATE / 32768
    assert abs(peak - hz) < 40.0  # the mel filters are 46 Hz apart or more


def test_the_waveform_of_a_log_mel_has_that_log_mel(audios):
    config = replace(CONFIG, griffin_lim_iterations=60)
    wanted = log_mel(jnp.asarray(audios[:2]), config.mel)
    got = log_mel(waveform(wanted, config, SAMPLES), config.mel)
    loud = np.asarray(wanted) > np.log(1e-2)
    assert np.abs(np.asarray(got - wanted))[loud].mean() < 0.15


def test_silence_stays_silent(codec):
    decoded = codec.audio.decode(codec.audio.encode(np.zeros((1, SAMPLES, 2))), SAMPLES)
    assert np.abs(decoded).max() < 1e-4
    floor = jnp.full((1, 105, 64, 2), np.log(1e-5))
    assert np.abs(waveform(floor, CONFIG, SAMPLES)).max() < 1e-8


def test_a_loud_waveform_is_cut_to_its_range_and_its_last_frame_held_for_one_latent():
    loud = jnp.full((1, 105, 64, 2), 3.0)  # mel frames of 27 latents, which last 27 * 640 samples
    audio = np.abs(waveform(loud, CONFIG, SAMPLES))
    assert audio.max() == 1
    assert audio[:, 26 * 640 + 160 : 27 * 640].max() > 0.1
    assert not audio[:, 27 * 640 :].any()


def test_the_channels_of_a_mono_signal_stay_equal(codec):
    mono = np.stack([burst(SAMPLES, 0.2, 500.0)] * 2, axis=1)[None]
    wanted = log_mel(jnp.asarray(mono, jnp.float32), CONFIG.mel)
    decoded = waveform(wanted, CONFIG, SAMPLES)
    np.testing.assert_allclose(decoded[..., 0], decoded[..., 1], atol=1e-6)


def test_decoding_does_not_depend_on_the_batch(codec, audios):
    latents = codec.audio.encode(audios[:3])
    together = codec.audio.decode(latents)
    np.testing.assert_allclose(together[1:2], codec.audio.decode(latents[1:2]), atol=1e-4)


# ---- files and mistakes --------------------------------------------------------------------------


def test_a_saved_codec_comes_back_whole(codec, videos, audios, tmp_path):
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    loaded = LinearCodec.load(path)
    assert loaded.config == codec.config
    assert loaded.explained == codec.explained
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # readable by others, too
    np.testing.assert_array_equal(loaded.video.encode(videos[:2]), codec.video.encode(videos[:2]))
    np.testing.assert_array_equal(loaded.audio.encode(audios[:2]), codec.audio.encode(audios[:2]))


def test_a_file_that_is_no_codec_is_one_clear_line(codec, tmp_path):
    cases = {}
    cases["missing"] = "no such codec file"
    (tmp_path / "garbage").write_bytes(b"not safetensors at all")
    cases["garbage"] = "not a readable safetensors file"
    save_file({"x": np.zeros(3)}, str(tmp_path / "other"))
    cases["other"] = "kind None"
    codec.save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:5000])
    cases["cut"] = "not a readable safetensors file"
    with safe_open(str(tmp_path / "whole"), framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    newer = {**metadata, "kind": "ltx2_jax.linear_codec.9"}
    save_file(tensors, str(tmp_path / "newer"), metadata=newer)
    cases["newer"] = r"linear_codec\.9, not ltx2_jax\.linear_codec\.1"
    config = json.dumps({**json.loads(metadata["config"]), "wings": 2})
    save_file(tensors, str(tmp_path / "renamed"), metadata={**metadata, "config": config})
    cases["renamed"] = "damaged linear codec"
    del tensors["video.basis"]
    save_file(tensors, str(tmp_path / "partial"), metadata=metadata)
    cases["partial"] = "damaged linear codec"
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            LinearCodec.load(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_bad_input_is_named(codec, clips):
    with pytest.raises(UserError, match=r"height 12 is not a multiple.*8"):
        codec.video.encode(np.zeros((1, 5, 12, 16, 3)))
    with pytest.raises(UserError, match="width 20"):
        codec.video.encode(np.zeros((1, 5, 16, 20, 3)))
    with pytest.raises(UserError, match="F >= 1"):
        codec.video.encode(np.zeros((1, 0, 16, 16, 3)))
    with pytest.raises(UserError, match="empty"):
        codec.audio.encode(np.zeros((1, 0, 2)))
    with pytest.raises(UserError, match="finite"):
        codec.audio.encode(np.full((1, 1000, 2), np.nan))
    with pytest.raises(UserError, match="mono"):
        codec.audio.encode(np.zeros((1, 1000, 6)))
    with pytest.raises(UserError, match="clip 0 has audio at 48000 Hz"):
        LinearCodec.fit(CONFIG, [replace(clips[0], sample_rate=48000)])
    with pytest.raises(UserError, match="no video"):
        LinearCodec.fit(CONFIG, [])
    with pytest.raises(UserError, match="no audio"):
        LinearCodec.fit(CONFIG, [replace(clip, audio=None) for clip in clips])
    with pytest.raises(UserError, match="video_channels 769 is more than the 768"):
        LinearCodec.fit(replace(CONFIG, video_channels=769), clips[:2])


def test_a_config_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="video_strides"):
        LinearCodecConfig(video_strides=(4, 0, 8))
    with pytest.raises(UserError, match="audio_channels 0"):
        LinearCodecConfig(audio_channels=0)
    with pytest.raises(UserError, match="whitening 2"):
        LinearCodecConfig(whitening=2)
