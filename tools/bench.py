"""Measure how fast parts of this package are on this machine, as ratios to peers and to what bounds them, in one run."""

from __future__ import annotations

from megatron_ttl.bench.command_line import parser


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__ or "").parse_args()
    from megatron_ttl.bench.subjects import measure_and_print

    measure_and_print(arguments)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
