"""The README, run: every command in it, in order, in an empty folder, as a newcomer would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# They are what runs this test, and what .ci/run runs beside it.
MAKE_TARGETS = {"make quickstart", "make test"}


def readme_commands() -> list[str]:
    """Lines of the README's bash blocks in order, without the two make targets."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert set(lines) >= MAKE_TARGETS
    return [line for line in lines if line not in MAKE_TARGETS]


@pytest.fixture
def newcomer(tmp_path):
    """A folder that looks like the repository, but without the runs of other people."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_every_command_of_the_readme_runs(newcomer):
    script = "\n".join(["set -euxo pipefail", *readme_commands()])
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(["bash", "-c", script], cwd=newcomer, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    left = newcomer / "runs" / "steps"
    for name in ("shards/train/manifest.json", "pretrain/metrics.jsonl", "hf/config.json", "report.html"):
        assert (left / name).stat().st_size > 0, name


def test_links_and_the_tree_lead_to_files_that_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    missing = [name for name in links + tree_entries() if not (ROOT / name).exists()]
    assert not missing


def test_the_tree_has_a_comment_for_each_module():
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("data_prep", "pretrain", "evaluation", "examples")
        for path in (ROOT / package).glob("*.py")
        if path.name != "__init__.py"
    }
    assert not modules - set(tree_entries())


def tree_entries() -> list[str]:
    """Paths in the README's tree: a folder at the start of a line, its files two spaces in."""
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    folder, entries = "", []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folder = "" if not indent else folder
        entries.append(folder + name)
        folder = folder or name
    return entries
