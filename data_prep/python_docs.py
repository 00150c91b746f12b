"""Command line: collect the English documentation that is installed on this machine, for a first run without downloads.

The docstrings of the standard library and of some large packages, with Python's own help topics, hold ten megabytes of
English prose. `ast` reads them from the source files: nothing is imported or run.

Each module is one document. Whole modules are held out. A held-out paragraph is dropped if it shares any LEAK_WORDS
consecutive words with the training part, so that text copied between modules is never on both sides.

The output (UTF-8; the same bytes for the same versions of Python and the packages):

    pretrain/train.jsonl  pretrain/heldout.jsonl   {"id": "torch.nn.modules.linear", "text": "paragraph\\n\\nparagraph"}
    task/train.tsv        task/dev.tsv             sentence1<TAB>sentence2<TAB>label, as in GLUE's pair tasks
    manifest.json                                  rows and sha256 of each of them

The task: does the second passage follow the first in one module's documentation (label 1), or is it from another module
(label 0)? Neither passage alone gives the answer. Its training pairs come from training modules, its dev pairs from
held-out ones.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import platform
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_prep.cli import number, option, parse, run_cli
from data_prep.files import claim_output, finished_file, mark_finished, sha256_file, write_json

# All are installed with this project's requirements; a missing one is left out.
PACKAGES = ("matplotlib", "networkx", "nltk", "numpy", "scipy", "sklearn", "sympy", "torch")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # the packages whose distribution has another name
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "_vendor"}
)
HELDOUT_PERCENT = 10
LEAK_WORDS = 8
NUM_TASK_PAIRS = {"train": 8_000, "dev": 1_500}
PASSAGE_WORDS, LONGEST_PASSAGE = 25, 45  # two passages of the task fit into a sequence of 128 tokens

ENGLISH_WORDS = re.compile(
    r"\b(?:an?|and|are|as|at|be|but|by|can|for|from|has|have|if|in|into|is|it|its|may|must|no|not|of|on|or|should|so|than"
    r"|that|the|their|then|there|these|they|this|to|used|using|was|we|when|where|which|will|with|you)\b",
    re.IGNORECASE,
)
ABBREVIATIONS = ("e.g.", "i.e.", "cf.", "etc.", "vs.", "eq.", "fig.", "al.", "resp.", "no.", "pp.", "vol.", "approx.")

HEADING_RULE = re.compile(r"([=\-~^*#+`'\"_])\1{2,}\s*")
KEPT_DIRECTIVE = re.compile(r"\.\. (?:note|warning|tip|caution|important|seealso|hint)::\s*", re.IGNORECASE)
# A list item, a Sphinx field, or an argument in Google's style: each begins a paragraph.
ITEM = re.compile(
    r"(?:[-*+•]|\(?\d{1,2}[.)]|:\w+[^:`]*:(?!`)|\*{0,2}\w+\*{0,2} ?\([^()]*(?:\([^()]*\))?[^()]*\) ?:|@\w+)\s+"
)
MARKUP = (
    (re.compile(r":math:`[^`]*`"), "\\\\"),  # a backslash, so that is_prose rejects a sentence with a formula
    (re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`>]*>)?`"), r"\1"),
    (re.compile(r"`{1,2}([^`<]*?)(?:\s*<[^`>]*>)?`{1,2}_{0,2}"), r"\1"),
    (re.compile(r"\s?\[[\w\d]+\]_"), ""),
    (re.compile(r"\[([^\][]+)\]\([^()\s]+\)"), r"\1"),
    (re.compile(r"(?<!\w)(\*{1,2})(\S(?:[^*]*\S)?)\1(?!\w)"), r"\2"),
    (re.compile(r"\s+"), " "),
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def find_modules(packages: Iterable[str] = PACKAGES) -> list[tuple[str, Path]]:
    """(module name, source file) of the standard library and of those of `packages` that are installed."""
    roots = [((), Path(sysconfig.get_path("stdlib")))]
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            roots.append(((package,), Path(spec.origin).parent))
    modules = []
    for package, root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIPPED_FOLDERS.isdisjoint(parts):
                modules.append((".".join(package + parts).removesuffix(".__init__"), path))
    return modules


def read_docstrings(source: bytes) -> list[str]:
    """The docstrings of a module, its classes and functions, in file order; [] if the file does not parse."""
    if b'"""' not in source and b"'''" not in source:
        return []  # parsing takes 90 % of the time, and docstrings in other quotes are rarely sentences
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in these files are not the user's concern
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node, clean=False))]


def read_topics(stdlib: Path) -> dict[str, str]:
    """Python's help topics (the language reference) by name; {} on an installation without them."""
    path = stdlib / "pydoc_data" / "topics.py"
    if not path.exists():
        return {}
    assignments = (node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.Assign))
    return ast.literal_eval(next(assignments).value)  # the file is one dictionary


def strip_markup(text: str) -> str:
    """Text without reStructuredText and Markdown markup, on one line and with single spaces."""
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def is_prose(text: str) -> bool:
    """True for an English sentence or more; False for code, tables, formulas, signatures and lists of names."""
    words = text.split()
    if len(words) < 8 or text[-1] not in ".!?:" or "\\" in text or ">>>" in text:
        return False
    num_letters = sum(character.isalpha() or character == " " for character in text)
    num_english_words = len(ENGLISH_WORDS.findall(text))
    return num_letters >= 0.88 * len(text) and num_english_words >= 0.2 * len(words)


def clean_docstring(docstring: str) -> list[str]:
    """Paragraphs of prose, each on one line. Doctests, code, tables, headings and bare signatures are dropped."""
    lines = inspect.cleandoc(docstring.replace("\r\n", "\n").replace("\r", "\n")).split("\n")
    paragraphs: list[list[str]] = [[]]
    indent, opened_item = 0, False
    skipped_indent = None  # of the line that began a literal block, while that is being skipped
    for i, line in enumerate(lines):
        text = line.strip()
        if not text or HEADING_RULE.fullmatch(text):
            paragraphs.append([])
            continue
        previous_indent, indent = indent, len(line) - len(line.lstrip())
        if skipped_indent is not None and indent > skipped_indent:
            continue
        skipped_indent = None
        is_heading = i + 1 < len(lines) and HEADING_RULE.fullmatch(lines[i + 1].strip())
        item = KEPT_DIRECTIVE.match(text) or ITEM.match(text)
        if item is None and (text.startswith((".. ", ">>>", "...", "|", "+-")) or is_heading):
            skipped_indent = indent if text.startswith("..") else None
            paragraphs.append([])
            continue
        if text.endswith("::"):
            skipped_indent, text = indent, text[:-1]
        if item or (indent != previous_indent and not opened_item):
            paragraphs.append([])
        paragraphs[-1].append(text[item.end() :] if item else text)
        opened_item = item is not None
    return [text for lines in paragraphs if is_prose(text := strip_markup(" ".join(lines)))]


def name_hash(name: str) -> int:
    """A pseudo-random number that depends on the name alone: 64 bits of its sha256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def normalised_words(text: str) -> list[str]:
    """Lower-case words without digits and punctuation, for recognising copies of a text."""
    return re.findall(r"[a-z]+", text.lower())


def drop_repeated(documents: dict[str, list[str]]) -> dict[str, list[str]]:
    """The documents without paragraphs whose words occurred in an earlier one; empty documents are dropped."""
    first: dict[str, tuple[str, str]] = {}
    for name, paragraphs in documents.items():
        for paragraph in paragraphs:
            first.setdefault(" ".join(normalised_words(paragraph)), (name, paragraph))
    unique: dict[str, list[str]] = {}
    for name, paragraph in first.values():
        unique.setdefault(name, []).append(paragraph)
    return unique


def word_runs(paragraph: str) -> set[str]:
    """Every run of LEAK_WORDS consecutive words of a paragraph, each as one string."""
    words = normalised_words(paragraph)
    return {" ".join(words[i : i + LEAK_WORDS]) for i in range(max(1, len(words) - LEAK_WORDS + 1))}


def split_by_module(documents: dict[str, list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(train, held-out) documents, split by a hash of the module's name; leaking held-out paragraphs are dropped."""
    train, heldout = {}, {}
    for name, paragraphs in documents.items():
        (heldout if name_hash(name) % 100 < HELDOUT_PERCENT else train)[name] = paragraphs
    heldout_runs = {run for paragraphs in heldout.values() for text in paragraphs for run in word_runs(text)}
    leaked = {run for paragraphs in train.values() for text in paragraphs for run in word_runs(text) & heldout_runs}
    clean = {name: [text for text in texts if leaked.isdisjoint(word_runs(text))] for name, texts in heldout.items()}
    return train, {name: paragraphs for name, paragraphs in clean.items() if paragraphs}


def split_sentences(paragraph: str) -> list[str]:
    """Split at punctuation before a capital letter, which is good enough for the passages of the task."""
    sentences: list[str] = []
    for piece in SENTENCE_END.split(paragraph):
        if sentences and sentences[-1].lower().endswith(ABBREVIATIONS):
            sentences[-1] += f" {piece}"
        else:
            sentences.append(piece)
    return sentences


def cut_passages(paragraphs: list[str]) -> list[str]:
    """Runs of sentences with at least PASSAGE_WORDS words, cut at LONGEST_PASSAGE; a shorter rest is dropped."""
    passages, current = [], []
    for sentence in (sentence for text in paragraphs for sentence in split_sentences(text)):
        current += sentence.split(" ")
        if len(current) >= PASSAGE_WORDS:
            passages.append(" ".join(current[:LONGEST_PASSAGE]))
            current = []
    return passages


def make_task(documents: dict[str, list[str]], num_rows: int, seed: str) -> list[tuple[str, str, int]]:
    """Up to `num_rows` rows (passage, passage, label): 1 if the second follows the first, 0 if its module is another.

    Pairs with label 0 exchange their second passages, so that one passage alone says nothing. No passage occurs twice.
    """
    pairs = []
    for name, paragraphs in documents.items():
        passages = cut_passages(paragraphs)
        pairs += [(name, *pair) for pair in zip(passages[::2], passages[1::2], strict=False)]
    generator = random.Random(seed)
    generator.shuffle(pairs)
    pairs = pairs[:num_rows]
    wrong, right = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    rows = [(first, second, 1) for _, first, second in right]
    # Sorting by module and shifting by half pairs each first passage with a second one of another module.
    wrong.sort()
    shift = len(wrong) // 2
    for index, (name, first, _) in enumerate(wrong):
        other, _, second = wrong[(index + shift) % len(wrong)]
        if other != name:
            rows.append((first, second, 0))
    generator.shuffle(rows)
    return rows


def collect_documents(modules: list[tuple[str, Path]], max_bytes: float) -> dict[str, list[str]]:
    """Module name -> paragraphs, sorted by name, with at most about `max_bytes` of prose and no paragraph twice."""
    topics = read_topics(Path(sysconfig.get_path("stdlib")))
    texts = [(f"pydoc_data.topics.{name}", text) for name, text in topics.items()]
    # The order of a hash makes a limit give a fair sample of all packages.
    sources = dict(sorted([*modules, *texts], key=lambda source: name_hash(source[0])))
    documents: dict[str, list[str]] = {}
    num_bytes = 0
    for name, source in tqdm(sources.items(), desc="reading documentation", unit=" modules", smoothing=0):
        docstrings = [source] if isinstance(source, str) else read_docstrings(source.read_bytes())
        paragraphs = [paragraph for docstring in docstrings for paragraph in clean_docstring(docstring)]
        if paragraphs:
            documents[name] = paragraphs
        num_bytes += sum(len(paragraph.encode()) for paragraph in paragraphs)
        if num_bytes >= max_bytes:
            break
    return drop_repeated(dict(sorted(documents.items())))


def document_lines(documents: dict[str, list[str]]) -> Iterator[str]:
    """One object {"id", "text"} per line, with a blank line between the paragraphs of a text."""
    for name, paragraphs in documents.items():
        yield json.dumps({"id": name, "text": "\n\n".join(paragraphs)}, ensure_ascii=False) + "\n"


def task_lines(rows: list[tuple[str, str, int]]) -> Iterator[str]:
    """A header and the rows, with the columns of GLUE's pair tasks."""
    yield "sentence1\tsentence2\tlabel\n"
    yield from (f"{first}\t{second}\t{label}\n" for first, second, label in rows)


def installed_versions() -> dict[str, str]:
    """The versions that determine the output, of Python and of the packages, by distribution name."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            distribution = DISTRIBUTIONS.get(package, package)
            versions[distribution] = importlib.metadata.version(distribution)
    return versions


@dataclass(frozen=True, kw_only=True)
class PythonDocsOptions:
    """Collect the English documentation installed on this machine: a corpus for pretraining and a task for fine-tuning,
    split by module. Needs no network and imports none of the packages it reads.
    """

    output: Path = option("a new folder for pretrain/ and task/", metavar="DIR")
    max_mb: float | None = option(
        "stop after about N MB of prose; without it, everything is read",
        default=None,
        type=number(above=0),
        metavar="N",
    )


def main(argv: list[str] | None = None) -> None:
    options = parse(PythonDocsOptions, "data_prep.python_docs", argv)
    identity = {"versions": installed_versions(), "max_mb": options.max_mb}
    if claim_output(options.output, "data_prep.python_docs", identity) == "done":
        return
    documents = collect_documents(find_modules(), max_bytes=1e6 * options.max_mb if options.max_mb else math.inf)
    train, heldout = split_by_module(documents)
    parts = {
        "pretrain/train.jsonl": train,
        "pretrain/heldout.jsonl": heldout,
        "task/train.tsv": make_task(train, NUM_TASK_PAIRS["train"], seed="train"),
        "task/dev.tsv": make_task(heldout, NUM_TASK_PAIRS["dev"], seed="dev"),
    }
    entries = []
    for name, content in parts.items():
        path = options.output / name
        path.parent.mkdir(exist_ok=True)
        with finished_file(path, "w") as file:
            file.writelines(document_lines(content) if isinstance(content, dict) else task_lines(content))
        entries.append({"file": name, "rows": len(content), "bytes": path.stat().st_size, "sha256": sha256_file(path)})
        print(f"{path}: {len(content):,} rows, {path.stat().st_size / 1e6:.2f} MB")
    write_json(options.output / "manifest.json", entries)
    mark_finished(options.output)


if __name__ == "__main__":
    run_cli(main)
