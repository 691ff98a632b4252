"""layerskip.json: the prompt template, the recommended settings, how the model was made, and the files written with it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import exp
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from ..config.decoding import EXACT, STRATEGIES, DecodingOptions, DraftProfile, Drafts, Layer, Policy
from ..config.packing import PackingConfig
from ..errors import CheckpointError
from ..files import read_json_object
from ..prompting import PromptTemplate, is_template

INFO_FILE = "layerskip.json"
ADAPTER_FILE = "adapter_config.json"
EXIT_BLOCKS = "exit_blocks"  # the key that says how each exit's block was trained
CONFIG_FILES = ("config.json", ADAPTER_FILE)  # a complete model has one of them
_PLAIN = PackingConfig()


class _Skip(msgspec.Struct, frozen=True):
    layers: list[Layer]
    num_draft_tokens: Drafts


class _Recommended(msgspec.Struct, frozen=True):
    """What a sweep recommends; "autoregressive" means that no exit pays."""

    exit_layer: Layer | None = None
    num_draft_tokens: Drafts | None = None
    strategy: Literal[STRATEGIES] | None = None  # type: ignore[valid-type]
    skip: _Skip | None = None


class _Recipe(msgspec.Struct, frozen=True):
    curriculum: str = "none"
    exits: tuple[int, ...] = ()


class _Config(msgspec.Struct, frozen=True):
    recipe: _Recipe | None = None


class _Block(msgspec.Struct, frozen=True):
    agreement: float | None = None


class _Training(msgspec.Struct, frozen=True):
    """What is read of the details that training writes. `final_losses` and `exit_blocks` are by exit layer."""

    config: _Config = _Config()
    final_losses: dict[str, float | None] = {}
    exit_blocks: dict[str, _Block] = {}


class _Document(msgspec.Struct, frozen=True):
    """The keys of layerskip.json that are no details."""

    format: int = 1
    prompt_template: str | None = None
    recommended: _Recommended = _Recommended()
    files: tuple[str, ...] = ()
    system: str | None = None
    policies: dict[str, Policy] = {}
    profile: DraftProfile | None = None


@dataclass(frozen=True)
class CheckpointInfo:
    """The content of layerskip.json.

    `exit_layer`, `num_draft_tokens` and `strategy` are recommended by a sweep; "autoregressive" means that no exit pays.
    `policies` are the settings that a sweep saved, by name; older versions know only the recommended ones. `details` holds all
    other keys: recipe, data, seed, versions, losses. `files` are the names, relative to the folder, of all files written with
    the model; older versions did not write them. `system` belongs to the prompt template `chat`. `skip`: the layers that a
    search found for draft-and-verify, with a draft length.
    """

    prompt_template: str | None = None
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    strategy: str | None = None
    files: tuple[str, ...] = field(default=(), compare=False)
    system: str | None = None
    policies: dict[str, Policy] = field(default_factory=dict)
    skip: DecodingOptions | None = None
    profile: DraftProfile | None = None  # of drafting, where a sweep measured it

    def to_json(self) -> str:
        recommended: dict[str, Any] = {"exit_layer": self.exit_layer, "num_draft_tokens": self.num_draft_tokens}
        recommended |= {"strategy": self.strategy} if self.strategy else {}
        if self.skip is not None:
            recommended["skip"] = {"layers": self.skip["skip"], "num_draft_tokens": self.skip["num_draft_tokens"]}
        document: dict[str, Any] = {"format": 1, "prompt_template": self.prompt_template, "recommended": recommended}
        if self.profile is not None:
            document["profile"] = self.profile.document()
        if self.policies:
            document["policies"] = self.policies
        document |= {"system": self.system} if self.system is not None else {}
        document |= self.details
        if self.files:
            document["files"] = list(self.files)
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @property
    def template(self) -> PromptTemplate | None:
        """The template that the checkpoint names."""
        return None if self.prompt_template is None else PromptTemplate(self.prompt_template, self.system)

    @property
    def exit_blocks(self) -> dict[str, Any]:
        """How each exit's block was trained, by exit, as far as `details` tell it."""
        blocks: dict[str, Any] = self.details.get(EXIT_BLOCKS, {})
        return blocks

    @property
    def has_trained_exits(self) -> bool:
        """Whether `finetune` trained this checkpoint with a loss at its exits."""
        return self._recipe.curriculum != "none"

    def trained_exits(self, num_layers: int) -> tuple[int, ...]:
        """The exits before the last layer that `finetune` trained: those of the recipe, or all."""
        if not self.has_trained_exits:
            return ()
        exits = self._recipe.exits
        return tuple(exit_layer for exit_layer in range(1, num_layers) if not exits or exit_layer in exits)

    def draft_profile(self, num_layers: int, packing: PackingConfig = _PLAIN) -> DraftProfile:
        """What a sweep measured of drafts that are stored in this way, and of passes of the target.

        Where it measured no such drafts, what training measured of exit blocks, else a guess by its losses: exp(-gap / 2) for a
        gap of that many nats between an exit's loss and the last layer's.
        """
        known, blocks = self.profile, self._training.exit_blocks
        of_blocks = {f"exit {exit_layer}": block.agreement for exit_layer, block in blocks.items()}
        agreement = {name: share for name, share in of_blocks.items() if share is not None}
        if known is not None and (known.draft_head, known.draft_vocab) == (packing.draft_head, packing.draft_vocab):
            return replace(known, acceptance=agreement | known.acceptance)
        return DraftProfile(agreement or self._acceptance_by_losses(num_layers), () if known is None else known.passes)

    @property
    def advice(self) -> tuple[str, ...]:
        """The settings that are saved to decode with, by name: the policies, else the recommended exit or strategy."""
        recommended = self.strategy if self.exit_layer is None else f"exit {self.exit_layer}"
        return tuple(f"policy {name}" for name in self.policies) or ((recommended,) if recommended else ())

    def with_exit_blocks(self, trained: Mapping[str, Any]) -> "CheckpointInfo":
        """With a description of how the blocks of exits were trained, by exit.

        The `advice` goes: the best setting without these blocks would hide them. So does what a sweep measured of these exits.
        Its other measurements stay, such as those of passes and of layers to skip.
        """
        return replace(
            self,
            exit_layer=None,
            num_draft_tokens=None,
            strategy=None,
            policies={},
            profile=None if self.profile is None else self.profile.without(map(int, trained)),
            details={**self.details, EXIT_BLOCKS: {**self.exit_blocks, **trained}},
        )

    def _acceptance_by_losses(self, num_layers: int) -> dict[str, float]:
        losses = self._training.final_losses
        last = losses.get(str(num_layers))
        known = {exit_layer: losses.get(str(exit_layer)) for exit_layer in self.trained_exits(num_layers)}
        # exp(-gap) is about the chance that the exit gives the token; that this is its best one is more likely.
        return {
            f"exit {exit_layer}": exp(-max(loss - last, 0.0) / 2)
            for exit_layer, loss in known.items()
            if loss is not None and last is not None
        }

    @property
    def _training(self) -> _Training:
        return msgspec.convert(self.details, _Training)

    @property
    def _recipe(self) -> _Recipe:
        return self._training.config.recipe or _Recipe()


def read_info(path: str | Path) -> CheckpointInfo:
    """layerskip.json of a folder; an empty one if there is none (a hub model, a plain checkpoint).

    Raises CheckpointError if it holds anything that `to_json` would not write.
    """
    file = Path(path) / INFO_FILE
    if not file.is_file():
        return CheckpointInfo()
    document = read_json_object(file, CheckpointError)
    try:
        known = msgspec.convert(document, _Document)
        for name, policy in known.policies.items():
            _check_policy(name, policy, document["policies"][name])
        template = known.prompt_template
        if template is not None and not is_template(template):
            raise ValueError(f"prompt_template must be chat, raw or a text with {{prompt}} in it, got {template!r}")
        msgspec.convert(document, _Training)
        recommended, skip = known.recommended, known.recommended.skip
        return CheckpointInfo(
            prompt_template=template,
            exit_layer=recommended.exit_layer,
            num_draft_tokens=recommended.num_draft_tokens,
            details={name: value for name, value in document.items() if name not in _Document.__struct_fields__},
            strategy=recommended.strategy,
            files=tuple(map(require_inside, known.files)),
            system=known.system,
            policies=known.policies,
            profile=known.profile,
            skip=None if skip is None else {"skip": skip.layers, "num_draft_tokens": skip.num_draft_tokens},
        )
    except ValueError as error:  # msgspec's are ValueErrors too
        raise CheckpointError(f"{file} is not valid: {error}") from None


def _check_policy(name: str, policy: Policy, stored: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that this version does not know, and for an `exact` whose output is another one."""
    if unknown := stored.keys() - policy.keys():
        raise ValueError(f"policies.{name} has {min(unknown)!r}, which this version does not know")
    if "strategy" not in policy:
        raise ValueError(f"policies.{name} has no strategy")
    if name == EXACT and policy["strategy"] == "early-exit":
        raise ValueError(f"policies.{EXACT} must have the output of plain decoding, got the strategy early-exit")


def holds_model(path: str | Path) -> bool:
    """Whether a folder holds a complete model or adapter. Their config is written last."""
    return any((Path(path) / name).is_file() for name in CONFIG_FILES)


def require_inside(name: str) -> str:
    """A file's name relative to its folder, with / between the parts. Raises ValueError for one that leaves the folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"a file's name must stay in its folder, got {name!r}")
    return name
