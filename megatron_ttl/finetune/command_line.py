"""What `tools/finetune.py` is told on its command line. Standard library alone: `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ttl.finetune.experiment import Request


def parse_arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exactly one of --task, --predict, --table and --list must be there."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", help="fine-tune on this task (see --list)")
    what.add_argument("--predict", metavar="FILE", help="print the class of every text of a .jsonl, with --classifier")
    what.add_argument("--table", nargs="+", metavar="OUTPUT", help="compare finished fine-tunings: models by tasks")
    what.add_argument("--list", action="store_true", help="print the tasks and the names of their files")
    parser.add_argument("--model", metavar="FOLDER", help="model folder of ours, or an encoder's (safetensors)")
    parser.add_argument("--data", metavar="FOLDER", help="folder with the files of the task")
    parser.add_argument("--output", default="", metavar="FOLDER", help="(default: finetuned/TASK/MODEL)")
    parser.add_argument("--task-file", action="append", default=[], metavar="TOML",
                        help="more tasks, described in a file; repeatable")
    parser.add_argument("--compare", action="append", default=[], metavar="OUTPUT",
                        help="McNemar's test against another output on the same test rows; repeatable")
    parser.add_argument("--classifier", metavar="FOLDER", help="for --predict: OUTPUT/seed-0/classifier")
    parser.add_argument("--metric", default="accuracy", choices=("accuracy", "f1_macro"),
                        help="for --table (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ... (default: %(default)s)")
    parser.add_argument("--untrained", action="store_true", help="begin with random weights: what pretraining is worth")
    parser.add_argument("--epochs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="texts per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-5, help="falls linearly to 0 (default: %(default)s)")
    parser.add_argument("--warmup", type=float, default=0.0,
                        help="share of the steps in which it rises (default: %(default)s)")
    parser.add_argument("--epsilon", type=float, default=1e-8, help="AdamW's (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="of matrices (default: %(default)s)")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    parser.add_argument("--pooling", default="last", choices=("last", "mean"),
                        help="what the head sees (default: %(default)s token)")
    parser.add_argument("--max-tokens", type=int, help="longer texts lose their end (default: the model's positions)")
    parser.add_argument("--validation", type=float, default=0.1,
                        help="share of the training rows that choose the epoch (default: %(default)s)")
    parser.add_argument("--test-fraction", type=float, default=0.2,
                        help="share of the rows to be judged by, where the data are one file (default: %(default)s)")
    parser.add_argument("--split-seed", type=int, default=0,
                        help="of these two cuts, for all models alike (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda, else cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    needed = {"task": ("model", "data"), "predict": ("classifier",)}
    for mode, options in needed.items():
        missing = [f"--{option}" for option in options if getattr(arguments, mode) and not getattr(arguments, option)]
        if missing:
            parser.error(f"--{mode} needs {' and '.join(missing)}")
    return arguments


def request_of(arguments: argparse.Namespace) -> Request:
    """Return what is asked as the experiment takes it."""
    from dataclasses import fields

    from megatron_ttl.finetune.experiment import Request
    from megatron_ttl.finetune.training import HyperParameters

    given = vars(arguments) | {"task_files": arguments.task_file}
    training = HyperParameters(**{item.name: given[item.name] for item in fields(HyperParameters)})
    return Request(**{item.name: given[item.name] for item in fields(Request) if item.name != "training"}, training=training)
