"""The house keeps its rules; and each rule, shown a violation, sees it."""

from __future__ import annotations

from pathlib import Path

import architecture_rules as rules
import pytest


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(repository, rule):
    assert rule(repository) == []


def test_the_rules_look_at_something(repository):
    parsed = {source.unit: source for source in rules.sources(repository, tests=True)}
    assert {"train", "data", "model", "config", "kernels", "parallel", "tools", "pretrain_ttl",
            "tests"} <= set(parsed)
    edges = {(source.unit, imported.name.split(".")[1]) for source in rules.sources(repository)
             for imported in rules.imports(source) if imported.name.startswith("megatron_ttl.")}
    assert {("model", "kernels"), ("train", "checkpoint"), ("data", "tokenizer"), ("tools", "data")} <= edges


def plant(root: Path, path: str, text: str) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return root


UP, DOOR, CALL, NAME = rules.upward_imports, rules.second_doors, rules.forbidden_calls, rules.forbidden_names
ENVIRONMENT, LONG = rules.second_environment_readers, rules.too_long
LAYOUT = rules.layouts_in_the_model
PLANTED = [
    # upward
    (UP, "megatron_ttl/model/a.py", "import megatron_ttl.train.loop\n", "a floor above"),
    (UP, "megatron_ttl/checkpoint/a.py", "from megatron_ttl.evaluate import x\n", "a floor above"),
    (UP, "megatron_ttl/errors.py", "from megatron_ttl import data\n", "a floor above"),
    (UP, "megatron_ttl/kernels/a.py", "def f():\n    from ..model import llama\n", "a floor above"),
    (UP, "megatron_ttl/kernels/__init__.py", "from ..parallel.mesh import x\n", "a floor above"),
    (UP, "megatron_ttl/data/a.py",
     "import importlib\nimportlib.import_module('megatron_ttl.checkpoint')\n", "a floor above"),
    (UP, "megatron_ttl/__init__.py", "from megatron_ttl.errors import x\n", "a floor above"),
    (UP, "megatron_ttl/train/a.py", "import megatron_ttl.testing\n", "a floor above"),
    (UP, "tools/a.py", "from megatron_ttl.testing import x\n", "a floor above"),
    (UP, "megatron_ttl/data/a.py", "import megatron_ttl.model.llama\n", "kept apart"),
    (UP, "megatron_ttl/model/a.py", "import megatron_ttl.tokenizer\n", "kept apart"),
    (UP, "megatron_ttl/tokenizer/a.py", "from megatron_ttl.data import x\n", "kept apart"),
    (UP, "megatron_ttl/config/a.py", "from megatron_ttl import kernels\n", "kept apart"),
    (UP, "megatron_ttl/train/a.py", "import tools.evaluate\n", "stands above all"),
    (UP, "megatron_ttl/train/a.py", "import tests.conftest\n", "stands above all"),
    (UP, "megatron_ttl/attic/a.py", "", "'attic' has no floor"),
    # doors
    (DOOR, "megatron_ttl/train/loop.py", "import deepspeed\n", "imports deepspeed; its door is"),
    (DOOR, "megatron_ttl/data/a.py", "def f():\n    import deepspeed.comm as c\n", "imports deepspeed"),
    (DOOR, "megatron_ttl/train/loop.py", "from megatron_ttl.parallel.door import deepspeed\n",
     "imports deepspeed"),
    (DOOR, "pretrain_ttl.py", "from deepspeed import initialize\n", "imports deepspeed"),
    (DOOR, "tools/a.py", "def f():\n    import transformers\n", "imports transformers"),
    (DOOR, "megatron_ttl/train/metrics.py", "def f():\n    import wandb\n", "imports wandb"),
    (DOOR, "megatron_ttl/plan/a.py", "def f():\n    __import__('codecarbon')\n", "imports codecarbon"),
    (DOOR, "examples/a.py", "import sentencepiece\n", "imports sentencepiece"),
    (DOOR, "megatron_ttl/model/a.py", "from megatron.core import x\n", "its door is the tests"),
    (DOOR, "megatron_ttl/train/tracking.py", "import wandb\n", "at the top"),
    (DOOR, "megatron_ttl/checkpoint/hf.py", "from transformers import x\n", "at the top"),
    (DOOR, "megatron_ttl/config/a.py", "def f():\n    import torch.nn\n", "must work without it"),
    # forbidden calls
    (CALL, "megatron_ttl/data/a.py", "import pickle\n", "imports pickle"),
    (CALL, "tests/test_a.py", "def f():\n    from pickle import loads\n", "imports pickle.loads"),
    (CALL, "tools/a.py", "import torch\ntorch.load('x')\n", "uses torch.load"),
    (CALL, "tools/a.py", "from torch import save as keep\nkeep({}, 'x')\n", "uses torch.save"),
    (CALL, "pretrain_ttl.py", "eval('1')\n", "uses eval"),
    (CALL, "examples/a.py", "exec('1')\n", "uses exec"),
    (CALL, "tests/test_a.py", "import os\nos.system('ls')\n", "uses os.system"),
    (CALL, "megatron_ttl/a.py", "import yaml as y\ny.load('x')\n", "uses yaml.load"),
    (CALL, "tests/test_a.py", "import subprocess\nsubprocess.run('ls', shell=True)\n", "shell"),
    (CALL, "megatron_ttl/a.py", "import numpy as n\nn.load('x', allow_pickle=True)\n",
     "allow_pickle"),
    (CALL, "megatron_ttl/a.py", "def f(m, t):\n    m.load('x', trust_remote_code=t)\n",
     "trust_remote_code"),
    (CALL, "setup.py", "import _pickle as p\n", "imports _pickle"),
    (CALL, "tools/a.py", "import marshal\n", "imports marshal"),
    (CALL, "megatron_ttl/a.py", "import dill\n", "imports dill"),
    (CALL, "megatron_ttl/a.py", "def f():\n    import joblib\n", "imports joblib"),
    (CALL, "megatron_ttl/a.py", "import cloudpickle as c\n", "imports cloudpickle"),
    (CALL, "megatron_ttl/a.py", "import shelve\n", "imports shelve"),
    (CALL, "megatron_ttl/a.py", "import importlib\nimportlib.import_module('pickle')\n", "imports pickle"),
    (CALL, "megatron_ttl/a.py", "__import__('pickle')\n", "imports pickle"),
    (CALL, "pretrain_ttl.py", "compile('1', 'a', 'exec')\n", "uses compile"),
    (CALL, "pretrain_ttl.py", "f = eval\n", "uses eval"),
    (CALL, "tools/a.py", "import builtins\nbuiltins.exec('1')\n", "uses exec"),
    (CALL, "tools/a.py", "import os\nos.popen('ls')\n", "uses os.popen"),
    (CALL, "tools/a.py", "import os\nos.execvp('ls', ['ls'])\n", "uses os.execvp"),
    (CALL, "tools/a.py", "import os\nrun = os.system\n", "uses os.system"),
    (CALL, "tools/a.py", "import os\ngetattr(os, 'system')('ls')\n", "reaches os.system by its name"),
    (CALL, "tools/a.py", "import subprocess as s\ns.getoutput('ls')\n", "uses subprocess.getoutput"),
    (CALL, "tools/a.py", "import subprocess as s\ns.run('ls', **{'shell': True})\n", "shell is not False"),
    (CALL, "tools/a.py", "import torch\ntorch.jit.load('x')\n", "uses torch.jit.load"),
    (CALL, "tools/a.py", "import torch\ntorch.load('x', weights_only=True)\n", "uses torch.load"),
    (CALL, "megatron_ttl/checkpoint/foreign_child.py", "import torch\ntorch.load('x', weights_only=False)\n",
     "without weights_only=True"),
    (CALL, "megatron_ttl/checkpoint/foreign_child.py", "import torch\ntorch.load('x')\n", "without weights_only=True"),
    (CALL, "megatron_ttl/checkpoint/foreign_child.py", "import pickle\n", "imports pickle"),
    (CALL, "megatron_ttl/checkpoint/foreign_child.py", "import os\nos.execve('ls', [], {})\n", "uses os.execve"),
    (CALL, "megatron_ttl/jail.py", "import os\nos.execvp('ls', [])\n", "uses os.execvp"),
    (CALL, "megatron_ttl/a.py", "def f(pandas):\n    pandas.read_pickle('x')\n", "calls read_pickle"),
    (CALL, "megatron_ttl/a.py", "import yaml\nyaml.full_load('x')\n", "uses yaml.full_load"),
    (CALL, "megatron_ttl/a.py", "def f(t):\n    t.apply_chat_template([])\n", "calls apply_chat_template"),
    (CALL, "megatron_ttl/a.py", "def f(d):\n    d.all_gather_object([], 1)\n", "calls all_gather_object"),
    (CALL, "megatron_ttl/a.py", "import numpy\nnumpy.load('x', None, allow_pickle=1)\n", "allow_pickle"),
    (CALL, "megatron_ttl/a.py", "N = 0\ndef f():\n    global N\n    N = 1\n", "changes: N"),
    # names, environment
    (NAME, "megatron_ttl/data/utils.py", "", "says nothing"),
    (NAME, "megatron_ttl/common/order.py", "", "says nothing"),
    (NAME, "tests/helpers.py", "", "says nothing"),
    (ENVIRONMENT, "megatron_ttl/train/a.py", "import os\nX = os.environ['X']\n", "reads"),
    (ENVIRONMENT, "megatron_ttl/data/a.py", "from os import getenv as g\ng('X')\n", "reads"),
    (LAYOUT, "megatron_ttl/model/a.py", "def f(x, tensor_parallel):\n    return x\n", "the model knows no layout"),
    (LAYOUT, "megatron_ttl/kernels/a.py", "# the same on every rank\n", "speaks of 'rank'"),
    (LAYOUT, "megatron_ttl/train/a.py", "import torch.distributed as dist\n", "its place is parallel/"),
    # lengths
    (LONG, "megatron_ttl/data/a.py", "x = 1\n" * 401, "401 lines; the limit is 400"),
    (LONG, "tests/test_a.py", "x = 1\n" * 401, "401 lines; the limit is 400"),
    (LONG, "tools/a.py", "x = 1\n" * 61, "61 lines; the limit is 60"),
    (LONG, "examples/a.py", "def f():\n" + "    x = 1\n" * 80, "f has 81 lines; the limit is 80"),
    (LONG, "megatron_ttl/config/schema.py", "class A:\n" + "    x: int = 1\n" * 81, "81 fields"),
]


@pytest.mark.parametrize(("rule", "path", "text", "message"), PLANTED,
                         ids=[f"{rule.__name__}-{number}" for number, (rule, *_) in enumerate(PLANTED)])
def test_a_planted_violation_is_seen(tmp_path, rule, path, text, message):
    faults = rule(plant(tmp_path, path, text))
    assert len(faults) == 1
    assert faults[0].startswith(path.split("/")[0])
    assert message in faults[0]


INNOCENT = [
    ("megatron_ttl/train/a.py", "from megatron_ttl.model import llama\nimport megatron_ttl.plan.forecast\n"),
    ("megatron_ttl/data/a.py", "from megatron_ttl.tokenizer import tokenizer\nimport megatron_ttl\n"),
    ("megatron_ttl/data/d.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import e\n"),
    ("megatron_ttl/data/e.py", "import megatron_ttl.data.d\n"),
    ("megatron_ttl/checkpoint/hf.py", "def f(model):\n    import transformers\n    model.eval()\n"),
    ("megatron_ttl/parallel/a.py", "import torch.distributed as dist  # parallel\n"),
    ("megatron_ttl/train/deepspeed_drive.py", "from megatron_ttl.parallel.door import deepspeed\nimport torch\n"),
    ("megatron_ttl/runtime.py", "import os\nX = os.environ.get('RANK')\n"),
    ("megatron_ttl/data/b.py", "import numpy\nnumpy.load('x', allow_pickle=False)\n"),
    ("megatron_ttl/checkpoint/foreign_child.py", "import torch\ntorch.load('x', weights_only=True)\n"),
    ("tests/reliability/hostile_files.py", "import pickle\npickle.loads(b'')\n"),
    ("megatron_ttl/train/c.py", "import re, torch\nre.compile('a')\ntorch.compile(len)\n"),
    ("megatron_ttl/config/c.py", "class A:\n    compile: bool = False\n"),
    ("megatron_ttl/data/c.py", "x = 1\n" * 400),
    ("tools/a.py", "from megatron_ttl.evaluate.perplexity import x\n" + "x = 1\n" * 59),
    ("tests/test_a.py", "import wandb, transformers, deepspeed, megatron.core\n" + "x = 1\n" * 399),
    ("megatron_ttl/config/schema.py", "class A:\n    model_config = 1\n" + "    x: int = 1\n" * 80),
]


def test_what_is_allowed_is_not_reported(tmp_path):
    for path, text in INNOCENT:
        plant(tmp_path, path, text)
    assert [fault for rule in rules.RULES for fault in rule(tmp_path)] == []


def test_a_circle_of_units_is_seen(tmp_path):
    plant(tmp_path, "megatron_ttl/train/loop.py", "from megatron_ttl.evaluate.perplexity import x\n")
    plant(tmp_path, "megatron_ttl/evaluate/perplexity.py",
          "def f():\n    from megatron_ttl.plan import forecast\n")
    plant(tmp_path, "megatron_ttl/plan/__init__.py", "")
    plant(tmp_path, "megatron_ttl/plan/forecast.py", "from megatron_ttl.train.loop import x\n")
    assert rules.circles(tmp_path) == ["circle: evaluate -> plan -> train -> evaluate"]


def test_a_circle_of_modules_is_seen(tmp_path):
    plant(tmp_path, "megatron_ttl/data/order.py", "from megatron_ttl.data.sampler import x\n")
    plant(tmp_path, "megatron_ttl/data/sampler.py", "def f():\n    from . import order\n")
    assert rules.circles(tmp_path) == ["circle: megatron_ttl.data.order -> megatron_ttl.data.sampler -> "
                                       "megatron_ttl.data.order"]


def test_a_line_of_modules_is_no_circle(tmp_path):
    plant(tmp_path, "megatron_ttl/data/__init__.py", "from megatron_ttl.data.a import x\n")
    plant(tmp_path, "megatron_ttl/data/a.py", "from . import b\nfrom megatron_ttl.data.c import x\n")
    plant(tmp_path, "megatron_ttl/data/b.py", "from megatron_ttl.data.c import x\n")
    plant(tmp_path, "megatron_ttl/data/c.py", "from megatron_ttl.errors import x\n")
    plant(tmp_path, "megatron_ttl/errors.py", "")
    assert rules.circles(tmp_path) == []
