"""Rules of the structure that import-linter cannot state, and the command line's start-up time."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import softrl

PACKAGE = Path(softrl.__file__).parent
MAX_LINES = 420


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_private_names_of_trl_are_only_in_the_bridge():
    private = {
        str(path.relative_to(PACKAGE)): name
        for path in PACKAGE.rglob("*.py")
        for name in imported_modules(path)
        if name.startswith("trl.")
        and any(part.startswith("_") or part in ("trainer", "models") for part in name.split("."))
    }
    assert set(private) == {"trainers/_bridge.py"}


def test_no_file_outgrows_one_question():
    long = {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_help_answers_without_torch():
    code = "import sys, softrl.cli; softrl.cli.main(['--version']); assert 'torch' not in sys.modules, 'torch'"
    started = time.perf_counter()
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert softrl.__version__ in finished.stdout
    assert time.perf_counter() - started < 5.0


def test_core_rooms_import_without_trl():
    rooms = "tokens.relaxation models.policy rollouts.soft rewards.base estimators.pathwise objectives.token_terms"
    code = f"import sys\nfor room in '{rooms}'.split(): __import__('softrl.' + room)\nassert 'trl' not in sys.modules"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_nothing_from_outside_is_loaded_in_a_way_that_runs_code():
    """Pickles only by restricted readers, YAML by the safe loader, no remote code, no archive unpacked whole."""
    allowed = {("_keras_files.py", "pickle.Unpickler")}  # the base of a reader that admits four names
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load"):
                    found.add((path.name, name))
            if isinstance(node, ast.Attribute) and node.attr in ("extractall", "read_pickle"):
                found.add((path.name, node.attr))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if settings.get("weights_only") != "True":
                    found.add((path.name, "torch.load"))
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                found.add((path.name, node.arg))
    assert found == allowed
