import numpy as np
import pytest
import sentencepiece

from ltx2_jax import tokenizer
from ltx2_jax.errors import UserError

CAPTIONS = [
    f"a {colour} ball bounces {count}, with a {sound} at every hit"
    for colour in ("red", "green", "blue")
    for count in ("once", "twice", "three times")
    for sound in ("click", "boom")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer.train(CAPTIONS, path, 512)
    return path


def write_model(path, **options):
    """A word model by the library itself, with special ids of our choice."""
    settings = dict(pad_id=-1, unk_id=0, bos_id=1, eos_id=2, minloglevel=2, model_type="word")
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS),
            model_writer=file,
            vocab_size=30,
            hard_vocab_limit=False,
            **{**settings, **options},
        )
    return tokenizer.Tokenizer(path)


def test_padding_is_on_the_left_and_bos_comes_first(model):
    ids, mask = tokenizer.Tokenizer(model).encode(CAPTIONS[:3], 64)
    assert ids.shape == mask.shape == (3, 64)
    assert (ids.dtype, mask.dtype) == (np.int32, bool)
    for row, valid in zip(ids, mask, strict=True):
        start = int(np.argmax(valid))
        assert valid[start:].all()
        assert row[start] == 2
        assert start > 0
        assert (row[:start] == 0).all()
        assert 3 not in row  # no EOS


def test_tokens_decode_to_the_caption(model):
    ids, mask = tokenizer.Tokenizer(model).encode(CAPTIONS, 64)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for caption, row, valid in zip(CAPTIONS, ids, mask, strict=True):
        assert library.decode(row[valid].tolist()) == caption


def test_long_text_is_cut_at_its_end(model):
    loaded = tokenizer.Tokenizer(model)
    whole, mask = loaded.encode([CAPTIONS[0]], 64)
    short, all_valid = loaded.encode([CAPTIONS[0]], 5)
    assert all_valid.all()
    np.testing.assert_array_equal(short[0], whole[mask][:5])


def test_empty_text_is_bos_alone_and_outer_space_does_not_count(model):
    loaded = tokenizer.Tokenizer(model)
    ids, mask = loaded.encode(["", "  \n"], 4)
    np.testing.assert_array_equal(ids, [[0, 0, 0, 2]] * 2)
    np.testing.assert_array_equal(mask, [[False, False, False, True]] * 2)
    padded, _ = loaded.encode([f"\t {CAPTIONS[0]} "], 40)
    np.testing.assert_array_equal(padded, loaded.encode([CAPTIONS[0]], 40)[0])


def test_unseen_characters_survive_as_bytes(model):
    ids, mask = tokenizer.Tokenizer(model).encode(["красный 球"], 64)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert library.decode(ids[mask].tolist()) == "красный 球"


def test_training_is_deterministic_and_silent(model, tmp_path, capfd):
    tokenizer.train(CAPTIONS, tmp_path / "again.model", 512)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]
    assert capfd.readouterr() == ("", "")


def test_vocabulary_size_is_an_upper_limit(model, tmp_path):
    assert tokenizer.Tokenizer(model).vocab_size < 512
    tokenizer.train(CAPTIONS, tmp_path / "small.model", 300)
    assert tokenizer.Tokenizer(tmp_path / "small.model").vocab_size <= 300
    ids, _ = tokenizer.Tokenizer(tmp_path / "small.model").encode(CAPTIONS, 64)
    assert ids.max() < 300


def test_captions_longer_than_the_library_default_are_not_dropped(tmp_path):
    tokenizer.train(["word " * 2000], tmp_path / "long.model", 512)
    ids, mask = tokenizer.Tokenizer(tmp_path / "long.model").encode(["word"], 8)
    assert (ids[mask][1:] > 255 + 4).all()  # pieces, not bytes


def test_a_vocabulary_too_small_says_what_is_needed(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size 100 is too small .* at least (\d+)") as error:
        tokenizer.train(CAPTIONS, tmp_path / "t.model", 100)
    enough = int(str(error.value).rsplit(" ", 1)[1])
    tokenizer.train(CAPTIONS, tmp_path / "t.model", enough)


def test_captions_without_text_are_refused(tmp_path):
    with pytest.raises(UserError, match="every caption is empty"):
        tokenizer.train(["", "  "], tmp_path / "t.model", 512)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("special", "pad"), [({"pad_id": 3}, 3), ({}, 2), ({"eos_id": -1}, 0)], ids=str
)
def test_padding_is_the_models_own_then_its_eos(tmp_path, special, pad):
    loaded = write_model(tmp_path / "foreign.model", **special)
    ids, mask = loaded.encode([""], 3)
    assert ids.tolist() == [[pad, pad, 1]]
    assert mask.tolist() == [[False, False, True]]


def test_missing_and_damaged_models_are_named(model, tmp_path):
    with pytest.raises(UserError, match=r"none\.model: no such"):
        tokenizer.Tokenizer(tmp_path / "none.model")
    for name, content in {
        "empty": b"",
        "text": b"hello" * 99,
        "cut": model.read_bytes()[:700],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a sentencepiece model"):
            tokenizer.Tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="no BOS"):
        write_model(tmp_path / "bosless.model", bos_id=-1)


def test_one_string_is_not_taken_for_a_list_of_characters(model):
    with pytest.raises(TypeError, match="sequence of strings"):
        tokenizer.Tokenizer(model).encode("red", 4)
    with pytest.raises(ValueError, match="at least 1"):
        tokenizer.Tokenizer(model).encode(["red"], 0)
