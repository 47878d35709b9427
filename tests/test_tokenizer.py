import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import save_file

from ltx2_jax import tokenizer
from ltx2_jax.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
FORMS = ("tokenizer.model", "tokenizer.json")
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


def test_a_rare_character_and_a_form_of_one_are_learned_as_they_are(model, tmp_path):
    """Others would be spelled in bytes, or as what they resemble."""
    tokenizer.train(["word " * 2000 + "\u2460\ufb01"], tmp_path / "rare.model", 512)
    loaded = tokenizer.Tokenizer(tmp_path / "rare.model")
    ids, mask = loaded.encode(["\u2460\ufb01"], 8)
    assert (ids[mask][1:] > 255 + 4).all()
    assert loaded.decode(ids[0]) == "\u2460\ufb01"


def test_words_of_the_captions_are_one_token_each(model):
    _, mask = tokenizer.Tokenizer(model).encode(CAPTIONS, 64)
    words = [len(caption.replace(",", " ,").split()) for caption in CAPTIONS]
    assert mask.sum(1).tolist() == [1 + count for count in words]


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


# ---- released tokenizers -------------------------------------------------------------------------

PROMPTS = [
    "A quiet fox walks through the rainy harbour at dawn.",
    "一只狐狸在雨中的港口散步。",
    "ثعلب هادئ يمشي في الميناء",
    "🦊🎻 café, 24 fps!\tline\n\nnext",
    "",
    "the frozen river " * 400,
    "<bos>hello <eos>",
    "a <pad> b<unk>c <start_of_turn>\n<|turn>",
]


@pytest.mark.parametrize("release", ["v2.0", "v2.3", "v2.5"])
def test_both_released_forms_give_the_same_ids(release):
    library = pytest.importorskip("tokenizers")
    folder = GOLDEN / release / "gemma"
    from_model, from_json = tokenizer.Tokenizer(folder), tokenizer.Tokenizer(folder / FORMS[1])
    # Words of the vocabulary, control words and other characters, in random order.
    words = list(library.Tokenizer.from_file(str(folder / FORMS[1])).get_vocab())
    words += [" ", "  ", "\t", "\r", "é", "e\u0301", "雨", "م", "🎻", "\u200d", "<", "bos>", "\x01"]
    rng = np.random.default_rng(0)
    noise = ["".join(rng.choice(words, size=8)) for _ in range(300)]
    for ours, theirs in zip(
        from_model.encode(PROMPTS + noise, 1024), from_json.encode(PROMPTS + noise, 1024),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        assert getattr(from_model, name) == getattr(from_json, name)
    for word in (*words[:40], "no such word"):
        assert from_model.id_of(word) == from_json.id_of(word)
    ids, mask = from_model.encode(PROMPTS[3:4], 64)
    assert from_model.decode(ids[mask]) == from_json.decode(ids[mask]) == PROMPTS[3]


def test_spelled_out_control_words_become_control_ids():
    gemma3, gemma4 = (tokenizer.Tokenizer(GOLDEN / v / "gemma") for v in ("v2.3", "v2.5"))
    text = "<bos>hello <eos><pad>"
    ids, mask = gemma3.encode([text], 16)
    assert ids[mask].tolist()[:2] == [2, 2]  # its own rule adds one to any text
    assert ids[mask].tolist()[-2:] == [1, 0]
    ids, mask = gemma4.encode([text], 16)
    assert ids[mask].tolist()[:2] != [2, 2]  # only where the text has none
    assert ids[mask].tolist()[0] == 2
    assert gemma4.decode(ids[mask]) == "hello "


def test_words_beside_a_model_are_kept_whole_the_longest_of_two(model, tmp_path):
    shutil.copy(model, tmp_path / "tokenizer.model")
    added = [{"content": "<x>", "id": 600}, {"content": "<x><y>", "id": 601, "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    loaded = tokenizer.Tokenizer(tmp_path)
    ids, _ = loaded.encode(["red<x><y>", "red<x>"], 16)
    assert ids[:, -1].tolist() == [601, 600]
    np.testing.assert_array_equal(ids[0, :-1], ids[1, :-1])
    assert loaded.vocab_size == 602
    assert loaded.decode(ids[0]) == "red"  # a special word is no text
    assert [loaded.id_of(word) for word in ("<x>", "</s>", "<nothing>")] == [600, 3, None]


def test_the_config_beside_a_model_names_its_special_words(model, tmp_path):
    shutil.copy(model, tmp_path / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": {"content": "<pad>"}, "pad_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    packed = tmp_path / "pack.safetensors"  # small files of one are in its metadata
    tensors = {"hf_asset__tokenizer.model": np.frombuffer(model.read_bytes(), np.uint8)}
    save_file(tensors, packed, {"tokenizer_config.json": json.dumps(names)})
    for place in (tmp_path, packed):
        loaded = tokenizer.Tokenizer(place)
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (2, 0, 1)


def test_a_json_neither_cuts_nor_fills_texts_by_itself_and_counts_its_highest_id(tmp_path):
    pytest.importorskip("tokenizers")
    source = GOLDEN / "v2.5" / "gemma" / "tokenizer.json"
    described = json.loads(source.read_text())
    described["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    described["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    described["model"]["vocab"]["far away"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    plain, changed = (tokenizer.Tokenizer(p) for p in (source, tmp_path / "tokenizer.json"))
    for ours, theirs in zip(changed.encode(PROMPTS, 64), plain.encode(PROMPTS, 64), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (plain.vocab_size, changed.vocab_size) == (640, 1000)
    ids = plain.encode(["<bos>hello<eos>"], 16)[0][0]
    assert plain.decode(ids) == "hello"


def test_control_words_of_a_trained_model_count_too(model):
    loaded = tokenizer.Tokenizer(model)
    ids, mask = loaded.encode(["<s>red</s>"], 16)
    assert ids[mask].tolist()[:2] == [2, 2]
    assert ids[mask].tolist()[-1] == 3


def test_whether_a_bos_is_added_follows_the_tokenizers_own_config(tmp_path):
    shutil.copytree(GOLDEN / "v2.3" / "gemma", tmp_path / "g")
    config = tmp_path / "g" / "tokenizer_config.json"
    for added in (True, False):
        config.write_text(json.dumps({"add_bos_token": added, "bos_token": {"content": "<bos>"}}))
        ids = tokenizer.Tokenizer(tmp_path / "g").encode(["<bos>a", "a"], 8)[0]
        assert (ids[0] == 2).sum() == 1 + added
        assert (ids[1] == 2).sum() == 1
    (tmp_path / "g" / "tokenizer.json").unlink()
    config.unlink()
    assert (tokenizer.Tokenizer(tmp_path / "g").encode(["<bos>a"], 8)[0] == 2).sum() == 2


def test_a_packed_text_encoder_has_the_tokenizer_of_its_folder():
    pytest.importorskip("tokenizers")
    packed = tokenizer.Tokenizer(GOLDEN / "v2.5" / "split" / "text_encoder.safetensors")
    folder = tokenizer.Tokenizer(GOLDEN / "v2.5" / "gemma")
    for ours, theirs in zip(packed.encode(PROMPTS, 64), folder.encode(PROMPTS, 64), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'ltx2-jax\[tokenizers\]'"):
        tokenizer.Tokenizer(GOLDEN / "v2.5" / "gemma" / FORMS[1])
    tokenizer.Tokenizer(GOLDEN / "v2.5" / "gemma")  # tokenizer.model needs none


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_what_is_no_text_is_refused(model, text):
    with pytest.raises(UserError, match=r"prompt 1 .* position 1"):
        tokenizer.Tokenizer(model).encode(["fine", text], 8)


def test_a_place_without_a_readable_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        tokenizer.Tokenizer(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        tokenizer.Tokenizer(GOLDEN / "v2.5" / "split" / "transformer.safetensors")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"its tokenizer\.json is not JSON"):
        tokenizer.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match=r"its tokenizer\.json is not a JSON object"):
        tokenizer.Tokenizer(tmp_path)
    (tmp_path / "pack.safetensors").write_text("hello")
    with pytest.raises(UserError, match="not a readable safetensors"):
        tokenizer.Tokenizer(tmp_path / "pack.safetensors")
    with pytest.raises(UserError, match=r"none\.safetensors: no such"):
        tokenizer.Tokenizer(tmp_path / "none.safetensors")
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"not a tokenizer\.json that can be read"):
        tokenizer.Tokenizer(tmp_path)
