"""Soft thoughts: their surrogate against autograd through the loop, finite differences, and paths counted by hand."""

from dataclasses import replace

import pytest
import torch
from helpers import ALL_RELAXATIONS, V, gpt2, gru, llama, mamba, relaxation_of, thinking, with_float64_norms
from peft import LoraConfig, get_peft_model
from torch import nn

from softrl.estimators.soft_thoughts import soft_thought_pass
from softrl.estimators.system import AdjointSettings
from softrl.models import policy as policy_module
from softrl.rollouts.thoughts import thought_embeds, thought_pass, thought_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.types import Texts

pytestmark = pytest.mark.usefixtures("float64_inside")

N, A, S, LENGTH, N_TALK, TEMPERATURE = 2, 2, 2, 3, 2, 0.9
ANCHORS = torch.tensor([[0, 3], [1, 0]])
IS_ANCHOR = torch.tensor([[True, True], [True, False]])
EXACT = AdjointSettings()
MODELS = {"gpt2": gpt2, "gru": gru, "llama": lambda: with_float64_norms(llama())}


def texts():
    ids = torch.randint(3, V, (N, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3]).bool()
    return Texts(ids.masked_fill(~mask, 2), mask)


def make(lm, relaxation, n_thought=LENGTH, **settings):
    model = thinking(lm, n_thought=n_thought, temperature=TEMPERATURE, **settings).eval()
    random = SequenceRandom([1, 2], rows=A * S)
    attention = "naive" if "Mamba" in type(model.policy.causal_lm).__name__ else "shared"
    given = (model, texts(), ANCHORS, IS_ANCHOR, random, S)
    return model, thought_rollout(*given, relaxation=relaxation, attention=attention), attention


def looped(model, thoughts, relaxation, discount=1.0, hops=None, through=True):
    """Rewards [N, A, S] with the whole loop in the graph, written with the LM's own forward pass: one plain sequence
    a thought, run again for every thought token.

    A path is weighed by `discount` to the number of its feedback edges. With `hops`, what is fed are constants first,
    and then, so many times, embeddings whose weights were computed from those of the time before. Without `through`,
    weights are constants: what remains is the gradient at fixed thoughts.
    """
    lm = model.policy.causal_lm
    table, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    rewards = torch.zeros(N, A, S, dtype=torch.float64)

    def hidden_of(inputs):
        return model.policy.decoder(**model.policy.accepted({"inputs_embeds": inputs[None], "use_cache": False}))[0][0]

    def weighed(embed):
        return embed.detach() + discount * (embed - embed.detach())

    for row, column, sample in torch.cartesian_prod(torch.arange(N), torch.arange(A), torch.arange(S)).tolist():
        if not IS_ANCHOR[row, column]:
            continue
        text = texts().ids[row, texts().mask[row]]
        after = int(ANCHORS[row, column]) + 1
        opening = torch.cat([table(text[:after]), model.start[None]])

        def embedded(fed_before, step, row=row, column=column, sample=sample, opening=opening):
            support = thoughts.support.at(row, column, sample, step)
            hidden = hidden_of(torch.cat([opening, *fed_before]))[-1]
            p = relaxation.weights((head(hidden) / TEMPERATURE)[support.ids], support)
            q = thoughts.fed[row, column, sample, step] + (p - p.detach() if through else 0.0)
            return weighed((q[:, None] * table(support.ids)).sum(0))[None]

        steps = range(thoughts.length)
        fed = [] if hops is None else [_constant(thoughts, table, row, column, sample, step) for step in steps]
        for _ in range(0 if hops is None else hops):
            fed = [embedded(fed[:step], step) for step in steps]
        for step in steps if hops is None else ():
            fed.append(embedded(fed, step))
        true = text[after : after + N_TALK]
        hidden = hidden_of(torch.cat([opening, *fed, model.end[None], table(true[:-1])]))
        base = hidden_of(table(text))[after - 1 : after - 1 + len(true)]
        talk = hidden[after + 1 + thoughts.length :]
        weight = model.mixing(base, talk)[:, None]
        if model.thinking.mixing == "hidden":
            log_probs = head((1 - weight) * base + weight * talk).log_softmax(-1)
        else:
            both = head(base).log_softmax(-1), head(talk).log_softmax(-1)
            log_probs = ((1 - weight) * both[0] + weight * both[1]).log_softmax(-1)
        rewards[row, column, sample] = log_probs.gather(-1, true[:, None]).sum()
    return rewards


def _constant(thoughts, table, row, column, sample, step):
    ids, fed = thoughts.support.ids[row, column, sample, step], thoughts.fed[row, column, sample, step]
    return (fed[:, None] * table(ids)).sum(0)[None].detach()


def gradient(model, total, retain=False):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=retain)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
    )


def assert_near(actual, expected, tolerance=1e-9):
    assert expected.norm() > 1e-6
    assert (actual - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("relaxation_name", ALL_RELAXATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_both_parts_are_the_derivative_through_the_loop(name, relaxation_name):
    relaxation = relaxation_of(relaxation_name)
    model, thoughts, attention = make(MODELS[name](), relaxation)
    soft = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, EXACT, attention=attention)
    fixed = looped(model, thoughts, relaxation, through=False)
    whole = looped(model, thoughts, relaxation)
    torch.testing.assert_close(soft.talk, whole.detach() * IS_ANCHOR[..., None], rtol=1e-9, atol=1e-9)
    talk, thought = (gradient(model, part.sum(), retain=True) for part in (soft.talk, soft.thought))
    of_fixed, of_whole = gradient(model, fixed.sum()), gradient(model, whole.sum())
    assert_near(talk, of_fixed)
    assert_near(thought, of_whole - of_fixed)
    assert (of_whole - of_fixed).norm() > 1e-2 * of_whole.norm(), "the thought's part is no trifle"


ATTENTIONS = [
    (name, attention)
    for name in MODELS
    for attention in ("naive", "dense", "shared")
    if (name, attention) != ("gru", "dense")  # a recurrent state has no dense mask
]


@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_attentions_give_the_same_surrogate(name, attention):
    relaxation = relaxation_of("gumbel_softmax")
    model, thoughts, _ = make(MODELS[name](), relaxation)
    soft = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, EXACT, attention=attention)
    assert_near(
        gradient(model, (soft.talk + soft.thought).sum()), gradient(model, looped(model, thoughts, relaxation).sum())
    )


@pytest.mark.parametrize("case", ["mamba", "llama, LoRA", "untied", "log_probs", "entropy bound"])
def test_other_models_and_mixings(case):
    lm = {
        "mamba": mamba,
        "llama, LoRA": lambda: get_peft_model(
            with_float64_norms(llama()), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        ).double(),
        "untied": lambda: gpt2(tied=False),
    }.get(case, gpt2)()
    bound = {"max_entropy_nats": 1.0} if case == "entropy bound" else {}
    relaxation = relaxation_of("softmax", **bound)
    model, thoughts, attention = make(lm, relaxation, mixing="log_probs" if case == "log_probs" else "hidden")
    soft = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, EXACT, attention=attention)
    assert_near(
        gradient(model, (soft.talk + soft.thought).sum()), gradient(model, looped(model, thoughts, relaxation).sum())
    )


@pytest.mark.parametrize("name", ["gpt2", "gru"])
@pytest.mark.parametrize("relaxation_name", ["softmax", "gumbel_softmax"])
def test_mixtures_against_finite_differences(name, relaxation_name):
    """Rewards of thoughts thought again at other parameters, with the same noise and the same kept ids."""
    relaxation = relaxation_of(relaxation_name, top_k=V, min_p=0.0)
    model, thoughts, _ = make(MODELS[name](), relaxation)
    soft = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, EXACT)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = gradient(model, (soft.talk + soft.thought).sum())
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(len(grads), generator=generator, dtype=torch.float64)
    step, values = 1e-6, []
    for sign in (1.0, -1.0):
        nn.utils.vector_to_parameters(_flat(parameters) + sign * step * direction, parameters)
        values.append(_value_thinking_again(model, thoughts, relaxation))
        nn.utils.vector_to_parameters(_flat(parameters) - sign * step * direction, parameters)
    difference = (values[0] - values[1]) / (2 * step)
    assert difference == pytest.approx((grads * direction).sum().item(), rel=1e-6)


def _flat(parameters):
    return nn.utils.parameters_to_vector(parameters).detach()


@torch.no_grad()
def _value_thinking_again(model, thoughts, relaxation):
    """R at these parameters: the rollout is made again; kept ids are all of V, so that no support jumps."""
    again = make_again(model, relaxation)
    order = [each.support.ids.argsort(-1) for each in (thoughts, again)]
    assert torch.equal(*(each.support.ids.gather(-1, o) for each, o in zip((thoughts, again), order, strict=True)))
    return thought_pass(model, texts(), again, N_TALK, thought_embeds(model, again, "policy")).rewards.sum().item()


def make_again(model, relaxation):
    random = SequenceRandom([1, 2], rows=A * S)
    return thought_rollout(model, texts(), ANCHORS, IS_ANCHOR, random, S, relaxation=relaxation)


@pytest.mark.parametrize("relaxation_name", ["softmax", "st_gumbel"])
@pytest.mark.parametrize("discount", [0.0, 0.4])
def test_gamma_weighs_a_path_by_its_edges(relaxation_name, discount):
    """Against a loop whose every fed embedding is `sg e + γ (e − sg e)`, the embedding's own part included."""
    relaxation = relaxation_of(relaxation_name)
    model, thoughts, _ = make(gpt2(), relaxation)
    settings = AdjointSettings(feedback_discount=discount)
    soft = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, settings)
    expected = gradient(model, looped(model, thoughts, relaxation, discount).sum())
    assert_near(gradient(model, (soft.talk + soft.thought).sum()), expected)


@pytest.mark.parametrize("discount", [1.0, 0.4])
@pytest.mark.parametrize("hops", [0, 1, 2, 3, 7])
def test_hops_are_paths_of_so_many_edges(hops, discount):
    """Against a loop that is cut after so many edges; as many as there are thought tokens, or more, are exact."""
    relaxation = relaxation_of("gumbel_softmax")
    model, thoughts, _ = make(gpt2(), relaxation)
    settings = AdjointSettings(hops=hops, feedback_discount=discount)
    soft = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, settings)
    actual = gradient(model, (soft.talk + soft.thought).sum())
    cut = gradient(model, looped(model, thoughts, relaxation, discount, min(hops, LENGTH)).sum())
    assert_near(actual, cut)
    if hops < LENGTH:
        whole = gradient(model, looped(model, thoughts, relaxation, discount).sum())
        assert (actual - whole).norm() > 1e-4 * whole.norm()


def test_the_bound_cuts_every_adjoint_and_its_direction_stays():
    relaxation = relaxation_of("softmax")
    model, thoughts, _ = make(gpt2(), relaxation)
    free = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, AdjointSettings(hops=1)).adjoint
    norms = free.norm(dim=-1)
    bound = norms[norms > 0.0].median().item()
    settings = AdjointSettings(hops=1, adjoint_clip=bound)
    clipped = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, settings).adjoint
    expected = free * (bound / norms.clamp(min=bound))[..., None]
    torch.testing.assert_close(clipped, expected, rtol=1e-10, atol=1e-12)
    assert (clipped != free).any()


def test_a_frozen_embedding_has_no_own_part():
    relaxation = relaxation_of("softmax")
    model, thoughts, _ = make(gpt2(tied=False), relaxation)
    model.lm.get_input_embeddings().weight.requires_grad_(False)
    soft = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, EXACT)
    actual = gradient(model, (soft.talk + soft.thought).sum())
    assert_near(actual, gradient(model, looped(model, thoughts, relaxation).sum()))


def test_the_embeddings_own_part_is_counted():
    """The rows of W that only thoughts read: nothing but E(q; W) reaches them in an untied model."""
    relaxation = relaxation_of("softmax", top_k=V, min_p=0.0)
    model, thoughts, _ = make(gpt2(tied=False), relaxation)
    weight = model.lm.get_input_embeddings().weight
    unread = torch.tensor(sorted(set(range(V)) - set(texts().ids[texts().mask].tolist())))
    soft = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, EXACT)
    actual = torch.autograd.grad((soft.talk + soft.thought).sum(), weight)[0][unread]
    expected = torch.autograd.grad(looped(model, thoughts, relaxation).sum(), weight)[0][unread]
    assert_near(actual, expected)


def test_another_value_goes_through_the_thoughts_in_its_stead():
    """`thought` is the value's derivative through the thoughts, `talk` the reward's at fixed ones: for a function of r
    and for one that reads the thought itself."""
    relaxation = relaxation_of("gumbel_softmax")
    model, thoughts, _ = make(gpt2(), relaxation)
    settings = {"relaxation": relaxation, "settings": EXACT}
    soft = soft_thought_pass(
        model, texts(), thoughts, N_TALK, value=lambda passed, _: passed.rewards.tanh(), **settings
    )
    squashed = [looped(model, thoughts, relaxation, through=through).tanh().sum() for through in (True, False)]
    through = [gradient(model, total) for total in squashed]
    assert_near(gradient(model, soft.thought.sum(), retain=True), through[0] - through[1])
    assert_near(
        gradient(model, soft.talk.sum()), gradient(model, looped(model, thoughts, relaxation, through=False).sum())
    )
    none = soft_thought_pass(
        model,
        texts(),
        thoughts,
        N_TALK,
        value=lambda passed, fed: 0.0 * passed.rewards + 0.0 * fed.sum((-2, -1)),
        **settings,
    )
    assert gradient(model, none.thought.sum()).norm() == 0.0


def test_chunks_of_the_head_change_nothing(monkeypatch):
    relaxation = relaxation_of("softmax")
    model, thoughts, _ = make(gpt2(), relaxation)
    expected = gradient(model, looped(model, thoughts, relaxation).sum())
    monkeypatch.setattr(policy_module, "CHUNK_ELEMENTS", 300)
    soft = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, EXACT)
    assert_near(gradient(model, (soft.talk + soft.thought).sum()), expected)


def test_thoughts_of_no_tokens_have_no_part():
    relaxation = relaxation_of("softmax")
    model, thoughts, _ = make(gpt2(), relaxation, n_thought=0)
    soft = soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, EXACT)
    assert torch.equal(soft.thought, torch.zeros(N, A, S, dtype=torch.float64))
    assert soft.adjoint.shape == (N, A, S, 0, 16)
    assert_near(gradient(model, soft.talk.sum()), gradient(model, looped(model, thoughts, relaxation, hops=0).sum()))


@pytest.mark.parametrize("method", ["sequential", "blocked", "autograd"])
def test_other_methods_are_refused(method):
    relaxation = relaxation_of("softmax")
    model, thoughts, _ = make(gpt2(), relaxation)
    settings = replace(EXACT, method=method)
    with pytest.raises(ValueError, match=f"solved for by method='parallel', got '{method}'"):
        soft_thought_pass(model, texts(), thoughts, N_TALK, relaxation, settings)
