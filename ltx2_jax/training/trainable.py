"""Which weights a run trains: rules on paths, adapters, and the two parts of a model's weights.

    trained, frozen = split(params, config)
    model = nnx.merge(graph(config), join(trained, frozen, constants(config, key)))

Weights are nested dicts, as everywhere; the adapter of a linear map lies in it, under "adapter".
Optimizer, average, gradients and checkpoints know the trained part alone. See `config.TuneConfig`.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.models import flops, lora, ltx2
from ltx2_jax.models.layers import Axes, Rngs
from ltx2_jax.models.ltx2 import LTX2
from ltx2_jax.models.quantized import quantize
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.models.transformer.transformer import LTX2Transformer
from ltx2_jax.sharding import weight_spec
from ltx2_jax.weights import lora as loras
from ltx2_jax.weights import lora_targets, mapping
from ltx2_jax.weights.lora_targets import Adapted

Path = tuple[str, ...]
Params = dict[str, Any]
ADAPTER = "adapter"
# Every weight that the tokens of one stream pass, or that moves them by what the other one says.
STREAMS = {
    "video": (
        "transformer/video", "transformer/blocks/video_self", "transformer/blocks/video_text",
        "transformer/blocks/audio_to_video", "transformer/blocks/video_mlp",
        "transformer/blocks/video_*table",
    ),
    "audio": (
        "transformer/audio", "transformer/blocks/audio_self", "transformer/blocks/audio_text",
        "transformer/blocks/video_to_audio", "transformer/blocks/audio_mlp",
        "transformer/blocks/audio_*table",
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------- rules


def follows(path: Path, rule: str) -> bool:
    """Whether a rule means the weight at a path."""
    name = "/".join(path)
    meant = STREAMS.get(rule, (rule,))
    return any(fnmatchcase(name, one) or fnmatchcase(name, f"{one}/*") for one in meant)


def is_trained(path: Path, config: Config) -> bool:
    """Whether a run trains the weight at a path."""
    if config.tune is None:
        return True
    if config.tune.lora is not None:
        return ADAPTER in path
    if path[-1] == "scale":  # of a weight that is quantised because it is frozen
        return False
    return any(follows(path, rule) for rule in config.tune.train)


def rate(path: Path, config: Config) -> float:
    """Times what learning rate the weight at a path is trained."""
    rates = () if config.tune is None else config.tune.rates
    return next((value for rule, value in reversed(rates) if follows(path, rule)), 1.0)


def check(config: Config) -> None:
    """UserError for a rule or a target that means nothing, and for ranks that are too high.

    And for a form of frozen matrices where all of them are trained.
    """
    if config.tune is None:
        return
    if config.tune.quantize is not None:
        weights = jax.eval_shape(lambda: params_of(config, jax.random.key(0)))
        if not any(path[-1] == "scale" for path in mapping.leaves(weights)):
            raise UserError(
                f"tune.quantize={config.tune.quantize!r}: tune.train={list(config.tune.train)} "
                "trains all large matrices, and what is trained stays float32"
            )
    if config.tune.lora is not None:
        paths = [
            ("transformer", *one.path, ADAPTER, name) for one in adapted(config) for name in "ab"
        ]
    else:
        params = jax.eval_shape(lambda: ltx2.init_params(jax.random.key(0), config.networks))
        paths = list(mapping.leaves(params))
    trained = [path for path in paths if is_trained(path, config)]
    for name, rules, among in (
        ("train", config.tune.train if config.tune.lora is None else (), paths),
        ("rates", [rule for rule, _ in config.tune.rates], trained),
    ):
        for rule in rules:
            if not any(follows(path, rule) for path in among):
                close = ", ".join(_closest(rule, among))
                close = f" (did you mean {close}?)" if close else ""
                what = "weight" if among is paths else "trained weight"
                raise UserError(f"tune.{name}: {rule!r} means no {what}{close}")


def _closest(rule: str, paths: Iterable[Path]) -> list[str]:
    known = {"/".join(path[:n]) for path in paths for n in range(1, len(path) + 1)} | set(STREAMS)
    return difflib.get_close_matches(rule, sorted(known), n=3)


# ------------------------------------------------------------------------------------------- parts


def networks(config: Config, rngs: Rngs) -> LTX2:
    """The networks of a run without adapters, with room for frozen matrices as they are kept."""
    form = None if config.tune is None else config.tune.quantize
    model = LTX2(config.networks, rngs=rngs)
    return quantize(model, form, lambda path: is_trained((*path, "weight"), config))


def params_of(config: Config, key: Array) -> Params:
    """The weights of `networks`, for their shapes, dtypes and shardings."""
    return nnx.to_pure_dict(nnx.split(networks(config, Rngs(key)), nnx.Param)[1])


def split(params: Params, config: Config) -> tuple[Params, Params]:
    """The trained and the frozen part of the weights."""
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in mapping.leaves(params).items():
        parts[not is_trained(path, config)][path] = leaf
    return mapping.nested(parts[0]), mapping.nested(parts[1])


def join(*parts: Mapping[str, Any] | None) -> Params:
    """The weights that lie in several parts."""
    leaves = [mapping.leaves(part) for part in parts if part]
    if len(leaves) == 1:
        return next(part for part in parts if part)
    return mapping.nested({path: leaf for part in leaves for path, leaf in part.items()})


@functools.cache
def trained_share(config: Config) -> float:
    """What share of the numbers in the transformer's matrices a run trains."""
    if config.tune is None:
        return 1.0
    found = {("transformer", *map(str, p.path)): p.leaf.size for p in loras.matrices(config.model)}
    trained = sum(size for path, size in found.items() if is_trained(path, config))
    for one in adapted(config):
        trained += sum(one.ranks) * sum(one.shape)
    return trained / sum(found.values())


def train_flops(config: Config, video_tokens: int, audio_tokens: int) -> float:
    """FLOPs of a step for one sample; frozen matrices have no gradient of their own."""
    tokens = video_tokens, audio_tokens, config.text.length
    forward = sum(flops.forward_flops(config.model, *tokens).values())
    return (flops.TRAIN_PASSES - 1 + trained_share(config)) * forward


def merged(trained: Params, frozen: Params, config: Config) -> Params:
    """Weights without adapters that compute what both parts do together."""
    leaves = mapping.leaves(join(trained, frozen))
    for one, scale in zip(adapted(config), scales(config).values(), strict=True):
        path = ("transformer", *one.path)
        weight = leaves[(*path, "weight")]
        a, b = (_whole(leaves.pop((*path, ADAPTER, name)), weight) for name in "ab")
        scale = scale.reshape(*scale.shape, 1, 1)
        leaves[(*path, "weight")] = loras.fused(weight, a, b * scale)
    return mapping.nested(leaves)


def as_sampled(trained: Params, frozen: Params, config: Config) -> Params:
    """The weights of a run as `sampled_graph` takes them.

    `merged`, but beside quantised weights adapters stay what they are: rounding would swallow them.
    """
    if config.tune is None or config.tune.quantize is None:
        return trained if config.tune is None else merged(trained, frozen, config)
    # As numpy arrays, which a program takes on any mesh of any number of hosts.
    beside = {("transformer", *path, ADAPTER, "scale"): x for path, x in scales(config).items()}
    return join(trained, frozen, mapping.nested(beside))


def sampled_graph(config: Config) -> Any:
    """The static half of the model that samples with the weights of a run; see `ltx2.graph`."""
    if config.tune is None or config.tune.quantize is None:
        return ltx2.graph(config.networks)
    return graph(without_dropout(config))


def without_dropout(config: Config) -> Config:
    """A run whose adapters leave nothing out, as where they do not learn."""
    if config.tune is None or config.tune.lora is None:
        return config
    lora = dataclasses.replace(config.tune.lora, dropout=0.0)
    return dataclasses.replace(config, tune=dataclasses.replace(config.tune, lora=lora))


def _whole(x: Array, beside: Array) -> Array:
    """A copy of `x` on every device that holds a part of `beside`."""
    where = beside.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec())
    return jax.device_put(x, where)


# ---------------------------------------------------------------------------------------- adapters


def adapted(config: Config) -> list[Adapted]:
    """The linear maps that get an adapter; none without `tune.lora`."""
    if config.tune is None or (given := config.tune.lora) is None:
        return []
    return lora_targets.adapted(config.model, given.targets, given.rank, given.ranks)


def scales(config: Config) -> dict[Path, np.ndarray]:
    """alpha / r of every layer of every adapted map, float32 [L], or [] where none are stacked."""
    found = {}
    for one in adapted(config):
        ranks = np.maximum(one.ranks, 1)
        scale = np.asarray((config.tune.lora.alpha or ranks) / ranks, np.float32)
        found[one.path] = scale if one.stacked else scale[0]
    return found


def new_adapters(key: Array, config: Config) -> Params:
    """Adapters that do nothing yet, float32, born on their shards: a as PEFT draws it, b zero.

    a is uniform within 1 / sqrt(in). What a layer has no rank for is zero, and stays so.
    """
    tree: Params = {}
    axes, found = _axes(config.model), adapted(config)
    # Not the keys of any step, which are made of its number.
    keys = jax.random.split(jax.random.fold_in(key, 2**32 - 1), len(found))
    for one, of_map in zip(found, keys, strict=True):
        (rows, columns), rank = one.shape, one.rank
        shapes = (rank, columns), (rows, rank)
        homes = [
            weight_spec(shape, names)
            for shape, names in zip(shapes, lora.homes(axes[one.path]), strict=True)
        ]
        if one.stacked:
            shapes = [(len(one.ranks), *shape) for shape in shapes]
            homes = [None if home is None else PartitionSpec(None, *home) for home in homes]
        bound = 1 / math.sqrt(columns)
        a = jax.random.uniform(of_map, shapes[0], jnp.float32, -bound, bound, out_sharding=homes[0])
        if min(one.ranks) < rank:
            some = np.arange(rank) < np.asarray(one.ranks)[:, None]
            a = jnp.where(some[..., None] if one.stacked else some[0, :, None], a, 0)
        b = jnp.zeros(shapes[1], jnp.float32, out_sharding=homes[1])
        mapping.insert(tree, ("transformer", *one.path, ADAPTER), {"a": a, "b": b})
    return tree


def constants(config: Config, key: Array | None = None) -> Params:
    """What adapters read beside a and b: their scales, and the keys of this step's dropout."""
    tree: Params = {}
    for i, (path, scale) in enumerate(scales(config).items()):
        beside: dict[str, Any] = {"scale": jnp.asarray(scale)}
        if config.tune.lora.dropout:
            of_map = jax.random.fold_in(jax.random.key(0) if key is None else key, i)
            beside["keys"] = jax.random.split(of_map, scale.shape) if scale.ndim else of_map
        mapping.insert(tree, ("transformer", *path, ADAPTER), beside)
    return tree


def graph(config: Config) -> Any:
    """`ltx2.graph` of a run's networks, with its adapters."""

    def create() -> LTX2:
        model = networks(config, Rngs(0))
        given = join(new_adapters(jax.random.key(0), config), constants(config))
        found = mapping.leaves(given.get("transformer", {}))
        tree = mapping.nested({(*path[:-2], path[-1]): leaf for path, leaf in found.items()})
        for one in adapted(config):
            if config.tune.lora.dropout:
                mapping.insert(tree, (*one.path, "rate"), config.tune.lora.dropout)
        lora.attach(model.transformer, tree)
        return model

    return nnx.graphdef(jax.eval_shape(create))


@functools.cache
def _axes(config: TransformerConfig) -> dict[Path, Axes]:
    """Logical names of the features of every linear map, input and output."""
    model = jax.eval_shape(lambda: LTX2Transformer(config, rngs=Rngs(0)))
    return {tuple(map(str, path)): linear.axes for path, linear in lora.linears(model)}
