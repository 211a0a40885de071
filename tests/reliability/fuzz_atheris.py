"""Feed one target of `fuzz_targets.py` with inputs that coverage guides: `fuzz_atheris.py <target> <inputs> <folder>`.

Started by `test_fuzzing.py`, or by hand with PYTHONPATH=.:tests:tests/checkpoint. Writes `result.json` into the folder,
and the input at which it ended, if one is wrong, as `crash-<sha1>` (what libFuzzer itself stops) or `wrong-input`.
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["megatron_ttl", "tomllib", "json"]):
    import fuzz_mutations
    import fuzz_targets


class Feeder:
    """What libFuzzer calls, and what it has seen."""

    def __init__(self, target: fuzz_targets.Target, wanted: int, folder: Path) -> None:
        self.target, self.wanted, self.folder = target, wanted, folder
        self.work = folder / "work"
        self.work.mkdir()
        self.seeds = target.prepare(self.work)
        self.inputs = self.accepted = 0
        self.begin = time.monotonic()

    def feed(self, payload: bytes) -> None:
        """Read one input; end at the first wrong one."""
        try:
            self.accepted += fuzz_targets.check(self.target, payload, self.work)
        except BaseException:
            (self.folder / "wrong-input").write_bytes(payload)
            self.report(traceback.format_exc())
            raise
        self.inputs += 1
        if self.inputs % 1000 == 0 or self.inputs == self.wanted:
            self.report("")

    def report(self, wrong: str) -> None:
        """Write down how far it came."""
        (self.folder / "result.json").write_text(json.dumps({
            "inputs": self.inputs, "accepted": self.accepted, "seconds": time.monotonic() - self.begin, "wrong": wrong}))

    def mutate(self, payload: bytes, _limit: int, seed: int) -> bytes:
        """Half of the inputs are changed by someone who knows the formats, half by libFuzzer."""
        if seed & 1:
            return atheris.Mutate(payload, fuzz_mutations.LARGEST)
        return fuzz_mutations.apply(payload, fuzz_mutations.draw(random.Random(seed)), self.seeds)


def main() -> None:
    """Fuzz one target; libFuzzer ends the process."""
    name, wanted, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    feeder = Feeder(fuzz_targets.TARGETS[name], wanted, folder)
    for number, seed in enumerate(feeder.seeds):
        assert fuzz_targets.check(feeder.target, seed, feeder.work), f"valid payload {number} of {name} was refused"
        (folder / "corpus").mkdir(exist_ok=True)
        (folder / "corpus" / f"seed-{number}").write_bytes(seed)
    options = [f"-runs={wanted}", f"-max_len={fuzz_mutations.LARGEST}", "-len_control=0", "-timeout=10",
               "-rss_limit_mb=3000", f"-artifact_prefix={folder}/", "-print_final_stats=0", "-seed=1"]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], feeder.feed, custom_mutator=feeder.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
