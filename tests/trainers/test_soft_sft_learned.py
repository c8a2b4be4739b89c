"""SoftSFTTrainer with learned settings: their gradient, their updates, and what is saved and gone on from."""

import json

import pytest
import torch
from engines.ranks import outcomes
from helpers import llama, with_float64_norms
from peft import LoraConfig
from trainers.soft_sft import SETTINGS, soft_sft, texts
from trainers.test_engines import TOLERANCE, difference, logged
from trainers.tiny import logs_of, numbers_of, parameters_of
from transformers import AutoModelForCausalLM

from softrl.generation.soft_settings import load_soft_decoding
from softrl.tokens.learned import LearnedRelaxation
from softrl.tokens.noise import SequenceRandom
from softrl.trainers import SoftSFTConfig, learned_settings

pytestmark = pytest.mark.slow  # imports trl

ALPHA = 0.375
STARTS = {
    "temperature": {"relaxation_temperature": 1.3, "min_p": 0.0},
    "max_entropy_nats": {"max_entropy_nats": 0.8},
    "min_p": {"min_p": 0.1, "max_entropy_nats": 1.2},
    "top_k": {"relaxation_temperature": 1.5},
}


def naive_loss(trainer, batch, weights_of):
    """Minus the mean log-likelihood: a text at a time, a whole forward of the model at every token, one graph."""
    model = trainer.model
    table, total, count = model.get_input_embeddings().weight, 0.0, 0
    for ids, present in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        ids = ids[present]
        fed = table[ids[:1]]
        for true in ids[1:]:
            logits = model(inputs_embeds=fed[None]).logits[0, -1]
            total, count = total + logits.log_softmax(-1)[true], count + 1
            kept, weights = weights_of(logits)
            fed = torch.cat([fed, (ALPHA * table[true] + (1 - ALPHA) * weights @ table[kept])[None]])
    return -total / count


def by_softmax(relaxation):
    """Of the seven likeliest, without any code of ours."""

    def weights_of(logits):
        values, kept = logits.topk(7)
        return kept, (values / relaxation.temperature).softmax(-1)

    return weights_of


def by_relaxation(relaxation):
    def weights_of(logits):
        support = relaxation.draw(logits[None].detach(), SequenceRandom([0]))
        return support.ids[0], relaxation.weights(logits[support.ids], support)[0]

    return weights_of


def gradients(trainer, loss):
    learned = list(trainer.learned.raw.values())
    others = [each for each in trainer.model.parameters() if not any(each is raw for raw in learned)]
    trainer.model.zero_grad()
    loss.backward()
    return torch.stack([raw.grad for raw in learned]), torch.cat([each.grad.flatten() for each in others])


@pytest.mark.parametrize("method", ["parallel", "sequential"])
@pytest.mark.parametrize("name", STARTS)
def test_gradient_of_settings_and_model_is_that_of_the_naive_loop(tmp_path, name, method):
    settings = STARTS[name] | {"learned_settings": [name], "cotangent_method": method, "guidance_alpha": ALPHA}
    trainer = soft_sft(tmp_path, model=with_float64_norms(llama()), adjoint_tol=1e-12, **settings)
    trainer.learned.double()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    found, by_model = gradients(trainer, loss)
    relaxation = trainer.live_relaxation().base
    weights_of = by_softmax(relaxation) if name == "temperature" else by_relaxation(relaxation)
    expected_loss = naive_loss(trainer, batch, weights_of)
    expected, expected_by_model = gradients(trainer, expected_loss)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert expected.abs().min() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(by_model, expected_by_model, rtol=1e-7, atol=1e-9)


def test_settings_have_their_own_learning_rate_and_the_barrier_moves_them_once_a_step(tmp_path):
    settings = STARTS["temperature"] | {"learned_settings": ["temperature"], "weight_decay": 0.3, "max_steps": 1}
    plain = soft_sft(tmp_path / "plain", **settings, learned_settings_learning_rate=0.5)
    before = plain.learned.raw["temperature"].item()
    plain.train()
    groups = plain.optimizer.param_groups
    assert [group["lr"] for group in groups][-1] == 0.5
    assert groups[-1]["weight_decay"] == 0.0
    assert sum(each is plain.learned.raw["temperature"] for group in groups for each in group["params"]) == 1
    moved = plain.learned.raw["temperature"].item() - before
    assert moved != 0.0
    for parts in (1, 2):
        rows = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 4 // parts}
        trainer = soft_sft(
            tmp_path / f"barrier-{parts}", **settings | rows, learned_settings_learning_rate=0.5,
            learned_settings_barrier=0.2,
        )  # fmt: skip
        fresh = LearnedRelaxation(trainer.learned.truncation, temperature=1.3)
        fresh.penalty(0.2).backward()
        trainer.train()
        expected = moved - 0.5 * fresh.raw["temperature"].grad.item()
        assert trainer.learned.raw["temperature"].item() - before == pytest.approx(expected, rel=1e-4)
        extra = logs_of(trainer, "loss")[0] - logs_of(plain, "loss")[0]
        assert extra == pytest.approx(fresh.penalty(0.2).item(), rel=1e-3)


def test_nothing_moves_them_where_true_tokens_are_fed(tmp_path):
    settings = {"learned_settings": ["temperature"], "optim": "adamw_torch", "learned_settings_learning_rate": 0.1}
    true = soft_sft(tmp_path, guidance_alpha=1.0, learned_settings_barrier=0.5, **settings)
    true.train()
    assert logs_of(true, "learned/temperature") == [1.0] * 3
    late = soft_sft(tmp_path, guidance_alpha="epochs:0.3,1.0", max_steps=4, **settings)  # two steps an epoch
    late.train()
    values = logs_of(late, "learned/temperature")
    assert values[0] != values[1] != values[2]
    assert values[2] == values[3] == late.learned.values()["temperature"]  # momentum does not carry on


LEARNS = {
    "learned_settings": ["max_entropy_nats", "min_p", "top_k"], "max_entropy_nats": 1.0, "min_p": 0.05,
    "learned_settings_learning_rate": 0.2, "optim": "adamw_torch", "learning_rate": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True], ids=["model", "adapter"])
def test_a_resumed_run_takes_the_same_steps(tmp_path, lora):
    more = LEARNS | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def make():
        adapter = LoraConfig(r=2, target_modules="all-linear") if lora else None
        torch.manual_seed(0)
        return soft_sft(tmp_path, peft_config=adapter, **more)

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert numbers_of(resumed)[-2:] == numbers_of(whole)[-2:]
    assert len(set(logs_of(whole, "learned/top_k"))) == 4
    assert resumed.learned.to_dict() == whole.learned.to_dict()
    torch.testing.assert_close(parameters_of(resumed), parameters_of(whole), rtol=0.0, atol=1e-12)


def test_what_is_saved_is_a_plain_model_and_numbers_that_go_on(tmp_path):
    trainer = soft_sft(tmp_path, model=llama().float(), **LEARNS)
    start = trainer.learned.values()
    trainer.train()
    trainer.save_model()
    values = trainer.learned.values()
    assert all(values[name] != start[name] for name in start)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.state_dict().keys() == llama().state_dict().keys()
    relaxation = load_soft_decoding(tmp_path).thinking.relaxation
    assert relaxation == trainer.learned.frozen()
    assert (relaxation.max_entropy_nats, relaxation.smooth.min_p, relaxation.smooth.top_k) == tuple(values.values())
    assert relaxation.truncation.min_p == 0.0  # the smooth rule has taken its place
    again = soft_sft(tmp_path / "again", model=str(tmp_path), **LEARNS)
    assert again.learned.values() == values
    fewer = soft_sft(tmp_path / "fewer", model=str(tmp_path), **LEARNS | {"top_k": 6})  # other ranges
    assert fewer.learned.values() == pytest.approx(values, rel=1e-5)
    saved = json.loads((tmp_path / "learned_settings.json").read_text())
    saved["raw"] = {}
    (tmp_path / "learned_settings.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"learned_settings.json cannot be gone on from.*remove it"):
        soft_sft(tmp_path / "broken", model=str(tmp_path), **LEARNS)


def test_what_is_not_learned_follows_the_configuration(tmp_path):
    trainer = soft_sft(
        tmp_path, learned_settings=["top_k"], relaxation_temperature="linear:2.0->1.0@2", relaxation="gumbel_softmax"
    )
    for step, temperature in enumerate((2.0, 1.5, 1.0)):
        trainer.state.global_step, trainer.state.max_steps = step, 3
        trainer._follow_schedules()
        for base in (trainer.relaxation.base, trainer.live_relaxation().base):
            assert (base.name, base.temperature, base.truncation.min_p) == ("gumbel_softmax", temperature, 0.02)
        assert trainer.relaxation.base.smooth.top_k == pytest.approx(3.5)  # half of K = 7


def test_a_collapse_is_reported_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(learned_settings.logger, "warning", said.append)
    trainer = soft_sft(tmp_path, learned_settings=["temperature"], learned_settings_learning_rate=1e-6)
    trainer.learned.set_values({"temperature": 0.12})
    trainer.train()
    assert len(said) == 1
    assert "temperature has come from 1 to 0.12" in said[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learned_settings": ["top_p"]}, "learned_settings must be among"),
        ({"learned_settings": ["top_k", "top_k"]}, "names a setting twice"),
        ({"learned_settings": ["temperature"], "hops": 0}, "hops=0 .* the feedback is detached"),
        ({"learned_settings": ["temperature"], "feedback_discount": 0.0}, "the feedback is detached"),
        ({"learned_settings": ["max_entropy_nats"]}, "max_entropy_nats has no start"),
        ({"learned_settings": ["temperature"], "max_entropy_nats": 1.0}, "sets the temperature itself"),
        ({"learned_settings": ["min_p"]}, "cannot start: min_p must lie strictly between"),
        ({"learned_settings": ["temperature"], "relaxation": "st_gumbel"}, "feeds one-hot tokens"),
        ({"learned_settings": ["top_k"], "top_k": "linear:9->5"}, "top_k='linear:9->5' is a schedule"),
        (
            {"learned_settings": ["temperature"], "relaxation_temperature": "linear:2.0->1.0"},
            "relaxation_temperature='linear:2.0->1.0' is a schedule",
        ),
        (
            {"learned_settings": ["max_entropy_nats"], "max_entropy_nats": 1.0, "detach_temperature": True},
            "detach_temperature=True leaves",
        ),
        ({"learned_settings": ["top_k"], "learned_settings_barrier": -1.0}, "barrier must not be negative"),
        ({"learned_settings": ["top_k"], "learned_settings_learning_rate": 0.0}, "learning_rate must be positive"),
    ],
)
def test_what_cannot_be_learned_is_named_before_a_model_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        SoftSFTConfig("nowhere", **{**SETTINGS, **settings})


def case(engine, parts=1, **settings):
    world = 1 if engine == "single" else 2
    rows = {"per_device_train_batch_size": 8 // world // parts, "gradient_accumulation_steps": parts}
    kept = {"top_k": 23, "min_p": 0.0, "adjoint_tol": 1e-6, "learning_rate": 0.01, "learned_settings_barrier": 0.1}
    # True tokens alone at first: DDP has to see a gradient of the settings there too.
    more = {"learned_settings": ["temperature", "top_k"], "guidance_alpha": "epochs:1.0,0.8", "max_steps": 3}
    name = f"{engine}-learned-{parts}"
    settings = {**kept, **more, **rows, "learned_settings_learning_rate": 0.1, **settings}
    return {"name": name, "engine": engine, "method": "SoftSFT", "lora": False, "world": world, "settings": settings}


def test_two_ranks_learn_what_one_does(tmp_path):
    # With checkpointing DDP waits for a gradient of every parameter, without it finds those that have none.
    cases = [case("single"), case("ddp"), case("ddp", 2, gradient_checkpointing=True)]
    found = outcomes(tmp_path, cases)
    alone, *others = (found(each["name"]) for each in cases)
    values = logged(alone, "learned/temperature")
    assert values[0] == values[1] == 1.0
    assert abs(values[2] - 1.0) > 100 * TOLERANCE
    for other in others:
        assert difference(alone["parameters"], other["parameters"]) < TOLERANCE
        for name in ("loss", "learned/temperature", "learned/top_k"):
            assert logged(other, name) == pytest.approx(logged(alone, name), abs=TOLERANCE), name


def test_engines_that_shard_and_optimizers_of_others_are_refused(tmp_path, monkeypatch):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    trainer = soft_sft(tmp_path, train=texts(4), learned_settings=["temperature"])
    for engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "distributed_type", engine)
            with pytest.raises(ValueError, match=f"not under {engine.value}"):
                trainer.attach_learned_settings(trainer.model)
    trainer.create_optimizer()
    with pytest.raises(ValueError, match="leave `optimizers` out"):
        trainer.attach_learned_settings(trainer.model)
