"""`softrl assets`: what it prints and how it ends."""

import json

import pytest

from softrl import assets
from softrl.assets import AssetError
from softrl.cli import assets as command
from softrl.cli import main


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTRL_CACHE", str(tmp_path))
    return tmp_path


def piece(cache, name, **card):
    (cache / name).mkdir()
    (cache / name / "card.json").write_text(json.dumps({"inputs": {}, **card}))


def test_list_shows_what_is_there_and_what_is_not(cache, capsys, monkeypatch):
    monkeypatch.setattr(command, "make_all", lambda **options: pytest.fail("--list made something"))
    piece(cache, "reviews", title="the reviews", files={"reviews.csv": 34_592_250})
    accuracy = {"rotten_tomatoes_snippets": 0.7442, "imdb_whole": 0.87}
    piece(cache, "sentiment-reward-49152-abc", title="the reward", files={"r": 196_852}, held_out_accuracy=accuracy)
    (cache / "minilm-l6").mkdir()  # without a card: not complete
    assert main(["assets", "--list"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        f"softrl's assets in {cache}",
        "",
        f"the reviews 34.6 MB {cache / 'reviews'}",
        "MiniLM-L6 encoder absent run `softrl assets`",
        "SmolLM2-135M-Instruct absent run `softrl assets`",
        f"the reward 196.9 kB {cache / 'sentiment-reward-49152-abc'}",
        "right on reviews it was not fitted on: rotten tomatoes snippets 74.4%, imdb whole 87.0%",
        "sentiment judge absent run `softrl assets`",
        "Shakespeare's works absent run `softrl assets`",
        'toxicity classifier absent fetched for the reward "nontoxic"',
        "",
        "total 34.8 MB",
    ]


def test_an_asset_error_is_one_message_and_exit_1(cache, capsys, monkeypatch):
    def fail(**options):
        raise AssetError("the disk filled up. Free some space.")

    monkeypatch.setattr(assets, "reviews_csv", fail)
    assert main(["assets"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "softrl: the disk filled up. Free some space.\n"
    assert captured.out == ""


def test_ctrl_c_says_that_the_work_is_kept(cache, capsys, monkeypatch):
    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "reviews_csv", interrupt)
    assert main(["assets"]) == 130
    assert "interrupted; what is finished is kept" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "rebuild"), [([], False), (["--force"], True)])
def test_everything_is_made_in_order(cache, monkeypatch, argv, rebuild):
    from softrl.rewards import fit

    made = []
    for owner, name in [
        (assets, "reviews_csv"),
        (assets, "encoder"),
        (assets, "language_model"),
        (fit, "sentiment_reward"),
        (fit, "sentiment_judge"),
        (assets, "shakespeare_texts"),
    ]:
        monkeypatch.setattr(owner, name, lambda *, rebuild, name=name: made.append((name, rebuild)))
    assert main(["assets", *argv]) == 0
    names = ["reviews_csv", "encoder", "language_model", "sentiment_reward", "sentiment_judge", "shakespeare_texts"]
    assert made == [(name, rebuild) for name in names]
