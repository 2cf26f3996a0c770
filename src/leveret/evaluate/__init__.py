"""7. Examine: tasks as rows, official rules, honest intervals, a report.

In come a model (or a file of its answers) and a benchmark's official files; out go scores with intervals and
baselines, one line per answer, and a page a person can read. `score` needs no model and imports no torch.
"""

from __future__ import annotations

from leveret.evaluate.forms import Item
from leveret.evaluate.run import evaluate
from leveret.evaluate.scoring import score
from leveret.evaluate.tasks import SUITES, TASKS, TaskRow, load_items, rule_of, task_row

__all__ = ["SUITES", "TASKS", "Item", "TaskRow", "evaluate", "load_items", "rule_of", "score", "task_row"]
