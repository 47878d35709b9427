"""What a train step should need, by arithmetic alone: to rank what is worth compiling.

Memory of a chip: the state (exact, from its shapes), gradients, what the remat policy keeps of
every block, the working set of one block, and its gathered weights. Time: matrix products
and attention at the chip's sustained rates, recomputation included; the elementwise rest as traffic
with HBM; weights gathered and gradients reduced beside it; and what tensor and sequence parallelism
exchange in between. The constants are fitted to compiled steps of the 19B model on v5p, v6e and
tpu7x; times come within 10 % of those, peaks within 15 %.
"""

import dataclasses
import functools
import math

import jax

from ltx2_jax.chips import Chip
from ltx2_jax.config import Config
from ltx2_jax.models import flops
from ltx2_jax.models.quantized import FORMS
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.planning.compiled.interconnect import EFFICIENCY
from ltx2_jax.planning.compiled.roofline import HBM_EFFICIENCY
from ltx2_jax.planning.programs import train_state
from ltx2_jax.sampling.programs import Request
from ltx2_jax.sharding import SLICE, batch_shards, bytes_per_chip
from ltx2_jax.training import initial, trainable

WORKING_ROWS = 80  # [tokens, width] arrays of 2 bytes that live at once in a block's backward pass
MOVED_ROWS = 400  # that the elementwise rest of a block reads and writes, in both passes
SEEN = 0.2  # of what is sent beside matrix products, as the roofline of compiled steps has it
SCATTERS = ("v7x",)  # where gradients over all devices are reduced so, and not in the program's way
POLICIES = ("block", "attention", "attention_offload", "projections")  # that we can estimate
ATTENTION_PASSES = 3.5  # a kernel's backward pass costs 2.5 forward ones: it computes logits again


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one jax device: bytes, and seconds of a step. `mfu` as in `compiled.roofline`."""

    state: float
    gradients: float
    saved: float
    working: float
    weights: float
    compute: float
    hbm: float
    links: float
    between_slices: float  # all of it holds up the step, as far as we know
    step: float
    mfu: float

    @property
    def peak(self) -> float:
        return self.state + self.gradients + self.saved + self.working + self.weights

    def facts(self) -> dict[str, float]:
        """All of it as JSON."""
        return dataclasses.asdict(self) | {"peak": self.peak}


def estimate(
    config: Config, request: Request, mesh: jax.sharding.AbstractMesh, chip: Chip
) -> Estimate:
    """Of the train step of `config` for clips as `request` says, at practical rates.

    Raises:
      UserError: weights cannot be split so.
    """
    cfg, shape = config.model, dict(mesh.shape)
    model, sequence = shape["model"], shape["sequence"]
    clips = config.data.batch_size / batch_shards(mesh) / config.optim.accumulate_steps
    video, audio = math.prod(request.video_shape), request.audio_length
    tokens = clips * video / sequence  # of a device
    network = dataclasses.replace(cfg, remat="none")
    alone = Config("", network, config.text, optim=config.optim)
    alone = dataclasses.replace(alone, tune=config.tune, init_from=config.init_from)
    state, params = _state_bytes(alone, mesh)
    block = flops.total_parameters(network) / cfg.num_layers / model

    whole, split = saved_rows(cfg)
    small = clips * (audio + 2 * config.text.length) * cfg.audio_width / cfg.width
    kept = 2 * cfg.num_layers * (tokens + small) * (whole + split / model)
    on_host = kept if cfg.remat == "attention_offload" else 0.0
    width = cfg.width / model**0.5  # about half of what a block works on is split over model
    working = 2 * WORKING_ROWS * tokens * width
    compute = _compute(config, request, chip, mesh.size)
    moved = 2 * MOVED_ROWS * cfg.num_layers * tokens * width * config.optim.accumulate_steps
    hbm = moved / chip.device_hbm_bandwidth / HBM_EFFICIENCY
    links = _links(config, chip, shape, block, tokens)
    host = 2 * on_host * config.optim.accumulate_steps / chip.host_bandwidth  # there and back
    hidden = links["gathered"] + (links["reduced"] if chip.name in SCATTERS else 0.0)
    seen = sum(links.values()) - hidden + SEEN * hidden
    between = _between_slices(chip, mesh, params)
    step = max(compute + hbm + seen + between, hidden, host)
    work = trainable.train_flops(config, video, audio) * config.data.batch_size
    return Estimate(
        state=state,
        gradients=params,
        saved=kept - on_host,
        working=working,
        weights=2 * block,
        compute=compute,
        hbm=hbm,
        links=sum(links.values()),
        between_slices=between,
        step=step,
        mfu=work / step / chip.device_flops / mesh.size,
    )


@functools.cache
def _state_bytes(config: Config, mesh: jax.sharding.AbstractMesh) -> tuple[int, int]:
    """Of the train state with frozen weights, and of the parameters that are trained."""
    state, frozen = train_state(config, mesh), initial.frozen_homes(config, mesh)
    return bytes_per_chip(state) + bytes_per_chip(frozen), bytes_per_chip(state["params"])


def saved_rows(cfg: TransformerConfig) -> tuple[int, int]:
    """Numbers per block and video token that a policy keeps: not split by model, and split.

    See `models.remat.REMAT_POLICIES`; "attention_offload" keeps them in the host's memory.
    """
    width, cross = cfg.width, cfg.audio_width if cfg.audio_video_attention else 0
    attention = 2 * width + cross
    projections = 3 * width + width + 3 * cross + cfg.ff_mult * width
    return {
        "block": (width, 0),
        "attention": (width, attention),
        "attention_offload": (width, attention),
        "projections": (2 * width, attention + projections),
    }.get(cfg.remat, (5 * width, attention + projections))


def recomputed(cfg: TransformerConfig) -> float:
    """Share of a block's matrix products, attention apart, that the backward pass runs again."""
    width, cross = cfg.width, cfg.audio_width if cfg.audio_video_attention else 0
    everything = 4 * width + 2 * width + 4 * cross + 2 * cfg.ff_mult * width
    given_back = 2 * width + cross  # to_out of self-, text and audio-to-video attention
    return {"projections": given_back / everything, "none": 0.0, "dots": 0.0}.get(cfg.remat, 1.0)


def _compute(config: Config, request: Request, chip: Chip, devices: int) -> float:
    cfg, video = config.model, math.prod(request.video_shape)
    terms = flops.forward_flops(cfg, video, request.audio_length, config.text.length)
    core = {name: value for name, value in terms.items() if "core" in name}
    products = sum(terms.values()) - sum(core.values())
    passes = ATTENTION_PASSES + (1 if cfg.remat == "block" else 0)
    own = trainable.trained_share(config)  # of frozen matrices there is no gradient
    seconds = products * (flops.TRAIN_PASSES - 1 + own + recomputed(cfg)) / chip.gemm
    for name, value in core.items():
        head = cfg.head_dim if name.startswith("video") else cfg.audio_head_dim
        seconds += passes * value / chip.attention(head)
    return config.data.batch_size * seconds / chip.device_flops / devices


def _gathered_bytes(config: Config) -> float:
    """Of a number of a weight on its way from its shards, on the average."""
    if config.tune is None:
        return 2.0
    form = config.tune.quantize
    frozen = 1.0 if config.tune.lora is not None else 1 - trainable.trained_share(config)
    own = 0.0 if config.tune.resident else FORMS[form][2] / 8 if form else 2.0
    return 2 * (1 - frozen) + own * frozen


def _between_slices(chip: Chip, mesh: jax.sharding.AbstractMesh, params: float) -> float:
    """Seconds of a step in which gradients as large as `params` bytes of weights cross."""
    sent = 2 * (1 - 1 / mesh.shape.get(SLICE, 1)) * params
    return sent / chip.device_network / EFFICIENCY if sent else 0.0


def _links(
    config: Config, chip: Chip, mesh: dict[str, int], block: float, tokens: float
) -> dict[str, float]:
    """Seconds of a step on links: weights gathered, gradients reduced, activations exchanged."""
    cfg, model, sequence = config.model, mesh["model"], mesh["sequence"]
    all_links, ring = (
        links * EFFICIENCY / chip.devices for links in (chip.interconnect, 2 * chip.link)
    )
    blocks = cfg.num_layers * config.optim.accumulate_steps
    others = 1 - 1 / (mesh["data"] * sequence)  # of a weight's shards
    reduced = 2 * block * (1 if chip.name in SCATTERS else 2)  # bfloat16, twice as an all-reduce
    row = 2 * tokens * cfg.width  # bytes of one activation
    summed = 8 * 2 * row * (1 - 1 / model)  # all-reduces of four products, in both passes
    traded = 3 * 4 * row / model * (1 - 1 / sequence)  # q, k, v and the result, in three passes
    return {
        "gathered": blocks * 2 * _gathered_bytes(config) * block * others / all_links,
        "reduced": trainable.trained_share(config) * blocks * reduced * others / all_links,
        "exchanged": blocks * (summed + traded) / ring,
    }
