"""Constrained decoding: what masks cost, and what tokens that the grammar forces gain. 40 prompts over five schemas.

    python examples/json_answers.py --model HuggingFaceTB/SmolLM2-135M-Instruct

One line per way to decode: plain decoding without a grammar, with one, and adaptive drafts with one, without and with the
tokens that it forces. Every answer is compared with that of plain decoding under the grammar, and parses as JSON.
"""

import argparse
import json
import time
from dataclasses import replace
from statistics import median

from layerskip_core import load
from layerskip_core.decoding.dialogue import TextStream
from layerskip_core.decoding.processing import LogitsProcessor

TEXT, NUMBER = {"type": "string", "maxLength": 40}, {"type": "integer", "minimum": 0, "maximum": 100}


def schema(**properties):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS = {
    "the person": schema(first_name=TEXT, last_name=TEXT, age=NUMBER, occupation=TEXT),
    "the product": schema(product_name=TEXT, price=NUMBER, currency={"enum": ["USD", "EUR"]}, in_stock={"type": "boolean"}),
    "the event": schema(title=TEXT, location=schema(city=TEXT, country=TEXT), participants=NUMBER),
    "the sentiment": schema(sentiment={"enum": ["positive", "neutral", "negative"]}, confidence_percent=NUMBER, reason=TEXT),
    "the call": schema(function_name={"enum": ["search", "send"]}, arguments=schema(query=TEXT, maximum_results=NUMBER)),
}
TEXTS = (
    "Maria Lopez, 34, teaches mathematics in Madrid.",
    "The red bicycle costs 90 euros and is sold out.",
    "The conference in Oslo, Norway, had 80 guests.",
    "I loved the film, although it was too long.",
    "Find five papers about early exits.",
    "John Smith is a 51-year-old carpenter from Leeds.",
    "A lamp for 20 dollars, available now.",
    "The soup was cold and the waiter was rude.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--texts", type=int, default=len(TEXTS))
    parser.add_argument("--quantize", default=None)
    arguments = parser.parse_args()
    model = load(arguments.model, quantize=arguments.quantize)
    decoder, honest = model.decoder, LogitsProcessor.forced
    tasks = []
    for what, asked in SCHEMAS.items():
        for text in TEXTS[: arguments.texts]:
            ids = decoder.encode_prompt(f"Describe {what} in this text as JSON.\n\n{text}")
            config = decoder.resolve({"schema": asked, "strategy": "autoregressive", "max_new_tokens": 120})
            tasks.append((ids, config))
    drafts = decoder.resolve({})
    expected: list[list[int]] = []
    print(f"{decoder.name}: {len(tasks)} prompts")
    for name in ("warm up", "plain, no grammar", "plain", "drafts, nothing forced", "drafts"):
        LogitsProcessor.forced = honest if name == "drafts" else lambda *_: []
        seconds, tokens, passes, longest = [], 0, 0, []
        for number, (ids, config) in enumerate(tasks[:4] if name == "warm up" else tasks):
            if name == "plain, no grammar":
                config = replace(config, guided=None, guide=None, ignore_eos=True, max_new_tokens=48)
            elif name != "plain":
                config = replace(drafts, guided=config.guided, guide=config.guide, max_new_tokens=config.max_new_tokens)
            started = time.perf_counter()
            answer = TextStream(decoder, ids, config).finish()
            longest.append(time.perf_counter() - started)
            stats = answer.stats
            seconds.append(stats.total_seconds - stats.prefill_seconds)
            tokens, passes = tokens + stats.new_tokens - 1, passes + sum(stats.steps_by_drafter.values())
            if name == "plain":
                expected.append(answer.ids)
            elif name.startswith("drafts"):
                assert answer.ids == expected[number], (answer.ids, expected[number])
                assert answer.finish_reason == "length" or json.loads(answer.text)
        speed = tokens / sum(seconds)
        print(f"{name:24} {speed:7.1f} tokens/s  {1e3 / speed:6.2f} ms per token  {passes} steps  {tokens} tokens  "
              f"median answer {median(longest):.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
