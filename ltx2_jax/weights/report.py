"""What is in a file of weights, for a person: `python -m ltx2_jax.convert --inspect` prints it."""

import collections
import re
from collections.abc import Iterable
from typing import Any

from ltx2_jax import units
from ltx2_jax.errors import UserError
from ltx2_jax.weights.loading import Source
from ltx2_jax.weights.lora import Lora
from ltx2_jax.weights.mapping import in_short
from ltx2_jax.weights.networks import NETWORKS
from ltx2_jax.weights.release import Held, Release
from ltx2_jax.weights.tensor_files import dtype_name

INDENT = "  "


def of_release(release: Release) -> str:
    """Release, a line for each network with parameters, dtypes and config; what is not read."""
    version, name = release.version(), release.release_of()
    metadata = ", ".join(sorted({key for file in release.files for key in file.metadata})) or "none"
    lines = [
        f"{release.name}",
        f"{INDENT}"
        + (f"LTX-2 {name}, " if name else "")
        + (f"model_version {version}" if version else "no model_version"),
        f"{INDENT}metadata: {metadata}",
        f"{INDENT}{'network':18}{'parameters':>12}  {'stored as':16}config",
    ]
    for network in filter(release.networks.get, NETWORKS):
        held = release.networks[network]
        lines.append(
            f"{INDENT}{network:18}{_count(held.tensors.values()):>12}  {_dtypes(held):16}"
            f"{_config(release, network)}"
        )
    unread = [source.name for held in release.networks.values() for source in held.unread.values()]
    for what, names in (("read by nothing", unread), ("beside", list(release.beside))):
        if names:
            lines.append(f"{INDENT}{what}: {_some(names)}")
    return "\n".join(lines)


def of_lora(lora: Lora) -> str:
    """Rank, scale, the modules that it adapts, and its metadata."""
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for module in lora.targets:
        kinds[re.sub(r"^transformer_blocks\.\d+\.", "", module)].append(module)
    ranks = sorted(lora.ranks)
    scales = {f"{target.scale:g}" for target in lora.targets.values()}
    parameters = sum(t.a.size + t.b.size for t in lora.targets.values())
    lines = [
        lora.name,
        f"{INDENT}LoRA of rank {', '.join(map(str, ranks))}, alpha / rank {', '.join(scales)}, "
        f"{units.parameters(parameters)} parameters",
        f"{INDENT}metadata: {', '.join(f'{k}={v}' for k, v in lora.metadata.items()) or 'none'}",
    ]
    lines += [
        f"{INDENT}{kind:34}{_shape(lora, modules[0]):>12}  {_blocks(modules)}".rstrip()
        for kind, modules in sorted(kinds.items())
    ]
    return "\n".join(lines)


def _count(sources: Iterable[Source]) -> str:
    return units.parameters(sum(s.stored.nbytes // s.stored.dtype.itemsize for s in sources))


def _dtypes(held: Held) -> str:
    """The dtypes by their share of the bytes."""
    sizes: dict[str, int] = collections.Counter()
    for source in held.tensors.values():
        sizes[dtype_name(source.stored.dtype)] += source.stored.nbytes
    return ", ".join(name for name, _ in sizes.most_common())


def _config(release: Release, network: str) -> str:
    try:
        config = release.config(network)
        release.parameters(network, config)
    except UserError as error:
        return f"! {error}"
    return describe(network, config)


def describe(network: str, config: Any) -> str:
    """One line about a config of ours."""
    return _DESCRIBE[network](config)


def _transformer(cfg: Any) -> str:
    parts = [
        f"{cfg.num_layers} blocks, video {cfg.num_heads} x {cfg.head_dim}, "
        f"audio {cfg.audio_num_heads} x {cfg.audio_head_dim}"
    ]
    words = {
        "gated attention": cfg.gated_attention,
        "modulated text": cfg.modulated_text_attention,
        "captions projected inside": cfg.caption_channels is not None,
        "no video feed-forward bias": not cfg.ff_bias,
        "keyframe mark": cfg.keyframe_embedding,
    }
    return ", ".join(parts + [word for word, has in words.items() if has])


def _connectors(configs: Any) -> str:
    video, audio = configs
    blocks = sorted({video.num_layers, audio.num_layers})
    return (
        f"{' and '.join(map(str, blocks))} blocks, video {video.num_heads} x {video.head_dim}, "
        f"audio {audio.num_heads} x {audio.head_dim}, {video.registers} registers"
    )


def _upsampler(cfg: Any) -> str:
    return ", ".join(
        f"{name} x{factor:g}"
        for name, factor in zip(("frames", "rows", "columns"), cfg.scale, strict=True)
        if factor != 1
    )


def _has_blocks(cfg: Any) -> bool:
    """Not of the statistics alone, which a file of a diffusion decoder has beside it."""
    return cfg.encoder_blocks is not None or cfg.decoder_blocks is not None


def _halves(encoder: bool, decoder: bool) -> str:
    names = [name for name, has in (("encoder", encoder), ("decoder", decoder)) if has]
    return " and ".join(names) or "statistics alone"


_DESCRIBE = {
    "transformer": _transformer,
    "connectors": _connectors,
    "text_projection": lambda c: (
        f"{c.num_states} states of {c.width} to {c.video_dim}"
        + (f" and {c.audio_dim}" if c.audio_dim else "")
    ),
    "gemma": lambda c: f"{c.num_layers} layers, {c.width} wide, {c.vocab_size} tokens",
    "video_vae": lambda c: (
        f"{c.latent_channels} channels, "
        + (f"strides {' x '.join(map(str, c.strides))}, " if _has_blocks(c) else "")
        + _halves(c.encoder_blocks is not None, c.decoder_blocks is not None)
    ),
    "diffusion_decoder": lambda c: f"{c.num_steps} step, predicts {c.prediction}",
    "audio_vae": lambda c: (
        f"{c.latent_channels} channels, {c.latents_per_second:g} latents/s, "
        + _halves(c.has_encoder, c.has_decoder)
    ),
    "vocoder": lambda c: f"{(c.extension or c).sample_rate} Hz",
    "duration_head": lambda c: f"width {c.width}",
    "upsampler": _upsampler,
}


def _some(names: list[str], most: int = 4) -> str:
    short = in_short(names)
    return ", ".join(short[:most]) + (f" and {len(short) - most} more" if len(short) > most else "")


def _shape(lora: Lora, module: str) -> str:
    target = lora.targets[module]
    return f"{target.b.shape[0]} x {target.a.shape[1]}"


def _blocks(modules: list[str]) -> str:
    numbers = [int(m.split(".")[1]) for m in modules if m.startswith("transformer_blocks.")]
    if not numbers:
        return ""
    first, last = min(numbers), max(numbers)
    if len(numbers) == last - first + 1:
        return f"blocks {first} to {last}" if last > first else f"block {first}"
    return f"{len(numbers)} blocks of {first} to {last}"
