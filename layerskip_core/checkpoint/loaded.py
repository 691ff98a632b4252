"""A model in memory: a Decoder generates text, a Trainable is a transformers model that can be
trained and saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from ..config.decoding import DecodingConfig, DecodingOptions, RequestOptions, choices
from ..config.model import DTYPES, PLAIN, PackingConfig, Quantization
from ..config.options import checked
from ..config.resolution import (
    EXACT,
    Policy,
    Recommended,
    policy_named,
    policy_options,
    policy_packing,
    resolve,
)
from ..errors import CheckpointError, ConfigError, require, require_choice
from ..model import Backend, TransformersBackend
from ..prompting import RAW, PromptTemplate, Tokenizer, encode_prompt, resolve_template, special_ids
from .info import CheckpointInfo
from .locate import PUBLISHED
from .sidecars import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LARGE_MODEL = 50_000_000  # parameters; from here on bf16 is faster on a CPU with AVX-512
_USUAL_DRAFTS = 6  # draft tokens without a recommendation


def pick_device(device: str) -> torch.device:
    """`auto`: CUDA where available, else the CPU. Raises ConfigError for a device that this machine
    lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"`device` must be auto, cpu, cuda, cuda:N or mps, got {device}"
        ) from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(chosen.type, False):
        raise ConfigError(
            f"`device` {device} was asked for, but this machine or this build of torch has none"
        )
    return chosen


def pick_dtype(dtype: str, device: torch.device, parameters: int) -> torch.dtype:
    """`auto`: bf16 on CUDA, and on a CPU with AVX-512 for 50M parameters or more; else fp32. Raises
    ConfigError.
    """
    require_choice(dtype, "dtype", DTYPES)
    if dtype != "auto":
        return TORCH_DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16
    has_avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.bfloat16 if has_avx512 and parameters >= _LARGE_MODEL else torch.float32


@dataclass(frozen=True)
class Decoder:
    """A model that generates text."""

    name: str
    backend: Backend
    tokenizer: Tokenizer
    info: CheckpointInfo
    eos_ids: frozenset[int]
    template: PromptTemplate
    notes: tuple[str, ...] = ()  # for the user
    generation: object = None  # generation_config.json as attributes
    # Whether calibrated int4 weights, which it lacks, would draft faster than its int8 copy
    gains_by_calibration: bool = False

    def with_template(self, asked: str | None, system: str | None) -> "Decoder":
        """The same model with another template; see `resolve_template`."""
        return replace(
            self, template=resolve_template(asked, system, self.info.template, self.tokenizer)
        )

    def encode_prompt(self, prompt: str, turns: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Token ids of a prompt in `template`, after earlier `turns` (prompts with their answers)
        in a chat template.

        Raises ConfigError for an empty prompt, unknown tokens and invalid Unicode, CheckpointError
        for a chat template that fails. White space alone is a prompt in the raw template only.
        """
        if not (prompt if self.template.text == RAW else prompt.strip()):
            raise ConfigError("the prompt is empty")
        return self.known_ids(encode_prompt(self.tokenizer, self.template, prompt, turns))

    def known_ids(self, ids: list[int]) -> list[int]:
        """Returns `ids`. Raises ConfigError for an id without an embedding."""
        last = max(ids, default=0)
        vocab = self.backend.spec.vocab
        if last >= vocab:
            token = self.tokenizer.decode([last])
            raise ConfigError(
                f"the prompt must have tokens of the model, ids below {vocab}, got {token!r}, id {last}"
            )
        return ids

    def prompt_start(self) -> list[int]:
        """The first tokens, which all prompts share."""
        one = self.encode_prompt("a")
        other = self.encode_prompt("1")
        shared = []
        for token, other_token in zip(one, other, strict=False):
            if token != other_token:
                break
            shared.append(token)
        return shared

    def detokenize(self, ids: list[int]) -> str:
        """The text of tokens, without special ones."""
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def ends(self, stop: Sequence[str]) -> frozenset[int]:
        """The ids that end an answer: EOS, and special tokens among the stop strings, which have no
        text.
        """
        if not stop:
            return self.eos_ids
        special = special_ids(self.tokenizer)
        return self.eos_ids | {special[text] for text in stop if text in special}

    def ends_of(self, config: DecodingConfig) -> frozenset[int]:
        """All ids that end an answer: `ends` (without EOS if `ignore_eos`) and `stop_token_ids`."""
        ids = self.ends(config.stop)
        if config.ignore_eos:
            ids -= self.eos_ids
        return ids | set(config.stop_token_ids)

    def token_text(self, token: int) -> str:
        """A token's text as it continues a text, special tokens included."""
        before = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        text = str(self.tokenizer.decode([*before, token]))
        return text[len(str(self.tokenizer.decode(before))) :]

    @property
    def own_sampling(self) -> RequestOptions:
        """Sampling by generation_config.json: greedy without `do_sample`. Raises
        CheckpointError.
        """
        is_sampled = getattr(self.generation, "do_sample", None) is True
        names = ["repetition_penalty"]
        own: dict[str, Any] = {}
        if is_sampled:
            names += ["temperature", "top_k", "top_p", "min_p"]
            own["temperature"] = 1.0
        stored = {name: getattr(self.generation, name, None) for name in names}
        try:
            own |= checked(RequestOptions, stored)
        except ConfigError as error:
            raise CheckpointError(f"generation_config.json of {self.name}: {error}") from None
        return cast(RequestOptions, own)

    def recommended(self, packing: PackingConfig = PLAIN) -> Recommended:
        """Exit and draft length: of layerskip.json, else of an exit block, else PUBLISHED, else a
        quarter of the layers.
        """
        info = self.info
        layers = self.backend.num_layers
        is_published = self.name in PUBLISHED
        usual = (max(1, layers // 4), _USUAL_DRAFTS)
        exit_layer, drafts = PUBLISHED[self.name] if is_published else usual
        blocks = tuple(self.backend.exit_blocks)
        exits = blocks or info.trained_exits
        if not exits and is_published:
            exits = (exit_layer,)
        strategy = info.strategy
        # A recommended exit that no training of ours made
        if strategy is None and info.exit_layer is not None and not exits:
            strategy = "self-speculative"
        if blocks:
            exit_layer = blocks[0]
        return Recommended(
            info.exit_layer or exit_layer,
            info.num_draft_tokens or drafts,
            strategy,
            exits,
            info.draft_profile(layers, packing),
        )

    def resolve(self, options: DecodingOptions, packing: PackingConfig = PLAIN) -> DecodingConfig:
        """The requested options, completed by this checkpoint; by default the policy `exact`, if
        saved.

        `packing`: as requested. Raises ConfigError for a policy that is not saved or lacks its
        low-bit copies, and as `resolve` in config/resolution.py.
        """
        name = options.get("policy")
        policies = self.info.policies
        # By default the policy `exact`, if its copies are loaded
        is_default = EXACT in policies and not choices(options) and not packing.drafts_apart
        if name is None and is_default and not self._missing(policies[EXACT]):
            name = EXACT
        if name is not None:
            policy = policy_named(policies, name)
            missing = ",".join(self._missing(policy))
            needed = f"given with `draft_weights` {missing}, which it drafts with"
            require(not missing, "policy", needed, name)
            options = policy_options(policy, options)
            packing = policy_packing(policy)
        try:
            config = resolve(options, self.recommended(packing), self.backend.num_layers, packing)
        except ConfigError as error:
            if name is None:
                raise
            raise ConfigError(
                f"`policy` {name} does not suit the model: {error}", "policy"
            ) from None
        vocab = self.backend.spec.vocab
        last = max(dict(config.logit_bias), default=0)
        needed = f"of tokens of the model, ids below {vocab}"
        require(last < vocab, "logit_bias", needed, last)
        if config.guided is not None:
            from ..grammar import guide

            grammar = guide(config.guided, self.tokenizer, vocab, self.eos_ids)
            config = replace(config, guide=grammar)
        return replace(config, policy=name)

    def _missing(self, policy: Policy) -> list[Quantization]:
        """The low-bit copies of a policy that are not loaded."""
        loaded = self.backend.draft_sides
        return [kind for kind in policy_packing(policy).draft_weights if kind not in loaded]


@dataclass(frozen=True)
class Trainable:
    """A transformers model with its own layers, and a backend over the same weights."""

    name: str
    model: "PreTrainedModel"
    backend: TransformersBackend
    tokenizer: Any  # of transformers
    info: CheckpointInfo

    def fingerprint(self) -> str:
        """As in sidecars.py."""
        return fingerprint(self.backend.spec, self.model.get_parameter)


def decoder_of(trainable: Trainable) -> Decoder:
    """Decodes with transformers' layers, on the weights of the model in training."""
    model = trainable.model
    backend = trainable.backend
    return decoder(
        trainable.name,
        backend,
        trainable.tokenizer,
        trainable.info,
        model.config,
        model.generation_config,
    )


def decoder(
    name: str,
    backend: Backend,
    tokenizer: Any,
    info: CheckpointInfo,
    config: object,
    generation: object,
    *notes: str,
) -> Decoder:
    """A Decoder with the template and end tokens of the model's files. `config`, `generation`: as
    transformers has them.
    """
    eos_ids = end_ids(generation, config, tokenizer)
    template = resolve_template(None, None, info.template, tokenizer)
    return Decoder(name, backend, tokenizer, info, eos_ids, template, notes, generation)


def end_ids(*sources: object) -> frozenset[int]:
    """Every `eos_token_id` of generation config, config and tokenizer. Raises CheckpointError for
    one that is no id.
    """
    found = set[int]()
    for source in sources:
        stored = getattr(source, "eos_token_id", None)
        ids = stored if isinstance(stored, list) else [stored]
        for token in ids if stored is not None else ():
            if type(token) is not int:
                raise CheckpointError(
                    f"eos_token_id must be a token id, a list of them, or null, got {token!r}"
                )
            found.add(token)
    return frozenset(found)
