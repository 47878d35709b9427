"""What is refused before any long work starts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from resume_config import get_config

from ltx2_jax.config import CheckConfig, Condition, FlowConfig, StreamConfig
from ltx2_jax.data.records import RecordWriter
from ltx2_jax.data.schema import Field, Schema
from ltx2_jax.errors import UserError
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import checks


def test_records_of_odd_size_are_refused_before_the_training_that_ends_in_an_mp4():
    fields = {"video": np.zeros((5, 3, 2, 8)), "audio": np.zeros((11, 1, 8))}
    schema = Schema(
        **dict.fromkeys(("release", "text", "text_release", "codec", "codec_hash"), ""),
        **dict.fromkeys(("text_encoder", "text_encoder_hash"), ""),
        **{"num_frames": 9, "height": 33, "width": 16, "fps": 8.0},
        fields={name: Field.of(value) for name, value in fields.items()},
    )
    with pytest.raises(UserError, match=r"a/set: .* even sizes; height 33 x width 16 is not"):
        checks.check_schema(get_config(), schema, Path("a/set"))


def test_a_run_that_is_lost_says_which_checkpoint_to_remove_if_that_is_at_fault():
    def check(step, **values):
        good = {"loss": 1.0, "grad_norm": 1.0, "video_loss_quarters_1": float("nan")}
        checks.check_finite(good | values, step, 40, Path("run/checkpoints"))

    check(41)
    with pytest.raises(UserError, match=r"loss is nan at step 41, .* remove run/checkpoints/40, "):
        check(41, loss=float("nan"))
    with pytest.raises(UserError, match=r"grad_norm is inf at step 42: lower optim.learning_rate"):
        check(42, grad_norm=float("inf"))


def test_the_checker_of_a_tpu_is_refused_where_there_is_none():
    config = replace(get_config(), check=CheckConfig(sdc_every=100))
    with pytest.raises(UserError, match=r"^check\.sdc_every: .* no TPU is here$"):
        checks.check_alone(config, make_mesh(devices=jax.devices()[:1]))


def schema_of(**shapes):
    """A dataset of clips of 9 frames, 32 rows and 32 columns with fields of these shapes."""
    text = {"video_text": (16, 24), "audio_text": (16, 16), "text_mask": (16,)}
    fields = {name: Field("float32", shape) for name, shape in (shapes | text).items()}
    return Schema(
        **dict.fromkeys(("codec", "codec_hash", "text_encoder", "text_encoder_hash"), ""),
        **{"release": "linear", "text": "features", "text_release": "random"},
        **{"num_frames": 9, "height": 32, "width": 32, "fps": 8.0},
        fields=fields,
    )


VIDEO, AUDIO = {"video": (5, 4, 4, 8)}, {"audio": (11, 1, 8)}
REFERENCE = StreamConfig(conditions=(Condition("reference"),))


def of_streams(*streams):
    return replace(get_config(), flow=FlowConfig(*streams))


def test_a_dataset_needs_the_streams_that_a_mode_runs_and_no_other():
    alone = of_streams(StreamConfig("absent"), StreamConfig())
    checks.check_schema(alone, schema_of(**AUDIO), Path("a/set"))
    with pytest.raises(UserError, match=r"a/set: flow.video.role=generated: there is no video"):
        checks.check_schema(get_config(), schema_of(**AUDIO), Path("a/set"))
    with pytest.raises(UserError, match=r"latents have 8 audio channels, but model.audio_in"):
        checks.check_schema(
            replace(alone, model=replace(alone.model, audio_in_channels=9)),
            schema_of(**AUDIO),
            Path("a/set"),
        )


def test_a_mesh_divides_the_tokens_of_references_too():
    run = of_streams(REFERENCE)
    schema = schema_of(**VIDEO, **AUDIO, video_reference=(5, 2, 2, 8))  # 80 and 20 tokens
    records = SimpleNamespace(schema=schema, folder=Path("a/set"))
    checks.check_records(run, records, make_mesh(2, 1, 4))
    with pytest.raises(UserError, match="sequence=8 does not divide 20 video tokens"):
        checks.check_records(run, records, make_mesh(1, 1, 8))


def test_a_model_that_projects_its_text_takes_one_width_of_both_connectors():
    """That is 2.0, whose own widths of the text are those behind the projection."""
    config = get_config()
    wide = replace(config.text.audio_connector, head_dim=12)
    config = replace(
        config,
        text=replace(config.text, audio_connector=wide),
        model=replace(config.model, caption_channels=24),
        data=replace(config.data, path="a/set"),
    )
    checks.check_text(config)
    with pytest.raises(UserError, match=r"connector is 24 wide .* model\.caption_channels=25"):
        checks.check_text(replace(config, model=replace(config.model, caption_channels=25)))


def test_the_code_of_a_host_is_told_by_names_and_contents_of_its_files(monkeypatch, tmp_path):
    (tmp_path / "training").mkdir()
    monkeypatch.setattr(checks, "__file__", str(tmp_path / "training" / "checks.py"))
    found = []
    for name, text in (("a", "x = 1"), ("a", "x = 2"), ("training/a", "x = 2")):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        found.append(checks._code_hash())
        path.unlink()
    assert len(set(found)) == 3


def test_the_dataset_of_a_host_is_told_by_its_index_and_the_sizes_of_its_shards(
    monkeypatch, tmp_path
):
    said = []
    monkeypatch.setattr(checks.hosts, "count", lambda: 2)
    monkeypatch.setattr(checks.hosts, "same_everywhere", said.append)
    for index, shard in (("{}", b"12"), ("{}", b"123"), ("[]", b"12")):
        (tmp_path / "dataset.json").write_text(index)
        (tmp_path / "data-00000.arrayrecord").write_bytes(shard)
        checks.same_dataset(SimpleNamespace(folder=tmp_path))
    (first, larger, other) = said
    size = "the size of data-00000.arrayrecord"
    assert [values[size] for values in said] == ["2", "3", "2"]
    index = "the index of the dataset"
    assert first[index] == larger[index] != other[index]


def test_references_of_all_sizes_of_a_dataset_are_looked_at():
    run = of_streams(REFERENCE)
    first = schema_of(**VIDEO, **AUDIO, video_reference=(5, 2, 2, 8))
    checks.check_schema(run, first, Path("a/set"))
    other = schema_of(**VIDEO, **AUDIO, video_reference=(5, 4, 4, 8)).buckets
    with pytest.raises(UserError, match=r"several factors \(space, time\), \[\(1, 1\), \(2, 1\)\]"):
        checks.check_schema(run, replace(first, others=other), Path("a/set"))
    other = schema_of(**VIDEO, **AUDIO).buckets
    with pytest.raises(UserError, match="no field 'video_reference' in its records"):
        checks.check_schema(run, replace(first, others=other), Path("a/set"))


def test_a_damaged_dataset_is_refused_before_any_long_work(tmp_path):
    """Its index and its shards have the sizes they should; only a record that is read tells."""
    fields = {"video": (5, 4, 4, 8), "audio": (11, 1, 8)}
    schema = schema_of(**fields)
    with RecordWriter(tmp_path / "set") as writer:
        writer.start(schema)
        for _ in range(2):
            values = {k: np.zeros(x.shape, x.dtype) for k, x in schema.fields.items()}
            writer.write(values)
    run = get_config()
    run = replace(run, data=replace(run.data, path=str(tmp_path / "set"), batch_size=1))
    mesh = make_mesh(devices=jax.devices()[:1])
    checks.check_data(run, mesh)
    shard = tmp_path / "set" / "data-00000-of-00001.arrayrecord"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrayrecord: damaged shard"):
        checks.check_data(run, mesh)
