"""Soft supervised fine-tuning against a naive loop: transformers' own forward, row by row, without padding or cache.

The loop shares with softrl the kept ids, the noise and the base relaxation's weights (which have tests of their own).
Each mistake of the first sketch that softrl's maths, section 8, corrects is one that a test here would show.
"""

from dataclasses import replace

import pytest
import torch
from helpers import ALL_MODELS, EOS, V, gpt2, llama, random_for, relaxation_of

from softrl.data.supervised import supervised_texts
from softrl.estimators.pathwise import pathwise_estimate, surrogate
from softrl.estimators.supervised import guided_rollout, plain_pass, token_objective
from softrl.estimators.system import AdjointSettings, ForwardPass
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.tokens.guidance import guided

pytestmark = pytest.mark.usefixtures("float64_inside")

ROWS = [
    ([3, 9, 4, 11, 6, EOS, 8], [0, 0, 1, 1, 1, 1, 1]),  # goes on after an end of sequence, as a conversation does
    ([7, 12, 5], [0, 1, 1]),
    ([14, 3, 20, 9, 4, 16], [0, 1, 1, 0, 0, 1]),  # another speaker's turn in between
]
TERMS = DirectTerms(entropy_weight=-0.3, target_weight=1.0)
FULL = {
    "sequential": AdjointSettings("sequential"),
    "blocked": AdjointSettings("blocked", block_length=2, tol=1e-10),
    "parallel": AdjointSettings("parallel", tol=1e-10),
    "autograd": AdjointSettings("autograd"),
}
RELAXATIONS = {
    "softmax": ("softmax", {}),
    "softmax, tau": ("softmax", {"temperature": 0.6}),
    "gumbel_softmax": ("gumbel_softmax", {}),
    "entropy bound": ("softmax", {"max_entropy_nats": 0.9}),
    "straight_through": ("straight_through", {}),
}


def batch(rows=ROWS):
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [2] * (length - len(ids)) for ids, _ in rows])
    counts = torch.tensor([counts + [0] * (length - len(counts)) for _, counts in rows]).bool()
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows])
    return ids, ids.masked_fill(~counts, -100), mask


def texts_of(rows=ROWS):
    return supervised_texts(*batch(rows))


def amounts_of(texts, alpha):
    """A different amount at every step, around α, where α is neither 0 nor 1."""
    shape = texts.targets.shape
    wave = 0.15 * torch.sin(torch.arange(shape[0] * shape[1], dtype=torch.float64)).view(shape)
    return torch.full(shape, float(alpha)) if alpha in (0.0, 1.0) else alpha + wave.float()


def make(model, name="softmax", rule="mix", alpha=0.4, rows=ROWS):
    policy, texts = Policy(model), texts_of(rows)
    base, settings = RELAXATIONS[name]
    relaxation = guided(relaxation_of(base, **settings), rule)
    rollout = guided_rollout(policy, texts, relaxation, amounts_of(texts, alpha), random_for(len(rows)))
    return policy, texts, relaxation, rollout


def parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient(value, model):
    found = torch.autograd.grad(value, parameters(model), allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters(model), found, strict=True)]
    return torch.cat([each.flatten() for each in filled])


def naive(model, relaxation, rollout, amounts, detached=False, rows=ROWS, terms=TERMS):
    """J of all rows: the whole prefix again at every step, and the guided embedding by its formula."""
    table = model.get_input_embeddings()
    total = torch.zeros((), dtype=torch.float64)
    for row, (ids, counts) in enumerate(rows):
        start = counts.index(1) if 1 in counts else 1
        inputs = table(torch.tensor(ids[:start]))
        for step, (token, count) in enumerate(zip(ids[start:], counts[start:], strict=True)):
            logits = model(inputs_embeds=inputs[None]).logits[0, -1]
            log_probs = logits.log_softmax(-1)
            if count:
                entropy = -(log_probs.exp() * log_probs).sum()
                total = total + terms.target_weight * log_probs[token] + terms.entropy_weight * entropy
            embed = _guided_embedding(table, relaxation, rollout, row, step, logits, token, detached)
            if not count:
                embed = table(torch.tensor(token))
            inputs = torch.cat([inputs, embed[None]])
    return total


def _guided_embedding(table, relaxation, rollout, row, step, logits, token, detached):
    support = rollout.support.at(row, step)
    own = replace(
        support, ids=support.ids[:-1], noise=support.noise[:-1], kept=support.kept[:-1],
        draws=None, guidance=None,
    )  # fmt: skip
    p = relaxation.base.weights(logits[own.ids], own)
    fed = _guided_densely(relaxation.rule, own.ids, p, support.guidance.double(), token)
    if relaxation.base.feeds_one_hot:  # dq := dp: guided both, the value of the one and the derivative of the other
        one_hot = torch.nn.functional.one_hot(own.choice, len(p)).double()
        value = _guided_densely(relaxation.rule, own.ids, one_hot, support.guidance.double(), token)
        fed = value + fed - fed.detach()
    return (fed.detach() if detached else fed) @ table.weight


def _guided_densely(rule, ids, weights, alpha, token):
    dense = torch.zeros(V, dtype=torch.float64).scatter_add(0, ids, weights)
    true = torch.nn.functional.one_hot(torch.tensor(token), V).double()
    if rule == "mix":
        return alpha * true + (1 - alpha) * dense
    if dense[token] >= alpha:
        return dense
    return alpha * true + dense * (1 - true) * (1 - alpha) / (1 - dense[token])


@pytest.mark.parametrize("rule", ["mix", "floor"])
@pytest.mark.parametrize("name", RELAXATIONS)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_full_gradient_is_that_of_the_naive_loop(build, name, rule):
    policy, texts, relaxation, rollout = make(build(), name, rule)
    objective = naive(policy.model, relaxation, rollout, amounts_of(texts, 0.4))
    expected = gradient(objective, policy.model)
    for method, settings in FULL.items():
        estimate = pathwise_estimate(policy, rollout, relaxation, None, TERMS, settings)
        output = surrogate(policy, relaxation, estimate, TERMS, settings)
        actual = gradient(output.value.sum(), policy.model)
        assert ((actual - expected).norm() / expected.norm()).item() < 1e-6, method
        assert output.replay_error < 1e-12
        values = token_objective(TERMS, estimate.target_log_probs, rollout.entropy) * texts.counted
        assert values.sum().item() == pytest.approx(objective.item(), rel=1e-9), method
    forward = ForwardPass.of(policy, rollout)
    estimate = pathwise_estimate(policy, rollout, relaxation, None, TERMS, FULL["parallel"], forward=forward)
    shared = surrogate(policy, relaxation, estimate, TERMS, FULL["parallel"], forward).value.sum()
    assert ((gradient(shared, policy.model) - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("rule", ["mix", "floor"])
@pytest.mark.parametrize("model_name", ALL_MODELS)
def test_a_detached_feedback_is_one_ordinary_pass(model_name, rule):
    """Weights are constants; the embedding that they weigh is not."""
    rows = ROWS if model_name in ("llama", "gpt2", "gemma3", "gru", "mamba", "soft_ar") else ROWS[:1]
    policy, texts, relaxation, rollout = make(ALL_MODELS[model_name](), "gumbel_softmax", rule, rows=rows)
    found = plain_pass(policy, texts, TERMS, rollout).value.sum()
    if model_name == "gemma3":  # scales its embedding inside the module, which `table.weight` misses
        assert found.isfinite()
        return
    expected = naive(policy.model, relaxation, rollout, amounts_of(texts, 0.4), detached=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    actual, wanted = gradient(found, policy.model), gradient(expected, policy.model)
    assert ((actual - wanted).norm() / wanted.norm()).item() < 1e-6
    full = gradient(naive(policy.model, relaxation, rollout, amounts_of(texts, 0.4)), policy.model)
    assert ((actual - full).norm() / full.norm()).item() > 1e-2  # the feedback matters here


def test_a_frozen_head_gets_its_terms_from_the_second_phase():
    model = llama(tied=False)
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    policy, texts, relaxation, rollout = make(model, "softmax", "floor")
    expected = gradient(naive(model, relaxation, rollout, amounts_of(texts, 0.4)), model)
    estimate = pathwise_estimate(policy, rollout, relaxation, None, TERMS, FULL["sequential"])
    actual = gradient(surrogate(policy, relaxation, estimate, TERMS, FULL["sequential"]).value.sum(), model)
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("method", FULL)
def test_a_setting_that_is_a_tensor_gets_its_derivative_from_the_surrogate(method):
    """A learned temperature: against finite differences of J, the rollout made anew on either side."""
    terms, tau = DirectTerms(target_weight=1.0), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    policy, texts = Policy(gpt2()), texts_of()  # Llama's norms round to float32, which a quotient magnifies

    def rolled_out(temperature):
        relaxation = guided(relaxation_of("softmax", temperature=temperature, min_p=0.0), "mix")
        rollout = guided_rollout(policy, texts, relaxation, amounts_of(texts, 0.4), random_for(3))
        return relaxation, rollout, plain_pass(policy, texts, terms, rollout).value.sum().item()

    relaxation, rollout, _ = rolled_out(0.8)
    estimate = pathwise_estimate(policy, rollout, relaxation, None, terms, FULL[method])
    live = guided(relaxation_of("softmax", temperature=0.8, min_p=0.0), "mix")
    object.__setattr__(live.base, "temperature", tau)
    (found,) = torch.autograd.grad(surrogate(policy, live, estimate, terms, FULL[method]).value.sum(), tau)
    expected = (rolled_out(0.8 + 1e-5)[2] - rolled_out(0.8 - 1e-5)[2]) / 2e-5
    assert found.item() == pytest.approx(expected, rel=1e-4)


def own_loss(model, rows=ROWS):
    """Teacher forcing by the model itself: −Σ log π of the tokens that count."""
    ids, labels, mask = batch(rows)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("build", [llama, gpt2])
def test_guidance_of_one_is_teacher_forcing(build):
    """By the short cut, by a rollout that feeds true tokens only, and through a feedback that is constant then."""
    policy, texts, relaxation, rollout = make(build(), alpha=1.0)
    terms = DirectTerms(target_weight=1.0)
    expected = own_loss(policy.model)
    wanted = gradient(expected, policy.model)
    estimate = pathwise_estimate(policy, rollout, relaxation, None, terms, FULL["parallel"])
    ways = {
        "short cut": plain_pass(policy, texts, terms).value.sum(),
        "rollout": plain_pass(policy, texts, terms, rollout).value.sum(),
    }
    for way, value in ways.items():
        assert value.item() == pytest.approx(-expected.item(), rel=1e-12), way
    ways["full"] = surrogate(policy, relaxation, estimate, terms, FULL["parallel"]).value.sum()
    for way, value in ways.items():
        assert ((-gradient(value, policy.model) - wanted).norm() / wanted.norm()).item() < 1e-9, way


@pytest.mark.parametrize("rule", ["mix", "floor"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_one_kept_token_without_guidance_is_greedy_free_running(build, rule):
    """What transformers' generate writes; the loss is that of the text's tokens behind what was written."""
    rows = [(ids, [0] * start + [1] * (len(ids) - start)) for (ids, _), start in zip(ROWS, (2, 1, 3), strict=True)]
    policy, texts = Policy(build()), texts_of(rows)
    relaxation = guided(relaxation_of("softmax", top_k=1), rule)
    rollout = guided_rollout(policy, texts, relaxation, torch.zeros(texts.targets.shape), random_for(3))
    model, num_steps = policy.model, texts.targets.shape[1]
    model.generation_config.eos_token_id = None
    for row, (ids, counts) in enumerate(rows):
        start = counts.index(1)
        prompt = torch.tensor([ids[:start]])
        written = model.generate(input_ids=prompt, max_new_tokens=num_steps, do_sample=False, pad_token_id=2)
        length = len(ids) - start
        assert rollout.tokens[row, :length].tolist() == written[0, start : start + length].tolist()
        logits = model(input_ids=written[:, : start + length - 1]).logits[0, start - 1 :]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None])[:, 0]
        found = plain_pass(policy, texts, DirectTerms(target_weight=1.0), rollout).log_probs[row, :length]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_loss_is_on_raw_logits_and_token_ids():
    """Against cross-entropy on probabilities, and against targets read as places among the kept."""
    policy, texts, _, rollout = make(llama(), "softmax, tau", alpha=0.0)
    found = plain_pass(policy, texts, DirectTerms(target_weight=1.0), rollout)
    embeds = policy.embed_soft(rollout.support.ids.flatten(0, 1), rollout.fed.flatten(0, 1)).unflatten(
        0, texts.targets.shape
    )
    logits = policy.causal_lm.lm_head(policy.hidden(texts.prompts, embeds))
    right = torch.nn.functional.cross_entropy(logits[texts.counted], texts.targets[texts.counted], reduction="sum")
    assert found.value.sum().item() == pytest.approx(-right.item(), rel=1e-12)
    probs = logits.softmax(-1)
    sketch = torch.nn.functional.cross_entropy(probs[texts.counted], texts.targets[texts.counted], reduction="sum")
    assert abs(sketch.item() - right.item()) > 0.1
    outside = ~(rollout.support.ids[..., :-1] == texts.targets[..., None]).any(-1)
    assert (outside & texts.counted).any()  # no place among the kept could be its target
    assert (found.log_probs[outside] < 0.0).all()


def test_masked_weights_keep_their_ids_and_what_is_fed_is_their_mixture():
    _, texts, _, rollout = make(llama(), alpha=0.4)
    support = rollout.support
    assert (~support.kept[..., :-1]).any()  # the nucleus has removed some
    distinct = support.ids[..., :-1].sort(-1).values.diff(dim=-1)
    assert (distinct > 0).all()  # masked ids have not become id 0
    assert torch.equal(support.ids[..., -1], texts.targets)
    assert (rollout.fed[~support.kept] == 0.0).all()


def test_a_cached_step_is_fed_the_newest_embedding_and_positions_are_left_alone():
    policy, texts = Policy(llama()), texts_of()
    relaxation = guided(relaxation_of("softmax"), "mix")
    assert policy.honours_padding  # measured at its first use, by passes of its own
    seen = []

    def spy(module, args, kwargs):
        seen.append((kwargs["inputs_embeds"].shape[1], kwargs["position_ids"], kwargs["position_ids"].clone()))

    handle = policy.decoder.register_forward_pre_hook(spy, with_kwargs=True)
    guided_rollout(policy, texts, relaxation, amounts_of(texts, 0.4), random_for(3))
    handle.remove()
    prompt_length, num_steps = texts.prompts.mask.shape[1], texts.targets.shape[1]
    assert [length for length, *_ in seen] == [prompt_length] + [1] * (num_steps - 1)
    for step, (_, positions, before) in enumerate(seen):
        assert torch.equal(positions, before)  # nobody added to them in place
        assert torch.equal(positions[:, -1], texts.prompts.mask.sum(-1) - 1 + step)


def test_an_end_of_sequence_among_the_fed_weights_ends_nothing():
    """The text says where it ends: a soft token may well hold some weight of the end long before."""
    model = llama(tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] = 0.0  # logit 0: kept, with weight, nearly everywhere
    _, texts, _, rollout = make(model, alpha=0.1)
    weight = (rollout.fed * (rollout.support.ids == EOS)).sum(-1)
    assert weight[texts.counted].max() > 1e-3
    assert torch.equal(rollout.mask, texts.counted)
    assert torch.equal(rollout.soft_tokens.survival, texts.counted.double())


def test_a_penalty_on_the_entropy_needs_a_likelihood():
    with pytest.raises(ValueError, match="beside which alone an entropy may be penalised"):
        DirectTerms(entropy_weight=-0.1)
