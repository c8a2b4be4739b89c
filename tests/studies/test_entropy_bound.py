"""The study's numbers on a tiny model against other ways to compute them, and what happens as the bound tightens."""

import csv
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import EOS, PairReward, gru, llama, prompts, random_for
from peft import LoraConfig, get_peft_model

from softrl.estimators.adjoint import AdjointSettings
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rollouts.soft import soft_rollout
from softrl.studies.entropy_bound import (
    Row,
    hard_nll,
    header,
    jacobian_norm,
    line,
    measure,
    nearest_distance,
    plot,
    plot_adjoint,
    run,
    write_csv,
)
from softrl.tokens.relaxation import make_relaxation
from softrl.tokens.truncation import Truncation

K = 7
T = 6


def measured(name, bound, model=None, num_steps=T, **settings):
    policy = Policy(llama() if model is None else model, temperature=1.3)
    relaxation = make_relaxation(name, Truncation(K), max_entropy_nats=bound)
    base = Policy(llama(seed=4))
    return measure(policy, base, relaxation, prompts(4), PairReward(), DirectTerms(), num_steps, (EOS,), **settings)


def rolled_out(name, bound=0.4, min_p=0.0):
    policy = Policy(llama(), temperature=1.3)
    relaxation = make_relaxation(name, Truncation(K, min_p=min_p), max_entropy_nats=bound)
    rollout = soft_rollout(policy, prompts(3), relaxation, random_for(3), T, eos_ids=(EOS,))
    embeds = policy.embed_soft(rollout.support.ids.flatten(0, 1), rollout.fed.flatten(0, 1))
    return policy, relaxation, rollout, embeds.detach().unflatten(0, rollout.mask.shape)


@pytest.mark.parametrize("name", ["softmax", "gumbel_softmax"])
def test_a_tight_bound_gives_tokens_and_takes_the_gradient(name):
    bounds = (0.01, 0.1, 0.5, 1.5, None)
    rows = [measured(name, bound) for bound in bounds]
    for row in rows[:-1]:
        assert 0.0 < row.entropy_nats <= row.max_entropy_nats * (1 + 1e-6)
    for field in ("entropy_nats", "nearest_distance"):
        values = [getattr(row, field) for row in rows]
        assert values == sorted(values), field
    assert rows[0].nearest_distance < 0.01
    assert rows[0].jacobian_norm < 0.1 * rows[-1].jacobian_norm
    assert rows[0].gradient_norm < 0.1 * rows[-1].gradient_norm
    assert rows[0].adjoint_norms[0] < 0.1 * rows[-1].adjoint_norms[0]


def test_exact_is_exact_and_two_hops_are_when_the_horizon_is_three():
    short = measured("gumbel_softmax", 0.5, num_steps=3)
    assert short.cosine_two_hops == pytest.approx(1.0, abs=1e-12)
    full, parallel = (
        measured("gumbel_softmax", 1.5, exact=exact) for exact in (None, AdjointSettings(tol=0.0))
    )  # sequential, and all sweeps
    assert full.cosine_two_hops < 0.999
    assert full.gradient_norm == pytest.approx(parallel.gradient_norm, rel=1e-9)
    assert full.adjoint_norms == pytest.approx(parallel.adjoint_norms, rel=1e-9)
    assert full.adjoint_norms[-1] == 0.0
    assert len(full.adjoint_norms) == T
    assert 2 <= full.sweeps <= T - 1


def test_other_architectures_are_measured_too():
    row = measured("softmax", 0.5, model=gru())
    assert row.gradient_norm > 0.0
    assert row.base_nll_nats > 0.0


@pytest.mark.parametrize(("name", "bound"), [("softmax", 0.4), ("gumbel_softmax", 0.4), ("gumbel_softmax", None)])
def test_jacobian_norm_against_finite_differences(name, bound):
    policy, relaxation, rollout, embeds = rolled_out(name, bound, min_p=0.02)
    found = jacobian_norm(policy, rollout, relaxation, embeds)
    hidden = policy.hidden(rollout.prompts, embeds).detach()
    for row, step in ((0, 0), (1, 2), (2, 4)):
        support = rollout.support.at(row, step)
        logits = policy.kept_logits(hidden[row, step][None], support.ids[None])[0]
        columns = [
            (relaxation.weights(logits + shift, support) - relaxation.weights(logits - shift, support)) / 2e-6
            for shift in 1e-6 * torch.eye(K, dtype=torch.float64)
        ]
        assert found[row, step].item() == pytest.approx(torch.stack(columns).norm().item(), rel=1e-6)


def test_nearest_distance_is_that_of_the_nearest_kept_token():
    policy, _, rollout, embeds = rolled_out("gumbel_softmax", 1.2)
    table = policy.causal_lm.get_input_embeddings().weight.detach()
    found = nearest_distance(policy, rollout)
    for row, step in ((0, 0), (2, 3)):
        distances = [(embeds[row, step] - table[k]).norm().item() for k in rollout.support.ids[row, step]]
        best = min(range(K), key=distances.__getitem__)
        norm = table[rollout.support.ids[row, step, best]].norm().item()
        assert found[row, step].item() == pytest.approx(distances[best] / norm, rel=1e-9)
    one_hot = replace(rollout, fed=torch.nn.functional.one_hot(rollout.support.choice, K).double())
    assert nearest_distance(policy, one_hot).max() < 1e-12


def test_hard_nll_against_the_model_s_own_forward():
    _, _, rollout, _ = rolled_out("gumbel_softmax")
    base = Policy(llama(seed=4), temperature=0.3)  # its sampling temperature must not matter
    found = hard_nll(base, rollout)
    for row in range(3):
        prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]]
        ids = torch.cat([prompt, rollout.tokens[row]])[None]
        with torch.no_grad():
            log_probs = base.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = -log_probs.gather(-1, rollout.tokens[row][:, None]).squeeze(-1)
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-8)


def test_a_frozen_policy_is_refused():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        measured("softmax", 0.5, model=llama().requires_grad_(False))


def row(relaxation, bound, norms):
    return Row(relaxation, bound, 64, 0.1, 2.5, 0.1, 0.2, 0.3, 1.5, 0.9, 4, 1.0, 0.5, norms)


def test_table_csv_and_figures(tmp_path):
    rows = [row(name, bound, (0.3, 1e-3, 0.0)) for name in ("softmax", "gumbel_softmax") for bound in (None, 0.1, 1.0)]
    assert len(line(rows[0])) == len(header()) == len(line(rows[1]))
    write_csv(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [(each["relaxation"], each["max_entropy_nats"]) for each in read[:2]] == [
        ("softmax", ""),
        ("softmax", "0.1"),
    ]
    assert [float(text) for text in read[0]["adjoint_norms"].split()] == [0.3, 1e-3, 0.0]
    plot(rows, tmp_path / "figure.png")
    plot_adjoint([(10, {0: 0.1, 4: 0.01, 8: 0.0}), (20, {0: 1.0, 4: 0.5})], tmp_path / "adjoint.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adjoint.png", "figure.png", "rows.csv"]
    for name in ("figure", "adjoint"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_curves_hold_the_numbers(tmp_path, monkeypatch):
    """What is drawn, read back from the axes before the figure is saved."""
    from softrl.studies import entropy_bound

    drawn = []
    monkeypatch.setattr(entropy_bound, "_save", lambda figure, path: drawn.append(figure))
    plot([row("softmax", None, (0.3, 1e-3, 0.0)), row("softmax", 0.1, (0.2, 1e-4, 0.0))], tmp_path / "x.png")
    coherence, gradient, norms = drawn[0].axes
    assert list(coherence.lines[0].get_xdata()) == pytest.approx([0.1, math.log(64)])  # no bound: at log K
    assert list(gradient.lines[0].get_ydata()) == [1.5, 1.5]
    assert [text.get_text() for text in norms.get_legend().get_texts()] == ["0.1 nats", "none"]
    assert list(norms.lines[1].get_xdata()) == [1, 2]  # the zero of the last position has no logarithm
    assert list(norms.lines[1].get_ydata()) == [0.3, 1e-3]
    plot_adjoint([(step, {0: 1.0, 1: 0.5}) for step in range(30)], tmp_path / "y.png")
    assert [text.get_text() for text in drawn[1].axes[0].get_legend().get_texts()] == ["step 0", "step 29"]
    assert len(drawn[1].axes[0].lines) == 30


def trainer_of(policy, reference):
    """What the study reads of a trainer, without one (and without trl)."""
    batch = SimpleNamespace(prompts=prompts(4), columns={"prompt": ["w"] * 4})
    return SimpleNamespace(
        model=policy.model, policy=policy, reference=reference, rewards=PairReward(), terms=DirectTerms(),
        relaxation=make_relaxation("st_gumbel", Truncation(K)), eos_ids=(EOS,), train_dataset=list(range(9)),
        prompt_batch=lambda rows, num_samples: batch,
    )  # fmt: skip


def test_a_run_measures_the_grid_with_adapters_off_zero(tmp_path, capsys):
    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    trainer = trainer_of(Policy(adapted), Policy(adapted, context=adapted.disable_adapter))
    output, figure = tmp_path / "rows.csv", tmp_path / "figure.png"
    rows = run(trainer, ["softmax", "gumbel_softmax"], [0.5, 1.0, math.log(K), None], 4, 3, output, figure)
    wanted = [
        (name, bound) for name in ("softmax", "gumbel_softmax") for bound in (0.5, 1.0, None)
    ]  # log K is no bound
    assert [(each.relaxation, each.max_entropy_nats) for each in rows] == wanted
    assert all(p.norm() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)
    assert all(each.gradient_norm > 0.0 for each in rows)
    assert output.is_file()
    assert figure.is_file()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == header()
    assert [text for text in printed[1:] if text] == [line(each) for each in rows]
    with pytest.raises(ValueError, match="no reference model"):
        run(trainer_of(Policy(adapted), None), ["softmax"], [None], 4, 3, output, figure)
