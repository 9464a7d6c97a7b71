"""Kinds of problems: recipes that read public data sets, answer checking, and the generated arithmetic worlds."""

from tracereward.tasks.recipes import TASKS, Task, get_task

__all__ = ["TASKS", "Task", "get_task"]
