"""Markup -> prose: the articles of a MediaWiki dump, their wikitext, and HTML. No file is opened here.

Only the running text of an article is kept, as in BERT's corpus, which ignores "lists, tables, and headers" (Devlin et
al. 2018, section 3.1). Templates are dropped, except for a few that only format the words in them.
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

from data_prep.text.cleaning import apply_rules, compile_rules, paragraphs
from data_prep.text.compressed import Unreadable

LONGEST_HTML = 1 << 25  # characters, all of which the parser keeps in memory
_FILE_NAMESPACE, _CATEGORY_NAMESPACE = "6", "14"

# Nested wikitext that is not prose: templates, tables, footnotes. Text between tags of the last group is raw.
_BRACKET = re.compile(
    r"\{\{|^[ \t:]*\{\||<ref(?:\s[^<>]*)?(?<!/)>|\}\}|^[ \t]*\|\}(?!\})|</ref\s*>|<!--"
    r"|<(nowiki|pre|math|chem|ce|gallery|source|syntaxhighlight|timeline|score|graph)(?:\s[^<>]*)?(?<!/)>",
    re.IGNORECASE | re.MULTILINE,
)
_CLOSING = {"{{": "}}", "{|": "|}", "<r": "</"}
_SHOWN_TEMPLATES = compile_rules(
    (r"(?i)\{\{\s*(?:lang\s*\|[^{}|]*|lang-[\w-]+|nowrap|nobr)\s*\|([^{}|=]*)\}\}", r"\1"),
    (r"\{\{\s*(?:convert|cvt)\|([\d.,]+)\|(?!(?:to|by|and|or|x)\|)([^\W\d][^{}|]*)[^{}]*\}\}", r"\1 \2"),
)
# Language conversion, as in the Chinese Wikipedia (mediawiki.org/wiki/Writing_systems/Syntax), and what nests with it.
_CONVERSION = re.compile(
    r"-\{(?!\{)|\{\{|\}\}|\}-|<!--|<(nowiki|pre|math|chem|ce|source|syntaxhighlight)(?:\s[^<>]*)?(?<!/)>", re.IGNORECASE
)
_MAX_CONVERSIONS = 10  # nested in one another, as in MediaWiki
_FLAGS = re.compile(r"[\w\s;+-]*")
_VARIANT = r"(?:ban|crh|gan|iu|kk|ku|mni|shi?|sr|tg|tly|uz|wuu|zh)(?:-[a-z]+)*"
_NEXT_RULE = re.compile(rf";(?=(?:[^;:=]*=>)?\s*{_VARIANT}\s*:)", re.IGNORECASE)
_RULE = re.compile(rf"(?:[^;:=]*=>)?\s*({_VARIANT})\s*:(.*?);?\s*", re.IGNORECASE | re.DOTALL)
_PREFERRED_VARIANTS = ("zh-hans", "zh-cn", "zh-sg", "zh-my", "zh")
# Quotes that mean bold and italics, switches such as __TOC__, and links to other languages, one per line.
_SILENT = re.compile(r"'{5}|'{2,3}|__[A-Z]+__|^\[\[[a-z]{2,3}(?:-[a-z]+)*:[^\[\]|\n]*\]\][ \t]*$", re.MULTILINE)
_HEADING = re.compile("^(?==)", re.MULTILINE)
# The parser's time is quadratic in the length of unclosed markup, so it gets at most 10,000 characters at a time.
_PIECE = re.compile(r".{1,10000}(?:\n|\Z)|.{10000}", re.DOTALL)
# The most frequent markup by far: replacing it first saves a fifth to two fifths of the parser's time.
_PLAIN_LINK = re.compile(r"\[\[(?:[^:\[\]{}|<>\n]+\|)?([^:\[\]{}|<>\n]+)\]\]")
_LIST_ITEM = "\0"  # XML has no such character
_DROPPED_LINE = re.compile(rf"^[ \t]*[{_LIST_ITEM}|{{}}].*", re.MULTILINE)
_HOLLOW_RULES = compile_rules(
    (r"\((?: ?[;,:–])* ?\)", ""),
    (r"(?<=\()[ ;,]+|[;,]? (?=\))", ""),
    (r" (?=[,.](?: |$))|(?<= ) |^[ ,;:.)]+| $", ""),
)

_SEPARATING = re.compile(
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
_PROBE = b"<Az09> \\u0041.xn--bcher-kva"  # Python's codecs that are not character sets change this or fail


class Page(NamedTuple):
    """An article: its title, its wikitext, its first line's number, and the namespaces whose links are not shown."""

    title: str
    wikitext: str
    line: int
    hidden: set[str]


def wiki_pages(blocks: Iterable[bytes], longest: int) -> Iterator[Page]:
    """The articles of a MediaWiki dump, without redirects, pages of other namespaces and pages that are not wikitext.

    A text of more than `longest` characters is cut at line ends into pages T, T#2, T#3. Raises Unreadable if the XML is
    damaged, is not a dump, or declares a document type (no dump has one, and its entities could grow without bound);
    the pages before that place are yielded first.
    """
    dump = _Dump(longest)
    try:
        for block in chain(blocks, [b""]):
            dump.parser.Parse(block, not block)
            yield from dump.take()
    except expat.ExpatError as error:
        yield from dump.take()
        raise Unreadable("damaged XML", error.lineno) from error


class _Dump:
    """The handlers of the XML parser and their state: the current page, and the pages completed since `take`."""

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
        raise Unreadable("XML with a document type, so not a MediaWiki dump", self.parser.CurrentLineNumber)

    def start_root(self, tag: str, attributes: dict[str, str]) -> None:
        if tag != "mediawiki":
            raise Unreadable("XML, but not a MediaWiki dump", self.parser.CurrentLineNumber)
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
        elif tag == "page" and "text" in self.fields:  # of several revisions, the last one
            self.add_page(self.fields["text"])

    def add_page(self, wikitext: str) -> None:
        self.num_parts += 1
        title = one_variant(self.fields.get("title", "")) + (f"#{self.num_parts}" if self.num_parts > 1 else "")
        self.pages.append(Page(title, wikitext, self.line, self.hidden))


def wiki_prose(page: Page) -> str:
    """The paragraphs of an article, separated by blank lines. Raises Unreadable if the parser fails, which is rare."""
    wikitext = apply_rules(one_variant(page.wikitext), _SHOWN_TEMPLATES)
    shown: list[str] = []
    try:
        for section in _HEADING.split(_without_nested(wikitext)):
            for piece in _PIECE.findall(_SILENT.sub("", _without_nested(section))):
                plain = piece if "<nowiki" in piece else _PLAIN_LINK.sub(r"\1", piece)
                _show(parse(plain, skip_style_tags=True), page.hidden, shown)
    except ParserError as error:
        raise Unreadable("wikitext that cannot be parsed", page.line) from error
    lines = _DROPPED_LINE.sub("\n", "".join(shown))
    blocks = (apply_rules(block, _HOLLOW_RULES) for block in paragraphs(lines))
    return "\n\n".join(block for block in blocks if any(map(str.isalnum, block)))


def one_variant(wikitext: str) -> str:
    """The text with one variant of each closed -{...}-: simplified Chinese if it has that, else the first one."""
    if "-{" not in wikitext:
        return wikitext
    kept: list[str] = []
    opened: list[tuple[str, int]] = []  # "-{" or "{{", and its index in `kept`
    depth, start, at, unclosed = 0, 0, 0, set()
    while found := _CONVERSION.search(wikitext, at):
        mark, at = found[0], found.end()
        if mark[0] == "<":
            end = f"</{found[1]}" if found[1] else "-->"
            if end not in unclosed and (after := wikitext.find(end, at)) >= 0:
                at = after
            else:
                unclosed.add(end)  # so that the rest is not searched for it again
            continue
        kept.append(wikitext[start : found.start()])
        start = at
        if mark == "{{" or (mark == "-{" and depth < _MAX_CONVERSIONS):
            opened.append((mark, len(kept)))
            depth = depth + 1 if mark == "-{" else depth
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
    """What -{content}- shows. Content: [flags|]text, where text may be "zh-hans:one;zh-hant:other" or "a=>zh-cn:b"."""
    head, bar, text = content.partition("|")
    flags = set()
    if bar and _FLAGS.fullmatch(head):  # else the bar belongs to a link
        flags, content = {flag.strip() for flag in head.split(";")} - {""}, text
    if "R" in flags:  # raw
        return content
    if flags & {"H", "-", "N"} or flags == {"T"}:  # a hidden rule, a withdrawn rule, a variant's name, the page title
        return ""
    rules = [rule for part in _NEXT_RULE.split(content) if (rule := _RULE.fullmatch(part))]
    texts = {rule[1].lower(): rule[2].strip() for rule in reversed(rules)}
    return next((texts[variant] for variant in (*_PREFERRED_VARIANTS, *reversed(texts)) if variant in texts), content)


def _without_nested(wikitext: str) -> str:
    """The text without templates, tables and footnotes; the parser would take several times as long.

    If brackets do not match, the text is returned unchanged, since only the parser knows how MediaWiki reads it. The
    caller tries the whole page and then each section, so that one stray bracket affects only one section.
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
    """Append the prose in `code` to `shown`. List items become lines that begin with _LIST_ITEM, dropped later."""
    for node in code.nodes:
        match node:
            case nodes.Text() | nodes.HTMLEntity():
                shown.append(unescape(str(node)))
            case nodes.Wikilink() if node.text is None and not _is_hidden(node, hidden):
                shown.append(unescape(str(node.title)).strip().removeprefix(":"))
            case nodes.Wikilink() if not _is_hidden(node, hidden):
                _show(node.text, hidden, shown)
            case nodes.ExternalLink() if node.title is not None or not node.brackets:
                _show(node.title if node.brackets else node.url, hidden, shown)
            case nodes.Heading():
                shown.append("\n\n")
            case nodes.Tag():
                _show_tag(node, hidden, shown)


def _is_hidden(link: nodes.Wikilink, hidden: set[str]) -> bool:
    """Whether a link is a category or shows a file; in any language, only a link to a file has a second bar."""
    namespace, colon, _ = str(link.title).partition(":")
    return bool(colon and namespace.strip().casefold() in hidden) or "|" in str(link.text or "")


def _show_tag(tag: nodes.Tag, hidden: set[str], shown: list[str]) -> None:
    name = str(tag.tag).strip().lower()
    if tag.wiki_markup and name in ("li", "dt", "dd"):
        shown.append(_LIST_ITEM)
    elif name == "br":
        shown.append(" ")
    elif not _DROPPED_IN_WIKITEXT.fullmatch(name):
        around = "\n\n" if _SEPARATING.fullmatch(name) else ""
        shown.append(around)
        if tag.contents is not None:
            _show(tag.contents, hidden, shown)
        shown.append(around)


def html_charset(start: bytes) -> str:
    """The codec of an HTML file by its first bytes: the declared one (cp1252 for Latin-1, as in browsers) or UTF-8."""
    declared = _CHARSET.search(start[:4096])
    charset = declared[1].decode().lower() if declared else "utf-8"
    try:
        is_text = _PROBE.decode(charset) == _PROBE.decode()
    except (LookupError, UnicodeError):
        is_text = False
    if not is_text or start.startswith(BOM_UTF8) or charset in ("utf8", "utf-8"):
        return "utf-8-sig"
    return "cp1252" if charset in ("latin-1", "latin1", "iso-8859-1", "iso8859-1", "ascii", "us-ascii") else charset


def html_prose(blocks: Iterable[str]) -> Iterator[str]:
    """Stream the text of an HTML page, with blank lines between blocks. Raises Unreadable beyond LONGEST_HTML."""
    target, line, num_characters = _HtmlText(), 1, 0
    parser = etree.HTMLParser(target=target)
    for block in chain(blocks, [""]):
        parser.feed(block)
        yield target.take()
        line += block.count("\n")
        num_characters += len(block)
        if num_characters > LONGEST_HTML:
            raise Unreadable(f"HTML of more than {LONGEST_HTML:,} characters", line)
    parser.close()
    yield target.take()


class _HtmlText:
    """The target of lxml's parser: the text since `take`, and the number of open elements that are dropped."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.num_dropped = 0

    def take(self) -> str:
        taken, self.text = "".join(self.text), []
        return taken

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if _DROPPED_IN_HTML.fullmatch(tag):
            self.num_dropped += 1
        self.separate(tag)

    def end(self, tag: str) -> None:
        self.separate(tag)
        if _DROPPED_IN_HTML.fullmatch(tag):
            self.num_dropped -= 1

    def separate(self, tag: str) -> None:
        if _SEPARATING.fullmatch(tag):
            self.text.append("\n\n")
        elif tag == "br":
            self.text.append(" ")

    def data(self, text: str) -> None:
        if not self.num_dropped:
            self.text.append(_SPACE.sub(" ", text))

    def close(self) -> None:
        pass
