"""The report's HTML page: one file that refers to nothing outside itself."""

from html import escape
from typing import NamedTuple

# In every file of a report, so that a report replaces a report and never another file.
MARK = "<!-- made by evaluation.report -->"

STYLE = """
:root { --ink: #1c2330; --soft: #5a6372; --line: #e3e6eb; --accent: #0072b2; --paper: #f6f7f9; }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1, h2, p, li, .tile, caption { overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 0 0 .6rem; }
p { margin: 0 0 .9rem; max-width: 52rem; }
.soft { color: var(--soft); }
section, .tile { background: #fff; border: 1px solid var(--line); border-radius: 12px; }
section { padding: 1.4rem 1.5rem; margin-top: 1.4rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; margin-top: 1.4rem; }
.tile { border-top: 3px solid var(--accent); padding: .9rem 1.1rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; border-bottom: 2px solid var(--line); }
th, td { padding: .42rem .7rem; white-space: nowrap; text-align: left; }
td { border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
.figures { display: grid; gap: 1rem; align-items: start; }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; max-width: 30rem; height: auto; }
caption { text-align: left; font-size: .88rem; padding-bottom: .3rem; }
.wide { grid-column: 1 / -1; }
.matrix { width: auto; }
.matrix th, .matrix td { border: 1px solid #fff; padding: .3rem; white-space: nowrap; }
.matrix td { text-align: center; min-width: 2.2rem; }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); }
.matrix tbody th { position: sticky; left: 0; background: #fff; }
ul { margin: 0 0 1rem; padding-left: 1.2rem; }
summary { cursor: pointer; color: var(--soft); margin-top: .6rem; }
pre { background: var(--paper); border-radius: 8px; padding: .9rem; overflow-x: auto; font-size: .8rem; }
@media (max-width: 40rem) {
  main { padding: 1.2rem .75rem 3rem; }
  h1 { font-size: 1.4rem; }
  section { padding: 1rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .6rem; margin-top: 1rem; }
  .tile { padding: .6rem .7rem; }
  .tile b { font-size: 1.2rem; }
  table { font-size: .82rem; }
  th, td { padding: .35rem .3rem; }
  th, td:not([style*="right"]) { white-space: normal; }
}
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""


class Section(NamedTuple):
    """A headline, what it says, tables as HTML, figures as {alternative text: data URI}, sentences, confusion matrices
    as HTML, and {title: text} to unfold.
    """

    title: str
    introduction: str
    tables: list[str]
    figures: dict[str, str]
    sentences: list[str] = []
    matrices: list[str] = []
    unfold: dict[str, str] = {}


def render_page(title: str, origin: str, tiles: dict[str, str], sections: list[Section]) -> str:
    """The whole page. `tiles` are the numbers to see first: {what it is: value}; `origin`, when and from what the page
    was made, ends it.
    """
    tile_html = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in tiles.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
{MARK}
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<div class="tiles">{tile_html}</div>
{"".join(render_section(section) for section in sections)}
<p class="soft">{escape(origin)}</p>
</main>
</body>
</html>
"""


def render_section(section: Section) -> str:
    """One card of the page."""
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in section.sentences)
    parts = [
        f"<h2>{escape(section.title)}</h2>",
        f'<p class="soft">{escape(section.introduction)}</p>',
        *(f'<div class="scroll">{table}</div>' for table in section.tables),
        f"<ul>{sentences}</ul>" if sentences else "",
        '<div class="figures">',
        *(f'<figure><img src="{uri}" alt="{escape(name)}"></figure>' for name, uri in section.figures.items()),
        *section.matrices,
        "</div>",
        *(
            f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
            for name, text in section.unfold.items()
        ),
    ]
    return "<section>\n" + "\n".join(part for part in parts if part) + "\n</section>\n"


def render_matrix(title: str, labels: list[str], counts: list[list[int]]) -> str:
    """A confusion matrix as a figure that holds a table: how often each label was answered with each, in percent of the
    label's rows; the higher, the darker. counts: [label][answer].

    It is no picture, so that its letters have the page's size, however many labels and matrices there are.
    """
    head, rows = "".join(f"<th>{escape(label)}</th>" for label in labels), []
    for label, row in zip(labels, counts, strict=True):
        shares = [100 * count / max(1, sum(row)) for count in row]
        styles = [f"background: rgb(0 114 178 / {share:.0f}%)" + "; color: #fff" * (share > 85) for share in shares]
        cells = "".join(f'<td style="{style}">{share:.0f}</td>' for style, share in zip(styles, shares, strict=True))
        rows.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    return (
        f'<figure class="scroll{" wide" if len(labels) > 6 else ""}"><table class="matrix">'
        f"<caption><b>{escape(title)}</b>: a row a label, in percent by what was answered</caption>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></figure>"
    )
