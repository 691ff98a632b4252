"""`inspect`: the prediction after every layer."""

import html
import json
import re
import shutil

import pytest
import torch
from command_line import fails, run
from evaluating import LAYERS, own_answers, tiny_loaded

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.evaluation.inspection import (
    Inspection,
    LayerPrediction,
    TokenTrace,
    inspect,
    settled_layer,
)
from layerskip_core.evaluation.measure.measuring import measure_prompt
from layerskip_core.evaluation.report.files import inspection_page


@pytest.mark.parametrize(
    "chosen, layer",
    [
        ([5], 1),
        ([5, 5, 5], 1),
        ([1, 5, 5], 2),
        ([5, 1, 5], 3),
        ([1, 2, 5], 3),
        ([5, 5, 1, 5, 5], 4),
    ],
)
def test_the_layer_from_which_on_a_prediction_stays(chosen, layer):
    assert settled_layer(chosen) == layer


def test_every_layer_predicts_as_transformers_does():
    loaded = tiny_loaded()
    prompt = own_answers().examples[0].prompt
    found = inspect(loaded, prompt, 6)
    ids = loaded.encode_prompt(prompt)
    answer = list(
        measure_prompt(loaded, prompt, DecodingConfig("autoregressive", max_new_tokens=6)).ids
    )
    assert [one.token for one in found.tokens] == [loaded.detokenize([token]) for token in answer]
    with torch.no_grad():
        states = loaded.backend.model(
            torch.tensor([ids + answer]), output_hidden_states=True
        ).hidden_states
        for place, one in enumerate(found.tokens):
            for layer in range(1, LAYERS + 1):
                state = states[layer][0, len(ids) - 1 + place]
                # The last one is given normed
                normed = state if layer == LAYERS else loaded.backend.model.model.norm(state)
                probability, token = (
                    loaded.backend.model.lm_head(normed).float().softmax(-1).max(-1)
                )
                said = one.predictions[layer - 1]
                assert said.token == loaded.detokenize([int(token)])
                assert said.probability == pytest.approx(float(probability), abs=1e-5)
    assert found.mean_layers == sum(one.settled for one in found.tokens) / 6
    assert all(one.predictions[-1].token == one.token for one in found.tokens)


def test_no_text_of_an_inspection_becomes_markup():
    text = """</pre></title><script>alert("1")</script><img src=x onerror='1'>&lt;"""
    page = inspection_page(
        Inspection(text, text, 1, (TokenTrace(text, 1, (LayerPrediction(text, 0.5),)),), 1.0)
    )
    assert re.findall(r"<(script|img)", page) == []
    assert page.count("</title>") == 1
    assert html.unescape(re.search(r'title="(.*?)"', page)[1]) == f"layer 1: {text!r} 50%"
    assert html.unescape(re.search(r"<pre>\n(.*?)</pre>", page)[1]) == text


def test_the_page_of_a_known_inspection():
    said = LayerPrediction
    first = TokenTrace(" x", 2, (said("y", 0.25), said(" x", 0.5), said(" x", 1.0)))
    second = TokenTrace("<", 3, (said("<", 0.5), said("\n", 0.5), said("<", 0.75)))
    page = inspection_page(Inspection("tiny", "a <b>", 3, (first, second), 2.5))
    assert "On average, a token needed 2.5 of 3 layers." in page
    rows = re.findall(r'<tr><th scope="row">(\d)</th>(.*?)</tr>', page, re.DOTALL)
    cells = {
        int(layer): re.findall(r'<td class="(\w+)" .*?>(.*?)</td>', row) for layer, row in rows
    }
    assert cells == {
        3: [("right", "␣x"), ("right", "&lt;")],
        2: [("right", "␣x"), ("wrong", "↵")],
        1: [("wrong", "y"), ("early", "&lt;")],
    }
    assert "a &lt;b&gt;" in page and "exit block" not in page
    assert not re.search(r"https?://|url\(|<script", page)


def test_the_command_at_80_columns(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "out.html"
    result = run("inspect", "hi", f"--model {checkpoint} --max-new-tokens 3 --output {file}")
    lines = result.out.splitlines()
    assert result.code == 0
    every = " ".join(f"layer {layer}" for layer in range(1, 7))
    assert " ".join(lines[0].split()) == f"token needed {every}"
    assert max(map(len, lines)) <= 80
    assert re.search(r"A token needed \d\.\d of 6 layers", result.out)
    assert file.read_text().count("<tr>") == 2 + LAYERS
    narrow = run(
        "inspect", "hi", f"--model {checkpoint} --max-new-tokens 3 --layers 2,6"
    ).out.splitlines()[0]
    assert " ".join(narrow.split()) == "token needed layer 2 layer 6"


def test_json_from_standard_input_and_of_an_empty_prompt(checkpoint):
    short = f"inspect --model {checkpoint} --max-new-tokens 2 --format json"
    document = json.loads(run(short, stdin="hi\n").out)
    assert (document["prompt"], document["num_layers"]) == ("hi", LAYERS)
    assert [len(one["predictions"]) for one in document["tokens"]] == [LAYERS] * 2
    assert document["mean_layers"] == sum(one["settled"] for one in document["tokens"]) / 2
    fails("the prompt is empty", short, "")
    assert json.loads(run(short).out)["prompt"] == "remind me to call mom at 5"


def test_bad_flags_and_a_page_that_would_replace_a_file_of_a_model(checkpoint, tmp_path):
    fails(
        "--layers must be in 1..6, got 2,7", "inspect", "hi", f"--model {checkpoint} --layers 2,7"
    )
    fails("--format must be one of table, json, got csv", "inspect", "hi", "--format csv")
    file = tmp_path / "none" / "x.html"
    message = f"cannot write {file}: there is no folder {file.parent}"
    fails(message, "inspect", "hi", f"--model {checkpoint} --output {file}")
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "link").symlink_to(folder / "config.json")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for output in (folder / "config.json", tmp_path / "link"):
        message = (
            f"--output {output} must not be a file of the model in {folder}; give another name"
        )
        fails(message, "inspect", "x", f"--model {folder} --output {output}")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert run("inspect", "x", f"--model {folder} --output {folder}/page.html").code == 0
