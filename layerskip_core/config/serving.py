"""The address and the limits of a server."""

from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from .decoding import Remember, RequestOptions
from .options import BatchSize, Count, Flag, Layer, ModelName, Text, Without

KEY = "LAYERSKIP_API_KEY"


@dataclass(frozen=True)
class ServeConfig:
    """`decoding`: the options that a request leaves out."""

    model: ModelName = "embedded"
    host: Annotated[Text, Flag("Address to listen on; 0.0.0.0 is all of this machine's.", panel="Server")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535), Flag("Port to listen on; 0: a free one.")] = 8000
    batch_size: Annotated[BatchSize, Flag("Answers that are decoded together.")] = 8
    queue_size: Annotated[
        int,
        Meta(ge=0, le=1_000_000),
        Flag("Answers and embeddings that may wait besides; a request beyond gets status 429.", "--queue"),
    ] = 256
    token_limit: Annotated[
        Count | None, Flag("Most tokens of an answer, whatever its request asks for.", default="the room in the context")
    ] = None
    body_limit: Annotated[int, Meta(ge=1_024, le=2**30), Flag("Most bytes of a request's body.")] = 2**20
    api_key: Annotated[Text | None, Flag("Key that clients must send.", default=f"{KEY} in the environment, else none")] = None
    embedding_layer: Annotated[
        Layer | None, Flag("Embeddings are the mean of the states after this many layers.", default="all")
    ] = None
    remember: Remember = 0
    prefix_cache: Annotated[
        int,
        Meta(ge=0, le=1_000_000),
        Flag("Megabytes for keys and values of earlier prompts and answers, so that a common beginning is computed once."),
    ] = 512
    kv_memory: Annotated[
        Count | None,
        Flag("Megabytes for all keys and values, on our own kernels; requests beyond wait.", default="a fifth of what is free"),
    ] = None
    decoding: Annotated[RequestOptions, Without(("seed", "logprobs", "prompt_logprobs"))] = field(
        default_factory=RequestOptions
    )
