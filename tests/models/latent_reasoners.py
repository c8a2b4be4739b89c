"""Small latent reasoners in float64 and texts for them, for tests of the model."""

import torch
from helpers import with_float64_norms

from softrl.models.reasoner import ReasonerForCausalLM
from softrl.models.reasoner_config import ReasonerConfig

V, SEED = 11, 5
KINDS = {
    "discrete": {"latent_kind": "discrete", "num_latents": 3},
    "gaussian": {"latent_kind": "gaussian", "latent_size": 2},
    "soft": {"latent_kind": "soft", "num_latents": 3, "latent_noise": True, "latent_temperature": 0.8},
}
SIZES = {"base_lm_size": 4, "reasoner_size": 8, "interpreter_size": 12}


def reasoner(seed=0, **settings):
    torch.manual_seed(seed)
    given = {"vocab_size": V, "base_lm_size": 8, "reasoner_size": 8, "interpreter_size": 8, "mixing_width": 6}
    model = ReasonerForCausalLM(ReasonerConfig(**(given | settings))).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("mixing.last", "log_z")):
                parameter.normal_(0.0, 0.5)
    return with_float64_norms(model)


def texts(num_texts=2, length=5, seed=0):
    return torch.randint(0, V, (num_texts, length), generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
