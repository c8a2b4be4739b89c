"""Tokens that say where thinking begins and ends, `<think>` and `</think>`: added to a tokenizer and a model, and
trained alone where nothing else should change.

A new row starts as the mean of those that were there. Its logit is then the mean of their logits, so that no context
gives it more than the average token, and the probabilities of the others shrink by `V / (V + n)` at the most.
Left out: the chat template, which has to put the tokens where they belong; models that an engine has sharded already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ThinkTokens:
    """The two tokens and their ids; `added` are those that the tokenizer did not have."""

    start: str
    end: str
    start_id: int
    end_id: int
    added: tuple[str, ...] = ()

    @property
    def ids(self) -> list[int]:
        """Both ids, in rising order."""
        return sorted((self.start_id, self.end_id))


def add_think_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    start: str = "<think>",
    end: str = "</think>",
    like: str | None = None,
    special: bool = False,
    pad_to_multiple_of: int | None = None,
) -> ThinkTokens:
    """Give tokenizer and model the two tokens; those that the tokenizer has already are used as they are.

    Called again it changes nothing. `save_pretrained` of both and transformers' `from_pretrained` bring them back.

    Args:
        model: transformers causal LM, without an adapter. It gets rows for all ids of the tokenizer, in its input and
            output embeddings, tied or not; rows beyond the tokenizer's ids, which many models have, are used first.
        tokenizer: the model's; changed in place.
        start, end: how they are written.
        like: a text whose tokens' mean embedding the new rows start as; None for the mean of all the tokenizer's.
        special: whether decoding with `skip_special_tokens` leaves them out. Not by default, as in Qwen 3.
        pad_to_multiple_of: round a larger number of rows up to a multiple, as tensor cores like it.
    Returns:
        The tokens and their ids.
    Raises:
        ValueError: equal or empty tokens, a `like` without tokens, a tokenizer that does not read a token as one id,
            or a model with an adapter, whose base must not change size any more.
    """
    if not start or not end or start == end:
        raise ValueError(f"start and end must be two different texts, got {start!r} and {end!r}")
    if hasattr(model, "get_base_model"):
        raise ValueError(
            "the model has an adapter already; add the tokens to the base model, then wrap it: "
            "get_peft_model(model, LoraConfig(trainable_token_indices=trainable_rows(model, tokens)))"
        )
    like_ids = None if like is None else tokenizer.encode(like, add_special_tokens=False)
    if like_ids == []:
        raise ValueError(f"like={like!r} has no tokens in this tokenizer; give a text that has, or leave it out")
    known = len(tokenizer)
    missing = [token for token in (start, end) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in missing], special)
    ids = [_single_id(tokenizer, token) for token in (start, end)]
    rows = model.get_input_embeddings().weight.shape[0]
    fresh = [index for index in ids if index >= min(rows, known)]
    all_old = range(min(rows, known))
    make_room(model, max(len(tokenizer), max(ids) + 1), pad_to_multiple_of)
    _start_rows(model, list(range(rows, model.get_input_embeddings().weight.shape[0])), all_old)  # padding included
    _start_rows(model, fresh, all_old if like_ids is None else like_ids)
    return ThinkTokens(start, end, ids[0], ids[1], tuple(missing))


def _single_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"the tokenizer has {token!r} in its vocabulary, but reads it as the ids {ids}; choose other tokens, or "
            f"declare it first: tokenizer.add_tokens([{token!r}])"
        )
    return ids[0]


def make_room(model: Any, num_ids: int, pad_to_multiple_of: int | None = None) -> None:
    """Rows for so many ids; never fewer than there are. What transformers draws for them is replaced later."""
    if num_ids <= model.get_input_embeddings().weight.shape[0]:
        return
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(num_ids, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)


@torch.no_grad()
def _start_rows(model: Any, ids: list[int], like: "range | list[int]") -> None:
    """Every parameter that has a row an id: input embedding, output embedding if it is not the same, its bias."""
    if not ids:
        return
    for parameter in _rows_of(model):
        mean = parameter[list(like)].double().mean(0)  # of thousands of rows, perhaps in bfloat16
        parameter[ids] = mean.to(parameter.dtype)


def _rows_of(model: Any) -> list[nn.Parameter]:
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight]
    if head is not None:
        found += [parameter for parameter in (head.weight, getattr(head, "bias", None)) if parameter is not None]
    return list({id(parameter): parameter for parameter in found}.values())


def trainable_rows(model: Any, tokens: ThinkTokens) -> dict[str, list[int]]:
    """What PEFT has to know to train the rows of these tokens and no other, optimizers with weight decay included.

    `LoraConfig(trainable_token_indices=trainable_rows(model, tokens), ...)` trains them beside LoRA;
    `TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=tokens.ids, target_modules=list(trainable_rows(...)))`
    trains nothing else. PEFT finds the head of a tied model by itself; one that is not tied is named here. It takes no
    bias of a head. `merge_and_unload` before saving for plain transformers.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)].rpartition(".")[2]: tokens.ids for module in modules}


def train_only_rows(model: Any, tokens: ThinkTokens) -> Callable[[], None]:
    """Without PEFT: freeze everything but the embeddings, and mask their gradient to the rows of these tokens.

    The optimizer must have no weight decay, which moves rows without a gradient too, and keeps moments for all rows.

    Returns:
        A function that takes the masks off again; what is frozen stays so.
    """
    model.requires_grad_(False)
    hooks = []
    for parameter in _rows_of(model):
        parameter.requires_grad_(True)
        mask = torch.zeros(parameter.shape[0], dtype=torch.bool, device=parameter.device)
        mask[tokens.ids] = True
        hooks.append(parameter.register_hook(_masked_by(mask)))

    def release() -> None:
        for hook in hooks:
            hook.remove()

    return release


def _masked_by(mask: Bool[Tensor, "V"]) -> Callable[[Tensor], Tensor]:
    def masked(grad: Float[Tensor, "V ..."]) -> Float[Tensor, "V ..."]:
        return grad * mask.view(-1, *[1] * (grad.ndim - 1))

    return masked
