"""ReasonerTrainer on tiny models: its loss by hand, its invariances, what it measures, saves and refuses."""

import math

import pytest
import torch
from datasets import Dataset
from estimators.reasoners import reasoner
from helpers import V, llama
from trainers.tiny import logs_of, numbers_of, parameters_of, word_tokenizer
from transformers import AutoModelForCausalLM

from softrl.estimators.latent_objective import latent_loss
from softrl.models.reasoner import ReasonerForCausalLM
from softrl.tokens.noise import sequence_seed
from softrl.trainers import ReasonerTrainer, ReasonerTrainingConfig
from softrl.trainers.reasoner_config import OBJECTIVES

pytestmark = pytest.mark.slow  # imports trl

# What an objective needs beside its name.
NEEDS = {
    "reparameterised": {"latent_kind": "gaussian"},
    "cem": {"objective_settings": {"num_rounds": 2, "num_samples": 6, "num_elites": 2}},
    "surrogate": {"surrogate_spread": 100.0},
}
MODEL_KEYS = ("latent_kind", "latent_noise", "use_reasoner", "use_base_lm", "n_thought", "weight_groups", "core")


def texts(count=8, seed=0, length=6):
    """Rows of token ids; of 4 to 9 with length None."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length or 4 + (5 * row) % 6 for row in range(count)]
    return Dataset.from_list([{"input_ids": torch.randint(3, V, (n,), generator=generator).tolist()} for n in lengths])


def trained(folder, model=None, train=None, evaluation=None, tokenizer=None, float32=False, **settings):
    """A trainer in float64 (or 32) with SGD at a learning rate that shows."""
    objective = settings.get("objective", "reinforce")
    settings = {**NEEDS.get(objective, {}), **settings}
    defaults = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "num_thoughts": 3, "learning_rate": 0.1,
        "lr_scheduler_type": "constant", "optim": "sgd", "max_steps": 3, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0,
    }  # fmt: skip
    args = ReasonerTrainingConfig(str(folder), **{**defaults, **settings})
    if model is None:
        own = {key: settings[key] for key in MODEL_KEYS if key in settings}
        model = reasoner(learns_log_z=args.rule_name == "partition_learned", **own)
        model = model.float() if float32 else model
    return ReasonerTrainer(
        model, args, texts() if train is None else train, texts(3, seed=1) if evaluation is None else evaluation,
        tokenizer,
    )  # fmt: skip


def test_the_loss_is_that_of_the_model_s_own_numbers(tmp_path):
    """A batch of padded rows of which one counts in part: thoughts keyed by seed, step and row, summed by hand."""
    rows = texts(length=None)
    # The last tokens of the shortest rows do not count.
    masks = [[1] * (len(ids) - 1) + [int(len(ids) != 4)] for ids in rows["input_ids"]]
    rows = rows.add_column("completion_mask", masks)
    trainer = trained(tmp_path, train=rows, objective="rloo", seed=7, policy_weight=2.0, interpreter_weight=0.5)
    batch = [trainer.train_dataset[index] for index in (5, 0, 2)]
    found = trainer.compute_loss(trainer.model, batch).item()
    total = count = 0.0
    for row in batch:
        ids = torch.tensor([row["input_ids"]])
        output = reasoner()(ids, num_thoughts=3, seed=sequence_seed(7, 0), row_ids=[row["text_index"]])
        for position in range(ids.shape[1] - 1):
            if not row["completion_mask"][position + 1]:
                continue
            token = ids[0, position + 1]
            talk = [output.talk_log_probs[0, position, s, token].item() for s in range(3)]
            interpreter = output.interpreter_log_probs[0, position, :, token].mean().item()
            log_probs = output.thought_log_probs[0, position].tolist()
            total -= output.base_log_probs[0, position, token].item() + 0.5 * interpreter + sum(talk) / 3
            total -= (
                2.0
                * sum((one - (sum(talk) - one) / 2) * log_prob for one, log_prob in zip(talk, log_probs, strict=True))
                / 3
            )
            count += 1
    assert count == sum(sum(row["completion_mask"][1:]) for row in batch)
    assert found == pytest.approx(total / count, rel=1e-10)


def test_two_parts_of_a_step_are_one(tmp_path):
    whole = trained(tmp_path / "whole", objective="rloo")
    parts = trained(tmp_path / "parts", objective="rloo", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for trainer in (whole, parts):
        trainer.train()
    torch.testing.assert_close(parameters_of(parts), parameters_of(whole), rtol=0.0, atol=1e-12)
    assert logs_of(parts, "loss") == pytest.approx(logs_of(whole, "loss"), rel=1e-10)
    for name in ("nll", "reward", "reward_std", "thought_entropy"):
        assert logs_of(parts, name) == pytest.approx(logs_of(whole, name), rel=1e-5), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_takes_steps_and_moves_the_reasoner(tmp_path, objective):
    trainer = trained(tmp_path, objective=objective)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert all(math.isfinite(value) for value in logs_of(trainer, "loss"))
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, start[name])}
    assert {"latent_head.weight", "start", "cores.C.decoder.cells.0.weight_hh"} <= moved
    assert "cores.A.decoder.embed_tokens.weight" in moved
    if objective == "surrogate":
        assert logs_of(trainer, "surrogate/trusted") == [0.0, 1.0, 1.0], "whatever the gate, not before it has learned"


def test_a_search_is_for_the_reward_that_is_learned(tmp_path):
    """With the prediction's entropy in it, at a weight that makes it all that counts."""
    settings = {"num_rounds": 4, "num_samples": 30, "num_elites": 1}
    trainer = trained(tmp_path, objective="cem", objective_settings=settings, beta=1000.0)
    batch = trainer.batch([trainer.train_dataset[0]])
    output = trainer.passed(trainer.model, batch, 0)
    with torch.no_grad():
        found = trainer._elite_log_probs(trainer.model, output, batch)
        every = torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(1, 6, -1, -1)
        all_thoughts = trainer.model(batch.ids, batch.mask, values=every)
        talk = all_thoughts.talk_log_probs
        best = -(talk.exp() * talk).sum(-1)
        expected = all_thoughts.thought_log_probs.gather(-1, best.argmax(-1, keepdim=True))
    torch.testing.assert_close(found[:, :-1], expected[:, :-1])


@pytest.mark.parametrize(
    "settings", [{"objective": "nca"}, {"objective": "partition", "objective_settings": {"log_z": "importance"}}]
)
def test_objectives_with_a_reference_learn_from_its_thoughts(tmp_path, settings):
    """Of the model as it began, whatever the policy has become: their values, and both log-probabilities by hand."""
    trainer = trained(tmp_path, num_thoughts=4, beta_2=0.7, **settings)
    start = reasoner()
    with torch.no_grad():
        trainer.model.latent_head.weight.add_(1.0)
        trainer.model.start.neg_()
    rows = [trainer.train_dataset[index] for index in (3, 1)]
    batch = trainer.batch(rows)
    key = {"seed": sequence_seed(trainer.args.seed, 5), "row_ids": [3, 1], "num_thoughts": 4}
    output = trainer.passed(trainer.model, batch, 5)
    theirs = start(batch.ids, batch.mask, **key)
    assert torch.equal(output.thought_values, theirs.thought_values)
    assert not torch.allclose(output.thought_log_probs, theirs.thought_log_probs, atol=0.1)
    extras = trainer.extras(output, batch)
    torch.testing.assert_close(extras.log_prior, theirs.thought_log_probs)
    torch.testing.assert_close(extras.log_proposal, theirs.thought_log_probs)
    found = latent_loss(output, trainer.objective, extras)
    rewards, own, of_start = (
        each[output.is_target].detach()
        for each in (output.rewards, output.thought_log_probs, theirs.thought_log_probs)
    )
    ratio, scaled = own - of_start, rewards / 0.7
    if settings["objective"] == "nca":
        terms = scaled.softmax(-1) * ratio.sigmoid().log() + (-ratio).sigmoid().log() / 4
        expected = -terms.sum(-1)
    else:
        log_z = scaled.exp().mean(-1).log()
        expected = (ratio + log_z[:, None] - scaled).square().mean(-1)
    assert found.policy.item() == pytest.approx(expected.mean().item(), rel=1e-9)
    assert found.talk.item() == pytest.approx((ratio.softmax(-1) * rewards).sum(-1).mean().item(), rel=1e-9)
    own_thoughts = trainer.model(batch.ids, batch.mask, **{**key, "seed": sequence_seed(trainer.args.seed, -1)})
    evaluated = trainer.passed(trainer.model, batch, -1)
    assert torch.equal(evaluated.thought_values, own_thoughts.thought_values), "an evaluation is of the policy's own"


@pytest.mark.parametrize("objective", ["reinforce", "cem", "reparameterised"])
def test_policy_weight_zero_leaves_thoughts_as_they_were(tmp_path, objective):
    trainer = trained(tmp_path, objective=objective, policy_weight=0.0)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, start[name])}
    assert not [name for name in moved if name.startswith(("latent_head", "start", "cores.B", "cores.C"))]
    assert {"cores.A.decoder.cells.0.weight_hh", "cores.D.decoder.cells.0.weight_hh"} <= moved


@pytest.mark.parametrize(("groups", "same"), [("ABCD", True), ("AAAA", False)])
def test_with_adam_the_policys_weight_acts_on_predictions_where_they_share_weights(tmp_path, groups, same):
    """What `sweeps/reasoner-policy-weight` rests on; without clipping, which would pass the weight on by the norm."""
    found = []
    for weight in (1.0, 1e4):
        adam = {"optim": "adamw_torch", "learning_rate": 0.01}
        trainer = trained(tmp_path, weight_groups=groups, policy_weight=weight, **adam)
        start = trainer.model.cores["A"].decoder.cells[0].weight_hh.detach().clone()
        trainer.train()
        found.append(trainer.model.cores["A"].decoder.cells[0].weight_hh.detach() - start)
    apart = ((found[1] - found[0]).norm() / found[0].norm()).item()
    assert apart < 0.02 if same else apart > 0.5


SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 4}


@pytest.mark.parametrize("objective", ["reinforce", "surrogate", "nca", "partition", "trice", "cem"])
def test_a_run_goes_on_exactly(tmp_path, objective):
    """In float32, as users train; whatever model the second trainer is made with."""
    settings = {"objective_settings": {"log_z": "importance"}} if objective == "partition" else {}
    settings |= {"objective": objective, **SAVING}
    whole = trained(tmp_path / "whole", float32=True, **settings)
    whole.train()
    again = trained(tmp_path / "whole", reasoner(seed=1).float(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert numbers_of(again) == numbers_of(whole)
    torch.testing.assert_close(parameters_of(again), parameters_of(whole), rtol=0.0, atol=0.0)
    if objective == "surrogate":
        for name, value in whole.surrogate.surrogate.state_dict().items():
            assert torch.equal(value, again.surrogate.surrogate.state_dict()[name]), name


def test_a_reference_is_not_made_up_where_a_run_goes_on(tmp_path):
    trained(tmp_path, **SAVING).train()
    with pytest.raises(ValueError, match=r"checkpoint-4 has no reference\.pt, the model that its run began with"):
        trained(tmp_path, objective="nca", **{**SAVING, "max_steps": 6}).train(resume_from_checkpoint=True)
    trainer = trained(tmp_path / "nca", objective="nca", **SAVING)
    trainer.train()
    path = tmp_path / "nca" / "checkpoint-4" / "reference.pt"
    state = torch.load(path, weights_only=True)
    del state["start"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"is of another kind of model: \['start'\] are in one of the two"):
        trainer._load_optimizer_and_scheduler(str(path.parent))


def test_an_evaluation_is_of_tokens_and_averages_thoughts_in_probability(tmp_path):
    rows = texts(5, seed=2, length=None)
    trainer = trained(tmp_path, evaluation=rows, num_eval_thoughts=5)
    found = trainer.evaluate()
    sums, count = dict.fromkeys(("nll", "base_nll", "interpreter_nll", "mixing"), 0.0), 0
    for index, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        seed = sequence_seed(trainer.args.seed, -1)
        output = reasoner()(ids, num_thoughts=5, seed=seed, row_ids=[index])
        for position, token in enumerate(row["input_ids"][1:]):
            sums["nll"] -= output.talk_log_probs[0, position, :, token].exp().mean().log().item()
            sums["interpreter_nll"] -= output.interpreter_log_probs[0, position, :, token].exp().mean().log().item()
            sums["base_nll"] -= output.base_log_probs[0, position, token].item()
            sums["mixing"] += output.mixing[0, position].mean().item()
            count += 1
    assert {name: found[f"eval_{name}"] for name in sums} == pytest.approx(
        {name: value / count for name, value in sums.items()}, rel=1e-9
    )
    assert found["eval_gain"] == pytest.approx(found["eval_base_nll"] - found["eval_nll"])
    assert trainer.evaluate()["eval_nll"] == found["eval_nll"]
    parameters = dict(trainer.model.named_parameters())
    assert found["eval_num_parameters"] == sum(value.numel() for value in parameters.values())
    assert found["eval_num_core_parameters"] == sum(
        value.numel() for name, value in parameters.items() if "embed_tokens" not in name
    )


def test_texts_of_which_nothing_counts_cannot_be_measured(tmp_path):
    nothing = texts(3).add_column("completion_mask", [[1, 0, 0, 0, 0, 0]] * 3)
    with pytest.raises(ValueError, match=r"none of the 3 texts of eval_dataset has a token that counts"):
        trained(tmp_path, evaluation=nothing).evaluate()


def test_settings_of_a_latent_reach_the_model(tmp_path):
    args = ReasonerTrainingConfig(
        str(tmp_path), report_to=[], use_cpu=True, latent_kind="gaussian", min_log_sigma=-1.5, max_log_sigma=0.5
    )
    assert ReasonerForCausalLM(args.model_config(V)).latent.bounds == (-1.5, 0.5)


def test_shared_weights_are_counted_once_and_at_the_start_of_the_log(tmp_path):
    whole, shared = (trained(tmp_path, weight_groups=groups, max_steps=1) for groups in ("ABCD", "AAAA"))
    for trainer in (whole, shared):
        trainer.train()
    counts = [logs_of(trainer, "num_parameters")[0] for trainer in (whole, shared)]
    core = sum(value.numel() for name, value in whole.model.named_parameters() if name.startswith("cores.A"))
    assert counts[0] - counts[1] == 3 * core - V * whole.model.config.reasoner_size  # a reasoner alone reads no text


@pytest.mark.parametrize(
    ("settings", "absent"),
    [
        ({"use_base_lm": False}, {"eval_base_nll", "eval_mixing", "eval_gain"}),
        ({"use_reasoner": False}, {"eval_thought_entropy"}),
        ({"use_reasoner": False, "use_base_lm": False}, {"eval_thought_entropy", "eval_base_nll"}),
        ({"n_thought": 0}, set()),
    ],
)
def test_models_without_a_part_train_and_say_nothing_of_it(tmp_path, settings, absent):
    trainer = trained(tmp_path, **settings)
    trainer.train()
    found = trainer.evaluate()
    assert not absent & found.keys()
    assert found["eval_nll"] < trained(tmp_path, **settings).evaluate()["eval_nll"]


@pytest.mark.parametrize(("beta", "divergence"), [(None, "reverse"), (0.0, "reverse"), (None, "forward")])
def test_a_proxy_takes_the_place_of_the_data(tmp_path, beta, divergence):
    """The reward is −KL(π‖D) by default, E log D with β = 0, and −KL(D‖π) forward."""
    llama().float().save_pretrained(tmp_path / "proxy")
    word_tokenizer().save_pretrained(tmp_path / "proxy")
    trainer = trained(
        tmp_path / "run", tokenizer=word_tokenizer(), reward_from="proxy", proxy_model=str(tmp_path / "proxy"),
        beta=beta, proxy_divergence=divergence, max_steps=1,
    )  # fmt: skip
    rows = [trainer.train_dataset[index] for index in range(8)]
    ids = torch.tensor([row["input_ids"] for row in rows])
    output = reasoner()(ids, num_thoughts=3, seed=sequence_seed(trainer.args.seed, 0), row_ids=list(range(8)))
    proxy = AutoModelForCausalLM.from_pretrained(tmp_path / "proxy")(ids).logits.log_softmax(-1).double()
    talk = output.talk_log_probs[:, :-1]
    of_proxy = proxy[:, :-1, None]
    if divergence == "forward":
        value = (of_proxy.exp() * (talk - of_proxy)).sum(-1).mean().item()
    else:
        value = (talk.exp() * (of_proxy - (talk if beta is None else 0.0))).sum(-1).mean().item()
    trainer.compute_loss(trainer.model, rows)
    assert trainer._metrics.drained(1, "update")["reward"] == pytest.approx(value, rel=1e-5)


def test_a_saved_model_loads_by_auto_classes_and_goes_on(tmp_path):
    trainer = trained(tmp_path / "run", float32=True, tokenizer=word_tokenizer(), max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    again = trained(tmp_path / "again", model=loaded, tokenizer=word_tokenizer())
    assert again.evaluate()["eval_nll"] == pytest.approx(trainer.evaluate()["eval_nll"], abs=1e-6)
    by_name = trained(tmp_path / "again", model=str(tmp_path / "run"), max_steps=1)
    by_name.train()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "This model was trained from scratch with softrl" in card
    assert "latent-reasoner" in card
    assert "None" not in card
    code = card.split("```python\n")[1].split("```")[0].replace('"run"', repr(str(tmp_path / "run")))
    exec(code.replace("To be", "w3 w4"), {})  # the quick start runs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "best"}, "objective must be one of reinforce, "),
        ({"num_thoughts": 0}, "num_thoughts must be at least 1, got 0"),
        ({"block_length_tokens": 1}, "block_length_tokens must leave a token to predict, so be at least 2, got 1"),
        ({"reward_from": "proxy"}, "pass both reward_from='proxy' and its folder, or neither"),
        ({"proxy_model": "x"}, "pass both reward_from='proxy' and its folder, or neither"),
        ({"objective": "reparameterised", "policy_weight": 3.0}, "policy_weight must be 0 or 1"),
        ({"objective": "cem", "objective_settings": {"rounds": 2}}, r"'cem' takes the settings \['num_elites'"),
        ({"objective": "cem", "beta_2": 0.1}, "a search finds the thoughts to learn from"),
        ({"proxy_divergence": "forward"}, "says how a proxy scores, and there is none"),
        ({"objective": "cem", "reward_from": "proxy", "proxy_model": "x"}, "use reward_from='data'"),
        ({"weight_groups": "ABC"}, "weight_groups must have one letter for each of base_lm"),
        ({"weight_groups": "AAAA", "reasoner_size": 16}, "make the sizes equal, or give these modules different"),
        ({"gradient_checkpointing": True}, "transformers then drops the keys that thoughts share"),
        ({"beta_2": -1.0}, "beta_2 must be 0 or more, got -1.0"),
        ({"objective": "rloo", "objective_settings": {"top": 2}}, "rloo takes the settings"),
        (
            {"objective": "listwise", "beta_2": 0.3, "objective_settings": {"beta": 0.5}},
            "both say the temperature of objective='listwise'; leave one of them out",
        ),
    ],
)
def test_configurations_that_mean_nothing_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ReasonerTrainingConfig(str(tmp_path), report_to=[], use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "rloo", "num_thoughts": 1}, "num_thoughts must be at least 2, got 1"),
        ({"objective": "reparameterised", "latent_kind": "discrete"}, "latent_kind is 'discrete'"),
        ({"latent_kind": "soft"}, "set latent_noise, or use objective='reparameterised'"),
        ({"objective": "cem", "latent_kind": "soft"}, "searches for discrete or Gaussian latents"),
        ({"objective": "partition_learned", "model": reasoner()}, "needs a model with a head for log Z"),
        ({"model": llama()}, "model must be a ReasonerForCausalLM or the folder of one, got a LlamaForCausalLM"),
        ({"reward_from": "proxy", "proxy_model": "/nowhere"}, "proxy_model='/nowhere' cannot be loaded"),
    ],
)
def test_models_that_cannot_learn_so_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, **settings)


def test_temperatures_of_sets_are_beta_2(tmp_path):
    def made(**settings):
        return ReasonerTrainingConfig(str(tmp_path), report_to=[], use_cpu=True, **settings).make_objective()

    assert made(objective="listwise", beta_2=0.3).rule.beta == 0.3
    assert made(objective="listwise", beta_2=0.3).beta_2 == 0.0
    assert made(objective="rloo", beta_2=0.3).beta_2 == 0.3
    assert made(objective="plackett_luce", beta_2=0.3).beta_2 == 0.3
