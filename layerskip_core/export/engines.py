"""How engines decode a model with a draft model, as commands or programs to copy."""

import json
from collections.abc import Callable
from shlex import quote

from ..config.export import Engine

Recipe = Callable[[str, str, int], str]  # from target, draft and number of draft tokens to Markdown


def instructions(engine: Engine, target: str, draft: str, drafts: int) -> str:
    """Markdown for one engine. `target` and `draft` are folders or hub ids, for llama.cpp GGUF files."""
    return _RECIPES[engine](target, draft, drafts)


def _vllm(target: str, draft: str, drafts: int) -> str:
    config = json.dumps({"method": "draft_model", "model": draft, "num_speculative_tokens": drafts})
    plugin = (
        "# With layerskip in the environment of vLLM (pip install --no-deps), --load-format layerskip makes the draft of the\n"
        "# weights and the cache of the target, without copies.\n"
    )
    return _code("sh", f"{plugin}vllm serve {quote(target)} \\\n    --speculative-config {quote(config)}")


def _sglang(target: str, draft: str, drafts: int) -> str:
    flags = (
        f"--model-path {quote(target)}",
        f"--speculative-algorithm STANDALONE --speculative-draft-model-path {quote(draft)}",
        f"--speculative-num-steps {drafts} --speculative-eagle-topk 1 --speculative-num-draft-tokens {drafts + 1}",
    )
    return _code("sh", " \\\n    ".join(("python -m sglang.launch_server", *flags)))


def _llama_cpp(target: str, draft: str, drafts: int) -> str:
    flags = f"--spec-type draft-simple -md {quote(draft)} --spec-draft-n-max {drafts}"
    return _code("sh", f"llama-server -m {quote(target)} \\\n    {flags}")


def _tensorrt(target: str, draft: str, drafts: int) -> str:
    return _code(
        "python",
        f"""from tensorrt_llm import LLM
from tensorrt_llm.llmapi import DraftTargetDecodingConfig

drafting = DraftTargetDecodingConfig(max_draft_len={drafts}, speculative_model={draft!r})
llm = LLM({target!r}, speculative_config=drafting, disable_overlap_scheduler=True)
print(llm.generate("PROMPT").outputs[0].text)""",
    )


def _transformers(target: str, draft: str, drafts: int) -> str:
    return _code(
        "python",
        f"""from transformers import AutoModelForCausalLM, AutoTokenizer

target, draft = {target!r}, {draft!r}
tokenizer = AutoTokenizer.from_pretrained(target)
model = AutoModelForCausalLM.from_pretrained(target)
assistant = AutoModelForCausalLM.from_pretrained(draft)
assistant.generation_config.num_assistant_tokens = {drafts}
assistant.generation_config.num_assistant_tokens_schedule = "constant"
assistant.generation_config.assistant_confidence_threshold = 0.0
inputs = tokenizer("PROMPT", return_tensors="pt")
output = model.generate(**inputs, assistant_model=assistant, do_sample=False, max_new_tokens=128)
print(tokenizer.decode(output[0], skip_special_tokens=True))""",
    )


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```\n"


_RECIPES: dict[Engine, Recipe] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "tensorrt-llm": _tensorrt,
    "transformers": _transformers,
}
