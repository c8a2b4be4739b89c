"""Tiny latent reasoners in float64, whose mixture is no half of each, for tests of their loss and their trainer."""

import torch
from helpers import V

from softrl.models.reasoner import ReasonerForCausalLM
from softrl.models.reasoner_config import ReasonerConfig


def reasoner(seed=0, **settings):
    """A GRU of width 6 with discrete thoughts of two latents; always the same for a seed."""
    sizes = {"base_lm_size": 6, "reasoner_size": 6, "interpreter_size": 6, "mixing_width": 4, "num_latents": 3}
    torch.manual_seed(seed)
    model = ReasonerForCausalLM(ReasonerConfig(vocab_size=V, **{**sizes, **settings})).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("mixing.last", "log_z")):
                parameter.normal_(0.0, 0.5)
    return model
