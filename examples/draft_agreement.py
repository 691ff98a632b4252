"""How often drafters that read a text alone agree with greedy decoding: low-bit copies of all layers, and exit blocks.

    python examples/draft_agreement.py --model MODEL --dtype bf16 --task scitldr --data SCITLDR_TEST.jsonl --copies int8,int4

The model answers each prompt greedily. Then each drafter reads prompt and answer, and predicts every token of the answer from
those before it. A copy sees its own keys and values only: in decoding, where it sees the model's, it agrees more often. An exit
block is given the model's true states, as the first draft of a round is.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import TaskConfig
from layerskip_core.config.model import PackingConfig, PromptingConfig
from layerskip_core.decoding import decode
from layerskip_core.evaluation.tasks import load_task
from layerskip_core.model import Backend
from layerskip_core.model.backend import DraftSide
from layerskip_core.model.cache import Places
from layerskip_core.model.exit_blocks import PlacedBlock, features_of

Predict = Callable[[Tensor, Places], Tensor]


def main() -> None:
    arguments = parsed()
    loaded = for_decoding(arguments.model, "cpu", arguments.dtype, PackingConfig(draft_weights=arguments.copies))
    prompting = PromptingConfig(arguments.template)
    task = load_task(
        TaskConfig(arguments.task, arguments.data, samples=arguments.samples, shots=arguments.shots, prompting=prompting)
    )
    loaded, config = task.prepared(loaded), DecodingConfig("autoregressive", max_new_tokens=arguments.max_new_tokens)
    drafters = drafters_of(loaded.backend)
    agreed, total = dict.fromkeys(drafters, 0), 0
    for example in task.examples:
        prompt = loaded.encode_prompt(example.prompt)
        answer = [token for [step] in decode(loaded.backend, prompt, config, loaded.eos_ids) for token in step.ids]
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        places = loaded.backend.new_cache(*ids.shape).span(0, ids.shape[1])
        total += len(answer)
        for name, predict in drafters.items():
            with torch.inference_mode():
                predicted = predict(ids, places)[0, len(prompt) - 1 :].argmax(-1)
            agreed[name] += int((predicted == torch.tensor(answer)).sum())
    print(f"{loaded.name}: {loaded.backend.implementation}; {len(task.examples)} prompts, {total} tokens\n")
    print("| drafter | agreement |\n|---|---|")
    for name, count in agreed.items():
        print(f"| {name} | {count / total:.1%} |")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--copies", type=lambda text: tuple(text.split(",")), default=(), help="int8, int4 or both")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--shots", type=int)
    parser.add_argument("--template")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    return parser.parse_args()


def drafters_of(backend: Backend) -> dict[str, Predict]:
    """What predicts, by name: ids (1, T) and their places to logits (1, T, V)."""
    copies = {weights: of_copy(side) for weights, side in backend.draft_sides.items() if weights is not None}
    blocks = {f"exit {exit_layer}": of_block(backend, block) for exit_layer, block in backend.exit_blocks.items()}
    return {**copies, **blocks}


def of_copy(side: DraftSide) -> Predict:
    return lambda ids, places: side.whole.unembed(side.layers.run_layers(side.layers.embed(ids), 0, side.num_layers, places))


def of_block(backend: Backend, block: PlacedBlock) -> Predict:
    def predict(ids: Tensor, places: Places) -> Tensor:
        states = backend.run_layers(backend.embed(ids), 0, block.block.exit_layer, places)
        full = backend.run_layers(states, block.block.exit_layer, backend.num_layers, places)
        hidden = block.enter(states, features_of(backend.normed(full)))
        return block.head(backend.run_layers(hidden, block.layer, block.layer + 1, places))

    return predict


if __name__ == "__main__":
    main()
