"""Tasks: conversion of dataset rows to demonstrations, answer extraction and answer comparison."""

from tracereward.tasks.recipes import TASKS, Task, get_task

__all__ = ["TASKS", "Task", "get_task"]
