"""Imports run one way: trainer -> models -> kernels, trainer -> data."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "trainer": {"trainer", "models", "kernels", "data"},
    "models": {"models", "kernels"},
    "data": {"data"},
    "kernels": {"kernels"},
}
OURS = {*MAY_IMPORT, "tests"}


def imported(path: Path) -> Iterator[str]:
    """The top-level packages that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in OURS & set(imported(path)) - MAY_IMPORT[package]
    }
    assert not wrong


def test_no_other_packages() -> None:
    others = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")} - OURS
    assert not others


def test_every_way_of_importing_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import a.b, c as d\nfrom e.f import g\ndef f():\n    from h import i\n")
    assert set(imported(tmp_path / "a.py")) == {"a", "c", "e", "h"}
