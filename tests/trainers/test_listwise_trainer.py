"""Ranked completions: TRL's DPOTrainer for two, every loss on ragged sets with ties, and what is refused."""

from itertools import permutations

import pytest
import torch
from datasets import Dataset
from helpers import llama
from peft import LoraConfig
from trainers.tiny import CHAT_TEMPLATE, logs_of, numbers_of, parameters_of, word_tokenizer

from softrl.data.ranked import check_ranked_rows, ranked_batch
from softrl.trainers import ListwisePreferenceConfig, ListwisePreferenceTrainer
from softrl.trainers.listwise_evaluation import evaluate_sets
from softrl.trainers.listwise_trainer import pairs_in_order

LOSSES = ("plackett_luce", "listwise", "one_winner", "nca", "partition")
ROWS = [
    {"prompt": "w4 w5 ", "completions": ["w6 w7", "w8", "w9 w10 w11"], "rewards": [1.0, 0.0, -1.0]},
    {"prompt": "w3 ", "completions": ["w5", "w6"], "rewards": [0.2, 0.9]},
    {"prompt": "w7 w8 w9 ", "completions": ["w4", "w5 w6", "w7", "w8"], "rewards": [0.5, 0.5, -0.5, 0.0]},
    {"prompt": "w6 ", "completions": ["w10 w11", "w9", "w8 w7"], "rewards": [0.0, 2.0, 1.0]},
]
RANKED = [{"prompt": row["prompt"], "completions": row["completions"],
           "ranking": [1 + sum(other > reward for other in row["rewards"]) for reward in row["rewards"]]}
          for row in ROWS]  # fmt: skip


def trainer_of(folder, rows=ROWS, model=None, tokenizer=None, **settings):
    peft_config = settings.pop("peft_config", None)
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.02, "lr_scheduler_type": "constant",
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "beta": 0.5,
    }  # fmt: skip
    return ListwisePreferenceTrainer(
        llama() if model is None else model, args=ListwisePreferenceConfig(str(folder), **{**defaults, **settings}),
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:2]),
        processing_class=tokenizer or word_tokenizer(), peft_config=peft_config,
    )  # fmt: skip


def test_a_batch_holds_every_completion_behind_its_prompt():
    tokenizer = word_tokenizer()
    batch = ranked_batch(ROWS, tokenizer, None)
    assert batch.mask.sum(-1).tolist() == [3, 2, 4, 3]
    assert batch.ranks[2].tolist() == [1.0, 1.0, 3.0, 2.0]  # the tie is one place
    assert batch.ids[0][batch.attention[0]].tolist() == [4, 5, 6, 7, 1]
    assert batch.ids[0][batch.completion[0]].tolist() == [6, 7, 1]  # ended, as DPOTrainer ends it
    assert batch.by_set(torch.arange(12.0))[1].tolist() == [3.0, 4.0, 0.0, 0.0]
    cut = ranked_batch(ROWS[:1], tokenizer, 4)
    assert cut.ids[2][cut.completion[2]].tolist() == [9, 10]


def test_conversations_are_told_from_their_answers():
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    turn = [{"role": "user", "content": "w4"}]
    answers = [[{"role": "assistant", "content": word}] for word in ("w5", "w6 w7")]
    batch = ranked_batch([{"prompt": turn, "completions": answers, "ranking": [2, 1]}], tokenizer, None)
    texts = [tokenizer.decode(ids[chosen]) for ids, chosen in zip(batch.ids, batch.completion, strict=True)]
    assert ["w5" in text and "w4" not in text for text in texts] == [True, False]
    assert "w6 w7" in texts[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": ["w4"]}, "two or more"),
        ({"rewards": [1.0]}, "3 completions and 1 rewards"),
        ({"rewards": [1.0, float("nan"), 0.0]}, "must be finite"),
        ({"rewards": None}, "neither 'rewards' nor 'ranking'"),
        ({"prompt": None}, "has no 'prompt'"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"rewards": 1.0}, "must be a list of numbers"),
        ({"rewards": ["a", "b", "c"]}, "must be finite numbers"),
        ({"completions": [[{"role": "assistant", "content": "w4"}]] * 3}, "a completion is text, or a list of mess"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(change, message):
    for check in (ranked_batch, check_ranked_rows):
        with pytest.raises(ValueError, match=f"row 1.*{message}"):
            check([ROWS[1], {**ROWS[0], **change}], word_tokenizer(), None)


def test_pairs_are_in_order_where_scores_fall_with_ranks():
    batch = ranked_batch(ROWS, word_tokenizer(), None)
    scores = torch.tensor([[0.0, 0.0, -1.0, 9.0], [1.0, 2.0, 9.0, 9.0], [3.0, 1.0, 2.0, 2.0], [1.0, 2.0, 3.0, 9.0]])
    right, ordered = pairs_in_order(scores, batch)
    expected = torch.zeros(2, len(ROWS))
    for index, row in enumerate(ROWS):
        for one, other in permutations(range(len(row["rewards"])), 2):
            if row["rewards"][one] > row["rewards"][other]:
                difference = scores[index, one] - scores[index, other]
                expected[0, index] += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
                expected[1, index] += 1
    torch.testing.assert_close(torch.stack([right, ordered]), expected)
    assert expected[1].tolist() == [3.0, 1.0, 5.0, 3.0]


def test_a_prompt_that_fills_the_length_is_named():
    with pytest.raises(ValueError, match="leaves no room"):
        ranked_batch(ROWS, word_tokenizer(), 3)


@pytest.mark.slow
def test_two_completions_give_trls_dpo_loss(tmp_path):
    from trl import DPOConfig, DPOTrainer

    pairs = [("w4 w5 ", "w6 w7 w8", "w9"), ("w3 ", "w5", "w6 w6 w10"), ("w8 w9 w10 ", "w3 w4", "w4 w3")]
    policy, generator = llama(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    theirs = DPOTrainer(
        policy, llama(), processing_class=word_tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]),
        args=DPOConfig(str(tmp_path), beta=0.5, per_device_train_batch_size=3, use_cpu=True, bf16=False, report_to=[],
                       gradient_checkpointing=False),
    )  # fmt: skip
    rows = [{"prompt": p, "completions": [r, c], "ranking": [2, 1]} for p, c, r in pairs]
    for loss_type in ("plackett_luce", "one_winner"):
        ours = ListwisePreferenceTrainer(
            policy, llama(), ListwisePreferenceConfig(str(tmp_path), beta=0.5, loss_type=loss_type, report_to=[],
                                                      use_cpu=True),
            train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer(),
        )  # fmt: skip
        loss = ours.compute_loss(ours.model, ranked_batch(rows, word_tokenizer(), None))
        expected = theirs.compute_loss(theirs.model, next(iter(theirs.get_train_dataloader())))
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        assert abs(expected.item() - 0.693) > 0.01
        weights = list(policy.parameters())
        for one, other in zip(*(torch.autograd.grad(each, weights) for each in (loss, expected)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("lora", [False, True])
def test_every_loss_learns_the_order(tmp_path, loss_type, lora):
    peft_config = LoraConfig(r=4, target_modules="all-linear") if lora else None
    trainer = trainer_of(tmp_path, loss_type=loss_type, max_steps=25, peft_config=peft_config, beta=0.5)
    trainer.train()
    if loss_type != "one_winner":  # which does not order the losers
        assert logs_of(trainer, "rewards/accuracies")[-1] == 1.0
    assert logs_of(trainer, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-6)  # the reference is the start
    assert logs_of(trainer, "rewards/margins")[-1] > 0.3
    losses = logs_of(trainer, "loss")
    assert losses[-1] < losses[0]
    measured = trainer.evaluate()
    assert measured["eval_rewards/margins"] > 0.3
    if loss_type != "one_winner":
        assert measured["eval_rewards/accuracies"] == 1.0
    assert {"eval_loss", "eval_rewards/chosen", "eval_rewards/rejected"} <= measured.keys()


@pytest.mark.slow
def test_sets_are_measured_one_by_one_as_all_together(tmp_path):
    tie = {"prompt": "w5 ", "completions": ["w4", "w9"], "rewards": [1.0, 1.0]}
    trainer = trainer_of(tmp_path, [*ROWS, tie], per_device_train_batch_size=5)
    trainer.train()
    trainer.model.train()
    measured = evaluate_sets(trainer, trainer.train_dataset)
    assert trainer.model.training  # as it was
    whole = trainer.evaluate(trainer.train_dataset)
    assert sum(each.loss for each in measured) / 5 == pytest.approx(whole["eval_loss"], abs=1e-6)
    assert (measured[4].accuracy, measured[4].policy_accuracy, measured[4].margin) == (None, None, None)
    pairs = [3, 1, 5, 3]
    right = sum(each.accuracy * count for each, count in zip(measured, pairs, strict=False))
    assert right / sum(pairs) == pytest.approx(whole["eval_rewards/accuracies"], abs=1e-6)
    assert [len(each.log_probs) for each in measured] == [3, 2, 4, 3, 2]
    ids = torch.tensor([[3, 5, 1]])  # the first completion of the second row
    own = trainer.model(ids).logits[0, :-1].log_softmax(-1)[torch.arange(2), ids[0, 1:]].sum()
    assert measured[1].log_probs[0] == pytest.approx(own.item(), abs=1e-5)


@pytest.mark.slow
def test_metrics_of_a_step_do_not_depend_on_its_micro_batches(tmp_path):
    found = []
    for size in (4, 1):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "optim": "sgd"}
        trainer = trainer_of(tmp_path, **settings)
        trainer.train()
        found.append([logs_of(trainer, f"rewards/{name}") for name in ("chosen", "rejected", "margins", "accuracies")])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.slow
def test_a_ranking_is_as_good_as_rewards_where_only_the_order_counts(tmp_path):
    found = []
    for rows in (ROWS, RANKED):
        trainer = trainer_of(tmp_path, rows)
        trainer.train()
        found.append(parameters_of(trainer))
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trainer_of(tmp_path / "a", **settings)
    straight.train()
    resumed = trainer_of(tmp_path / "a", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert numbers_of(resumed)[-2:] == numbers_of(straight)[-2:]
    torch.testing.assert_close(parameters_of(resumed), parameters_of(straight), rtol=0.0, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["listwise", "nca", "partition"])
def test_losses_of_rewards_refuse_a_ranking(tmp_path, loss_type):
    with pytest.raises(ValueError, match="needs the column 'rewards'"):
        trainer_of(tmp_path, RANKED, loss_type=loss_type)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", [{"loss_type": "dpo"}, {"beta": 0.0}, {"reward_temperature": -1.0}, {"max_length": 1}]
)
def test_settings_out_of_range_are_named(tmp_path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        ListwisePreferenceConfig(str(tmp_path), report_to=[], **setting)
