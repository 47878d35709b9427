"""What we ask of the TPU compiler beyond its defaults, by chip.

Only what its releases 0.0.42 and 0.0.50 both accept: the older way to run
collectives beside matrix products, `xla_tpu_enable_async_collective_fusion`, the newer refuses
on all chips but v5e, as it may give wrong results there.
"""

from ltx2_jax import chips
from ltx2_jax.sharding import target

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
SAMPLING: dict[str, Options] = {"v7x": _STORED_LAYOUT}
TRAINING: dict[str, Options] = {
    "v5p": _ON_SPARSE_CORES,
    "v6e": _ON_SPARSE_CORES,
    "v7x": _STORED_LAYOUT,
}


def compiler_options(*, training: bool) -> Options | None:
    """For the `compiler_options` of `jax.jit`, by the chip of the mesh in context; None: defaults.

    To be called under the `jax.set_mesh` that the program runs under. A sampler gathers no weights,
    and what it sends, the next instruction waits for.
    """
    platform, kind = target()
    chip = chips.of_kind(kind)
    if platform != "tpu" or chip is None:
        return None
    return (TRAINING if training else SAMPLING).get(chip.name)
