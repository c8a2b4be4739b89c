"""The study of soft against hard decoding: its recipe, its tables, and a whole run on a tiny model."""

import json
import math

import pytest
import torch
import yaml

from softrl.studies.soft_decoding_report import decoding_rows, gap_rows, summary_lines

_MEASURES = ("accuracy", "base_nll", "own_nll", "distinct_1", "distinct_2", "repetition", "entropy", "length")


pytestmark = pytest.mark.slow  # imports trl


def _decoded(**numbers):
    values = dict.fromkeys(_MEASURES, 1.0) | numbers
    return values | {
        "entropy_by_step": [1.0, 2.0, None],
        "fed_by_step": [0.5, 0.25, None],
        "shown": ["<b>The film</b> & more"],
    }


def _record(tuning, seed, hard, soft, status="done"):
    return {
        "tuning": tuning, "seed": seed, "status": status, "seconds": 3.0, "hard_nll": 3.0, "other_nll": 5.0,
        "decodings": {"hard": _decoded(base_nll=hard), "soft": _decoded(base_nll=soft)},
    }  # fmt: skip


RECORDS = [
    _record("untuned", 0, 2.0, 5.0),
    _record("tuned", 0, 2.0, 2.5), _record("tuned", 1, 2.0, 1.0), _record("tuned", 2, 2.0, 3.0),
]  # fmt: skip


def test_gaps_are_differences_to_the_hard_decoding_seed_by_seed():
    rows = {(row.tuning, row.measure): row for row in gap_rows(RECORDS, "untuned")}
    before, after = rows["untuned", "base_nll"], rows["tuned", "base_nll"]
    assert before.gap[0] == 3.0
    assert math.isnan(before.change[0])
    assert after.gap[0] == pytest.approx((0.5 - 1.0 + 1.0) / 3)
    changes = [0.5 - 3.0, 1.0 - 3.0, 1.0 - 3.0]  # of sizes: a gap below zero is a gap as well
    mean = sum(changes) / 3
    assert after.change[0] == pytest.approx(mean)
    spread = math.sqrt(sum((each - mean) ** 2 for each in changes) / 2 / 3)
    assert after.change[1] == pytest.approx(spread)
    assert rows["tuned", "accuracy"].gap == (0.0, 0.0)


def test_the_summary_names_what_changed_beyond_doubt():
    lines = summary_lines(gap_rows(RECORDS, "untuned"))
    assert lines == ["“tuned”, “soft”: the gap in base nll shrank by 2.167 ± 0.167."]
    same = [_record("untuned", 0, 2.0, 5.0), _record("tuned", 0, 2.0, 4.0), _record("tuned", 1, 2.0, 6.0)]
    assert summary_lines(gap_rows(same, "untuned")) == ["No gap changed by more than two standard errors over seeds."]


def test_rows_are_means_over_seeds():
    rows = {(row.tuning, row.decoding): row for row in decoding_rows(RECORDS)}
    assert rows["tuned", "soft"].base_nll[0] == pytest.approx(6.5 / 3)
    assert rows["tuned", "soft"].seeds == 3


RECIPE = {
    "question": "Does it run?", "num_train_texts": 8, "num_train_answers": 8, "num_texts": 3, "num_answers": 8,
    "prompt_length_tokens": 4, "text_length_tokens": 5, "answers": {"num_examples": 1}, "batch_size": 2,
    "seeds": [0, 1],
    "decodings": {"hard": {}, "soft": {"top_k": 4, "max_entropy_nats": 0.5}},
    "common": {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "top_k": 4, "hops": 0, "max_steps": 2,
        "bf16": False, "use_cpu": True,
    },
    "tunings": [
        {"name": "untuned", "max_steps": 0},
        {"name": "soft SFT", "guidance_alpha": "linear:1.0->0.0@0.5", "learning_rate": 1e-2},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A random Llama of width 16 that reads SmolLM2's tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from softrl.assets import language_model

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(language_model())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(tmp_path, folder, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "model": str(folder), "output_dir": str(tmp_path / "out"), **changes}))
    return path


def test_a_study_runs_is_kept_and_reported(tmp_path, tiny_folder, capsys):
    from softrl.cli.study import main

    argv = ["soft-decoding", "--config", str(recipe(tmp_path, tiny_folder))]
    assert main(argv) == 0
    runs = sorted((tmp_path / "out" / "runs").glob("*.json"))
    records = {path.name.rsplit("-", 1)[0]: json.loads(path.read_text()) for path in runs}
    assert set(records) == {"untuned", "soft-sft-seed0", "soft-sft-seed1"}  # what is not tuned has no seeds
    assert all(record["status"] == "done" for record in records.values())
    assert records["untuned"]["losses"] == []
    hard, soft = (records["untuned"]["decodings"][name] for name in ("hard", "soft"))
    assert max(hard["largest_fed_by_step"]) == 0.0
    assert 0.0 < max(soft["largest_fed_by_step"]) <= 0.5 + 1e-5
    assert records["untuned"]["hard_nll"] != records["soft-sft-seed0"]["hard_nll"]
    before = {path: path.stat().st_mtime_ns for path in runs}
    assert main(argv) == 0  # nothing is run again
    assert {path: path.stat().st_mtime_ns for path in runs} == before
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(text in page for text in ("Does it run?", "untuned", "soft SFT", "data:image/png"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decodings": {}}, "decodings is empty"),
        ({"decodings": {"soft": {"topk": 3}}}, r"'soft': unknown settings \['topk'\]"),
        ({"common": {"seed": 3}}, r"\['seed'\] are set by the study"),
        ({"tunings": [{"name": "a", "guidence_alpha": 1}]}, r"unknown keys \['guidence_alpha'\]"),
        ({"tunings": [{"name": "a"}, {"name": "A"}]}, "every tuning needs one of its own"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path, changes, message):
    from softrl.studies.soft_decoding_config import load_config

    with pytest.raises(ValueError, match=message):
        load_config(recipe(tmp_path, "nowhere", **changes))


def test_the_shipped_recipe_is_read_and_its_settings_are_possible():
    from softrl.cli.arguments import find_study
    from softrl.studies.soft_decoding_config import load_config
    from softrl.studies.soft_decoding_run import SoftDecodingStudy

    config = load_config(find_study("soft-decoding"))
    SoftDecodingStudy(config).check()
    assert config.num_answers >= 200
    assert len(config.runs()) == 1 + 3 * 3
    for asked in ({"tunings": ["hard sft"]}, {"seeds": [7]}):
        with pytest.raises(ValueError, match=r"are not in the recipe, which has"):
            config.runs(**asked)
