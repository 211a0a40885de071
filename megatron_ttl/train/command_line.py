"""What `pretrain_ttl.py` is told on its command line. Standard library alone: `--help` answers at once."""

from __future__ import annotations

import argparse


def parser(description: str, default_config: str) -> argparse.ArgumentParser:
    """Return the parser of `pretrain_ttl.py`."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--deepspeed_config", required=True, metavar="JSON", help="machine profile (configs/cpu.json)")
    found.add_argument("--config", default=default_config, metavar="TOML", help="run file (default: %(default)s)")
    found.add_argument("--allow-change", action="append", default=[], metavar="KEY",
                       help="go on although this key or section (optimizer.lr, optimizer) was changed; repeatable")
    found.add_argument("--skip-steps", action="append", default=[], metavar="A-B",
                       help="leave the samples of these steps out, going back before them if need be; repeatable")
    found.add_argument("--dry-run", action="store_true", help="report every fault and the plan; touch no device")
    found.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: processes to plan for (default: 1)")
    found.add_argument("--json", action="store_true", help="with --dry-run: the plan as JSON")
    found.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    found.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run file, in TOML")
    return found
