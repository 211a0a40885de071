"""Give an item the demonstrations of its own subject: MMLU and BIG-Bench Hard are many small tasks in one."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from megatron_ttl.errors import DataError


def with_own_demonstrations(task_class: type, column: str) -> type:
    """Return lm-eval's class of tasks, changed so that demonstrations agree with the item in a column.

    Args:
        task_class: `lm_eval.api.task.ConfigurableTask`, or made from it.
        column: key that test rows and demonstrations have.
    """
    class OwnDemonstrations(task_class):  # type: ignore[misc]
        """A task whose sampler sees the demonstrations of one subject at a time."""

        def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *args: Any, **kwargs: Any) -> Any:
            if num_fewshot:
                if not hasattr(self, "_by_column"):
                    self._by_column = defaultdict(list)
                    for row in self.sampler.df:
                        self._by_column[row[column]].append(row)
                own = self._by_column.get(doc[column], [])
                if len([row for row in own if row != doc]) < num_fewshot:
                    raise DataError(f"task {self.config.task}: {len(own)} demonstrations with {column} "
                                    f"'{doc[column]}'; {num_fewshot} are needed; add them to the file of "
                                    "demonstrations, or ask with fewer --shots")
                self.sampler.replace_df(own)
            return super().fewshot_context(doc, num_fewshot, *args, **kwargs)

    return OwnDemonstrations
