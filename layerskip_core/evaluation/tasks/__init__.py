"""The tasks: what a model is evaluated on.

A task is one module that defines a TaskLoader, and one line here. The module is imported when the task is used, so that the
names can be listed without importing torch.
"""

TASKS = {
    "commands": ".pairs:PARSING",
    "topv2": ".pairs:PARSING",
    "jsonl": ".pairs:PROMPTS",
    "cnn_dm": ".summaries:CNN_DM",
    "xsum": ".summaries:XSUM",
    "scitldr": ".summaries:SCITLDR",
    "humaneval": ".code:HUMANEVAL",
    "mbpp": ".code:MBPP",
    "lm": ".language_modelling:LANGUAGE_MODELLING",
}
