"""The report in a browser without a window: it renders, its controls work, and nothing is fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from relaxprop.lab.experiments.gathered import gather
from relaxprop.lab.report.html import write_report
from tests.lab.test_report import HOSTILE, a_run, planned, write_curves, write_records

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no chromium with chromedriver on PATH: on Debian, apt-get install chromium chromium-driver",
)
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
    "--disable-background-networking", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    runs = [run._replace(environment={"processor": HOSTILE}) for _, run in planned(3, 4)]
    write_records(folder / "runs.jsonl", runs, command=HOSTILE)
    long = runs[1].config.model_copy(
        update={"dataset": "a_data_set_with_a_very_long_name_that_does_not_break", "seed": 9}
    )
    write_records(folder / "long" / "runs.jsonl", [a_run("baseline", long)])
    write_curves(folder, HOSTILE, parameter=HOSTILE)
    return write_report(gather([folder]), folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def started() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(started: webdriver.Chrome, address: str) -> Iterator[webdriver.Chrome]:
    """The page, freshly opened. Afterwards nothing was complained about, and nothing fetched."""
    for kind in ("browser", "performance"):
        log(started, kind)
    look(started, 1280)
    started.get(address)
    yield started
    assert log(started, "browser") == []
    events = [json.loads(entry["message"])["message"] for entry in log(started, "performance")]
    requested = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert {url.partition("#")[0] for url in requested if not url.startswith("data:")} <= {address}


def log(driver: webdriver.Chrome, kind: str) -> list[Any]:
    """What was logged since the last time."""
    entries: list[Any] = driver.get_log(kind)  # type: ignore[no-untyped-call]
    return entries


def look(driver: webdriver.Chrome, width: int, scheme: str = "light") -> None:
    scheme_is = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_is]})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    # The page hears of it when it is drawn the next time.
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def charts(driver: webdriver.Chrome) -> list[WebElement]:
    return driver.find_elements(By.CLASS_NAME, "chart")


def traces(driver: webdriver.Chrome, kind: str, chart: int = 0) -> list[str]:
    """Names of what is drawn, by Plotly."""
    drawn = (
        "const { data } = document.querySelectorAll('.plot')[arguments[0]];"
        "return data.filter(t => t.meta == arguments[1]).map(t => t.name)"
    )
    names: list[str] = driver.execute_script(drawn, chart, kind)
    return names


def ranges(driver: webdriver.Chrome, chart: int = 0) -> list[list[float]]:
    script = (
        "const l = document.querySelectorAll('.plot')[arguments[0]]._fullLayout; return [l.xaxis.range, l.yaxis.range]"
    )
    found: list[list[float]] = driver.execute_script(script, chart)
    return found


def same(now: list[list[float]], before: list[list[float]]) -> bool:
    return [*now[0], *now[1]] == pytest.approx([*before[0], *before[1]])


def lines(chart: WebElement) -> int:
    """Curves in the drawing itself."""
    return len(chart.find_elements(By.CSS_SELECTOR, ".scatterlayer .trace"))


def checkbox(chart: WebElement, name: str, value: str) -> WebElement:
    return chart.find_element(By.CSS_SELECTOR, f"input[name={name}][value={json.dumps(value)}]")


def test_it_renders(browser: webdriver.Chrome) -> None:
    assert browser.title == "relaxprop: report"
    found = charts(browser)
    assert len(found) == 5  # curves and alignment of two figures, convergence
    for chart in found:
        assert lines(chart) > 0
        assert chart.find_element(By.CSS_SELECTOR, ".ytitle").text
    assert len(traces(browser, "mean")) == len(traces(browser, "band")) == 6
    dashes = (
        "return document.querySelector('.plot').data.filter(t => t.meta == 'mean').map(t => t.line.color + t.line.dash)"
    )
    assert len(set(browser.execute_script(dashes))) == 6
    assert browser.execute_script("return document.images.length") == 0


def test_what_comes_from_records_runs_nothing(browser: webdriver.Chrome) -> None:
    assert HOSTILE in browser.find_element(By.ID, "origin").text
    assert HOSTILE in charts(browser)[-1].find_element(By.CLASS_NAME, "names").text
    assert traces(browser, "mean", chart=4)[0] == HOSTILE.replace("&", "&amp;").replace("<", "&lt;").replace(
        ">", "&gt;"
    )


def test_conditions_are_toggled(browser: webdriver.Chrome) -> None:
    chart = charts(browser)[0]
    before = lines(chart)
    toggle = checkbox(chart, "curve", "d: presynaptic x in the update")
    toggle.click()
    assert "d: presynaptic x in the update" not in traces(browser, "mean") + traces(browser, "band")
    assert len(traces(browser, "mean")) == 5
    assert lines(chart) == before - 2  # its line and its band
    assert ranges(browser)[1][0] > 0.5  # the others fill the chart
    toggle.click()
    assert lines(chart) == before


def test_seeds_are_toggled(browser: webdriver.Chrome) -> None:
    chart = charts(browser)[0]
    assert traces(browser, "seed") == []
    for shown, seed in enumerate(("0", "2"), 1):
        checkbox(chart, "seed", seed).click()
        assert len(traces(browser, "seed")) == 6 * shown
    script = "return document.querySelector('.plot').data.find(t => t.meta == 'seed').y"
    assert browser.execute_script(script) == [
        m.test_accuracy for m in a_run("backprop", planned()[0][1].config).metrics
    ]
    checkbox(chart, "seed", "0").click()
    assert len(traces(browser, "seed")) == 6


def test_another_quantity_is_shown(browser: webdriver.Chrome) -> None:
    curves, alignment = charts(browser)[:2]
    Select(curves.find_element(By.TAG_NAME, "select")).select_by_visible_text("training loss")
    assert curves.find_element(By.CSS_SELECTOR, ".ytitle").text == "training loss per label"
    assert checkbox(alignment, "curve", "2").is_displayed()
    select = Select(alignment.find_element(By.TAG_NAME, "select"))
    select.select_by_visible_text("Activation Relaxation – backwards weights to weights")
    assert traces(browser, "mean", chart=1) == ["1"]
    assert not checkbox(alignment, "curve", "2").is_displayed()  # it has no backwards weights


def test_zoom_by_buttons_and_by_dragging(browser: webdriver.Chrome) -> None:
    chart = charts(browser)[0]
    whole = ranges(browser)

    def press(how: str) -> list[list[float]]:
        chart.find_element(By.CSS_SELECTOR, f"[data-zoom={how}]").click()
        return ranges(browser)

    inside = press("in")
    for (a, b), (low, high) in zip(inside, whole, strict=True):
        assert low < a < b < high
    checkbox(chart, "curve", "Backpropagation").click()  # which keeps what is looked at
    assert same(ranges(browser), inside)
    right = press("right")
    assert right[0][0] > inside[0][0]
    assert right[1] == pytest.approx(inside[1])
    assert press("up")[1][0] > right[1][0]
    checkbox(chart, "curve", "Backpropagation").click()
    assert same(press("reset"), whole)
    drag = chart.find_element(By.CSS_SELECTOR, ".nsewdrag")
    webdriver.ActionChains(browser).move_to_element_with_offset(drag, -100, -50).click_and_hold().move_by_offset(
        150, 90
    ).release().perform()
    dragged = ranges(browser)
    assert dragged[0][1] - dragged[0][0] < whole[0][1] - whole[0][0]
    checkbox(chart, "curve", "Backpropagation").click()
    assert same(ranges(browser), dragged)
    checkbox(chart, "curve", "Backpropagation").click()
    assert same(press("reset"), whole)


def test_everything_works_by_keyboard(browser: webdriver.Chrome) -> None:
    reached: list[tuple[str, str]] = []
    operated = set()
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        now = browser.switch_to.active_element
        name = now.get_attribute("name") or now.get_attribute("data-zoom") or ""
        reached.append((now.tag_name, name))
        outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", reached[-1]
        if (now.tag_name, name) == ("input", "curve") and "curve" not in operated:
            operated.add("curve")
            now.send_keys(Keys.SPACE)
            assert "Backpropagation" not in traces(browser, "mean")
        if (now.tag_name, name) == ("button", "in") and "in" not in operated:
            operated.add("in")
            whole = ranges(browser)
            now.send_keys(Keys.ENTER)
            assert ranges(browser) != whole
        if (now.tag_name, name) == ("button", "reset") and "reset" not in operated:
            operated.add("reset")
            now.send_keys(Keys.SPACE)
            assert ranges(browser)[1] == pytest.approx(whole[1])
        if now.tag_name == "summary" and "summary" not in operated:
            operated.add("summary")
            now.send_keys(Keys.ENTER)
            assert charts(browser)[0].find_element(By.TAG_NAME, "table").is_displayed()
    assert operated == {"curve", "in", "reset", "summary"}
    assert {tag for tag, _ in reached} >= {
        "a",
        "select",
        "input",
        "button",
        "summary",
        "div",
    }  # div: tables that scroll


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_every_width_and_colour_scheme(browser: webdriver.Chrome, address: str, width: int, scheme: str) -> None:
    look(browser, width, scheme)
    browser.get(address)
    for details in browser.find_elements(By.TAG_NAME, "details"):
        browser.execute_script("arguments[0].open = true", details)
    assert browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
    for plot in browser.find_elements(By.CSS_SELECTOR, ".plot .main-svg"):
        assert plot.size["width"] <= width
    colours: list[Any] = browser.execute_script(
        "const s = getComputedStyle(document.body), t = document.querySelector('.xtick text');"
        "return [s.backgroundColor, s.color, getComputedStyle(t).fill]"
    )
    ground, ink, label = (luminance(colour) for colour in colours)
    assert (ground > 0.5) == (scheme == "light")
    assert contrast(ground, ink) >= 7
    assert contrast(ground, label) >= 7
    strokes: list[str] = browser.execute_script(
        "return document.querySelector('.plot').data.filter(t => t.meta == 'mean').map(t => t.line.color)"
    )
    hexadecimal = [tuple(int(s[i : i + 2], 16) for i in (1, 3, 5)) for s in strokes]
    assert all(contrast(ground, luminance(f"rgb{rgb}")) >= 3 for rgb in hexadecimal)


def test_the_colour_scheme_may_change_while_it_is_open(browser: webdriver.Chrome) -> None:
    fill = "return getComputedStyle(document.querySelector('.xtick text')).fill"
    light = browser.execute_script(fill)
    look(browser, 1280, "dark")
    assert contrast(luminance(browser.execute_script(fill)), luminance(light)) > 4


def test_in_print_there_are_charts_and_no_controls(browser: webdriver.Chrome) -> None:
    look(browser, 1280, "dark")
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    chart = charts(browser)[0]
    assert not [e for e in chart.find_elements(By.CSS_SELECTOR, "input, button") if e.is_displayed()]
    assert [e for e in chart.find_elements(By.CSS_SELECTOR, ".names label") if e.is_displayed()]  # they are the legend
    assert 0 < chart.find_element(By.CLASS_NAME, "main-svg").size["width"] < 700
    fill = browser.execute_script("return getComputedStyle(document.querySelector('.xtick text')).fill")
    assert luminance(fill) < 0.1  # on paper
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert chart.find_element(By.CLASS_NAME, "main-svg").size["width"] > 700


def test_names_for_those_who_do_not_see(browser: webdriver.Chrome) -> None:
    assert browser.execute_script("return document.documentElement.lang") == "en"
    for chart in charts(browser):
        plot = chart.find_element(By.CLASS_NAME, "plot")
        assert plot.get_attribute("role") == "img"
        assert plot.get_attribute("aria-label")
        for control in chart.find_elements(By.CSS_SELECTOR, "input, button, select"):
            if control.is_displayed():
                assert control.accessible_name
    levels = [int(h.tag_name[1]) for h in browser.find_elements(By.CSS_SELECTOR, "h1, h2, h3, h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def luminance(colour: str) -> float:
    """Relative, of ``rgb(r, g, b)``, as the Web Content Accessibility Guidelines define it."""
    channels = [int(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
