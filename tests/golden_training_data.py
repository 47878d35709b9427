"""Runners for the golden training cases of datasets: files, folders of them, buckets."""

import hashlib
import math
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from golden_case import Case

from ltx2_jax.data.buckets import (
    Bucket,
    choose_bucket,
    parse_buckets,
    reference_frames,
    smaller_bucket,
)
from ltx2_jax.data.loader import make_dataset
from ltx2_jax.data.precomputed import Precomputed, official_entries
from ltx2_jax.data.torch_files import Tensor, read_entries, read_pt, write_pt
from ltx2_jax.errors import UserError


def run_precomputed(case: Case):
    return _file(case) if "file" in case.args else _dataset(case)


def run_preprocess(case: Case):
    {"bucket_choice": _choice, "bucket_text": _texts}[case.name.split("/")[1]](case)


def _file(case: Case):
    """Every entry of a file, in order, as stored; and it is written again as it was."""
    path = case.folder / case.args["file"]
    entries, wanted = read_entries(path), case.data["entries"]
    assert list(entries) == list(wanted)
    for name, want in wanted.items():
        value = entries[name]
        if "python" in want:
            assert (type(value).__name__, value) == (want["python"], want["value"])
        else:
            assert value.offset == want["storage_offset"]
            assert value.storage.count == want["storage_elements"]
            assert value.strides == tuple(want["stride"])
            _check_array(value.array(), want)
    tensors = [value for value in entries.values() if isinstance(value, Tensor)]
    storages = {id(tensor.storage) for tensor in tensors}
    assert (len(storages) < len(tensors)) == case.data["tensors_share_storage"]

    # An array for each storage, so that what was shared is again.
    arrays = {id(tensor.storage): tensor.array() for tensor in tensors}
    again = {k: arrays[id(v.storage)] if isinstance(v, Tensor) else v for k, v in entries.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_pt(Path(folder) / path.name, again)
        ours, theirs = _zip(Path(folder) / path.name), _zip(path)
    assert list(ours) == list(theirs)
    assert next(iter(ours)).split("/")[0] == case.data["zip_folder"]
    # Of a view only what is seen is written; and strides of axes of size 1 are a matter of taste.
    if all(_plain(tensor) for tensor in tensors):
        del ours[f"{path.name}.tmp/.data/serialization_id"]
        assert ours.items() <= theirs.items()

    got = read_pt(path)
    cuts = {name: v["slices"] for name, v in case.spec.get("subsample", {}).items()}
    outputs = {}
    for name in case.spec["outputs"]:
        cut = [slice(*part) if part else slice(None) for part in cuts.get(name, [])]
        outputs[name] = got[name][tuple(cut)].astype(np.float64)
    return outputs


def _plain(tensor: Tensor) -> bool:
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
    return tensor.storage.count == math.prod(tensor.shape) and list(tensor.strides) == strides


def _check_array(array: np.ndarray, want: dict):
    assert array.dtype.name == want["dtype"]
    assert array.shape == tuple(want["shape"])
    assert hashlib.sha1(array.tobytes()).hexdigest() == want["sha1"]


def _zip(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        return {info.filename: file.read(info) for info in file.infolist()}


def _dataset(case: Case):
    """Which samples a choice of folders has; the first one; a batch of it twice."""
    root = case.folder / case.args["root"]
    strides = 8, 32, 32
    sources, data = case.args["data_sources"], case.data
    for folder in (root, root / ".precomputed"):
        dataset = Precomputed(folder, list(sources), strides=strides)
        assert len(dataset) == data["count"]
        for source, key in sources.items():
            files = [dataset.file(source, i) for i in range(len(dataset))]
            base = root / ".precomputed" / source
            assert [f.relative_to(base).as_posix() for f in files] == data["files"][key]
    record = dataset[0]
    assert record["id"] == data["first"]["idx"]
    (batch,) = make_dataset([record, record], batch_size=2, seed=0, num_steps=1, threads=0)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(2)]
    for official in map(official_entries, (record, *rows)):
        for source, key in sources.items():
            _check_entries(official[source], data["first"][key])
    outputs = case.spec["outputs"]
    return {
        name: np.moveaxis(dataset[int(name.split("_")[1])]["video"], -1, 0).astype(np.float64)
        for name in outputs
    }


def _check_entries(got: dict, wanted: dict):
    for name, want in wanted.items():
        if name == "duration":  # the sound's before it was cut into latents: not in a record
            continue
        older = {"prompt_embeds": "video_prompt_embeds"}
        value = got[older.get(name, name)]
        if isinstance(want, dict):
            if want["dtype"] == "bool":
                value = value.astype(bool)
            _check_array(value, want)
        else:
            assert value == pytest.approx(want, rel=1e-6)


def _choice(case: Case):
    buckets = [Bucket(*sizes) for sizes in case.args["buckets"]]
    for row in case.data["rows"]:
        clip = row["frames"], row["height"], row["width"]
        if row["bucket"] == "error":
            with pytest.raises(UserError):
                choose_bucket(buckets, *clip)
        else:
            assert choose_bucket(buckets, *clip) == tuple(row["bucket"]), row


def _texts(case: Case):
    data = case.data
    for row in data["parse"]:
        if row["buckets"] == "error":
            with pytest.raises(UserError):
                parse_buckets(row["text"])
        else:
            assert parse_buckets(row["text"]) == tuple(Bucket(*b) for b in row["buckets"])
    for row in data["reference_buckets"]:
        if row["scaled"] == "error":
            with pytest.raises(UserError):
                smaller_bucket(Bucket(*row["bucket"]), row["factor"])
        else:
            assert [list(smaller_bucket(Bucket(*row["bucket"]), row["factor"]))] == row["scaled"]
    for row in data["reference_frames"]:
        assert list(reference_frames(row["frames"], row["factor"])) == row["indices"]
