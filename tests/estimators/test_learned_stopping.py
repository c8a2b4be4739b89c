"""A policy learns when to stop: the survival's gradient alone moves the length of its hard samples to a target.

The tiny policies here end a text with nearly the same probability h at every step, so lengths are geometric, cut at T.
For one squared error a sequence the mean is then not the target where lengths are random: see the tests at the end.
"""

import pytest
import torch
from trainers.tiny import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from softrl.estimators.adjoint import AdjointSettings
from softrl.estimators.pathwise import pathwise_estimate, surrogate
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rewards.likelihood import LikelihoodReward
from softrl.rewards.overlap import BleuReward, RougeReward
from softrl.rollouts.hard import hard_rollout
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import make_relaxation
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts

pytestmark = pytest.mark.slow  # twenty trainings of two to three seconds

V = 12
EOS = 1
T = 20
SHORT, LONG = 4.0, 14.0  # the untrained policy's mean is between 9 and 10
NUM_STEPS = 40


class LengthReward:
    """`−((length − target) / T)²`, of every sequence by itself or of the batch's mean length."""

    name = "length"
    vocab_size = V

    def __init__(self, target, of_the_mean):
        self.target = target
        self.of_the_mean = of_the_mean

    def soft(self, tokens, **columns):
        return self._of(tokens.survival.sum(-1))

    def hard(self, ids, mask, **columns):
        return self._of(mask.sum(-1).float())

    def _of(self, lengths):
        if self.of_the_mean:
            lengths = lengths.mean().expand(len(lengths))
        return -(((lengths - self.target) / T) ** 2)


def policy_of(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=EOS, pad_token_id=2,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config).eval())


def prompts(count):
    ids = torch.randint(3, V, (count, 3), generator=torch.Generator().manual_seed(1))
    return Prompts(ids, torch.ones_like(ids, dtype=torch.bool))


def hard_length(policy):
    """Mean length of 512 hard samples; its standard error is below 0.3 tokens, and in proportion for short ones."""
    random = SequenceRandom.keyed(99, 0, list(range(512)), 1)
    mask = hard_rollout(policy, prompts(512), Truncation(V), random, T, eos_ids=(EOS,)).mask
    return mask.sum(-1).float().mean().item()


def trained(seed, relaxation, target, of_the_mean, num_sequences=64):
    """Hard mean lengths before and after, and the soft mean length of the last five steps."""
    return trained_on(LengthReward(target, of_the_mean), seed, relaxation, num_sequences)


def trained_on(reward, seed, relaxation, num_sequences, **columns):
    """See `trained`."""
    policy, terms, settings = policy_of(seed), DirectTerms(), AdjointSettings(tol=1e-2)
    before = hard_length(policy)
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / NUM_STEPS)
    soft_lengths = []
    for step in range(NUM_STEPS):
        random = SequenceRandom.keyed(seed, step, list(range(num_sequences)), 1)
        rollout = soft_rollout(
            policy, prompts(num_sequences), relaxation, random, T, eos_ids=(EOS,), soft_stopping=True
        )
        estimate = pathwise_estimate(policy, rollout, relaxation, reward, terms, settings, columns)
        optimizer.zero_grad()
        (-surrogate(policy, relaxation, estimate, terms, settings).value.mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        soft_lengths.append(rollout.soft_tokens.survival.sum(-1).mean().item())
    return before, hard_length(policy), sum(soft_lengths[-5:]) / 5


# K = V: the end-of-sequence id must be among the kept ones, or nothing reaches its logit
MIXTURE = make_relaxation("softmax", Truncation(V))
STRAIGHT_THROUGH = make_relaxation("st_gumbel", Truncation(V))
NOISY_MIXTURE = make_relaxation("gumbel_softmax", Truncation(V))
SHARP_MIXTURE = make_relaxation("gumbel_softmax", Truncation(V), temperature=0.25)


@pytest.mark.parametrize("target", [SHORT, LONG])
@pytest.mark.parametrize(
    ("relaxation", "of_the_mean", "seed"),
    [
        *[pytest.param(MIXTURE, False, seed, id=f"softmax, each, seed {seed}") for seed in range(3)],
        *[pytest.param(STRAIGHT_THROUGH, True, seed, id=f"st_gumbel, mean, seed {seed}") for seed in range(3)],
        pytest.param(MIXTURE, True, 0, id="softmax, mean"),
        pytest.param(SHARP_MIXTURE, True, 0, id="gumbel_softmax at temperature 0.25, mean"),
    ],
)
def test_hard_length_goes_to_the_target(relaxation, of_the_mean, target, seed):
    before, after, _ = trained(seed, relaxation, target, of_the_mean, num_sequences=64 if of_the_mean else 16)
    assert SHORT * 1.15 < before < LONG * 0.85
    assert after == pytest.approx(target, rel=0.15)


@pytest.mark.parametrize(
    "reward",
    [
        pytest.param(BleuReward(max_ngram_order=1, eos_ids=[EOS]), id="bleu"),
        pytest.param(RougeReward(rouge_type="rouge1", eos_ids=[EOS]), id="rouge1"),
        pytest.param(RougeReward(rouge_type="rougeL", eos_ids=[EOS]), id="rougeL"),
    ],
)
def test_a_reward_of_references_teaches_their_length(reward):
    """The words are the same in both, so only when to stop tells the policies apart."""
    word, after = 5, {}
    for length in (3, 16):
        references = [[[word] * length]] * 16
        before, after[length], _ = trained_on(reward, 0, MIXTURE, 16, reference=references)
    assert after[3] < 0.6 * before
    assert after[16] > 1.3 * before


def test_the_sum_of_log_likelihoods_teaches_to_be_brief_and_their_mean_does_not():
    lengths, before = {}, None
    for reduction in ("sum", "mean"):
        reward = LikelihoodReward(policy_of(7).model, word_tokenizer(vocab_size=V), reduction=reduction)
        before, lengths[reduction], _ = trained_on(reward, 0, MIXTURE, 16, prompt=["w4 w5"] * 16)
    assert lengths["sum"] < 0.4 * before
    assert lengths["mean"] > 2 * lengths["sum"]


def test_hard_stopping_learns_nothing_about_length():
    """The planted error: without survival weights the same reward has no gradient at all."""
    policy, relaxation = policy_of(0), MIXTURE
    random = SequenceRandom.keyed(0, 0, list(range(16)), 1)
    rollout = soft_rollout(policy, prompts(16), relaxation, random, T, eos_ids=(EOS,))
    with pytest.raises(ValueError, match="not differentiable in the weights"):
        pathwise_estimate(policy, rollout, relaxation, LengthReward(SHORT, False), DirectTerms(), AdjointSettings())


@pytest.mark.parametrize("target", [SHORT, LONG])
def test_a_noisy_mixture_brings_its_soft_length_there_but_not_its_hard_one(target):
    """At temperature 1 a Gumbel-softmax weight is on average closer to uniform than π, so hard lengths overshoot."""
    before, after, soft = trained(0, NOISY_MIXTURE, target, of_the_mean=True)
    assert soft == pytest.approx(target, rel=0.1)
    assert abs(after - before) > 1.1 * abs(soft - before)


def geometric(hazard):
    lengths = torch.arange(1, T + 1, dtype=torch.float64)
    probabilities = (1 - hazard) ** (lengths - 1) * hazard
    probabilities[-1] = (1 - hazard) ** (T - 1)
    return lengths, probabilities


def settling_length(target):
    """Mean length at which the straight-through gradient of `E (L − target)²` vanishes for one hazard at all steps.

    A sequence's survival weights differentiate at the L steps before its end only, by L − j at step j, so a sequence
    counts by L (L − 1) / 2: the stationary point is `E[(L − target) L (L − 1)] = 0`, a size-biased mean of `target`;
    (target + 1) / 3 without the cut at T. The true optimum has E L = (2 target + 1) / 4 there.
    """
    hazards = torch.linspace(1e-3, 0.999, 4000, dtype=torch.float64)
    means, slopes = [], []
    for hazard in hazards:
        lengths, probabilities = geometric(hazard)
        means.append((lengths * probabilities).sum().item())
        slopes.append(((lengths - target) * lengths * (lengths - 1) * probabilities).sum().item())
    return next(mean for mean, slope in zip(means, slopes, strict=True) if slope < 0)


@pytest.mark.parametrize("target", [SHORT, LONG])
def test_straight_through_settles_short_of_a_target_for_each_sequence(target):
    """Known and by design: no gradient comes through a token that ends, so long samples outweigh short ones."""
    before, after, _ = trained(0, STRAIGHT_THROUGH, target, of_the_mean=False)
    assert after < 1.25 * settling_length(target) < 0.6 * target
    assert after < before  # away from the long target, too
