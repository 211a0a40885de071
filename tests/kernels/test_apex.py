"""The door to NVIDIA Apex: recognised, told from the other package of that name, and called as it wants to be."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from megatron_ttl.errors import ConfigError
from megatron_ttl.kernels.apex import apex_adam, apex_refusal, installed_apex
from megatron_ttl.kernels.paths import resolve_paths
from megatron_ttl.kernels.rms_norm import rms_norm

GPU = torch.device("cuda")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return a function that installs files; what is imported from them is forgotten at the end."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def install(version, files):
        written = {f"apex-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: apex\nVersion: {version}\n", **files}
        for name, text in written.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()

    yield install
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("apex", "amp_C", "fused_layer_norm_cuda"):
            del sys.modules[name]


NVIDIAS = {
    "apex/__init__.py": "", "apex/normalization/__init__.py": "", "amp_C.py": "def multi_tensor_adam_capturable(): pass\n",
    "apex/normalization/fused_layer_norm.py":
        "def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):\n"
        "    return input * 0 + eps + normalized_shape[0]\n",
}
"""The folders and names of NVIDIA's package."""


def test_absent():
    """Not there: how to get it."""
    if installed_apex() is None:
        assert "NVIDIA Apex is not installed; build it from github.com/NVIDIA/apex" in apex_refusal("rms_norm", GPU)


def test_the_other_apex_is_named(packages):
    """PyPI's package fails on import; it is recognised without one."""
    packages("0.9.10.dev0", {"apex/__init__.py": "raise ImportError('UnencryptedCookieSessionFactoryConfig')"})
    assert installed_apex() == "the Pyramid toolkit of PyPI, 0.9.10.dev0"
    with pytest.raises(ConfigError, match=r"kernels.adamw: .*is the Pyramid toolkit of PyPI, 0.9.10.dev0, not NVIDIA's; pip "
                                          "uninstall apex"):
        resolve_paths({"adamw": "apex"}, torch.device("cpu"))
    assert "apex" not in sys.modules


def test_nvidias_without_its_extensions(packages):
    """Installed from its Python files alone, it would be slow or fail."""
    packages("0.1", NVIDIAS)
    assert installed_apex() == "NVIDIA Apex 0.1"
    assert "was built without its extension fused_layer_norm_cuda" in apex_refusal("rms_norm", GPU)
    assert apex_refusal("adamw", GPU) is None
    assert apex_refusal("adamw", torch.device("cpu")) == "NVIDIA Apex 0.1 computes on a GPU and not on cpu"


def test_nvidias_is_called(packages):
    """The norm with its arguments in their places; the optimizer's kernel."""
    packages("0.1", {**NVIDIAS, "fused_layer_norm_cuda.py": ""})
    assert apex_refusal("rms_norm", GPU) is None
    others = dict.fromkeys(("rotary", "swiglu", "cross_entropy"), "torch")
    assert resolve_paths({**others, "rms_norm": "apex", "adamw": "apex"}, GPU).paths.rms_norm == "apex"
    assert torch.equal(rms_norm(torch.ones(2, 8), torch.ones(8), 0.5, path="apex"), torch.full((2, 8), 8.5))
    assert apex_adam().__module__ == "amp_C"
