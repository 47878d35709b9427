"""Config files of the official trainer, as configs of ours: `--config=t2v_lora.yaml`.

Every key is used, or `IDLE` says why it has no meaning here; any other is refused with the closest
known one. Source: `ltx_trainer/config.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ltx2_jax import config as config_lib
from ltx2_jax.config import (
    CheckpointConfig,
    Condition,
    Config,
    DataConfig,
    FlowConfig,
    LoraConfig,
    MetricsConfig,
    OptimConfig,
    SampleConfig,
    StreamConfig,
    TextConfig,
    TuneConfig,
)
from ltx2_jax.errors import UserError
from ltx2_jax.files import reason
from ltx2_jax.models.text.connectors import (
    AUDIO_CONNECTOR_2_3,
    CONNECTOR_2_0,
    VIDEO_CONNECTOR_2_3,
)
from ltx2_jax.models.transformer.config import PRESETS
from ltx2_jax.training.yaml_keys import Keys
from ltx2_jax.weights.lora_targets import TARGETS
from ltx2_jax.weights.sources import open_release

SUFFIXES = (".yaml", ".yml")
_CLIPS = "clips on the way are those of validation.clips_every and .prompts, a file: two flags"
_MADE = "latents and text features are made beforehand, by `prepare`"
# Keys that are read and have no effect, and why.
IDLE = {
    "model.text_encoder_path": _MADE,
    "model.video_vae_path": _MADE,
    "model.audio_vae_path": _MADE,
    "acceleration.load_text_encoder_in_8bit": _MADE,
    "acceleration.quantization": "no form here has so few bits; int4-quanto has the fewest",
    "acceleration.offload_optimizer_during_validation": "the optimizer stays on the devices",
    "checkpoints.precision": "`convert` writes the file, in the precision that it is told",
    "checkpoints.no_resume": "a run goes on in its workdir; another output_dir begins anew",
    "checkpoints.save_training_state": "a checkpoint always holds the whole state",
    "hub.push_to_hub": "nothing is uploaded",
    "hub.hub_model_id": "nothing is uploaded",
    **dict.fromkeys(
        (
            f"validation.{name}"
            for name in (
                "samples", "prompts", "negative_prompt", "images", "reference_videos",
                "reference_downscale_factor", "include_reference_in_output", "video_dims",
                "frame_rate", "interval", "videos_per_prompt", "video_stg_scale",
                "audio_stg_scale", "stg_scale", "stg_blocks", "stg_mode", "guidance_rescale",
                "video_modality_guidance_scale", "audio_modality_guidance_scale",
                "generate_audio", "generate_video", "skip_initial_validation",
            )
        ),
        _CLIPS,
    ),
    **dict.fromkeys(
        ("wandb.tags", "wandb.log_validation_videos"),
        "a run has no tags there; clips go wherever metrics go",
    ),
}  # fmt: skip
# Where the trainer looks for what a condition or a stream reads.
FOLDERS = {
    "video.latents_dir": "latents",
    "audio.latents_dir": "audio_latents",
    "video.mask_dir": "video_masks",
    "audio.mask_dir": "audio_masks",
    "video.reference": "reference_latents",
    "audio.reference": "reference_audio_latents",
}
# Forms of a quantised base, and ours; that of None is IDLE.
QUANTO = {
    "int8-quanto": "int8",
    "fp8-quanto": "fp8",
    "fp8uz-quanto": "fp8",  # the same digits, on hardware that has no negative zero
    "int4-quanto": "int4",
    "int2-quanto": None,
}
CONNECTORS = {
    "2.0": (CONNECTOR_2_0, CONNECTOR_2_0),
    "2.3": (VIDEO_CONNECTOR_2_3, AUDIO_CONNECTOR_2_3),
    "2.5": (VIDEO_CONNECTOR_2_3, AUDIO_CONNECTOR_2_3),
}


# ----------------------------------------------------------------------------------------- the file


def load(source: str, overrides: dict[str, str] | None = None) -> Config:
    """`config.load`, and of a file of the official trainer: `file.yaml`, or `file.yaml:RELEASE`.

    The release, "2.0", "2.3" or "2.5", says which networks are trained where `model.model_path` is
    not here to be asked. Prints which keys have no meaning here.

    Raises:
      UserError: as `config.load`; not YAML, a key that nobody knows, a value of another kind.
    """
    path, _, release = source.rpartition(":")
    if Path(source).suffix in SUFFIXES or not path:
        path, release = source, ""
    if Path(path).suffix not in SUFFIXES:
        return config_lib.load(source, overrides)
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config: cannot read {path}: {reason(error)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "is not YAML"
        raise UserError(f"--config: {path}{line}: {problem}") from None
    try:
        config, idle = translate(values, release or None)
    except UserError as error:
        raise UserError(f"--config: {path}: {error}") from None
    for why in dict.fromkeys(IDLE[name] for name in idle):
        names = ", ".join(name for name in idle if IDLE[name] == why)
        print(f"{path}: no meaning here have {names}: {why}")
    return config_lib.changed(config, overrides or {})


def translate(values: Any, release: str | None = None) -> tuple[Config, list[str]]:
    """What a file of the official trainer says, and which of its keys have no meaning here."""
    file = Keys(values)
    sections = {
        name: file.keys(name)
        for name in (
            "model", "lora", "training_strategy", "optimization", "acceleration", "data",
            "validation", "checkpoints", "flow_matching", "hub", "wandb",
        )
    }  # fmt: skip
    workdir, seed = file.text("output_dir", "outputs"), file.integer("seed", 42)
    file.done({})
    optimization = sections["optimization"]
    steps = optimization.integer("steps", 3000)
    if steps < 1:
        raise UserError(f"optimization.steps={steps} must be at least 1")
    model, text, released, init_from = _model(sections, release)
    tune = _tune(sections)
    chunks = optimization.integer("gradient_accumulation_steps", 1)
    data = _named(
        "optimization, data",
        DataConfig,
        path=_needed(sections["data"], "preprocessed_data_root"),
        release=released,
        batch_size=optimization.integer("batch_size", 2) * chunks,
        read_threads=sections["data"].integer("num_dataloader_workers", 2),
    )
    config = Config(
        workdir=workdir,
        model=model,
        text=text,
        data=data,
        flow=flow_of(sections["training_strategy"], sections["flow_matching"]),
        optim=_optim(optimization, steps, chunks),
        checkpoint=_checkpoint(sections["checkpoints"], steps),
        metrics=_metrics(sections["wandb"]),
        sample=_sample(sections["validation"]),
        init_from=init_from,
        tune=tune,
        num_steps=steps,
        seed=seed,
    )
    return config, [name for section in sections.values() for name in section.done(IDLE)]


def _needed(keys: Keys, name: str) -> str:
    value = keys.text(name)
    if value is None:
        raise UserError(f"{keys.where(name)} is missing")
    return value


# ----------------------------------------------------------------------------------------- networks


def _model(sections: Mapping[str, Keys], release: str | None) -> tuple[Any, TextConfig, str, str]:
    """The transformer, the text, the release, and the file of the weights."""
    path = _needed(sections["model"], "model_path")
    modes = ("bf16", "fp16", "no")
    precision = sections["acceleration"].choice("mixed_precision_mode", modes, "bf16")
    if precision == "fp16":
        raise UserError("acceleration.mixed_precision_mode=fp16: use bf16, or no for float32")
    remat = sections["optimization"].flag("enable_gradient_checkpointing", False)
    ours = {"dtype": "float32" if precision == "no" else "bfloat16",
            "remat": "attention" if remat else "none"}  # fmt: skip
    if Path(path).exists():
        with open_release(path) as opened:
            found = opened.release_of("transformer")
            model = opened.config("transformer", **ours)
            connectors = CONNECTORS[found]
            if "connectors" in opened.networks:
                connectors = opened.config("connectors")
        if release not in (None, found):
            raise UserError(f"model.model_path={path} is a file of {found}, not of {release}")
    elif release in PRESETS:
        found, connectors = release, CONNECTORS[release]
        model = replace(PRESETS[release], **ours)
    else:
        raise UserError(
            f"model.model_path={path}: no such file; to go on without it, say which release it is "
            f"after the file's name: {', '.join(f':{name}' for name in PRESETS)}"
        )
    video, audio = connectors
    text = TextConfig(release=found, video_connector=video, audio_connector=audio)
    return model, text, found, path


def _tune(sections: Mapping[str, Keys]) -> TuneConfig:
    """What is trained: adapters, or with `training_mode: full` the whole transformer."""
    lora, model = sections["lora"], sections["model"]
    rank, alpha = lora.integer("rank", 64), lora.number("alpha", 64)
    dropout = lora.number("dropout", 0.0)
    targets = tuple(map(str, lora.listed("target_modules"))) or TARGETS["short"]
    checkpoint, form = model.text("load_checkpoint"), _form(sections["acceleration"])
    if model.choice("training_mode", ("lora", "full"), "lora") == "full":
        if form is not None:
            raise UserError(
                "acceleration.quantization: model.training_mode=full trains what it would quantise"
            )
        if checkpoint is not None:
            raise UserError(
                f"model.load_checkpoint={checkpoint}: a full fine-tune begins at model.model_path; "
                "name the file there"
            )
        return TuneConfig()
    adapters = _named("lora", LoraConfig, targets, rank, alpha, dropout, init_from=checkpoint)
    return TuneConfig(lora=adapters, quantize=form)


def _form(acceleration: Keys) -> str | None:
    """In what the frozen weights are kept."""
    given = acceleration.text("quantization")
    if given is None:
        return None
    if given not in QUANTO:
        where = acceleration.where("quantization")
        raise UserError(f"{where}={given!r}: use null, {', '.join(QUANTO)}")
    if QUANTO[given] is None:
        acceleration.leave("quantization", given)
    return QUANTO[given]


# ---------------------------------------------------------------------------------- what is learned


def flow_of(strategy: Keys, flow_matching: Keys) -> FlowConfig:
    """The training distribution of a `training_strategy` and a `flow_matching` section."""
    names = ("flexible", "text_to_video", "video_to_video")
    name = strategy.choice("name", names, "text_to_video")
    fields = {"flexible": _flexible, "text_to_video": _text_to_video,
              "video_to_video": _video_to_video}[name](strategy)  # fmt: skip
    strategy.done(IDLE)
    return _named(strategy.path, FlowConfig, **fields, **_sigmas(flow_matching))


def _flexible(strategy: Keys) -> dict[str, Any]:
    streams = {}
    for name in ("video", "audio"):
        given = name in strategy
        keys = strategy.keys(name)
        if not given:
            streams[name] = StreamConfig("absent")
            continue
        _check_folder(keys, "latents_dir", f"{name}.latents_dir")
        role = "generated" if keys.flag("is_generated", True) else "frozen"
        conditions = tuple(
            _condition(Keys(values, f"{keys.path}.conditions[{i}]"), name)
            for i, values in enumerate(keys.listed("conditions"))
        )
        keys.done(IDLE)
        streams[name] = _named(keys.path, StreamConfig, role, conditions)
    return streams


def _condition(keys: Keys, stream: str) -> Condition:
    kind = keys.choice("type", tuple(config_lib.CONDITIONS), "")
    fields: dict[str, Any] = {"probability": keys.number("probability", 1.0)}
    if kind in ("prefix", "suffix"):
        fields["length"] = keys.integer("temporal_boundary")
    elif kind == "spatial_crop":
        fields["region"] = tuple(keys.listed("spatial_region"))
        if len(fields["region"]) != 4 or not all(type(x) is int for x in fields["region"]):
            raise UserError(f"{keys.where('spatial_region')}: expected four whole numbers")
    elif kind == "mask":
        _check_folder(keys, "mask_dir", f"{stream}.mask_dir")
    elif kind == "reference":
        _check_folder(keys, "latents_dir", f"{stream}.reference")
    keys.done(IDLE)
    return _named(keys.path, Condition, kind, **fields)


def _text_to_video(strategy: Keys) -> dict[str, Any]:
    """The deprecated strategy: one noise level for both streams."""
    probability = strategy.number("first_frame_conditioning_p", 0.1)
    sound = strategy.flag("with_audio", False)
    _check_folder(strategy, "audio_latents_dir", "audio.latents_dir")
    return {
        "audio": StreamConfig("generated" if sound else "absent"),
        "first_frame_prob": probability,
        "shared_sigma_prob": 1.0 if sound else 0.0,
    }


def _video_to_video(strategy: Keys) -> dict[str, Any]:
    """The deprecated strategy: a reference, and video alone."""
    probability = strategy.number("first_frame_conditioning_p", 0.1)
    _check_folder(strategy, "reference_latents_dir", "video.reference")
    return {
        "video": StreamConfig(conditions=(Condition("reference"),)),
        "audio": StreamConfig("absent"),
        "first_frame_prob": probability,
    }


def _check_folder(keys: Keys, name: str, what: str) -> None:
    """UserError for a folder of another name than datasets have here."""
    known = FOLDERS[what]
    if (given := keys.text(name, known)) != known:
        raise UserError(f"{keys.where(name)}={given}: name the folder {known}, as the others are")


def _named(where: str, kind: type, /, *values: Any, **fields: Any) -> Any:
    """A `kind` of these; its own errors with the place in the file before them."""
    try:
        return kind(*values, **fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _sigmas(keys: Keys) -> dict[str, Any]:
    """How noise levels are drawn."""
    mode = keys.choice("timestep_sampling_mode", config_lib.SIGMAS, config_lib.SIGMAS[0])
    params = keys.keys("timestep_sampling_params")
    if mode == "uniform":
        fields = {"sigma_min": params.number("min_value", 0.0),
                  "sigma_max": params.number("max_value", 1.0)}  # fmt: skip
    else:
        fields = {"sigma_std": params.number("std", 1.0), "sigma_eps": params.number("eps", 1e-3),
                  "sigma_uniform_prob": params.number("uniform_prob", 0.1)}  # fmt: skip
    params.done(IDLE)
    return {"sigma": mode} | fields


# ------------------------------------------------------------------------------------- the schedule


def _optim(keys: Keys, steps: int, chunks: int) -> OptimConfig:
    rate = keys.number("learning_rate", 5e-4)
    if rate <= 0:
        raise UserError(f"{keys.where('learning_rate')}={rate:g} must be above 0")
    eight_bit = keys.choice("optimizer_type", ("adamw", "adamw8bit"), "adamw") == "adamw8bit"
    schedule = keys.choice("scheduler_type", config_lib.SCHEDULES, "linear")
    return _named(
        keys.path,
        OptimConfig,
        learning_rate=rate,
        clip_norm=keys.number("max_grad_norm", 1.0),
        accumulate_steps=chunks,
        decays="all",
        # The nearest that there is to moments of one byte.
        first_moment_dtype="bfloat16" if eight_bit else "float32",
        schedule=schedule,
        **schedule_of(schedule, keys.keys("scheduler_params"), rate, steps),
    )


def schedule_of(name: str, params: Keys, rate: float, steps: int) -> dict[str, Any]:
    """Fields of `OptimConfig` for a scheduler's parameters, which are those of PyTorch."""
    if name == "linear":
        fields = {"start_fraction": params.number("start_factor", 1.0),
                  "final_fraction": params.number("end_factor", 0.1)}  # fmt: skip
    elif name == "cosine":
        fields = {"final_fraction": params.number("eta_min", 0.0) / rate}
    elif name == "cosine_with_restarts":
        fields = {"restart_after": params.integer("T_0", max(steps // 4, 1)),
                  "restart_growth": params.integer("T_mult", 1),
                  "final_fraction": params.number("eta_min", 5e-5) / rate}  # fmt: skip
    elif name == "polynomial":
        fields = {"power": params.number("power", 1.0)}
    elif name == "step":
        fields = {"step_every": params.integer("step_size", max(steps // 2, 1)),
                  "step_fraction": params.number("gamma", 0.1)}  # fmt: skip
    else:
        fields = {}
    params.done({})
    return fields


def _checkpoint(keys: Keys, steps: int) -> CheckpointConfig:
    """Without an interval there is the last checkpoint alone; -1 keeps all of them."""
    every, keep = keys.integer("interval", steps), keys.integer("keep_last_n", 1)
    keep = steps // max(every, 1) + 1 if keep == -1 else keep
    return _named(keys.path, CheckpointConfig, every_steps=every, keep=keep)


def _sample(keys: Keys) -> SampleConfig:
    old = keys.number("guidance_scale")  # of both streams, the deprecated key
    return _named(
        keys.path,
        SampleConfig,
        num_clips=1,
        batch_size=1,
        steps=keys.integer("inference_steps", 30),
        video_guidance=keys.number("video_cfg_scale", 3.0 if old is None else old),
        audio_guidance=keys.number("audio_cfg_scale", 7.0 if old is None else old),
        seed=keys.integer("seed", 42),
    )


def _metrics(keys: Keys) -> MetricsConfig:
    project, entity = keys.text("project", "ltx-2-trainer"), keys.text("entity")
    if not keys.flag("enabled", False):
        return MetricsConfig()
    return _named(keys.path, MetricsConfig, f"{entity}/{project}" if entity else project)
