"""Say what this machine runs: versions, the implementation of each operation and why, on a GPU how exact each is."""

from __future__ import annotations

import argparse

PACKAGES = ("deepspeed", "transformers", "flash-attn", "liger-kernel", "triton")


def main() -> None:
    """Look around and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deepspeed_config", metavar="JSON", help="what a run with this machine profile would get")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    import torch

    from megatron_ttl.config.load import load_profile
    from megatron_ttl.console import print_result, print_table
    from megatron_ttl.kernels.doctor import examine
    from megatron_ttl.train.engine_options import DTYPES

    profile = load_profile(args.deepspeed_config) if args.deepspeed_config else None
    choice = profile.kernels.model_dump() if profile else {}
    dtype = DTYPES[profile.precision if profile else "bf16"]
    found = examine(choice, torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype, PACKAGES)
    if args.json:
        print_result(found, as_json=True)
        return
    print_table(("", ""), list(found["versions"].items()))
    rows = [[row["operation"], row["path"], row["error"], row["why"]] for row in found["operations"]]
    print_table(("operation", "path", "error / PyTorch's", "why"), rows, title="operations")


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
