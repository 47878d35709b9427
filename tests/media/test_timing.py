"""Timestamps are looked at before they are believed."""

import av
import numpy as np
import pytest
from film import number, numbered, plain, tone_of, write_film

from ltx2_jax.errors import UserError
from ltx2_jax.media import media
from ltx2_jax.media.sound import PARTLY_SILENT, SILENT, SoundTrack
from ltx2_jax.media.timing import FrameClock, paced, resampled


def join(path, *parts):
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def choose(stamps, fps, rate=10.0, limit=float("inf")):
    """Which of the frames at `stamps` (in seconds) are shown, by `resampled`."""
    frames = ((stamp, index) for index, stamp in enumerate(stamps))
    chosen = resampled(frames, FrameClock(rate), rate, fps, limit)
    return [index for index, count in chosen for _ in range(count)]


@pytest.mark.parametrize("fps", [7.0, 10.0, 24.0, 30.0])
def test_resampling_takes_the_frame_nearest_in_time(fps):
    stamps = 3.0 + np.cumsum(np.random.default_rng(0).uniform(0.02, 0.18, 50))
    chosen = choose(stamps, fps)
    times = np.arange(len(chosen)) / fps
    nearest = np.abs(stamps[:, None] - stamps[0] - times).argmin(axis=0)
    np.testing.assert_array_equal(chosen, nearest)
    assert times[-1] < stamps[-1] - stamps[0] + 0.1 <= times[-1] + 1 / fps


def test_a_varying_rate_and_a_slow_one_are_no_holes():
    assert choose([0, 0.1, 0.2, 0.5, 0.6], 10.0) == [0, 1, 2, 2, 3, 3, 4]
    assert choose([0, 2, 4, 6], 1.0, rate=0.5) == [0, 1, 1, 2, 2, 3, 3, 3]


def test_a_hole_is_named_unless_the_clip_is_complete_before_it():
    stamps = [k / 25 for k in (*range(10), *range(30, 40))]
    with pytest.raises(UserError, match=r"no picture between 0\.36 and 1\.20 s"):
        choose(stamps, 25.0, rate=25.0)
    assert choose(stamps, 25.0, rate=25.0, limit=10) == list(range(10))
    with pytest.raises(UserError, match="no picture between"):
        choose(stamps, 25.0, rate=25.0, limit=11)
    # A rate that is the mean over the hole does not hide it.
    with pytest.raises(UserError, match="no picture between"):
        choose(stamps, 25.0, rate=20 / 1.6)
    with pytest.raises(UserError, match="no picture between"):
        choose(stamps, 25.0, rate=1.0)


def test_the_last_frame_stands_no_longer_than_a_hole_whatever_rate_the_file_states():
    # 0.2 s, and 2 ms by which stamps may be rounded: it ends at 0.282 s, as frame 7 begins.
    assert choose([0, 0.04, 0.08], 25.0, rate=1.0) == [0, 1, *[2] * 6]


def test_stamps_that_run_backwards_are_named_unless_the_clip_is_complete_before():
    stamps = [*np.arange(10) / 10, *np.arange(10) / 10]
    with pytest.raises(UserError, match=r"backwards, from 0\.90 to 0\.00 s"):
        choose(stamps, 10.0)
    assert choose(stamps, 10.0, limit=10) == list(range(10))


def test_frames_without_stamps_follow_at_the_rate():
    assert choose([None] * 5, 10.0) == list(range(5))
    assert choose([2.0, None, None, 2.3, None], 10.0) == list(range(5))
    frames = ((None, index) for index in range(3))
    with pytest.raises(UserError, match="does not say its frame rate"):
        list(paced(frames, FrameClock(0.0), 0.0, 3))


@pytest.mark.parametrize("fps", [None, 25.0])
def test_two_recordings_in_one_file_are_not_taken_for_one(tmp_path, fps):
    """The second begins at zero again, and would lend its sound to the pictures of the first."""
    first = write_film(tmp_path / "a.ts", plain((200, 0, 0), 50), tones=[440], seconds=1.9)
    second = write_film(tmp_path / "b.ts", plain((0, 0, 200), 50), tones=[2000])
    both = join(tmp_path / "both.ts", first, second)
    with pytest.raises(UserError, match=r"both\.ts: its timestamps run backwards.*joined"):
        media.read_clip(both, num_frames=60, fps=fps)
    clip = media.read_clip(both, num_frames=50, fps=fps)
    assert (clip.video[:, 32, 48, 0] > 150).all()
    assert tone_of(clip.audio[4800:80000], 48000) == pytest.approx(440, abs=5)
    assert not clip.audio[94000:].any()


def test_sound_that_starts_anew_within_a_clip_is_refused(tmp_path):
    in_order = {"options": {"bf": "0"}}
    one = write_film(tmp_path / "a.ts", plain(100, 25), tones=[440], **in_order)
    rest = {"stamps": range(25, 100), **in_order}
    two = write_film(tmp_path / "b.ts", plain(100, 75), tones=[2000], **rest)
    with pytest.raises(UserError, match=r"c\.ts: the timestamps of its sound run backwards"):
        media.read_clip(join(tmp_path / "c.ts", one, two), num_frames=75, fps=25.0)


@pytest.mark.parametrize("fps", [None, 25.0, 12.5])
def test_a_picture_that_stands_over_a_hole_is_refused(tmp_path, fps):
    stamps = [*range(50), *range(100, 150)]
    write_film(
        tmp_path / "a.mkv",
        np.tile(numbered(20), (5, 1, 1, 1)),
        stamps=stamps,
        tones=[440],
        seconds=6,
    )
    with pytest.raises(
        UserError, match=r"a\.mkv: frames are missing: no picture between 1\.96 and"
    ):
        media.read_clip(tmp_path / "a.mkv", fps=fps, num_frames=70)
    if fps:
        assert len(media.read_clip(tmp_path / "a.mkv", fps=fps, num_frames=20).video) == 20


def test_a_hole_in_the_sound_is_refused_by_its_seconds(tmp_path):
    in_order = {"options": {"bf": "0"}}
    film = write_film(tmp_path / "a.ts", plain(100, 25), tones=[440], **in_order)
    late = dict(stamps=range(25, 75), tones=[440], sound_start=2.0, seconds=1, **in_order)
    rest = write_film(tmp_path / "b.ts", plain(100, 50), **late)
    both = join(tmp_path / "c.ts", film, rest)
    with pytest.raises(
        UserError, match=r"c\.ts: sound is missing between [01]\.\d+ and [12]\.\d+ s"
    ):
        media.read_clip(both, num_frames=75, fps=25.0)
    assert len(media.read_clip(both, num_frames=25, fps=25.0).audio) == 48000


@pytest.mark.parametrize("shift", [-0.6, 0.6])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts"])
def test_a_stream_that_starts_late_keeps_its_time(tmp_path, suffix, shift):
    """The sound starts `shift` seconds after the picture; before it is silence."""
    path = tmp_path / f"a{suffix}"
    first = round(max(0.0, -shift) * 25)
    stamps = range(first, first + 50)
    write_film(
        path, plain(90, 50), stamps=stamps, tones=[440], seconds=2, sound_start=max(0, shift)
    )
    clip = media.read_clip(path, fps=25.0)
    loud = np.flatnonzero(np.abs(clip.audio[:, 0]) > 0.1) / 48000
    assert loud[0] == pytest.approx(max(0.0, shift), abs=0.03)
    assert loud[-1] == pytest.approx(2.0 + min(0, shift), abs=0.03)
    assert clip.notes == (PARTLY_SILENT,)


def test_a_track_of_silence_is_told_from_one_with_sound(tmp_path):
    for name, silent in (("loud", False), ("silent", True)):
        path = write_film(tmp_path / f"{name}.mp4", plain(90), tones=[440], silent=silent)
        assert media.read_clip(path).notes == ((SILENT,) if silent else ())


def test_pieces_of_sound_go_where_their_stamps_say():
    track = SoundTrack(1000, 1.0)
    ones = np.ones((100, 2), np.float32)
    for piece, time in ((1, None), (2, -0.05), (3, 0.055), (4, None), (5, 0.3)):
        track.place(piece * ones, time)
    got = track.samples[:400, 0]
    # The stamp of the second piece is the first to count; 5 ms are no gap, 50 ms are one.
    expected = np.repeat([2, 3, 4, 0, 5], [50, 100, 100, 50, 100])
    np.testing.assert_array_equal(got, expected)


def test_pieces_of_sound_may_overlap_a_little_and_no_more():
    track, ones = SoundTrack(1000, 1.0), np.ones((200, 2), np.float32)
    track.place(ones, 0.0)
    track.place(2 * ones, 0.15)  # a recorder corrects its clock
    np.testing.assert_array_equal(track.samples[:350, 0], np.repeat([1, 2], [150, 200]))
    with pytest.raises(UserError, match=r"run backwards, from 0\.35 to 0\.20 s"):
        track.place(3 * ones, 0.2)


def test_a_packet_that_holds_nothing_shows_the_frame_before_again(tmp_path):
    """As Theora writes a picture that does not change; libav alone takes it for the end."""
    whole = write_film(tmp_path / "a.mkv", numbered(12), fps=10, codec="mpeg4")
    with av.open(str(whole)) as source, av.open(str(tmp_path / "b.nut"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for index, packet in enumerate(packets):
            if index in (5, 6, 11):
                empty = av.Packet(0)
                empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
                packet = empty
            packet.stream = stream
            target.mux(packet)
    for fps in (None, 10.0):
        clip = media.read_clip(tmp_path / "b.nut", fps=fps)
        assert [number(image) for image in clip.video] == [0, 1, 2, 3, 4, 4, 4, 7, 8, 9, 10, 10]
