"""Text GANs on a tiny model: the discriminator learns, both generators follow it, runs resume exactly."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import EOS, PairReward
from trainers.tiny import logs_of, make, numbers_of, parameters_of, word_tokenizer

pytestmark = pytest.mark.slow  # imports trl

SETTINGS = {
    "discriminator_warmup_samples": 8, "discriminator_warmup_steps": 5, "discriminator_steps": 2, "beta": 0.0,
    "discriminator_batch_size": 8, "discriminator_buffer_size": 16, "discriminator_width": 6, "entropy_coef": 0.0,
}  # fmt: skip
METHODS = {"TextGAN": {}, "ReinforceGAN": {"num_generations": 2, "estimator": "rloo"}}


def data(count=16, word="w9"):
    return Dataset.from_dict(
        {"prompt": [f"w3 w{4 + i % 7}" for i in range(count)], "reference": [f"{word} {word}"] * count}
    )


def gan(tmp_path, method="TextGAN", train=None, **settings):
    return make(
        tmp_path, word_tokenizer(), reward="discriminator", train=data() if train is None else train,
        evaluation=data(3), method=method, **{**SETTINGS, **METHODS[method], **settings},
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_generator_learns_to_write_what_is_real(tmp_path, method):
    trainer = gan(
        tmp_path, method, max_steps=40, per_device_train_batch_size=32, optim="adamw_torch", max_completion_length=3,
        learning_rate=0.02, discriminator_learning_rate=0.01, discriminator_warmup_steps=50,
        discriminator_layers=0,  # layers drawn at random only hide the words
    )  # fmt: skip
    before = share_of(trainer, 9)
    trainer.train()
    assert before < 0.2
    assert share_of(trainer, 9) > before + 0.3
    for name in ("loss", "accuracy", "accuracy_unseen", "gradient_penalty"):
        assert len(logs_of(trainer, f"discriminator/{name}")) == 40


def share_of(trainer, token):
    trainer.evaluate()
    tokens = [token_id for sample in trainer.last_evaluation for token_id in sample.tokens]
    words = len(trainer.last_evaluation) * 2
    return sum(found == token for found in tokens) / words


@pytest.mark.parametrize("method", METHODS)
def test_the_first_gradient_is_of_the_discriminator_as_it_was(tmp_path, method):
    """A reward trainer on the frozen discriminator takes the same step."""
    trainer = gan(tmp_path / "gan", method, max_steps=1, discriminator_steps=0)
    trainer.train()
    frozen = trainer.discriminator  # trained on the start alone
    plain = method.replace("TextGAN", "SoftRollout").replace("ReinforceGAN", "Reinforce")
    own = {name: value for name, value in SETTINGS.items() if not name.startswith("discriminator")}
    other = make(
        tmp_path / "plain", word_tokenizer(), reward=frozen, train=data(), method=plain, max_steps=1, **own,
        **METHODS[method],
    )  # fmt: skip
    other.train()
    torch.testing.assert_close(parameters_of(trainer), parameters_of(other), rtol=1e-9, atol=1e-12)


def test_an_update_is_one_of_adamw_on_the_loss_of_real_and_generated_texts(tmp_path):
    trainer = gan(tmp_path, discriminator_warmup_steps=1, gradient_penalty=0.0)
    start = copy.deepcopy(trainer.discriminator)
    trainer._warm_up()
    adversary = trainer.adversary
    assert adversary.num_updates == 1
    assert [pair.prompt for pair in adversary.pairs] == data(8)["prompt"]
    real = torch.tensor([[9, 9, EOS]] * 8)
    of_real = start.hard(real, torch.ones_like(real, dtype=torch.bool), prompt=data(8)["prompt"])
    of_generated = torch.cat([start.soft(pair.generated, prompt=[pair.prompt]) for pair in adversary.pairs])
    (-(0.9 * of_real.sigmoid().log() + 0.1 * (-of_real).sigmoid().log()).mean() / 2).backward()
    (-(-of_generated).sigmoid().log().mean() / 2).backward()
    for parameter, own in zip(trainer.discriminator.head.parameters(), start.head.parameters(), strict=True):
        first_moment = adversary.optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(first_moment, 0.1 * own.grad, rtol=1e-9, atol=1e-12)


def test_the_penalty_is_part_of_it(tmp_path):
    slopes = {}
    for weight in (0.0, 100.0):
        trainer = gan(tmp_path, discriminator_warmup_steps=100, gradient_penalty=weight)
        trainer._warm_up()
        slopes[weight] = trainer.adversary.train(1, trainer.accelerator)["gradient_penalty"]
    assert slopes[100.0] < 0.2 * slopes[0.0]


@pytest.mark.parametrize("method", METHODS)
def test_resuming_goes_on_as_if_it_had_not_stopped(tmp_path, method):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = gan(tmp_path / "whole", method, **settings)
    whole.train()
    resumed = gan(tmp_path / "whole", method, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert numbers_of(resumed)[-2:] == numbers_of(whole)[-2:]
    torch.testing.assert_close(parameters_of(resumed), parameters_of(whole), rtol=0.0, atol=0.0)
    for ours, theirs in zip(resumed.discriminator.parameters(), whole.discriminator.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0)
    (tmp_path / "whole" / "checkpoint-2" / "discriminator.pt").unlink()
    with pytest.raises(ValueError, match=r"discriminator\.pt is missing"):
        gan(tmp_path / "whole", method, **settings).train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))


def test_mixtures_are_seen_as_mixtures(tmp_path):
    trainer = gan(tmp_path, relaxation="gumbel_softmax", max_steps=1)
    trainer.train()
    weights = trainer.adversary.pairs[-1].generated.weights
    assert weights.shape[-1] == 7
    assert float(weights.max()) < 1.0


def test_accumulated_micro_batches_make_one_round_of_updates(tmp_path):
    trainer = gan(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.adversary.num_updates == 5 + 2 * 2
    assert len(trainer.adversary.pairs) == 16


def test_other_rewards_may_be_added_and_the_discriminator_may_not_be_left_out(tmp_path):
    trainer = make(
        tmp_path, word_tokenizer(), reward=["discriminator", PairReward()], train=data(), method="TextGAN",
        reward_weights=[1.0, 0.5], **SETTINGS,
    )  # fmt: skip
    trainer.train()
    assert logs_of(trainer, "rewards/discriminator/mean")
    assert logs_of(trainer, "rewards/pair/mean")
    with pytest.raises(ValueError, match="a text GAN needs 'discriminator' among them"):
        make(tmp_path, word_tokenizer(), reward=PairReward(), train=data(), method="TextGAN", **SETTINGS)


def test_a_data_set_without_references_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset has no column 'reference'"):
        gan(tmp_path, train=data().remove_columns("reference"))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("discriminator_batch_size", 0, "discriminator_batch_size must be 1 or more, got 0"),
        ("label_smoothing", 0.5, "label_smoothing must be from 0 to below 0.5, got 0.5"),
        ("gradient_penalty", -1.0, "gradient_penalty must not be negative"),
        ("discriminator_warmup_samples", 0, "discriminator_warmup_steps needs discriminator_warmup_samples"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, setting, value, message):
    with pytest.raises(ValueError, match=message):
        gan(tmp_path, **{setting: value})
