"""The official trainer's config files, rebuilt from what is known of the shipped ones."""

from pathlib import Path

import pytest
import yaml

from ltx2_jax import config as config_lib
from ltx2_jax.config import Condition, StreamConfig, TuneConfig
from ltx2_jax.errors import UserError
from ltx2_jax.training import trainer_yaml

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "golden" / "v2.3" / "checkpoint.safetensors"

FILE = """\
model:
  model_path: "path/to/ltx-2-model.safetensors"
  text_encoder_path: "path/to/gemma-model"
  training_mode: "lora"
  load_checkpoint: null
lora:
  rank: {rank}
  alpha: {rank}
  dropout: 0.0
  target_modules: {targets}
training_strategy:
  name: "flexible"
{streams}
optimization:
  learning_rate: {rate}
  steps: {steps}
  batch_size: 1
  gradient_accumulation_steps: 1
  max_grad_norm: 1.0
  optimizer_type: "{optimizer}"
  scheduler_type: "linear"
  scheduler_params: {{}}
  enable_gradient_checkpointing: true
acceleration:
  mixed_precision_mode: "bf16"
  quantization: {quantization}
  load_text_encoder_in_8bit: {low}
  offload_optimizer_during_validation: {low}
data:
  preprocessed_data_root: "/path/to/preprocessed/data"
  num_dataloader_workers: 2
validation:
  samples:
    - prompt: "a dog"
      conditions: []
  negative_prompt: "worst quality"
  video_dims: [576, 576, 49]
  frame_rate: 25.0
  seed: 42
  inference_steps: 30
  interval: 100
  video_cfg_scale: 4.0
  audio_cfg_scale: 7.0
  video_stg_scale: 1.0
  audio_stg_scale: 1.0
  stg_blocks: [28]
  guidance_rescale: 0.7
  video_modality_guidance_scale: 3.0
  audio_modality_guidance_scale: 3.0
  generate_audio: true
  generate_video: true
  skip_initial_validation: false
checkpoints:
  interval: 250
  keep_last_n: 3
  precision: "bfloat16"
  no_resume: false
  save_training_state: "minimal"
flow_matching:
  timestep_sampling_mode: "shifted_logit_normal"
  timestep_sampling_params: {{}}
hub:
  push_to_hub: false
  hub_model_id: null
wandb:
  enabled: false
  project: "ltx-2-trainer"
  entity: null
  tags: ["ltx2", "lora"]
  log_validation_videos: true
seed: 42
output_dir: "outputs/{mode}"
"""

ALL = ["to_k", "to_q", "to_v", "to_out.0"]


def projections(*modules):
    return [f"{module}.{name}" for module in modules for name in ALL]


PICTURE = projections("attn1", "attn2")
SOUND = [*projections("audio_attn1", "audio_attn2"), "audio_ff.net.0.proj", "audio_ff.net.2"]
VIDEO = {"is_generated": True, "latents_dir": "latents"}
AUDIO = {"is_generated": True, "latents_dir": "audio_latents"}


def given(stream, *conditions):
    return stream | {"conditions": list(conditions)}


FIRST = {"type": "first_frame", "probability": 0.5}
PREFIX = {"type": "prefix", "temporal_boundary": 8, "probability": 1.0}
SUFFIX = {"type": "suffix", "temporal_boundary": 8, "probability": 1.0}
CROP = {"type": "spatial_crop", "spatial_region": [0, 0, 288, 576], "probability": 1.0}
REFERENCE = {"type": "reference", "latents_dir": "reference_latents", "probability": 1.0}
HEARD = {"type": "reference", "latents_dir": "reference_audio_latents", "probability": 1.0}
# Name: video, audio, targets; with a rate of 1e-4 over 2000 steps, but for the last ones.
SHIPPED = {
    "t2v_lora": (VIDEO, AUDIO, ALL),
    "t2v_lora_low_vram": (VIDEO, AUDIO, ALL),
    "i2v_lora": (given(VIDEO, FIRST), AUDIO, ALL),
    "a2v_lora": (VIDEO, AUDIO | {"is_generated": False}, ALL),
    "v2a_lora": (VIDEO | {"is_generated": False}, AUDIO,
                 [*SOUND, *projections("video_to_audio_attn")]),
    "video_extend_lora": (given(VIDEO, PREFIX), AUDIO, ALL),
    "video_suffix_lora": (given(VIDEO, SUFFIX), AUDIO, ALL),
    "video_inpainting_lora": (given(VIDEO, {"type": "mask", "mask_dir": "video_masks"}), None,
                              PICTURE),
    "video_outpainting_lora": (given(VIDEO, CROP), None, PICTURE),
    "v2v_ic_lora": (given(VIDEO, REFERENCE, FIRST | {"probability": 0.2}), None,
                    [*PICTURE, "ff.net.0.proj", "ff.net.2"]),
    "av2av_ic_lora": (given(VIDEO, REFERENCE), given(AUDIO, HEARD), ALL),
    "t2a_lora": (None, AUDIO, SOUND),
    "audio_extend_lora": (None, given(AUDIO, PREFIX), SOUND),
    "audio_suffix_lora": (None, given(AUDIO, SUFFIX), SOUND),
    "audio_inpainting_lora": (None, given(AUDIO, {"type": "mask", "mask_dir": "audio_masks"}),
                              SOUND),
    "a2a_ic_lora": (None, given(AUDIO, HEARD), SOUND),
}  # fmt: skip


def shipped(name: str) -> str:
    """The text of a shipped file."""
    video, audio, targets = SHIPPED[name]
    streams = {"video": video, "audio": audio}
    streams = {key: value for key, value in streams.items() if value is not None}
    text = yaml.safe_dump(streams, sort_keys=False)
    longer = video is None or REFERENCE in video.get("conditions", [])
    low = name == "t2v_lora_low_vram"
    return FILE.format(
        mode=name,
        streams="\n".join("  " + line for line in text.splitlines()),
        targets=targets,
        rank=16 if low else 32,
        rate="2e-4" if longer else "1e-4",
        steps=3000 if longer else 2000,
        optimizer="adamw8bit" if low else "adamw",
        quantization='"int8-quanto"' if low else "null",
        low=str(low).lower(),
    )


def translated(**changes):
    """The config of `t2v_lora` with other values, {"section__key": value}."""
    values = yaml.safe_load(shipped("t2v_lora"))
    for name, value in changes.items():
        *path, last = name.split("__")
        section = values
        for key in path:
            section = section[key]
        section[last] = value
    return trainer_yaml.translate(values, "2.3")[0]


def refused(**changes):
    with pytest.raises(UserError) as error:
        translated(**changes)
    return str(error.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_says_what_the_config_of_its_name_says(name):
    theirs, idle = trainer_yaml.translate(yaml.safe_load(shipped(name)), "2.3")
    mode = name.replace("_lora", "")
    ours = config_lib.load(f"{ROOT}/configs/lora.py:{mode}")
    for field in ("model", "text", "flow", "optim", "tune", "num_steps"):
        assert getattr(theirs, field) == getattr(ours, field), field
    assert theirs.data.batch_size == ours.data.batch_size == 1
    assert theirs.data.release == ours.data.release == "2.3"
    assert theirs.checkpoint.every_steps == ours.checkpoint.every_steps == 250
    assert (theirs.workdir, theirs.seed) == (f"outputs/{name}", 42)
    assert theirs.init_from == "path/to/ltx-2-model.safetensors"
    # What has no meaning here is told by name, with a reason, and nothing that is off.
    assert "validation.interval" in idle
    assert "wandb.enabled" not in idle
    assert theirs.tune.quantize == ("int8" if "low_vram" in name else None)
    assert "acceleration.quantization" not in idle
    assert all(trainer_yaml.IDLE[key] for key in idle)


def test_every_mode_has_a_shipped_file_but_the_one_of_another_trainer():
    names = {name.replace("_lora", "") for name in SHIPPED} | {"t2v_shared_sigma"}
    with pytest.raises(UserError) as error:
        config_lib.load(f"{ROOT}/configs/lora.py:none")
    listed = str(error.value).partition("modes are ")[2].partition(";")[0]
    assert {name.strip().removeprefix(":") for name in listed.split(",")} == names


def test_a_file_is_read_with_its_release_from_its_weights_and_changed_by_flags(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(shipped("i2v_lora").replace("path/to/ltx-2-model.safetensors", str(CHECKPOINT)))
    config = trainer_yaml.load(str(path), {"optim.learning_rate": "3e-4"})
    assert config.text.release == config.data.release == "2.3"
    assert config.model.gated_attention
    assert config.model.num_layers < 48
    assert config.optim.learning_rate == 3e-4
    names = "wandb.tags, wandb.log_validation_videos"
    assert f"{path}: no meaning here have {names}: a run has no" in capsys.readouterr().out
    assert trainer_yaml.load(f"{path}:2.3") == trainer_yaml.load(str(path))
    with pytest.raises(UserError, match=r"is a file of 2.3, not of 2.0"):
        trainer_yaml.load(f"{path}:2.0")


def test_other_configs_are_read_as_before():
    path = f"{ROOT}/configs/quickstart.py"
    assert trainer_yaml.load(f"{path}:ablation") == config_lib.load(f"{path}:ablation")


def test_every_value_arrives():
    config = translated(
        optimization__batch_size=4,
        optimization__gradient_accumulation_steps=2,
        optimization__max_grad_norm="2",
        optimization__scheduler_type="cosine_with_restarts",
        optimization__scheduler_params={"eta_min": "1e-5", "T_mult": 2},
        optimization__enable_gradient_checkpointing=False,
        acceleration__mixed_precision_mode=False,  # what YAML makes of a bare `no`
        lora__rank=8,
        lora__alpha=4,
        lora__dropout=0.1,
        model__load_checkpoint="mine.safetensors",
        flow_matching={"timestep_sampling_mode": "uniform",
                       "timestep_sampling_params": {"max_value": 0.9}},
        checkpoints__keep_last_n=-1,
        validation__inference_steps=8,
        data__num_dataloader_workers=0,
    )  # fmt: skip
    optim, lora = config.optim, config.tune.lora
    assert (config.data.batch_size, optim.accumulate_steps, optim.clip_norm) == (8, 2, 2.0)
    assert (optim.schedule, optim.restart_after, optim.restart_growth) == (
        "cosine_with_restarts", 500, 2,
    )  # fmt: skip
    assert optim.final_fraction == pytest.approx(0.1)
    assert (config.model.remat, config.model.dtype) == ("none", "float32")
    assert (lora.rank, lora.alpha, lora.dropout, lora.init_from) == (8, 4, 0.1, "mine.safetensors")
    assert (config.flow.sigma, config.flow.sigma_max) == ("uniform", 0.9)
    assert config.checkpoint.keep == 9
    assert (config.sample.steps, config.data.read_threads) == (8, 0)
    assert translated(model__training_mode="full").tune == TuneConfig()
    scales = {"validation__video_cfg_scale": 2, "validation__audio_cfg_scale": 5}
    for given, want in (
        (scales, (2, 5)),
        ({"validation__guidance_scale": 4, **dict.fromkeys(scales)}, (4, 4)),
        (dict.fromkeys(scales), (3, 7)),
    ):
        sample = translated(**given).sample
        assert (sample.video_guidance, sample.audio_guidance) == want
    assert config.metrics.wandb is None
    assert translated(wandb__enabled=True).metrics.wandb == "ltx-2-trainer"
    mine = {"wandb__enabled": True, "wandb__entity": "me", "wandb__project": "dogs"}
    assert translated(**mine).metrics.wandb == "me/dogs"


@pytest.mark.parametrize(
    ("given", "form"),
    [("int8-quanto", "int8"), ("fp8-quanto", "fp8"), ("fp8uz-quanto", "fp8"),
     ("int4-quanto", "int4"), ("int2-quanto", None), (None, None)],
)  # fmt: skip
def test_a_quantised_base_stays_one_where_there_is_such_a_form(given, form):
    values = yaml.safe_load(shipped("t2v_lora"))
    values["acceleration"]["quantization"] = given
    config, idle = trainer_yaml.translate(values, "2.3")
    assert config.tune.quantize == form
    assert ("acceleration.quantization" in idle) == (given == "int2-quanto")


def test_what_is_left_out_is_what_the_trainer_takes():
    values = {
        "model": {"model_path": "x"},
        "lora": {},
        "training_strategy": {},
        "data": {"preprocessed_data_root": "y"},
    }
    config, idle = trainer_yaml.translate(values, "2.0")
    assert idle == []
    assert (config.tune.lora.rank, config.tune.lora.alpha) == (64, 64)
    assert (config.optim.learning_rate, config.num_steps, config.data.batch_size) == (5e-4, 3000, 2)
    assert (config.checkpoint.every_steps, config.checkpoint.keep) == (3000, 1)
    assert config.model.remat == "none"
    assert config.flow.streams == ("video",)
    assert config.flow.first_frame_prob == 0.1


def test_a_stream_that_a_file_leaves_empty_is_absent():
    assert translated(training_strategy__audio=None).flow.streams == ("video",)
    assert translated(training_strategy__video=None).flow.streams == ("audio",)


def test_the_deprecated_strategies_are_read():
    both = {"name": "text_to_video", "with_audio": True, "first_frame_conditioning_p": 0.5}
    flow = translated(training_strategy=both).flow
    assert (flow.streams, flow.shared_sigma_prob) == (("video", "audio"), 1.0)
    assert flow.conditions("video") == (Condition("first_frame", 0.5),)
    flow = translated(training_strategy={"name": "video_to_video"}).flow
    assert flow.audio == StreamConfig("absent")
    assert flow.conditions("video") == (Condition("first_frame", 0.1), Condition("reference"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimization__learnig_rate": 1}, "optimization.learnig_rate: no such key; did you mean "
         "learning_rate?"),
        ({"optimisation": {}}, "optimisation: no such key; did you mean optimization?"),
        ({"wandb__enable": True}, "wandb.enable: no such key; did you mean enabled?"),
        ({"training_strategy__video__is_generatd": True}, "training_strategy.video.is_generatd: no "
         "such key; did you mean is_generated?"),
        ({"training_strategy__video__conditions": [FIRST | {"prob": 1}]},
         "training_strategy.video.conditions[0].prob: no such key; did you mean probability?"),
        ({"training_strategy__video__conditions": [{"type": "first"}]},
         "training_strategy.video.conditions[0].type='first': use first_frame, prefix"),
        ({"training_strategy__video__conditions": [{"type": "prefix"}]},
         "training_strategy.video.conditions[0]: prefix: needs length"),
        ({"training_strategy__video__conditions": [CROP | {"spatial_region": [1, 2]}]},
         "training_strategy.video.conditions[0].spatial_region: expected four whole numbers"),
        ({"training_strategy__video__latents_dir": "mine"}, "training_strategy.video.latents_dir="
         "mine: name the folder latents"),
        ({"flow_matching__timestep_sampling_params": {"sdt": 1}},
         "flow_matching.timestep_sampling_params.sdt: no such key; did you mean std?"),
        ({"optimization__scheduler_params": {"eta_min": 0}},
         "optimization.scheduler_params.eta_min: no such key"),
        ({"optimization__scheduler_type": "triangle"}, "scheduler_type='triangle': use"),
        ({"optimization__learning_rate": "fast"}, "learning_rate='fast': expected a n"),
        ({"optimization__steps": 10.5}, "optimization.steps=10.5: expected a whole number"),
        ({"optimization__steps": True}, "optimization.steps=True: expected a number"),
        ({"training_strategy__audio__is_generated": "yes"}, "is_generated='yes': expected true or"),
        ({"lora": [1]}, "lora: expected keys and values, not [1]"),
        ({"lora__target_modules": "to_k"}, "lora.target_modules='to_k': expected a list"),
        ({"acceleration__mixed_precision_mode": "fp16"}, "mixed_precision_mode=fp16: use bf16"),
        ({"acceleration__quantization": "int8"}, "quantization='int8': use null, int8-quanto"),
        ({"model__training_mode": "full", "acceleration__quantization": "int8-quanto"},
         "acceleration.quantization: model.training_mode=full trains what it would quantise"),
        ({"data__preprocessed_data_root": None}, "data.preprocessed_data_root is missing"),
        ({"model__training_mode": "full", "model__load_checkpoint": "x"}, "=x: a full"),
        ({"lora__rank": 0}, "lora: rank=0 must be at least 1"),
        ({"optimization__learning_rate": 0}, "optimization.learning_rate=0 must be above 0"),
        ({"optimization__steps": 0}, "optimization.steps=0 must be at least 1"),
        ({"optimization__batch_size": 0}, "optimization, data: batch_size=0 must be at least 1"),
        ({"checkpoints__interval": 0, "checkpoints__keep_last_n": -1}, "ts: every_steps=0 must"),
        ({"training_strategy": {"name": "flexible"}}, "training_strategy: video.role, audio.role"),
        ({"flow_matching__timestep_sampling_params": {"uniform_prob": 3}}, "sigma_uniform_prob=3"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_named_by_its_key(changes, message):
    assert message in refused(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", "mine.yaml, line 2: "),
        ("- 1", "mine.yaml: the file: expected keys and values, not [1]"),
        (shipped("t2v_lora"), "mine.yaml: model.model_path=path/to/ltx-2-model.safetensors: no "
         "such file; to go on without it, say which release it is after the file's name: :2"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        trainer_yaml.load(str(path))
    assert f"--config: {tmp_path}/{message}" in str(error.value)
    with pytest.raises(UserError, match=r"--config: cannot read .*none.yaml"):
        trainer_yaml.load(str(tmp_path / "none.yaml"))


def test_the_release_can_be_said_where_the_weights_are_not(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(shipped("t2v_lora"))
    assert trainer_yaml.load(f"{path}:2.5").model.keyframe_embedding
    for release in ("2.3", "2.5"):
        config = trainer_yaml.load(f"{path}:{release}")
        video, audio = config.text.video_connector, config.text.audio_connector
        widths = config.model.context_dim, config.model.audio_context_dim
        assert (video.width, audio.width) == widths
    assert trainer_yaml.load(f"{path}:2.0").model.caption_channels == 3840
