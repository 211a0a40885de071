"""What a launcher started by a test sees of the surroundings."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMIX_", "PRTE_", "SLURM_", "TORCHELASTIC_")


def environment(**more: str) -> dict[str, str]:
    """The tests' own, without what a launcher would take for another's, and with this environment's programs first."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_OTHERS)}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"} | more
