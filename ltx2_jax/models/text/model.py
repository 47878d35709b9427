"""The networks between token ids and what the transformer attends to, as one.

Dims: B prompts, S text tokens, Dv and Da widths for video and audio.
"""

from flax import nnx
from jax import Array

from ltx2_jax.models.text.connectors import Connectors
from ltx2_jax.models.text.features import TextFeatures
from ltx2_jax.models.text.gemma import Gemma


class TextModel(nnx.Module):
    """The networks of the encoder, as one; without connectors it ends at the features."""

    def __init__(self, gemma: Gemma, text_features: TextFeatures, connectors: Connectors | None):
        self.gemma, self.text_features, self.connectors = gemma, text_features, connectors

    def features(self, tokens: Array, mask: Array) -> tuple[Array, Array]:
        """Left-padded tokens and mask [B, S] -> features [B, S, Dv] and [B, S, Da]."""

        def consume(carry, hidden, index):
            return self.text_features.add(carry, hidden, index, mask)

        carry = self.gemma.fold(tokens, mask, consume, self.text_features.init(*tokens.shape))
        return self.text_features.finish(carry)

    def __call__(self, tokens: Array, mask: Array) -> tuple[Array, Array, Array | None]:
        return self.connectors(*self.features(tokens, mask), mask)
