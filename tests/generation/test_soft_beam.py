"""Soft beam search: its two ends, its partition, and a search by hand without a cache."""

import pytest
import torch
from helpers import EOS, V, gpt2, llama, prompts

from softrl.generation.beam import BeamSettings, Expansion, beam_search
from softrl.generation.soft_beam import cell_mixtures, soft_beam_search
from softrl.models.policy import Policy
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import SoftmaxMixture
from softrl.tokens.truncation import Truncation

T = 7
ENDS = (EOS, 5, 9)
MODELS = {"gpt2": gpt2, "llama": llama}


def texts_of(found):
    return [tokens[kept].tolist() for tokens, kept in zip(found.tokens, found.mask, strict=True)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["one kept token", "own share", "cold", "tight bound"])
def test_one_hot_mixtures_are_the_ordinary_search(name, way):
    policy = Policy(MODELS[name](seed=3))
    settings = BeamSettings(4, early_stopping=True)
    relaxation = {
        "one kept token": SoftmaxMixture(Truncation(1)),
        "own share": SoftmaxMixture(Truncation(6)),
        "cold": SoftmaxMixture(Truncation(6), temperature=1e-4),
        "tight bound": SoftmaxMixture(Truncation(6), max_entropy_nats=1e-9),
    }[way]
    hard = beam_search(policy, prompts(4), T, settings, 2, ENDS)
    own_share = 1.0 if way == "own share" else 0.0
    soft = soft_beam_search(policy, prompts(4), T, relaxation, settings, 2, ENDS, own_share)
    assert texts_of(soft) == texts_of(hard)
    torch.testing.assert_close(soft.scores, hard.scores, rtol=1e-6, atol=1e-6)
    assert soft.forward_tokens.tolist() == hard.forward_tokens.tolist()


def test_mixtures_make_a_difference():
    policy = Policy(llama(seed=3))
    hard = beam_search(policy, prompts(4), T, BeamSettings(3))
    soft = soft_beam_search(policy, prompts(4), T, SoftmaxMixture(Truncation(6)), BeamSettings(3))
    assert texts_of(soft) != texts_of(hard)


@pytest.mark.parametrize("name", MODELS)
def test_width_one_is_greedy_soft_decoding(name):
    policy = Policy(MODELS[name](seed=3))
    relaxation = SoftmaxMixture(Truncation(6, min_p=0.05), max_entropy_nats=1.0)
    rollout = soft_rollout(policy, prompts(4), relaxation, SequenceRandom([0] * 4), T)
    found = soft_beam_search(policy, prompts(4), T, relaxation, BeamSettings(1))
    assert texts_of(found) == texts_of(rollout.hard)


def test_cells_partition_the_parent_s_soft_token():
    policy, width = Policy(llama(seed=2)), 4
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2 * width, V, generator=generator, dtype=torch.float64)
    relaxation = SoftmaxMixture(Truncation(6))
    kept = logits.topk(6, -1).indices
    # Three children of the first row, one of the second (row 1); in the other prompt a child whose token is not kept,
    # its sibling, one without a hypothesis, and a child of another row.
    tokens = torch.stack(
        [
            torch.stack([kept[0, 0], kept[0, 3], kept[0, 5], kept[1, 2]]),
            torch.stack([logits[4].argmin(), kept[4, 1], kept[4, 0], kept[6, 0]]),
        ]
    )
    parents = torch.tensor([[0, 0, 0, 1], [4, 4, 4, 6]])
    alive = torch.tensor([[True] * 4, [True, True, False, True]])
    ids, weights = cell_mixtures(policy, Expansion(logits, parents, tokens, alive), relaxation)
    dense = torch.zeros(2, width, V, dtype=torch.float64).scatter_add(-1, ids, weights)
    torch.testing.assert_close(dense.sum(-1), torch.ones(2, width, dtype=torch.float64))
    # Disjoint, and in the proportions of the parent's own mixture.
    assert ((dense[0, :3] > 0).sum(0) <= 1).all()
    shares = torch.zeros(2 * width, V, dtype=torch.float64)
    shares = shares.scatter(-1, kept, logits.gather(-1, kept).softmax(-1))
    masses = (shares[0] * (dense[0, :3] > 0)).sum(-1)
    torch.testing.assert_close((masses[:, None] * dense[0, :3]).sum(0), shares[0])
    torch.testing.assert_close(dense[0, 3], shares[1])  # an only child has all of it
    assert dense[1, 0].nonzero().flatten().tolist() == [logits[4].argmin().item()]
    torch.testing.assert_close(dense[1, 1], shares[4])  # its siblings are not kept, or not there
    # Whose cell a token is in: by hand, on the embedding matrix.
    table = torch.nn.functional.normalize(policy.causal_lm.get_input_embeddings().weight.detach(), dim=-1)
    for token in kept[0].tolist():
        owner = (table[tokens[0, :3]] @ table[token]).argmax().item()
        assert dense[0, owner, token] > 0
    ids, weights = cell_mixtures(policy, Expansion(logits, parents, tokens, alive), relaxation, own_share=0.25)
    shifted = torch.zeros(2, width, V, dtype=torch.float64).scatter_add(-1, ids, weights)
    one_hot = torch.nn.functional.one_hot(tokens, V)
    expected = torch.where((one_hot * dense).sum(-1, keepdim=True) == 1.0, one_hot, 0.25 * one_hot + 0.75 * dense)
    torch.testing.assert_close(shifted, expected)


def test_an_end_is_in_no_cell_and_a_bound_holds_in_each():
    policy = Policy(llama(seed=2))
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = logits.topk(6, -1).indices
    ends = (kept[0, 0].item(), kept[1, 1].item())
    relaxation = SoftmaxMixture(Truncation(6), max_entropy_nats=0.4)
    tokens = torch.stack([kept[0, 1], kept[0, 2], kept[1, 0]])[None]
    expansion = Expansion(logits, torch.tensor([[0, 0, 1]]), tokens, torch.ones(1, 3, dtype=torch.bool))
    ids, weights = cell_mixtures(policy, expansion, relaxation, eos_ids=ends)
    for end in ends:
        assert weights[ids == end].sum() == 0.0
    assert (weights > 0).sum() > 5  # mixtures all the same
    entropy = torch.special.entr(weights).sum(-1)
    assert entropy.max() <= 0.4 + 1e-9
    heaviest = ids.gather(-1, weights.argmax(-1, keepdim=True))[..., 0]
    assert torch.equal(heaviest, tokens)


def by_hand(model, prompt, num_kept, width, num_steps):
    """A soft beam search of one prompt in plain loops: whole prefixes of embeddings, no cache, no batch, no end."""
    table = model.get_input_embeddings().weight.detach()
    directions = table / table.norm(dim=-1, keepdim=True)
    beam = [((), 0.0, table[prompt])]  # hard tokens, Σ log p, everything fed
    for _ in range(num_steps):
        candidates = []
        for index, (_, so_far, fed) in enumerate(beam):
            with torch.no_grad():
                log_probs = model(inputs_embeds=fed[None]).logits[0, -1].log_softmax(-1)
            candidates += [(so_far + log_probs[v].item(), index, v, log_probs) for v in range(V)]
        candidates = sorted(candidates, key=lambda each: -each[0])[:width]
        grown = []
        for score, index, token, log_probs in candidates:
            text, _, fed = beam[index]
            kept = log_probs.topk(num_kept).indices.tolist()
            centres = [v for _, parent, v, _ in candidates if parent == index and v in kept]
            if token in kept:
                owned = [v for v in kept if max(centres, key=lambda c: directions[c] @ directions[v]) == token]
            else:
                owned = [token]
            weights = log_probs[owned].softmax(-1)
            grown.append(((*text, token), score, torch.cat([fed, (weights @ table[owned])[None]])))
        beam = grown
    return [(list(text), score) for text, score, _ in beam]


@pytest.mark.parametrize("name", MODELS)
def test_the_search_by_hand(name):
    model, width = MODELS[name](seed=4), 3
    batch = prompts(3)
    settings = BeamSettings(width, length_penalty=0.0)
    found = soft_beam_search(Policy(model), batch, 5, SoftmaxMixture(Truncation(4)), settings, num_return=width)
    for row in range(3):
        expected = by_hand(model, batch.ids[row][batch.mask[row]], 4, width, 5)
        rows = slice(row * width, (row + 1) * width)
        assert texts_of(found)[rows] == [text for text, _ in expected]
        torch.testing.assert_close(
            found.log_probs[rows], torch.tensor([score for _, score in expected], dtype=torch.float64), rtol=1e-5,
            atol=1e-5,
        )  # fmt: skip


def test_arguments_out_of_range():
    policy = Policy(llama())
    with pytest.raises(ValueError, match=r"own_share must lie in \[0, 1\], got 1.5"):
        soft_beam_search(policy, prompts(1), 2, SoftmaxMixture(Truncation(2)), own_share=1.5)
    with pytest.raises(ValueError, match="top_k=24 is larger than the vocabulary"):
        soft_beam_search(policy, prompts(1), 2, SoftmaxMixture(Truncation(24)))
