"""`layerskip export --check`: a drafter here and in vLLM, for which a program stands. test_vllm_plugin.py runs vLLM."""

import json
import shutil
import sys

import pytest
from command_line import fails, run
from exit_block_models import add_eagle3

from layerskip_core.config.model import CheckConfig
from layerskip_core.export.check import Drafted, DrafterCheck, check_drafter


@pytest.fixture
def drafting(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "drafting")
    add_eagle3(folder)
    return folder


def python_printing(path, output, status=0):
    """Stands for the Python of an environment with vLLM."""
    program = f"import sys\nif 'find_spec' not in sys.argv[2]:\n    print({output!r})\n    sys.exit({status} and {output!r})\n"
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)
    return str(path)


def test_acceptance_is_that_of_rounds_that_end_no_answer():
    """Of 3 rounds, 2 accept their first draft, 1 its second; an answer's first and last step are none."""
    here = Drafted("layerskip", [[[5], [1, 2, 3], [4, 5], [6, 7, 8, 9]], [[5], [9], [2]], [[5]]])
    assert here.rates == [2 / 3, 1 / 3, 0, 0] and here.ids[1] == [5, 9, 2]
    other = Drafted("vLLM", [[[5], [1, 2], [3, 4, 5], [6, 7, 8, 9]], [[5], [9], [3]], [[5]]])
    checked = DrafterCheck(here, other)
    assert (checked.difference, checked.same, checked.passed) == (0, 2, False)
    assert checked.table().splitlines()[2:] == [
        "| layerskip | 3 | 66.7% | 33.3% | 0.0% | 0.0% | 2.00 |",
        "| vLLM | 3 | 66.7% | 33.3% | 0.0% | 0.0% | 2.00 |",
    ]
    assert not DrafterCheck(here, Drafted("vLLM", [[[5], [1, 2, 3], [4], [5, 6, 7, 8, 9]], *here.answers[1:]])).passed
    assert DrafterCheck(here, here).passed


def test_the_exit_status_says_whether_engines_agree(drafting, tmp_path):
    here = check_drafter(CheckConfig(samples=2, python=sys.executable), str(drafting)).here
    assert len(here.ids) == 2 and len(here.accepted) > 2
    for answers, code in ((here.answers, 0), (here.answers[::-1], 1)):
        python = python_printing(tmp_path / "python", json.dumps({"engine": "vLLM 9", "answers": answers}))
        done = run("export", str(drafting), "--check", "--samples", "2", "--python", python)
        assert done.code == code and [line.split(" | ")[0] for line in done.out.splitlines()[2:]] == ["| layerskip", "| vLLM 9"]
        assert f"{2 - 2 * code} of 2 answers the same, rates of acceptance at most 0.0 points apart (1 allowed)" in done.err


def test_what_cannot_be_compared_is_one_line(drafting, checkpoint, tmp_path):
    message = "this model has no EAGLE-3 drafter; `layerskip train-drafter --layout eagle3` makes one"
    fails(f"--check: {message}", "export", checkpoint, "--check")
    fails(f"--strategy eagle3: {message}", "generate", "hi", "--model", checkpoint, "--strategy", "eagle3")
    flags = ("export", str(drafting), "--check", "--samples", "1")
    fails("vLLM ended with status 1: no memory", *flags, "--python", python_printing(tmp_path / "python", "no memory", 1))
    fails("--python must be the Python of an environment, got no/where", *flags, "--python", "no/where")
