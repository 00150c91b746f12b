"""The architecture, read from the sources: which way imports run; who knows DeepSpeed, the ranks, the environment."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = ("data_prep", "pretrain", "evaluation")
PACKAGES = (*LIBRARIES, "examples", "benchmarks", "tests")
MAX_LINES = 400

# What each package may import of this repository.
IMPORTABLE = {
    "data_prep": {"data_prep"},
    "pretrain": {"data_prep", "pretrain"},
    "evaluation": {"data_prep", "pretrain", "evaluation"},
    "examples": {"examples"},  # they drive the command lines as a user would
    "benchmarks": {"data_prep", "pretrain", "evaluation", "benchmarks"},
    "tests": set(PACKAGES),
}
KNOW_DEEPSPEED = {"pretrain/engine.py", "pretrain/checkpoint.py", "pretrain/lamb.py"}
TALK_BETWEEN_RANKS = {f"pretrain/{name}.py" for name in ("layout", "layers", "lamb", "checkpoint", "telemetry")}
READ_THE_ENVIRONMENT = {"pretrain/layout.py"}


def sources(*packages: str) -> list[str]:
    """Python files of the packages, relative to the repository."""
    return sorted(path.relative_to(ROOT).as_posix() for name in packages for path in (ROOT / name).rglob("*.py"))


def imported_modules(tree: ast.AST) -> set[str]:
    """Dotted names of all that a file imports, wherever the import stands; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write the module's full name"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def used_attributes(tree: ast.AST) -> set[str]:
    """Dotted names such as os.environ that a file uses."""
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def knows(tree: ast.AST, name: str) -> bool:
    """True if a file imports the dotted `name` or something below it, or uses it as an attribute."""
    return any(f"{used}.".startswith(f"{name}.") for used in imported_modules(tree) | used_attributes(tree))


def parse(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"), filename=source)


@pytest.mark.parametrize("source", sources(*PACKAGES))
def test_every_file_keeps_the_house_rules(source):
    tree, package = parse(source), source.split("/")[0]
    ours = {name for name in imported_modules(tree) if name.split(".")[0] in PACKAGES}
    forbidden = {name for name in ours if name.split(".")[0] not in IMPORTABLE[package]}
    assert not forbidden, f"{package} must not import {sorted(forbidden)}"
    assert ast.get_docstring(tree), "a module opens with what it holds and why"
    assert Path(source).name not in ("utils.py", "helpers.py", "common.py"), "name the file after what it holds"
    assert (ROOT / source).read_text(encoding="utf-8").count("\n") <= MAX_LINES, "two rooms: split the file"


@pytest.mark.parametrize("source", sources(*LIBRARIES, "examples", "benchmarks"))
def test_an_option_with_several_values_may_be_given_twice(source):
    """`--seeds 0 --seeds 1` is `--seeds 0 1`. A default would be extended too, so it is put in after parsing."""
    for call in (node for node in ast.walk(parse(source)) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        names = [node.value for node in call.args if isinstance(node, ast.Constant)]
        if keywords.get("nargs") in ("'+'", "'*'") and (not names or names[0].startswith("-")):
            assert keywords.get("action") == "'extend'" and keywords.get("default") in (None, "[]"), ast.unparse(call)


@pytest.mark.parametrize("source", sources(*LIBRARIES))
def test_only_a_few_files_know_the_machinery(source):
    tree = parse(source)
    assert not knows(tree, "pretrain.train"), "the loop is a program; what others need of it belongs elsewhere"
    assert source in KNOW_DEEPSPEED or not knows(tree, "deepspeed")
    assert source in TALK_BETWEEN_RANKS or not knows(tree, "torch.distributed")
    assert source in READ_THE_ENVIRONMENT or not (knows(tree, "os.environ") or knows(tree, "os.getenv"))


WITHOUT_ENGINES = (
    *("pretrain.checkpoint_reader", "pretrain.weights", "pretrain.metrics_file", "pretrain.costs", "pretrain.plan"),
    *("evaluation.report", "evaluation.report_page"),
)


def test_reading_needs_no_engine():
    """Checkpoints and runs are read, planned and reported without torch.distributed, Megatron and DeepSpeed.

    torch imports torch.distributed itself, so that is looked for in the sources of what was loaded.
    """
    program = f"import sys, {', '.join(WITHOUT_ENGINES)}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert not loaded & {"deepspeed", "megatron"}
    names = {source.removesuffix(".py").replace("/", "."): source for source in sources(*LIBRARIES)}
    assert not [name for name in sorted(loaded & names.keys()) if knows(parse(names[name]), "torch.distributed")]


def test_data_prep_and_planning_run_without_torch():
    modules = [name.removesuffix(".py").replace("/", ".") for name in sources("data_prep")]
    modules += ["pretrain.costs", "pretrain.plan", "pretrain.metrics_file"]
    program = (
        f"import {', '.join(modules)}, sys; print(sorted({{'torch', 'deepspeed', 'megatron'}} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
