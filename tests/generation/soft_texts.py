"""A byte-level tokenizer whose pieces cut text in several ways, models in its vocabulary, and scripts for them."""

import torch
from helpers import _redraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

_MERGES = [("<", "/"), ("t", "h"), ("i", "n"), ("in", "k"), ("th", "ink"), (">", "Ċ"), ("a", "b")]


def byte_tokenizer():
    """256 bytes and a few pieces: `</think>` is `</`, `think`, `>`, and there is a piece `>\\n`."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in _MERGES]
    vocabulary = {"<eos>": 0, **{piece: index for index, piece in enumerate(pieces, 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )


def byte_model(seed=0):
    """A tiny GPT-2 in that vocabulary, in float64."""
    config = GPT2Config(
        vocab_size=1 + 256 + len(_MERGES), n_positions=128, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return _redraw(GPT2LMHeadModel(config), seed, 0.4)


def pieces(tokenizer, *words):
    """Ids of single pieces, each of which must be one."""
    ids = [tokenizer.convert_tokens_to_ids(word.replace(" ", "Ġ").replace("\n", "Ċ")) for word in words]
    assert None not in ids
    return ids


class Script:
    """A logits processor under which row i's likeliest token at step t is scripts[i][t], by `margin` nats."""

    def __init__(self, scripts, margin=1.0, prompt_length=None):
        self.scripts, self.margin, self.prompt_length = scripts, margin, prompt_length

    def __call__(self, tokens, logits):
        if self.prompt_length is None:
            self.prompt_length = tokens.shape[1]
        step = tokens.shape[1] - self.prompt_length
        logits = logits.clone()
        for row, script in enumerate(self.scripts):
            if step < len(script):
                margin = self.margin(row, step) if callable(self.margin) else self.margin
                logits[row, script[step]] = logits[row].max() + margin
        return logits


def replayed(model, record, row):
    """log π of every step of a row, in one pass without a cache over what the record says was fed."""
    embedding = model.get_input_embeddings()
    prompt = record.prompts.ids[row][record.prompts.mask[row]]
    fed = (record.weights[row, :, :, None] * embedding(record.ids[row])).sum(1)
    whole = torch.cat([embedding(prompt), fed[:-1]])[None]
    return model(inputs_embeds=whole).logits[0, len(prompt) - 1 :].log_softmax(-1)
