"""Tiny random models, rewards and prompts for unit tests, and the lists that parametrised tests go through.

Everything is float64 and built from configurations: nothing is downloaded. Every parameter is redrawn at a scale at
which feedback paths matter; with the default initialisation they would be invisible beside the direct ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from softrl.assets import WordVocabulary
from softrl.contexts.soft_ar import SoftARForCausalLM
from softrl.contexts.window import WindowLayout
from softrl.models.gru import GRUConfig, GRUForCausalLM
from softrl.models.thinking import ThinkingConfig, ThinkingLM
from softrl.rewards.aligned_reward_model import AlignedClassifierReward
from softrl.rewards.base import WeightedRewards
from softrl.rewards.discriminator import Discriminator
from softrl.rewards.function import FunctionReward
from softrl.rewards.length import LengthReward
from softrl.rewards.likelihood import LikelihoodReward, TargetLikelihoodReward
from softrl.rewards.overlap import BleuReward, RougeReward
from softrl.rewards.repetition import RepetitionPenalty
from softrl.rewards.reward_model import SequenceClassifierReward
from softrl.rewards.similarity import EmbeddingSimilarityReward
from softrl.rewards.token_linear import TokenLinearReward
from softrl.rewards.toxicity import ToxicityClassifier, ToxicityReward
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import RELAXATIONS, Relaxation
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts, SoftTokens

V = 23
EOS = 1


def _redraw(model: nn.Module, seed: int, scale: float) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    # nn.Embedding drops the pad row's gradient; finite differences would see it where a soft token keeps that id.
    model.get_input_embeddings().padding_idx = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(0.0, scale, generator=generator)
    return model


def with_float64_norms(model: nn.Module) -> nn.Module:
    """Llama's and Mamba's RMSNorm compute in float32 whatever they are given; these compute in float64."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in ("LlamaRMSNorm", "MambaRMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def llama(seed: int = 0, tied: bool = True) -> nn.Module:
    """Two layers, grouped keys: four heads on two key-value heads."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=EOS, pad_token_id=2,
    )  # fmt: skip
    return _redraw(LlamaForCausalLM(config), seed, 0.4)


def gpt2(seed: int = 0, tied: bool = True) -> nn.Module:
    """Learned absolute positions, biases everywhere."""
    config = GPT2Config(
        vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=EOS, pad_token_id=2,
    )  # fmt: skip
    return _redraw(GPT2LMHeadModel(config), seed, 0.4)


def gru(seed: int = 0, tied: bool = True) -> nn.Module:
    """A recurrent state instead of keys and values."""
    config = GRUConfig(vocab_size=V, hidden_size=12, num_hidden_layers=2, tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # its cells' biases are not redrawn
        return _redraw(GRUForCausalLM(config), seed, 0.7)


def mamba(seed: int = 0, tied: bool = True) -> nn.Module:
    """A state-space model, whose state transformers updates in place; its norms in float64, where stock ones round."""
    config = MambaConfig(
        vocab_size=V, hidden_size=12, state_size=4, num_hidden_layers=2, intermediate_size=24, time_step_rank=4,
        tie_word_embeddings=tied, residual_in_fp32=False, bos_token_id=0, eos_token_id=EOS, pad_token_id=2,
    )  # fmt: skip
    return with_float64_norms(_redraw(MambaForCausalLM(config), seed, 0.4))


def gemma3(seed: int = 0, tied: bool = True) -> nn.Module:
    """Scales embeddings inside their module, caps logits, and slides a window over every other layer."""
    config = Gemma3TextConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=4, tie_word_embeddings=tied,
        layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=3.0,
        bos_token_id=0, eos_token_id=EOS, pad_token_id=2,
    )  # fmt: skip
    return _redraw(Gemma3ForCausalLM(config), seed, 0.4)


def rwkv(seed: int = 0, tied: bool = True) -> nn.Module:
    """Neither a cache argument nor a mask: decodes from the whole prefix, and takes prompts of one length."""
    config = RwkvConfig(
        vocab_size=V, hidden_size=12, attention_hidden_size=12, num_hidden_layers=2, intermediate_size=24,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=EOS, rescale_every=0,
    )  # fmt: skip
    return _redraw(RwkvForCausalLM(config), seed, 0.4)


def soft_ar(seed: int = 0, tied: bool = True) -> nn.Module:
    """GPT-2 behind a window of four tokens, with a slot for two and one for all that is older."""
    layout = WindowLayout(num_segments=1, segment_tokens=2, num_hard=4, num_soft=0)
    model = SoftARForCausalLM.from_backbone(gpt2(seed, tied), layout)
    return _redraw(model, seed, 0.4)


def thinking(lm=None, learns_log_z=False, redraw=True, **settings):
    """A tiny model that thinks, its mixing head and embeddings drawn away from their start."""
    model = ThinkingLM(gpt2() if lm is None else lm, ThinkingConfig(**settings), learns_log_z)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters() if redraw else ():
            if not name.startswith("lm."):
                parameter.normal_(0.0, 0.4, generator=generator)
    return model


ALL_MODELS = {
    "llama": llama, "gpt2": gpt2, "gru": gru, "mamba": mamba, "gemma3": gemma3, "soft_ar": soft_ar
}  # fmt: skip
REPLAYABLE_MODELS = ("llama", "gpt2", "gru", "gemma3")
ALL_RELAXATIONS = tuple(RELAXATIONS)


def relaxation_of(name: str, top_k: int = 7, **settings: float) -> Relaxation:
    """A relaxation with a nucleus rule that really removes kept ids."""
    return RELAXATIONS[name](Truncation(top_k=top_k, min_p=settings.pop("min_p", 0.02)), **settings)


def prompts(num_prompts: int = 3, length: int = 5, seed: int = 1) -> Prompts:
    """Left-padded prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (num_prompts, length), generator=generator)
    padding = torch.arange(num_prompts) % (length - 1)
    mask = torch.arange(length)[None] >= padding[:, None]
    return Prompts(ids.masked_fill(~mask, 2), mask)


def random_for(num_sequences: int, step: int = 0) -> SequenceRandom:
    """Streams of `num_sequences` different prompts."""
    return SequenceRandom.keyed(7, step, list(range(num_sequences)), 1)


class PairReward:
    """Non-linear in every token and across neighbours: `tanh(mean u·q) + Σ_t (u·q_t)(v·q_{t+1})`."""

    name = "pair"
    vocab_size = V

    def __init__(self, seed: int = 5):
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = torch.randn(2, V, generator=generator, dtype=torch.float64)

    def soft(self, tokens: SoftTokens, **columns: Sequence) -> Tensor:
        """R of soft tokens, shape (N,)."""
        present = tokens.survival.to(tokens.weights.dtype)
        first = (tokens.weights * self.first[tokens.ids]).sum(-1) * present
        second = (tokens.weights * self.second[tokens.ids]).sum(-1) * present
        pairs = (first[:, :-1] * second[:, 1:]).sum(-1)
        return torch.tanh(first.sum(-1) / present.sum(-1)) + pairs

    def hard(self, ids: Tensor, mask: Tensor, **columns: Sequence) -> Tensor:
        """R of hard tokens, shape (N,)."""
        return self.soft(SoftTokens(ids[..., None], torch.ones(*ids.shape, 1, dtype=torch.float64), mask))


def _token_linear(link: str, pooling: str) -> TokenLinearReward:
    weight = torch.randn(V, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return TokenLinearReward(weight, 0.3, link=link, pooling=pooling)


def classifier() -> nn.Module:
    """A reward model in the policy's vocabulary."""
    config = GPT2Config(vocab_size=V, n_positions=64, n_embd=8, n_layer=1, n_head=2, num_labels=1, pad_token_id=2)
    return _redraw(GPT2ForSequenceClassification(config), 7, 0.4)


def _sequence_classifier(pooling: str, append_eos: bool = False) -> SequenceClassifierReward:
    model, tokenizer = classifier(), None
    if append_eos:
        from trainers.tiny import word_tokenizer

        tokenizer = word_tokenizer()
        model.config.eos_token_id = [EOS, 4, 7, 13]  # as instruction-tuned models have several
    return SequenceClassifierReward(model, tokenizer, pooling=pooling, include_prompt=False, append_eos=append_eos)


def _function() -> FunctionReward:
    value = torch.linspace(-1.0, 2.0, V, dtype=torch.float64)
    return FunctionReward(lambda tokens: ((tokens.weights * value[tokens.ids]).sum(-1) * tokens.survival).sum(-1))


def _likelihood(reward: type, **settings: Any) -> LikelihoodReward | TargetLikelihoodReward:
    from trainers.tiny import word_tokenizer

    return reward(gpt2(seed=3), word_tokenizer(), **settings)


def _word_pieces() -> PreTrainedTokenizerFast:
    """Cuts the policy's word "w12" into "w", "##1" and "##2", and puts nothing around a text."""
    pieces = {"[PAD]": 0, "[UNK]": 1, "w": 2, **{f"##{digit}": 3 + digit for digit in range(10)}}
    backend = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def _bert(model_class: type, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        num_labels=1, max_position_embeddings=64,
    )  # fmt: skip
    return _redraw(model_class(config), 9, 0.6)


def _aligned_classifier() -> AlignedClassifierReward:
    from trainers.tiny import word_tokenizer

    tokenizer = _word_pieces()
    model = _bert(BertForSequenceClassification, tokenizer)
    return AlignedClassifierReward(model, tokenizer, word_tokenizer(), name="aligned")


def _similarity() -> EmbeddingSimilarityReward:
    from trainers.tiny import word_tokenizer

    tokenizer = _word_pieces()
    return EmbeddingSimilarityReward(_bert(BertModel, tokenizer), tokenizer, word_tokenizer(), column="target")


def _discriminator() -> Discriminator:
    from trainers.tiny import word_tokenizer

    torch.manual_seed(4)
    return Discriminator(gpt2(), word_tokenizer(), width=5)


def toxicity_classifier(num_words: int, max_words: int) -> ToxicityClassifier:
    """Six labels; widths of 5, 3 and 4, all different."""
    generator = torch.Generator().manual_seed(10)
    recurrent = {"kernel": (5, 12), "recurrent_kernel": (3, 12), "bias": (12,)}
    shapes = {
        "embedding": (num_words, 5),
        **{f"{side}.{name}": shape for side in ("forward", "backward") for name, shape in recurrent.items()},
        "hidden.kernel": (6, 4), "hidden.bias": (4,), "output.kernel": (4, 6), "output.bias": (6,),
    }  # fmt: skip
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return ToxicityClassifier(weights, max_words)


def _nontoxic() -> ToxicityReward:
    """Knows most of the policy's words, and fewer places than the texts have."""
    from trainers.tiny import word_tokenizer

    vocabulary = WordVocabulary(("", *(f"w{index}" for index in range(3, 19))), " ,")
    classifier = toxicity_classifier(len(vocabulary.words), max_words=4)
    return ToxicityReward(classifier, vocabulary, word_tokenizer(), link="logit")


def reward_columns(num_rows: int) -> dict[str, list]:
    """What rewards read of the data set: prompts, targets, and token ids of one reference or two a row."""
    generator = torch.Generator().manual_seed(8)
    texts = torch.randint(V, (num_rows, 2, 12), generator=generator).tolist()
    return {
        "prompt": [f"w3 w{row + 4}" for row in range(num_rows)],
        "target": [f"w{row + 5} w9" for row in range(num_rows)],
        "reference": [several[: 1 + row % 2] for row, several in enumerate(texts)],
    }


ALL_REWARDS = {
    "pair": PairReward,
    "token linear, sigmoid of the mean": lambda: _token_linear("sigmoid", "mean"),
    "token linear, sum": lambda: _token_linear("identity", "sum"),
    "weighted": lambda: WeightedRewards([PairReward(), _token_linear("sigmoid", "mean")], [0.5, -2.0]),
    "sequence classifier, last token": lambda: _sequence_classifier("last"),
    "sequence classifier, end of sequence": lambda: _sequence_classifier("last", append_eos=True),
    "sequence classifier, mean": lambda: _sequence_classifier("mean"),
    "function": _function,
    "repetition": lambda: RepetitionPenalty(n=1),
    "bleu": lambda: BleuReward(max_ngram_order=2),
    "bleu, add-k": lambda: BleuReward(smooth_method="add-k", eos_ids=[EOS]),
    "rouge1": lambda: RougeReward(rouge_type="rouge1"),
    "rouge2": lambda: RougeReward(rouge_type="rouge2", measure="recall"),
    "rougeL": lambda: RougeReward(rouge_type="rougeL"),
    "likelihood": lambda: _likelihood(LikelihoodReward),
    "target likelihood": lambda: _likelihood(TargetLikelihoodReward, baseline=True, separator="w20"),
    "aligned classifier": _aligned_classifier,
    "similarity": _similarity,
    "discriminator": _discriminator,
    "nontoxic": _nontoxic,
    "length": LengthReward,
    "length, target": lambda: LengthReward(target=3.5, scale=2.0),
}
# These look at few of the weights, and length only at what ends a text: there is no gradient with hard stopping.
REWARDS_OF_FEW_WEIGHTS = (
    "repetition", "bleu", "bleu, add-k", "rouge1", "rouge2", "rougeL", "aligned classifier", "similarity",
    "discriminator", "nontoxic", "length", "length, target",
)  # fmt: skip
REWARDS_OF_SURVIVAL_ALONE = ("length", "length, target")

# Estimators of language models, as recipes name them: `softrl.studies.methods` makes them.
ALL_ESTIMATORS = {
    "REINFORCE": "reinforce",
    "REINFORCE, running mean": "reinforce_running_mean",
    "REINFORCE, learned value": "reinforce_value",
    "RLOO": "rloo",
    "GRPO": "grpo",
    "GRPO without scaling": {"name": "grpo", "scale_rewards": "none", "normalization": "sum"},
    "Dr. GRPO": "dr_grpo",
    "PPO, lambda 1": {"name": "ppo", "gae_lambda": 1.0},
    "PPO, lambda 0.5": {"name": "ppo", "gae_lambda": 0.5, "normalization": "token_mean"},
    "softmax": "softmax",
    "Gumbel-softmax": "gumbel_softmax",
    "straight-through": "straight_through",
    "ST-Gumbel": "st_gumbel",
    "ST-Gumbel, one hop": {"name": "st_gumbel", "hops": 1},
    "Gumbel-Rao": {"name": "gumbel_rao", "num_draws": 4},
    "ReinMax": "reinmax",
    "control variate": {"name": "pathwise_control_variate", "hops": 1},
    "control variate, regression": {"name": "pathwise_control_variate", "hops": 0, "coefficient": "regression"},
    "combined": {"name": "combined", "weight": 0.5},
    "policy gradient on soft tokens": "soft_score",
}
