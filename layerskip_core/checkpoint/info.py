"""layerskip.json: the prompt template, the recommended settings, how the model was made, and the files written with it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import exp
from pathlib import Path, PurePosixPath
from typing import Any

from msgspec import ValidationError, convert

from ..config.decoding import EXACT, STRATEGIES, DecodingOptions, DraftProfile, Policy
from ..config.packing import PackingConfig
from ..errors import CheckpointError
from ..files import read_json
from ..prompting import CHAT, PromptTemplate, is_template

INFO_FILE = "layerskip.json"
ADAPTER_FILE = "adapter_config.json"
EXIT_BLOCKS = "exit_blocks"  # the key that says how each exit's block was trained
CONFIG_FILES = ("config.json", ADAPTER_FILE)  # a complete model has one of them
_MOST = 1024  # layers or draft tokens
_PLAIN = PackingConfig()


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
        blocks = self.details.get(EXIT_BLOCKS)
        return blocks if isinstance(blocks, dict) else {}

    @property
    def has_trained_exits(self) -> bool:
        """Whether `finetune` trained this checkpoint with a loss at its exits."""
        return bool(self._recipe.get("curriculum", "none") != "none")

    def trained_exits(self, num_layers: int) -> tuple[int, ...]:
        """The exits before the last layer that `finetune` trained: those of the recipe, or all."""
        if not self.has_trained_exits:
            return ()
        listed = self._recipe.get("exits")
        exits = {exit_layer for exit_layer in listed if type(exit_layer) is int} if isinstance(listed, list) else set()
        return tuple(exit_layer for exit_layer in range(1, num_layers) if not exits or exit_layer in exits)

    def draft_profile(self, num_layers: int, packing: PackingConfig = _PLAIN) -> DraftProfile:
        """What a sweep measured of drafts that are stored in this way, and of passes of the target.

        Where it measured no such drafts, what training measured of exit blocks, else a guess by its losses: exp(-gap / 2) for a
        gap of that many nats between an exit's loss and the last layer's.
        """
        known, of_blocks = self.profile, self._acceptance_of_blocks()
        if known is not None and (known.draft_head, known.draft_vocab) == (packing.draft_head, packing.draft_vocab):
            return replace(known, acceptance=of_blocks | known.acceptance)
        return DraftProfile(of_blocks or self._acceptance_by_losses(num_layers), () if known is None else known.passes)

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
        losses = self.details.get("final_losses")
        known = losses if isinstance(losses, dict) else {}
        last = known.get(str(num_layers))
        if type(last) is not float:
            return {}
        exits = {exit_layer: known.get(str(exit_layer)) for exit_layer in self.trained_exits(num_layers)}
        gaps = {exit_layer: max(loss - last, 0.0) for exit_layer, loss in exits.items() if type(loss) is float}
        # exp(-gap) is about the chance that the exit gives the token; that this is its best one is more likely.
        return {f"exit {exit_layer}": exp(-gap / 2) for exit_layer, gap in gaps.items()}

    def _acceptance_of_blocks(self) -> dict[str, float]:
        """The share of first drafts that each exit block had right in training."""
        told = self.exit_blocks.items()
        shares = {f"exit {exit_layer}": block.get("agreement") for exit_layer, block in told if isinstance(block, dict)}
        return {name: share for name, share in shares.items() if type(share) is float and 0 <= share <= 1}

    @property
    def _recipe(self) -> dict[str, Any]:
        config = self.details.get("config")
        recipe = config.get("recipe") if isinstance(config, dict) else None
        return recipe if isinstance(recipe, dict) else {}


def read_info(path: str | Path) -> CheckpointInfo:
    """layerskip.json of a folder; an empty one if there is none (a hub model, a plain checkpoint).

    Raises CheckpointError if it holds anything that `to_json` would not write.
    """
    file = Path(path) / INFO_FILE
    if not file.is_file():
        return CheckpointInfo()
    document = read_json(file, CheckpointError)
    try:
        _require(document, dict, "the document")
        document.pop("format", None)
        recommended = _require(document.pop("recommended", {}), dict, "recommended")
        files = _require(document.pop("files", []), list, "files")
        policies = _policies(document.pop("policies", {}))
        profile = convert(document.pop("profile", None), DraftProfile | None)
        strategy = recommended.get("strategy")
        if strategy is not None and strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        template = _optional(document.pop("prompt_template", None), str, "prompt_template")
        if template is not None and not is_template(template):
            raise ValueError(f"prompt_template must be chat, raw or a text with {{prompt}} in it, got {template!r:.100}")
        system = _optional(document.pop("system", None), str, "system")
        if system is not None and template != CHAT:
            raise ValueError(f"system needs the prompt_template chat, got {template!r:.100}")
        return CheckpointInfo(
            prompt_template=template,
            exit_layer=_count(recommended.get("exit_layer"), "exit_layer"),
            num_draft_tokens=_count(recommended.get("num_draft_tokens"), "num_draft_tokens"),
            details=document,
            strategy=strategy,
            files=tuple(require_inside(name) for name in files),
            system=system,
            policies=policies,
            profile=profile,
            skip=_skip(recommended.get("skip")),
        )
    except (ValueError, ValidationError) as error:
        raise CheckpointError(f"{file} is not valid: {error}") from None


def holds_model(path: str | Path) -> bool:
    """Whether a folder holds a complete model or adapter. Their config is written last."""
    return any((Path(path) / name).is_file() for name in CONFIG_FILES)


def require_inside(name: Any) -> str:
    """A file's name relative to its folder, with / between the parts. Raises ValueError for one that leaves the folder."""
    text: str = _require(name, str, "a file's name")
    path = PurePosixPath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in text or "\0" in text:
        raise ValueError(f"a file's name must stay in its folder, got {text!r}")
    return text


def _require(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r:.100}")
    return value


def _policies(document: Any) -> dict[str, Policy]:
    """Raises ValueError for an option that this version does not know, and for an `exact` whose output is another one."""
    policies = convert(document, dict[str, Policy])
    for name, policy in policies.items():
        if unknown := document[name].keys() - policy.keys():
            raise ValueError(f"policies.{name} has {min(unknown)!r}, which this version does not know")
        if "strategy" not in policy:
            raise ValueError(f"policies.{name} has no strategy")
        if name == EXACT and policy["strategy"] == "early-exit":
            raise ValueError(f"policies.{EXACT} must have the output of plain decoding, got the strategy early-exit")
    return policies


def _skip(value: Any) -> DecodingOptions | None:
    choice = _optional(value, dict, "skip")
    if choice is None:
        return None
    options = convert({"skip" if name == "layers" else name: entry for name, entry in choice.items()}, DecodingOptions)
    if not options.get("skip") or "num_draft_tokens" not in options:
        raise ValueError(f"skip must have layers and num_draft_tokens, got {choice!r:.100}")
    return options


def _count(value: Any, name: str) -> int | None:
    count: int | None = _optional(value, int, name)
    if count is not None and not 1 <= count <= _MOST:
        raise ValueError(f"{name} must be in 1..{_MOST}, got {count}")
    return count


def _optional(value: Any, kind: type, name: str) -> Any:
    return None if value is None else _require(value, kind, name)
