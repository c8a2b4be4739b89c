"""A tiny run on two processes that goes on until a signal: `accelerate launch ... endless.py FOLDER SAVE_STEPS`.

Every rank writes its process id to `FOLDER/rank-<n>`, and the first one the step that it has made to `FOLDER/step`.
"""

import os
import sys
from pathlib import Path

from helpers import llama
from trainers.tiny import make, word_tokenizer
from transformers import TrainerCallback

from softrl.trainers.callbacks import InterruptCallback


class Report(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        (self.folder / f"rank-{args.process_index}").write_text(str(os.getpid()))
        if args.process_index == 0:
            (self.folder / "step").write_text(str(state.global_step))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trainer = make(
        folder / "run", word_tokenizer(), llama().float(), max_steps=10**6, save_strategy="steps",
        save_steps=int(sys.argv[2]), save_total_limit=2, ddp_backend="gloo", per_device_train_batch_size=2,
    )  # fmt: skip
    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    trainer.add_callback(Report(folder))
    trainer.train()
    (folder / f"stopped-{trainer.args.process_index}").write_text(str(trainer.state.global_step))
    sys.exit(interrupt.exit_code)
