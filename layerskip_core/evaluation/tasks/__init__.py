"""The tasks: what a model is evaluated on. A task is a module that defines a TaskLoader, and a line in config/evaluation.py."""
