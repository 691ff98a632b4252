"""An export, from its settings to the files of `output`, and how engines decode with it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from ..checkpoint.beside import read_exit_blocks
from ..checkpoint.folder import EXIT_BLOCKS_FILE, INT4_FILE
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Trainable, decoder_of
from ..checkpoint.locate import EMBEDDED, is_adapter, locate, reading
from ..checkpoint.open import for_training
from ..checkpoint.save import refuse_overwrite, save_checkpoint
from ..checkpoint.transformers_read import written_dtype
from ..config.checks import require_exit_layer
from ..config.export import Engine, ExportConfig
from ..errors import ConfigError
from ..model import TransformersBackend
from ..model.exit_blocks import NO_BLOCKS, ExitBlocks
from .draft import cut_to_exit, recommended_length
from .gguf import DRAFT, TARGET, refuse_gguf, write_pair

README = "README.md"


@dataclass(frozen=True)
class Exported:
    """What was written: exit and layers, whether the exit was trained, and the README's text if an engine was named."""

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
    if Path(config.output).resolve() == Path(config.model).resolve():
        raise ConfigError(f"`output` must be another folder than the model's, got {config.output}", "output")
    if config.as_gguf:
        refuse_gguf(config.output, config.overwrite, README)
    else:
        refuse_overwrite(config.output, config.overwrite, (README,) if config.engine else ())
    loaded = for_training(config.model, "cpu", "fp32")
    blocks = _blocks_of(loaded)
    decoder = decoder_of(replace(loaded, backend=TransformersBackend(loaded.model, blocks)))
    recommended, layers = decoder.recommended(), loaded.backend.num_layers
    exit_layer = recommended.exit_layer if config.exit_layer is None else config.exit_layer
    require_exit_layer(exit_layer, layers, may_be_last=config.engine is None)
    draft_layers = exit_layer + any(block.exit_layer == exit_layer for block in blocks.blocks)
    readme = None
    if config.engine is not None:
        length = recommended_length(decoder, exit_layer, draft_layers)
        how = instructions(config.engine, *_names(config), length.tokens)
        readme = _readme(config, exit_layer, layers, f"{length.tokens} draft tokens: {length.why}", how)
    files = {} if readme is None else {README: readme.encode()}
    if config.as_gguf:
        write_pair(loaded, exit_layer, blocks, config.output, "f16" if config.dtype == "auto" else config.dtype, files)
    else:
        info = CheckpointInfo(
            loaded.info.prompt_template,
            details={"exported_from": config.model, "exported_exit": exit_layer},
            system=loaded.info.system,
        )
        dtype = written_dtype(loaded, config.dtype)
        model = cut_to_exit(loaded, exit_layer, blocks)
        save_checkpoint(model, loaded.tokenizer, info, config.output, dtype, files)
    return Exported(exit_layer, draft_layers, exit_layer == layers or exit_layer in recommended.exits, readme)


def _blocks_of(loaded: Trainable) -> ExitBlocks:
    """The exit blocks beside the model's weights. An adapter changes the weights, so it has none."""
    if is_adapter(loaded.name) or not (location := locate(loaded.name)).is_folder:
        return NO_BLOCKS
    return reading(loaded.name, lambda: read_exit_blocks(location.path, loaded.backend.spec, loaded.model.get_parameter))


def _names(config: ExportConfig) -> tuple[str, str]:
    """Target and draft, as engines take them."""
    output = Path(config.output).resolve()
    if config.as_gguf:
        return str(output / TARGET), str(output / DRAFT)
    return _target(config) or f"{output}-target", str(output)


def _target(config: ExportConfig) -> str | None:
    """The model as engines can load it: a hub id, or a folder with no weights beside the model's own; None if it is neither."""
    name = config.model
    if name in EMBEDDED or is_adapter(name) or (location := locate(name)).gguf_file is not None:
        return None
    if not location.is_folder:
        return name
    beside = any((Path(name) / file).exists() for file in (INT4_FILE, EXIT_BLOCKS_FILE))
    return None if beside else str(Path(name).resolve())


def _readme(config: ExportConfig, exit_layer: int, layers: int, length: str, how: str) -> str:
    parts = [f"# Exit {exit_layer} of {config.model} as a draft model, with {config.engine}", f"{length}."]
    if _target(config) is None and not config.as_gguf:
        target, _ = _names(config)
        name = config.model if config.model in EMBEDDED else str(Path(config.model).resolve())
        parts.append("First the model itself, in a form that the engine loads:")
        parts.append(f"```sh\nlayerskip export {quote(name)} --exit {layers} --output {quote(target)}\n```")
    return "\n\n".join([*parts, how])


def instructions(engine: Engine, target: str, draft: str, drafts: int) -> str:
    """Markdown: commands or a program to copy. `target` and `draft` are folders or hub ids, for llama.cpp GGUF files."""
    recipes = {"vllm": _vllm, "llama.cpp": _llama_cpp, "transformers": _transformers}
    return recipes[engine](target, draft, drafts)


def _vllm(target: str, draft: str, drafts: int) -> str:
    config = json.dumps({"method": "draft_model", "model": draft, "num_speculative_tokens": drafts})
    plugin = (
        "# With layerskip in the environment of vLLM (pip install --no-deps), --load-format layerskip makes the draft of the\n"
        "# weights and the cache of the target, without copies.\n"
    )
    return _code("sh", f"{plugin}vllm serve {quote(target)} \\\n    --speculative-config {quote(config)}")


def _llama_cpp(target: str, draft: str, drafts: int) -> str:
    flags = f"--spec-type draft-simple -md {quote(draft)} --spec-draft-n-max {drafts}"
    return _code("sh", f"llama-server -m {quote(target)} \\\n    {flags}")


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
