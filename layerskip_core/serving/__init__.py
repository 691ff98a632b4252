"""Many prompts at once, of callers that come and go."""

from .dispatcher import Dispatcher
from .embedding import Embedding
from .requests import QueueFull, Request, Stopped, Update

__all__ = ["Dispatcher", "Embedding", "QueueFull", "Request", "Stopped", "Update"]
