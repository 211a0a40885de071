"""Make a four-way continuation task of held-out text; or write the items of agreement_pt and cloze_pt again."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Parse, make, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, help="held-out documents, .jsonl, .jsonl.gz or .jsonl.zst")
    what.add_argument("--shipped", action="store_true", help="write agreement_pt and cloze_pt into --output")
    parser.add_argument("--output", type=Path, required=True,
                        help="new folder, for --packs of tools/evaluate.py; its name becomes the task's")
    parser.add_argument("--text-key", default="text", help="key of the text (default: %(default)s)")
    parser.add_argument("--items", type=int, default=400, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of what is chosen (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N documents")
    parser.add_argument("--language", default="pt", help="of the text (default: %(default)s)")
    parser.add_argument("--license", default="as the text it was made of", help="of the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    from megatron_ttl.console import print_result

    if args.shipped:
        from megatron_ttl.evaluate.synthetic import write_shipped

        print_result(write_shipped(args.output), args.json)
        return
    from megatron_ttl.evaluate.continuation import make_continuation_pack

    print_result(make_continuation_pack(args.text, args.output, args.text_key, args.items, args.seed, args.skip,
                                        args.language, args.license), args.json)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
