"""`SoftARTrainer`: its steps and evaluations by hand, exact resumption, and its models as policies of a reward."""

import copy

import pytest
import torch
from contexts.test_soft_ar import soft_ar
from datasets import Dataset
from helpers import V, gpt2, llama
from torch import nn
from trainers.test_architectures import ATTENTION, rise
from trainers.tiny import logs_of, numbers_of, parameters_of, word_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from softrl.contexts.soft_ar import SoftARForCausalLM
from softrl.contexts.soft_ar_config import SoftARConfig
from softrl.contexts.window import WindowLayout
from softrl.models.policy import Policy
from softrl.models.reasoner import ReasonerForCausalLM
from softrl.models.reasoner_config import ReasonerConfig
from softrl.objectives.learned_collapse import collapse_errors
from softrl.trainers import SoftARTrainer, SoftARTrainingConfig, soft_ar_trainer
from softrl.types import Texts

pytestmark = pytest.mark.slow  # imports trl

WINDOW = {"num_segments": 1, "segment_tokens": 3, "num_hard": 3, "num_soft": 2}  # as "soft" of the model's tests


def texts(count=8, seed=0, length=None):
    """Rows of 3 to 14 tokens, or of one length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length or 3 + (5 * row) % 12 for row in range(count)]
    return Dataset.from_list(
        [{"input_ids": torch.randint(3, V, (length,), generator=generator).tolist()} for length in lengths]
    )


def trainer(folder, model=None, train=None, evaluation=None, float32=False, **settings):
    """With SGD at a learning rate that shows, in float64."""
    defaults = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "learning_rate": 0.05, "warmup_steps": 0,
        "lr_scheduler_type": "constant", "optim": "sgd", "max_steps": 3, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0,
    }  # fmt: skip
    model = soft_ar() if model is None else model
    model = soft_ar() if model is None else model
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return SoftARTrainer(
        model.float() if float32 else model, SoftARTrainingConfig(str(folder), **{**defaults, **WINDOW, **settings}),
        texts() if train is None else train, texts(2, seed=1) if evaluation is None else evaluation, word_tokenizer(),
    )  # fmt: skip


def nll_by_hand(model, ids, **settings):
    """Of tokens 2..T of one row."""
    logits = model(torch.tensor([ids]), **settings).logits[0, :-1]
    return -logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def without_slots(model):
    """The same model, with a window that truncates."""
    layout = WindowLayout(0, 1, 3, 2, aggregate=False)
    other = SoftARForCausalLM.from_backbone(gpt2(), layout)
    other.model.backbone.load_state_dict(model.model.backbone.state_dict())
    return other.eval()


def test_a_step_is_gradient_descent_on_the_mean_over_tokens(tmp_path):
    made = trainer(tmp_path, per_device_train_batch_size=8, max_steps=1, learning_rate=0.3)
    model = copy.deepcopy(made.model)
    made.train()
    loss = torch.cat([nll_by_hand(model, ids) for ids in texts()["input_ids"]]).mean()
    assert logs_of(made, "nll") == pytest.approx([loss.item()])
    assert logs_of(made, "num_tokens") == [sum(map(len, texts()["input_ids"]))]
    model.zero_grad()
    loss.backward()
    moved = {name: (p - 0.3 * p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}
    assert "model.place_types" in moved
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), moved[name], msg=name)


def test_tokens_that_do_not_count_are_read_and_not_predicted(tmp_path):
    rows = texts(4, length=9).add_column("completion_mask", [[0] * 6 + [1] * 3] * 4)
    made = trainer(tmp_path, train=rows, evaluation=rows, max_steps=1)
    expected = torch.stack([nll_by_hand(made.model, ids)[5:] for ids in rows["input_ids"]])
    assert made.evaluate()["eval_nll"] == pytest.approx(expected.mean().item())
    made.train()
    assert logs_of(made, "nll") == pytest.approx([expected.mean().item()])


def test_texts_of_which_nothing_counts_cannot_be_measured(tmp_path):
    rows = texts(3, length=9).add_column("completion_mask", [[1] + [0] * 8] * 3)
    with pytest.raises(ValueError, match=r"none of the 3 texts of eval_dataset has a token that counts"):
        trainer(tmp_path, evaluation=rows).evaluate()


def test_an_evaluation_by_hand(tmp_path):
    """Two texts, so that each gets the other's memory."""
    rows = texts(2, seed=3, length=14)
    made = trainer(tmp_path, evaluation=rows)
    model, ids = made.model.eval(), rows["input_ids"]
    found = made.evaluate()
    with torch.no_grad():
        own = torch.cat([nll_by_hand(model, row) for row in ids])
        plain = without_slots(model)
        truncated = torch.cat([nll_by_hand(plain, row) for row in ids])
        swapped = model(torch.tensor(ids), memory_of=torch.tensor([1, 0])).logits[:, :-1].log_softmax(-1)
        permuted = -swapped.gather(-1, torch.tensor(ids)[:, 1:, None])[..., 0].flatten()
    position = torch.arange(13).repeat(2)
    beyond = position >= 5  # predicted from the sixth token on
    for name, values in (("nll", own), ("nll_truncated", truncated), ("nll_permuted", permuted)):
        assert found[f"eval_{name}"] == pytest.approx(values.mean().item())
        assert found[f"eval_{name}_beyond"] == pytest.approx(values[beyond].mean().item())
    assert len({round(found[f"eval_nll{way}_beyond"], 6) for way in ("", "_truncated", "_permuted", "_soft")}) == 4
    for name, other in (("gain_truncated", truncated), ("gain_permuted", permuted)):
        gains = torch.stack([(other - own)[beyond & (torch.arange(26) // 13 == row)].mean() for row in range(2)])
        assert found[f"eval_{name}"] == pytest.approx(gains.mean().item())
        assert found[f"eval_{name}_se"] == pytest.approx(abs(gains[0] - gains[1]).item() / 2.0)
    second = (position >= 5) & (position < 7)
    assert found["eval_window_1/nll"] == pytest.approx(own[second].mean().item())
    assert found["eval_window_1/nll_truncated"] == pytest.approx(truncated[second].mean().item())
    assert found["eval_perplexity_beyond"] == pytest.approx(own[beyond].mean().exp().item())
    assert found["eval_tokens_beyond"] == beyond.sum().item()
    logits = torch.cat([model(torch.tensor([row])).logits[0, :-1] for row in ids])
    hits = logits.argmax(-1) == torch.tensor(ids)[:, 1:].flatten()
    assert found["eval_accuracy_beyond"] == pytest.approx(hits[beyond].double().mean().item())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert found["eval_num_parameters"] == sum(sizes.values())
    inside = sum(sizes.values()) - sizes["model.backbone.wte.weight"]  # the head is tied to it
    assert found["eval_num_parameters_without_embeddings"] == inside


def test_a_short_text_lends_its_memory_as_far_as_it_goes(tmp_path):
    """Beyond that a text is read without any, which is no test of memory: such tokens do not count."""
    ids = [texts(1, 3, 14)["input_ids"][0], texts(1, 4, 6)["input_ids"][0]]
    made = trainer(tmp_path, evaluation=Dataset.from_dict({"input_ids": ids}))
    model = made.model.eval()
    rows = torch.tensor([ids[0], ids[1] + [2] * 8])
    with torch.no_grad():
        logits = model(rows, torch.arange(14) < torch.tensor([[14], [6]]), memory_of=torch.tensor([1, 0])).logits
    permuted = -logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    own = nll_by_hand(model, ids[0])
    found = made.evaluate()
    # Windows of five tokens move on by two: the third begins at 4, the fourth at 6, where the short text has ended.
    counted = torch.cat([permuted[0, :9], permuted[1, :5]])
    assert found["eval_nll_permuted"] == pytest.approx(counted.mean().item())
    assert found["eval_nll_permuted_beyond"] == pytest.approx(permuted[0, 5:9].mean().item())
    assert found["eval_nll_beyond"] == pytest.approx(own[5:].mean().item())
    assert "eval_gain_permuted" not in found  # of one text there is no standard error


def test_beyond_begins_where_it_is_said(tmp_path):
    """Arms of a sweep whose windows differ in size count the same tokens."""
    rows = texts(2, seed=3, length=14)
    made = trainer(tmp_path, evaluation=rows, eval_beyond_tokens=8)
    own = torch.stack([nll_by_hand(made.model.eval(), ids) for ids in rows["input_ids"]])
    found = made.evaluate()
    assert found["eval_nll_beyond"] == pytest.approx(own[:, 8:].mean().item())
    assert found["eval_tokens_beyond"] == 10
    assert found["eval_window_1/nll"] == pytest.approx(own[:, 5:7].mean().item())
    with pytest.raises(ValueError, match="eval_beyond_tokens=4 is inside the window, whose first 5 tokens"):
        trainer(tmp_path, eval_beyond_tokens=4)


@pytest.mark.parametrize("named", [False, True])
def test_beyond_that_no_text_reaches_is_refused(tmp_path, named):
    rows = texts(2, seed=3, length=14)  # the last token is predicted from 13
    other = {"short": texts(2, length=14), "long": texts(2, length=30)} if named else rows
    assert trainer(tmp_path, evaluation=rows, eval_beyond_tokens=12).evaluate()["eval_tokens_beyond"] == 2
    for beyond in (13, float("inf")):
        with pytest.raises(ValueError, match=r"eval_beyond_tokens=(13|inf) is reached by no text.*from 13 tokens"):
            trainer(tmp_path, evaluation=other, eval_beyond_tokens=beyond)
    with pytest.raises(ValueError, match="eval_beyond_tokens=nan is inside the window"):
        trainer(tmp_path, evaluation=rows, eval_beyond_tokens=float("nan"))
    made = trainer(tmp_path, evaluation=texts(2, length=14), eval_beyond_tokens=9)
    with pytest.raises(ValueError, match=r"reached by no text of eval_dataset, whose predictions .* from 7 tokens"):
        made.evaluate(texts(2, length=8))
    masked = rows.add_column("completion_mask", [[1] * 8 + [0] * 6] * 2)
    with pytest.raises(ValueError, match="predictions that count are from 7 tokens at most"):
        trainer(tmp_path, evaluation=masked, eval_beyond_tokens=9).evaluate()


def test_it_is_said_that_nobody_lends_memory(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(soft_ar_trainer.logger, "warning_once", said.append)
    rows = texts(2, length=14)
    assert "eval_nll_permuted" in trainer(tmp_path, evaluation=rows).evaluate()
    trainer(tmp_path, without_slots(soft_ar()), evaluation=rows, per_device_eval_batch_size=1).evaluate()
    assert not said
    assert "eval_nll_permuted" not in trainer(tmp_path, evaluation=rows, per_device_eval_batch_size=1).evaluate()
    assert "eval_nll_permuted" not in trainer(tmp_path, evaluation=texts(1, length=14)).evaluate()
    assert len(said) == 2
    assert "no metrics _permuted; raise per_device_eval_batch_size to 2 or more" in said[0]


def test_what_is_fed_soft_is_what_an_evaluation_measures(tmp_path):
    made = trainer(
        tmp_path, evaluation=texts(2, seed=3, length=14), max_steps=1, soft_share=1.0, train=texts(2, 3, 14)
    )
    found = made.evaluate()
    made.train()
    assert logs_of(made, "nll") == pytest.approx([found["eval_nll_soft"]])
    assert abs(found["eval_nll_soft"] - found["eval_nll"]) > 1e-3


def test_a_window_without_slots_has_one_nll_under_three_names(tmp_path):
    made = trainer(tmp_path, without_slots(soft_ar()))
    found = made.evaluate()
    assert found["eval_nll_beyond"] == found["eval_nll_truncated_beyond"] == found["eval_nll_permuted_beyond"]


def test_texts_that_are_read_without_memory(tmp_path):
    rows = texts(4, length=12)
    made = trainer(tmp_path, train=rows, max_steps=1, memory_dropout=1.0)
    plain = without_slots(made.model)
    expected = torch.cat([nll_by_hand(plain, ids) for ids in rows["input_ids"]]).mean()
    made.train()
    assert logs_of(made, "nll") == pytest.approx([expected.item()])


@pytest.mark.parametrize("output", ["tokens", "embedding"])
def test_micro_batches_change_nothing(tmp_path, output):
    parameters = []
    for number, size in ((1, 4), (2, 2)):
        made = trainer(
            tmp_path, soft_ar(output=output), texts(8, length=10), per_device_train_batch_size=size,
            gradient_accumulation_steps=number, soft_share=0.5, output=output, learning_rate=1e-3,
            regression_weight=float(output == "embedding"),
        )  # fmt: skip
        made.train()
        parameters.append(parameters_of(made))
    torch.testing.assert_close(*parameters)


def test_a_run_goes_on_exactly(tmp_path):
    """In float32, with everything that is drawn."""
    settings = {
        "float32": True, "optim": "adamw_torch", "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
        "soft_share": "linear:0->1", "memory_dropout": 0.5,
    }  # fmt: skip
    straight, resumed = (trainer(tmp_path, **settings) for _ in range(2))
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logs_of(straight, "soft_share") == [0.0, 0.25, 0.5, 0.75]
    assert numbers_of(resumed)[-2:] == numbers_of(straight)[-2:]
    torch.testing.assert_close(parameters_of(resumed), parameters_of(straight), rtol=0.0, atol=0.0)


def test_a_head_for_collapses_is_fitted_beside_the_model(tmp_path):
    """Its loss by `collapse_errors`; the model itself moves as it does without one."""
    rows, moved = texts(4, length=9), {}
    for weight in (0.0, 0.7):
        made = trainer(tmp_path, train=rows, max_steps=1, collapse_head_weight=weight)
        model = copy.deepcopy(made.model)
        made.train()
        moved[weight] = dict(made.model.named_parameters())
    ids = torch.tensor(rows["input_ids"])
    errors = collapse_errors(Policy(model), model.collapse_head, Texts(ids, torch.ones_like(ids).bool()))
    assert logs_of(made, "collapse_error") == pytest.approx([errors.mean().item()])
    (grad,) = torch.autograd.grad(errors.mean(), model.collapse_head.layers.weight)
    expected = model.collapse_head.layers.weight - 0.05 * 0.7 * grad
    torch.testing.assert_close(moved[0.7]["collapse_head.layers.weight"], expected)
    assert not any("collapse" in name for name in moved[0.0])
    for name, parameter in moved[0.0].items():
        torch.testing.assert_close(moved[0.7][name], parameter, msg=name)
    assert made.evaluate()["eval_collapse_error"] > 0.0


def test_a_causal_lm_gets_the_window_and_what_is_saved_trains_on(tmp_path):
    made = trainer(tmp_path, llama(), normalisation="learned", slot_order="aggregate_last", stride=1)
    layout = WindowLayout(**WINDOW, order=("segments", "aggregate"), normalisation="learned", stride=1)
    assert made.model.model.layout == layout
    made.train()
    made.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "soft-ar" in card
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64").eval()
    assert again.model.layout == layout
    ids = torch.tensor(texts(2, length=14)["input_ids"])
    torch.testing.assert_close(again(ids).logits, made.model.eval()(ids).logits, rtol=1e-6, atol=1e-6)
    on = trainer(tmp_path / "on", str(tmp_path), model_init_kwargs={"dtype": "float64"})
    assert on.model.model.layout == layout  # and not that of its arguments
    assert on.evaluate()["eval_nll"] == pytest.approx(made.evaluate()["eval_nll"], rel=1e-6)


def test_a_reward_trains_it_on_prompts_longer_than_its_window(tmp_path):
    """Prompts of 9 to 15 tokens and a window of 4: rewards go through memory slots too."""
    backbone = LlamaConfig(**ATTENTION).to_dict()
    window = {"num_segments": 1, "segment_tokens": 4, "num_hard": 4, "num_soft": 0}
    config = SoftARConfig(backbone_config=backbone, window=window)
    change, error = rise(tmp_path, word_tokenizer(vocab_size=40), config, lengths=(9, 11, 15))
    assert change > 10.0 * error
    assert change > 0.8  # as for the models without a window


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            ("gpt2", "soft", "tokens"),
            {"output": "embedding", "regression_weight": 1.0, "cross_entropy_weight": 0.0},
            "regression_weight=1.0 is of a vector that is put out, and the model has output='tokens' already",
        ),
        (
            ("gpt2", "hard", "tokens"),
            {"soft_share": "linear:0->0.5"},
            "soft_share='linear:0->0.5' needs a soft region, and the model's window has num_soft=0 already",
        ),
    ],
)
def test_a_model_with_a_window_is_not_asked_for_what_it_has_not(tmp_path, model, settings, message):
    """Once such a run ended as if it had trained."""
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, soft_ar(*model), **settings)


def test_settings_of_a_window_that_a_model_does_not_get_are_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(soft_ar_trainer.logger, "warning", said.append)
    trainer(tmp_path, soft_ar())
    assert said == []
    trainer(tmp_path, soft_ar(), num_hard=7, slot_order="aggregate_last", output="embedding", distance_temperature=5.0)
    (warning,) = said
    assert "num_hard=7 (it has 3), order=('segments', 'aggregate') (it has ('aggregate', 'segments'))" in warning
    assert "output='embedding' (it has 'tokens')" in warning
    assert "distance_temperature=5.0 (it has 0.2)" in warning
    assert "num_soft" not in warning


def test_a_model_that_reads_no_embeddings_is_refused(tmp_path):
    config = ReasonerConfig(vocab_size=V, base_lm_size=8, reasoner_size=8, interpreter_size=8)
    with pytest.raises(TypeError, match="ReasonerForCausalLM has no parallel forward over inputs_embeds"):
        trainer(tmp_path, ReasonerForCausalLM(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True is not for windows"),
        ({"output": "words"}, "output must be one of tokens, embedding, got 'words'"),
        ({"core": "lstm"}, "core must be one of transformer, gru, got 'lstm'"),
        ({"slot_order": "newest"}, "slot_order must be one of aggregate_first, aggregate_last, got 'newest'"),
        ({"regression_weight": 1.0}, "is of a vector that is put out; pass output='embedding'"),
        ({"soft_share": 0.5, "num_soft": 0}, "soft_share=0.5 needs a soft region; pass num_soft"),
        ({"soft_share": "linear:0->2"}, r"soft_share is a share and must lie in \[0, 1\], got 'linear:0->2'"),
        ({"memory_dropout": 1.5}, r"memory_dropout is a share and must lie in \[0, 1\], got 1.5"),
        ({"cross_entropy_weight": 0.0}, "one of them positive, got"),
        ({"stride": 9}, "stride must be a whole number, from 1 to num_hard"),
        ({"cross_entropy_weight": float("nan")}, "must not be negative, and one of them positive, got"),
        ({"collapse_head_weight": -1.0}, "collapse must not be negative, and a finite number, got -1.0"),
        ({"distance_temperature": -1.0}, "distance_temperature must be positive and finite, got -1.0"),
        ({"distance_temperature": float("inf")}, "distance_temperature must be positive and finite, got inf"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"block_length_tokens": 0}, "block_length_tokens must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SoftARTrainingConfig(str(tmp_path), use_cpu=True, **{**WINDOW, **settings})


def test_adapters_are_refused(tmp_path):
    from peft import LoraConfig

    args = SoftARTrainingConfig(str(tmp_path), use_cpu=True, **WINDOW)
    with pytest.raises(ValueError, match="trains a model whole, since its memory slots are new to every layer"):
        SoftARTrainer(llama(), args, texts(), peft_config=LoraConfig())
