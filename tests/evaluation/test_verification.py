"""`verify`, which finds what is broken on purpose, and `inspect`, the prediction after every
layer.
"""

import html
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import fails, run
from evaluating import LAYERS, own_answers, tiny_loaded
from exit_block_models import add_eagle3

from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import VerifyConfig
from layerskip_core.decoding import Prefixes, engine, sampling
from layerskip_core.decoding.drafters.exit import ExitDrafter
from layerskip_core.decoding.sampling import accepted_choices, verify
from layerskip_core.evaluation import verification
from layerskip_core.evaluation.checks import (
    BATCH,
    DISTRIBUTION,
    DRAFTS,
    JOINED,
    PIECES,
    ROW,
    ROWS,
    SAMPLED_DRAFTS,
    SEED,
    THREADS,
    TURN,
    chi_square,
)
from layerskip_core.evaluation.inspection import (
    Inspection,
    LayerPrediction,
    TokenTrace,
    inspect,
    settled_layer,
)
from layerskip_core.evaluation.measure import measure_prompt
from layerskip_core.evaluation.report import inspection_page
from layerskip_core.evaluation.verification import tables, to_csv
from layerskip_core.model.native import NativeBackend, compiled
from layerskip_core.model.torch_backend import TorchBackend

VARIANT = next((name for name in compiled.VARIANTS if compiled.kernels(name) is not None), None)
OWN = VARIANT or "torch"
SMALL = tuple(
    f"--samples 2 --max-new-tokens 6 --draws 0 --kernels {OWN} --precisions fp32 --specs 2".split()
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = tiny_loaded(torch.float32, hidden_size=64, intermediate_size=96)
    folder = str(tmp_path_factory.mktemp("verified") / "model")
    info = replace(loaded.info, exit_layer=2, num_draft_tokens=4)
    save_checkpoint(loaded.backend.model, loaded.tokenizer, info, folder, torch.float32)
    add_eagle3(Path(folder))
    return folder


def settings(model, **changes):
    usual = {
        "samples": 4,
        "max_new_tokens": 8,
        "precisions": ("fp32",),
        "kernels": (OWN,),
        "specs": (3,),
        "draws": 0,
    }
    return VerifyConfig(model, **{**usual, **changes})


def verified(config):
    *_, record = verification.verify(config)
    return record


def missed(record):
    return {result.check for result in record.results if not result.passed}


@pytest.fixture(scope="module")
def whole(model):
    kernels = tuple(filter(None, (VARIANT, "torch", "exact", "generic")))
    return verified(
        settings(model, samples=2, kernels=kernels, precisions=("fp32", "int8"), draws=40)
    )


def test_every_promise_is_kept(whole):
    assert missed(whole) == set()
    found = {(result.kernels, result.precision) for result in whole.results}
    assert {(OWN, "fp32"), ("torch", "int8"), ("exact", "fp32"), ("generic", "fp32")} <= found
    assert whole.environment["skipped"] == [
        "not verified: generic int8: transformers' layers have no low-bit weights"
    ]


def test_every_check_ran_on_our_own_kernels(whole):
    own = [
        result for result in whole.results if (result.kernels, result.precision) == (OWN, "fp32")
    ]
    checks = {ROWS, PIECES, THREADS, DRAFTS, BATCH, JOINED, TURN, SEED, DISTRIBUTION} | (
        {ROW, SAMPLED_DRAFTS} if VARIANT else set()
    )
    assert checks == {result.check for result in own}
    promised = {result.promise for result in own if result.check in (ROWS, DRAFTS)}
    assert promised == ({"bits", "tokens"} if VARIANT else {"near-ties"})
    drafted = [result.setting for result in own if result.check == DRAFTS]
    of_all = {"exit 2, 3 drafts", "eagle3 drafter", "lookup", "adaptive"}
    assert of_all | {"int8 copy, 6 layers", "int4 copy, 6 layers"} <= set(drafted)
    assert all(result.tokens > 0 and result.prompts > 0 for result in own)


def test_there_is_a_table_for_each_precision(whole):
    wide, narrow = tables(whole)
    assert wide.headers == ("fp32", *dict.fromkeys((OWN, "torch", "exact", "generic")))
    rows = {row[0]: dict(zip(wide.headers[1:], row[1:], strict=True)) for row in wide.rows}
    assert (rows[ROWS][OWN], rows[BATCH]["exact"]) == ("bits" if VARIANT else "same", "-")
    assert narrow.headers[0] == "int8" and narrow.note.endswith("\nEvery promise was kept.")
    assert to_csv(whole).count("\n") == len(whole.results) + 1


def _wrong_tokens(monkeypatch):
    """A verification that accepts its first draft, whatever the target says."""
    honest = accepted_choices

    def careless(tokens, counts, choices):
        ids = honest(tokens, counts, choices)
        return [[int(tokens[1]), *ids[0][1:]]] if list(counts) == [2] else ids

    for module in (engine, sampling):
        monkeypatch.setattr(module, "accepted_choices", careless)
    return {DRAFTS}


def _bits_of_a_batch(monkeypatch):
    """Kernels that round in a batch otherwise than for a row alone."""
    kind = NativeBackend if VARIANT else TorchBackend
    honest = kind.unembed
    off = 1 + 1e-7 if VARIANT else -1.0
    monkeypatch.setattr(
        kind, "unembed", lambda self, hidden: honest(self, hidden) * (off if len(hidden) > 1 else 1)
    )
    return {ROWS}


def _stale_turns(monkeypatch):
    """Keys and values of the turn before that are taken for those of other tokens."""
    honest = Prefixes.begin

    def stale(self, model, target, prompt, end):
        for text in self._texts:
            text.ids = (prompt + text.ids)[: len(text.ids)]
        return honest(self, model, target, prompt, end)

    monkeypatch.setattr(Prefixes, "begin", stale)
    return {TURN}


def _biased_sampling(monkeypatch):
    def careless(tokens, spans, logits):
        counts = [span.tokens for span in spans]
        if spans[0].row.config.temperature == 0 or max(counts) == 1:
            return verify(tokens, spans, logits)
        return [[*own[1:].tolist(), 5] for own in torch.split(tokens, counts)]

    monkeypatch.setattr(engine, "verify", careless)
    return {DISTRIBUTION}


@pytest.mark.parametrize(
    "break_it", [_wrong_tokens, _bits_of_a_batch, _stale_turns, _biased_sampling]
)
def test_what_is_broken_is_found(model, monkeypatch, break_it):
    expected = break_it(monkeypatch)
    record = verified(settings(model, draws=60 if break_it is _biased_sampling else 0))
    assert expected <= missed(record)
    if break_it is _wrong_tokens:
        result = next(
            result for result in record.results if result.check == DRAFTS and not result.passed
        )
        miss = result.mismatches[0]
        assert miss.expected != miss.found and miss.gap > 1e-3 and not miss.near_tie
        check, setting, kernels, prompt, place, *_, gap, near = tables(record)[1].rows[0]
        assert (check, setting, kernels) == (DRAFTS, result.setting, f"{OWN} fp32")
        assert (prompt, place, gap, near) == (
            str(miss.prompt),
            str(miss.position),
            f"{miss.gap:.3g}",
            "no",
        )


def test_the_command(model, tmp_path):
    result = run("verify", model, *SMALL, "--output", str(tmp_path / "out"), "--format", "json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert all(one["passed"] for one in document["results"])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "verification.csv", "verification.json", "verification.md",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "verification.json").read_text()) == document


def test_the_command_ends_with_status_1_where_a_promise_is_broken(model, monkeypatch):
    honest = ExitDrafter.draft

    def spoiled(self, *more):
        """The target goes on from states that are not its own."""
        draft = honest(self, *more)
        return replace(
            draft,
            exit_states={
                exit_layer: states * -3 for exit_layer, states in draft.exit_states.items()
            },
        )

    monkeypatch.setattr(ExitDrafter, "draft", spoiled)
    monkeypatch.setenv("COLUMNS", "200")
    result = run("verify", model, *SMALL)
    assert result.code == 1
    assert "near tie" in result.out and "broke their promise" in result.out
    assert "error:" not in result.err


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--kernels", "cuda"), ("--samples", "1"), ("--exits", "6"), ("--max-new-tokens", "128")],
)
def test_wrong_flags(model, flag, value):
    result = run("verify", model, "--kernels", OWN, flag, value)
    # The context is as long as the output
    named = "every prompt of --data" if value == "128" else flag
    assert result.code == (1 if value == "128" else 2)
    assert result.err.splitlines()[-1].startswith(f"error: {named} must be ")


def test_chi_square_tells_what_is_drawn_from_another_distribution():
    shares = {(0,): 0.5, (1,): 0.3, (2,): 0.199, (3,): 0.001}
    assert chi_square(Counter({(0,): 100, (1,): 60, (2,): 40}), shares, 200) > 0.9
    # 40^2/100 + 40^2/60 + 0.2^2/39.8 + 0.2^2/0.2 = 42.87 of three degrees of freedom
    assert chi_square(Counter({(0,): 60, (1,): 100, (2,): 40}), shares, 200) == pytest.approx(
        2.63e-9, rel=0.02
    )
    assert chi_square(Counter({(4,): 1}), shares, 1) == 0.0


@pytest.mark.parametrize(
    ("chosen", "layer"),
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
    result = run(
        "inspect", "hi", "--model", checkpoint, "--max-new-tokens", "3", "--output", str(file)
    )
    lines = result.out.splitlines()
    assert result.code == 0
    assert lines[0].split() == [
        "token",
        "needed",
        *[part for layer in range(1, 7) for part in ("layer", str(layer))],
    ]
    assert max(map(len, lines)) <= 80
    assert re.search(r"A token needed \d\.\d of 6 layers", result.out)
    assert file.read_text().count("<tr>") == 2 + LAYERS
    narrow = run(
        "inspect", "hi", "--model", checkpoint, "--max-new-tokens", "3", "--layers", "2,6"
    ).out.splitlines()[0]
    assert narrow.split() == ["token", "needed", "layer", "2", "layer", "6"]


def test_json_from_standard_input_and_of_an_empty_prompt(checkpoint):
    short = ("inspect", "--model", checkpoint, "--max-new-tokens", "2", "--format", "json")
    document = json.loads(run(*short, stdin="hi\n").out)
    assert (document["prompt"], document["num_layers"], len(document["tokens"])) == (
        "hi",
        LAYERS,
        2,
    )
    assert [len(one["predictions"]) for one in document["tokens"]] == [LAYERS] * 2
    assert document["mean_layers"] == sum(one["settled"] for one in document["tokens"]) / 2
    fails("the prompt is empty", *short, "")
    assert json.loads(run(*short).out)["prompt"] == "remind me to call mom at 5"


def test_bad_flags_and_a_page_that_would_replace_a_file_of_a_model(checkpoint, tmp_path):
    fails(
        "--layers must be in 1..6, got 2,7",
        "inspect",
        "hi",
        "--model",
        checkpoint,
        "--layers",
        "2,7",
    )
    fails("--format must be one of table, json, got csv", "inspect", "hi", "--format", "csv")
    file = tmp_path / "none" / "x.html"
    message = f"cannot write {file}: there is no folder {file.parent}"
    fails(message, "inspect", "hi", "--model", checkpoint, "--output", str(file))
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "link").symlink_to(folder / "config.json")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for output in (folder / "config.json", tmp_path / "link"):
        message = (
            f"--output {output} must not be a file of the model in {folder}; give another name"
        )
        fails(message, "inspect", "x", "--model", str(folder), "--output", str(output))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert (
        run("inspect", "x", "--model", str(folder), "--output", str(folder / "page.html")).code == 0
    )
