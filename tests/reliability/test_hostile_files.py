"""Nothing that is opened runs code: pickles, templates, tags and programs in the place of every file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile_files
import pytest
from strangers import ENTRIES, Place, branch, export, identifier, open_model, put

from megatron_ttl.errors import CheckpointError, DataError, UserError
from megatron_ttl.evaluate.perplexity import perplexity_report
from megatron_ttl.generate.generate import continue_prompt
from megatron_ttl.generate.open_folder import open_model_folder
from megatron_ttl.generate.sampling import choose_sampling


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "CANARY"


def payloads_of(canary: Path) -> dict[str, bytes]:
    return hostile_files.pickled(canary) | hostile_files.written(canary)


def test_there_are_enough_payloads(canary):
    """At least sixty, all different."""
    payloads = payloads_of(canary)
    assert len(payloads) >= 60 and len(set(payloads.values())) == len(payloads)
    assert not canary.exists()


@pytest.mark.parametrize(("name", "kind"), [
    ("pickle-mkdir-protocol0", "pickle"), ("pickle-system-protocol2", "pickle"), ("pickle-exec-protocol4", "pickle"),
    ("pickle-eval-protocol0", "pickle"), ("pickle-popen-protocol4", "pickle"), ("pickle-mkdir-protocol5", "pickle"),
    ("pickle-by-hand", "pickle"), ("pickle-inst", "pickle"), ("pickle-stack-global", "pickle"), ("torch-zip", "torch"),
    ("torch-legacy", "torch"), ("torch-metadata", "torch"), ("torch-pickle-swapped", "torch"),
    ("numpy-object-array", "numpy"),
])
def test_the_canary_sings(canary, name, kind):
    """A careless reader is caught: what follows would see it."""
    payload = payloads_of(canary)[name]
    assert not canary.exists()
    try:
        hostile_files.springs(payload, kind)
    except Exception:
        pass  # what comes after the trap does not matter
    assert canary.is_dir()


SHORT = 8  # an eighth of the payloads for each entry point, another eighth for the next one


@pytest.mark.parametrize("every", [SHORT, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("number", range(len(ENTRIES)),
                         ids=[identifier(f"{entry[1]}-{entry[0]}") for entry in ENTRIES])
def test_nothing_runs(place: Place, canary, number, every):
    """Payloads in the place of a file: refused in a sentence or not looked at; nothing is executed."""
    file, entry, call, strict = ENTRIES[number]
    (place.folder / "new.jsonl").write_text('{"text": "uma casa"}\n')
    call(place)  # the good file is taken
    survived = []
    for name, payload in list(payloads_of(canary).items())[number % every :: every]:
        back = put(place, file, payload)
        try:
            call(place)
            survived.append(name)
        except UserError:
            pass
        finally:
            back()
        assert not canary.exists(), f"{name} as {file} was executed by {entry}"
    assert not (strict and survived), f"{entry} took {file} of {survived}"


CONFIGS = {
    "auto_map": {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"},
    "trust_remote_code": True, "_attn_implementation_internal": "evil/kernels",
    "_attn_implementation": "evil/kernels:f", "attn_implementation": "evil/kernels",
    "_attn_implementation_autoset": True, "custom_pipelines": {"x": {"impl": "x.X"}},
    "custom_code": "modeling_x", "code_revision": "main", "_commit_hash": "0", "use_kernels": True,
    "kernel_config": {"RMSNorm": "evil/kernel:Layer"}, "experts_implementation": "evil/x", "_target_": "os.mkdir",
    "__class__": "os", "py/object": "os.system", "peft_type": "LORA", "base_model_name_or_path": "../evil",
    "tokenizer_class": "tokenization_x.X", "processor_class": "X", "sub_configs": {"a": "X"},
    "text_config": {"auto_map": {}},
    "quantization_config": {"quant_method": "custom", "modules": "x"}, "model_type": "evil",
    "architectures": ["EvilForCausalLM"], "rope_scaling": {"rope_type": "evil"}, "hidden_act": "os.system",
    "torch_dtype_module": "os", "transformers_weights": "pytorch_model.bin", "encoder": {"_target_": "os.mkdir"},
    "num_hidden_layers": "__import__('os')", "rope_parameters": {"rope_type": "evil"}, "generation_config": {"x": 1},
    "compression_config": {"x": 1}, "distributed_config": {"plan": "x"},
}


@pytest.mark.parametrize("key", CONFIGS)
def test_a_config_cannot_ask_for_code(place: Place, canary, key):
    """Each key that makes some version of transformers load something, in an otherwise good config.json."""
    hostile_files.beside(place.model, canary)
    config = json.loads((place.model / "config.json").read_text())
    (place.model / "config.json").write_text(json.dumps({**config, key: CONFIGS[key]}))
    with pytest.raises(CheckpointError, match=key):
        open_model(place)
    assert not canary.exists()


TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('%s') }}"
TOKENIZER_SETTINGS = {
    "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "chat_template": TEMPLATE,
    "tokenizer_class": "tokenization_x.X", "tokenizer_file": "/etc/passwd", "custom_code": "x", "_target_": "os.mkdir",
    "additional_special_tokens": [{"__class__": "os"}], "extra_special_tokens": {"x": {"content": "x"}},
    "backend_class": "evil", "name_or_path": "../evil", "bos_token": {"__type": "AddedToken", "content": "<s>"},
}


@pytest.mark.parametrize("key", TOKENIZER_SETTINGS)
def test_an_export_takes_no_setting_that_names_code(place: Place, canary, key):
    """A tokenizer_config.json that travels into an export is plain, or there is no export."""
    path = place.run / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: TOKENIZER_SETTINGS[key]}))
    with pytest.raises(DataError, match=key):
        export(place)
    assert not canary.exists() and not (place.folder / "export").exists()


def test_templates_and_neighbours_are_only_text(place: Place, canary):
    """A model folder full of code and templates is used, and none of it."""
    hostile_files.beside(place.model, canary)
    path = place.model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE % canary}))
    (place.model / "chat_template.jinja").write_text(TEMPLATE % canary)
    (place.model / "generation_config.json").write_text(json.dumps({"custom_generate": "x", "auto_map": {"a": "b"}}))
    opened = open_model_folder(place.model, "cpu")
    continue_prompt(opened, "{{ ''.__class__ }}", 4, choose_sampling(None, None, None, None, False, 1, 4), 1, None)
    assert perplexity_report(place.model, [place.data / "held"], device="cpu")["total"]["tokens"] > 0
    branch(place)
    assert not canary.exists()


COMMANDS = [
    pytest.param("generate.py --model . --prompt x --max-new-tokens 2 --device cpu", marks=pytest.mark.long),
    "preprocess_data.py --input ../new.jsonl --tokenizer ../data/tokenizer --output-prefix out --workers 2",
    pytest.param("evaluate.py --model . --perplexity ../data/held --device cpu", marks=pytest.mark.long),
    pytest.param("inspect_data.py --prefix ../data/train --verify --show 1", marks=pytest.mark.long),
    pytest.param("convert_to_hf.py --run ../run --output converted", marks=pytest.mark.long),
    pytest.param("train_tokenizer.py --input ../new.jsonl --output t --vocab-size 300", marks=pytest.mark.long),
    pytest.param("show_config.py --deepspeed_config ../machine.json --config ../run.toml", marks=pytest.mark.long),
    pytest.param("../pretrain_ttl.py --deepspeed_config ../machine.json --config ../run.toml train.steps=4 "
                 "schedule.warmup_steps=1 run.dir=x", marks=pytest.mark.long),
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_nothing_that_lies_around(place: Place, canary, repository, command):
    """Started inside a folder with sitecustomize.py, json.py, torch.py and their like."""
    (place.folder / "new.jsonl").write_text("".join(json.dumps({"text": f"uma casa {n} à beira do rio"}) + "\n"
                                                    for n in range(200)))
    for folder in (place.model, place.data, place.run):
        hostile_files.beside(folder, canary)
    tool, *arguments = command.split()
    done = subprocess.run([sys.executable, str(repository / "tools" / tool), *arguments], cwd=place.model, text=True,
                          capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": str(repository)})
    assert done.returncode == 0, done.stderr
    assert not canary.exists()
