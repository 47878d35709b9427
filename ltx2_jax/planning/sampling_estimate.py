"""What one step of a sampler should take on a mesh, by arithmetic alone: to rank meshes.

Matrix products and attention at the chip's sustained rates, but no faster than the weights come
from memory: few rows a device leave the matrix unit waiting. Then what is exchanged, in the
program's way, on the links that the mesh's axes have (`compiled.interconnect`): the sums of what
`model` splits, tokens traded for heads and back over `sequence`, and the merged sound. Memory of a
device: the weights, exact, the text's keys and values, and some arrays as large as the activations.
The two constants are fitted to compiled steps (docs/planning.md).
"""

import dataclasses
import functools
import math
from typing import Any

import jax

from ltx2_jax.chips import Chip
from ltx2_jax.models import flops, ltx2
from ltx2_jax.models.ltx2 import LTX2Config
from ltx2_jax.models.quantized import FORMS, PRODUCTS, stored
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.planning.compiled.collectives import Collective
from ltx2_jax.planning.compiled.interconnect import Network, seconds
from ltx2_jax.planning.compiled.roofline import HBM_EFFICIENCY
from ltx2_jax.sampling.programs import Request
from ltx2_jax.sharding import abstract_mesh, bytes_per_chip
from ltx2_jax.text.encoder import LENGTH

LIVE_ROWS = 12  # arrays like the activations of the video that live at once
MOVED_ROWS = 16  # that the elementwise rest of a block reads and writes in HBM
# How the terms of `flops.forward_flops` end that are of matrices in blocks.
_IN_BLOCKS = ("projections", "keys and values", "feed-forward", "gates")


@dataclasses.dataclass(frozen=True)
class SampleEstimate:
    """Of one jax device: bytes, and seconds of a step of all passes."""

    weights: float
    working: float
    products: float  # at the rates of the matrix unit
    memory: float  # that they, and the rest of a block, take longer
    links: float

    @property
    def peak(self) -> float:
        return self.weights + self.working

    @property
    def step(self) -> float:
        return self.products + self.memory + self.links

    def facts(self) -> dict[str, float]:
        """All of it as JSON."""
        return dataclasses.asdict(self) | {"peak": self.peak, "step": self.step}


def estimate_sample(
    networks: LTX2Config, request: Request, mesh: jax.sharding.Mesh, chip: Chip, rows: int
) -> SampleEstimate:
    """Of `rows` clips and passes, at practical rates; the devices of `mesh` need not exist.

    Raises:
      UserError: weights cannot be split so.
    """
    cfg, (data, model, sequence) = networks.transformer, mesh.devices.shape
    rows = -(-rows // data)  # of a device
    tokens = math.prod(request.video_shape) / sequence
    activation = 2 * rows * tokens * cfg.width  # bytes, of the video
    hoisted = not (cfg.modulated_text_attention and cfg.prompt_adaln)
    text = 2 * 2 * cfg.num_layers * rows * LENGTH * (cfg.width + cfg.audio_width) / model
    products, memory = _products(networks, request, chip, rows, model, sequence)
    moved = cfg.num_layers * MOVED_ROWS * activation
    return SampleEstimate(
        weights=weight_bytes(networks, model),
        working=LIVE_ROWS * activation + (text if hoisted else 0.0),
        products=products,
        memory=memory + moved / chip.device_hbm_bandwidth / HBM_EFFICIENCY,
        links=cfg.num_layers * _links(cfg, request, mesh, chip, rows),
    )


@functools.cache
def weight_bytes(networks: LTX2Config, model: int) -> int:
    """Of a device, with the weights split over so many."""
    mesh = abstract_mesh(1, model, 1)  # they are whole along the other axes
    return bytes_per_chip(ltx2.abstract_params(networks, mesh, for_sampling=True))


def _products(
    networks: LTX2Config, request: Request, chip: Chip, rows: int, model: int, sequence: int
) -> tuple[float, float]:
    """Seconds of matrix products and attention, and how much longer reading the weights takes."""
    cfg, tokens = networks.transformer, math.prod(request.video_shape)
    terms = flops.forward_flops(cfg, tokens, request.audio_length, LENGTH)
    size = FORMS[stored(networks.quantized)][2] / 8 if networks.quantized else 2
    hbm = chip.device_hbm_bandwidth * HBM_EFFICIENCY
    gemm = chip.gemm * chip.products(PRODUCTS.get(networks.quantized, ""))
    products = longer = 0.0
    for rows_of, shards, parameters in _matrices(cfg, tokens, request.audio_length):
        each = parameters / model
        busy = 2 * each * rows * rows_of / shards(sequence) / chip.device_flops / gemm
        products += busy
        longer += max(0.0, size * each / hbm - busy)
    for name, work in terms.items():
        if "core" in name:
            head = cfg.head_dim if name.startswith("video") else cfg.audio_head_dim
            # Where the sound attends to itself or to the text, every shard has all of it.
            whole = name.startswith(("audio self", "audio text"))
            over = model * (1 if whole else sequence)
            products += rows * work / over / chip.device_flops / chip.attention(head)
    return products, longer


def _matrices(cfg: TransformerConfig, tokens: int, audio: int) -> list[tuple[int, Any, float]]:
    """Of all blocks: rows, over how many shards of `sequence` they are, and parameters.

    Those that read the video, the sound, and the text, if its keys and values change from step to
    step. A parameter is two FLOPs of a row.
    """

    def parameters(*rows: int) -> float:
        terms = flops.forward_flops(cfg, *rows).items()
        return sum(work for name, work in terms if name.endswith(_IN_BLOCKS)) / 2

    found = [(tokens, lambda s: s, parameters(1, 0, 0)), (audio, lambda s: 1, parameters(0, 1, 0))]
    if cfg.modulated_text_attention and cfg.prompt_adaln:
        found.append((LENGTH, lambda s: 1, parameters(0, 0, 1)))
    return found


def _links(
    cfg: TransformerConfig, request: Request, mesh: jax.sharding.Mesh, chip: Chip, rows: int
) -> float:
    """Seconds that a block waits for links."""
    _, model, sequence = mesh.devices.shape
    network = Network.of(list(mesh.devices.flat), chip)
    summed, group = range(0, model * sequence, sequence), math.gcd(cfg.num_heads // model, sequence)

    def sent(kind: str, members: range, size: float) -> float:
        moved = Collective(
            kind, "bf16", size, 1, (), ("some",), len(members), tuple(members), False, ""
        )
        return seconds(moved, network, ideal=False)

    video = 2 * rows * math.prod(request.video_shape) / sequence * cfg.width
    audio = 2 * rows * request.audio_length * cfg.audio_width
    total = 4 * sent("all-reduce", summed, video + audio)
    # The norms of queries and keys are over all heads: a number a row.
    total += 4 * sent("all-reduce", summed, 4 * (video / cfg.width + audio / cfg.audio_width))
    total += sent("all-to-all", range(group), 3 * video / model)
    total += sent("all-to-all", range(group), video / model)
    if (around := sequence // group - 1) > 0:
        total += around * sent("collective-permute", range(0, sequence, group), 2 * video / model)
    if cfg.audio_video_attention:  # in float32: the highest logits, then what is merged
        total += sent("all-reduce", range(sequence), 2 * audio / model / cfg.audio_head_dim)
        total += sent("all-reduce", range(sequence), 2 * audio / model)
    return total
