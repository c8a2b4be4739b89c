"""Tokenizers for models from scratch: of tokens that are given one by one, so that ids depend on them alone, and BPE.

Special tokens come first: `<pad>` 0, `<eos>` 1, `<unk>` 2. Their names in a text are read as these tokens.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, models
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Decoder
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
LEAST_PAIRS_SIZE = len(SPECIAL_TOKENS) + 256  # of a vocabulary of byte pairs


def listed_tokenizer(
    tokens: Sequence[str], pre_tokenizer: PreTokenizer, decoder: Decoder | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of these tokens, in the order of their ids, from 3.

    Args:
        tokens: different from each other and from the special tokens.
        pre_tokenizer: cuts a text into tokens.
        decoder: puts tokens together again; None puts spaces between them.
    """
    ids = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *tokens])}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        backend.decoder = decoder
    return wrapped(backend)


def byte_pair_tokenizer(text: str, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a text; it reads any text and decodes to exactly what it read.

    Its ids: three special tokens, the 256 bytes, and merged pairs, the first ones first. Words are cut as GPT-2's.

    Args:
        text: what pairs are counted in; a short one may have fewer than asked for.
        size: tokens in all, from 259.
    Raises:
        ValueError: a size below that.
    Source: Sennrich et al. (2016), arXiv:1508.07909; on bytes: Radford et al. (2019).
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < LEAST_PAIRS_SIZE:
        raise ValueError(
            f"size of a byte-pair vocabulary must be a whole number, {LEAST_PAIRS_SIZE} or more (special tokens and "
            f"bytes), got {size!r}; 1024 suits a small corpus"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([text], trainer)
    return wrapped(backend)


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with our special tokens, as transformers knows them."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
