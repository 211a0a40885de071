"""Tokenise .jsonl, .jsonl.gz or .jsonl.zst files into a .bin/.idx dataset, and one of held-out documents beside it."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE",
                        help="documents, one JSON object per line")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="tokenizer folder")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX",
                        help="writes PREFIX.bin .idx .json .tokenizer/, the same of PREFIX_heldout, and "
                             "PREFIX.rejected.jsonl for lines that are no documents")
    parser.add_argument("--workers", type=int, default=1,
                        help="processes that encode; does not change the output (1)")
    parser.add_argument("--text-key", default="text", help="key of the text in each object (text)")
    parser.add_argument("--held-out-fraction", type=float, default=0.01,
                        help="share of the documents kept from training; 0 for none (0.01)")
    parser.add_argument("--held-out-seed", type=int, default=0, help="seed of that choice (0)")
    parser.add_argument("--max-bad-fraction", type=float, default=0.001,
                        help="share of lines that may be no documents (0.001)")
    parser.add_argument("--no-bos", action="store_true", help="do not begin documents with <s>")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    """Tokenise and print the counts."""
    arguments = parse_arguments()
    from pathlib import Path

    from megatron_ttl.console import print_result, progress
    from megatron_ttl.data.encode import EncodeSettings
    from megatron_ttl.data.preprocess import preprocess

    settings = EncodeSettings(arguments.tokenizer, arguments.text_key, not arguments.no_bos,
                              arguments.held_out_fraction, arguments.held_out_seed)
    size = sum(path.stat().st_size for path in map(Path, arguments.input) if path.is_file())
    with progress("tokenising", size, "B") as on_progress:
        result = preprocess(arguments.input, arguments.output_prefix, settings, workers=arguments.workers,
                            max_bad_fraction=arguments.max_bad_fraction, overwrite=arguments.overwrite,
                            on_progress=on_progress)
    print_result(result, arguments.json, "dataset")


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
