"""Pretrain a small Llama-2: `deepspeed pretrain_ttl.py --deepspeed_config configs/a100_single.json`.

The run file (--config) says what is trained, the DeepSpeed JSON on which machine; `section.key=value` overrides the run
file. The same command resumes. Exit codes: 0 done, 1 failed, 2 faulty settings or data, 70 it hung, 75 no checkpoint
could be written, 85 stopped with a checkpoint.
"""

from __future__ import annotations

import time

from megatron_ttl.train.command_line import parser

DEFAULT_CONFIG = "configs/ttl_160m.toml"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, check everything, train."""
    arguments = parser(__doc__ or "", DEFAULT_CONFIG).parse_args(argv)

    from megatron_ttl.errors import UserError
    from megatron_ttl.runtime import discover_ranks, end_at_once, find_meeting_place, stop_with_launcher
    from megatron_ttl.train.run_lock import RunLock
    from megatron_ttl.train.stop import StopRequest

    ranks, files = discover_ranks(), (arguments.deepspeed_config, arguments.config, arguments.overrides)
    try:
        if arguments.dry_run:
            from megatron_ttl.plan.forecast import dry_run, print_forecast
            world_size = ranks.world_size if arguments.world_size is None else arguments.world_size
            plan = dry_run(*files, world_size, arguments.allow_change, arguments.skip_steps)
            if ranks.is_first:
                print_forecast(plan, arguments.json)
            return 0
        # Before the slow imports: a signal then must not be lost, and a second run in the folder leaves at once.
        stop = StopRequest(ranks.is_first, waits_for_peers=ranks.world_size > 1, to_the_end=__name__ == "__main__")
        with RunLock(takes=ranks.is_first) as lock, stop:
            stop_with_launcher()
            # Before anything is refused: mpirun may hang if a process leaves while another one starts MPI.
            ranks = find_meeting_place(ranks)
            lock.take_early(arguments.config, arguments.overrides)
            from megatron_ttl.config.load import load_settings
            settings = load_settings(*files, arguments.allow_change, arguments.skip_steps)
            lock.take(settings.run.run.dir)
            if ranks.is_first and arguments.config == DEFAULT_CONFIG:
                print(f"run file: {DEFAULT_CONFIG} (the default; --config chooses another)")
            from megatron_ttl.train.loop import pretrain
            code = int(pretrain(settings, ranks, stop, lock))
        if ranks.world_size > 1:
            end_at_once(code)
        return code
    except UserError as error:
        if ranks.local_rank == 0:  # one process per machine says it for all
            raise
        time.sleep(2)  # torchrun ends all processes when the first one leaves: give the speaker time to be heard
        return int(error.exit_code)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
