"""QuietSTaRTrainer: every way to learn trains, curricula, where to think, and evaluations against a loop."""

import math

import pytest
import torch
from datasets import Dataset
from generation.thinkers import thinker
from peft import LoraConfig
from trainers.quietstar import quietstar, texts
from trainers.tiny import logs_of, parameters_of

from softrl.estimators.thought_rules import THOUGHT_RULES

pytestmark = pytest.mark.slow  # imports trl

WAYS = {
    **{rule: {"estimator": rule} for rule in THOUGHT_RULES},
    "soft": {"estimator": "soft"},
    "soft, softmax": {"estimator": "soft", "relaxation": "softmax", "max_entropy_nats": 1.0},
    "soft, reinmax, one hop": {"estimator": "soft", "relaxation": "reinmax", "hops": 1, "adjoint_clip": 1.0},
    "positive only": {"estimator_settings": {"positive_only": True}},
    "one thought": {"num_thoughts": 1, "estimator_settings": {"baseline": "batch"}},
    "entropy": {"entropy_weight": 0.1},
    "log_probs": {"mixing": "log_probs"},
    "residual": {"residual_mixing": True, "sigmoid_mixing": False},
    "cooler": {"temperature": 0.7, "thinking_learning_rate": 0.2, "mixing_learning_rate": 0.1},
    "prior": {"estimator": "self_normalized", "proposal": "prior"},
    "mixture": {"estimator": "reinforce", "estimator_settings": {"baseline": "batch"}, "proposal": "mixture"},
    "relative": {"estimator": "dpo", "relative_to_prior": True},
    "surrogate": {"reward_surrogate": True, "surrogate_spread": 100.0},
    "soft, surrogate": {"estimator": "soft", "reward_surrogate": True, "surrogate_spread": 100.0},
    "random": {"thoughts": "random"},
    "pause": {"thoughts": "pause"},
    "none": {"thoughts": "none"},
    "policy weight 0": {"policy_weight": 0.0},
    "no length": {"n_thought": 0},
    "no length, soft": {"n_thought": 0, "estimator": "soft"},
    "by entropy": {"think_at": "entropy", "think_count": 2},
    "given": {"think_at": "given"},
    "every third": {"think_every": 3},
    "dense": {"branch_attention": "dense"},
    "naive": {"branch_attention": "naive", "think_every": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains(tmp_path, way):
    trainer = quietstar(tmp_path, **WAYS[way])
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    still = {"pause", "start", "end"} | {name for name in before if name.startswith(("mixing", "log_z"))}
    if trainer.args.thinks:
        still = {name for name in before if name.startswith("log_z")} if way != "partition_learned" else set()
        still |= set() if way == "pause" else {"pause"}
    assert moved == before.keys() - still


def test_thoughts_get_shorter_over_a_run_and_may_end(tmp_path):
    trainer = quietstar(tmp_path, n_thought="linear:2->0", max_steps=5)
    lengths, think = [], trainer._think
    trainer._think = lambda *given: lengths.append(think(*given).length) or think(*given)
    trainer.train()
    assert lengths[0] == 2
    assert lengths[-1] == 0
    assert sorted(lengths, reverse=True) == lengths
    assert logs_of(trainer, "n_thought") == lengths
    assert trainer.model.thinking.n_thought == 0  # and so it is saved


def test_parts_of_a_step_add_up(tmp_path):
    """In float64, on texts of one length: a loss is a mean over a micro-batch."""
    for settings in ({}, {"estimator": "soft"}, {"estimator": "rloo", "think_every": 2}):
        found = []
        for size, parts in ((8, 1), (4, 2), (2, 4)):
            trainer = quietstar(
                tmp_path, thinker("gpt2", n_thought=2), texts(8, length=6), per_device_train_batch_size=size,
                gradient_accumulation_steps=parts, **settings,
            )  # fmt: skip
            trainer.train()
            found.append((parameters_of(trainer), logs_of(trainer, "loss"), logs_of(trainer, "nll")))
        for parameters, *numbers in found[1:]:
            torch.testing.assert_close(parameters, found[0][0], rtol=0.0, atol=1e-10)
            assert numbers == [pytest.approx(each, abs=1e-6) for each in found[0][1:]]


@pytest.mark.parametrize("build", ["gpt2", "mamba"])
@pytest.mark.parametrize("settings", [{}, {"think_every": 2}, {"think_at": "given"}, {"thoughts": "none"}])
def test_an_evaluation_is_what_a_loop_finds(tmp_path, build, settings):
    """Plain calls of the LM on the thoughts that it reports; naive branches where the architecture needs them."""
    attention = "naive" if build == "mamba" else "shared"
    trainer = quietstar(tmp_path, thinker(build, n_thought=2), branch_attention=attention, **settings)
    metrics = trainer.evaluate()
    model, rows = trainer.model, texts(3, seed=1)
    embedding, head = model.lm.get_input_embeddings(), model.lm.get_output_embeddings()

    def hidden(embeds):
        return model.lm.base_model(inputs_embeds=embeds[None]).last_hidden_state[0]

    base, mixed, weights, hits = [], [], [], []
    with torch.no_grad():
        for sample, row in zip(trainer.last_evaluation, rows, strict=True):
            ids = torch.tensor(row["input_ids"])
            step = settings.get("think_every", 1)
            expected = list(range(0, len(ids) - 1, step)) if settings.get("think_at") != "given" else row["anchors"]
            assert sample.slots == expected
            of_text = hidden(embedding(ids))
            for slot, thought in zip(sample.slots, sample.thoughts, strict=True):
                log_probs = head(of_text[slot]).log_softmax(-1)
                base.append(-log_probs[ids[slot + 1]].item())
                weight = 0.0
                if trainer.args.thinks:
                    parts = [embedding(ids[: slot + 1]), model.start[None], embedding(torch.tensor(thought))]
                    after = hidden(torch.cat([*parts, model.end[None]]))[-1]
                    weight = model.mixing(of_text[slot][None], after[None])[0]
                    log_probs = head((1 - weight) * of_text[slot] + weight * after).log_softmax(-1)
                mixed.append(-log_probs[ids[slot + 1]].item())
                weights.append(float(weight))
                hits.append(float(log_probs.argmax() == ids[slot + 1]))
    for name, values in (("nll", mixed), ("base_nll", base), ("mixing", weights), ("accuracy", hits)):
        assert metrics[f"eval_{name}"] == pytest.approx(sum(values) / len(values), abs=2e-6), name
    assert metrics["eval_gain"] == pytest.approx((sum(base) - sum(mixed)) / len(base), abs=2e-6)
    assert metrics["eval_marginal_nll"] == pytest.approx(metrics["eval_nll"], abs=1e-6)  # of one thought
    middle = sorted(base)[(len(base) - 1) // 2]
    hard = [each for each, other in zip(mixed, base, strict=True) if other > middle]
    assert metrics["eval_nll_hard"] == pytest.approx(sum(hard) / len(hard), abs=2e-6)


def test_an_evaluation_is_the_same_every_time_and_marginals_are_tighter(tmp_path):
    trainer = quietstar(tmp_path, num_eval_thoughts=4)
    first, again = ({k: v for k, v in trainer.evaluate().items() if "per_second" not in k and "runtime" not in k}
                    for _ in range(2))  # fmt: skip
    assert first == again
    assert first["eval_marginal_nll"] < first["eval_nll"]


def test_it_thinks_where_the_model_is_least_sure(tmp_path):
    trainer = quietstar(tmp_path, think_at="entropy", think_count=2)
    rows = trainer.get_eval_dataloader().dataset
    trainer.evaluate()
    for sample, row in zip(trainer.last_evaluation, rows, strict=True):
        with torch.no_grad():
            log_probs = trainer.model.lm(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        spread = -(log_probs.exp() * log_probs).sum(-1)
        assert sorted(sample.slots) == sorted(spread.topk(2).indices.tolist())


def config_of(tmp_path, **settings):
    from softrl.trainers import QuietSTaRConfig

    return QuietSTaRConfig(str(tmp_path), report_to=[], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator_settings": {"positive": True}}, "reinforce takes the settings"),
        ({"estimator_settings": {"max_importance": 0.0}}, "max_importance must be positive"),
        ({"estimator": "grpo"}, "estimator must be one of"),
        ({"estimator": "soft", "estimator_settings": {"beta": 1.0}}, "are of sampled ones; leave them out"),
        ({"estimator": "soft", "proposal": "prior"}, "are of sampled ones; leave them out"),
        ({"estimator": "soft", "feedback_discount": -1.0}, "feedback_discount"),
        ({"estimator": "soft", "max_entropy_nats": 9.0}, "max_entropy_nats"),
        ({"proposal": "mixture", "num_thoughts": 3}, "num_thoughts must be even"),
        ({"proposal": "mixture"}, "proposal='mixture' with estimator='reinforce': half of a token's thoughts"),
        ({"proposal": "mixture", "estimator": "rloo"}, "a baseline made of the others differs between the halves"),
        ({"proposal": "mixture", "estimator": "log_mean_exp"}, "or an objective on sets"),
        ({"num_thoughts": 1}, "compares thoughts: num_thoughts must be at least 2, got 1"),
        ({"estimator": "rloo", "num_thoughts": 1, "n_thought": "linear:2->0"}, "num_thoughts must be at least 2"),
        ({"num_thoughts": 0}, "num_thoughts must be at least 1"),
        ({"n_talk": 0}, "n_talk must be at least 1"),
        ({"n_thought": -1}, "n_thought"),
        ({"n_thought": "linear:2"}, "n_thought"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"think_at": "commas"}, "think_at must be one of"),
        ({"think_every": 0}, "think_every must be at least 1"),
        ({"talk_weight": -1.0}, "talk_weight must not be negative"),
        ({"mixing": "both"}, "mixing must be one of"),
        ({"max_length": 1}, "max_length must leave a token"),
        ({"gradient_checkpointing": True}, "drops the keys"),
        ({"reward_surrogate": True, "surrogate_spread": 0.0}, "surrogate_spread must be positive"),
    ],
)
def test_settings_that_cannot_be_are_named_before_a_model_is_loaded(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **settings)


def test_one_thought_is_enough_where_nothing_is_compared(tmp_path):
    for settings in ({"thoughts": "pause"}, {"policy_weight": 0.0}, {"n_thought": 0}, {"thoughts": "none"}):
        config_of(tmp_path, num_thoughts=1, **settings)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "w4"}], {}, "needs at least one row and a column `text` or `input_ids`"),
        ([{"text": "w4 w5"}], {}, "there is no tokenizer; pass processing_class"),
        ([{"input_ids": [4, 5]}, {"input_ids": [4]}], {}, "train_dataset, row 1: a text of 1 tokens"),
        ([{"input_ids": []}], {}, "row 0: a text of 0 tokens"),
        ([{"input_ids": [4, 5, 6]}], {"think_at": "given"}, "has no column 'anchors'"),
        ([{"input_ids": [4, 5, 6], "anchors": [2]}], {"think_at": "given"}, "holds no token of 3 that another one"),
        ([{"input_ids": [4, 5, 6], "anchors": [-1, 1]}], {"think_at": "given"}, "or one below 0"),
        ([{"input_ids": list(range(3, 20)) * 5}], {}, "exceeds the model's context of 64"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        quietstar(tmp_path, thinker("gpt2", n_thought=2), Dataset.from_list(rows), **settings).train()


def test_what_is_no_data_set_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"train_dataset must be a datasets\.Dataset"):
        quietstar(tmp_path, train=[{"input_ids": [4, 5]}])


def test_a_model_that_thinks_already_keeps_to_its_way(tmp_path):
    with pytest.raises(ValueError, match=r"thinks with temperature=0\.5 already, and temperature=1\.0 is asked for"):
        quietstar(tmp_path, thinker(temperature=0.5))
    with pytest.raises(ValueError, match="pass residual_mixing=True"):
        quietstar(tmp_path, thinker(residual=True))
    with pytest.raises(ValueError, match="needs a model with a head for log Z"):
        quietstar(tmp_path, thinker(), estimator="partition_learned")
    with pytest.raises(ValueError, match="model thinks already"):
        quietstar(tmp_path, thinker(), peft_config=LoraConfig(target_modules="all-linear"))
    assert quietstar(tmp_path, thinker(n_thought=3)).args.n_thought == 2  # its length may change


def test_the_mixing_head_and_the_learned_embeddings_have_rates_of_their_own(tmp_path):
    trainer = quietstar(tmp_path, learning_rate=0.01, thinking_learning_rate=0.2, mixing_learning_rate=0.1)
    groups = trainer.create_optimizer().param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(trainer.model.parameters()))
    model = trainer.model
    for expected, parameters in (
        (0.01, model.lm.parameters()),
        (0.1, model.mixing.parameters()),
        (0.2, [model.start, model.end, model.pause]),
    ):
        assert {rates[id(parameter)] for parameter in parameters} == {expected}
