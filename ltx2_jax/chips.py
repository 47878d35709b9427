"""The accelerators we run on: what one chip can do, what share of it programs sustain, and what we
ask of its compiler beyond the defaults.

Peaks are the vendors'. A jax device is a chip, except on v7x, where it is one of the chip's two
cores (v4 and v5p fuse theirs); `device_*` are of a jax device.

Sustained fractions of the bf16 peak: `gemm` of large dense matrix products is an assumption; the
attention kernels at head width 128 and 64 are records for 16k tokens, unmasked, forward, or marked
as assumed where no record was found:

    v5p, v6e, h100    autotuning records shipped with tokamax (openxla/tokamax)
    v7x               128: MaxDiffusion's fixed-m ring kernel (pull request 452), of which the 256
                      wide matrix unit allows 2/3; 64: tokamax
    v4, v5e           assumed like their nearest relative, v5p
    h200              as h100, the same compute
    b200              cuDNN and FlashAttention-4 (Dao-AILab/flash-attention, pull request 2605)
    a100              the FlashAttention-2 paper (arXiv 2307.08691)

Products of int8 and of float8 are rated as times the bf16 peak, by the vendors, with the same
sustained fraction, which is an assumption. 1 is for chips that gain nothing (docs.cloud.google.com
says so of v4's int8, and of float8 on v5p and v6e), have no such unit, or of which nothing is said.

Between slices data crosses the data-center network over the hosts. Its rate is the vendor's peak of
a chip (docs.cloud.google.com/tpu; of v4, which has none there, assumed as v5p): 200 Gbit/s for a
host of four v5p. That programs reach it is an assumption; no run has measured it.
"""

import dataclasses

from ltx2_jax.sharding import target

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. FLOP/s are dense bf16; bytes/s are in one direction, of all links together."""

    name: str
    flops: float  # per second
    hbm_bytes: float  # what a program can have: TPU compilers keep up to 1.25 GiB for themselves
    hbm_bandwidth: float
    interconnect: float
    torus: int  # dimensions of the network of chips; 0 is a switch
    matrix_unit: int | None  # side of the systolic array
    gemm: float
    attention_128: float
    attention_64: float
    host_bandwidth: float  # bytes/s of one jax device to the memory of its host, one direction
    network: float = 0.0  # bytes/s of one chip to other slices, one direction
    devices: int = 1  # jax devices
    int8: float = 1.0  # products of int8 in the time of one of bf16
    fp8: float = 1.0  # and of float8 e4m3

    @property
    def device_flops(self) -> float:
        return self.flops / self.devices

    @property
    def device_hbm_bytes(self) -> float:
        return self.hbm_bytes / self.devices

    @property
    def device_hbm_bandwidth(self) -> float:
        return self.hbm_bandwidth / self.devices

    @property
    def device_network(self) -> float:
        return self.network / self.devices

    def products(self, dtype: str) -> float:
        """Products of two numbers of a dtype in the time of one of bf16.

        The dtype is named as XLA names it, or as a form of quantised weights.
        """
        eight_bits = {"s8": self.int8, "int8": self.int8, "f8e4m3fn": self.fp8, "fp8": self.fp8}
        return eight_bits.get(dtype, 1.0)

    @property
    def link(self) -> float:
        """Bytes/s of one link to a neighbour, one direction; of all links to a switch."""
        return self.interconnect / (2 * self.torus or 1)

    def attention(self, head_width: int) -> float:
        """Sustained fraction of the peak of an attention kernel."""
        return self.attention_128 if head_width >= 128 else self.attention_64


def _tpu(name: str, tflops: float, gib: float, *rates: float, **more: float) -> Chip:
    hbm, interconnect, torus, side, attention_128, attention_64, host, network = rates
    return Chip(name, tflops * 1e12, gib * GIB, hbm * 1e9, interconnect * 1e9, torus, side,
                0.80, attention_128, attention_64, host * 1e9, network * 1e9, **more)  # fmt: skip


def _gpu(name: str, tflops: float, gib: float, *rates: float, **more: float) -> Chip:
    hbm, nvlink, attention_128, attention_64 = rates
    return Chip(name, tflops * 1e12, gib * GIB, hbm * 1e9, nvlink * 1e9, 0, None,
                0.72, attention_128, attention_64, 64e9, **more)  # fmt: skip


CHIPS = {
    chip.name: chip
    for chip in (
        # TFLOP/s, GiB for a program, HBM GB/s, links GB/s, torus, MXU, attention 128, 64, host,
        # network GB/s
        _tpu("v4", 275, 30.75, 1228, 300, 3, 128, 0.80, 0.42, 16, 6.25),
        _tpu("v5e", 197, 15.75, 819, 200, 2, 128, 0.80, 0.42, 16, 3.125, int8=2),
        _tpu("v5p", 459, 95.74, 2765, 600, 3, 128, 0.89, 0.46, 16, 6.25, int8=2),
        _tpu("v6e", 918, 31.25, 1638, 400, 2, 256, 0.36, 0.19, 32, 12.5, int8=2),
        _tpu("v7x", 2307, 189.5, 7380, 600, 3, 256, 0.60, 0.17, 32, 12.5, devices=2, fp8=2),
        # bf16 TFLOP/s, GiB, HBM GB/s, NVLink GB/s, attention 128, 64
        _gpu("a100-40gb", 312, 40, 1555, 300, 0.71, 0.60, int8=2),
        _gpu("a100", 312, 80, 2039, 300, 0.71, 0.60, int8=2),
        _gpu("h100", 989, 79.6, 3350, 450, 0.70, 0.57, int8=2, fp8=2),
        _gpu("h200", 989, 140.4, 4800, 450, 0.70, 0.57, int8=2, fp8=2),
        _gpu("b200", 2250, 179, 8000, 900, 0.57, 0.46, int8=2, fp8=2),
    )
}
# Parts of a lower-cased `device_kind`, first match wins: jax calls a v5e "TPU v5 lite" or "TPU
# v5e", a v5p "TPU v5" or "TPU v5p", a v6e "TPU v6 lite" or "TPU v6e", a v7x "TPU7x".
_KINDS = (
    (("v5 lite",), "v5e"),
    (("v5e",), "v5e"),
    (("v5",), "v5p"),
    (("v6",), "v6e"),
    (("7x",), "v7x"),
    (("a100", "40gb"), "a100-40gb"),
    *(((name,), name) for name in ("v4", "a100", "h100", "h200", "b200")),
)


def of_kind(device_kind: str) -> Chip | None:
    """The chip of `jax.devices()[0].device_kind`, or None for one not listed, such as a CPU."""
    kind = device_kind.lower()
    return next((CHIPS[name] for parts, name in _KINDS if all(p in kind for p in parts)), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of one jax device in FLOP/s, or None for a kind that is not listed.

    Multiply by the number of jax devices.
    """
    chip = of_kind(device_kind)
    return None if chip is None else chip.device_flops


def hbm_bytes(device_kind: str) -> int | None:
    """High-bandwidth memory of one jax device, or None for a kind that is not listed."""
    chip = of_kind(device_kind)
    return None if chip is None else round(chip.device_hbm_bytes)


def wraps(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Whether the ends of each dimension of a slice of this shape, in chips, are connected.

    Slices of three-dimensional pods close if they are made of whole 4x4x4 cubes; those of
    two-dimensional ones along a dimension of the whole pod, 16 chips.
    """
    if chip.torus == 3:
        return (all(size % 4 == 0 for size in shape),) * len(shape)
    return tuple(size == 16 for size in shape)


# ------------------------------------------------------------------------------- compiler options

# Only what the TPU compiler's releases 0.0.42 and 0.0.50 both accept: the older way to run
# collectives beside matrix products, `xla_tpu_enable_async_collective_fusion`, the newer refuses
# on all chips but v5e, as it may give wrong results there.

# Sparse cores gather weights and reduce gradients while the matrix units go on; a v7x does so by
# itself. (On v5p, 0.0.42 still gathers on the matrix units' time; 0.0.50 does not.)
_ON_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
}
# Otherwise the stacked weights of a v7x are copied into another layout before the loop over them.
_STORED_LAYOUT = {"xla_tpu_control_large_2nd_minor_layout_for_x16": 0}
Options = dict[str, bool | int]
# libtpu's checker of silent faults: what a core computes it computes again, and one that got other
# bits halts. By its own words alone: no chip has run it here, so that its price is not known.
_CHECKED: Options = {
    "xla_tpu_enable_sdc_checker": True,
    "xla_tpu_sdc_check_repeat_count": 1,
    "xla_tpu_sdc_check_halt_on_detection": True,
}
SAMPLING: dict[str, Options] = {"v7x": _STORED_LAYOUT}
TRAINING: dict[str, Options] = {
    "v5p": _ON_SPARSE_CORES,
    "v6e": _ON_SPARSE_CORES,
    "v7x": _STORED_LAYOUT,
}


def compiler_options(*, training: bool, checked: bool = False) -> Options | None:
    """For the `compiler_options` of `jax.jit`, by the chip of the mesh in context; None: defaults.

    `checked` puts the checker of silent faults into the program, on a TPU.

    To be called under the `jax.set_mesh` that the program runs under. A sampler gathers no weights,
    and what it sends, the next instruction waits for.
    """
    platform, kind = target()
    chip = of_kind(kind)
    if platform != "tpu" or chip is None:
        return None
    options = (TRAINING if training else SAMPLING).get(chip.name)
    return (options or {}) | _CHECKED if checked else options


# For the `compiler_options` of `jax.jit`, where a TPU's compiler works minutes on a program that
# runs for a moment: the effort O1. For v5e, six convolutions of the vocoder (96 channels, 10,000
# samples) compile in 4.5 s of a core in place of 30, and take as long by the compiler's estimate.
QUICK: Options = {"optimization_level": 19}


def one_run_options() -> Options | None:
    """For the `compiler_options` of `jax.jit`, where a program runs once, or seldom.

    A CPU's compiler would spend a hundred times longer on its speed than it runs.
    """
    return {"xla_backend_optimization_level": 0} if target()[0] == "cpu" else None
