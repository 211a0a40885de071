"""Write a checkpoint of a run as a Hugging Face model folder, and prove it with transformers."""

from __future__ import annotations

import argparse


def main() -> None:
    """Parse, export, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="run folder (run.dir of the training)")
    parser.add_argument("--output", required=True, help="model folder to write")
    parser.add_argument("--step", type=int, help="checkpoint of this step (default: the newest valid one)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                        help="float32 is exact, bfloat16 halves the size (default: %(default)s)")
    parser.add_argument("--no-verify", action="store_true", help="do not compare with transformers")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    from megatron_ttl.checkpoint.hf import export_run
    from megatron_ttl.console import print_result, print_warning

    result = export_run(args.run, args.output, args.step, dtype=args.dtype, verify=not args.no_verify,
                        overwrite=args.overwrite)
    if not args.json:
        for warning in result.pop("warnings"):
            print_warning(warning)
    print_result(result, as_json=args.json)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
