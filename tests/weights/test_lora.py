"""LoRA files: every key style is one adapter, fused, taken back, kept beside, or written again."""

import dataclasses
import json
import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax import nnx
from golden_case import file_of, load, load_cases, release_of
from golden_transformer import forward
from safetensors.numpy import load_file, save_file

from ltx2_jax.errors import UserError
from ltx2_jax.models.lora import attach
from ltx2_jax.models.transformer.config import PRESETS
from ltx2_jax.models.transformer.streams import Modality
from ltx2_jax.models.transformer.transformer import LTX2Transformer
from ltx2_jax.sharding import make_mesh
from ltx2_jax.weights import lora as loras
from ltx2_jax.weights import lora_files, mapping
from ltx2_jax.weights.lora import Lora, Target, fuse, read_lora, unfuse, write_lora
from ltx2_jax.weights.names import transformer

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = [GOLDEN / release / "lora.safetensors" for release in ("v2.0", "v2.3", "v2.5")]
CHECKPOINT = GOLDEN / "v2.3" / "checkpoint.safetensors"
LORA = FILES[1]
CONFIG = dataclasses.replace(tiny.MODEL, num_layers=3)


def same(a: Lora, b: Lora) -> bool:
    return set(a.targets) == set(b.targets) and all(
        x.scale == y.scale and x.a.tobytes() == y.a.tobytes() and x.b.tobytes() == y.b.tobytes()
        for x, y in ((a.targets[k], b.targets[k]) for k in a.targets)
    )


def drawn(seed=0, rank=2, modules=None):
    """A LoRA of CONFIG: some matrices of some blocks, of different ranks."""
    rng = np.random.default_rng(seed)
    shapes = {
        name.removesuffix(".weight"): p.official_shape
        for p in mapping.parameters(partial(transformer.create, CONFIG), transformer.TABLE)
        for name in p.names
        if len(p.official_shape) == 2 and name.endswith(".weight")
    }
    modules = modules or [
        "patchify_proj",
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.2.attn1.to_q",
        "transformer_blocks.1.attn1.to_gate_logits",
        "transformer_blocks.1.audio_to_video_attn.to_out.0",
        "transformer_blocks.2.audio_ff.net.2",
        "audio_adaln_single.emb.timestep_embedder.linear_1",
    ]
    targets = {}
    for i, module in enumerate(modules):
        out, into = shapes[module]
        r = rank + i % 2
        a, b = rng.normal(size=(r, into)), rng.normal(size=(out, r))
        targets[module] = Target(*(x.astype(ml_dtypes.bfloat16) for x in (a, b)), scale=0.5)
    return Lora(targets)


@cache
def weights():
    """A transformer with weights that mean something, float32."""
    params = mapping.abstract_params(partial(transformer.create, CONFIG))
    rng = np.random.default_rng(1)
    return mapping.nested(
        {k: jnp.asarray(np.float32(rng.normal(size=v.shape, scale=0.2))) for k, v in params.items()}
    )


def wanted():
    return mapping.parameters(partial(transformer.create, CONFIG), transformer.TABLE)


def official(params):
    return mapping.to_official(params, wanted())


def expected(params, *pairs):
    """The definition, on official tensors, in float64."""
    tensors = official(params)
    for lora, strength in pairs:
        for module, t in lora.targets.items():
            delta = np.float64(t.b) @ np.float64(t.a) * t.scale * strength
            tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + delta
    return tensors


# ---- key styles ----------------------------------------------------------------------------------

ORIGINAL = load_file(LORA)
PREFIX = "diffusion_model."
# As diffusers names the modules of these files that it renames.
DIFFUSERS = {"patchify_proj": "proj_in"}


def styled(style):
    """The tensors of the golden file in another tool's style, and the metadata."""
    tensors, metadata = {}, {}
    for name, value in ORIGINAL.items():
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        letter = part[0]
        down_up = {"A": "lora_down", "B": "lora_up"}[letter]
        if style == "bare":  # DiffSynth-Studio
            tensors[f"{module}.lora_{letter}.default.weight"] = value
        elif style == "peft":
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = value
        elif style == "comfy":
            tensors[f"{PREFIX}{module}.{down_up}.weight"] = value
        elif style == "kohya":
            tensors[f"lora_unet_{module.replace('.', '_')}.{down_up}.weight"] = value
        elif style == "diffusers":
            for ours, theirs in DIFFUSERS.items():
                module = module.replace(ours, theirs)
            tensors[f"transformer.{module}.lora_{letter}.weight"] = value
            metadata = {
                "lora_adapter_metadata": json.dumps(
                    {"transformer.r": 3, "transformer.lora_alpha": 6}
                )
            }
        if style in ("kohya", "comfy"):
            first = next(iter(tensors))
            key = f"{list(tensors)[-1].rpartition('.lora_')[0]}.alpha"
            tensors[key] = np.asarray(6, np.float32)
            assert first
    return tensors, metadata


@pytest.mark.parametrize("style", ["bare", "peft", "comfy", "kohya", "diffusers"])
def test_every_key_style_is_the_same_adapter(style, tmp_path):
    tensors, metadata = styled(style)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata)
    lora, official = read_lora(path), read_lora(LORA)
    scale = 1.0 if style in ("bare", "peft") else 2.0  # alpha 6 at rank 3
    assert {target.scale for target in lora.targets.values()} == {scale}
    targets = {k: dataclasses.replace(t, scale=1.0) for k, t in lora.targets.items()}
    assert same(Lora(targets), official)


def renamed(module_name, *, sides="AB", alpha=None, ending=".weight"):
    """The golden file with its modules and matrices called otherwise, and an alpha beside them."""
    tensors = {}
    for name, value in ORIGINAL.items():
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        stem = module_name(module)
        tensors[f"{stem}.lora_{sides['AB'.index(part[0])]}{ending}"] = value
        if alpha is not None:
            tensors[f"{stem}.alpha"] = alpha
    return tensors


def under(module):
    return module.replace(".", "_")


SIDES = {"letters": "AB", "words": ("down", "up")}


@pytest.mark.parametrize(
    ("stem", "sides", "ending"),
    [
        (lambda m: m, "letters", ".weight"),
        (lambda m: m, "letters", ""),
        (lambda m: m, "letters", ".default.weight"),
        (lambda m: f"transformer.{m}", "letters", ".default_0.weight"),
        (lambda m: f"transformer.{m}", "letters", ".my-style.weight"),
        (lambda m: f"transformer.{m}", "words", ".weight"),
        (lambda m: f"diffusion_model.{m}", "words", ".weight"),
        (lambda m: f"model.diffusion_model.{m}", "letters", ".weight"),
        (lambda m: f"base_model.model.{m}", "letters", ".weight"),
        (lambda m: f"base_model.model.diffusion_model.{m}", "letters", ".default.weight"),
        (lambda m: f"base_model.model.transformer.{m}", "letters", ".weight"),
        (lambda m: f"pipe.dit.{m}", "letters", ".default.weight"),
        (lambda m: f"module._orig_mod.{m}", "letters", ".weight"),
        (lambda m: f"lora_unet_{under(m)}", "words", ".weight"),
        (lambda m: f"lora_unet_model_{under(m)}", "words", ".weight"),
        (lambda m: f"lora_unet_diffusion_model_{under(m)}", "words", ".weight"),
        (lambda m: f"lora_transformer_{under(m)}", "words", ".weight"),
        (lambda m: f"lycoris_{under(m)}", "words", ".weight"),
        (lambda m: f"transformer.{m.replace('patchify_proj', 'proj_in')}", "words", ".weight"),
        (lambda m: f"lora_unet_{under(m.replace('patchify_proj', 'proj_in'))}", "words", ".weight"),
    ],
)
def test_modules_are_known_by_whatever_stands_around_their_names(stem, sides, ending, tmp_path):
    tensors = renamed(stem, sides=SIDES[sides], ending=ending)
    assert len(tensors) == len(ORIGINAL)
    save_file(tensors, tmp_path / "lora.safetensors")
    assert same(read_lora(tmp_path / "lora.safetensors"), read_lora(LORA))


# ---- scales --------------------------------------------------------------------------------------

TO_Q, TO_K = (f"transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_k"))


def scales_of(path):
    return {module: target.scale for module, target in read_lora(path).targets.items()}


@pytest.mark.parametrize(("root", "scale"), [(False, 2.0), (True, 6 / 3**0.5)])
def test_the_scales_of_peft_are_in_a_file_beside_its_tensors(root, scale, tmp_path):
    save_file(styled("peft")[0], tmp_path / "adapter_model.safetensors")
    config = {"r": 3, "lora_alpha": 6, "use_rslora": root, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        for found in scales_of(path).values():
            assert found == pytest.approx(scale)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config\.json: not a JSON object"):
        read_lora(tmp_path)


def test_a_config_of_peft_is_of_its_own_tensors_alone(tmp_path):
    save_file(ORIGINAL, tmp_path / "another.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    assert set(scales_of(tmp_path / "another.safetensors").values()) == {1.0}


def test_patterns_of_alpha_are_of_the_names_in_the_file(tmp_path):
    tensors, _ = styled("diffusers")
    patterns = {"proj_in": 12, "attn1.to_q|attn1.to_k": 6, "to_q": 60}
    stored = {"r": 3, "lora_alpha": 3, "alpha_pattern": patterns}
    stored = {f"transformer.{key}": value for key, value in stored.items()}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(stored)})
    scales = scales_of(tmp_path / "x.safetensors")
    assert scales.pop("patchify_proj") == 4  # "proj_in" in the file
    assert (scales[TO_Q], scales[TO_K]) == (2, 2)  # of several patterns the first counts
    assert scales["transformer_blocks.0.attn1.to_v"] == 1


def test_every_matrix_of_the_released_models_can_be_adapted():
    names = lora_files._modules()
    for name, cfg in PRESETS.items():
        for parameter in mapping.parameters(partial(transformer.create, cfg), transformer.TABLE):
            if parameter.path[-1] == "weight":
                for official in parameter.names:
                    module = official.removesuffix(".weight")
                    assert names[module] == module, name
                    assert names[module.replace(".", "_")] == module
    assert names["time_embed.emb.timestep_embedder.linear_1"] == (
        "adaln_single.emb.timestep_embedder.linear_1"
    )
    assert names["audio_time_embed.linear"] == "audio_adaln_single.linear"
    assert names["av_cross_attn_video_a2v_gate.linear"] == "av_ca_a2v_gate_adaln_single.linear"
    assert names["audio_prompt_adaln.linear"] == "audio_prompt_adaln_single.linear"


def test_ranks_and_metadata_are_those_of_the_file():
    lora = read_lora(LORA)
    assert lora.ranks == {3}
    assert lora.metadata["reference_downscale_factor"] == "1"
    assert len(lora.targets) == len(ORIGINAL) / 2


KINDS = ("int64", "int32", "uint8", "float16", "float32", "float64", ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: np.dtype(kind).name)
def test_an_alpha_may_be_a_whole_number_or_short_and_have_an_axis(kind, shape, tmp_path):
    alpha = np.full(shape, 6, kind)
    tensors = renamed(lambda m: f"lora_unet_{under(m)}", sides=SIDES["words"], alpha=alpha)
    save_file(tensors, tmp_path / "x.safetensors")
    assert set(scales_of(tmp_path / "x.safetensors").values()) == {2.0}


@pytest.mark.parametrize(
    ("header", "scale"),
    [
        ({"lora_alpha": "6", "rank": "3"}, 2.0),
        ({"network_alpha": "1.5"}, 0.5),
        ({"alpha": "3"}, 1.0),
        ({"lora_alpha": "6", "use_rslora": "True"}, 6 / 3**0.5),
        ({"lora_alpha": "None", "network_alpha": "6"}, 2.0),
        ({"rank": "3", "format": "pt"}, 1.0),
        ({"lora_config": '{"r": 3, "lora_alpha": 6}'}, 2.0),
        ({"lora_adapter_metadata": '{"lora_alpha": 6}', "lora_alpha": "60"}, 2.0),
        # A network of another trainer's with the same alpha as rank.
        ({"ss_network_alpha": "3", "ss_network_dim": "3"}, 1.0),
        ({"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, 1.0),
    ],
)
def test_an_alpha_that_is_in_the_header_alone_counts(header, scale, tmp_path):
    save_file(ORIGINAL, tmp_path / "x.safetensors", header)
    for found in scales_of(tmp_path / "x.safetensors").values():
        assert found == pytest.approx(scale)
    # Written again it is in the matrices, and in the header no more.
    write_lora(tmp_path / "y.safetensors", read_lora(tmp_path / "x.safetensors"))
    assert set(scales_of(tmp_path / "y.safetensors").values()) == {1.0}


def test_an_alpha_beside_the_matrices_counts_before_that_of_the_header(tmp_path):
    tensors = renamed(lambda m: f"{PREFIX}{m}", alpha=np.asarray(6))
    save_file(tensors, tmp_path / "x.safetensors", {"lora_alpha": "x", "ss_network_alpha": "60"})
    assert set(scales_of(tmp_path / "x.safetensors").values()) == {2.0}


def test_an_alpha_that_converters_leave_in_the_header_is_not_applied_twice(tmp_path):
    save_file(
        ORIGINAL, tmp_path / "x.safetensors", {"ss_network_alpha": "1", "ss_network_dim": "3"}
    )
    with pytest.warns(UserWarning, match=r"ss_network_alpha=1 at rank 3, but there is no alpha"):
        assert set(scales_of(tmp_path / "x.safetensors").values()) == {1.0}


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "my_style.safetensors"])
def test_a_folder_with_one_lora_is_that_lora(name, tmp_path):
    save_file(ORIGINAL, tmp_path / name)
    assert same(read_lora(tmp_path), read_lora(LORA))
    save_file(ORIGINAL, tmp_path / "another.safetensors")
    if name.startswith("pytorch"):  # what diffusers wrote there
        assert same(read_lora(tmp_path), read_lora(LORA))
    else:
        with pytest.raises(UserError, match=r"give one LoRA file; .*: another.*, my_style"):
            read_lora(tmp_path)


# ---- fusing --------------------------------------------------------------------------------------


def test_several_are_fused_at_their_strengths():
    pairs = [(drawn(0), 0.7), (drawn(1, rank=3), -1.25)]
    params, _ = fuse(weights(), pairs, CONFIG)
    got, want = official(params), expected(weights(), *pairs)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)
    touched = {f"{module}.weight" for module in pairs[0][0].targets}
    assert all(np.any(got[name] != official(weights())[name]) for name in touched)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", [False, True])
def test_unfusing_gives_the_weights_back_bit_for_bit(dtype, offload):
    params = jax.tree.map(lambda x: x.astype(dtype), weights())
    fused, originals = fuse(params, [(drawn(), 0.3)], CONFIG, offload=offload)
    assert 0 < len(originals) < len(jax.tree.leaves(params))
    again, more = fuse(fused, [(drawn(4), 2.0)], CONFIG, offload=offload)  # one after the other
    back = unfuse(unfuse(again, more), originals)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), params, back)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(fused)} == {np.dtype(dtype)}
    where = {leaf.sharding.memory_kind for leaf in originals.values()}
    assert (where == {"pinned_host"}) == offload


def test_bfloat16_weights_are_rounded_at_every_step():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights())
    lora, name = drawn(), "transformer_blocks.2.attn1.to_q"
    fused, _ = fuse(params, [(lora, 0.7)], CONFIG)
    short = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)  # noqa: E731
    target, weight = lora.targets[name], official(params)[f"{name}.weight"].astype(np.float32)
    b = short(target.b.astype(np.float32) * np.float32(0.7 * target.scale))
    want = short(weight + short(b @ target.a.astype(np.float32)))
    # But where the order of a sum decides.
    assert np.mean(official(fused)[f"{name}.weight"] == want) > 0.999
    once = short(weight + b @ target.a.astype(np.float32))
    assert np.mean(once == want) < 0.99


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_sharded_weights_are_fused_where_they_are(sizes):
    mesh = make_mesh(*sizes)
    homes = mapping.abstract_params(partial(transformer.create, CONFIG), mesh)
    placed = {k: jax.device_put(v, homes[k].sharding) for k, v in mapping.leaves(weights()).items()}
    fused, _ = fuse(mapping.nested(placed), [(drawn(), 0.7)], CONFIG)
    want, _ = fuse(weights(), [(drawn(), 0.7)], CONFIG)
    for path, value in mapping.leaves(want).items():
        got = mapping.leaves(fused)[path]
        assert got.sharding == homes[path].sharding
        np.testing.assert_allclose(np.asarray(got), value, atol=1e-6)


# ---- adapters ------------------------------------------------------------------------------------


def inputs(cfg, tokens=16, audio=4):
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(np.float32(rng.normal(size=shape)))  # noqa: E731
    shared = {"sigma": jnp.asarray([0.3, 0.8]), "timesteps": jnp.asarray([[0.3], [0.8]])}
    return (
        Modality(draw(2, tokens, cfg.in_channels), positions=jnp.abs(draw(1, 3, tokens, 2)),
                 context=draw(2, 5, cfg.context_dim), **shared),
        Modality(draw(2, audio, cfg.audio_in_channels), positions=jnp.abs(draw(1, 1, audio, 2)),
                 context=draw(2, 5, cfg.audio_context_dim), **shared),
    )  # fmt: skip


def test_adapters_beside_the_weights_compute_what_fused_weights_do():
    pairs = [(drawn(0), 0.7), (drawn(1, rank=3), -0.5)]
    fused, _ = fuse(weights(), pairs, CONFIG)
    create = partial(transformer.create, CONFIG)
    want = forward(*nnx.split(mapping.build(create, fused)), *inputs(CONFIG), None)
    model = mapping.build(create, weights())
    plain = forward(*nnx.split(model), *inputs(CONFIG), None)
    attach(model, loras.adapters(pairs, CONFIG, dtype="float32"))
    got = forward(*nnx.split(model), *inputs(CONFIG), None)
    for have, expect, before in zip(got, want, plain, strict=True):
        np.testing.assert_allclose(have, expect, atol=1e-4, rtol=1e-4)
        assert np.abs(np.asarray(have) - before).max() > 0.1
    attach(model, {})
    for have, before in zip(forward(*nnx.split(model), *inputs(CONFIG), None), plain, strict=True):
        np.testing.assert_array_equal(have, before)


def test_adapters_on_a_mesh_compute_the_same(mesh_context):
    lora = [(drawn(), 0.7)]

    def run(*sizes):
        with mesh_context(*sizes):
            mesh = jax.sharding.get_mesh()
            homes = mapping.abstract_params(partial(transformer.create, CONFIG), mesh)
            placed = {
                k: jax.device_put(v, homes[k].sharding)
                for k, v in mapping.leaves(weights()).items()
            }
            model = mapping.build(partial(transformer.create, CONFIG), mapping.nested(placed), mesh)
            attach(model, loras.adapters(lora, CONFIG, mesh, dtype="float32"))
            return [np.asarray(x) for x in forward(*nnx.split(model), *inputs(CONFIG), None)]

    for got, want in zip(run(2, 2, 2), run(1, 1, 1), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_adapters_are_variables_of_their_own():
    model = mapping.build(partial(transformer.create, CONFIG), weights())
    adapters = loras.adapters([(drawn(), 1.0)], CONFIG)
    attach(model, adapters)
    trained, frozen = nnx.state(model, nnx.LoRAParam, nnx.Param)
    assert len(jax.tree.leaves(trained)) == len(jax.tree.leaves(adapters)) > 2
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(weights()))


def test_an_adapter_that_does_not_fit_its_map_is_refused():
    model = mapping.build(partial(transformer.create, CONFIG), weights())
    for n_in, n_out in ((7, 32), (8, 31)):
        wrong = {"video": {"project_in": {"a": np.zeros((2, n_in)), "b": np.zeros((n_out, 2))}}}
        with pytest.raises(ValueError, match=r"video\.project_in: .* do not fit \[32, 8\]"):
            attach(model, wrong)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_an_official_file_is_written_as_it_was_read(path, tmp_path):
    write_lora(tmp_path / "back.safetensors", read_lora(path))
    back, before = load_file(tmp_path / "back.safetensors"), load_file(path)
    assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in before.items()}
    assert read_lora(tmp_path / "back.safetensors").metadata == read_lora(path).metadata


def test_matrices_are_written_as_stored_where_no_dtype_is_given(tmp_path):
    for dtype in (np.float16, np.float32, ml_dtypes.float8_e4m3fn):
        save_file({k: v.astype(dtype) for k, v in ORIGINAL.items()}, tmp_path / "x.safetensors")
        write_lora(tmp_path / "y.safetensors", read_lora(tmp_path / "x.safetensors"), dtype=None)
        # Official LoRAs are never float8.
        kept = ml_dtypes.bfloat16 if dtype == ml_dtypes.float8_e4m3fn else dtype
        assert {v.dtype for v in load_file(tmp_path / "y.safetensors").values()} == {np.dtype(kept)}


def test_what_was_trained_as_adapters_is_written_with_its_alpha_in_b(tmp_path):
    tree = loras.adapters([(drawn(), 1.0)], CONFIG, dtype="float32")  # its scale is in b
    trained = loras.from_adapters(tree, CONFIG, scale=2.0, reference_downscale_factor="2")
    path = tmp_path / "lora.safetensors"
    write_lora(path, trained, dtype="float32")
    assert not any("alpha" in name for name in load_file(path))
    lora = read_lora(path)
    assert lora.metadata["reference_downscale_factor"] == "2"
    assert set(lora.targets) == set(drawn().targets)  # untouched layers of a stack are left out
    for module, target in drawn().targets.items():
        got = lora.targets[module].b @ lora.targets[module].a
        want = 2.0 * 0.5 * np.float32(target.b) @ np.float32(target.a)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_difference_of_low_rank_is_extracted_exactly():
    lora = drawn(rank=3)
    fused, _ = fuse(weights(), [(lora, 1.0)], CONFIG)
    pairs = [[(p, mapping.leaves(tree)[p.path]) for p in wanted()] for tree in (weights(), fused)]
    found, missed = loras.extract(*pairs, rank=4)
    assert set(found.targets) == set(lora.targets)
    assert missed < 1e-9
    for module, target in lora.targets.items():
        want = 0.5 * np.float32(target.b) @ np.float32(target.a)
        got = found.targets[module].b @ found.targets[module].a
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_difference_of_full_rank_is_extracted_as_well_as_the_svd_does_it():
    rng = np.random.default_rng(3)
    delta = rng.normal(size=(48, 32)) @ np.diag(0.8 ** np.arange(32))
    a, b, missed, total = loras._decompose(jnp.zeros((48, 32)), jnp.asarray(delta, jnp.float32), 5)
    singular = np.linalg.svd(delta, compute_uv=False)
    np.testing.assert_allclose(missed, np.sum(singular[5:] ** 2), rtol=1e-3)
    np.testing.assert_allclose(total, np.sum(singular**2), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(delta - np.asarray(b @ a)) ** 2, missed, rtol=1e-3)


# ---- what does not fit ---------------------------------------------------------------------------


def refused(tmp_path, tensors, metadata=None):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(UserError) as error:
        read_lora(path)
    path.unlink()
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    return str(error.value)


def test_what_a_lora_file_cannot_be_is_said_by_name(tmp_path):
    name = f"{PREFIX}transformer_blocks.0.attn1.to_q"
    pair = {f"{name}.lora_A.weight": np.zeros((2, 4)), f"{name}.lora_B.weight": np.zeros((6, 2))}
    for tensors, message in (
        ({f"{name}.hada_w1_a": np.zeros(2)}, "LoHa in a LoRA is not supported"),
        ({f"{name}.lokr_w1": np.zeros(2)}, "LoKr in a LoRA is not supported"),
        (pair | {f"{name}.dora_scale": np.zeros(2)}, "DoRA in a LoRA is not supported"),
        (pair | {f"{name}.lora_magnitude_vector.weight": np.zeros(2)}, "DoRA in a LoRA is not sup"),
        (pair | {f"{name}.lora_magnitude_vector": np.zeros(2)}, "DoRA in a LoRA is not supported"),
        (pair | {f"{name}.oft_R.weight": np.zeros(2)}, "OFT in a LoRA is not supported"),
        (pair | {f"{name}.lora_mid.weight": np.zeros(2)}, "LoCon in a LoRA is not supported"),
        (pair | {f"{name}.diff": np.zeros(2)}, "a difference of whole weights in a LoRA"),
        (pair | {f"{name}.lora_B.bias": np.zeros(2)}, "biases in a LoRA is not supported"),
        (pair | {f"{name}.alpha": np.asarray(True)}, "alpha is stored as bool, not as a float"),
        (pair | {f"{name}.alpha": np.asarray(np.nan)}, "NaN or infinity in diffusion_model"),
        (
            {k.replace(".weight", f".{a}.weight"): v for k, v in pair.items() for a in ("x", "y")},
            "holds several adapters (x, y); save one of them alone",
        ),
        (pair | {f"{name}.diff_b": np.zeros(2)}, "a difference of whole weights in a LoRA"),
        (pair | {"lora_te1_text_model.lora_up.weight": np.zeros(2)}, "tensors of no module of the"),
        (
            {"vae.encoder.weight": np.zeros(2)},
            "is no LoRA file (its tensors are vae.encoder.weight",
        ),
        ({f"{name}.lora_A.weight": np.zeros((2, 4))}, "attn1.to_q has only a of its pair"),
        (pair | {f"{name}.lora_B.weight": np.zeros((6, 3))}, "A (2, 4) and B (6, 3), which do not"),
        (
            {k: v[:, :0] if "B" in k else v[:0] for k, v in pair.items()},
            "A (0, 4) and B (6, 0), wh",
        ),
        (pair | {f"{name}.alpha": np.ones(2)}, "alpha of transformer_blocks.0.attn1.to_q has (2,)"),
        (
            pair | {f"{name}.lora_A.weight": np.full((2, 4), np.nan)},
            "NaN or infinity in diffusion_",
        ),
        (pair | {f"{name}.lora_A.weight": np.ones((2, 4), np.int8)}, "is stored as int8, not as a"),
        (
            pair | {f"{name.replace('diffusion_model', 'transformer')}.lora_A.weight": np.ones(2)},
            "attn1.to_q is there twice",
        ),
        (  # of another model, not a norm
            {"transformer.single_blocks.0.norm.linear.lora_A.weight": np.zeros((2, 4))},
            "tensors of no module of the transformer: transformer.single_blocks.0.norm",
        ),
    ):
        assert message in refused(tmp_path, tensors)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"lora_alpha": "x"}', "lora_alpha is 'x', not a number"),
        ('{"alpha_pattern": [1]}', r"alpha_pattern=\[1\] is not a JSON object"),
        ('{"alpha_pattern": {"to_q": null}}', "alpha_pattern of 'to_q' is None, not a number"),
        ('{"alpha_pattern": {"(to_q": 1}}', r"alpha_pattern '\(to_q': missing \)"),
    ],
)
def test_scales_that_are_none_are_refused(stored, message, tmp_path):
    assert re.search(
        f"lora_adapter_metadata:? {message}",
        refused(tmp_path, ORIGINAL, {"lora_adapter_metadata": stored}),
    )


def test_a_header_whose_alpha_is_no_number_is_refused(tmp_path):
    for value in ("six", "inf"):
        message = refused(tmp_path, ORIGINAL, {"lora_alpha": value})
        assert "lora_alpha in its header is" in message


@pytest.mark.parametrize(
    "module",
    [
        f"{PREFIX}video_embeddings_connector.transformer_1d_blocks.{{}}.attn1.to_q",
        f"{PREFIX}connectors.audio_connector.transformer_blocks.{{}}.attn1.to_k",
        "connectors.video_connector.transformer_blocks.{}.attn1.to_k",
        "lora_unet_embeddings_connector_transformer_1d_blocks_{}_attn1_to_q",
        "text_embedding_projection.{}.aggregate_embed",
    ],
)
def test_parts_for_the_text_side_are_left_out_with_a_warning(module, tmp_path):
    more = {
        f"{module.format(i)}.lora_{x}.weight": np.zeros((2, 2), np.float32)
        for i in range(2) for x in "AB"
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    save_file(ORIGINAL | more, path)
    with pytest.warns(UserWarning, match="4 tensors for the text side"):
        assert same(read_lora(path), read_lora(LORA))


def test_a_lora_of_another_model_is_refused_with_all_that_does_not_fit():
    lora, config = read_lora(FILES[0]), release_of(CHECKPOINT).config("transformer")
    with pytest.raises(UserError, match="is it for another release") as error:
        loras.check(lora, config)
    assert "transformer_blocks.{0-2}.attn1.to_q has (40, 40), not (32, 32)" in str(error.value)
    assert "\n" not in str(error.value)
    newer = Lora({"prompt_adaln_single.linear": Target(np.zeros((1, 32)), np.zeros((64, 1)))})
    older = release_of(GOLDEN / "v2.0" / "checkpoint.safetensors").config("transformer")
    for use in (
        lambda: loras.check(newer, older),
        lambda: next(loras.fuse_stream([], [(newer, 1.0)], older), None),
        lambda: loras.adapters([(newer, 1.0)], older),
    ):
        with pytest.raises(UserError, match=r"prompt_adaln_single\.linear is not there"):
            use()


def test_a_lora_that_says_its_generation_is_held_to_it():
    lora = dataclasses.replace(read_lora(LORA), metadata={"model_version": "2.5.1"})
    config = release_of(CHECKPOINT).config("transformer")
    with pytest.raises(UserError, match=r"is for LTX-2 2\.5, these weights are 2\.3"):
        loras.check(lora, config, "2.3")


def test_a_golden_transformer_runs_with_its_lora_beside_it():
    model = load(CHECKPOINT, "transformer", dtype="float32")
    assert isinstance(model, LTX2Transformer)
    attach(model, loras.adapters([(read_lora(LORA), 0.7)], model.cfg))
    assert model.blocks.video_self.to_q.adapter.a.shape == (3, 3, 40)
    assert model.blocks.audio_mlp.linear_in.adapter is None


@pytest.mark.parametrize("release", ["v2.0", "v2.3", "v2.5"])
def test_weights_fused_in_bfloat16_are_those_of_the_official_code(release):
    (case,) = [
        c for c in load_cases(GOLDEN) if c.name == "lora/fused_bfloat16_official"
        and c.folder.name == release
    ]  # fmt: skip
    release = release_of(file_of(case.folder, "transformer"))
    config, params = release.load("transformer")
    lora = read_lora(case.folder / case.args["file"])
    fused, _ = fuse(params, [(lora, case.args["strength"])], config)
    ours = np.asarray(fused["blocks"]["video_self"]["to_q"]["weight"][0], np.float32)
    np.testing.assert_array_equal(ours, case.expected()["fused_example"])
