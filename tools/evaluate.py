"""Measure a model: on tasks with lm-eval's metrics, or on held-out text in nats per token, perplexity and bits per byte."""

from __future__ import annotations

from megatron_ttl.evaluate.command_line import contradictions, parser


def main() -> None:
    """Parse, evaluate, print."""
    args = parser(__doc__).parse_args()

    from megatron_ttl.errors import UserError, raise_faults

    raise_faults(UserError, contradictions(args))
    if args.list:
        from megatron_ttl.evaluate.packs import task_listing
        from megatron_ttl.evaluate.show_results import show_listing

        show_listing(task_listing(args.data, args.packs), args.data, args.json)
    elif args.perplexity:
        from megatron_ttl.evaluate.perplexity import perplexity_report
        from megatron_ttl.evaluate.show_results import show_perplexity

        show_perplexity(perplexity_report(args.model, args.perplexity, args.batch or 8, args.max_tokens,
                                          args.sequence_length, args.device, args.dtype, args.document_mask,
                                          args.stride), args.json)
    else:
        from functools import partial

        from megatron_ttl.evaluate.evaluate_tasks import TaskSettings, evaluate_tasks
        from megatron_ttl.evaluate.model_places import find_places, scores_file
        from megatron_ttl.evaluate.show_results import show_scores

        places = partial(find_places, args.model, args.run, args.step, args.every_checkpoint, args.device, args.dtype)
        settings = TaskSettings(
            tuple(name for name in args.tasks.split(",") if name), args.data, tuple(args.packs), args.shots, args.limit,
            32 if args.batch is None else args.batch, args.seed or 0, args.dtype, args.hub, args.again,
            tuple(args.contamination or ()))
        scores = evaluate_tasks(places, settings, scores_file(args.model, args.run, args.scores))
        show_scores(scores, args.json)
        raise_faults(UserError, scores.faults)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
