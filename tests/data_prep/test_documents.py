"""Readers: every format, every compression, and input that is no text."""

import bz2
import gzip
import json
import lzma
from collections import Counter

import pytest

from data_prep import documents
from data_prep.documents import (
    Document,
    count_skips,
    find_files,
    guess_format,
    input_bytes,
    read_documents,
    require_text,
    sample_documents,
)

BOOK = """\ufeffThe Project Gutenberg EBook of Walden\r
\r
*** START OF THIS PROJECT GUTENBERG EBOOK WALDEN, AND\r
ON THE DUTY OF CIVIL DISOBEDIENCE ***\r
\r
Produced by Judith Boss\r
and others\r
\r
I went to the woods.\r
\r
The end of the book.\r
\r
End of Project Gutenberg's Walden\r
*** END OF THIS PROJECT GUTENBERG EBOOK WALDEN ***\r
The licence, at length.\r
"""
WIKITEXT = (
    " \n = Gold dollar = \n \n It was a coin @-@ dollar . \n = 5 = 5 is no title\n \n"
    " = = Design = = \n \n Small .\n \n = X = \n \n Y ."
)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_with_problems(files, **options):
    problems = []
    found = list(read_documents(files, skip=lambda reason, place: problems.append((reason, place)), **options))
    return found, problems


@pytest.mark.parametrize("suffix, module", [("", None), (".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_a_text_file_is_a_document_compressed_or_not(tmp_path, suffix, module):
    text = "Zürich\n\n力加勝\n" * 50_000  # several blocks
    content = module.compress(text.encode()) if module else text
    path = write(tmp_path / f"a.txt{suffix}", content)
    assert list(read_documents([path])) == [Document(path.name, text)]


def test_folders_are_read_in_sorted_order_without_hidden_and_foreign_files(tmp_path):
    for name in ("b.txt", "a/z.txt.gz", ".git/x.txt", ".hidden.txt", "photo.jpg", "a/b.jsonl"):
        write(tmp_path / name, b"x")
    assert [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])] == [
        "a/b.jsonl",
        "a/z.txt.gz",
        "b.txt",
    ]
    assert find_files([tmp_path / "photo.jpg"]) == [tmp_path / "photo.jpg"]


def test_missing_and_empty_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent does not exist"):
        find_files([tmp_path / "absent"])
    write(tmp_path / "photo.jpg", b"x")
    with pytest.raises(ValueError, match="holds no text: none of its 1 files"):
        find_files([tmp_path])
    with pytest.raises(ValueError, match="only empty files"):
        require_text([write(tmp_path / "a.txt", "")], "auto", "text")
    with pytest.raises(ValueError, match=r"b\.txt:3: NUL byte"):
        require_text([write(tmp_path / "b.txt", b"a\nb\nc\0d\n")], "auto", "text")


def test_gutenberg_header_credits_and_licence_are_stripped(tmp_path):
    (book,) = read_documents([write(tmp_path / "walden.txt", BOOK)])
    assert " ".join(book.text.split()) == "I went to the woods. The end of the book."


def test_wikitext_articles(tmp_path):
    path = write(tmp_path / "wiki.txt", WIKITEXT)
    assert guess_format(path) == "wikitext"
    first, second = read_documents([path])
    assert first == Document("Gold dollar", "It was a coin-dollar.\n\n= 5 = 5 is no title\n\nSmall.\n\n")
    assert second == Document("X", "Y.\n\n")


def test_sentences_format_is_chosen_by_name_only(tmp_path):
    path = write(tmp_path / "google.txt", "One.\nTwo.\n\n \nThree.\n")
    assert guess_format(path) == "text"
    assert list(read_documents([path], "sentences")) == [
        Document("google.txt:1", "One.\nTwo.\n", is_split=True),
        Document("google.txt:2", "Three.\n", is_split=True),
    ]


def test_jsonl_skips_lines_that_are_no_document_and_says_where(tmp_path):
    lines = [json.dumps({"id": 7, "text": "A\n\nB"}), "", "[1]", "{", '{"text": 3}', '{"text": "C"}']
    path = write(tmp_path / "x.jsonl", "\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    found, problems = read_with_problems([path])
    assert found == [Document("7", "A\n\nB"), Document("x.jsonl:6", "C")]
    assert problems == [
        ("not a JSON object", f"{path}:3"),
        ("not valid JSON", f"{path}:4"),
        ("no text under the key 'text'", f"{path}:5"),
        ("not valid JSON", f"{path}:7"),
    ]
    assert [d.text for d in read_documents([write(tmp_path / "y.jsonl", '{"body": "D"}')], text_key="body")] == ["D"]


@pytest.mark.parametrize(
    "content, reason, line",
    [
        (b"a\n" * 100_000 + b"\xff\n", "not valid UTF-8", 100_001),
        (b"a\nb\xe5\x8a", "not valid UTF-8: it ends inside a character", 2),
        ("a\n".encode("utf-16"), "NUL byte, so not a text file", 1),
        (b"\x7fELF\0\0", "NUL byte, so not a text file", 1),
    ],
)
def test_what_is_no_text_is_skipped_with_its_place(tmp_path, content, reason, line):
    bad, good = write(tmp_path / "bad.txt", content), write(tmp_path / "good.txt", "fine")
    found, problems = read_with_problems([bad, good])
    assert [document.text for document in found] == ["fine"]
    assert problems == [(reason, f"{bad}:{line}")]
    with pytest.raises(ValueError, match=rf"bad\.txt:{line}"):
        list(read_documents([bad, good]))


def test_damaged_archives_and_vanished_files_are_skipped(tmp_path):
    content = bz2.compress(b"text " * 100_000)
    cut = write(tmp_path / "cut.txt.bz2", content[: len(content) // 2])
    not_gz = write(tmp_path / "not.txt.gz", b"plain")
    found, problems = read_with_problems([cut, not_gz, tmp_path / "vanished.txt"])
    assert found == []
    assert [reason for reason, _ in problems] == ["file is damaged"] * 2 + ["unreadable: No such file or directory"]


def test_long_documents_are_cut_at_a_line_end(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 300_000)
    text = "word " * 7 + "\n"
    path = write(tmp_path / "long.txt", text * 20_000)
    parts = list(read_documents([path]))
    assert [part.id for part in parts] == ["long.txt", "long.txt#2", "long.txt#3"]
    assert "".join(part.text for part in parts) == text * 20_000
    assert all(len(part.text) <= 300_000 and part.text.endswith("\n") for part in parts)


def test_progress_adds_up_to_the_size_on_disk(tmp_path):
    files = [
        write(tmp_path / "a.txt", "x\n" * 300_000),
        write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "y"}')),
    ]
    steps = []
    list(read_documents(files, progress=steps.append))
    assert sum(steps) == input_bytes(files)


def test_the_sample_is_even_bounded_and_the_same_every_time():
    stream = [Document(str(i), f"{i:05d}" * 20) for i in range(1_000)]
    sample = sample_documents(iter(stream), 10_000)
    assert sample == sample_documents(iter(stream), 10_000)
    assert 5_000 <= sum(len(document.text) for document in sample) <= 10_000
    indices = [int(document.id) for document in sample]
    assert len({b - a for a, b in zip(indices, indices[1:], strict=False)}) == 1 and indices[-1] > 980
    assert sample_documents(stream, 10**9) == stream
    assert sum(len(piece.text) for piece in sample_documents([Document("book", "x" * 25_000)], 10**6)) == 25_000


def test_skips_are_counted_and_the_first_told():
    counts, told = Counter(), []
    skip = count_skips(counts, told.append)
    for line in range(30):
        skip("not valid JSON", f"a:{line}")
    assert counts == {"not valid JSON": 30}
    assert len(told) == 10 and told[0] == "skipped a:0: not valid JSON"


def test_lines_that_break_parsers_and_encoders(tmp_path):
    """A lone surrogate is dropped, a pair stays, a line nested too deep is skipped with its place."""
    path = tmp_path / "bad.jsonl"
    lines = [r'{"text": "a \ud800b"}', "[" * 100_000, r'{"text": "\ud83d\ude00 c"}']
    path.write_text("\n".join(lines), encoding="utf-8")
    skipped = []
    documents = list(read_documents([path], skip=lambda *what: skipped.append(what)))
    assert [document.text for document in documents] == ["a b", "\U0001f600 c"]
    assert skipped == [("not valid JSON", f"{path}:2")]
