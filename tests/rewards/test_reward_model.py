"""Sequence classifiers as rewards: against their own forward on token ids, copies of tokens, finite differences."""

import pytest
import torch
from classifiers import (
    CLASSIFIERS,
    EOS,
    PAD,
    PROMPTS,
    V,
    bert,
    bloom,
    completions,
    ctrl,
    gpt2,
    llama,
    qwen2,
    tokenizer,
)
from transformers import BartConfig, BartForSequenceClassification, LlamaForCausalLM

from softrl.masking import mask_through_eos
from softrl.models import policy
from softrl.rewards.base import checked_hard, checked_soft
from softrl.rewards.reward_model import SequenceClassifierReward
from softrl.types import SoftTokens

EVERYTHING = torch.ones(len(PROMPTS), 6, dtype=torch.bool)


def own_logits(model, ids, mask, prompts=PROMPTS):
    """What the class itself says of prompt and completion, one text at a time and without padding."""
    words = tokenizer()
    texts = [
        words(prompt).input_ids + row[real].tolist() for prompt, row, real in zip(prompts, ids, mask, strict=True)
    ]
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([text])).logits for text in texts])


def one_hot_tokens(eos_ids):
    ids, weights, _ = completions(torch.float32)
    one_hot = torch.zeros_like(weights).scatter(-1, weights.argmax(-1, keepdim=True), 1.0)
    hard = mask_through_eos(ids.gather(-1, weights.argmax(-1, keepdim=True)).squeeze(-1), (EOS,))
    return SoftTokens(ids, one_hot, EVERYTHING if eos_ids else hard, eos_ids)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_both_faces_are_the_classes_own_forward_without_padding(name):
    model = CLASSIFIERS[name](num_labels=3)
    reward = SequenceClassifierReward(model, tokenizer(), label=2)
    *_, ids = completions()
    mask = mask_through_eos(ids, (EOS,))
    assert mask.sum(-1).tolist() == [4, 1, 6, 3, 6]
    expected = own_logits(model, ids, mask)[:, 2]
    assert expected.std() > 1e-2
    torch.testing.assert_close(checked_hard(reward, ids, mask, prompt=PROMPTS), expected, rtol=1e-5, atol=1e-5)
    for eos_ids in ((), (EOS,)):
        soft = checked_soft(reward, one_hot_tokens(eos_ids), prompt=PROMPTS)
        torch.testing.assert_close(soft, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_without_prompts(name):
    model = CLASSIFIERS[name]()
    *_, ids = completions()
    mask = mask_through_eos(ids, (EOS,))
    found = SequenceClassifierReward(model, include_prompt=False).hard(ids, mask)
    torch.testing.assert_close(found, own_logits(model, ids, mask, [""] * 5)[:, 0], rtol=1e-5, atol=1e-5)


def test_conversations_go_through_the_chat_template():
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}w5 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w6{% endif %}"
    )
    model, (*_, ids) = llama(), completions()
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    found = SequenceClassifierReward(model, words).hard(ids, EVERYTHING, prompt=conversations)
    expected = own_logits(model, ids, EVERYTHING, [f"w5 {prompt} w6" for prompt in PROMPTS])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_mean_pooling_is_the_head_on_the_mean_state():
    model, (*_, ids) = gpt2(), completions()
    mask = mask_through_eos(ids, (EOS,))
    reward = SequenceClassifierReward(model, tokenizer(), pooling="mean")
    found = reward.hard(ids, mask, prompt=PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        text = torch.tensor([tokenizer()(prompt).input_ids + ids[row][mask[row]].tolist()])
        expected = model.score(model.transformer(text).last_hidden_state.mean(1))[0, 0]
        assert found[row].item() == pytest.approx(expected.item(), abs=1e-5)


def test_survival_of_one_half_is_half_a_token():
    """Attention that cannot tell positions apart weighs a token of survival 1/2 as it weighs one of two copies.

    Word 3 and the end are made the same vector, so an even mixture of both is word 3 and leaves a survival of 1/2;
    the text "3, 8" with survivals 1 and 1/2 is then "3, 3, 8" in hard tokens, at every layer of the encoder.
    """
    model = bert()
    embeddings = model.bert.embeddings
    with torch.no_grad():
        embeddings.position_embeddings.weight.zero_()
        embeddings.word_embeddings.weight[EOS] = embeddings.word_embeddings.weight[3]
    ids = torch.tensor([[[3, EOS], [8, 9]]])
    weights = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    reward = SequenceClassifierReward(model, include_prompt=False)
    soft = reward.soft(SoftTokens(ids, weights, torch.ones(1, 2, dtype=torch.bool), (EOS,)))
    hard = [model(input_ids=torch.tensor([text])).logits[0, 0] for text in ([3, 3, 8], [3, 8])]
    torch.testing.assert_close(soft[0], hard[0], rtol=1e-5, atol=1e-5)
    assert (hard[0] - hard[1]).abs() > 1e-2


def test_the_last_state_is_a_mean_over_where_the_text_may_end():
    """A causal model with one step of doubt: the reward is the mean of both texts' own rewards.

    The first state does not see what follows; the second one reads the first token fully and itself by half.
    """
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[EOS] = model.model.embed_tokens.weight[3]
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.zero_()  # nothing is read, so a state is its own token's alone
    reward = SequenceClassifierReward(model, include_prompt=False)
    ids, weights = torch.tensor([[[3, EOS], [8, 9]]]), torch.tensor([[[0.75, 0.25], [1.0, 0.0]]])
    soft = reward.soft(SoftTokens(ids, weights, torch.ones(1, 2, dtype=torch.bool), (EOS,)))
    short, long = (model(input_ids=torch.tensor([text])).logits[0, 0] for text in ([3], [3, 8]))
    torch.testing.assert_close(soft[0], 0.25 * short + 0.75 * long, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2, pad is eos", "bert"])
def test_gradient_against_finite_differences(name, attention):
    settings = {"pad_token_id": EOS} if "pad is eos" in name else {}
    model = (bert() if name == "bert" else gpt2(**settings)).double()
    model.set_attn_implementation(attention)
    reward = SequenceClassifierReward(model, tokenizer(), link="sigmoid")
    ids, weights, _ = completions()
    tokens = SoftTokens(ids, weights.requires_grad_(), EVERYTHING, (EOS,))
    assert torch.autograd.gradcheck(
        lambda weights: checked_soft(reward, tokens.with_weights(weights), prompt=PROMPTS), weights, fast_mode=True
    )
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize("link", ["identity", "sigmoid", "softmax", "log_softmax"])
def test_links_and_labels(link):
    model = llama(num_labels=3)
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    model.config.label2id = {"bad": 0, "fair": 1, "good": 2}
    *_, ids = completions()
    logits = own_logits(model, ids, EVERYTHING)
    expected = {
        "identity": logits[:, 2],
        "sigmoid": 1 / (1 + (-logits[:, 2]).exp()),
        "softmax": logits[:, 2].exp() / logits.exp().sum(-1),
        "log_softmax": logits[:, 2] - logits.exp().sum(-1).log(),
    }[link]
    for label in (2, "good"):
        found = SequenceClassifierReward(model, tokenizer(), label=label, link=link).hard(
            ids, EVERYTHING, prompt=PROMPTS
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_bfloat16_model_with_float32_weights(name):
    ids, weights, _ = completions(torch.float32)
    weights.requires_grad_()
    tokens = SoftTokens(ids, weights, EVERYTHING, (EOS,))
    exact = SequenceClassifierReward(CLASSIFIERS[name](), tokenizer()).soft(tokens, prompt=PROMPTS)
    found = SequenceClassifierReward(CLASSIFIERS[name]().bfloat16(), tokenizer()).soft(tokens, prompt=PROMPTS)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 5e-2 * exact.norm()
    exact_grad, grad = (torch.autograd.grad(values.sum(), weights)[0] for values in (exact, found))
    assert (grad - exact_grad).norm() < 1e-1 * exact_grad.norm()
    of_mixtures = grad[..., 1:]  # the end's weight also acts through survival, which is never rounded
    assert not torch.equal(of_mixtures, of_mixtures.bfloat16().float()), "weights were rounded on their way"


def test_under_autocast():
    ids, weights, _ = completions(torch.float32)
    tokens = SoftTokens(ids, weights.requires_grad_(), EVERYTHING, (EOS,))
    exact = SequenceClassifierReward(llama(), tokenizer()).soft(tokens, prompt=PROMPTS)
    reward = SequenceClassifierReward(llama(), tokenizer())
    with torch.autocast("cpu", torch.bfloat16):
        found = reward.soft(tokens, prompt=PROMPTS)
    assert 0.0 < (found - exact).norm() < 5e-2 * exact.norm()
    assert torch.autograd.grad(found.sum(), weights)[0].isfinite().all()


def test_embeddings_are_mixed_in_chunks_and_not_kept(monkeypatch):
    """Nothing of size N T K D is saved for the backward pass, and chunks change nothing."""
    reward = SequenceClassifierReward(llama(), tokenizer())
    ids, weights, _ = completions(torch.float32, num_kept=20)
    tokens = SoftTokens(ids, weights.requires_grad_(), EVERYTHING)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.numel()) or saved, lambda one: one):
        whole = reward.soft(tokens, prompt=PROMPTS)
    assert max(kept) < tokens.ids.numel() * 16 / 4
    monkeypatch.setattr(policy, "CHUNK_ELEMENTS", 7 * 20 * 16)
    pieces = reward.soft(tokens, prompt=PROMPTS)
    torch.testing.assert_close(pieces, whole)
    expected, found = (torch.autograd.grad(values.sum(), tokens.weights)[0] for values in (whole, pieces))
    torch.testing.assert_close(found, expected)


def test_the_model_is_frozen_and_dropout_stays_off():
    model = llama(attention_dropout=0.5).train()
    reward = SequenceClassifierReward(model, tokenizer()).train()
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.classifier.modules())
    assert reward.vocab_size == V


def test_a_lora_adapter_around_the_model_stays_active():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(llama(), LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    *_, ids = completions()
    expected = own_logits(adapted, ids, EVERYTHING)[:, 0]
    assert (expected - own_logits(llama(), ids, EVERYTHING)[:, 0]).abs().min() > 1e-3
    found = SequenceClassifierReward(adapted, tokenizer()).hard(ids, EVERYTHING, prompt=PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_from_pretrained(tmp_path):
    folder = tmp_path / "tiny-reward"
    llama(num_labels=2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    reward = SequenceClassifierReward.from_pretrained(folder, tokenizer(), label=1, dtype=torch.float64)
    assert reward.name == "tiny-reward"
    *_, ids = completions()
    found = reward.hard(ids, EVERYTHING, prompt=PROMPTS)
    assert found.dtype == torch.float64
    expected = own_logits(llama(num_labels=2), ids, EVERYTHING)[:, 1].double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"has another tokenizer than the policy: 23 tokens have other ids, 'w0' is 0"
    ):
        SequenceClassifierReward.from_pretrained(folder, tokenizer(shift=5), label=1)


def test_what_is_no_trained_classifier_is_refused(tmp_path):
    LlamaForCausalLM(llama().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no trained sequence classifier: its weights lack \['score.weight'\]"):
        SequenceClassifierReward.from_pretrained(tmp_path, tokenizer())
    with pytest.raises(
        ValueError, match=r"'no-such/model' cannot be loaded as a sequence classifier .*pass a hub name"
    ):
        SequenceClassifierReward.from_pretrained("no-such/model", tokenizer())


def test_models_that_cannot_read_soft_tokens_are_refused():
    small = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    with pytest.raises(TypeError, match=r"BartForSequenceClassification\) cannot read soft tokens"):
        SequenceClassifierReward(BartForSequenceClassification(BartConfig(vocab_size=V, **small)), tokenizer())
    with pytest.raises(TypeError, match=r"CTRLForSequenceClassification\) scores embeddings behind padding otherwise"):
        SequenceClassifierReward(ctrl(), tokenizer())


@pytest.mark.parametrize(
    "make", [bloom, lambda: qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=0)]
)
def test_soft_stopping_is_refused_where_attention_takes_no_bias(make):
    """ALiBi needs a mask of two axes; a sliding window would be lost once the text is longer than it."""
    reward = SequenceClassifierReward(make(), tokenizer())
    ids, weights, _ = completions(torch.float32)
    assert reward.soft(SoftTokens(ids, weights, EVERYTHING), prompt=PROMPTS).isfinite().all()
    with pytest.raises(ValueError, match=r"cannot be told of soft stopping.*soft_stopping=False"):
        reward.soft(SoftTokens(ids, weights, EVERYTHING, (EOS,)), prompt=PROMPTS)


def test_a_sliding_window_longer_than_the_text_does_not_matter():
    reward = SequenceClassifierReward(
        qwen2(use_sliding_window=True, sliding_window=10, max_window_layers=0), tokenizer()
    )
    *_, ids = completions()
    expected = reward.hard(ids, mask_through_eos(ids, (EOS,)), prompt=PROMPTS)
    torch.testing.assert_close(reward.soft(one_hot_tokens((EOS,)), prompt=PROMPTS), expected, rtol=1e-5, atol=1e-5)


def test_settings_that_the_model_does_not_have():
    with pytest.raises(ValueError, match="reads the prompts and has no tokenizer"):
        SequenceClassifierReward(llama())
    for label in (None, 3, -1, "fine"):
        with pytest.raises(ValueError, match=r"has 3 labels .*LABEL_2.* label must be one of their indices or names"):
            SequenceClassifierReward(llama(num_labels=3), tokenizer(), label=label)
    with pytest.raises(ValueError, match=r"link='softmax' .* which has one logit, is constant"):
        SequenceClassifierReward(llama(), tokenizer(), link="softmax")
    with pytest.raises(ValueError, match="pools the first token in its own way"):
        SequenceClassifierReward(bert(), tokenizer(), pooling="mean")


def test_texts_that_cannot_be_read():
    reward = SequenceClassifierReward(llama(), tokenizer(), name="taste")
    *_, ids = completions()
    with pytest.raises(
        ValueError, match=r"'taste' reads the prompts, and there is no column 'prompt' among \['answer'\]"
    ):
        reward.hard(ids, EVERYTHING, answer=["a"] * 5)
    with pytest.raises(
        ValueError, match=rf"token id {V} is outside the {V} ids of reward 'taste'.*policy's tokenizer"
    ):
        reward.hard(torch.full_like(ids, V), EVERYTHING, prompt=PROMPTS)
    with pytest.raises(ValueError, match="up to 34 tokens exceed the context of 32"):
        reward.hard(ids.repeat(1, 5), EVERYTHING.repeat(1, 5), prompt=PROMPTS)
    with pytest.raises(ValueError, match="got an empty text: sequence 1 has neither a prompt nor a token"):
        reward.hard(ids, EVERYTHING & (torch.arange(5) != 1)[:, None], prompt=["w3", "", "w3", "w3", "w3"])


def test_hidden_ids_may_be_anything_and_an_empty_completion_is_its_prompt():
    model = llama()
    reward = SequenceClassifierReward(model, tokenizer())
    *_, ids = completions()
    mask = torch.arange(6) < torch.tensor([6, 0, 2, 0, 1])[:, None]
    found = reward.hard(ids.masked_fill(~mask, -100), mask, prompt=PROMPTS)
    torch.testing.assert_close(found, own_logits(model, ids, mask)[:, 0], rtol=1e-5, atol=1e-5)
    assert PAD not in ids[mask]
