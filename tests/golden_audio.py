"""Golden cases of the audio codec, group `audio`: front end, audio VAE, vocoder."""

import dataclasses
from functools import cache
from pathlib import Path

import jax
import numpy as np
from golden_case import Case, file_of, load

from ltx2_jax.models.codecs.audio_vae import AudioVAE
from ltx2_jax.models.codecs.mel import log_mel
from ltx2_jax.models.codecs.resample import resample
from ltx2_jax.models.codecs.vocoder import Vocoder


@cache
def audio_vae_of(folder: Path) -> AudioVAE:
    return load(file_of(folder, "audio_vae"), "audio_vae")


@cache
def vocoder_of(folder: Path) -> Vocoder:
    return load(file_of(folder, "vocoder"), "vocoder")


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def channels_first(x):
    return np.moveaxis(x, -1, 1)


def run_audio(case: Case):
    given = {name: channels_last(value) for name, value in case.inputs().items()}
    kind = case.name.partition("/")[2]
    # The longest match: "decode_to_waveform" is not a "decode" of some size, as "decode_t5" is.
    known = [name for name in KINDS if f"{kind}_".startswith(f"{name}_")]
    return KINDS[max(known, key=len, default=kind)](case, **given)


def run_waveform_to_mel(case, waveform):
    given = {"n_fft": case.args["n_fft"], "hop": case.args["hop"], "bins": case.args["n_mels"]}
    config = dataclasses.replace(audio_vae_of(case.folder).config.mel, **given)
    return {"mel": channels_first(jax.jit(log_mel, static_argnums=1)(waveform, config))}


def run_resample(case, waveform):
    return {"resampled": channels_first(resample(waveform, case.args["from"], case.args["to"]))}


def run_encode(case, mel):
    latents = jax.jit(AudioVAE.encode)(audio_vae_of(case.folder), mel)
    return {"latent": channels_first(latents)}


def run_encode_waveform(case, waveform):
    vae = audio_vae_of(case.folder)
    waveform = resample(waveform, case.args["sampling_rate"], vae.config.mel.sample_rate)
    return {"latent": channels_first(jax.jit(AudioVAE.encode_waveform)(vae, waveform))}


def run_decode(case, latent):
    mel = jax.jit(AudioVAE.decode)(audio_vae_of(case.folder), latent)
    return {"mel": channels_first(mel)}


def run_vocoder(case, mel):
    model = vocoder_of(case.folder)
    assert model.output_sample_rate == case.args["output_sampling_rate"]
    # Not jitted as a whole: its compilation takes longer than that of every part by itself, and
    # the cases share the parts.
    return {"waveform": channels_first(model(mel))}


def run_vocoder_parts(case, mel):
    model = vocoder_of(case.folder)
    low_rate = model.generator(mel)
    mel2 = model.extension.log_mel(low_rate)
    return {
        "low_rate": channels_first(low_rate),
        "mel2": np.moveaxis(mel2, (1, 2, 3), (3, 2, 1)),
        "residual": channels_first(model.extension.generator(mel2)),
        "skip": channels_first(model.extension.interpolate(low_rate)),
    }


def run_antialiased_activation(case, x):
    lists = {"acts1": "before_dilated", "acts2": "before_plain"}
    name, _, number = case.args["which"].partition(".")
    block = vocoder_of(case.folder).generator.blocks[case.args["resblock"]]
    return {"y": channels_first(getattr(block, lists[name])[int(number)](x))}


def run_decode_to_waveform(case, latent):
    model = vocoder_of(case.folder)
    assert model.output_sample_rate == case.args["sampling_rate"]
    mel = jax.jit(AudioVAE.decode)(audio_vae_of(case.folder), latent)
    return {"waveform": channels_first(model(mel))[0]}


KINDS = {
    "waveform_to_mel": run_waveform_to_mel,
    "resample": run_resample,
    "encode": run_encode,
    "encode_waveform": run_encode_waveform,
    "decode": run_decode,
    "vocoder": run_vocoder,
    "vocoder_parts": run_vocoder_parts,
    "antialiased_activation": run_antialiased_activation,
    "decode_to_waveform": run_decode_to_waveform,
}

RUNNERS = {"audio": run_audio}
