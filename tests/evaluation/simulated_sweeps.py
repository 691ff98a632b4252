"""Sweeps of stand-in times: how often something is recommended where nothing pays, and where one of twenty settings does.

`python tests/evaluation/simulated_sweeps.py 1000` prints a table.
"""

import sys
from math import exp
from random import Random

from layerskip_core.config.evaluation import SweepConfig
from layerskip_core.evaluation.measure.figures import contest, finalists, recommend
from layerskip_core.evaluation.results import Result

SETTINGS, PROMPTS = 20, 12
NAMES = ["autoregressive", *["self-speculative"] * (SETTINGS - 1), "adaptive"]


class Machine:
    """Its speed wanders by 10%, and times have 3% of noise. Prompts suit settings more or less, by `spread`."""

    def __init__(self, seed, speeds, spread):
        self.draw, self.speeds, self.spread = Random(seed), speeds, spread
        self.prompts, self.own, self.now, self.load = {}, {}, 0.0, 0.0

    def answer(self, prompt, place):
        """Seconds and tokens."""
        draw = self.draw
        tokens, base = self.prompts.setdefault(prompt, (draw.randint(20, 60), 0.001 * exp(draw.gauss(0, 0.2))))
        own = self.own.setdefault((prompt, place), draw.gauss(0, self.spread) if place else 0.0)
        self.load = 0.98 * self.load + draw.gauss(0, 0.02)
        seconds = tokens * base / self.speeds[place] * exp(self.load - own + draw.gauss(0, 0.03))
        self.now += seconds
        return seconds, tokens


def simulated(seed, speed, spread):
    """(the advice, the place of the setting that has this speed, the best measured speed) of a sweep where others gain 0."""
    right = 1 + seed % (SETTINGS - 1)
    machine = Machine(seed, [speed if place == right else 1.0 for place in range(SETTINGS + 1)], spread)
    totals = [0.0] * (SETTINGS + 1)
    for prompt in range(PROMPTS):
        for place in range(SETTINGS + 1):
            totals[place] += machine.answer(prompt, place)[0]
    speeds = [totals[0] / total for total in totals]
    results = [Result(name, place, 4, {"known": 1.0}, speedup=speeds[place]) for place, name in enumerate(NAMES)]
    found = None
    if places := finalists(results, 1e-3):
        budget, clock = 0.25 * machine.now, lambda: machine.now
        run = contest(places, 256, lambda prompt, place: machine.answer(1000 + prompt, place), budget, clock=clock)
        while found is None:
            try:
                next(run)
            except StopIteration as end:
                found = end.value
    return recommend(results, 1e-3, "known", SweepConfig(), [None] * len(results), found), right, max(speeds)


if __name__ == "__main__":
    print("prompts differ by | one gains | something recommended | that one | fastest of the sweep above 1.05")
    for spread in (0.05, 0.1, 0.15):
        for speed in (1.0, 1.1, 1.2):
            sweeps = [simulated(seed, speed, spread) for seed in range(int(sys.argv[1]))]
            some = sum(advice.pays for advice, _, _ in sweeps) / len(sweeps)
            that = sum(advice.exit_layer == right for advice, right, _ in sweeps) / len(sweeps)
            old = sum(best >= 1.05 for _, _, best in sweeps) / len(sweeps)
            print(f"{spread:.0%} | {speed:.2f} | {some:.1%} | {that:.1%} | {old:.1%}", flush=True)
