"""Latent shapes, token order and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltx2_jax.diffusion import geometry
from ltx2_jax.errors import UserError


def test_latent_shape_of_a_five_second_clip():
    assert geometry.video_latent_shape(121, 512, 768) == (16, 16, 24)
    assert geometry.video_latent_shape(1, 64, 64) == (1, 2, 2)
    assert geometry.video_latent_shape(25, 32, 32, strides=(4, 8, 8)) == (7, 4, 4)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((120, 512, 768), r"num_frames=120 is not 8\*k\+1: use 113 or 121"),
        ((0, 512, 768), r"num_frames=0 .* use 1$"),
        ((121, 500, 768), r"height=500 is not a multiple of 32: use 480 or 512"),
        ((121, 512, 20), r"width=20 is not a multiple of 32: use 32$"),
    ],
)
def test_an_illegal_size_names_its_legal_neighbours(size, message):
    with pytest.raises(UserError, match=message):
        geometry.video_latent_shape(*size)


def test_audio_length_rounds_halves_to_even():
    assert geometry.audio_latent_length(121, 24.0) == 126
    assert geometry.audio_latent_length(25, 23.976) == 26
    assert geometry.audio_latent_length(1, 10.0) == 2  # 2.5
    assert geometry.audio_latent_length(3, 50.0) == 2  # 1.5
    assert geometry.audio_latent_length(25, 12.0, latents_per_second=50) == 104
    with pytest.raises(UserError, match="fps=0"):
        geometry.audio_latent_length(9, 0.0)


def test_frame_helpers_stay_on_the_grid():
    assert [geometry.snap_frames(f) for f in (1, 8, 9, 16, 120, 121)] == [1, 1, 9, 9, 113, 121]
    assert geometry.seconds_to_frames(3.21, 24.0) == 73
    assert geometry.seconds_to_frames(0.01, 25.0, 5, 100) == 9  # the least legal count above 5
    assert geometry.seconds_to_frames(99.0, 30.0, 1, 260) == 257
    assert geometry.evenly_spaced_keyframes(3, 121) == [30, 60, 90]
    assert geometry.evenly_spaced_keyframes(0, 9) == []
    with pytest.raises(UserError, match="between 10 and 16"):
        geometry.seconds_to_frames(1.0, 24.0, 10, 16)
    with pytest.raises(UserError, match="5 keyframes need num_frames >= 7"):
        geometry.evenly_spaced_keyframes(5, 1)


def test_video_tokens_run_time_row_column_and_features_channel_first():
    F, H, W, C = 2, 4, 6, 3
    latents = np.arange(F * H * W * C).reshape(1, F, H, W, C)
    tokens = geometry.patchify_video(latents, patch_size=2)
    assert tokens.shape == (1, F * 2 * 3, C * 4)
    f, h, w, c, dh, dw = 1, 1, 2, 2, 1, 0
    token, feature = (f * 2 + h) * 3 + w, (c * 2 + dh) * 2 + dw
    assert tokens[0, token, feature] == latents[0, f, 2 * h + dh, 2 * w + dw, c]


@pytest.mark.parametrize("patch_size", [1, 2])
def test_unpatchify_inverts_patchify(patch_size):
    latents = jax.random.normal(jax.random.key(0), (2, 3, 4, 6, 5))
    tokens = geometry.patchify_video(latents, patch_size)
    back = geometry.unpatchify_video(tokens, (3, 4, 6), patch_size)
    np.testing.assert_array_equal(back, latents)


def test_audio_features_run_channel_then_bin():
    A, M, C = 3, 16, 8
    latents = np.arange(A * M * C).reshape(1, A, M, C)
    tokens = geometry.patchify_audio(latents)
    assert tokens.shape == (1, A, C * M)
    assert tokens[0, 2, 5 * M + 7] == latents[0, 2, 7, 5]
    np.testing.assert_array_equal(geometry.unpatchify_audio(tokens, bins=M), latents)


def test_video_bounds_follow_the_causal_codec():
    bounds = geometry.pixel_bounds((3, 1, 2))
    np.testing.assert_array_equal(bounds[0, 0, ::2], [[0, 1], [1, 9], [9, 17]])
    np.testing.assert_array_equal(bounds[0, 2, :2], [[0, 32], [32, 64]])
    loose = geometry.pixel_bounds((3, 1, 2), causal=False)
    np.testing.assert_array_equal(loose[0, 0, ::2], [[0, 8], [8, 16], [16, 24]])
    # Latent i > 0 covers pixel frames st*(i-1)+1 .. st*i, whatever the stride.
    np.testing.assert_array_equal(
        geometry.pixel_bounds((3, 1, 1), strides=(4, 8, 8))[0, 0], [[0, 1], [1, 5], [5, 9]]
    )


def test_token_midpoints_in_seconds():
    video = geometry.video_positions((2, 1, 1), 24.0)
    np.testing.assert_allclose(video[0, 0].mean(-1), [1 / 48, 5 / 24], rtol=1e-6)
    audio = geometry.audio_positions(3)
    np.testing.assert_allclose(audio[0, 0].mean(-1), [0.005, 0.03, 0.07], rtol=1e-6)
    assert video.dtype == audio.dtype == np.float32


@pytest.mark.parametrize(("ours", "theirs", "factor"), [(9, 5, 2), (5, 5, 1), (9, 1, 1)])
def test_a_reference_passes_as_many_times_faster_as_it_has_fewer_frames(ours, theirs, factor):
    assert geometry.temporal_factor((ours, 2, 2), (theirs, 2, 2)) == factor


@pytest.mark.parametrize(("ours", "theirs"), [(8, 5), (5, 9), (1, 5)])
def test_a_reference_of_frames_that_do_not_fit_is_refused(ours, theirs):
    with pytest.raises(UserError, match=f"of {theirs} latent frames for a clip of {ours}:"):
        geometry.temporal_factor((ours, 2, 2), (theirs, 2, 2))


def test_audio_bounds_without_gap_and_with_shift():
    bounds = geometry.audio_positions(126)[0, 0]
    np.testing.assert_array_equal(bounds[1:, 0], bounds[:-1, 1])
    np.testing.assert_array_equal(geometry.audio_positions(4, shift=3)[0, 0], bounds[3:7])
    loose = geometry.audio_positions(2, causal=False)[0, 0]
    np.testing.assert_allclose(loose, [[0, 0.04], [0.04, 0.08]], rtol=1e-6)


def test_a_traced_frame_rate_per_clip_gives_the_static_positions():
    shape, fps = (3, 2, 2), np.array([24.0, 12.5], np.float32)
    traced = jax.jit(lambda rate: geometry.video_positions(shape, rate))(jnp.asarray(fps))
    static = geometry.video_positions(shape, fps)
    assert traced.shape == static.shape == (2, 3, 12, 2)
    assert isinstance(static, np.ndarray)
    np.testing.assert_allclose(traced, static, rtol=1e-6)
    for row, rate in zip(static, fps, strict=True):
        np.testing.assert_array_equal(row, geometry.video_positions(shape, rate)[0])


def test_audio_and_video_clocks_agree_over_a_clip():
    frames, fps = 121, 24.0
    shape = geometry.video_latent_shape(frames, 32, 32)
    end_of_video = geometry.video_positions(shape, fps)[0, 0, -1, 1]
    end_of_audio = geometry.audio_positions(geometry.audio_latent_length(frames, fps))[0, 0, -1, 1]
    assert end_of_video == pytest.approx(frames / fps, rel=1e-6)
    assert abs(end_of_audio - end_of_video) < 0.04  # one audio latent
