"""The commands beside `train` on tiny models and files: what they write is what the next one reads."""

import json
import random

import pytest
import torch
from helpers import llama
from trainers.tiny import word_tokenizer
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from softrl.cli import evaluate, reward, sft, train
from softrl.rewards.aligned_reward_model import AlignedClassifierReward
from softrl.rewards.calibration import fitted_temperature
from softrl.rewards.resolve import resolve_rewards
from softrl.studies.report import load_samples
from softrl.trainers.reward_model_config import RewardModelConfig
from softrl.trainers.reward_model_fitting import scores

pytestmark = pytest.mark.slow  # imports trl

QUIET = ["--report_to", "none", "--logging_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny policy and a tiny BERT, each saved with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    policy, tokenizer = llama().float(), word_tokenizer()
    policy.save_pretrained(root / "policy")
    tokenizer.save_pretrained(root / "policy")
    own = word_tokenizer(vocab_size=31)  # other ids than the policy's
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, pad_token_id=2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(root / "bert")
    own.save_pretrained(root / "bert")
    return root


def words(draw, label, length=5, right=0.9):
    """`w9` is favourable, `w10` is not; a share of the texts is right."""
    marks = ["w9" if (draw.random() < right) == bool(label) else "w10"]
    return " ".join([*draw.choices([f"w{i}" for i in range(3, 9)], k=length), *marks])


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_classifier_is_fitted_measured_saved_and_used_as_a_reward(folders, tmp_path, capsys):
    draw = random.Random(0)
    rows = [{"text": words(draw, row % 2), "label": row % 2} for row in range(600)]
    texts, folder = write(tmp_path / "texts.jsonl", rows), tmp_path / "favourable"
    argv = ["fit", "--model_name_or_path", str(folders / "bert"), "--dataset_name", texts, "--output_dir", str(folder)]
    argv += ["--learning_rate", "0.01", "--num_train_epochs", "3", *QUIET]
    assert reward.main(argv) == 0
    assert "on held-out data" in capsys.readouterr().out
    card = json.loads((folder / "card.json").read_text())
    assert 0.8 < card["held_out"]["all"]["accuracy"] <= 1.0  # the words are right in nine of ten texts
    assert card["held_out"]["all"]["expected_calibration_error"] < 0.15
    assert card["num_train"] + card["num_validation"] + card["held_out"]["all"]["num_texts"] == 600
    assert (folder / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    assert "softrl train --reward_funcs favourable" in (folder / "README.md").read_text()

    (found,) = resolve_rewards(str(folder), word_tokenizer(), None)
    assert isinstance(found, AlignedClassifierReward)
    assert found.link == "sigmoid"
    ids = torch.tensor([[3, 9], [3, 10]])
    values = found.hard(ids, torch.ones_like(ids, dtype=torch.bool), prompt=["w4 w5 w6 w7 "] * 2)
    assert values[0] > 0.7
    assert values[1] < 0.3
    # The temperature is in the model: what it was fitted on asks for no other.
    args = RewardModelConfig(str(tmp_path / "x"), use_cpu=True)
    log_odds = scores(found.classifier.model, found.reward_tokenizer, [row["text"] for row in rows], args)
    labels = torch.tensor([row["label"] for row in rows]).double()
    assert fitted_temperature(log_odds, labels) == pytest.approx(1.0, abs=0.35)  # of 540 other texts
    decoded = found.hard_decoded(ids, torch.ones_like(ids, dtype=torch.bool), prompt=["w4 w5 w6 w7 "] * 2)
    torch.testing.assert_close(decoded, values)


def test_rlhf_whole_reward_model_policy_and_judgement(folders, tmp_path, capsys, monkeypatch):
    """The three commands of one recipe."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    pairs = [
        {"prompt": "w4 ", "chosen": words(draw, 1, 2, 1.0), "rejected": words(draw, 0, 2, 1.0)} for _ in range(400)
    ]
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"w3 w{4 + i % 5}"} for i in range(40)])
    recipe = tmp_path / "rlhf.yaml"
    recipe.write_text(
        f"reward_model:\n  objective: preference\n  model_name_or_path: {folders / 'policy'}\n"
        f"  dataset_name: {write(tmp_path / 'pairs.jsonl', pairs)}\n  learning_rate: 0.01\n  num_train_epochs: 3\n"
        "  output_dir: runs/reward\n  report_to: none\n  use_cpu: true\n  use_peft: true\n"
        "  lora_target_modules: all-linear\n"
        f"model_name_or_path: {folders / 'policy'}\ndataset_name: {prompts}\n"
        "reward_funcs: [runs/reward]\njudge: none\n"
        "output_dir: runs/policy\nmax_steps: 15\nlearning_rate: 0.05\nper_device_train_batch_size: 16\nbeta: 0.0\n"
        "max_completion_length: 4\ntop_k: 23\nuse_peft: true\nlora_target_modules: all-linear\nreport_to: none\n"
        "use_cpu: true\nnum_eval_prompts: 10\nlr_scheduler_type: constant\n"
    )
    assert reward.main(["fit", "--config", str(recipe)]) == 0
    card = json.loads((tmp_path / "runs/reward/card.json").read_text())
    assert card["held_out"]["all"]["accuracy"] > 0.9  # chance is one half
    assert train.main(["--config", str(recipe)]) == 0
    assert evaluate.main(["--config", str(recipe)]) == 0
    assert "10 held-out prompts" in capsys.readouterr().out
    before, after = (load_samples(tmp_path / f"runs/policy/{name}.json") for name in ("before", "after"))
    assert sum(s.reward for s in after) > sum(s.reward for s in before)
    assert max(abs(sample.kl_nats) for sample in before) < 1e-4  # the first one is the base, the second is not
    assert max(sample.kl_nats for sample in after) > 0.1


def test_a_supervised_start_is_a_model_that_writes_references(folders, tmp_path, capsys):
    # Nothing says which second word a prompt has: the loss would stay high if prompts were counted.
    rows = [{"prompt": f"w{3 + i % 9} w{3 + i * 7 % 11}", "reference": "w7 w8"} for i in range(80)]
    folder, data = tmp_path / "start", write(tmp_path / "rows.jsonl", rows)
    argv = ["--model_name_or_path", str(folders / "policy"), "--dataset_name", data, "--output_dir", str(folder)]
    argv += ["--learning_rate", "0.02", "--num_train_epochs", "6", "--num_eval_prompts", "16", *QUIET]
    assert sft.main(argv) == 0
    out = capsys.readouterr().out
    before, after = out.split("held-out references: ")[1].split(" nats")[0].split(" -> ")
    assert float(after) < 0.2 < float(before)
    model = AutoModelForCausalLM.from_pretrained(folder)
    written = model.generate(torch.tensor([[5, 6]]), do_sample=False, max_new_tokens=3)
    assert written[0].tolist() == [5, 6, 7, 8, 1]  # and it ends

    argv[-len(QUIET) :] = [*QUIET, "--append_eos", "false"]
    assert sft.main(argv) == 0
    written = AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor([[5, 6]]), do_sample=False, max_new_tokens=3
    )
    assert written[0, 2:4].tolist() == [7, 8]
    assert written[0, -1] != 1


def test_mistakes_are_named_before_anything_is_replaced(folders, tmp_path, capsys):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("words")
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "w3", "text": "w3", "label": row % 2} for row in range(40)])
    policy = ["--model_name_or_path", str(folders / "policy"), "--dataset_name", rows]
    for command, argv, message in (
        (reward, ["fit", *policy, "--output_dir", str(precious)], "holds something else than a reward model"),
        (sft, [*policy, "--output_dir", str(precious)], "holds something else than a model"),
        (sft, [*policy, "--output_dir", str(tmp_path / "new")], "has no column 'reference' to train on"),
        (reward, ["fit", *policy, "--objective", "preference"], r"lacks the columns ['chosen', 'rejected']"),
        (reward, ["fit", "--learnin_rate", "1"], "unknown key 'learnin_rate' on the command line: did you mean"),
        (reward, ["fit", "--model_name_or_path", str(precious), "--dataset_name", rows], "cannot be loaded as a"),
        (evaluate, ["--output_dir", str(precious)], "holds neither a model nor an adapter"),
        (evaluate, ["--trainer", "trl_rloo"], "give one of ours"),
    ):
        assert command.main(argv) == 2
        assert message in capsys.readouterr().err
    assert (precious / "chapter.txt").read_text() == "words"
    assert reward.main(["refit"]) == 2
    assert evaluate.main([]) == 2
