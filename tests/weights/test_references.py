"""What names a released file tells it from others without reading all of it."""

import pytest

from ltx2_jax.errors import UserError
from ltx2_jax.weights import references
from ltx2_jax.weights.tensor_files import read_metadata

MB = 2**20


@pytest.fixture
def folder(tmp_path):
    """Five megabytes, and a folder in a folder."""
    (tmp_path / "gemma" / "words").mkdir(parents=True)
    (tmp_path / "gemma" / "words" / "a.json").write_text("{}")
    (tmp_path / "gemma" / "b.json").write_text("[]")
    (tmp_path / "large").write_bytes(bytes(5 * MB))
    return tmp_path


@pytest.mark.parametrize("at", [0, MB - 1, 5 * MB // 2, 4 * MB, 5 * MB - 1])
def test_another_start_middle_or_end_is_another_file(at, folder):
    before = references.fingerprint(folder / "large")
    content = bytearray(5 * MB)
    content[at] = 1
    (folder / "large").write_bytes(content)
    assert references.fingerprint(folder / "large") != before


def test_a_longer_file_is_another_one(folder):
    before = references.fingerprint(folder / "large")
    (folder / "large").write_bytes(bytes(5 * MB + 1))
    assert references.fingerprint(folder / "large") != before


def test_a_folder_is_all_its_files_and_their_names(folder):
    gemma = folder / "gemma"
    found = [references.fingerprint(gemma)]
    (gemma / "words" / "a.json").write_text("{} ")
    found.append(references.fingerprint(gemma))
    (gemma / "b.json").rename(gemma / "c.json")
    found.append(references.fingerprint(gemma))
    assert len(set(found)) == 3


def test_a_reference_leads_to_its_files_as_long_as_they_are_the_same(folder):
    path = folder / "encoder.safetensors"
    references.write(path, "kind", [folder / "large", folder / "gemma"], length="3")
    metadata = read_metadata(path)
    assert (metadata["kind"], metadata["length"]) == ("kind", "3")
    assert references.follow(path, metadata) == [folder / "large", folder / "gemma"]
    with pytest.raises(UserError, match=r"damaged .*; run prepare again"):
        references.follow(path, metadata | {"files": "[1]"})
    (folder / "gemma" / "words" / "a.json").write_text("{} ")
    with pytest.raises(UserError, match="gemma is not the file"):
        references.follow(path, metadata)
