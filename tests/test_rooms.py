"""Which room may know which: walks every import of the tree, lazy ones included, and fails on any arrow that docs/architecture.md lacks."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("action_tokenizer", "emu3_vla", "envs", "eval", "policies")

ALLOWED = {
    "action_tokenizer": set(),
    "envs": {"envs"},
    "emu3_vla": {"emu3_vla", "action_tokenizer", "envs.spec"},
    "policies": {"policies", "emu3_vla", "action_tokenizer", "envs.spec"},
    "eval": {"eval", "envs", "policies"},
}
COMMAND_LINE = ("emu3_vla/cli.py", "emu3_vla/commands/")
NEVER = {"action_tokenizer": {"torch", "transformers"}, "envs": {"torch", "transformers"}}


def _imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, not relative"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _files():
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield room, path.relative_to(ROOT).as_posix(), path


def _within(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)


def test_imports_follow_the_arrows():
    wrong = []
    for room, name, path in _files():
        if name.startswith(COMMAND_LINE):
            continue
        for imported in _imports(path):
            ours = imported.split(".")[0] in ROOMS
            if ours and not _within(imported, ALLOWED[room] | {room}) or imported.split(".")[0] in NEVER.get(room, ()):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_spec_needs_numpy_alone():
    outside = {name.split(".")[0] for name in _imports(ROOT / "envs/spec.py")} - {"numpy", "__future__", "dataclasses"}
    assert not outside


def test_nothing_imports_the_command_line():
    others = [(name, path) for _, name, path in _files() if not name.startswith(COMMAND_LINE)]
    wrong = [name for name, path in others if any(_within(imported, {"emu3_vla.commands"}) for imported in _imports(path))]
    assert not wrong


def test_packages_import_without_simulator_or_torch():
    """Importing does no work: neither PyBullet nor torch is loaded by the rooms' fronts."""
    code = (
        "import sys, envs, envs.calvin, envs.calvin.tasks, envs.calvin.language, policies, policies.base, action_tokenizer, eval; "
        "loaded = {'torch', 'pybullet', 'transformers'} & set(sys.modules); assert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
