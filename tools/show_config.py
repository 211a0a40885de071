"""Show the resolved settings of a run and where each came from; with --docs, what each means."""

from __future__ import annotations

import argparse


def main() -> None:
    """Parse, resolve, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="machine profile")
    parser.add_argument("--config", required=True, metavar="TOML", help="run file")
    parser.add_argument("--docs", action="store_true", help="print what each key must hold and means")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run file, in TOML")
    args = parser.parse_args()

    from megatron_ttl.config.describe import resolved_rows
    from megatron_ttl.config.load import load_settings
    from megatron_ttl.console import print_result, print_table

    rows = resolved_rows(load_settings(args.deepspeed_config, args.config, args.overrides))
    if args.json:
        print_result({row["key"]: row for row in rows}, as_json=True)
    else:
        columns = ("key", "value", "origin", *(("must be", "documentation") if args.docs else ()))
        print_table(columns, [[row[column] for column in columns] for row in rows])


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
