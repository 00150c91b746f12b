"""Cleaning: pure functions, in the order in which a document passes through them.

undo_wikitext   word-tokenised wikitext back to prose (that format only)
normalise       NFC, one kind of newline, no control and no zero-width characters
paragraphs      blocks between blank lines, unwrapped, white space collapsed
fingerprint     16 bytes that are equal for documents with equal paragraphs
"""

import hashlib
import re
import unicodedata

Rules = tuple[tuple[re.Pattern, str], ...]


def compile_rules(*rules: tuple[str, str]) -> Rules:
    """(regular expression, replacement) pairs for `apply_rules`."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


def apply_rules(text: str, rules: Rules) -> str:
    """Replace all matches of each rule, one rule after the other."""
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


_LINE_BREAK = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# Controls, soft hyphen, zero-width space, direction marks, byte-order mark, annotation and tag characters.
# The joiners U+200C and U+200D stay: they are part of the spelling in Persian and in Indic scripts.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffd\U000e0001-\U000e007f]"
)
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")

# wikitext was tokenised for word-level models: "@-@" is a hyphen, punctuation has spaces, rare words are "<unk>".
_WIKITEXT_RULES = compile_rules(
    (r" @([-,.])@ ", r"\1"),
    (r"(?<=\d) : (?=\d)", ":"),
    (r"<unk>", ""),  # a model would learn to predict it; the word that it replaced is lost
    (r'" ([^"]*?) "', r'"\1"'),
    (r"([(\[$£€#]) ", r"\1"),
    (r"(?: +(?=[.,;:!?%)\]])| +(?='(?:s|t|m|d|re|ve|ll)\b)| +(?=n't\b))", ""),
    (r"\(\)|\[\]|\"\"", ""),
    (r"  +", " "),
    (r"(?m)^[ ,;:.)]+", ""),
)


def undo_wikitext(text: str) -> str:
    """Undo the word tokenisation of wikitext-2 and wikitext-103: `real @-@ time play .` becomes `real-time play.`"""
    return apply_rules(text, _WIKITEXT_RULES)


def normalise(text: str) -> str:
    """Unicode NFC with `\\n` as the only line break, without control, zero-width and replacement characters."""
    text = _INVISIBLE.sub("", _LINE_BREAK.sub("\n", text))
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def paragraphs(text: str, one_a_line: bool = False) -> list[str]:
    """The non-empty blocks between blank lines (or the lines, with `one_a_line`), with single spaces inside."""
    blocks = text.split("\n") if one_a_line else _BLANK_LINES.split(text)
    return [block for block in (" ".join(block.split()) for block in blocks) if block]


def fingerprint(blocks: list[str]) -> bytes:
    """16 bytes for exact de-duplication of cleaned documents."""
    return hashlib.blake2b("\n".join(blocks).encode(), digest_size=16).digest()
