"""Rules at equal entropy: their masks, the matching, the estimates for basis-aware rules, and the examples."""

import numpy as np
import pytest
import torch

from softrl.contexts.basis_aware import BasisAware
from softrl.contexts.basis_directions import svd_directions
from softrl.studies.basis_rules import (
    Contexts,
    Prefixes,
    accepted_weights,
    compare_rules,
    context_rows,
    eta_mask,
    examples,
    mean_entropy,
    top_p_mask,
)

V = 120


class _Words:
    """A tokenizer that decodes token i as `<i>`."""

    def decode(self, ids):
        return "".join(f"<{token}>" for token in ids)


def _drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rule(rule="tau", epsilon=0.02):
    return BasisAware(svd_directions(_drawn(V, 10), 6), epsilon, rule, None)


def _contexts(num_texts=3, steps=4, scale=1.2):
    states = scale * _drawn(num_texts * steps, 10, seed=1)
    ids = torch.randint(V, (num_texts, 2 + steps), generator=torch.Generator().manual_seed(2))
    return Contexts(ids, 2, states @ _drawn(V, 10).T)


def test_masks():
    logits = 2.0 * _drawn(50, 40)
    probs = logits.softmax(-1)
    inside = top_p_mask(logits, 0.9)
    assert (inside * probs).sum(-1).min() >= 0.9
    smallest = probs.masked_fill(~inside, torch.inf).amin(-1)
    assert ((inside * probs).sum(-1) - smallest).max() < 0.9
    entropy = -(probs * probs.log()).sum(-1, keepdim=True)
    assert (eta_mask(logits, 0.01) == (probs > (0.1 * torch.exp(-entropy)).clamp(max=0.01))).all()


def test_prefixes_are_these_masks_and_are_matched_in_entropy():
    logits = 2.0 * _drawn(150, 40)
    prefixes = Prefixes.of(logits)
    for counts, mask in (
        (prefixes.eta(0.03), eta_mask(logits, 0.03)),
        (prefixes.top_p(0.8), top_p_mask(logits, 0.8)),
    ):
        assert counts.tolist() == mask.sum(-1).tolist()
        kept = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        by_hand = -(kept * kept.clamp(min=1e-300).log()).sum(-1).mean()
        assert prefixes.mean_entropy(counts) == pytest.approx(float(by_hand), abs=1e-6)
        assert mean_entropy(logits, mask) == pytest.approx(float(by_hand), abs=1e-12)
    target = mean_entropy(logits, eta_mask(logits, 0.03))
    found = prefixes.matched(prefixes.eta, target, 1e-6, 0.9)
    assert mean_entropy(logits, eta_mask(logits, found)) == pytest.approx(target, abs=0.005)
    left_out = prefixes.matched(lambda each: prefixes.top_p(1 - each), target, 1e-6, 0.9)
    assert mean_entropy(logits, top_p_mask(logits, 1 - left_out)) == pytest.approx(target, abs=0.005)


def test_weights_are_the_mask_where_all_are_asked_about_and_unbiased_where_some_are():
    rule, logits = _rule(), _contexts().logits[:4]
    probs, mask = logits.softmax(-1), rule.mask(logits)
    assert (accepted_weights(rule, logits, V, 0) == mask).all()
    draws = accepted_weights(rule, logits.repeat(60, 1), 5, 20).view(60, 4, V)
    below = mask & (probs <= 0.02)
    assert below.sum(-1).min() > 5  # some of them can only be drawn
    for values in (probs, torch.ones_like(probs)):
        sums = (draws * values).sum(-1)
        z = (sums.mean(0) - (mask * values).sum(-1)) / (sums.std(0) / 60**0.5)
        assert z.abs().max() < 4.0  # of eight numbers: a false failure in 2,000, and the seeds are fixed
        assert sums.std(0).min() > 0.0
    assert (draws[:, ~mask] == 0).all()


@pytest.fixture(scope="module")
def compared():
    """A rule that accepts much, 60 contexts, and the comparison with all tokens asked about."""
    rule, contexts = _rule("eta", 0.1), _contexts(10, 6)
    return rule, contexts, compare_rules(contexts, rule, V, 0)


def test_rules_are_compared_at_equal_entropy(compared):
    rule, contexts, found = compared
    rows = {row.rule: row for row in found.rows}
    basis, eta, top_p, plain = (rows[name] for name in ("basis-aware eta", "eta", "top-p", "eta, same epsilon"))
    mask, true = rule.mask(contexts.logits), contexts.true_tokens[:, None]
    assert (found.basis == mask).all()
    for row in (eta, top_p):
        assert row.entropy_nats == pytest.approx(basis.entropy_nats, abs=0.02)
    assert basis.entropy_nats == pytest.approx(mean_entropy(contexts.logits, mask))
    assert basis.true_kept == pytest.approx(float(mask.gather(1, true).double().mean()))
    assert basis.beyond_both == pytest.approx(float((mask & ~found.eta & ~found.top_p).sum() / 60))
    assert basis.beyond_eta > 0.3
    assert eta.beyond_eta == top_p.beyond_top_p == basis.true_gained == basis.true_lost == 0.0
    kept = found.eta.gather(1, true)
    assert eta.true_gained == pytest.approx(float((kept & ~mask.gather(1, true)).double().mean()))
    assert eta.true_lost == pytest.approx(float((~kept & mask.gather(1, true)).double().mean()))
    assert plain.kept < basis.kept  # the same tau, and what is proved below it
    assert plain.true_gained == 0.0


def test_examples_are_proved_and_rejected_by_both_others(compared):
    rule, contexts, found = compared
    rows = examples(contexts, found, rule, _Words(), number=60)
    have_one = (rule.mask(contexts.logits) & ~found.eta & ~found.top_p).any(-1)
    assert len(rows) == int(have_one.sum()) >= 5
    assert len(examples(contexts, found, rule, _Words(), number=3)) == 3
    for row in rows:
        assert row.certified_bound < row.probability <= row.tau
        assert row.probability <= row.eta_tau
        assert row.mass_before >= found.nucleus
    token, context = (int(text.strip("<>").split("><")[-1]) for text in (rows[0].token, rows[0].context))
    matching = torch.nonzero(contexts.ids[:, 1:-1].flatten() == context)[:, 0].tolist()
    assert any(contexts.logits[at].softmax(-1)[token] == pytest.approx(rows[0].probability) for at in matching)


def test_rows_of_contexts_say_what_is_before_them(compared):
    rule, contexts, found = compared
    rows = context_rows(contexts, found, rule, _Words())
    ids = contexts.ids.tolist()
    assert rows[7].context == "".join(f"<{token}>" for token in ids[1][:3])  # six contexts a text
    assert rows[7].true_next == f"<{ids[1][3]}>"
    assert np.mean([row.kept_basis for row in rows]) == pytest.approx(found.rows[0].kept)
    assert np.mean([row.beyond_both for row in rows]) == pytest.approx(found.rows[0].beyond_both, abs=1e-6)
    assert [row.kept_eta for row in rows] == found.eta.sum(-1).tolist()
