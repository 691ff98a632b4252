"""Rows of a run: their templates, encoding and batches; streams, validation, and tokenizers made of
them.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from evaluating import tiny_loaded
from training_runs import RECIPE, require_exact_resumption, train

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.loaded import Trainable
from layerskip_core.config.model import DataConfig, PromptingConfig
from layerskip_core.config.training import FinetuneConfig
from layerskip_core.data import PARSING_TEMPLATE, Conversation, Example, load_examples
from layerskip_core.errors import ConfigError, DataError
from layerskip_core.losses import IGNORED
from layerskip_core.prompting import CHAT, RAW, PromptTemplate
from layerskip_core.splits import HeldOut
from layerskip_core.training import data as training_data
from layerskip_core.training.data import (
    StreamedRows,
    by_frequency,
    collate,
    encode_rows,
    make_encoder,
    token_order,
)
from layerskip_core.training.encoding import Encoder, encoded_row, packed, train_tokenizer
from layerskip_core.training.run import execute, prepare
from layerskip_core.training.trainer import RunTrainer

TURNS = (("user", "hi"), ("assistant", "hello you"), ("user", "bye"), ("assistant", "so long"))
TURNS_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def examples():
    return load_examples(DataConfig(limit=300))


@pytest.fixture(scope="module")
def tokenizer(examples):
    return train_tokenizer(examples, 300)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TURNS_TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def encoded_rows(rows, tokenizer, template, max_length):
    return encode_rows(rows, Encoder(tokenizer, PromptTemplate(template or "raw"), max_length))


def test_prompts_are_masked_and_rows_end(tokenizer):
    encoded = encoded_rows(
        [Example("hi", "[IN:A ]"), Example("", "go")], tokenizer, PARSING_TEMPLATE, 64
    )
    prompt = tokenizer("hi\n")["input_ids"]
    completion = tokenizer("[IN:A ]")["input_ids"]
    plain = tokenizer("go")["input_ids"]  # no prompt, no template
    first, second = encoded.rows
    assert first["input_ids"].tolist() == [*prompt, *completion, 2]
    assert first["labels"].tolist() == [IGNORED] * len(prompt) + [*completion, 2]
    assert second["input_ids"].tolist() == [*plain, 2]
    # Nothing predicts the first token
    assert second["labels"].tolist() == [IGNORED, *plain[1:], 2]
    assert encoded.tokens == len(prompt) + len(completion) + len(plain) + 2
    assert not first["truncated"]


def test_truncation_is_counted_and_rows_without_room_are_left_out(tokenizer):
    long = Example("hi", "go " * 50)
    encoded = encoded_rows(
        [long, Example("hi " * 50, "go"), Example("hi", "go")], tokenizer, PARSING_TEMPLATE, 20
    )
    assert ([row["truncated"] for row in encoded.rows], encoded.left_out) == ([True, False], 1)
    whole = tokenizer("hi\n")["input_ids"] + tokenizer(long.completion)["input_ids"]
    assert encoded.rows[0]["input_ids"].tolist() == whole[:20]
    with pytest.raises(DataError, match="no row has room for a completion within `max_length` 3"):
        encoded_rows([long], tokenizer, "a prompt of many tokens: {prompt}\n", 3)


def test_batches_are_padded_at_the_right_and_their_first_label_does_not_count():
    batch = collate([encoded_row([5, 6, 7], [5, 6, 7]), encoded_row([8, 9], [8, 9])])
    torch.testing.assert_close(batch["input_ids"], torch.tensor([[5, 6, 7], [8, 9, 0]]))
    torch.testing.assert_close(
        batch["labels"], torch.tensor([[IGNORED, 6, 7], [IGNORED, 9, IGNORED]])
    )


def test_of_a_conversation_only_what_the_assistant_says_is_a_target(chat_tokenizer):
    (row,) = Encoder(chat_tokenizer, PromptTemplate(), 128).rows([Conversation(TURNS)])
    text = "<user>hi<|eos|>\n<assistant>hello you<|eos|>\n<user>bye<|eos|>\n<assistant>so long<|eos|>\n"
    assert row["input_ids"].tolist() == chat_tokenizer(text)["input_ids"]
    said = [token for token in row["labels"] if token != IGNORED]
    assert chat_tokenizer.decode(said) == "hello you<|eos|>\nso long<|eos|>\n"
    # What stands before the first target is what `generate` gives the model as its prompt.
    first = next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
    prompt = chat_tokenizer("<user>hi<|eos|>\n<assistant>")["input_ids"]
    assert row["input_ids"][:first].tolist() == prompt


def test_documents_fill_rows_and_lose_nothing():
    rows = list(packed([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11, 12], [13]], 5))
    assert [row["input_ids"].tolist() for row in rows] == [
        [1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10],
        [11, 12, 13],
    ]
    assert [row["documents"].tolist() for row in rows] == [[0, 0, 0, 1, 1], [0] * 5, [0, 0, 1]]
    assert [row["labels"].tolist() for row in rows] == [
        [IGNORED, 2, 3, IGNORED, 5],
        [IGNORED, 7, 8, 9, 10],
        [IGNORED, 12, IGNORED],
    ]


def written(tmp_path, count=50):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"document {row} says {'abc' * (row % 5)}\n" for row in range(count)))
    return str(file)


def test_language_model_data_is_packed_but_for_task_finetuning(settings, tmp_path):
    data = DataConfig(name=written(tmp_path))
    job = prepare(settings(data=data, recipe=replace(RECIPE, preset="continual"), max_length=32))
    assert {len(row["labels"]) for row in job.data.training.rows[:-1]} == {
        32
    } and "packed into whole rows" in job.plan.notes[0]
    assert job.plan.truncated == 0 and job.plan.tokens == prepare(settings(data=data)).plan.tokens
    job = prepare(settings(data=data))
    assert job.plan.rows == 42 and job.plan.held_out == 8 and not job.plan.notes
    with pytest.raises(DataError, match="packed rows are of plain text"):
        list(
            Encoder(job.trainable.tokenizer, PromptTemplate(), 32, pack=True).rows(
                [Example("a", "b")]
            )
        )
    assert (
        len(
            train(
                settings(
                    data=data, recipe=replace(RECIPE, preset="scratch"), max_length=32, steps=2
                )
            )
        )
        == 2
    )


def test_a_stream_is_shuffled_the_same_way_each_time_and_has_no_end(
    tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(training_data, "_SHUFFLED", 8)
    stream = StreamedRows(
        DataConfig(name=written(tmp_path, 20)),
        Encoder(tokenizer, PromptTemplate(), 64),
        1,
        HeldOut(),
    )
    first = [tuple(row["input_ids"]) for row in itertools.islice(stream, 60)]
    assert first == [tuple(row["input_ids"]) for row in itertools.islice(stream, 60)]
    passes = [first[at : at + 20] for at in (0, 20, 40)]
    assert all(set(each) == set(first) and len(set(each)) == 20 for each in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_streamed_run_and_its_resumption(settings, tmp_path):
    """Not promised, but so it is while the file stays as it was: the rows already seen are read
    past.
    """
    changes = {"data": DataConfig(name=written(tmp_path)), "streaming": True}
    job = prepare(settings(**changes))
    assert job.plan.rows is None and "streaming: `resume` reads past" in job.plan.notes[0]
    require_exact_resumption(settings, tmp_path, **changes)


def test_a_stream_that_has_lost_its_rows_ends(tokenizer, tmp_path):
    """As every pass without a row is followed by another."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    stream = iter(
        StreamedRows(
            DataConfig(name=str(file)),
            Encoder(tokenizer, PromptTemplate("{prompt}"), 8),
            1,
            HeldOut(),
        )
    )
    next(stream)
    file.write_text('{"prompt": "a prompt longer than the row", "completion": "b"}\n')
    with pytest.raises(DataError, match="no row has room for a completion within `max_length` 8"):
        next(stream)


def test_every_exit_is_measured_on_held_out_rows(settings):
    """Every two steps and at the end; after no training at all that is the loss of the base model's
    own exits.
    """
    changes = {"validation": "validation", "validation_samples": 6, "eval_steps": 2, "steps": 5}
    job = prepare(settings(**changes))
    assert job.data.held_out.digest == prepare(settings(**changes)).data.held_out.digest
    held_out, own = (
        {tuple(row["input_ids"]) for row in each.rows}
        for each in (job.data.held_out, job.data.training)
    )
    assert not held_out & own
    reports = []
    info = execute(job, reports.append).info
    # The last layer drafts nothing
    assert all(4 not in report.agreement for report in reports)
    assert [sorted(report.validation_losses) for report in reports] == [
        [],
        [],
        [1, 2, 3, 4],
        [1, 2, 3, 4],
        [1, 2, 3, 4],
    ]
    assert (
        reports[2].validation_losses == reports[3].validation_losses != reports[4].validation_losses
    )
    batch = collate([job.data.held_out.rows[at] for at in range(6)])
    logits = job.trainable.model.eval()(batch["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    assert info.details["validation_losses"]["4"] == pytest.approx(loss.item(), rel=1e-5)
    assert info.details["validation_rows"] == job.data.held_out.digest != job.data.training.digest


def test_every_validation_happens_once_and_changes_nothing(settings, tmp_path, monkeypatch):
    """At the end too, where Trainer asks again when the epoch is over."""
    plain = train(settings(steps=5, output=str(tmp_path / "plain")))
    done = []
    evaluate = RunTrainer.evaluate

    def noting(trainer, *arguments, **keywords):
        done.append(trainer.state.global_step)
        return evaluate(trainer, *arguments, **keywords)

    monkeypatch.setattr(RunTrainer, "evaluate", noting)
    measured = train(settings(validation="test", eval_steps=2, validation_samples=2, steps=5))
    assert done == [2, 4, 5]
    assert [report.loss for report in measured] == [report.loss for report in plain]


def test_the_text_of_a_special_token_in_a_completion_stays_text(tokenizer):
    row = Example("hi", "yo <|eos|> z")
    end = tokenizer.eos_token_id
    (kept,) = Encoder(tokenizer, PromptTemplate("{prompt}\n"), 64).rows([row])
    assert [token for token in kept["labels"] if token == end] == [end]  # at the end alone
    targets = [label for label in kept["labels"] if label != IGNORED]
    assert tokenizer.decode(targets[:-1]) == row.completion
    (raw,) = Encoder(tokenizer, PromptTemplate("raw"), 64).rows([row])
    assert raw["labels"].tolist().count(end) == 2


def test_a_tokenizer_has_the_size_asked_for_and_text_comes_back_unchanged(tokenizer, examples):
    assert len(tokenizer) == 300
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|pad|>", "<|bos|>", "<|eos|>"]
    texts = [examples[0].completion, "  two  spaces\n\ttab", "naïve café 東京 🙂", "[IN:X a ] 's"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert not {0, 1, 2} & set(ids)  # no special token is added


def test_tokens_in_the_order_of_their_frequency(tokenizer):
    """Of targets alone: the q's of the prompt do not count. `ab` may be one token, so letters stand
    apart.
    """
    encoder = Encoder(tokenizer, PromptTemplate("{prompt}"), 64)
    z, y, end = (tokenizer.convert_tokens_to_ids(name) for name in ("z", "y", "<|eos|>"))
    # Z four times, the end twice, y once
    rows = [Example("qqqqqqqq", "zzz"), Example("qqqqqqqq", "zy")]
    encoded = encode_rows(rows, encoder)
    order = token_order(encoded, 300)
    assert order[:3] == [z, end, y]
    assert order[3:] == [token for token in range(300) if token not in (z, end, y)]
    known = list(reversed(range(300)))
    order = by_frequency(encoded.rows, known)
    assert order[:3] == [z, end, y]
    assert order[3:] == [token for token in known if token not in (z, end, y)]


CONVERSATION = Conversation((("user", "hi"), ("assistant", "ho")))
FILE = DataConfig(name="rows.jsonl")


def template_of(prompting=None, data=FILE, rows=None, stored=None, chat=None):
    decoder = tiny_loaded()
    tokenizer = type("WithChat", (), {"chat_template": chat})()
    trainable = Trainable(
        "tiny", decoder.backend.model, decoder.backend, tokenizer, stored or CheckpointInfo()
    )
    config = replace(FinetuneConfig(data=data), prompting=prompting or PromptingConfig())
    return make_encoder(config, trainable, rows or [Example("hi", "ho")]).template


def test_templates():
    assert template_of() == PromptTemplate(PARSING_TEMPLATE)  # a prompt and a line end
    assert template_of(chat="x") == PromptTemplate(CHAT)
    assert template_of(stored=CheckpointInfo("Q: {prompt}"), chat="x") == PromptTemplate(
        "Q: {prompt}"
    )
    assert template_of(stored=CheckpointInfo(RAW)) == PromptTemplate(RAW)
    # Else it could not continue a line
    assert template_of(rows=[Example("", "plain text")]) == PromptTemplate(RAW)
    assert template_of(
        data=DataConfig(), stored=CheckpointInfo("Q: {prompt}"), chat="x"
    ) == PromptTemplate(PARSING_TEMPLATE)
    assert template_of(PromptingConfig("A {prompt}"), data=DataConfig()) == PromptTemplate(
        "A {prompt}"
    )
    assert template_of(PromptingConfig(raw=True), chat="x") == PromptTemplate(RAW)
    assert template_of(PromptingConfig(system="Be brief."), chat="x") == PromptTemplate(
        CHAT, "Be brief."
    )
    assert template_of(
        rows=[CONVERSATION], stored=CheckpointInfo("Q: {prompt}"), chat="x"
    ) == PromptTemplate(CHAT)


def test_a_split_is_none_of_the_files_that_have_its_name(settings, tmp_path, monkeypatch):
    (tmp_path / "test").mkdir()
    monkeypatch.chdir(tmp_path)
    assert prepare(settings(validation="test", validation_samples=2)).plan.held_out == 2


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% for %}"])
def test_a_template_that_fails_is_an_error_of_the_row(chat_tokenizer, template):
    chat_tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"^a\.jsonl:7.*") as error:
        list(
            Encoder(chat_tokenizer, PromptTemplate(), 128).rows([Conversation(TURNS, "a.jsonl:7")])
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["\0", "<|eos|>", "a" * 300_000])
def test_any_text(text):
    """The trainer takes a minute for a word of so many letters."""
    assert 259 <= len(train_tokenizer([Example("", text)], 260)) < 300


def test_conversations_that_cannot_be_encoded(tokenizer, chat_tokenizer):
    # A turn depends on what follows
    chat_tokenizer.chat_template = "{{ messages | length }}" + TURNS_TEMPLATE
    with pytest.raises(DataError, match="rewrites earlier turns"):
        list(Encoder(chat_tokenizer, PromptTemplate(), 128).rows([Conversation(TURNS)]))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        list(Encoder(tokenizer, PromptTemplate(), 128).rows([Conversation(TURNS)]))


EXAMPLE = Example("hi", "ho")


@pytest.mark.parametrize(
    "prompting, row, message",
    [
        (PromptingConfig("Q: {prompt}"), CONVERSATION, "`template` must be chat for conversations"),
        (
            PromptingConfig(system="Hi."),
            CONVERSATION,
            "`system` must be left out for conversations",
        ),
        (
            PromptingConfig("chat"),
            EXAMPLE,
            "a chat template was asked for, but the model's tokenizer has none",
        ),
        (
            PromptingConfig(system="Hi."),
            EXAMPLE,
            "`system` must be given with the chat template only",
        ),
    ],
)
def test_templates_that_cannot_be_used(prompting, row, message):
    with pytest.raises(ConfigError, match=message):
        template_of(prompting, rows=[row])
