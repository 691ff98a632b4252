"""An export, from its settings to the files of `output`, and how engines decode with it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from ..checkpoint.beside import read_exit_blocks
from ..checkpoint.folder import EXIT_BLOCKS_FILE, INT4_FILE
from ..checkpoint.importing import written_dtype
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import decoder_of
from ..checkpoint.locate import EMBEDDED, is_adapter, locate, reading
from ..checkpoint.open import for_training
from ..checkpoint.save import refuse_overwrite, save_checkpoint
from ..config.decoding import require_exit_layer
from ..config.model import Engine, ExportConfig
from ..errors import require
from ..model import TransformersBackend
from ..model.exit_blocks import NO_BLOCKS
from .draft import cut_to_exit, recommended_length
from .gguf import DRAFT, TARGET, refuse_gguf, write_pair

README = "README.md"


@dataclass(frozen=True)
class Exported:
    """The written model: exit and layers, whether the exit was trained, and the README's text if an engine was named."""

    exit_layer: int
    layers: int
    trained: bool
    readme: str | None


def export(config: ExportConfig) -> Exported:
    """Writes an exit of a model to `output`, whose lock the caller holds: a transformers checkpoint, or GGUF with the model.

    Its logits are those of the exit. With the last layer as the exit it is the whole model, without the files beside it.

    Raises:
        CheckpointError: the model cannot be read, or the folder not be written.
        ConfigError: the folder is the model's own, or holds another model or a README.md of someone else; the exit is not one
            of the model's, or needs the whole model.
    """
    own = Path(config.output).resolve() == Path(config.model).resolve()
    require(not own, "output", "another folder than the model's", config.output)
    if config.as_gguf:
        refuse_gguf(config.output, config.overwrite, README)
    else:
        refuse_overwrite(config.output, config.overwrite, (README,) if config.engine else ())
    loaded, blocks = for_training(config.model, "cpu", "fp32"), NO_BLOCKS
    if (folder := locate(loaded.name).folder) is not None:
        spec, weight_of = loaded.backend.spec, loaded.model.get_parameter
        blocks = reading(loaded.name, lambda: read_exit_blocks(folder, spec, weight_of))
    decoder = decoder_of(replace(loaded, backend=TransformersBackend(loaded.model, blocks)))
    recommended, layers = decoder.recommended(), loaded.backend.num_layers
    exit_layer = recommended.exit_layer if config.exit_layer is None else config.exit_layer
    require_exit_layer(exit_layer, layers, may_be_last=config.engine is None)
    draft_layers = exit_layer + any(block.exit_layer == exit_layer for block in blocks.blocks)
    readme, files = None, {}
    if config.engine is not None:
        readme = _readme(config, exit_layer, layers, *recommended_length(decoder, exit_layer, draft_layers))
        files[README] = readme.encode()
    if config.as_gguf:
        write_pair(loaded, exit_layer, blocks, config.output, "f16" if config.dtype == "auto" else config.dtype, files)
    else:
        details = {"exported_from": config.model, "exported_exit": exit_layer}
        info = CheckpointInfo(loaded.info.prompt_template, details=details, system=loaded.info.system)
        dtype = written_dtype(loaded, config.dtype)
        save_checkpoint(cut_to_exit(loaded, exit_layer, blocks), loaded.tokenizer, info, config.output, dtype, files)
    return Exported(exit_layer, draft_layers, exit_layer == layers or exit_layer in recommended.exits, readme)


def _readme(config: ExportConfig, exit_layer: int, layers: int, drafts: int, why: str) -> str:
    """How the engine decodes; first how to write the model itself, if the engine cannot load it as it is."""
    assert config.engine is not None
    output, engine = Path(config.output).resolve(), config.engine
    parts = [f"# Exit {exit_layer} of {config.model} as a draft model, with {engine}", f"{drafts} draft tokens: {why}."]
    if config.as_gguf:
        return "\n\n".join([*parts, instructions(engine, str(output / TARGET), str(output / DRAFT), drafts)])
    model, target = config.model if config.model in EMBEDDED else str(Path(config.model).resolve()), f"{output}-target"
    location = None if config.model in EMBEDDED or is_adapter(config.model) else locate(config.model)
    beside = any((Path(config.model) / file).exists() for file in (INT4_FILE, EXIT_BLOCKS_FILE))
    if location is not None and location.gguf_file is None and not beside:
        target = config.model if location.folder is None else model  # a hub id, or a folder
    else:
        parts.append("First the model itself, in a form that the engine loads:")
        parts.append(f"```sh\nlayerskip export {quote(model)} --exit {layers} --output {quote(target)}\n```")
    return "\n\n".join([*parts, instructions(engine, target, str(output), drafts)])


_VLLM = """# With layerskip in the environment of vLLM (pip install --no-deps), --load-format layerskip makes the draft of the
# weights and the cache of the target, without copies.
vllm serve {target} \\
    --speculative-config {speculative}"""
_LLAMA_CPP = """llama-server -m {target} \\
    --spec-type draft-simple -md {draft} --spec-draft-n-max {drafts}"""
_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

target, draft = {target}, {draft}
tokenizer = AutoTokenizer.from_pretrained(target)
model = AutoModelForCausalLM.from_pretrained(target)
assistant = AutoModelForCausalLM.from_pretrained(draft)
assistant.generation_config.num_assistant_tokens = {drafts}
assistant.generation_config.num_assistant_tokens_schedule = "constant"
assistant.generation_config.assistant_confidence_threshold = 0.0
inputs = tokenizer("PROMPT", return_tensors="pt")
output = model.generate(**inputs, assistant_model=assistant, do_sample=False, max_new_tokens=128)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
_RECIPES = {"vllm": ("sh", _VLLM), "llama.cpp": ("sh", _LLAMA_CPP), "transformers": ("python", _TRANSFORMERS)}


def instructions(engine: Engine, target: str, draft: str, drafts: int) -> str:
    """Markdown: commands or a program to copy. `target` and `draft` are folders or hub ids, for llama.cpp GGUF files."""
    language, recipe = _RECIPES[engine]
    speculative = json.dumps({"method": "draft_model", "model": draft, "num_speculative_tokens": drafts})
    quoted = repr if language == "python" else quote
    text = recipe.format(target=quoted(target), draft=quoted(draft), drafts=drafts, speculative=quote(speculative))
    return f"```{language}\n{text}\n```\n"
