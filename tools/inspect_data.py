"""Say what a tokenised dataset holds, whether it is whole, and how its first documents read."""

from __future__ import annotations

import argparse


def main() -> None:
    """Parse, inspect, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", required=True, help="dataset, without .bin or .idx")
    parser.add_argument("--verify", action="store_true", help="compare checksums, look into every document")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N documents")
    parser.add_argument("--first", type=int, default=0, metavar="D", help="number of the first one to print (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    from pathlib import Path

    from megatron_ttl.console import print_result, progress
    from megatron_ttl.data.inspect import decoded_documents, inspect_dataset

    ids = Path(f"{args.prefix}.bin")
    with progress("reading", ids.stat().st_size if ids.is_file() else None, "B") as advance:
        result = inspect_dataset(args.prefix, args.verify, advance)
    shown = list(decoded_documents(args.prefix, args.show, args.first)) if args.show else []
    if args.json and shown:
        result["shown"] = [text for _, _, text in shown]
    print_result(result, args.json)
    for number, tokens, text in () if args.json else shown:
        print(f"\n-- document {number}, {tokens:,} tokens\n{text}")


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
