"""Logits by distance: by hand, in low precision, and when the embedding they are measured to changes."""

import copy

import pytest
import torch
from contexts.test_soft_ar import embedded, soft_ar, texts
from helpers import V
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from softrl.contexts.distance_head import DistanceHead, distance_logits
from softrl.models.policy import Policy, check_policy


def test_logits_by_distance_and_a_head_that_moves():
    model, ids = soft_ar(output="embedding"), texts(1)
    table, head = model.get_input_embeddings().weight, model.head
    output = model.model(ids).last_hidden_state[0, 4] @ head.projection.weight.T + head.projection.bias
    expected = torch.stack([-((output - table[v]) ** 2).sum() / 0.2 for v in range(V)])
    torch.testing.assert_close(model(ids).logits[0, 4], expected)
    torch.testing.assert_close(distance_logits(output, table, 0.4), expected / 2)
    torch.testing.assert_close(model.soft_outputs(model.model(ids).last_hidden_state)[0, 4], output)
    model(ids).logits.square().sum().backward()
    assert head.log_temperature.grad.abs() > 0.0
    assert table.grad[0].norm() > 0.0  # of a token that the text has not


@pytest.mark.parametrize("norm", [1.6, 16.0])
@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_low_precision_does_not_reach_distances(way, norm):
    """Against float64 on the same numbers, rounded to bfloat16 before; once they were 0.4 and 44 nats off."""
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(500, 256, generator=generator), dim=-1) * norm
    output = table[:50] + 0.1 * table[50:100]
    table, output = table.bfloat16(), output.bfloat16()
    expected = distance_logits(output.double(), table.double(), 0.2).log_softmax(-1)
    if way == "bfloat16":
        found = distance_logits(output, table, 0.2)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = distance_logits(output, table.float(), torch.tensor(0.2))
    assert found.dtype == torch.float32
    assert (found.log_softmax(-1) - expected).abs().max() < 4e-5 * norm**2


def test_a_scaled_embedding_has_its_distances_scaled():
    model = soft_ar("gemma3", output="embedding")
    torch.testing.assert_close(model.head.embeddings, 4.0 * model.get_input_embeddings().weight)  # sqrt(16)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_vocabulary_grows_under_a_head_of_distances(tmp_path, name):
    model, ids = soft_ar(name, output="embedding"), texts(1)
    before = model(ids).logits
    model.resize_token_embeddings(V + 3)
    after = model(ids).logits
    assert after.shape[-1] == V + 3 == model.config.vocab_size == model.head.embeddings.shape[0]
    torch.testing.assert_close(after[..., :V], before)
    y = model.head.outputs(model.model(ids).last_hidden_state)[0, 2]
    new = embedded(model, torch.tensor([V + 1]))[0]
    torch.testing.assert_close(after[0, 2, V + 1], -(y - new).square().sum() / 0.2)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64")
    torch.testing.assert_close(again(ids).logits, after, rtol=1e-6, atol=1e-6)
    model.set_input_embeddings(nn.Embedding(V + 3, 16, dtype=torch.float64))
    assert model.head.embeddings is model.get_input_embeddings().weight


def test_a_copy_has_its_own_embedding_for_distances():
    model = soft_ar(output="embedding")
    other = copy.deepcopy(model)
    assert isinstance(other.lm_head, DistanceHead)
    assert other.lm_head.embeddings is other.get_input_embeddings().weight
    assert other.lm_head.embeddings is not model.get_input_embeddings().weight


def test_a_copy_of_the_head_alone_keeps_the_model_s_embedding():
    """PEFT copies it for `modules_to_save`; the decoder must not be copied along."""
    model = soft_ar(output="embedding")
    other = copy.deepcopy(model.head)
    assert other.projection.weight is not model.head.projection.weight
    assert torch.equal(other.projection.weight, model.head.projection.weight)
    assert other.embeddings is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}],
    ids=["LoRA of the embedding", "an embedding of its own"],
)
def test_distances_are_to_the_embedding_that_an_adapter_makes(settings, name):
    model, ids = soft_ar(name, output="embedding"), texts(1)
    before, old = model(ids).logits, model.head.embeddings.detach().clone()
    tuned = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings)).eval()
    with torch.no_grad():
        for parameter in (each for key, each in tuned.named_parameters() if each.requires_grad and "embed" in key):
            parameter.add_(0.3)
    table = embedded(model, torch.arange(V))
    assert (table - old).abs().max() > 0.1
    y = model.head.outputs(model.model(ids).last_hidden_state)
    expected = -(y[:, :, None] - table).square().sum(-1) / 0.2
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)
    check_policy(Policy(tuned))
    model(ids).logits[0, 4].logsumexp(-1).backward()  # of tokens that the text has not as well
    learned = [each for key, each in tuned.named_parameters() if each.requires_grad and "embed" in key]
    assert all(each.grad.abs().sum() > 0.0 for each in learned)
    with tuned.disable_adapter():
        torch.testing.assert_close(model.head.embeddings, old)
        torch.testing.assert_close(model(ids).logits, before)
