"""Decoding states with some of their rows, in another order, and branches beside a trunk."""

import pytest
import torch
from helpers import ALL_MODELS, V, gemma3, llama, prompts, rwkv

from softrl.models.policy import Policy
from softrl.types import Prompts

MODELS = {**ALL_MODELS, "rwkv": rwkv}


def batch_of(name):
    """Prompts of one length for those that do not mask padding."""
    if name in ("rwkv", "mamba"):
        batch = prompts(3)
        return Prompts(batch.ids, torch.ones_like(batch.mask))
    return prompts(3)


def alone(policy, batch, row, fed):
    """The last hidden state of one row that was fed these embeddings, from a state of its own."""
    mask = batch.mask[row]
    state = policy.begin(Prompts(batch.ids[row][mask][None], mask[mask][None]), 1, len(fed))[1]
    for each in fed:
        hidden = policy.advance(state, each[None, None])[0, 0]
    return hidden


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_go_on_in_any_order_and_number(name, float64_inside):
    policy, batch = Policy(MODELS[name]()), batch_of(name)
    _, state = policy.begin(batch, 1, 4)
    first, second = policy.embed(torch.arange(3, 3 + 8).reshape(2, 4) % V)
    policy.advance(state, first[:3, None])
    rows = torch.tensor([2, 0, 2, 1])
    state.select(rows)
    hidden = policy.advance(state, second[:, None])[:, 0]
    for place, row in enumerate(rows.tolist()):
        expected = alone(policy, batch, row, [first[row], second[place]])
        torch.testing.assert_close(hidden[place], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_branch_and_its_trunk_go_on_apart(name, float64_inside):
    policy, batch = Policy(MODELS[name]()), batch_of(name)
    _, trunk = policy.begin(batch, 1, 4)
    common, on_trunk, on_branch, later = policy.embed(torch.arange(3, 3 + 12).reshape(4, 3) % V)
    policy.advance(trunk, common[:, None])
    rows = torch.tensor([1, 1, 0])
    branch = trunk.branched(rows)
    policy.advance(branch, on_branch[:, None])
    policy.advance(trunk, on_trunk[:, None])
    second = trunk.branched(torch.tensor([0, 1, 2]))
    found = [policy.advance(state, later[:, None])[:, 0] for state in (branch, trunk, second)]
    for place, row in enumerate(rows.tolist()):
        expected = alone(policy, batch, row, [common[row], on_branch[place], later[place]])
        torch.testing.assert_close(found[0][place], expected, rtol=1e-5, atol=1e-6)
    for row in range(3):
        expected = alone(policy, batch, row, [common[row], on_trunk[row], later[row]])
        torch.testing.assert_close(found[1][row], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[2][row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [llama, gemma3])
def test_a_growing_cache_is_selected_inside_the_graph(make):
    policy = Policy(make())
    _, state = policy.begin(prompts(2), 1, 4, growing=True)
    embeds = policy.embed(torch.tensor([3, 4])).detach().requires_grad_()
    policy.advance(state, embeds[:, None])
    state.select(torch.tensor([1, 1]))
    policy.advance(state, policy.embed(torch.tensor([5, 6]))[:, None]).sum().backward()
    assert embeds.grad is not None
    assert embeds.grad[0].abs().max() == 0.0
    assert embeds.grad[1].abs().max() > 0.0
