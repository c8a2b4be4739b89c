"""The GRU's fused loop over time against its own step, one position after the other."""

import pytest
import torch
from helpers import gru
from torch import nn

MASKS = {
    "none": None,
    "full": torch.ones(3, 6, dtype=torch.bool),
    "padded": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1]]).bool(),
    "empty": torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]).bool(),
}


def deep_gru():
    model = gru().model
    torch.manual_seed(0)
    model.cells.append(type(model.cells[0])(model.config.hidden_size, model.config.hidden_size).double())
    return model


@pytest.mark.parametrize("mask", MASKS)
def test_states_are_those_of_single_steps(mask):
    model, mask = deep_gru(), MASKS[mask]
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(3, 6, model.config.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
    start = torch.randn(3, len(model.cells), model.config.hidden_size, generator=generator, dtype=torch.float64)
    start.requires_grad_()
    state, expected = start, []
    for index in range(6):
        new = model.step(embeds[:, index], state)
        state = new if mask is None else torch.where(mask[:, index, None, None], new, state)
        expected.append(state)
    inputs = [embeds, start, *model.cells.parameters()]
    results = []
    for states in (model.states(embeds, start, mask), torch.stack(expected, 1)):
        weights = torch.linspace(-1.0, 2.0, states.numel(), dtype=torch.float64).view_as(states)
        results.append([states, *torch.autograd.grad((weights * states).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_cells_are_torchs_own_gru():
    model = deep_gru()
    width = model.config.hidden_size
    theirs = nn.GRU(width, width, num_layers=len(model.cells), batch_first=True).double()
    for index, cell in enumerate(model.cells):
        for name, value in cell.named_parameters():
            getattr(theirs, f"{name}_l{index}").data.copy_(value)
    ids = torch.arange(8).view(2, 4)
    expected = theirs(model.embed_tokens(ids))[0]
    torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=1e-10, atol=1e-12)


def test_second_derivatives_are_there():
    model = gru().model
    embeds = 0.3 * torch.ones(1, 3, model.config.hidden_size, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(model(inputs_embeds=embeds).last_hidden_state.sum(), embeds, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), embeds)
    assert second.abs().sum() > 0.0
