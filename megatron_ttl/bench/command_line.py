"""What `tools/bench.py` is told on its command line. Standard library alone: `--help` answers at once."""

from __future__ import annotations

import argparse


def parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of `tools/bench.py`."""
    found = argparse.ArgumentParser(description=description)
    subjects = found.add_subparsers(dest="subject", required=True)
    for add in (_add_step, _add_kernels, _add_generate, _add_grid, _add_preprocess, _add_data, _add_evaluate, _add_report):
        add(subjects).add_argument("--json", action="store_true", help="print one JSON object")
    return found


def _add_run(subject: argparse.ArgumentParser) -> None:
    subject.add_argument("--config", metavar="TOML", help="run file (default: a model of 1.1M parameters)")
    subject.add_argument("--deepspeed_config", metavar="JSON", help="machine profile (default: bf16 on a GPU, else fp32)")
    subject.add_argument("--micro-batch", type=int, metavar="N", help="sequences at a time, instead of the profile's")
    subject.add_argument("--data", action="store_true", help="the run's own data instead of synthetic tokens")
    subject.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run file, in TOML")


def _add_step(subjects: argparse._SubParsersAction) -> argparse.ArgumentParser:
    subject = subjects.add_parser("step", help="an optimizer step of the engine, against peers with the same shapes",
                                  description="Contenders take turns; ratios say how many times as fast ours is.")
    _add_run(subject)
    subject.add_argument("--peer", nargs="+", default=["all"], metavar="NAME",
                         help="bare (our model without the engine), plain (PyTorch, compiled on a GPU), hf, liger, litgpt, "
                              "or all (default); write overrides before it")
    subject.add_argument("--steps", type=int, default=10, help="timed steps of a turn (10)")
    subject.add_argument("--rounds", type=int, default=2, help="turns of each contender (2)")
    subject.add_argument("--warm-up", type=int, default=3, help="steps before those (3)")
    return subject


def _add_kernels(subjects: argparse._SubParsersAction) -> argparse.ArgumentParser:
    subject = subjects.add_parser("kernels", help="each operation by itself, as a share of the bandwidth of a copy",
                                  description="Bytes by formula, over the time of the device; every input is used in turn "
                                              "with others so that no cache holds it. On a CPU a small operation can: "
                                              "its share may pass 1.")
    subject.add_argument("--op", nargs="+", default=[], metavar="NAME",
                         help="rms_norm, add_rms_norm, rotary_heads, swiglu, cross_entropy, adamw (default: all)")
    subject.add_argument("--tokens", type=int, metavar="N", help="rows (default: 32,768 on a GPU, 512 elsewhere)")
    subject.add_argument("--widths", nargs="+", default=[], metavar="NAME",
                         help="small, 160m, 460m, 1b1 (default: the last three on a GPU, the first elsewhere)")
    subject.add_argument("--path", nargs="+", default=[], metavar="NAME",
                         help="cuda, torch, compiled, liger, apex (default: all on a GPU, torch elsewhere)")
    subject.add_argument("--repeats", type=int, default=20, help="timed calls of each (20)")
    return subject


def _add_generate(subjects: argparse._SubParsersAction) -> argparse.ArgumentParser:
    subject = subjects.add_parser("generate", help="greedy generation, against transformers with the same folder")
    subject.add_argument("--model", required=True, metavar="FOLDER", help="model folder; its weights may be random")
    subject.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="continuations side by side (1 64)")
    subject.add_argument("--new-tokens", type=int, default=128, help="of each continuation (128)")
    subject.add_argument("--repeats", type=int, default=3, help="timed runs of each (3)")
    return subject


def _add_grid(subjects: argparse._SubParsersAction) -> argparse.ArgumentParser:
    subject = subjects.add_parser("grid", help="ways to compute a run: speed, memory, energy, loss; and the fastest profile",
                                  description="Each row is measured in a process of its own and kept at once; the same "
                                              "command goes on where it was stopped.")
    _add_run(subject)
    subject.add_argument("--output", required=True, metavar="FOLDER", help="for grid.jsonl, grid.md and fastest.json")
    subject.add_argument("--axes", nargs="+", default=[], metavar="NAME",
                         help="precision, attention, optimizer, micro_batch, recompute, compiled, engine, cuda_graphs, data "
                              "(default: all)")
    subject.add_argument("--steps", type=int, default=20, help="timed steps of a row (20); energy takes a second of them")
    subject.add_argument("--warm-up", type=int, default=5, help="steps before those (5)")
    subject.add_argument("--tolerance", type=float, default=0.02, help="nats that count as the same loss (0.02)")
    return subject


def _add_preprocess(subjects: argparse._SubParsersAction) -> argparse.ArgumentParser:
    subject = subjects.add_parser("preprocess", help="text to dataset, against the encoder alone and SentencePiece",
                                  description="Rates are MB of text per second of CPU time, or by the clock with workers.")
    subject.add_argument("--input", nargs="+", required=True, metavar="FILE", help="documents, one JSON object per line")
    subject.add_argument("--tokenizer", required=True, metavar="FOLDER", help="tokenizer folder")
    subject.add_argument("--text-key", default="text", help="key of the text in each object (text)")
    subject.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes to try (1 2 4)")
    subject.add_argument("--max-mb", type=float, default=50.0, help="take so much text from the beginning (50)")
    subject.add_argument("--repeats", type=int, default=2, help="runs of each; the best one counts (2)")
    return subject


def _add_data(subjects: argparse._SubParsersAction) -> argparse.ArgumentParser:
    subject = subjects.add_parser("data", aliases=["loader"],
                                  help="dataset to training step: opening, speed of one core, waits of a step")
    subject.add_argument("--prefix", nargs="+", required=True, metavar="PREFIX", help="tokenised datasets, mixed evenly")
    subject.add_argument("--sequence-length", type=int, default=2048, help="ids of a sample (2048)")
    subject.add_argument("--samples-per-step", type=int, default=4, help="samples of an optimizer step (4)")
    subject.add_argument("--tokens-per-s", type=float, default=1e6, help="what the simulated training takes (1e6)")
    subject.add_argument("--steps", type=int, default=500, help="how many steps (500)")
    subject.add_argument("--preload", action="store_true", help="read the data into memory first")
    return subject


def _add_evaluate(subjects: argparse._SubParsersAction) -> argparse.ArgumentParser:
    subject = subjects.add_parser("evaluate", help="questions scored per second on the CPU, against lm-eval's backend")
    subject.add_argument("--model", required=True, metavar="FOLDER", help="model folder; its weights may be random")
    subject.add_argument("--questions", type=int, default=16, help="of each set, four choices each (16)")
    subject.add_argument("--batch", type=int, default=8, help="sequences side by side, for both (8)")
    subject.add_argument("--repeats", type=int, default=2, help="runs of each; the best one counts (2)")
    return subject


def _add_report(subjects: argparse._SubParsersAction) -> argparse.ArgumentParser:
    subject = subjects.add_parser("report", help="results of other subjects, kept with --json, as one table in Markdown",
                                  description="NAME.json becomes a section; NAME.log without it is told as failed.")
    subject.add_argument("--folder", required=True, help="where they are; report.md is written there")
    return subject
