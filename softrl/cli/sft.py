"""`softrl sft`: a supervised start for a policy, by TRL's SFTTrainer on prompts with a column `reference`."""

import sys
from pathlib import Path
from typing import Any

PROG = "softrl sft"


def main(argv: list[str]) -> int:
    """Train and save the merged model; returns the process's exit status: 2 for a mistake."""
    from softrl.assets import AssetError

    try:
        return _train(*parsed(argv))
    except (ValueError, TypeError, OSError, AssetError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\n{PROG}: interrupted; nothing was saved but its checkpoints. Where it has any (--save_strategy steps "
            "--save_steps N), go on with --resume_from_checkpoint latest.",
            file=sys.stderr,
        )
        return 130


def parsed(argv: list[str]) -> tuple[Any, Any, Any]:
    """Recipe and command line, the latter winning."""
    from trl import ModelConfig

    from softrl.cli.arguments import DataArguments, parse_recipe
    from softrl.trainers.sft_config import SupervisedConfig

    classes = (DataArguments, SupervisedConfig, ModelConfig)
    return parse_recipe(classes, argv, PROG, section="sft", model_name_or_path="smollm2-135m")


def _train(arguments: Any, args: Any, model_args: Any) -> int:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer, get_peft_config

    from softrl.assets import resolve_model, write_folder_atomically
    from softrl.cli.train import checkpoint_to_resume, load_prompts
    from softrl.trainers.loading import check_output_dir, supported_dtype

    folder = Path(args.output_dir)
    check_output_dir(folder, "config.json", "a model")
    checkpoint = checkpoint_to_resume(args)
    name = resolve_model(model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model_args.model_revision)
    train, test = load_prompts(arguments, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=supported_dtype(model_args.dtype or "float32", args.device), revision=model_args.model_revision
    )
    train, test = (
        encoded_references(rows, tokenizer, args.append_eos, arguments.dataset_name) for rows in (train, test)
    )
    trainer = SFTTrainer(
        model, args, train_dataset=train, eval_dataset=test, processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )  # fmt: skip
    print(f"training {model_args.model_name_or_path} on {len(train)} references ...", flush=True)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate()["eval_loss"]
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.merge_and_unload() if isinstance(model, PeftModel) else model
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_folder_atomically(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    print(
        f"loss on {len(test)} held-out references: {before:.3f} -> {after:.3f} nats a token. Saved in {folder}; to go "
        f"on from it: softrl train --model_name_or_path {folder}"
    )
    return 0


def encoded_references(rows: Any, tokenizer: Any, append_eos: bool, name: str) -> Any:
    """Token ids, and labels of the completion alone. TRL would end every text, also one that is cut, and split it.

    Not a `completion_mask`, which TRL reads only where `completion_only_loss` is asked for.
    """
    from softrl.data.prompts import prompt_ids
    from softrl.data.supervised import IGNORED

    if "reference" not in rows.column_names:
        raise ValueError(
            f"dataset_name={name!r} has no column 'reference' to train on; it has {rows.column_names}. Of "
            "'review-openings' say how long it is: reference_length_tokens"
        )
    ending = [tokenizer.eos_token_id] if append_eos else []

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        reference = row["reference"] if isinstance(row["reference"], str) else row["reference"][0]
        prompt = prompt_ids(row["prompt"], tokenizer)
        completion = tokenizer(reference, add_special_tokens=False).input_ids + ending
        return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}

    return rows.map(encode, remove_columns=rows.column_names)
