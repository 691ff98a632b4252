"""Many prompts at once, of callers that come and go: continuous batching over the decoding loop."""

from .engine import Engine, QueueFull, Stopped
from .scheduler import Request, Scheduler, Update

__all__ = ["Engine", "QueueFull", "Request", "Scheduler", "Stopped", "Update"]
