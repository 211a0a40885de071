"""The staircase: imports go down only, one door for each large dependency, nothing that runs a stranger's code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = {"train": 4, "evaluate": 4, "generate": 4, "plan": 4, "checkpoint": 3, "parallel": 2, "model": 1, "data": 1,
          "tokenizer": 1, "kernels": 0, "config": 0, "runtime": 0, "errors": 0, "files": 0, "console": 0}
ANYWHERE = {"testing"}  # imported by tests alone; may import all
SAME_FLOOR = {("train", "evaluate"), ("evaluate", "generate"), ("plan", "train"), ("data", "tokenizer"),
              ("config", "errors"), ("config", "console"), ("files", "errors"), ("console", "errors"),
              ("runtime", "errors"), ("config", "files"), ("model", "config")}
DOORS = {"deepspeed": {"parallel/door.py"}, "wandb": {"train/tracking.py"}, "codecarbon": {"train/energy.py"},
         "transformers": {"checkpoint/hf.py"}, "sentencepiece": {"tokenizer/tokenizer.py", "tokenizer/train.py"},
         "megatron": set(), "torch": None}
TORCHLESS = ("config/", "plan/", "errors.py", "files.py", "console.py")
FORBIDDEN_NAMES = {"utils", "helpers", "misc", "common"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
FORBIDDEN_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}
LINES = {"file": 400, "function": 80, "tool": 60, "fields": 80}


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def staircase_faults(root: Path) -> list[str]:
    """Return upward imports, unlisted imports on one floor, second doors, and torch where none may be."""
    faults = []
    for path in python_files(root, "megatron_ttl"):
        place = path.relative_to(root / "megatron_ttl")
        part = place.parts[0].removesuffix(".py")
        if part in ANYWHERE or part == "__init__":
            continue
        if part not in FLOORS:
            faults.append(f"{place}: {part} has no floor")
            continue
        for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            top, *rest = name.split(".")
            if top == "megatron_ttl":
                other = rest[0] if rest else "errors"
                if other in ANYWHERE or FLOORS.get(other, 9) > FLOORS[part]:
                    faults.append(f"{place}: imports {name}, which is above it")
                elif other != part and FLOORS[other] == FLOORS[part] and (part, other) not in SAME_FLOOR:
                    faults.append(f"{place}: imports {name} on its own floor")
            elif top in DOORS and DOORS[top] is not None and str(place) not in DOORS[top]:
                faults.append(f"{place}: a second door to {top}")
            elif top == "torch" and str(place).startswith(TORCHLESS):
                faults.append(f"{place}: imports torch, and must be quick")
    return faults


def circle_faults(pairs: set[tuple[str, str]]) -> list[str]:
    """Return pairs that import each other, directly or around."""
    reach = {a: {b for x, b in pairs if x == a} for a, _ in pairs}
    for _ in reach:
        reach = {a: bs | {c for b in bs for c in reach.get(b, ())} for a, bs in reach.items()}
    return [f"{a} imports itself in a circle" for a, bs in reach.items() if a in bs]


def size_faults(root: Path) -> list[str]:
    """Return files, functions and tools that are too long, and names that say nothing."""
    faults = []
    for path in [*python_files(root, "megatron_ttl", "tools", "examples", "tests"), *root.glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        place, length = path.relative_to(root), len(text.splitlines())
        limit = LINES["tool"] if place.parts[0] == "tools" or place.name == "pretrain_ttl.py" else LINES["file"]
        if length > limit:
            faults.append(f"{place}: {length} lines, more than {limit}")
        if FORBIDDEN_NAMES & set(place.with_suffix("").parts):
            faults.append(f"{place}: a name that says nothing")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if node.end_lineno - node.lineno + 1 > LINES["function"]:
                    faults.append(f"{place}: {node.name} is longer than {LINES['function']} lines")
    return faults


def danger_faults(root: Path) -> list[str]:
    """Return calls that could run what a stranger wrote."""
    faults = []
    for path in [*python_files(root, "megatron_ttl", "tools", "examples"), *root.glob("*.py")]:
        place = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        faults += [f"{place}: imports {name}" for name in imports(tree) if name.split(".")[0] in FORBIDDEN_MODULES]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func) in FORBIDDEN_CALLS:
                faults.append(f"{place}: calls {ast.unparse(node.func)}")
            faults += [f"{place}: passes {keyword.arg}" for keyword in node.keywords
                       if keyword.arg in FORBIDDEN_KEYWORDS and getattr(keyword.value, "value", True) is not False]
    return faults


def environment_faults(root: Path) -> list[str]:
    """Return readers of the environment other than runtime.py, and ones that only set it."""
    allowed = {"runtime.py", "parallel/door.py"}
    faults = []
    for path in python_files(root, "megatron_ttl"):
        place = path.relative_to(root / "megatron_ttl")
        text = path.read_text(encoding="utf-8")
        if str(place) not in allowed and ("os.environ" in text or "os.getenv" in text):
            faults.append(f"{place}: reads or sets the environment")
    return faults


def test_the_staircase(repository):
    """Imports, doors, sizes, dangers: nothing to say of the tree as it is."""
    assert staircase_faults(repository) == []
    assert circle_faults(SAME_FLOOR) == []
    assert size_faults(repository) == []
    assert danger_faults(repository) == []
    assert environment_faults(repository) == []


def test_the_run_file_stays_small():
    """Eighty settings at most: each one more is a decision for every user."""
    from megatron_ttl.config.describe import leaf_keys
    from megatron_ttl.config.schema import RunFile

    assert len(leaf_keys(RunFile)) <= LINES["fields"]


@pytest.mark.parametrize(("file", "text", "check", "fault"), [
    ("megatron_ttl/model/a.py", "from megatron_ttl.train.loop import x", staircase_faults, "above it"),
    ("megatron_ttl/model/a.py", "def f():\n    import megatron_ttl.data.order", staircase_faults, "own floor"),
    ("megatron_ttl/data/a.py", "from megatron_ttl.model.llama import x", staircase_faults, "own floor"),
    ("megatron_ttl/train/a.py", "import deepspeed.ops", staircase_faults, "second door to deepspeed"),
    ("megatron_ttl/generate/a.py", "def f():\n    import transformers", staircase_faults, "second door"),
    ("megatron_ttl/train/a.py", "from megatron_ttl.testing import x", staircase_faults, "above it"),
    ("megatron_ttl/config/a.py", "import torch", staircase_faults, "must be quick"),
    ("megatron_ttl/attic/a.py", "x = 1", staircase_faults, "no floor"),
    ("megatron_ttl/train/utils.py", "x = 1", size_faults, "says nothing"),
    ("megatron_ttl/train/a.py", "x = 1\n" * 401, size_faults, "more than 400"),
    ("tools/a.py", "x = 1\n" * 61, size_faults, "more than 60"),
    ("megatron_ttl/train/a.py", "def f():\n" + "    x = 1\n" * 80, size_faults, "longer than 80"),
    ("megatron_ttl/train/a.py", "import pickle", danger_faults, "imports pickle"),
    ("tools/a.py", "import torch\ntorch.load('x')", danger_faults, "calls torch.load"),
    ("tools/a.py", "eval('1')", danger_faults, "calls eval"),
    ("examples/a.py", "f(shell=True)", danger_faults, "passes shell"),
    ("tools/a.py", "f(trust_remote_code=True)", danger_faults, "passes trust_remote_code"),
    ("megatron_ttl/train/a.py", "import os\nos.environ['X']", environment_faults, "environment"),
])
def test_a_planted_violation_is_found(tmp_path, file, text, check, fault):
    """Each rule is seen to fail once."""
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    found = check(tmp_path)
    assert len(found) == 1 and fault in found[0], found


def test_a_circle_is_found():
    """Two parts of one floor that import each other."""
    assert circle_faults({("a", "b"), ("b", "c"), ("c", "a")})
