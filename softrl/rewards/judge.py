"""The judge: an independent classifier of texts that says whether training made them better.

A frozen sentence encoder with a linear head, fitted on other reviews than the reward was. It reads text, not tokens
of the policy, and nothing in it is differentiated: it is for measuring alone and never for training.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from softrl.assets import write_atomically

_LAYERS = 3  # the last ones; their features together tell sentiment apart better than the last one's alone
_MAX_LENGTH_TOKENS = 256


class SentenceEncoder:
    """Features of texts: hidden states of a BERT's last three layers, each averaged over the tokens.

    Args:
        folder: a model folder with tokenizer.
        device: where it runs.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().to(device)
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        finally:
            if bars:
                logging.enable_progress_bar()
        self._device = device

    @property
    def num_features(self) -> int:
        return int(_LAYERS * self._model.config.hidden_size)

    @torch.inference_mode()
    def features(self, texts: list[str], batch_size: int = 64, title: str | None = None) -> Float[Tensor, "N D"]:
        """Features of each text's first 256 word pieces, float32; with a title, under a progress bar."""
        features = torch.zeros(len(texts), self.num_features, device=self._device)
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little padding in a batch
        with tqdm(total=len(texts), desc=title, unit="text", leave=False, disable=None if title else True) as bar:
            for start in range(0, len(texts), batch_size):
                rows = by_length[start : start + batch_size]
                features[rows] = self._batch([texts[row] for row in rows])
                bar.update(len(rows))
        return features

    def _batch(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=_MAX_LENGTH_TOKENS, return_tensors="pt"
        ).to(self._device)
        states = self._model(**tokens, output_hidden_states=True).hidden_states[-_LAYERS:]
        mask = tokens.attention_mask[..., None].float()
        return torch.cat([(state * mask).sum(1) / mask.sum(1) for state in states], dim=-1)


class SentimentJudge:
    """The probability that a text is favourable.

    Args:
        encoder: gives the features.
        weight: of the linear head, one per feature.
        bias: of the linear head.
    """

    name = "judge"

    def __init__(self, encoder: SentenceEncoder, weight: Float[Tensor, "D"], bias: Float[Tensor, ""]) -> None:
        if len(weight) != encoder.num_features:
            raise ValueError(
                f"the judge's head has {len(weight)} weights, its encoder {encoder.num_features} features"
            )
        self._encoder = encoder
        self._weight = weight
        self._bias = bias

    def score(self, texts: list[str], batch_size: int = 64) -> Float[Tensor, "N"]:
        """Judge texts.

        Args:
            texts: N texts; what lies beyond 256 word pieces is not read.
            batch_size: texts at a time.
        Returns:
            Probabilities of favourable, in (0, 1), float32, on the CPU.
        """
        features = self._encoder.features(texts, batch_size).to(device="cpu", dtype=self._weight.dtype)
        return (features @ self._weight + self._bias).sigmoid().float()

    def save(self, path: str | Path) -> None:
        """Write the head as one safetensors file, whole or not at all; the encoder is not part of it."""
        with write_atomically(path) as temporary:
            save_file({"weight": self._weight.contiguous(), "bias": self._bias}, temporary)

    @classmethod
    def load(cls, path: str | Path, encoder: SentenceEncoder) -> "SentimentJudge":
        """Read a head that `save` wrote and put it on the encoder."""
        head = load_file(path)
        return cls(encoder, head["weight"], head["bias"])
