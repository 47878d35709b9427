"""Where every array lives: the mesh, the logical-axis rules, and the few helpers that apply them.

Mesh axis names appear in this file only. The rest of the package speaks of logical axes ("batch",
"video_tokens", "heads"), which `RULES` maps to mesh axes:

    tensor axis                 mesh axis           why
    batch                       slice x data        guidance passes are batch entries
    video tokens                sequence            the only long axis
    audio tokens, text tokens   (replicated)        few rows: moving them costs more
    weights, input feature      data x sequence     FSDP: gathered in the compute dtype when used;
                                                    sampling keeps them whole: `resident_weights`.
                                                    Whole on every slice: between slices, gathering
                                                    would hold up every layer
    heads, mlp features         model               tensor parallel
    shards                      all                 what each device leaves for its own backward

The mesh is explicit (`jax.sharding.AxisType.Explicit`): shardings are part of array types, so a
wrong one is an error at trace time, without devices, and optimizer moments inherit the sharding of
their parameters. Without a mesh in context every helper is a no-op.

A slice is what the links between chips connect; several talk over the data-center network. The
mesh of one slice has no axis for it.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ltx2_jax.errors import UserError

SLICE = "slice"
IN_SLICE = ("data", "model", "sequence")
MESH_AXES = (SLICE, *IN_SLICE)
Names = tuple[str | None, ...]  # logical names, one per dimension of an array
PICTURE_AXES = ("clips", "rows", "columns")  # of the meshes for convolutional networks

RULES: dict[str, tuple[str, ...]] = {
    "batch": (SLICE, "data"),
    "video_tokens": ("sequence",),
    "audio_tokens": (),
    "text_tokens": (),
    "fsdp": ("data", "sequence"),
    "heads": ("model",),
    "mlp": ("model",),
    "shards": MESH_AXES,
    "slices": (SLICE,),
}
_RESIDENT = contextvars.ContextVar("resident", default=False)
_REDUCED_IN_FLOAT32 = contextvars.ContextVar("reduced_in_float32", default=False)


def make_mesh(
    data: int = -1,
    model: int = 1,
    sequence: int = 1,
    *,
    slices: int = -1,
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
    """An explicit mesh (data, model, sequence) over all devices of one slice.

    data = -1 takes what the others leave. Over several slices it is (slice, data, model, sequence),
    with the sizes of one of them. slices = -1 takes as many as the devices lie in; another number
    cuts devices that know of no slices, as CPUs, into blocks.

    Raises:
      UserError: the sizes do not multiply to the number of devices of a slice; there are not so
        many slices, or they are not alike.
    """
    devices = jax.devices() if devices is None else list(devices)
    groups = _by_slice(devices, slices)
    hosts = len({device.process_index for device in devices})
    sizes = mesh_sizes(data, model, sequence, len(devices) // len(groups), len(groups), hosts)
    grids = [_grid(sizes, group) for group in groups]
    if len(grids) == 1:
        return jax.sharding.Mesh(grids[0], IN_SLICE, axis_types=(AxisType.Explicit,) * 3)
    return jax.sharding.Mesh(np.stack(grids), MESH_AXES, axis_types=(AxisType.Explicit,) * 4)


def _grid(sizes: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice, [data, model, sequence]."""
    data, model, sequence = sizes
    try:
        grid = jax.make_mesh(sizes, IN_SLICE, (AxisType.Explicit,) * 3, devices=devices).devices
    except NotImplementedError:
        # No whole dimensions of the torus multiply to an axis, as for 32 x 1 x 2 on 4x4x4 chips.
        # Data and sequence, over which weights are gathered, are laid out as one: in another order
        # of the devices the TPU compiler gathers by all-reduces, which move twice the bytes.
        fsdp = create_device_mesh((data * sequence, model), devices, allow_split_physical_axes=True)
        grid = fsdp.reshape(data, sequence, model).swapaxes(1, 2)
    # Small slices jax lays out as one ring and cuts it up, whatever the axes: of 2x4 chips the two
    # shards of model 2, which add up each other's results four times a block, would lie in opposite
    # corners. In the order of their places they are next to each other, in rings if they are four.
    if len(devices) <= 32 and 1 < model < len(devices) and _apart(grid.swapaxes(1, 2)):

        def place(device: Any) -> tuple[int, ...]:
            x, y, z = device.coords
            return z, y, -x if model > 2 and y % 2 else x, device.core_on_chip

        near = np.empty(len(devices), object)
        near[:] = sorted(devices, key=place)
        near = near.reshape(data, sequence, model)
        grid = grid if _apart(near) else near.swapaxes(1, 2)
    return grid


def _apart(grid: np.ndarray) -> bool:
    """Whether neighbours along the last axis, which know their places, are not on one link."""
    if not hasattr(grid.flat[0], "coords"):
        return False
    places = np.array([d.coords for d in grid.flat]).reshape(*grid.shape, -1)
    return bool((np.abs(np.diff(places, axis=-2)).sum(-1) > 1).any())


def _by_slice(devices: Sequence[Any], slices: int) -> list[list[Any]]:
    """The devices of every slice, in the order of the slices; see `make_mesh`."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    groups, count = [found[index] for index in sorted(found)], len(devices)
    if slices > 1 and len(groups) == 1 and count % slices == 0 and devices[0].platform != "tpu":
        size = count // slices
        groups = [list(devices[i : i + size]) for i in range(0, count, size)]
    if slices not in (-1, len(groups)):
        there = f"{len(groups)} slice{'s'[: len(groups) > 1]}"
        raise UserError(f"mesh: slices={slices}, but the {count} devices are of {there}")
    if len(sizes := {len(group) for group in groups}) > 1:
        listed = " and ".join(map(str, sorted(sizes)))
        raise UserError(f"mesh: the {len(groups)} slices are not alike: of {listed} devices")
    return groups


def mesh_sizes(
    data: int, model: int, sequence: int, devices: int, slices: int = 1, hosts: int = 1
) -> tuple[int, int, int]:
    """Sizes of a mesh over so many devices of a slice; data = -1 takes what the others leave.

    The number of slices, and that of the hosts of all of them, are for the messages.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    others = model * sequence
    if data == -1 and min(model, sequence) >= 1 and devices % others == 0:
        data = devices // others
    if min(data, model, sequence) < 1 or data * others != devices:
        asked = f"mesh (data={data}, model={model}, sequence={sequence})"
        if hosts > 1 and min(data, others) > 0 and data * others * hosts == devices * slices:
            raise UserError(
                f"{asked} is that of the {data * others} devices of one host, but the run has "
                f"{hosts} hosts with {devices * slices} devices: data=-1 takes the rest"
            )
        divisors = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        of_each = f" of each of the {slices} slices" if slices > 1 else ""
        raise UserError(
            f"{asked} does not divide the {devices} devices{of_each}: data * model * sequence "
            f"must be {devices} (data=-1 takes the rest); sizes that divide them: {divisors}"
        )
    return data, model, sequence


def abstract_mesh(
    data: int, model: int, sequence: int, slices: int = 1
) -> jax.sharding.AbstractMesh:
    """A mesh without devices, to trace and check shardings of any size on any machine."""
    sizes, names = (data, model, sequence), IN_SLICE
    if slices > 1:
        sizes, names = (slices, *sizes), MESH_AXES
    return jax.sharding.AbstractMesh(sizes, names, (AxisType.Explicit,) * len(sizes))


def batch_shards(mesh: Any) -> int:
    """Number of shards of a batch on `mesh`, over all slices."""
    return math.prod(mesh.shape[axis] for axis in _axes("batch", mesh))


def picture_mesh(devices: Sequence[Any], batch: int, rows: int, columns: int) -> jax.sharding.Mesh:
    """A mesh that splits [batch, frames, rows, columns, channels] for a convolutional network.

    Clips go to as many devices as divide them, then columns, then rows; devices beyond that hold
    copies. The axes are Auto, not Explicit: XLA's partitioner gives every convolution the border
    of its neighbours by itself, which array types cannot express. Under `jax.set_mesh` of it,
    `picture_sharding` is the sharding of an array.
    """
    sizes, left = [], len(devices)
    for count in (batch, columns, rows):
        sizes.append(math.gcd(left, count))
        left //= sizes[-1]
    grid = np.asarray(devices).reshape(sizes[0], sizes[2], sizes[1], left)
    return jax.sharding.Mesh(grid, (*PICTURE_AXES, "copies"), axis_types=(AxisType.Auto,) * 4)


def replicated_on(devices: Sequence[Any]) -> NamedSharding:
    """A whole copy on every one of `devices`."""
    mesh = jax.sharding.Mesh(np.asarray(devices), "copies", axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


def picture_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of [batch, frames, rows, columns, channels] on a `picture_mesh`."""
    clips, rows, columns = PICTURE_AXES
    return NamedSharding(mesh, PartitionSpec(clips, None, rows, columns, None))


def pin_picture(x: jax.Array) -> jax.Array:
    """`x` [batch, frames, rows, columns, channels] split so, inside jit under a `picture_mesh`."""
    clips, rows, columns = PICTURE_AXES
    return jax.lax.with_sharding_constraint(x, PartitionSpec(clips, None, rows, columns, None))


def axis_size(name: str | None) -> int:
    """Number of shards of the logical axis `name` under the mesh in context (1 without one)."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in _axes(name, mesh))


def mesh_axes(name: str | None) -> tuple[str, ...]:
    """The mesh axes that shard the logical axis `name`, for collectives inside `on_shards`."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else _axes(name, mesh)


def target() -> tuple[str, str]:
    """(platform, device kind) that the program being traced is compiled for.

    Those of the mesh in context, which may be a slice that is not here; else of this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.platform, device.device_kind


def spec(*names: str | None) -> PartitionSpec | None:
    """PartitionSpec of one logical name per array dimension; None without a mesh in context.

    Raises:
      ValueError: an unknown logical name, or two names that share a mesh axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else _partition([_axes(name, mesh) for name in names])


@contextlib.contextmanager
def resident_weights() -> Iterator[None]:
    """Weights made or loaded within are stored whole along data and sequence, not FSDP.

    For sampling, which reads all of them in every step: gathering moves more than the activations.
    """
    token = _RESIDENT.set(True)
    try:
        yield
    finally:
        _RESIDENT.reset(token)


def is_resident() -> bool:
    """Whether `resident_weights` is in force."""
    return _RESIDENT.get()


@contextlib.contextmanager
def gradients_reduced_in(dtype: str) -> Iterator[None]:
    """Gradients traced within are summed over the shards of a batch in `dtype`.

    "float32", or "bfloat16": the dtype of the activations.
    """
    token = _REDUCED_IN_FLOAT32.set(dtype == "float32")
    try:
        yield
    finally:
        _REDUCED_IN_FLOAT32.reset(token)


def reduces_in_float32() -> bool:
    """Whether `gradients_reduced_in` asks for it, and there is a mesh whose shards are summed."""
    return _REDUCED_IN_FLOAT32.get() and not jax.sharding.get_abstract_mesh().empty


def _axes(name: str | None, mesh: Any) -> tuple[str, ...]:
    """Mesh axes of a logical name, without those of size 1: they would only collide.

    And without that of slices within `summed_over_slices`, where there is one.
    """
    if name is None or (name == "fsdp" and is_resident()):
        return ()
    if name not in RULES:
        raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(RULES)}")
    there = {axis: size for axis, size in mesh.shape.items() if size > 1}
    if SLICE in mesh.manual_axes:
        there.pop(SLICE, None)
    return tuple(axis for axis in RULES[name] if axis in there)


def _partition(entries: Sequence[tuple[str, ...]]) -> PartitionSpec:
    used = [axis for entry in entries for axis in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"a mesh axis is used twice: {entries}")
    return PartitionSpec(*(axes[0] if len(axes) == 1 else (axes or None) for axes in entries))


def pin(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` resharded to the logical axes `names`, one a dimension; unchanged without a mesh."""
    target = spec(*names)
    return x if target is None else jax.sharding.reshard(x, target)


def on_shards(
    f: Callable[..., Any], inputs: Sequence[Names], outputs: Any, *, checked: bool = True
) -> Callable[..., Any]:
    """`f` of the shards that one device holds; collectives inside name `mesh_axes`.

    `inputs` and `outputs` are logical names per dimension of each argument and result (a pytree of
    tuples). Without a mesh it is `f` itself. `checked` proves that a result which is the same on
    several devices by its names is so by its computation; kernels cannot be looked through.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return f
    names = lambda tree: jax.tree.map(lambda n: spec(*n), tree, is_leaf=_is_names)  # noqa: E731
    return jax.shard_map(
        f, in_specs=names(tuple(inputs)), out_specs=names(outputs), check_vma=checked
    )


def summed_over_slices(f: Callable[..., Any], shared: Any, batch: Any, rows: int) -> Any:
    """The sum over slices of `f(shared, batch)`, a tree of arrays, of the rows of each slice.

    What slices find crosses the data-center network once, when all of it is found: `f` computes
    on one slice as if there were no other. Of `batch`, arrays with `rows` rows are split over the
    slices. `f` closes over no arrays, and what it gathers by indices it gathers in `on_shards`: on
    others, XLA of jax 0.10 ends the process. With one slice, or without a mesh, the result is
    `f(shared, batch)`.
    """
    if axis_size("slices") == 1:
        return f(shared, batch)
    whole = PartitionSpec()
    over = jax.tree.map(lambda x: PartitionSpec(SLICE) if x.shape[0] == rows else whole, batch)
    within = jax.tree.map(lambda x: _within_slice(jax.typeof(x)), (shared, batch))
    found_at = []

    def explicit(*given: Any) -> Any:
        found = f(*given)
        found_at.append(jax.tree.map(lambda x: spec_of(jax.typeof(x)), found))
        return found

    def of_one_slice(*given: Any) -> Any:
        found = jax.sharding.explicit_axes(explicit, axes=IN_SLICE, in_sharding=within)(*given)
        return jax.lax.psum(found, SLICE)

    # On the way in and out the other axes are left to XLA: jax 0.10 would gather over explicit ones
    # what a function takes that is mapped over some axes only.
    mesh = jax.sharding.get_abstract_mesh()
    with jax.sharding.use_abstract_mesh(
        mesh.update_axis_types(dict.fromkeys(IN_SLICE, AxisType.Auto))
    ):
        given = jax.sharding.reshard((shared, batch), (jax.tree.map(lambda _: whole, shared), over))
        total = jax.shard_map(
            of_one_slice,
            in_specs=(whole, over),
            out_specs=whole,
            axis_names={SLICE},
            # What is found on a slice differs from what is found on another, until it is summed.
            check_vma=False,
        )(*given)
    return jax.sharding.reshard(total, found_at[0])


def _within_slice(x: Any) -> PartitionSpec:
    """The sharding of an array's type, but for the axis of slices."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec_of(x)]
    return _partition([tuple(axis for axis in entry if axis != SLICE) for entry in entries])


def _is_names(tree: Any) -> bool:
    return isinstance(tree, tuple) and all(name is None or isinstance(name, str) for name in tree)


def weight_spec(shape: Sequence[int], names: Sequence[str | None]) -> PartitionSpec | None:
    """Where a weight of `shape` is stored, given one logical name (or None) per dimension.

    "fsdp" falls on the named dimension if data x sequence divides it, else on the largest other
    free dimension that it divides, else on as many of its mesh axes as divide the named dimension.
    A tensor-parallel name that does not divide its dimension is a UserError: heads or mlp features
    cannot be split that way.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    entries: list[tuple[str, ...]] = []
    for size, name in zip(shape, names, strict=True):
        axes = _axes(None if name == "fsdp" else name, mesh)
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if size % shards:
            raise UserError(f"mesh axis {'x'.join(axes)}={shards} does not divide {size} ({name})")
        entries.append(axes)
    if "fsdp" in names:
        home = list(names).index("fsdp")
        others = sorted((i for i in range(len(shape)) if not entries[i] and i != home),
                        key=lambda i: -shape[i])  # fmt: skip
        fsdp = _axes("fsdp", mesh)
        options = [(i, fsdp) for i in (home, *others)] + [(home, (axis,)) for axis in fsdp]
        for i, axes in options:
            shards = math.prod(mesh.shape[axis] for axis in axes)
            if shape[i] % shards == 0:
                entries[i] = axes
                break
    return _partition(entries)


def sharding_of(mesh: jax.sharding.Mesh, *names: str | None) -> NamedSharding:
    """NamedSharding on `mesh` of one logical name per dimension, for data coming from the host."""
    return NamedSharding(mesh, _partition([_axes(name, mesh) for name in names]))


def abstract_state(create: Callable[..., Any], *args: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, dtypes and shardings of `create(*args)` on `mesh`, without computing anything."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.eval_shape(create, *args)
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec_of(a))),
        state,
    )


def spec_of(a: Any) -> PartitionSpec:
    """PartitionSpec of an array or abstract value; empty if it has no sharding."""
    return a.sharding.spec if getattr(a, "sharding", None) is not None else PartitionSpec()


def bytes_per_chip(tree: Any) -> int:
    """Bytes of one shard of every array of `tree` (arrays or abstract values with shardings)."""
    return sum(math.prod(_shard_shape(a)) * _bits(a.dtype) // 8 for a in jax.tree.leaves(tree))


def _bits(dtype: Any) -> int:
    """Of a number on a device: two int4 share a byte there, not in numpy."""
    return 4 if dtype == jax.numpy.int4 else 8 * dtype.itemsize


def replicated(tree: Any, limit_bytes: int = 1_000_000) -> list[str]:
    """Paths of arrays larger than `limit_bytes` of which every chip holds the whole."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, a in flat
        if a.size * a.dtype.itemsize > limit_bytes and _shard_shape(a) == a.shape
    ]


def _shard_shape(a: Any) -> tuple[int, ...]:
    return tuple(a.shape) if a.sharding is None else tuple(a.sharding.shard_shape(a.shape))
