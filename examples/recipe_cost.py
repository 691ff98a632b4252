"""Peak memory and time of a training step under the recipe, relative to a plain step with the same chunked last-layer loss.

    python examples/recipe_cost.py MODEL --batch 8 --length 256 --rotation 8 --steps 5

Each kind of step runs in its own process, on random tokens, with AdamW. The count beside the times is the multiply-adds of the
same steps; it accounts for the rows that dropout left out and the heads of the exits that were on. Figures are medians over the
steps, which stderr shows as they end. On a busy machine steps take many times as long, and the fastest step says more.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median

PLAIN = ["--pmax", "0", "--curriculum", "none"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as for layerskip finetune --model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rotation", type=int, default=8)
    parser.add_argument("--pmax", type=float, default=0.2)
    parser.add_argument("--curriculum", default="rotational")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    parser.add_argument("--device", default="cpu", help="as for layerskip finetune --device; memory is the GPU's on cuda")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: one per core that this process may use")
    parser.add_argument("--one", action="store_true", help="measure only this setting, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments)))
        return
    plain, recipe = (in_a_process([*sys.argv[1:], *extra, "--one"]) for extra in (PLAIN, []))
    for name, result in (("plain", plain), ("recipe", recipe)):
        seconds, exits = result["seconds"], result["exits"]
        print(
            f"{name:7} {median(seconds):.3f} s per step (fastest {min(seconds):.3f}), peak {result['peak_mb']:.0f} MB, "
            f"{sum(exits) / len(exits):.1f} exits per step"
        )
    print(f"memory {recipe['peak_mb'] / plain['peak_mb']:.3f}x plain")
    for name, pick in (("median", median), ("fastest", min)):
        took = pick(recipe["seconds"]) / pick(plain["seconds"])
        over = pick(seconds_per_count(recipe)) / pick(seconds_per_count(plain))
        print(f"time, {name} step: {took:.3f}x plain; counted {took / over:.3f}x; time over count {over:.3f}")


def seconds_per_count(result: dict) -> list[float]:
    """The time of each step over its own multiply-adds, because exits and dropped rows differ from step to step."""
    return [seconds / count for seconds, count in zip(result["seconds"], result["counts"], strict=True)]


def in_a_process(arguments: list[str]) -> dict:
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measured(arguments: argparse.Namespace) -> dict:
    """Seconds, multiply-adds and exits of each step, and the peak memory of the process or its GPU in MB."""
    import torch

    from layerskip_core.checkpoint.open import for_training
    from layerskip_core.config.training import RecipeSettings
    from layerskip_core.training.module import RecipeModule
    from layerskip_core.training.recipe import RunStep, resolve_recipe

    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    loaded = for_training(arguments.model, arguments.device, "fp32")
    device = loaded.backend.device
    rotation = arguments.rotation if arguments.curriculum == "rotational" else None
    asked = RecipeSettings("finetune", arguments.pmax, e_scale=0.2, curriculum=arguments.curriculum, rotation=rotation)
    recipe = resolve_recipe(asked, loaded.backend.spec, arguments.steps)
    training = RecipeModule(loaded.model, recipe).train()
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-5)
    ids = torch.randint(3, loaded.backend.spec.vocab, (arguments.batch, arguments.length), device=device)

    def step(number: int, rows: torch.Tensor) -> tuple[int, ...]:
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.dtype == "bf16"):
            output = training(rows, rows, RunStep(number, 1000))
        (output["loss"] / rows.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return output["exit_layers"]

    step(0, ids[:1, :16])  # the optimizer's state
    times, counts, exits = [], [], []
    for number in range(arguments.steps):
        started = time.perf_counter()
        on = step(number, ids)
        times.append(time.perf_counter() - started)
        counts.append(multiply_adds(training, number, on, arguments.batch, arguments.length))
        exits.append(len(on))
        print(f"step {number + 1}: {times[-1]:.3f} s, {len(on)} exits, {counts[-1] / 1e9:.0f} G counted", file=sys.stderr)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        peak_mb = torch.cuda.max_memory_allocated(device) / 2**20
    return {"seconds": times, "counts": counts, "exits": exits, "peak_mb": peak_mb}


def multiply_adds(training, number: int, exits: tuple[int, ...], batch: int, length: int) -> float:
    """Multiply-adds of one step: 1x forward and 2x backward; a head of weight 0 only 1x."""
    from layerskip_core.training.recipe import dropout_rates, exit_weights, kept_rows

    backend, recipe = training.backend, training.recipe
    rates = dropout_rates(recipe.p_max, backend.num_layers, profile=recipe.dropout_profile)
    kept = sum(max(1, len(kept_rows(rate, batch, training.seed, number, 0, layer))) for layer, rate in enumerate(rates))
    layer = sum(parameter.numel() for parameter in backend.layers[0].parameters())
    attention = length * backend.spec.queries  # scores and values, causal
    head = backend.spec.hidden * backend.spec.vocab
    weights = exit_weights(exits, backend.num_layers, recipe.e_scale, recipe.exit_weights)
    heads = sum(3 if weight > 0 else 1 for weight in weights)
    return length * (3.0 * kept * (layer + attention) + batch * heads * head)


if __name__ == "__main__":
    main()
