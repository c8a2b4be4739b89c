"""A study's page: one HTML file that holds its figures and needs no network.

Left out: scripts, and any style that is fetched.
"""

import base64
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from softrl.assets import write_atomically

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #d0d0d0; padding: 0.25rem 0.7rem; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #808080; font-weight: 600; }
th.text, td.text { text-align: left; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption, .note { color: #505050; font-size: 0.9rem; }
pre { background: #f4f4f4; padding: 0.7rem 1rem; overflow-x: auto; } .scroll { overflow-x: auto; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style | safe }}</style></head>
<body>
<h1>{{ title }}</h1>
{% macro table(columns, rows, text_columns=1) -%}
<div class="scroll"><table><thead><tr>
{%- for column in columns -%}
<th{% if loop.index <= text_columns %} class="text"{% endif %}>{{ column }}</th>
{%- endfor -%}
</tr></thead><tbody>
{%- for row in rows %}<tr>
{%- for cell in row %}<td{% if loop.index <= text_columns %} class="text"{% endif %}>{{ cell }}</td>{% endfor -%}
</tr>{% endfor -%}
</tbody></table></div>
{%- endmacro %}
{% macro figure(source, caption) -%}
<figure><img src="{{ source }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{%- endmacro %}
BODY
</body></html>
"""


def write_page(path: Path, title: str, body: str, values: Mapping[str, Any]) -> None:
    """Write a page whole or not at all.

    Args:
        path: where to.
        title: of the page, and its heading.
        body: a Jinja2 template; what it inserts is escaped. It may call the macros `table(columns, rows,
            text_columns=1)` and `figure(source, caption)`, and the filter `number`.
        values: what the template names; a name that is missing is an error.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    page = environment.from_string(_PAGE.replace("BODY", body)).render(title=title, style=_STYLE, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def embedded(path: Path) -> str:
    """A PNG as a `data:` address."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table, to so many significant digits; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"  # noqa: RUF001
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.{digits - 1}e}"


def with_error(value: float | None, error: float | None, signed: bool = False, decimals: int = 3) -> str:
    """`value ± error`, without the error where it is None or NaN; a dash without a value."""
    if value is None or math.isnan(value):
        return "–"  # noqa: RUF001
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    return text if error is None or math.isnan(error) else f"{text} ± {error:.{decimals}f}"


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard error of independent numbers; NaN where there are too few."""
    numbers = list(values)
    if not numbers:
        return math.nan, math.nan
    mean = sum(numbers) / len(numbers)
    if len(numbers) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in numbers) / (len(numbers) - 1)
    return mean, math.sqrt(variance / len(numbers))
