"""`softrl study basis-aware` on SmolLM2: verdicts against HiGHS on real programs, and rules at equal entropy."""

import csv

import pytest
import torch

from softrl.cli.study import main
from softrl.studies.basis_aware import Settings, run
from softrl.studies.basis_real import eta_mask, matched, mean_entropy, top_p_mask

pytestmark = pytest.mark.slow


def _rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_real_programs_end_as_highs_says(tmp_path, capsys):
    arguments = ["--texts", "1", "--tokens", "24", "--programs", "3", "--output_dir", str(tmp_path)]
    assert main(["basis-aware", "--parts", "cost", *arguments]) == 0
    assert "same verdict 3 of 3" in capsys.readouterr().out
    for row in _rows(tmp_path / "programs.csv"):
        level, tau, ours, highs, certified = (
            float(row[name]) for name in ("level", "tau", "ours", "highs", "certified")
        )
        assert abs(ours - highs) < 1e-5 * tau  # HiGHS stops at 1e-7, per equation
        assert (row["accepted"] == "True") == (highs < level) == (certified < level)
    cost = _rows(tmp_path / "cost.csv")[0]
    assert int(cost["tokens"]) == 24
    assert int(cost["failed"]) == 0
    assert float(cost["solved_per_token"]) <= float(cost["asked_per_token"])


def test_rules_are_compared_at_equal_entropy(tmp_path):
    run(Settings(texts=1, tokens=4), ["rules"], tmp_path)
    rows = {row["rule"]: row for row in _rows(tmp_path / "rules.csv")}
    basis, plain = rows["basis-aware eta"], rows["eta, same epsilon"]
    for name in ("eta", "top-p"):
        assert float(rows[name]["entropy_nats"]) == pytest.approx(float(basis["entropy_nats"]), abs=0.05)
    assert float(plain["kept"]) < float(basis["kept"])  # the same tau, and what is proved below it
    assert float(plain["true_kept"]) <= float(basis["true_kept"])
    assert float(rows["eta"]["only_here"]) == 0.0


def test_rules_and_their_matching():
    logits = 2.0 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = logits.softmax(-1)
    assert (top_p_mask(logits, 0.9) * probs).sum(-1).min() >= 0.9
    kept = eta_mask(logits, 0.01)
    entropy = -(probs * probs.log()).sum(-1, keepdim=True)
    assert (kept == (probs > (0.1 * torch.exp(-entropy)).clamp(max=0.01))).all()
    target = mean_entropy(logits, eta_mask(logits, 0.03))
    found = matched(lambda each: eta_mask(logits, each), logits, target, 1e-6, 0.5, rising=False)
    assert mean_entropy(logits, eta_mask(logits, found)) == pytest.approx(target, abs=0.01)


def test_unknown_parts_are_refused(tmp_path, capsys):
    assert main(["basis-aware", "--parts", "speed", "--output_dir", str(tmp_path)]) == 1
    assert "parts must be among" in capsys.readouterr().err
