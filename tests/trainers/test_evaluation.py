"""`evaluate_policy`: the trainers' own evaluation for any model, also one that TRL's trainer trained."""

import pytest
import sacrebleu
import torch
from helpers import ALL_REWARDS, PairReward, V, llama
from trainers.tiny import dataset, make
from trl import RLOOConfig, RLOOTrainer

from softrl.models.policy import Policy
from softrl.rewards.base import as_trl
from softrl.rewards.resolve import resolve_rewards
from softrl.rewards.token_linear import TokenLinearReward
from softrl.trainers import evaluate_policy
from softrl.trainers.evaluation import summary

pytestmark = pytest.mark.slow  # imports trl


def judge(texts):
    return torch.tensor([float(len(text.split())) for text in texts])


def test_it_is_the_trainers_own_evaluation(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, judge=judge, temperature=1.3, evaluation=dataset(7), seed=5)
    trainer.reference.model.load_state_dict(llama(seed=2).state_dict())
    metrics = trainer.evaluate()
    for batch_size in (2, 7):
        samples = evaluate_policy(
            Policy(trainer.model, 1.3), Policy(llama(seed=2), 1.3), dataset(7), tokenizer, PairReward(), judge,
            max_completion_length=5, batch_size=batch_size, seed=5,
        )  # fmt: skip
        assert [sample.tokens for sample in samples] == [sample.tokens for sample in trainer.last_evaluation]
        for ours, its in zip(samples, trainer.last_evaluation, strict=True):
            assert (ours.prompt, ours.completion, ours.judge) == (its.prompt, its.completion, its.judge)
            assert (ours.reward, ours.kl_nats) == pytest.approx((its.reward, its.kl_nats), rel=1e-6)
        for name, value in summary(samples).items():
            assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-6), name


def test_a_model_that_trl_trained_is_measured_against_its_base(tmp_path, tokenizer):
    reward = TokenLinearReward(torch.linspace(-2, 2, V), 0.0)
    args = RLOOConfig(
        str(tmp_path), per_device_train_batch_size=16, num_generations=4, max_completion_length=5, max_steps=15,
        beta=0.0, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, learning_rate=0.02,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = RLOOTrainer(
        llama().float(), as_trl(reward, tokenizer), args, dataset(), processing_class=tokenizer
    )  # fmt: skip
    trainer.train()
    base = llama().float()
    before, after = (
        summary(evaluate_policy(Policy(model), Policy(base), dataset(8), tokenizer, [reward], max_completion_length=5))
        for model in (base, trainer.model)
    )
    assert before["kl"] == pytest.approx(0.0, abs=1e-6)
    assert after["kl"] > 0.01
    assert after["reward"] > before["reward"] + 0.05
    assert "judge" not in after


def test_functions_of_texts_and_weights(tokenizer):
    def length(completions, **kwargs):
        return [float(len(text.split())) for text in completions]

    rewards = resolve_rewards([length, PairReward()], tokenizer, None, differentiates=False)
    model = llama()
    samples = evaluate_policy(
        Policy(model), None, dataset(3), tokenizer, rewards, reward_weights=[2.0, 0.5], max_completion_length=4
    )
    for sample in samples:
        assert sample.rewards["length"] == len(sample.completion.split())
        assert sample.reward == pytest.approx(2.0 * sample.rewards["length"] + 0.5 * sample.rewards["pair"])
        assert sample.kl_nats is None
    with pytest.raises(ValueError, match="needs a column `prompt`"):
        evaluate_policy(Policy(model), None, dataset(3).rename_column("prompt", "text"), tokenizer, rewards)


def test_completions_are_compared_with_references(tmp_path, tokenizer):
    """Rewards and metrics read the same column; the metrics read decoded text."""
    rows = dataset(6).add_column("reference", [["w5 w6 w7", "w8"], *[["w9 w10", "w5"]] * 5])
    trainer = make(
        tmp_path, tokenizer, reward=["bleu", "rougeL"], train=rows, evaluation=rows,
        eval_metrics=["sacrebleu", "rouge"], max_steps=1,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    texts = [sample.completion for sample in trainer.last_evaluation]
    references = [list(column) for column in zip(*rows["reference"], strict=True)]
    assert metrics["eval_sacrebleu/score"] == pytest.approx(sacrebleu.corpus_bleu(texts, references).score)
    assert 0.0 < metrics["eval_rouge/rouge1"] <= 1.0
    assert metrics["eval_rewards/bleu/mean"] >= 0.0
    with pytest.raises(
        ValueError, match=r"column 'reference' of the data set, which is missing or empty for .*\[0, 1"
    ):
        make(tmp_path, tokenizer, eval_metrics=["rouge"]).evaluate()


def test_rewards_with_another_tokenizer_are_logged_of_the_decoded_text_too(tmp_path, tokenizer):
    rows = dataset(6).add_column("target", [f"w{i + 5} w9" for i in range(6)])
    reward = ALL_REWARDS["similarity"]()
    trainer = make(tmp_path, tokenizer, reward=reward, train=rows, evaluation=rows, max_steps=1)
    trainer.train()
    (step,) = [row for row in trainer.state.log_history if "loss" in row]
    assert {"rewards/similarity/mean", "rewards/similarity_decoded/mean"} <= step.keys()
    metrics = trainer.evaluate()
    for index, sample in enumerate(trainer.last_evaluation):
        ids, target = torch.tensor([sample.tokens]), [rows["target"][index]]
        decoded = reward.hard_decoded(ids, torch.ones_like(ids, dtype=torch.bool), target=target)
        assert sample.rewards["similarity_decoded"] == pytest.approx(decoded.item(), abs=1e-6)
    values = [sample.rewards["similarity_decoded"] for sample in trainer.last_evaluation]
    assert metrics["eval_rewards/similarity_decoded/mean"] == pytest.approx(sum(values) / len(values))
