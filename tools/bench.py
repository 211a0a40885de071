"""Measure how fast parts of this package are on this machine, as ratios to what bounds them, in one run."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True)
    subject = subjects.add_parser("preprocess", help="text to dataset, against the encoder alone and SentencePiece",
                                  description="Rates are MB of text per second of CPU time, or by the clock with workers.")
    subject.add_argument("--input", nargs="+", required=True, metavar="FILE", help="documents, one JSON object per line")
    subject.add_argument("--tokenizer", required=True, metavar="FOLDER", help="tokenizer folder")
    subject.add_argument("--text-key", default="text", help="key of the text in each object (text)")
    subject.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes to try (1 2 4)")
    subject.add_argument("--max-mb", type=float, default=50.0, help="take so much text from the beginning (50)")
    subject.add_argument("--repeats", type=int, default=2, help="runs of each; the best one counts (2)")
    subject.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    from megatron_ttl.console import print_result
    from megatron_ttl.data.bench_preprocess import bench_preprocess

    result = bench_preprocess(arguments.input, arguments.tokenizer, arguments.text_key, arguments.workers,
                              arguments.max_mb, arguments.repeats)
    print_result(result, arguments.json)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
