"""Rows as prompts: texts and conversations, and what is said about rows that are neither."""

import pytest
import torch
from datasets import Dataset
from trainers.tiny import CHAT_TEMPLATE, make, word_tokenizer

from softrl.trainers.batches import indexed, prompt_batch, prompt_text

pytestmark = pytest.mark.slow  # imports trl


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def rows_of(prompts):
    return [{"prompt": prompt, "prompt_index": 10 + i, "target": i} for i, prompt in enumerate(prompts)]


def test_conversations_go_through_the_template_and_texts_do_not():
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    rows = rows_of([chat("w5 w6"), "w5 w6"])
    batch = prompt_batch([row for row in rows for _ in range(2)], tokenizer, 2, None, torch.device("cpu"))
    user, assistant, eos, pad = 21, 22, 1, 2
    assert batch.prompts.ids.tolist() == [[user, 5, 6, eos, assistant], [pad, pad, pad, 5, 6]]
    assert batch.prompts.mask.sum(-1).tolist() == [5, 2]
    assert batch.indices == [10, 11]
    assert batch.columns["target"] == [0, 0, 1, 1]
    assert batch.columns["prompt"][1] == chat("w5 w6")
    assert prompt_text(chat("w5 w6", "w7")) == "user: w5 w6\nassistant: w7"


@pytest.mark.parametrize("wrong", [None, 5, [], ["w4"], [{"content": "w4"}]])
def test_a_row_that_is_no_prompt_is_named(tokenizer, wrong):
    rows = rows_of(["w4", wrong])
    with pytest.raises(TypeError, match=r"row 11: a prompt is text or a list of messages with `role` and `content`"):
        prompt_batch(rows, tokenizer, 1, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="row 11: the prompt is empty"):
        prompt_batch(rows_of(["w4", ""]), tokenizer, 1, None, torch.device("cpu"))


def test_data_sets_without_prompts_are_told_where_theirs_are(tokenizer):
    preferences = Dataset.from_dict({"chosen": ["w4 w5"], "rejected": ["w4 w6"]})
    with pytest.raises(ValueError, match=r"needs a column `prompt`.*dataset\.map\(trl\.extract_prompt\)"):
        indexed(preferences, "train_dataset", tokenizer)
    messages = Dataset.from_dict({"messages": [chat("w4", "w5")]})
    with pytest.raises(ValueError, match=r'needs a column `prompt`.*row\["messages"\]\[:-1\].*trl\.extract_prompt'):
        indexed(messages, "train_dataset", tokenizer)
    with pytest.raises(ValueError, match=r"columns \['ids', 'mask'\], which are names of a reward's own arguments"):
        indexed(Dataset.from_dict({"prompt": ["w4"], "mask": [1], "ids": [1]}), "train_dataset", tokenizer)


def test_streams_are_refused(tokenizer):
    stream = Dataset.from_dict({"prompt": ["w4"]}).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"got IterableDataset; a stream has no row indices.*stream\.take\(n\)"):
        indexed(stream, "train_dataset", tokenizer)


@pytest.mark.parametrize("which", ["train", "evaluation"])
def test_conversations_without_a_template_are_refused_at_construction(tmp_path, tokenizer, which):
    data = Dataset.from_dict({"prompt": [chat("w4")] * 4})
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template; set tokenizer\.chat_template"):
        make(tmp_path, tokenizer, **{which: data})


def test_training_on_conversations_is_training_on_their_templated_text(tmp_path):
    """The same tokens, so the same losses; and evaluations show the conversation as text."""
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    contents = [f"w{3 + i} w{4 + i}" for i in range(8)]
    conversations = Dataset.from_dict({"prompt": [chat(content) for content in contents]})
    texts = Dataset.from_dict({"prompt": [f"user {content} <eos> assistant" for content in contents]})
    losses, samples = [], []
    for data in (conversations, texts):
        trainer = make(tmp_path, tokenizer, train=data, evaluation=data)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        trainer.evaluate()
        samples.append(trainer.last_evaluation)
    assert losses[0] == losses[1]
    assert [sample.tokens for sample in samples[0]] == [sample.tokens for sample in samples[1]]
    assert samples[0][2].prompt == "user: w5 w6"
    assert samples[1][2].prompt == "user w5 w6 <eos> assistant"


def test_another_evaluation_set_and_several_by_name(tmp_path, tokenizer):
    data = Dataset.from_dict({"prompt": ["w4 w5", "w6", "w7"]})
    trainer = make(tmp_path, tokenizer, evaluation={"all": data, "one": data.select([0])})
    metrics = trainer.evaluate()
    first = trainer.last_evaluation[0].reward
    assert metrics["eval_one_reward"] == pytest.approx(first)
    assert metrics["eval_all_reward"] != pytest.approx(first)
    assert trainer.evaluate(data)["eval_reward"] == pytest.approx(metrics["eval_all_reward"])
