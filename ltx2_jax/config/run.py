"""The fields of a run's configuration, which check themselves."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from ltx2_jax.config.films import FilmsConfig
from ltx2_jax.demo.config import LinearCodecConfig, RandomEncoderConfig, SyntheticConfig
from ltx2_jax.diffusion import schedules
from ltx2_jax.errors import UserError
from ltx2_jax.fields import check_least, check_one_of, check_seed, check_share
from ltx2_jax.models.ltx2 import LTX2Config
from ltx2_jax.models.quantized import FORMS, check_form
from ltx2_jax.models.text.connectors import CONNECTOR_2_0, ConnectorConfig
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.weights.lora_targets import TARGETS


@dataclass(frozen=True)
class TextConfig:
    """Where text features come from, and the connectors that are trained on them."""

    length: int = 1024  # tokens per caption, left padded
    release: str = "random"  # of the features: of a random encoder, or "2.0", "2.3", "2.5"
    encoder: RandomEncoderConfig = field(default_factory=RandomEncoderConfig)  # of synthetic clips
    video_connector: ConnectorConfig = CONNECTOR_2_0
    audio_connector: ConnectorConfig = CONNECTOR_2_0

    def __post_init__(self):
        check_least(self, length=1)
        for name in ("video_connector", "audio_connector"):
            registers = getattr(self, name).registers
            if registers and self.length % registers:
                raise UserError(
                    f"length={self.length} is not a multiple of {name}.registers={registers}"
                )
        if bool(self.video_connector.registers) != bool(self.audio_connector.registers):
            raise UserError("video_connector and audio_connector: registers in both or in none")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on: folders written by `prepare`, films, or a synthetic set rendered first.

    Films are a table of `prepare` or a folder of them, in any place of a dataset.
    """

    path: str | None = None  # dataset folder; None: rendered and prepared under the workdir
    # In place of path, several folders, and what share of the examples comes from each; together 1.
    mixture: tuple[tuple[str, float], ...] = ()
    # Folder on a disk of every host, for the copy of one in a bucket, and for latents of films.
    cache: str | None = None
    films: FilmsConfig = field(default_factory=FilmsConfig)  # if some are given
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)  # if no folder is given
    codec: LinearCodecConfig = field(default_factory=LinearCodecConfig)  # fitted to it
    release: str = "linear"  # whose latents: of a linear codec, or of "2.0", "2.3", "2.5"
    batch_size: int = 16  # clips per step over all hosts
    # Of video and audio in a step, at most: every size of clips has batches of its own, of as many
    # times batch_size clips as fit. None: batch_size clips, of whatever size.
    batch_tokens: int | None = None
    read_threads: int = 2

    def __post_init__(self):
        check_least(self, batch_size=1, read_threads=0)
        if self.batch_tokens is not None:
            check_least(self, batch_tokens=1)
        if not self.mixture:
            return
        if self.path is not None:
            raise UserError(
                f"path={self.path}: with a mixture it is None; name all datasets in mixture"
            )
        for folder, share in self.mixture:
            if not 0 < share < math.inf:
                raise UserError(f"mixture: the share {share:g} of {folder!r} is not above 0")
        names = [str(Path(folder)) for folder, _ in self.mixture]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"mixture: {twice[0]!r} is named twice; give it one share")
        total = sum(share for _, share in self.mixture)
        if abs(total - 1) > 0.005:  # such as three times 0.333
            raise UserError(f"mixture: the shares add up to {total:g}, not to 1")

    @property
    def folders(self) -> tuple[tuple[str, float], ...]:
        """The datasets that are given, and the share of each; none if clips are synthetic."""
        return self.mixture if self.path is None else ((self.path, 1.0),)


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh of one slice; data = -1 takes the devices that the others leave."""

    data: int = -1
    model: int = 1
    sequence: int = 1
    slices: int = -1  # -1: those that the devices lie in


# Kinds of conditions, and the fields that each needs beside its probability.
CONDITIONS: dict[str, tuple[str, ...]] = {
    "first_frame": (),
    "prefix": ("length",),
    "suffix": ("length",),
    "spatial_crop": ("region",),
    "mask": (),
    "reference": (),
}


@dataclass(frozen=True)
class Condition:
    """Something of a stream that a sample is given, clean; it is not learned.

    `first_frame`, `prefix`, `suffix`: latents at an end; `spatial_crop`: a rectangle in all frames;
    `mask`: where the sample's own mask says; `reference`: another clip beside the sample's own.
    """

    kind: str
    probability: float = 1.0  # of every sample by itself; of a reference, of the whole batch
    length: int | None = None  # of prefix and suffix: latent frames of video, latents of audio
    region: tuple[int, int, int, int] | None = None  # of spatial_crop: top, left, bottom, right

    def __post_init__(self):
        if self.kind not in CONDITIONS:
            raise UserError(f"kind={self.kind!r}: use {', '.join(CONDITIONS)}")
        check_share(self, "probability")
        for name in ("length", "region"):
            given, needed = getattr(self, name) is not None, name in CONDITIONS[self.kind]
            if given != needed:
                raise UserError(f"{self.kind}: {'needs' if needed else 'takes no'} {name}")
        if self.length is not None:
            check_least(self, length=1)
        if self.region is not None:
            top, left, bottom, right = self.region
            if not (0 <= top < bottom and 0 <= left < right):
                raise UserError(f"region={self.region} is not (top, left, bottom, right)")


ROLES = ("generated", "frozen", "absent")


@dataclass(frozen=True)
class StreamConfig:
    """What one stream is in a training."""

    # Generated: noised and learned. Frozen: clean at noise level 0, only read by the other one.
    # Absent: the model runs without it, the dataset need not have it.
    role: str = "generated"
    conditions: tuple[Condition, ...] = ()

    def __post_init__(self):
        if self.role not in ROLES:
            raise UserError(f"role={self.role!r}: use {', '.join(ROLES)}")
        if self.role == "absent" and self.conditions:
            raise UserError("role='absent': a stream that is not there has no conditions")
        kinds = [condition.kind for condition in self.conditions]
        for kind in ("mask", "reference"):
            if kinds.count(kind) > 1:
                raise UserError(f"conditions: one {kind} at most; a sample has one")


SIGMAS = ("shifted_logit_normal", "uniform")


@dataclass(frozen=True)
class FlowConfig:
    """The training distribution: streams, noise levels and what is given."""

    video: StreamConfig = StreamConfig()
    audio: StreamConfig = StreamConfig()
    sigma: str = "shifted_logit_normal"  # how noise levels are drawn, or "uniform"
    shared_sigma_prob: float = 0.0  # both streams take one sigma; released training draws two
    sigma_std: float = 1.0  # these four are read by shifted_logit_normal alone
    # The count of tokens that shifts the levels, many towards noise; None: the stream's own.
    sigma_tokens: int | None = None
    sigma_uniform_prob: float = 0.1
    sigma_eps: float = 1e-3
    sigma_min: float = 0.0  # these two by uniform alone
    sigma_max: float = 1.0
    # The first latent frame of the video is given; as a first_frame condition before the others.
    first_frame_prob: float = 0.0
    # Latent frame 0 is marked as a keyframe to models that know such marks, as sampling does.
    mark_first_frame: bool = True
    caption_dropout: float = 0.0  # the caption is emptied, for classifier-free guidance
    video_weight: float = 1.0  # of the video loss in the sum of both
    audio_weight: float = 1.0

    def __post_init__(self):
        if self.sigma not in SIGMAS:
            raise UserError(f"sigma={self.sigma!r}: use {' or '.join(SIGMAS)}")
        check_share(self, "shared_sigma_prob", "sigma_uniform_prob", "sigma_min", "sigma_max")
        check_share(self, "first_frame_prob", "caption_dropout")
        if self.sigma_tokens is not None:
            check_least(self, sigma_tokens=1)
        if self.sigma_min > self.sigma_max:
            raise UserError(f"sigma_min={self.sigma_min} is above sigma_max={self.sigma_max}")
        for condition in self.audio.conditions:
            if condition.kind in ("first_frame", "spatial_crop"):
                raise UserError(f"audio.conditions: {condition.kind} is of video alone")
        if not self.generated:
            raise UserError("video.role, audio.role: one of the two must be generated")

    @property
    def streams(self) -> tuple[str, ...]:
        """Those that the model runs on, "video" before "audio"."""
        return tuple(name for name in ("video", "audio") if getattr(self, name).role != "absent")

    @property
    def generated(self) -> tuple[str, ...]:
        """Those that are learned."""
        return tuple(x for x in self.streams if getattr(self, x).role == "generated")

    def conditions(self, stream: str) -> tuple[Condition, ...]:
        """Those of a stream that have an effect; references come last."""
        given = getattr(self, stream).conditions
        if stream == "video" and self.first_frame_prob > 0:
            given = (Condition("first_frame", self.first_frame_prob), *given)
        references = tuple(x for x in given if x.kind == "reference")
        if stream not in self.generated:  # given as a whole, but for what stands beside it
            return references
        return tuple(x for x in given if x.kind != "reference") + references


SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "step")
OPTIMIZERS = ("adamw", "adafactor", "muon")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer with clipping by global norm, a warm-up and a decay."""

    # "adamw"; "adafactor", whose second moments of matrices are two vectors; or "muon", which
    # orthogonalises the moments of matrices and leaves the rest to AdamW.
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    # After the warm-up, one of `SCHEDULES`, which are those of the official trainer: "linear" from
    # start_fraction to final_fraction of the rate, "cosine" from it to final_fraction,
    # "cosine_with_restarts" the same again and again, "polynomial" to 0 with `power`, "step" by
    # step_fraction every step_every steps.
    schedule: str = "constant"
    start_fraction: float = 1.0  # of linear
    final_fraction: float = 0.1  # of linear, cosine and cosine_with_restarts
    restart_after: int | None = None  # steps of the first period; None: a quarter of all
    restart_growth: int = 1  # by what every period is longer than the one before
    power: float = 1.0
    step_every: int | None = None  # None: half of all
    step_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    # What decays: "matrices", and not biases, norms, tables, embeddings; or "all", as PyTorch has
    # it. Adapters decay in either case.
    decays: str = "matrices"
    clip_norm: float = 1.0
    # Of the average of gradients, "float32" or "bfloat16", 2 bytes a parameter less. That of their
    # squares stays float32: with b2 = 0.999 it moves by less than bfloat16 resolves.
    first_moment_dtype: str = "float32"
    # What gradients of matrices are summed in over the shards of a batch, "float32" or "bfloat16".
    reduce_dtype: str = "float32"
    accumulate_steps: int = 1  # micro-batches whose gradients are averaged into one step
    ema_decay: float | None = None  # of the averaged weights that sampling uses; None: no average
    # Steps in a row whose gradient is not finite, after which the run ends. They change no weight.
    max_bad_steps: int = 10

    def __post_init__(self):
        check_one_of(self, schedule=SCHEDULES, optimizer=OPTIMIZERS, decays=("matrices", "all"))
        dtypes = ("float32", "bfloat16")
        check_one_of(self, first_moment_dtype=dtypes, reduce_dtype=dtypes)
        check_least(self, accumulate_steps=1, restart_growth=1, max_bad_steps=1)
        for name in ("restart_after", "step_every"):
            if getattr(self, name) is not None:
                check_least(self, **{name: 1})


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside the transformer's linear maps: W x + (alpha / rank) B A x."""

    # Official names of modules, or how they end; see `weights.lora_targets`, which has the lists of
    # the official trainer.
    targets: tuple[str, ...] = TARGETS["short"]
    rank: int = 32
    alpha: float | None = None  # None: that of the rank, whatever it is
    dropout: float = 0.0  # of what A reads, in training
    ranks: tuple[tuple[str, int], ...] = ()  # of some targets, another rank; the last counts
    init_from: str | None = None  # a LoRA file to go on from

    def __post_init__(self):
        check_least(self, rank=1)
        if not self.targets:
            raise UserError("targets: name at least one module")
        for target, rank in self.ranks:
            if rank < 1:
                raise UserError(f"ranks: {rank} of {target!r} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} is not from 0 to below 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UserError(f"alpha={self.alpha} must be above 0")


@dataclass(frozen=True)
class TuneConfig:
    """What is trained of the weights in `init_from`; the rest is frozen.

    Frozen weights are kept in the dtype that they are used in, or their large matrices quantised,
    and are no part of checkpoints: a run that goes on reads them again from `init_from`. A rule is
    a path such as
    "transformer/blocks/audio_self", which means all that is in it; "*" stands for anything, and the
    words "video" and "audio" for all weights of a stream.
    """

    train: tuple[str, ...] = ("transformer",)  # rules; without the connectors, as officially
    lora: LoraConfig | None = None  # adapters are trained, and nothing else
    rates: tuple[tuple[str, float], ...] = ()  # rules, and times what rate; the last one counts
    resident: bool = False  # frozen weights whole along data and sequence, not FSDP
    quantize: str | None = None  # a form of `models.quantized`, of the large frozen matrices

    def __post_init__(self):
        check_form(self.quantize, FORMS)  # products of what is rounded have no gradient
        if self.lora is not None and self.train != ("transformer",):
            raise UserError("train: with lora, the adapters alone are trained; leave it out")
        for rule, rate in self.rates:
            if not 0 <= rate < math.inf:
                raise UserError(f"rates: {rate} of {rule!r} must be at least 0")


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 500
    every_minutes: float | None = None  # saves after so many minutes too, by the clock of process 0
    keep: int = 2  # newest checkpoints that stay
    keep_every: int | None = None  # checkpoints of multiples of so many steps are never deleted
    max_failures: int = 3  # saves in a row that may fail (a full disk) before the run ends

    def __post_init__(self):
        check_least(self, every_steps=1, keep=1, max_failures=0)
        for name in ("every_minutes", "keep_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}={value} must be above 0")


@dataclass(frozen=True)
class CheckConfig:
    """What is looked for while a run goes on: hosts that drifted apart, computers that miscount."""

    compare_every: int = 100  # steps after which hosts compare what they have done; 0: never
    replay_every: int = 0  # steps after which one is run twice and compared; 0: never
    sdc_every: int = 0  # TPUs: steps after which one has libtpu's checker in its program; 0: never

    def __post_init__(self):
        check_least(self, compare_every=0, replay_every=0, sdc_every=0)


@dataclass(frozen=True)
class WatchdogConfig:
    """Seconds after which a phase is stuck, and the run ends to be started again."""

    seconds: float = 900.0  # a step, or its data
    long_seconds: float = 7200.0  # preparing data, restoring, compiling, saving, sampling

    def __post_init__(self):
        check_least(self, seconds=1, long_seconds=1)


@dataclass(frozen=True)
class ProfileConfig:
    """An XProf trace of some steps, in `profile/` of the workdir."""

    steps: str | None = None  # such as "10:13", from the first step on and before the second

    def __post_init__(self):
        if self.steps is not None and self.span is None:
            raise UserError(f"profile.steps={self.steps!r}: expected FIRST:END, such as 10:13")

    @property
    def span(self) -> range | None:
        first, colon, end = (self.steps or "").partition(":")
        if not (colon and first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end)):
            return None
        return range(int(first), int(end))


@dataclass(frozen=True)
class MetricsConfig:
    """Where metrics and clips go beside the files of the workdir, and TensorBoard."""

    wandb: str | None = None  # project of Weights & Biases, or ENTITY/PROJECT; None: nowhere

    def __post_init__(self):
        parts = [] if self.wandb is None else self.wandb.split("/")
        if len(parts) > 2 or not all(parts):
            raise UserError(f"wandb={self.wandb!r} is not PROJECT or ENTITY/PROJECT")


@dataclass(frozen=True)
class SampleConfig:
    """The clips that `train` makes when it ends, and the defaults of `sample`."""

    num_clips: int = 8
    batch_size: int = 16  # clips in one call of the jitted sampler
    schedule: str = "ltx2"  # or another of `schedules.SCHEDULES`
    steps: int = 30
    video_guidance: float = 3.0  # classifier-free guidance scales; 1 = off
    audio_guidance: float = 7.0
    seed: int = 10
    preview_step: int | None = None  # a few clips after so many steps, to see how it goes

    def __post_init__(self):
        check_least(self, num_clips=1, batch_size=1)
        check_seed(self)
        for name in ("video_guidance", "audio_guidance"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)} is not a number")
        schedules.make_sigmas(self.schedule, self.steps)  # refused now, not after the training


SYNC_LAG = "val_sync_lag_ms"  # of sound and picture, the one metric of clips that can be best


@dataclass(frozen=True)
class ValidationConfig:
    """The loss on fixed samples, and clips of fixed prompts, while a training goes on."""

    every: int = 0  # steps after which the loss is taken; 0: never
    path: str | None = None  # dataset of held-out clips; None: the training set
    samples: int = 16  # the first so many records of one size
    seed: int = 0  # of their noise and noise levels, whatever the seed of the run
    # A metric, such as "val_loss": it is taken of every checkpoint too, and that in which it is
    # lowest is never deleted. Or "val_sync_lag_ms", of the clips: of checkpoints that have some.
    best: str | None = None
    clips_every: int = 0  # steps after which clips are made; 0: never
    # File of their prompts, and of those at the end: a line each, see `sampling.wishes`.
    prompts: str | None = None

    def __post_init__(self):
        check_least(self, every=0, samples=1, clips_every=0)
        check_seed(self)
        if self.best_of_clips and not self.clips_every:
            raise UserError(
                f"best={self.best}: needs clips_every, the steps after which clips are made"
            )
        for name in ("path",) if self.best_of_clips else ("path", "best"):
            if getattr(self, name) is not None and not self.every:
                raise UserError(f"{name}: needs every, the steps after which the loss is taken")

    @property
    def best_of_clips(self) -> bool:
        """Whether the best checkpoint is told by its clips, not by its loss."""
        return self.best == SYNC_LAG


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    workdir: str
    model: TransformerConfig = field(default_factory=TransformerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    # Compiled programs are kept in the workdir, so that the next start needs no compiler.
    compile_cache: bool = True
    # Weights to start from: a released file, one that convert wrote, or a name on the Hugging Face
    # Hub. None: random ones.
    init_from: str | None = None
    tune: TuneConfig | None = None  # what of them is trained; None: all, and in float32
    num_steps: int = 1000
    seed: int = 0

    def __post_init__(self):
        check_least(self, num_steps=1)
        check_seed(self)
        if self.tune is not None and self.init_from is None:
            raise UserError("tune: needs init_from, the weights that are tuned")

    @property
    def networks(self) -> LTX2Config:
        """Of what is trained: the transformer, and the connectors before it."""
        return LTX2Config(self.model, self.text.video_connector, self.text.audio_connector)
