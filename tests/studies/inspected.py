"""Records of soft decoding from a real soft rollout of a tiny model, for tests of what shows them."""

import torch
from helpers import EOS, llama
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from softrl.generation.soft_record import SoftText
from softrl.models.policy import Policy
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import GumbelSoftmax
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts

# Everything that a page must not take for its own, or swallow: one token an id, in GPT-2's alphabet of bytes.
PIECES = [
    "<bos>", "<eos>", "<pad>", "<script>alert(1)</script>", "Ġthe", "Ċ", "Ġ", "ðŁ", "ĺĢ", "ĠåĽ½", "&amp;", "'\"",
    "Ġ</p>", "ĉ", "âĢĭ", "Ìģ", "Ġcat", "Ġ{{7*7}}", "--", "Ġsat", "ĠÙħØ±ØŃ", "Ã¢", "Ġincomprehensibilities",
]  # fmt: skip
BOUND_NATS = 1.1


def byte_tokenizer():
    """23 tokens of GPT-2's kind, among them markup, white space, and the halves of a character."""
    backend = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(PIECES)}, unk_token="<pad>"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def record_of(steps=24, num_samples=2, seed=5, hard_from=None, bound=BOUND_NATS, eos_ids=(EOS,)):
    """A record of two texts, computed from a rollout in the plainest way: as dense tensors over the vocabulary."""
    policy = Policy(llama(seed=2))
    prompts = Prompts(torch.tensor([[4, 16, 19]]), torch.ones(1, 3, dtype=torch.bool))
    relaxation = GumbelSoftmax(Truncation(6), max_entropy_nats=bound)
    random = SequenceRandom.keyed(seed, 0, [0], num_samples)
    rollout = soft_rollout(policy, prompts, relaxation, random, steps, num_samples, eos_ids)
    order = rollout.fed.argsort(-1, descending=True)
    ids, weights = rollout.support.ids.gather(-1, order), rollout.fed.gather(-1, order)
    is_soft = torch.ones_like(rollout.mask)
    if hard_from is not None:  # what a text that thinks first looks like; the numbers behind it are made up
        is_soft[:, hard_from:] = False
        weights[:, hard_from:] = torch.nn.functional.one_hot(torch.tensor(0), 6).to(weights)
    vectors = policy.causal_lm.get_input_embeddings().weight.detach()
    fed = (weights[..., None] * vectors[ids]).sum(-2)
    apart = (fed[:, :, None] - vectors).norm(dim=-1)
    lengths = vectors[ids].norm(dim=-1).mean(-1)
    hidden = policy.hidden(rollout.prompts, fed).detach()
    log_probs = torch.stack([policy.head(row) for row in hidden]).log_softmax(-1).detach()
    return SoftText(
        rollout.prompts, ids[..., 0], rollout.mask, is_soft, ids, weights, log_probs.exp().gather(-1, ids),
        log_probs.argmax(-1), -(log_probs.exp() * log_probs).sum(-1), torch.special.entr(weights).sum(-1),
        apart.argmin(-1), apart.min(-1).values / lengths,
    )  # fmt: skip
