"""Readers: every format, every compression, and input that is not text."""

import bz2
import gzip
import json
import lzma
import zlib
from collections import Counter
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import zstandard

from data_prep.cli import InputOptions
from data_prep.text import documents
from data_prep.text.documents import (
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


def test_suffixes_in_any_case_and_a_note_about_files_left_out(tmp_path):
    for name in ("A.TXT", "b.md", "c.JSONL.GZ", "d.Html", "photo.jpg", "wiki.train.tokens"):
        write(tmp_path / name, b"x")
    notes = []
    assert [path.name for path in find_files([tmp_path], notes.append)] == ["A.TXT", "b.md", "c.JSONL.GZ", "d.Html"]
    assert len(notes) == 1 and notes[0].startswith(f"2 of 6 files in {tmp_path} are left out: they do not end in .txt")


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    top, outside = tmp_path / "top", tmp_path / "outside"
    for path in (top / "a" / "1.txt", top / ".store" / "2.txt", outside / "deep" / "3.txt", outside / ".git" / "4.txt"):
        write(path, path.stem)
    links = {"a/up": top, "a/self": top / "a", "again": top / "a", "b": outside, "c": outside, "seen": top / ".store"}
    links |= {"a/deep": outside / "deep", "file.txt": outside / "deep" / "3.txt"}
    for name, target in links.items():
        (top / name).symlink_to(target)
    (outside / "back").symlink_to(top)
    names = [path.relative_to(top).as_posix() for path in find_files([top])]
    assert names == ["a/1.txt", "b/deep/3.txt", "file.txt", "seen/2.txt"]
    (tmp_path / "link").symlink_to(top)
    assert len(find_files([tmp_path / "link"])) == 4


def test_unreadable_files_and_folders_are_reported_and_counted(tmp_path, bound_by_modes):
    folder = tmp_path / "in"
    for name in ("good.txt", "shut/1.txt", "shut.txt", "listed/2.txt", "z/also.txt"):
        write(folder / name, name)
    for name, target in (("lost", "nowhere"), ("gone.txt", "nowhere.txt"), ("loop", "loop")):
        (folder / name).symlink_to(target)
    for name, mode in (("shut", 0), ("shut.txt", 0), ("listed", 0o444)):
        (folder / name).chmod(mode)
    with bound_by_modes():
        files = find_files([folder])
        size = input_bytes(files)
        found, problems = read_with_problems(files)
        alone = read_with_problems(find_files([folder / "shut"]))
    for name in ("shut", "listed"):
        (folder / name).chmod(0o755)
    assert [document.text for document in found] == ["good.txt", "z/also.txt"]
    assert {place.removeprefix(f"{folder}/"): reason.removeprefix("unreadable: ") for reason, place in problems} == {
        "gone.txt:1": "No such file or directory",
        "listed/2.txt:1": "Permission denied",
        "loop:1": "Too many levels of symbolic links",
        "lost:1": "No such file or directory",
        "shut:1": "Permission denied",
        "shut.txt:1": "Permission denied",
    }
    assert size >= len("good.txt" + "z/also.txt")
    assert alone == ([], [("unreadable: Permission denied", f"{folder / 'shut'}:1")])


def test_the_formats_of_the_option_are_those_that_have_readers():
    (field,) = (field for field in fields(InputOptions) if field.name == "format")
    assert field.metadata["choices"] == ("auto", *documents._READERS)


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


@pytest.mark.parametrize(
    "copied",
    [
        lambda line: line + "\r",
        lambda line: line.rstrip(),
        lambda line: line.strip(),
        lambda line: line.strip() + "\r",
        lambda line: line.lstrip(),
        lambda line: f"{line}\t ",
    ],
)
def test_wikitext_whose_lines_were_changed_by_copying(tmp_path, copied):
    published = " \n = First = \n \n Real @-@ time <unk> works . \n \n = = Part = = \n \n = 5 = 5 stays . \n"
    published += " \n = = = Deep = = = \n \n == Raw == \n \n = Second article = \n \n Another one . \n"
    path = write(tmp_path / "wiki.txt", "\n".join(map(copied, published.split("\n"))))
    assert guess_format(path) == "wikitext"
    assert list(read_documents([path])) == [
        Document("First", "Real-time works.\n\n= 5 = 5 stays.\n\n== Raw ==\n\n"),
        Document("Second article", "Another one.\n\n"),
    ]


def test_sentences_format_is_chosen_by_name_only(tmp_path):
    path = write(tmp_path / "google.txt", "One.\nTwo.\n\n \nThree.\n")
    assert guess_format(path) == "text"
    assert list(read_documents([path], "sentences")) == [
        Document("google.txt:1", "One.\nTwo.\n", is_split=True),
        Document("google.txt:2", "Three.\n", is_split=True),
    ]


def test_jsonl_skips_lines_without_a_document_and_says_where(tmp_path):
    lines = [json.dumps({"id": 7, "text": "A\n\nB"}), "", "[1]", "{", '{"text": 3}', '{"id": null, "text": "C"}']
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


@pytest.mark.parametrize("value", ["null", "3", "NaN", "true", '["a", "b"]', '{"a": "b"}', None])
def test_other_json_values_never_become_text(tmp_path, value):
    """They become neither "null" nor "['a', 'b']"; a missing key counts as one of them."""
    bad = f'{{"text": {value}}}' if value else '{"body": "null"}'
    path = write(tmp_path / "x.jsonl", f'{{"text": "A"}}\n{bad}\n{{"text": "B"}}\r\n')
    found, problems = read_with_problems([path])
    assert [document.text for document in found] == ["A", "B"]
    assert problems == [("no text under the key 'text'", f"{path}:2")]
    with pytest.raises(ValueError, match=r"x\.jsonl:2: no text under the key 'text'"):
        list(read_documents([path]))


UNPACK = {
    ".gz": lambda cut: zlib.decompressobj(31).decompress(cut),
    ".bz2": lambda cut: bz2.BZ2Decompressor().decompress(cut),
    ".xz": lambda cut: lzma.LZMADecompressor().decompress(cut),
    ".zst": lambda cut: zstandard.ZstdDecompressor().decompressobj().decompress(cut),
}


PACK = {".gz": gzip.compress, ".bz2": partial(bz2.compress, compresslevel=1)}
PACK |= {".xz": partial(lzma.compress, preset=1), ".zst": zstandard.compress}


@pytest.mark.parametrize("suffix", PACK)
def test_of_a_cut_file_the_whole_lines_before_the_cut_are_read(tmp_path, suffix):
    words = np.random.default_rng(0).integers(0, 10**9, (3_000, 12))
    whole = "".join(json.dumps({"text": " ".join(map(str, row))}) + "\n" for row in words.tolist()).encode()
    content = PACK[suffix](whole)
    path = write(tmp_path / f"cut.jsonl{suffix}", content[: len(content) * 9 // 10])
    num_whole = UNPACK[suffix](path.read_bytes()).count(b"\n")
    assert num_whole > 1_000
    found, problems = read_with_problems([path])
    assert len(found) == num_whole and found[-1].text == " ".join(map(str, words[num_whole - 1].tolist()))
    assert problems == [("file is damaged", f"{path}:{num_whole + 1}")]


def test_lines_of_any_length_stay_whole(tmp_path):
    lines = [json.dumps({"text": "x" * size}) for size in (10, 200_000, 131_060, 131_072, 3, 1_000_000, 5)]
    for name, end in (("a.jsonl", ""), ("b.jsonl", "\n")):
        path = write(tmp_path / name, "\n".join(lines) + end)
        assert [document.text for document in read_documents([path])] == [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize(
    "content, reason, line",
    [
        (b"a\n" * 100_000 + b"\xff\n", "not valid UTF-8", 100_001),
        (b"a\nb\xe5\x8a", "not valid UTF-8: it ends inside a character", 2),
        ("a\n".encode("utf-16"), "NUL byte, so not a text file", 1),
        (b"\x7fELF\0\0", "NUL byte, so not a text file", 1),
    ],
)
def test_a_file_that_is_not_text_is_skipped_with_its_place(tmp_path, content, reason, line):
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


def test_skips_are_counted_and_the_first_reported():
    counts, reported = Counter(), []
    skip = count_skips(counts, reported.append)
    for line in range(30):
        skip("not valid JSON", f"a:{line}")
    assert counts == {"not valid JSON": 30}
    assert len(reported) == 10 and reported[0] == "skipped a:0: not valid JSON"


def test_lines_that_break_parsers_and_encoders(tmp_path):
    """A lone surrogate is dropped, a pair is kept, and a line that is nested too deeply is skipped with its place."""
    path = tmp_path / "bad.jsonl"
    lines = [r'{"text": "a \ud800b"}', "[" * 100_000, r'{"text": "\ud83d\ude00 c"}']
    path.write_text("\n".join(lines), encoding="utf-8")
    skipped = []
    documents = list(read_documents([path], skip=lambda *what: skipped.append(what)))
    assert [document.text for document in documents] == ["a b", "\U0001f600 c"]
    assert skipped == [("not valid JSON", f"{path}:2")]
