"""What the quickstart makes for itself, as values: clips, a codec, a text encoder."""

import dataclasses

from ltx2_jax.errors import UserError
from ltx2_jax.fields import check_seed
from ltx2_jax.models.codecs.mel import MelConfig
from ltx2_jax.models.text.gemma import GEMMA_SMALL
from ltx2_jax.models.text.gemma_layers import GemmaConfig

# A ball by day and a lamp by night, which the quickstart learns; and a ball by night, which it
# never sees: something new for a fine-tuning.
FAMILIES = ("bounce", "flash", "night")


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """What to render. Sizes in pixels (at least 16), fps in frames per second, sample_rate in Hz.

    Raises UserError for a size, rate, count, seed or family that cannot be rendered.
    """

    num_clips: int = 512
    num_frames: int = 25
    height: int = 32
    width: int = 32
    fps: float = 12.0
    sample_rate: int = 16000
    seed: int = 0
    families: tuple[str, ...] = FAMILIES[:2]

    def __post_init__(self) -> None:
        for name, least in (("num_clips", 1), ("num_frames", 2), ("height", 16), ("width", 16)):
            if getattr(self, name) < least:
                raise UserError(f"synthetic: {name} must be at least {least}")
        if not (self.fps > 0 and self.sample_rate > 0):
            raise UserError("synthetic: fps and sample_rate must be positive")
        check_seed(self, "synthetic: ")
        object.__setattr__(self, "families", tuple(self.families))
        unknown = sorted(set(self.families) - set(FAMILIES))
        if unknown or not self.families:
            raise UserError(f"synthetic: families must be some of {FAMILIES}, not {unknown}")

    @property
    def duration(self) -> float:
        """Seconds of picture."""
        return self.num_frames / self.fps


@dataclasses.dataclass(frozen=True)
class LinearCodecConfig:
    """Geometry and sizes; stored in the codec's file."""

    video_strides: tuple[int, int, int] = (4, 8, 8)  # st, sh, sw
    video_channels: int = 64
    audio_channels: int = 32
    # Component c is divided by std_c**whitening, then all by one number that makes the mean square
    # of a latent 1. At 0 an error of the sampler is as large in pixels in every component, and
    # shows as speckle in the many faint ones; at 1 the loss weighs a faint component as much as the
    # first, and the brightness of neighbouring patches drifts apart. 0.5 balances the two.
    whitening: float = 0.5
    mel: MelConfig = dataclasses.field(default_factory=MelConfig)
    mel_frames_per_latent: int = 4
    mel_inversion_iterations: int = 24
    griffin_lim_iterations: int = 32
    griffin_lim_momentum: float = 0.99

    def __post_init__(self) -> None:
        if len(self.video_strides) != 3 or min(self.video_strides) < 1:
            raise UserError(f"video_strides {self.video_strides}: expected three positive numbers")
        for name in ("video_channels", "audio_channels", "mel_frames_per_latent"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: expected at least 1")
        if not 0.0 <= self.whitening <= 1.0:
            raise UserError(f"whitening {self.whitening}: expected a number from 0 to 1")

    def num_audio_latents(self, samples: int) -> int:
        """Audio latents of a waveform: seconds * latents per second, halves to even, at least one.

        For a clip of F frames this is the official round(F / fps * 25) (`ltx_core/types.py`) except
        where that product is a half, or a sample from one: at 69 / 30 * 25 float arithmetic falls
        short of the half. `ltx2_jax.data.encoding` cuts the sound to the official count first.
        """
        return max(1, round(samples / (self.mel.hop * self.mel_frames_per_latent)))


@dataclasses.dataclass(frozen=True)
class RandomEncoderConfig:
    """A text encoder with fixed random weights: a small Gemma and the features of its states."""

    gemma: GemmaConfig = GEMMA_SMALL  # its vocab_size is the most that the tokenizer may have
    video_dim: int = 96  # width of the features for video
    audio_dim: int | None = 64  # and for audio; None: it receives those of video
    last_layer_only: bool = False  # features of the last hidden state alone
    seed: int = 0

    def __post_init__(self):
        check_seed(self)
        for name in self.gemma.layers:
            if name not in ("sliding", "full"):
                raise UserError(f"gemma.layers: {name!r} is not one of sliding, full")
            kv_heads = self.gemma.kind(name).kv_heads
            if self.gemma.num_heads % kv_heads:
                raise UserError(
                    f"gemma.num_heads={self.gemma.num_heads} is not a multiple of "
                    f"gemma.{name}.kv_heads={kv_heads}"
                )
