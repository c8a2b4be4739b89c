"""What was generated with thoughts: tokens, thoughts and the numbers beside them; and both as text."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softrl.rollouts.thoughts import ThoughtSource
from softrl.types import HardRollout

THOUGHT_BEGINS, THOUGHT_ENDS, PAUSE = "<|thought|>", "</thought|>", "…"


@dataclass(frozen=True)
class ThoughtfulText(HardRollout):
    """N texts of T generated tokens; the thought of step t came before token t, and only the mixture saw it.

    Axes: n tokens of a thought, k ids of each with their weights, the heaviest first: one for hard thoughts, a few for
    soft ones. Where `thinks` is False there was no thought, and what stands there is zero.
    """

    thinks: Bool[Tensor, "N T"]
    thought_ids: Int[Tensor, "N T n k"]
    thought_weights: Float[Tensor, "N T n k"]
    mixing: Float[Tensor, "N T"]  # weight of the thought's prediction
    base_entropy: Float[Tensor, "N T"]  # of the prediction without a thought, nats
    entropy: Float[Tensor, "N T"]  # of the mixed one, nats
    source: ThoughtSource = "policy"

    @property
    def thoughts(self) -> Int[Tensor, "N T n"]:
        """The heaviest id of every thought token."""
        return self.thought_ids[..., 0]


def as_text(
    record: ThoughtfulText, tokenizer: PreTrainedTokenizerBase, show: bool = False, with_prompt: bool = True
) -> list[str]:
    """Texts for people to read, without special tokens.

    Args:
        record: what was generated.
        tokenizer: the model's.
        show: put thoughts where they were thought: `The film<|thought|> really good </thought|> was`. Soft ones are
            their heaviest tokens.
        with_prompt: begin with the prompt.
    """

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    texts = []
    for row in range(len(record.tokens)):
        prompt = record.prompts.ids[row][record.prompts.mask[row]].tolist()
        ids = prompt + record.tokens[row][record.mask[row]].tolist()
        steps = (record.thinks[row] & record.mask[row]).nonzero()[:, 0].tolist() if show else []
        text, at = decode(ids), 0 if with_prompt else len(decode(prompt))
        pieces = []
        for step in steps:
            # Characters of several tokens stand as "�" in a prefix that ends within them.
            before = len(decode(ids[: len(prompt) + step]).rstrip("�"))
            before = min(max(before, at), len(text))
            pieces += [text[at:before], _marked(record, decode(record.thoughts[row, step].tolist()))]
            at = before
        texts.append("".join([*pieces, text[at:]]))
    return texts


def _marked(record: ThoughtfulText, thought: str) -> str:
    words = thought.strip() if record.source != "pause" else " ".join([PAUSE] * record.thought_ids.shape[2])
    return f"{THOUGHT_BEGINS} {words} {THOUGHT_ENDS}" if words else f"{THOUGHT_BEGINS} {THOUGHT_ENDS}"
