"""WordPiece ids equal Hugging Face's, token for token; both kinds have one interface; bad vocabularies are named."""

import bz2
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_prep.files import sha256_file
from data_prep.text import tokenizer as tokenizer_module
from data_prep.text.tokenizer import load_tokenizer
from data_prep.text.vocab_files import SPECIAL_TOKENS
from data_prep.vocab import train_sentencepiece, train_wordpiece

DATA = Path(__file__).parents[3] / "shared" / "data"
TEXTS = [
    "The quick brown fox jumped over the lazy dogs, unbelievably!",
    "Ärger in Zürich: naïve café, ΟΔΥΣΣΕΥΣ, İstanbul, ﬁne ſ K",
    "力加勝北区 日本語と中国語 ᴵᴺᵀᵃছজটডণত 한국어 ไทย",
    "controls \x00a\x07b\x0bc\x0cd\x1ce\x1df\x1eg\x1fh\x85i\u200bj\ufeffk\ufffdl\xadm",
    "spaces\u00a0and\u2003more\u3000and\u2028lines\r\nand\ttabs",
    "foo[SEP]bar [MASK] [CLS][UNK] <unk> [PAD]",
    "e\u0301 combining \u0301 alone, a\u0315\u0300\u05ae\u0062 reordered",
    "x" * 100 + " " + "y" * 101 + " " + "word" * 50,
    "",
    " \t\n ",
    "🤗 emoji 👩‍👩‍👧 and $100 @home #tag ~`|^<>=+",
]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """A folder with an uncased and a cased vocab.txt and a SentencePiece model, trained on the texts."""
    folder = tmp_path_factory.mktemp("vocabularies")
    for name, lowercase in (("uncased", True), ("cased", False)):
        tokens = train_wordpiece(TEXTS * 3, 400, lowercase)
        (folder / f"{name}-vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "spm.model").write_bytes(train_sentencepiece(TEXTS[:3] * 3, 70))
    return folder


def reference(path, lowercase):
    """BertTokenizerFast, set to find no special tokens in text."""
    from transformers import BertTokenizerFast

    backend = BertTokenizerFast(str(path), do_lower_case=lowercase).backend_tokenizer
    backend.encode_special_tokens = True

    def encode(text):
        return backend.encode(text, add_special_tokens=False).ids

    encode.batch = lambda texts: [found.ids for found in backend.encode_batch(texts, add_special_tokens=False)]
    return encode


def every_kind_of_character():
    """All code points below U+3000 and every 61st above, inside words and as words."""
    codes = [*range(0x3000), *range(0x3000, 0xD800, 61), *range(0xE000, 0x110000, 61)]
    return [" ".join(f"a{chr(c)}b {chr(c)}" for c in codes[i : i + 50]) for i in range(0, len(codes), 50)]


@pytest.mark.parametrize("name", ["uncased", "cased"])
def test_wordpiece_equals_hugging_face(vocabularies, name):
    path = vocabularies / f"{name}-vocab.txt"
    ours, theirs = load_tokenizer(path), reference(path, name == "uncased")
    assert ours.folding.lower_case == (name == "uncased")
    for text in TEXTS + every_kind_of_character():
        expected = theirs(text)
        assert ours.encode(text) == expected, text  # cold
        assert ours.encode(text) == expected, text  # from the cache


@pytest.mark.parametrize("name", ["uncased", "cased", "chinese"])
def test_wordpiece_equals_hugging_face_on_real_text(name):
    path = DATA / "vocab" / f"bert-base-{name}-vocab.txt"
    texts = [DATA / "pretrain" / "wikitext-2" / "valid.txt", DATA / "pretrain" / "google_bert_sample_text.txt"]
    if not path.exists():
        pytest.skip("no shared data")
    ours, theirs = load_tokenizer(path), reference(path, name != "cased")
    assert ours.folding.lower_case == (name != "cased")
    for file in texts:
        for line in file.read_text(encoding="utf-8").split("\n")[:1500]:
            assert ours.encode(line) == theirs(line)


def all_given_lines():
    """Every line of the texts (books, wikitext, a Wikipedia dump with its markup) and of GLUE's files."""
    for path in [*sorted((DATA / "pretrain").rglob("*.txt")), *sorted((DATA / "glue").rglob("*.tsv"))]:
        yield from path.read_text(encoding="utf-8", errors="replace").split("\n")
    with tarfile.open(DATA / "pretrain" / "gutenberg_extra.tar.xz") as books:
        for book in books:
            if book.isfile():
                yield from books.extractfile(book).read().decode("utf-8", "replace").split("\n")
    for path in sorted((DATA / "pretrain" / "wiki_xml").iterdir()):
        yield from bz2.decompress(path.read_bytes()).decode("utf-8", "replace").split("\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uncased", "cased"])
def test_wordpiece_equals_hugging_face_on_all_given_text(name):
    path = DATA / "vocab" / f"bert-base-{name}-vocab.txt"
    if not path.exists():
        pytest.skip("no shared data")
    ours, theirs = load_tokenizer(path), reference(path, name == "uncased")
    lines, num_tokens, num_bytes = all_given_lines(), 0, 0
    while block := list(islice(lines, 10_000)):
        for line, expected in zip(block, theirs.batch(block), strict=True):
            assert ours.encode(line) == expected, line
            num_tokens += len(expected)
        num_bytes += sum(len(line.encode()) + 1 for line in block)
    print(f"{name}: {num_tokens:,} tokens of {num_bytes:,} bytes compared, 0 differ")
    assert num_tokens > 20_000_000


def test_the_cache_stays_bounded(vocabularies, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "CACHE_WORDS", 10)
    tokenizer = load_tokenizer(vocabularies / "uncased-vocab.txt")
    words = [f"w{i}" for i in range(100)]
    assert tokenizer.encode(" ".join(words)) == [i for word in words for i in tokenizer.encode(word)]
    assert len(tokenizer._cache) <= 10
    tokenizer.encode("long" * 100)
    assert "long" * 100 not in tokenizer._cache


@pytest.mark.parametrize("name", ["uncased-vocab.txt", "spm.model"])
def test_both_kinds_have_one_interface(vocabularies, tmp_path, name):
    tokenizer = load_tokenizer(vocabularies / name)
    assert tokenizer.kind == ("sentencepiece" if name == "spm.model" else "wordpiece")
    ids = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
    assert ids == [0, 1, 2, 3, 4] and tuple(tokenizer.tokens[:5]) == SPECIAL_TOKENS
    assert tokenizer.vocab_size == len(tokenizer.tokens) == len(tokenizer.word_start)
    assert tokenizer.word_start.dtype == np.bool_ and tokenizer.word_start[:5].all() and not tokenizer.word_start.all()
    assert tokenizer.decode(tokenizer.encode("The quick  brown fox")) == "the quick brown fox"
    assert not set(tokenizer.encode("[MASK] [SEP]")) & {tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id}
    assert tokenizer.decode([2, *tokenizer.encode("fox"), 4]) == "[CLS] fox [MASK]"
    copy = tokenizer.save(tmp_path)
    assert copy.name == name and load_tokenizer(tmp_path).sha256 == tokenizer.sha256 == sha256_file(copy)


def test_sentencepiece_words_start_after_a_space_and_at_punctuation_and_cjk():
    begins = tokenizer_module._begins_word
    assert begins("▁fox") and begins("▁") and begins(",") and begins("力")
    assert not begins("ing") and not begins("7") and not begins("é")


@pytest.mark.parametrize(
    "content, message",
    [
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n", r"has no \[MASK\]"),
        ("a\nb\n", r"has no \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
        ("\n".join([*SPECIAL_TOKENS, "a", "b", "a"]) + "\n", "token 'a' on lines 6 and 8"),
        (b"\xff\xfe", r"is not UTF-8 text \(byte 0\)"),
    ],
)
def test_bad_vocab_txt(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_bad_paths(vocabularies, tmp_path):
    with pytest.raises(ValueError, match="exactly one vocabulary .* not cased-vocab.txt, spm.model, uncased-vocab.txt"):
        load_tokenizer(vocabularies)
    with pytest.raises(ValueError, match="not none"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "spm.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "spm.model")
    for name in ("vocab.json", "vocab"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=r"neither \*\.txt .* nor tokenizer\.json"):
            load_tokenizer(tmp_path / name)
