"""The libraries that open files are never older than the releases that mended a hole."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest

# package -> (first release without the holes, which)
FLOORS = {
    "torch": ((2, 10, 0), "CVE-2025-32434 (2.6.0), CVE-2026-24747 (2.10.0): weights_only"),
    "transformers": ((5, 3, 0), "CVE-2024-3568, CVE-2026-1839, CVE-2026-5241, CVE-2026-4372: a config that loads code"),
    "safetensors": ((0, 4, 0), "releases after its security audit of 2023"),
    "sentencepiece": ((0, 2, 1), "CVE-2026-1260: a model file that writes beyond its memory"),
    "numpy": ((2, 0, 0), "allow_pickle is false since 1.16.3 (CVE-2019-6446)"),
}
AT_LEAST_INSTALLED = {"Jinja2": ((3, 1, 6), "CVE-2025-27516: out of the sandbox"),
                      "requests": ((2, 32, 4), "CVE-2024-47081: passwords of .netrc"),
                      "urllib3": ((2, 6, 0), "CVE-2025-66471: bombs of packed answers"),
                      "protobuf": ((6, 31, 1), "CVE-2025-4565: recursion"),
                      "pyarrow": ((14, 0, 1), "CVE-2023-47248: code in files")}


def numbers(version: str) -> tuple[int, ...]:
    found = [int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split(".")]
    return tuple((found + [0, 0])[:3])


def declared(text: str) -> dict[str, tuple[int, ...]]:
    requirements = tomllib.loads(text)["project"]["dependencies"]
    return {match[1]: numbers(match[2]) for line in requirements if (match := re.match(r"([\w.-]+)>=([\d.]+)", line))}


def pinned(text: str) -> dict[str, tuple[int, ...]]:
    return {match[1].lower(): numbers(match[2]) for match in re.finditer(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}


def too_old(found: dict[str, tuple[int, ...]], floors: dict[str, tuple[tuple[int, ...], str]]) -> list[str]:
    """Return what is missing or older than its floor."""
    return [f"{name}: {found.get(name)}, at least {floor}: {why}" for name, (floor, why) in floors.items()
            if found.get(name, (0,)) < floor]


def test_pyproject_asks_for_mended_releases(repository):
    """Whoever installs without our pins is safe too."""
    assert too_old(declared((repository / "pyproject.toml").read_text()), FLOORS) == []


def test_constraints_and_the_environment_are_mended(repository):
    """What `make install` installs, and what is here."""
    pins = pinned((repository / "constraints.txt").read_text())
    wanted = {name.lower(): floor for name, floor in (FLOORS | AT_LEAST_INSTALLED).items()}
    assert too_old(pins, wanted) == []
    assert too_old({name: numbers(importlib.metadata.version(name)) for name in FLOORS}, FLOORS) == []


@pytest.mark.parametrize(("name", "version"), [("torch", "2.9.1"), ("transformers", "5.2.0"), ("torch", "2.5.1")])
def test_an_old_release_is_seen(name, version):
    """A floor that somebody lowers, or takes away."""
    text = f'[project]\ndependencies = ["{name}>={version}"]\n'
    assert any(fault.startswith(f"{name}: {numbers(version)}") for fault in too_old(declared(text), FLOORS))
    assert len(too_old(declared('[project]\ndependencies = ["torch"]\n'), FLOORS)) == len(FLOORS)
