"""Checks that batching, drafting and resuming do not change outputs and logits of greedy decoding
one prompt at a time.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..config.evaluation import VerifyConfig
from ..config.model import Quantization
from ..config.resolution import require_exit_layer
from ..decoding import Prefixes, Scheduler, decode, decode_batch, new_row, without_failure
from ..decoding.sampling import probabilities
from ..errors import plural
from .measure import first_difference, logits
from .results import NEAR_TIE

# From strongest to weakest: bitwise equal logits; equal tokens; equal tokens except at near-ties;
# sampled tokens of equal distribution.
Promise = Literal["bits", "tokens", "near-ties", "distribution"]
Ids = list[int]
Pair = tuple[int, ...]  # the first two tokens of an output, or its only one

ROWS = "row alone = among others"
PIECES = "token by token = at once"
THREADS = "any number of threads"
DRAFTS = "speculative = plain"
BATCH = "batch = single"
JOINED = "joining a batch = single"
TURN = "next turn = fresh"
SEED = "sampled: a seed repeats"
ROW = "sampled: batch = single"
DISTRIBUTION = "sampled: the model's distribution"
SAMPLED_DRAFTS = "sampled: every drafter = plain"

LOW_BIT: dict[str, Quantization] = {"int8": "int8", "int4": "int4"}
# Few candidate tokens, so that each pair is drawn often
_COUNTED: dict[str, Any] = {"temperature": 2.0, "top_k": 4}
_AT_ONCE = 50  # draws per batch
_LEAST_DRAWS = 5.0  # expected in a cell of the chi-square test; rarer pairs share one
_LEAST_P = 1e-6  # below it distributions differ; equal ones fail once in a million tests


@dataclass(frozen=True)
class Mismatch:
    """The first difference of a prompt's output, or of its logits (their argmax): token ids, None
    past an end.
    """

    prompt: int
    position: int
    expected: int | None
    found: int | None
    # By how much the model prefers the expected token, in logits; 0 if only bits differ, None past
    # an end
    gap: float | None
    near_tie: bool


@dataclass(frozen=True)
class CheckResult:
    """One check with one setting. `prompts`, `tokens`: how many were compared. `p_value`: of
    sampled tokens.
    """

    check: str
    setting: str
    kernels: str
    precision: str
    promise: Promise
    prompts: int
    tokens: int
    passed: bool
    mismatches: tuple[Mismatch, ...] = ()
    p_value: float | None = None


class Subject:
    """A model on some kernels in some precision, with prompts and their plain outputs."""

    def __init__(
        self, loaded: Decoder, names: tuple[str, str], prompts: list[Ids], config: VerifyConfig
    ) -> None:
        """`names`: of kernels and precision. Raises ConfigError for an exit that the model
        lacks.
        """
        self.loaded = loaded
        self.backend = loaded.backend
        self.names = names
        self.prompts = prompts
        self.config = config
        self.ends = loaded.eos_ids, loaded.detokenize
        # Rounding decides between almost equally likely tokens; torch's low-bit kernels take their
        # inputs in bf16.
        self._near = NEAR_TIE[torch.bfloat16 if names[1] in LOW_BIT else self.backend.dtype]
        layers = self.backend.num_layers
        best = loaded.recommended().exit_layer
        for exit_layer in config.exits:
            require_exit_layer(exit_layer, layers, field="exits")
        usual = (
            {max(1, best // 2), min(best, layers - 1), min(2 * best, layers - 1)}
            if layers > 1
            else set()
        )
        self.exits = sorted({*(config.exits or usual), *self.backend.exit_blocks})
        self.middle = self.exits[len(self.exits) // 2 :][:1]
        # Low-bit ones
        self.copies = [weights for weights in self.backend.draft_sides if weights is not None]
        self.setting = partial(
            DecodingConfig, num_draft_tokens=max(config.specs), max_new_tokens=config.max_new_tokens
        )
        drafted = {f"exit {each}": self.setting("self-speculative", each) for each in self.middle}
        self.usual = {"autoregressive": self.setting("autoregressive")} | drafted
        self.expected = self.alone(self.usual["autoregressive"])

    def alone(
        self, config: DecodingConfig, prompts: Sequence[Ids] = (), prefixes: Prefixes | None = None
    ) -> list[Ids]:
        """The outputs of prompts (default: all), one at a time."""
        outputs = []
        for prompt in prompts or self.prompts:
            decoding = decode(self.backend, prompt, config, *self.ends, prefixes=prefixes)
            outputs.append([token for [step] in decoding for token in step.ids])
        return outputs

    def together(
        self,
        config: DecodingConfig,
        prompts: Sequence[Ids] = (),
        seeds: Sequence[int] | None = None,
    ) -> list[Ids]:
        """The outputs of prompts (default: all) in one batch."""
        finished = decode_batch(self.backend, prompts or self.prompts, config, *self.ends, seeds)
        return [output.ids for output in sorted(finished, key=lambda output: output.row)]

    def joined(self, config: DecodingConfig) -> list[Ids]:
        """The outputs of prompts that join a loop a step apart, as in continuous batching."""
        scheduler = Scheduler(self.backend)
        rows = [new_row(self.backend, prompt, config, *self.ends) for prompt in self.prompts]
        for row in rows:
            scheduler.add(row)
            without_failure(scheduler.step())
        while not scheduler.is_idle:
            without_failure(scheduler.step())
        return [row.output for row in rows]

    def mismatch(
        self, number: int, position: int, before: Ids, wanted: int | None, found: int | None
    ) -> Mismatch:
        """Adds the logit gap; `before`: all tokens before the difference."""
        gap = None
        if wanted is not None and found is not None:
            # Mps has no fp64
            scores = logits(self.backend, torch.tensor([before]), last=1)[0, -1].cpu().double()
            gap = float(scores[wanted] - scores[found])
        return Mismatch(
            number, position, wanted, found, gap, gap is not None and abs(gap) <= self._near
        )

    def compared(
        self,
        check: str,
        setting: str,
        outputs: Sequence[Ids],
        expected: Sequence[Ids] = (),
        prompts: Sequence[Ids] = (),
        promise: Promise | None = None,
    ) -> CheckResult:
        """Outputs against the `expected` ones of the same prompts, by default the plain ones."""
        expected = expected or self.expected
        mismatches = []
        for number, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
            position = first_difference(found, wanted)
            if position is not None:
                before = [*(prompts or self.prompts)[number], *wanted[:position]]
                pair = (ids[position] if position < len(ids) else None for ids in (wanted, found))
                mismatches.append(self.mismatch(number, position, before, *pair))
        promise = promise or ("tokens" if self.backend.batch_invariant else "near-ties")
        return self.result(check, setting, promise, expected, mismatches)

    def result(
        self,
        check: str,
        setting: str,
        promise: Promise,
        texts: Sequence[Ids],
        mismatches: Sequence[Mismatch],
    ) -> CheckResult:
        """`texts`: the compared tokens, by prompt."""
        kept = all(promise == "near-ties" and each.near_tie for each in mismatches)
        tokens = sum(map(len, texts))
        return CheckResult(
            check, setting, *self.names, promise, len(texts), tokens, kept, tuple(mismatches)
        )


def check_logits(subject: Subject) -> Iterator[CheckResult]:
    """Logits of prompts with their outputs: as rows of one call, token by token, and with another
    number of threads.
    """
    texts = [
        [*prompt, *output] for prompt, output in zip(subject.prompts, subject.expected, strict=True)
    ]
    longest = max(map(len, texts))
    threads = torch.get_num_threads()
    padded = logits(
        subject.backend, torch.tensor([text + [text[-1]] * (longest - len(text)) for text in texts])
    )

    def one_by_one(size: int = 0) -> list[Tensor]:
        return [logits(subject.backend, torch.tensor([text]), size)[0] for text in texts]

    outputs = {
        (ROWS, f"{len(texts)} rows"): [
            row[: len(text)] for row, text in zip(padded, texts, strict=True)
        ],
        (PIECES, "one by one"): one_by_one(1),
        (PIECES, "in fives"): one_by_one(5),
    }
    alone = one_by_one()
    if subject.backend.device.type == "cpu":
        other = 2 if threads == 1 else 1
        torch.set_num_threads(other)
        try:
            outputs[THREADS, f"{threads} and {other}"] = one_by_one()
        finally:
            torch.set_num_threads(threads)
    promise: Promise = "bits" if subject.backend.batch_invariant else "near-ties"
    for (check, setting), rows in outputs.items():
        mismatches = []
        for number, (got, wanted) in enumerate(zip(rows, alone, strict=True)):
            differs = (
                (wanted != got).any(-1)
                if promise == "bits"
                else wanted.argmax(-1) != got.argmax(-1)
            )
            if differs.any():
                position = int(differs.byte().argmax())
                pair = (int(each[position].argmax()) for each in (wanted, got))
                mismatches.append(
                    subject.mismatch(number, position, texts[number][: position + 1], *pair)
                )
        yield subject.result(check, setting, promise, texts, mismatches)


def check_drafts(subject: Subject) -> Iterator[CheckResult]:
    """Every way to draft gives the tokens of plain decoding."""
    for setting, config in drafting(subject).items():
        yield subject.compared(DRAFTS, setting, subject.alone(config))


def drafting(subject: Subject) -> dict[str, DecodingConfig]:
    """Ways to draft with this model."""
    backend = subject.backend
    exits = subject.exits
    layers = subject.backend.num_layers
    specs = subject.config.specs
    setting = subject.setting
    settings = dict[str, DecodingConfig]()
    for number, exit_layer in enumerate(exits):
        kind = "exit block" if exit_layer in backend.exit_blocks else "exit"
        for spec in specs if exit_layer in subject.middle else (specs[number % len(specs)],):
            name = f"{kind} {exit_layer}, {plural(spec, 'draft')}"
            settings[name] = setting("self-speculative", exit_layer, num_draft_tokens=spec)
    for exit_layer in exits[-1:]:
        settings[f"lookup, then exit {exit_layer}"] = setting(
            "self-speculative", exit_layer, lookup=1
        )
    settings["lookup"] = setting("lookup", lookup=1)
    settings |= {f"{name} drafter": setting(name) for name in backend.drafters}
    if backend.draft_model is not None:
        settings["draft model"] = setting("draft-model")
    if layers > 2:
        skip = tuple(range(2, layers, 3))
        settings[f"skipping {plural(len(skip), 'layer')}"] = setting("draft-and-verify", skip=skip)
    for weights in subject.copies:
        for exit_layer in (layers, *exits[-1:]):
            settings[f"{weights} copy, {exit_layer} layers"] = setting(
                "self-speculative", exit_layer, draft_weights=weights
            )
    known = subject.loaded.recommended()
    adaptive = setting(
        "adaptive", num_draft_tokens=32, exits=known.exits or tuple(exits), profile=known.profile
    )
    return settings | {"adaptive": adaptive}


def check_batches(subject: Subject) -> Iterator[CheckResult]:
    """Rows of a batch get the same tokens as alone, also if they join while others are decoded."""
    for setting, config in subject.usual.items():
        yield subject.compared(BATCH, setting, subject.together(config))
        yield subject.compared(JOINED, setting, subject.joined(config))
    for exit_layer in subject.middle:
        early = subject.setting("early-exit", exit_layer)
        yield subject.compared(
            BATCH, f"early exit {exit_layer}", subject.together(early), subject.alone(early)
        )
    yield subject.compared(BATCH, "adaptive", subject.together(drafting(subject)["adaptive"]))


def check_turns(subject: Subject) -> Iterator[CheckResult]:
    """A next turn on the KV entries of the previous one gets the same tokens as on a fresh
    cache.
    """
    room = subject.backend.spec.context - subject.config.max_new_tokens - 1
    following = [*subject.prompts[1:], subject.prompts[0]]
    texts = zip(subject.prompts, subject.expected, following, strict=True)
    turns = [[*prompt, *output, *more][:room] for prompt, output, more in texts]
    for setting, config in subject.usual.items():
        known = Prefixes(inf, most_texts=2, least=1)
        reused = []
        for pair in zip(subject.prompts, turns, strict=True):
            reused.append(subject.alone(config, pair, known)[1])
        yield subject.compared(TURN, setting, reused, subject.alone(config, turns), turns)


def check_sampling(subject: Subject) -> Iterator[CheckResult]:
    """A seed repeats its tokens, with any drafter; a chi-square test of first token pairs against
    the logits.
    """
    backend = subject.backend
    draws = subject.config.draws
    seed = subject.config.seed
    settings = subject.usual | {"lookup": drafting(subject)["lookup"]}
    for weights, exit_layer in zip(subject.copies[-1:], subject.middle, strict=False):
        settings[f"{weights} copy, exit {exit_layer}"] = subject.setting(
            "self-speculative", exit_layer, draft_weights=weights
        )
    plain = list[Ids]()  # the samples of the first setting, which has no drafter
    for setting, config in settings.items():
        sampled = replace(config, temperature=1.0, seed=seed)
        first = subject.alone(sampled)
        yield subject.compared(SEED, setting, subject.alone(sampled), first, promise="tokens")
        if config.strategy == "autoregressive":
            plain = first
        elif backend.batch_invariant:
            yield subject.compared(SAMPLED_DRAFTS, setting, first, plain)
        if backend.exact:
            continue
        if backend.batch_invariant:
            yield subject.compared(
                ROW, setting, subject.together(sampled, seeds=[seed] * len(first)), first
            )
        if draws:
            prompt = min(subject.prompts, key=lambda ids: max(_following(subject, ids).values()))
            counted = replace(config, max_new_tokens=3, **_COUNTED)
            counts = Counter[Pair]()
            for start in range(0, draws, _AT_ONCE):
                seeds = range(seed + 1 + start, seed + 1 + min(start + _AT_ONCE, draws))
                counts.update(
                    tuple(ids[:2])
                    for ids in subject.together(counted, [prompt] * len(seeds), seeds)
                )
            p_value = chi_square(counts, _pairs(subject, prompt), draws)
            result = CheckResult(
                DISTRIBUTION, setting, *subject.names, "distribution", 1, draws, p_value >= _LEAST_P
            )
            yield replace(result, p_value=p_value)


def _following(subject: Subject, ids: Ids) -> dict[int, float]:
    """The possible next tokens, with their probabilities."""
    probs = probabilities(
        logits(subject.backend, torch.tensor([ids]), last=1)[0, -1], DecodingConfig(**_COUNTED)
    )
    return {int(token): float(probs[token]) for token in probs.nonzero()[:, 0]}


def _pairs(subject: Subject, prompt: Ids) -> dict[Pair, float]:
    """The probability of each pair of first tokens, and of EOS as the only one."""
    pairs: dict[Pair, float] = {}
    for token, share in _following(subject, prompt).items():
        if token in subject.loaded.eos_ids:
            pairs[token,] = share
        else:
            pairs |= {
                (token, second): share * part
                for second, part in _following(subject, [*prompt, token]).items()
            }
    return pairs


def chi_square(counts: Counter[Pair], expected: dict[Pair, float], draws: int) -> float:
    """P-value of the counts under the `expected` probabilities; 0 if an impossible pair was drawn.
    Rare pairs share a cell.
    """
    if counts.keys() - expected.keys():
        return 0.0
    frequent = [pair for pair, share in expected.items() if draws * share >= _LEAST_DRAWS]
    cells = [(counts[pair], draws * expected[pair]) for pair in frequent]
    rest = draws - sum(mean for _, mean in cells)
    if rest > 1e-6 * draws:
        cells.append((counts.total() - sum(count for count, _ in cells), rest))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    half = torch.tensor([max(len(cells) - 1, 1), statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(half[0], half[1]))


CHECKS = (check_logits, check_drafts, check_batches, check_turns, check_sampling)
