"""Tasks by name and from files: prompts, ends of answers, scores."""

import csv
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from command_line import run
from evaluating import score, tiny_loaded

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.config.evaluation import TASKS, TaskConfig
from layerskip_core.config.model import PromptingConfig
from layerskip_core.data import Example
from layerskip_core.errors import ConfigError, DataError
from layerskip_core.evaluation.metrics import Scores
from layerskip_core.evaluation.tasks.task import load_task
from layerskip_core.evaluation.tasks.texts import load_trained
from layerskip_core.prompting import PromptTemplate


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def hub(monkeypatch):
    """A fake hub: (rows by (id, split), the calls of load_dataset)."""
    rows = {}
    calls = []

    def load_dataset(hub_id, split, streaming=False, **keywords):
        calls.append((hub_id, split, streaming, keywords))
        return datasets.Dataset.from_list(rows[hub_id, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return rows, calls


def test_commands_is_the_default_and_a_parsing_task():
    task = load_task(TaskConfig(samples=5))
    assert (len(task.examples), task.config.max_new_tokens, task.quality_metric) == (
        5,
        128,
        "exact_match",
    )
    assert all(example.completion.startswith("[IN:") for example in task.examples)
    assert (task.config.task, task.config.data, task.config.completion_column) == (
        "commands",
        "commands",
        "completion",
    )
    references = [example.completion for example in task.examples]
    assert score(task, references) == {"exact_match": 1.0}
    spaced = [f"\n{references[0]}  ", references[1].replace(" ", "  "), "", *references[3:]]
    assert score(task, spaced) == {"exact_match": 0.8}


@pytest.mark.parametrize("column", ["completion", "reference"])
def test_jsonl_and_csv_with_prompt_and_reference(tmp_path, column):
    rows = [{"prompt": "one", column: "the cat sat down"}, {"prompt": "two", column: "b a"}]
    jsonl = tmp_path / "rows.jsonl"
    table = tmp_path / "rows.csv"
    jsonl.write_text("\n" + "\n".join(map(json.dumps, rows)))
    table.write_text(f"prompt,{column}\none,the cat sat down\ntwo,b a\n")
    for task in (load_task(TaskConfig(str(jsonl))), load_task(TaskConfig("jsonl", str(table)))):
        assert task.examples == (Example("one", "the cat sat down"), Example("two", "b a"))
        assert (task.template, task.quality_metric, task.config.completion_column) == (
            None,
            "rouge2",
            column,
        )
        assert score(task, ["the cat sat", "b a"]) == pytest.approx(
            {"rouge2": 0.9, "exact_match": 0.5}
        )


def test_references_of_one_word_are_scored_by_exact_match_and_columns_are_chosen_by_flag(tmp_path):
    rows = [{"prompt": "one", "answer": "yes"}, {"prompt": "two", "answer": ["no", "never"]}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    task = load_task(TaskConfig(data=file))
    assert task.quality_metric == "exact_match"
    assert score(task, ["yes", "never"]) == {"exact_match": 1.0}
    swapped = load_task(
        TaskConfig(data=file, samples=1, prompt_column="answer", completion_column="prompt")
    )
    assert swapped.examples == (Example("yes", "one"),)


def test_a_list_is_joined_as_a_prompt_and_a_choice_of_references(tmp_path):
    file = write_lines(
        tmp_path / "rows.json",
        [{"source": ["One. ", "Two."], "target": ["a b c", "the cat sat down"]}],
    )
    task = load_task(TaskConfig(data=file, metric="rouge1"))
    assert task.examples == (Example("One. Two.", "a b c"),)
    # Against the second reference: 3 of 3 words, of 4; 2 of 2 bigrams, of 3.
    scores = {"rouge1": 6 / 7, "rouge2": 0.8, "rougeL": 6 / 7}
    assert score(task, ["the cat sat"]) == pytest.approx(scores)
    assert task.quality_metric == "rouge1"
    assert score(load_task(TaskConfig(data=file, metric="exact_match")), ["the cat sat down"]) == {
        "exact_match": 1.0
    }


def test_rows_without_references_are_scored_against_given_answers(tmp_path):
    """The first of several `turns` is asked. Answers are cut at stop strings before they become
    references.
    """
    rows = [
        {"turns": ["one", "then"], "category": "poem"},
        {"turns": ["two"]},
        {"turns": ["three"], "category": "poem"},
    ]
    task = load_task(
        TaskConfig(data=write_lines(tmp_path / "rows.jsonl", rows), metric="exact_match")
    )
    assert task.examples == tuple(Example(prompt, "") for prompt in ("one", "two", "three"))
    assert "no references" in task.notes[0]
    assert list(task.losses(None, [1])) == []
    task = replace(task, stop=("|",)).referring_to(["a|b", "b", "c"])
    assert score(task, ["a", "b|", "x"]) == {"exact_match": pytest.approx(2 / 3)}
    assert task.categories == {"poem": (0, 2)}
    assert task.referring_to(["x", "x", "x"]) is task
    failed = load_task(TaskConfig(data=str(tmp_path / "rows.jsonl"))).referring_to(
        ["one", None, "three words here"]
    )
    assert failed.quality_metric == "rougeL"
    assert score(failed, ["one", "", "three words here"]) == pytest.approx(
        {"rougeL": 2 / 3, "exact_match": 2 / 3}
    )
    with pytest.raises(
        ConfigError, match=r"`shots` must be 0 for .*, which has no references, got 1"
    ):
        load_task(TaskConfig(data=str(tmp_path / "rows.jsonl"), shots=1))


@pytest.mark.parametrize(
    "template, prompt, completion, model_template",
    [
        (None, "one\nA\n\ntwo\nB\n\nthree", "C", None),
        ("chat", "one\nA\n\ntwo\nB\n\nthree", "C", "chat"),
        ("raw", "one\nA\n\ntwo\nB\n\nthree\n", "C", "raw"),
        ("Q: {prompt}\nA:", "three", " C", "Q: one\nA: A\n\nQ: two\nA: B\n\nQ: {prompt}\nA:"),
    ],
)
def test_first_rows_are_shots_in_the_template(
    tmp_path, template, prompt, completion, model_template
):
    rows = [
        {"prompt": "one", "answer": "A"},
        {"prompt": "two", "answer": "B"},
        {"prompt": "three", "answer": "C"},
    ]
    task = load_task(
        TaskConfig(
            data=write_lines(tmp_path / "rows.jsonl", rows),
            shots=2,
            prompting=PromptingConfig(template),
        )
    )
    assert task.examples == (Example(prompt, completion),)
    assert (task.stop, task.template) == (("\n\n",), model_template)
    assert score(task, ["C\n\nQ: four"])["exact_match"] == 1.0
    loaded = task.prepared(
        replace(tiny_loaded(), tokenizer=SimpleNamespace(chat_template="{{ messages }}"))
    )
    assert loaded.template == PromptTemplate(model_template or "{prompt}\n")
    assert task.asked({"stop": ["!"]})[1] == {"max_new_tokens": 128, "stop": ("\n\n", "!")}


def test_topv2_from_a_folder_and_complete_prompts_of_xsum(tmp_path):
    head = "domain\tutterance\tsemantic_parse\n"
    form = "music\t{0}\t[IN:{0} ]\n"
    (tmp_path / "music_train.tsv").write_text(
        head + "".join(map(form.format, ("one", "two", "three", "more")))
    )
    (tmp_path / "music_test.tsv").write_text(head + form.format("four"))
    assert load_task(TaskConfig(data=str(tmp_path))).examples == (Example("four", "[IN:four ]"),)
    task = load_task(TaskConfig("topv2", str(tmp_path), shots=2))
    assert task.examples == (Example("one\n[IN:one ]\n\nthree\n[IN:three ]\n\nfour", "[IN:four ]"),)
    assert (task.stop, task.template, task.config.shots) == (("\n\n",), None, 2)
    assert score(task, ["[IN:four ]\n\nfive"]) == {"exact_match": 1.0}
    rows = [{"article": "###\nArticle: Snow fell.\n\nSummarize it.\n", "summary_gt": "It snowed."}]
    task = load_task(TaskConfig("xsum", write_lines(tmp_path / "rows.jsonl", rows)))
    assert task.examples == (Example("###\nArticle: Snow fell.\n\nSummarize it.\n", " It snowed."),)
    assert score(task, ["It snowed.\n\n###\nArticle"])["rouge2"] == 1.0


ARTICLE = {"article": "Rain fell.", "highlights": "It rained .\nA lot ."}
SHOWN = "Article: Rain fell.\nSummary: It rained . A lot .\n\n"
ABSTRACT = {
    "source": ["Snow fell.", "It was white."],
    "target": ["It snowed a lot.", "Rain is rare."],
}
PARQUET = {"revision": "refs/convert/parquet"}


@pytest.mark.parametrize(
    "name, source, row, example, keywords, answer",
    [
        ("cnn_dm", "abisee/cnn_dailymail", ARTICLE, Example(f"{SHOWN}Article: Rain fell.\nSummary:", " It rained . A lot ."),
         {"name": "3.0.0"}, " It rained . A lot .\nArticle: more"),
        ("xsum", "EdinburghNLP/xsum", {"document": "Snow fell.", "summary": "It snowed a lot."},
         Example("Article: Snow fell.\nSummary:", " It snowed a lot."), PARQUET, " It snowed a lot."),
        ("scitldr", "allenai/scitldr", ABSTRACT, Example("Snow fell. It was white.\nTL;DR:", " It snowed a lot."),
         {"data_dir": "Abstract", **PARQUET}, " Rain is rare.\nTL;DR: more"),
    ],
)  # fmt: skip
def test_summaries_from_the_hub(hub, name, source, row, example, keywords, answer):
    """CNN/DM shows an article of the training split; the best of a row's summaries counts."""
    rows, calls = hub
    rows[source, "validation"] = rows[source, "train"] = [row, row]
    task = load_task(TaskConfig(name, split="validation", samples=1))
    assert task.examples == (example,)
    assert calls[0] == (source, "validation", False, keywords)
    assert calls[1:] == ([(source, "train", True, keywords)] if name == "cnn_dm" else [])
    assert score(task, [answer]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert (task.quality_metric, task.template) == ("rouge2", "{prompt}")


def test_other_tasks_from_the_hub(hub):
    rows, calls = hub
    rows["owner/set", "test"] = [{"question": "one", "answer": "two"}]
    rows["Salesforce/wikitext", "test"] = [
        {"text": " = Snow = \n"},
        {"text": ""},
        {"text": " It fell . \n"},
    ]
    rows["openai/openai_humaneval", "test"] = [problem(1)]
    rows["google-research-datasets/mbpp", "prompt"] = [small(number) for number in range(1, 11)]
    rows["google-research-datasets/mbpp", "test"] = [small(11)]
    assert load_task(TaskConfig("jsonl", "owner/set")).examples == (Example("one", "two"),)
    assert load_task(TaskConfig("lm")).text == " = Snow = \n It fell . \n"
    assert load_task(TaskConfig("humaneval")).examples[0].completion == "\n    return x + 1\n"
    (example,) = load_task(TaskConfig("mbpp", shots=1)).examples
    assert example.prompt == SOLVED.format(2) + SHOT.format(11)
    assert [call[1] for call in calls] == ["test", "test", "test", "test", "prompt"]


def problem(number):
    return {
        "task_id": f"Own/{number}",
        "prompt": f'def add{number}(x):\n    """Adds {number} to x."""\n',
        "entry_point": f"add{number}",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {1 + number}\n    assert candidate(2) == {2 + number}\n",
    }


def test_humaneval_judges_by_running_the_tests(tmp_path):
    file = tmp_path / "problems.jsonl.gz"
    file.write_bytes(
        gzip.compress("".join(json.dumps(problem(number)) + "\n" for number in (1, 2)).encode())
    )
    config = TaskConfig(
        "humaneval", str(file), problem_samples=2, pass_k=(1, 2), allow_code_execution=True
    )
    task = load_task(config)
    first = problem(1)
    second = problem(2)
    heads = [row["prompt"].removesuffix("\n") for row in (first, second)]
    assert [example.prompt for example in task.examples] == [heads[0]] * 2 + [heads[1]] * 2
    assert (task.quality_metric, task.template) == ("pass@1", "{prompt}")
    # The text after a stop string is not part of the answer
    right = "    return x + 1\n\ndef add1(x):\n    return 0\n"
    scores = score(task, [right, "    return x", "    return x", ""])
    assert (scores["pass@1"], scores["pass@2"]) == (0.25, 0.5)
    fenced = "\n    return x + 2\n```\n\nThis adds 2."
    scores = task.score([fenced] * 4)
    assert scores["pass@1"].values == (0.0, 1.0)  # one value per problem
    rows = task.answered([[fenced] * 4], [scores])
    assert [row.scores.get("pass@1") for row in rows] == [(0.0,), None, (1.0,), None]


def test_in_chat_the_first_code_block_of_an_answer_is_the_program(tmp_path):
    uses_helper = {
        **problem(1),
        "prompt": f"import math\n\ndef helper(x):\n    return math.floor(x)\n\n{problem(1)['prompt']}",
    }
    chat = PromptingConfig(template="chat")
    task = load_task(
        TaskConfig(
            "humaneval",
            write_lines(tmp_path / "problems.jsonl", [problem(2), uses_helper]),
            prompting=chat,
            allow_code_execution=True,
        )
    )
    head = problem(2)["prompt"].removesuffix("\n")
    assert head in task.examples[0].prompt and task.template == "chat"
    block = "Here it is:\n```python\ndef add{0}(x):\n    return {1}\n```\nIt adds.\n```\nadd\n```"
    answers = [block.format(2, "x + 2"), block.format(1, "helper(x + 1.5)")]
    assert score(task, answers)["pass@1"] == 1
    assert score(task, [answers[1], answers[0]])["pass@1"] == 0
    assert score(task, ["def add2(x):\n    return x + 2", "It cannot be done."])["pass@1"] == 0.5

    file = write_lines(tmp_path / "mbpp.jsonl", [small(number) for number in (2, 3, 4, 11, 511)])
    task = load_task(TaskConfig("mbpp", file, prompting=chat, allow_code_execution=True))
    (example,) = task.examples
    assert "Write f11." in example.prompt and "Write f2." not in example.prompt
    assert score(task, ["```python\ndef f11():\n    return 11\n```"])["pass@1"] == 1


def small(number, **changes):
    row = {
        "task_id": number,
        "text": f"Write f{number}.",
        "code": f"def f{number}():\r\n  return {number}",
        "test_setup_code": "",
    }
    return {
        **row,
        "test_list": [f"assert f{number}() == {number}"],
        "challenge_test_list": [],
        **changes,
    }


SHOT = "You are an expert Python programmer, and here is your task: Write f{0}. Your code should pass these tests:\n\n"
SHOT += "assert f{0}() == {0}\n[BEGIN]\n"
SOLVED = SHOT + "def f{0}():\n  return {0}\n[DONE]\n\n"


def test_mbpp_has_problems_2_to_4_as_shots_and_asks_those_of_the_split(tmp_path):
    file = write_lines(
        tmp_path / "mbpp.jsonl", [small(number) for number in (1, 2, 3, 4, 5, 11, 12, 511)]
    )
    task = load_task(TaskConfig("mbpp", file, allow_code_execution=True))
    assert [example.prompt for example in task.examples] == [
        "".join(SOLVED.format(number) for number in (2, 3, 4)) + SHOT.format(number)
        for number in (11, 12)
    ]
    assert task.examples[0].completion == "def f11():\n  return 11"
    assert (
        score(task, ["def f11():\n  return 11\n[DONE]\nnot python", "def f12():\n  return 11"])[
            "pass@1"
        ]
        == 0.5
    )
    (only,) = load_task(TaskConfig("mbpp", file, split="validation", shots=0)).examples
    assert only.prompt == SHOT.format(511)


def test_the_tests_of_mbpp_have_a_setup_that_uses_the_answer_or_imports(tmp_path):
    full = small(367, test_setup_code="root = Node(1)\r\n", test_list=["assert root.value == 1"])
    task = load_task(
        TaskConfig(
            "mbpp", write_lines(tmp_path / "mbpp.jsonl", [full]), shots=0, allow_code_execution=True
        )
    )
    answer = "class Node:\n  def __init__(self, value):\n    self.value = value"
    assert (score(task, [answer])["pass@1"], score(task, ["def f(): pass"])["pass@1"]) == (1.0, 0.0)
    sanitized = [
        small(7),
        small(8, test_imports=["import math"], test_list=["assert math.floor(f8()) == 8"]),
    ]
    for row in sanitized:
        row["prompt"] = row.pop("text")
        del row["test_setup_code"]
    task = load_task(
        TaskConfig(
            "mbpp", write_lines(tmp_path / "b.json", sanitized), shots=1, allow_code_execution=True
        )
    )
    assert [example.prompt.count("[BEGIN]") for example in task.examples] == [2]
    assert score(task, ["def f8(): return 8"])["pass@1"] == 1.0


@pytest.mark.parametrize(
    "column, odd", [("text", 5), ("code", ["a"]), ("test_list", "assert 1"), ("test_list", [5])]
)
def test_rows_of_wrong_types_are_named(tmp_path, column, odd):
    file = write_lines(tmp_path / "rows.jsonl", [small(1), small(2, **{column: odd})])
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {column} must be a "):
        load_task(TaskConfig("mbpp", file, shots=0))


def test_lm_takes_passages_of_a_text(tmp_path):
    words = [f"w{number}" for number in range(3000)]
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words) + "\n")
    task = load_task(TaskConfig("lm", str(file), samples=4))
    assert task.examples[0].prompt.split()[0] == "w0"
    assert [len(example.prompt.split()) for example in task.examples] == [100] * 4
    assert task.examples[0].completion.split()[0] == "w100"
    perplexity = Scores((2.0, 3.0), (1, 2))
    assert (task.quality_metric, task.score(["a", "b"], perplexity)) == (
        "perplexity",
        {"perplexity": perplexity},
    )
    rows = tmp_path / "rows.csv"
    rows.write_text("name,text\nx,first\ny,second\n")
    assert load_task(TaskConfig("lm", str(rows))).text == "first\n\nsecond"


@pytest.mark.parametrize(
    "keywords, named",
    [
        ({"task": "nothing-here"}, "`task` .*got nothing-here"),
        ({"task": "jsonl"}, "`data`"),
        ({"task": "lm", "data": "nothing.txt"}, "`data` nothing.txt"),
        ({"task": "humaneval", "shots": 1}, "`shots`"),
        ({"task": "xsum", "metric": "rouge1"}, "`metric`"),
        ({"task": "lm", "prompting": PromptingConfig("raw")}, "`template`"),
        ({"task": "mbpp", "split": "dev"}, "`split`"),
    ],
)
def test_settings_and_data_that_a_task_lacks_are_named(keywords, named):
    with pytest.raises((ConfigError, DataError), match=named):
        load_task(TaskConfig(**keywords))


@pytest.mark.parametrize("task", ["jsonl", "cnn_dm"])
def test_shots_leave_a_row_to_ask(tmp_path, task):
    rows = [{"prompt": "a", "article": "a", "summary": "b"}] * 2
    with pytest.raises(ConfigError, match="`shots` must be below 2"):
        load_task(TaskConfig(task, write_lines(tmp_path / "rows.jsonl", rows), shots=2))


def test_a_module_and_a_line_are_a_task(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "toy", "toy_task:TOY")
    folder = tmp_path / "out"
    arguments = (
        f"--model {checkpoint} --task toy --samples 3 --format markdown",
        f"--output {folder}",
    )
    result = run("bench", *arguments, "--exit 5 --spec 3 --repeats 1")
    assert result.code == 0, result.err
    document = json.loads((folder / "results.json").read_text())
    assert (document["config"]["task"]["task"], document["config"]["quality_metric"]) == (
        "toy",
        "digits",
    )
    values = [row["metrics"]["digits"] for row in document["results"]]
    head, _, *lines = [
        line.split(" | ") for line in result.out.splitlines() if line.startswith("|")
    ]
    # Rounded more with an interval
    shares = [float(re.match(r"[\d.]+", line[head.index("digits")])[0]) for line in lines]
    assert shares == pytest.approx([100 * value for value in values], abs=0.5)
    assert [
        float(row["digits"]) for row in csv.DictReader((folder / "results.csv").open())
    ] == values
    page = (folder / "report.html").read_text()
    assert "<button>digits</button>" in page
    assert "Quality: digits (%)</text>" in page


USUAL = TaskConfig()


def trained(folder, data, exit_blocks=None, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    details = {"config": {"data": data, **config}} | (
        {} if exit_blocks is None else {"exit_blocks": exit_blocks}
    )
    (folder / "layerskip.json").write_text(CheckpointInfo(details=details).to_json())
    return str(folder)


def test_a_trained_model_is_measured_on_rows_of_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"ask": "one", "say": "two"}\n')
    Path("other.jsonl").write_text('{"ask": "three", "say": "four"}\n')
    columns = {"prompt_column": "ask", "completion_column": "say"}

    def loaded(data, asked=USUAL, **config):
        task = load_trained(asked, trained(tmp_path / "model", data, **config))
        return (
            [(row.prompt, row.completion) for row in task.examples],
            task.config.task,
            next(iter(task.notes), ""),
        )

    rows = {"name": "rows.jsonl", "split": "train", **columns}
    seen = "rows: rows.jsonl, split train, which the model was trained on; `data` gives others"
    assert loaded(rows) == ([("one", "two")], "rows.jsonl", seen)
    other = "rows: other.jsonl, split validation, which the model was not trained on"
    assert loaded(rows, validation="other.jsonl") == ([("three", "four")], "other.jsonl", other)
    assert loaded(rows, validation="gone.jsonl")[0] == [("one", "two")]
    # The latest training counts; older versions wrote the name of its data alone.
    blocks = {
        "exit 2": {"data": "gone.jsonl"},
        "eagle3": {"data": {"name": "other.jsonl", **columns}},
    }
    assert loaded(rows, exit_blocks=blocks)[0] == [("three", "four")]
    assert loaded(rows, TaskConfig("commands", samples=1))[1:] == ("commands", "")
    assert loaded({"name": "commands"}, TaskConfig(samples=1))[1:] == ("commands", "")
    Path("folder").mkdir()
    for split, utterance in (("train", "a"), ("eval", "b")):
        Path(f"folder/alarm_{split}.tsv").write_text(
            f"domain\tutterance\tsemantic_parse\nalarm\t{utterance}\t[X ]\n"
        )
    told = "rows: folder, split validation, which the model was not trained on"
    assert loaded({"name": "folder", "prompt_column": "prompt"}) == (
        [("b", "[X ]")],
        "folder",
        told,
    )
    Path("rows.jsonl").write_text('{"say": "a text without a prompt"}\n')
    assert loaded(rows)[1] == "lm"
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    Path("rows.jsonl").write_text(json.dumps({"messages": messages}))
    assert loaded(rows)[0] == [("u", "a")]
    Path("rows.jsonl").unlink()
    with pytest.raises(
        DataError,
        match=r"was trained for: `data` rows.jsonl: there is no such file; give `data` or `task`",
    ):
        loaded(rows)


ANSWERED = {"prompt": "a", "answer": "b"}


@pytest.mark.parametrize(
    "rows, named",
    [
        ([ANSWERED, {"prompt": "a"}], "rows.jsonl:2: .*completion_column"),
        ([{"prompt": "a"}, ANSWERED], "rows.jsonl:1: needed a reference"),
        ([ANSWERED, {**ANSWERED, "category": 3}], "rows.jsonl:2: category"),
        ([ANSWERED, {"prompt": "a", "answer": [1]}], "rows.jsonl:2: answer"),
    ],
)
def test_bad_data_is_named(tmp_path, rows, named):
    with pytest.raises(DataError, match=named):
        load_task(TaskConfig(data=write_lines(tmp_path / "rows.jsonl", rows)))
