"""Which rows train, choose and report: the division by keys, and that no row does two of these in
real runs.
"""

import json
from random import Random

import pytest
from training_runs import saved_base, settings_on

from layerskip_core.checkpoint.info import read_info
from layerskip_core.config.evaluation import BenchConfig, SweepConfig
from layerskip_core.config.model import DataConfig
from layerskip_core.config.training import DrafterConfig, RecipeSettings
from layerskip_core.evaluation.tasks.task import TaskConfig, load_task
from layerskip_core.evaluation.tasks.texts import load_trained
from layerskip_core.splits import TEST, VALIDATION, HeldOut, hold_out, key_of, part_of, side_of
from layerskip_core.training.run import execute, prepare

PROMPTS = ("prompt",)
SWEEP = SweepConfig().task
BENCH = BenchConfig().task


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def settings(base, tmp_path):
    return settings_on(base, tmp_path)


def keys(count, start=0):
    return [key_of({"prompt": f"row {number}"}, PROMPTS) for number in range(start, start + count)]


def held(division, rows, side):
    return [key for key in rows if division.holds(key) and side_of(key) == side]


def test_a_key_is_that_of_the_content_and_the_same_in_every_process():
    row = {"prompt": "naïve", "completion": "b", "id": 7}
    columns = ("prompt", "completion", "messages")
    assert (
        key_of(row, columns)
        == key_of({"completion": "b", "prompt": "naïve", "id": 8, "score": 0.5}, columns)
        == "57c974c5acbcc144"
    )
    assert key_of(row, columns) != key_of({**row, "completion": "c"}, columns)
    # No usual column: all count
    assert key_of({"ask": "a", "n": 1}, columns) != key_of({"ask": "a", "n": 2}, columns)
    assert len(key_of({"prompt": "\ud800", "completion": {1, 2}}, columns)) == 16  # any content


@pytest.mark.parametrize(
    "rows, choose, report",
    [
        (0, 0, 0),
        (39, 0, 0),
        (40, 8, 0),
        (255, 15, 0),
        (256, 16, 8),
        (2048, 128, 64),
        (50_000, 128, 64),
    ],
)
def test_how_many_rows_are_held_out(rows, choose, report):
    every = keys(rows)
    division = hold_out(every)
    assert (len(held(division, every, VALIDATION)), len(held(division, every, TEST))) == (
        choose,
        report,
    )
    assert division.rows == choose + report and bool(division.digest) == (choose > 0)


def test_what_is_held_out_is_spread_over_sorted_data_whatever_its_order():
    every = keys(2048)  # of eight domains, one after the other
    division = hold_out(every)
    domains = [every.index(key) // 256 for key in held(division, every, VALIDATION)]
    assert min(domains.count(domain) for domain in range(8)) >= 6
    assert hold_out(Random(1).sample(every, 2048)) == division
    more = hold_out([*every, *keys(300, 2048)])
    assert more.digest != division.digest
    for side in (VALIDATION, TEST):  # rows keep their side, and most that were held out still are
        kept = set(held(more, every, side)) & set(held(division, every, side))
        assert len(kept) >= 0.7 * len(held(division, every, side))
        assert not kept & set(held(more, every, TEST if side == VALIDATION else VALIDATION))


def test_equal_rows_are_never_apart():
    every = [*keys(60), *keys(60)]
    division = hold_out(every)
    chosen = held(division, every, VALIDATION)
    assert 0 < len(chosen) <= 8 and all(chosen.count(key) == 2 for key in chosen)
    alike = hold_out(keys(1) * 100)
    assert (alike.rows, alike.digest) == (0, "")


def test_trained_data_is_recognised_by_its_rows():
    every = keys(1000)
    division = hold_out(every)
    recognised = {
        "shuffled": Random(2).sample(every, 1000),
        "three times as long": [*every, *keys(2000, 1000)],
        "its first half": every[:500],
    }
    assert all(division.recognises(rows) for rows in recognised.values())
    others = keys(1000, 5000)
    # A test file of which a tenth is also in the training data.
    assert not division.recognises(others) and not division.recognises([*others, *every[:100]])
    assert not HeldOut().recognises(every) and hold_out(every[:10]).recognises(every[:10])


def test_parts_of_data():
    every = keys(100)
    chosen = part_of(every, VALIDATION)
    reported = part_of(every, TEST)
    assert sorted([*chosen.places, *reported.places]) == list(range(100)) and chosen.divided
    assert len(part_of(every, None).places) == 100
    few = part_of(every[:39], TEST)
    assert len(few.places) == 39 and not few.divided
    trained = keys(300)
    division = hold_out(trained)
    new = keys(100, 300)
    for side, count in ((VALIDATION, 18), (TEST, 9)):
        part = part_of(trained, side, [division])
        assert (len(part.places), part.is_trained, part.seen, part.divided) == (
            count,
            True,
            False,
            True,
        )
        longer = part_of([*trained, *new], side, [division])
        assert set(part.places) <= set(longer.places)
        later = {[*trained, *new][place] for place in longer.places} - set(trained)
        assert all(division.holds(key) for key in later)
    whole = hold_out(trained, nothing=True)  # with rows of its own to validate on
    part = part_of(trained, TEST, [whole])
    assert (len(part.places), part.seen, part.divided) == (300, True, False)
    # A second training held out rows that the first one trained on: those of the newest count.
    assert len(part_of(trained, VALIDATION, [division, whole]).places) == 18
    assert part_of(new, TEST, [division]).is_trained is False


def write_rows(file, numbers):
    rows = [
        {"id": number, "prompt": f"domain {number // 50} row {number}", "completion": f"{number}"}
        for number in numbers
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def trained_rows(job):
    """The texts of the rows that a run trains on."""
    tokenizer = job.trainable.tokenizer
    return {tokenizer.decode(row["input_ids"]) for row in job.data.training.rows}


def of_task(task):
    return {example.prompt for example in task.examples}


def test_a_model_is_measured_on_rows_of_its_file_that_it_was_not_trained_on(
    settings, tmp_path, monkeypatch
):
    file = tmp_path / "rows.jsonl"
    write_rows(file, range(400))
    config = settings(
        data=DataConfig(str(file)), recipe=RecipeSettings("none"), steps=2, max_length=64
    )
    job = prepare(config)
    texts = "\n".join(trained_rows(job))
    execute(job)
    info = read_info(tmp_path / "out")
    (division,) = info.held_out
    assert (job.plan.rows, job.plan.held_out, division.rows, bool(division.digest)) == (
        400 - 25 - 12,
        25,
        37,
        True,
    )

    def measured(data=None, model="out"):
        """Rows of a sweep, those that it checks on, and rows of bench; never a trained one, never
        one of two of these.
        """
        chosen = load_trained(TaskConfig(data=data, split=VALIDATION), str(tmp_path / model))
        reported = load_trained(TaskConfig(data=data, samples=20), str(tmp_path / model))
        parts = (
            of_task(chosen),
            {example.prompt for example in chosen.others(256)},
            of_task(reported),
        )
        assert not any(f"{prompt}\n" in texts for part in parts for prompt in part)
        assert sum(map(len, parts)) == len(set.union(*parts))
        return parts, chosen.notes[0], reported.notes[0]

    parts, chosen, reported = measured()
    assert list(map(len, parts)) == [12, 13, 12]
    # Of 8 domains in order
    assert min(len({prompt.split()[1] for prompt in part}) for part in parts) >= 4
    assert (
        chosen
        == f"rows: among 25 of the 400 in {file}, held out of the training; others report (`bench`), `samples` 0 takes both"
    )
    assert reported.startswith(
        f"rows: among 12 of the 400 in {file}, held out of the training; others choose (`sweep-exits`)"
    )
    # The file is the same one when it is named, renamed, shuffled or longer.
    assert measured(str(file))[0] == parts
    shuffled = write_rows(tmp_path / "other.jsonl", Random(3).sample(range(400), 400))
    assert [set(part) for part in measured(shuffled)[0]][2] == parts[2]
    write_rows(file, range(500))
    longer, _, _ = measured()
    assert parts[2] <= longer[2]
    write_rows(file, range(1000, 1400))  # all rows are new
    assert "held out" not in measured()[1]


def test_a_stream_leaves_out_what_its_first_rows_decide(settings, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", range(400))
    job = prepare(settings(data=DataConfig(file), streaming=True))
    assert (
        job.plan.division == prepare(settings(data=DataConfig(file))).plan.division
        and job.plan.held_out == 25
    )
    decode = job.trainable.tokenizer.decode
    held = {decode(row["input_ids"]) for row in job.data.held_out.rows}
    one_pass = [decode(row["input_ids"]) for row in job.data.training.stream.one_pass(0)]
    assert len(one_pass) == len(set(one_pass)) == 400 - 25 - 12 and not held & set(one_pass)


def test_other_data_to_validate_on_is_divided_and_all_rows_train(settings, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", range(100))
    other = write_rows(tmp_path / "other.jsonl", range(1000, 1100))
    config = settings(
        data=DataConfig(file),
        validation=other,
        recipe=RecipeSettings("none"),
        steps=1,
        max_length=64,
    )
    job = prepare(config)
    execute(job)
    decode = job.trainable.tokenizer.decode
    validated = {decode(row["input_ids"]).split("\n")[0] for row in job.data.held_out.rows}
    chosen = load_trained(TaskConfig(split=VALIDATION, samples=99), str(tmp_path / "out"))
    reported = load_trained(TaskConfig(samples=99), str(tmp_path / "out"))
    assert job.plan.rows == 100 and of_task(chosen) == validated
    assert not of_task(reported) & validated and len(of_task(reported) | validated) == 100
    named = load_trained(TaskConfig(data=file, samples=20), str(tmp_path / "out"))
    assert named.notes == (
        f"rows: among 100 of the 100 in {file}, which the model was trained on; `data` gives others",
    )


def test_lines_of_a_text_are_held_out_too_and_other_texts_are_divided(settings, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"the line number {line} of this text\n" for line in range(300)))
    config = settings(
        data=DataConfig(str(file)), recipe=RecipeSettings("none"), steps=1, max_length=64
    )
    job = prepare(config)
    execute(job)
    texts = trained_rows(job)
    chosen, reported = (
        load_trained(TaskConfig(split=split), str(tmp_path / "out")).text
        for split in (VALIDATION, TEST)
    )
    lines = chosen.splitlines(), reported.splitlines()
    assert list(map(len, lines)) == [18, 9] and not set(lines[0]) & set(lines[1])
    assert not any(line in text for line in (*lines[0], *lines[1]) for text in texts)
    running = tmp_path / "running.txt"
    running.write_text(
        "".join(f"sentence {line} has a few words, and so on it goes.\n" for line in range(5000))
    )
    texts = [
        load_task(TaskConfig("lm", str(running), split=split)).text for split in (VALIDATION, TEST)
    ]
    parts = [set(text.splitlines()) for text in texts]
    assert (
        not parts[0] & parts[1] and len(parts[0] | parts[1]) == 5000 and min(map(len, parts)) > 1500
    )
    assert load_task(TaskConfig("lm", str(running), samples=0)).text == running.read_text()


def test_tasks_with_splits_of_their_own_and_tasks_without(tmp_path):
    head = "domain\tutterance\tsemantic_parse\n"
    for split in ("eval", "test"):
        (tmp_path / f"a_{split}.tsv").write_text(
            head + "".join(f"a\t{split} {row}\t[X ]\n" for row in range(60))
        )
    folder = str(tmp_path)
    chosen, reported = (
        of_task(load_task(TaskConfig(data=folder, split=split, samples=99)))
        for split in (VALIDATION, TEST)
    )
    assert chosen == {f"eval {row}" for row in range(60)} and reported == {
        f"test {row}" for row in range(60)
    }
    articles = [{"article": f"article {row}", "summary": "s"} for row in range(100)]
    file = tmp_path / "xsum.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in articles))
    chosen, reported = (
        of_task(load_task(TaskConfig("xsum", str(file), split=split, samples=99)))
        for split in (VALIDATION, TEST)
    )
    assert not chosen & reported and len(chosen | reported) == 100


def test_every_process_and_resumption_holds_out_the_same_rows(settings, tmp_path):
    file = tmp_path / "rows.jsonl"
    write_rows(file, range(400))

    def held_out(**changes):
        job = prepare(settings(data=DataConfig(str(file)), overwrite=True, **changes))
        decode = job.trainable.tokenizer.decode
        return {decode(row["input_ids"]) for row in job.data.held_out_rows}, job.plan.division

    rows, division = held_out()
    assert len(rows) == 25 and len({row.split()[1] for row in rows}) >= 6  # of eight domains
    assert held_out(seed=5) == (rows, division)
    write_rows(file, reversed(range(400)))
    assert held_out() == (rows, division)
    drafter = prepare(
        settings(
            DrafterConfig,
            data=DataConfig(str(file)),
            answers="data",
            output=str(tmp_path / "drafter"),
        )
    )
    assert (drafter.plan.held_out, drafter.plan.division) == (25, division)
