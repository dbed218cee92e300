"""profiles <- planner <- runner, and what the planner may import."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "profiles": (
        "outlay.planner",
        "outlay.runner",
        "torch",
        "deepspeed",
        "transformers",
        "pandas",
        "numpy",
    ),
    "planner": ("outlay.runner", "deepspeed", "torch", "transformers", "pandas"),
}
"""By room: what it may not import at module level (deepspeed and the runner: nowhere)."""
NOWHERE = ("outlay.runner", "deepspeed", "outlay.planner")


def imports(tree: ast.Module) -> list[tuple[str, bool, int]]:
    """(module, at module level, line) of every import outside `if TYPE_CHECKING`."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if function or checking:
            inside |= {id(child) for child in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) not in inside, node.lineno))
    return found


def under(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def violations(room: str, text: str, name: str) -> list[str]:
    bad = []
    for module, top, line in imports(ast.parse(text)):
        for package in FORBIDDEN[room]:
            nowhere = package in NOWHERE
            if under(module, package) and (top or nowhere):
                bad.append(f"{name}:{line}: {module}")
    return bad


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_only_to_the_left(room: str) -> None:
    bad = []
    for path in sorted((ROOT / room).rglob("*.py")):
        bad += violations(room, path.read_text(), str(path.relative_to(ROOT)))
    assert not bad


def test_the_check_itself_sees_a_violation() -> None:
    assert violations("planner", "import torch\n", "x") == ["x:1: torch"]
    assert violations("planner", "def f():\n    import torch\n", "x") == []
    assert violations("planner", "def f():\n    import deepspeed\n", "x") == ["x:2: deepspeed"]
    assert violations("profiles", "from outlay.planner import cost\n", "x") == [
        "x:1: outlay.planner"
    ]


def modules_after(code: str, *args: str, cwd: Path) -> set[str]:
    script = f"import sys; sys.argv = ['outlay', {', '.join(map(repr, args))}]\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=cwd,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )  # fmt: skip
    return set(done.stderr.split("MODULES ")[1].split())


RUN = """
import atexit
atexit.register(lambda: print("MODULES", *sys.modules, file=sys.stderr))
from outlay.runner.cli import main
main()
"""


@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("estimate", "--model", "config.json", "--hardware", "h100-sxm:8", "--steps", "10"),
        (
            "plan",
            "--model",
            "config.json",
            "--hardware",
            "h100-sxm:8",
            "--steps",
            "10",
            "--dry-run",
        ),
        ("probe",),
    ],
)
def test_light_commands_import_neither_torch_nor_pandas(
    args: tuple[str, ...], tmp_path: Path, tiny_config: Path
) -> None:
    (tmp_path / "config.json").write_text(tiny_config.read_text())
    loaded = modules_after(RUN, *args, cwd=tmp_path)
    assert "click" in loaded
    assert not {"torch", "pandas", "deepspeed", "transformers"} & loaded
