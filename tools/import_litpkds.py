"""Turn TinyLlama's packed chunks (LITPKDS) into a .bin/.idx dataset; filler between documents is taken out and counted."""

from __future__ import annotations

import argparse


def main() -> None:
    """Parse, import, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="CHUNK",
                        help="all chunks, NAME_0000000000.bin and so on, of one chain or of several")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin .idx .json .tokenizer/")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="tokenizer that made the ids")
    parser.add_argument("--vocab-size", type=int, metavar="N",
                        help="instead of a tokenizer: number of its pieces, with BOS 1 and EOS 2 (Llama 2: 32000); then "
                             "there is no manifest, and nothing trains on the dataset here")
    parser.add_argument("--filler-id", type=int, metavar="ID",
                        help="id that chunks were filled up with, if it was neither BOS nor EOS")
    parser.add_argument("--no-bos", action="store_true", help="do not begin documents with <s>")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    from pathlib import Path

    from megatron_ttl.console import print_result, progress
    from megatron_ttl.data.litpkds import import_litpkds

    size = sum(path.stat().st_size for path in map(Path, args.input) if path.is_file())
    with progress("importing", size, "B") as on_progress:
        result = import_litpkds(args.input, args.output_prefix, args.tokenizer, args.vocab_size,
                                filler_id=args.filler_id, bos=not args.no_bos, overwrite=args.overwrite,
                                on_progress=on_progress)
    print_result(result, args.json, "dataset")


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
