"""Show what runs have learnt and what it cost: figures, tables, one page; or look at the papers' own figures."""

from __future__ import annotations

import argparse
from pathlib import Path

PUBLISHED = Path(__file__).resolve().parent.parent / "examples" / "paper" / "published"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders; all go into the same figures")
    parser.add_argument("--output", metavar="DIR", help="write report.html and a .png, .svg and .csv per figure there")
    parser.add_argument("--format", nargs="+", default=["html", "png", "svg", "csv"], metavar="FORMAT",
                        help="which of these (default: all; csv alone needs no matplotlib)")
    parser.add_argument("--constants", nargs="+", default=[], metavar="NAME",
                        help="compare held-out loss with ttl-paper, hoffmann-text, hoffmann-tex, besiroglu")
    parser.add_argument("--scores", nargs="+", default=[], metavar="FILE",
                        help="scores.jsonl of evaluations, beside those in the run folders")
    parser.add_argument("--window", type=float, metavar="TOKENS",
                        help="average the loss of training over so many (default: a fiftieth of the longest run)")
    parser.add_argument("--paper", action="store_true",
                        help="recompute the published figures from the published rows, and say which are misprints")
    parser.add_argument("--published", metavar="TABLE", help="print one published table, e.g. ttl_table4; list: their names")
    parser.add_argument("--published-folder", metavar="DIR", default=str(PUBLISHED),
                        help="where their .csv files are (default: examples/paper/published)")
    parser.add_argument("--json", action="store_true", help="--paper prints one JSON object")
    arguments = parser.parse_args()
    if not (arguments.runs or arguments.paper or arguments.published):
        parser.error("name a run folder, or --paper, or --published TABLE")
    return arguments


def main() -> None:
    """Parse, do what was asked."""
    arguments = parse_arguments()
    if arguments.paper:
        from megatron_ttl.report.paper import print_checks

        print_checks(arguments.published_folder, arguments.json)
    if arguments.published:
        from megatron_ttl.report.published import print_published

        print_published(arguments.published_folder, arguments.published)
    if arguments.runs:
        from megatron_ttl.report.write_report import write_report

        write_report(arguments.runs, arguments.output, arguments.format, arguments.constants, arguments.scores,
                     arguments.window)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
