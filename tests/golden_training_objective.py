"""Golden training cases of what a step learns: `objective`, `sigma_sampler`, `lr_schedule`.

Where we differ on purpose, a case is asked this; docs/finetuning.md has the same list.

- One latent frame: a first frame that is all of a clip is not given here. The official trainer
  gives it, which is our prefix of 1.
- Frame rates: each sample has its own here. The official trainer takes the first for all.
- Reference factors: found here from the batch at hand. Where the official trainer finds none, or
  its deprecated strategy reads none, its positions are those of a factor of 1.
- Uneven references: refused here. The official trainer rounds their factor down.
- Marks: latent frame 0 is marked here, for models that know marks. The official trainer marks none.
- Noise: drawn in float32 here. The cases with latents in bfloat16 feed noise in bfloat16, which
  rounds the target.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden_case import Case

from ltx2_jax.config import Condition, FlowConfig, OptimConfig
from ltx2_jax.diffusion import flow, geometry
from ltx2_jax.errors import UserError
from ltx2_jax.training import objective
from ltx2_jax.training.state import learning_rate
from ltx2_jax.training.trainer_yaml import Keys, flow_of, schedule_of

PREFIX = {"video": "v", "audio": "a"}


# ---------------------------------------------------------------------------------- sigma_sampler


def run_sigma_sampler(case: Case):
    args, given = case.args, case.inputs()
    return {"sigma": sigmas(args, given["U"], given.get("n"), given.get("q"), args.get("tokens"))}


def sigmas(params, uniform, normal, pick, tokens):
    """By the sampler whose parameters these are."""
    if normal is None:
        return flow.between(uniform, params.get("min_value", 0.0), params.get("max_value", 1.0))
    params = {name: params[name] for name in ("std", "eps", "uniform_prob") if name in params}
    return flow.shifted_logit_normal(normal, uniform, pick, tokens, **params)


def run_lr_schedule(case: Case):
    args, want = case.args, case.data["learning_rate"]
    kind, rate, steps = (args[name] for name in ("scheduler_type", "learning_rate", "steps"))
    fields = schedule_of(kind, Keys(args["scheduler_params"]), rate, steps)
    optim = OptimConfig(learning_rate=rate, schedule=kind, **fields)
    schedule = learning_rate(tiny.config(optim=optim, num_steps=steps))
    rates = jax.vmap(schedule)(jnp.arange(len(want)))
    np.testing.assert_allclose(rates, want, **case.spec["tolerance"])


# -------------------------------------------------------------------------------------- objective


def run_objective(case: Case):
    if case.name.endswith("reference_factor_table"):
        return compare_factors(case.data["rows"])
    args, given = case.args, case.inputs()
    legacy = args["strategy"]["name"] != "flexible"
    matching = {name: args[name] for name in ("timestep_sampling_mode", "timestep_sampling_params")}
    run = flow_of(Keys(args["strategy"]), Keys(matching))
    strides = tuple(args["video_scale_factors"][name] for name in ("time", "height", "width"))
    batch, noises = batch_of(given, args["stored_dtypes"], legacy)
    run = as_official(run, batch, legacy)
    config = tiny.config(flow=run)
    draws = {"caption": np.ones(case.spec["shapes"]["outputs"]["loss_per_sample"], np.float32)}
    for name in run.streams:
        draws[name] = draws_of(name, given, args, run, noises.get(name))
    if refused(batch):
        with pytest.raises(UserError, match="reference"):
            objective.condition(batch, draws, config, strides)
        return None
    drawn = objective.condition(batch, draws, config, strides)
    if "video_reference" in batch:
        drawn["video"] = with_factors(drawn["video"], batch, args["reference_factors"], strides)
    check_decisions(case.data["decisions"], run, draws)
    return outputs(case, batch, drawn, config, given)


def batch_of(given, dtypes, legacy):
    """A batch in our orders, as the dtypes it was stored in, and the noise of both streams."""
    batch, noises = {}, {}
    for name, p in PREFIX.items():
        dtype = jnp.dtype(dtypes.get(f"{p}_latents", "float32"))
        for theirs, ours in (("latents", name), ("reference_latents", f"{name}_reference")):
            if f"{p}_{theirs}" in given:  # [B, C, F, H, W] or [B, C, A, M]
                batch[ours] = jnp.asarray(np.moveaxis(given[f"{p}_{theirs}"], 1, -1), dtype)
        if f"{p}_noise" in given:
            noises[name] = jnp.asarray(given[f"{p}_noise"], dtype)
        if f"{p}_mask" in given:
            batch[f"{name}_mask"] = given[f"{p}_mask"]
    if "video" in batch:
        rows = len(batch["video"])
        # The first sample's rate for all. Where files do not say, loaders take 24.
        batch["fps"] = np.full(rows, given["fps"][0] if "fps" in given else 24.0, np.float32)
        if "v_reference_latents" in given:
            rate = batch["fps"][0] if legacy else given.get("v_reference_fps", [24.0])[0]
            batch["video_reference_fps"] = np.full(rows, rate, np.float32)
    text = {"video_text": "v_context", "audio_text": "a_context", "text_mask": "context_mask"}
    if "prompt_embeds" in given:
        text = {"video_text": "prompt_embeds", "text_mask": "context_mask"}
    return batch | {ours: given[theirs] for ours, theirs in text.items()}, noises


def as_official(run: FlowConfig, batch, legacy) -> FlowConfig:
    """The run without the first frame of one latent frame, and without marks, that are ours."""
    video = run.video
    if "video" in batch and batch["video"].shape[1] == 1 and not legacy:
        prefix = Condition("prefix", length=1)
        conditions = [
            dataclasses.replace(prefix, probability=x.probability) if x.kind == "first_frame" else x
            for x in video.conditions
        ]
        video = dataclasses.replace(video, conditions=tuple(conditions))
    return dataclasses.replace(run, video=video, mark_first_frame=False)


def draws_of(name, given, args, run: FlowConfig, noise):
    """The official draws of a stream, as ours are."""
    p, rows = PREFIX[name], len(given[f"{PREFIX[name]}_latents"])
    sigma = None
    if name in run.generated:
        sigma = jnp.asarray(given[f"{p}_sigma"])
        if f"{p}_uniform_draw" in given:  # else the other stream's
            draws = (given.get(f"{p}_{draw}_draw") for draw in ("uniform", "normal", "mixture"))
            params, tokens = args["timestep_sampling_params"], noise.shape[1]
            np.testing.assert_allclose(sigmas(params, *draws, tokens), sigma, atol=1e-5)
    conditions = run.conditions(name)
    listed = args["strategy"].get(name, {}).get("conditions")
    if (
        listed is None
    ):  # a deprecated strategy: a first frame, then a reference that is always there
        order = range(len(conditions))
    else:
        kept = [i for i, x in enumerate(listed) if sigma is not None or x["type"] == "reference"]
        order = sorted(kept, key=lambda i: listed[i]["type"] == "reference")
    chances = []
    for i, what in zip(order, conditions, strict=True):
        drawn = given.get(f"{p}_condition{i}_uniform", np.zeros((), np.float32))
        size = 1 if what.kind == "reference" else rows
        chances.append(np.broadcast_to(drawn, size))
    return objective.StreamDraws(sigma, noise, tuple(chances))


def check_decisions(decisions, run: FlowConfig, draws):
    """That as many conditions apply as officially, of every kind."""
    for name, p in PREFIX.items():
        theirs = [x for key, x in decisions.items() if key.startswith(f"{p}_")]
        for x in theirs:
            pairs = zip(run.conditions(name), draws[name].chances, strict=True)
            kinds = (x["type"], "prefix" if x["type"] == "first_frame" else x["type"])
            applied = [np.asarray(c < what.probability) for what, c in pairs if what.kind in kinds]
            assert any(np.array_equal(a, np.atleast_1d(x["applied"])) for a in applied)


# ---- what the network is given, and what it learns ----


class Network:
    """Returns the made-up velocities of a case, and keeps what it was given."""

    def __init__(self, predictions, references):
        self.predictions, self.references, self.seen = predictions, references, {}

    def context(self, text):
        return text["video_text"], text.get("audio_text", text["video_text"]), text["text_mask"]

    @property
    def transformer(self):
        return self

    def __call__(self, *modalities):
        velocities = []
        for name, modality in zip(PREFIX, modalities, strict=True):
            if modality is None:
                velocities.append(None)
                continue
            self.seen[name] = modality
            prediction = self.predictions.get(name, jnp.zeros_like(modality.latent))
            extra = modality.latent.shape[1] - self.references[name][0]
            velocities.append(jnp.roll(prediction, -extra, axis=1))
        return tuple(velocities)


def outputs(case: Case, batch, drawn, config, given):
    streams = {name: drawn[name] for name in config.flow.streams}
    clips = {name: (s.conditions.clip_tokens,) for name, s in streams.items()}
    predictions = {
        name: given[f"{p}_prediction"] for name, p in PREFIX.items() if f"{p}_prediction" in given
    }
    network = Network(predictions, clips)
    null = {name: batch[name][0] for name in ("video_text", "audio_text", "text_mask")
            if name in batch}  # fmt: skip
    undecided = any(s.applied is not None for s in streams.values())
    with jax.disable_jit() if undecided else contextlib.nullcontext():
        total, sums = objective.loss(network, batch, drawn, null, config)
    got = {"loss": total, "loss_per_sample": 0}
    for name, modality in network.seen.items():
        p, stream = PREFIX[name], streams[name]
        facts = case.data[name]
        rows, length = modality.latent.shape[:2]
        appended = length - clips[name][0]
        assert (length, appended) == (facts["tokens"], facts["reference_tokens"])
        levels = jnp.broadcast_to(modality.timesteps, (rows, length))
        if modality.clean is not None:
            levels = jnp.where(modality.clean, 0, levels)
        positions = np.broadcast_to(modality.positions, (rows, *modality.positions.shape[1:]))
        assert modality.keyframes_mask is None
        assert modality.attention_mask is None
        # The official trainer puts references in front.
        got |= {
            f"{p}_latent": jnp.roll(modality.latent, appended, 1),
            f"{p}_sigma": modality.sigma,
            f"{p}_timesteps": jnp.roll(levels, appended, 1),
            f"{p}_positions": np.roll(positions, appended, 2),
            f"{p}_context": modality.context,
            f"{p}_context_mask": modality.context_mask,
        }
        if name in config.flow.generated:
            mask = np.concatenate([np.zeros((rows, appended)), objective.learned_mask(stream)], 1)
            velocity = jnp.roll(predictions[name], -appended, 1)
            losses = objective.sample_losses(stream, velocity)
            np.testing.assert_allclose(jnp.sum(losses), sums[f"{name}_loss"], rtol=1e-6)
            target = flow.velocity_target(stream.x0, stream.noise).astype(jnp.float32)
            got |= {f"{p}_target": target, f"{p}_loss_mask": mask, f"{p}_loss": losses}
            got["loss_per_sample"] += losses
    return got


# ---- references ----


def refused(batch) -> bool:
    """Whether a video reference is uneven, which we refuse."""
    return "video_reference" in batch and "error" in factors(
        batch["video"].shape[1:4], batch["video_reference"].shape[1:4]
    )


def factors(grid, reference) -> list:
    """Our spatial and temporal factor, "error" for one that is refused."""
    found = []
    for factor in (geometry.spatial_factor, geometry.temporal_factor):
        try:
            found.append(factor(tuple(grid), tuple(reference)))
        except UserError:
            found.append("error")
    return found


def with_factors(stream, batch, theirs, strides):
    """The stream with the positions of its reference as the official trainer has them."""
    grid, reference = batch["video"].shape[1:4], batch["video_reference"].shape[1:4]
    theirs = [theirs["spatial"] or 1, theirs["temporal"] or 1]
    if factors(grid, reference) == theirs:
        return stream
    conditions, rates = stream.conditions, (batch["fps"], batch["video_reference_fps"])
    positions = geometry.reference_positions(
        reference, *map(jnp.asarray, rates), strides, spatial=theirs[0], temporal=theirs[1]
    )
    own = conditions.positions[:, :, : conditions.clip_tokens]
    conditions = dataclasses.replace(conditions, positions=jnp.concatenate([own, positions], 2))
    return dataclasses.replace(stream, conditions=conditions)


def compare_factors(rows):
    """Ours are those of the official trainer's strict strategy, and its temporal ones."""
    for row in rows:
        ours = factors(row["target"], row["reference"])
        assert ours == [row["legacy_spatial"], row["temporal"]], row
        if row["spatial"] != row["legacy_spatial"]:
            assert ours[0] == "error", row
