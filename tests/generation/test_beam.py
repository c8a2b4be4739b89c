"""Beam search against transformers' own, against enumeration, and its price."""

from itertools import product

import pytest
import torch
from helpers import EOS, V, gpt2, llama, prompts

from softrl.generation.beam import BeamSettings, beam_search
from softrl.models.policy import Policy
from softrl.rollouts.hard import hard_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts

T = 8
ENDS = (EOS, 5, 9)  # several ids, so that some hypotheses of an untrained model end early
MANY_ENDS = (EOS, 3, 5, 7, 9, 11, 13)
MODELS = {"gpt2": gpt2, "llama": llama}


def texts_of(found):
    return [tokens[kept].tolist() for tokens, kept in zip(found.tokens, found.mask, strict=True)]


def through_end(tokens, eos_ids):
    first = next((i for i, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tokens[: first + 1]


def generated(model, batch, settings, num_return, eos_ids):
    """The texts and scores of transformers."""
    output = model.generate(
        batch.ids, attention_mask=batch.mask.long(), max_new_tokens=T, do_sample=False, num_beams=settings.num_beams,
        num_return_sequences=num_return, length_penalty=settings.length_penalty,
        early_stopping=settings.early_stopping, eos_token_id=list(eos_ids), pad_token_id=2, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    rows = output.sequences[:, batch.ids.shape[1] :].tolist()
    return [through_end(row, eos_ids) for row in rows], output.sequences_scores


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eos_ids", [(EOS,), ENDS])
@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "early_stopping"),
    [(3, 1.0, False), (4, 1.0, True), (2, 0.0, "never"), (3, 2.0, "never"), (5, -0.5, False), (3, 2.0, True)],
)
def test_same_texts_as_transformers(name, eos_ids, num_beams, length_penalty, early_stopping):
    settings, batch = BeamSettings(num_beams, length_penalty, early_stopping), prompts(5)
    for seed in (1, 3):
        model = MODELS[name](seed)
        expected, scores = generated(model, batch, settings, 2, eos_ids)
        found = beam_search(Policy(model), batch, T, settings, 2, eos_ids)
        assert texts_of(found) == expected
        torch.testing.assert_close(found.scores.float(), scores, rtol=1e-4, atol=1e-4)
        penalised = found.log_probs / found.mask.sum(-1).double() ** length_penalty
        torch.testing.assert_close(found.scores, penalised, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_comparison_sees_the_rules_and_texts_of_several_lengths(name):
    policy = Policy(MODELS[name](1))
    found = [
        texts_of(beam_search(policy, prompts(5), T, BeamSettings(3, 2.0, rule), 2, ENDS))
        for rule in (False, True, "never")
    ]
    assert found[0] not in found[1:]
    assert found[1] != found[2]
    assert len({len(text) for texts in found for text in texts}) > 2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("early_stopping", [False, True])
def test_width_one_is_greedy(name, early_stopping):
    policy = Policy(MODELS[name]())
    batch = prompts(4)
    random = SequenceRandom([0] * 4)
    greedy = hard_rollout(policy, batch, Truncation(1), random, T, eos_ids=MANY_ENDS, greedy=True)
    found = beam_search(policy, batch, T, BeamSettings(1, early_stopping=early_stopping), eos_ids=MANY_ENDS)
    assert texts_of(found) == texts_of(greedy)
    assert found.forward_tokens.tolist() == (greedy.mask.sum(-1) - 1).tolist()
    assert len(set(found.forward_tokens.tolist())) > 1


def enumerated(policy, prompt, num_steps, eos_ids):
    """Every text of at most so many tokens, with its log-probability, from forward passes over whole prefixes."""
    found, prefixes = {}, {(): 0.0}
    for step in range(num_steps):
        table = torch.tensor(list(prefixes), dtype=torch.long).reshape(len(prefixes), step)
        ids = torch.cat([prompt.expand(len(prefixes), -1), table], 1)
        with torch.no_grad():
            log_probs = policy.model(input_ids=ids).logits[:, -1].log_softmax(-1).tolist()
        grown = {}
        for (prefix, so_far), row in zip(prefixes.items(), log_probs, strict=True):
            for token, each in enumerate(row):
                ends = token in eos_ids or step == num_steps - 1
                (found if ends else grown)[(*prefix, token)] = so_far + each
        prefixes = grown
    return found


def test_a_beam_that_is_wide_enough_finds_the_likeliest_text():
    policy = Policy(llama(seed=5))
    batch = prompts(3, length=4)
    settings = BeamSettings(V * V, 0.0, "never")
    wide = beam_search(policy, batch, 3, settings, num_return=4, eos_ids=(EOS,))
    narrow = beam_search(policy, batch, 3, BeamSettings(1, 0.0), eos_ids=(EOS,))
    improved = 0
    for row in range(3):
        every = enumerated(policy, batch.ids[row][batch.mask[row]], 3, (EOS,))
        assert sum(torch.tensor(list(every.values())).exp()).item() == pytest.approx(1.0, abs=1e-4)
        best = sorted(every, key=every.__getitem__, reverse=True)[:4]
        assert texts_of(wide)[4 * row : 4 * row + 4] == [list(text) for text in best]
        expected = torch.tensor([every[text] for text in best], dtype=torch.float64)
        torch.testing.assert_close(wide.log_probs[4 * row : 4 * row + 4], expected, rtol=1e-5, atol=1e-5)
        improved += every[best[0]] > narrow.log_probs[row].item() + 1e-6
    assert improved  # greedy would not have passed


def test_a_prompt_s_search_and_price_are_its_own(monkeypatch):
    policy = Policy(gpt2(seed=3))
    batch = prompts(5)
    settings = BeamSettings(3, early_stopping=True)
    together = beam_search(policy, batch, T, settings, eos_ids=ENDS)
    fed = []
    advance = Policy.advance
    monkeypatch.setattr(Policy, "advance", lambda self, state, e: fed.append(len(e)) or advance(self, state, e))
    for row in range(5):
        fed.clear()
        alone = Prompts(batch.ids[row][batch.mask[row]][None], batch.mask[row][batch.mask[row]][None])
        found = beam_search(policy, alone, T, settings, eos_ids=ENDS)
        assert texts_of(found) == [texts_of(together)[row]]
        assert found.forward_tokens.item() == together.forward_tokens[row].item() == sum(fed)
    assert len(set(together.forward_tokens.tolist())) > 1


def test_fewer_texts_than_asked_for_are_marked():
    found = beam_search(Policy(llama()), prompts(1), 1, BeamSettings(V + 2, 0.0), V + 2)
    assert (found.scores > -torch.inf).sum() == V
    assert sorted(found.tokens[:V, 0].tolist()) == list(range(V))


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="num_beams must be at least 1, got 0"):
        BeamSettings(0)
    settings = BeamSettings()
    object.__setattr__(settings, "early_stopping", "soon")  # the type checker of the tests would be first
    with pytest.raises(ValueError, match="True, False or 'never', got 'soon'"):
        settings.__post_init__()


@pytest.mark.parametrize(("num_return", "steps"), product([0, 5], [3]))
def test_searches_that_cannot_be_made(num_return, steps):
    with pytest.raises(ValueError, match="num_return must lie between 1 and num_beams=4"):
        beam_search(Policy(llama()), prompts(2), steps, num_return=num_return)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        beam_search(Policy(llama()), prompts(2), 0)
