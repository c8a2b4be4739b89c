"""The study of the pull to greedy: its gradient is that of the NLL it reports, and its rows say what happened."""

import csv

import pytest
import torch
from helpers import V, gpt2

from softrl.models.policy import Policy
from softrl.studies import learned_settings
from softrl.studies.learned_settings import greedy_nll, learning, run
from softrl.tokens.learned import LearnedRelaxation
from softrl.tokens.truncation import Truncation

T = 4


def made(**start):
    texts = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(2))
    learned = LearnedRelaxation(Truncation(7), **start).double()
    learned.set_values(start)
    return Policy(gpt2().requires_grad_(False)), texts, learned


@pytest.mark.parametrize("start", [{"temperature": 0.8}, {"max_entropy_nats": 0.9}, {"min_p": 0.1, "top_k": 3.3}])
def test_a_step_follows_the_gradient_of_the_reported_nll(start):
    """Central differences of the NLL in every raw number; the barrier's part is subtracted."""
    policy, texts, learned = made(**start)
    rows = learning(policy, texts, learned, T, 1, barrier=0.03)
    first = next(rows)
    raw = {name: value.item() for name, value in learned.raw.items()}
    next(rows)  # makes the update, which leaves the gradients
    found = {name: value.grad.item() for name, value in learned.raw.items()}

    def nll(**moved):
        with torch.no_grad():
            for name, value in (raw | moved).items():
                learned.raw[name].fill_(value)
        return next(learning(policy, texts, learned, T, 0, 0.0)).nll

    assert nll() == pytest.approx(first.nll, rel=1e-12)
    barrier = dict(
        zip(learned.raw, torch.autograd.grad(learned.penalty(0.03), list(learned.parameters())), strict=True)
    )
    for name, value in raw.items():
        slope = (nll(**{name: value + 1e-5}) - nll(**{name: value - 1e-5})) / 2e-5
        assert abs(slope) > 1e-4, "the setting has to matter here"
        assert found[name] - barrier[name].item() == pytest.approx(slope, rel=1e-5)


def test_rows_and_their_csv(tmp_path, monkeypatch, capsys):
    policy, texts, _ = made(temperature=0.8)
    monkeypatch.setattr(learned_settings, "STARTS", ({"temperature": 0.8}, {"top_k": 3.0}))
    rows = run(policy, texts, T, 7, 2, [0.0, 0.1], tmp_path / "rows.csv")
    assert [(row.learned, row.barrier, row.step) for row in rows[2:4]] == [
        ("temperature", 0.0, 2), ("temperature", 0.1, 0)
    ]  # fmt: skip
    assert len(rows) == 12
    assert rows[0].temperature == pytest.approx(0.8)
    assert rows[0].top_k is None
    assert rows[0].nll == rows[3].nll
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert float(read[5]["nll"]) == rows[5].nll
    printed = capsys.readouterr().out
    assert f"likeliest tokens: NLL {greedy_nll(policy, texts, T):.3f}" in printed
    assert "barrier 0.1: temperature 0.8 -> " in printed
