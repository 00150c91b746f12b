"""The report's HTML page: one file that refers to nothing outside itself."""

from html import escape
from pathlib import Path
from typing import NamedTuple

# Every file of a report contains this mark, so that a report overwrites an earlier report but no other file.
MARK = "<!-- made by evaluation.report -->"


class Section(NamedTuple):
    """One card of the page."""

    title: str
    introduction: str
    tables: list[str]  # HTML
    figures: dict[str, str | None]  # {alternative text: data URI}; None is left out
    sentences: list[str] = []
    matrices: list[str] = []  # HTML
    unfold: dict[str, str] = {}  # {summary: text}


def render_page(title: str, origin: str, tiles: dict[str, str], sections: list[Section]) -> str:
    """The whole page. `tiles` are the numbers at the top, {what: value}; `origin`, at the end, says how it was made."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
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
<style>
{style}</style>
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
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in section.sentences)
    parts = [
        f"<h2>{escape(section.title)}</h2>",
        f'<p class="soft">{escape(section.introduction)}</p>',
        *(f'<div class="scroll">{table}</div>' for table in section.tables),
        f"<ul>{sentences}</ul>" if sentences else "",
        '<div class="figures">',
        *(f'<figure><img src="{uri}" alt="{escape(name)}"></figure>' for name, uri in section.figures.items() if uri),
        *section.matrices,
        "</div>",
        *(
            f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
            for name, text in section.unfold.items()
        ),
    ]
    return "<section>\n" + "\n".join(part for part in parts if part) + "\n</section>\n"


def render_matrix(title: str, labels: list[str], counts: list[list[int]]) -> str:
    """A confusion matrix, counts [label][prediction], in percent of each label's examples; larger is darker.

    It is an HTML table rather than a figure, so that its font size does not depend on the number of labels.
    """
    head, rows = "".join(f"<th>{escape(label)}</th>" for label in labels), []
    for label, row in zip(labels, counts, strict=True):
        shares = [100 * count / max(1, sum(row)) for count in row]
        styles = [f"background: rgb(0 114 178 / {share:.0f}%)" + "; color: #fff" * (share > 85) for share in shares]
        cells = "".join(f'<td style="{style}">{share:.0f}</td>' for style, share in zip(styles, shares, strict=True))
        rows.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    return (
        f'<figure class="scroll{" wide" if len(labels) > 6 else ""}"><table class="matrix">'
        f"<caption><b>{escape(title)}</b>: one row per label, one column per prediction, in percent</caption>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></figure>"
    )
