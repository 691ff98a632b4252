"""Where two outputs differ, and how near the two tokens are there."""

import pytest
import torch
from evaluating import NEW_TOKENS, own_answers, tiny_loaded

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.data.examples import Example
from layerskip_core.evaluation.measure.measure import differences, first_difference, top2_gap
from layerskip_core.evaluation.measure.runs import measure_prompt
from layerskip_core.evaluation.outputs import Output, Outputs

EXAMPLE = Example("remind me to call mom", "[IN:CREATE_REMINDER remind [SL:PERSON_REMINDED me ] to call mom ]")
PLAIN = DecodingConfig("autoregressive", max_new_tokens=NEW_TOKENS)


@pytest.mark.parametrize(
    ("ids", "expected", "position"),
    [([1, 2], [1, 2], None), ([1, 3], [1, 2], 1), ([1], [1, 2], 1), ([1, 2, 3], [1, 2], 2), ([], [5], 0)],
)
def test_first_difference(ids, expected, position):
    assert first_difference(ids, expected) == position


def test_gap_is_between_the_two_best_logits():
    loaded = tiny_loaded()
    ids = loaded.encode_prompt(EXAMPLE.prompt)
    best, second = sorted(loaded.backend.model(torch.tensor([ids])).logits[0, -1].tolist(), reverse=True)[:2]
    assert top2_gap(loaded.backend, ids) == pytest.approx(best - second)


def test_a_difference_is_located_with_the_targets_gap_there():
    loaded, task = tiny_loaded(), own_answers()
    plain = Outputs(tuple(measure_prompt(loaded, example.prompt, PLAIN) for example in task.examples))
    ids = plain.each[1].ids
    changed = Outputs((plain.each[0], Output((*ids[:4], ids[4] + 1, *ids[5:])), plain.each[2]))
    (difference,) = differences(loaded, task.examples, changed, plain)
    assert (difference.sample, difference.position) == (1, 4)
    prefix = loaded.encode_prompt(task.examples[1].prompt) + list(ids[:4])
    assert difference.top2_gap == pytest.approx(top2_gap(loaded.backend, prefix))
    assert differences(loaded, task.examples, plain, plain) == ()
