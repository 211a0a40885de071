"""Pretrain a small Llama-2: `deepspeed pretrain_ttl.py --deepspeed_config configs/a100_single.json`.

The run file (--config) says what is trained, the DeepSpeed JSON on which machine; `section.key=value` overrides the run
file. The same command resumes. Exit codes: 0 done, 2 faulty settings or data, 75 disk, 85 stopped with a checkpoint.
"""

from __future__ import annotations

import argparse
import time

DEFAULT_CONFIG = "configs/ttl_160m.toml"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, check everything, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="machine profile (configs/cpu.json)")
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="TOML", help="run file (default: %(default)s)")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY",
                        help="go on although this key or section (optimizer.lr, optimizer) was changed; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="report every fault and the plan; touch no device")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: processes (default: 1)")
    parser.add_argument("--json", action="store_true", help="with --dry-run: the plan as JSON")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # the deepspeed launcher's
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run file, in TOML")
    arguments = parser.parse_args(argv)

    from megatron_ttl.config.load import load_settings
    from megatron_ttl.errors import UserError
    from megatron_ttl.runtime import discover_ranks, find_meeting_place
    from megatron_ttl.train.stop import StopRequest

    ranks, files = discover_ranks(), (arguments.deepspeed_config, arguments.config, arguments.overrides)
    try:
        if arguments.dry_run:
            from megatron_ttl.plan.forecast import dry_run, print_forecast
            world_size = ranks.world_size if arguments.world_size is None else arguments.world_size
            plan = dry_run(*files, world_size, arguments.allow_change)
            if ranks.is_first:
                print_forecast(plan, arguments.json)
            return 0
        settings = load_settings(*files, arguments.allow_change)
        if ranks.is_first and arguments.config == DEFAULT_CONFIG:
            print(f"run file: {DEFAULT_CONFIG} (the default; --config chooses another)")
        ranks = find_meeting_place(ranks)
        with StopRequest(speaks=ranks.is_first) as stop:  # before the slow imports: a signal then must not be lost
            from megatron_ttl.train.loop import pretrain
            return int(pretrain(settings, ranks, stop))
    except UserError as error:
        if ranks.local_rank == 0:  # one process per machine says it for all
            raise
        time.sleep(2)  # torchrun ends all processes when the first one leaves: give the speaker time to be heard
        return int(error.exit_code)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
