"""Basis-aware truncation in `model.generate`, in `soft_generate`, and in hard and soft rollouts."""

import pytest
import torch
from helpers import llama
from transformers import LogitsProcessorList

from softrl.contexts.basis_aware import basis_aware
from softrl.generation.basis_aware import BasisAwareLogitsProcessor, truncated_by
from softrl.generation.next_token import NextToken
from softrl.generation.soft_generate import soft_generate
from softrl.generation.soft_settings import Phase, SoftDecoding
from softrl.models.policy import Policy
from softrl.rollouts.hard import hard_rollout
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import RELAXATIONS, make_relaxation
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts

SETTINGS = {"epsilon": 0.06, "rule": "tau", "num_directions": 8, "max_candidates": None}


def _model():
    """Narrower probabilities than the tests' usual model, so that tokens are below τ and yet provable."""
    return llama(seed=3)


def _prompts(model):
    ids = torch.tensor([[3, 5, 7, 4], [6, 8, 9, 10]])
    return Prompts(ids, torch.ones_like(ids, dtype=torch.bool))


def _allowed(model, sequences, prompt_length, rule):
    """Whether each generated token is in the mask of its context, by one forward of the whole text."""
    logits = model(input_ids=sequences).logits[:, prompt_length - 1 : -1]
    masks = rule.mask(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape)
    return masks.gather(-1, sequences[:, prompt_length:, None])[..., 0], masks


@pytest.mark.parametrize("how", ["draw", "mask"])
@torch.no_grad()
def test_generate_samples_accepted_tokens_only(how):
    model, prompts = _model(), None
    prompts = _prompts(model).ids.repeat_interleave(20, 0)
    processor = BasisAwareLogitsProcessor(model, **SETTINGS, how=how)
    torch.manual_seed(0)
    sequences = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=6,
        eos_token_id=None, pad_token_id=2, logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    rule = basis_aware(Policy(model), **SETTINGS)
    allowed, masks = _allowed(model, sequences, 4, rule)
    assert allowed.all()
    assert not masks.all()
    assert processor.counts.contexts == 40 * 6
    assert 0 < processor.counts.accepted < processor.counts.asked
    assert len({tuple(each) for each in sequences[:20, 4:].tolist()}) > 5


@torch.no_grad()
def test_a_drawing_processor_is_repeatable_and_goes_cold():
    model, prompts = _model(), None
    prompts = _prompts(model).ids

    def texts(**kwargs):
        processor = BasisAwareLogitsProcessor(model, **SETTINGS, **kwargs)
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, eos_token_id=None, pad_token_id=2,
            logits_processor=LogitsProcessorList([processor]),
        )  # fmt: skip

    assert (texts(seed=1) == texts(seed=1)).all()
    assert (texts(seed=1) != texts(seed=2)).any()
    greedy = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, eos_token_id=None, pad_token_id=2
    )
    assert (texts(temperature=1e-6) == greedy).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"how": "sample"}, "how must be"), ({"temperature": 0.0}, "must be positive"),
        ({"how": "mask", "temperature": 0.5}, "pass it to generate"),
    ],
)  # fmt: skip
def test_processor_settings(changed, message):
    with pytest.raises(ValueError, match=message):
        BasisAwareLogitsProcessor(_model(), **SETTINGS, **changed)


def test_hard_rollouts_stay_inside():
    model = _model()
    rule = basis_aware(Policy(model), **SETTINGS)
    prompts = _prompts(model)
    random = SequenceRandom.keyed(0, 0, [0, 1], 20, torch.device("cpu"))
    rollout = hard_rollout(Policy(model), prompts, Truncation(1, support=rule), random, 6, 20)
    sequences = torch.cat([rollout.prompts.ids, rollout.tokens], 1)
    allowed, masks = _allowed(model, sequences, 4, rule)
    assert allowed.all()
    assert not masks.all()


@pytest.mark.parametrize("name", sorted(RELAXATIONS))
def test_supports_of_soft_rollouts_stay_inside(name):
    model = _model()
    policy, prompts = Policy(model), _prompts(model)
    rule = basis_aware(policy, **SETTINGS)
    relaxation = make_relaxation(name, Truncation(16, support=rule), num_draws=2)
    random = SequenceRandom.keyed(0, 0, [0, 1], 3, torch.device("cpu"))
    rollout = soft_rollout(policy, prompts, relaxation, random, 4, 3)
    embeds = policy.embed_soft(rollout.support.ids.flatten(0, 1), rollout.fed.flatten(0, 1)).reshape(6, 4, -1)
    logits = policy.head(policy.hidden(rollout.prompts, embeds).flatten(0, 1))
    inside = rule.mask(logits).gather(-1, rollout.support.ids.flatten(0, 1)).reshape(6, 4, -1)
    assert (inside == rollout.support.kept).all()
    assert not rollout.support.kept.all()
    assert (rollout.weights[~rollout.support.kept] == 0).all()


def test_soft_generate_keeps_what_the_rule_leaves():
    model = _model()
    policy, prompts = Policy(model), _prompts(model)
    rule = basis_aware(policy, **SETTINGS)
    relaxation = make_relaxation("softmax", Truncation(16, support=rule), temperature=0.7)
    text = soft_generate(policy, prompts, 3, SoftDecoding(Phase(relaxation)), num_recorded=16)
    first = model(input_ids=prompts.ids).logits[:, -1]
    inside = rule.mask(first).gather(-1, text.ids[:, 0])
    assert (inside == (text.weights[:, 0] > 0)).all()
    assert not inside.all()
    assert (first.softmax(-1).gather(-1, text.ids[:, 0])[inside] <= 0.06).any()  # below τ, and kept


@torch.no_grad()
def test_settings_truncated_by_a_rule():
    """Draws at any temperature and soft tokens are truncated, each as the rule says; the likeliest stay."""
    model = _model()
    policy, prompts = Policy(model), _prompts(model)
    rule = basis_aware(policy, **{**SETTINGS, "max_candidates": 2})
    everything = basis_aware(policy, **SETTINGS)
    hot = SoftDecoding(Phase(None, NextToken(temperature=1.5)))
    text = soft_generate(policy, prompts, 6, truncated_by(rule, hot), num_samples=20, find_nearest=False)
    allowed, masks = _allowed(model, torch.cat([text.prompts.ids, text.tokens], 1), 4, everything)
    assert allowed.all()
    assert not masks.all()
    few, _ = _allowed(model, torch.cat([text.prompts.ids, text.tokens], 1), 4, rule)
    assert not few.all()  # draws are not bound to two tokens below τ
    assert rule.counts.contexts == 40 * 6 + 40 * 6  # drawing, and looking just now
    greedy = SoftDecoding(Phase(make_relaxation("softmax", Truncation(16))), Phase(None, NextToken(greedy=True)))
    both = truncated_by(rule, greedy)
    assert both.thinking.relaxation.truncation == Truncation(16, support=rule)
    assert both.answer == greedy.answer


def test_a_cool_draw_is_of_the_accepted_tokens_cooled():
    """20,000 draws of one context against exact probabilities, within 5 standard errors of each (fixed seed)."""
    model = _model()
    rule = basis_aware(Policy(model), **SETTINGS)
    logits = model(input_ids=_prompts(model).ids[:1]).logits[:, -1].detach()
    expected = (logits / 0.7).masked_fill(~rule.mask(logits), -torch.inf).softmax(-1)[0]
    random = SequenceRandom.keyed(0, 0, [0], 20_000, torch.device("cpu"))
    drawn = NextToken(temperature=0.7, support=rule).choose(logits.expand(20_000, -1), random)
    share = torch.bincount(drawn, minlength=len(expected)) / 20_000
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((share - expected).abs() <= 5 * error).all()
    assert 1 < int((expected > 0).sum()) < len(expected)


def test_other_temperatures_are_refused(tmp_path):
    model = _model()
    rule = basis_aware(Policy(model), **SETTINGS)
    warm, prompts = Policy(model, temperature=1.3), _prompts(model)
    truncation = Truncation(4, support=rule)
    random = SequenceRandom.keyed(0, 0, [0, 1], 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"sampling temperature is 1\.3"):
        hard_rollout(warm, prompts, truncation, random, 2)
    with pytest.raises(ValueError, match=r"sampling temperature is 1\.3"):
        soft_rollout(warm, prompts, make_relaxation("softmax", truncation), random, 2)
    phase = Phase(make_relaxation("softmax", truncation), NextToken(temperature=0.5))
    with pytest.raises(ValueError, match=r"sampling temperature is 0\.5"):
        soft_generate(Policy(model), prompts, 2, SoftDecoding(phase))
    with pytest.raises(ValueError, match="beside support"):
        Truncation(4, top_p=0.9, support=rule)
    with pytest.raises(ValueError, match="top_k=5 beside support"):
        NextToken(top_k=5, support=rule)
    with pytest.raises(ValueError, match=r"relaxation\.truncation is what truncates"):
        Phase(make_relaxation("softmax", truncation), NextToken(support=rule))
