"""Train a SentencePiece BPE tokenizer on .jsonl or .jsonl.gz files and write its folder."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE",
                        help="documents, one JSON object per line")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="tokenizer folder to write")
    parser.add_argument("--vocab-size", type=int, default=32_000,
                        help="pieces, specials and bytes included (32000)")
    parser.add_argument("--text-key", default="text", help="key of the text in each object (text)")
    parser.add_argument("--normalization", choices=("identity", "nfkc"), default="identity",
                        help="identity keeps every character; nfkc folds compatibility characters, and then "
                             "Hugging Face's LlamaTokenizer needs normalised text (identity)")
    parser.add_argument("--character-coverage", type=float, default=0.99995,
                        help="share of the characters that get a piece, the rest is spelled in bytes "
                             "(0.99995)")
    parser.add_argument("--digits", choices=("split", "whole"), default="split",
                        help="split makes every digit a token; whole costs fewer tokens (split)")
    parser.add_argument("--max-documents", "--samples", type=int, help="train on a sample of so many documents")
    parser.add_argument("--max-bytes", type=int, help="train on a sample of so many bytes of text; 6.5 times as much memory")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (0)")
    parser.add_argument("--max-bad-fraction", type=float, default=0.001,
                        help="share of lines that may be no documents (0.001)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    """Read the documents, train and print what was used."""
    arguments = parse_arguments()
    from megatron_ttl.console import print_result, progress
    from megatron_ttl.data.documents import DocumentReader, input_faults
    from megatron_ttl.errors import DataError, raise_faults
    from megatron_ttl.tokenizer.train import announce_sample, train_tokenizer

    raise_faults(DataError, input_faults(arguments.input))
    reader = DocumentReader(arguments.input, arguments.text_key, arguments.max_bad_fraction)
    with progress("reading", reader.size_bytes, "B") as reader.on_progress:
        result = train_tokenizer(
            reader, arguments.output, arguments.vocab_size, normalization=arguments.normalization,
            character_coverage=arguments.character_coverage, max_documents=arguments.max_documents,
            max_bytes=arguments.max_bytes, seed=arguments.seed, inputs=reader.sources, digits=arguments.digits,
            on_sample=None if arguments.json else announce_sample, overwrite=arguments.overwrite,
        )
    result["rejected_lines"] = sum(reader.rejected.values())
    print_result(result, arguments.json, "tokenizer")


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
