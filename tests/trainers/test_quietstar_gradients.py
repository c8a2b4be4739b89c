"""The trainer's loss and gradient against ones written out: plain calls of the LM, a text for each thought."""

import pytest
import torch
from generation.thinkers import thinker
from helpers import gpt2
from trainers.quietstar import quietstar, texts

pytestmark = pytest.mark.slow  # imports trl

N_TALK = 2


class ByHand:
    """Losses of recorded thoughts, an anchor and a thought at a time, in sequences without branches or padding."""

    def __init__(self, trainer, rows, thoughts):
        self.trainer, self.model, self.rows, self.thoughts = trainer, trainer.model, rows, thoughts
        self.embedding, self.head = self.model.lm.get_input_embeddings(), self.model.lm.get_output_embeddings()

    def hidden(self, embeds):
        return self.model.lm.base_model(inputs_embeds=embeds[None]).last_hidden_state[0]

    def of_text(self, ids):
        """Hidden states, and log p of all tokens but the first."""
        hidden = self.hidden(self.embedding(ids))
        return hidden, self.head(hidden[:-1]).log_softmax(-1).gather(-1, ids[1:, None])[:, 0]

    def thought(self, row, column, sample, through):
        """log π of a thought and log p of what follows; with `through`, soft thoughts depend on the parameters."""
        ids = torch.tensor(self.rows[row]["input_ids"])
        anchor = int(self.thoughts.anchors[row, column])
        base, _ = self.of_text(ids)
        fed, log_probs = [self.embedding(ids[: anchor + 1]), self.model.start[None]], []
        for step in range(self.thoughts.length):
            support = self.thoughts.support.at(row, column, sample, step)
            logits = self.head(self.hidden(torch.cat(fed))[-1]) / self.model.thinking.temperature
            log_probs.append(logits.log_softmax(-1)[support.tokens()])
            weights = self.thoughts.fed[row, column, sample, step]
            if through:
                p = self.trainer.relaxation.weights(logits[support.ids], support)
                weights = weights + p - p.detach()
            token = (weights[:, None] * self.embedding(support.ids)).sum(0)
            fed.append((self.model.pause if self.trainer.args.thoughts == "pause" else token)[None])
        told = ids[anchor + 1 : anchor + N_TALK]
        after = self.hidden(torch.cat([*fed, self.model.end[None], self.embedding(told)]))
        reward, count = 0.0, 0
        for place in range(N_TALK):
            slot = anchor + 1 + place
            if slot < len(ids):
                states = (base[slot - 1], after[len(after) - len(told) - 1 + place])
                weight = self.model.mixing(*(each[None] for each in states))[0]
                mixed = (1 - weight) * states[0] + weight * states[1]
                reward = reward + self.head(mixed).log_softmax(-1)[ids[slot]]
                count += 1
        return sum(log_probs), reward, count

    def loss(self, policy_part):
        """Base, talk and policy parts; the last from log π, rewards and (of soft ones) rewards through thoughts."""
        base = torch.cat([self.of_text(torch.tensor(row["input_ids"]))[1] for row in self.rows])
        talk, policy, num_talk = [], [], 0
        for row, column in self.thoughts.is_anchor.nonzero().tolist():
            samples = range(self.thoughts.num_samples)
            found = [self.thought(row, column, sample, False) for sample in samples]
            log_probs, rewards = (torch.stack([torch.as_tensor(each[i]) for each in found]) for i in (0, 1))
            through = None
            if self.trainer.args.is_soft:
                through = torch.stack([self.thought(row, column, sample, True)[1] for sample in samples])
            weights, of_policy = policy_part(log_probs, rewards, through)
            talk.append(-(weights * rewards).sum())
            policy.append(of_policy)
            num_talk += found[0][2]
        return -base.mean() + sum(talk) / num_talk + sum(policy) / len(policy)


def reinforce(log_probs, rewards, through):
    constant = rewards.detach()
    return torch.full_like(constant, 1 / 3), -((constant - constant.mean()) * log_probs).mean()


def rloo(log_probs, rewards, through):
    constant = rewards.detach()
    others = [(constant.sum() - each) / 2 for each in constant]
    advantages = torch.stack([each - other for each, other in zip(constant, others, strict=True)])
    return torch.full_like(constant, 1 / 3), -(advantages * log_probs).mean()


def self_normalized(log_probs, rewards, through):
    weights = rewards.detach().softmax(0)
    return weights, -(weights * log_probs).sum()


def soft(log_probs, rewards, through):
    return torch.full_like(rewards.detach(), 1 / 3), -(through - rewards).mean()


def nothing(log_probs, rewards, through):
    return torch.full_like(rewards.detach(), 1 / 3), torch.zeros(())


CASES = {
    "reinforce": (reinforce, {}),
    "rloo": (rloo, {"estimator": "rloo"}),
    "rloo, some tokens": (rloo, {"estimator": "rloo", "think_every": 2, "temperature": 0.7}),
    "self_normalized": (self_normalized, {"estimator": "self_normalized"}),
    "soft, gumbel_softmax": (soft, {"estimator": "soft", "relaxation": "gumbel_softmax"}),
    "soft, st_gumbel": (soft, {"estimator": "soft", "relaxation": "st_gumbel", "relaxation_temperature": 0.6}),
    "pause": (nothing, {"thoughts": "pause"}),
    "random": (nothing, {"thoughts": "random"}),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_loss_written_out(tmp_path, case, tied, monkeypatch):
    policy_part, settings = CASES[case]
    model = thinker(lm=gpt2(tied=tied), n_thought=3, temperature=settings.get("temperature", 1.0))
    trainer = quietstar(tmp_path, model, num_thoughts=3, n_thought=3, n_talk=N_TALK, **settings)
    rows, kept, think = list(texts(3)), [], trainer._think
    rows = [{"input_ids": row["input_ids"], "text_index": index} for index, row in enumerate(rows)]
    monkeypatch.setattr(trainer, "_think", lambda *given: kept.append(think(*given)) or kept[-1])
    trainer._metrics.clear()
    trainer.state.max_steps = 3
    loss = trainer.compute_loss(trainer.model, rows)
    expected = ByHand(trainer, rows, kept[0]).loss(policy_part)
    named = dict(trainer.model.named_parameters())
    ours, theirs = (
        dict(zip(named, torch.autograd.grad(each, list(named.values()), allow_unused=True), strict=True))
        for each in (loss, expected)
    )
    if not trainer.args.is_soft:  # its value is not the loss's: a surrogate, whose gradient is meant
        assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    assert {name for name in named if ours[name] is None} == {name for name in named if theirs[name] is None}
    for name in named:
        if theirs[name] is not None:
            error = (ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)
            assert error < 1e-9, name
    assert kept[0].is_anchor.sum() > 5
