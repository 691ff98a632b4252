"""Every supported architecture: the training forward, and the commands on a small random
checkpoint.
"""

import pytest
import torch
from command_line import run
from conftest import CHANGES, ids_of, tiny_model
from evaluating import tiny_loaded
from torch.nn.functional import cross_entropy
from training_runs import recipe_module

from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.config.training import RecipeSettings
from layerskip_core.model import TransformersBackend
from layerskip_core.model.architectures import SUPPORTED
from layerskip_core.training.recipe import RunStep


@pytest.fixture(scope="module", params=SUPPORTED)
def folder(request, tmp_path_factory):
    loaded = tiny_loaded(torch.float32)
    vocabulary = {
        "vocab_size": len(loaded.tokenizer),
        "eos_token_id": loaded.tokenizer.eos_token_id,
    }
    model = tiny_model(request.param, torch.float32, num_hidden_layers=3, **vocabulary)
    path = str(tmp_path_factory.mktemp(request.param))
    save_checkpoint(model, loaded.tokenizer, loaded.info, path, torch.float32)
    return path


def test_commands(folder):
    """As they are started without any flags, and with an exit."""
    fixed = f"--model {folder} --max-new-tokens 3"
    plain = run("generate", "wake me up", "--strategy autoregressive --ignore-eos", fixed)
    for chosen in ((), ("--exit 2 --spec 2",)):
        result = run("generate", "wake me up", *chosen, "--stats --ignore-eos", fixed)
        assert (result.code, result.out) == (0, plain.out) and "3 tokens" in result.err


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_loss_of_the_last_exit_is_that_of_the_model(model_type):
    """Without layer dropout, in training mode; the gradients of every weight too, because no other
    exit is trained.
    """
    changes = {**CHANGES.get(model_type, {}), "num_hidden_layers": 2}
    model = tiny_model(model_type, **changes).train()
    ids = ids_of(2, 11)
    output = model(ids, labels=ids)
    expected = output.loss  # in fp32
    cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    step = RunStep(0, 1)
    output = recipe_module(model, RecipeSettings("finetune", p_max=0.0, curriculum="none")).train()(
        ids, ids, step
    )
    tokens = 2 * 10
    torch.testing.assert_close(
        output["per_exit"][-1] / tokens, expected.detach(), check_dtype=False
    )
    (output["loss"] / tokens).backward()
    # Ours are of a loss in fp32: rounded by 6e-8, and then summed
    for name, weight in model.named_parameters():
        assert (weight.grad - gradients[name]).abs().max() < 1e-5 * gradients[name].abs().max(), (
            name
        )


def test_embedding_dropout_acts_in_training():
    """In training half of the embedding is zero and the rest is doubled; in evaluation nothing
    changes.
    """
    backend = TransformersBackend(tiny_model("starcoder2", embedding_dropout=0.5))
    ids = torch.arange(3, 67)[None]
    seen = []
    texts = backend.texts
    backend.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    texts.states(ids, ())
    backend.model.train()
    texts.states(ids, ())
    plain, dropped = seen
    torch.testing.assert_close(plain, backend.model.model.embed_tokens.weight[None, 3:])
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder", ["gpt2", "qwen3_moe", "gemma3_text", "qwen3_5_text", "nemotron_h"], indirect=True
)
def test_finetune_and_sweep(folder, tmp_path):
    """Of types between which all kinds of weights, layers and caches are."""
    settings = "--steps 1 --batch-size 2 --samples 4 --max-length 48 --dtype fp32"
    output = str(tmp_path / "out")
    result = run(f"finetune --model {folder}", settings, f"--device cpu --output {output}")
    assert result.code == 0, result.err
    assert run("generate", "wake me up", f"--max-new-tokens 3 --exit 2 --model {output}").code == 0
    few = "--samples 1 --max-new-tokens 3 --device cpu --format csv"
    result = run(f"sweep-exits --exits 2 --specs 2 --model {folder}", few)
    assert result.code == 0 and len(result.out.splitlines()) > 2, result.err
