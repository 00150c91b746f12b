"""The files of a vocabulary decide how text is folded; missing facts are guessed with care, and the result recorded."""

import json

import pytest

from data_prep import build, corpus
from data_prep.files import read_json
from data_prep.text.tokenizer import load_tokenizer
from data_prep.text.vocab_files import SPECIAL_TOKENS, Folding, guess_folding

SMALL = "abcdefghijklmnopqrstuvwxyz"
LATIN = [*SMALL, *(f"##{c}" for c in SMALL), "the", "patient", "has", "apne", "fur"]
CASED = [*LATIN, *SMALL.upper(), "The", "Patient"]
GERMAN = [*LATIN, "für", "##ü", "ü", "grün", "ö", "schön"]
HINDI = ["अपने", "घर", "में", "##ी", "##े", "क", "##क", "है"]


def make(folder, tokens, name="vocab.txt", **beside):
    """A folder with a vocab.txt and JSON files beside it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([*SPECIAL_TOKENS, *tokens]) + "\n", encoding="utf-8")
    for file, content in beside.items():
        (folder / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def pieces(tokenizer, text):
    return [tokenizer.tokens[i] for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (LATIN, (True, True)),
        (CASED, (False, False)),
        (HINDI, (False, False)),
        ([*HINDI, *SMALL], (True, False)),
        ([*LATIN, "[Patient]", "Heparin"], (True, True)),  # one capital in a free slot
        ([*LATIN, *(f"Drug{c}" for c in SMALL)], (True, True)),  # many
        ([*LATIN, "É"], (True, True)),
        ([*LATIN, "café"], (True, True)),  # one accent in a free slot
        (GERMAN, (True, False)),
        ([], (False, False)),
    ],
)
def test_a_guess_goes_by_the_whole_vocabulary(tokens, expected):
    assert guess_folding([*SPECIAL_TOKENS, "[unused1]", "<S>", *tokens]) == expected


def test_a_guess_is_reported_on_first_use_and_the_option_prevents_it(tmp_path, capsys):
    tokenizer = load_tokenizer(make(tmp_path / "hi", HINDI))
    assert not capsys.readouterr().err
    assert pieces(tokenizer, "अपने घर में") == ["अपने", "घर", "में"]
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    assert "assumed to be cased" in warning and "--uncased" in warning
    folder = make(tmp_path / "latin", LATIN)
    assert load_tokenizer(folder, cased=True).folding == Folding(False, False)
    assert load_tokenizer(folder, cased=False).folding == Folding(True, True)
    assert pieces(load_tokenizer(folder, cased=True), "The patient") == ["[UNK]", "patient"]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "normalizer", "expected"),
    [
        ({"do_lower_case": False}, None, Folding(False, False)),
        ({"do_lower_case": True}, None, Folding(True, True)),
        ({"do_lower_case": True, "strip_accents": False}, None, Folding(True, False)),
        ({"do_lower_case": False, "strip_accents": True}, None, Folding(False, True)),
        ({"do_lower_case": True, "tokenize_chinese_chars": False}, None, Folding(True, True, False)),
        (
            None,
            {"lowercase": False, "strip_accents": None, "handle_chinese_chars": False},
            Folding(False, False, False),
        ),
        ({"do_lower_case": True}, {"lowercase": True, "strip_accents": False}, Folding(True, False)),
        ({"strip_accents": False}, None, Folding(True, False)),  # only the case is guessed
    ],
)
def test_the_files_beside_a_vocabulary_are_honoured_as_hugging_face_does(
    tmp_path, config, normalizer, expected, capsys
):
    tokens = [*SPECIAL_TOKENS, *GERMAN]
    beside = {} if config is None else {"tokenizer_config": config}
    if normalizer:
        kind = {"type": "BertNormalizer", "clean_text": True}
        model = {"type": "WordPiece", "vocab": {token: i for i, token in enumerate(tokens)}}
        beside["tokenizer"] = {"normalizer": kind | normalizer, "model": model, "added_tokens": []}
    tokenizer = load_tokenizer(make(tmp_path / "v", GERMAN, **beside))
    assert tokenizer.folding == expected
    assert bool(capsys.readouterr().err) == (config == {"strip_accents": False})
    if config and "do_lower_case" in config and not normalizer:
        from transformers import BertTokenizer

        theirs = BertTokenizer(str(tmp_path / "v/vocab.txt"), **config)
        for text in ("Für den Patienten schön", "FUR 中文 ü Ü"):
            assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    assert load_tokenizer(saved).folding == expected
    assert load_tokenizer(saved, cased=expected.lower_case).folding.lower_case != expected.lower_case


@pytest.mark.parametrize(
    ("config", "content", "message"),
    [
        ({"do_lower_case": False}, {"lowercase": True}, "do_lower_case=False and tokenizer.json lowercase=True"),
        ({"do_basic_tokenize": False}, None, "do_basic_tokenize=False"),
        ({}, {"type": "NFC"}, "normalises text unlike BERT"),
        ([], None, "not a JSON object"),
    ],
)
def test_contradictions_beside_a_vocabulary_are_refused(tmp_path, config, content, message):
    beside = {"tokenizer_config": config}
    if content:
        vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *LATIN])}
        beside["tokenizer"] = {
            "normalizer": {"type": "BertNormalizer", "clean_text": True} | content,
            "model": {"vocab": vocab},
        }
    with pytest.raises(ValueError, match=message):
        load_tokenizer(make(tmp_path / "v", LATIN, **beside)).encode("a")


def test_another_tokenizer_json_is_not_taken_for_the_vocabularys_own(tmp_path):
    with pytest.raises(ValueError, match="have different tokens"):
        load_tokenizer(make(tmp_path / "v", LATIN, tokenizer={"model": {"vocab": {"a": 0}}}))


def test_corpus_and_shards_record_case_and_accents_and_keep_to_them(tmp_path, capsys):
    folder = make(tmp_path / "v", GERMAN, name="tokens.txt")
    sentences = "\n\n".join("Für den Patienten. Schön has the patient." for _ in range(9))
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} {sentences}" for i in range(3)), encoding="utf-8")
    (tmp_path / "more.txt").write_text(sentences, encoding="utf-8")
    source = ["--input", str(tmp_path / "text.txt"), str(tmp_path / "more.txt"), "--vocab", str(folder / "tokens.txt")]
    corpus.main([*source, "--uncased", "--output", str(tmp_path / "c")])
    expected = {"lower_case": True, "strip_accents": False}
    assert read_json(tmp_path / "c/manifest.json")["vocab"].items() >= expected.items()
    assert "with accents kept" in capsys.readouterr().err  # which --uncased does not say
    with pytest.raises(ValueError, match="vocab.lower_case: True there, False requested"):
        corpus.main([*source, "--cased", "--output", str(tmp_path / "c")])
    options = ["--corpus", str(tmp_path / "c"), "--output", str(tmp_path / "s"), "--seq-length", "16"]
    options += ["--max-predictions", "3", "--num-shards", "1"]
    with pytest.raises(ValueError, match="lower_case False.* is not the one the corpus was tokenised with"):
        build.main([*options, "--vocab", str(folder / "tokens.txt"), "--cased"])
    capsys.readouterr()
    build.main(options)
    assert "warning" not in capsys.readouterr().err
    assert read_json(tmp_path / "s/manifest.json")["vocab"].items() >= expected.items()
    assert load_tokenizer(tmp_path / "s").folding == Folding(True, False)


def test_a_byte_order_mark_blank_last_lines_and_crlf_are_not_tokens(tmp_path):
    plain = load_tokenizer(make(tmp_path / "v", LATIN))
    text = (tmp_path / "v/vocab.txt").read_text(encoding="utf-8")
    for number, content in enumerate(
        ("\ufeff" + text, text + "\n", text + "\n\n", text.rstrip(), text.replace("\n", "\r\n"))
    ):
        path = tmp_path / f"{number}-vocab.txt"
        path.write_bytes(content.encode())
        assert load_tokenizer(path).tokens == plain.tokens


def test_a_vocabulary_of_any_name_is_found_among_other_texts(tmp_path):
    make(tmp_path, LATIN, name="tokens.txt")
    (tmp_path / "notes.txt").write_text("[PAD] is a token\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    assert load_tokenizer(tmp_path).path.name == "tokens.txt"
    make(tmp_path, HINDI, name="other.txt")
    with pytest.raises(ValueError, match=r"not other\.txt, tokens\.txt; name the file"):
        load_tokenizer(tmp_path)
    make(tmp_path, CASED)
    assert load_tokenizer(tmp_path).path.name == "vocab.txt"


@pytest.mark.parametrize("style", ["added_tokens.json", "added_tokens_decoder", "tokenizer.json"])
def test_added_tokens_are_tokens(tmp_path, style):
    """As transformers finds them, in whichever file they are."""
    from transformers import BertTokenizer

    folder = make(tmp_path / "v", LATIN, tokenizer_config={"do_lower_case": True})
    theirs = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True)
    size = len(theirs)
    theirs.add_tokens(["[URL]", "heart attack", "##zz"])
    theirs.save_pretrained(tmp_path / "saved")
    content = read_json(tmp_path / "saved/tokenizer.json")
    entries = {str(token.pop("id")): token for token in content["added_tokens"]}
    if style == "tokenizer.json":
        (tmp_path / "saved/tokenizer.json").rename(folder / "tokenizer.json")
    elif style == "added_tokens.json":
        (folder / style).write_text(json.dumps({t["content"]: int(i) for i, t in entries.items() if int(i) >= size}))
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, style: entries}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokens[size:] == ["[URL]", "heart attack", "##zz"]
    for text in ("see [URL], heart attack", "a[url]b Heart Attack heart  attack", "##zz", "[SEP] the"):
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.encode_with_offsets(text)[0] == expected
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").tokens == tokenizer.tokens
    assert tokenizer.describe()["added_tokens"] == {token: size + i for i, token in enumerate(tokenizer.tokens[size:])}


def test_an_added_token_behind_a_gap_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'\[URL\]' has id 99, which does not follow"):
        load_tokenizer(make(tmp_path / "v", LATIN, added_tokens={"[URL]": 99}))
