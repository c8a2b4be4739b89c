"""The thinking model: its mixing head against formulas written out, what it saves, and what it refuses."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import V, gemma3, gpt2, llama, thinking
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from softrl.models.thinking import MixingHead, ThinkingConfig, ThinkingLM, load_thinking_config


def states(width=16, rows=5):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, rows, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("mixing", ["hidden", "log_probs"])
def test_mixing_is_its_formula(mixing, residual):
    model = thinking(mixing=mixing, residual=residual)
    (base, thought), weight = states(), torch.tensor([0.0, 0.3, 1.0, -0.5, 2.0], dtype=torch.float64)
    mixed = model.mixed_log_probs(base, thought, weight)
    head, w = model.lm.lm_head.weight, weight[:, None]
    share = 1.0 if residual else 1.0 - w
    if mixing == "hidden":
        scores = (share * base + w * thought) @ head.T
    else:
        each = [hidden @ head.T - (hidden @ head.T).exp().sum(-1, keepdim=True).log() for hidden in (base, thought)]
        scores = share * each[0] + w * each[1]
    expected = scores - scores.exp().sum(-1, keepdim=True).log()
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    if not residual:
        torch.testing.assert_close(mixed[2], (thought[2] @ head.T).log_softmax(-1), rtol=1e-12, atol=1e-12)


def test_mixing_scores_at_temperature_1_and_with_the_models_own_head():
    """Thoughts have their temperature; true tokens have none. Gemma caps its logits behind the head."""
    model = thinking(gemma3(), temperature=0.4)
    (base, thought), weight = states(), torch.full((5,), 0.25, dtype=torch.float64)
    logits = (0.75 * base + 0.25 * thought) @ model.lm.lm_head.weight.T
    expected = (torch.tanh(logits / 3.0) * 3.0).log_softmax(-1)
    torch.testing.assert_close(model.mixed_log_probs(base, thought, weight), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_mixing_head_is_a_network_of_both_states(sigmoid):
    torch.manual_seed(0)
    head = MixingHead(16, 7, sigmoid).double()
    base, thought = states()
    start = head(base, thought)
    assert torch.equal(start, torch.full((5,), 0.5 if sigmoid else 0.0, dtype=torch.float64))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()

    def normal(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    features = torch.cat([normal(base), normal(thought)], -1)
    for layer in (head.first, head.second):
        features = (features @ layer.weight.T + layer.bias).clamp(min=0.0)
    expected = (features @ head.last.weight.T + head.last.bias)[:, 0]
    expected = 1.0 / (1.0 + (-expected).exp()) if sigmoid else expected
    torch.testing.assert_close(head(base, thought), expected, rtol=1e-12, atol=1e-12)
    assert (head(base, thought) - head(thought, base)).norm() > 0.1, "which is which matters"
    torch.testing.assert_close(head(1e4 * base, thought), head(base, thought), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"residual": True}, {"mixing": "log_probs"}])
def test_untrained_the_mixture_is_the_base(settings):
    model = thinking(redraw=False, **settings)
    base, thought = states()
    weight = model.mixing(base, 100.0 * thought)
    assert torch.equal(weight, torch.zeros(5, dtype=torch.float64))
    mixed, alone = model.mixed_log_probs(base, 100.0 * thought, weight), model.talk.head(base).log_softmax(-1)
    if settings.get("mixing") == "log_probs":  # renormalised once more
        torch.testing.assert_close(mixed, alone, rtol=1e-14, atol=1e-14)
    else:
        assert torch.equal(mixed, alone)


def test_the_zero_start_learns():
    """Zero in its last layer alone: the first gradient step moves the weight."""
    model = thinking(redraw=False)
    base, thought = states()
    model.mixed_log_probs(base, thought, model.mixing(base, thought))[:, 3].sum().backward()
    assert model.mixing.last.weight.grad.norm() > 1e-3


def test_embeddings_start_as_the_mean_of_what_the_embedding_module_returns():
    for lm in (gpt2(), gemma3()):
        model = thinking(lm, redraw=False)
        mean = lm.get_input_embeddings()(torch.arange(V)).mean(0)
        for each in (model.start, model.end, model.pause):
            torch.testing.assert_close(each.data, mean, rtol=1e-6, atol=1e-6)
    assert torch.equal(lm(torch.tensor([[4, 5]])).logits, model(torch.tensor([[4, 5]])).logits)


# Saving. The other process is told nothing but the folder.

_FRESH = """
import sys, torch
from softrl.models.thinking import ThinkingLM
from softrl.rollouts.thoughts import thought_embeds, thought_pass, thought_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.types import Texts

folder, result = sys.argv[1:]
model = ThinkingLM.from_pretrained(folder, dtype="float64")
ids = torch.arange(12).view(2, 6) + 3
texts, anchors = Texts(ids, torch.ones_like(ids).bool()), torch.tensor([[0, 2], [1, 3]])
thoughts = thought_rollout(model, texts, anchors, torch.ones_like(anchors).bool(), SequenceRandom([1, 2], rows=4), 2)
with torch.no_grad():
    passed = thought_pass(model, texts, thoughts, 2, thought_embeds(model, thoughts, "policy"))
torch.save({"tokens": thoughts.tokens, "log_probs": passed.log_probs, "talk": passed.talk_log_probs,
            "base": passed.base_log_probs, "settings": str(model.thinking), "log_z": model.log_z is not None}, result)
"""


def _outcome(model):
    """The same in this process."""
    from softrl.rollouts.thoughts import thought_embeds, thought_pass, thought_rollout
    from softrl.tokens.noise import SequenceRandom
    from softrl.types import Texts

    ids = torch.arange(12).view(2, 6) + 3
    texts, anchors = Texts(ids, torch.ones_like(ids).bool()), torch.tensor([[0, 2], [1, 3]])
    random = SequenceRandom([1, 2], rows=4)
    thoughts = thought_rollout(model, texts, anchors, torch.ones_like(anchors).bool(), random, 2)
    with torch.no_grad():
        passed = thought_pass(model, texts, thoughts, 2, thought_embeds(model, thoughts, "policy"))
    return {
        "tokens": thoughts.tokens, "log_probs": passed.log_probs, "talk": passed.talk_log_probs,
        "base": passed.base_log_probs, "settings": str(model.thinking), "log_z": model.log_z is not None,
    }  # fmt: skip


def _lora(lm):
    model = get_peft_model(lm, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return model.double().eval()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_fresh_process_thinks_the_same(tmp_path, lora):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lm = _lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float64")) if lora else base
    settings = {"n_thought": 3, "temperature": 0.8, "mixing": "log_probs", "sigmoid": True, "mixing_width": 5}
    model = thinking(lm, learns_log_z=lora, **settings).eval()
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", _FRESH, str(tmp_path / "model"), str(tmp_path / "result.pt")]
    subprocess.run(command, check=True, capture_output=True)
    theirs, ours = torch.load(tmp_path / "result.pt", weights_only=True), _outcome(model)
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-6)  # Llama's norms round to float32
        else:
            assert theirs[name] == value, name


def test_the_folder_is_an_ordinary_model_to_transformers(tmp_path):
    model = thinking(llama())
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64")
    ids = torch.tensor([[3, 9, 4, 17]])
    assert torch.equal(plain(ids).logits, model.lm(ids).logits)
    names = {name for name in load_file(tmp_path / "thinking.safetensors") if not name.startswith("mixing.")}
    assert names == {"start", "end", "pause"}


def test_the_lora_folder_is_an_ordinary_adapter_to_peft(tmp_path):
    from peft import AutoPeftModelForCausalLM

    llama().save_pretrained(tmp_path / "base")
    model = thinking(_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float64")))
    model.save_pretrained(tmp_path / "model")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float64")
    ids = torch.tensor([[3, 9, 4, 17]])
    torch.testing.assert_close(plain(ids).logits, model.lm(ids).logits, rtol=1e-6, atol=1e-6)
    assert not list((tmp_path / "model").glob("model*.safetensors")), "the base is not copied"
    for trainable in (False, True):
        again = ThinkingLM.from_pretrained(tmp_path / "model", is_trainable=trainable)
        assert again.start.requires_grad
        assert any(parameter.requires_grad for parameter in again.lm.parameters()) == trainable


def test_saved_tensors_come_back_bit_for_bit(tmp_path):
    model = thinking(llama(), learns_log_z=True, n_thought=2)
    model.save_pretrained(tmp_path)
    again = ThinkingLM.from_pretrained(tmp_path, dtype="float64")
    assert again.thinking == model.thinking
    assert again.own_state().keys() == model.own_state().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# What is refused.


def test_folders_that_hold_no_thinking_model_say_so(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no model that thinks \(thinking.json is missing\); pass a folder"):
        ThinkingLM.from_pretrained(tmp_path)
    thinking(llama()).save_pretrained(tmp_path)
    settings = tmp_path / "thinking.json"
    written = json.loads(settings.read_text())
    settings.write_text(json.dumps({**written, "depth": 3}))
    with pytest.raises(ValueError, match=r"unknown settings \['depth'\]; this version knows"):
        load_thinking_config(tmp_path)
    settings.write_text(json.dumps({**written, "n_thought": -3}))
    with pytest.raises(ValueError, match="n_thought must not be negative, got -3"):
        ThinkingLM.from_pretrained(tmp_path)
    for broken in ("{", "[]", json.dumps({**written, "n_thought": "four"})):
        settings.write_text(broken)
        with pytest.raises(ValueError, match=r"thinking\.json"):
            ThinkingLM.from_pretrained(tmp_path)
    settings.write_text(json.dumps(written))
    (tmp_path / "thinking.safetensors").unlink()
    with pytest.raises(ValueError, match=r"thinking\.safetensors is missing"):
        ThinkingLM.from_pretrained(tmp_path)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    thinking(llama()).save_pretrained(tmp_path)
    path = tmp_path / "thinking.safetensors"
    state = load_file(path)
    save_file({name: value for name, value in state.items() if name != "end"}, path)
    with pytest.raises(ValueError, match=r"does not fit: it lacks \['end'\] and has \[\] besides"):
        ThinkingLM.from_pretrained(tmp_path)
    save_file({**state, "middle": state["end"].clone()}, path)
    with pytest.raises(ValueError, match=r"has \['middle'\] besides"):
        ThinkingLM.from_pretrained(tmp_path)
    save_file({**state, "end": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=r"does not fit: \['end'\] have another shape"):
        ThinkingLM.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"thinking.safetensors is broken"):
        ThinkingLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_thought": -1}, "n_thought must not be negative, got -1"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive, got nan"),
        ({"mixing": "logits"}, r"mixing must be one of \('hidden', 'log_probs'\), got 'logits'"),
        ({"mixing_width": 0}, "mixing_width must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ThinkingConfig(**settings)
