"""Put the scores of several models side by side, or compare two of them item by item."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", nargs="*", metavar="PLACE", help="model folders, run folders or files of scores")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="only these (default: all)")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="METRIC",
                        help="only these; all: every one that was measured (default: the score of each task)")
    parser.add_argument("--show-differences", action="store_true",
                        help="give scores that were asked differently columns of their own instead of refusing them")
    parser.add_argument("--format", choices=("terminal", "markdown", "csv", "latex", "json"),
                        help="default: what the suffix of --output means, else terminal")
    parser.add_argument("--output", metavar="FILE", help="write it there (.md, .csv, .tex, .json)")
    return parser.parse_args()


def main() -> None:
    """Read, arrange, write."""
    arguments = parse_arguments()
    from megatron_ttl.evaluate.score_formats import write_table
    from megatron_ttl.evaluate.score_table import build_table, choose_scores, read_scores

    records = choose_scores(read_scores(arguments.places), arguments.tasks, arguments.metrics)
    write_table(build_table(records, arguments.show_differences), arguments.format, arguments.output)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
