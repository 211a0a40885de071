"""Keys and passwords stay where they were given: none comes into a run folder, an export, a log or a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_session import write_data, write_settings

from megatron_ttl.checkpoint.hf import export_run
from megatron_ttl.config.credentials import credential_faults
from megatron_ttl.config.load import load_settings, read_settings
from megatron_ttl.errors import ConfigError

CANARY = "CanaryThatSingsWhenItIsCopied"
ENVIRONMENT = {name: f"{CANARY}{number:011d}" for number, name in enumerate((
    "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID",
    "OPENAI_API_KEY", "GITHUB_TOKEN", "CODECARBON_API_KEY", "SSH_AUTH_SOCK_SECRET", "DATABASE_PASSWORD",
    "MY_PRIVATE_VARIABLE"))}

LOOK_LIKE_SECRETS = {
    "hugging face": "hf_" + "a1B2" * 9, "wandb by name": 'wandb_api_key = "' + "0a1b2c3d" * 5 + '"',
    "wandb v1": "wandb_v1_" + "Ab1" * 20, "openai": "sk-proj-" + "a1B2" * 9, "github": "ghp_" + "a1B2" * 9,
    "github fine": "github_pat_" + "a1B2" * 9, "gitlab": "glpat-" + "a1B2" * 5, "aws": "AKIA" + "ABCD1234" * 2,
    "google": "AIza" + "a1B2_" * 7, "slack": "xoxb-1234567890-abc", "key file": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "address": "https://user:passw0rd@example.org/data", "password": "password = hunter2hunter2",
    "json": '"token": "a1b2c3d4e5"',
    "environment": "HF_TOKEN=a1b2c3d4e5f6", "secret": "client_secret: a1b2c3d4e5f6",
}


def where_it_lies(folder: Path, *texts: str) -> list[str]:
    """Return every file and text that holds the canary."""
    found = [str(path) for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    return found + [text for text in texts if CANARY in text]


@pytest.mark.slow
@pytest.mark.parametrize("mirror", ["disabled", pytest.param("offline", marks=pytest.mark.long)])
def test_the_environment_goes_nowhere(tmp_path, repository, mirror):
    """A run that saves, evaluates and then crashes with a traceback, and an export: no value of the environment."""
    machine, run = write_settings(tmp_path, write_data(tmp_path / "data"), tmp_path / "run")
    crashing = repository / "tests" / "reliability" / "planted_fault.py"
    done = subprocess.run(
        [sys.executable, str(crashing), "step", "0", "raise", str(tmp_path / "told"), "--deepspeed_config", str(machine), "--config", str(run),
         "checkpoint.every_steps=1", "evaluation.every_steps=1", f"log.wandb={mirror}"], cwd=tmp_path, text=True,
        capture_output=True, timeout=300, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 1 and "ZeroDivisionError: planted" in done.stderr, done.stderr
    export_run(tmp_path / "run", tmp_path / "export", verify=False)
    assert len(list((tmp_path / "run").rglob("*"))) > 8 and (tmp_path / "export" / "megatron_ttl.json").exists()
    assert where_it_lies(tmp_path, done.stdout, done.stderr) == []


def test_the_canary_would_be_found(tmp_path):
    """In a file, and in a text."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(b"\x00" + CANARY.encode())
    assert where_it_lies(tmp_path, "quiet", f"a {CANARY}") == [str(tmp_path / "a" / "b.bin"), f"a {CANARY}"]


@pytest.mark.parametrize("place", ["run file", "comment", "machine", "override", "unknown override"])
@pytest.mark.parametrize("kind", LOOK_LIKE_SECRETS)
def test_settings_with_secrets_are_refused_and_not_repeated(tmp_path, kind, place):
    """Settings are copied into the run folder: what looks like a key is refused, with its line and without itself."""
    secret = LOOK_LIKE_SECRETS[kind]
    machine, run = write_settings(tmp_path, tmp_path, tmp_path / "run")
    overrides = []
    if place == "run file":
        run.write_text(run.read_text().replace("[model]", f"note = '{secret}'\n[model]"))
    elif place == "comment":
        run.write_text(run.read_text() + f"# {secret}\n")
    elif place == "machine":
        machine.write_text('{"_comment": "%s"}' % secret.replace('"', "'"))
    else:
        overrides = [f"{'run.dir' if place == 'override' else 'x.y'}={secret}"]
    faults = read_settings(machine, run, overrides).faults
    assert len(faults) == 1 and "holds what looks like a key or a password" in faults[0]
    assert secret.strip('"').split("=")[-1].strip(' "') not in faults[0] and not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r":\d+: holds what looks like a key"):
        load_settings(machine, run, overrides)


def test_the_settings_of_the_project_hold_none(repository):
    """No false alarm: everything under configs/ and examples/, and words that only resemble."""
    texts = [path.read_text(encoding="utf-8") for folder in ("configs", "examples")
             for path in (repository / folder).rglob("*") if path.suffix in (".toml", ".json", ".sbatch", ".sh")]
    assert len(texts) > 10
    innocent = ["tokens_per_step = 1_000_000", "max_tokens = 100000000", "dir = 'runs/token_efficiency_study'",
                "prefix = 'https://example.org/data'", "# the key/value heads: num_key_value_heads = 12345678",
                "commit = '" + "0a1b2c3d" * 5 + "'", "prefix = 'data/sk-short'"]
    assert [fault for text in texts + innocent for fault in credential_faults(text, "x")] == []
