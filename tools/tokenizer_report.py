"""Compare tokenizers on text: tokens, tokens per word, bytes per token, unknown, spelled in bytes, continued words."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizers", nargs="+", required=True, metavar="[NAME=]PATH",
                        help="a SentencePiece .model, a tokenizer.json, a WordPiece .txt, encoder.json+vocab.bpe, or a "
                             "folder with one of these; the others are compared with the first")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE",
                        help="plain .txt files, or .jsonl files of documents")
    parser.add_argument("--text-key", default="text", help="key of the text in each object (text)")
    parser.add_argument("--source-key", default="source", help="key of the source in each object (source)")
    parser.add_argument("--lowercase", action="store_true", help="WordPiece vocabularies are of lower-case text")
    parser.add_argument("--json", action="store_true", help="print one JSON object, as without a terminal")
    return parser.parse_args()


def main() -> None:
    """Open the tokenizers, count, and print a row per source and tokenizer."""
    arguments = parse_arguments()
    import os
    import sys

    from megatron_ttl.console import on_terminal, print_result, print_table, progress
    from megatron_ttl.data.strict_records import read_sourced_texts
    from megatron_ttl.tokenizer.foreign import open_foreign
    from megatron_ttl.tokenizer.report import compare_tokenizers

    tokenizers = [open_foreign(place, arguments.lowercase) for place in arguments.tokenizers]
    size = sum(os.path.getsize(path) for path in arguments.text if os.path.isfile(path))
    with progress("counting", size, "B") as on_progress:
        result = compare_tokenizers(tokenizers, read_sourced_texts(arguments.text, arguments.text_key,
                                                                   arguments.source_key, on_progress))
    if arguments.json or not on_terminal(sys.stdout):
        print_result(result, as_json=True)
    else:
        rows = result["rows"]
        print_table(list(rows[0]), [list(row.values()) for row in rows], title="tokenizers")


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
