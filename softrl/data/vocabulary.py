"""A tokenizer whose tokens are given one by one; nothing is learned from a corpus, so its ids depend on them alone.

Special tokens come first: `<pad>` 0, `<eos>` 1, `<unk>` 2. Their names in a text are read as these tokens.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, models
from tokenizers.decoders import Decoder
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")


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
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
