"""The files of a vocabulary: which they are, the tokens of a vocab.txt, and what stands beside it.

A vocab.txt does not say how text is folded before it is looked up. That stands in `tokenizer_config.json`, which we
write beside every vocab.txt, with Hugging Face's names and meaning:

    {"do_lower_case": true, "strip_accents": false, "tokenize_chinese_chars": true}

Where it is missing, a tokenizer.json is asked. Tokens that `add_tokens` of transformers has added are in these files,
too, as "added_tokens_decoder" and "added_tokens", and those of old versions in added_tokens.json.
"""

import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

from data_prep.files import read_json

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SETTINGS_FILE, PIPELINE_FILE = "tokenizer_config.json", "tokenizer.json"
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Folding(NamedTuple):
    """What BERT does to text before WordPiece sees it."""

    lower_case: bool
    strip_accents: bool
    split_cjk: bool = True  # each Chinese character is a word


def find_vocabularies(folder: Path) -> list[Path]:
    """The vocabulary files of a folder: `*.model` and `*vocab.txt`, else other `*.txt` files that have BERT's special
    tokens on lines of their own, else tokenizer.json.
    """
    found = sorted([*folder.glob("*.model"), *folder.glob("*vocab.txt")])
    pipeline = folder / PIPELINE_FILE
    if len(found) == 1 and found[0].suffix == ".model" and pipeline.is_file() and has_added_tokens(read_json(pipeline)):
        return [pipeline]  # the model has no place for tokens that were added later
    found = found or sorted(path for path in folder.glob("*.txt") if _has_special_tokens(path))
    return found or [path for path in [pipeline] if path.is_file()]


def _has_special_tokens(path: Path) -> bool:
    try:
        return set(SPECIAL_TOKENS) <= set(path.read_text(encoding="utf-8-sig").split("\n"))
    except UnicodeDecodeError:
        return False


def is_special(token: str) -> bool:
    """Whether a token is one of SPECIAL_TOKENS, in BERT's spelling or in ALBERT's."""
    return token in SPECIAL_TOKENS or token in map(_albert_name, SPECIAL_TOKENS)


def special_ids(path: Path, tokens: list[str]) -> list[int]:
    """Ids of SPECIAL_TOKENS; ALBERT's public models call the first two <pad> and <unk>."""
    ids = {token: i for i, token in enumerate(tokens)}
    missing = [name for name in SPECIAL_TOKENS if name not in ids and _albert_name(name) not in ids]
    if missing:
        raise ValueError(
            f"vocabulary {path} has no {', '.join(missing)}; BERT needs {' '.join(SPECIAL_TOKENS)}: "
            "train one with `python -m data_prep.vocab` or take one of BERT's"
        )
    return [ids.get(name, ids.get(_albert_name(name))) for name in SPECIAL_TOKENS]


def _albert_name(name: str) -> str:
    return f"<{name[1:-1].lower()}>"


def read_vocab_txt(path: Path) -> list[str]:
    try:
        tokens = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"vocabulary {path} is not UTF-8 text (byte {error.start}); a vocab.txt has one token a line"
        ) from error
    first_line: dict[str, int] = {}
    for line, token in enumerate(tokens, start=1):
        if first_line.setdefault(token, line) != line:
            raise ValueError(
                f"vocabulary {path} has token {token!r} on lines {first_line[token]} and {line}; "
                "every token must be unique: remove one"
            )
    return tokens


def find_folding(path: Path, tokens: list[str], cased: bool | None) -> Folding:
    """As `cased`, tokenizer_config.json and tokenizer.json say, in this order, else as the tokens look.

    Raises ValueError where the two files contradict each other, or say what is not built.
    """
    settings, content = _beside(path)
    normalizer = content.get("normalizer") or {}
    if content and not (normalizer.get("type") == "BertNormalizer" and normalizer["clean_text"]):
        raise ValueError(f"{path} is used otherwise than BERT does by tokenizer.json beside it; give that as --vocab")
    if settings.get("do_basic_tokenize") is False:
        raise ValueError(f"{path}: do_basic_tokenize=False in {SETTINGS_FILE} beside it is not built; remove it")
    told = []
    for name, in_settings, in_normalizer in (
        ("lower_case", "do_lower_case", "lowercase"),
        ("strip_accents", "strip_accents", "strip_accents"),
        ("split_cjk", "tokenize_chinese_chars", "handle_chinese_chars"),
    ):
        values = {value for value in (settings.get(in_settings), normalizer.get(in_normalizer)) if value is not None}
        if len(values) > 1 and not (name == "lower_case" and cased is not None):
            raise ValueError(
                f"{path}: {SETTINGS_FILE} beside it says {in_settings}={settings[in_settings]} and {PIPELINE_FILE} "
                f"{in_normalizer}={normalizer[in_normalizer]}; make them agree"
            )
        told.append(values.pop() if len(values) == 1 else None)
    told_lower, strip, cjk = told
    lower = told_lower if cased is None else not cased
    is_told = lower is not None and lower == told_lower
    is_guess = lower is None
    looks_lower, looks_stripped = guess_folding(tokens)
    if is_guess:
        lower = looks_lower
    if strip is None:
        strip = lower and (is_told or looks_stripped)
        is_guess |= strip != lower
    if is_guess:
        print(
            f"warning: no file beside {path} says whether it is cased; by its tokens it is taken to be "
            f"{'un' * lower}cased, with accents {'stripped' if strip else 'kept'}. Confirm that or say otherwise with "
            f"--cased or --uncased, or in {path.with_name(SETTINGS_FILE)}: "
            + json.dumps({"do_lower_case": lower, "strip_accents": strip}),
            file=sys.stderr,
        )
    return Folding(lower, strip, True if cjk is None else cjk)


def guess_folding(tokens: list[str]) -> tuple[bool, bool]:
    """(lower_case, strip_accents) that the tokens look like.

    Every trained vocabulary has its alphabet as tokens, and a cased one has the capitals of most usual letters: in
    Google's, 117 of 276 letters have theirs; in its uncased one none of 165. A few tokens that somebody put into free
    slots, capitals or accents, do not change the answer, and neither do scripts without capitals.
    """
    bare = {token.removeprefix("##") for token in tokens if not re.fullmatch(r"\[.*\]|<.*>", token)}
    with_case = [token for token in bare if token.lower() != token.upper()]
    letters = [token for token in with_case if len(token) == 1] or with_case
    capitals = {token.lower() for token in letters if token != token.lower()}
    is_cased = not letters or (len(capitals) > 1 and 4 * len(capitals) > len({token.lower() for token in letters}))
    accented = sum(_stripped(token) != token for token in bare)
    return not is_cased, not is_cased and (accented < 2 or 100 * accented < len(bare))


def _stripped(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


def added_tokens(path: Path, tokens: list[str]) -> list[tuple[int, str, dict[str, bool]]]:
    """(id, token, flags) of what was added to a vocab.txt, by id, as the files beside it tell."""
    settings, content = _beside(path)
    held, ids = content.get("model", {}).get("vocab"), {token: index for index, token in enumerate(tokens)}
    if content and held not in (ids, ids | {"": len(ids)}):  # with or without a blank last line
        raise ValueError(f"{path} and tokenizer.json beside it have different tokens; remove the one that is wrong")
    entries = {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
    entries |= {token["id"]: token for token in content.get("added_tokens", [])}
    old = path.with_name("added_tokens.json")
    if old.is_file():
        entries = {index: {"content": token} for token, index in read_json(old).items()} | entries
    default = {name: name == "normalized" for name in TOKEN_FLAGS}
    return [
        (index, token["content"], {name: token.get(name, default[name]) for name in TOKEN_FLAGS})
        for index, token in sorted(entries.items())
        if not is_special(token["content"])
    ]


def with_added(path: Path, tokens: list[str], added: list[tuple[int, str, dict[str, bool]]]) -> list[str]:
    """All tokens by id."""
    tokens = list(tokens)
    for index, token, _ in sorted(added, key=lambda entry: entry[0]):
        if index == len(tokens):
            tokens.append(token)
        elif index > len(tokens) or tokens[index] != token:
            raise ValueError(
                f"{path}: the added token {token!r} has id {index}, which does not follow on the tokens before it"
            )
    return tokens


def has_added_tokens(content: object) -> bool:
    """Whether a tokenizer.json has tokens that are found in text and are no pieces of its model."""
    return isinstance(content, dict) and any(not token["special"] for token in content.get("added_tokens") or [])


def lost_tokens(path: Path, pieces: list[str]) -> list[str]:
    """Tokens that an added_tokens.json beside a SentencePiece model names and the model has not."""
    old = path.with_name("added_tokens.json")
    return sorted(set(read_json(old)) - set(pieces)) if old.is_file() else []


def _beside(path: Path) -> tuple[dict, dict]:
    """The contents of tokenizer_config.json and tokenizer.json beside a vocab.txt; {} where there is none."""
    settings, content = (
        read_json(file) if file.is_file() else {} for file in map(path.with_name, (SETTINGS_FILE, PIPELINE_FILE))
    )
    if not isinstance(settings, dict) or not isinstance(content, dict):
        raise ValueError(
            f"{SETTINGS_FILE} or {PIPELINE_FILE} beside {path} is no JSON object: damaged, or not a tokenizer's"
        )
    return settings, content
