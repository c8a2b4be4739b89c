"""ReasonerTrainer with a surrogate: when its estimates are used, what it tells apart, and what is refused."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from trainers.test_reasoner_trainer import trained
from trainers.tiny import logs_of

from softrl.estimators.latent_objective import latent_loss, scored_by

pytestmark = pytest.mark.slow  # imports trl


@pytest.mark.parametrize("gate", [0.5, 100.0])
def test_a_surrogate_that_has_not_learned_leaves_rewards_as_they_are(tmp_path, gate):
    """Fresh members agree that rewards are about 0; thoughts that only some were trusted of had two scales."""
    trainer = trained(tmp_path, objective="surrogate", surrogate_spread=gate)
    batch = trainer.batch([trainer.train_dataset[index] for index in range(4)])
    output = trainer.passed(trainer.model, batch, 0)
    extras = trainer.extras(output, batch)
    found = latent_loss(output, trainer.objective, extras)
    scored = scored_by(output, found.rewards, 0.0, extras)
    assert (scored.estimated - scored.rewards).mean() > 1.0
    torch.testing.assert_close(scored.used_rewards().std(-1), found.rewards.std(-1), rtol=0.0, atol=0.0)


def test_a_surrogate_is_trusted_once_its_error_is_small(tmp_path):
    """Texts of one token teach the model, and then the surrogate, that rewards are about 0."""
    rows = Dataset.from_list([{"input_ids": [4] * 6}] * 8)
    settings = {"surrogate_spread": 0.5, "surrogate_learning_rate": 0.01, "learning_rate": 1.0, "max_steps": 40}
    trainer = trained(tmp_path, train=rows, objective="surrogate", **settings)
    trainer.train()
    trusted, recent = logs_of(trainer, "surrogate/trusted"), logs_of(trainer, "surrogate/recent_rmse")
    assert trusted[0] == 0.0
    assert trusted[-1] == 1.0
    for before, share in zip(recent, trusted[1:], strict=False):
        assert share == 0.0 or before < 0.5
    squares = [error**2 for error in logs_of(trainer, "surrogate/rmse")]
    running = squares[0]
    for each in squares[1:]:
        running = 0.9 * running + 0.1 * each
    assert recent[-1] == pytest.approx(running**0.5, rel=1e-4)


def test_the_surrogate_tells_the_order_of_latents(tmp_path):
    """Thoughts of two of three codes, the reward 1 nat where the first is smaller: a mean over latents shows nothing.

    Estimates that are trusted would all be about 0.
    """
    fit = trained(tmp_path, objective="surrogate", surrogate_learning_rate=0.01, surrogate_spread=0.3).surrogate
    pairs = torch.tensor([(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)])
    codes = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    context = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    embeds = codes[pairs].expand(4, -1, -1, -1)
    rewards = torch.where(pairs[:, 0] < pairs[:, 1], 1.0, -1.0).expand(4, -1)
    for _ in range(200):
        fit.learn_from(context, embeds, rewards, Accelerator())
    said = fit.surrogate(context, embeds)
    assert said.trusted.all()
    assert (said.estimated - rewards).abs().max() < 0.2


def test_a_surrogate_of_an_older_checkpoint_is_refused(tmp_path):
    fit = trained(tmp_path, objective="surrogate").surrogate
    state = fit.state_dict()
    fit.load_state_dict(state)
    del state["surrogate"]["mean_square_error"]
    with pytest.raises(ValueError, match="has no mean_square_error: an older softrl wrote it"):
        fit.load_state_dict(state)


def test_a_surrogate_takes_no_harm_from_a_batch_without_thoughts(tmp_path):
    fit = trained(tmp_path, objective="surrogate").surrogate
    before = {name: value.clone() for name, value in fit.surrogate.state_dict().items()}
    nothing = (torch.zeros(0, 6), torch.zeros(0, 3, 2, 6), torch.zeros(0, 3))
    assert fit.learn_from(*nothing, Accelerator()) == {}
    assert all(torch.equal(value, before[name]) for name, value in fit.surrogate.state_dict().items())
