"""Train a toxicity classifier on labelled .jsonl files, choose its threshold and measure it on a held-out part."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="labelled texts, one JSON object per line")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="classifier to write")
    parser.add_argument("--text-key", default="text", help="key of the text in each object (text)")
    parser.add_argument("--label-key", default="label", help="key of the label in each object (label)")
    parser.add_argument("--toxic", nargs="+", default=["1", "true"], metavar="LABEL", help="labels of toxic texts (1 true)")
    parser.add_argument("--clean", nargs="+", default=["0", "false"], metavar="LABEL", help="labels of others (0 false)")
    parser.add_argument("--precision", type=float, help="choose the lowest threshold with this precision")
    parser.add_argument("--recall", type=float, help="choose the highest threshold with this recall")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split into parts (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    """Train, and print how good it is."""
    arguments = parse_arguments()
    from megatron_ttl.console import print_result, print_table, print_warning, progress
    from megatron_ttl.data.corpus.toxicity_training import DIALECT_WARNING, LabelNames, train_toxicity

    names = LabelNames(arguments.text_key, arguments.label_key, tuple(arguments.toxic), tuple(arguments.clean))
    with progress("reading", None, "B") as on_progress:
        result = train_toxicity(arguments.input, arguments.output, names, precision=arguments.precision,
                                recall=arguments.recall, seed=arguments.seed, overwrite=arguments.overwrite,
                                on_progress=on_progress)
    if not arguments.json:
        table = result.pop("table")
        print_table(list(table[0]), [list(row.values()) for row in table], title="held-out part")
    print_result(result, arguments.json, "toxicity classifier")
    print_warning(DIALECT_WARNING)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
