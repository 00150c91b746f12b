"""Markup -> prose: the articles of a MediaWiki dump, their wikitext, and HTML. No file is opened here.

Of an article only running text stays, as in BERT's corpus, which ignores "lists, tables, and headers" (Devlin et al.
2018, section 3.1). Templates are not expanded, but for a few that only dress up the words in them.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from html import unescape
from itertools import chain
from typing import NamedTuple
from xml.parsers import expat

from lxml import etree
from mwparserfromhell import nodes, parse
from mwparserfromhell.parser import ParserError
from mwparserfromhell.wikicode import Wikicode

from data_prep.text.cleaning import paragraphs

LONGEST_HTML = 1 << 25
_FILE_NAMESPACE, _CATEGORY_NAMESPACE = "6", "14"

# What wikitext nests and a reader of prose never sees: templates, tables, footnotes. The last group's contents are raw.
_BRACKET = re.compile(
    r"\{\{|^[ \t:]*\{\||<ref(?:\s[^<>]*)?(?<!/)>|\}\}|^[ \t]*\|\}(?!\})|</ref\s*>|<!--"
    r"|<(nowiki|pre|math|chem|ce|gallery|source|syntaxhighlight|timeline|score|graph)(?:\s[^<>]*)?(?<!/)>",
    re.IGNORECASE | re.MULTILINE,
)
_CLOSING = {"{{": "}}", "{|": "|}", "<r": "</"}
_SHOWN_TEMPLATES = (
    (re.compile(r"\{\{\s*(?:lang\s*\|[^{}|]*|lang-[\w-]+|nowrap|nobr)\s*\|([^{}|=]*)\}\}", re.IGNORECASE), r"\1"),
    (re.compile(r"\{\{\s*(?:convert|cvt)\|([\d.,]+)\|(?!(?:to|by|and|or|x)\|)([^\W\d][^{}|]*)[^{}]*\}\}"), r"\1 \2"),
)
# Language conversion, as in the Chinese Wikipedia (mediawiki.org/wiki/Writing_systems/Syntax), and what it nests with.
_CONVERSION = re.compile(
    r"-\{(?!\{)|\{\{|\}\}|\}-|<!--|<(nowiki|pre|math|chem|ce|source|syntaxhighlight)(?:\s[^<>]*)?(?<!/)>", re.IGNORECASE
)
_MAX_CONVERSIONS = 10  # inside one another, as MediaWiki has it
_FLAGS = re.compile(r"[\w\s;+-]*")
_VARIANT = r"(?:ban|crh|gan|iu|kk|ku|mni|shi?|sr|tg|tly|uz|wuu|zh)(?:-[a-z]+)*"
_NEXT_RULE = re.compile(rf";(?=(?:[^;:=]*=>)?\s*{_VARIANT}\s*:)", re.IGNORECASE)
_RULE = re.compile(rf"(?:[^;:=]*=>)?\s*({_VARIANT})\s*:(.*?);?\s*", re.IGNORECASE | re.DOTALL)
_PREFERRED_VARIANTS = ("zh-hans", "zh-cn", "zh-sg", "zh-my", "zh")
# Quotes that mean bold and italics, __TOC__ and its like, and links to other languages, one a line.
_SILENT = re.compile(r"'{5}|'{2,3}|__[A-Z]+__|^\[\[[a-z]{2,3}(?:-[a-z]+)*:[^\[\]|\n]*\]\][ \t]*$", re.MULTILINE)
_HEADING = re.compile("^(?==)", re.MULTILINE)
# The parser's time grows with the square of what nobody closed: it gets lines of 10,000 characters together at most.
_PIECE = re.compile(r".{1,10000}(?:\n|\Z)|.{10000}", re.DOTALL)
# The most frequent markup by far: without it the parser has a fifth to two fifths less to do.
_PLAIN_LINK = re.compile(r"\[\[(?:[^:\[\]{}|<>\n]+\|)?([^:\[\]{}|<>\n]+)\]\]")
_LIST_ITEM = "\0"  # XML has no such character
_DROPPED_LINE = re.compile(rf"^[ \t]*[{_LIST_ITEM}|{{}}].*", re.MULTILINE)
_HOLLOW_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\((?: ?[;,:–])* ?\)", ""),
        (r"(?<=\()[ ;,]+|[;,]? (?=\))", ""),
        (r" (?=[,.](?: |$))|(?<= ) |^[ ,;:.)]+| $", ""),
    )
)

_PARTING = re.compile(
    "address|article|aside|blockquote|body|caption|center|dd|details|div|dl|dt|fieldset|figcaption|figure|footer|form"
    "|h[1-6]|header|hr|li|main|ol|option|p|poem|pre|section|summary|table|td|th|title|tr|ul"
)
_DROPPED_IN_WIKITEXT = re.compile(
    "categorytree|ce|chem|dl|gallery|graph|imagemap|includeonly|inputbox|li|math|ol|ref|references|score|section|source"
    "|syntaxhighlight|table|templatedata|templatestyles|timeline|ul"
)
_DROPPED_IN_HTML = re.compile("canvas|head|iframe|math|nav|noscript|object|script|select|style|svg|template")
_SPACE = re.compile(r"\s+")
_CHARSET = re.compile(rb"<meta\s[^>]*charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_PROBE = b"<Az09> \\u0041.xn--bcher-kva"  # Python has codecs that are no charset; they change this


class BadMarkup(ValueError):
    """Markup that cannot be read, or not further: a short reason and the line, counted from 1."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(f"{reason} in line {line}")
        self.reason, self.line = reason, line


class Page(NamedTuple):
    """An article's title, its wikitext, the line it begins in, and the namespaces whose links are not shown."""

    title: str
    wikitext: str
    line: int
    hidden: set[str]


def wiki_pages(blocks: Iterable[bytes], longest: int) -> Iterator[Page]:
    """The articles of a MediaWiki dump; redirects, other namespaces and what is no wikitext are passed over.

    A text over `longest` characters is cut at line ends, into pages T, T#2, T#3. Raises BadMarkup, after the pages
    before that place, where the XML is damaged, where it is no dump, and at a document type: no dump has one, and its
    entities could grow without bound.
    """
    dump = _Dump(longest)
    try:
        for block in chain(blocks, [b""]):
            dump.parser.Parse(block, not block)
            yield from dump.take()
    except expat.ExpatError as error:
        yield from dump.take()
        raise BadMarkup("damaged XML", error.lineno) from error


class _Dump:
    """The state between two calls of the XML parser: the page it is in, and the pages complete since `take`."""

    def __init__(self, longest: int) -> None:
        self.parser = expat.ParserCreate("UTF-8")
        self.parser.buffer_text, self.parser.buffer_size = True, 1 << 16
        self.parser.StartDoctypeDeclHandler = self.refuse_doctype
        self.parser.StartElementHandler = self.start_root
        self.parser.EndElementHandler = self.end
        self.longest = longest
        self.pages: list[Page] = []
        self.hidden = {"file", "image", "category"}
        self.namespace, self.is_redirect = "", False
        self.fields = {"ns": "", "model": ""}
        self.text: list[str] = []
        self.num_characters = self.num_parts = self.line = 0

    def take(self) -> list[Page]:
        taken, self.pages = self.pages, []
        return taken

    def refuse_doctype(self, *declaration: object) -> None:
        raise BadMarkup("XML with a document type, so no MediaWiki dump", self.parser.CurrentLineNumber)

    def start_root(self, tag: str, attributes: dict[str, str]) -> None:
        if tag != "mediawiki":
            raise BadMarkup("XML, but no MediaWiki dump", self.parser.CurrentLineNumber)
        self.parser.StartElementHandler = self.start

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "page":
            self.fields, self.is_redirect = {"ns": "0", "model": "wikitext"}, False
            self.line = self.parser.CurrentLineNumber
        elif tag == "redirect":
            self.is_redirect = True
        elif tag == "namespace":
            self.namespace = attributes.get("key", "")
        if tag in ("namespace", "title", "ns", "model") or (tag == "text" and self.is_article()):
            self.text, self.num_characters, self.num_parts = [], 0, 0
            self.parser.CharacterDataHandler = self.collect

    def is_article(self) -> bool:
        return (self.fields["ns"], self.fields["model"], self.is_redirect) == ("0", "wikitext", False)

    def collect(self, text: str) -> None:
        self.text.append(text)
        self.num_characters += len(text)
        if self.num_characters > self.longest:
            whole = "".join(self.text)
            end = whole.rfind("\n", 0, self.longest) + 1 or self.longest
            self.add_page(whole[:end])
            self.text, self.num_characters = [whole[end:]], len(whole) - end

    def end(self, tag: str) -> None:
        if self.parser.CharacterDataHandler:
            self.parser.CharacterDataHandler = None
            self.fields[tag] = "".join(self.text)
            if tag == "namespace" and self.namespace in (_FILE_NAMESPACE, _CATEGORY_NAMESPACE):
                self.hidden.add(self.fields[tag].casefold())
        elif tag == "page" and "text" in self.fields:  # of several revisions, the last
            self.add_page(self.fields["text"])

    def add_page(self, wikitext: str) -> None:
        self.num_parts += 1
        title = one_variant(self.fields.get("title", "")) + (f"#{self.num_parts}" if self.num_parts > 1 else "")
        self.pages.append(Page(title, wikitext, self.line, self.hidden))


def wiki_prose(page: Page) -> str:
    """The paragraphs of an article's running text, parted by blank lines.

    Raises BadMarkup where the parser gives up, which is rare.
    """
    wikitext = one_variant(page.wikitext)
    for template, shown in _SHOWN_TEMPLATES:
        wikitext = template.sub(shown, wikitext)
    shown: list[str] = []
    try:
        for section in _HEADING.split(_without_nested(wikitext)):
            for piece in _PIECE.findall(_SILENT.sub("", _without_nested(section))):
                plain = piece if "<nowiki" in piece else _PLAIN_LINK.sub(r"\1", piece)
                _show(parse(plain, skip_style_tags=True), page.hidden, shown)
    except ParserError as error:
        raise BadMarkup("wikitext that cannot be parsed", page.line) from error
    blocks = paragraphs(_DROPPED_LINE.sub("\n", "".join(shown)))
    for hollow, replacement in _HOLLOW_RULES:
        blocks = [hollow.sub(replacement, block) for block in blocks]
    return "\n\n".join(block for block in blocks if any(map(str.isalnum, block)))


def one_variant(wikitext: str) -> str:
    """The text with what one reader sees of each -{...}-: simplified Chinese if that is offered, else the first one.

    One pass; what is not closed stays as it is.
    """
    if "-{" not in wikitext:
        return wikitext
    kept: list[str] = []
    opened: list[tuple[str, int]] = []  # "-{" or "{{", and where it is in `kept`
    depth, start, at, unclosed = 0, 0, 0, set()
    while found := _CONVERSION.search(wikitext, at):
        mark, at = found[0], found.end()
        if mark[0] == "<":
            end = f"</{found[1]}" if found[1] else "-->"
            if end not in unclosed and (after := wikitext.find(end, at)) >= 0:
                at = after
            else:
                unclosed.add(end)  # so that no end is searched for again and again
            continue
        kept.append(wikitext[start : found.start()])
        start = at
        if mark == "{{" or (mark == "-{" and depth < _MAX_CONVERSIONS):
            opened.append((mark, len(kept)))
            depth += mark == "-{"
        elif mark == "}}" and opened and opened[-1][0] == "{{":
            opened.pop()
        elif mark == "}-" and depth:
            while opened[-1][0] == "{{":
                opened.pop()
            depth, place = depth - 1, opened.pop()[1]
            kept[place:] = [_shown_variant("".join(kept[place + 1 :]))]
            continue
        kept.append(mark)
    return "".join(kept) + wikitext[start:]


def _shown_variant(content: str) -> str:
    """What is shown of -{content}-: "text", "flags|text", and for text "zh-hans:one;zh-hant:other" or "a=>zh-cn:b"."""
    head, bar, text = content.partition("|")
    flags = set()
    if bar and _FLAGS.fullmatch(head):  # else the bar belongs to a link
        flags, content = {flag.strip() for flag in head.split(";")} - {""}, text
    if "R" in flags:  # raw
        return content
    if flags & {"H", "-", "N"} or flags == {"T"}:  # a hidden rule, one taken back, a variant's name, the page's title
        return ""
    rules = [rule for part in _NEXT_RULE.split(content) if (rule := _RULE.fullmatch(part))]
    texts = {rule[1].lower(): rule[2].strip() for rule in reversed(rules)}
    return next((texts[variant] for variant in (*_PREFERRED_VARIANTS, *reversed(texts)) if variant in texts), content)


def _without_nested(wikitext: str) -> str:
    """The text without templates, tables and footnotes, in one pass: the parser would need several times as long.

    Where brackets do not match, all is left to the parser, which knows what MediaWiki makes of that. So a page is
    taken whole, then section by section: one stray bracket spoils one section.
    """
    kept, awaited, start, at = [], [], 0, 0
    while found := _BRACKET.search(wikitext, at):
        bracket, at = found[0].strip(" \t:").lower()[:2], found.end()
        if bracket in _CLOSING:
            if not awaited:
                kept.append(wikitext[start : found.start()])
            awaited.append(_CLOSING[bracket])
        elif bracket in _CLOSING.values():
            if not awaited or awaited.pop() != bracket:
                return wikitext
            if not awaited:
                start = at
        elif (at := wikitext.find(f"</{found[1]}" if found[1] else "-->", at)) < 0:
            return wikitext
    return wikitext if awaited else "".join(kept) + wikitext[start:]


def _show(code: Wikicode, hidden: set[str], shown: list[str]) -> None:
    """Append what a reader of prose sees of `code`; a list's items stay as lines that begin with _LIST_ITEM."""
    for node in code.nodes:
        if isinstance(node, nodes.Text | nodes.HTMLEntity):
            shown.append(unescape(str(node)))
        elif isinstance(node, nodes.Wikilink):
            if _is_hidden(node, hidden):
                continue
            if node.text is None:
                shown.append(unescape(str(node.title)).strip().removeprefix(":"))
            else:
                _show(node.text, hidden, shown)
        elif isinstance(node, nodes.ExternalLink):
            if node.title is not None or not node.brackets:
                _show(node.title if node.brackets else node.url, hidden, shown)
        elif isinstance(node, nodes.Heading):
            shown.append("\n\n")
        elif isinstance(node, nodes.Tag):
            _show_tag(node, hidden, shown)


def _is_hidden(link: nodes.Wikilink, hidden: set[str]) -> bool:
    """Whether a link is a category or shows a file; only that has a second bar, in any language."""
    namespace, colon, _ = str(link.title).partition(":")
    return bool(colon and namespace.strip().casefold() in hidden) or "|" in str(link.text or "")


def _show_tag(tag: nodes.Tag, hidden: set[str], shown: list[str]) -> None:
    name = str(tag.tag).strip().lower()
    if tag.wiki_markup and name in ("li", "dt", "dd"):
        shown.append(_LIST_ITEM)
    elif name == "br":
        shown.append(" ")
    elif not _DROPPED_IN_WIKITEXT.fullmatch(name):
        around = "\n\n" if _PARTING.fullmatch(name) else ""
        shown.append(around)
        if tag.contents is not None:
            _show(tag.contents, hidden, shown)
        shown.append(around)


def html_charset(start: bytes) -> str:
    """The codec of an HTML file from its first bytes: the declared one, with browsers' reading of Latin-1, or UTF-8."""
    declared = _CHARSET.search(start[:4096])
    charset = declared[1].decode().lower() if declared else "utf-8"
    try:
        is_text = _PROBE.decode(charset) == _PROBE.decode()
    except (LookupError, UnicodeError):
        is_text = False  # unknown, or not what these bytes, which could be read so far, are written in
    if not is_text or start.startswith(BOM_UTF8) or charset in ("utf8", "utf-8"):
        return "utf-8-sig"
    return "cp1252" if charset in ("latin-1", "latin1", "iso-8859-1", "iso8859-1", "ascii", "us-ascii") else charset


def html_prose(blocks: Iterable[str]) -> Iterator[str]:
    """The running text of an HTML page, streamed; blank lines part what its block elements part.

    Raises BadMarkup at LONGEST_HTML characters: all that was read stays in the parser's memory.
    """
    target, line, num_characters = _HtmlText(), 1, 0
    parser = etree.HTMLParser(target=target)
    for block in chain(blocks, [""]):
        parser.feed(block)
        yield target.take()
        line += block.count("\n")
        num_characters += len(block)
        if num_characters > LONGEST_HTML:
            raise BadMarkup(f"HTML of more than {LONGEST_HTML:,} characters", line)
    parser.close()
    yield target.take()


class _HtmlText:
    """What lxml's parser calls: the text since `take`, and how many of the elements around are dropped ones."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.num_dropped = 0

    def take(self) -> str:
        taken, self.text = "".join(self.text), []
        return taken

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.num_dropped += bool(_DROPPED_IN_HTML.fullmatch(tag))
        self.part(tag)

    def end(self, tag: str) -> None:
        self.part(tag)
        self.num_dropped -= bool(_DROPPED_IN_HTML.fullmatch(tag))

    def part(self, tag: str) -> None:
        if _PARTING.fullmatch(tag):
            self.text.append("\n\n")
        elif tag == "br":
            self.text.append(" ")

    def data(self, text: str) -> None:
        if not self.num_dropped:
            self.text.append(_SPACE.sub(" ", text))

    def close(self) -> None:
        pass
