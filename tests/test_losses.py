"""Losses through a head in chunks, against the same formulas without chunks."""

import pytest
import torch

from layerskip_core import losses

VOCABULARY = 11


@pytest.fixture(params=[(1, 1), (3, 2), (100, 2), (100, 100)])
def chunks(request, monkeypatch):
    """Rows of a chunk, and those whose logits are kept."""
    for name, rows in zip(("CHUNK_LOGITS", "_CACHED_LOGITS"), request.param, strict=True):
        monkeypatch.setattr(losses, name, rows * VOCABULARY)
    monkeypatch.setattr(losses, "_SHARE_OF_HEAD", 0)
    torch.manual_seed(0)


def naive(head, run, teacher):
    aim, found = (head(states).log_softmax(-1) for states in (teacher, run))
    return (aim.exp() * (aim - found)).sum()


@pytest.mark.usefixtures("chunks")
def test_divergences_and_their_gradients_do_not_depend_on_chunks():
    weight = torch.randn(VOCABULARY, 5)
    taught, *inputs = torch.randn(3, 7, 5).unbind()

    def head(states):
        return torch.tanh(states @ weight.T) * 4  # a cap, whose derivative counts too

    runs = [(2 * states.clone().requires_grad_()) for states in inputs]
    expected = [naive(head, run, taught) for run in runs]
    weights = [(0.0, 0.5), (0.0, 3.0)]
    loss, sums = losses.summed_losses(head, runs, None, VOCABULARY, weights, taught)
    torch.testing.assert_close(sums[:, 1], torch.stack(expected))
    wanted = 0.5 * expected[0] + 3 * expected[1]
    torch.testing.assert_close(loss, wanted)
    for gradient, known in zip(
        torch.autograd.grad(loss, runs), torch.autograd.grad(wanted, runs), strict=True
    ):
        torch.testing.assert_close(gradient, known)

    with torch.no_grad():
        value, sums = losses.summed_losses(head, runs, None, VOCABULARY, weights, taught)
        assert [int(agreeing) for agreeing in sums[:, 2]] == [
            int((head(run).argmax(-1) == head(taught).argmax(-1)).sum()) for run in runs
        ]
    assert torch.equal(value, loss) and not value.requires_grad


@pytest.mark.usefixtures("chunks")
def test_losses_and_their_gradients_are_those_of_the_formulas():
    """Exits of weights (CE, KL) (0, 0), (0.3, 0.6) and (0.5, 0) after a matrix that trains with the
    head, behind a cap.
    """
    weight = torch.randn(VOCABULARY, 5, requires_grad=True)
    matrix = torch.randn(5, 5, requires_grad=True)
    inputs = torch.randn(3, 7, 5).unbind()
    targets = torch.randint(VOCABULARY, (7,))
    weights = [(0.0, 0.0), (0.3, 0.6), (0.5, 0.0)]

    def head(states):
        return torch.tanh(states @ weight.T) * 4

    def found(loss):
        return torch.autograd.grad(3 * loss, [weight, matrix], retain_graph=True)

    runs = [states @ matrix for states in inputs]
    logs = [head(run).log_softmax(-1) for run in runs]
    hard = [-one.gather(1, targets[:, None]).sum() for one in logs]
    last = logs[2].detach()
    soft = [torch.tensor(0.0), (last.exp() * (last - logs[1])).sum(), torch.tensor(0.0)]
    expected = sum(a * ce + b * kl for (a, b), ce, kl in zip(weights, hard, soft, strict=True))

    loss, sums = losses.summed_losses(head, runs, targets, VOCABULARY, weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sums[:, 0], torch.stack(hard))
    torch.testing.assert_close(sums[1:, 1], torch.stack(soft[1:]))
    for gradient, wanted in zip(found(loss), found(expected), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_a_batch_without_targets_has_a_gradient_of_zero_for_the_head():
    """Else its process would wait for the others in vain (DDP)."""
    weight = torch.randn(VOCABULARY, 5, requires_grad=True)
    states = torch.randn(0, 5, requires_grad=True)
    loss, *_ = losses.summed_losses(
        lambda part: part @ weight.T,
        [states],
        torch.zeros(0, dtype=torch.long),
        VOCABULARY,
        [(1.0, 0.0)],
    )
    loss.backward()
    assert float(loss.detach()) == 0 and not weight.grad.any()


def _trained(head_of, weight, runs, targets):
    """Sums, and the gradients of the whole head and the states, with `head_of(weight)` for the
    early exit.
    """
    loss, sums = losses.summed_losses(
        [head_of(weight), lambda states: states @ weight.T],
        runs,
        targets,
        VOCABULARY,
        [(0.3, 0.6), (0.5, 0.0)],
    )
    return sums, torch.autograd.grad(loss, [weight, *runs])


@pytest.mark.usefixtures("chunks")
def test_a_head_of_all_candidates_is_the_whole_head_frozen():
    weight = torch.randn(VOCABULARY, 5, requires_grad=True)
    runs = [torch.randn(7, 5, requires_grad=True) for _ in range(2)]
    targets = torch.randint(VOCABULARY, (7,))
    frequent = torch.tensor([8, 2])
    whole = _trained(lambda own: lambda states: states @ own.detach().T, weight, runs, targets)
    part = _trained(
        lambda own: losses.CandidateHead(own, frequent, targets, VOCABULARY, 0),
        weight,
        runs,
        targets,
    )
    torch.testing.assert_close(part, whole)


def test_a_sample_stands_for_the_tokens_left_out():
    """Its softmax denominator is that of all tokens on average: within 5 standard errors over
    samples.
    """
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, 5)
    states = torch.randn(1, 5)
    frequent = torch.tensor([8, 2])
    targets = torch.tensor([4])
    sampled = []
    for seed in range(200):
        head = losses.CandidateHead(weight, frequent, targets, 3, seed)
        logits = head(states)
        assert logits.shape == (1, 6)
        assert logits[0, head.places(targets)[0]] == states[0] @ weight[4]
        sampled.append(logits.exp().sum().detach())
    denominators = torch.stack(sampled)
    error = denominators.std() / len(denominators) ** 0.5
    assert denominators.std() > 0
    assert abs(denominators.mean() - (states @ weight.T).exp().sum()) < 5 * error
