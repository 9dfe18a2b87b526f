"""How the repository is laid out: what a reader may rely on without looking."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import esmm_torchrec
from esmm_torchrec.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "esmm_torchrec"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted(p for folder in ("examples", "benchmarks") for p in (ROOT / folder).glob("*.py"))
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")),
    *sorted(
        path
        for folder in ("docs", "datasets", "examples", "benchmarks", "requirements", PACKAGE.name)
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".md", ".py", ".yaml", ".txt", ".toml")
    ),
]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_modules_are_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_datasets_holds_cards_and_is_no_package() -> None:
    """With code in it, it would stand before Hugging Face's `datasets` for whoever starts here."""
    files = [path for path in (ROOT / "datasets").rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} == {".md"}


def test_folders_are_packages_with_telling_names() -> None:
    for folder in {path.parent for path in MODULES}:
        assert (folder / "__init__.py").exists(), _name(folder)
    for path in MODULES:
        assert not re.search(r"util|helper|common|misc", path.name), _name(path)
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    mirrored = {path.name for path in (ROOT / "tests" / "unit").iterdir() if path.is_dir()}
    assert mirrored - {"__pycache__"} <= packages


@pytest.mark.parametrize("path", [*MODULES, *PROGRAMS], ids=_name)
def test_modules_and_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if not tree.body:
        return
    assert ast.get_docstring(tree), "no docstring"
    if path in PROGRAMS:
        return

    documented: set[str] = set()
    undocumented: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            if not node.name.startswith("_"):
                (documented if ast.get_docstring(node) else undocumented).add(node.name)
                _sort(node.body, documented, undocumented, prefix=".")
        elif isinstance(node, ast.Module):
            _sort(node.body, documented, undocumented)
    assert undocumented <= documented, (
        "no docstring"
    )  # what a base class documents need not be repeated


def _sort(
    body: list[ast.stmt], documented: set[str], undocumented: set[str], prefix: str = ""
) -> None:
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            (documented if ast.get_docstring(node) else undocumented).add(prefix + node.name)


def _is_class_name(name: str) -> bool:
    return name[0].isupper() and not name.isupper()


def test_public_names_are_sorted_there_and_documented() -> None:
    names = esmm_torchrec.__all__
    constants, classes, functions = (
        [name for name in names if kind(name)]
        for kind in (str.isupper, _is_class_name, str.islower)
    )
    assert names == [*sorted(constants), *sorted(classes), *sorted(functions)]
    for name in names:
        assert getattr(esmm_torchrec, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = esmm_torchrec.nonsense  # pyright: ignore[reportAttributeAccessIssue]


def test_to_import_it_is_quick() -> None:
    program = (
        "import sys, esmm_torchrec.cli.main;"
        "print([m for m in ('torch', 'pandas', 'pyarrow', 'matplotlib') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert loaded.stdout == "[]\n"


def test_every_command_is_registered() -> None:
    found = set()
    for path in MODULES:
        tree = ast.parse(path.read_text())
        names = {
            node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        if {"Options", "run"} <= names:
            found.add(path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    assert found == {module for module, _ in COMMANDS.values()}


@pytest.mark.parametrize("path", TEXTS, ids=_name)
def test_no_text_names_a_place_on_somebodys_machine(path: Path) -> None:
    found = re.search(r"(?<![\w.])/(work|root|home|Users|tmp|mnt)/\S*", path.read_text())
    assert found is None, found


TEXT_FOR_A_TERMINAL = {
    "comparison/handover.py",
    "comparison/report.py",
    "data/sources/ali_ccp/files.py",
    "planning/estimates.py",
    "planning/plan_report.py",
}
"""They print or quote whole commands."""


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in MODULES
        if not {"cli", "commands"} & set(path.parts)
        and str(path.relative_to(PACKAGE)) not in TEXT_FOR_A_TERMINAL
    ],
    ids=_name,
)
def test_messages_of_the_library_name_arguments_and_not_options(path: Path) -> None:
    """The command line turns `embedding_dim` into --embedding-dim."""
    tree = ast.parse(path.read_text())
    texts = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            assert not re.search(r"(?<!-)--[a-z]", node.value), node.value


def test_every_example_is_run_by_a_test() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert (ROOT / "tests" / "examples" / f"test_{path.name}").exists(), path.name


@pytest.mark.parametrize("device", ["cpu", "cuda", "newest"])
def test_dependencies_are_pinned(device: str) -> None:
    """One `pip install -r` brings exact versions of everything the package asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        *_requirements(device),
        *_requirements("common"),
        *_requirements("docs"),
        *_requirements("spark"),
    ]
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    wanted = {
        re.split(r"[<>=\[ ]", dependency)[0]
        for dependencies in (
            project["dependencies"],
            *project["optional-dependencies"].values(),
        )
        for dependency in dependencies
    }
    assert wanted <= pinned
    loose = [line for line in lines if line and "==" not in line and line[0] not in "-."]
    assert not loose


def _requirements(name: str) -> list[str]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines]


CORE_WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {extras!r}:
            raise ModuleNotFoundError(name, name=name.split(".")[0])
sys.meta_path.insert(0, Missing())
import importlib
for module in {modules!r}:
    importlib.import_module(module)
"""


def test_core_imports_no_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    modules = {"pyyaml": "yaml"}
    missing = {
        modules.get(name, name)
        for name in (
            re.split(r"[<>=\[ ]", line)[0]
            for extra in ("planning", "comparison")
            for line in extras.get(extra, [])
        )
    }
    core = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in MODULES
        if path.relative_to(PACKAGE).parts[0] not in ("comparison", "planning")
        and path.name not in ("__init__.py", "__main__.py")
    ]
    program = CORE_WITHOUT.format(extras=missing, modules=core)
    ran = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr

    program = CORE_WITHOUT.format(extras=missing, modules=["esmm_torchrec.cli.main"])
    command = "from esmm_torchrec.cli.main import main; main(['plan', '--tables', 'tables.yaml'])"
    ran = subprocess.run(
        [sys.executable, "-c", program + command],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2
    assert "pip install 'esmm_torchrec[planning]'" in ran.stderr
