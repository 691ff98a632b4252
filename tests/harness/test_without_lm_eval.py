"""Tasks of lm-eval where it is not installed."""

import sys

from command_line import fails


def test_the_missing_package_and_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "layerskip_core.harness"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    needed = "lm-evaluation-harness is needed, whose package lm_eval is missing: pip install 'layerskip[lm-eval]'"
    fails(needed, "sweep-exits", "--task", "lm-eval:piqa")
    fails(needed, "bench", "--task", "lm-eval:piqa,gsm8k")


def test_where_the_flags_of_lm_eval_belong():
    fails("--include-path must be used with --task lm-eval:..., got here", "bench", "--include-path", "here")
    fails("--tasks must be left out with --task, got piqa", "bench", "--task", "commands", "--tasks", "piqa")
    fails("--log-samples must be used with --output, got none", "sweep-exits", "--log-samples")
    fails("--task must be lm-eval: with the name of a task, got lm-eval: ,", "bench", "--task", "lm-eval: ,")
