"""Collapsing beam search: its ends, its fold by hand without a cache, and its price."""

import pytest
import torch
from helpers import EOS, V, gpt2, llama, prompts

from softrl.generation.collapsing_beam import collapsing_beam_search
from softrl.models.policy import Policy
from softrl.rollouts.hard import hard_rollout
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import SoftmaxMixture
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts

T = 8
ENDS = (EOS, 5, 9)
MANY_ENDS = (EOS, 3, 5, 7, 9, 11, 13)
MODELS = {"gpt2": gpt2, "llama": llama}


def texts_of(found):
    return [tokens[kept].tolist() for tokens, kept in zip(found.tokens, found.mask, strict=True)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fold_every", [1, 3, 20])
def test_width_one_is_greedy(name, fold_every):
    policy = Policy(MODELS[name](seed=3))
    random = SequenceRandom([0] * 4)
    greedy = hard_rollout(policy, prompts(4), Truncation(1), random, T, eos_ids=MANY_ENDS, greedy=True)
    found = collapsing_beam_search(policy, prompts(4), T, 1, fold_every, eos_ids=MANY_ENDS)
    assert texts_of(found) == texts_of(greedy)
    assert len({len(text) for text in texts_of(found)}) > 1


def test_folding_every_step_is_greedy_soft_decoding():
    policy = Policy(llama(seed=3))
    rollout = soft_rollout(policy, prompts(4), SoftmaxMixture(Truncation(5)), SequenceRandom([0] * 4), T)
    found = collapsing_beam_search(policy, prompts(4), T, 5, 1)
    assert texts_of(found) == texts_of(rollout.hard)
    torch.testing.assert_close(found.weights, rollout.fed)
    assert torch.equal(found.ids, rollout.support.ids)
    assert found.forward_tokens.tolist() == [T - 1] * 4


def segment_by_hand(model, fed, width, num_steps, eos_ids):
    """The likeliest hypotheses of a segment: every one is extended by every token, from whole prefixes."""
    table = model.get_input_embeddings().weight.detach()
    beam = [((), 0.0)]
    for _ in range(num_steps):
        candidates = []
        for text, so_far in beam:
            if text and text[-1] in eos_ids:
                candidates.append((text, so_far))
                continue
            with torch.no_grad():
                logits = model(inputs_embeds=torch.cat([fed, table[list(text)]])[None]).logits[0, -1]
            candidates += [((*text, v), so_far + logp) for v, logp in enumerate(logits.log_softmax(-1).tolist())]
        beam = sorted(candidates, key=lambda each: -each[1])[:width]
    return beam


def by_hand(model, prompt, width, fold_every, temperature, eos_ids):
    """The whole search of one prompt: what is written, its log-probability, and every folded embedding."""
    table = model.get_input_embeddings().weight.detach()
    fed, written, log_prob, folds = table[prompt], [], 0.0, []
    while len(written) < T:
        num_steps = min(fold_every, T - len(written))
        beam = segment_by_hand(model, fed, width, num_steps, eos_ids)
        written += beam[0][0]
        log_prob += beam[0][1]
        if beam[0][0][-1] in eos_ids:
            break
        going_on = [(text, score) for text, score in beam if text[-1] not in eos_ids]
        weights = torch.tensor([score / temperature for _, score in going_on], dtype=torch.float64).softmax(-1)
        tokens = torch.tensor([text for text, _ in going_on])
        folded = torch.einsum("w,wnd->nd", weights, table[tokens])
        folds.append(folded)
        fed = torch.cat([fed, folded])
    return written, log_prob, torch.cat(folds) if folds else None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("fold_every", "temperature", "eos_ids"), [(3, 1.0, ()), (3, 2.0, ENDS), (2, 0.5, ENDS)])
def test_the_fold_by_hand(name, fold_every, temperature, eos_ids):
    model, width = MODELS[name](seed=6), 4
    policy, batch = Policy(model), prompts(4)
    found = collapsing_beam_search(policy, batch, T, width, fold_every, temperature, eos_ids)
    embeds = policy.embed_soft(found.ids.flatten(0, 1), found.weights.flatten(0, 1)).unflatten(0, found.mask.shape)
    checked = 0
    for row in range(4):
        prompt = batch.ids[row][batch.mask[row]]
        written, log_prob, folded = by_hand(model, prompt, width, fold_every, temperature, eos_ids)
        assert texts_of(found)[row] == written
        assert found.log_probs[row].item() == pytest.approx(log_prob, rel=1e-5)
        if folded is not None:
            steps = min(len(folded), found.mask.shape[1])
            torch.testing.assert_close(embeds[row, :steps].detach(), folded[:steps], rtol=1e-5, atol=1e-6)
            checked += steps
    assert checked > T


@pytest.mark.parametrize(("width", "fold_every", "eos_ids"), [(3, 3, ENDS), (2, T, tuple(range(1, 20, 2)))])
def test_the_price_of_a_prompt_is_its_own(width, fold_every, eos_ids, monkeypatch):
    policy, batch = Policy(gpt2(seed=3)), prompts(5)
    together = collapsing_beam_search(policy, batch, T, width, fold_every, eos_ids=eos_ids)
    fed = []
    advance = Policy.advance
    monkeypatch.setattr(
        Policy, "advance", lambda self, state, e: fed.append(e.shape[0] * e.shape[1]) or advance(self, state, e)
    )
    prices = []
    for row in range(5):
        fed.clear()
        alone = Prompts(batch.ids[row][batch.mask[row]][None], batch.mask[row][batch.mask[row]][None])
        found = collapsing_beam_search(policy, alone, T, width, fold_every, eos_ids=eos_ids)
        assert texts_of(found) == [texts_of(together)[row]]
        prices.append(sum(fed))
    assert together.forward_tokens.tolist() == prices
    assert len(set(prices)) > 1
    fed.clear()
    endless = collapsing_beam_search(policy, batch, T, 3, 3)
    # Two whole segments of 3 * 2 + 3, and the last one of two tokens, which is not folded.
    assert endless.forward_tokens.tolist() == [9 + 9 + 3] * 5
    assert sum(fed) == 5 * 21


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 0}, f"num_beams must lie between 1 and V={V}, got 0"),
        ({"num_beams": V + 1}, "num_beams must lie between"),
        ({"fold_every": 0}, "fold_every must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        collapsing_beam_search(Policy(llama()), prompts(2), 3, **arguments)
