"""What `tools/evaluate.py` is told on its command line. Standard library alone: `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

_OF_TASKS = ("shots", "limit", "hub", "scores", "again", "contamination", "seed")
_OF_PERPLEXITY = ("max_tokens", "sequence_length", "stride", "document_mask")
_EXAMPLES = """examples:
  python tools/evaluate.py --list --data tasks
  python tools/evaluate.py --model models/x --tasks arc_pt,hellaswag_pt --data tasks
  python tools/evaluate.py --run runs/x --every-checkpoint --tasks arc_pt
  python tools/evaluate.py --model models/x --perplexity data/pt_heldout

Scores are appended to scores.jsonl in the folder of the model or the run as soon as a task is done; the same command goes
on where it was interrupted. tools/scores.py makes tables of them."""


def parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of `tools/evaluate.py`."""
    found = argparse.ArgumentParser(description=description, epilog=_EXAMPLES,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    what = found.add_argument_group("what is measured, one of")
    what.add_argument("--tasks", metavar="A,B", help="tasks and groups of tasks, by the names of --list")
    what.add_argument("--perplexity", nargs="+", metavar="PREFIX",
                      help="tokenised datasets (path without .bin), made with the tokenizer of the model")
    what.add_argument("--list", action="store_true", help="list the tasks, where their data go, and what is missing")
    whom = found.add_argument_group("of which model, one of")
    whom.add_argument("--model", type=Path, help="model folder, as tools/convert_to_hf.py writes it")
    whom.add_argument("--run", type=Path, help="run folder: its newest checkpoint, no export needed")
    whom.add_argument("--step", type=int, metavar="N", help="with --run: the checkpoint of this step")
    whom.add_argument("--every-checkpoint", action="store_true", help="with --run: all of them, in the order of steps")
    tasks = found.add_argument_group("tasks")
    tasks.add_argument("--data", type=Path, default=Path("tasks"), metavar="DIR",
                       help="folder of their data files (default: %(default)s)")
    tasks.add_argument("--packs", type=Path, action="append", default=[], metavar="DIR",
                       help="more task definitions, *.yaml; repeatable")
    tasks.add_argument("--hub", action="store_true", help="fetch rows that are not there from the Hugging Face hub")
    tasks.add_argument("--shots", type=int, metavar="K", help="demonstrations (default: as each task is defined)")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task, for trials")
    tasks.add_argument("--seed", type=int, help="which demonstrations are drawn (default: 0)")
    tasks.add_argument("--scores", type=Path, metavar="FILE", help="append there instead of scores.jsonl in the folder")
    tasks.add_argument("--again", action="store_true", help="score again what is recorded already")
    tasks.add_argument("--contamination", nargs="+", metavar="PREFIX",
                       help="count the items that share 13 words in a row with this training text")
    text = found.add_argument_group("perplexity")
    text.add_argument("--max-tokens", type=int, help="read at most so many of each dataset (default: all)")
    text.add_argument("--sequence-length", type=int,
                      help="tokens per window (default: as many as the model has positions)")
    text.add_argument("--stride", type=int, metavar="N",
                      help="let windows overlap, each N tokens behind the one before it (default: side by side)")
    text.add_argument("--document-mask", action="store_true",
                      help="keep documents apart, as a run with data.document_mask does")
    found.add_argument("--batch", type=int, help="sequences at once (default: 8 windows, 32 for tasks)")
    found.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda, else cpu")
    found.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: %(default)s)")
    found.add_argument("--json", action="store_true", help="print one JSON object")
    return found


def contradictions(args: argparse.Namespace) -> Iterator[str]:
    """Yield what cannot be meant: nothing or two things asked for, options of the other."""
    asked = [name for name in ("--tasks", "--perplexity", "--list") if getattr(args, name[2:])]
    if len(asked) != 1:
        yield (f"{' and '.join(asked) or 'nothing to measure'}; it must be one of --tasks, --perplexity and --list; "
               f"{'leave out all but one' if asked else 'add one'}")
        return
    models = [name for name in ("--model", "--run") if getattr(args, name[2:])]
    if args.list:
        return
    if len(models) != 1:
        yield (f"{' and '.join(models) or 'no model'}; it must be one of --model and --run; "
               f"{'leave one out' if models else 'add one'}")
    if args.perplexity and args.run:
        yield ("--perplexity: of a run; it must be of a model folder; convert the checkpoint with tools/convert_to_hf.py, or "
               "see metrics.jsonl for what the run measured itself")
    for name in ("step", "every_checkpoint"):
        if getattr(args, name) not in (None, False) and not args.run:
            yield f"{_option(name)}: without a run; it must stand beside --run; add it, or leave the option out"
    if args.step is not None and args.every_checkpoint:
        yield "--step and --every-checkpoint; it must be one checkpoint or all; leave one out"
    foreign, kind = (_OF_PERPLEXITY, "--perplexity") if args.tasks else (_OF_TASKS, "--tasks")
    for name in foreign:
        if getattr(args, name) not in (None, False):
            yield f"{_option(name)}: is for {kind}; it must not stand beside {asked[0]}; leave it out"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
