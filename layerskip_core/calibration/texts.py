"""The texts of a calibration: what the model itself writes, or the user's rows.

A model's own text has the distribution that it decodes in, and needs no data (LLM-QAT, Liu et al., 2023). Half of the texts
begin with a random token, half with what the prompt template puts before a prompt, so that the model writes the prompt, too
(Magpie, Xu et al., 2024).
"""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from ..checkpoint.loaded import Decoder
from ..config.data import DataConfig
from ..data.examples import Conversation, load_rows
from ..errors import DataError
from ..model import Backend

_ROWS = 32  # that are written together
Report = Callable[[int], None]  # texts that are done


@torch.inference_mode()
def written_texts(decoder: Decoder, count: int, length: int, seed: int, report: Report) -> Tensor:
    """(count, length) tokens, sampled at temperature 1. A text goes on after the end of an answer."""
    generator = torch.Generator().manual_seed(seed)
    start = decoder.prompt_start()[: length - 1]
    texts: list[Tensor] = []
    done = 0
    while done < count:
        rows = min(_ROWS, count - done)
        first = torch.randint(decoder.backend.vocab_size, (rows, 1), generator=generator)
        templated = bool(start) and len(texts) % 2 == 1
        texts.append(_continued(decoder.backend, torch.tensor([start] * rows) if templated else first, length, generator))
        done += rows
        report(done)
    return torch.cat(texts)


def data_texts(decoder: Decoder, data: DataConfig, count: int, length: int) -> Tensor:
    """At most (count, length) tokens of the rows of a data set, joined in random order.

    Raises DataError where there is not even one text.
    """
    ids: list[int] = []
    rows = load_rows(data)
    Random(data.seed).shuffle(rows)
    for row in rows:
        if len(ids) >= count * length:
            break
        if isinstance(row, Conversation):
            raise DataError(f"`data` {data.name} must have rows of text or of prompt and completion, found conversations")
        ids += decoder.encode_prompt(row.prompt) if row.prompt else []
        ids += decoder.tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        ids += [] if decoder.tokenizer.eos_token_id is None else [decoder.tokenizer.eos_token_id]
    if len(ids) < length:
        raise DataError(f"`data` {data.name} must have at least {length} tokens, found {len(ids)}")
    texts = min(count, len(ids) // length)
    return torch.tensor(ids[: texts * length]).view(texts, length)


def _continued(model: Backend, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    rows, cache = len(ids), model.new_cache(len(ids), length)
    positions = torch.arange(length)[None].expand(rows, -1)
    newest = ids
    while True:
        known = ids.shape[1]
        start = known - newest.shape[1]
        hidden = model.run_layers(model.embed(newest), 0, model.num_layers, positions[:, start:known], cache)
        logits = model.unembed(hidden[:, -1:])[:, 0].float()
        newest = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, newest], dim=1)
        if ids.shape[1] == length:
            return ids
