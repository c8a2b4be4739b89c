"""A run that is killed again and again: `python killed.py FOLDER KILLS SEED`. Prints what happened as JSON.

The run of a tiny trainer saves at every step. A child process goes on from the newest checkpoint, and is killed by
SIGKILL at a random instant; after `KILLS` times one may finish. Another run is never killed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

STEPS = 100


def trainer_of(folder):
    import torch
    from helpers import llama
    from trainers.tiny import make, word_tokenizer

    torch.set_num_threads(1)
    return make(
        folder, word_tokenizer(), model=llama().float(), max_steps=STEPS, save_strategy="steps", save_steps=1,
        save_total_limit=2, optim="adamw_torch", learning_rate=1e-3, lr_scheduler_type="linear",
    )  # fmt: skip


def go_on(folder):
    from softrl.trainers.checkpoints import latest_checkpoint

    trainer_of(folder).train(resume_from_checkpoint=latest_checkpoint(folder))


def forked(folder):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
                go_on(folder)
            code = 0
        finally:
            os._exit(code)
    return child


def newest(folder):
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def main():
    folder, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    from softrl.trainers.checkpoints import damage

    killed, instants, unfinished = folder / "killed", [], 0
    killed.mkdir(parents=True)
    started = time.monotonic()
    assert os.waitpid(forked(folder / "straight"), 0)[1] == 0
    a_step = (time.monotonic() - started) / STEPS
    while len(instants) < kills:
        before, child = newest(killed), forked(killed)
        # Not before it has made a step, or none of twenty would get anywhere; then at any instant of two steps.
        while newest(killed) == before and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 2.0) * a_step)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        instants.append(newest(killed))
        unfinished += (killed / ".unfinished").exists()
        for checkpoint in killed.glob("checkpoint-*"):
            # What is being deleted may be in pieces, but never the newest.
            assert damage(checkpoint) is None or int(checkpoint.name.split("-")[1]) < newest(killed)
    assert os.waitpid(forked(killed), 0)[1] == 0
    logs = []
    for run in ("straight", "killed"):
        state = json.loads((folder / run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        logs.append([row["loss"] for row in state["log_history"] if "loss" in row])
    print(json.dumps({"killed_at": instants, "while_writing": unfinished, "straight": logs[0], "killed": logs[1]}))


if __name__ == "__main__":
    main()
