"""`<think>` tokens: rows where they belong, trained alone, and read again by plain transformers."""

import math

import pytest
import torch
from helpers import EOS, PairReward, V, gpt2, llama, prompts, random_for, relaxation_of
from models.test_virtual_tokens import qwen2
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from trainers.tiny import word_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from softrl.estimators.pathwise import pathwise_estimate, surrogate
from softrl.estimators.system import AdjointSettings
from softrl.models.policy import Policy, check_policy
from softrl.models.think_tokens import add_think_tokens, train_only_rows, trainable_rows
from softrl.objectives.token_terms import DirectTerms
from softrl.rollouts.soft import soft_rollout

MODELS = {"gpt2": gpt2, "llama": llama, "qwen2": qwen2}
CASES = [("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False), ("qwen2", True)]
TEXT = torch.tensor([[5, 9, 4, 17]])


@pytest.mark.parametrize(("model_name", "tied"), CASES)
def test_new_rows_are_the_mean_and_take_little_from_the_others(model_name, tied):
    """No context gives a mean row more than the average token: the others keep V / (V + 2) of what they had."""
    model, tokenizer = MODELS[model_name](tied=tied), word_tokenizer()
    before = model(input_ids=TEXT).logits[0].log_softmax(-1)
    mean = model.get_input_embeddings().weight.mean(0)
    head_mean = model.get_output_embeddings().weight.mean(0)
    tokens = add_think_tokens(model, tokenizer)
    assert (tokens.start_id, tokens.end_id, tokens.added) == (V, V + 1, ("<think>", "</think>"))
    assert (model.config.vocab_size, len(tokenizer)) == (V + 2, V + 2)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    torch.testing.assert_close(model.get_input_embeddings().weight[tokens.ids], mean.expand(2, -1))
    torch.testing.assert_close(model.get_output_embeddings().weight[tokens.ids], head_mean.expand(2, -1))
    after = model(input_ids=TEXT).logits[0].log_softmax(-1)
    lost = before - after[:, :V]
    torch.testing.assert_close(lost, lost[:, :1].expand_as(lost))  # all by the same factor
    assert (lost > 0).all()
    assert (lost <= math.log((V + 2) / V) + 1e-9).all()
    check_policy(Policy(model))
    ids = tokenizer.encode("w5 <think> w7 </think> w9", add_special_tokens=False)
    assert ids == [5, V, 7, V + 1, 9]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "w5 <think> w7 </think> w9"


def test_again_changes_nothing_and_known_tokens_are_used():
    model, tokenizer = gpt2(), word_tokenizer()
    tokens = add_think_tokens(model, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens.ids] = 3.0  # as trained
    again = add_think_tokens(model, tokenizer)
    assert again.ids == tokens.ids
    assert again.added == ()
    assert (model.get_input_embeddings().weight[tokens.ids] == 3.0).all()
    assert len(tokenizer) == V + 2
    fresh = add_think_tokens(llama(), tokenizer)  # a tokenizer that was saved with them, and a model that was not
    assert fresh.ids == tokens.ids
    assert fresh.added == ()
    known = add_think_tokens(model, tokenizer, start="w5", end="</think>")
    assert (known.start_id, known.end_id) == (5, V + 1)


def test_rows_that_a_model_has_to_spare_are_used_and_paddings_multiple_is_kept():
    model, tokenizer = llama(tied=False), word_tokenizer(vocab_size=15)  # ids 0 to 14: eight rows to spare
    mean = model.get_input_embeddings().weight[:15].mean(0)
    kept = model.get_input_embeddings().weight[17:].clone()
    tokens = add_think_tokens(model, tokenizer)
    assert tokens.ids == [15, 16]
    assert model.get_input_embeddings().weight.shape[0] == V, "never fewer rows than there are"
    torch.testing.assert_close(model.get_input_embeddings().weight[tokens.ids], mean.expand(2, -1))
    assert torch.equal(model.get_input_embeddings().weight[17:], kept)
    padded, like = llama(tied=False), word_tokenizer()
    tokens = add_think_tokens(padded, like, like="w5 w7", pad_to_multiple_of=16)
    assert padded.get_input_embeddings().weight.shape[0] == padded.config.vocab_size == 32
    for weight in (padded.get_input_embeddings().weight, padded.get_output_embeddings().weight):
        torch.testing.assert_close(weight[tokens.ids], ((weight[5] + weight[7]) / 2).expand(2, -1))
        torch.testing.assert_close(weight[V + 2 :], weight[:V].mean(0).expand(7, -1))


def test_a_heads_bias_gets_its_mean():
    model = gpt2(tied=False)
    model.lm_head = nn.Linear(16, V, dtype=torch.float64)
    tokens = add_think_tokens(model, word_tokenizer())
    torch.testing.assert_close(model.lm_head.bias[tokens.ids], model.lm_head.bias[:V].mean().expand(2))


@pytest.mark.parametrize(("model_name", "tied"), CASES)
@pytest.mark.parametrize("how", ["rows", "lora", "mask"])
def test_only_their_rows_learn_and_plain_transformers_reads_the_result(model_name, tied, how, tmp_path):
    """A step of the pathwise gradient; PEFT is merged before it is saved."""
    model, tokenizer = MODELS[model_name](tied=tied), word_tokenizer()
    tokens = add_think_tokens(model, tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows, lm = trainable_rows(model, tokens), {"task_type": "CAUSAL_LM"}
    assert len(rows) == (1 if tied else 2)
    if how != "mask":
        config = TrainableTokensConfig(token_indices=tokens.ids, target_modules=list(rows), **lm)
        if how == "lora":
            attention = {"gpt2": "c_attn"}.get(model_name, "q_proj")
            config = LoraConfig(r=1, target_modules=[attention], trainable_token_indices=rows, **lm)
        model = get_peft_model(model, config).eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    else:
        release = train_only_rows(model, tokens)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    _step(model, optimizer)
    if how != "mask":
        model = model.merge_and_unload()
    for name, value in model.state_dict().items():
        if how == "lora" and attention in name:
            continue
        changed = (value != before[name]).reshape(len(value), -1).any(-1).nonzero().flatten().tolist()
        is_table = name.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight"))
        assert changed == (tokens.ids if is_table else []), name
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, reader = AutoModelForCausalLM.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = torch.tensor([reader.encode("w5 <think> w7 </think> w9", add_special_tokens=False)])
    assert ids.tolist() == [[5, tokens.start_id, 7, tokens.end_id, 9]]
    with torch.no_grad():
        ours, theirs = (which.double()(input_ids=ids).logits for which in (model, loaded))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # Llama's norms compute in float32
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    if how == "mask":
        release()
        model.zero_grad()
        model(input_ids=ids).logits.square().sum().backward()
        assert model.get_input_embeddings().weight.grad[5].abs().max() > 0


def _step(model, optimizer):
    """Prompts that end with `<think>`, padded, so that their rows are read, kept and fed."""
    policy, terms, settings = Policy(model, 1.3), DirectTerms(entropy_weight=0.1), AdjointSettings("parallel")
    batch = prompts()
    batch.ids[:, -1] = V
    relaxation = relaxation_of("softmax", top_k=V, min_p=0.0)
    rollout = soft_rollout(policy, batch, relaxation, random_for(3), 3, eos_ids=(EOS,))
    reward = PairReward()
    reward.first, reward.second = (torch.cat([u, torch.ones(2).double()]) for u in (reward.first, reward.second))
    estimate = pathwise_estimate(policy, rollout, relaxation, reward, terms, settings)
    assert policy.trains_embedding
    assert policy.trains_head
    (-surrogate(policy, relaxation, estimate, terms, settings).value.sum()).backward()
    optimizer.step()


def test_what_cannot_be_added_is_refused():
    model, tokenizer = gpt2(), word_tokenizer()
    with pytest.raises(ValueError, match=r"must be two different texts, got '<t>' and '<t>'"):
        add_think_tokens(model, tokenizer, start="<t>", end="<t>")
    with pytest.raises(ValueError, match=r"like='' has no tokens"):
        add_think_tokens(model, tokenizer, like="")
    adapted = get_peft_model(gpt2(), LoraConfig(r=1, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"has an adapter already; add the tokens to the base model"):
        add_think_tokens(adapted, tokenizer)
    backend = Tokenizer(tokenizer_models.WordLevel({"[UNK]": 0, "<think>": 1, "w": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Punctuation()
    split = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"has '<think>' in its vocabulary, but reads it as the ids \[0, 0, 0\]"):
        add_think_tokens(gpt2(), split)
