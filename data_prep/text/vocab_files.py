"""The files of a vocabulary: how to find them, the tokens of a vocab.txt, and the settings in the files beside it.

A vocab.txt does not say how text is folded before its words are looked up. `tokenizer_config.json` does, with Hugging
Face's names and meaning, and we write one beside every vocab.txt:

    {"do_lower_case": true, "strip_accents": false, "tokenize_chinese_chars": true}

If that is missing, a tokenizer.json is read. Both files also hold the tokens that `add_tokens` of transformers has
added, as "added_tokens_decoder" and "added_tokens"; old versions wrote them to added_tokens.json.
"""

import json
import re
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from data_prep.files import read_json

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_IN_ALBERT = {name: f"<{name[1:-1].lower()}>" for name in SPECIAL_TOKENS}  # its public models have <pad> and <unk>
SETTINGS_FILE, PIPELINE_FILE, OLD_ADDED_FILE = "tokenizer_config.json", "tokenizer.json", "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SETTINGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")  # the fields of Folding in SETTINGS_FILE
_NORMALIZER_SETTINGS = ("lowercase", "strip_accents", "handle_chinese_chars")  # and in PIPELINE_FILE


class Folding(NamedTuple):
    """What BERT does to text before WordPiece sees it."""

    lower_case: bool
    strip_accents: bool
    split_cjk: bool = True  # each Chinese character is a word


class Added(NamedTuple):
    """A token that was added to a trained vocabulary; `flags` are those of the `tokenizers` library."""

    id: int
    token: str
    flags: dict[str, bool]


def find_vocabularies(folder: Path) -> list[Path]:
    """A folder's `*.model` and `*vocab.txt`, else `*.txt` with lines for BERT's special tokens, else tokenizer.json."""
    found = sorted([*folder.glob("*.model"), *folder.glob("*vocab.txt")])
    pipeline = folder / PIPELINE_FILE
    added = read_object(pipeline).get("added_tokens") or []
    if [file.suffix for file in found] == [".model"] and any(not token["special"] for token in added):
        return [pipeline]  # a model has no place for tokens that were added later
    found = found or sorted(path for path in folder.glob("*.txt") if _has_special_tokens(path))
    return found or [path for path in [pipeline] if path.is_file()]


def _has_special_tokens(path: Path) -> bool:
    try:
        return set(SPECIAL_TOKENS) <= set(path.read_text(encoding="utf-8-sig").split("\n"))
    except UnicodeDecodeError:
        return False


def read_object(path: Path) -> dict:
    """The JSON object in a tokenizer's file; {} if there is no such file. Raises ValueError for a damaged file."""
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; it is damaged, or does not belong to a tokenizer")
    return content


def is_special(token: str) -> bool:
    """Whether a token is one of SPECIAL_TOKENS, in BERT's spelling or in ALBERT's."""
    return token in _IN_ALBERT or token in _IN_ALBERT.values()


def special_ids(path: Path, tokens: list[str]) -> list[int]:
    """Ids of SPECIAL_TOKENS in either spelling. Raises ValueError if one is missing."""
    ids = {token: i for i, token in enumerate(tokens)}
    found = [ids.get(name, ids.get(albert)) for name, albert in _IN_ALBERT.items()]
    if None in found:
        missing = ", ".join(name for name, index in zip(SPECIAL_TOKENS, found, strict=True) if index is None)
        raise ValueError(
            f"vocabulary {path} has no {missing}; BERT needs {' '.join(SPECIAL_TOKENS)}: "
            "train one with `python -m data_prep.vocab` or take one of BERT's"
        )
    return found


def read_vocab_txt(path: Path) -> list[str]:
    """The tokens of a vocab.txt, one per line. Raises ValueError for other files and for duplicate tokens."""
    try:
        tokens = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"vocabulary {path} is not UTF-8 text (byte {error.start}); give a vocab.txt") from error
    first_line: dict[str, int] = {}
    for line, token in enumerate(tokens, start=1):
        if first_line.setdefault(token, line) != line:
            raise ValueError(
                f"vocabulary {path} has token {token!r} on lines {first_line[token]} and {line}; remove one"
            )
    return tokens


def find_folding(path: Path, tokens: list[str], cased: bool | None) -> Folding:
    """How text is folded for a vocab.txt, by `cased`, else by tokenizer_config.json and tokenizer.json beside it.

    What none of them states is guessed from the tokens, with a warning. Raises ValueError if the two files contradict
    each other or ask for something that BERT does not do.
    """
    settings, content = _beside(path)
    normalizer = content.get("normalizer") or {}
    if content and not (normalizer.get("type") == "BertNormalizer" and normalizer["clean_text"]):
        raise ValueError(f"{path}: {PIPELINE_FILE} beside it normalises text unlike BERT; give that file as --vocab")
    if settings.get("do_basic_tokenize") is False:
        raise ValueError(f"{path}: do_basic_tokenize=False in {SETTINGS_FILE} beside it is not supported; remove it")
    stated = []
    for ours, theirs in zip(SETTINGS, _NORMALIZER_SETTINGS, strict=True):
        values = {value for value in (settings.get(ours), normalizer.get(theirs)) if value is not None}
        if len(values) > 1 and (cased is None or ours != SETTINGS[0]):
            raise ValueError(
                f"{path}: {SETTINGS_FILE} beside it says {ours}={settings[ours]} and {PIPELINE_FILE} "
                f"{theirs}={normalizer[theirs]}; make them agree"
            )
        stated.append(values.pop() if len(values) == 1 else None)
    stated_lower, strip, split_cjk = stated
    looks_lower, looks_stripped = guess_folding(tokens)
    lower = stated_lower if cased is None else not cased
    is_guess = lower is None
    if is_guess:
        lower = looks_lower
    if strip is None:  # as in Hugging Face, a file that asks for lower case asks for both
        strip = lower and (stated_lower == lower or looks_stripped)
        is_guess = is_guess or strip != lower
    if is_guess:
        print(
            f"warning: no file beside {path} says whether it is cased; judging by its tokens, it is assumed to be "
            f"{'uncased' if lower else 'cased'}, with accents {'stripped' if strip else 'kept'}. Confirm or correct "
            f"that with --cased or --uncased, or in {path.with_name(SETTINGS_FILE)}: "
            + json.dumps({"do_lower_case": lower, "strip_accents": strip}),
            file=sys.stderr,
        )
    return Folding(lower, strip, True if split_cjk is None else split_cjk)


def guess_folding(tokens: list[str]) -> tuple[bool, bool]:
    """(lower_case, strip_accents) as the tokens suggest.

    A trained vocabulary has its alphabet as tokens. A cased one also has the capitals of many letters: 117 of 276 in
    Google's, against none of 165 in its uncased one. A few capitals or accents that somebody put into unused slots do
    not change the answer, and neither do scripts without capitals.
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


def added_beside(path: Path, tokens: list[str]) -> list[Added]:
    """The tokens that the files beside a vocab.txt add to it, by id. Raises ValueError if they have other tokens."""
    settings, content = _beside(path)
    held, ids = content.get("model", {}).get("vocab"), {token: index for index, token in enumerate(tokens)}
    if content and held not in (ids, ids | {"": len(ids)}):  # with or without an empty last line
        raise ValueError(f"{path} and {PIPELINE_FILE} beside it have different tokens; remove the one that is wrong")
    old = read_object(path.with_name(OLD_ADDED_FILE))
    entries = {index: {"content": token} for token, index in old.items()}
    entries |= {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
    entries |= {token["id"]: token for token in content.get("added_tokens", [])}
    return [added for added in added_tokens(entries) if not is_special(added.token)]


def added_tokens(entries: dict[int, dict]) -> list[Added]:
    """Added tokens, sorted by id. `entries` maps each id to Hugging Face's description."""
    default = {name: name == "normalized" for name in _FLAGS}
    return [
        Added(index, token["content"], {name: token.get(name, default[name]) for name in _FLAGS})
        for index, token in sorted(entries.items())
    ]


def with_added(path: Path, tokens: list[str], added: Iterable[Added]) -> list[str]:
    """All tokens by id; `added` is sorted. Raises ValueError for an id that leaves a gap or has another token."""
    tokens = list(tokens)
    for index, token, _ in added:
        if index == len(tokens):
            tokens.append(token)
        elif index > len(tokens) or tokens[index] != token:
            raise ValueError(f"{path}: added token {token!r} has id {index}, which does not follow the ids before it")
    return tokens


def _beside(path: Path) -> tuple[dict, dict]:
    """The contents of tokenizer_config.json and tokenizer.json beside a vocab.txt."""
    return read_object(path.with_name(SETTINGS_FILE)), read_object(path.with_name(PIPELINE_FILE))
