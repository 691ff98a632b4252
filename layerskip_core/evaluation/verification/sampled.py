"""Sampled output: what its seed decides, and that drafts leave its distribution as it is.

With drafts a seed gives other tokens than without, because drafts draw random numbers too. So tokens cannot be compared. Pairs
of first tokens can be counted, and their probabilities follow from the model's logits.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...config.decoding import DecodingConfig, SamplingConfig
from ...config.verification import VerifyConfig
from ...decoding.sampling import probabilities
from .drafting import exits_of
from .results import CheckResult
from .subject import Ids, Subject

SEED, ROW, DISTRIBUTION = "sampled: a seed repeats", "sampled: batch = single", "sampled: the model's distribution"
_SAMPLING = SamplingConfig(2.0, 4)  # of counted tokens: few, so that each pair of them is often drawn, and none nearly always
_AT_ONCE = 50
_LEAST = 5.0  # expected draws of a cell of the chi-square test; rarer pairs share one


def check_sampled(config: VerifyConfig, subject: Subject) -> Iterator[CheckResult]:
    """Plain, and by drafts of an exit, of a copy and of lookups."""
    backend, limit = subject.loaded.backend, subject.max_new_tokens
    sampling = SamplingConfig(1.0, seed=subject.seed)
    settings = {"autoregressive": replace(subject.plain, sampling=sampling)}
    exits = exits_of(config, subject.loaded)
    for exit_layer in exits[len(exits) // 2 :][:1]:
        drafted = DecodingConfig("self-speculative", exit_layer, 4, limit, sampling=sampling)
        settings[f"exit {exit_layer}, 4 drafts"] = drafted
        for kind in subject.copies[-1:]:
            settings[f"{kind} copy, exit {exit_layer}"] = replace(drafted, draft_weights=kind)
    settings["lookup"] = DecodingConfig("lookup", None, 4, limit, lookup=1, sampling=sampling)
    prompts = [list(ids) for ids in subject.prompts.ids]
    plain: list[Ids] | None = None
    counted = min(prompts, key=lambda ids: float(_next(subject, ids).max())) if config.draws and not backend.exact else []
    for name, setting in settings.items():
        first = [subject.alone(prompt, setting) for prompt in prompts]
        again = [subject.alone(prompt, setting) for prompt in prompts]
        plain = plain or first
        same = sum(ids == other for ids, other in zip(first, plain, strict=True))
        note = (
            ""
            if plain is first
            else f"{same} of {len(first)} have the tokens of plain sampling with this seed, which is not promised"
        )
        yield subject.compared(SEED, name, again, first, promise="tokens", note=note)
        if backend.batch_invariant and not backend.exact:
            seeds = [sampling.seed] * len(prompts)
            yield subject.compared(ROW, name, subject.together(prompts, setting, seeds), first)
        if counted:
            yield _distribution(subject, name, setting, counted, config.draws)


def _distribution(subject: Subject, name: str, setting: DecodingConfig, prompt: Ids, draws: int) -> CheckResult:
    """A chi-square test of the first two tokens of many outputs to one prompt."""
    setting = replace(setting, max_new_tokens=3, sampling=_SAMPLING)
    found: Counter[tuple[int, ...]] = Counter()
    for start in range(0, draws, _AT_ONCE):
        seeds = range(start, min(draws, start + _AT_ONCE))
        outputs = subject.together([prompt] * len(seeds), setting, [subject.seed + 1 + seed for seed in seeds])
        found.update(tuple(ids[:2]) for ids in outputs)
    p_value, cells = chi_square(found, _pairs(subject, prompt), draws)
    return subject.result(DISTRIBUTION, name, "distribution", 1, draws, p_value=p_value, note=f"{draws} outputs, {cells} cells")


def _next(subject: Subject, ids: Ids) -> Tensor:
    """The probabilities (V,) of the token after these."""
    return probabilities(subject.logits(torch.tensor([ids]))[0, -1], _SAMPLING)


def _pairs(subject: Subject, prompt: Ids) -> dict[tuple[int, ...], float]:
    """The probability of each beginning of two tokens; of one, where it ends the output."""

    def following(ids: Ids) -> list[tuple[int, float]]:
        probs = _next(subject, ids)
        return [(int(token), float(probs[token])) for token in probs.nonzero()[:, 0]]

    pairs: dict[tuple[int, ...], float] = {}
    for token, share in following(prompt):
        if token in subject.loaded.eos_ids:
            pairs[token,] = share
        else:
            pairs |= {(token, second): share * part for second, part in following([*prompt, token])}
    return pairs


def chi_square(found: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float], draws: int) -> tuple[float, int]:
    """The p-value of counts, given probabilities, and the number of cells. 0 if something impossible was drawn."""
    if any(pair not in expected for pair in found):
        return 0.0, len(expected)
    cells: list[tuple[float, float]] = []  # counts drawn and expected, of pairs from rare to frequent
    count = mean = 0.0
    for pair, share in sorted(expected.items(), key=lambda item: item[1]):
        count, mean = count + found[pair], mean + draws * share
        if mean >= _LEAST:
            cells.append((count, mean))
            count = mean = 0.0
    if mean and cells:
        cells[-1] = cells[-1][0] + count, cells[-1][1] + mean
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    half = torch.tensor([max(len(cells) - 1, 1), statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(half[0], half[1])), len(cells)
