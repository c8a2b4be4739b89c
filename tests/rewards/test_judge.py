"""The judge on a tiny random encoder: its features written out, and what batching must not change."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from softrl.rewards.judge import SentenceEncoder, SentimentJudge

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=300,
    )
    BertModel(config).save_pretrained(path)
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    return path


@pytest.fixture
def encoder(folder):
    return SentenceEncoder(folder)


TEXTS = ["a good film", "bad", "a a a a bad film", "", "good good"]


def test_features_are_means_of_the_last_three_layers(folder, encoder):
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(torch.tensor([[2, 4, 5, 7, 3]]), output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer][0].mean(0) for layer in (2, 3, 4)])
    assert encoder.num_features == 24
    torch.testing.assert_close(encoder.features(["a good film"])[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batching_changes_neither_order_nor_values(encoder, batch_size):
    alone = torch.cat([encoder.features([text]) for text in TEXTS])
    torch.testing.assert_close(encoder.features(TEXTS, batch_size), alone, rtol=0, atol=1e-6)
    assert not torch.allclose(alone[0], alone[1])


def test_score_is_the_logistic_of_the_head(encoder):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, generator=generator), torch.tensor(0.2)
    judge = SentimentJudge(encoder, weight, bias)
    expected = 1 / (1 + torch.exp(-(encoder.features(TEXTS) @ weight + bias)))
    torch.testing.assert_close(judge.score(TEXTS, batch_size=2), expected, rtol=0, atol=1e-6)
    assert judge.score([]).shape == (0,)


def test_text_beyond_256_pieces_is_not_read(encoder):
    """Two of the 256 are special tokens."""
    words = "a film " * 127
    assert torch.equal(encoder.features([words + "bad"]), encoder.features([words + "good"]))
    words = "film " + "a film " * 126
    assert not torch.equal(encoder.features([words + "bad"]), encoder.features([words + "good"]))


def test_save_and_load(encoder, tmp_path):
    judge = SentimentJudge(encoder, torch.linspace(-1, 1, 24), torch.tensor(0.1))
    judge.save(tmp_path / "head.safetensors")
    loaded = SentimentJudge.load(tmp_path / "head.safetensors", encoder)
    assert torch.equal(loaded.score(TEXTS), judge.score(TEXTS))


def test_a_head_of_another_encoder(encoder):
    with pytest.raises(ValueError, match="head has 5 weights, its encoder 24 features"):
        SentimentJudge(encoder, torch.zeros(5), torch.tensor(0.0))


def test_nothing_of_it_can_be_trained(encoder):
    assert not SentimentJudge(encoder, torch.ones(24), torch.tensor(0.0)).score(TEXTS).requires_grad
