"""Tasks: data sets in memory, by name or from a user's own file."""

from zoo.tasks.loading import TASKS, load_task
from zoo.tasks.names import suggest
from zoo.tasks.task import Task

__all__ = ["TASKS", "Task", "load_task", "suggest"]
