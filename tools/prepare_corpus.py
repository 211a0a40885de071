"""Prepare a corpus as a corpus file says: read, clean, filter, score, deduplicate, decontaminate, write, report."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="corpus file in TOML (configs/corpus/pt.toml)")
    parser.add_argument("--workers", type=int, default=1, help="processes; does not change the output (1)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list what would be read, and stop")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished corpus of other settings or inputs")
    parser.add_argument("--keep-work", action="store_true",
                        help="keep <output>/work, so that changed settings redo only what depends on them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    """Prepare the corpus, or list what would be read."""
    arguments = parse_arguments()
    from megatron_ttl.console import print_result, print_table
    from megatron_ttl.data.corpus.plan import make_plan
    from megatron_ttl.data.corpus.run import prepare

    plan = make_plan(arguments.config)
    if arguments.dry_run and arguments.json:
        print_result({"inputs": plan.summary()}, True)
    elif arguments.dry_run:
        print_table(("source", "input", "format", "bytes", "licence"), plan.summary(), "would be read")
    else:
        result = prepare(plan, arguments.workers, arguments.overwrite, arguments.keep_work)
        print_result(result, arguments.json, "corpus")


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
