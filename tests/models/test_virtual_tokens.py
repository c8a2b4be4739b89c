"""Virtual tokens of PEFT's prompt learning: policy, rollouts and gradients against PEFT's own forward and generate."""

import warnings

import pytest
import torch
from estimators.looped import looped_objective
from helpers import EOS, PairReward, V, gemma3, gpt2, llama, mamba, prompts, random_for, relaxation_of
from peft import (
    CPTConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import Qwen2Config, Qwen2ForCausalLM

from softrl.estimators.pathwise import pathwise_estimate, surrogate
from softrl.estimators.system import AdjointSettings
from softrl.models.branches import read_texts
from softrl.models.policy import Policy, check_policy
from softrl.models.thinking import ThinkingConfig, ThinkingLM
from softrl.objectives.token_terms import DirectTerms
from softrl.rollouts.hard import hard_rollout
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.relaxation import make_relaxation
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts, rows_of

N_VIRTUAL = 3
T = 5


def qwen2(seed=0, tied=True):
    """Biases in its attention's projections, grouped keys."""
    config = Qwen2Config(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=EOS, pad_token_id=2,
    )  # fmt: skip
    generator, model = torch.Generator().manual_seed(seed), Qwen2ForCausalLM(config).double().eval()
    model.get_input_embeddings().padding_idx = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.4, generator=generator)
    return model


MODELS = {"gpt2": gpt2, "llama": llama, "qwen2": qwen2, "gemma3": gemma3}
KINDS = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N_VIRTUAL),
    "p-tuning, MLP": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N_VIRTUAL, encoder_hidden_size=7
    ),
    "p-tuning, LSTM": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N_VIRTUAL, encoder_hidden_size=7,
        encoder_reparameterization_type="LSTM", encoder_dropout=0.5, encoder_num_layers=1,
    ),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N_VIRTUAL),
    "prefix tuning, projected": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N_VIRTUAL, prefix_projection=True, encoder_hidden_size=7
    ),
}  # fmt: skip


def with_virtual(model, kind):
    """The model with virtual tokens drawn at a scale at which they matter, in float64."""
    wrapped = get_peft_model(model, KINDS[kind]()).double().eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in wrapped.prompt_encoder.parameters():
            parameter.normal_(0.0, 0.7, generator=generator)
    return wrapped


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def alone(batch, row):
    """One row of a batch without its padding."""
    return Prompts(batch.ids[row : row + 1, batch.mask[row]], batch.mask[row : row + 1, batch.mask[row]])


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_name", MODELS)
def test_every_row_of_a_padded_batch_gives_the_logits_of_pefts_own_forward(model_name, kind):
    """Parallel and step by step; PEFT on the row alone, where it counts no padding."""
    model, batch = with_virtual(MODELS[model_name](), kind), prompts()
    policy = Policy(model)
    check_policy(policy)
    slides = model_name == "gemma3" and "prefix" in kind  # its window counts slots, and padding comes after the prefix
    assert policy.honours_padding == (not slides)
    if slides:
        batch = Prompts(batch.ids, torch.ones_like(batch.mask))
    tokens = torch.tensor([[5, 9, 4], [7, 7, 3], [11, 4, 20]])
    with torch.no_grad():
        hidden = policy.hidden(batch, policy.embed(tokens))
        first, state = policy.begin(batch, 1, capacity=3)
        stepped = [first, *(policy.advance(state, policy.embed(tokens[:, t : t + 1]))[:, 0] for t in range(2))]
        for row in range(3):
            ids = torch.cat([alone(batch, row).ids, tokens[row : row + 1, :2]], 1)
            theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -3:].double()
            assert relative(policy.head(hidden[row]), theirs) < 1e-9
            without = model.get_base_model()(input_ids=ids).logits[0, -3:].double()
            assert relative(without, theirs) > 1e-2, "virtual tokens have to matter here"
    torch.testing.assert_close(torch.stack(stepped, 1), hidden, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_what_peft_itself_makes_of_padding(kind):
    """Prefix tuning keeps `position_ids`, so padded batches agree; prompt tuning counts the padding. Ours never."""
    model, batch = with_virtual(llama(), kind), prompts()
    policy = Policy(model)
    with torch.no_grad():
        ours = policy.head(policy.hidden(batch, policy.embed(batch.ids[:, :1]))[:, 0])
        where = (batch.mask.long().cumsum(-1) - 1).clamp(min=0)
        theirs = model(input_ids=batch.ids, attention_mask=batch.mask.long(), position_ids=where).logits[:, -1]
        if kind == "prompt tuning":
            slots = torch.arange(N_VIRTUAL + batch.ids.shape[1])[None].expand(3, -1)
            embeds = torch.cat([model.get_prompt(3), policy.embed(batch.ids)], 1)
            mask = torch.cat([torch.ones(3, N_VIRTUAL, dtype=torch.bool), batch.mask], 1)
            counted = policy.decoder(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=slots)
            assert relative(policy.head(counted.last_hidden_state[:, -1]), theirs) < 1e-9
    unpadded = batch.mask.all(-1)
    assert 0 < unpadded.sum() < 3
    assert relative(ours[unpadded], theirs[unpadded]) < 1e-9
    assert (relative(ours[~unpadded], theirs[~unpadded]) < 1e-9) == (kind == "prefix tuning")


@pytest.mark.parametrize(
    ("model_name", "kind"), [("gpt2", "prompt tuning"), ("llama", "p-tuning, MLP"), ("llama", "prefix tuning")]
)
def test_greedy_rollouts_are_pefts_own(model_name, kind):
    """One kept id is greedy free running: soft and hard rollouts of a padded batch, two samples a prompt.

    Against PEFT's forward token by token, and its generate without a cache where it makes none of its own: PEFT 0.21
    knows transformers' cache by the name that it had before 5.24, and with one its generate differs from its forward.
    """
    model, batch = with_virtual(MODELS[model_name](), kind), prompts()
    policy = Policy(model)
    greedy = make_relaxation("softmax", Truncation(1))
    rollout = soft_rollout(policy, batch, greedy, random_for(6), T, num_samples=2)
    for row in range(3):
        ids = start = alone(batch, row).ids
        for _ in range(T):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        theirs = ids[0, start.shape[1] :].tolist()
        assert rollout.tokens[2 * row].tolist() == rollout.tokens[2 * row + 1].tolist() == theirs
        if kind != "prefix tuning":
            generated = model.generate(
                input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=T, do_sample=False,
                pad_token_id=2, eos_token_id=None, use_cache=False,
            )  # fmt: skip
            assert generated.tolist() == ids.tolist()
    cold = hard_rollout(policy.at_temperature(1e-6), batch, Truncation(1), random_for(3), T)
    assert torch.equal(cold.tokens, rollout.tokens[::2])


def gradients(policy, relaxation, rollout, settings, terms):
    estimate = pathwise_estimate(policy, rollout, relaxation, PairReward(), terms, settings)
    output = surrogate(policy, relaxation, estimate, terms, settings)
    assert output.replay_error < 1e-10
    wanted = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(output.value.sum(), wanted)
    return torch.cat([grad.flatten() for grad in grads])


def loop_gradient(model, rollout, relaxation):
    """PEFT's own forward on the whole prefix at every step, row by row without padding, in one graph."""
    total = 0.0
    for row in range(len(rollout.mask)):
        one = rows_of(rollout, slice(row, row + 1))
        one = type(one)(**{**vars(one), "prompts": alone(rollout.prompts, row)})
        total = total + looped_objective(model, one, relaxation, PairReward(), 1.3)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(total, wanted)])


@pytest.mark.parametrize(
    ("model_name", "tied", "kind", "relaxation_name"),
    [
        ("gpt2", True, "prompt tuning", "softmax"),
        ("gpt2", False, "prefix tuning", "gumbel_softmax"),
        ("gpt2", True, "p-tuning, LSTM", "gumbel_softmax"),
        ("llama", False, "prompt tuning", "st_gumbel"),
        ("llama", True, "prefix tuning, projected", "softmax"),
        ("llama", False, "p-tuning, MLP", "gumbel_softmax"),
        ("qwen2", True, "prompt tuning", "gumbel_softmax"),
        ("qwen2", False, "prefix tuning", "st_gumbel"),
    ],
)
def test_the_prefix_gets_the_whole_derivative(model_name, tied, kind, relaxation_name):
    """Feedback included, by every solver, on padded prompts; the base model stays frozen."""
    model = with_virtual(MODELS[model_name](tied=tied), kind)
    policy, relaxation, terms = Policy(model, 1.3), relaxation_of(relaxation_name), DirectTerms()
    assert not policy.trains_embedding
    rollout = soft_rollout(policy, prompts(), relaxation, random_for(3), T, eos_ids=(EOS,))
    expected = loop_gradient(model, rollout, relaxation)
    for method in ("sequential", "blocked", "parallel", "autograd"):
        settings = AdjointSettings(method, tol=1e-12, block_length=2)
        assert relative(gradients(policy, relaxation, rollout, settings, terms), expected) < 1e-6, method
    detached = gradients(policy, relaxation, rollout, AdjointSettings("parallel", hops=0), terms)
    assert relative(detached, expected) > 1e-3, "the feedback has to matter here"


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_the_reference_is_the_base_model_without_the_prefix(kind):
    batch, tokens = prompts(), torch.tensor([[5, 9, 4]] * 3)
    plain = Policy(llama())
    expected = plain.hidden(batch, plain.embed(tokens))
    model = with_virtual(llama(), kind)
    adapted, reference = Policy(model), Policy(model, context=model.disable_adapter)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(reference.hidden(batch, reference.embed(tokens)), expected)
    first, _ = reference.begin(batch, 1, capacity=3)
    assert torch.equal(first, plain.begin(batch, 1, capacity=3)[0])
    check_policy(reference)
    assert relative(adapted.hidden(batch, adapted.embed(tokens)), expected) > 1e-2
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert (adapted.max_length, reference.max_length, plain.max_length) == (61, 64, 64)
    terms = DirectTerms(kl_weight=0.3, reference=reference)
    relaxation = relaxation_of("softmax")
    rollout = soft_rollout(adapted, batch, relaxation, random_for(3), T)
    found = [gradients(adapted, relaxation, rollout, AdjointSettings(method, tol=1e-12), terms)
             for method in ("sequential", "parallel", "autograd")]  # fmt: skip
    for other in found[1:]:
        assert relative(other, found[0]) < 1e-6


def test_lora_is_fed_as_before():
    """The same numbers through a wrapper with layers changed as through the base model inside it."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    policy, batch, tokens = Policy(model), prompts(), torch.tensor([[5, 9, 4]] * 3)
    assert not policy.virtual.exist
    mask = torch.cat([batch.mask, torch.ones(3, 2, dtype=torch.bool)], 1)
    theirs = model(
        input_ids=torch.cat([batch.ids, tokens[:, :2]], 1), attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
    ).logits[:, -3:]  # fmt: skip
    ours = policy.head(policy.hidden(batch, policy.embed(tokens)).flatten(0, 1)).view_as(theirs)
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("float64_inside")
def test_prompt_tuning_of_a_state_space_model():
    """It has no keys and values, and takes embeddings as well, padded or not; PEFT's prefix tuning does not fit it."""
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N_VIRTUAL, "num_attention_heads": 2, "num_layers": 2}
    model = get_peft_model(mamba(), PromptTuningConfig(token_dim=12, **config)).double().eval()
    policy, relaxation, terms = Policy(model, 1.3), relaxation_of("softmax"), DirectTerms()
    assert policy.honours_padding
    rollout = soft_rollout(policy, prompts(), relaxation, random_for(3), T)
    expected = loop_gradient(model, rollout, relaxation)
    for method in ("parallel", "autograd"):
        actual = gradients(policy, relaxation, rollout, AdjointSettings(method, tol=1e-12), terms)
        assert relative(actual, expected) < 1e-6
    with pytest.raises(ValueError, match=r"prefix tuning learns keys and values, but the state of MambaForCausalLM"):
        Policy(get_peft_model(mamba(), PrefixTuningConfig(token_dim=12, **config)))


def test_what_is_not_fed_is_refused():
    cpt = CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2],
        num_virtual_tokens=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"PeftType.CPT prepends virtual tokens.*use PromptTuningConfig"):
        Policy(get_peft_model(gpt2(), cpt))
    inner = get_peft_model(gpt2(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"virtual tokens around another adapter.*merge_and_unload"):
        Policy(get_peft_model(inner, KINDS["prompt tuning"]()))
    model = with_virtual(gpt2(), "prompt tuning")
    with pytest.raises(ValueError, match=r"prepends virtual tokens.*which a model that thinks leaves out"):
        ThinkingLM(model, ThinkingConfig())
    with pytest.raises(ValueError, match="which a text with branches leaves out"):
        read_texts(Policy(model), "shared", 1, torch.device("cpu"))
    prefix = with_virtual(llama(), "prefix tuning")
    prefix.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    prefix.train()
    with pytest.raises(ValueError, match="gradient checkpointing is active"):
        Policy(prefix).hidden(prompts(), torch.zeros(3, 2, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="5 tokens and 57 generated ones exceed the model's context of 61"):
        soft_rollout(Policy(model), prompts(), relaxation_of("softmax"), random_for(3), 57)
