"""Collapsing soft tokens: which, into what, and that a learned head's optimum is the conditional mean."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from contexts.test_soft_ar import soft_ar
from contexts.test_soft_ar import texts as texts_of
from helpers import V, gpt2
from transformers import AutoModelForCausalLM

from softrl.contexts.collapse import LearnedCollapse, selective
from softrl.generation.soft_ar import SoftWriting, soft_ar_generate
from softrl.models.policy import Policy
from softrl.objectives.learned_collapse import collapse_errors, fit_collapse
from softrl.types import Prompts, Texts


@pytest.mark.parametrize(("by", "threshold", "expected"), [
    ("distance", 0.5, [False, False, True]), ("entropy", 0.5, [True, False, False]),
    ("distance", 0.0, [False, True, True]), ("entropy", torch.inf, [False] * 3),
])  # fmt: skip
def test_far_or_uncertain_tokens_are_replaced(by, threshold, expected):
    measures = SimpleNamespace(distance=torch.tensor([0.0, 0.5, 0.7]), entropy=torch.tensor([2.0, 0.0, 0.1]))
    assert selective(by, threshold)(measures).tolist() == expected


def markov_texts(count, length, generator):
    """Texts of a random Markov chain, its transition probabilities P [V, V]."""
    transition = (2.0 * torch.randn(V, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)).softmax(-1)
    ids = torch.randint(V, (count, 1), generator=generator)
    for _ in range(length - 1):
        ids = torch.cat([ids, torch.multinomial(transition[ids[:, -1]], 1, generator=generator)], 1)
    return Texts(ids, torch.ones_like(ids, dtype=torch.bool)), transition


class OneHotPolicy:
    """A policy whose hidden state says the last token and nothing else: then a linear head can be any function."""

    def __init__(self):
        self.model = gpt2()
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def embed(self, ids):
        return self.table[ids]

    def hidden(self, prompts, embeds):
        read = torch.cat([self.embed(prompts.ids), embeds[:, :-1]], 1)
        return (torch.cdist(read, self.table[None].expand(len(read), -1, -1)) < 1e-6).to(embeds.dtype)


def test_the_optimum_of_a_learned_collapse_is_the_conditional_mean():
    """Least squares on N draws comes within σ/√n of `Σ_v p(v | x) e_v`, n the visits of x: z-scores of all 23 × 23
    numbers below 5.5 (a false failure in 1 of 50,000 runs, and the seeds are fixed)."""
    policy, generator = OneHotPolicy(), torch.Generator().manual_seed(1)
    texts, transition = markov_texts(400, 60, generator)
    head = LearnedCollapse(V).double()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = inspect.unwrap(collapse_errors)(policy, head, texts).mean()  # which asks for a `Policy`
        value.backward()
        return value

    optimizer.step(loss)
    found = head(torch.eye(V, dtype=torch.float64)).detach()
    mean = transition @ policy.table
    spread = (transition @ policy.table.square() - mean.square()).sqrt()
    visits = texts.ids[:, :-1].flatten().bincount(minlength=V)[:, None]
    z = (found - mean) / (spread / visits.sqrt())
    assert z.abs().max() < 5.5
    assert 0.8 < z.std() < 1.2  # and no nearer than draws allow, so it is this mean and not another
    nearest = torch.cdist(mean, policy.table).argmin(-1)
    assert nearest.tolist() != transition.argmax(-1).tolist()  # the nearest token to a mean may not be the likeliest


def test_fitting_comes_to_least_squares_and_leaves_the_model_alone():
    policy, (texts, _) = Policy(gpt2()), markov_texts(16, 12, torch.Generator().manual_seed(2))
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    torch.manual_seed(0)
    means = fit_collapse(policy, LearnedCollapse(16).double(), [texts] * 300, learning_rate=0.03)
    with torch.no_grad():
        hidden = policy.model.base_model(input_ids=texts.ids, attention_mask=texts.mask.long()).last_hidden_state
        states = torch.nn.functional.pad(hidden[:, :-1].flatten(0, 1), (0, 1), value=1.0)
        targets = policy.embed(texts.ids[:, 1:]).flatten(0, 1)
        best = (states @ torch.linalg.lstsq(states, targets).solution - targets).square().sum(-1).mean().item()
    assert best <= means[-1] < 1.01 * best < 0.8 * means[0]
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in policy.model.parameters())


def test_errors_are_counted_where_texts_are_and_targets_get_no_gradient():
    policy, head = Policy(gpt2()), LearnedCollapse(16).double()
    texts, _ = markov_texts(2, 6, torch.Generator().manual_seed(3))
    counted = torch.ones(2, 6, dtype=torch.bool)
    counted[0, 4] = False
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    errors = collapse_errors(policy, head, Texts(texts.ids, mask, counted))
    assert (errors == 0.0).tolist() == [[False, False, False, True, False], [False, False, False, True, True]]
    hidden = policy.model.base_model(
        input_ids=texts.ids[1:, :3], attention_mask=mask[1:, :3].long()
    ).last_hidden_state[0]
    by_hand = (head(hidden) - policy.embed(texts.ids[1, 1:4])).square().sum(-1)
    torch.testing.assert_close(errors[1, :3], by_hand)
    errors.sum().backward()
    assert policy.model.get_input_embeddings().weight.grad is None
    with pytest.raises(ValueError, match="padded on the right"):
        collapse_errors(policy, head, Texts(texts.ids, mask.flip(1)))


@pytest.mark.parametrize("core", ["llama", "gpt2"])
def test_a_model_keeps_its_head(tmp_path, core):
    """Fitted after training, saved with the model, and no part of what the model says otherwise."""
    model, ids = soft_ar(core), texts_of(3, 9)
    before = model(ids).logits
    batch = Texts(ids, torch.ones_like(ids, dtype=torch.bool))
    fit_collapse(Policy(model), model.add_collapse_head(), [batch] * 3)
    assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64")
    hidden = again.model(ids).last_hidden_state
    torch.testing.assert_close(again.collapse_head(hidden), model.collapse_head(hidden))
    assert torch.equal(again.collapse_head.layers.weight, model.collapse_head.layers.weight)


def test_what_cannot_be_a_rule_is_refused():
    for by, threshold, message in (("norm", 1.0, "by must be one of"), ("entropy", -0.1, "threshold must be 0 or")):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(selective)(by, threshold)


def test_the_generator_collapses_by_these_rules():
    model, ids = soft_ar("gpt2", "soft", "tokens"), texts_of(2, 5)
    prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool))
    whole = soft_ar_generate(model, prompts, 24, soft=SoftWriting())
    middle = whole.distance[whole.collapsed].median().item()
    text = soft_ar_generate(model, prompts, 24, soft=SoftWriting(which=selective("distance", middle)))
    left = ~torch.isclose(text.context, text.embeds).all(-1)
    assert text.collapsed.any()
    assert not left[~text.collapsed].any()
    assert (text.distance[text.collapsed] > middle).all()
    head = LearnedCollapse(16).double()
    mapped = soft_ar_generate(model, prompts, 24, soft=SoftWriting(mapped=lambda tokens: head(tokens.hidden)))
    assert mapped.collapsed.any()
    assert not torch.equal(mapped.tokens, whole.tokens)
