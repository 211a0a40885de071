"""Find keys and passwords in settings: these are copied into run folders, checkpoints and reports, which travel."""

from __future__ import annotations

import re

_NAMED = re.compile(r"(?i)\b(?:[a-z0-9]+_)*(?:api_?key|access_?key|token|passw(?:or)?d|secret(?:_?key)?)[\"']?"
                    r"\s*[=:]\s*[\"']?[^\s\"',}]{8,}")
_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bwandb_v\d_\w{20,}|\blocal-[0-9a-f]{40}\b|\bsk-[\w-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\bxox[abprs]-[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s:@]+@")


def credential_faults(text: str, where: str) -> list[str]:
    """Return a fault for every line that holds what looks like a key or a password; it is not repeated there."""
    return [f"{where}:{number}: holds what looks like a key or a password; settings are copied into the run folder and "
            "its checkpoints, where it must not be; take it out, and give it in the environment (WANDB_API_KEY, "
            "HF_TOKEN)"
            for number, line in enumerate(text.splitlines(), 1) if _TOKENS.search(line) or _NAMED.search(line)]
