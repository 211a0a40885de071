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
    subject = subjects.add_parser("loader", help="dataset to training step: opening, speed of one core, waits of a step")
    subject.add_argument("--prefix", nargs="+", required=True, metavar="PREFIX", help="tokenised datasets, mixed evenly")
    subject.add_argument("--sequence-length", type=int, default=2048, help="ids of a sample (2048)")
    subject.add_argument("--samples-per-step", type=int, default=4, help="samples of an optimizer step (4)")
    subject.add_argument("--tokens-per-s", type=float, default=1e6, help="what the simulated training takes (1e6)")
    subject.add_argument("--steps", type=int, default=500, help="how many steps (500)")
    subject.add_argument("--preload", action="store_true", help="read the data into memory first")
    subject.add_argument("--json", action="store_true", help="print one JSON object")
    subject = subjects.add_parser("evaluate", help="questions scored per second on the CPU, against lm-eval's backend")
    subject.add_argument("--model", required=True, metavar="FOLDER", help="model folder; its weights may be random")
    subject.add_argument("--questions", type=int, default=16, help="of each set, four choices each (16)")
    subject.add_argument("--batch", type=int, default=8, help="sequences side by side, for both (8)")
    subject.add_argument("--repeats", type=int, default=2, help="runs of each; the best one counts (2)")
    subject.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    from megatron_ttl.console import print_result

    if arguments.subject == "loader":
        from megatron_ttl.data.bench_loader import measure_loader
        result = measure_loader(arguments.prefix, arguments.sequence_length, arguments.samples_per_step,
                                arguments.tokens_per_s, arguments.steps, arguments.preload)
    elif arguments.subject == "evaluate":
        from megatron_ttl.evaluate.bench_scoring import bench_scoring
        result = bench_scoring(arguments.model, arguments.questions, arguments.batch, arguments.repeats)
    else:
        from megatron_ttl.data.bench_preprocess import bench_preprocess
        result = bench_preprocess(arguments.input, arguments.tokenizer, arguments.text_key, arguments.workers,
                                  arguments.max_mb, arguments.repeats)
    print_result(result, arguments.json)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
