"""The README and the recipe for one's own domain: every command runs, in order, in an empty folder. Links and trees."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.commands import flags_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
# They are what runs this test, and what .ci/run runs beside it.
MAKE_TARGETS = {"make quickstart", "make test"}


def commands(page: str) -> list[str]:
    """The lines of a page's bash blocks in order, without the two make targets."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [line for line in lines if line not in MAKE_TARGETS]


@pytest.fixture
def newcomer(tmp_path):
    """A folder that looks like the repository, but without the runs of other people."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(script: list[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", "\n".join(["set -euxo pipefail", *script])]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


def test_every_flag_of_the_pages_exists():
    """In the README and the recipe, by the page of commands, whose test holds it to the code."""
    flags = {
        name: flags_of(text) for name, text in re.findall(r"^## ([^\n]+)\n\n```\n(.*?)^```", COMMANDS, re.M | re.S)
    }
    script = "\n".join(commands("README.md") + commands("docs/own_domain.md")).replace("\\\n", " ")
    calls = [
        line.split()
        for line in script.splitlines()
        if re.search(r"(-m|--module) (data_prep|pretrain|evaluation)\.", line)
    ]
    assert len(calls) > 20
    for words in calls:
        start = next(index for index, word in enumerate(words) if word in ("-m", "--module")) + 1
        used = {word.partition("=")[0] for word in words[start:] if word.startswith("--")}
        assert used <= flags[words[start]].keys(), f"{' '.join(words)}: {used - flags[words[start]].keys()}"


@pytest.mark.slow
def test_every_command_of_the_readme_runs(newcomer):
    assert all(f"\n{target}\n" in README for target in MAKE_TARGETS)
    run(commands("README.md"), newcomer)
    left = newcomer / "runs" / "steps"
    for name in ("shards/train/manifest.json", "pretrain/metrics.jsonl", "hf/config.json", "report.html"):
        assert (left / name).stat().st_size > 0, name


@pytest.mark.slow
def test_the_recipe_for_ones_own_domain_runs(newcomer):
    """With the smallest model and few steps in place of the recipe's own first line."""
    first, *recipe = commands("docs/own_domain.md")
    assert first.startswith("MODEL=mini ")
    sizes = "MODEL=tiny CONFIG=ds_configs/mini.json STEPS=20 LENGTH=32 PREDICTIONS=5 RANKS=2 OUT=runs/domain"
    text = """
        python -m data_prep.python_docs --output found --max-mb 1
        mkdir text heldout task
        mv found/pretrain/train.jsonl text/
        mv found/pretrain/heldout.jsonl heldout/
        for split in train dev; do head -n 200 found/task/$split.tsv > task/$split.tsv; done
    """
    run([text, sizes, *recipe], newcomer)
    left = newcomer / "runs" / "domain"
    for name in ("hf/model.safetensors", "finetune/pretrained/seed_0/model/model.safetensors", "report.html"):
        assert (left / name).stat().st_size > 0, name


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_to_files_and_sections_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for target, _, section in (link.partition("#") for link in links):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        assert not section or section in sections(path), f"{page} links to #{section} of {target}"


def sections(path: Path) -> list[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", ["README.md", "docs/files.md"])
def test_the_trees_name_files_that_exist(page):
    assert not [name for name in tree_entries(page) if not (ROOT / name).exists()]


def test_every_module_has_a_line_in_the_list_of_files():
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("data_prep", "pretrain", "evaluation", "examples")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert not modules - set(tree_entries("docs/files.md"))


def tree_entries(page: str) -> list[str]:
    """Paths in a page's tree: a folder at the start of a line, its content two more spaces in for each level."""
    tree = re.search(r"```\n(data_prep/.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL).group(1)
    folders, entries = [], []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        del folders[len(indent) // 2 :]
        entries.append("".join(folders) + name)
        folders.append(name)
    return entries
