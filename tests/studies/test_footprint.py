"""The estimate of memory: its terms against what autograd really keeps, its laws, and how engines share it."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from softrl.models.kv import KVCache
from softrl.models.policy import Policy
from softrl.models.shape import adapter_shape, model_shape
from softrl.studies.footprint import PHASES, activation_bytes, footprint
from softrl.studies.step_plan import ENGINES, Precision, Sharding, StepPlan
from softrl.types import Prompts

# Wide beside its sequences, as language models are, and shapes that are all different.
CONFIG = LlamaConfig(
    vocab_size=500, hidden_size=96, intermediate_size=272, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
)  # fmt: skip
LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
SHAPE, ADAPTER = model_shape(CONFIG), adapter_shape(CONFIG, LORA)
FLOAT32, BFLOAT16 = Precision(4, 4, 4), Precision(2, 2, 2)
PLAN = StepPlan(num_sequences=16, prompt_length=8, num_steps=64)


def items(held):
    return {item.name: item.size for item in held.items}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["nothing", "everything", "adapters"])
def test_activations_are_what_autograd_keeps(trained, dtype):
    """One pass over embeddings that need a gradient; tensors by storage, parameters left out. Within 5%."""
    model = LlamaForCausalLM(CONFIG).to(dtype).requires_grad_(trained == "everything")
    if trained == "adapters":
        model = get_peft_model(model, copy.deepcopy(LORA))
    policy = Policy(model.eval())
    ids = torch.randint(3, 500, (3, 5))
    embeds = policy.embed(torch.randint(3, 500, (3, 20))).detach().requires_grad_()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = policy.hidden(Prompts(ids, torch.ones_like(ids, dtype=torch.bool)), embeds)
    size = dtype.itemsize
    precision = Precision(size, 4 if trained == "adapters" else size, size)
    tokens = 3 * (5 + 20 - 1)
    estimate = tokens * CONFIG.num_hidden_layers * activation_bytes(SHAPE, precision, trained, ADAPTER)
    assert estimate == pytest.approx(sum(kept.values()), rel=0.05)
    assert hidden.requires_grad


def test_the_cache_is_as_large_as_ours():
    cache = KVCache(CONFIG.num_hidden_layers, PLAN.prompt_length + PLAN.num_steps)
    keys = torch.zeros(PLAN.num_sequences, 2, PLAN.prompt_length, 32, dtype=torch.bfloat16)
    size = sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.ours
        for tensor in (layer.update(keys, keys), (layer.keys, layer.values))[1]
    )
    assert items(footprint(SHAPE, PLAN, BFLOAT16))["keys and values"]["rollout"] == size


def test_weights_gradients_and_states_are_exact():
    held = items(footprint(SHAPE, PLAN, FLOAT32))
    count = SHAPE.num_parameters
    assert held["policy's weights"]["rollout"] == 4 * count
    assert held["optimiser's states"]["rollout"] == 8 * count
    assert held["gradients"]["update"] == 4 * (count + 500 * 96)  # the table's own arrives beside all others
    assert "reference's weights" not in held
    held = items(footprint(SHAPE, replace(PLAN, has_kl=True), Precision(2, 4, 2), ADAPTER))
    assert "reference's weights" not in held
    assert held["policy's weights"]["update"] == 2 * count + 4 * ADAPTER.num_parameters
    assert held["gradients"]["update"] == 4 * ADAPTER.num_parameters
    held = items(footprint(SHAPE, replace(PLAN, has_kl=True, accumulates=True), FLOAT32, beside=77))
    assert held["reference's weights"]["rollout"] == 4 * count
    assert held["rewards and judge"] == dict.fromkeys(PHASES, 77)
    assert held["gradients"]["rollout"] == 4 * count


@pytest.mark.parametrize("adapter", [None, ADAPTER])
@pytest.mark.parametrize("method", ["parallel", "blocked", "sequential", "autograd", "score_function"])
def test_more_of_anything_takes_more(method, adapter):
    plan = replace(PLAN, method=method, has_kl=True)
    least = footprint(SHAPE, plan, FLOAT32, adapter)
    for more in ({"num_sequences": 32}, {"num_steps": 128}, {"prompt_length": 64}):
        most = footprint(SHAPE, replace(plan, **more), FLOAT32, adapter)
        assert all(most.total(phase) >= least.total(phase) for phase in PHASES)
        assert most.peak > least.peak
    assert footprint(SHAPE, replace(plan, checkpointed=True), FLOAT32, adapter).peak <= least.peak
    assert footprint(SHAPE, replace(plan, has_kl=False), FLOAT32, adapter).peak <= least.peak
    assert footprint(SHAPE, plan, BFLOAT16, adapter).peak < least.peak


def test_blocks_keep_the_activations_of_cotangents_flat():
    """Beside the cache, `sequential` holds as much at any T; `parallel` grows in proportion."""

    def activations(method, num_steps):
        held = footprint(SHAPE, replace(PLAN, method=method, num_steps=num_steps), FLOAT32)
        return items(held)["activations of the policy"]["cotangents"]

    assert activations("sequential", 1024) == activations("sequential", 64)
    assert activations("parallel", 1024) > 12 * activations("parallel", 64)
    assert activations("sequential", 64) < activations("blocked", 64) < activations("parallel", 64)
    assert activations("autograd", 64) > activations("parallel", 64)


def test_engines_share_what_they_say_they_share():
    def held(engine):
        return items(footprint(SHAPE, PLAN, FLOAT32, None, Sharding(engine, 1 if engine == "single" else 4)))

    table = 4 * 500 * 96
    by_engine = {engine: held(engine) for engine in ENGINES}
    weights, gradients, states = (
        {engine: sizes[name]["update"] for engine, sizes in by_engine.items()}
        for name in ("policy's weights", "gradients", "optimiser's states")
    )
    count = 4 * SHAPE.num_parameters
    assert weights == {engine: count // 4 if engine in ("zero3", "fsdp2") else count for engine in ENGINES}
    parts = {"single": 4, "ddp": 8, "zero1": 4, "zero2": 1, "zero3": 1, "fsdp2": 1}  # quarters; DDP has buckets too
    assert {engine: size - table for engine, size in gradients.items()} == {
        engine: count * part // 4 for engine, part in parts.items()
    }
    # DeepSpeed keeps a float32 copy of the weights beside AdamW's two states.
    assert states == {
        "single": 2 * count, "ddp": 2 * count, "zero1": 3 * count // 4, "zero2": 3 * count // 4,
        "zero3": 3 * count // 4, "fsdp2": 2 * count // 4,
    }  # fmt: skip
    assert {engine for engine in ENGINES if "gathered weights" in by_engine[engine]} == {"zero3", "fsdp2"}
    reference = [
        items(footprint(SHAPE, replace(PLAN, has_kl=True), FLOAT32, None, Sharding(engine, 4)))["reference's weights"]
        for engine in ("ddp", "zero3", "fsdp2")
    ]
    assert all(sizes["rollout"] == count for sizes in reference), "a reference is whole on every process"


def test_a_kl_costs_a_pathwise_method_the_references_graph():
    plan = replace(PLAN, has_kl=True, method="sequential")
    graph = plan.num_tokens * CONFIG.num_hidden_layers * activation_bytes(SHAPE, FLOAT32, "nothing")
    assert plan.num_tokens == 16 * (8 + 64 - 1)
    held = items(footprint(SHAPE, plan, FLOAT32, ADAPTER))["activations of the reference"]
    assert held.keys() == {"cotangents"}
    assert graph < held["cotangents"] < 1.3 * graph
    assert "activations of the reference" not in items(footprint(SHAPE, PLAN, FLOAT32, ADAPTER))
    score = items(footprint(SHAPE, replace(plan, method="score_function"), FLOAT32, ADAPTER))
    assert "activations of the reference" not in score


def test_quantized_layers_and_autocast():
    layers = SHAPE.num_layers * SHAPE.layer_parameters
    outside = SHAPE.num_parameters - layers
    assert Precision(2, 2, 2, quantized=0.5).weight_bytes(SHAPE) == 0.5 * layers + 2 * outside
    held = items(footprint(SHAPE, PLAN, Precision(4, 4, 2, autocast=True)))
    assert held["weights cast by autocast"]["surrogate"] == 2 * SHAPE.num_parameters


def test_one_process_has_no_partners():
    with pytest.raises(ValueError, match="2 processes under 'single'"):
        Sharding("single", 2)
