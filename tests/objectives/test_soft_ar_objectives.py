"""Regression to embeddings by hand, what holds embeddings apart, and two-pass feeding against a loop over windows."""

import math

import pytest
import torch
from contexts.test_soft_ar import LAYOUTS, embedded, soft_ar, texts
from helpers import V

from softrl.contexts.window import WindowLayout
from softrl.objectives.embedding_regression import embedding_spread, squared_error
from softrl.objectives.soft_ar import SoftARObjective, text_hidden, token_scores
from softrl.types import Texts


def given(ids):
    return Texts(ids, torch.ones_like(ids, dtype=torch.bool))


def test_squared_error_by_hand_and_no_gradient_to_the_target():
    outputs = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
    targets = torch.tensor([[0.0, 4.0], [3.0, -1.0]], requires_grad=True)
    errors = squared_error(outputs, targets)
    assert errors.tolist() == [5.0, 9.0]
    errors.sum().backward()
    assert outputs.grad.tolist() == [[2.0, -4.0], [-6.0, 0.0]]
    assert targets.grad is None


def test_its_optimum_is_the_mixture_of_the_targets():
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    y = (probs @ table).requires_grad_()
    (grad,) = torch.autograd.grad((probs * squared_error(y.expand(4, 3), table)).sum(), y)
    assert grad.norm() < 1e-12


def test_spread_is_the_mean_squared_distance_from_the_mean():
    assert embedding_spread(torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]])).item() == pytest.approx(8.0 / 3.0)
    assert embedding_spread(torch.ones(5, 2)).item() == 0.0


def test_a_table_collapses_by_squared_error_alone_and_not_beside_a_cross_entropy():
    """A hundred and fifty steps of AdamW, with weight decay as in training; the table starts at a spread of 1."""
    spreads = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = soft_ar("gru", WindowLayout(0, 1, 6, 0, aggregate=False), "embedding").float()
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=12**-0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=1.0)
        batch, objective = given(texts(8, 6)), SoftARObjective(cross_entropy=weight, regression=1.0)
        for _ in range(150):
            loss = token_scores(model, text_hidden(model, batch), batch.ids, objective).loss.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spreads[weight] = embedding_spread(model.head.embeddings).item()
    assert spreads[0.0] < 0.1
    assert spreads[1.0] > 0.5


def test_tokens_that_are_only_targets_learn_from_the_cross_entropy_alone():
    model, ids = soft_ar(output="embedding"), texts(1, 6)
    ids[0, -1] = V - 1
    ids[0, :-1] = ids[0, :-1].clamp(max=V - 2)
    hidden = text_hidden(model, given(ids))
    for objective, learns in ((SoftARObjective(0.0, 1.0), False), (SoftARObjective(1.0, 1.0), True)):
        loss = token_scores(model, hidden, ids, objective).loss.sum()
        (grad,) = torch.autograd.grad(loss, model.get_input_embeddings().weight, retain_graph=True)
        assert bool(grad[V - 1].norm() > 1e-6) == learns


@pytest.mark.parametrize("output", ["tokens", "embedding"])
def test_scores_of_every_token_by_hand(output):
    model, ids = soft_ar(output=output), texts()
    objective = SoftARObjective(0.7, 0.3 if output == "embedding" else 0.0)
    scores = token_scores(model, text_hidden(model, given(ids)), ids, objective)
    logits = model(ids).logits
    for row, t in ((0, 0), (1, 5), (2, 15)):
        target = ids[row, t + 1]
        nll = logits[row, t].logsumexp(0) - logits[row, t, target]
        error = torch.zeros(())
        if output == "embedding":
            y = model.head.outputs(model.model(ids).last_hidden_state[row, t])
            error = ((y - model.get_input_embeddings().weight[target]) ** 2).sum()
        found = [value[row, t].item() for value in (scores.nll, scores.squared_error, scores.loss)]
        assert found == pytest.approx([nll.item(), error.item(), (objective.cross_entropy * nll
                                       + objective.regression * error).item()])  # fmt: skip
        assert scores.hits[row, t] == (logits[row, t].argmax() == target)


@pytest.mark.parametrize("output", ["tokens", "embedding"])
def test_the_second_pass_is_fed_the_first_one_s_outputs_moved_on(output):
    model, ids = soft_ar("gpt2", "soft", output), texts(2)
    batch = Texts(ids, torch.arange(ids.shape[1]) >= torch.tensor([[0], [3]]))
    x, first = embedded(model, ids), model.model(ids, batch.mask).last_hidden_state
    soft_x = torch.zeros_like(x)
    for row, start in ((0, 0), (1, 3)):
        for t in range(start + 1, ids.shape[1]):
            soft_x[row, t] = model.soft_outputs(first[row, t - 1])
    is_soft = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.7
    really = is_soft.clone()
    really[0, 0] = really[1, 3] = False  # nothing comes before them
    expected = model.model(ids, batch.mask, soft_mask=really, soft_embeds=soft_x).last_hidden_state
    torch.testing.assert_close(text_hidden(model, batch, is_soft), expected)


def test_detached_soft_tokens_give_the_same_loss_and_another_gradient():
    model, ids = soft_ar(), texts(2)
    is_soft, grads, losses = torch.ones_like(ids, dtype=torch.bool), {}, {}
    for detached in (True, False):
        hidden = text_hidden(model, given(ids), is_soft, detached=detached)
        loss = token_scores(model, hidden, ids, SoftARObjective()).loss.sum()
        losses[detached] = loss.item()
        grads[detached] = torch.autograd.grad(loss, model.lm_head.weight)[0]
    assert losses[True] == pytest.approx(losses[False], rel=1e-9)
    assert (grads[True] - grads[False]).norm() > 1e-2 * grads[False].norm()
    # The whole gradient is that of finite differences.
    direction = torch.randn(grads[False].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    values = []
    with torch.no_grad():
        for step in (1e-6, -1e-6):
            model.lm_head.weight.add_(direction, alpha=step)
            hidden = text_hidden(model, given(ids), is_soft)
            values.append(token_scores(model, hidden, ids, SoftARObjective()).loss.sum().item())
            model.lm_head.weight.sub_(direction, alpha=step)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx((grads[False] * direction).sum().item(), rel=1e-5)


def test_without_a_soft_region_nothing_is_soft():
    model, ids = soft_ar("gpt2", LAYOUTS["hard"]), texts()
    is_soft = torch.ones_like(ids, dtype=torch.bool)
    assert torch.equal(text_hidden(model, given(ids), is_soft), text_hidden(model, given(ids)))


@pytest.mark.parametrize("weights", [(-1.0, 1.0), (0.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="must not be negative, and one of them positive, got"):
        SoftARObjective(*weights)
