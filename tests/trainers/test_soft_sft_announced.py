"""What announces soft tokens: vectors before the prompt, tokens around thoughts; trained, saved, generated with."""

import json

import pytest
import torch
from datasets import Dataset
from helpers import V, llama, with_float64_norms
from peft import LoraConfig, PeftModel
from trainers.soft_sft import SETTINGS, soft_sft, texts
from trainers.tiny import CHAT_TEMPLATE, logs_of, word_tokenizer
from transformers import AutoModelForCausalLM

from softrl.cli.generate import load, main
from softrl.cli.train import _with_completions
from softrl.cli.train import main as train
from softrl.generation.soft_settings import load_soft_decoding
from softrl.models.policy import Policy
from softrl.trainers import SoftSFTConfig

pytestmark = pytest.mark.slow  # imports trl

START, END = V, V + 1


def saved_base(folder):
    """A tiny model on disk, for adapters that name their base."""
    llama().float().save_pretrained(folder)
    word_tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    return str(folder)


def thinking(folder, **settings):
    rows = {"train": texts(kind="prompt"), "evaluation": texts(3, "prompt", seed=20)}
    return soft_sft(folder, think_tokens=True, **{**rows, **settings})


def naive_loss(model, batch, alpha, top_k=7):
    """PEFT's own forward, a text at a time, a whole forward at every token, one graph."""
    table, total, count = model.get_input_embeddings().weight, 0.0, 0
    for ids, present, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        ids, counts = ids[present], labels[present] != -100
        fed = table[ids[:1]]
        for true, counted in zip(ids[1:], counts[1:], strict=True):
            logits = model(inputs_embeds=fed[None]).logits[0, -1]
            embed = table[true]
            if counted:
                total, count = total + logits.log_softmax(-1)[true], count + 1
                values, kept = logits.topk(top_k)
                embed = alpha * embed + (1 - alpha) * values.softmax(-1) @ table[kept]
            fed = torch.cat([fed, embed[None]])
    return -total / count


@pytest.mark.parametrize("settings", [{}, {"cotangent_method": "sequential"}], ids=["auto", "sequential"])
def test_the_gradient_of_a_prefix_is_that_of_the_naive_loop_and_nothing_else_trains(tmp_path, settings):
    trainer = soft_sft(
        tmp_path, model=with_float64_norms(llama()), train=texts(kind="prompt"), soft_prefix_tokens=3,
        guidance_alpha=0.375, min_p=0.0, adjoint_tol=1e-12, **settings,
    )  # fmt: skip
    ((name, prefix),) = ((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert "prompt" in name
    assert prefix.shape == (3, 16)
    rows = trainer.model.get_input_embeddings().weight
    assert all(min((row - each).norm() for each in rows) < 1e-6 for row in prefix)  # they start as tokens
    prefix.data = prefix.data.double()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    (found,) = torch.autograd.grad(loss, [prefix])
    expected_loss = naive_loss(trainer.model, batch, 0.375)
    (expected,) = torch.autograd.grad(expected_loss, [prefix])
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-7)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_prefix_is_drawn_by_the_seed(tmp_path):
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))
        trainer = soft_sft(tmp_path, soft_prefix_tokens=2, seed=seed)
        drawn.append(next(p.detach().clone() for p in trainer.model.parameters() if p.requires_grad))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_saved_prefix_generates(tmp_path, capsys):
    base, folder = saved_base(tmp_path / "base"), tmp_path / "tuned"
    trainer = soft_sft(folder, model=base, train=texts(kind="prompt"), soft_prefix_tokens=3)
    trainer.train()
    trainer.save_model()
    prefix = trainer.model.get_prompt(1)
    model, _ = load(str(folder))
    assert isinstance(model, PeftModel)
    assert torch.equal(model.get_prompt(1), prefix)
    assert load_soft_decoding(folder).thinking.relaxation.truncation.top_k == 7
    written = {}
    capsys.readouterr()
    for name in (str(folder), base):
        command = ["--model", name, "--prompt", "w4 w5", "--max_new_tokens", "6", "--no_stream", "--soft_top_k", "7"]
        assert main(command) == 0
        written[name] = capsys.readouterr().out
    assert written[str(folder)].startswith("w4 w5")
    assert len(set(written.values())) == 2


def test_thoughts_are_put_between_the_tokens_and_the_rows_train(tmp_path):
    rows = {
        "prompt": ["w3 w4", "w5 <think>", "w6"] * 2, "completion": [" w7", " w8 w9", " w10 </think> w11"] * 2,
        "other": list(range(6)),
    }  # fmt: skip
    trainer = soft_sft(
        tmp_path, train=Dataset.from_dict(rows), evaluation={"a": texts(2, "prompt", seed=20)}, think_tokens=True,
        learning_rate=0.01,
    )  # fmt: skip
    assert trainer.train_dataset["input_ids"][:3] == [
        [3, 4, START, 7, END, 1], [5, START, 8, 9, END, 1], [6, START, 10, END, 11, 1],
    ]  # fmt: skip
    assert trainer.train_dataset["labels"][0] == [-100, -100, -100, 7, END, 1]
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    assert before.shape[0] == V + 2
    assert {"eval_a_soft_nll"} <= trainer.evaluate().keys()
    assert trainer.evaluate(texts(2, "prompt", seed=40))["eval_soft_nll"] > 0.0
    trainer.train()
    moved = (trainer.model.get_input_embeddings().weight - before).norm(dim=-1)
    assert moved[[START, END]].min() > 1e-4
    trainer.save_model()
    saved = load_soft_decoding(tmp_path)
    assert (saved.think_start, saved.think_end, saved.force_thinking) == ((START,), (END,), True)
    again = thinking(tmp_path / "again", model=str(tmp_path))
    assert again.model.config.vocab_size == V + 2  # they are there already


@pytest.mark.parametrize("lora", [False, True], ids=["model", "adapter"])
def test_a_model_taught_the_tokens_thinks_between_them(tmp_path, capsys, lora):
    base, folder = saved_base(tmp_path / "base"), tmp_path / "tuned"
    rows = Dataset.from_dict({"prompt": ["w3 w4"] * 4, "completion": [" w7 </think> w9"] * 4})
    adapter = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = soft_sft(
        folder, model=base, train=rows, evaluation=rows, think_tokens=True, guidance_alpha="linear:1.0->0.0@20",
        optim="adamw_torch", learning_rate=0.02, max_steps=40, top_k=3, max_grad_norm=1.0, peft_config=adapter,
    )  # fmt: skip
    trainer.train()
    assert logs_of(trainer, "loss")[-1] < 0.2
    trainer.save_model()
    model, tokenizer = load(str(folder))
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [START, END]
    ids = torch.tensor([[3, 4, START, 7]])
    ours = model(input_ids=ids).logits
    torch.testing.assert_close(ours, trainer.model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    output = tmp_path / "texts.jsonl"
    command = ["--model", str(folder), "--prompt", "w3 w4", "--max_new_tokens", "6", "--output_file", str(output)]
    assert main(command) == 0
    (line,) = (json.loads(each) for each in output.read_text().splitlines())
    assert line["tokens"][:4] == [START, 7, END, 9]
    assert line["is_soft"][:4] == [False, True, False, False]
    if not lora:
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert Policy(plain).vocab_size == V + 2
    capsys.readouterr()


def test_lora_trains_the_rows_of_the_tokens_and_no_other(tmp_path):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = thinking(tmp_path, peft_config=adapter)
    assert adapter.trainable_token_indices is None  # the caller's own stays as it is
    trained = {name: p.shape for name, p in trainer.model.named_parameters() if p.requires_grad}
    rows = {name: shape for name, shape in trained.items() if "lora" not in name}
    assert len(rows) == 1
    assert list(rows.values()) == [(2, 16)]
    before = trainer.model.get_input_embeddings()(torch.arange(V + 2)).detach().clone()
    trainer.train()
    moved = (trainer.model.get_input_embeddings()(torch.arange(V + 2)) - before).norm(dim=-1)
    assert moved[:V].max() == 0.0
    assert moved[V:].min() > 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: soft_sft(f, think_tokens=True), "train_dataset needs columns `prompt` and `completion` of text"),
        (lambda f: soft_sft(f, train=texts(kind="conversation"), think_tokens=True), "columns `prompt`"),
        (
            lambda f: soft_sft(f, train=texts(kind="prompt"), evaluation=texts(3), think_tokens=True),
            "eval_dataset needs columns",
        ),
        (
            lambda f: soft_sft(f, soft_prefix_tokens=2, peft_config=LoraConfig(target_modules=["q_proj"])),
            "soft_prefix_tokens=2 is an adapter of its own .* a LoraConfig",
        ),
        (lambda f: SoftSFTConfig(str(f), **SETTINGS, soft_prefix_tokens=-1), "soft_prefix_tokens must be at least 0"),
        (lambda f: SoftSFTConfig(str(f), **SETTINGS, soft_prefix_tokens=1, think_tokens=True), "soft_prefix_tokens=1"),
        (
            lambda f: SoftSFTConfig(str(f), **SETTINGS, freeze_embeddings=True, think_tokens=True),
            "freeze_embeddings=True keeps",
        ),
        (
            lambda f: soft_sft(
                f, train=texts(kind="prompt"), think_tokens=True,
                peft_config=LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]),
            ),
            "pass a LoraConfig without them",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        ["--think_tokens", "true"],
        ["--soft_prefix_tokens", "2"],
        ["--learned_settings", "max_entropy_nats", "top_k", "--max_entropy_nats", "1.0", "--use_peft", "true"],
    ],
    ids=lambda given: given[0],
)
def test_from_training_to_generation_by_commands(tmp_path, capsys, given):
    base, folder, rows = saved_base(tmp_path / "base"), tmp_path / "tuned", tmp_path / "rows.jsonl"
    lines = [{"prompt": f"w{3 + i} w4", "reference": f" w{5 + i} w7"} for i in range(8)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "trainer": "soft_sft", "model_name_or_path": base, "dtype": "float32", "dataset_name": str(rows),
        "output_dir": str(folder), "max_steps": 2, "top_k": 5, "report_to": "none", "save_strategy": "no",
        "per_device_train_batch_size": 2, "guidance_alpha": 0.3, "lora_target_modules": "all-linear",
    }  # fmt: skip
    command = [text for name, value in common.items() for text in (f"--{name}", str(value))]
    assert train(command + given) == 0, capsys.readouterr().err
    decoding = load_soft_decoding(folder)
    assert decoding.force_thinking == (given[0] == "--think_tokens")
    assert (decoding.thinking.relaxation.smooth is not None) == (given[0] == "--learned_settings")
    assert main(["--model", str(folder), "--prompt", "w3 w4", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out


def test_references_between_think_tokens_are_text_again():
    rows = Dataset.from_dict({"prompt": ["w3", "w4"], "reference": [[" w5", " w6"], [" w7"]]})
    found = _with_completions(rows, word_tokenizer(), "rows", as_text=True)
    assert found[:] == {"prompt": ["w3", "w4"], "completion": [" w5", " w7"]}
