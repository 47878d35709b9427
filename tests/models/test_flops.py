"""Parameters and FLOPs against published totals and sums done by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ltx2_jax.models import flops
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.transformer.config import PRESETS
from ltx2_jax.models.transformer.streams import Modality
from ltx2_jax.models.transformer.transformer import LTX2Transformer

V20, V23 = PRESETS["2.0"], PRESETS["2.3"]
SIZES = {"num_layers": 3, "num_heads": 2, "audio_num_heads": 2, "audio_head_dim": 8}
CHANNELS = {"in_channels": 4, "out_channels": 4, "audio_in_channels": 16, "audio_out_channels": 16}
TINY = replace(V23, **SIZES, **CHANNELS, head_dim=20, context_dim=40, audio_context_dim=16)


def test_the_released_sizes():
    assert flops.total_parameters(V20) == 18_876_174_592
    assert flops.total_parameters(V23) == 18_988_838_144


def test_every_switch_counts_what_it_adds():
    total = flops.total_parameters
    V, A = TINY.width, TINY.audio_width
    assert total(replace(TINY, keyframe_embedding=True)) == total(TINY) + V
    assert total(replace(TINY, ff_bias=False)) == total(TINY) - 3 * (4 * V + V)
    assert total(replace(TINY, audio_ff_bias=False)) == total(TINY) - 3 * (4 * A + A)
    prompt = sum(256 * d + d + d * d + d + 2 * d * d + 2 * d for d in (V, A))
    assert total(replace(TINY, prompt_adaln=False)) == total(TINY) - prompt
    caption = sum(24 * d + d + d * d + d for d in (V, A))
    assert total(replace(TINY, caption_channels=24)) == total(TINY) + caption
    # Gates sit on the query side: three attentions a stream, one logit a head.
    gates = 3 * 3 * 2 * (V + 1 + A + 1)
    assert total(replace(TINY, gated_attention=False)) == total(TINY) - gates


def test_parameters_equal_the_sum_of_module_shapes():
    """The shapes a small 2.3 checkpoint has, written out."""
    v, a, t = 40, 16, 256

    def linear(fan_in, fan_out):
        return fan_in * fan_out + fan_out

    def attention(query, context, inner):  # q, k, v, out, q and k norm, gate of two heads
        qkv = linear(query, inner) + 2 * linear(context, inner)
        return qkv + linear(inner, query) + 2 * inner + linear(query, 2)

    def adaln(width, rows):
        return linear(t, width) + linear(width, width) + linear(width, rows * width)

    block = 2 * attention(v, v, v) + 2 * attention(a, a, a)
    block += attention(v, a, a) + attention(a, v, a)
    block += sum(linear(d, 4 * d) + linear(4 * d, d) + (9 + 2 + 5) * d for d in (v, a))
    outside = sum(adaln(d, rows) for d in (v, a) for rows in (9, 2, 4, 1))
    outside += linear(4, v) + linear(v, 4) + 2 * v + linear(16, a) + linear(a, 16) + 2 * a
    assert flops.total_parameters(TINY) == 3 * block + outside == 203_904


@pytest.mark.parametrize(
    ("frames", "height", "width", "teraflops"),
    [(121, 512, 768, 199), (121, 704, 1280, 537), (121, 1088, 1920, 1714), (481, 704, 1280, 3722)],
)
def test_forward_flops_of_the_four_reference_clips(frames, height, width, teraflops):
    video_tokens = ((frames - 1) // 8 + 1) * (height // 32) * (width // 32)
    audio_tokens = round(frames / 24 * 25)
    total = sum(flops.forward_flops(V20, video_tokens, audio_tokens).values())
    assert total / 1e12 == pytest.approx(teraflops, rel=0.02)
    assert flops.train_flops(V20, video_tokens, audio_tokens) == 3 * total


def test_projections_cost_two_flops_a_weight_and_token():
    """Each matrix is met once per token of its input, so its weights give its FLOPs."""
    v, a, s = 700, 90, 128
    config = replace(TINY, gated_attention=False)
    terms = flops.forward_flops(config, v, a, s)
    V, A, L = config.width, config.audio_width, config.num_layers
    assert terms["video self-attention projections"] == 2 * v * L * 4 * V * V
    assert terms["video feed-forward"] == 2 * v * L * 8 * V * V
    assert terms["audio text keys and values"] == 2 * s * L * 2 * A * A
    video_side, audio_side = 4 * V * A, 4 * A * A  # q, out of one direction; k, v of the other
    assert terms["audio-to-video and video-to-audio projections"] == 2 * L * (
        v * video_side + a * audio_side
    )
    assert terms["video self-attention core"] == 2 * 2 * L * v * v * V


def test_a_model_without_exchange_has_none_of_its_cost():
    silent = replace(TINY, audio_video_attention=False)
    exchange = 2 * (TINY.width + 1) * TINY.audio_width  # the least that a projection has
    assert flops.total_parameters(silent) < flops.total_parameters(TINY) - exchange
    assert not any("audio-to-video" in name for name in flops.forward_flops(silent, 64, 8))
    gates = flops.forward_flops(silent, 64, 8)["attention gates"]
    assert gates == 3 * 2 * 2 * 2 * (64 * TINY.width + 8 * TINY.audio_width)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"gated_attention": False},
        {"caption_channels": 24},
        {"audio_video_attention": False},
        {"prompt_adaln": False},
    ],
    ids=str,
)
def test_the_terms_add_up_to_the_products_in_a_trace_of_the_model(switches):
    """To the last one, with no size like another; the terms count biases of timestep MLPs too."""
    config = replace(TINY, remat="none", in_channels=3, audio_out_channels=11, **switches)
    v, a, s = 13, 5, 7
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: LTX2Transformer(config, rngs=Rngs(0))))

    def stream(tokens, channels, axes, context):
        shapes = ((1, tokens, channels), (1,), (1, 1), (1, axes, tokens, 2), (1, s, context))
        fields = ("latent", "sigma", "timesteps", "positions", "context")
        given = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        return Modality(**dict(zip(fields, given, strict=True)))

    widths = config.context_dim, config.audio_context_dim
    video_text, audio_text = (config.caption_channels or width for width in widths)
    counted = flops.count(
        lambda weights, *streams: nnx.merge(graphdef, weights)(*streams),
        weights,
        stream(v, config.in_channels, 3, video_text),
        stream(a, config.audio_in_channels, 1, audio_text),
    )
    rows = [9] + [2] * config.prompt_adaln + [4, 1] * config.audio_video_attention
    biases = sum((2 + n) * (config.width + config.audio_width) for n in rows)
    assert sum(flops.forward_flops(config, v, a, s).values()) == counted + 2 * biases
