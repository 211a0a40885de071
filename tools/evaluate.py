"""Measure a model folder on held-out text: nats per token, perplexity and bits per byte."""

from __future__ import annotations

import argparse


def main() -> None:
    """Parse, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model folder, as tools/convert_to_hf.py writes it")
    parser.add_argument("--perplexity", required=True, nargs="+", metavar="PREFIX",
                        help="tokenised datasets (path without .bin), made with the tokenizer of the model")
    parser.add_argument("--batch", type=int, default=8, help="windows at once (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="read at most so many of each dataset (default: all)")
    parser.add_argument("--sequence-length", type=int,
                        help="tokens per window (default: as many as the model has positions)")
    parser.add_argument("--document-mask", action="store_true",
                        help="keep documents apart, as a run with data.document_mask does")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda, else cpu")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    from megatron_ttl.console import print_result, print_table
    from megatron_ttl.evaluate.perplexity import perplexity_report

    result = perplexity_report(args.model, args.perplexity, args.batch, args.max_tokens, args.sequence_length,
                               args.device, args.dtype, args.document_mask)
    if args.json:
        print_result(result, as_json=True)
        return
    columns = ("nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes", "windows", "complete")
    rows = result["prefixes"] + ([result["total"]] if len(result["prefixes"]) > 1 else [])
    header = ("dataset", *(column.replace("_", " ") for column in columns))
    print_table(header, [[row["prefix"], *map(row.get, columns)] for row in rows], title=result["model"])
    print(f"windows of {result['context_tokens']} tokens, {result['windowing']}; {result['dtype']} on "
          f"{result['device']}, {result['tokens_per_s']:,.0f} tokens/s")


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
