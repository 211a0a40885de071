"""Turn pickled weights of another project (pytorch_model.bin, *.pt) into model.safetensors.

A pickle is a program that opening runs. With --allow-pickle it is read by torch's restricted unpickler in a process
without network, with bounded memory and time; anything but tensors by name is refused.
"""

from __future__ import annotations

import argparse


def main() -> None:
    """Parse, import, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, metavar="PATH",
                        help="file of weights, or folder with pytorch_model.bin or its index and shards")
    parser.add_argument("--output", required=True, metavar="FOLDER",
                        help="writes FOLDER/model.safetensors; put config.json and the tokenizer beside it")
    parser.add_argument("--allow-pickle", action="store_true", help="I know where the file comes from; read it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    from megatron_ttl.checkpoint.foreign import import_weights
    from megatron_ttl.console import print_result

    print_result(import_weights(args.input, args.output, args.allow_pickle), as_json=args.json)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
