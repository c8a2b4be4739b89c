"""The page of `softrl inspect` in a browser: no script fails, steps can be chosen, nothing is too wide."""

import json

import pytest
from browser import started_browser
from studies.inspected import BOUND_NATS, byte_tokenizer, record_of

from softrl.studies.inspect_page import write_page
from softrl.studies.inspect_run import line_of, readings, run_of
from softrl.studies.inspect_text import TokenTexts

pytestmark = pytest.mark.slow
WIDTHS = (1280, 400)
# What reaches beyond the window on the right or the left, but what is there for screen readers only.
OVERFLOWING = """Array.from(document.querySelectorAll("body *")).filter(function (e) {
  const b = e.getBoundingClientRect();
  return b.width > 1 && (b.right > innerWidth + 1 || b.left < -1);
}).map(e => e.outerHTML.slice(0, 120))"""
# Contrast of every text with what is behind it, by WCAG 2.1, as (ratio, text); canvas turns any CSS colour into bytes.
CONTRASTS = """(function () {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  function bytes(layers) {
    context.clearRect(0, 0, 1, 1);
    layers.forEach(function (colour) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); });
    return Array.from(context.getImageData(0, 0, 1, 1).data).slice(0, 3);
  }
  function luminance(colour) {
    const parts = colour.map(x => x / 255).map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(getComputedStyle(e).backgroundColor);
    const behind = luminance(bytes(layers)), ink = luminance(bytes([...layers, getComputedStyle(element).color]));
    found.push([(Math.max(ink, behind) + 0.05) / (Math.min(ink, behind) + 0.05), text.slice(0, 40)]);
  }
  return found;
})()"""
SHOWN = (
    """Array.from(document.querySelectorAll(".step")).filter(e => e.checkVisibility()).map(e => Number(e.dataset.n))"""
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with started_browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """24 steps with everything that tokens can do to a page, a bound, a hard phase, another run and readings."""
    texts, record = TokenTexts(byte_tokenizer()), record_of(hard_from=18, eos_ids=())
    run = run_of(line_of(record, 0, "a prompt\n" + "x" * 200), texts, "soft run", BOUND_NATS, {"kept tokens": "6"})
    other = run_of(line_of(record, 1, ""), texts, "hard decode")
    path = tmp_path_factory.mktemp("page") / "inspect.html"
    write_page(path, run, other, readings(run, texts, 3, 0), "softrl inspect --prompt " + "y" * 300)
    return path


def step_now(page):
    """The step whose details are shown, with its number in the bar; they agree, and it is the only one."""
    (shown,) = page.evaluate(SHOWN)
    assert page.evaluate("document.querySelector('.where').textContent") == f"{shown} of 24"
    assert page.evaluate(f"document.getElementById('s{shown}').checkVisibility()")
    assert page.evaluate("document.querySelectorAll('.text [aria-current=step]').length") == 1
    assert page.evaluate("document.querySelector('.text [aria-current=step]').dataset.step") == str(shown)
    return shown


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_fails_nothing_overflows_everything_can_be_read(page, path, width, dark, tmp_path):
    page.open(path, width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWING) == []
    page.evaluate("document.querySelector('[data-all]').click()")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(page.evaluate(SHOWN)) == 24
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 200
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert page.errors() == []
    assert page.requests() == [path.absolute().as_uri()]


def test_the_errors_of_a_page_are_seen(page, path, tmp_path):
    """The tests above can fail."""
    words = path.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(words.replace('<div class="area">', '<div class="area" style="width: 1300px">', 1))
    page.open(broken, 1280)
    assert page.evaluate(OVERFLOWING)
    broken.write_text(words.replace("</main>", "<img src='nowhere.png' onerror='alert(1)'></main>"))
    page.open(broken, 1280)
    assert any("Content Security Policy" in json.dumps(each) for each in page.errors())
    broken.write_text(words.replace('"use strict";', '"use strict"; nothing();'))
    page.open(broken, 1280)
    assert page.errors()  # the policy admits the script that was written, and no other
    broken.write_text(words.replace("--quiet: #565656", "--quiet: #8a8a8a"))
    page.open(broken, 1280)
    assert min(page.evaluate(CONTRASTS))[0] < 4.5


@pytest.mark.parametrize("width", WIDTHS)
def test_a_step_is_chosen_by_mouse_and_keys(page, path, width):
    page.open(path, width)
    assert step_now(page) == 1
    page.click('.text [data-step="7"]')
    assert step_now(page) == 7
    assert page.evaluate("document.getElementById('s7').innerText").count("%") > 4
    box = page.evaluate("(b => [b.top, b.bottom])(document.querySelector('.panel').getBoundingClientRect())")
    assert box[0] < 900
    assert box[1] > 60
    for key, expected in (("ArrowRight", 8), ("ArrowLeft", 7), ("End", 24), ("ArrowRight", 24), ("Home", 1)):
        page.evaluate("document.querySelector('.text [aria-current]').focus()")
        page.press(key)
        assert step_now(page) == expected
        assert page.evaluate("document.activeElement.dataset.step") == str(expected)
    page.click('[data-go="1"]')
    assert step_now(page) == 2
    page.click(".plot svg")
    assert step_now(page) in (12, 13)  # the middle
    page.click('.parts-of [data-step="20"]')
    assert step_now(page) == 20
    assert "This step was hard" in page.evaluate("document.getElementById('s20').innerText")
    assert page.evaluate("document.querySelector('.cursor').getAttribute('x')") == "19"
    assert page.errors() == []


def test_an_address_names_a_step(page, path):
    page.open(path, 1280)
    page.evaluate("location.replace(location.href + '#s11'); location.reload()")
    page.pipe.wait_for("Page.loadEventFired")
    assert step_now(page) == 11


@pytest.mark.parametrize("width", WIDTHS)
def test_without_scripts_every_step_is_there_and_opens(page, path, width):
    page.open(path, width, scripts=False)
    page.call("Emulation.setScriptExecutionDisabled", value=False)  # of the page's own none has run
    assert page.evaluate("document.documentElement.classList.contains('js')") is False
    assert len(page.evaluate(SHOWN)) == 24
    assert page.evaluate("document.querySelector('button').checkVisibility()") is False
    assert page.evaluate(OVERFLOWING) == []
    page.click('.text [data-step="9"]')
    assert page.evaluate("document.querySelector('[data-n=\"9\"]').open") is True
    assert page.evaluate("document.getElementById('s9').checkVisibility()") is True


def test_tokens_are_text(page, path):
    page.open(path, 1280)
    written = page.evaluate("document.querySelector('.text .flow').textContent")
    assert "<script>alert(1)</script>" in written or "</p>" in written
    assert page.evaluate("document.querySelectorAll('script').length") == 1
    assert page.evaluate("document.querySelectorAll('.flow script, .chip script').length") == 0
