"""tools/doctor.py: what runs on this machine, why, and how exact it is."""

from __future__ import annotations

import json

import torch

from megatron_ttl.config.kernels import KernelsConfig


def test_the_tool_runs_anywhere(repository, call_tool):
    """Without a GPU too: a table for people, one object for programs, status 0."""
    command = ("doctor.py", "--deepspeed_config", repository / "configs" / "a100_single.json")
    (code, text, _), (code_too, as_json, _) = call_tool(*command), call_tool(*command, "--json")
    found = json.loads(as_json)
    assert code == code_too == 0
    assert [row["operation"] for row in found["operations"]] == list(KernelsConfig.model_fields)
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["deepspeed"] != "absent"
    for row in found["operations"]:
        assert row["operation"] in text and row["why"] in text
    code, _, told = call_tool("doctor.py", "--deepspeed_config", repository / "configs" / "none.json")
    assert code == 2 and "none.json" in told
