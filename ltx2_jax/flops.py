"""Parameters and FLOPs of the transformer from its config alone.

Conventions: a multiply-accumulate is 2 FLOPs; attention is dense (bidirectional, nothing halved);
matrix products only, so norms, rotary embeddings, softmax, GELU, modulation and gating are left out
(they cost bandwidth, not matrix units); the timestep MLPs run once per sample, not per token. These
are the model's FLOPs: recomputation under rematerialisation is not counted, so an MFU from them is
comparable across remat policies.
"""

from ltx2_jax.models.transformer_config import TransformerConfig

TIMESTEP_CHANNELS = 256  # sinusoid features entering the timestep MLPs
TRAIN_PASSES = 3  # a backward pass costs two forward passes: gradients of inputs and of weights


# ------------------------------------------------------------------------------------ parameters


def count_parameters(config: TransformerConfig) -> dict[str, int]:
    """Parameter count of each part of the transformer, summed over its blocks.

    Text encoder, connectors and codecs are not part of it. Source: the module shapes under
    `ltx_core/model/transformer/`.
    """
    c = config
    V, A = c.width, c.audio_width
    n, an = c.num_heads, c.audio_num_heads
    text_rows = 2 if c.modulated_text_attention else 0
    rows = _adaln_rows(c)
    block = {
        "video self-attention": _attention(c, V, V, V, n),
        "video text attention": _attention(c, V, c.context_dim, V, n),
        "video feed-forward": _feed_forward(c, V, c.ff_bias),
        "audio self-attention": _attention(c, A, A, A, an),
        "audio text attention": _attention(c, A, c.audio_context_dim, A, an),
        "audio feed-forward": _feed_forward(c, A, c.audio_ff_bias),
        "modulation tables": (rows + text_rows) * (V + A),
    }
    timestep = _adaln(V, rows) + _adaln(A, rows)
    if c.modulated_text_attention and c.prompt_adaln:
        timestep += _adaln(V, 2) + _adaln(A, 2)
    if c.audio_video_attention:
        block["audio-to-video attention"] = _attention(c, V, A, A, an)
        block["video-to-audio attention"] = _attention(c, A, V, A, an)
        block["modulation tables"] += 5 * (V + A)
        timestep += _adaln(V, 4) + _adaln(A, 4) + _adaln(V, 1) + _adaln(A, 1)
    parts = {name: c.num_layers * count for name, count in block.items()}
    parts["timestep MLPs"] = timestep
    parts["input and output"] = (
        _linear(c.in_channels, V)
        + _linear(V, c.out_channels)
        + 2 * V
        + _linear(c.audio_in_channels, A)
        + _linear(A, c.audio_out_channels)
        + 2 * A
    )
    if c.caption_channels is not None:
        parts["caption projection"] = sum(
            _linear(c.caption_channels, d) + _linear(d, d)
            for d in (c.context_dim, c.audio_context_dim)
        )
    if c.keyframe_embedding:
        parts["keyframe embedding"] = V
    return parts


def total_parameters(config: TransformerConfig) -> int:
    """Number of parameters of the transformer: 18.88 B for LTX-2 2.0, 18.99 B for 2.3."""
    return sum(count_parameters(config).values())


def _linear(fan_in: int, fan_out: int, bias: bool = True) -> int:
    return fan_in * fan_out + (fan_out if bias else 0)


def _attention(c: TransformerConfig, query: int, context: int, inner: int, heads: int) -> int:
    projections = _linear(query, inner) + 2 * _linear(context, inner) + _linear(inner, query)
    norms = 2 * inner
    return projections + norms + (_linear(query, heads) if c.gated_attention else 0)


def _feed_forward(c: TransformerConfig, width: int, bias: bool) -> int:
    return _linear(width, c.ff_mult * width, bias) + _linear(c.ff_mult * width, width, bias)


def _adaln(width: int, rows: int) -> int:
    return _linear(TIMESTEP_CHANNELS, width) + _linear(width, width) + _linear(width, rows * width)


def _adaln_rows(c: TransformerConfig) -> int:
    return 9 if c.modulated_text_attention else 6


# ----------------------------------------------------------------------------------------- FLOPs


def forward_flops(
    config: TransformerConfig, video_tokens: int, audio_tokens: int, text_tokens: int = 1024
) -> dict[str, float]:
    """FLOPs of one forward pass of one sample, term by term.

    Guidance passes and batch entries each cost this much. Terms named "core" are the two products
    inside attention, the rest are projections.
    """
    c, L = config, config.num_layers
    V, A = c.width, c.audio_width
    v, a, s = video_tokens, audio_tokens, text_tokens
    terms = {
        "video self-attention core": L * _core(v, v, V),
        "video self-attention projections": L * 4 * _matmul(v, V, V),
        "video text attention core": L * _core(v, s, V),
        "video text attention projections": L * 2 * _matmul(v, V, V),
        "video text keys and values": L * 2 * _matmul(s, c.context_dim, V),
        "video feed-forward": L * 2 * _matmul(v, V, c.ff_mult * V),
        "audio self-attention core": L * _core(a, a, A),
        "audio self-attention projections": L * 4 * _matmul(a, A, A),
        "audio text attention core": L * _core(a, s, A),
        "audio text attention projections": L * 2 * _matmul(a, A, A),
        "audio text keys and values": L * 2 * _matmul(s, c.audio_context_dim, A),
        "audio feed-forward": L * 2 * _matmul(a, A, c.ff_mult * A),
        "input and output": _matmul(v, V, c.in_channels + c.out_channels)
        + _matmul(a, A, c.audio_in_channels + c.audio_out_channels),
        "timestep MLPs": 2.0 * count_parameters(c)["timestep MLPs"],
    }
    if c.audio_video_attention:
        # Query and output on the attending side, key and value on the other: the sum is symmetric.
        projections = 2 * _matmul(v, V, A) + 2 * _matmul(a, A, A)
        terms["audio-to-video and video-to-audio core"] = L * 2 * _core(v, a, A)
        terms["audio-to-video and video-to-audio projections"] = L * 2 * projections
    if c.gated_attention:
        kinds = 3 if c.audio_video_attention else 2
        video_heads = 2 * c.num_heads + (kinds - 2) * c.audio_num_heads
        gates = _matmul(v, V, video_heads) + _matmul(a, A, kinds * c.audio_num_heads)
        terms["attention gates"] = L * gates
    if c.caption_channels is not None:
        terms["caption projection"] = sum(
            _matmul(s, c.caption_channels, d) + _matmul(s, d, d)
            for d in (c.context_dim, c.audio_context_dim)
        )
    return terms


def train_flops(
    config: TransformerConfig, video_tokens: int, audio_tokens: int, text_tokens: int = 1024
) -> float:
    """FLOPs of one training step of one sample: forward and backward, nothing recomputed."""
    return TRAIN_PASSES * sum(
        forward_flops(config, video_tokens, audio_tokens, text_tokens).values()
    )


def _matmul(rows: int, fan_in: int, fan_out: int) -> float:
    return 2.0 * rows * fan_in * fan_out


def _core(queries: int, keys: int, inner: int) -> float:
    return 4.0 * queries * keys * inner  # scores, and their weighting of the values
