"""MediaWiki dumps and HTML: what becomes prose, what is dropped, and input that is damaged or hostile."""

import bz2
import gzip
import lzma
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
import zstandard

from data_prep.corpus import open_corpus
from data_prep.text import documents, markup
from data_prep.text.documents import Document, find_files, guess_format, input_bytes, read_documents, sample_documents
from data_prep.text.markup import Page, html_charset, one_variant, wiki_prose
from data_prep.text.vocab_files import SPECIAL_TOKENS

ROOT = Path(__file__).parents[2]
HEADER = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo>
    <sitename>Probe</sitename>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""
COAST = """{{Infobox coast
| name = {{lang|de|Küste}}
| map = {{map|{{{size|}}}|x={{y}}}}
}}
<!-- nobody == sees == {{this -->'''Coasts''' ({{IPA|x}}; {{audio|y}}) lie
[[sea|by the sea]]<ref name="a">Book, {{cite|p. 3}}.</ref>
and are up to {{convert|5|km|mi}} wide<ref name="b" />, says [[:Category:Seas]], ''{{lang|fr|la côte}}''.

[[File:Coast.jpg|thumb|upright|A [[cliff|white cliff]] seen from [[Dover]]]]
[[Datei:Küste.jpg|mini|Klippe]]
== Plants &amp; animals ==
Grass &amp; sand&nbsp;– R&D &lt;b&gt; at 3&nbsp;[[metre]]s.<br />They
<b>grow</b> <small>[http://example.org/x slowly]</small> [http://example.org/y].
{| class="wikitable"
|-
! Plant !! Height {{n|
|}}
| a
{|
| nested
|}
|}
Of <nowiki>[[them]] {{all}}</nowiki>, <math>\\frac{{a}}{b_{2}}</math> is one.
Kinds are:
* sand
** fine {{sand}}
# rock
; term : meaning
After the list, H<sub>2</sub>O.
<gallery>
File:a.jpg|A [[shore]]
</gallery>
<blockquote>The sea is wide.</blockquote>
__NOTOC__
[[Category:Coasts]]
[[Kategorie:Küsten|Küste]]
[[fr:Côte]]"""
COAST_PROSE = [
    "Coasts lie by the sea and are up to 5 km wide, says Category:Seas, la côte.",
    "Grass & sand – R&D <b> at 3 metres. They grow slowly.",
    "Of [[them]] {{all}}, is one. Kinds are:",
    "After the list, H2O.",
    "The sea is wide.",
]


def page(title, text, namespace=0, more="", model="wikitext"):
    return (
        f"  <page>\n    <title>{escape(title)}</title>\n    <ns>{namespace}</ns>\n    <id>7</id>\n{more}"
        f"    <revision>\n      <id>8</id>\n      <comment>see {{{{x}}}}</comment>\n      <model>{model}</model>\n"
        f'      <text bytes="9" xml:space="preserve">{escape(text)}</text>\n    </revision>\n  </page>\n'
    )


PAGES = (
    page("Coast", COAST)
    + page("Shore", "#REDIRECT [[Coast]]", more='    <redirect title="Coast" />\n')
    + page("Talk:Coast", "I think so.", namespace=1)
    + page("Data", '{"a": 1}', model="json")
    + page("Q & A", "A question.\n\n\nAn answer.")
)
DUMP = HEADER + PAGES + "</mediawiki>\n"


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_with_problems(path, format="auto"):
    problems = []
    found = list(read_documents([path], format, skip=lambda reason, place: problems.append((reason, place))))
    return found, problems


def prose(wikitext):
    return wiki_prose(Page("T", wikitext, 1, {"file", "image", "category"}))


def multi_stream(text):
    return bz2.compress(text[:700]) + bz2.compress(text[700:1900]) + bz2.compress(text[1900:])


@pytest.mark.parametrize(
    "name, compress",
    [
        ("dump.xml", bytes),
        ("dump.XML.gz", gzip.compress),
        ("xxwiki-20260101-pages-articles-multistream1.xml-p1p41242.bz2", multi_stream),
        ("dump.xml.xz", lzma.compress),
        ("dump.xml.zst", zstandard.compress),
        ("dump", bytes),
    ],
)
def test_a_dump_becomes_articles_in_prose(tmp_path, name, compress):
    path = write(tmp_path / name, compress(DUMP.encode()))
    assert guess_format(path) == "mediawiki"
    if name != "dump":
        assert find_files([tmp_path]) == [path]
    coast, questions = read_documents([path])
    assert coast.id == "Coast" and coast.text.split("\n\n") == COAST_PROSE
    assert questions == Document("Q & A", "A question.\n\nAn answer.")


@pytest.mark.parametrize(
    "wikitext, expected",
    [
        ("a {{b|{{c}} d}} e", "a e"),
        ("Stray }} here.\n{{open|\n|a\n\n== H ==\nThe {{x}}rest is [[clean]].", "Stray }} here.\n\nThe rest is clean."),
        ("{{a\n| b = c\n\n== H ==\n[[Good]] text.", "Good text."),
        ("[[a|b]]s, [[c]]s, [[d#e|]] and [[:fr:f|g]], [[category|h]], [[:File:i.png]]", "bs, cs, and g, h, File:i.png"),
        ("[[Image:a.png]] [[ file : b.png |left]] x", "x"),
        ("[[Bild:a.png|thumb|A [[b|c]] d]] x", "x"),
        ("1 &lt; 2 &amp;lt; &#x4e00; &apos; &unknown; &#xD800;", "1 < 2 &lt; 一 ' &unknown; \ufffd"),
        ("l'''homme'' and '''''both''''' and ''''Tis", "lhomme and both and 'Tis"),
        ("A<ref>b</ref> c<ref name=d/> e<REF group='f'>g</REF>.", "A c e."),
        ("A<ref>b {{c}}\n\n{|\n|d\n|}</ref>.\n\nE <references><ref>f</ref></references>", "A.\n\nE"),
        ("<div>\nA\n</div><p>B</p><poem>C</poem>", "A\n\nB\n\nC"),
        ("{{-}}\n{|\n|}\n* only\n# a list\n[[Category:X]]", ""),
        ("<!-- a -->\nb <!-- c {{ -->d", "b d"),
        ("", ""),
    ],
)
def test_wikitext_to_prose(wikitext, expected):
    assert prose(wikitext) == expected


@pytest.mark.parametrize(
    "wikitext, expected",
    [
        (
            "'''-{zh-hans:计算机;zh-hant:電腦}-'''是机器。-{H|zh-cn:甲;zh-tw:乙}-它很快。-{台}-灣很大。",
            "计算机是机器。它很快。台灣很大。",
        ),
        ("甲-{A|zh-cn:乙; zh-tw:丙;}-丁", "甲乙丁"),
        ("甲-{T|zh-hans:乙;zh-hant:丙}-丁-{T; |乙}-", "甲丁"),
        ("甲-{R|zh:乙}-丁-{H;R|丙}-", "甲zh:乙丁丙"),
        ("甲-{D|zh-cn:乙;zh-tw:丙}-丁", "甲乙丁"),
        ("甲-{N|zh-hk}-丁-{-|zh-cn:乙;zh-tw:丙}-戊", "甲丁戊"),
        ("甲-{S|zh-tw:乙;zh-hk:丙}-丁-{A;H|zh-cn:乙}-", "甲乙丁"),
        ("甲-{zh-hans;zh-hant|乙}-丁-{ zh ; zh-tw |丙}-", "甲乙丁丙"),
        ("-{zh-tw:甲;zh-sg:乙;zh-hk:丙}--{zh-hk:丁; zh-mo:戊}--{|zh-cn:己;zh-tw:庚}-", "乙丁己"),
        ("-{zh-hans:-{甲}-乙;zh-hant:丙}-丁-{zh-cn:-{zh-hans:戊;zh-hant:-{己}-}-;zh-tw:庚}-", "甲乙丁戊"),
        ("-{H|甲=>zh-cn:乙;丙=>zh-tw:丁;}-戊-{甲=>zh-cn:乙;}-", "戊乙"),
        ("-{zh-hans:\n甲;\nzh-hant:乙\n}-丙-{zh-hans:;zh-hant:乙}-", "甲丙"),
        ("[[-{zh-hans:甲;zh-hant:乙}-|丙]][[丁|-{zh-hans:戊;zh-hant:己}-]]-{[[庚|辛]]}-", "丙戊辛"),
        ("-{zh-hans:[[甲|乙]];zh-hant:[[丙]]}-{{lang|en|-{Apple}-}}-{zh-cn:a&lt;b;zh-tw:c}-", "乙Applea<b"),
        ("甲-{乙{{x}}-丙}-丁-{zh-cn:戊{{y|z}};zh-tw:己}-{{z|-{庚}-}}", "甲乙-丙丁戊"),
        ("== -{zh-hans:甲;zh-hant:乙}- ==\n-{sr-ec:Ћ;sr-el:Ć}-", "Ћ"),
        ("-{zh-cn:http://a.b/c;zh-tw:d}- -{12:30; 13:00}-", "http://a.b/c 12:30; 13:00"),
        ("a-{{x}}b {{-}}c <nowiki>-{d}-</nowiki> <!-- -{ -->e <math>x^{-{1}-y}</math>", "a-b c -{d}- e"),
        ("open -{甲 <nowiki> -{乙}-", "open -{甲 <nowiki> 乙"),
        ("{{open -{甲}- }} 乙}- 丙", "乙}- 丙"),
    ],
)
def test_of_language_variants_one_is_read(wikitext, expected):
    assert prose(wikitext) == expected


def test_language_variants_in_a_dump(tmp_path):
    dump = HEADER + page("-{zh-hans:计;zh-hant:計}-", "-{H|zh-cn:甲;zh-tw:乙}--{台}-灣。") + "</mediawiki>"
    assert list(read_documents([write(tmp_path / "a.xml", dump)])) == [Document("计", "台灣。")]


@pytest.mark.parametrize(
    "read, openings",
    [
        (prose, ("[[", "{{", "<div>", "<!--", "(", "[http://a ", "  ")),
        (one_variant, ("-{", "-{zh:", "-{<nowiki>", "-{{{{", "-{zh:;a=>", "-{H|;;", "-{}-")),
    ],
)
def test_unclosed_markup_takes_no_more_than_linear_time(read, openings):
    for opening in openings:
        seconds = []
        for num_characters in (15_000, 60_000):
            started = time.process_time()
            read(opening * (num_characters // len(opening)) + "}-end")
            seconds.append(time.process_time() - started)
        assert seconds[1] < 8 * seconds[0] + 0.5, opening  # four times as long; were it quadratic, sixteen


def test_of_several_revisions_the_last_is_read(tmp_path):
    revision = "<revision><text>{}</text></revision>"
    text = (
        f"{HEADER}<page><title>T</title><ns>0</ns>{revision.format('old')}{revision.format('new')}</page></mediawiki>"
    )
    assert list(read_documents([write(tmp_path / "a.xml", text)])) == [Document("T", "new")]


def test_a_long_page_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 100_000)
    line = "A line of [[prose]] in an article.\n\n"
    dump = HEADER + page("Long", line * 10_000) + page("B", "b") + "</mediawiki>"
    *parts, last = read_documents([write(tmp_path / "a.xml", dump)])
    assert [part.id for part in parts] == ["Long", "Long#2", "Long#3", "Long#4"] and last == Document("B", "b")
    assert sum(part.text.count("A line of prose in an article.") for part in parts) == 10_000


def test_a_sample_never_cuts_markup(tmp_path):
    dump = HEADER + page("A", "A word {{and|a [[template]]}} [[of|with]] a link.\n\n" * 3_000) + "</mediawiki>"
    sample = sample_documents(read_documents([write(tmp_path / "a.xml", dump)]), 10**6)
    assert len(sample) > 3 and not any(set("[]{}|") & set(piece.text) for piece in sample)


@pytest.mark.parametrize("size", [0.3, 0.6, 0.9, 0.999])
def test_pages_before_a_damaged_place_are_read(tmp_path, size):
    dump = (HEADER + "".join(page(f"T{i}", f"Text {i}.") for i in range(2_000)) + "</mediawiki>\n").encode()
    line = dump[: int(len(dump) * size)].count(b"\n") + 1
    found, problems = read_with_problems(write(tmp_path / "a.xml", dump[: int(len(dump) * size)]))
    assert 2_000 * size - 20 < len(found) <= 2_000 and found[-1].text == f"Text {len(found) - 1}."
    assert problems == [("damaged XML", f"{tmp_path / 'a.xml'}:{line}")]
    packed = bz2.compress(dump[: len(dump) // 2]) + bz2.compress(dump[len(dump) // 2 :])
    found, problems = read_with_problems(write(tmp_path / "a.xml.bz2", packed[: int(len(packed) * size)]))
    assert [reason for reason, _ in problems] == ["file is damaged"]
    assert len(found) > 500 or size < 0.5
    garbled = dump.replace(b"Text 1500.", b"Text <1500.")
    found, problems = read_with_problems(write(tmp_path / "b.xml", garbled))
    assert len(found) == 1_500 and [reason for reason, _ in problems] == ["damaged XML"]


@pytest.mark.parametrize(
    "content, reason",
    [
        ("<rss><channel/></rss>", "XML, but not a MediaWiki dump"),
        ("\0\1\2", "damaged XML"),
        ("", "damaged XML"),
        (
            '<?xml version="1.0"?>\n<!DOCTYPE mediawiki [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;">]>\n'
            + DUMP.replace("A question", "&b;" * 1_000),
            "XML with a document type, so not a MediaWiki dump",
        ),
        ('<!DOCTYPE mediawiki SYSTEM "file:///etc/passwd"><mediawiki/>', "XML with a document type"),
    ],
)
def test_other_xml_and_entity_bombs_are_refused(tmp_path, content, reason):
    found, problems = read_with_problems(write(tmp_path / "a.xml", content))
    assert found == [] and len(problems) == 1
    assert problems[0][0].startswith(reason) and problems[0][1].startswith(f"{tmp_path / 'a.xml'}:")


PEAK = r"""
import re, sys
from pathlib import Path
from data_prep.text.documents import read_documents
num_characters = sum(len(document.text) for document in read_documents(sys.argv[1:]))
print(num_characters, re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""  # not ru_maxrss, which a child takes over from pytest


def peak_mb(path):
    done = subprocess.run([sys.executable, "-c", PEAK, path], cwd=ROOT, capture_output=True, text=True, check=True)
    num_characters, peak_kb = map(int, done.stdout.split())
    assert num_characters > path.stat().st_size / 100
    return peak_kb / 1024


def test_memory_does_not_grow_with_the_dump(tmp_path):
    """Measured: 27.5 MB for 4 MB, 27.4 MB for 40 MB."""
    block = page("T", "{{box|" + "nothing to read here " * 1_800 + "}}\n" + "A [[line]] of ''prose''.\n\n" * 50)
    small = write(tmp_path / "small.xml", HEADER + block * 100 + "</mediawiki>")
    large = write(tmp_path / "large.xml", HEADER + block * 1_000 + "</mediawiki>")
    assert 35e6 < large.stat().st_size < 45e6
    assert peak_mb(large) - peak_mb(small) < 20


HTML = """<!DOCTYPE html>
<html><head><title>No</title>{meta}<style>p {{ color: red }}</style><script>if (a < b) "<p>No</p>"</script></head>
<body><nav><ul><li>No</ul></nav>
<h1>Über uns</h1>
<p>First<br>paragraph,

in <b>b</b>old &amp; &eacute;t&eacute; &#8212; &lt;p&gt;.<p>Second <!-- no --><a href="x">one</a>
<ul><li>item<li>other</ul><noscript>No</noscript>Loose text
</body></html>"""
HTML_PROSE = "Über uns|First paragraph, in bold & été — <p>.|Second one|item|other|Loose text"


@pytest.mark.parametrize(
    "name, meta, charset",
    [
        ("a.html", "", "utf-8"),
        ("a.htm", "", "utf-8-sig"),
        ("a.html", "<meta charset=latin-1>", "latin-1"),
        ("a.html", '<meta http-equiv="Content-Type" content="text/html; charset=windows-1252">', "cp1252"),
        ("a.html", "<meta charset='unheard-of'>", "utf-8"),
        ("a", "<meta charset=utf-16>", "utf-8"),
    ],
)
def test_html_becomes_prose(tmp_path, name, meta, charset):
    path = write(tmp_path / name, HTML.format(meta=meta).encode(charset))
    assert guess_format(path) == "html"
    (document,) = read_documents([path])
    assert document.id == name
    assert "|".join(" ".join(block.split()) for block in document.text.split("\n\n") if block.strip()) == HTML_PROSE


def test_html_that_is_not_text_or_long_or_empty(tmp_path, monkeypatch):
    path = write(tmp_path / "a.html", "<p>\nZürich".encode("latin-1"))
    assert read_with_problems(path) == ([], [("not valid UTF-8", f"{path}:2")])
    assert read_with_problems(write(tmp_path / "b.html", "<nav>" * 3_000))[1] == []
    assert read_with_problems(write(tmp_path / "c.html", ""))[1] == []
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 300_000)
    parts = list(read_documents([write(tmp_path / "d.html", "<p>Some words. " * 60_000)]))
    assert [part.id for part in parts] == ["d.html", "d.html#2", "d.html#3", "d.html#4"]
    assert all(len(part.text) <= 300_000 for part in parts)
    assert sum(part.text.count("Some words.") for part in parts) == 60_000
    monkeypatch.setattr(markup, "LONGEST_HTML", 500_000)
    found, problems = read_with_problems(tmp_path / "d.html")
    assert len(found) == 1 and problems == [("HTML of more than 500,000 characters", f"{tmp_path / 'd.html'}:1")]


def test_a_declared_charset_must_be_a_character_set():
    for name in ("hex", "idna", "undefined", "utf-16", "punycode", "unicode_escape", "raw_unicode_escape"):
        assert html_charset(b"<meta charset=%s>" % name.encode()) == "utf-8-sig"
    assert html_charset(b"\xef\xbb\xbf<meta charset=latin-1>") == "utf-8-sig"
    assert html_charset(b'<meta charset="Shift_JIS"/>') == "shift_jis"


def test_zstandard_frames_and_cut_files(tmp_path):
    text = "A line with ümlaut.\n" * 50_000
    frames = zstandard.compress(text.encode()) + zstandard.compress(b"") + zstandard.compress(b"The end.\n")
    path = write(tmp_path / "a.txt.zst", frames)
    steps = []
    assert list(read_documents([path], progress=steps.append)) == [Document("a.txt.zst", text + "The end.\n")]
    assert sum(steps) == input_bytes([path]) and find_files([tmp_path]) == [path]
    for damaged in (frames[:-3], frames[: len(frames) // 2], frames + b"\x28\xb5", b"no zstandard at all", frames[5:]):
        found, problems = read_with_problems(write(tmp_path / "b.txt.zst", damaged))
        assert [reason for reason, _ in problems] == ["file is damaged"]


def test_a_dump_becomes_a_corpus(tmp_path):
    for folder in ("dumps", "vocab"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "dumps" / "xxwiki-pages-articles1.xml-p1p9.bz2", multi_stream(DUMP.encode()))
    words = sorted(
        {*re.findall(r"[^\W\d_]+|\d+|[^\w\s]", " ".join(COAST_PROSE).lower()), "a", "question", "answer", "an"}
    )
    write(tmp_path / "vocab" / "vocab.txt", "\n".join([*SPECIAL_TOKENS, *words]) + "\n")
    arguments = ["--input", tmp_path / "dumps", "--vocab", tmp_path / "vocab", "--output", tmp_path / "corpus"]
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.corpus", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    corpus = open_corpus(tmp_path / "corpus")
    assert corpus.manifest["num_documents"] == 2 and corpus.manifest.get("skipped", {}) == {}
    assert corpus.document_start.tolist() == [0, 7, 9]
