"""Measures the settings of a task: answers, figures, predictions, and which setting to recommend."""
