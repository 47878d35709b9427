"""LoRAs fused into weights, kept beside them, trained, and extracted from a difference.

    lora = read_lora("style.safetensors")
    fused, originals = fuse(params, [(lora, 0.8)], config)
    params = unfuse(fused, originals)

The weight becomes W + strength (alpha / r) B A; `lora_files.py` reads and writes the files.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ltx2_jax.errors import UserError
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.sharding import sharding_of
from ltx2_jax.weights import mapping, versions
from ltx2_jax.weights.lora_files import Lora, Target, is_matrix, matrices
from ltx2_jax.weights.lora_files import lora_file as lora_file
from ltx2_jax.weights.lora_files import read_lora as read_lora
from ltx2_jax.weights.lora_files import write_lora as write_lora
from ltx2_jax.weights.lora_targets import Adapted
from ltx2_jax.weights.mapping import Parameter, in_short

# ------------------------------------------------------------------------------------------ fitting


def check(lora: Lora, config: TransformerConfig, release: str = "") -> None:
    """UserError unless a LoRA is for a transformer of this config, and of this release if given.

    All that does not fit is listed.
    """
    made_for = versions.release_of(lora.metadata.get("model_version", ""))
    if made_for and release and made_for != release:
        raise UserError(f"{lora.name}: is for LTX-2 {made_for}, these weights are {release}")
    shapes = {
        name.removesuffix(".weight"): parameter.official_shape
        for parameter in matrices(config)
        for name in parameter.names
    }
    wrong = []
    for module, target in lora.targets.items():
        shape = (target.b.shape[0], target.a.shape[1])
        if module not in shapes:
            wrong.append(f"{module} is not there")
        elif shapes[module] != shape:
            wrong.append(f"{module} has {shapes[module]}, not {shape}")
    if wrong:
        raise UserError(
            f"{lora.name}: does not fit these weights (is it for another release?): "
            f"{'; '.join(in_short(wrong))}"
        )


def _stacked(
    parameter: Parameter, loras: Sequence[tuple[Lora, float]], dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray] | None:
    """a [L, r, in] and b [L, out, r] of all LoRAs, strengths and scales in b, float32; or None.

    Without the layer axis for a parameter that is not stacked. Layers that have less rank than
    others, or none, end with zeros. Files are rounded to `dtype`.
    """

    def read(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype).astype(np.float32)

    modules = [name.removesuffix(".weight") for name in parameter.names]
    if not any(module in lora.targets for module in modules for lora, _ in loras):
        return None
    rows, columns = parameter.official_shape
    layers = []
    for module in modules:
        found = [(lora.targets[module], s) for lora, s in loras if module in lora.targets]
        a = [read(t.a) for t, _ in found] or [np.zeros((0, columns), np.float32)]
        b = [read(t.b) * np.float32(s * t.scale) for t, s in found]
        b = b or [np.zeros((rows, 0), np.float32)]
        layers.append((np.concatenate(a), np.concatenate(b, axis=1)))
    rank = max(a.shape[0] for a, _ in layers)
    a = np.stack([np.pad(a, ((0, rank - a.shape[0]), (0, 0))) for a, _ in layers])
    b = np.stack([np.pad(b, ((0, 0), (0, rank - b.shape[1]))) for _, b in layers])
    return (a, b) if parameter.stacked else (a[0], b[0])


# ------------------------------------------------------------------------------------------ fusing


def fuse(
    params: Mapping[Any, Any],
    loras: Sequence[tuple[Lora, float]],
    config: TransformerConfig,
    *,
    offload: bool = False,
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Weights with LoRAs in them, and the weights that they replace.

    W + sum of strength * scale * B A, in float32. Weights in bfloat16 become those that the
    official code makes of one LoRA: there A, B, B with its strength, the product and the sum are
    each rounded to bfloat16 (`ltx_core/loader/fuse_loras.py`).

    Args:
      params: of the transformer; untouched arrays are shared with the result.
      loras: each with its strength.
      config: of the transformer.
      offload: move what is replaced to the memory of the host, to keep room on the devices.

    Returns:
      The parameter tree, and path -> array for `unfuse`.

    Raises:
      UserError: a LoRA that does not fit; see `check`.
    """
    leaves = mapping.leaves(params)
    stream = [(p, leaves[p.path]) for p in matrices(config)]
    originals = {}
    for parameter, fused in fuse_stream(stream, loras, config):
        before = leaves[parameter.path]
        if fused is not before:
            originals[parameter.path] = _on_host(before) if offload else before
            leaves[parameter.path] = fused
    return mapping.nested(leaves), originals


def fuse_stream(
    stream: Iterable[tuple[Parameter, jax.Array]],
    loras: Sequence[tuple[Lora, float]],
    config: TransformerConfig,
) -> Iterator[tuple[Parameter, jax.Array]]:
    """`fuse`, one parameter at a time; those that no LoRA adapts come as they are."""
    for lora, _ in loras:
        check(lora, config)
    for parameter, weight in stream:
        # bfloat16 is the one that the official code rounds to.
        dtype = weight.dtype if weight.dtype == jnp.bfloat16 else np.float32
        if (pair := _stacked(parameter, loras, dtype)) is not None:
            weight = fused(weight, *pair)
        yield parameter, weight


def fused(weight: jax.Array, a: Any, b: Any) -> jax.Array:
    """weight [.., out, in] and b [.., out, r] times a [.., r, in], rounded as by `fuse`."""
    return _fuse(weight.ndim == 3)(weight, a, b)


def unfuse(params: Mapping[Any, Any], originals: Mapping[Any, Any]) -> dict[Any, Any]:
    """The weights from before `fuse`, bit for bit."""
    leaves = mapping.leaves(params)
    back = {path: jax.device_put(value, leaves[path].sharding) for path, value in originals.items()}
    return mapping.nested(leaves | back)


@functools.cache
def _fuse(stacked: bool) -> Any:
    def one(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        where = jax.typeof(weight).sharding
        where = None if where.mesh.empty else where
        # Not by casts to bfloat16 and back, which XLA takes the liberty to leave out.
        short = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
        rounded = short if weight.dtype == jnp.bfloat16 else lambda x: x
        a, b = rounded(a), rounded(b)
        delta = rounded(jnp.einsum("or,ri->oi", b, a, precision="highest", out_sharding=where))
        return (weight.astype(jnp.float32) + delta).astype(weight.dtype)

    def layers(*stacks: jax.Array) -> jax.Array:
        # Layer by layer: the float32 sum of a whole stack would be twice its size.
        return jax.lax.scan(lambda _, layer: (None, one(*layer)), None, stacks)[1]

    return jax.jit(layers if stacked else one)


def _on_host(array: jax.Array) -> jax.Array:
    kinds = {memory.kind for memory in next(iter(array.devices())).addressable_memories()}
    if "pinned_host" not in kinds:
        return array
    return jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))


def adapters(
    loras: Sequence[tuple[Lora, float]],
    config: TransformerConfig,
    where: Any = None,
    *,
    dtype: Any = "bfloat16",
    then: Callable[[Sequence[Any], jax.Array], jax.Array] | None = None,
) -> dict[Any, Any]:
    """LoRAs as adapters beside the weights, for `models.lora.attach`; strengths are in b.

    Args:
      loras: each with its strength; together they are one adapter of the sum of their ranks.
      config: of the transformer.
      where: mesh, sharding or None, as for the weights; the adapters are replicated.
      dtype: of the adapters.
      then: what becomes of the array at a path as soon as it is there, such as a move.

    Raises:
      UserError: a LoRA that does not fit; see `check`.
    """
    for lora, _ in loras:
        check(lora, config)
    home = sharding_of(where) if isinstance(where, jax.sharding.Mesh) else where
    tree: dict[Any, Any] = {}
    for parameter in matrices(config):
        for name, value in zip("ab", _stacked(parameter, loras) or (), strict=False):
            path, value = (*parameter.path[:-1], name), jax.device_put(value.astype(dtype), home)
            mapping.insert(tree, path, value if then is None else then(path, value))
    return tree


# ----------------------------------------------------------------------------------------- training


def from_adapters(
    tree: Mapping[Any, Any], config: TransformerConfig, *, scale: float = 1.0, **metadata: str
) -> Lora:
    """A LoRA of what was trained as adapters: {"a": [.., r, in], "b": [.., out, r]} by path.

    `scale` is alpha / r of the training; an adapter may have its own, "scale" [..], beside a and b.
    Rows of a whose columns of b are zero, as they are, are left out, and so are layers of nothing
    else.
    """
    values = mapping.leaves(tree)
    targets = {}
    for parameter in matrices(config):
        path = parameter.path[:-1]
        if (*path, "a") not in values:
            continue
        a, b = (np.asarray(values[(*path, name)]) for name in "ab")
        scales = np.asarray(values.get((*path, "scale"), scale), np.float32)
        if not parameter.stacked:
            a, b, scales = a[None], b[None], scales[None]
        scales = np.broadcast_to(scales, len(a))
        for name, a_layer, b_layer, of_layer in zip(parameter.names, a, b, scales, strict=True):
            some = a_layer.any(axis=1) | b_layer.any(axis=0)
            if some.any():
                target = Target(a_layer[some], b_layer[:, some], float(of_layer))
                targets[name.removesuffix(".weight")] = target
    return Lora(targets, metadata)


def reference_metadata(spatial: int | None, temporal: int | None) -> dict[str, str]:
    """What a LoRA says of the clips that it refers to: how much smaller, and how much slower.

    Nothing where a factor is 1 or None. The spatial one has two names, of which the second is that
    of older files. Source: `training_strategies/flexible.py`.
    """
    found = {}
    if spatial not in (None, 1):
        names = ("reference_spatial_scale_factor", "reference_downscale_factor")
        found |= dict.fromkeys(names, str(spatial))
    if temporal not in (None, 1):
        found["reference_temporal_scale_factor"] = str(temporal)
    return found


def continued(
    lora: Lora, adapted: Sequence[Adapted], scales: Mapping[tuple[str, ...], np.ndarray]
) -> Iterator[tuple[Adapted, np.ndarray, np.ndarray, np.ndarray]]:
    """A LoRA as the adapters of a training that goes on from it.

    Args:
      lora: fits the transformer; see `check`.
      adapted: what the training adapts.
      scales: alpha / r of the training by path, [L].

    Yields:
      One of `adapted`; a [L, r, in] and b [L, out, r], float32, zero where the LoRA has nothing;
      and where it has something, bool [L, r]. Its own scales are put into b.

    Raises:
      UserError: it adapts what the training does not, or has a higher rank.
    """
    ranks = {m: r for one in adapted for m, r in zip(one.modules, one.ranks, strict=True)}
    outside = [module for module in lora.targets if not ranks.get(module)]
    if outside:
        raise UserError(
            f"{lora.name}: adapts what lora.targets do not mean: {', '.join(in_short(outside))}"
        )
    higher = [(t.rank, m) for m, t in lora.targets.items() if t.rank > ranks[m]]
    if higher:
        rank, module = max(higher)
        raise UserError(
            f"{lora.name}: {module} has rank {rank}, above that of lora.rank, {ranks[module]}"
        )
    for one in adapted:
        (rows, columns), layers = one.shape, len(one.modules)
        a = np.zeros((layers, one.rank, columns), np.float32)
        b = np.zeros((layers, rows, one.rank), np.float32)
        given = np.zeros((layers, one.rank), bool)
        for layer, module in enumerate(one.modules):
            if (target := lora.targets.get(module)) is None:
                continue
            a[layer, : target.rank] = target.a
            scale = np.float32(target.scale / scales[one.path][layer])
            b[layer, :, : target.rank] = target.b.astype(np.float32) * scale
            given[layer, : target.rank] = True
        yield one, a, b, given


# --------------------------------------------------------------------------------------- extracting


def extract(
    before: Iterable[tuple[Parameter, jax.Array]],
    after: Iterable[tuple[Parameter, jax.Array]],
    rank: int,
    *,
    total: int | None = None,
) -> tuple[Lora, float]:
    """The LoRA of rank `rank` that comes closest to the difference of two transformers.

    Matrices that are equal get none. By a randomised singular value decomposition (Halko et al.,
    arXiv 0909.4061): a few products with thin matrices, on the devices that hold the weights.

    Args:
      before: parameters with their values, one at a time, as `Release.stream` gives them.
      after: the same of the other transformer, in the same order.
      rank: of every pair of matrices, at most.
      total: how many parameters there are, for a progress bar; None shows none.

    Returns:
      The LoRA, and the share of the squared difference of all matrices that it misses.
    """
    targets, missed, whole = {}, 0.0, 0.0
    pairs = zip(before, after, strict=True)
    bar = tqdm(pairs, desc="extracting", total=total, disable=None if total else True)
    for (parameter, old), (_, new) in bar:
        if not is_matrix(parameter):
            continue
        for i, name in enumerate(parameter.names):
            pair = (old[i], new[i]) if parameter.stacked else (old, new)
            a, b, *norms = map(np.asarray, _decompose(*pair, rank))
            part, all_of_it = map(float, norms)
            if all_of_it == 0:
                continue
            missed, whole = missed + part, whole + all_of_it
            targets[name.removesuffix(".weight")] = Target(a, b)
    return Lora(targets), missed / whole if whole else 0.0


@functools.partial(jax.jit, static_argnames="rank")
def _decompose(
    old: jax.Array, new: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """a [r, in], b [out, r], the squared norm that b @ a misses of new - old, and that of all."""
    delta = new.astype(jnp.float32) - old.astype(jnp.float32)
    rank = min(rank, *delta.shape)
    with jax.default_matmul_precision("highest"):
        width = min(rank + 8, *delta.shape)
        sketch = jax.random.normal(jax.random.key(0), (delta.shape[1], width), jnp.float32)
        q = jnp.linalg.qr(delta @ sketch)[0]
        for _ in range(3):  # power iterations: the spectrum of a difference falls slowly
            q = jnp.linalg.qr(delta.T @ q)[0]
            q = jnp.linalg.qr(delta @ q)[0]
        u, s, vt = jnp.linalg.svd(q.T @ delta, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        a, b = root[:, None] * vt[:rank], (q @ u[:, :rank]) * root
        return a, b, jnp.sum((delta - b @ a) ** 2), jnp.sum(delta**2)
