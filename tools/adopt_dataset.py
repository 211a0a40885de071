"""Make a .bin/.idx of Megatron-LM, datatrove or GPT-NeoX a dataset to train on: check its ids, write its manifest."""

from __future__ import annotations

import argparse


def main() -> None:
    """Parse, check, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", required=True, help="dataset, without .bin or .idx; these two files are only read")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER",
                        help="tokenizer that made the ids; copied to PREFIX.tokenizer/")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    from pathlib import Path

    from megatron_ttl.console import print_result, progress
    from megatron_ttl.data.adopt import adopt_dataset

    ids = Path(f"{args.prefix}.bin")
    with progress("checking", ids.stat().st_size if ids.is_file() else None, "B") as advance:
        result = adopt_dataset(args.prefix, args.tokenizer, advance)
    print_result(result, args.json, "dataset")


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
