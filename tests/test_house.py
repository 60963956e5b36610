"""The house rules: who imports whom, what an import costs, what the wheel holds."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffcam_fast

ROOT = Path(__file__).parents[1]

# a package may import itself and what stands before it
FOLDERS = {
    "diffcam_kernels": "kernels/diffcam_kernels",
    "diffcam_fast": "diffcam_fast",
    "diffcam_export": "export/diffcam_export",
    "diffcam_bench": "benchmarks/diffcam_bench",
}
ORDER = list(FOLDERS)

# heavy or optional: imported where they are used
NOT_AT_IMPORT = {
    "triton",
    "onnx",
    "onnxruntime",
    "torchvision",
    "timm",
    "matplotlib",
    "pyarrow",
    "ray",
}


def imports(tree: ast.AST, *, lazy: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Yield (top-level name, line, whether inside a function) of every absolute import."""
    for node in ast.iter_child_nodes(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [
                arg.value
                for arg in node.args[:1]
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
        for name in names:
            yield name.split(".")[0], node.lineno, lazy
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        # For a type checker alone: nothing is imported when the module is.
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        yield from imports(node, lazy=lazy or inside or typing)


def violations(source: str, *, package: str, may_look_up: bool = False) -> list[str]:
    """Return the imports in `source`, a module of `package`, that point the wrong way."""
    found = []
    for name, line, lazy in imports(ast.parse(source)):
        upward = name in ORDER and ORDER.index(name) > ORDER.index(package)
        if name in {"tests", "conftest"} or (upward and not (may_look_up and lazy)):
            found.append(f"line {line}: {package} imports {name}")
        if package == "diffcam_export" and name == "triton":
            found.append(f"line {line}: {package} imports {name}")
    return found


def modules() -> list[tuple[str, Path]]:
    return [
        (package, path)
        for package, folder in FOLDERS.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


@pytest.mark.parametrize(
    ("source", "package", "may_look_up", "expected"),
    [
        ("import diffcam_kernels.ops", "diffcam_fast", False, 0),
        ("import diffcam_fast.contrast", "diffcam_kernels", False, 1),
        ("from diffcam_bench import run", "diffcam_fast", True, 1),
        ("def f():\n    from diffcam_bench import run", "diffcam_fast", True, 0),
        ("def f():\n    from diffcam_bench import run", "diffcam_fast", False, 1),
        ("if x:\n    import_module('diffcam_export.a')", "diffcam_fast", False, 1),
        ("try:\n    import triton\nexcept ImportError:\n    pass", "diffcam_export", False, 1),
        ("if TYPE_CHECKING:\n    from diffcam_export import a", "diffcam_fast", True, 0),
        ("if TYPE_CHECKING:\n    from diffcam_export import a", "diffcam_fast", False, 1),
        ("from tests import networks", "diffcam_bench", False, 1),
    ],
)
def test_checker_sees_a_wrong_import(
    source: str, package: str, may_look_up: bool, expected: int
) -> None:
    assert len(violations(source, package=package, may_look_up=may_look_up)) == expected


def test_imports_point_one_way() -> None:
    found = []
    for package, path in modules():
        fast = ROOT / "diffcam_fast"
        may_look_up = path.is_relative_to(fast / "cli") or path == fast / "__init__.py"
        source = path.read_text(encoding="utf-8")
        found += [
            f"{path.relative_to(ROOT)}, {text}"
            for text in violations(source, package=package, may_look_up=may_look_up)
        ]
    assert found == []
    assert {package for package, _ in modules()} >= {"diffcam_kernels", "diffcam_fast"}


def test_import_is_light() -> None:
    code = (
        "import json, sys, time; start = time.process_time()\n"
        "import diffcam_fast; diffcam_fast.Explainer\n"
        "print(json.dumps([time.process_time() - start, sorted(sys.modules)]))"
    )
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, loaded = json.loads(out.stdout)
    assert NOT_AT_IMPORT & set(loaded) == set()
    # CPU seconds, PyTorch's own import included: other work on the machine does not count
    assert seconds < 6, f"importing diffcam_fast took {seconds:.1f} s of CPU"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # built from a copy: setuptools leaves build/ behind, and would pack what an older one held
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "demo-out", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*pip, "-w", str(folder), str(folder / "source")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("diffcam_fast-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".html", ".txt"} or path.name == "py.typed"
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert {"diffcam_fast/outputs/report.html", "diffcam_bench/py.typed"} <= packed


def test_wheel_takes_no_foreign_name(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} <= set(FOLDERS)


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert info == f"diffcam_fast-{diffcam_fast.__version__}.dist-info"
    entries = wheel.read(f"{info}/entry_points.txt").decode()
    assert "diffcam = diffcam_fast.cli.main:main" in entries
    assert "License: Apache-2.0" in wheel.read(f"{info}/METADATA").decode()
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
