"""How the sentiment judge is fitted: logistic regression on the features of a frozen sentence encoder.

Settings were chosen by the accuracy on snippets of Rotten Tomatoes and on pieces of IMDB reviews. Tried: features of
the last layer, of the one before, of the last two and three; scaled to unit length or not; 0 to 8,000 pieces beside
the snippets. Three layers are worth 2 points over one; unit length makes no difference.
"""

import time
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from softrl.data.reviews import LabelledText, load_reviews, pieces, sample, snippets, unit_hash
from softrl.rewards.judge import SentenceEncoder, SentimentJudge
from softrl.rewards.logistic import Linear, Problem, fit_along_path, mean_loss_nats

PIECE_LENGTH_WORDS = 32
NUM_PIECES = 5000
NUM_HELD_OUT = 1500  # of snippets and of pieces
PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
MAX_ITERATIONS = 200
VALIDATION_FRACTION = 0.1

# What a cached fit depends on; raise the recipe's number when the code changes what it fits.
SETTINGS = {
    "recipe": 1,
    "piece_length_words": PIECE_LENGTH_WORDS,
    "num_pieces": NUM_PIECES,
    "num_held_out": NUM_HELD_OUT,
    "penalties": PENALTIES,
    "max_iterations": MAX_ITERATIONS,
    "validation_fraction": VALIDATION_FRACTION,
}


def fit(encoder: SentenceEncoder) -> tuple[SentimentJudge, dict[str, Any]]:
    """Fit the judge on the "judge" part and measure it on the "reward" part; returns it with facts for its card."""
    started = time.monotonic()
    reviews, other = load_reviews("judge"), load_reviews("reward")
    texts = snippets(reviews) + sample(pieces(reviews, PIECE_LENGTH_WORDS), NUM_PIECES)
    best = fit_features(_features(encoder, texts, "reading the judge's reviews"), texts)
    judge = SentimentJudge(encoder, best.weight.float(), best.bias.float())
    held_out = {
        "rotten_tomatoes_snippets": sample(snippets(other), NUM_HELD_OUT),
        f"imdb_pieces_of_{PIECE_LENGTH_WORDS}_words": sample(pieces(other, PIECE_LENGTH_WORDS), NUM_HELD_OUT),
    }
    facts = {
        "title": "sentiment judge, a head on MiniLM",
        "held_out_accuracy": {name: accuracy(judge, labelled) for name, labelled in held_out.items()},
        "num_held_out_texts": sum(map(len, held_out.values())),
        "num_train_texts": len(texts),
        "penalty": best.penalty,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": round(time.monotonic() - started, 1),
    }
    return judge, facts


def fit_features(features: Float[Tensor, "n D"], texts: list[LabelledText]) -> Linear:
    """The classifier of features with the penalty that does best on a tenth of the texts, fitted on the others.

    The penalty is on standardised features; the result is for features as they are.
    """
    held = torch.tensor([unit_hash(text, "validation") < VALIDATION_FRACTION for text, _ in texts])
    labels = torch.tensor([label for _, label in texts], dtype=torch.float64)
    mean, deviation = features[~held].mean(0), features[~held].std(0)
    standard = (features - mean) / deviation
    train, validation = standard[~held], standard[held]
    problem = Problem(
        margins=train.mv,
        pullback=train.T.mv,
        labels=labels[~held],
        example_weights=torch.full((len(train),), 1 / len(train), dtype=torch.float64),
        penalty_scale=torch.ones(train.shape[1], dtype=torch.float64),
        step_scale=torch.ones(train.shape[1], dtype=torch.float64),
    )

    def validation_loss(weight: Tensor, bias: Tensor) -> float:
        return mean_loss_nats(validation @ weight + bias, labels[held])

    best = fit_along_path(problem, PENALTIES, validation_loss, MAX_ITERATIONS, "fitting the judge")
    weight = best.weight / deviation
    return Linear(weight, best.bias - weight @ mean, best.penalty, best.validation_loss_nats)


def accuracy(judge: SentimentJudge, texts: list[LabelledText]) -> float:
    """Share of texts that the judge puts on the right side of one half."""
    scores = judge.score([text for text, _ in texts])
    return round(float(((scores > 0.5) == torch.tensor([label == 1 for _, label in texts])).double().mean()), 4)


def _features(encoder: SentenceEncoder, texts: list[LabelledText], title: str) -> Float[Tensor, "n D"]:
    return encoder.features([text for text, _ in texts], title=title).double().cpu()
