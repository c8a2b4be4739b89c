"""The policy wrapper: its logits are the model's own, its chunks change nothing, and what it cannot do it refuses."""

import pytest
import torch
from helpers import ALL_MODELS, EOS, gpt2, llama, mamba, prompts, random_for, relaxation_of
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn

from softrl.estimators.adjoint import solve_cotangents
from softrl.estimators.system import AdjointSettings
from softrl.models import policy as policy_module
from softrl.models.policy import Policy, check_policy, evaluation_mode
from softrl.models.virtual_tokens import unwrap
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.embedding import check_norm_correction


@pytest.mark.parametrize("model_name", ALL_MODELS)
def test_logits_are_the_models_own(model_name):
    model, batch = ALL_MODELS[model_name](), prompts()
    policy = Policy(model, 1.7)
    check_policy(policy)
    tokens = torch.tensor([[5, 9, 4]] * 3)
    with torch.no_grad():
        hidden = policy.hidden(batch, policy.embed(tokens))
        ours = policy.head(hidden.flatten(0, 1)).view(3, 3, -1)
        ids = torch.cat([batch.ids, tokens[:, :-1]], 1)
        mask = torch.cat([batch.mask, torch.ones(3, 2).bool()], 1).long()
        extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if model_name not in ("gru", "mamba") else {}
        theirs = model(input_ids=ids, attention_mask=mask, **extra).logits[:, -3:] / 1.7
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5)


def test_a_head_that_softrl_does_not_know_is_noticed():
    model = llama(tied=False)
    forward = model.forward
    model.forward = lambda *args, **kwargs: _flipped(forward(*args, **kwargs))
    with pytest.raises(TypeError, match="logits differ from decoder"):
        check_policy(Policy(model))


def _flipped(output):
    output.logits = output.logits.flip(-1)
    return output


@pytest.mark.parametrize("method", ["kept_logits", "embed_soft", "feedback"])
def test_chunks_change_nothing(monkeypatch, method):
    policy = Policy(gpt2())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 23, (11, 4), generator=generator)
    hidden = torch.randn(11, 16, generator=generator, dtype=torch.float64)
    weights = torch.rand(11, 4, generator=generator, dtype=torch.float64)
    arguments = {
        "kept_logits": (hidden, ids), "embed_soft": (ids, weights), "feedback": (ids, weights, hidden)
    }[method]  # fmt: skip
    whole = getattr(policy, method)(*arguments)
    monkeypatch.setattr(policy_module, "CHUNK_ELEMENTS", 150)  # two soft tokens a chunk
    torch.testing.assert_close(getattr(policy, method)(*arguments), whole)
    if method == "kept_logits":
        torch.testing.assert_close(whole, policy.head(hidden).gather(-1, ids))


def test_lora_reference_is_the_base_model():
    base = llama()
    tokens, batch = torch.tensor([[5, 9, 4]] * 3), prompts()
    plain = Policy(llama()).hidden(batch, Policy(llama()).embed(tokens))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    adapted, reference = Policy(model), Policy(model, context=model.disable_adapter)
    torch.testing.assert_close(reference.hidden(batch, reference.embed(tokens)), plain)
    assert (adapted.hidden(batch, adapted.embed(tokens)) - plain).norm() > 1e-3 * plain.norm()


def test_checkpointing_with_a_cache_is_refused():
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with pytest.raises(ValueError, match=r"gradient checkpointing is active.*model\.eval\(\)"):
        Policy(model).begin(prompts(), 1, 4)
    model.eval()
    Policy(model).begin(prompts(), 1, 4)


def test_checkpointed_evaluation_mode_recomputes_layers_without_dropout():
    model = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    evaluation_mode(model, checkpointed=True)
    layers = [module for module in model.modules() if module.training]
    assert len(layers) == 2
    assert not any(isinstance(module, nn.Dropout) for module in layers)
    policy = Policy(model)
    embeds = torch.randn(3, 4, 16, dtype=torch.float64)
    checkpointed = torch.autograd.grad(policy.hidden(prompts(), embeds).square().sum(), list(model.parameters())[2:4])
    evaluation_mode(model)
    plain = torch.autograd.grad(policy.hidden(prompts(), embeds).square().sum(), list(model.parameters())[2:4])
    for a, b in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_models_without_parallel_input_embeddings_are_refused():
    class OnlyIds(nn.Module):
        def forward(self, input_ids):
            return input_ids

        @property
        def base_model(self):
            return self

    with pytest.raises(TypeError, match=r"OnlyIds has no parallel forward over inputs_embeds.*use a causal LM"):
        Policy(OnlyIds())
    with pytest.raises(ValueError, match=r"prepends virtual tokens to the prompt, which would be left out here"):
        unwrap(get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))
    with pytest.raises(ValueError, match="sampling temperature must be positive"):
        Policy(llama(), 0.0)
    with pytest.raises(ValueError, match="norm_correction must be one of"):
        check_norm_correction("l2")


def test_sequential_says_where_it_does_not_work():
    policy, relaxation = Policy(mamba()), relaxation_of("softmax")
    rollout = soft_rollout(policy, prompts(), relaxation, random_for(3), 3, eos_ids=(EOS,))

    def objective(fed, hidden):
        return fed.square().sum((-2, -1))

    with pytest.raises(ValueError, match=r"MambaForCausalLM keeps neither. Use method='parallel'"):
        solve_cotangents(policy, rollout, relaxation, objective, AdjointSettings("sequential"))
    state = policy.begin(prompts(), 1, 3)[1]
    with pytest.raises(RuntimeError, match=r"not differentiable.*method='parallel'"):
        policy.advance(state, torch.zeros(3, 1, 12, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "jacobi"}, "method must be one of"),
        ({"hops": -1}, "hops must be at least 0"),
        ({"hops": 2, "method": "sequential"}, "hops=2 with method='sequential'"),
        ({"feedback_discount": 1.5}, r"feedback_discount must lie in \[0, 1\]"),
        ({"adjoint_clip": 0.0}, "adjoint_clip must be positive"),
        ({"tol": -1.0}, "tol must not be negative"),
    ],
)
def test_bad_adjoint_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdjointSettings(**settings)
