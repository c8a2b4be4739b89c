"""Tiny random sequence classifiers, their tokenizer, and texts for them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    CTRLConfig,
    CTRLForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

V, EOS, PAD = 23, 1, 2

_SPECIAL = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": EOS}
_DECODER = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
_ENCODER = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 34, "pad_token_id": PAD,
}  # fmt: skip


def drawn(model_class, config, seed=0):
    """A model whose attention is far from uniform and whose biases are not zero, as after training."""
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(0.0, 0.5, generator=generator)
    return model


def llama(num_labels=1, **settings):
    """No position embeddings, grouped keys."""
    config = LlamaConfig(**_DECODER, **(_SPECIAL | settings), num_labels=num_labels)
    return drawn(LlamaForSequenceClassification, config)


def qwen2(num_labels=1, **settings):
    """Llama with biases; a sliding window where one is set."""
    config = Qwen2Config(**_DECODER, **(_SPECIAL | settings), num_labels=num_labels)
    return drawn(Qwen2ForSequenceClassification, config)


def gpt2(num_labels=1, **settings):
    """Learned absolute positions."""
    sizes = {"vocab_size": V, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, **(_SPECIAL | settings), num_labels=num_labels)
    return drawn(GPT2ForSequenceClassification, config)


def bert(num_labels=1, **settings):
    """Reads both ways and pools the first token through a layer of its own."""
    return drawn(BertForSequenceClassification, BertConfig(**_ENCODER, num_labels=num_labels, **settings))


def roberta(num_labels=1):
    """As BERT, with the pooler in the head, and positions that count from the pad id on."""
    return drawn(RobertaForSequenceClassification, RobertaConfig(**_ENCODER, num_labels=num_labels))


def distilbert(num_labels=1):
    """As BERT, with another pooler and no position ids in its arguments' defaults."""
    config = DistilBertConfig(
        vocab_size=V, dim=16, hidden_dim=24, n_layers=2, n_heads=4, max_position_embeddings=32, pad_token_id=PAD,
        num_labels=num_labels,
    )  # fmt: skip
    return drawn(DistilBertForSequenceClassification, config)


def bloom():
    """ALiBi: needs a two-dimensional mask."""
    return drawn(BloomForSequenceClassification, BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=2,
                                                             num_labels=1, **_SPECIAL))  # fmt: skip


def ctrl():
    """Pools the last token, but its head is not called `score`."""
    config = CTRLConfig(vocab_size=V, n_embd=16, n_layer=2, n_head=2, dff=24, num_labels=1, pad_token_id=PAD)
    return drawn(CTRLForSequenceClassification, config)


CLASSIFIERS = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "llama, pad is eos": lambda num_labels=1: llama(num_labels, pad_token_id=EOS),
    "bert": bert,
    "roberta": roberta,
    "distilbert": distilbert,
}


def tokenizer(shift=0):
    """Words "w0" to "w22"; with a shift they have other ids."""
    vocabulary = {f"w{(number + shift) % V}": number for number in range(V)}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=f"w{(PAD + shift) % V}")


PROMPTS = ["w3 w4 w5 w6", "w7", "w8 w9", "w10 w11 w12", "w13 w5"]


def completions(dtype=torch.float64, num_kept=3):
    """Ids and weights [5, 6, K] that keep the end at every step, and the heaviest ids, of 4, 1, 6, 3 and 6 tokens."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(PROMPTS), 6)
    ids = torch.stack([torch.randperm(V - 3, generator=generator)[:num_kept] + 3 for _ in range(shape[0] * shape[1])])
    ids = ids.view(*shape, num_kept)
    ids[..., 0] = EOS
    weights = torch.rand(*shape, num_kept, generator=generator, dtype=torch.float64)
    weights[..., 0] = 0.3 * weights[..., 1:].amin(-1)
    for row, step in ((0, 3), (1, 0), (2, 5), (3, 2)):
        weights[row, step, 0] = 3.0
    weights = weights / weights.sum(-1, keepdim=True)
    heaviest = ids.gather(-1, weights.argmax(-1, keepdim=True)).squeeze(-1)
    return ids, weights.to(dtype), heaviest
