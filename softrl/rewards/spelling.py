"""From the policy's tokens to the words of a reward model that reads whole words.

Tokens spell words: "Ġmor" and "on" make "moron". A trie of the vocabulary, walked in tokens instead of letters, says
what every spelling of a word is; so no way of cutting a word into tokens hides it, and a token that happens to look
like a word ("Ġass" in "assume") is not taken for one. Soft tokens are read as if every step drew its token
independently of the others: a word is present with the probability that its tokens are drawn, one after another, that
it begins there (nothing goes before it in its word) and that it ends there (nothing goes on with it). At one-hot
tokens these probabilities are 0 and 1, and the words are those of the text.

A token's text is cut at the characters that separate words. Without one it is a `body`, which begins a word or goes
on with one. With one it has a `head`, which goes on with a word and ends it, a `tail`, which begins the next one, and
whole words between; any of them may be empty. Tokens without a text (special ones) count as separators.

Left out: characters that several tokens have to spell together, byte by byte. The words that have them are unknown.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softrl.assets import WordVocabulary
from softrl.masking import is_any_of
from softrl.rewards.alignment import token_texts
from softrl.types import SoftTokens

_ROOT, _DEAD = 0, -1  # nodes: nothing spelt yet, and what begins no word of the vocabulary
_MAX_PAIRS = 1 << 20  # looked up at once
_FLOOR = 1e-6  # of a divisor: a slot that is hardly present is hardly read either


@dataclass(frozen=True)
class SpellingCoverage:
    """What the policy's tokens spell, as shares.

    The first four are shares of the policy's tokens that are not special and add up to 1, `spellable_words` is the
    share of the reward model's words that the policy's tokens can spell.
    """

    words: float  # one word of the vocabulary, or several
    parts: float  # no word by themselves, but a part of one
    separators: float  # no letter of any word: white space and punctuation that the reward model drops
    unknown: float  # in no word of the vocabulary
    spellable_words: float

    def __str__(self) -> str:
        return (
            f"{1.0 - self.unknown:.1%} of the policy's tokens are read ({self.words:.1%} are words, {self.parts:.1%} "
            f"parts of words, {self.separators:.1%} separate words), {self.unknown:.1%} are in no known word; they "
            f"spell {self.spellable_words:.1%} of the reward model's words"
        )


@dataclass(frozen=True)
class Spelling:
    """How the policy's V tokens walk through the trie of the reward model's words.

    Nodes are the beginnings of words, 0 the empty one and −1 everything that begins no word. Texts are the bodies and
    heads of tokens, 0 the empty one. `edges` are `node * num_texts + text`, sorted, and `targets` the nodes they lead
    to; `word` is a node's word id, 0 where the beginning is no whole word.
    """

    body: Int[Tensor, "V"]  # text; 0 for tokens with a separator
    head: Int[Tensor, "V"]  # text; 0 for bodies as well
    tail: Int[Tensor, "V"]  # node; −1 for bodies as well
    between: Int[Tensor, "V M"]  # word ids, padded with 0 on the right
    edges: Int[Tensor, "E"]
    targets: Int[Tensor, "E"]
    word: Int[Tensor, "nodes"]
    num_texts: int
    coverage: SpellingCoverage

    def to(self, device: torch.device) -> "Spelling":
        """The same walks on a device."""
        names = ("body", "head", "tail", "between", "edges", "targets", "word")
        moved: dict[str, Tensor] = {name: getattr(self, name).to(device) for name in names}
        return Spelling(**moved, num_texts=self.num_texts, coverage=self.coverage)

    def after(self, node: Int[Tensor, "*batch"], text: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """The nodes that texts lead to; −1 from −1 and where the text leads out of the vocabulary."""
        wanted = node * self.num_texts + text
        place = torch.searchsorted(self.edges, wanted).clamp(max=len(self.edges) - 1)
        found = (self.edges[place] == wanted) & (node >= _ROOT)
        return torch.where(found, self.targets[place], _DEAD)


@dataclass(frozen=True)
class SoftWords:
    """N completions in words of the reward model, L slots a row in the order of the text.

    `weights` sum to one over the words of a slot, and `presence` says how likely one of them is there, survival
    included. Both are sparse: entry e is the word `ids[e]` in the slot `slot[e]` of the flattened [N, L].
    """

    slot: Int[Tensor, "entries"]
    ids: Int[Tensor, "entries"]
    weights: Float[Tensor, "entries"]
    presence: Float[Tensor, "N L"]


def spelling_of(policy_tokenizer: PreTrainedTokenizerBase, vocabulary: WordVocabulary, vocab_size: int) -> Spelling:
    """The walks of the policy's `vocab_size` tokens through the words of a vocabulary.

    Raises:
        ValueError: the policy's tokenizer has no token of letters or digits.
    """
    texts = token_texts(policy_tokenizer, vocab_size)
    cut = [None if not text else vocabulary.spaced(text).split(" ") for text in texts]
    number: dict[str, int] = {"": 0}
    for parts in cut:
        if parts:
            number.setdefault(parts[0], len(number))
    nodes = {"": _ROOT}
    for word in vocabulary.words:
        for end in range(1, len(word) + 1):
            nodes.setdefault(word[:end], len(nodes))
    walks = _walks(nodes, number)
    edges, order = torch.tensor(list(walks) or [-1]).sort()
    ids = {word: index for index, word in enumerate(vocabulary.words) if word}
    between = [[ids[word] for word in (parts or [])[1:-1] if word in ids] for parts in cut]
    width = max(map(len, between), default=0)
    return Spelling(
        body=torch.tensor([number[parts[0]] if parts and len(parts) == 1 else 0 for parts in cut]),
        head=torch.tensor([number[parts[0]] if parts and len(parts) > 1 else 0 for parts in cut]),
        tail=torch.tensor([_tail(parts, nodes) for parts in cut]),
        between=torch.tensor([row + [0] * (width - len(row)) for row in between], dtype=torch.long),
        edges=edges,
        targets=torch.tensor(list(walks.values()) or [_DEAD])[order],
        word=torch.tensor([ids.get(beginning, 0) for beginning in nodes]),
        num_texts=len(number),
        coverage=_coverage([parts for parts in cut if parts], ids, nodes, number, walks),
    )


def _walks(nodes: dict[str, int], number: dict[str, int]) -> dict[int, int]:
    """From `node * num_texts + text` to the node that the text leads to."""
    walks = {}
    for beginning, node in nodes.items():
        for start in range(len(beginning)):
            text = number.get(beginning[start:])
            if text:
                walks[nodes[beginning[:start]] * len(number) + text] = node
    return walks


def _tail(parts: list[str] | None, nodes: dict[str, int]) -> int:
    if not parts:
        return _ROOT
    return nodes.get(parts[-1], _DEAD) if len(parts) > 1 else _DEAD


def _coverage(
    cut: list[list[str]], ids: dict[str, int], nodes: dict[str, int], number: dict[str, int], walks: dict[int, int]
) -> SpellingCoverage:
    inside = {0} | {key % len(number) for key in walks}  # texts that are a part of some word
    counts = dict.fromkeys(("words", "parts", "separators", "unknown"), 0)
    for parts in cut:
        written = [part for part in parts if part]
        if not written:
            kind = "separators"
        elif all(part in ids for part in written):
            kind = "words"
        elif number[parts[0]] in inside and (len(parts) == 1 or parts[-1] in nodes):
            kind = "parts"
        else:
            kind = "unknown"
        counts[kind] += 1
    shares = {kind: count / max(1, len(cut)) for kind, count in counts.items()}
    reached = {_ROOT, *(nodes.get(parts[-1], _DEAD) for parts in cut if len(parts) > 1)}
    for key, node in walks.items():  # all that lead to a node stand before those that lead on from it
        if key // len(number) in reached:
            reached.add(node)
    return SpellingCoverage(**shares, spellable_words=sum(nodes[word] in reached for word in ids) / max(1, len(ids)))


@dataclass(frozen=True)
class _Front:
    """Words that are being spelt: the slot each began in, the step it has come to, and how likely it is.

    `over` where the token at that step ends the text. `zeros` counts the tokens so far whose weight is exactly 0.
    """

    slot: Int[Tensor, "F"]
    step: Int[Tensor, "F"]  # in the flattened [N, T]
    node: Int[Tensor, "F"]
    probability: Float[Tensor, "F"]
    over: Bool[Tensor, "F"]
    zeros: Int[Tensor, "F"]


@dataclass(frozen=True)
class _Following:
    """What may go on with a word: for every step the candidates of the next one that have a body or a head.

    `boundary` is the probability that what follows separates words at once, or that nothing follows.
    """

    text: Int[Tensor, "steps C"]  # 0 where there is none
    probability: Float[Tensor, "steps C"]
    closes: Bool[Tensor, "steps C"]
    over: Bool[Tensor, "steps C"]
    boundary: Float[Tensor, "steps"]


def soft_words(tokens: SoftTokens, spelling: Spelling) -> SoftWords:
    """The words of soft tokens, differentiable in their weights, in float32 at least.

    A word that begins at step t has the probability `b_t q_t[k_0] q_{t+1}[k_1] ... e`: of being at the beginning of a
    word (for tokens that bring their own separator: of being written at all, the survival), of its tokens, and of the
    word's end, summed over its spellings. Tokens that end the text end its last word.

    Args:
        tokens: N completions; ids within the vocabulary that the spelling was made for.
        spelling: on the tokens' device.
    Source: ours.
    """
    ids = tokens.ids.masked_fill(~tokens.mask[..., None], 0)
    precise = torch.promote_types(tokens.weights.dtype, torch.float32)
    weights = tokens.weights.to(precise).masked_fill(~tokens.mask[..., None], 0.0)
    between = spelling.between[ids].masked_fill(~tokens.mask[..., None, None], 0)
    most = int((between > 0).sum(-1).max()) if between.numel() else 0
    front = _beginnings(tokens, ids, weights, most + 1, spelling)
    following = _following(tokens, ids, weights, spelling)

    alive = (weights * tokens.survival.to(precise)[..., None]).flatten()
    candidate, place = (between.flatten(0, -2) > 0).nonzero().unbind(-1)
    found = [
        (candidate // ids.shape[-1] * (most + 1) + place, between.flatten(0, -2)[candidate, place], alive[candidate])
    ]
    while len(front.node):
        end = torch.where(front.over, 1.0, following.boundary[front.step])
        found.append((front.slot, spelling.word[front.node], front.probability * end))
        closed, front = _gone_on(front, following, spelling)
        found.append((closed.slot, spelling.word[closed.node], closed.probability))
    slot, word, probability = (torch.cat(parts) for parts in zip(*found, strict=True))
    slot, word, probability = slot[word > 0], word[word > 0], probability[word > 0]
    presence = probability.new_zeros(len(ids) * ids.shape[1] * (most + 1)).index_add(0, slot, probability)
    # Where nothing is present there is nothing to divide: a tiny divisor would make a huge gradient of nothing.
    divisor = torch.where(presence > 0, presence, torch.ones_like(presence)).clamp(min=_FLOOR)
    return SoftWords(slot, word, probability / divisor[slot], presence.view(len(ids), -1))


def _beginnings(
    tokens: SoftTokens,
    ids: Int[Tensor, "N T K"],
    weights: Float[Tensor, "N T K"],
    slots_a_step: int,
    spelling: Spelling,
) -> _Front:
    """Tokens that begin a word: those with a tail, and bodies behind a token that ends with a separator."""
    alive = tokens.survival.to(weights.dtype)
    ends = is_any_of(tokens.ids, tokens.eos_ids)
    body, tail = spelling.body[ids], spelling.tail[ids]
    clean = alive * (weights * ((tail == _ROOT) & ~ends)).sum(-1)
    begins = torch.cat([alive[:, :1], clean[:, :-1]], 1)
    node = torch.where(body > 0, spelling.after(torch.zeros_like(body), body), tail)
    probability = weights * torch.where(body > 0, begins[..., None], alive[..., None])
    chosen = ((node > _ROOT) & tokens.mask[..., None]).flatten().nonzero().flatten()
    step = chosen // ids.shape[-1]
    zeros = (weights.detach() == 0).long()
    return _Front(
        (step + 1) * slots_a_step - 1,  # behind the whole words between head and tail
        step,
        *(values.flatten()[chosen] for values in (node, probability, ends, zeros)),
    )


def _following(
    tokens: SoftTokens, ids: Int[Tensor, "N T K"], weights: Float[Tensor, "N T K"], spelling: Spelling
) -> _Following:
    body, head = spelling.body[ids], spelling.head[ids]
    exists = tokens.mask
    text = torch.where(exists[..., None], body + head, 0)  # one of them is 0
    boundary = torch.where(exists, (weights * (text == 0)).sum(-1), 1.0)
    count = int((text > 0).sum(-1).max()) if text.numel() else 0
    columns = (text > 0).long().argsort(dim=-1, descending=True, stable=True)[..., :count]

    def of_next_step(values: Tensor) -> Tensor:
        picked = values.gather(-1, columns)
        return torch.cat([picked[:, 1:], torch.zeros_like(picked[:, :1])], 1).flatten(0, 1)

    return _Following(
        text=of_next_step(text),
        probability=of_next_step(weights),
        closes=of_next_step(head > 0),
        over=of_next_step(is_any_of(tokens.ids, tokens.eos_ids)),
        boundary=torch.cat([boundary[:, 1:], torch.ones_like(boundary[:, :1])], 1).flatten(),
    )


def _gone_on(front: _Front, following: _Following, spelling: Spelling) -> tuple[_Front, _Front]:
    """The words that the next step ends with its head, and those that it goes on with."""
    index, column, node = _pairs(front, following, spelling)
    step = front.step[index]
    longer = _Front(
        front.slot[index],
        step + 1,
        node,
        front.probability[index] * following.probability[step, column],
        following.over[step, column],
        front.zeros[index] + (following.probability.detach()[step, column] == 0),
    )
    closes = following.closes[step, column]
    # Two weights of exactly 0 in a product: it is 0, and so is its gradient.
    matters = longer.zeros < 2
    return _selected(longer, closes & matters), _selected(longer, ~closes & matters)


def _pairs(
    front: _Front, following: _Following, spelling: Spelling
) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
    """Which words go on with which candidates of the next step, and the node that leads to; in chunks, for memory."""
    size = max(1, _MAX_PAIRS // max(1, following.text.shape[-1]))
    found = []
    for start in range(0, len(front.node), size):
        node, step = front.node[start : start + size], front.step[start : start + size]
        there = spelling.after(node[:, None].expand(-1, following.text.shape[-1]), following.text[step])
        index, column = ((there != _DEAD) & ~front.over[start : start + size, None]).nonzero().unbind(-1)
        found.append((index + start, column, there[index, column]))
    index, column, there = (torch.cat(parts) for parts in zip(*found, strict=True))
    return index, column, there


def _selected(front: _Front, chosen: Bool[Tensor, "F"]) -> _Front:
    return _Front(**{name: value[chosen] for name, value in vars(front).items()})
