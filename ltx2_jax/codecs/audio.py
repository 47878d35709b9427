"""An audio VAE and a vocoder at work: waveforms to latents and back, on one device.

Dims: B batch, A audio latents, M mel-latent bins, C channels.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from ltx2_jax.chips import QUICK
from ltx2_jax.diffusion.geometry import AudioClock
from ltx2_jax.errors import UserError
from ltx2_jax.models.codecs.audio_vae import FRAMES_PER_LATENT, AudioVAEConfig
from ltx2_jax.models.codecs.inputs import as_stereo
from ltx2_jax.models.codecs.vocoder import VocoderConfig
from ltx2_jax.sharding import replicated_on
from ltx2_jax.weights import mapping
from ltx2_jax.weights.names import audio_vae as audio_weights
from ltx2_jax.weights.names import vocoder as vocoder_weights


class AudioCodec:
    """A released audio VAE with its vocoder, on one device; weights are read when first needed."""

    def __init__(
        self,
        config: AudioVAEConfig,
        vocoder: VocoderConfig | None,
        read: Callable[[Any], tuple[Any, ...]],
        *,
        device: jax.Device | None = None,
    ):
        """
        Args:
          config: of the VAE.
          vocoder: of the vocoder; None where the VAE has no decoder that would need one.
          read: gives the weights of both with the sharding that it is called with.
          device: to work on; the first of this process when None.
        """
        self.config, self.vocoder = config, vocoder
        self.sample_rate = config.mel.sample_rate
        self.output_sample_rate = self.sample_rate
        if vocoder is not None:
            self.output_sample_rate = (vocoder.extension or vocoder).sample_rate
        self.channels, self.bins = config.latent_channels, config.latent_bins
        self.clock = AudioClock(config.mel.sample_rate, config.mel.hop, FRAMES_PER_LATENT)
        self.latents_per_second = config.latents_per_second
        self.device = device or jax.local_devices()[0]
        self._read = read

    @cached_property
    def graph(self) -> tuple[Any, ...]:
        """Structure of the networks."""
        create = [partial(audio_weights.create, self.config)]
        if self.vocoder is not None:
            create.append(partial(vocoder_weights.create, self.vocoder))
        return tuple(mapping.graph(network) for network in create)

    @cached_property
    def params(self) -> tuple[Any, ...]:
        return self._read(jax.sharding.SingleDeviceSharding(self.device))

    def encode(self, audio: ArrayLike) -> np.ndarray:
        """Normalised latents float32 [B, A, M, C] of a waveform [B, samples, 2]; mono is doubled.

        A is samples / sample_rate * latents_per_second, halves to even, at least one.

        Raises:
          UserError: no samples, a sample that is not finite, or neither one nor two channels; there
            is no encoder.
        """
        if not self.config.has_encoder:
            raise UserError(
                "this audio VAE has no encoder (its file holds a decoder alone): sound cannot be "
                "encoded with it"
            )
        audio = as_stereo(audio)
        count = max(1, round(audio.shape[1] / self.sample_rate * self.latents_per_second))
        with jax.set_mesh(replicated_on([self.device]).mesh):
            latents = _encode_audio(self.params[0], audio, graph=self.graph[0])
        return np.asarray(latents[:, :count])

    def decode(self, latents: ArrayLike, num_samples: int | None = None) -> np.ndarray:
        """Waveform float32 [B, num_samples, 2] in [-1, 1] at output_sample_rate of [B, A, M, C].

        num_samples is A / latents_per_second seconds when None. The sound ends 30 ms before that,
        with the last mel frame; silence follows.

        Raises:
          UserError: there is no decoder.
        """
        if not self.config.has_decoder:
            raise UserError(
                "this audio VAE has no decoder (its file holds an encoder alone): latents cannot "
                "be decoded with it"
            )
        count = round(latents.shape[1] / self.latents_per_second * self.output_sample_rate)
        count = count if num_samples is None else num_samples
        with jax.set_mesh(replicated_on([self.device]).mesh):
            audio = _decode_audio(self.params, jnp.asarray(latents), graph=self.graph)
        audio = np.asarray(audio)[:, :count]
        return np.pad(audio, ((0, 0), (0, count - audio.shape[1]), (0, 0)))

    def program(self, half: str, shape: Sequence[int]) -> tuple[Any, ...]:
        """The jitted "encode" or "decode" of an array of `shape`, and its arguments as shapes.

        It is a `functools.partial` of what is jitted, and can be part of no other program.
        """
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        if half == "encode":
            return partial(_encode_audio, graph=self.graph[0]), self.params[0], x
        return partial(_decode_audio, graph=self.graph), self.params, x


@partial(jax.jit, static_argnames="graph")
def _encode_audio(params: Any, audio: Array, *, graph: Any) -> Array:
    return nnx.merge(graph, params).encode_waveform(audio)


@partial(jax.jit, static_argnames="graph", compiler_options=QUICK)
def _decode_audio(params: tuple[Any, Any], latents: Array, *, graph: tuple[Any, Any]) -> Array:
    vae, vocoder = (nnx.merge(g, p) for g, p in zip(graph, params, strict=True))
    return vocoder(vae.decode(latents))
