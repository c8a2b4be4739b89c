"""Done means: on identical rollouts our RLOO and GRPO gradients equal those of TRL's own trainers.

TRL's trainer generates and scores a batch with its own code; its prompt and completion ids, masks included, are then a
`HardRollout` for our estimator and for `ReinforceTrainer.compute_loss`.
"""

from dataclasses import replace

import pytest
import torch
from helpers import EOS, V, llama
from trainers.tiny import dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from softrl.estimators.base import Problem
from softrl.estimators.score_function import RLOO, ScoreFunction
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rewards.base import as_trl
from softrl.rewards.token_linear import TokenLinearReward
from softrl.tokens.truncation import Truncation
from softrl.trainers import ReinforceConfig, ReinforceTrainer
from softrl.trainers.reinforce_config import LOSS_TYPES
from softrl.types import HardRollout, Prompts

pytestmark = pytest.mark.slow  # imports trl

GROUP, LENGTH, TEMPERATURE, BOUND = 4, 16, 1.5, 1e-5
GRPO_CASES = [(scale, loss) for scale in ("none", "group", "batch") for loss in ("grpo", "bnpo", "dapo", "dr_grpo")]


def reward():
    weight = torch.randn(V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return TokenLinearReward(weight, 0.2, link="identity", pooling="sum")


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def relative_errors(ours, theirs):
    assert set(ours) == set(theirs)
    return {name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs}


class Theirs:
    """A batch that TRL's trainer made, and the gradient of its loss."""

    def __init__(self, tmp_path, tokenizer, config_class, trainer_class, **settings):
        common = {
            "per_device_train_batch_size": 3 * GROUP, "num_generations": GROUP, "max_completion_length": LENGTH,
            "temperature": TEMPERATURE, "beta": 0.0, "report_to": [], "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        self.model = llama()
        trainer = trainer_class(
            model=self.model, reward_funcs=as_trl(reward(), tokenizer), processing_class=tokenizer,
            args=config_class(str(tmp_path), **{**common, **settings}), train_dataset=dataset(),
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = 1  # what `train()` would set
        trainer.model.train()
        torch.manual_seed(0)
        rows = [dataset()[index] for index in (0, 1, 3)]
        self.rows = [row for row in rows for _ in range(GROUP)]
        # `_prepare_inputs` would shuffle the sequences afterwards, and groups be neighbours no more.
        inputs = trainer._generate_and_score_completions([dict(row) for row in self.rows])
        trainer.compute_loss(trainer.model, inputs).backward()
        self.gradients = gradients(trainer.model)
        prompts = Prompts(inputs["prompt_ids"], inputs["prompt_mask"].bool())
        self.rollout = HardRollout(prompts, inputs["completion_ids"], inputs["completion_mask"].bool())
        self.check()

    def check(self):
        """The batch is one that tells methods apart: lengths differ, some end, prompts are padded."""
        lengths = self.rollout.mask.sum(-1)
        assert len(set(lengths.tolist())) > 2
        ended = (self.rollout.tokens == EOS).any(-1)
        assert 0 < ended.sum() < len(ended)
        assert not self.rollout.prompts.mask.all()
        assert all(gradient.norm() > 1e-6 for gradient in self.gradients.values())


def estimated(theirs, estimator):
    """The gradient that our estimator gives on their rollout."""
    policy = Policy(llama(), TEMPERATURE)
    problem = Problem(policy, reward(), DirectTerms(), Truncation(1), GROUP)
    rewards = reward().hard(theirs.rollout.tokens, theirs.rollout.mask)
    estimate = estimator.estimate(problem, theirs.rollout, rewards)
    (-estimator.surrogate(problem, estimate).mean()).backward()
    return gradients(policy.model)


def trained(theirs, tmp_path, tokenizer, monkeypatch, **settings):
    """The gradient of our trainer's loss on their rollout."""
    args = ReinforceConfig(
        str(tmp_path / "ours"), per_device_train_batch_size=3 * GROUP, num_generations=GROUP, beta=0.0, use_cpu=True,
        max_completion_length=LENGTH, temperature=TEMPERATURE, report_to=[], **settings,
    )  # fmt: skip
    trainer = ReinforceTrainer(llama(), reward(), args, dataset(), processing_class=tokenizer)
    monkeypatch.setattr(trainer, "rollout", lambda batch: theirs.rollout)
    rows = [trainer.train_dataset[index] for index in (0, 1, 3) for _ in range(GROUP)]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in theirs.rows]
    trainer.compute_loss(trainer.model, rows).backward()
    return gradients(trainer.model)


def test_rloo(tmp_path, tokenizer, monkeypatch):
    theirs = Theirs(tmp_path, tokenizer, RLOOConfig, RLOOTrainer)
    assert max(relative_errors(estimated(theirs, RLOO), theirs.gradients).values()) < BOUND
    ours = trained(theirs, tmp_path, tokenizer, monkeypatch, estimator="rloo")
    assert max(relative_errors(ours, theirs.gradients).values()) < BOUND
    # The bound tells apart what differs.
    for wrong in (replace(RLOO, baseline="group_mean"), replace(RLOO, baseline="none")):
        assert min(relative_errors(estimated(theirs, wrong), theirs.gradients).values()) > 100 * BOUND


@pytest.mark.parametrize(("scale", "loss"), GRPO_CASES)
def test_grpo(tmp_path, tokenizer, monkeypatch, scale, loss):
    theirs = Theirs(tmp_path, tokenizer, GRPOConfig, GRPOTrainer, scale_rewards=scale, loss_type=loss)
    estimator = ScoreFunction("group_mean", scale, LOSS_TYPES[loss], LENGTH)
    assert max(relative_errors(estimated(theirs, estimator), theirs.gradients).values()) < BOUND
    settings = {"estimator": "grpo", "scale_rewards": scale, "loss_type": loss}
    ours = trained(theirs, tmp_path, tokenizer, monkeypatch, **settings)
    assert max(relative_errors(ours, theirs.gradients).values()) < BOUND
    wrong = replace(estimator, baseline="leave_one_out")
    assert min(relative_errors(estimated(theirs, wrong), theirs.gradients).values()) > 100 * BOUND


def test_dr_grpo_is_grpo_without_scales(tmp_path, tokenizer, monkeypatch):
    theirs = Theirs(tmp_path, tokenizer, GRPOConfig, GRPOTrainer, scale_rewards="none", loss_type="dr_grpo")
    ours = trained(theirs, tmp_path, tokenizer, monkeypatch, estimator="dr_grpo")
    assert max(relative_errors(ours, theirs.gradients).values()) < BOUND
