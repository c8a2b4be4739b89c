"""The page about scale is what its command prints, and says what does not fit."""

from pathlib import Path

from softrl.studies.scale import LIMIT, cell, page, policies

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_the_page_is_what_the_command_prints():
    assert PAGE.read_text(encoding="utf-8") == page() + "\n"


def test_the_first_number_of_processes_that_fits_is_shown():
    by_name = {policy.name: policy for policy in policies()}
    small = cell(by_name["1B, LoRA"], "parallel", 256, "zero3")
    assert (small.num_processes, small.fits) == (8, True)
    large = cell(by_name["70B, LoRA"], "blocked", 256, "zero3")
    assert large.fits
    assert large.num_processes > 8
    whole = cell(by_name["70B, all parameters"], "score_function", 256, "zero3")
    assert not whole.fits, "the reference alone is larger than a GPU"
    assert whole.held.peak > 2 * by_name["70B, all parameters"].shape.num_parameters > LIMIT
