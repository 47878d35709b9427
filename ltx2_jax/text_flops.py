"""Parameters, bytes and FLOPs of a Gemma text decoder from its config alone.

Conventions as in `flops.py`: a multiply-accumulate is 2 FLOPs, matrix products only, attention
counted dense over all tokens (which is how it is computed), no output matrix: encoding a prompt
does not run it.
"""

from ltx2_jax.models.gemma_layers import GemmaConfig, LayerKind


def count_parameters(cfg: GemmaConfig) -> dict[str, int]:
    """Parameter count of each part, summed over the layers. 11.77 B in all for Gemma 3 12B."""
    kinds = [cfg.kind(name) for name in cfg.layers]
    norms = sum(4 * cfg.width + 2 * kind.head_dim + cfg.layer_scalar for kind in kinds)
    return {
        "embedding": cfg.vocab_size * cfg.width,
        "attention": sum(_projections(cfg, kind) for kind in kinds),
        "feed-forward": len(kinds) * 3 * cfg.width * cfg.mlp,
        "norms": norms + cfg.width,
    }


def forward_flops(cfg: GemmaConfig, tokens: int = 1024) -> dict[str, float]:
    """FLOPs of the hidden states of one prompt of `tokens` tokens, padding included."""
    kinds = [cfg.kind(name) for name in cfg.layers]
    parts = count_parameters(cfg)
    core = sum(4.0 * tokens * tokens * cfg.num_heads * kind.head_dim for kind in kinds)
    return {
        "attention projections": 2.0 * tokens * parts["attention"],
        "attention core": core,
        "feed-forward": 2.0 * tokens * parts["feed-forward"],
    }


def weight_bytes(cfg: GemmaConfig, bytes_per_parameter: int = 2) -> float:
    """Bytes that one pass reads of the weights, however many prompts it serves.

    All but the embedding, of which it reads one row a token.
    """
    parts = count_parameters(cfg)
    return float(bytes_per_parameter * (sum(parts.values()) - parts["embedding"]))


def _projections(cfg: GemmaConfig, kind: LayerKind) -> int:
    """Queries and output; keys and, unless they are the keys, values."""
    key_value = (1 if kind.keys_are_values else 2) * kind.kv_heads
    return cfg.width * kind.head_dim * (2 * cfg.num_heads + key_value)
