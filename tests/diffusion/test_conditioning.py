"""What is given of a stream: which tokens, with which values, strengths, places and marks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltx2_jax.diffusion import conditioning, geometry
from ltx2_jax.errors import UserError

GRID, STRIDES, FPS = (3, 2, 2), (4, 8, 8), 8.0
PLACE = {"fps": FPS, "strides": STRIDES}


def rng(seed=0):
    return np.random.default_rng(seed)


def latents(frames=3, clips=2, seed=0):
    return rng(seed).normal(size=(clips, frames, 2, 2, 5)).astype(np.float32)


def video(**kw):
    return conditioning.of_video(latents(), **PLACE, marked=True, **kw)


def audio(length=8, clips=2):
    return conditioning.of_audio(rng(1).normal(size=(clips, length, 2, 3)).astype(np.float32))


def seconds(conditions, tokens=slice(None)):
    return np.asarray(conditions.positions)[0, 0, tokens]


# ---------------------------------------------------------------------------------------- in place


def test_nothing_is_given_at_first_and_frame_zero_is_marked():
    c = video()
    assert c.strength is None
    np.testing.assert_array_equal(c.marks, np.tile(np.arange(12) < 4, (2, 1)))
    np.testing.assert_array_equal(c.positions, geometry.video_positions(GRID, FPS, STRIDES))
    assert conditioning.of_video(latents(), **PLACE, marked=False).marks is None


def test_frames_are_given_where_they_are_put_and_nothing_else_changes():
    image = latents(1, seed=2)
    c = conditioning.frames(video(), image, 1)
    clean = np.asarray(c.clean).reshape(2, 3, 2, 2, 5)
    np.testing.assert_array_equal(clean[:, 1], image[:, 0])
    np.testing.assert_array_equal(clean[:, ::2], latents()[:, ::2])
    np.testing.assert_array_equal(c.strength, np.tile(np.repeat([False, True, False], 4), (2, 1)))
    assert c.strength.dtype == bool
    last = conditioning.frames(video(), image, -1)
    np.testing.assert_array_equal(last.strength[0], np.repeat([False, False, True], 4))


def test_one_image_is_given_to_all_clips_of_a_batch():
    c = conditioning.frames(video(), latents(1, clips=1, seed=2))
    np.testing.assert_array_equal(c.clean[0, :4], c.clean[1, :4])
    c = conditioning.keyframe(c, latents(1, clips=1, seed=3), 5, **PLACE)
    np.testing.assert_array_equal(c.clean[0, 12:], c.clean[1, 12:])


def test_a_prefix_and_a_suffix_of_a_sound_leave_its_middle():
    tokens = rng(3).normal(size=(2, 3, 6)).astype(np.float32)
    c = conditioning.at(conditioning.at(audio(), tokens, 0), tokens, -3)
    np.testing.assert_array_equal(c.strength[0], [1, 1, 1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(c.clean[:, :3], tokens)
    np.testing.assert_array_equal(c.clean[:, 5:], tokens)


def test_a_suffix_ends_where_the_clip_does_whatever_is_appended():
    c = conditioning.keyframe(video(), latents(1, seed=2), 5, **PLACE)
    c = conditioning.frames(c, latents(1, seed=3), -1)
    np.testing.assert_array_equal(c.strength[0], np.repeat([0, 0, 1, 1], 4))
    np.testing.assert_array_equal(c.clean[:, 8:12], latents(1, seed=3).reshape(2, 4, 5))
    np.testing.assert_array_equal(c.clean[:, 12:], latents(1, seed=2).reshape(2, 4, 5))


def test_strengths_become_numbers_where_one_is_below_one():
    c = conditioning.frames(video(), latents(1, seed=2), 0, 1.0)
    assert c.strength.dtype == bool
    c = conditioning.frames(c, latents(1, seed=3), 2, np.asarray([0.25, 0.5], np.float32))
    want = [[1] * 4 + [0] * 4 + [s] * 4 for s in (0.25, 0.5)]
    assert c.strength.dtype == np.float32
    np.testing.assert_array_equal(c.strength, want)
    assert conditioning.keyframe(c, latents(1), 1, **PLACE).strength.dtype == np.float32


def test_the_further_a_token_is_given_the_less_noise_it_has():
    c = conditioning.frames(video(), latents(1, seed=2), 1, 0.25)
    c = conditioning.frames(c, latents(1, seed=3), 2, 0.75)
    sigma, want = np.float32([0.5, 0.8]), np.repeat([1, 0.75, 0.25], 4)
    found = conditioning.levels(c, sigma)
    np.testing.assert_allclose(found["timesteps"], sigma[:, None] * want, rtol=1e-6)
    np.testing.assert_array_equal(found["sigma"], sigma)
    np.testing.assert_allclose(conditioning.token_levels(c, sigma), found["timesteps"], rtol=1e-6)


def test_noise_is_mixed_with_the_clip_where_nothing_else_is_to_begin_with():
    c, noise = dataclasses.replace(video(), start=None), rng(7).normal(size=(2, 12, 5))
    want = 0.25 * latents().reshape(2, 12, 5) + 0.75 * noise
    np.testing.assert_allclose(conditioning.noised(c, noise, 0.75), want, rtol=1e-5, atol=1e-6)


def test_a_later_stage_starts_from_its_clip_and_from_the_keyframes_that_were_made():
    made = latents(2, seed=4)
    c = conditioning.keyframe_slots(video(), [2, 6], **PLACE, latents=made)
    c = conditioning.started(c, latents(seed=6).reshape(2, 12, 5))
    np.testing.assert_array_equal(c.start[:, :12], latents(seed=6).reshape(2, 12, 5))
    np.testing.assert_array_equal(c.start[:, 12:], made.reshape(2, 8, 5))


def test_clips_of_a_batch_keep_their_own_attention_when_more_is_appended():
    mine = np.repeat(np.float32([[0.25], [0.5]]), 4, axis=1)
    c = conditioning.keyframe(video(), latents(1, seed=2), 1, **PLACE, attention=mine)
    c = conditioning.keyframe(c, latents(1, seed=3), 2, **PLACE, attention=0.75)
    np.testing.assert_array_equal(
        c.attention[:, 0], [[1] * 12 + [s] * 4 + [0.75] * 4 for s in (0.25, 0.5)]
    )


def test_the_clip_by_itself_keeps_what_is_given_and_marked_of_it():
    c = conditioning.frames(video(), latents(1, seed=2), 1, 0.25)
    c = conditioning.without_appended(conditioning.keyframe(c, latents(1), 5, **PLACE))
    np.testing.assert_array_equal(c.strength[0], np.repeat([0, 0.25, 0], 4))
    np.testing.assert_array_equal(c.marks, video().marks)
    assert c.positions.shape[2] == c.clean.shape[1] == 12


def test_a_mask_is_of_the_clip_and_not_of_what_stands_beside_it():
    c = conditioning.keyframe(video(), latents(1, seed=2), 5, **PLACE, strength=0.25)
    c = conditioning.masked(c, np.ones((2, *GRID)))
    np.testing.assert_array_equal(c.strength[0], [1] * 12 + [0.25] * 4)


def test_a_mask_gives_the_clip_where_it_says():
    where = rng(4).integers(0, 2, (2, *GRID))
    other = latents(seed=5)
    c = conditioning.masked(video(), where, other)
    clean = np.asarray(c.clean).reshape(other.shape)
    np.testing.assert_array_equal(clean, np.where(where[..., None] == 1, other, latents()))
    np.testing.assert_array_equal(c.strength, where.reshape(2, -1) == 1)
    shares = conditioning.masked(video(), np.where(where, 0.51, 0.5))
    np.testing.assert_array_equal(shares.strength, c.strength)  # more than half is given
    kept = conditioning.masked(video(), where)
    np.testing.assert_array_equal(kept.clean, video().clean)


def test_a_retake_gives_all_but_the_tokens_that_touch_its_time():
    # Frame 0 lasts from 0 to 1/8 s, frame 1 to 5/8, frame 2 to 9/8.
    for start, end, again in (
        (0.125, 0.5, [False, True, False]),  # it begins where frame 0 ends
        (0.1, 0.5, [True, True, False]),
        (0.7, 2.0, [False, False, True]),
    ):
        c = conditioning.outside_time(video(), start, end)
        np.testing.assert_array_equal(c.strength[1], ~np.repeat(again, 4))
    c = conditioning.outside_time(video(), 0.2, 0.5, strength=0.75)
    np.testing.assert_array_equal(c.strength[1], np.repeat([0.75, 0, 0.75], 4))
    with pytest.raises(UserError, match=r"between 2 and 3 s: the clip ends at 1.125 s"):
        conditioning.outside_time(video(), 2.0, 3.0)


def test_a_retake_does_not_reach_the_tokens_that_were_appended():
    c = conditioning.keyframe(video(), latents(1, seed=2), 9, **PLACE, strength=0.5)
    c = conditioning.outside_time(c, 0.2, 0.5)
    np.testing.assert_array_equal(c.strength[0], [1] * 4 + [0] * 4 + [1] * 4 + [0.5] * 4)


def test_masks_of_pixels_become_means_over_what_is_behind_a_latent():
    pixels = rng(6).uniform(size=(1, 9, 16, 16)).astype(np.float32)
    got = geometry.latent_mask(pixels, GRID)
    np.testing.assert_allclose(got[0, 0, 1, 0], pixels[0, 0, 8:, :8].mean(), rtol=1e-6)
    np.testing.assert_allclose(got[0, 2, 0, 1], pixels[0, 5:9, :8, 8:].mean(), rtol=1e-6)
    assert geometry.latent_mask(pixels, (1, 2, 2)).shape == (1, 1, 2, 2)
    with pytest.raises(UserError, match="9 frames of 16x16 does not divide into 4 of 2x2"):
        geometry.latent_mask(pixels, (4, 2, 2))


def test_a_rectangle_of_pixels_is_cut_to_the_clip():
    inside = geometry.rectangle(GRID, (8, 0, 99, 8), STRIDES)
    np.testing.assert_array_equal(inside[0], [[[False, False], [True, False]]] * 3)
    wide = geometry.rectangle((1, 4, 4), (8, 32, 24, 64), (8, 8, 16))
    np.testing.assert_array_equal(np.argwhere(wide[0, 0]), [[1, 2], [1, 3], [2, 2], [2, 3]])
    with pytest.raises(UserError, match="no latents lie in the region"):
        geometry.rectangle(GRID, (64, 64, 128, 128), STRIDES)


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: conditioning.frames(video(), np.zeros((2, 1, 3, 2, 5))), "3x2 latents do not fit"),
        (lambda: conditioning.frames(video(), latents(2), 2), "8 given tokens at 8 do not fit"),
        (lambda: conditioning.masked(video(), np.ones((2, 2, 2, 2))), "a mask of 8 tokens"),
        (lambda: conditioning.keyframe_slots(video(), [2, 9], **PLACE), "lie within 0 to 8"),
        (lambda: conditioning.keyframe_slots(video(), [-1, 2], **PLACE), "lie within 0 to 8"),
        (lambda: conditioning.keyframe_slots(video(), [5, 2], **PLACE), "must rise"),
        (
            lambda: conditioning.keyframe(video(), latents(1), 1, **PLACE, attention=np.ones(3)),
            "3 attention strengths for 4 tokens",
        ),
    ],
    ids=["size", "too long", "mask", "outside", "before", "order", "attention"],
)
def test_what_does_not_fit_the_clip_is_refused(do, message):
    with pytest.raises(UserError, match=message):
        do()


# ---------------------------------------------------------------------------------------- appended


def test_a_keyframe_lasts_one_pixel_frame_and_a_clip_as_long_as_it_is():
    c = conditioning.keyframe(video(), latents(1, seed=2), 6, **PLACE)
    np.testing.assert_allclose(seconds(c, slice(12, None)), [[6 / 8, 7 / 8]] * 4)
    np.testing.assert_array_equal(c.positions[:, 1:, 12:], c.positions[:, 1:, :4])
    c = conditioning.keyframe(c, latents(2, seed=3), 1, **PLACE)
    np.testing.assert_allclose(seconds(c, [16, 20]), [[1 / 8, 5 / 8], [5 / 8, 9 / 8]])
    assert c.clip_tokens == 12
    begun = conditioning.keyframe(video(), latents(2, seed=3), 0, **PLACE)
    np.testing.assert_allclose(seconds(begun, [12, 16]), [[0, 1 / 8], [1 / 8, 5 / 8]])
    np.testing.assert_array_equal(conditioning.of_clip(c, c.clean), video().clean)
    np.testing.assert_array_equal(c.marks[:, 12:], 0)


def test_clips_of_different_rates_have_keyframes_at_their_own_times():
    place = {"fps": np.asarray([8.0, 16.0]), "strides": STRIDES}
    c = conditioning.of_video(latents(), **place, marked=False)
    c = conditioning.keyframe(c, latents(1), 4, **place)
    np.testing.assert_allclose(np.asarray(c.positions)[:, 0, -1], [[0.5, 0.625], [0.25, 0.3125]])


def test_a_small_slow_reference_covers_the_clip():
    small = rng(7).normal(size=(2, 2, 1, 1, 5)).astype(np.float32)
    c = conditioning.reference_video(video(), small, **PLACE, spatial_scale=2, temporal_scale=2)
    # Its frames of 1 and 4 pixels last twice as long, and end where those of the clip do.
    np.testing.assert_allclose(seconds(c, slice(12, None)), [[0, 1 / 8], [1 / 8, 9 / 8]])
    np.testing.assert_allclose(np.asarray(c.positions)[0, 1:, 12], [[0, 16], [0, 16]])


def test_attention_strengths_hold_between_the_clip_and_what_they_are_of():
    c = conditioning.keyframe(video(), latents(1), 1, **PLACE)
    assert c.attention is None
    by_token = np.asarray([0.1, 0.2, 0.3, 0.4], np.float32)
    c = conditioning.keyframe(c, latents(1), 2, **PLACE, attention=by_token)
    mask = c.attention[0]
    np.testing.assert_array_equal(mask, mask.T)
    np.testing.assert_array_equal(mask[:16, :16], 1)  # those that were there see each other
    np.testing.assert_array_equal(mask[0, 16:], by_token)
    np.testing.assert_array_equal(mask[12:16, 16:], 0)  # but not the new ones
    np.testing.assert_array_equal(mask[16:, 16:], 1)
    grown = conditioning.keyframe(c, latents(1), 3, **PLACE).attention[0]
    np.testing.assert_array_equal(grown[:12, 20:], 1)
    np.testing.assert_array_equal(grown[12:20, 20:], 0)


def test_each_clip_has_attention_strengths_of_its_own():
    by_clip = np.asarray([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]], np.float32)
    c = conditioning.keyframe(video(), latents(1), 2, **PLACE, attention=by_clip)
    np.testing.assert_array_equal(c.attention[:, 0, 12:], by_clip)
    np.testing.assert_array_equal(c.attention[:, 12:, 11], by_clip)


def test_a_sound_to_follow_lies_at_its_own_time_with_its_own_strengths():
    heard = rng(10).normal(size=(2, 3, 2, 3)).astype(np.float32)
    places = np.arange(6, dtype=np.float32).reshape(1, 1, 3, 2) - 9
    c = conditioning.reference_audio(audio(), heard, places, 0.5, 0.25)
    np.testing.assert_array_equal(c.clean[:, 8:], geometry.patchify_audio(heard))
    np.testing.assert_array_equal(c.strength[0], [0] * 8 + [0.5] * 3)
    np.testing.assert_array_equal(c.positions[0, :, 8:], places[0])
    np.testing.assert_array_equal(c.attention[0, 0], [1] * 8 + [0.25] * 3)


def test_keyframes_to_be_generated_are_marked_and_come_back_as_pictures():
    first = latents(2, seed=8)
    c = conditioning.frames(video(), latents(1), 0)
    c = conditioning.keyframe_slots(c, [2, 5], **PLACE, latents=first)
    np.testing.assert_array_equal(c.strength[0], np.arange(20) < 4)
    np.testing.assert_array_equal(c.marks[0], np.isin(np.arange(20) // 4, [0, 3, 4]))
    np.testing.assert_allclose(seconds(c, [12, 16]), [[2 / 8, 3 / 8], [5 / 8, 6 / 8]])
    c = conditioning.keyframe(c, latents(1), 7, **PLACE)
    np.testing.assert_array_equal(conditioning.slots_of(c, c.start), first)
    with pytest.raises(UserError, match="named once"):
        conditioning.keyframe_slots(c, [3], **PLACE)
    assert conditioning.keyframe_slots(video(), [3], **PLACE).strength is None


def test_noise_leaves_what_is_given_and_starts_from_what_is_there():
    noise = rng(9).normal(size=(2, 16, 5)).astype(np.float32)
    c = conditioning.frames(video(), image := latents(1, seed=2), 1)
    c = conditioning.keyframe(c, image, 5, **PLACE, strength=0.75)
    got = np.asarray(conditioning.noised(c, noise, 0.5))
    tokens = image.reshape(2, 4, 5)
    np.testing.assert_array_equal(got[:, 4:8], tokens)
    np.testing.assert_allclose(got[:, :4], (c.clean[:, :4] + noise[:, :4]) / 2, atol=1e-6)
    np.testing.assert_allclose(got[:, 12:], 0.75 * tokens + 0.25 * noise[:, 12:] / 2, atol=1e-6)
    later = conditioning.started(c, -np.asarray(c.clean[:, :12]))
    got = np.asarray(conditioning.noised(later, noise, 0.5))
    np.testing.assert_allclose(got[:, :4], (noise[:, :4] - c.clean[:, :4]) / 2, atol=1e-6)


def test_a_frozen_stream_is_clean_at_every_level():
    c = conditioning.freeze(audio())
    sigma = jnp.asarray([0.3, 0.7])
    level = conditioning.levels(c, sigma)
    assert not level["sigma"].any()
    assert not level["timesteps"].any()
    np.testing.assert_array_equal(conditioning.keep_given(c, jnp.ones((2, 8, 6))), c.clean)


def test_the_level_of_a_token_is_what_its_strength_leaves_of_sigma():
    sigma = jnp.asarray([0.5, 1.0])
    c = conditioning.frames(video(), latents(1), 0)
    want = np.asarray(sigma)[:, None] * (np.arange(12) >= 4)
    np.testing.assert_array_equal(conditioning.token_levels(c, sigma), want)
    assert conditioning.levels(c, sigma)["clean"] is c.strength
    soft = dataclasses.replace(c, strength=c.strength * np.float32(0.25))
    got = conditioning.token_levels(soft, sigma)
    np.testing.assert_allclose(
        got, np.where(np.arange(12) < 4, 0.75, 1) * np.asarray(sigma)[:, None]
    )
    assert conditioning.token_levels(video(), sigma).shape == (2, 1)


def test_conditions_may_be_traced():
    def build(image, strength):
        c = conditioning.of_video(jnp.asarray(latents()), **PLACE, marked=True)
        c = conditioning.frames(c, image, 0, strength)
        c = conditioning.keyframe(c, image, 5, **PLACE, strength=strength, attention=strength)
        return conditioning.keyframe_slots(c, [2], **PLACE)

    image = latents(1, seed=2)
    strength = np.float32(0.5)
    traced = jax.jit(build)(image, strength)
    for a, b in zip(jax.tree.leaves(traced), jax.tree.leaves(build(image, strength)), strict=True):
        np.testing.assert_array_equal(a, b)
