"""Fine-tune a model for classification from several seeds, and judge it on a test split that is opened once, at the end.

Ctrl-C keeps the seeds that are done; the same command goes on. Exit codes: 0 done, 2 faulty settings or data, 130 Ctrl-C.
"""

from __future__ import annotations

import json

from megatron_ttl.finetune.command_line import parse_arguments, request_of


def main() -> None:
    """Parse, fine-tune, print."""
    arguments = parse_arguments(__doc__ or "")
    from megatron_ttl.console import print_result, print_table

    if arguments.list:
        from megatron_ttl.finetune.tasks import known_tasks
        print_table(("task", "files", "classes", "source"), [
            [task.name, " or ".join(task.files), ", ".join(task.label_names), task.source]
            for task in known_tasks(arguments.task_file).values()])
    elif arguments.predict:
        from megatron_ttl.finetune.classifier import load_classifier, predict
        from megatron_ttl.finetune.rows import read_texts
        classifier = load_classifier(arguments.classifier, arguments.device)
        for answer in predict(classifier, read_texts(arguments.predict, classifier.record.task), arguments.batch):
            print(json.dumps(answer, ensure_ascii=False))
    elif arguments.table:
        from megatron_ttl.finetune.results import comparison_table
        header, rows = comparison_table(arguments.table, arguments.metric)
        if arguments.json:
            print_result({"header": header, "rows": rows}, as_json=True)
        else:
            print_table(header, rows, title=f"test {arguments.metric}, %, mean ± standard deviation over seeds")
    else:
        from megatron_ttl.finetune.experiment import fine_tune
        from megatron_ttl.finetune.results import compare, print_comparison, print_report
        request = request_of(arguments)
        result = fine_tune(request)
        comparisons = {other: compare(request.folder, other) for other in arguments.compare}
        if arguments.json:
            print_result({**result, "comparisons": comparisons}, as_json=True)
            return
        print_report(result)
        for other, rows in comparisons.items():
            print_comparison(rows, other)


if __name__ == "__main__":
    from megatron_ttl.console import run_tool

    run_tool(main)
