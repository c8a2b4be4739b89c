"""Settings that change over training reach the step, the log and the checkpoint."""

import pytest
from trainers.tiny import make, word_tokenizer

pytestmark = pytest.mark.slow  # imports trl


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def test_schedules_are_followed_and_logged(tmp_path):
    trainer = make(
        tmp_path, word_tokenizer(), max_steps=5, relaxation="gumbel_softmax", beta="linear:0.2->0.0@4",
        relaxation_temperature="exponential:2.0->0.5@4", feedback_discount="linear:0.0->1.0", top_k="linear:9->5@2",
    )  # fmt: skip
    seen = []
    compute = trainer._estimate

    def watched(rollout, *rest):
        terms, settings = trainer.terms, trainer.adjoint_settings
        seen.append((rollout.support.ids.shape[-1], terms.kl_weight, settings.feedback_discount))
        return compute(rollout, *rest)

    trainer._estimate = watched
    trainer.train()
    expected = [(9, 0.2, 0.0), (7, 0.15, 0.2), (5, 0.1, 0.4), (5, 0.05, 0.6), (5, 0.0, 0.8)]
    for actual, wanted in zip(seen, expected, strict=True):
        assert actual == pytest.approx(wanted)
    assert logged(trainer, "beta") == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0])
    assert logged(trainer, "relaxation_temperature") == pytest.approx([2.0, 2**0.5, 1.0, 0.5**0.5, 0.5])
    assert logged(trainer, "top_k") == [9, 7, 5, 5, 5]


def test_constants_are_not_logged_and_text_from_the_command_line_is_a_number(tmp_path):
    trainer = make(tmp_path, word_tokenizer(), max_steps=1, beta="0.1", top_k="7", max_entropy_nats="0.5")
    trainer.train()
    assert trainer.args.beta == 0.1
    assert trainer.relaxation.truncation.top_k == 7
    assert trainer.relaxation.max_entropy_nats == 0.5
    assert not {"beta", "top_k", "max_entropy_nats"} & set(trainer.state.log_history[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": "linear:0.1"}, "beta='linear:0.1'"),
        ({"beta": "linear:0.1->-0.1"}, "beta must not be negative"),
        ({"relaxation_temperature": "linear:1.0->0.0"}, "relaxation temperature must be positive, got 0.0"),
        ({"max_entropy_nats": "linear:0.5->9.0"}, "9.0"),
        ({"feedback_discount": "linear:0->2"}, r"feedback_discount must lie in \[0, 1\], got 2.0"),
        ({"top_k": "linear:8->900"}, "top_k=900 is larger than the vocabulary"),
        ({"beta": "linear:0.1->0.2", "target_kl": 0.1}, "adapts beta by itself"),
        ({"beta": 0.0, "target_kl": 0.1}, "beta must be positive to hold"),
    ],
)
def test_impossible_schedules_are_named_before_training(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, word_tokenizer(), **settings)


def test_the_kl_weight_follows_the_target_and_survives_a_restart(tmp_path):
    settings = {"beta": 0.1, "target_kl": 0.02, "kl_horizon": 2, "max_steps": 6, "save_strategy": "steps",
                "save_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}  # fmt: skip
    whole = make(tmp_path / "whole", word_tokenizer(), **settings)
    whole.train()
    weights, kls = logged(whole, "beta"), logged(whole, "kl")
    for before, after, kl in zip(weights, weights[1:], kls, strict=False):
        error = min(max((kl - 0.02) / 0.02, -0.2), 0.2)
        assert after == pytest.approx(before * (1 + error / 2), rel=1e-6)
    assert len(set(weights)) == 6
    again = make(tmp_path / "again", word_tokenizer(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert logged(again, "beta")[-3:] == pytest.approx(weights[-3:], rel=1e-6)
    assert logged(again, "kl")[-3:] == pytest.approx(kls[-3:], rel=1e-4)
