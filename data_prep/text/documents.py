"""Readers: files and folders of text -> a stream of documents, in memory that does not grow with the file.

Formats (`--format`, or `auto`, which goes by file name and first lines):

    text       a file is a document; blank lines part its paragraphs; Gutenberg headers and licences are stripped
    jsonl      a line is a JSON object with the document in a key (`text` by default; its `id`, if there, is kept)
    wikitext   a line " = Title = " between blank lines starts a document, as in wikitext-2 and wikitext-103; section
               headings are dropped
    sentences  one sentence a line, a blank line between documents, as google-research/bert reads; never guessed
    mediawiki  an XML dump of Wikipedia or another wiki; an article is a document, named by its title
    html       a file is a document; scripts, styles and navigation are dropped

Any file may be compressed (.gz, .bz2, .xz, .zst). Folders are read recursively, through links, in the order of their
sorted paths. What cannot be read as text is skipped and reported to the caller with file and line; nothing is dropped
in silence.
"""

import argparse
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

from data_prep.text.cleaning import undo_wikitext
from data_prep.text.compressed import OPENERS, NotText, Progress, no_progress, raw_blocks
from data_prep.text.markup import BadMarkup, html_charset, html_prose, wiki_pages, wiki_prose

FORMATS = ("auto", "text", "jsonl", "wikitext", "sentences", "mediawiki", "html")
LONGEST_DOCUMENT = 4_000_000  # characters; longer ones are cut at a line end, so that memory stays constant
_SAMPLE_PIECE = 10_000  # characters
_LONGEST_JSON_LINE = 1 << 26  # bytes; it has to be held whole

_FORMAT_BY_SUFFIX = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_FORMAT_BY_SUFFIX |= {".xml": "mediawiki", ".html": "html", ".htm": "html"}
_DUMP_PAGES = re.compile(r"-p\d+p\d+.*")  # as in enwiki-20260101-pages-articles1.xml-p1p41242.bz2
# As published, " = Title = \n" and " = = Section = = \n"; copies lose the spaces at the ends of lines or gain "\r".
_WIKITEXT_TITLE = re.compile(r"\s*= ([^=\s]|[^=\s][^\n]*[^=\s]) =\s*")
_WIKITEXT_SECTION = re.compile(r"\s*= = .* = =\s*")
_PARAGRAPH_REST = r"[^\r\n]*(?:\r?\n[^\r\n]+)*"
_GUTENBERG_START = re.compile(
    r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK"
    + _PARAGRAPH_REST
    + r"(?:\s*(?:Produced|Transcribed|E-text prepared) "
    + _PARAGRAPH_REST
    + ")?",
    re.IGNORECASE | re.MULTILINE,
)
_GUTENBERG_END = re.compile(
    r"^(?:\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK|End of (?:the )?Project Gutenberg)",
    re.IGNORECASE | re.MULTILINE,
)

Skip = Callable[[str, str], None]


class Document(NamedTuple):
    """A document's name, its text, and whether that holds one finished sentence a line."""

    id: str
    text: str
    is_split: bool = False


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what to read; `input_config` turns them into files."""
    parser.add_argument(
        "--input", required=True, nargs="+", action="extend", metavar="PATH", help="text files, and folders of them"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="text: a file is a document; jsonl: a line is; wikitext: ' = Title = ' starts one; sentences: one "
        "sentence a line, a blank line between documents; mediawiki: an XML dump; html: a file is a document; auto "
        "(default): by file name and first line, never sentences",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="the key of a jsonl object that holds the text (default: text)",
    )


def input_config(args: argparse.Namespace) -> tuple[list[Path], dict]:
    """The files that the options name, and the part of the output's configuration that tells other input apart."""
    files = find_files(args.input, lambda message: print(message, file=sys.stderr))
    sizes = {"num_input_files": len(files), "num_input_bytes": input_bytes(files)}
    return files, {"input": args.input, "format": args.format, "text_key": args.text_key, **sizes}


def input_bytes(files: Iterable[Path]) -> int:
    """Size of the files on disk, the total of what `progress` is told; 0 for a file that only reading will report."""
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))


def find_files(paths: Iterable[str | Path], tell: Callable[[str], object] = lambda message: None) -> list[Path]:
    """The input files: those given by name, and in folders, sorted, those not hidden and with a known suffix.

    Folders that may not be entered and broken links are among them, so that reading reports and counts them. `tell` is
    called with the number of files that are left out for their suffix. Raises ValueError for a path that does not exist
    and for a folder without text.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside, unreadable = _files_inside(path)
            known = [f for f in inside if _suffix(f) in _FORMAT_BY_SUFFIX]
            endings = f"{' '.join(_FORMAT_BY_SUFFIX)} (or these with {' '.join(OPENERS)}); name other files one by one"
            if not known and not unreadable:
                raise ValueError(
                    f"input folder {path} holds no text: none of its {len(inside)} files ends in {endings}"
                )
            if num_others := len(inside) - len(known):
                tell(f"{num_others} of {len(inside)} files in {path} are left out: they do not end in {endings}")
            files += sorted(known + unreadable)
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"input {path} does not exist; give text files or folders of them")
    return files


def _files_inside(top: Path) -> tuple[list[Path], list[Path]]:
    """The visible files below a folder, and the folders and links in it that cannot be read.

    Links to folders are followed after all that is no link, and no folder is entered twice: a link to a folder above
    leads nowhere, and the files that a folder has itself keep their names.
    """
    files: list[Path] = []
    unreadable: list[Path] = []
    starts, entered = [str(top)], set()
    for start in starts:  # grows
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

    `skip(reason, place)` is called for every document or file that cannot be read; without it, that raises ValueError
    with `file:line`. `progress(num_bytes)` is called with the bytes read from disk since its last call.
    """
    readers = {"text": _read_text, "wikitext": _read_wikitext, "sentences": _read_sentences, "html": _read_html}
    for path in map(Path, files):
        try:
            chosen = guess_format(path) if format == "auto" else format
            if chosen == "jsonl":
                yield from _read_jsonl(path, progress, text_key, skip or _stop)
            elif chosen == "mediawiki":
                yield from _read_mediawiki(path, progress, skip or _stop)
            else:
                yield from readers[chosen](path, progress)
        except NotText as error:
            (skip or _stop)(error.reason, error.place)


def count_skips(counts: Counter[str], tell: Callable[[str], object]) -> Skip:
    """A `skip` for `read_documents` that counts by reason and tells the first ten of each."""

    def skip(reason: str, place: str) -> None:
        counts[reason] += 1
        if counts[reason] <= 10:
            tell(
                f"skipped {place}: {reason}" + (" (and so on; only counted from here)" if counts[reason] == 10 else "")
            )

    return skip


def require_text(files: Iterable[Path], format: str, text_key: str) -> None:
    """Raise ValueError, naming the first place that cannot be read, unless `files` hold at least one document."""
    problems: list[str] = []
    documents = read_documents(files, format, text_key, lambda reason, place: problems.append(f"{place}: {reason}"))
    if not any(document.text.strip() for document in documents):
        found = f"; {problems[0]}" if problems else ", only empty files"
        raise ValueError(f"the input holds no document{found}; give UTF-8 text, or name the format with --format")


def guess_format(path: Path) -> str:
    """The format of one file by its suffix, and by its first lines where that leaves a choice."""
    format = _FORMAT_BY_SUFFIX.get(_suffix(path), "text")
    if format == "text":
        first = next((line for line in _lines(path, no_progress) if line.strip()), "")
        if _WIKITEXT_TITLE.fullmatch(first):
            return "wikitext"
        if first.startswith(("<mediawiki", "<?xml")):
            return "mediawiki"
        return "html" if first.lower().startswith(("<!doctype html", "<html")) else "text"
    return format


def sample_documents(documents: Iterable[Document], max_bytes: int) -> list[Document]:
    """Pieces of the documents, at most `max_bytes` of UTF-8, spread evenly over a stream of unknown length.

    Every piece is kept until the bound is passed, then every second, every fourth and so on: one pass, no randomness.
    """
    kept: list[Document] = []
    num_bytes, stride = 0, 1
    for index, piece in enumerate(_pieces(documents)):
        if index % stride:
            continue
        kept.append(piece)
        num_bytes += len(piece.text.encode())
        while num_bytes > max_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            num_bytes = sum(len(piece.text.encode()) for piece in kept)
    return kept


def _pieces(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        for start in range(0, len(document.text), _SAMPLE_PIECE):
            yield document._replace(text=document.text[start : start + _SAMPLE_PIECE])


def _stop(reason: str, place: str) -> None:
    raise ValueError(f"{place}: {reason}; remove it from the input or repair it")


def _suffix(path: Path) -> str:
    """The suffix that tells the format: that of `a.txt.gz` is .txt, that of `b.xml-p1p41242.bz2` is .xml."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in OPENERS else path.suffix
    return _DUMP_PAGES.sub("", suffix.lower())


def _blocks(path: Path, progress: Progress, charset: str = "utf-8-sig") -> Iterator[str]:
    """The blocks of a file as text; NotText names the first line that is none."""
    name = charset.removesuffix("-sig").upper()
    decoder, number, raw = codecs.getincrementaldecoder(charset)(), 1, b""
    try:
        for number, raw in raw_blocks(path, progress):
            if (nul := raw.find(b"\0")) >= 0:
                line = number + raw.count(b"\n", 0, nul)
                raise NotText("NUL byte, so not a text file", f"{path}:{line}")
            yield decoder.decode(raw)
        if decoder.getstate()[0]:
            line = number + raw.count(b"\n")
            raise NotText(f"not valid {name}: it ends inside a character", f"{path}:{line}")
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        raise NotText(f"not valid {name}", f"{path}:{line}") from error


def _lines(path: Path, progress: Progress) -> Iterator[str]:
    """Lines with their newline; only `\\n` ends one."""
    for block in _blocks(path, progress):
        yield from StringIO(block, newline="\n")


def _bounded(id: str, lines: Iterable[str], is_split: bool = False) -> Iterator[Document]:
    """A document from its lines, or several of at most about LONGEST_DOCUMENT characters, called id, id#2, id#3."""
    part, size, num_parts = [], 0, 0
    for line in lines:
        if part and size + len(line) > LONGEST_DOCUMENT:
            num_parts += 1
            yield Document(id if num_parts == 1 else f"{id}#{num_parts}", "".join(part), is_split)
            part, size = [], 0
        part.append(line)
        size += len(line)
    if part:
        yield Document(id if not num_parts else f"{id}#{num_parts + 1}", "".join(part), is_split)


def _read_text(path: Path, progress: Progress) -> Iterator[Document]:
    yield from _bounded(path.name, _without_gutenberg_licence(_blocks(path, progress)))


def _without_gutenberg_licence(blocks: Iterator[str]) -> Iterator[str]:
    """Drop the header and the licence of a Project Gutenberg book; other texts pass unchanged.

    The header, which fits the first block, ends with a START line, its title's further lines and a line of credits.
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


def _read_wikitext(path: Path, progress: Progress) -> Iterator[Document]:
    title, article = path.name, []
    before, line = "", ""
    for after in chain(_lines(path, progress), ["\n"]):
        if not (before.strip() or after.strip()) and (found := _WIKITEXT_TITLE.fullmatch(line)):
            yield from _bounded(title, article)
            title, article = undo_wikitext(found[1]).strip(), []
        elif line.strip() and not _WIKITEXT_SECTION.fullmatch(line):
            article.append(undo_wikitext(line).strip() + "\n\n")
        before, line = line, after
    yield from _bounded(title, article)


def _read_mediawiki(path: Path, progress: Progress, skip: Skip) -> Iterator[Document]:
    blocks = (block for _, block in raw_blocks(path, progress))
    try:
        for page in wiki_pages(blocks, LONGEST_DOCUMENT):
            try:
                yield Document(page.title, wiki_prose(page))
            except BadMarkup as error:
                skip(error.reason, f"{path}:{error.line}")
    except BadMarkup as error:
        raise NotText(error.reason, f"{path}:{error.line}") from error


def _read_html(path: Path, progress: Progress) -> Iterator[Document]:
    _, start = next(raw_blocks(path, no_progress), (1, b""))
    try:
        yield from _bounded(path.name, html_prose(_blocks(path, progress, html_charset(start))))
    except BadMarkup as error:
        raise NotText(error.reason, f"{path}:{error.line}") from error


def _read_sentences(path: Path, progress: Progress) -> Iterator[Document]:
    count = 0
    for is_blank, group in groupby(_lines(path, progress), lambda line: not line.strip()):
        if not is_blank:
            count += 1
            yield from _bounded(f"{path.name}:{count}", group, is_split=True)


def _json_lines(path: Path, progress: Progress) -> Iterator[tuple[int, bytes]]:
    for number, block in raw_blocks(path, progress, _LONGEST_JSON_LINE):
        yield from enumerate(BytesIO(block), start=number)


def _read_jsonl(path: Path, progress: Progress, text_key: str, skip: Skip) -> Iterator[Document]:
    for number, raw in _json_lines(path, progress):
        place = f"{path}:{number}"
        try:
            record = json.loads(raw.decode("utf-8-sig")) if raw.strip() else None
        except (ValueError, RecursionError):  # no UTF-8, no JSON, or nested too deep for the parser
            skip("not valid JSON", place)
            continue
        if not isinstance(record, dict):
            if raw.strip():
                skip("not a JSON object", place)
        elif not isinstance(record.get(text_key), str):
            skip(f"no text under the key {text_key!r}", place)
        else:
            # A lone surrogate, as "\ud800" in JSON, is no character and could not be written.
            text = record[text_key].encode(errors="ignore").decode()
            lines = text.splitlines(keepends=True) or [""]
            id = record.get("id")
            yield from _bounded(f"{path.name}:{number}" if id is None else str(id), lines)
