"""The trainer against the estimators it is made of, on tiny models: gradients, accumulation, resuming, bad input."""

import math

import pytest
import torch
from datasets import Dataset
from helpers import PairReward, V, gpt2, llama, prompts
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from trainers.tiny import dataset, logs_of, make, parameters_of

from softrl.models.policy import Policy
from softrl.rewards.token_linear import TokenLinearReward

pytestmark = pytest.mark.slow  # imports trl


def test_loss_gradient_equals_the_reference_method(tmp_path, tokenizer):
    """One optimiser step by every method, from the same parameters, ends at the same parameters."""
    ends = {}
    for method in ("autograd", "parallel", "sequential"):
        trainer = make(tmp_path, tokenizer, cotangent_method=method, relaxation="gumbel_softmax", max_steps=1)
        trainer.train()
        ends[method] = parameters_of(trainer)
    start = parameters_of(make(tmp_path, tokenizer))
    moved = (ends["autograd"] - start).norm()
    assert moved > 1e-4
    for method in ("parallel", "sequential"):
        assert (ends[method] - ends["autograd"]).norm() < 1e-5 * moved


def test_accumulation_changes_nothing(tmp_path, tokenizer):
    whole = make(tmp_path, tokenizer, shuffle_dataset=False)
    whole.train()
    halves = make(
        tmp_path, tokenizer, shuffle_dataset=False, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    halves.train()
    torch.testing.assert_close(parameters_of(halves), parameters_of(whole), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("relaxation", ["st_gumbel", "gumbel_softmax", "gumbel_rao"])
def test_surrogates_in_parts_change_nothing_but_how_much_is_kept(tmp_path, tokenizer, relaxation):
    ends, losses, sizes = [], [], []
    for chunks in (1, 2):
        trainer = make(
            tmp_path, tokenizer, relaxation=relaxation, surrogate_chunks=chunks, gradient_accumulation_steps=2,
            mask_truncated_completions=True, learning_rate=0.5,
        )  # fmt: skip
        redirect, seen = trainer._redirect, []

        def counted(model, unwrapped, function, record, *others, redirect=redirect, seen=seen):
            seen.append(len(getattr(record, "rollout", record).mask))  # an estimate, or a rollout
            return redirect(model, unwrapped, function, record, *others)

        trainer._redirect = counted
        trainer.train()
        ends.append(parameters_of(trainer))
        losses.append(logs_of(trainer, "loss"))
        sizes.append(seen)
    assert sizes == [[4] * 6, [2] * 12]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-7, atol=1e-9)
    assert losses[1] == pytest.approx(losses[0], rel=1e-7)
    assert (ends[0] - parameters_of(make(tmp_path, tokenizer))).norm() > 1e-2


def test_checkpointing_changes_nothing_and_dropout_is_off(tmp_path, tokenizer):
    """GPT-2 with dropout in its configuration: checkpointed layers recompute without it, so the steps agree."""
    ends = []
    for checkpointing in (False, True):
        model = gpt2()
        assert any(module.p > 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
        trainer = make(tmp_path, tokenizer, model, gradient_checkpointing=checkpointing)
        trainer.train()
        ends.append(parameters_of(trainer))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-7, atol=1e-9)


def test_resuming_gives_the_same_losses(tmp_path, tokenizer):
    settings = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
    }
    straight = make(tmp_path / "a", tokenizer, **settings)
    straight.train()  # 2 batches an epoch, so this crosses epochs
    assert "soft-rollout" in (tmp_path / "a" / "README.md").read_text()  # the model card
    resumed = make(tmp_path / "a", tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert logs_of(resumed, "loss")[-3:] == pytest.approx(logs_of(straight, "loss")[-3:], rel=1e-6)
    torch.testing.assert_close(parameters_of(resumed), parameters_of(straight), rtol=1e-6, atol=1e-9)


def test_lora_trains_adapters_only_and_measures_kl_to_the_base(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, peft_config=LoraConfig(r=2, target_modules="all-linear"), learning_rate=1.0)
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(p, base[name]) for name, p in trainer.model.named_parameters() if name in base)
    kls = logs_of(trainer, "kl")
    assert kls[0] == pytest.approx(0.0, abs=1e-9)
    assert kls[-1] > 1e-6
    trainer.save_model(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_train_alone_and_come_back(tmp_path, tokenizer, config):
    """KL is to the model without them, so it does not start at zero; PEFT reads what was saved."""
    prefix = config(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make(tmp_path, tokenizer, llama(), peft_config=prefix, learning_rate=1.0)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in trainer.model.named_parameters() if "prompt_encoder" in name}
    assert logs_of(trainer, "kl")[0] > 1e-6
    trainer.save_model(str(tmp_path))
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    batch, tokens = prompts(), torch.tensor([[5, 9, 4]] * 3)
    ours, theirs = (
        policy.hidden(batch, policy.embed(tokens)) for policy in (Policy(trainer.model.eval()), Policy(loaded))
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)  # saved in float32


def test_metric_keys_and_their_values(tmp_path, tokenizer):
    def judge(texts):
        assert all(isinstance(text, str) for text in texts)
        return torch.tensor([float(len(text.split())) for text in texts])

    trainer = make(tmp_path, tokenizer, judge=judge, num_generations=2)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "reward" in row)
    wanted = """
        reward reward_std frac_reward_zero_std rewards/pair/mean rewards/pair/std kl entropy num_tokens step_time
        completions/mean_length completions/min_length completions/max_length completions/clipped_ratio reward/soft
        reward/hard reward/gap judge adjoint/norm adjoint/residual adjoint/sweeps step_time/rollout
        step_time/cotangents step_time/surrogate
    """.split()  # noqa: SIM905
    assert set(wanted) <= set(row)
    assert row["reward/gap"] == pytest.approx(row["reward/soft"] - row["reward/hard"], abs=1e-6)
    assert row["reward/gap"] == pytest.approx(0.0, abs=1e-6)  # straight-through scores one-hot tokens
    assert 0.0 < row["entropy"] < math.log(V)
    assert row["judge"] <= row["completions/mean_length"] + 1e-6
    phases = sum(row[f"step_time/{phase}"] for phase in ("rollout", "cotangents", "surrogate"))
    assert phases == pytest.approx(row["step_time"], rel=1e-6)
    metrics = trainer.evaluate()
    assert {"eval_reward", "eval_kl", "eval_base_perplexity", "eval_distinct_1", "eval_judge"} <= set(metrics)
    assert metrics == pytest.approx({**trainer.evaluate(), **_timings(metrics)}, nan_ok=True)  # the same draws again


def _timings(metrics):
    return {key: value for key, value in metrics.items() if key.endswith(("runtime", "per_second"))}


def test_evaluation_numbers_against_transformers(tmp_path, tokenizer):
    """KL and base NLL of an evaluation recomputed with the models' own forwards, one sequence at a time."""
    trainer = make(tmp_path, tokenizer, llama(seed=1), temperature=1.3)
    trainer.reference.model.load_state_dict(llama(seed=2).state_dict())
    trainer.evaluate()
    for sample in trainer.last_evaluation:
        prompt = tokenizer(sample.prompt).input_ids
        ids = torch.tensor([prompt + list(sample.tokens)])
        with torch.no_grad():
            policy = trainer.model(ids).logits[0, len(prompt) - 1 : -1].double()
            base = trainer.reference.model(ids).logits[0, len(prompt) - 1 : -1].double()
        p, q = (policy / 1.3).log_softmax(-1), (base / 1.3).log_softmax(-1)
        assert sample.kl_nats == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-5)
        nll = -base.log_softmax(-1).gather(-1, torch.tensor(sample.tokens)[:, None]).sum()
        assert sample.base_nll_nats == pytest.approx(nll.item(), rel=1e-5)


def test_no_tensor_has_a_time_and_a_vocabulary_axis(tmp_path, tokenizer, monkeypatch):
    """With chunks of a few positions no tensor of a step holds N*T*V numbers or more."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from softrl.models import policy

    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.ndim > 0 and V in tensor.shape:
                    largest.append(tensor.numel() // V)
            return result

    monkeypatch.setattr(policy, "CHUNK_ELEMENTS", 4 * V)
    trainer = make(tmp_path, tokenizer, max_steps=1, max_completion_length=6, relaxation="gumbel_softmax")
    with Watch():
        trainer.train()
    # 16 rows: an embedding or head weight [V, D]; 4: a chunk, or a decoding step's [N, V]; N*T = 24 would be [N, T, V]
    assert max(largest) < 24


class Broken(PairReward):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def soft(self, tokens, **columns):
        return self.result(super().soft(tokens, **columns))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda r: r * float("nan"), "reward 'pair' is NaN or infinite"),
        (lambda r: r[:, None], r"returned shape \(4, 1\), expected \(4,\)"),
        (lambda r: r.sum(), r"returned shape \(\), expected \(4,\)"),
        (lambda r: r.detach(), "not differentiable in the weights"),
    ],
)
def test_bad_rewards_are_reported_by_name(tmp_path, tokenizer, result, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tokenizer, reward=Broken(result)).train()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_k": V + 1}, ValueError, f"top_k={V + 1} is larger than the vocabulary, V={V}"),
        ({"max_entropy_nats": 3.0}, ValueError, r"max_entropy_nats must lie in \(0, log K\)"),
        ({"max_entropy_nats": 0.0}, ValueError, r"max_entropy_nats must lie in \(0, log K\)"),
        ({"train": dataset(1).select([])}, ValueError, "train_dataset is empty"),
        ({"train": Dataset.from_dict({"text": ["w4"]})}, ValueError, "needs a column `prompt`"),
        ({"train": [{"prompt": "w4"}]}, TypeError, r"must be a datasets\.Dataset, got list"),
        ({"num_generations": 3}, ValueError, "must be divisible by num_generations=3"),
        ({"reward": TokenLinearReward(torch.zeros(V + 5), 0.0)}, ValueError, "vocabularies differ"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "reward_weights has 2 numbers for 1 rewards"),
        ({"cotangent_method": "sequential", "hops": 2}, ValueError, "hops=2 with method='sequential'"),
        ({"beta": -0.1}, ValueError, "must not be negative"),
        ({"surrogate_chunks": 3}, ValueError, "surrogate_chunks=3 must be at least 1 and divide"),
    ],
)
def test_bad_arguments_are_refused_before_training(tmp_path, tokenizer, change, error, message):
    with pytest.raises(error, match=message):
        make(tmp_path, tokenizer, **change)


def test_a_prompt_longer_than_the_context_says_what_to_do(tmp_path, tokenizer):
    long = Dataset.from_dict({"prompt": [" ".join(["w5"] * 62)] * 4})
    with pytest.raises(
        ValueError, match=r"exceed the model's context of 64; shorten the prompts \(max_prompt_length\)"
    ):
        make(tmp_path, tokenizer, train=long).train()
    make(tmp_path, tokenizer, train=long, max_prompt_length=8, max_steps=1).train()


def test_a_policy_learns_the_reward(tmp_path, tokenizer):
    """Not only a gradient: forty steps raise the hard reward by several times its standard error."""
    weight = torch.zeros(V, dtype=torch.float64)
    weight[[5, 9, 14]] = 4.0
    trainer = make(
        tmp_path, tokenizer, reward=TokenLinearReward(weight, -2.0), beta=0.0, entropy_coef=0.0, max_steps=40,
        optim="adamw_torch", learning_rate=0.01, per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    rewards = logs_of(trainer, "reward/hard")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_trl_trainer_runs_on_our_reward(tmp_path, tokenizer):
    from trl import RLOOConfig, RLOOTrainer

    reward = TokenLinearReward(torch.linspace(-1, 1, V), 0.0)
    arguments = RLOOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=4, max_steps=1,
        beta=0.0, report_to=[], use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = RLOOTrainer(
        model=llama().float(), reward_funcs=reward.as_trl(tokenizer), args=arguments, train_dataset=dataset(),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert 0.0 < logs_of(trainer, "rewards/sentiment/mean")[0] < 1.0
