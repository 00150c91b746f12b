"""A SentencePiece model and its export give the same ids for any text; a model without an exact export is refused."""

import io
import json
import random

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from transformers import AlbertTokenizer, AutoTokenizer

from data_prep.files import read_json
from data_prep.text.tokenizer import load_tokenizer
from data_prep.text.tokenizer_json import save_tokenizer, tokenizer_json
from data_prep.vocab import train_sentencepiece

SAMPLE = [
    "Émile has a naïve café, quickly. The fox's [red] box (it jumped) – no?",
    "Ọ̀rọ̀ G̃ III xx yy zz 日本語で 한국어 ガ 1½",
] * 9
MARKS = [chr(code) for code in (*range(0x300, 0x346), 0x93C, 0x1161, 0x11A8, 0x200B, 0x200D, 0x3099, 0xFF9E)]
BLOCKS = [(0x20, 0x7F)] * 4 + [(0xA0, 0x250), (0x370, 0x530), (0x900, 0xD00), (0x1100, 0x1200), (0x1D00, 0x2600)]
BLOCKS += [(0x3000, 0x3200), (0xFB00, 0xFDD0), (0xFE00, 0xFFFF), (0x1D400, 0x1D800), (1, 0xD800), (0xE000, 0x10FFFF)]
BERT = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "pad_piece": "[PAD]", "unk_piece": "[UNK]"}
BERT |= {"control_symbols": ["[CLS]", "[SEP]", "[MASK]"]}


def train_elsewhere(path, **options):
    content = io.BytesIO()
    settings = {"vocab_size": 90, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2} | BERT | options
    SentencePieceTrainer.train(sentence_iterator=iter(SAMPLE), model_writer=content, **settings)
    path.write_bytes(content.getvalue())
    return path


def random_texts(number, seed=0):
    """Characters of all blocks, with marks, spaces and repetitions more often than by chance."""
    choose = random.Random(seed)

    def character():
        kind = choose.random()
        return choose.choice(MARKS) if kind < 0.2 else choose.choice(" ▁\nIx-") if kind < 0.4 else chr(
            choose.randrange(*choose.choice(BLOCKS))
        )  # fmt: skip

    return ["".join(character() for _ in range(choose.randrange(1, 25))) for _ in range(number)]


TEXTS = ["E\u0301mile", "Ọ̀rọ̀", "G̃", "ﬁ\u0301", "a\u0315\u0300b", "o\u0302\u0323", "～〜", "한국", "I\u0307 Α\u0345"]
TEXTS += [
    "",
    " ",
    "▁",
    "▁x",
    " x ▁",
    "  two  spaces ",
    "a\r\nb",
    "\x01x",
    "\u200bx",
    "¨ a ¨",
    "xIII III",
    "--------",
    "<s>x</s>",
]
MODELS = {
    "ours": None,
    "pad and unk as in ALBERT": {"pad_piece": "<pad>", "unk_piece": "<unk>"},
    "spm_train's <s>, symbols, pieces over spaces": {
        "pad_id": 3, "bos_id": 4, "eos_id": 5, "unk_id": 0, "user_defined_symbols": ["(", "--"],
        "split_by_whitespace": False, "normalization_rule_name": "nmt_nfkc_cf",
    },
    "no normalisation": {"normalization_rule_name": "identity"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_sentencepiece_model_and_its_export_agree_on_any_text(tmp_path, name):
    path = tmp_path / "spm.model"
    if MODELS[name] is None:
        path.write_bytes(train_sentencepiece(SAMPLE, 60))
    else:
        train_elsewhere(path, **MODELS[name])
    tokenizer, reference = load_tokenizer(path), SentencePieceProcessor(model_file=str(path))
    (tmp_path / "hf").mkdir()
    save_tokenizer(tokenizer, tmp_path / "hf", 64)
    pipeline = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    pipeline.encode_special_tokens = True
    alone = load_tokenizer(tmp_path / "hf/tokenizer.json")
    assert alone.tokens == tokenizer.tokens and (alone.word_start == tokenizer.word_start).all()
    assert (alone.kind, alone.folding) == (tokenizer.kind, tokenizer.folding)
    num_ties = 0
    for text in [*SAMPLE[:2], *TEXTS, *random_texts(1500)]:
        expected = reference.encode(text)
        assert tokenizer.encode(text) == expected, ascii(text)
        if MODELS[name] and sorted(expected) == sorted(found := alone.encode(text)) and expected != found:
            # "I II" and "II I" are equally probable; elsewhere SentencePiece's float32 decides by rounding.
            num_ties += 1
            expected = found
        assert pipeline.encode(text, add_special_tokens=False).ids == expected, ascii(text)
        assert alone.encode(text) == expected == alone.encode_with_offsets(text)[0], ascii(text)
    assert num_ties < 4
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("Émile", "fox")["input_ids"] == [
        *(tokenizer.cls_id, *tokenizer.encode("Émile"), tokenizer.sep_id),
        *(*tokenizer.encode("fox"), tokenizer.sep_id),
    ]
    ids = [theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id]
    assert ids == tokenizer.special_ids and len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("text", "before", "behind"),
    [
        ("the [MASK].", "▁the", "."),
        ("([MASK])", "▁(", ")"),
        ("the [MASK]'s box", "▁the", "'s▁box"),
        ("[MASK] fox", "", "▁fox"),
        (" a  [MASK]  x ", "▁a", "▁x"),
    ],
)
def test_a_mask_has_the_neighbours_of_the_word_that_it_hides(tmp_path, text, before, behind):
    (tmp_path / "spm.model").write_bytes(train_sentencepiece(SAMPLE, 60))
    tokenizer = load_tokenizer(tmp_path / "spm.model")
    ids = tokenizer_json(tokenizer).encode(text).ids
    pieces = [tokenizer.tokens[i] for i in ids]
    place = ids.index(tokenizer.mask_id)
    assert ("".join(pieces[1:place]), "".join(pieces[place + 1 : -1])) == (before, behind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "bpe"}, "only unigram models convert"),
        ({"byte_fallback": True, "vocab_size": 400}, "was trained with byte_fallback"),
        ({"add_dummy_prefix": False}, "was trained with add_dummy_prefix=False"),
        ({"remove_extra_whitespaces": False}, "was trained with remove_extra_whitespaces=False"),
        ({"treat_whitespace_as_suffix": True}, "was trained with treat_whitespace_as_suffix"),
        ({"user_defined_symbols": ["fox"]}, "user-defined piece 'fox'"),
    ],
)
def test_models_that_do_not_convert_exactly_are_refused(tmp_path, options, message):
    tokenizer = load_tokenizer(train_elsewhere(tmp_path / "spm.model", **options))
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match=message):
        save_tokenizer(tokenizer, tmp_path / "hf", 64)
    assert not list((tmp_path / "hf").iterdir())


def test_custom_rules_convert_exactly_or_are_refused(tmp_path):
    rules = tmp_path / "rules.tsv"
    texts = ["the Fox's É", "qQ ab"]
    for content, is_exact in (("46 6F 78\t62\n", False), ("46\t66\n51\t71\n", True)):
        rules.write_text(content)
        tokenizer = load_tokenizer(train_elsewhere(tmp_path / "spm.model", normalization_rule_tsv=str(rules)))
        if is_exact:
            pipeline = tokenizer_json(tokenizer)
            assert [pipeline.encode(text, add_special_tokens=False).ids for text in texts] == list(
                map(tokenizer.encode, texts)
            )
        else:
            with pytest.raises(ValueError, match="normalisation rules are not"):
                tokenizer_json(tokenizer)


def test_tokenizers_that_transformers_saves_are_vocabularies(tmp_path):
    """Our export saved again, with tokens added, and transformers' own kind of Unigram tokenizer."""
    (tmp_path / "spm.model").write_bytes(train_sentencepiece(SAMPLE, 60))
    ours = load_tokenizer(tmp_path / "spm.model")
    (tmp_path / "hf").mkdir()
    save_tokenizer(ours, tmp_path / "hf", 64)
    # Transformers 5 would write TokenizersBackend, which 4 does not know; 4.57.6 gave the same ids.
    assert read_json(tmp_path / "hf/tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode("Émile's [MASK] fox") == ours.encode("Émile's [MASK] fox")
    theirs.add_tokens(["[URL]", "red fox"])
    theirs.save_pretrained(tmp_path / "more")
    pieces = [(token, 0.0 if i < 5 else -float(i)) for i, token in enumerate(ours.tokens)]
    albert = AlbertTokenizer(vocab=[("<pad>", 0.0), ("<unk>", 0.0), *pieces[2:]])
    albert.save_pretrained(tmp_path / "albert")
    for name, tokenizer in (("more", theirs), ("albert", albert)):
        loaded = load_tokenizer(tmp_path / name)
        assert loaded.kind == "sentencepiece" and loaded.vocab_size == len(tokenizer)
        for text in ("The red fox", "a [URL] x", "Émile"):
            assert loaded.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
        assert loaded.mask_id not in loaded.encode("[MASK] <unk> [CLS]")
    (tmp_path / "both").mkdir()
    (tmp_path / "spm.model").rename(tmp_path / "both/spm.model")
    (tmp_path / "more/tokenizer.json").rename(tmp_path / "both/tokenizer.json")
    assert load_tokenizer(tmp_path / "both").tokens[-1] == "red fox"


def test_added_tokens_beside_a_model_are_not_lost(tmp_path):
    (tmp_path / "spm.model").write_bytes(train_sentencepiece(SAMPLE, 60))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[MASK]": 4, "[URL]": 60}))
    with pytest.raises(ValueError, match=r"adds '\[URL\]', which a SentencePiece model cannot hold"):
        load_tokenizer(tmp_path)


def test_other_kinds_of_tokenizer_json_are_refused(tmp_path):
    for content in ({"model": {"type": "BPE", "vocab": {}}}, [], {"model": {"type": "WordPiece", "vocab": {"a": 0}}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": []} | content if content else content))
        with pytest.raises(ValueError, match="not a tokenizer.json of a WordPiece|has no .PAD.|not a JSON object"):
            load_tokenizer(tmp_path)
