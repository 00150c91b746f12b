"""The characters of each token: cut out of the text they match the token, and none is lost."""

import unicodedata
from pathlib import Path

import pytest

from data_prep.text.tokenizer import load_tokenizer
from data_prep.vocab import train_sentencepiece
from tests.data_prep.test_tokenizer import TEXTS, every_kind_of_character

VOCABULARIES = Path(__file__).parents[3] / "shared" / "data" / "vocab"
PIECES = ["caf", "##e", "e", "##b", "x", "ᄒ", "##ᅡ", "##ᆫ", "日", "本", "て", "##す", "ab", "##c", "d", "don", "'", "t"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]
    (folder / "uncased.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "cased.txt").write_text("\n".join([*tokens, "D", "é"]) + "\n", encoding="utf-8")
    (folder / "spm.model").write_bytes(train_sentencepiece(TEXTS[:3] * 3, 70))
    return folder


def cut(tokenizer, text):
    """The tokens and the text of each."""
    ids, offsets = tokenizer.encode_with_offsets(text)
    return [(tokenizer.tokens[i], text[begin:end]) for i, (begin, end) in zip(ids, offsets, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't", [("don", "Don"), ("'", "'"), ("t", "t")]),
        ("CAFÉ", [("caf", "CAF"), ("##e", "É")]),
        ("cafe\u0301 x", [("caf", "caf"), ("##e", "e\u0301"), ("x", "x")]),  # the accent is its letter's
        ("e\u0301\u0302b", [("e", "e\u0301\u0302"), ("##b", "b")]),
        ("\u0301x", [("x", "x")]),  # an accent without a letter
        ("한", [("ᄒ", "한"), ("##ᅡ", "한"), ("##ᆫ", "한")]),  # NFD makes three letters of one character
        ("日本 です", [("日", "日"), ("本", "本"), ("て", "で"), ("##す", "す")]),
        ("a\u200bb\x00c  d", [("ab", "a\u200bb"), ("##c", "c"), ("d", "d")]),
        ("a\x0bb", [("ab", "a\x0bb")]),  # not white space to BERT
    ],
)
def test_wordpiece_by_hand(folder, text, expected):
    assert cut(load_tokenizer(folder / "uncased.txt"), text) == expected


def test_cased_wordpiece_by_hand(folder):
    assert cut(load_tokenizer(folder / "cased.txt", cased=True), "D é") == [("D", "D"), ("é", "é")]


def test_sentencepiece_by_hand(folder):
    tokenizer = load_tokenizer(folder / "spm.model")
    surfaces = [surface for _, surface in cut(tokenizer, "  The\u00a0 ½ ﬁne\u3000x ")]
    assert "".join(dict.fromkeys("".join(surfaces))) == "The½ﬁnx"
    for piece, surface in cut(tokenizer, "ﬁ ½"):
        assert surface in ("ﬁ", "½") or (piece == "▁" and not surface)


def plain(text):
    """The text in compatibility forms, without accents and case, computed independently of the tokenizer."""
    kept = [
        c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) not in ("Mn", "Mc", "Cc", "Cf", "Co")
    ]
    return unicodedata.normalize("NFKD", "".join(kept).lower().casefold())


@pytest.mark.parametrize("name", ["uncased.txt", "cased.txt", "spm.model", "bert-base-uncased", "bert-base-chinese"])
def test_no_character_is_lost_and_none_is_foreign(folder, name):
    path = VOCABULARIES / f"{name}-vocab.txt" if name.startswith("bert") else folder / name
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    tokenizer = load_tokenizer(path)
    for text in TEXTS + every_kind_of_character():
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text), text
        assert offsets == sorted(offsets), text
        covered = {place for begin, end in offsets for place in range(begin, end)}
        lost = {text[place] for place in range(len(text)) if place not in covered and not text[place].isspace()}
        # Normalisation removes invisible characters, accents without a letter, and the replacement character.
        lost -= {"\ufffd"}
        assert all(unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn", "Mn", "Mc") for c in lost), lost
        for i, (begin, end) in zip(ids, offsets, strict=True):
            piece = plain(tokenizer.tokens[i].replace("▁", "").removeprefix("##"))
            newer = any(unicodedata.category(c) == "Cn" for c in text[begin:end])  # than this Python's Unicode
            if i != tokenizer.unk_id and not newer:
                assert piece in plain(text[begin:end]), (piece, text[begin:end])
                assert begin < end or not piece, (text, begin, end)
