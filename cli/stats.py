"""The line of --stats."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.decoding import DecodeStats


def stats_text(stats: "DecodeStats", loaded: "Decoder", policy: str | None) -> str:
    """Counts and speed of one answer or of many, and how they were decoded."""
    steps = ", ".join(f"{name}: {count}" for name, count in sorted(stats.steps_by_drafter.items(), key=lambda item: -item[1]))
    return (
        f"{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s; "
        f"{_exits_text(stats, loaded.backend.num_layers)}drafted {stats.drafted}, "
        f"accepted {stats.accepted} ({stats.acceptance_rate:.1%}) in {stats.rounds} rounds; "
        f"{f'steps by {steps}; ' if steps else ''}"
        f"layers: {loaded.backend.implementation}, {str(loaded.backend.dtype).removeprefix('torch.')} on "
        f"{loaded.backend.device}; prompt template: {loaded.template.name}{'' if policy is None else f'; policy: {policy}'}"
    )


def _exits_text(stats: "DecodeStats", num_layers: int) -> str:
    """`6.1 layers per token (exit 4: 27, exit 8: 4, exit 24: 3); ` if any token left early, else nothing."""
    if sum(stats.tokens_by_layers[: num_layers - 1]) == 0:
        return ""
    exits = ", ".join(f"exit {layers}: {count}" for layers, count in enumerate(stats.tokens_by_layers, start=1) if count)
    return f"{stats.mean_layers:.1f} layers per token ({exits}); "
