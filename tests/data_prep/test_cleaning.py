"""Cleaning: each function on its own."""

import pytest

from data_prep.text.cleaning import fingerprint, normalise, paragraphs, undo_wikitext


@pytest.mark.parametrize(
    "text, expected",
    [
        ("cafe\u0301", "café"),
        ("a\r\nb\rc\x0bd\x0ce\x85f\u2028g", "a\nb\nc\nd\ne\nf\ng"),
        ("zero\u200bwidth\ufeff so\u00adft \x00\x07\x1c\x7f\ufffdend", "zerowidth soft end"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("tab\tstays", "tab\tstays"),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_paragraphs_are_unwrapped_at_blank_lines():
    assert paragraphs("  a\nb  c \n \t\n\n d\u00a0e\n\n") == ["a b c", "d e"]
    assert paragraphs("a\nb  c \n\nd", one_a_line=True) == ["a", "b c", "d"]
    assert paragraphs(" \n\n ") == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("real @-@ time , 4 @.@ 9 lb and 7 @,@ 000", "real-time, 4.9 lb and 7,000"),
        ("the first game 's ( 1944 ) team didn 't", "the first game's (1944) team didn't"),
        ('known as " Nameless " , at 22 : 00 .', 'known as "Nameless", at 22:00.'),
        ("a species of <unk> lobster <unk> .", "a species of lobster."),
        ("<unk> , the treaty ( <unk> ) held", "the treaty held"),
    ],
)
def test_undo_wikitext(text, expected):
    assert undo_wikitext(text) == expected


def test_fingerprints_distinguish_paragraphs():
    assert fingerprint(["a", "b"]) == fingerprint(["a", "b"]) != fingerprint(["a b"])
    assert len(fingerprint([])) == 16
