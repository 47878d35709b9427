"""Colours come out as those that the film shows on a screen, whatever its numbers mean."""

import types

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from film import write_film

from ltx2_jax.errors import UserError
from ltx2_jax.media import colour, media
from ltx2_jax.media.picture import to_rgb, with_colours

PQ, HLG = colour.PQ, colour.HLG
HDR = {"codec": "libx265", "options": {"x265-params": "log-level=none", "crf": "4"}}


def level(fraction, bits=10, colours=(512, 512)):
    """A frame of yuv420p10le whose luma is that fraction of the limited range."""
    frame = av.VideoFrame(96, 64, "yuv420p10le")
    for plane, value in zip(frame.planes, (64 + round(fraction * 876), *colours), strict=True):
        plane.update(np.full((plane.height, plane.line_size // 2), value, np.uint16).tobytes())
    return frame


def tagged(matrix=2, primaries=2, transfer=2, full=False):
    return {
        "colorspace": matrix,
        "color_primaries": primaries,
        "color_trc": transfer,
        "color_range": 2 if full else 1,
    }


def test_pq_and_hlg_have_their_published_values():
    """ITU-R BT.2408-7 table 1: code values of reference white and grey on 1000 cd/m2."""
    pq = {0.0: 0.0, 0.508: 100, 0.58: 203, 0.7518: 1000, 1.0: 10000}
    np.testing.assert_allclose(colour.pq_light(np.array(list(pq))), list(pq.values()), rtol=0.01)
    np.testing.assert_allclose(colour.pq_code(colour.pq_light(0.3)), 0.3, rtol=1e-9)
    np.testing.assert_allclose(colour.hlg_scene([0.0, 0.5, 1.0]), [0, 1 / 12, 1], atol=1e-6)
    for code, light in ((0.75, 203), (0.38, 26), (1.0, 1000)):
        shown = colour.hlg_display(np.repeat(colour.hlg_scene(code), 3))
        np.testing.assert_allclose(shown, light, rtol=0.02)


def test_the_eetf_keeps_what_is_below_its_knee_and_ends_at_the_target():
    codes = np.linspace(0, 1, 2001)
    mapped = colour.eetf(codes, 1000, 203)
    top, end = colour.pq_code(np.array([1000.0, 203.0]))
    knee = (1.5 * end / top - 0.5) * top  # BT.2390: KS = 1.5 maxLum - 0.5, in units of the source
    np.testing.assert_array_equal(mapped[codes < knee], codes[codes < knee] / top * top)
    assert 87 < colour.pq_light(knee) < 89
    np.testing.assert_allclose(mapped[codes >= top], end, rtol=1e-9)
    assert (np.diff(mapped) >= -1e-12).all()
    slope = np.diff(mapped) / np.diff(codes)
    assert np.abs(np.diff(slope)).max() < 0.01  # no kink at the knee


def test_matrices_between_primaries_are_the_published_ones():
    """ITU-R BT.2087-0 (BT.2020) and CSS Color 4 (Display P3)."""
    bt2020 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    np.testing.assert_allclose(colour.to_bt709(9), bt2020, atol=2e-4)
    p3 = [[1.2249, -0.2249, 0], [-0.0420, 1.0420, 0], [-0.0197, -0.0786, 1.0983]]
    np.testing.assert_allclose(colour.to_bt709(12), p3, atol=2e-3)
    for code in colour.CHROMATICITIES:
        np.testing.assert_allclose(colour.to_bt709(code).sum(axis=1), 1, atol=1e-9)


@pytest.mark.parametrize(
    ("transfer", "white", "grey"), [(PQ, 0.5807, 0.3782), (HLG, 0.75, 0.38)], ids=["PQ", "HLG"]
)
@pytest.mark.parametrize("primaries", [9, 2])
def test_hdr_becomes_sdr(tmp_path, transfer, white, grey, primaries):
    """BT.2408: reference white, 203 cd/m2; 18 % grey, 26 cd/m2; and the brightest, 1000 cd/m2."""
    top = 0.7518 if transfer == PQ else 1.0
    frames = [level(code) for code in (0.0, grey, white, top)]
    matrix = 9 if primaries == 9 else 2
    write_film(
        tmp_path / "a.mp4",
        frames,
        pix_fmt="yuv420p10le",
        tags=tagged(matrix, primaries, transfer),
        **HDR,
    )
    for size in ({}, {"height": 32, "width": 32}):
        clip = media.read_clip(tmp_path / "a.mp4", **size)
        assert clip.notes == (colour.CONVERTED_HDR,)
        got = clip.video[:, 8:-8, 8:-8].reshape(4, -1).astype(int)
        assert np.ptp(got, axis=1).max() <= 2  # grey stays grey
        # 26 cd/m2 is below the knee: 255 (26 / 203) ** (1 / 2.4). White is rolled off to 160.
        np.testing.assert_allclose(got[:, 0], [0, 108, 231, 255], atol=2)


def test_colours_of_hdr_get_the_primaries_of_bt709(tmp_path):
    """A colour of BT.709, of 80 cd/m2 at most, written as PQ in BT.2020, comes back."""
    light = np.array([80.0, 20.0, 8.0])
    wide = np.linalg.solve(np.array(colour.to_bt709(9)), light)
    code = colour.pq_code(wide)
    luma = code @ [0.2627, 0.6780, 0.0593]
    chroma = (code[2] - luma) / 1.8814, (code[0] - luma) / 1.4746
    frame = level(luma, colours=[512 + round(896 * value) for value in chroma])
    options = {"pix_fmt": "yuv420p10le", "tags": tagged(9, 9, PQ), **HDR}
    write_film(tmp_path / "a.mp4", [frame] * 3, **options)
    got = media.read_clip(tmp_path / "a.mp4").video[1, 32, 48]
    np.testing.assert_allclose(got, 255 * (light / 203) ** (1 / 2.4), atol=3)


@pytest.mark.parametrize("primaries", [9, 12, 11, 4])
def test_wide_primaries_become_bt709(tmp_path, primaries):
    """The same light in other primaries; a colour that BT.709 has comes back."""
    wanted = np.array([200, 120, 60])
    light = (wanted / 255) ** 2.4
    stored = np.linalg.solve(colour.to_bt709(primaries), light) ** (1 / 2.4)
    image = np.broadcast_to(np.rint(stored * 255).astype(np.uint8), (64, 96, 3))
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    matrix, name = (9, "BT2020") if primaries == 9 else (1, "ITU709")
    frame = frame.reformat(format="yuv420p", dst_colorspace=name, dst_color_range="MPEG")
    tags = tagged(matrix, primaries, 1)
    write_film(tmp_path / "a.mp4", [frame] * 3, tags=tags, options={"crf": "2"})
    clip = media.read_clip(tmp_path / "a.mp4")
    np.testing.assert_allclose(clip.video[1, 32, 48], wanted, atol=4)
    assert np.abs(clip.video[1, 32, 48] - image[0, 0].astype(int)).max() > 8
    assert clip.notes == (colour.CONVERTED_GAMUT,)


@pytest.mark.parametrize(
    ("matrix", "name"),
    [(1, "ITU709"), (5, "ITU601"), (6, "ITU601"), (7, "SMPTE240M"), (9, "BT2020")],
)
@pytest.mark.parametrize("full", [False, True])
def test_matrix_and_range_are_those_that_the_file_names(tmp_path, matrix, name, full):
    colours = np.array([[200, 60, 40], [40, 180, 70], [50, 60, 200], [128, 128, 128]], np.uint8)
    frames = []
    for value in colours:
        image = np.broadcast_to(value, (64, 96, 3)).copy()
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        to = {"dst_colorspace": name, "dst_color_range": "JPEG" if full else "MPEG"}
        frames.append(frame.reformat(format="yuv444p", **to))
    tags = tagged(matrix, 2, 2, full)
    write_film(tmp_path / "a.mp4", frames, pix_fmt="yuv444p", tags=tags, options={"crf": "1"})
    for size in ({}, {"height": 32, "width": 32}):
        video = media.read_clip(tmp_path / "a.mp4", **size).video[:, 16, 16]
        np.testing.assert_allclose(video, colours, atol=3)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"transfer": 8}, r"transfer function \(linear light\)"),
        ({"transfer": 9}, r"transfer function \(logarithmic\)"),
        ({"transfer": 17}, "transfer function"),
        ({"matrix": 8}, r"matrix from RGB to YUV \(code 8"),
        ({"matrix": 14}, r"matrix from RGB to YUV \(code 14"),
        ({"primaries": 10}, r"primaries \(code 10"),
    ],
)
def test_colours_that_no_rule_turns_into_sdr_are_refused(tmp_path, tags, message):
    frames = [level(0.5)] * 3
    options = {"pix_fmt": "yuv420p10le", "tags": tagged(**tags), **HDR}
    write_film(tmp_path / "a.mkv", frames, **options)
    with pytest.raises(UserError, match=rf"a\.mkv: its {message}"):
        media.read_clip(tmp_path / "a.mkv")


def test_dolby_vision_that_only_its_players_can_show_is_refused():
    frame = level(0.5)

    class Marked:
        side_data = types.MappingProxyType({"DOVI_METADATA": b""})

        def __getattr__(self, name):
            return getattr(frame, name)

    with pytest.raises(UserError, match="Dolby Vision"):
        to_rgb(Marked(), None, None, VideoReformatter())
    assert to_rgb(frame, None, None, VideoReformatter())[0].shape == (64, 96, 3)


def test_what_the_container_says_of_colours_holds_where_the_codec_is_silent(tmp_path):
    """The frames of this ProRes do not say it; its .mov does."""
    options = {"codec": "prores_ks", "pix_fmt": "yuv422p10le", "tags": tagged(9, 9, PQ)}
    path = write_film(tmp_path / "a.mov", [level(0.5807)] * 3, **options)
    with av.open(str(path)) as container:
        assert int(next(container.decode(video=0)).color_trc) == colour.UNSPECIFIED
    clip = media.read_clip(path)
    assert clip.notes == (colour.CONVERTED_HDR,)
    np.testing.assert_allclose(clip.video[1, 32, 48], 231, atol=2)


@pytest.mark.parametrize("size", [{}, {"height": 32, "width": 32}])
def test_deep_pictures_are_as_bright_as_they_say(tmp_path, size):
    frames = [level(value) for value in (0.0, 0.25, 0.5, 0.75, 1.0)]
    write_film(tmp_path / "a.mp4", frames, pix_fmt="yuv420p10le", tags=tagged(1, 1, 1), **HDR)
    clip = media.read_clip(tmp_path / "a.mp4", **size)
    np.testing.assert_allclose(clip.video[:, 16, 16, 1], [0, 64, 128, 191, 255], atol=1)
    assert clip.notes == ()


def test_what_a_picture_says_of_its_colours_comes_before_the_word_of_the_container():
    names = ("color_primaries", "color_trc", "colorspace", "color_range")
    context = types.SimpleNamespace(**dict.fromkeys(names, 1))
    said, unsaid = ((9, 16, 9, 2), (2, 2, 2, 0))
    frames = [types.SimpleNamespace(**dict(zip(names, c, strict=True))) for c in (said, unsaid)]
    found = [tuple(vars(frame).values()) for frame in with_colours(frames, context)]
    assert found == [said, (1, 1, 1, 1)]
