"""Files of clips are told apart without being read whole."""

import os

from ltx2_jax.media.clip_files import fingerprints

KIB_64 = 2**16


def test_films_are_told_apart_by_their_size_and_their_beginning_middle_and_end(tmp_path):
    size, found = 10 * KIB_64, []
    for place in (None, 0, KIB_64 - 1, size // 2, size - KIB_64, size - 1):
        data = bytearray(size)
        if place is not None:
            data[place] = 1
        (tmp_path / f"{place}.mp4").write_bytes(data)
        found += fingerprints([tmp_path / f"{place}.mp4"])
    (tmp_path / "longer.mp4").write_bytes(bytes(size + 1))
    (tmp_path / "empty.mp4").write_bytes(b"")
    found += fingerprints([tmp_path / "longer.mp4", tmp_path / "empty.mp4"])
    assert None not in found
    assert len(set(found)) == len(found)


def test_a_copy_has_the_fingerprint_of_its_film_and_what_cannot_be_read_has_none(tmp_path):
    for name in ("a.mp4", "copy.mp4"):
        (tmp_path / name).write_bytes(b"1234")
    os.utime(tmp_path / "copy.mp4", (0, 0))
    names = ["a.mp4", "gone.mp4", "", "copy.mp4"]
    first, *none, last = fingerprints(tmp_path / name for name in names)
    assert first == last
    assert none == [None, None]
