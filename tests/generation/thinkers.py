"""Tiny models that think, every part of them at a scale at which it matters, and generation that keeps nothing."""

import torch
from helpers import ALL_MODELS, llama

from softrl.models.thinking import ThinkingConfig, ThinkingLM
from softrl.tokens.noise import SequenceRandom, sequence_seed


def thinker(build=llama, seed=3, scale=0.5, lm=None, learns_log_z=False, **config):
    """A model whose mixing head and learned embeddings are redrawn; mixing weights are around 1/2."""
    lm = ALL_MODELS.get(build, build)() if lm is None else lm
    model = ThinkingLM(lm, ThinkingConfig(**{"n_thought": 3, "sigmoid": True, **config}), learns_log_z).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("lm."):
                parameter.normal_(0.0, scale, generator=generator)
    return model


def slow_text(model, prompt, num_steps, thinks, next_token=None, key=(0, 0, 0), n=None, relaxation=None, source=None):
    """One text, everything from scratch at every token: ids, and (step, thought ids, fed, w, entropies) of thoughts.

    Args:
        prompt: ids.
        thinks: of a step and the entropy of the prediction without a thought.
        source: "greedy" or "pause"; None samples.
    """
    n = model.thinking.n_thought if n is None else n
    embedding, cap = model.lm.get_input_embeddings(), getattr(model.lm.config, "final_logit_softcapping", None)
    draws, ids, record = SequenceRandom([sequence_seed(*key)]), list(prompt), []

    def head(hidden):
        logits = model.lm.get_output_embeddings()(hidden)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def last_hidden(embeds):
        return model.lm.base_model(inputs_embeds=embeds[None]).last_hidden_state[0, -1]

    for step in range(num_steps):
        text = embedding(torch.tensor(ids))
        base = last_hidden(text)
        log_probs = head(base).log_softmax(-1)
        spread = -(log_probs.exp() * log_probs).sum()
        if thinks(step, spread):
            fed, thought = [text, model.start[None]], []
            random = SequenceRandom([sequence_seed(*key, step)])
            for _ in range(n):
                logits = head(last_hidden(torch.cat(fed)))[None] / model.thinking.temperature
                if relaxation is not None:
                    support = relaxation.draw(logits, random)
                    weights = relaxation.weights(logits.gather(-1, support.ids), support)
                    weights = relaxation.fed(weights, support)[0]
                    thought.append(dict(zip(support.ids[0].tolist(), weights.tolist(), strict=True)))
                    fed.append((weights[:, None] * embedding(support.ids[0])).sum(0)[None])
                    continue
                noise = 0.0 if source == "greedy" else random.gumbel(logits.shape[-1], logits.dtype)
                token = 0 if source == "pause" else int((logits + noise).argmax())
                thought.append({token: 1.0})
                fed.append(model.pause[None] if source == "pause" else embedding(torch.tensor([token])))
            after = last_hidden(torch.cat([*fed, model.end[None]]))
            weight = model.mixing(base[None], after[None])
            both = [head(states).log_softmax(-1) for states in (base, after)]
            share = 1.0 if model.thinking.residual else 1.0 - weight
            if model.thinking.mixing == "hidden":
                log_probs = head(share * base + weight * after).log_softmax(-1)
            else:
                log_probs = (share * both[0] + weight * both[1]).log_softmax(-1)
            record.append((step, thought, weight.item(), spread.item(), -(log_probs.exp() * log_probs).sum().item()))
        if next_token is None:
            ids.append(int(log_probs.argmax()))
        else:
            ids.append(int(next_token.choose(log_probs[None], draws)))
    return ids[len(prompt) :], record
