"""The page of tools/report.py in a real browser, offline: drawn, legible, and nothing is fetched."""

import contextlib
import fcntl
import json
import os
import shutil

import pytest
from metrics import made_up_run
from page import contrast, rgb

import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TICKS = "() => getComputedStyle(document.querySelector('.xtick text')).fill"
SETTLED = "() => document.querySelectorAll('.panel .main-svg').length > 0"


@pytest.fixture(scope="module")
def browser():
    """Skipped where there is none, unless BROWSER_TESTS=require."""
    with contextlib.ExitStack() as stack:
        try:
            if not BROWSER:
                raise ImportError("chromium is not installed")
            from playwright.sync_api import sync_playwright

            pytest.importorskip("plotly")
            driver = stack.enter_context(sync_playwright())
        except ImportError as error:
            if os.environ.get("BROWSER_TESTS") == "require":
                pytest.fail(f"BROWSER_TESTS=require, but {error}")
            pytest.skip(f"needs a browser: {error}")
        yield stack.enter_context(contextlib.closing(driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])))


@pytest.fixture
def open_page(browser, tmp_path):
    """A function that opens the page of these runs; at the end there was no error and no request but for the file."""
    wrong = []
    contexts = []

    def opened(*words, scheme="light", clock=False):
        file = tmp_path / "page.html"
        assert report.main([*map(str, words), "--html", str(file)]) == 0
        context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": 1300, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.partition("#")[0] == file.as_uri() or wrong.append(request.url))
        if clock:
            page.clock.install()
        page.goto(file.as_uri())
        page.wait_for_function(SETTLED)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def colour(page, selector, what="color"):
    return rgb(page.eval_on_selector(selector, f"element => getComputedStyle(element)['{what}']"))


def illegible(page):
    """{text: contrast} of those texts of the page and its panels that have less than 4.5 with what is behind them."""
    card = colour(page, ".panel", "background-color")
    texts = {"h1": "body", "#results thead button": "#results thead th", "#results tbody td": ".scroll",
             ".choice button[aria-pressed=true]": ".choice button[aria-pressed=true]",
             ".choice button[aria-pressed=false]": ".choice button[aria-pressed=false]",
             ".choice > span": "body", "summary": "body"}
    found = {text: contrast(colour(page, text), colour(page, ground, "background-color")) for text, ground in texts.items()}
    for text in (".xtick text", ".ytick text", ".xtitle", ".ytitle", ".gtitle", ".legendtext"):
        found[text] = contrast(colour(page, text, "fill"), card)
    return {text: ratio for text, ratio in found.items() if ratio < 4.5}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_one_run_is_drawn_and_legible(open_page, tmp_path, scheme):
    page = open_page(made_up_run(tmp_path / "run"), scheme=scheme)
    titles = page.eval_on_selector_all(".gtitle", "elements => elements.map(element => element.textContent)")
    assert titles == ["training loss", "validation", "learning rate", "step time", "phases",
                      "size by role of parameters"]
    curves = page.eval_on_selector_all(".scatterlayer path.js-line", "lines => lines.map(line => line.getAttribute('d').length)")
    assert len(curves) == 4 and min(curves) > 20
    assert page.locator(".barlayer path").count() >= 8
    assert illegible(page) == {}
    luminance = sum(colour(page, "body", "background-color"))
    assert luminance > 600 if scheme == "light" else luminance < 150


def test_the_theme_follows_the_system_and_the_button(open_page, tmp_path):
    page = open_page(made_up_run(tmp_path / "run"))
    light = page.evaluate(TICKS)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"light => ({TICKS})() !== light", arg=light)
    assert illegible(page) == {}
    page.click("#theme button[data-value=light]")
    assert page.evaluate(TICKS) == light and illegible(page) == {}


def test_the_axis_is_switched_and_kept_over_a_reload(open_page, tmp_path):
    run = made_up_run(tmp_path / "run")
    page = open_page(run, "--x", "steps")
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [event for event in events if event["event"] == "train"]
    shown = "() => Array.from(document.querySelector('.panel').data[0].x)"
    assert page.evaluate(shown) == [event["step"] for event in train]
    assert page.locator(".xtitle").first.text_content() == "optimizer steps"
    page.click("#x button[data-value=seconds]")
    assert page.evaluate(shown) == [event["train_time_ms"] / 1000 for event in train]
    page.click("#x button[data-value=tokens]")
    page.click("#theme button[data-value=dark]")
    assert page.evaluate(shown) == [2048 * event["step"] for event in train]
    assert page.locator(".xtitle").first.text_content() == "training tokens"
    page.reload()
    page.wait_for_function(SETTLED)
    assert page.evaluate(shown) == [2048 * event["step"] for event in train]
    assert sum(colour(page, "body", "background-color")) < 150


def test_a_page_of_a_running_run_reloads_itself(open_page, tmp_path):
    run = made_up_run(tmp_path / "run", ended=("", 1))
    with open(run / "run.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        page = open_page(run, clock=True)
    page.click("#x button[data-value=steps]")
    with page.expect_navigation():
        page.clock.fast_forward(6000)
    page.wait_for_function(SETTLED)
    assert page.locator("#x button[data-value=steps]").get_attribute("aria-pressed") == "true"


def test_fifty_runs_stay_readable(open_page, tmp_path):
    ended = {7: ("the loss is not finite at step 200", 4)}
    runs = [made_up_run(tmp_path / f"run{place:02}", score=1.5 - place / 100, seed=place % 2, ended=ended.get(place),
                        settings=f"MATRIX_LR={0.01 * (1 + place // 2):.2f}") for place in range(50)]
    page = open_page(*runs, "--compare")
    assert page.locator("#results tbody tr").count() == 50 and page.locator("#comparison tbody tr").count() == 25
    assert page.locator("#legend .swatch").count() == 0 and page.locator("#legend .scale").count() == 1
    assert page.locator("nav").bounding_box()["height"] < 60, "the legend is one line"
    assert page.locator("body").bounding_box()["height"] < 4000
    first = "() => document.querySelector('#results tbody tr th').textContent"
    page.get_by_role("button", name="final, of the packed model").click()
    assert page.evaluate(first) == "run49"
    page.get_by_role("button", name="final, of the packed model").click()
    assert page.evaluate(first) == "run00"
    assert page.locator("#results tbody tr").last.locator("th").text_content() == "run07", "without a score it is last"
    page.get_by_role("button", name="MATRIX_LR").click()
    assert page.evaluate(first) in ("run00", "run01")
    assert "diverged (the loss is not finite at step 200)" in page.locator("tr.diverged").text_content()
    page.locator("#results tbody tr", has_text="run05").hover()
    opacities = page.evaluate("() => document.querySelector('.panel').data.map(trace => trace.opacity)")
    assert opacities[5] == 1 and opacities.count(0.15) == 49
    assert illegible(page) == {}


def test_what_a_file_says_is_text_and_no_markup(open_page, tmp_path):
    evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    runs = [made_up_run(tmp_path / name, settings="'NOTE=<b>bold</b>$title'", valid="no", reasons=[evil], data=name)
            for name in ("<i>one<", "$report & two")]
    page = open_page(*runs)
    assert page.title() == "2 runs" and page.locator(".warning").text_content().startswith("They scored different texts")
    names = [text.strip() for text in page.locator("#results tbody th").all_text_contents()]
    assert names == ["<i>one<", "$report & two"]
    assert page.locator("#results td", has_text="document.title").count() == 2
    assert page.locator("body img, #results i:not(.swatch), b").count() == 0
    labels = page.eval_on_selector_all(".ytick text", "elements => elements.map(element => element.textContent)")
    assert "<i>one<" in labels and page.locator(".panel i, .panel script").count() == 0


def test_page_and_picture_show_the_same(open_page, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    runs = [made_up_run(tmp_path / f"run{place}", score=1.2 + place / 10) for place in range(3)]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    page = open_page(*runs, "--plot", tmp_path / "x.png")
    drawn = page.evaluate("() => [...document.querySelectorAll('.panel')].map(panel => [panel.layout.title.text, "
                          "panel.data.map(trace => [Array.from(trace.x), Array.from(trace.y), trace.type])])")
    assert len(drawn) == len(figures[0].axes) == 6
    for (title, traces), axes in zip(drawn, figures[0].axes):
        assert axes.get_title(loc="left") == title
        curves = [[list(line.get_xdata()), list(line.get_ydata())] for line in axes.lines]
        if traces[0][2] == "scatter":
            assert [trace[:2] for trace in traces] == curves
        else:
            assert [width for trace in traces for width in trace[0]] == pytest.approx(
                [bar.get_width() for bar in axes.patches])
