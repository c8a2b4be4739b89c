"""What `softrl train` makes for trainers that begin from nothing: a corpus's blocks, its tokenizer, a small model.

A corpus is Shakespeare, or any data set with a column `text`. `model_name_or_path: scratch`, the default of these
trainers, makes tokenizer and model; any other name is loaded, and its tokenizer reads the corpus.
Every process of a launch makes the same; what takes long is kept in the cache under a lock (`softrl.data.corpus`).
"""

from pathlib import Path
from typing import Any, NamedTuple

from softrl.cli.arguments import CORPORA, POINTER_CORPUS, RECALL_CORPUS, SCRATCH, SHAKESPEARE_CORPUS, TrainArguments

_MOST_ROWS = 20_000  # of what is made, not read
_HELD_OUT = 10  # the last of so many parts of a corpus that has no split of its own


class Beginning(NamedTuple):
    """What a trainer begins with."""

    model: Any
    tokenizer: Any
    train: Any
    test: Any


def beginning(arguments: TrainArguments, training_args: Any, name: str, tokenizer: Any) -> Beginning:
    """Model, tokenizer, training and held-out blocks.

    Args:
        arguments: of the data.
        training_args: the trainer's, with `tokenizer`, `block_length_tokens`, `seed`, and what its model is made of.
        name: "scratch", or a model to be loaded by the trainer.
        tokenizer: of that model; None for "scratch".
    Raises:
        ValueError: a data set that cannot be read, or what tokenizer, blocks and model refuse.
    """
    if arguments.prompt_prefix:
        raise ValueError(f"prompt_prefix={arguments.prompt_prefix!r} is put before prompts, and a corpus has none")
    if arguments.dataset_name == POINTER_CORPUS:
        tokenizer, train, test = _pointers(arguments, tokenizer)
    elif arguments.dataset_name == RECALL_CORPUS:
        tokenizer, train, test = _recall(arguments, training_args, tokenizer)
    else:
        tokenizer, train, test = _blocks(arguments, training_args, tokenizer)
    if name != SCRATCH:
        return Beginning(name, tokenizer, train, test)
    training_args.model_init_kwargs = None  # of models that are loaded
    return Beginning(_MODELS[arguments.trainer](training_args, tokenizer), tokenizer, train, test)


def _blocks(arguments: TrainArguments, training_args: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    from softrl.data.corpus import corpus_blocks, corpus_tokenizer, tokenizer_size

    text, held_out = corpus_texts(arguments)
    if tokenizer is None:
        kind = training_args.tokenizer
        # Bytes read any text; characters that occur in held-out text alone need a token too.
        tokenizer = corpus_tokenizer(kind, text + held_out if tokenizer_size(kind) is None else text)
    length = training_args.block_length_tokens
    train = corpus_blocks(text, tokenizer, length)
    if held_out:
        test = corpus_blocks(held_out, tokenizer, length)
    elif len(train) < 2:
        raise ValueError(
            f"dataset_name={arguments.dataset_name!r} has one block of block_length_tokens={length}; it needs two, "
            "one to hold out"
        )
    else:
        first = len(train) - max(len(train) // _HELD_OUT, 1)
        train, test = train.select(range(first)), train.select(range(first, len(train)))
    return tokenizer, spread(train, arguments.num_train_prompts), spread(test, arguments.num_eval_prompts)


def corpus_texts(arguments: TrainArguments) -> tuple[str, str]:
    """Training text and held-out text; the latter is empty where the data set has one split only.

    Raises:
        ValueError: the data set cannot be read, or lacks a split or the column `text`.
    """
    name = arguments.dataset_name
    if name == SHAKESPEARE_CORPUS:
        from softrl.data.characters import shakespeare

        return shakespeare("train"), shakespeare("test")
    from softrl.data.files import read_data_set

    splits = read_data_set(name, CORPORA)
    wanted = [arguments.dataset_train_split]
    if not Path(name).is_file() and (len(splits) > 1 or arguments.dataset_test_split in splits):
        wanted.append(arguments.dataset_test_split)
    texts = []
    for split in wanted:
        if split not in splits:
            raise ValueError(f"data set {name!r} has no split {split!r}; it has {sorted(splits)}")
        columns = splits[split].column_names
        if "text" not in columns:
            raise ValueError(f"dataset_name={name!r} is read as a corpus and needs a column `text`; it has {columns}")
        texts.append("\n".join(splits[split]["text"]) + "\n")  # which gives a text file back as it was
    return texts[0], "".join(texts[1:])


def spread(blocks: Any, count: int) -> Any:
    """So many blocks at most, spread evenly over the corpus."""
    if count < 1:
        raise ValueError(f"num_train_prompts and num_eval_prompts must be at least 1, got {count}")
    number = len(blocks)
    if count >= number:
        return blocks
    chosen = blocks[[index * number // count for index in range(count)]]
    return type(blocks).from_dict(chosen, features=blocks.features)  # `select` would be resolved later, with a bar


def _pointers(arguments: TrainArguments, tokenizer: Any) -> tuple[Any, Any, Any]:
    """Pointer chasing, of which the answers count alone."""
    from softrl.data.pointer_chasing import pointer_chasing
    from softrl.data.texts import ANCHOR_COLUMN
    from softrl.studies.thought_tasks import pointer_task

    counts = {"num_rows": arguments.num_train_prompts, "num_eval_rows": arguments.num_eval_prompts}
    task = pointer_task(None, **counts, right_work=None)
    if tokenizer is not None:
        pointer_chasing(tokenizer, 1, hops=(3,))  # refuses a tokenizer of other ids
    return task.tokenizer, task.train.remove_columns(ANCHOR_COLUMN), task.test.remove_columns(ANCHOR_COLUMN)


def _recall(arguments: TrainArguments, training_args: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    """A key with `block_length_tokens` of Shakespeare between it and the question; the answer counts alone.

    In training rows it is up to so many: where the key is near, what is asked for is learned first.
    """
    from softrl.data.characters import shakespeare
    from softrl.data.corpus import corpus_tokenizer
    from softrl.data.key_recall import key_recall, with_keys
    from softrl.data.texts import MASK_COLUMN

    if tokenizer is None:
        tokenizer = with_keys(corpus_tokenizer(training_args.tokenizer, shakespeare("train")))
    longest = training_args.block_length_tokens
    train = key_recall(tokenizer, min(arguments.num_train_prompts, _MOST_ROWS), (1, longest), split="train")
    test = key_recall(tokenizer, arguments.num_eval_prompts, longest, split="test")
    columns = ["input_ids", MASK_COLUMN]
    return tokenizer, train.select_columns(columns), test.select_columns(columns)


def _soft_ar(training_args: Any, tokenizer: Any) -> Any:
    """A small causal LM, which its trainer gives a window."""
    if training_args.core == "transformer":
        from softrl.models.small import small_llama

        return small_llama(
            tokenizer, training_args.hidden_size, training_args.num_layers, training_args.num_heads,
            training_args.block_length_tokens, training_args.seed,
        )  # fmt: skip
    from softrl.models.gru import GRUConfig, GRUForCausalLM

    config = GRUConfig(
        vocab_size=len(tokenizer), hidden_size=training_args.hidden_size, num_hidden_layers=training_args.num_layers,
        **special_ids(tokenizer),
    )  # fmt: skip
    return seeded(lambda: GRUForCausalLM(config), training_args.seed)


def _reasoner(training_args: Any, tokenizer: Any) -> Any:
    from softrl.models.reasoner import ReasonerForCausalLM

    config = training_args.model_config(len(tokenizer), **special_ids(tokenizer))
    return seeded(lambda: ReasonerForCausalLM(config), training_args.seed)


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """Of a model's configuration."""
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def seeded(make: Any, seed: int) -> Any:
    """A model whose weights are drawn with this seed; the global random state stays as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


_MODELS = {"reasoner": _reasoner, "soft_ar": _soft_ar}
