"""How many clips make a batch, what is said of a size, and which rows this host has of it."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from ltx2_jax.config import Condition, DataConfig, FlowConfig, StreamConfig, ValidationConfig
from ltx2_jax.data.mixtures import Mixture
from ltx2_jax.data.order import Order
from ltx2_jax.data.schema import BucketFields, Field
from ltx2_jax.errors import UserError
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import examples
from ltx2_jax.training.batch import batches_of
from ltx2_jax.training.examples import Examples, batch_size, names_of


def bucket(frames=9, fps=24.0, **shapes):
    fields = {name: Field("float32", shape) for name, shape in shapes.items()}
    return BucketFields(frames, 32 if frames else 0, 48 if frames else 0, fps, fields)


VIDEO, AUDIO = (2, 4, 5, 8), (10, 1, 16)  # 40 and 10 tokens
CLIP, SILENT = bucket(video=VIDEO, audio=AUDIO), bucket(video=VIDEO)
SOUND, FAST = bucket(0, 0.0, audio=AUDIO), bucket(video=VIDEO, audio=(9, 1, 16), fps=25.0)


def config(tokens, flow=None, clips=2):
    data = dataclasses.replace(tiny.config().data, batch_tokens=tokens, batch_size=clips)
    return tiny.config(data=data, flow=flow or FlowConfig())


class Set:
    """A dataset of so many records of each size."""

    def __init__(self, folder, sizes):
        self.folder, self.buckets = folder, np.repeat(range(len(sizes)), list(sizes.values()))
        self.schema = SimpleNamespace(
            **dict.fromkeys(["release", "codec_hash", "text_release", "text_encoder_hash"], ""),
            buckets=[CLIPS[name] for name in sizes],
        )

    def __len__(self):
        return len(self.buckets)


CLIPS = {"clip": CLIP, "silent": SILENT, "sound": SOUND, "fast": FAST}


def test_batches_are_of_as_many_clips_as_the_model_reads_tokens_of():
    size = batch_size(config(400))
    assert [size(clips) for clips in CLIPS.values()] == [8, 10, 40, 8]
    assert batch_size(config(None)) == 2
    # A stream that is absent is not read; a reference is, beside the clip.
    alone = batch_size(config(400, FlowConfig(audio=StreamConfig(role="absent"))))
    assert alone(CLIP) == alone(SILENT) == 10
    given = FlowConfig(video=StreamConfig(conditions=(Condition("reference"),)))
    both = bucket(video=VIDEO, audio=AUDIO, video_reference=VIDEO)
    assert batch_size(config(400, given))(both) == 4
    assert batch_size(config(400))(both) == 8


def test_a_size_without_a_batch_is_named_with_its_dataset():
    mesh = make_mesh(devices=jax.devices()[:1])
    data = Mixture([Set("a", {"sound": 3}), Set("b", {"sound": 1, "silent": 1})], [0.5, 0.5])
    with pytest.raises(
        UserError,
        match=r"^b: data.batch_tokens=79: data.batch_size=2 clips of 48x32x9 have 80 tokens, a "
        "batch has 79; give more tokens, or a smaller data.batch_size",
    ):
        Examples(config(79), data, mesh)
    assert len(Examples(config(80), data, mesh).kinds) == 3


def test_sizes_have_names_that_tell_them_apart():
    names = names_of([CLIP, SILENT, SOUND, CLIP])
    assert list(names.values()) == ["48x32x9", "48x32x9-silent", "sound-10"]
    other = bucket(video=VIDEO, audio=AUDIO, video_mask=VIDEO[:3])
    names = names_of([CLIP, FAST, other, SILENT])
    assert [names[x.key] for x in (CLIP, FAST, other)] == [
        "48x32x9-24fps", "48x32x9-25fps", "48x32x9-24fps-2",
    ]  # fmt: skip
    assert names[SILENT.key] == "48x32x9-silent"


def test_a_step_is_known_by_its_size_and_dataset_and_rows_before_it_is_read():
    mesh = make_mesh(devices=jax.devices()[:2])
    data = Mixture([Set("a", {"clip": 3, "silent": 2}), Set("b", {"clip": 9})], [0.5, 0.5])
    run = dataclasses.replace(config(400), seed=5)
    examples, order = Examples(run, data, mesh), Order(data, batch_size(run), run.seed, True)
    seen = set()
    for step in range(40):
        share, (kind, rows, _) = examples.share(step), order.batch(step)
        assert share.size == len(rows)
        assert share.numbers == tuple(range(share.size))  # of the only host
        assert share.labels["dataset"] == kind.source.folder
        seen.add((*share.labels.values(), share.size))
    assert seen == {("a", "48x32x9", 8), ("a", "48x32x9-silent", 10), ("b", "48x32x9", 8)}
    shapes = {tuple(sorted((k, x.shape) for k, x in b.items()))
              for b in batches_of(examples.kinds, mesh)}  # fmt: skip
    # Datasets share the program of a size that both have.
    assert shapes == {(("audio", (8, *AUDIO)), ("video", (8, *VIDEO))), (("video", (10, *VIDEO)),)}
    # What is the same in every step is not said in every row.
    assert Examples(run, Set("a", {"clip": 3}), mesh).share(0).labels == {}
    alone = Examples(run, Set("a", {"clip": 3, "silent": 2}), mesh)
    assert {tuple(alone.share(step).labels) for step in range(9)} == {("bucket",)}


def test_datasets_of_buckets_are_read_from_their_copies(monkeypatch):
    monkeypatch.setattr(examples, "local_dataset", lambda path, cache: f"{cache}/{path[5:]}")
    held_out = ValidationConfig(every=1, path="gs://b/held_out")
    one = tiny.config(data=DataConfig(path="gs://a/set", cache="/disk"), validation=held_out)
    here = examples.with_data_here(one)
    assert (here.data.path, here.validation.path) == ("/disk/a/set", "/disk/b/held_out")
    mixture = (("gs://a/set", 0.25), ("gs://c/set", 0.75))
    several = tiny.config(data=DataConfig(mixture=mixture, cache="/disk"))
    found = examples.with_data_here(several).data.mixture
    assert found == (("/disk/a/set", 0.25), ("/disk/c/set", 0.75))
    assert examples.with_data_here(tiny.config()) == tiny.config()
