"""Sentence splitting: Punkt (Kiss and Strunk 2006, Computational Linguistics 32:4), trained on a sample of the corpus.

nltk trains the model; nothing is downloaded. The decision at each candidate follows section 4 of the paper with nltk's
parameters, at ten times nltk's speed. It deviates where nltk splits dialogue wrongly: closing quotes and brackets are
skipped, and a word in lower case never begins a sentence ('"No!" he said' is one). The sentence-final marks of other
scripts, such as 。 । ؟ ። and ។, have no other meaning, so they need neither the model nor a space after them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data_prep.files import read_json, write_json

_OPENERS = "\"'“‘«([{*_"
_CLOSERS = "\"'”’»)]}*_"
# The characters of Unicode 18.0's property Sentence_Terminal (PropList.txt), in three classes. After the first class,
# which is used as in English, and the ellipsis, a space must follow, and Punkt decides.
_ENGLISH_ENDS = ".!?…\u2024\u203c\u203d\u2047\u2048\u2049\u2e2e\u2e3c\u2e53\u2e54\u2e60\u2e61"
# Full stops that are also decimal points and occur inside names, so no letter or digit of that width may follow.
_WIDE_STOPS = "\ufe52\uff0e"
# All others always end a sentence.
_CERTAIN_ENDS = (
    "\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u104a\u104b\u1362\u1367\u1368"
    "\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab\u1b4e\u1b4f\u1b5a\u1b5b\u1b5e\u1b5f"
    "\u1b7d-\u1b7f\u1c3b\u1c3c\u1c7e\u1c7f\u2cf9-\u2cfb\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf"
    "\ua92f\ua9c8\ua9c9\uaa5d-\uaa5f\uaaf0\uaaf1\uabeb\ufe12\ufe15\ufe16\ufe56\ufe57\uff01\uff1f\uff61"
    "\U00010a56\U00010a57\U00010f55-\U00010f59\U00010f86-\U00010f89\U00011047\U00011048\U000110be-\U000110c1"
    "\U00011141-\U00011143\U000111c5\U000111c6\U000111cd\U000111de\U000111df\U00011238\U00011239\U0001123b\U0001123c"
    "\U000112a9\U000113d4\U000113d5\U0001144b\U0001144c\U000115c2\U000115c3\U000115c9-\U000115d7\U00011641\U00011642"
    "\U0001173c-\U0001173e\U00011944\U00011946\U00011a42\U00011a43\U00011a9b\U00011a9c\U00011c41\U00011c42"
    "\U00011ef7\U00011ef8\U00011f43\U00011f44\U00016a6e\U00016a6f\U00016af5\U00016b37\U00016b38\U00016b44"
    "\U00016d6e\U00016d6f\U00016e98\U0001bc9f\U0001da88"
)
_CERTAIN_CLOSERS = "」』”’）】〉》〕］｝｣»›)\\]}"
_CANDIDATE = re.compile(
    # Most characters fail at the first set; for speed, one range covers all of its characters beyond U+FFFF.
    rf"[{_ENGLISH_ENDS}{_WIDE_STOPS}{_CERTAIN_ENDS[: _CERTAIN_ENDS.index(chr(0x10A56))]}\U00010a56-\U0001da88]"
    rf"(?:(?<=[{_ENGLISH_ENDS}])\ufe0f?[{re.escape(_CLOSERS)}]* "
    rf"|(?:(?<=[{_CERTAIN_ENDS}])|(?<=[{_WIDE_STOPS}])(?![\dA-Za-zＡ-Ｚａ-ｚ]))(?<![{_CERTAIN_ENDS}].)"
    rf"[{_CERTAIN_ENDS}{_WIDE_STOPS}.!?]*+[{_CERTAIN_CLOSERS}]*+"
    rf"(?:[{_CERTAIN_CLOSERS}\"'*_]++(?=\s|\Z))?+\s*+(?![,;:،؛、，；：､]))"
)
# nltk would treat curly quotes, and underscores that mean italics, as parts of words.
_PLAIN_QUOTES = str.maketrans("‘’“”", "''\"\"", "_")
# Bits of nltk's orthographic context of a type; its saved models hold the same numbers.
_SEEN_CAPITALISED_INSIDE = 1 << 2
_SEEN_LOWERCASE = 1 << 4 | 1 << 5 | 1 << 6
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*")
_NUMBER_TYPE = "##number##"


@dataclass(frozen=True)
class SentenceSplitter:
    """A trained Punkt model. Its types are words in lower case without a final period; all numbers are one type.

    abbreviations       types that are followed by a period inside a sentence
    collocations        (type before a period, type after it), without a boundary between them
    sentence_starters   types that often follow a boundary
    lowercase_types     types seen in lower case
    capitalised_inside  types seen capitalised inside a sentence
    """

    abbreviations: frozenset[str] = frozenset()
    collocations: frozenset[tuple[str, str]] = frozenset()
    sentence_starters: frozenset[str] = frozenset()
    lowercase_types: frozenset[str] = frozenset()
    capitalised_inside: frozenset[str] = frozenset()

    def split(self, paragraph: str) -> list[str]:
        """The sentences of a paragraph with collapsed white space. Together they contain all of its text."""
        sentences, start = [], 0
        for match in _CANDIDATE.finditer(paragraph):
            end = match.end()
            if end == len(paragraph):
                break
            if match[0][0] in _ENGLISH_ENDS and not self._is_boundary(*_words_around(paragraph, start, match)):
                continue
            sentences.append(paragraph[start:end].rstrip())
            start = end
        return [*sentences, paragraph[start:]] if start < len(paragraph) else sentences

    def _is_boundary(self, before: str, after: str) -> bool:
        """Whether a sentence ends between two words (sections 4.1 to 4.3); `before` ends with one of _ENGLISH_ENDS."""
        if not after or after[0].islower() or after[0] in ",;:.!?…":
            return False
        if before[-1] not in ".…\u2024":
            return True
        is_ellipsis = before.endswith(("..", "…"))
        is_initial = len(before) == 2 and before[0].isalpha()
        this = _word_type(before[:-1])
        following = _word_type(after.rstrip(_CLOSERS + ".,;:!?…"))
        if (this, following) in self.collocations:
            return False
        is_ordinary = following in self.lowercase_types and following not in self.capitalised_inside
        surely_starts = after[0].isupper() and is_ordinary
        if is_initial:
            return surely_starts or (this not in self.abbreviations and following in self.lowercase_types)
        if is_ellipsis or this in self.abbreviations or this.rpartition("-")[2] in self.abbreviations:
            return surely_starts or (after[0].isupper() and following in self.sentence_starters)
        return True

    def save(self, path: str | Path) -> None:
        """Write the model as sorted JSON, so that equal models give equal bytes."""
        write_json(path, {name: sorted(getattr(self, name)) for name in self.__dataclass_fields__})


def load_splitter(path: str | Path) -> SentenceSplitter:
    """Read a model that `SentenceSplitter.save` wrote. Raises ValueError for a file that is not JSON."""
    content = read_json(path)
    content["collocations"] = map(tuple, content["collocations"])
    return SentenceSplitter(**{name: frozenset(values) for name, values in content.items()})


def train_splitter(sample: Iterable[str]) -> SentenceSplitter:
    """Train Punkt on paragraphs of the corpus only. 4 MB suffice: 4 MB more change 0.1 % of the boundaries."""
    from nltk.tokenize.punkt import PunktTrainer

    text = "\n\n".join(sample).translate(_PLAIN_QUOTES)
    if not text.strip():
        return SentenceSplitter()
    trainer = PunktTrainer()
    # The penalty would reject "Mr." as soon as some documents write "Mr"; the likelihood ratio already weighs both.
    trainer.IGNORE_ABBREV_PENALTY = True
    trainer.train(text, finalize=True)
    learned = trainer.get_params()
    seen = learned.ortho_context.items()
    return SentenceSplitter(
        abbreviations=frozenset(learned.abbrev_types),
        collocations=frozenset(learned.collocations),
        sentence_starters=frozenset(learned.sent_starters),
        lowercase_types=frozenset(word for word, how in seen if how & _SEEN_LOWERCASE),
        capitalised_inside=frozenset(word for word, how in seen if how & _SEEN_CAPITALISED_INSIDE),
    )


def _words_around(paragraph: str, start: int, candidate: re.Match) -> tuple[str, str]:
    """The word that the candidate ends and the word after it, both without opening quotes and brackets."""
    word_start = max(start, paragraph.rfind(" ", start, candidate.start()) + 1)
    space = paragraph.find(" ", candidate.end())
    after = paragraph[candidate.end() : space if space >= 0 else None]
    return paragraph[word_start : candidate.start() + 1].lstrip(_OPENERS), after.lstrip(_OPENERS)


def _word_type(word: str) -> str:
    return _NUMBER_TYPE if _NUMBER.fullmatch(word) else word.lower()
