"""A program for vLLM's environment, which need not have this package: greedy answers in fp32, drafted in the EAGLE-3 layout.

Reads as JSON from standard input a model's folder, prompts as token ids, the drafts of a round and the tokens of an answer. The
last line that it prints is JSON: vLLM's version, and each answer as the token ids of its steps.
"""

import json
import sys


def main() -> None:
    import vllm

    asked = json.load(sys.stdin)
    speculative = {"method": "eagle3", "model": f"{asked['model']}/eagle3", "num_speculative_tokens": asked["drafts"]}
    llm = vllm.LLM(
        asked["model"],
        speculative_config=speculative,
        dtype="float32",
        max_model_len=max(map(len, asked["prompts"])) + asked["tokens"] + asked["drafts"] + 1,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
    )
    greedy, answers = vllm.SamplingParams(temperature=0, max_tokens=asked["tokens"]), []
    for number, prompt in enumerate(asked["prompts"]):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, greedy)
        ids: list[int] = []
        steps: list[list[int]] = []
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                known, ids = len(ids), list(output.outputs[0].token_ids)
                steps.append(ids[known:])
        answers.append(steps)
    print(json.dumps({"engine": f"vLLM {vllm.__version__}", "answers": answers}))


if __name__ == "__main__":
    main()
