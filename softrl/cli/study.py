"""`softrl study`: what a setting does, measured, as a table and a figure."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run one study."""
    parser = argparse.ArgumentParser(prog="softrl study", description=__doc__)
    studies = parser.add_subparsers(dest="study", required=True)
    bound = studies.add_parser("entropy-bound", help="coherence of soft tokens against vanishing gradients")
    bound.add_argument("--relaxations", nargs="+", default=["gumbel_softmax", "softmax"], help="mixtures")
    bound.add_argument("--bounds", nargs="+", type=float, help="H_max in nats (0.05 to 3, and none)")
    bound.add_argument("--prompts", type=int, default=8, help="N (8)")
    bound.add_argument("--steps", type=int, default=24, help="T (24)")
    bound.add_argument(
        "--output", type=Path, default=Path("runs/entropy-bound.csv"), help="CSV and PNG (runs/entropy-bound.csv)"
    )
    learned = studies.add_parser("learned-settings", help="where learned relaxation settings go: the pull to greedy")
    learned.add_argument("--texts", type=int, default=4, help="reviews (4)")
    learned.add_argument("--steps", type=int, default=12, help="T (12)")
    learned.add_argument("--updates", type=int, default=15, help="of the settings (15)")
    learned.add_argument("--barriers", nargs="+", type=float, default=[0.0, 0.03], help="weights of the guard")
    learned.add_argument(
        "--output", type=Path, default=Path("runs/learned-settings.csv"), help="CSV (runs/learned-settings.csv)"
    )
    overlap = studies.add_parser(
        "overlap-bias", help="soft BLEU and ROUGE against mean hard scores, as tokens sharpen"
    )
    overlap.add_argument("--texts", type=int, default=64, help="references (64)")
    overlap.add_argument("--samples", type=int, default=100, help="hard texts drawn from each soft one (100)")
    overlap.add_argument(
        "--output", type=Path, default=Path("runs/overlap-bias.csv"), help="CSV and PNG (runs/overlap-bias.csv)"
    )
    given = parser.parse_args(argv)

    from softrl.assets import AssetError

    try:
        runs = {"entropy-bound": _entropy_bound, "overlap-bias": _overlap_bias, "learned-settings": _learned_settings}
        return runs[given.study](given)
    except (AssetError, ValueError) as error:
        print(f"softrl study: {error}", file=sys.stderr)
        return 1


def _entropy_bound(given: argparse.Namespace) -> int:
    from softrl.cli.train import build_trainer, parse
    from softrl.studies.entropy_bound import BOUNDS_NATS, run

    recipe = ["--config", "quickstart", "--judge", "none", "--dtype", "float32"]
    trainer = build_trainer(*parse(recipe, "softrl study"))
    bounds = BOUNDS_NATS if given.bounds is None else given.bounds
    figure = given.output.with_suffix(".png")
    run(trainer, given.relaxations, bounds, given.prompts, given.steps, given.output, figure)
    print(f"Written to {given.output} and {figure}.")
    return 0


def _learned_settings(given: argparse.Namespace) -> int:
    from softrl.studies.learned_settings import run_on_reviews

    run_on_reviews(given.texts, given.steps, given.updates, given.barriers, given.output)
    print(f"Written to {given.output}.")
    return 0


def _overlap_bias(given: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from softrl.assets import language_model
    from softrl.studies.overlap_bias import run

    figure = given.output.with_suffix(".png")
    rows = run(AutoTokenizer.from_pretrained(language_model()), given.texts, given.samples, given.output, figure)
    print(f"{'reward':<8} {'nats':>6} {'soft':>7} {'hard':>7} {'bias':>16}")
    for row in rows:
        error = f"{row.bias:+.4f} ± {row.bias_se:.4f}"
        print(f"{row.reward:<8} {row.entropy_nats:>6.2f} {row.soft:>7.3f} {row.hard:>7.3f} {error:>16}")
    print(f"Written to {given.output} and {figure}.")
    return 0
