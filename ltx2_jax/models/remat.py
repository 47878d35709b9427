"""What the backward pass of a block finds saved, and what it computes again."""

from collections.abc import Callable
from typing import Any

import jax

# Names of arrays that a policy may keep.
ATTENTION = "attention"  # what attention returns
STATISTICS = "attention_statistics"  # log-sum-exp of its logits, which a kernel's backward needs
PROJECTION = "projection"  # what a Linear in front of attention, or of a feed-forward, returns
BLOCK_INPUT = "block_input"


def _attention_saveable(saved: Callable[..., Any]) -> Callable[..., Any]:
    """`saved`, and what cuDNN returns: its statistics cannot be named from outside."""

    def policy(primitive, *args, **params):
        if primitive.name.startswith("dot_product_attention_fwd"):
            return True
        return saved(primitive, *args, **params)

    return policy


# The inputs of every block are saved in any case: they are the carry of the scan. Numbers per block
# and video token of the 19B model, input included:
# - "block" saves no more: 4096;
# - "attention" keeps what attention returns, so that no attention kernel runs twice: 14336 (self-
#   and text attention 4096 each, audio to video 2048), 0.4 GB per block for the 14080 tokens of 5 s
#   at 720p in bfloat16;
# - "attention_offload" moves these to the host's memory until they are needed. The statistics, one
#   float32 per attention, head and token, are 1 % of it and stay, as does what cuDNN returns;
# - "projections" keeps queries, keys and values before their norms and both products of the
#   feed-forward as well (the second for the gradient of its gate): 57344. Matrix products that
#   still run twice are those behind attention, which give its result back to the stream: a sixth of
#   the block's.
REMAT_POLICIES = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "attention": _attention_saveable(
        jax.checkpoint_policies.save_only_these_names(ATTENTION, STATISTICS)
    ),
    "attention_offload": _attention_saveable(
        jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[STATISTICS],
            names_which_can_be_offloaded=[ATTENTION, BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    ),
    "projections": _attention_saveable(
        jax.checkpoint_policies.save_only_these_names(ATTENTION, STATISTICS, PROJECTION)
    ),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
