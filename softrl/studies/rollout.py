"""What a training step costs: ours, TRL's RLOO, naive ways to the same gradient, and the least a step could take.

All of them take the same prompts, samples, lengths, model and dtype, and no optimizer. They run in one process,
alternating, after a warm-up; a figure is the median of the rounds. Peak memory comes from one process a contender.
The naive ones have no KL term, so they are left out when beta > 0.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import RLOOConfig, RLOOTrainer

from softrl.assets import resolve_model
from softrl.data.prompts import review_openings
from softrl.estimators.system import AdjointSettings
from softrl.rewards.base import as_trl
from softrl.rewards.fit import sentiment_reward
from softrl.studies.memory import MIB, glibc_environment, peak_bytes, reset_peak_bytes
from softrl.studies.naive import full_prefix_step, transformers_cache_step
from softrl.tokens.relaxation import make_relaxation
from softrl.trainers import SoftRolloutConfig, SoftRolloutTrainer

Seconds = dict[str, float]  # by phase
TEMPERATURE, TOP_K = 0.7, 64
SLOW_SECONDS = 60.0  # a step that takes longer is measured once, without a warm-up

OURS = {
    "st_gumbel, hops 0": ("st_gumbel", AdjointSettings(hops=0)),
    "st_gumbel, hops 1": ("st_gumbel", AdjointSettings(hops=1)),
    "st_gumbel, hops 2": ("st_gumbel", AdjointSettings(hops=2)),
    "st_gumbel, auto": ("st_gumbel", AdjointSettings(tol=1e-2)),
    "st_gumbel, sequential": ("st_gumbel", AdjointSettings("sequential")),
    "gumbel_softmax, auto": ("gumbel_softmax", AdjointSettings(tol=1e-2)),
    "gumbel_softmax, sequential": ("gumbel_softmax", AdjointSettings("sequential")),
}
NAIVE = {"autograd, transformers' cache": transformers_cache_step, "autograd, full prefix": full_prefix_step}
RLOO, FLOOR = "TRL RLOO", "floor"
CONTENDERS = (FLOOR, RLOO, *OURS, *NAIVE)


@dataclass(frozen=True)
class Setting:
    """The same for all contenders: B prompts of P tokens, G samples each."""

    model: str = "smollm2-135m"  # or "tiny", a random Llama of 4 layers with the same vocabulary
    dtype: str = "float32"
    use_peft: bool = False
    beta: float = 0.0
    num_prompts: int = 4
    num_generations: int = 4
    prompt_length_tokens: int = 16


@dataclass(frozen=True)
class Row:
    """One contender at one horizon; seconds are medians, `total` with all phases, memory beyond the idle process."""

    contender: str
    num_steps: int
    total: float
    generation: float
    cotangents: float
    gradient: float
    rounds: int
    peak_mib: float | None = None


class Bench:
    """Builds what a setting needs and runs single steps of its contenders."""

    def __init__(self, setting: Setting, num_steps: int):
        self.setting, self.num_steps = setting, num_steps
        path = resolve_model("smollm2-135m" if setting.model == "tiny" else setting.model)
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.path = path
        self.reward = sentiment_reward(path)
        self.prompts = review_openings(self.tokenizer, setting.num_prompts, setting.prompt_length_tokens)
        each = [{**row, "prompt_index": index} for index, row in enumerate(self.prompts)]
        self.rows = [row for row in each for _ in range(setting.num_generations)]
        self._ours: SoftRolloutTrainer | None = None
        self._rloo: RLOOTrainer | None = None
        self.folder = tempfile.mkdtemp(prefix="softrl-bench-")

    def close(self) -> None:
        """Remove the trainers' folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def step(self, contender: str) -> Seconds:
        """Run one step, and discard its gradient."""
        if contender == RLOO:
            return self._rloo_step()
        if contender in OURS:
            return self._our_step(*OURS[contender])
        trainer = self.ours
        batch = trainer.prompt_batch(self.rows, self.setting.num_generations)
        if contender == FLOOR:
            seconds = floor_step(self)
        else:
            relaxation = make_relaxation("st_gumbel", trainer.truncation)
            random = trainer.random_for(batch)
            prompts = batch.prompts.repeated(self.setting.num_generations)
            seconds = NAIVE[contender](trainer.policy, prompts, relaxation, random, self.num_steps, self.reward)
        trainer.model.zero_grad()
        return seconds

    def _model(self) -> Any:
        dtype = getattr(torch, self.setting.dtype)
        if self.setting.model != "tiny":
            return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1, pad_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)

    def _common(self) -> dict[str, Any]:
        setting = self.setting
        return {
            "output_dir": self.folder,
            "per_device_train_batch_size": len(self.rows),
            "num_generations": setting.num_generations,
            "max_completion_length": self.num_steps,
            "temperature": TEMPERATURE,
            "beta": setting.beta,
            "gradient_checkpointing": False,
            "report_to": "none",
            "bf16": False,
            "use_cpu": not torch.cuda.is_available(),
        }

    def _adapter(self) -> LoraConfig | None:
        if not self.setting.use_peft:
            return None
        return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

    @property
    def ours(self) -> SoftRolloutTrainer:
        """Our trainer, built when first needed."""
        if self._ours is None:
            args = SoftRolloutConfig(top_k=TOP_K, **self._common())
            self._ours = SoftRolloutTrainer(
                self._model(), self.reward, args, self.prompts, None, self.tokenizer, peft_config=self._adapter()
            )
            self._ours.current_gradient_accumulation_steps = 1  # what `train()` would set
            self._ours.eos_ids = ()  # all contenders generate exactly T tokens
        return self._ours

    def _our_step(self, relaxation: str, settings: AdjointSettings) -> Seconds:
        trainer = self.ours
        trainer.relaxation = make_relaxation(relaxation, trainer.truncation)
        trainer.adjoint_settings = settings
        trainer.training_step(trainer.model, self.rows)
        trainer.model.zero_grad()
        logged = trainer._metrics.drained(1, "surrogate")
        names = {"generation": "rollout", "cotangents": "cotangents", "gradient": "surrogate"}
        return {phase: logged[f"step_time/{name}"] for phase, name in names.items()}

    def _rloo_step(self) -> Seconds:
        if self._rloo is None:
            args = RLOOConfig(generation_kwargs={"min_new_tokens": self.num_steps}, **self._common())
            self._rloo = RLOOTrainer(
                self._model(),
                as_trl(self.reward, self.tokenizer),
                args,
                self.prompts,
                processing_class=self.tokenizer,
                peft_config=self._adapter(),
            )
            self._rloo.current_gradient_accumulation_steps = 1  # what `train()` would set
            self._generated = 0.0
            plain = self._rloo.model.generate

            def timed(*args: Any, **kwargs: Any) -> Any:
                started = time.perf_counter()
                result = plain(*args, **kwargs)
                self._generated = time.perf_counter() - started
                return result

            self._rloo.model.generate = timed
        started = time.perf_counter()
        self._rloo.training_step(self._rloo.model, [dict(row) for row in self.rows], None)
        total = time.perf_counter() - started
        self._rloo.model.zero_grad()
        return {"generation": self._generated, "gradient": total - self._generated}


def floor_step(bench: Bench) -> Seconds:
    """transformers' `generate`, one forward pass over the result, and one backward pass: no reward, no old policy."""
    trainer, num_samples = bench.ours, bench.setting.num_generations
    prompts = trainer.prompt_batch(bench.rows, num_samples).prompts.repeated(num_samples)
    started = time.perf_counter()
    trainer.model.eval()
    with torch.no_grad():
        sequences = trainer.model.generate(
            input_ids=prompts.ids, attention_mask=prompts.mask.long(), max_new_tokens=bench.num_steps,
            min_new_tokens=bench.num_steps, do_sample=True, temperature=TEMPERATURE, top_k=0, disable_compile=True,
            pad_token_id=0,
        )  # fmt: skip
    generated = time.perf_counter()
    logits = trainer.model(input_ids=sequences, logits_to_keep=bench.num_steps + 1, use_cache=False).logits[:, :-1]
    log_probs = (logits.float() / TEMPERATURE).log_softmax(-1)
    log_probs.gather(-1, sequences[:, -bench.num_steps :, None]).mean().neg().backward()
    return {"generation": generated - started, "gradient": time.perf_counter() - generated}


def measure(bench: Bench, contenders: list[str], rounds: int) -> list[Row]:
    """Warm up, then alternate."""
    first = {contender: bench.step(contender) for contender in tqdm(contenders, f"T={bench.num_steps}, warm-up")}
    slow = {contender for contender in contenders if sum(first[contender].values()) > SLOW_SECONDS}
    found: dict[str, list[Seconds]] = {name: [first[name]] if name in slow else [] for name in contenders}
    for _ in tqdm(range(rounds), f"T={bench.num_steps}, rounds"):
        for contender in contenders:
            if contender not in slow:
                found[contender].append(bench.step(contender))
    rows = []
    for contender, each in found.items():
        median = {phase: statistics.median(one.get(phase, 0.0) for one in each) for phase in Row.__annotations__}
        total = statistics.median(sum(one.values()) for one in each)
        phases = {phase: median[phase] for phase in ("generation", "cotangents", "gradient")}
        rows.append(Row(contender, bench.num_steps, total, rounds=len(each), **phases))
    return rows


def peak_mib(setting: Setting, contender: str, num_steps: int) -> float | None:
    """Peak memory of a second step in a process of its own, beyond what it held before; None if it ran out."""
    given = json.dumps({"setting": asdict(setting), "contender": contender, "num_steps": num_steps})
    command = [sys.executable, "-m", "softrl.studies.rollout", given]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=glibc_environment(), check=False)
    return float(finished.stdout.splitlines()[-1]) if finished.returncode == 0 else None


def _peak_here(setting: Setting, contender: str, num_steps: int) -> float:
    bench = Bench(setting, num_steps)
    if contender == RLOO:
        bench.step(contender)
    else:
        _ = bench.ours
    before = reset_peak_bytes()
    bench.step(contender)
    return (peak_bytes() - before) / MIB


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("given", type=json.loads)
    given = parser.parse_args().given
    print(_peak_here(Setting(**given["setting"]), given["contender"], given["num_steps"]))
