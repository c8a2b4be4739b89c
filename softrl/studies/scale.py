"""`softrl doctor --scale`: memory and communication of large policies by method, horizon and engine, on paper.

Nothing is loaded and nothing is measured here: the formulas of `footprint` and `communication`, whose memory is held
to measurements on SmolLM2-135M, for the shapes of Llama 3. The text is docs/scale.md, word for word.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from softrl.models.shape import AdapterShape, ModelShape, adapter_shape, model_shape
from softrl.studies.communication import Communication, communication, passes
from softrl.studies.footprint import REFERENCE_ACTIVATIONS, Footprint, footprint
from softrl.studies.step_plan import Engine, Method, Precision, Sharding, StepPlan

LIMIT = 80 * 10**9  # bytes of a process: one GPU
HORIZONS = (256, 1024, 4096)
NUM_PROCESSES = (8, 16, 32, 64, 128, 256)  # the first one that fits is shown
ENGINES: tuple[Engine, ...] = ("ddp", "zero2", "zero3", "fsdp2")
METHODS: dict[str, Method] = {
    "parallel, 2 hops": "parallel", "blocked": "blocked", "sequential": "sequential", "RLOO": "score_function",
}  # fmt: skip
_RANK = 16
PLAN = StepPlan(num_sequences=4, prompt_length=256, num_steps=256, num_kept=64, checkpointed=True, has_kl=True)

# Sizes of the published configurations: Llama-3.2-1B, Llama-3.1-8B, Llama-3.1-70B (Grattafiori et al. 2024).
LLAMAS: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """A policy of the tables: its shape, and what is trained."""

    name: str
    shape: ModelShape
    adapter: AdapterShape | None


@dataclass(frozen=True)
class Cell:
    """An engine's verdict: how many processes it takes, and what each of them holds and sends in a step."""

    num_processes: int
    held: Footprint
    sent: Communication

    @property
    def fits(self) -> bool:
        return self.held.peak <= LIMIT


@cache
def policies() -> tuple[Policy, ...]:
    """Every size, with LoRA and with all parameters trained."""
    from peft import LoraConfig
    from transformers import LlamaConfig

    found = []
    for name, sizes in LLAMAS.items():
        config = LlamaConfig(vocab_size=128_256, max_position_embeddings=131_072, **sizes)
        shape = model_shape(config)
        lora = LoraConfig(r=_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        found += [
            Policy(f"{name}, LoRA", shape, adapter_shape(config, lora)),
            Policy(f"{name}, all parameters", shape, None),
        ]
    return tuple(found)


def precision(engine: Engine, adapted: bool) -> Precision:
    """bfloat16 throughout, adapters in float32 except under DeepSpeed; FSDP2 keeps all that it trains in float32."""
    if engine == "ddp":  # autocast over float32, or adapters on a bfloat16 model
        return Precision(2, 4, 2) if adapted else Precision(4, 4, 2, autocast=True)
    if engine == "fsdp2":
        return Precision(2, 4, 2) if adapted else Precision(4, 4, 2)
    return Precision(2, 2, 2)


def cell(policy: Policy, method: Method, num_steps: int, engine: Engine, has_kl: bool = True) -> Cell:
    """With as few processes as fit, of `NUM_PROCESSES`; the most of them where none does.

    DDP holds the same on any number of processes, so it is shown on the fewest.
    """
    plan = replace(PLAN, method=method, num_steps=num_steps, has_kl=has_kl)
    numbers = NUM_PROCESSES[:1] if engine == "ddp" else NUM_PROCESSES
    bytes_each = precision(engine, policy.adapter is not None)
    for number in numbers:
        sharding = Sharding(engine, number)
        held = footprint(policy.shape, plan, bytes_each, policy.adapter, sharding)
        found = Cell(number, held, communication(policy.shape, plan, bytes_each, sharding, policy.adapter))
        if found.fits:
            break
    return found


def page() -> str:
    """The page as Markdown."""
    return "\n\n".join([_HEAD, *_sections(), _passes_section(), _LIMITS])


def _sections() -> Iterator[str]:
    for policy in policies():
        yield f"## {policy.name}"
        yield _facts(policy)
        yield _table(policy, has_kl=True)
        if policy.adapter is not None:
            yield "Without a KL:"
            yield _table(policy, has_kl=False)


def _table(policy: Policy, has_kl: bool) -> str:
    lines = [f"| method | T | {' | '.join(ENGINES)} |", f"|---|---:|{'---|' * len(ENGINES)}"]
    for title, method in METHODS.items():
        for num_steps in HORIZONS:
            cells = [_shown(cell(policy, method, num_steps, engine, has_kl)) for engine in ENGINES]
            lines.append(f"| {title} | {num_steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _facts(policy: Policy) -> str:
    shape, adapter = policy.shape, policy.adapter
    trained = shape.num_parameters if adapter is None else adapter.num_parameters
    text = f"{shape.num_parameters / 1e9:.2f}B parameters, {trained / 1e6:,.0f}M trained. "
    activations = ", ".join(f"{_gigabytes(_of_reference(shape, steps))} GB at T={steps}" for steps in HORIZONS)
    text += (
        "Of a pathwise cell the activations of the reference, which the KL is differentiated through, are "
        f"{activations}; they go with the KL. "
    )
    if adapter is not None:
        return text + "The reference is the policy without its adapter: no weights of its own."
    whole = {engine: shape.num_parameters * precision(engine, False).weights for engine in ENGINES}
    return text + (
        f"The reference is a second model, whole on every process whatever the engine: "
        f"{_gigabytes(whole['zero3'])} GB in bfloat16 (ZeRO), {_gigabytes(whole['ddp'])} in float32 (DDP, FSDP2)."
    )


def _of_reference(shape: ModelShape, num_steps: int) -> int:
    held = footprint(shape, replace(PLAN, num_steps=num_steps), precision("zero2", False))
    return next(item for item in held.items if item.name == REFERENCE_ACTIVATIONS).largest


def _shown(found: Cell) -> str:
    held, sent = _gigabytes(found.held.peak), _gigabytes(found.sent.total)
    if not found.fits:
        return f"**{held}**"
    return f"{held}, sends {sent}" + (f", on {found.num_processes}" if found.num_processes != 8 else "")


def _gigabytes(number: float) -> str:
    if number < 1e8:
        return f"{number / 1e9:.2f}"
    return f"{number / 1e9:,.1f}" if number < 1e10 else f"{number / 1e9:,.0f}"


def _passes_section() -> str:
    lines = ["| method | T | rollout | cotangents | surrogate |", "|---|---:|---:|---:|---:|"]
    for title, method in METHODS.items():
        for num_steps in HORIZONS:
            count = passes(replace(PLAN, method=method, num_steps=num_steps, has_kl=False))
            row = (title, num_steps, count.rollout, count.cotangents, count.surrogate)
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n\n".join([_PASSES.format(example=_example()), "\n".join(lines)])


def _example() -> str:
    """The gathers of one rollout in words."""
    policy = next(policy for policy in policies() if policy.name == "8B, LoRA")
    sent = cell(policy, "score_function", 1024, "zero3").sent.rollout
    fast, slow = 300 * 10**9, 25 * 10**9
    return (
        f"At T=1024 a process sends and receives {sent / 1e12:.1f} TB of an 8B policy in bfloat16: "
        f"{sent / fast:.0f} s of a step at {fast // 10**9} GB/s,\n{sent / slow:.0f} s at {slow // 10**9} GB/s between "
        "machines, before any computation."
    )


_HEAD = f"""# Scale, on paper

Made by `softrl doctor --scale > docs/scale.md`; a test compares this file with what the command prints. Nothing on
this page was run: softrl was made on two CPU cores. Memory comes from `softrl/studies/footprint.py`, which is held to
measured steps of SmolLM2-135M within 20% on one process; engines, sizes and communication
(`softrl/studies/communication.py`) have no measurement behind them.

Cells: GB (10⁹ bytes) that a process holds at its peak, and GB that it sends in a step, on 8 processes, or on the
number named, the first of {", ".join(map(str, NUM_PROCESSES))} on which the peak is at most {LIMIT // 10**9} GB.
**Bold**: more than that even on {NUM_PROCESSES[-1]} (DDP holds the same on any number).

The step: {PLAN.num_sequences} sequences on each process, prompts of {PLAN.prompt_length} tokens, T tokens generated,
K={PLAN.num_kept}, a KL to the reference where nothing else is said, AdamW, gradient checkpointing in the
surrogate's pass. LoRA has rank {_RANK} on all linear layers. Everything is computed in bfloat16. "blocked" has blocks
of {PLAN.block_length} steps."""

_PASSES = """## What a rollout costs under ZeRO-3 and FSDP2

Both hold a part of each weight and gather the whole for every pass over the layers. A rollout is a pass for each
token, so a process receives the whole model T times to move on by T tokens of its own few sequences. {example}
The surrogate's two or three passes are nothing beside it. So:

- While the weights fit on one device, DDP or ZeRO-2 with LoRA send gradients only, and that once a step.
- Where they do not, larger batches on each process spread the gathers over more sequences: they do not grow with N.
- `sequential` goes through the layers twice more for every token and sends three times as much; `parallel` with hops
  sends as much as one more handful of passes, and pays with the activations of a whole pass.

Passes over the layers in a step, without a KL (with LoRA it adds a forward and a backward pass of the reference, or
one for RLOO):"""

_LIMITS = """## What this leaves out

Libraries and CUDA's context (about 1 GB), fragments of the allocator, buckets and prefetching of DeepSpeed and FSDP2,
reward models, overlap and latency of communication. Phase 2 of `parallel` does not checkpoint, and a KL differentiates
a whole pass of the reference as well, by every pathwise method: at T=4096 these two activations are what does not
fit an 8B policy with LoRA. The engines' lines are for full batches: N and T are the same on every process.
Attention is counted as a fused kernel's, which keeps no T x T matrix. Tensor and pipeline parallelism, offloading, and
engines for generation beside the trainer are not part of softrl."""
