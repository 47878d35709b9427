"""Prompts to token ids and back: the only file that imports sentencepiece (or tokenizers).

`train` makes a small sentencepiece model from the captions of a dataset. `Tokenizer` loads that one
and the released ones alike: all it needs (BOS, padding, size) it reads from the files themselves.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from safetensors import SafetensorError, safe_open

from ltx2_jax.errors import UserError
from ltx2_jax.files import replacing

FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
ASSET = "hf_asset__"  # prefix of files stored as tensors in a packed text encoder


def train(captions: Iterable[str], path: str | os.PathLike, vocab_size: int) -> None:
    """Trains a BPE model with byte fallback and writes it to `path` in one atomic step.

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
            # As Gemma's. A unigram model of a small grammar's captions keeps parts of words: twice
            # as many tokens.
            model_type="bpe",
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
    """A tokenizer, applied as LTX-2 does: BOS, no EOS, cut at the end, padded on the left.

    A control word spelled out in a text (`<bos>`, `<eos>`, `<pad>`, ...) becomes the control id.
    Source: `ltx_core/text_encoders/gemma/{tokenizer,gemma_assets}.py` (behaviour).

    Attributes:
      vocab_size: number of ids, special ones included.
      bos_id: the id that starts every text.
      eos_id: the id that ends a generated text, or None.
      pad_id: the model's padding id; its EOS where it has none (as LTX-2 does), else 0.
    """

    def __init__(self, path: str | os.PathLike):
        """Loads a sentencepiece model, a `tokenizer.json`, or what holds one of the two.

        Args:
          path: a `tokenizer.model` or `tokenizer.json` file, a Hugging Face folder with either
            (`tokenizer.model` is preferred: it needs no extra package), or a safetensors file that
            carries `tokenizer_json` as a tensor, as the text encoder of 2.5 does.

        Raises:
          UserError: nothing is there, it is damaged, it defines no BOS, or it can only be read with
            the `tokenizers` package, which is not installed.
        """
        files = _tokenizer_files(Path(path))
        config, described = (
            _parse(files.get(name), f"{path}: its {name}")
            for name in ("tokenizer_config.json", "tokenizer.json")
        )
        added = described.get("added_tokens", [])
        if "tokenizer.model" in files:
            self._model = _SentencePiece(files["tokenizer.model"], added, path)
        else:
            self._model = _TokenizersJson(files["tokenizer.json"], path)
        self.vocab_size = self._model.vocab_size
        bos, self.eos_id, pad = (
            self._model.id_of(_word(config[f"{name}_token"]))
            if config.get(f"{name}_token")
            else self._model.defaults[name]
            for name in ("bos", "eos", "pad")
        )
        if bos is None:
            raise UserError(f"{path}: the tokenizer defines no BOS token")
        self.bos_id = bos
        self.pad_id = next(token for token in (pad, self.eos_id, 0) if token is not None)
        self._always_adds_bos = _adds_bos(config, described)

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encodes `n` texts: strip, BOS, cut to `length` keeping the start, pad on the left.

        Args:
          texts: the captions; an empty one becomes BOS alone.
          length: tokens per text, BOS included; at least 1.

        Returns:
          ids int32 [n, length] and mask bool [n, length] (True: a token, False: padding).

        Raises:
          UserError: a text holds a NUL character or half of a surrogate pair (invalid UTF-8).
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, not one string")
        if length < 1:
            raise ValueError(f"length must be at least 1 (the BOS token), not {length}")
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        mask = np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            check_text(text, row)
            tokens = self._model.encode(text.strip())
            if self._always_adds_bos or tokens[:1] != [self.bos_id]:
                tokens = [self.bos_id, *tokens]
            tokens = tokens[:length]
            ids[row, length - len(tokens) :] = tokens
            mask[row, length - len(tokens) :] = True
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids, control words left out."""
        return self._model.decode([int(token) for token in ids])

    def id_of(self, word: str) -> int | None:
        """The id of a piece or control word such as `<end_of_turn>`; None if there is none."""
        return self._model.id_of(word)


class _SentencePiece:
    """A sentencepiece model, with the control words that it would spell letter by letter."""

    def __init__(self, model: bytes, added: Sequence[dict], path: str | os.PathLike):
        """`added` is what a `tokenizer.json` beside the model says of words kept whole, if any."""
        try:
            if not model:  # The library takes empty bytes for "no model given" and loads nothing.
                raise ValueError("empty file")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError):
            raise UserError(f"{path}: not a sentencepiece model, or a damaged one") from None
        sp, ids = self._model, range(self._model.vocab_size())
        control = {sp.id_to_piece(i): i for i in ids if sp.is_control(i) or sp.is_unknown(i)}
        self._words = control | {token["content"]: token["id"] for token in added}
        self._hidden = set(control.values()) | {t["id"] for t in added if t.get("special")}
        # Longest first: alternatives are tried in order.
        words = sorted(self._words, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, words)))
        self.vocab_size = max(len(ids), *(token + 1 for token in self._words.values()))
        known = {"bos": sp.bos_id(), "eos": sp.eos_id(), "pad": sp.pad_id()}
        self.defaults = {name: None if token < 0 else token for name, token in known.items()}

    def encode(self, text: str) -> list[int]:
        tokens, start = [], 0
        for word in self._pattern.finditer(text):
            tokens += self._model.encode(text[start : word.start()])
            tokens.append(self._words[word[0]])
            start = word.end()
        return tokens + self._model.encode(text[start:])

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([token for token in ids if token not in self._hidden])

    def id_of(self, word: str) -> int | None:
        if word in self._words:
            return self._words[word]
        token = self._model.piece_to_id(word)
        return None if token == self._model.unk_id() else token


class _TokenizersJson:
    """A `tokenizer.json`, read by the library that defines the format."""

    def __init__(self, content: bytes, path: str | os.PathLike):
        try:
            import tokenizers  # an extra: only needed where no tokenizer.model exists
        except ImportError:
            raise UserError(
                f"{path}: has a tokenizer.json and no tokenizer.model: reading it needs the "
                "tokenizers package, pip install 'ltx2-jax[tokenizers]'"
            ) from None
        try:
            self._model = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # The library raises bare Exception.
            raise UserError(f"{path}: not a tokenizer.json that can be read: {error}") from None
        # The file may ask for either; both are ours to do.
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = max(self._model.get_vocab().values()) + 1
        self.defaults = {name: self.id_of(f"<{name}>") for name in ("bos", "eos", "pad")}

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def id_of(self, word: str) -> int | None:
        return self._model.token_to_id(word)


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    """Name -> content of the tokenizer files that `path` is or holds, at least one of the two."""
    try:
        if path.is_dir():
            found = {name: path / name for name in FILES if (path / name).is_file()}
            files = {name: file.read_bytes() for name, file in found.items()}
        elif path.suffix == ".safetensors":
            files = _packed_files(path)
        else:
            files = {FILES[path.suffix == ".json"]: path.read_bytes()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer file or folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer: {error.strerror}") from None
    if not {"tokenizer.model", "tokenizer.json"} & set(files):
        raise UserError(f"{path}: holds no tokenizer (no tokenizer.model and no tokenizer.json)")
    return files


def _packed_files(path: Path) -> dict[str, bytes]:
    """The same of a packed text encoder: files as tensors of bytes, small ones as metadata too."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            files = {name: metadata[name].encode() for name in FILES if name in metadata}
            for key in file.keys():
                name = "tokenizer.json" if key == "tokenizer_json" else key.removeprefix(ASSET)
                if name in FILES:
                    files[name] = file.get_tensor(key).astype(np.uint8).tobytes()
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    return files


def _parse(content: bytes | None, name: str) -> dict:
    if content is None:
        return {}
    try:
        parsed = json.loads(content)
    except ValueError:
        raise UserError(f"{name} is not JSON") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{name} is not a JSON object")
    return parsed


def _word(token: str | dict) -> str:
    """A special token of `tokenizer_config.json`: its text, or a dict that holds it."""
    return token["content"] if isinstance(token, dict) else token


def _adds_bos(config: dict, described: dict) -> bool:
    """Whether the tokenizer itself starts any text with a BOS.

    Gemma 3's does, before a BOS that the text spells out too. Gemma 4's does not: LTX-2 then adds
    one, unless the text spells one out.
    """
    if config.get("add_bos_token") is not None:
        return config["add_bos_token"]
    if not described:  # sentencepiece alone has no such rule
        return True
    return _word(config.get("bos_token") or "<bos>") in str(described.get("post_processor"))


def check_text(text: str, row: int) -> None:
    at = text.find("\0")
    if at >= 0:
        raise UserError(f"prompt {row} has a NUL character (at position {at}): remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"prompt {row} is not valid Unicode text (half a surrogate pair at position "
            f"{error.start}): decode it as UTF-8"
        ) from None
