"""WordPiece against transformers' BertTokenizerFast, token for token; SentencePiece against its own library."""

from pathlib import Path

import pytest
import sentencepiece
from transformers import BertTokenizerFast

from data_prep.tokenizer import load_tokenizer
from data_prep.vocab import train_sentencepiece, train_wordpiece

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
TRICKY = [
    "The naïve café – “quoted”, Über-größe!",
    "中文 and English混在一起",
    "tabs\tand\nnew lines\x0b\x0c and \x1c\x1d\x1e\x1f controls \x00 \ufffd \u200b joined",
    "x = a[0]**2 + 3.14e-5; url http://a.b/c?d=e&f",
    "word" * 60,
    "emoji 😀 and accents e\u0301",
    "",
    "   ",
]
TEXT = [f"The value number {i} of the café is returned as a new list, naïve or not." for i in range(200)]


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece_equals_transformers_on_tricky_text(lowercase, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(train_wordpiece(TEXT + TRICKY, 400, lowercase)) + "\n", encoding="utf-8")
    ours = load_tokenizer(path)
    theirs = BertTokenizerFast(vocab=str(path), do_lower_case=lowercase)
    assert ours.lowercase == lowercase
    for text in TRICKY + TEXT[:5]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not beside this repository")
@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-cased"])
def test_wordpiece_equals_transformers_on_real_text(name):
    path = SHARED / "vocab" / f"{name}-vocab.txt"
    ours, theirs = load_tokenizer(path), BertTokenizerFast(vocab=str(path), do_lower_case="uncased" in name)
    num_tokens = 0
    for file in ("wikitext-2/valid.txt", "gutenberg/Joyce_Dubliners.txt"):
        for line in (SHARED / "pretrain" / file).read_text(encoding="utf-8", errors="replace").splitlines()[:1500]:
            ids = ours.encode(line)
            assert ids == theirs(line, add_special_tokens=False)["input_ids"], repr(line)
            num_tokens += len(ids)
    assert num_tokens > 30_000


def test_sentencepiece_gives_its_librarys_ids_and_the_special_tokens_come_first(tmp_path):
    path = tmp_path / "spm.model"
    path.write_bytes(train_sentencepiece(TEXT, 60))
    ours, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (ours.pad_id, ours.unk_id, ours.cls_id, ours.sep_id, ours.mask_id) == (0, 1, 2, 3, 4)
    for text in TRICKY:
        assert ours.encode(text) == theirs.encode(text)
    assert train_sentencepiece(TEXT, 60) == path.read_bytes()


def test_a_vocabulary_without_mask_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n")
    with pytest.raises(ValueError, match=r"\[MASK\]"):
        load_tokenizer(path)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
