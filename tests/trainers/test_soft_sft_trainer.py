"""SoftSFTTrainer: with guidance of one it is TRL's SFTTrainer; without, its loss is that of the naive loop."""

import math

import pytest
import torch
from helpers import llama
from peft import LoraConfig
from trainers.soft_sft import SETTINGS, soft_sft, texts
from trainers.tiny import CHAT_TEMPLATE, logs_of, numbers_of, parameters_of, word_tokenizer
from trl import SFTConfig, SFTTrainer

from softrl.estimators.supervised import plain_pass
from softrl.generation.soft_settings import load_soft_decoding
from softrl.objectives.token_terms import DirectTerms
from softrl.tokens.truncation import Truncation
from softrl.trainers import SoftSFTConfig

pytestmark = pytest.mark.slow  # imports trl

KINDS = ("text", "prompt", "messages", "conversation", "ids")


def theirs(folder, train, **settings):
    args = SFTConfig(str(folder / "theirs"), **{**SETTINGS, **settings})
    return SFTTrainer(llama(), args, train_dataset=train, processing_class=word_tokenizer(CHAT_TEMPLATE))


def loss_and_gradient(trainer, batch, **more):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), **more)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


PARITY = [(kind, None) for kind in KINDS] + [("prompt", False), ("conversation", False), ("ids", True)]


@pytest.mark.parametrize(("kind", "completion_only"), PARITY)
def test_guidance_of_one_has_trl_s_loss_and_gradient(tmp_path, kind, completion_only):
    settings = {"completion_only_loss": completion_only}
    ours = soft_sft(tmp_path, train=texts(kind=kind), guidance_alpha=1.0, **settings)
    other = theirs(tmp_path, texts(kind=kind), **settings)
    batch = next(iter(ours.get_train_dataloader()))
    their_batch = next(iter(other.get_train_dataloader()))
    assert batch.keys() - their_batch.keys() == {"text_index"}
    assert all(torch.equal(batch[name], their_batch[name]) for name in their_batch)
    assert not batch["attention_mask"].all()  # rows of different lengths
    for more in ({}, {"num_items_in_batch": torch.tensor(11)}):
        (loss, gradient), (wanted, expected) = (loss_and_gradient(each, batch, **more) for each in (ours, other))
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert ((gradient - expected).norm() / expected.norm()).item() < 1e-5
    # The mean is over the tokens that count: over all places it would be another.
    counted = (batch["labels"][:, 1:] != -100).sum().item()
    assert counted < batch["labels"][:, 1:].numel()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["text", "prompt"])
def test_guidance_of_one_takes_trl_s_steps(tmp_path, kind, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    ours = soft_sft(tmp_path, train=texts(kind=kind), guidance_alpha=1.0, max_grad_norm=1.0, **settings)
    other = theirs(tmp_path, texts(kind=kind), max_grad_norm=1.0, **settings)
    for trainer in (ours, other):
        trainer.train()
    assert logs_of(ours, "loss") == pytest.approx(logs_of(other, "loss"), rel=1e-5)
    assert logs_of(ours, "entropy") == pytest.approx(logs_of(other, "entropy"), rel=1e-4)
    assert logs_of(ours, "num_tokens") == logs_of(other, "num_tokens")
    torch.testing.assert_close(parameters_of(ours), parameters_of(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"hops": 0},
        {"cotangent_method": "sequential"},
        {"cotangent_method": "parallel", "relaxation": "gumbel_softmax", "guidance": "floor"},
        {"cotangent_method": "parallel", "gradient_checkpointing": True, "max_entropy_nats": 0.9},
        {"cotangent_method": "blocked", "block_length": 2, "relaxation": "st_gumbel", "entropy_penalty": 0.1},
        {"true_token_probability": 0.5, "hops": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_method_trains_and_parts_of_a_step_are_the_step(tmp_path, settings):
    whole = soft_sft(tmp_path / "whole", **settings)
    parts = soft_sft(tmp_path / "parts", gradient_accumulation_steps=2, per_device_train_batch_size=2, **settings)
    start = parameters_of(whole).clone()
    for trainer in (whole, parts):
        trainer.train()
    assert logs_of(parts, "loss") == pytest.approx(logs_of(whole, "loss"), rel=1e-6)
    torch.testing.assert_close(parameters_of(parts), parameters_of(whole), rtol=1e-6, atol=1e-6)
    assert (parameters_of(whole) - start).norm() > 1e-3
    logged = numbers_of(whole)[0]
    penalty = settings.get("entropy_penalty", 0.0)
    assert logged["loss"] == pytest.approx(logged["guided_nll"] + penalty * logged["entropy"], rel=1e-5)
    assert {"guidance_alpha", "fed_entropy", "true_tokens", "num_tokens"} <= logged.keys()
    assert ("adjoint/norm" in logged) == (settings.get("hops") != 0)
    assert logged["rollout/replay_error"] < 1e-6 if "adjoint/norm" in logged else True


def test_the_full_gradient_differs_from_the_detached_one_and_they_meet_at_one(tmp_path):
    found = {}
    for name, settings in {"full": {}, "detached": {"hops": 0}}.items():
        for alpha in (0.2, 0.999):
            trainer = soft_sft(tmp_path, guidance_alpha=alpha, **settings)
            batch = next(iter(trainer.get_train_dataloader()))
            found[name, alpha] = loss_and_gradient(trainer, batch)[1]

    def apart(alpha):
        difference = found["full", alpha] - found["detached", alpha]
        return (difference.norm() / found["full", alpha].norm()).item()

    assert apart(0.2) > 0.05
    assert apart(0.999) < 1e-2


def test_guidance_follows_its_schedule_and_epochs(tmp_path):
    trainer = soft_sft(tmp_path, guidance_alpha="linear:1.0->0.0@2", max_steps=4)
    trainer.train()
    assert logs_of(trainer, "guidance_alpha") == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert len(logs_of(trainer, "fed_entropy")) == 3  # nothing is rolled out at 1
    by_epoch = soft_sft(tmp_path, guidance_alpha="epochs:1.0,0.5", hops=0, max_steps=4)  # two steps an epoch
    by_epoch.train()
    assert logs_of(by_epoch, "guidance_alpha") == [1.0, 1.0, 0.5, 0.5]
    coins = soft_sft(tmp_path, true_token_probability="linear:1.0->0.0@2", hops=0)
    coins.train()
    assert logs_of(coins, "true_token_probability") == [1.0, 0.5, 0.0]
    shares = logs_of(coins, "true_tokens")
    assert 0.2 < shares[0] < 0.8
    assert shares[1] == 0.0


def test_evaluation_measures_both_likelihoods_with_the_same_noise_every_time(tmp_path):
    trainer = soft_sft(tmp_path, relaxation="gumbel_softmax")
    first, second = trainer.evaluate(), trainer.evaluate()
    same = {key for key in first if not key.endswith(("runtime", "per_second"))}
    assert {key: first[key] for key in same} == {key: second[key] for key in same}
    assert first["eval_loss"] == first["eval_hard_nll"]
    assert first["eval_nll_gap"] == pytest.approx(first["eval_soft_nll"] - first["eval_hard_nll"])
    total = count = 0
    for batch in trainer.get_eval_dataloader():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        count += (labels != -100).sum().item()
    assert first["eval_hard_nll"] == pytest.approx(total / count, rel=1e-6)
    one = soft_sft(tmp_path, top_k=1, min_p=0.0).evaluate()  # greedy: nothing but single tokens is fed
    assert one["eval_fed_entropy"] == 0.0
    assert first["eval_fed_entropy"] > 0.1
    assert trainer.evaluate(texts(2, "prompt", seed=40))["eval_soft_nll"] > 0.0  # prepared as at the start


def test_evaluation_of_several_sets_by_name(tmp_path):
    trainer = soft_sft(tmp_path, evaluation={"a": texts(2, seed=20), "b": texts(2, "messages", seed=20)})
    metrics = trainer.evaluate()
    assert {"eval_a_soft_nll", "eval_b_soft_nll"} <= metrics.keys()


@pytest.mark.parametrize("settings", [{"hops": 0}, {"relaxation": "gumbel_softmax"}], ids=["detached", "full"])
def test_a_resumed_run_takes_the_same_steps(tmp_path, settings):
    more = {"max_steps": 4, "guidance_alpha": "linear:1.0->0.0", "save_strategy": "steps", "save_steps": 2, **settings}
    whole = soft_sft(tmp_path / "whole", **more)
    whole.train()
    resumed = soft_sft(tmp_path / "whole", **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert numbers_of(resumed)[-2:] == numbers_of(whole)[-2:]
    torch.testing.assert_close(parameters_of(resumed), parameters_of(whole), rtol=0.0, atol=1e-12)


def test_partial_freezing_and_adapters(tmp_path):
    trainer = soft_sft(tmp_path, freeze_embeddings=True, freeze_layers=1, model=llama(tied=False))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert not any("embed_tokens" in name or "layers.0." in name for name in moved)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian")
    adapted = soft_sft(tmp_path, peft_config=lora, freeze_layers=1)
    adapted.train()
    assert all(
        "layers.1" in name and "lora" in name for name, p in adapted.model.named_parameters() if p.requires_grad
    )
    assert logs_of(adapted, "loss")[-1] < logs_of(adapted, "loss")[0]


@pytest.mark.parametrize("hops", [0, None], ids=["detached", "full"])
def test_it_learns_to_predict_behind_its_own_soft_tokens(tmp_path, hops):
    trainer = soft_sft(
        tmp_path, train=texts(4), evaluation=texts(4), guidance_alpha="linear:1.0->0.0@15", hops=hops, max_steps=30,
        optim="adamw_torch", learning_rate=0.02, max_grad_norm=1.0,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_soft_nll"] < 0.5 * before["eval_soft_nll"]


def test_a_step_of_gradients_that_are_not_numbers_is_not_taken(tmp_path):
    trainer = soft_sft(tmp_path, max_skipped_steps=1)
    whole = trainer.compute_loss
    trainer.compute_loss = lambda *inputs, **more: whole(*inputs, **more) * torch.nan
    start = parameters_of(trainer).clone()
    with pytest.raises(FloatingPointError, match="steps in a row"):
        trainer.train()
    assert torch.equal(parameters_of(trainer), start)


def test_dropout_is_off_so_that_phases_agree(tmp_path):
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = soft_sft(tmp_path, model=model)
    trainer.train()
    assert max(logs_of(trainer, "rollout/replay_error")) < 1e-6


def test_a_saved_model_goes_on_in_reinforcement_by_one_line(tmp_path):
    from helpers import PairReward
    from trainers.tiny import make

    trainer = soft_sft(tmp_path / "sft", model=llama().float())
    trainer.train()
    trainer.save_model()
    saved = {name: p.detach() for name, p in trainer.model.named_parameters()}
    for method, settings in {
        "SoftRollout": {},
        "Reinforce": {"num_generations": 2},
        "PPO": {"num_generations": 2},
    }.items():
        again = make(
            tmp_path / method, None, str(tmp_path / "sft"), PairReward(), method=method, max_steps=1, **settings
        )
        start = {name.removeprefix("policy."): p for name, p in again.model.named_parameters()}
        assert all(torch.equal(start[name], value) for name, value in saved.items() if name in start)
        assert saved.keys() & start.keys()
        again.train()
        assert math.isfinite(logs_of(again, "loss")[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_alpha": 1.5}, r"guidance_alpha must lie in \[0, 1\], got 1.5"),
        ({"guidance_alpha": "linear:1.0"}, "guidance_alpha='linear:1.0'"),
        ({"guidance_alpha": "epochs:1.0,0.2,0.6"}, "must rise or fall throughout"),
        ({"top_k": "epochs:4,2"}, "top_k='epochs:4,2'"),
        ({"true_token_probability": -0.1}, r"true_token_probability must lie in \[0, 1\]"),
        ({"entropy_penalty": -1.0}, "entropy_penalty must not be negative"),
        ({"guidance": "clamp"}, "guidance must be one of"),
        ({"packing": True}, "packing=True does not go with soft tokens"),
        ({"loss_type": "dft"}, "loss_type='dft' does not go with soft tokens"),
        ({"hops": 2, "cotangent_method": "sequential"}, "hops=2 with method='sequential'"),
        ({"freeze_layers": -1}, "freeze_layers must be at least 0"),
        ({"max_entropy_nats": 5.0}, "max_entropy_nats must lie in"),
    ],
)
def test_what_cannot_be_is_named_before_a_model_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        SoftSFTConfig("nowhere", **{**SETTINGS, **settings})


def test_streams_and_too_many_kept_ids_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"train_dataset must be a datasets.Dataset, got IterableDataset"):
        soft_sft(tmp_path, train=texts().to_iterable_dataset())
    with pytest.raises(ValueError, match="top_k=99 is larger than the vocabulary"):
        soft_sft(tmp_path, top_k=99)


def test_with_the_model_goes_how_it_is_to_be_decoded(tmp_path):
    trainer = soft_sft(
        tmp_path, relaxation="gumbel_softmax", top_k="linear:9->5", norm_correction="match",
        save_strategy="steps", save_steps=3,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        loaded = load_soft_decoding(folder)
        relaxation = loaded.thinking.relaxation
        assert relaxation.name == "gumbel_softmax"
        assert relaxation.truncation == Truncation(6, min_p=0.02)  # of the last of three steps
        assert loaded.norm_correction == "match"


def test_guidance_of_one_needs_no_rollout(tmp_path):
    trainer = soft_sft(tmp_path, guidance_alpha=1.0)
    batch = next(iter(trainer.get_train_dataloader()))
    cut = trainer._texts(batch)
    assert trainer.rollout(cut, batch["text_index"]) is None
    assert plain_pass(trainer.policy, cut, DirectTerms(target_weight=1.0)).value.isfinite().all()
