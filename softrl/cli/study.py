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
    words = studies.add_parser("analogies", help="king - man + woman in a model's embeddings, with controls")
    words.add_argument("--model", default="smollm2-135m", help="model name or folder (smollm2-135m)")
    words.add_argument("--metric", choices=["cosine", "euclidean"], default="cosine", help="of nearest (cosine)")
    words.add_argument("--seed", type=int, default=0, help="of the random directions (0)")
    words.add_argument(
        "--output", type=Path, default=Path("runs/analogies.csv"), help="CSV and PNG (runs/analogies.csv)"
    )
    _add_beams(studies.add_parser("beams", help="searches with hard and soft tokens at equal forward passes"))
    _add_soft_decoding(studies.add_parser("soft-decoding", help="soft against hard decoding, before and after tuning"))
    _add_basis(studies.add_parser("basis-aware", help="truncation by proof: soundness, cost, what it accepts"))
    given = parser.parse_args(argv)

    from softrl.assets import AssetError

    studies_by_name = {
        "entropy-bound": _entropy_bound, "overlap-bias": _overlap_bias, "beams": _beams,
        "soft-decoding": _soft_decoding, "learned-settings": _learned_settings,
        "analogies": _analogies, "basis-aware": _basis_aware,
    }  # fmt: skip
    try:
        return studies_by_name[given.study](given)
    except (AssetError, ValueError) as error:
        print(f"softrl study: {error}", file=sys.stderr)
        return 1


def _add_soft_decoding(decoding: argparse.ArgumentParser) -> None:
    decoding.add_argument("--config", default="soft-decoding", help="a recipe's path, or its name (soft-decoding)")
    decoding.add_argument("--output_dir", help="where runs and report go (the recipe's)")
    decoding.add_argument("--tunings", nargs="+", help="run these only")
    decoding.add_argument("--seeds", nargs="+", type=int, help="run these only")
    decoding.add_argument("--only_report", action="store_true", help="run nothing; report what has been run")


def _add_basis(basis: argparse.ArgumentParser) -> None:
    basis.add_argument("--parts", nargs="+", help="of tiny, scaling, cost, rules, samples (all, some 20 minutes)")
    basis.add_argument("--model", help="model name or folder (smollm2-135m)")
    basis.add_argument("--epsilon", type=float, help="of eta-sampling's threshold (0.003)")
    basis.add_argument("--rule", help="tau or eta (eta)")
    basis.add_argument("--num_directions", type=int, help="k (20)")
    basis.add_argument("--representation", help="before_norm or output (before_norm)")
    basis.add_argument("--texts", type=int, help="read as human text, and generated for costs (16)")
    basis.add_argument("--tokens", type=int, help="of each, and of the samples (48)")
    basis.add_argument("--samples", type=int, help="texts that each rule writes (192)")
    basis.add_argument("--cost_directions", nargs="+", type=int, help="further k of the costs (5 20 80)")
    basis.add_argument("--programs", type=int, help="of the draws that HiGHS solves too (100)")
    basis.add_argument("--time_limit_seconds", type=float, help="of HiGHS, a program (60)")
    basis.add_argument("--seeds", type=int, help="tiny models of each norm (3)")
    basis.add_argument("--vocab_sizes", nargs="+", type=int, help="V of the scaling (1024 to 131072)")
    basis.add_argument("--scaled_directions", nargs="+", type=int, help="k of the scaling (5 10 20 40 80)")
    basis.add_argument("--scaled_programs", type=int, help="of each V and k (15)")
    basis.add_argument("--highs_programs", type=int, help="of these, that HiGHS solves too (3)")
    basis.add_argument(
        "--output_dir", type=Path, default=Path("runs/basis-aware"),
        help="page, figures, CSVs; reruns go on with what is missing (runs/basis-aware)",
    )  # fmt: skip


def _basis_aware(given: argparse.Namespace) -> int:
    from softrl.studies.basis_aware import PARTS, Settings, run

    own = ("study", "parts", "output_dir")
    values = {name: value for name, value in vars(given).items() if name not in own and value is not None}
    words = [f"--{name} {_words(value)}" for name, value in {"parts": given.parts, **values}.items() if value]
    settings = Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    command = " ".join(["softrl study basis-aware", *words])
    for line in run(settings, given.parts or PARTS, given.output_dir, command):
        print(line)
    print(f"Written to {given.output_dir}.")
    return 0


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _add_beams(beams: argparse.ArgumentParser) -> None:
    beams.add_argument("--model", default="smollm2-135m", help="model name or folder (smollm2-135m)")
    beams.add_argument("--base", help="model that scores what is written (the model itself)")
    beams.add_argument("--items", type=int, default=200, help="questions (200)")
    beams.add_argument("--kinds", nargs="+", help="also subtraction (addition copying reversal)")
    beams.add_argument("--digits", type=int, help="of both numbers of a sum or difference (2)")
    beams.add_argument("--copied", type=int, help="words to copy (6)")
    beams.add_argument("--reversed", type=int, help="words to reverse (3)")
    beams.add_argument("--examples", type=int, help="solved ones before a question (4)")
    beams.add_argument("--methods", nargs="+", help="their names, such as 'soft beam' (all); greedy is always among")
    beams.add_argument("--widths", nargs="+", type=int, default=[4], help="hypotheses or samples (4)")
    beams.add_argument("--top_k", type=int, help="kept ids of a mixture (16)")
    beams.add_argument("--max_entropy_nats", type=float, help="bound of a mixture's entropy (none)")
    beams.add_argument("--temperature", type=float, help="of the samples of self-consistency (0.7)")
    beams.add_argument("--seed", type=int, help="of questions and samples (0)")
    beams.add_argument("--batch_size", type=int, default=20, help="questions at a time (20)")
    beams.add_argument(
        "--output_dir", type=Path, default=Path("runs/beams"), help="answers, CSV and PNG; reruns go on (runs/beams)"
    )


def _analogies(given: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from softrl.assets import resolve_model
    from softrl.models.policy import Policy
    from softrl.studies.analogies import run

    folder, figure = resolve_model(given.model), given.output.with_suffix(".png")
    try:
        policy = Policy(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"--model: {str(error).splitlines()[0]}") from error
    run(policy, tokenizer, given.output, figure, given.metric, given.seed)
    print(f"Written to {given.output} and {figure}.")
    return 0


def _beams(given: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from softrl.assets import resolve_model
    from softrl.models.policy import Policy
    from softrl.studies.beams import METHODS, Bench, Settings, run

    counts = {f"num_{name}": getattr(given, name) for name in ("digits", "copied", "reversed", "examples")}
    others = ("base", "top_k", "max_entropy_nats", "temperature", "seed")
    wanted = counts | {name: getattr(given, name) for name in others}
    wanted["kinds"] = tuple(given.kinds) if given.kinds else None
    settings = Settings(given.model, given.items, **{key: value for key, value in wanted.items() if value is not None})

    def loaded(name: str) -> Policy:
        return Policy(AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype="float32"))

    try:
        policy = loaded(given.model)
        base = policy if given.base is None else loaded(given.base)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(given.model), padding_side="left")
    except OSError as error:
        raise ValueError(f"--model or --base: {str(error).splitlines()[0]}") from error
    bench = Bench(policy, base, tokenizer, settings)
    run(bench, given.methods or list(METHODS), given.widths, given.batch_size, given.output_dir)
    print(f"Written to {given.output_dir}: rows.csv, accuracy.png and all answers.")
    return 0


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


def _soft_decoding(given: argparse.Namespace) -> int:
    import datasets
    from transformers.utils import logging

    from softrl.cli.arguments import find_study
    from softrl.studies.soft_decoding_config import load_config
    from softrl.studies.soft_decoding_report import write_report
    from softrl.studies.soft_decoding_run import SoftDecodingStudy

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    study = SoftDecodingStudy(load_config(find_study(given.config), given.output_dir))
    command = f"softrl study soft-decoding --config {given.config}"
    if given.output_dir is not None:
        command += f" --output_dir {given.output_dir}"
    if not given.only_report:
        try:
            study.train(given.tunings, given.seeds)
        except KeyboardInterrupt:
            print(f"Stopped. Finished runs are kept; go on with: {command}")
            return 130
    print(f"Written to {write_report(study.config, study.records(), command)}.")
    return 0
