"""layerskip.json: a model's prompt template, recommended settings, training and list of files."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import exp
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from ..config.decoding import STRATEGIES, DraftProfile
from ..config.model import PLAIN, DataConfig, PackingConfig
from ..config.options import Drafts, Layer
from ..config.resolution import Policy
from ..errors import CheckpointError
from ..files import read_json
from ..prompting import PromptTemplate
from ..splits import HeldOut

INFO_FILE = "layerskip.json"
ADAPTER_FILE = "adapter_config.json"
EXIT_BLOCKS = "exit_blocks"  # key of the training of each exit's block
CONFIG_FILES = ("config.json", ADAPTER_FILE)  # a complete model has one of these
# Keys that are also fields of CheckpointInfo
_TOP = ("prompt_template", "files", "system", "policies", "profile")


class _Config(msgspec.Struct, frozen=True):
    data: DataConfig | None = None
    validation: str | None = None


class _Block(msgspec.Struct, frozen=True):
    agreement: float | None = None
    data: DataConfig | str | None = None  # older versions wrote the name alone
    validation: str | None = None
    held_out: HeldOut | None = None


class Cost(msgspec.Struct, frozen=True):
    """How training changed the output at full depth, on text that the original model wrote and on
    held-out rows.
    """

    tokens: int  # of the original's text
    agreement: float  # of argmax tokens
    before: float  # perplexity
    after: float
    task: tuple[float, float] | None = None  # loss on held-out rows in nats, before and after
    exact_match: tuple[float, float] | None = None  # on `answered` of these rows
    answered: int = 0


class _Training(msgspec.Struct, frozen=True):
    """The values of `CheckpointInfo.details` that are read; losses, agreement and blocks by
    exit.
    """

    config: _Config = _Config()
    trained_exits: tuple[int, ...] = ()
    cost: Cost | None = None
    final_losses: dict[str, float | None] = {}
    agreement: dict[str, float] = {}
    exit_blocks: dict[str, _Block] = {}
    held_out: tuple[HeldOut, ...] = ()


@dataclass(frozen=True)
class CheckpointInfo:
    """The content of layerskip.json. The recommendation, `policies` and `profile` come from a
    sweep.
    """

    prompt_template: Annotated[str, msgspec.Meta(pattern=r"\A(chat|raw)\Z|\{prompt\}")] | None = (
        None
    )
    exit_layer: Layer | None = None  # recommended
    num_draft_tokens: Drafts | None = None
    details: dict[str, Any] = field(default_factory=dict)  # other keys
    strategy: Literal[tuple(STRATEGIES)] | None = None  # type: ignore[valid-type]  # "autoregressive": no exit pays
    files: tuple[str, ...] = field(default=(), compare=False)  # of the model, relative
    system: str | None = None
    policies: dict[str, Policy] = field(default_factory=dict)  # by name
    profile: DraftProfile | None = None

    def to_json(self) -> str:
        recommended: dict[str, Any] = {
            "exit_layer": self.exit_layer,
            "num_draft_tokens": self.num_draft_tokens,
        }
        if self.strategy:
            recommended["strategy"] = self.strategy
        document: dict[str, Any] = {
            "format": 1,
            "prompt_template": self.prompt_template,
            "recommended": recommended,
        }
        if self.profile is not None:
            document["profile"] = asdict(self.profile)
        if self.policies:
            document["policies"] = self.policies
        if self.system is not None:
            document["system"] = self.system
        document |= self.details
        if self.files:
            document["files"] = self.files
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @property
    def template(self) -> PromptTemplate | None:
        """The checkpoint's own template, if it has one."""
        if self.prompt_template is None:
            return None
        return PromptTemplate(self.prompt_template, self.system)

    @property
    def trained_exits(self) -> tuple[int, ...]:
        """The exits before the last layer that `finetune` trained."""
        return self._training.trained_exits

    @property
    def agreement(self) -> dict[str, float]:
        """The share of right first drafts on held-out rows of the training, by exit layer or
        `eagle3`.
        """
        measured = dict(self._training.agreement)
        for name, block in self._training.exit_blocks.items():
            if block.agreement is not None:
                measured[name] = block.agreement
        return measured

    @property
    def cost(self) -> Cost | None:
        """The cost of the latest training by `finetune`, unless from scratch."""
        return self._training.cost

    @property
    def trained_on(self) -> tuple[DataConfig | None, str | None]:
        """The data of the latest training, and its `validation` setting."""
        for block in reversed(self._training.exit_blocks.values()):
            if isinstance(block.data, DataConfig):
                return block.data, block.validation
        return self._training.config.data, self._training.config.validation

    @property
    def held_out(self) -> tuple[HeldOut, ...]:
        """The rows that trainings of the model and of its drafters held out of files and hub data
        sets, the newest first.
        """
        training = self._training
        blocks = reversed(training.exit_blocks.values())
        rows = [block.held_out for block in blocks if block.held_out is not None]
        return tuple(dict.fromkeys((*rows, *training.held_out)))

    def draft_profile(self, num_layers: int, packing: PackingConfig = PLAIN) -> DraftProfile:
        """A sweep's measurements; those of drafts only for the same draft head and vocabulary.

        Other exits get the agreement of their training, else exp(-gap / 2) for a gap in nats to the
        last layer's loss.
        """
        training = self._training
        acceptance = {}
        for name, share in self.agreement.items():
            acceptance[f"exit {name}" if name.isdigit() else name] = share
        last = training.final_losses.get(str(num_layers))
        if not acceptance and last is not None:
            for layer in self.trained_exits:
                loss = training.final_losses.get(str(layer))
                if loss is not None:
                    acceptance[f"exit {layer}"] = exp(-max(loss - last, 0.0) / 2)
        measured = self.profile
        if measured is None:
            return DraftProfile(acceptance)
        is_same = measured.draft_head == packing.draft_head
        if is_same and measured.draft_vocab == packing.draft_vocab:
            return replace(measured, acceptance=acceptance | measured.acceptance)
        return DraftProfile(acceptance, measured.passes)

    @property
    def advice(self) -> tuple[str, ...]:
        """The names of saved settings: the policies, else the recommended exit or strategy."""
        if self.policies:
            return tuple(f"policy {name}" for name in self.policies)
        if self.exit_layer is not None:
            return (f"exit {self.exit_layer}",)
        return (self.strategy,) if self.strategy else ()

    def with_exit_blocks(self, trained: Mapping[str, Any]) -> "CheckpointInfo":
        """Adds new blocks, by exit. Drops saved settings, and a sweep's measurements of these
        exits.
        """
        names = tuple(f"exit {exit_layer}" for exit_layer in trained)

        def others(measured: Mapping[str, float]) -> dict[str, float]:
            return {name: value for name, value in measured.items() if not name.endswith(names)}

        profile = self.profile
        if profile is not None:
            acceptance = others(profile.acceptance)
            profile = replace(profile, acceptance=acceptance, drafts=others(profile.drafts))
        described = {**self.details.get(EXIT_BLOCKS, {}), **trained}
        details = {**self.details, EXIT_BLOCKS: described}
        return replace(self._without_advice(), profile=profile, details=details)

    def dequantised(self) -> "CheckpointInfo":
        """What stays true once low-bit weights are dequantised: not the recommendation and the
        times, which are measured.
        """
        info = self._without_advice()
        if info.profile is None:
            return info
        return replace(info, profile=DraftProfile(info.profile.acceptance))

    def _without_advice(self) -> "CheckpointInfo":
        return replace(self, exit_layer=None, num_draft_tokens=None, strategy=None, policies={})

    def without_int4(self) -> "CheckpointInfo":
        """Drops a sweep's acceptance rates of int4 weights, which a new calibration replaces."""
        if self.profile is None:
            return self
        acceptance = dict(self.profile.acceptance)
        for name in self.profile.acceptance:
            if name.startswith("int4"):
                del acceptance[name]
        return replace(self, profile=replace(self.profile, acceptance=acceptance))

    def with_int4(self, agreement: float) -> "CheckpointInfo":
        """Adds the `agreement` of int4 weights, unless a sweep measured their drafts."""
        profile = self.profile or DraftProfile()
        # Measured with another head or vocabulary
        if profile.draft_head is not None or profile.draft_vocab:
            return self
        acceptance = {"int4": agreement} | profile.acceptance
        return replace(self, profile=replace(profile, acceptance=acceptance))

    @property
    def _training(self) -> _Training:
        return msgspec.convert(self.details, _Training)


def read_info(path: str | Path) -> CheckpointInfo:
    """A folder's layerskip.json, empty if there is none. Raises CheckpointError for invalid
    content.
    """
    file = Path(path) / INFO_FILE
    return read_info_file(file) if file.is_file() else CheckpointInfo()


def read_info_file(file: Path) -> CheckpointInfo:
    """The content of a file like layerskip.json. Raises CheckpointError."""
    details = read_json(file, CheckpointError)
    details.pop("format", None)
    try:
        values = msgspec.convert(details.pop("recommended", {}), dict[str, Any])
        values |= {key: details.pop(key) for key in _TOP if key in details}
        info = msgspec.convert({**values, "details": details}, CheckpointInfo)
        msgspec.convert(details, _Training)
        for name in info.files:
            path = PurePosixPath(name)
            leaves = path.is_absolute() or ".." in path.parts
            if leaves or not path.parts or "\\" in name or "\0" in name:
                raise ValueError(f"a file's name must stay in its folder, got {name!r}")
        if any("strategy" not in policy for policy in info.policies.values()):
            raise ValueError("a policy has no strategy")
        return info
    except (ValueError, TypeError, KeyError) as error:  # msgspec's are ValueErrors too
        raise CheckpointError(f"{file} is not valid: {error}") from None


def gguf_in(folder: str | Path) -> Path | None:
    """The GGUF file of a folder that `train-drafter` wrote, by its layerskip.json; None for other
    folders. Raises as `read_info` does.
    """
    for name in read_info(folder).files:
        file = Path(folder) / name
        if file.suffix == ".gguf" and file.is_file():
            return file
    return None


def holds_model(path: str | Path) -> bool:
    """Whether a folder holds a complete model or adapter: its config is written last. Raises as
    `read_info` does.
    """
    has_config = any((Path(path) / name).is_file() for name in CONFIG_FILES)
    return has_config or gguf_in(path) is not None
