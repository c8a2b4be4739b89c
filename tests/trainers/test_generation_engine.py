"""Sampling through TRL's vLLM client gives what our own loop gives for the same tokens; vLLM itself is a stand-in.

TRL's own classes run here: a method, an argument or a key that TRL renames fails these tests.
"""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import EOS, V, llama
from peft import LoraConfig
from trainers.tiny import dataset, logs_of, make, parameters_of
from trainers.vllm_stub import Colocated, Engine, client_for, pretend_vllm, rows_of, serving
from trl import GRPOConfig, RLOOConfig
from trl.generation import vllm_client, vllm_generation

from softrl.rollouts.given import rollout_of
from softrl.rollouts.hard import hard_rollout
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.relaxation import make_relaxation
from softrl.tokens.truncation import Truncation
from softrl.trainers import ReinforceConfig, RolloutConfig, SoftRolloutConfig
from softrl.trainers.generation_engine import GenerationEngine

pytestmark = pytest.mark.slow  # imports trl

LEFT_OUT = ("vllm_structured_outputs_regex", "vllm_importance_sampling")  # and what it begins
GROUPS = {"num_generations": 2, "per_device_train_batch_size": 4}


@pytest.fixture
def through_engine(tmp_path, tokenizer, monkeypatch):
    """A trainer on a stand-in for the server, and the stand-in."""
    running = []

    def start(engine=None, **settings):
        engine = engine or Engine(llama(seed=9))  # not the policy's weights: they have to be sent
        context = serving(engine, monkeypatch)
        url = context.__enter__()
        running.append(context)
        server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 5.0}
        return make(tmp_path, tokenizer, **server, **settings), engine

    yield start
    for context in running:
        context.__exit__(None, None, None)


def same_parameters(left, right):
    left.train()
    right.train()
    assert not torch.equal(parameters_of(right), torch.cat([p.flatten() for p in llama().parameters()]))
    torch.testing.assert_close(parameters_of(left), parameters_of(right), rtol=1e-9, atol=1e-12)


# The contract


def test_options_have_trls_names_and_defaults():
    ours = {field.name: field.default for field in fields(RolloutConfig) if "vllm" in field.name}
    for config in (RLOOConfig, GRPOConfig):
        theirs = {field.name: field.default for field in fields(config) if "vllm" in field.name}
        assert {name: theirs[name] for name in ours} == ours
        assert {name for name in theirs if name not in ours and not name.startswith(LEFT_OUT)} == set()


def test_the_stand_in_has_the_signatures_of_trls_client():
    """What the stand-in replaces is called by TRL as TRL's own is, and our calls bind to TRL's methods."""
    stand_in = client_for(None)
    for name in ("init_communicator", "update_named_params"):
        theirs, ours = (inspect.signature(getattr(each, name)) for each in (vllm_client.VLLMClient, stand_in))
        assert list(ours.parameters) == list(theirs.parameters)
    generation = vllm_generation.VLLMGeneration
    inspect.signature(generation.generate).bind(None, prompts=[], images=None, num_generations=1)
    inspect.signature(generation.sync_weights).bind(None)
    assert inspect.isgeneratorfunction(generation._iter_named_params)


def test_the_request_says_what_the_policy_samples_from(through_engine):
    trainer, engine = through_engine(
        method="Reinforce", temperature=0.7, min_p=0.05, max_completion_length=4, max_steps=1, **GROUPS
    )
    trainer.train()
    (request,) = engine.requests
    said = {"n": 2, "temperature": 0.7, "top_p": 1.0, "min_p": 0.05, "top_k": 0, "max_tokens": 4}
    assert {name: request[name] for name in said} == said
    assert request["repetition_penalty"] == 1.0
    assert (request["stop_token_ids"], request["ignore_eos"]) == ([EOS], False)
    assert len(request["prompt"]) == 2
    assert all(2 not in ids for ids in request["prompt"])  # without padding


# The same training as without an engine


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("Reinforce", {"estimator": "rloo", "temperature": 1.3, "min_p": 0.1}),
        ("Reinforce", {"estimator": "reinforce_value"}),
        ("PPO", {"num_ppo_epochs": 2, "max_steps": 4}),
    ],
)
def test_score_functions_train_as_they_do_without_an_engine(through_engine, tmp_path, tokenizer, method, settings):
    cycle = settings.get("num_ppo_epochs", 1)
    engine = Engine(llama(seed=9), step_of_push=lambda pushes: (pushes - 1) * cycle)
    settings = {"method": method, **GROUPS, **settings}
    trainer, engine = through_engine(engine, **settings)
    same_parameters(trainer, make(tmp_path, tokenizer, **settings))
    assert engine.pushes == len(engine.requests) == trainer.state.max_steps // cycle


def test_accumulated_micro_batches_share_a_push(through_engine, tmp_path, tokenizer):
    settings = {"method": "Reinforce", "gradient_accumulation_steps": 2, "max_steps": 2, **GROUPS}
    trainer, engine = through_engine(**settings)
    same_parameters(trainer, make(tmp_path, tokenizer, **settings))
    assert (engine.pushes, len(engine.requests)) == (2, 4)


@pytest.mark.parametrize("settings", [{"min_p": 0.1, "temperature": 0.8}, {"soft_stopping": False}])
def test_st_gumbel_trains_as_on_the_same_tokens_and_posterior_noise(through_engine, tmp_path, tokenizer, settings):
    settings = {"relaxation": "st_gumbel", **settings}
    trainer, _ = through_engine(**settings)
    plain = make(tmp_path, tokenizer, **settings)
    plain.rollout = lambda batch: _given(plain, batch)
    same_parameters(trainer, plain)
    assert max(map(abs, logs_of(trainer, "reward/gap"))) < 1e-9
    assert max(logs_of(trainer, "rollout/replay_error")) < 1e-9


def _given(trainer, batch):
    """Both draw the noise from new streams: the engine has drawn nothing from those that it was given."""
    args = trainer.args
    sampled = hard_rollout(
        trainer.policy, batch.prompts, trainer.truncation, trainer.random_for(batch), args.max_completion_length,
        args.num_generations, trainer.eos_ids,
    )  # fmt: skip
    eos_ids = trainer.eos_ids if args.soft_stopping else ()
    return rollout_of(trainer.policy, sampled, trainer.relaxation, trainer.random_for(batch), eos_ids)


@pytest.mark.parametrize("relaxation", ["straight_through", "reinmax"])
def test_straight_through_trains_as_it_does_without_an_engine(through_engine, tmp_path, tokenizer, relaxation):
    """These sample from the K kept ids, which the engine is told."""

    def sample(policy, prompts, random, request):
        truncation = Truncation(request["top_k"], request["top_p"], request["min_p"])
        eos_ids = tuple(request["stop_token_ids"])
        own = make_relaxation(relaxation, truncation)
        return rows_of(soft_rollout(policy, prompts, own, random, request["max_tokens"], request["n"], eos_ids))

    settings = {"relaxation": relaxation, "top_k": 5, "min_p": 0.02}
    trainer, engine = through_engine(Engine(llama(seed=9), sample=sample), **settings)
    same_parameters(trainer, make(tmp_path, tokenizer, **settings))
    assert engine.requests[0]["top_k"] == 5


def test_estimators_on_sampled_relaxations_take_the_engines_tokens(through_engine):
    trainer, engine = through_engine(method="Reinforce", estimator="combined", relaxation="st_gumbel", **GROUPS)
    trainer.train()
    assert len(engine.requests) == 3
    assert engine.requests[0]["top_k"] == 0


def test_adapters_are_merged_into_what_is_sent(through_engine):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer, engine = through_engine(method="Reinforce", peft_config=config, max_steps=2, **GROUPS)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    trainer.generation_engine.push(None)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(engine.model(ids).logits, trainer.model(ids).logits, rtol=1e-9, atol=1e-11)
        with trainer.model.disable_adapter():
            assert not torch.allclose(engine.model(ids).logits, trainer.model(ids).logits)
    for name, value in before.items():  # merging and taking apart again rounds
        torch.testing.assert_close(trainer.model.get_parameter(name), value, rtol=1e-12, atol=1e-14)


def test_evaluation_samples_through_the_engine(through_engine, tmp_path, tokenizer):
    """With the streams of an evaluation on the stand-in, the metrics are those of our own loop."""
    trainer, engine = through_engine(Engine(llama(seed=9), step_of_push=lambda _: -1), method="Reinforce", **GROUPS)
    ours = trainer.evaluate()
    expected = make(tmp_path, tokenizer, method="Reinforce", **GROUPS).evaluate()
    timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert engine.requests[0]["n"] == 1
    for name in expected.keys() - set(timing):
        assert ours[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(0.5)  # as loading the best checkpoint does, without a step
    trainer.evaluate()
    torch.testing.assert_close(next(engine.model.parameters()), next(trainer.model.parameters()))


def test_colocated_sampling_is_the_same(tmp_path, tokenizer, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # TRL sets them; so they are put back at the end
        monkeypatch.delenv(name)
    pretend_vllm(monkeypatch)
    engine = Engine(llama(seed=9))
    engine.num_samples = GROUPS["num_generations"]
    colocated = Colocated(engine)
    monkeypatch.setattr(vllm_generation, "LLM", colocated, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", dict, raising=False)
    plain = make(tmp_path, tokenizer, method="Reinforce", **GROUPS)
    trainer = make(tmp_path, tokenizer, method="Reinforce", use_vllm=True, vllm_max_model_length=48, **GROUPS)
    same_parameters(trainer, plain)
    assert (engine.pushes, len(engine.requests)) == (3, 3)
    said = {"gpu_memory_utilization": 0.3, "max_model_len": 48, "max_num_seqs": 4, "model_impl": "vllm"}
    assert {name: colocated.settings[name] for name in said} == said


def test_two_ranks_that_shard_the_model_train_as_one_process_without_an_engine(tmp_path):
    """TRL gathers the shards that are sent, merges adapters meanwhile, and deals completions out to the ranks."""
    cases = [
        {
            "name": f"{engine}-{lora}", "engine": engine, "method": "Reinforce", "lora": lora, "world": world,
            "settings": {"num_generations": 2, "per_device_train_batch_size": 8 // world, "served": world == 2},
        }
        for engine, lora, world in [
            ("single", False, 1), ("single", True, 1), ("fsdp2", False, 2), ("fsdp2", True, 2), ("zero3", True, 2),
        ]
    ]  # fmt: skip
    tests = Path(__file__).parent.parent
    path = os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [sys.executable, str(tests / "engines" / "served_ranks.py"), str(tmp_path), json.dumps(cases)],
        env=os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}, check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    for failure in tmp_path.glob("*.txt"):
        raise AssertionError(failure.read_text())
    found = {case["name"]: torch.load(tmp_path / f"{case['name']}-0.pt") for case in cases}
    for case in cases:
        alone, here = found[f"single-{case['lora']}"], found[case["name"]]
        assert here["world"] == case["world"]
        assert here["rewards"] == pytest.approx(alone["rewards"], abs=1e-5)
        for name, value in alone["parameters"].items():
            torch.testing.assert_close(here["parameters"][name], value, rtol=0, atol=1e-5)


# Refusals


def test_without_vllm_the_error_says_what_to_install(tmp_path):
    with pytest.raises(ValueError, match=r"pip install \"softrl\[vllm\]\" \(softrl has not been tried with it"):
        RolloutConfig(str(tmp_path), use_vllm=True, use_cpu=True)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SoftRolloutConfig, {"relaxation": "softmax"}, "cannot sample; use relaxation='st_gumbel'"),
        (SoftRolloutConfig, {"relaxation": "gumbel_softmax"}, "mixtures"),
        (ReinforceConfig, {"estimator": "soft_score", "num_generations": 2}, "mixtures"),
        (SoftRolloutConfig, {"top_p": 0.9, "min_p": 0.1}, "top_p on what min_p has left"),
        (SoftRolloutConfig, {"relaxation": "straight_through", "top_p": 0.9}, "top_p on what top_k has left"),
        (RolloutConfig, {"vllm_mode": "elsewhere"}, "vllm_mode must be one of"),
    ],
)
def test_what_the_engine_cannot_sample_is_refused(tmp_path, monkeypatch, config, settings, message):
    pretend_vllm(monkeypatch)
    plain = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 2, "bf16": False}
    with pytest.raises(ValueError, match=message):
        config(use_vllm=True, **plain, **settings)


class Returns:
    """An engine that gives fixed completions, where TRL's object would be."""

    def __init__(self, *completions):
        self.completions = list(completions)

    def generate(self, prompts, images, num_generations):
        return None, self.completions, None, None


def sampled_by(*completions, num_steps=4):
    from helpers import prompts, random_for

    from softrl.models.policy import Policy

    batch = prompts(2)
    engine = GenerationEngine(Returns(*completions))
    return engine.hard_rollout(Policy(llama()), batch, Truncation(1), random_for(2), num_steps, eos_ids=(EOS,))


def test_completions_are_padded_and_masked_through_their_end():
    rollout = sampled_by([5, EOS], [5, EOS, 7, 7])
    assert rollout.tokens.tolist() == [[5, EOS, EOS, EOS], [5, EOS, 7, 7]]
    assert rollout.mask.tolist() == [[True, True, False, False]] * 2
    assert sampled_by([5, EOS], [EOS]).tokens.shape == (2, 2)
    assert rollout.tokens.max() < V


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        (([5, 6], [5, 6, 7, 8]), r"ended a completion after 2 of 4 tokens with id 6.*--max-model-len"),
        (([5, EOS],), "1 completions for 2 prompts"),
        (([], [EOS]), "a completion of 0 tokens"),
        (([5] * 5, [EOS]), "a completion of 5 tokens"),
    ],
)
def test_completions_that_are_not_the_policys_are_refused(completions, message):
    with pytest.raises(ValueError, match=message):
        sampled_by(*completions)


def test_prompts_of_the_stand_in_are_told_apart():
    """Its streams are keyed by the prompts' indices, so they must differ."""
    assert len(set(dataset()["prompt"])) == len(dataset())
