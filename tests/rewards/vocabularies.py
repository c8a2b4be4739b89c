"""Small tokenizers of different kinds, trained on a few sentences: a policy's, and those of models that read it."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["The film was wonderful.", "the films were dull and the cast was wonder", "a café in the film\n\n"] * 3
WORDS = ["the", "film", "was", "wonder", "and", "a", ".", "cafe", "cast", "##s", "##ful", "dull"]


def byte_level(vocab_size, corpus=CORPUS, special="<eos>"):
    """Byte-level BPE with leading spaces in its tokens, as SmolLM2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special, pad_token=special)


def word_piece():
    """Lower-cased WordPiece between [CLS] and [SEP], as MiniLM's."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *WORDS,
        *letters[1:],
        *(f"##{letter}" for letter in letters if letter != "s"),
    ]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    frame = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


POLICY, BERT_LIKE, BYTES = byte_level(300), word_piece(), byte_level(280, special="<end>")
