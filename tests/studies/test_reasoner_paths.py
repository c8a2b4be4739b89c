"""The study of fast and slow readings measures two computations that agree, of which one costs more."""

import pytest
import torch

from softrl.cli.bench import main
from softrl.models.reasoner import ReasonerForCausalLM
from softrl.models.reasoner_config import ReasonerConfig
from softrl.studies import reasoner_paths


def test_both_ways_agree_and_the_slow_one_reads_every_prefix(monkeypatch, capsys):
    lengths = []
    read = ReasonerForCausalLM.read

    def counted(model, ids, *mask):
        lengths.append(ids.shape[1])
        return read(model, ids, *mask)

    monkeypatch.setattr(ReasonerForCausalLM, "read", counted)
    found = reasoner_paths.measure(6, num_texts=2, width=8, rounds=1)
    assert lengths == [6, 1, 2, 3, 4, 5, 6]
    assert found.difference < 1e-12
    assert found.gradient_difference < 1e-12
    assert found.slow_seconds > 0.0
    assert main(["reasoner", "--lengths", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "4"
    assert main(["reasoner", "--lengths", "1"]) == 1
    assert "lengths must be at least 2" in capsys.readouterr().err


def test_a_pass_that_looked_ahead_would_be_noticed(monkeypatch):
    torch.manual_seed(0)
    model = ReasonerForCausalLM(ReasonerConfig(vocab_size=8, use_reasoner=False)).double()
    ids = torch.randint(0, 8, (2, 5))
    logits = reasoner_paths.one_prefix_at_a_time(model, ids)
    torch.testing.assert_close(model(ids).logits, logits)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(ids.flip(1)).logits, logits)
