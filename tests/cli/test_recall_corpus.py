"""`softrl train --dataset_name key-recall`: what is read and what counts."""

import pytest

from softrl.cli.arguments import SCRATCH, parse
from softrl.cli.scratch import beginning
from softrl.data.key_recall import key_tokens

pytestmark = pytest.mark.slow  # imports trl


def test_keys_lie_as_far_back_as_the_blocks_are_long_and_answers_alone_count(tmp_path):
    words = (
        "--config soft_ar/shakespeare --dataset_name key-recall --tokenizer characters --hidden_size 16 --num_heads 2"
    )
    words += " --num_layers 1 --block_length_tokens 40 --num_train_prompts 60 --num_eval_prompts 10"
    arguments, training_args, _ = parse([*words.split(), "--output_dir", str(tmp_path)])
    begun = beginning(arguments, training_args, SCRATCH, None)
    keys = {each for ids in key_tokens(begun.tokenizer) for each in ids}
    assert len(keys) == 16
    assert begun.model.config.vocab_size == len(begun.tokenizer)
    distances = {}
    for name, rows in (("train", begun.train), ("test", begun.test)):
        assert rows.column_names == ["input_ids", "completion_mask"]
        for ids, mask in zip(rows["input_ids"], rows["completion_mask"], strict=True):
            assert mask == [0] * (len(ids) - 1) + [1]
            announced, answered = (place for place, token in enumerate(ids) if token in keys)
            assert (answered, ids[announced]) == (len(ids) - 1, ids[-1])
            distances.setdefault(name, set()).add(answered - announced)
    (furthest,) = distances["test"]
    assert furthest > 40
    assert (len(begun.train), len(begun.test)) == (60, 10)
    assert max(distances["train"]) <= furthest
    assert min(distances["train"]) < furthest - 20
