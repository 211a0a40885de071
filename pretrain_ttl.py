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
    parser.add_argument("--dry-run", action="store_true", help="report every fault and the plan; touch no device")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: processes to plan for")
    parser.add_argument("--json", action="store_true", help="with --dry-run: the plan as JSON")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run file, in TOML")
    arguments = parser.parse_args(argv)

    from megatron_ttl.errors import UserError
    from megatron_ttl.runtime import discover_ranks, find_meeting_place
    from megatron_ttl.train.run_lock import RunLock
    from megatron_ttl.train.stop import StopRequest

    ranks = discover_ranks()
    try:
        if arguments.dry_run:
            from megatron_ttl.plan.forecast import dry_run, print_forecast

            world_size = ranks.world_size if arguments.world_size is None else arguments.world_size
            forecast = dry_run(arguments.deepspeed_config, arguments.config, arguments.overrides, world_size)
            if ranks.is_first:
                print_forecast(forecast, arguments.json)
            return 0
        with RunLock(takes=ranks.is_first) as lock, StopRequest(speaks=ranks.is_first) as stop:
            lock.take_early(arguments.config, arguments.overrides)  # a second run there leaves before slow imports
            from megatron_ttl.config.load import load_settings
            settings = load_settings(arguments.deepspeed_config, arguments.config, arguments.overrides)
            lock.take(settings.run.run.dir)
            if ranks.is_first and arguments.config == DEFAULT_CONFIG:
                print(f"run file: {DEFAULT_CONFIG} (the default; --config chooses another)")
            ranks = find_meeting_place(ranks)
            from megatron_ttl.train.loop import pretrain
            return int(pretrain(settings, ranks, stop, lock))
    except UserError as error:
        if ranks.local_rank == 0:  # one process per machine says it for all
            raise
        time.sleep(2)  # torchrun ends all processes when the first one leaves: give the speaker time to be heard
        return int(error.exit_code)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
