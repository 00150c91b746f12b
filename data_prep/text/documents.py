"""Readers: files and folders of text -> a stream of documents, in memory that does not grow with a file's size.

`find_files` finds the files, `guess_format` recognises the format of one, and _READERS has a reader for each format:

    text       one document per file; blank lines separate paragraphs; Project Gutenberg's headers and licences are cut
    jsonl      one JSON object per line; the document is the value of a key (`text` by default), named by its `id`
    wikitext   as in wikitext-2 and wikitext-103: a line " = Title = " between blank lines starts a document, and
               section headings are dropped
    sentences  one sentence per line, a blank line between documents, as in google-research/bert; never guessed
    mediawiki  an XML dump of Wikipedia or another wiki; one document per article, named by its title
    html       one document per file, without scripts, styles and navigation

Any file may be compressed (.gz, .bz2, .xz, .zst). What cannot be read as text is skipped and reported to the caller
with reason, file and line.
"""

import codecs
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO, StringIO
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

from data_prep.cli import InputOptions
from data_prep.text.cleaning import undo_wikitext
from data_prep.text.compressed import COMPRESSED, Progress, Unreadable, no_progress, raw_blocks
from data_prep.text.markup import html_charset, html_prose, wiki_pages, wiki_prose

LONGEST_DOCUMENT = 4_000_000  # characters; longer ones are cut at a line end, to bound the memory
_SAMPLE_PIECE = 10_000  # characters
_LONGEST_JSON_LINE = 1 << 26  # bytes; a line is parsed as a whole

_FORMAT_BY_SUFFIX = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_FORMAT_BY_SUFFIX |= {".xml": "mediawiki", ".html": "html", ".htm": "html"}
_DUMP_PAGES = re.compile(r"-p\d+p\d+.*")  # as in enwiki-20260101-pages-articles1.xml-p1p41242.bz2
# As published, " = Title = \n" and " = = Section = = \n"; copies lose the spaces at the ends of lines or gain "\r".
_WIKITEXT_TITLE = re.compile(r"\s*= ([^=\s]|[^=\s][^\n]*[^=\s]) =\s*")
_WIKITEXT_SECTION = re.compile(r"\s*= = .* = =\s*")
_REST = r"[^\r\n]*(?:\r?\n[^\r\n]+)*"  # the rest of a paragraph
_GUTENBERG_START = re.compile(
    rf"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK{_REST}"
    rf"(?:\s*(?:Produced|Transcribed|E-text prepared) {_REST})?",
    re.IGNORECASE | re.MULTILINE,
)
_GUTENBERG_END = re.compile(
    r"^(?:\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK|End of (?:the )?Project Gutenberg)",
    re.IGNORECASE | re.MULTILINE,
)

Skip = Callable[[str, str], None]


class Document(NamedTuple):
    """A document's name, its text, and whether each line of the text is one finished sentence."""

    id: str
    text: str
    is_split: bool = False


class InputFile(NamedTuple):
    """The input of a reader: a file, the key of the text in jsonl, and two callbacks (see `read_documents`)."""

    path: Path
    text_key: str
    skip: Skip
    progress: Progress


def input_config(options: InputOptions) -> tuple[list[Path], dict]:
    """The files that the options name, and what run.json records about them."""
    files = find_files(options.input, lambda message: print(message, file=sys.stderr))
    sizes = {"num_input_files": len(files), "num_input_bytes": input_bytes(files)}
    return files, {"input": options.input, "format": options.format, "text_key": options.text_key, **sizes}


def input_bytes(files: Iterable[Path]) -> int:
    """Total size of the files on disk, which is what `progress` adds up to; a missing file counts as 0."""
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))


def find_files(paths: Iterable[str | Path], report: Callable[[str], object] = lambda message: None) -> list[Path]:
    """The input files: all that are given by name, and from folders the visible ones with a known suffix, sorted.

    Folders are searched recursively, through links. The result includes broken links and folders without access, so
    that reading them reports and counts them. `report` receives a message about files left out because of their
    suffix. Raises ValueError for a path that does not exist and for a folder without text.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            files += _text_files_in(path, report)
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"input {path} does not exist; give text files or folders of them")
    return files


def _text_files_in(folder: Path, report: Callable[[str], object]) -> list[Path]:
    inside, unreadable = _files_inside(folder)
    known = [file for file in inside if _suffix(file) in _FORMAT_BY_SUFFIX]
    endings = f"{' '.join(_FORMAT_BY_SUFFIX)} (or these with {' '.join(COMPRESSED)}); name other files one by one"
    if not known and not unreadable:
        raise ValueError(f"input folder {folder} holds no text: none of its {len(inside)} files ends in {endings}")
    if num_others := len(inside) - len(known):
        report(f"{num_others} of {len(inside)} files in {folder} are left out: they do not end in {endings}")
    return sorted(known + unreadable)


def _files_inside(top: Path) -> tuple[list[Path], list[Path]]:
    """The visible files below a folder, and the folders and links in it that cannot be read.

    No folder is entered twice, so the search ends even if links form a cycle. Links to folders are followed last, so
    that files are listed under their real folder where possible.
    """
    files: list[Path] = []
    unreadable: list[Path] = []
    starts, entered = [str(top)], set()
    for start in starts:  # the loop appends to it
        for folder, subfolders, names in os.walk(start, onerror=lambda error: unreadable.append(Path(error.filename))):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            if (real := os.path.realpath(folder)) in entered:
                subfolders.clear()
                continue
            entered.add(real)
            starts += [path for name in subfolders if os.path.islink(path := os.path.join(folder, name))]
            for path in (Path(folder, name) for name in names if not name.startswith(".")):
                (unreadable if os.path.islink(path) and not os.path.exists(path) else files).append(path)
    return files, unreadable


def read_documents(
    files: Iterable[str | Path],
    format: str = "auto",
    text_key: str = "text",
    skip: Skip | None = None,
    progress: Progress = no_progress,
) -> Iterator[Document]:
    """Yield the documents of `files` in order.

    Args:
        format: one of this module's formats, or "auto", which guesses the format of each file
        text_key: the key of a jsonl object that holds the text
        skip: called with (reason, "file:line") for every document or file that cannot be read; by default this raises
            ValueError
        progress: called with the number of bytes read from disk since its last call
    """
    skip = skip or _refuse
    for path in map(Path, files):
        try:
            read = _READERS[guess_format(path) if format == "auto" else format]
            yield from read(InputFile(path, text_key, skip, progress))
        except Unreadable as error:
            skip(error.reason, f"{path}:{error.line}")


def _refuse(reason: str, place: str) -> None:
    raise ValueError(f"{place}: {reason}; remove it from the input or repair it")


def count_skips(counts: Counter[str], report: Callable[[str], object]) -> Skip:
    """A `skip` for `read_documents` that counts by reason and reports the first ten of each."""

    def skip(reason: str, place: str) -> None:
        counts[reason] += 1
        if counts[reason] <= 10:
            rest = " (further ones are only counted)" if counts[reason] == 10 else ""
            report(f"skipped {place}: {reason}{rest}")

    return skip


def require_text(files: Iterable[Path], format: str, text_key: str) -> None:
    """Raise ValueError, with the first place that cannot be read, unless `files` hold at least one document."""
    problems: list[str] = []
    documents = read_documents(files, format, text_key, lambda reason, place: problems.append(f"{place}: {reason}"))
    if not any(document.text.strip() for document in documents):
        found = f"; {problems[0]}" if problems else ", only empty files"
        raise ValueError(f"the input holds no document{found}; give UTF-8 text, or name the format with --format")


def guess_format(path: Path) -> str:
    """The format of one file by its suffix, or by its first line if the suffix is unknown or only means text."""
    format = _FORMAT_BY_SUFFIX.get(_suffix(path), "text")
    if format != "text":
        return format
    first = next((line for line in _lines(path) if line.strip()), "")
    if _WIKITEXT_TITLE.fullmatch(first):
        return "wikitext"
    if first.startswith(("<mediawiki", "<?xml")):
        return "mediawiki"
    return "html" if first.lower().startswith(("<!doctype html", "<html")) else "text"


def _suffix(path: Path) -> str:
    """The suffix that determines the format: .txt for `a.txt.gz`, and .xml for `b.xml-p1p41242.bz2`."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
    return _DUMP_PAGES.sub("", suffix.lower())


def sample_documents(documents: Iterable[Document], max_bytes: int) -> list[Document]:
    """Pieces of the documents, at most `max_bytes` of UTF-8, spread evenly over a stream of unknown length.

    All pieces are kept until the limit is passed, then every second, every fourth and so on: one pass, no randomness.
    """
    pieces = (
        document._replace(text=document.text[start : start + _SAMPLE_PIECE])
        for document in documents
        for start in range(0, len(document.text), _SAMPLE_PIECE)
    )
    kept: list[Document] = []
    num_bytes, stride = 0, 1
    for index, piece in enumerate(pieces):
        if index % stride:
            continue
        kept.append(piece)
        num_bytes += len(piece.text.encode())
        while num_bytes > max_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            num_bytes = sum(len(piece.text.encode()) for piece in kept)
    return kept


def _blocks(path: Path, progress: Progress, charset: str = "utf-8-sig") -> Iterator[str]:
    """The decoded blocks of a file. Raises Unreadable at the first line that is not text."""
    name = charset.removesuffix("-sig").upper()
    decoder, number, raw = codecs.getincrementaldecoder(charset)(), 1, b""
    try:
        for number, raw in raw_blocks(path, progress):
            if (nul := raw.find(b"\0")) >= 0:
                raise Unreadable("NUL byte, so not a text file", number + raw.count(b"\n", 0, nul))
            yield decoder.decode(raw)
    except UnicodeDecodeError as error:
        raise Unreadable(f"not valid {name}", number + raw.count(b"\n", 0, error.start)) from error
    if decoder.getstate()[0]:
        raise Unreadable(f"not valid {name}: it ends inside a character", number + raw.count(b"\n"))


def _lines(path: Path, progress: Progress = no_progress) -> Iterator[str]:
    """Lines with their newline; only `\\n` ends one."""
    for block in _blocks(path, progress):
        yield from StringIO(block, newline="\n")


def _bounded(id: str, lines: Iterable[str], is_split: bool = False) -> Iterator[Document]:
    """The lines as one document, or as several of at most about LONGEST_DOCUMENT characters: id, id#2, id#3."""
    for number, text in enumerate(_joined(lines), start=1):
        yield Document(id if number == 1 else f"{id}#{number}", text, is_split)


def _joined(lines: Iterable[str]) -> Iterator[str]:
    part, size = [], 0
    for line in lines:
        if part and size + len(line) > LONGEST_DOCUMENT:
            yield "".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    if part:
        yield "".join(part)


def _read_text(file: InputFile) -> Iterator[Document]:
    yield from _bounded(file.path.name, _without_gutenberg_licence(_blocks(file.path, file.progress)))


def _without_gutenberg_licence(blocks: Iterator[str]) -> Iterator[str]:
    """Drop the header and the licence of a Project Gutenberg book; other texts do not change.

    The header lies in the first block and ends with a START line, the rest of the title and a line of credits.
    """
    first = next(blocks, "")
    starts = list(_GUTENBERG_START.finditer(first))
    if not starts:
        yield from chain([first], blocks)
        return
    for block in chain([first[starts[-1].end() :]], blocks):
        if end := _GUTENBERG_END.search(block):
            yield block[: end.start()]
            return
        yield block


def _read_wikitext(file: InputFile) -> Iterator[Document]:
    title, article = file.path.name, []
    before, line = "", ""
    for after in chain(_lines(file.path, file.progress), ["\n"]):
        if not (before.strip() or after.strip()) and (found := _WIKITEXT_TITLE.fullmatch(line)):
            yield from _bounded(title, article)
            title, article = undo_wikitext(found[1]).strip(), []
        elif line.strip() and not _WIKITEXT_SECTION.fullmatch(line):
            article.append(undo_wikitext(line).strip() + "\n\n")
        before, line = line, after
    yield from _bounded(title, article)


def _read_sentences(file: InputFile) -> Iterator[Document]:
    groups = groupby(_lines(file.path, file.progress), lambda line: bool(line.strip()))
    for number, group in enumerate((group for has_text, group in groups if has_text), start=1):
        yield from _bounded(f"{file.path.name}:{number}", group, is_split=True)


def _read_jsonl(file: InputFile) -> Iterator[Document]:
    blocks = raw_blocks(file.path, file.progress, _LONGEST_JSON_LINE)
    for number, raw in chain.from_iterable(enumerate(BytesIO(block), start=first) for first, block in blocks):
        if not raw.strip():
            continue
        place = f"{file.path}:{number}"
        try:
            record = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError):  # neither UTF-8 nor JSON, or nested too deeply for the parser
            file.skip("not valid JSON", place)
            continue
        if not isinstance(record, dict):
            file.skip("not a JSON object", place)
        elif not isinstance(record.get(file.text_key), str):
            file.skip(f"no text under the key {file.text_key!r}", place)
        else:
            # A lone surrogate, such as "\ud800" in JSON, is not a character and cannot be encoded.
            text = record[file.text_key].encode(errors="ignore").decode()
            id = record.get("id")
            lines = text.splitlines(keepends=True) or [""]
            yield from _bounded(f"{file.path.name}:{number}" if id is None else str(id), lines)


def _read_mediawiki(file: InputFile) -> Iterator[Document]:
    blocks = (block for _, block in raw_blocks(file.path, file.progress))
    for page in wiki_pages(blocks, LONGEST_DOCUMENT):
        try:
            yield Document(page.title, wiki_prose(page))
        except Unreadable as error:
            file.skip(error.reason, f"{file.path}:{error.line}")


def _read_html(file: InputFile) -> Iterator[Document]:
    _, start = next(raw_blocks(file.path), (1, b""))
    yield from _bounded(file.path.name, html_prose(_blocks(file.path, file.progress, html_charset(start))))


_READERS: dict[str, Callable[[InputFile], Iterator[Document]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "wikitext": _read_wikitext,
    "sentences": _read_sentences,
    "mediawiki": _read_mediawiki,
    "html": _read_html,
}
