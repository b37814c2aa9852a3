"""The structure of the code: imports run one way and without cycles, and every file is short."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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


def imported_modules(path: Path, root: Path) -> set[str]:
    """The project's modules that a file imports when it is loaded; imports for type checking do not count."""
    found: set[str] = set()
    statements = list(ast.parse(path.read_text(encoding="utf-8"), str(path)).body)
    for node in statements:
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            statements += node.body + node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if (root / name.replace(".", "/")).with_suffix(".py").exists()}


def module_graph(root: Path, packages: list[str]) -> dict[str, set[str]]:
    files = [path for package in packages for path in (root / package).rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(root).with_suffix("").parts): imported_modules(path, root) for path in files}


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter(module_graph(ROOT, list(MAY_IMPORT))).prepare()
    except CycleError as error:
        raise AssertionError(f"import cycle: {' <- '.join(error.args[1])}") from None


def test_a_cycle_is_found(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.py").write_text("from p import b\n")
    (tmp_path / "p/b.py").write_text("from p.c import x\n")
    (tmp_path / "p/c.py").write_text("import typing\nif typing.TYPE_CHECKING:\n    import p.a\n")
    TopologicalSorter(module_graph(tmp_path, ["p"])).prepare()
    (tmp_path / "p/c.py").write_text("import p.a\n")
    with pytest.raises(CycleError):
        TopologicalSorter(module_graph(tmp_path, ["p"])).prepare()


def test_files_are_short() -> None:
    files = [path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_other_packages() -> None:
    others = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")} - OURS
    assert not others


def test_names_that_torch_has_renamed_are_in_one_file() -> None:
    files = [path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")]
    files += (ROOT / "slurm").rglob("*.sh")
    renamed = (
        r"dist\.(all_gather_(single|into_tensor)|reduce_scatter_(single|tensor))|forward_sync_buffers|broadcast_buffers"
    )
    users = {path.name for path in files if re.search(renamed + r"|^[^#]*--shutdown-timeout", path.read_text(), re.M)}
    assert users == {"compat.py"}


def test_every_way_of_importing_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import a.b, c as d\nfrom e.f import g\ndef f():\n    from h import i\n")
    assert set(imported(tmp_path / "a.py")) == {"a", "c", "e", "h"}
