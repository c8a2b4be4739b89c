"""The latent reasoner: a language model that thinks in latents after every token of a text.

Four modules, each a recurrent core or a small transformer, some of which may share weights: the *base LM* reads the
text; the *base reasoner* reads it too, and from its state the *reasoner* goes on: it is fed a learned start and then
its own latents, and says how each of them is distributed; the *interpreter* reads the text and, after every token, the
latents thought there. What base LM and interpreter predict is mixed, `p = (1 − w) p_base + w p_interpreter`, with
`w = σ(MLP[h_base; h_interpreter])`.

Every position thinks, S times, and predicts the next token: position t sees tokens 1..t alone. Random numbers belong
to a row and a position, see `uniforms`. Axes: N texts, T tokens, S thoughts, n latents, V vocabulary, D width.
Left out: objectives (`softrl.estimators`), caches between calls.
Source: ours; Quiet-STaR (Zelikman et al. 2024, arXiv:2403.09629) with the thought as a latent state.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init

from softrl.models.branches import read_texts
from softrl.models.heads import ValueHead
from softrl.models.latents import CodebookLatent, make_latent
from softrl.models.policy import Policy
from softrl.models.reasoner_config import ReasonerConfig
from softrl.models.reasoner_output import ReasonerOutput, scored
from softrl.models.reasoner_parts import ReaderCore, lm_head, log_mean_exp, projection
from softrl.models.state import positions
from softrl.models.text_state import TextState
from softrl.models.thinking import MixingHead
from softrl.tokens.noise import SequenceRandom, sequence_seed


@dataclass(frozen=True)
class ReadTexts:
    """What the cores have read of N texts, by the letter of their group; computed once and thought from often."""

    hidden: dict[str, Float[Tensor, "N T D"]]
    states: dict[str, TextState]
    positions: Int[Tensor, "N T"]


@dataclass(frozen=True)
class LatentThoughts:
    """S thoughts after every token of N texts.

    `values` are the latents (codes, vectors or log-weights; see `softrl.models.latents`), `embeds` what they are fed
    as, `outputs` the numbers of every latent's distribution. `log_probs` are of the values as constants; `entropy` is
    that of each latent given those before it. Both are nats and carry the reasoner's graph.
    """

    values: Tensor  # N T S n, and a value's own axes
    embeds: Float[Tensor, "N T S n D"]
    outputs: Float[Tensor, "N T S n P"]
    log_probs: Float[Tensor, "N T S n"]
    entropy: Float[Tensor, "N T S n"]


class ReasonerPreTrainedModel(PreTrainedModel):
    """Common part: configuration, and how weights begin. Cores begin as their own classes say."""

    config_class = ReasonerConfig
    base_model_prefix = "cores"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, 0.0, module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, CodebookLatent):
            init.normal_(module.codebook, 0.0, 1.0)
        elif isinstance(module, ReasonerForCausalLM) and module.config.use_reasoner:
            init.normal_(module.start, 0.0, 1.0)


class ReasonerForCausalLM(ReasonerPreTrainedModel, GenerationMixin):
    """See the top of this file.

    Attributes:
        cores: by the letter of a group, each once: `num_parameters` and checkpoints count what is shared once.
        latent: what is thought in; the model has no such part without a reasoner.
    """

    mixing: Any  # to a type checker every attribute of an nn.Module is a Tensor or a Module
    latent: Any
    log_z: Any
    start: nn.Parameter

    def __init__(self, config: ReasonerConfig):
        super().__init__(config)
        sizes = {config.group_of(name): config.size_of(name) for name in config.modules}
        self.cores = nn.ModuleDict({letter: ReaderCore(config, sizes[letter]) for letter in sorted(sizes)})
        head_width = config.base_lm_size if config.use_base_lm else config.interpreter_size
        shares = config.share_lm_head or not config.use_base_lm
        self.head = lm_head(config, head_width)
        self.interpreter_head = None if shares else lm_head(config, config.interpreter_size)
        self.to_head = projection(config.interpreter_size, head_width) if shares else nn.Identity()
        if config.use_base_lm:
            self.mixing = MixingHead(
                config.base_lm_size, config.mixing_width, False, config.interpreter_size, normalised=False
            )
        if config.use_reasoner:
            width = config.reasoner_size
            self.latent = make_latent(
                config.latent_kind, width, config.num_latents, config.latent_size, config.latent_temperature,
                config.latent_noise, (config.min_log_sigma, config.max_log_sigma),
            )  # fmt: skip
            self.latent_head = nn.Linear(width, self.latent.num_outputs)
            self.start = nn.Parameter(torch.randn(width))
            self.to_interpreter = projection(width, config.interpreter_size)
            self.log_z = ValueHead(width) if config.learns_log_z else None
        self.post_init()
        self._zero_heads()
        self._drop_unread_embeddings()

    @torch.no_grad()
    def _zero_heads(self) -> None:
        """As their classes begin; transformers' `post_init` visits their layers alone, and redraws those."""
        heads = [self.mixing.last] if self.config.use_base_lm else []
        if self.config.use_reasoner and self.log_z is not None:
            heads.append(self.log_z.linear)
        for head in heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def _drop_unread_embeddings(self) -> None:
        """Those of a reasoner that shares with nobody: it is fed `start` and latents alone.

        After weights have been drawn, so that what the other modules begin with is the same with and without them.
        """
        letter = self.config.group_of("reasoner")
        if self.config.use_reasoner and all(
            self.config.group_of(name) != letter for name in self.config.modules if name != "reasoner"
        ):
            core: Any = self.cores[letter]
            core.decoder.set_input_embeddings(None)

    def get_input_embeddings(self) -> nn.Module:
        """The interpreter's token embeddings: every model has one."""
        core: Any = self.cores[self.config.group_of("interpreter")]
        return core.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: heads may have two layers, and are not to be tied."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """What transformers calls for tokens that were added to a tokenizer.

        Raises:
            ValueError: always: every core has embeddings of its own, and heads have no rows that transformers knows.
        """
        raise ValueError(
            f"a reasoner's vocabulary of {self.config.vocab_size} tokens is that of all its cores and heads and "
            "cannot be resized; make a new model, ReasonerForCausalLM(ReasonerConfig(vocab_size=...))"
        )

    def _policy(self, module: str) -> Policy:
        return Policy(self.cores[self.config.group_of(module)])

    def read(self, input_ids: Int[Tensor, "N T"], attention_mask: Tensor | None = None) -> ReadTexts:
        """Let every core that reads texts read them, once for all modules of its group.

        Raises:
            ValueError: texts and thoughts are longer than the window of a transformer.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check_length(mask)
        hidden, states = {}, {}
        for module in self.config.modules:
            letter = self.config.group_of(module)
            if module != "reasoner" and letter not in states:
                policy = self._policy(module)
                states[letter] = read_texts(policy, "shared", len(input_ids), input_ids.device)
                hidden[letter] = states[letter].extend(policy.embed(input_ids), mask.bool())
        return ReadTexts(hidden, states, positions(mask.bool()))

    def _check_length(self, mask: Tensor) -> None:
        longest = int(mask.sum(-1).max()) if mask.numel() else 0
        if self.max_text_tokens is not None and longest > self.max_text_tokens:
            raise ValueError(
                f"a text of {longest} tokens is longer than the {self.max_text_tokens} that max_position_embeddings="
                f"{self.config.max_position_embeddings} of this transformer leaves beside a thought; shorten the "
                "texts (max_length), or make a model for longer ones (block_length_tokens)"
            )

    @property
    def max_text_tokens(self) -> int | None:
        """Tokens of the longest text that can be read and thought about; None for a GRU, which reads any."""
        thought = self.config.n_thought if self.config.use_reasoner else 0
        return self.config.max_position_embeddings - thought if self.config.core == "transformer" else None

    def uniforms(
        self, where: Int[Tensor, "N T"], num_thoughts: int, seed: int, row_ids: list[int]
    ) -> Float[Tensor, "N T S n U"]:
        """Random numbers of [0, 1), on which a row's length, its padding and the rows beside it have no influence.

        Args:
            where: position ids.
            num_thoughts: S.
            seed, row_ids: key of every row's stream: (seed, row id).
        """
        per_position = (num_thoughts, self.config.n_thought, self.latent.num_uniforms)
        size = where.shape[1] * per_position[0] * per_position[1] * per_position[2]
        random = SequenceRandom([sequence_seed(seed, row) for row in row_ids])
        drawn = random.uniform(size).view(len(where), where.shape[1], size // where.shape[1]).to(where.device)
        at_position = drawn.gather(1, where[..., None].expand_as(drawn))
        return at_position.unflatten(2, per_position)

    def think(
        self,
        texts: ReadTexts,
        uniforms: Float[Tensor, "N T S n U"] | None = None,
        reparameterised: bool = False,
        values: Tensor | None = None,
    ) -> LatentThoughts:
        """Think after every token.

        Args:
            texts: what was read.
            uniforms: see there; S is theirs.
            reparameterised: draw values as differentiable functions of the reasoner.
            values: given latents [N, T, S, n, ...] to be scored, instead of random numbers.
        Raises:
            ValueError: reparameterised discrete latents, neither or both of uniforms and values.
        """
        given = uniforms if values is None else values
        if given is None or (uniforms is not None and values is not None):
            raise ValueError("think needs random numbers to draw latents with, or latents to score: pass one of them")
        num_thoughts, length = given.shape[2:4]
        anchors = self._anchors(texts, num_thoughts)
        before = texts.states[self.config.group_of("base_reasoner")]
        branches = before.handed_to(self._policy("reasoner")).branch(anchors)
        shape = (*texts.positions.shape, num_thoughts)
        draw = self.latent.rsample if reparameterised else self.latent.sample
        fed = self.start.expand(*anchors.shape, 1, -1)
        steps: list[tuple[Tensor, ...]] = []
        for index in range(length):
            hidden = branches.advance(fed)[:, :, -1].unflatten(1, shape[1:])
            outputs = self.latent_head(hidden)
            value = given[:, :, :, index] if uniforms is None else draw(outputs, given[:, :, :, index])
            embed = self.latent.embed(value)
            log_probs = self.latent.log_prob(outputs, value.detach())  # a constant: paths are `rsample`'s business
            steps.append((value, embed, outputs, log_probs, self.latent.entropy(outputs)))
            fed = embed.flatten(1, 2)[:, :, None]
        if not steps:
            return self._no_thoughts(shape)
        return LatentThoughts(*(torch.stack(parts, 3) for parts in zip(*steps, strict=True)))

    def _no_thoughts(self, shape: tuple[int, ...]) -> LatentThoughts:
        outputs = self.start.new_zeros(*shape, 0, self.latent.num_outputs)
        values = self.latent.sample(outputs, outputs.new_zeros(*shape, 0, self.latent.num_uniforms))
        log_probs, spread = self.latent.log_prob(outputs, values), self.latent.entropy(outputs)
        return LatentThoughts(values, self.latent.embed(values), outputs, log_probs, spread)

    @staticmethod
    def _anchors(texts: ReadTexts, num_thoughts: int) -> Int[Tensor, "N L"]:
        """Every slot S times, thoughts of a slot side by side."""
        where = texts.positions
        return torch.arange(where.shape[1], device=where.device).repeat_interleave(num_thoughts).expand(len(where), -1)

    def interpreted(self, texts: ReadTexts, embeds: Float[Tensor, "N T S n D"]) -> Float[Tensor, "N T S D2"]:
        """The interpreter's state after every token and each thought there."""
        letter, num_thoughts = self.config.group_of("interpreter"), embeds.shape[2]
        if embeds.shape[3] == 0:
            return texts.hidden[letter][:, :, None].expand(-1, -1, num_thoughts, -1)
        branches = texts.states[letter].branch(self._anchors(texts, num_thoughts))
        hidden = branches.advance(self.to_interpreter(embeds).flatten(1, 2))[:, :, -1]
        return hidden.unflatten(1, (-1, num_thoughts))

    def talk(self, texts: ReadTexts, hidden: Float[Tensor, "N T S D"]) -> dict[str, Tensor]:
        """What is predicted after thoughts: `talk_log_probs` and its parts, see `ReasonerOutput`."""
        head = self.head if self.interpreter_head is None else self.interpreter_head
        of_thought = head(self.to_head(hidden)).log_softmax(-1)
        if not self.config.use_base_lm:
            return {"talk_log_probs": of_thought, "interpreter_log_probs": of_thought}
        base_hidden = texts.hidden[self.config.group_of("base_lm")]
        base = self.head(base_hidden).log_softmax(-1)
        score = self.mixing(base_hidden[:, :, None].expand(*hidden.shape[:3], -1), hidden)[..., None]
        log_share, log_rest = (nn.functional.logsigmoid(each) for each in (score, -score))
        mixed = torch.logaddexp(log_rest + base[:, :, None], log_share + of_thought)
        return {
            "talk_log_probs": mixed, "interpreter_log_probs": of_thought, "base_log_probs": base,
            "mixing": score.squeeze(-1).sigmoid(),
        }  # fmt: skip

    def forward(
        self,
        input_ids: Int[Tensor, "N T"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "N T"] | None = None,
        num_thoughts: int | None = None,
        seed: int | None = None,
        row_ids: list[int] | None = None,
        reparameterised: bool = False,
        values: Tensor | None = None,
        with_logits: bool = True,
        **ignored: Any,
    ) -> ReasonerOutput:
        """Read, think and predict at every position.

        Args:
            input_ids, attention_mask: texts, padded on either side.
            labels: as transformers': position t's label is predicted at t − 1; −100 does not count.
            num_thoughts: S; None for the configuration's.
            seed: of the thoughts; None draws one from torch's global state.
            row_ids: what distinguishes rows with the same seed; None for 0, 1, ... With (seed, row id) the same, a row
                gives the same numbers alone and in any batch, padded or not.
            reparameterised: thoughts are differentiable functions of the reasoner (not discrete ones).
            values: latents to score instead of thinking, [N, T, S, n, ...].
            with_logits: average predictions over thoughts; training, which reads `rewards`, saves it.
            ignored: what `generate` passes.
        Raises:
            ValueError: what `think` raises, or row_ids of another number of rows.
        """
        texts = self.read(input_ids, attention_mask)
        found: dict[str, Tensor] = {}
        if self.config.use_reasoner:
            count = self.config.num_thoughts if num_thoughts is None else num_thoughts
            drawn = None if values is not None else self._drawn(texts, count, seed, row_ids)
            thoughts = self.think(texts, drawn, reparameterised, values)
            hidden = self.interpreted(texts, thoughts.embeds)
            found = self._of_thoughts(texts, thoughts)
        else:
            hidden = texts.hidden[self.config.group_of("interpreter")][:, :, None]
        found |= self.talk(texts, hidden)
        talk = found["talk_log_probs"]
        if with_logits:
            found["logits"] = log_mean_exp(talk, 2)
        if labels is not None:
            found |= scored(talk, labels, attention_mask)
        return ReasonerOutput(**found)

    def _drawn(self, texts: ReadTexts, count: int, seed: int | None, row_ids: list[int] | None) -> Tensor:
        if count < 1:
            raise ValueError(f"num_thoughts must be at least 1, got {count}; n_thought=0 thinks nothing")
        rows = list(range(len(texts.positions))) if row_ids is None else row_ids
        if len(rows) != len(texts.positions):
            raise ValueError(f"row_ids: expected one for each of {len(texts.positions)} texts, got {len(rows)}")
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        return self.uniforms(texts.positions, count, seed, rows)

    def _of_thoughts(self, texts: ReadTexts, thoughts: LatentThoughts) -> dict[str, Tensor]:
        context = texts.hidden[self.config.group_of("base_reasoner")]
        found = {
            "thought_log_probs": thoughts.log_probs.sum(-1), "thought_entropy": thoughts.entropy.sum(-1),
            "thought_values": thoughts.values, "thought_embeds": thoughts.embeds, "context": context,
        }  # fmt: skip
        return found if self.log_z is None else found | {"log_z": self.log_z(context)}

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        seed: int | None = 0,
        num_thoughts: int | None = None,
        row_ids: list[int] | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        """The whole text again for every token: nothing is cached between calls.

        Args:
            seed: of the thoughts, `generate(..., seed=...)`, the same at every step: what was thought of a token does
                not change as the text goes on.
            num_thoughts: S; None for the configuration's.
            row_ids: see `forward`, `generate(..., row_ids=[...])`: one for every row, samples of a prompt beside each
                other. None for the same in all rows, so that the likeliest text of a prompt does not hang on the rows
                around it, and beams are compared by the same thoughts.
            ignored: what `generate` passes.
        """
        return {
            "input_ids": input_ids, "attention_mask": attention_mask, "seed": seed, "num_thoughts": num_thoughts,
            "row_ids": [0] * len(input_ids) if row_ids is None else row_ids,
        }  # fmt: skip


# So that transformers' Auto classes load what was saved; whoever loads by them imports this module.
AutoConfig.register(ReasonerConfig.model_type, ReasonerConfig)
AutoModelForCausalLM.register(ReasonerConfig, ReasonerForCausalLM)
