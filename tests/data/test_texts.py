"""Plain text as rows of token ids: what is read, cut and padded, and what is refused."""

import pytest
import torch
from datasets import Dataset
from trainers.tiny import word_tokenizer

from softrl.data.texts import padded_texts, text_rows


def rows(data, tokenizer=None, max_length=None, needs_anchors=False):
    return text_rows(Dataset.from_dict(data), "train_dataset", tokenizer, max_length, needs_anchors)


def test_texts_are_tokenised_cut_and_numbered():
    made = rows({"text": ["w3 w4 w5", "w6 w7"], "label": [1, 0]}, word_tokenizer(), max_length=2)
    assert made.to_list() == [{"input_ids": [3, 4], "text_index": 0}, {"input_ids": [6, 7], "text_index": 1}]


def test_token_ids_need_no_tokenizer_and_keep_masks_and_anchors():
    data = {"input_ids": [[3, 4, 5, 6], [7, 8]], "completion_mask": [[0, 1, 1, 1], [0, 1]], "anchors": [[0, 3], []]}
    made = rows(data, needs_anchors=True, max_length=3)
    assert made[0] == {"input_ids": [3, 4, 5], "text_index": 0, "anchors": [0], "completion_mask": [0, 1, 1]}
    assert made[1]["anchors"] == []
    assert "anchors" not in rows(data).column_names


def test_rows_are_padded_on_the_right():
    texts = padded_texts(list(rows({"input_ids": [[3, 4, 5], [6, 7]]})), torch.device("cpu"))
    assert texts.ids.tolist() == [[3, 4, 5], [6, 7, 0]]
    assert texts.mask.tolist() == [[True, True, True], [True, True, False]]
    assert texts.counted is None
    masked = rows({"input_ids": [[3, 4, 5], [6, 7]], "completion_mask": [[0, 1, 1], [0, 1]]})
    assert padded_texts(list(masked), torch.device("cpu")).counted.tolist() == [
        [False, True, True],
        [False, True, False],
    ]


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ({"prompt": ["w3"]}, {}, "needs at least one row and a column `text` or `input_ids`; it has 1 rows"),
        ({"text": []}, {}, "it has 0 rows"),
        ({"text": ["w3 w4"]}, {}, "there is no tokenizer; pass processing_class"),
        ({"text": ["w3 w4", "w5"]}, {"tokenizer": word_tokenizer()}, "row 1: a text of 1 tokens has none to predict"),
        ({"input_ids": [[3, 4]]}, {"needs_anchors": True}, "no column 'anchors', which think_at='given' reads"),
        ({"input_ids": [[3, 4]], "anchors": [[1]]}, {"needs_anchors": True}, "row 0: anchors=.1. holds no token of 2"),
        ({"input_ids": [[3, 4]], "anchors": [[-1, 0]]}, {"needs_anchors": True}, "or one below 0; count from 0"),
        ({"input_ids": [[3, 4]], "completion_mask": [[1]]}, {}, "it has 1 numbers for 2 tokens"),
    ],
)
def test_mistakes_are_named(data, settings, message):
    with pytest.raises(ValueError, match=message):
        rows(data, **settings)


def test_a_stream_is_refused():
    with pytest.raises(TypeError, match=r"must be a datasets.Dataset, got list"):
        text_rows([{"text": "w3 w4"}], "train_dataset", word_tokenizer(), None, False)
