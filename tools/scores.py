"""Put the scores of several models side by side, or compare two of them item by item."""

from __future__ import annotations

import argparse


def names(text: str) -> list[str]:
    """Split names at commas."""
    return [name for name in text.split(",") if name]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", nargs="*", metavar="PLACE", help="model folders, run folders or files of scores")
    parser.add_argument("--tasks", "--task", type=names, default=[], metavar="A,B", help="only these (default: all)")
    parser.add_argument("--metrics", type=names, default=[], metavar="A,B",
                        help="only these; all: every one that was measured (default: the score of each task)")
    parser.add_argument("--show-differences", action="store_true",
                        help="give scores that were asked differently columns of their own instead of refusing them")
    parser.add_argument("--format", choices=("terminal", "markdown", "csv", "latex", "json"),
                        help="default: what the suffix of --output means, else terminal; --compare has terminal and json")
    parser.add_argument("--output", metavar="FILE", help="write it there (.md, .csv, .tex, .json)")
    parser.add_argument("--compare", nargs=2, metavar="PLACE",
                        help="test whether two models differ on the items of each task; RUN@STEP chooses a checkpoint")
    arguments = parser.parse_args()
    if arguments.compare and (arguments.places or arguments.output or arguments.show_differences
                              or arguments.format not in (None, "terminal", "json")):
        parser.error("--compare takes two places and prints; --tasks, --metrics and --format json go with it")
    if not arguments.compare and not arguments.places:
        parser.error("name model folders, run folders or files of scores, or --compare two of them")
    return arguments


def main() -> None:
    """Read, arrange, write."""
    arguments = parse_arguments()
    if arguments.compare:
        from megatron_ttl.console import print_result
        from megatron_ttl.evaluate.compare import compare, print_comparison

        rows = compare(*arguments.compare, arguments.tasks, arguments.metrics)
        if arguments.format == "json":
            print_result({"comparisons": rows}, as_json=True)
        else:
            print_comparison(rows)
        return
    from megatron_ttl.evaluate.score_formats import write_table
    from megatron_ttl.evaluate.score_table import build_table, choose_scores, read_scores

    records = choose_scores(read_scores(arguments.places), arguments.tasks, arguments.metrics)
    write_table(build_table(records, arguments.show_differences), arguments.format, arguments.output)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
