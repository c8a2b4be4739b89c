"""What one process of a training step holds in memory, by phase, computed from shapes alone. All sizes are in bytes.

`peak = max over phases of Σ items held in it`; the phases are those of the design: rollout, cotangents, surrogate (up
to the start of its backward pass) and update (from the end of that pass on; between the two activations make room for
gradients). The formula follows the code of the solvers and of transformers' decoder
layers, and is held to measurements of whole steps (`tests/cli/test_measured_step.py`: within 20%).

Left out: the libraries themselves (a process that has imported them holds some 0.5 GB on a CPU, CUDA's context about
as much on a GPU), what the allocator loses in fragments, buckets and prefetching of DeepSpeed and FSDP2, activations
of rewards, texts and data sets. Early ends make rollouts shorter: T is the longest they can be.
"""

from dataclasses import dataclass

from softrl.estimators.blocks import RECORD_BLOCK
from softrl.models.policy import CHUNK_ELEMENTS
from softrl.models.shape import AdapterShape, ModelShape
from softrl.studies.step_plan import DEEPSPEED, Precision, Sharding, StepPlan

PHASES = ("rollout", "cotangents", "surrogate", "update")

REFERENCE_ACTIVATIONS = "activations of the reference"

_FLOAT32 = 4
_LIVE_LAYERS = 2  # that an engine has gathered at a time: the one in use and the next
# Arrays of a chunk's logits, in float32, that exist at the same time: counted in the code named, checked by measuring.
_ROLLOUT_LOGITS = 6  # rollouts/soft.py: logits, log-probabilities, noise, perturbed, and temporaries of the entropy
_CHUNK_LOGITS = 9  # objectives/token_terms.py: of policy and reference, their log-probabilities, gradients
_KEPT_ROWS = 2  # models/policy.py: rows of the head for K ids of a chunk, and their copy or gradient


@dataclass(frozen=True)
class Item:
    """Something that is held during some phases."""

    name: str
    size: dict[str, int]  # bytes by phase

    @property
    def largest(self) -> int:
        """Bytes in the phase that holds most of it."""
        return max(self.size.values(), default=0)


@dataclass(frozen=True)
class Footprint:
    """Everything that a process holds."""

    items: tuple[Item, ...]

    def total(self, phase: str) -> int:
        """Bytes held in a phase."""
        return sum(item.size.get(phase, 0) for item in self.items)

    @property
    def peak_phase(self) -> str:
        """The phase that holds most."""
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes held in it."""
        return self.total(self.peak_phase)


def footprint(
    shape: ModelShape,
    plan: StepPlan,
    precision: Precision,
    adapter: AdapterShape | None = None,
    sharding: Sharding | None = None,
    beside: int = 0,
) -> Footprint:
    """Memory of one process in a step that is not the first one.

    Args:
        shape: the policy's.
        plan: the micro-batch and its method.
        precision: bytes an element.
        adapter: what is trained; None for all parameters.
        sharding: the engine; default: one process.
        beside: bytes of reward models and judge, which are whole on every process.
    """
    sharding = sharding or Sharding()
    step = _Step(shape, plan, precision, adapter, sharding)
    items = (
        Item("policy's weights", _always(step.weights)),
        Item("gathered weights", _always(step.gathered)),
        Item("weights cast by autocast", step.cast_weights()),
        Item("reference's weights", _always(step.reference_weights)),
        Item("rewards and judge", _always(beside)),
        Item("optimiser's states", _always(step.states)),
        Item("gradients", step.gradients()),
        Item("keys and values", step.keys_and_values()),
        Item("activations of the policy", step.activations()),
        Item(REFERENCE_ACTIVATIONS, step.reference_activations()),
        Item("chunks of logits and embeddings", step.chunks()),
        Item("records of the rollout", step.records()),
    )
    return Footprint(tuple(item for item in items if item.largest > 0))


def activation_bytes(
    shape: ModelShape, precision: Precision, trained: str, adapter: AdapterShape | None = None
) -> int:
    """What autograd keeps of one token in one layer, for the backward pass.

    With D, A, k, F the widths of the residual stream, of all queries, of all keys, and of the feed-forward network, c
    bytes an element: two norms keep their input in float32, `8 D`; attention `c (2A + 2k)` (queries, keys, values,
    output) and its normalisers; the gated network `3 c F`. Where weights are trained, what multiplies them is kept as
    well: the norms' outputs before and after their weight, `4 c D`, and the product `c F`. Adapters read the layers'
    inputs in their own precision, which is a copy for each where it differs.

    Args:
        trained: "nothing", "everything" or "adapters".
    Source: transformers' modeling_llama.py, read and measured.
    """
    c, d, f = precision.compute, shape.hidden_size, shape.mlp_size
    kept = 8 * d + c * (2 * shape.attention_size + 2 * shape.kv_size) + 4 * shape.num_heads + 3 * c * f
    if trained == "everything" and not precision.autocast:
        return kept + 4 * c * d + c * f
    if trained == "everything":  # x̂ in float32; every one of the five linear maps of a norm's output casts its own
        return kept + 2 * 4 * d + 5 * c * d + c * f
    if trained == "adapters" and adapter is not None:
        return kept + _adapter_bytes(shape, precision, adapter)
    return kept


def _adapter_bytes(shape: ModelShape, precision: Precision, adapter: AdapterShape) -> int:
    rank_bytes = len(adapter.targets) * adapter.rank * _FLOAT32
    if precision.trained == precision.compute and not precision.autocast:
        inputs = {_input_of(name): width for name, width in adapter.targets}
        inputs.pop("attention", None)  # its output is kept already
        return precision.compute * sum(inputs.values()) + rank_bytes
    each = precision.compute if precision.autocast else precision.trained
    return each * sum(width for _, width in adapter.targets) + rank_bytes


def _input_of(name: str) -> str:
    """Which tensor a linear map of that name reads; maps that read the same one keep it once."""
    if name in ("q_proj", "k_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value"):
        return "first norm"
    if name in ("gate_proj", "up_proj", "c_fc", "fc1", "gate_up_proj"):
        return "second norm"
    return "attention" if name in ("o_proj", "out_proj") else name


def _always(size: float) -> dict[str, int]:
    return dict.fromkeys(PHASES, int(size)) if size else {}


@dataclass(frozen=True)
class _Step:
    """The terms of `footprint`."""

    shape: ModelShape
    plan: StepPlan
    precision: Precision
    adapter: AdapterShape | None
    sharding: Sharding

    # Parameters, and what is as large as they are

    @property
    def num_trained(self) -> int:
        return self.shape.num_parameters if self.adapter is None else self.adapter.num_parameters

    @property
    def weights(self) -> float:
        own = self.adapter.num_parameters * self.precision.trained if self.adapter else 0
        return self.sharding.shared(self.precision.weight_bytes(self.shape) + own, "zero3", "fsdp2")

    @property
    def gathered(self) -> float:
        """Whole while they are used: two layers; embedding and head for all of a step."""
        if not self.sharding.shards_parameters:
            return 0
        outside = self.shape.num_embedding + self.shape.num_head
        return (_LIVE_LAYERS * self.shape.layer_parameters + outside) * self.precision.compute

    @property
    def reference_weights(self) -> int:
        """A copy, whole on every process; with adapters the reference is the policy without them."""
        wanted = self.plan.has_kl and self.adapter is None
        return self.shape.num_parameters * self.precision.weights if wanted else 0

    @property
    def states(self) -> float:
        per_parameter = self.plan.states_per_parameter * self.precision.trained
        if self.sharding.engine in DEEPSPEED:  # states and a copy of the weights in float32
            per_parameter = (self.plan.states_per_parameter + 1) * _FLOAT32
        return self.sharding.shared(self.num_trained * per_parameter, "zero1", "zero2", "zero3", "fsdp2")

    def cast_weights(self) -> dict[str, int]:
        """Autocast keeps the trained weights in the lower precision for as long as its block goes on.

        Frozen ones are cast at every use.
        """
        if not self.precision.autocast:
            return {}
        return dict.fromkeys(PHASES[:3], self.num_trained * self.precision.compute)

    @property
    def _all_gradients(self) -> float:
        size = self.num_trained * self.precision.trained
        if self.sharding.engine == "ddp":
            return 2 * size  # DDP's buckets are a second copy
        return self.sharding.shared(size, "zero2", "zero3", "fsdp2")

    def gradients(self) -> dict[str, int]:
        """Made in the backward pass as activations go: those of the tables first, all of them by its end."""
        whole, table = int(self._all_gradients), self._table_gradient
        before = whole if self.plan.accumulates else 0
        return {"rollout": before, "cotangents": before, "surrogate": before + 2 * table, "update": whole + table}

    @property
    def _table_gradient(self) -> int:
        """The embedding's gradient as autograd makes it: dense, for every part of the graph that reads the table."""
        if self.adapter is not None:
            return 0
        return self.shape.vocab_size * self.shape.hidden_size * self.precision.trained

    # What grows with N and T

    @property
    def _cache_slot(self) -> int:
        """Keys and values of one position of one sequence, elements."""
        return 2 * self.shape.num_layers * self.shape.kv_size

    def keys_and_values(self) -> dict[str, int]:
        """The cache; the solvers that replay it keep cotangents of the generated slots too, in float32."""
        plan = self.plan
        slots = plan.num_sequences * (plan.prompt_length + plan.num_steps)
        cache = slots * self._cache_slot * self.precision.compute
        if plan.method not in ("blocked", "sequential"):
            return {"rollout": cache}
        cotangents = plan.num_sequences * plan.num_steps * self._cache_slot * _FLOAT32
        return {"rollout": cache, "cotangents": cache + cotangents}

    def graph(self, num_tokens: int, trained: str) -> int:
        """Activations of all layers for so many tokens."""
        each = activation_bytes(self.shape, self.precision, trained, self.adapter)
        return num_tokens * (self.shape.num_layers * each + self._last_norm)

    @property
    def _last_norm(self) -> int:
        return self.shape.hidden_size * (_FLOAT32 + self.precision.compute)

    @property
    def _trained(self) -> str:
        return "everything" if self.adapter is None else "adapters"

    def transient(self, num_tokens: int) -> int:
        """Of one layer's backward pass: gradients of the feed-forward network's inputs, and of its neighbours."""
        widths = 3 * self.shape.mlp_size + 2 * self.shape.hidden_size
        return num_tokens * widths * self.precision.compute

    def activations(self) -> dict[str, int]:
        return {
            "rollout": self._rollout_activations(),
            "cotangents": self._cotangent_activations(),
            "surrogate": self._surrogate_activations(),
        }

    def _rollout_activations(self) -> int:
        """Without a graph: one layer's temporaries of the prompts, or of one step."""
        plan = self.plan
        return self.transient(plan.num_sequences * plan.prompt_length)

    def _cotangent_activations(self) -> int:
        plan = self.plan
        if plan.method == "score_function":
            return 0
        if plan.method == "parallel":
            shares = self.sharding.shares_a_pass and not plan.checkpointed
            return self.graph(plan.num_tokens, self._trained if shares else "nothing") + self.transient(
                plan.num_tokens
            )
        if plan.method == "autograd":
            tokens = plan.num_sequences * plan.num_steps
            return self.graph(tokens, "nothing") + self._grown_caches() + self.transient(plan.num_sequences)
        length = 1 if plan.method == "sequential" else plan.block_length
        block = min(length, max(plan.num_steps - 1, 1)) * plan.num_sequences
        recording = self.transient(min(RECORD_BLOCK, plan.num_steps) * plan.num_sequences)
        return max(recording, self.graph(block, "nothing") + self._expanded_cache(length) + self.transient(block))

    def _expanded_cache(self, length: int) -> int:
        """Keys and values repeated for every query head, which attention keeps where it needs a mask."""
        if length == 1 or self.shape.num_heads == self.shape.num_kv_heads:
            return 0
        slots = self.plan.num_sequences * (self.plan.prompt_length + self.plan.num_steps)
        return slots * 2 * self.shape.num_layers * self.shape.attention_size * self.precision.compute

    def _grown_caches(self) -> int:
        """`Σ_t (P + t)` slots: every step of the loop has concatenated the cache anew, and its graph keeps that."""
        plan = self.plan
        slots = sum(plan.prompt_length + step for step in range(1, plan.num_steps))
        return plan.num_sequences * slots * self._cache_slot * self.precision.compute

    def _surrogate_activations(self) -> int:
        plan = self.plan
        kept = self.graph(plan.num_tokens, self._trained)
        if plan.checkpointed:
            inputs = plan.num_tokens * self.shape.hidden_size * self.precision.compute
            kept = inputs * self.shape.num_layers + kept // self.shape.num_layers
        return kept + self.transient(plan.num_tokens)

    def reference_activations(self) -> dict[str, int]:
        """A pathwise objective differentiates the reference's pass in the fed tokens; nothing else does."""
        if not self.plan.has_kl or self.plan.method == "score_function":
            return {}
        return {"cotangents": self.graph(self.plan.num_tokens, "nothing") + self.transient(self.plan.num_tokens)}

    # Chunks and records

    def chunks(self) -> dict[str, int]:
        shape, plan = self.shape, self.plan
        positions = plan.num_sequences * plan.num_steps
        kept = _chunk(positions, plan.num_kept * shape.hidden_size) * _KEPT_ROWS * self.precision.weights
        logits = _chunk(positions, shape.vocab_size) * _CHUNK_LOGITS * _FLOAT32
        has_terms = plan.has_kl or plan.has_entropy
        step = plan.num_sequences * shape.vocab_size * _ROLLOUT_LOGITS * _FLOAT32
        if plan.method == "score_function":
            return {"rollout": step, "surrogate": logits}
        reads_logits = has_terms and self.adapter is None
        return {
            "rollout": step,
            "cotangents": max(kept, logits if has_terms else 0),
            "surrogate": max(kept, logits if reads_logits else 0),
        }

    def records(self) -> dict[str, int]:
        """Ids, noise, weights, cotangents [N, T, K]; embeddings, adjoints, hidden states, gradients [N, T, D]."""
        plan, positions = self.plan, self.plan.num_sequences * self.plan.num_steps
        if plan.method == "score_function":
            return _some(PHASES[1:3], positions * self.shape.hidden_size * self.precision.compute * 2)
        kept = positions * plan.num_kept * (8 + 4 * _FLOAT32)
        states = positions * self.shape.hidden_size * self.precision.compute * 5
        return {"rollout": kept} | _some(PHASES[1:3], kept + states)


def _some(phases: tuple[str, ...], size: int) -> dict[str, int]:
    return dict.fromkeys(phases, size)


def _chunk(num_items: int, elements_per_item: int) -> int:
    """Elements of one chunk: what `softrl.models.policy.chunk_length` lets through at a time."""
    return min(num_items, max(1, CHUNK_ELEMENTS // elements_per_item)) * elements_per_item
