"""Continue a prompt with a model folder."""

from __future__ import annotations

import argparse
import sys


def main() -> None:
    """Parse, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model folder, as tools/convert_to_hf.py writes it")
    parser.add_argument("--prompt", default="", help='text to continue; "" begins a new one (default)')
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="0: the most probable token (default: 1.0)")
    parser.add_argument("--top-k", type=int, help="draw among the k best tokens; 0: all (default: 50)")
    parser.add_argument("--top-p", type=float,
                        help="draw among the fewest tokens that together reach p; 1: all (default: 0.95)")
    parser.add_argument("--seed", type=int, help="same seed, same text (default: 0)")
    parser.add_argument("--greedy", action="store_true", help="always take the most probable token")
    parser.add_argument("--num-samples", type=int, default=1, help="texts for one prompt (default: 1)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda, else cpu")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    from megatron_ttl.console import print_result
    from megatron_ttl.generate.generate import continue_prompt
    from megatron_ttl.generate.open_folder import open_model_folder
    from megatron_ttl.generate.sampling import choose_sampling
    from megatron_ttl.generate.text_stream import printable

    sampling = choose_sampling(args.temperature, args.top_k, args.top_p, args.seed, args.greedy,
                               args.num_samples, args.max_new_tokens)
    stream = sys.stdout.isatty() and not args.json and args.num_samples == 1

    def show(text: str) -> None:
        print(printable(text), end="", flush=True)

    opened = open_model_folder(args.model, args.device, args.dtype)
    result = continue_prompt(opened, args.prompt, args.max_new_tokens, sampling, args.num_samples,
                             show if stream else None)
    if args.json:
        print_result(result, as_json=True)
        return
    for number, sample in enumerate(result["samples"], start=1):
        header = f"--- {number} of {args.num_samples}\n" if args.num_samples > 1 else ""
        print("" if stream else header + args.prompt + sample["text"])
    speed = f", {result['tokens_per_s']:.1f} tokens/s" if result["tokens_per_s"] else ""
    new = sum(sample["new_tokens"] for sample in result["samples"])
    print(f"{result['prompt_tokens']} prompt tokens in {result['prompt_s']:.2f} s; {new} new tokens{speed} "
          f"({result['dtype']} on {result['device']})", file=sys.stderr)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
