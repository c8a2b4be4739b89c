"""The report of `softrl compare`: rows as CSV and Parquet, figures, one page that holds them all."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from softrl.assets import write_atomically
from softrl.studies.compare_config import CompareConfig
from softrl.studies.compare_figures import draw
from softrl.studies.compare_tables import (
    METRICS,
    Change,
    Final,
    Record,
    Row,
    at_equal_kl,
    at_equal_samples,
    at_equal_seconds,
    curve_beta,
    difference,
    finals,
    finished,
    mean_at_kl,
    rows_of,
    score_changes,
)
from softrl.studies.html import embedded, number, with_error, write_page

Table = tuple[list[str], list[list[str]]]

_BODY = """
<p>{{ question }}</p>
{% if notes %}<p class="note">{{ notes }}</p>{% endif %}
<h2>In short</h2>
<ul>{% for line in summary %}<li>{{ line }}</li>{% endfor %}</ul>
<p class="note">Changes are from the same seed's start, over the same held-out prompts with the same random streams.
± is one standard error over seeds, over prompts where there is one seed. Few seeds may agree by chance, so "more than
two standard errors" asks for two of the larger one, of that over seeds and that over prompts.</p>
<h2>Set-up</h2>
{{ table(setup[0], setup[1], 2) }}
{% if tuning %}<h2>Tuning</h2>
<p>{{ tuning_text }}</p>
{{ table(tuning[0], tuning[1]) }}{% endif %}
<h2>At the end of the runs</h2>
{{ table(final[0], final[1]) }}
<p class="note">By prompt: the standard error that the prompts of each seed give the mean. z: change over the larger of
the two standard errors. Seconds a rollout are those of all training on it; for PPO, of all epochs.</p>
{% if scores[1] %}<h2>Other measures of the held-out texts</h2>
{{ table(scores[0], scores[1], 3) }}
<p class="note">Mean ± standard error over seeds.</p>{% endif %}
<h2>At equal KL</h2>
<p>Values where a run first passes a KL to the base, linear between its evaluations; mean ± standard error over the
seeds that get there, their number in brackets where it is not all. The row of all KL weights averages those of a seed
first. Blank: no run gets there.</p>
{{ table(equal_kl[0], equal_kl[1], 2) }}
{% if differences %}<h2>Differences from {{ reference }}</h2>
<p>Each method less {{ reference }}, paired by seed: at the end of the runs (equal samples), after as many seconds of
training as the shorter of the two runs has (equal seconds), and at equal KL. Mean ± standard error over seeds, the
number of seeds in brackets where it is not all. One seed gives no error, and decides nothing.</p>
{{ table(differences[0], differences[1], 2) }}{% endif %}
{% if figures %}<h2>Figures</h2>
{% for name, source in figures.items() %}{{ figure(source, captions[name]) }}{% endfor %}{% endif %}
<h2>Runs</h2>
<p>{{ runs_text }}</p>
{% if failed[1] %}{{ table(failed[0], failed[1], 5) }}{% endif %}
<h2>Command</h2>
<pre>{{ command }}</pre>
"""


def write_report(config: CompareConfig, records: list[Record], command: str) -> list[Path]:
    """Rows, figures and page of all finished runs.

    Args:
        config: the study.
        records: what `Study.records` finds.
        command: what was typed.
    Returns:
        What was written.
    Raises:
        ValueError: there is no run yet.
    """
    if not records:
        raise ValueError(f"no run of this recipe is finished in {config.output_dir}; run it without --only_report")
    folder = Path(config.output_dir)
    written = _write_rows(rows_of(records), folder)
    figures = draw(records, folder)
    page = folder / "report.html"
    ends = finals(records)
    values = {
        "question": config.question, "notes": config.notes, "command": command,
        "summary": [line for end in ends for line in summary_lines(end)],
        "setup": _setup(config, records), "tuning": _tuning(config, records), "tuning_text": _tuning_text(config),
        "final": _final_table(ends), "scores": _scores_table(records), "equal_kl": _equal_kl_table(config, records),
        "reference": config.reference or config.methods[0].name, "differences": _differences(config, records),
        "figures": {name: embedded(path) for name, path in figures.items()}, "captions": _captions(records),
        "failed": _failed(records), "runs_text": _runs_text(config, records),
    }  # fmt: skip
    write_page(page, "Training methods compared", _BODY, values)
    return [*written, *figures.values(), page]


def _write_rows(rows: list[Row], folder: Path) -> list[Path]:
    table, columns = folder / "rows.csv", folder / "rows.parquet"
    flat = pd.DataFrame([{**asdict(row), **row.scores} for row in rows]).drop(columns="scores")
    with write_atomically(table) as temporary:
        flat.to_csv(temporary, index=False)
    with write_atomically(columns) as temporary:
        flat.to_parquet(temporary)
    return [table, columns]


# Words


def summary_lines(end: Final) -> list[str]:
    """What a method did at a KL weight, to the hard reward and to the judge."""
    where = f"{end.method}, KL weight {end.beta:g}"
    if end.seeds == 0:
        return [f"{where}: all {end.failed} runs failed."]
    lost = f" ({end.failed} more failed)" if end.failed else ""
    over = f"over {end.seeds} seeds" if end.seeds > 1 else "over the prompts of one seed"
    lines = []
    for what, change in (("the hard reward", end.reward), ("the judge", end.judge)):
        if change is not None:
            moves, clear = "raises" if change.mean >= 0 else "lowers", "yes" if change.z > 2.0 else "no"
            amount = with_error(abs(change.mean), change.error)
            lines.append(
                f"{where}: {moves} {what} by {amount} {over}{lost}; more than two standard errors up: {clear}."
            )
    return lines


def _captions(records: list[Record]) -> dict[str, str]:
    done = finished(records)
    beta = f"{curve_beta(done):g}" if done else ""
    return {
        "frontier": "The frontier: hard reward and judge against KL to the base. A point is one evaluation of one "
        "run, of all KL weights and seeds; a curve is the mean over seeds at equal KL, its band one standard error, "
        "drawn as far as every seed gets.",
        "curves": f"Learning curves at KL weight {beta}, against samples and against seconds of training: mean over "
        "seeds, bands of one standard error.",
        "diversity": "Diversity: distinct-2 and perplexity under the base against the hard reward; rings are the "
        "base. High reward at low distinct-2, or at a perplexity far from the base's, is a reward that was hacked.",
    }


def _tuning_text(config: CompareConfig) -> str:
    tuning = config.tuning
    if tuning is None:
        return ""
    criterion = {
        "reward": "the largest held-out hard reward",
        "objective": "the largest held-out hard reward less the KL weight times the KL a completion",
    }[tuning.criterion]
    bound = "" if tuning.max_kl_nats is None else f" among evaluations within {tuning.max_kl_nats:g} nats a completion"
    return (
        f"The same budget for every method: {len(tuning.learning_rates)} learning rates, {tuning.max_samples} "
        f"samples each, seed {tuning.seed} (not one of the comparison's), KL weight {config.tuning_beta:g}. Chosen "
        f"by {criterion}{bound}. The held-out prompts are those of the comparison, their random streams are not. A "
        "method whose rate is at the edge of its list might do better beyond it."
    )


def _runs_text(config: CompareConfig, records: list[Record]) -> str:
    main = [record for record in records if record["stage"] == "main"]
    planned = sum(len(method.betas) for method in config.methods) * len(config.seeds)
    failed = len(_failed(records)[1])
    text = f"{len(main)} of {planned} runs of the comparison have been made"
    return f"{text}, and all ended well." if not failed else f"{text}; these failed, of tuning too:"


# Tables


def _setup(config: CompareConfig, records: list[Record]) -> Table:
    settings = records[0]["settings"] | {"dtype": records[0].get("dtype")}
    shown = (
        ("model", "model_name_or_path"), ("number format", "dtype"), ("LoRA rank", "lora_r"),
        ("prompts", "dataset_name"), ("text before a prompt", "prompt_prefix"),
        ("held-out prompts", "num_eval_prompts"), ("reward", "reward_funcs"), ("judge", "judge"),
        ("temperature", "temperature"),
        ("longest completion, tokens", "max_completion_length"), ("samples a prompt", "num_generations"),
        ("samples a rollout and device", "per_device_train_batch_size"),
    )  # fmt: skip
    rows = [[label, _text(settings[key])] for label, key in shown if settings.get(key) is not None]
    budget = f"{config.max_samples} samples"
    budget += f", or {config.max_seconds:g} s of training" if config.max_seconds is not None else ""
    rows += [
        ["a run ends after", budget],
        ["evaluated every", f"{config.evaluate_every_samples} samples"],
        ["seeds", ", ".join(map(str, config.seeds))],
        ["KL weights", ", ".join(f"{beta:g}" for beta in config.betas)],
        ["base recipe", config.base],
    ]
    for method in config.methods:
        own = ", ".join(f"{key} {value}" for key, value in method.settings.items())
        rows.append([f"method: {method.name}", own or "as the base"])
    return ["", "value"], rows


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value).strip()


def _tuning(config: CompareConfig, records: list[Record]) -> Table | None:
    tuned = [record for record in records if record["stage"] == "tuning"]
    if not tuned:
        return None
    columns = ["method", "learning rate", "reward change", "judge change", "KL, nats a completion", "chosen", "status"]
    chosen = {(record["method"], record["learning_rate"]) for record in records if record["stage"] == "main"}
    rows = []
    for record in tuned:
        cells = ["", "", ""]
        if record["status"] == "done":
            changes = [Change.of([record], metric) for metric in ("reward", "judge")]
            cells = [*map(_cell, changes), number(record["points"][-1]["kl_completion"])]
        mark = "yes" if (record["method"], record["learning_rate"]) in chosen else ""
        rows.append([record["method"], f"{record['learning_rate']:g}", *cells, mark, record["status"]])
    return columns, rows


def _cell(change: Change | None) -> str:
    return "" if change is None else with_error(change.mean, change.error, signed=True)


def _final_table(ends: list[Final]) -> Table:
    columns = [
        "method", "KL weight", "learning rate", "seeds",
        "reward change", "by prompt", "z of reward", "judge change", "z of judge",
        "KL, nats a completion", "distinct-2", "base perplexity", "tokens", "s a rollout", "samples", "seconds",
    ]  # fmt: skip
    rows = []
    for end in ends:
        seeds = f"{end.seeds}" + (f", {end.failed} failed" if end.failed else "")
        changes = [
            _cell(end.reward), with_error(None if end.reward is None else end.reward.prompt_error, None),
            _z(end.reward), _cell(end.judge), _z(end.judge),
        ]  # fmt: skip
        means = end.means
        shown = [
            with_error(*means["kl_completion"], decimals=2), with_error(*means["distinct_2"]),
            with_error(*means["base_perplexity"], decimals=1), number(means["completions/mean_length"][0]),
            number(means["seconds_a_rollout"][0]), f"{means['samples'][0]:g}", number(means["seconds"][0]),
        ]  # fmt: skip
        rows.append([end.method, f"{end.beta:g}", f"{end.learning_rate:g}", seeds, *changes, *shown])
    return columns, rows


def _scores_table(records: list[Record]) -> Table:
    rows: list[Any] = [
        [each.method, f"{each.beta:g}", each.name, with_error(*each.start), with_error(*each.end),
         with_error(*each.change, signed=True)]
        for each in score_changes(records)
    ]  # fmt: skip
    return ["method", "KL weight", "measure", "start", "end", "change"], rows


def _z(change: Change | None) -> str:
    return "" if change is None else with_error(change.z, None, decimals=1)


def _equal_kl_table(config: CompareConfig, records: list[Record]) -> Table:
    done, levels = finished(records), config.equal_kl_nats
    metrics = _measured(done)
    columns = ["method", "KL weight", *(f"{metric} at {kl:g} nats" for metric in metrics for kl in levels)]
    rows = [
        [method, label, *(_of_seeds(mean_at_kl(group, kl, metric), group) for metric in metrics for kl in levels)]
        for method, label, group in _groups(done)
    ]
    return columns, rows


def _differences(config: CompareConfig, records: list[Record]) -> Table | None:
    done, name = finished(records), config.reference or config.methods[0].name
    reference = [record for record in done if record["method"] == name]
    others = [record for record in done if record["method"] != name]
    if not reference or not others:
        return None
    metrics = _measured(done)
    columns = ["method", "KL weight"]
    for metric in metrics:
        columns += [
            f"{metric} at equal samples",
            "at equal seconds",
            *(f"at {kl:g} nats" for kl in config.equal_kl_nats),
        ]
    rows = []
    for method, label, group in _groups(others):
        cells = []
        for metric in metrics:
            ways = [partial(at_equal_samples, metric=metric), partial(at_equal_seconds, metric=metric)]
            ways += [partial(at_equal_kl, metric=metric, kl_nats=kl) for kl in config.equal_kl_nats]
            cells += [_of_seeds(difference(group, reference, way), group, signed=True) for way in ways]
        rows.append([method, label, *cells])
    return columns, rows


def _measured(records: list[Record]) -> list[str]:
    return [name for name in METRICS if records and records[0]["points"][0].get(name) is not None]


def _groups(records: list[Record]) -> Iterator[tuple[str, str, list[Record]]]:
    """A method's runs by KL weight, then, if there are several, all of them."""
    for method in dict.fromkeys(record["method"] for record in records):
        runs = [record for record in records if record["method"] == method]
        weights = sorted({record["beta"] for record in runs})
        for beta in weights:
            yield method, f"{beta:g}", [record for record in runs if record["beta"] == beta]
        if len(weights) > 1:
            yield method, "all", runs


def _of_seeds(measured: tuple[float, float, int], records: list[Record], signed: bool = False) -> str:
    """Mean and error, and the number of seeds where it is not all of them; blank for none."""
    mean, error, reached = measured
    if not reached:
        return ""
    seeds = len({record["seed"] for record in records})
    return with_error(mean, error, signed) + (f" ({reached})" if reached < seeds else "")


def _failed(records: list[Record]) -> Table:
    rows: list[Any] = [
        [record["method"], f"{record['beta']:g}", str(record["seed"]), record["stage"], record["status"]]
        for record in records
        if record["status"] != "done"
    ]
    return ["method", "KL weight", "seed", "stage", "what happened"], rows
