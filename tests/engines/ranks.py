"""Tiny trainers on two gloo ranks, engine by engine: `python ranks.py OUTPUT_DIR CASES_JSON`.

Imports once and forks the ranks of every case, so that a case takes seconds. Each rank writes what it saw to
`OUTPUT_DIR/<name>-<rank>.pt`, or its traceback to `<name>-<rank>.txt`.
"""

import copy
import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch

RANKED = "ListwisePreference"
CASE = {
    "engine": "ddp", "method": "SoftRollout", "settings": {}, "lora": False, "world": 2, "naive": False,
    "reward": "pair", "rows": 8, "bf16": False,
    "folder": None,  # of the run, instead of one of its own
    "resume": None,  # a checkpoint, or True
    "poisoned": 0,  # a step whose gradient is not a number
    "export": False,  # save the model to `<name>-model`
}  # fmt: skip
_ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    "ACCELERATE_GRADIENT_CLIPPING": "auto",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
ENGINES = {
    "single": {"ACCELERATE_USE_CPU": "true"},
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
    **{f"zero{stage}": {**_ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (1, 2, 3)},
}


def on_rank(case, rank, port, folder):
    """What one rank does: train three steps, write down parameters, losses and what it ran on."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case["world"]), "OMP_NUM_THREADS": "1",
        "LOCAL_WORLD_SIZE": str(case["world"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_MIXED_PRECISION": "bf16" if case["bf16"] else "no", **ENGINES[case["engine"]],
    }  # fmt: skip
    if case["engine"] == "single":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    torch.set_num_threads(1)
    from engines import cpu_shim
    from trainers.tiny import logs_of

    cpu_shim.install()
    trainer = trainer_of(case, folder)
    if case["engine"] == "zero3":
        free_parameters(trainer.accelerator)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    discriminator = getattr(trainer, "discriminator", None)
    untrained = {} if discriminator is None else copy.deepcopy(discriminator.head.state_dict())
    draws = kept_draws(trainer) if hasattr(trainer, "record") else []
    surrogate = getattr(trainer, "surrogate", None)
    if case["naive"]:
        two_backwards(trainer)
    if case["poisoned"]:
        trainer.add_callback(poisoned(trainer, case["poisoned"]))
    trainer.train(resume_from_checkpoint=case["resume"])
    if case["export"]:
        trainer.save_model(str(folder / f"{case['name']}-model"))
    accelerator = trainer.accelerator
    if case["bf16"] and case["engine"].startswith("zero"):
        state = float32_masters(trainer.model)
        start = {name: value.bfloat16().float() for name, value in start.items()}  # what the masters are made of
    else:
        state = accelerator.get_state_dict(trainer.model_wrapped)
    torch.save(
        {
            "start": start,
            "parameters": {} if state is None else {name: value.cpu() for name, value in state.items()},
            "logs": [row for row in trainer.state.log_history if "loss" in row],
            "losses": logs_of(trainer, "loss"),
            "rewards": logs_of(trainer, "reward"),
            "draws": draws,
            "untrained": untrained,
            "discriminator": {} if discriminator is None else discriminator.head.state_dict(),
            "surrogate": {} if surrogate is None else surrogate.surrogate.state_dict(),
            "world": accelerator.num_processes,
            "engine": accelerator.distributed_type.value,
            "wrapper": type(trainer.model_wrapped).__name__,
        },
        folder / f"{case['name']}-{rank}.pt",
    )


def trainer_of(case, folder):
    """The trainer of a case, of a tiny Llama in float32."""
    if case["method"] == "QuietSTaR":
        return thinking_trainer_of(case, folder)
    if case["method"] == "SoftSFT":
        return supervised_trainer_of(case, folder)
    if case["method"] == "Reasoner":
        from trainers.test_reasoner_trainer import texts, trained

        rows = {"train": texts(case["rows"]), "evaluation": texts(3, seed=1), "float32": True}
        place = {"use_cpu": case["engine"] in ("single", "ddp"), "ddp_backend": "gloo" if case["world"] > 1 else None}
        return trained(folder / f"{case['name']}-run", **rows, **place, **case["settings"])
    from helpers import PairReward, classifier, llama
    from trainers.tiny import dataset, make, ranked_dataset, word_tokenizer

    lora = None
    if case["lora"]:
        from peft import LoraConfig

        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian")
    settings = {
        **({} if case["method"] in ("PPO", RANKED) else {"adjoint_tol": 1e-6}), "bf16": case["bf16"],
        "ddp_backend": "gloo" if case["world"] > 1 else None,
        "use_cpu": case["engine"] in ("single", "ddp"), **case["settings"],
    }  # fmt: skip
    rewards = {
        "pair": PairReward,
        "classifier": lambda: classifier().float(),
        "discriminator": lambda: "discriminator",
    }
    references = [f"w9 w{4 + index % 7}" for index in range(case["rows"])]
    rows = dataset(case["rows"]).add_column("reference", references)
    return make(
        folder / (case["folder"] or f"{case['name']}-run"), word_tokenizer(), model=llama().float(), peft_config=lora,
        method=case["method"], reward=rewards[case["reward"]](),
        train=ranked_dataset(case["rows"]) if case["method"] == RANKED else rows, **settings,
    )  # fmt: skip


def thinking_trainer_of(case, folder):
    """The same of a trainer of thoughts, on texts of one length, whose means are over as many tokens on every rank."""
    from peft import LoraConfig, get_peft_model
    from trainers.quietstar import quietstar, texts

    from softrl.models.thinking import ThinkingConfig

    model = None
    if case["lora"]:
        from generation.thinkers import thinker
        from helpers import llama

        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian")
        torch.manual_seed(0)
        model = thinker(lm=get_peft_model(llama().float(), config), **vars(ThinkingConfig(2, sigmoid=True)))
    settings = {
        "ddp_backend": "gloo" if case["world"] > 1 else None, "use_cpu": case["engine"] in ("single", "ddp"),
        "bf16": False, **case["settings"],
    }  # fmt: skip
    return quietstar(
        folder / (case["folder"] or f"{case['name']}-run"), model, texts(case["rows"], length=6), float32=True,
        **settings,
    )  # fmt: skip


def supervised_trainer_of(case, folder):
    """The same of supervised fine-tuning, on texts of different lengths: a mean over tokens is over those of all."""
    from helpers import llama
    from peft import LoraConfig
    from trainers.soft_sft import soft_sft, texts

    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian") if case["lora"] else None
    settings = {
        "ddp_backend": "gloo" if case["world"] > 1 else None, "use_cpu": case["engine"] in ("single", "ddp"),
        **case["settings"],
    }  # fmt: skip
    place = folder / (case["folder"] or f"{case['name']}-run")
    return soft_sft(place, llama().float(), texts(case["rows"], "prompt"), peft_config=lora, **settings)


def free_parameters(accelerator):
    """Make ZeRO-3 free all parameters after each use, as it does a large model's; it would keep all of a tiny one."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    settings |= {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}


def float32_masters(model):
    """What DeepSpeed's optimizer keeps of bfloat16 parameters."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in model.named_parameters()}


def kept_draws(trainer):
    """A list that every rollout of training adds its prompts, its noise and its tokens to; empty without rollouts."""
    draws, record = [], getattr(trainer, "record", None)

    def recording(batch, completions, values):
        noise = trainer.random_for(batch).exponential(4, torch.float64)
        draws.append({"prompts": batch.indices, "noise": noise, "tokens": completions.tokens})
        return record(batch, completions, values)

    if record is not None:
        trainer.record = recording
    return draws


def poisoned(trainer, step):
    """Make the gradient of a step not a number, on the last rank alone."""
    from transformers import TrainerCallback

    whole = trainer.compute_loss

    class Poisoned(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            here = state.global_step + 1 == step and args.process_index == args.world_size - 1
            trainer.compute_loss = (lambda *inputs, **more: whole(*inputs, **more) * torch.nan) if here else whole

    return Poisoned()


def two_backwards(trainer):
    """Make a step of two plain backward passes, half of the rows each."""
    whole = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        half = len(inputs) // 2
        trainer.accelerator.backward(whole(model, inputs[:half]) / 2)
        return whole(model, inputs[half:]) / 2

    trainer.compute_loss = compute_loss


def run(case, folder):
    """Fork the ranks of a case and wait for them; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(case["world"]):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                on_rank(case, rank, port, folder)
                code = 0
            except BaseException:
                (folder / f"{case['name']}-{rank}.txt").write_text(traceback.format_exc())
            sys.stdout.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def outcomes(folder, cases):
    """Run cases in a process of its own; returns what a rank of one wrote, by name and rank."""
    tests = Path(__file__).parent.parent
    # This checkout's softrl, whichever one is installed.
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [sys.executable, str(tests / "engines" / "ranks.py"), str(folder), json.dumps(cases)],
        env=environment, check=True, capture_output=True, timeout=1800,
    )  # fmt: skip

    def found(name, rank=0):
        failure = folder / f"{name}-{rank}.txt"
        assert not failure.exists(), failure.read_text()
        return torch.load(folder / f"{name}-{rank}.pt")

    return found


def main():
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    os.environ["DS_ACCELERATOR"] = "cpu"
    import accelerate.utils.deepspeed  # noqa: F401
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (three seconds: every optimizer is compared to it)
    import helpers  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from trainers import tiny  # noqa: F401

    import softrl.trainers.gan_trainer
    import softrl.trainers.ppo_trainer  # noqa: F401

    for case in cases:
        print(case["name"], run({**CASE, **case}, folder), flush=True)


if __name__ == "__main__":
    main()
