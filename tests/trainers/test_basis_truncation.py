"""`basis_aware` in training: what is kept, the gradient, logs, the card, and what is refused."""

import copy
import re

import pytest
import torch
from estimators.looped import looped_objective
from helpers import PairReward, V, gemma3, llama
from huggingface_hub import ModelCard
from peft import LoraConfig
from torch import nn
from trainers.tiny import logs_of, make
from transformers import AutoModelForCausalLM

from softrl.contexts.basis_aware import basis_aware
from softrl.models.policy import Policy
from softrl.trainers import basis_truncation

pytestmark = pytest.mark.slow  # imports trl

EPSILON, DIRECTIONS, CANDIDATES = 0.06, 8, 6
KEYS = {
    "basis_aware": EPSILON, "basis_aware_rule": "tau", "basis_aware_directions": DIRECTIONS,
    "basis_aware_candidates": CANDIDATES,
}  # fmt: skip


def made(tmp_path, tokenizer, model=None, **settings):
    return make(tmp_path, tokenizer, llama(seed=3) if model is None else model, **{**KEYS, **settings})


def fresh_rule(model):
    """Of the weights as they are, in a copy that no optimizer touches."""
    return basis_aware(
        Policy(copy.deepcopy(model)), EPSILON, "tau", DIRECTIONS, max_candidates=CANDIDATES
    )  # fmt: skip


def own_logits(model, prompts, tokens, mask):
    """By the model's own forward, a sequence at a time; of the tokens that are there."""
    found = []
    for ids, present, row, there in zip(prompts.ids, prompts.mask, tokens, mask, strict=True):
        prompt, completion = ids[present], row[there]
        found.append(model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1])
    return torch.cat(found)


def supports_and_masks(policy, rollout, rule):
    """What a soft rollout kept, and what a rule keeps of the same ids behind the same soft tokens."""
    with torch.no_grad():
        ids, fed = rollout.support.ids.flatten(0, 1), rollout.fed.flatten(0, 1)
        embeds = policy.embed_soft(ids, fed).unflatten(0, rollout.mask.shape)
        logits = policy.head(policy.hidden(rollout.prompts, embeds).flatten(0, 1))
    return rollout.support.kept.flatten(0, 1), rule.mask(logits).gather(-1, ids), logits


@pytest.mark.parametrize(("relaxation", "optim"), [("gumbel_softmax", "sgd"), ("st_gumbel", "adamw_torch_fused")])
def test_every_step_keeps_what_its_own_weights_prove(tmp_path, tokenizer, relaxation, optim):
    """Also after steps that autograd's counters do not see; the first step's directions would keep other tokens."""
    rate = 2.0 if optim == "sgd" else 0.1
    trainer = made(tmp_path, tokenizer, relaxation=relaxation, optim=optim, learning_rate=rate, max_steps=4, top_k=12)
    first, checked, differences = fresh_rule(trainer.model), 0, 0
    original = trainer.rollout

    def rollout(batch):
        nonlocal checked, differences
        found = original(batch)
        kept, inside, logits = supports_and_masks(trainer.policy, found, fresh_rule(trainer.model))
        assert torch.equal(kept, inside)
        assert not kept.all()
        checked += int((logits.softmax(-1).gather(-1, found.support.ids.flatten(0, 1))[kept] <= EPSILON).sum())
        differences += int((first.mask(logits).gather(-1, found.support.ids.flatten(0, 1)) != kept).sum())
        return found

    trainer.rollout = rollout
    trainer.train()
    assert checked > 20  # below τ, and kept
    assert differences > 0


def test_the_gradient_is_that_of_the_support_as_given(tmp_path, tokenizer):
    trainer = made(tmp_path, tokenizer, relaxation="gumbel_softmax", soft_stopping=False, top_k=12)
    trainer.reference.model.load_state_dict(llama(seed=2).state_dict())
    found, original = [], trainer.rollout
    trainer.rollout = lambda batch: found.append(original(batch)) or found[-1]
    rows = [trainer.train_dataset[index] for index in range(4)]
    trainer.compute_loss(trainer.model, rows).backward()
    ours = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    (rollout,) = found
    assert not rollout.support.kept.all()
    plain = trainer.args.make_relaxation()  # weights of a given support know no rule
    assert plain.truncation.support is None
    reference = trainer.reference.model
    total = looped_objective(trainer.model, rollout, plain, PairReward(), 1.0, 0.1, 0.05, reference)
    (-total / 4).backward()
    for name, parameter in trainer.model.named_parameters():
        assert (ours[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


def test_score_functions_are_of_the_truncated_sampler(tmp_path, tokenizer):
    """∇ Σ R log π by hand, π renormalised over what a fresh rule keeps; all sampled tokens are among it."""
    trainer = made(
        tmp_path, tokenizer, method="Reinforce", estimator="reinforce", beta=0.0, entropy_coef=0.0, num_generations=2
    )
    found, original = [], trainer.rollout
    trainer.rollout = lambda batch: found.append(original(batch)) or found[-1]
    rows = [trainer.train_dataset[index] for index in (1, 1, 2, 2)]
    trainer.compute_loss(trainer.model, rows).backward()
    ours = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    (rollout,) = found
    logits = own_logits(trainer.model, rollout.prompts, rollout.tokens, rollout.mask)
    inside = fresh_rule(trainer.model).mask(logits.detach())
    tokens = rollout.tokens[rollout.mask]
    assert inside.gather(-1, tokens[:, None]).all()
    assert not inside.all()
    taken = logits.masked_fill(~inside, -torch.inf).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    rewards = PairReward().hard(rollout.tokens, rollout.mask).repeat_interleave(rollout.mask.sum(-1))
    (-(rewards * taken).sum() / 4).backward()
    for name, parameter in trainer.model.named_parameters():
        assert (ours[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("Reinforce", {"estimator": "rloo", "num_generations": 2}),
        ("Reinforce", {"estimator": "combined", "num_generations": 2, "top_k": "linear:12->7"}),
        ("Reinforce", {"estimator": "soft_score", "num_generations": 2}),
        ("PPO", {"num_ppo_epochs": 2}),
        ("SoftRollout", {"top_k": "linear:12->7", "gradient_accumulation_steps": 2}),
    ],
)
def test_every_trainer_takes_it_and_logs_what_was_accepted(tmp_path, tokenizer, method, settings):
    trainer = made(tmp_path, tokenizer, method=method, **settings)
    made_so = getattr(trainer, "relaxation", None) or getattr(trainer.estimator, "relaxation", None)
    trainer.train()
    last = getattr(trainer, "relaxation", None) or getattr(trainer.estimator, "relaxation", None)
    for each in (trainer.truncation, *(one.truncation for one in (made_so, last) if one is not None)):
        assert each.support is trainer.support
    accepted, asked = logs_of(trainer, "basis_aware/accepted"), logs_of(trainer, "basis_aware/asked")
    assert len(asked) == 3
    assert all(0.0 < few <= many <= CANDIDATES for few, many in zip(accepted, asked, strict=True))
    assert all(0.0 < norm < torch.inf for norm in logs_of(trainer, "grad_norm"))
    assert logs_of(trainer, "basis_aware/failed") == [0.0] * 3
    assert logs_of(trainer, "basis_aware/greedy") == [0.0] * 3
    trainer.evaluate()
    rule = fresh_rule(trainer.model)
    for row, sample in enumerate(trainer.last_evaluation):
        prompt = tokenizer(trainer.eval_dataset[row]["prompt"], return_tensors="pt").input_ids
        with torch.no_grad():
            logits = trainer.model(torch.cat([prompt, torch.tensor([sample.tokens])], 1)).logits[0]
        inside = rule.mask(logits[prompt.shape[1] - 1 : -1])
        assert inside.gather(-1, torch.tensor(sample.tokens)[:, None]).all()


def test_adapters_leave_the_directions_as_they_are(tmp_path, tokenizer):
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian")
    trainer = made(tmp_path, tokenizer, peft_config=lora, learning_rate=1.0)
    before = trainer.support.directions
    trainer.train()
    assert trainer.support.directions is before
    assert logs_of(trainer, "basis_aware/accepted")[-1] > 0.0


def test_a_run_by_rewards_begins_with_a_warning(tmp_path, tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr(basis_truncation.logger, "warning", said.append)
    make(tmp_path, tokenizer)
    assert said == []
    made(tmp_path, tokenizer)
    assert len(said) == 1
    assert "assumes a model trained by cross-entropy" in said[0]
    assert "become unproven as training goes on" in said[0]


def with_biased_head():
    model = llama(tied=False)
    model.set_output_embeddings(nn.Linear(16, V, bias=True).double())
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basis_aware": 0.0}, r"basis_aware must lie in \(0, 1\), got 0.0; leave it out"),
        ({"basis_aware_rule": "p"}, "basis_aware_rule must be 'eta' or 'tau', got 'p'"),
        ({"basis_aware_directions": 0}, "basis_aware_directions must be at least 1, got 0"),
        ({"basis_aware_candidates": 0}, "basis_aware_candidates must be at least 1, got 0"),
        ({"temperature": 0.7}, r"at temperature 1, and temperature=0\.7; leave it at 1\.0"),
        ({"top_p": 0.9}, r"basis_aware=0\.06 beside top_p=0\.9 and min_p=0\.0: it takes their place"),
        ({"min_p": 0.1}, r"basis_aware=0\.06 beside top_p=1\.0 and min_p=0\.1: it takes their place"),
        ({"use_vllm": True}, "vLLM cannot truncate so"),
        ({"basis_aware_directions": 17}, "basis_aware_directions=17 is not for this model: .*, 16 here, got 17"),
        ({"model": gemma3()}, r"not for this model: .*final_logit_softcapping=3\.0"),
        ({"model": with_biased_head()}, "not for this model: .*its head has a bias"),
    ],
)
def test_what_it_is_not_for_is_refused_before_training(tmp_path, tokenizer, monkeypatch, change, message):
    monkeypatch.setattr("softrl.trainers.vllm_config.vllm_is_installed", lambda: True)
    with pytest.raises(ValueError, match=message):
        made(tmp_path, tokenizer, **change)


def test_a_device_without_float64_is_refused(tmp_path, tokenizer, monkeypatch):
    args = made(tmp_path, tokenizer).args
    monkeypatch.setattr(type(args), "device", torch.device("mps"))
    with pytest.raises(ValueError, match=r"basis_aware=0\.06 computes in float64, which MPS does not have"):
        args.make_support(Policy(llama()))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_cards_code_samples_so(tmp_path, tokenizer, monkeypatch, capsys, adapter):
    llama(seed=3).float().save_pretrained(tmp_path / "tiny-base")
    tokenizer.save_pretrained(tmp_path / "tiny-base")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False) if adapter else None
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-base")
    trainer = made(tmp_path / "my-run", tokenizer, base, peft_config=lora)
    trainer.save_model()
    card = (tmp_path / "my-run" / "README.md").read_text()
    text = "temperature 1, basis-aware truncation (BA-tau, epsilon 0.06, 8 directions, 6 candidates)"
    assert text in " ".join(card.split())
    monkeypatch.chdir(tmp_path)
    names = {}
    code = re.search(r"## Quick start\n\n```python\n(.*?)\n```", ModelCard(card).text, re.DOTALL).group(1)
    exec(code, names)
    assert capsys.readouterr().out
    processor = names["truncation"]
    assert processor.counts.contexts > 0
    rule, ours = processor.rule, trainer.support
    for name in ("epsilon", "rule", "max_candidates"):
        assert getattr(rule, name) == getattr(ours, name)
    torch.testing.assert_close(rule.directions.columns.abs(), ours.directions.columns.abs(), rtol=1e-5, atol=1e-5)


def test_the_command_line_and_recipes_know_the_keys(tmp_path, capsys):
    from softrl.cli.arguments import parse

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\ntrainer: ppo\nbasis_aware: 0.003\nbasis_aware_rule: tau\n")
    args = parse(["--config", str(recipe), "--basis_aware_candidates", "4", "--use_cpu"])[1]
    assert (args.basis_aware, args.basis_aware_rule, args.basis_aware_candidates) == (0.003, "tau", 4)
    parse(["--config", str(recipe), "--trainer", "trl_rloo", "--use_cpu"])
    said = capsys.readouterr().out
    assert "trainer='trl_rloo' has no use for basis_aware, basis_aware_rule" in said
