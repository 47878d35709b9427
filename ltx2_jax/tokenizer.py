"""Captions to token ids with a sentencepiece model: the only file that imports sentencepiece.

`train` makes a small model from the captions of a dataset. `Tokenizer` loads that one and the
released ones alike: everything it needs (BOS, padding, size) it reads from the model itself.
"""

import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from ltx2_jax.errors import UserError
from ltx2_jax.files import replacing


def train(captions: Iterable[str], path: str | os.PathLike, vocab_size: int) -> None:
    """Trains a unigram model with byte fallback and writes it to `path` in one atomic step.

    The same captions give the same file, byte for byte. Ids: 0 pad, 1 unknown, 2 BOS, 3 EOS,
    then 256 bytes (so that any text can be encoded), then pieces.

    Args:
      captions: the texts; blank ones are ignored.
      path: where the model goes.
      vocab_size: an upper limit. Captions with few distinct words support fewer pieces.

    Raises:
      UserError: no caption has any text, or `vocab_size` cannot hold the characters used.
    """
    texts = [text for text in (caption.strip() for caption in captions) if text]
    if not texts:
        raise UserError(f"{path}: cannot train a tokenizer: every caption is empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            # As in Gemma's model; the default rule would add 240 kB of Unicode tables to the file.
            normalization_rule_name="identity",
            character_coverage=1.0,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            # The order in which threads finish changes the floating-point sums, hence the pieces.
            num_threads=1,
            # In bytes; the default silently drops longer captions from the training text.
            max_sentence_length=max(4192, *(len(text.encode()) for text in texts)),
            minloglevel=2,
        )
    except RuntimeError as error:
        too_small = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", str(error))
        if not too_small:
            raise UserError(
                f"{path}: cannot train a tokenizer on these captions: {error}"
            ) from None
        raise UserError(
            f"vocab_size {vocab_size} is too small for these captions: 4 special pieces, 256 bytes "
            f"and their distinct characters need at least {too_small[2]}"
        ) from None
    with replacing(path) as temporary:
        temporary.write_bytes(model.getvalue())


class Tokenizer:
    """A sentencepiece model, applied as LTX-2 applies Gemma's: BOS first, no EOS, left padding.

    Source: `ltx_core/text_encoders/gemma/tokenizer.py` (behaviour).

    Attributes:
      vocab_size: number of ids, special ones included.
      bos_id: the id that starts every text.
      pad_id: the model's padding id; its EOS where it has none (as LTX-2 does), else 0.
    """

    def __init__(self, path: str | os.PathLike):
        """Loads the model file at `path`.

        Raises:
          UserError: the file is missing, is not a sentencepiece model, or defines no BOS.
        """
        try:
            model = Path(path).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path}: no such tokenizer model") from None
        except OSError as error:
            raise UserError(f"{path}: cannot read the tokenizer model: {error.strerror}") from None
        try:
            if not model:  # The library takes empty bytes for "no model given" and loads nothing.
                raise ValueError("empty file")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError):
            raise UserError(f"{path}: not a sentencepiece model, or a damaged one") from None
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()
        if self.bos_id < 0:
            raise UserError(f"{path}: the tokenizer model defines no BOS token")
        candidates = (self._model.pad_id(), self._model.eos_id(), 0)
        self.pad_id = next(token for token in candidates if token >= 0)

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encodes `n` texts: strip, BOS, cut to `length` keeping the start, pad on the left.

        Args:
          texts: the captions; an empty one becomes BOS alone.
          length: tokens per text, BOS included; at least 1.

        Returns:
          ids int32 [n, length] and mask bool [n, length] (True: a token, False: padding).
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, not one string")
        if length < 1:
            raise ValueError(f"length must be at least 1 (the BOS token), not {length}")
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        mask = np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            tokens = [self.bos_id, *self._model.encode(text.strip())][:length]
            ids[row, length - len(tokens) :] = tokens
            mask[row, length - len(tokens) :] = True
        return ids, mask
