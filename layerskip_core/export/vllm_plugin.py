"""A plugin for vLLM (entry point `vllm.general_plugins`): the load format `layerskip` for drafts of
`layerskip export`.

A draft is built of the target's modules and uses its KV pages below the exit; only its exit block
is read from its folder.
"""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

LOAD_FORMAT = "layerskip"

# Of this process; vLLM loads a draft right after its target
_last_target: "ref[nn.Module] | None" = None


def register() -> None:
    """Called by vLLM in each of its processes, perhaps repeatedly."""
    register_model_loader(LOAD_FORMAT)(LayerSkipLoader)


class LayerSkipLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads a target as vLLM does, and a draft as a part of it. Raises ValueError for a draft that
    is no exit of it.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="auto"))

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        global _last_target
        if model_config.runner_type != "draft":
            model: nn.Module = super().load_model(vllm_config, model_config, prefix)
            _last_target = ref(model)
            return model
        target: Any = _last_target and _last_target()
        assert target is not None
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("load format layerskip needs one pipeline stage, got several")
        exit_layer = exported_exit(model_config, target)
        with (
            set_default_torch_dtype(model_config.dtype),
            torch.device(vllm_config.device_config.device),
        ):
            draft = self.create_model(vllm_config, model_config, prefix)
        for layer in range(exit_layer):
            share_all_but_attention(draft.model.layers[layer], target.model.layers[layer])
        draft.model.embed_tokens = target.model.embed_tokens
        draft.lm_head = target.lm_head
        # An exit block, with a norm of its own
        own: list[nn.Module] = list(draft.model.layers[exit_layer:])
        if own:
            own.append(draft.model.norm)
            names = (f"model.layers.{exit_layer}.", "model.norm.")
            weights = self.get_all_weights(model_config, draft)
            draft.load_weights((name, weight) for name, weight in weights if name.startswith(names))
        else:
            draft.model.norm = target.model.norm
        attention = [module for module in draft.modules() if isinstance(module, Attention)]
        process_weights_after_loading(
            nn.ModuleList([*own, *attention]), model_config, vllm_config.device_config.device
        )
        evaluated: nn.Module = draft.eval()
        return evaluated


def exported_exit(draft: ModelConfig, target: Any) -> int:
    """The draft's number of target layers, from its layerskip.json in a folder or on the hub."""
    file = Path(draft.model, "layerskip.json")
    if not Path(draft.model).is_dir():
        with suppress(EntryNotFoundError, HFValidationError):
            file = Path(hf_hub_download(draft.model, file.name, revision=draft.revision))
    exit_layer = json.loads(file.read_text()).get("exported_exit") if file.is_file() else None
    if not isinstance(exit_layer, int) or draft.hf_config.num_hidden_layers - exit_layer not in (
        0,
        1,
    ):
        raise ValueError(
            f"load format layerskip needs a draft that `layerskip export` wrote, got {draft.model}"
        )
    for size in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ):
        mine = getattr(draft.hf_config, size)
        theirs = getattr(target.config, size)
        if mine != theirs:
            raise ValueError(
                f"load format layerskip needs a draft of this target: {size} must be {theirs}, got {mine}"
            )
    return exit_layer


def share_all_but_attention(mine: nn.Module, theirs: nn.Module) -> None:
    """Gives `mine` the modules of `theirs`, except attention, which finds its KV cache by its own
    name.
    """
    for name, child in theirs.named_children():
        # VLLM's layers that share a cache only read it, but drafted tokens must be written
        if isinstance(child, Attention):
            own: Any = getattr(mine, name)
            own.kv_sharing_target_layer_name = child.layer_name
            if not own.attn_backend.forward_includes_kv_cache_update:
                own.impl.__class__ = writing(type(own.impl))
        elif any(isinstance(module, Attention) for module in child.modules()):
            share_all_but_attention(getattr(mine, name), child)
        else:
            setattr(mine, name, child)


def writing(attention: type[Any]) -> type[Any]:
    """A subclass of vLLM's attention that writes keys and values to the cache before attention
    reads it.
    """

    class Writing(attention):  # type: ignore[misc]
        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            *rest: Any,
            **named: Any,
        ) -> Any:
            if attn_metadata is not None:  # there is none while vLLM warms up
                *_, slots = get_attention_context(layer.layer_name)
                self.do_kv_cache_update(layer, key, value, kv_cache, slots)
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, *rest, **named
            )

    return Writing
