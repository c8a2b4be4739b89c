"""Likelihood rewards against the language model's own forward on plain text, a row at a time."""

import pytest
import torch
from helpers import ALL_MODELS, EOS, V, rwkv
from trainers.tiny import word_tokenizer

from softrl.rewards.base import checked_hard, checked_soft, one_hot_tokens
from softrl.rewards.likelihood import LikelihoodReward, TargetLikelihoodReward
from softrl.types import SoftTokens

PROMPTS = ["w3", "w5 w6 w7", "w8 w9 w4 w11"]
TARGETS = ["w12", "w13 w14 w15", "w3 w4"]
IDS = torch.tensor([[5, 9, EOS, 0, 0], [10, 3, 4, 8, 6], [EOS, 0, 0, 0, 0]])
MASK = torch.arange(5) < torch.tensor([3, 5, 1])[:, None]


def ids_of(text):
    return word_tokenizer()(text, add_special_tokens=False).input_ids


def log_probs(model, context, tokens):
    """Of the tokens behind the context, by one forward on ids."""
    logits = model(input_ids=torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1)[range(len(tokens)), tokens]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gru"])
def test_likelihood_is_the_models_own(name, reduction):
    model = ALL_MODELS[name]()
    reward = LikelihoodReward(model, word_tokenizer(), reduction=reduction)
    expected = []
    for prompt, ids, mask in zip(PROMPTS, IDS, MASK, strict=True):
        values = log_probs(model, ids_of(prompt), ids[mask].tolist())
        expected.append(values.mean() if reduction == "mean" else values.sum())
    hard = checked_hard(reward, IDS, MASK, prompt=PROMPTS)
    torch.testing.assert_close(hard, torch.stack(expected), rtol=1e-5, atol=1e-5)  # llama's norms are in float32


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_target_likelihood_is_the_models_own(name):
    """The end of sequence is not read, and the target follows the text's last token."""
    model = ALL_MODELS[name]()
    settings = {"separator": "w20 w21", "reduction": "sum"}
    reward = TargetLikelihoodReward(model, word_tokenizer(), **settings)
    expected, alone = [], []
    for prompt, ids, mask, target in zip(PROMPTS, IDS, MASK, TARGETS, strict=True):
        read = [token for token in ids[mask].tolist() if token != EOS]
        between = ids_of("w20 w21")
        expected.append(log_probs(model, ids_of(prompt) + read + between, ids_of(target)).sum())
        alone.append(log_probs(model, ids_of(prompt) + between, ids_of(target)).sum())
    hard = checked_hard(reward, IDS, MASK, prompt=PROMPTS, target=TARGETS)
    torch.testing.assert_close(hard, torch.stack(expected), rtol=1e-5, atol=1e-5)
    gain = TargetLikelihoodReward(model, word_tokenizer(), baseline=True, **settings)
    found = checked_hard(gain, IDS, MASK, prompt=PROMPTS, target=TARGETS)
    torch.testing.assert_close(found, torch.stack(expected) - torch.stack(alone), rtol=1e-5, atol=1e-5)
    assert found[2].abs() < 1e-6, "an empty completion tells nothing"


@pytest.mark.parametrize(
    ("make", "settings"), [(LikelihoodReward, {}), (TargetLikelihoodReward, {"separator": "w20"})],
    ids=["completion", "target"],
)  # fmt: skip
def test_soft_stopping_reads_what_is_written(make, settings):
    """One-hot tokens behind the end, which survival hides, leave no trace."""
    reward = make(ALL_MODELS["gpt2"](), word_tokenizer(), **settings)
    columns = {"prompt": PROMPTS, "target": TARGETS}
    everything = torch.ones_like(MASK)
    soft = SoftTokens(
        IDS.masked_fill(~MASK, 7)[..., None], torch.ones(3, 5, 1, dtype=torch.float64), everything, (EOS,)
    )
    hard = checked_hard(reward, IDS, MASK, **columns)
    torch.testing.assert_close(checked_soft(reward, soft, **columns), hard, rtol=1e-6, atol=1e-6, check_dtype=False)


def test_a_mixture_scores_what_its_embedding_says():
    """Cross entropy of the first token; the second sees the mixture of embeddings."""
    model = ALL_MODELS["gpt2"]()
    weights = torch.tensor([[[0.3, 0.7], [0.6, 0.4]]], dtype=torch.float64)
    ids = torch.tensor([[[5, 6], [9, 10]]])
    embedding = model.get_input_embeddings()
    mixed = (weights[0, 0, :, None] * embedding(ids[0, 0])).sum(0)
    prompt = ids_of("w8 w3")
    embeds = torch.cat([embedding(torch.tensor(prompt)), mixed[None]])[None]
    values = model(inputs_embeds=embeds).logits[0, 1:].log_softmax(-1)
    expected = (weights[0] * values.gather(-1, ids[0])).sum()
    reward = LikelihoodReward(model, word_tokenizer(), reduction="sum")
    soft = checked_soft(reward, SoftTokens(ids, weights, torch.ones(1, 2, dtype=torch.bool)), prompt=["w8 w3"])
    torch.testing.assert_close(soft, expected[None])


def test_what_cannot_be_scored():
    tokenizer, one_hot = word_tokenizer(), one_hot_tokens(IDS, MASK)
    reward = TargetLikelihoodReward(ALL_MODELS["gpt2"](), tokenizer, separator="w20")
    with pytest.raises(ValueError, match="without a column 'prompt'"):
        reward.soft(one_hot, target=TARGETS)
    with pytest.raises(ValueError, match=r"no column 'target' \(it has \['prompt'\]\)"):
        reward.soft(one_hot, prompt=PROMPTS)
    with pytest.raises(ValueError, match="row 1 of the column 'target' is ''; give a text of at least one token"):
        reward.soft(one_hot, prompt=PROMPTS, target=["w5", "", "w6"])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        reward.soft(one_hot, prompt=["", "w3", "w4"], target=TARGETS)
    with pytest.raises(ValueError, match=f"token id {V + 3} is outside the {V} ids"):
        reward.hard(IDS + V - 2, MASK, prompt=PROMPTS, target=TARGETS)
    with pytest.raises(ValueError, match="separator='' has no token"):
        TargetLikelihoodReward(ALL_MODELS["gpt2"](), tokenizer, separator="")
    for model in (rwkv(), ALL_MODELS["gemma3"]()):  # the latter's sliding window is lost with an additive mask
        with pytest.raises(TypeError, match=r"does not score a target behind a soft completion as it scores plain"):
            TargetLikelihoodReward(model, tokenizer, separator="w20")
    with pytest.raises(ValueError, match="'nowhere' cannot be loaded as a causal language model"):
        LikelihoodReward.from_pretrained("nowhere", tokenizer)
