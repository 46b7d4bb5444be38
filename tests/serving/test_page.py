"""The page in a real browser: answers side by side, shading, alpha, keyboard, phone width, nothing from outside."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("browser", Path(__file__).parent.parent / "browser.py")
browser = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(browser)

KEY = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def page(url, tmp_path_factory):
    with browser.chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(url)
        until(driver, lambda: "Run tiny" in by(driver, "#about").text)
        yield driver


def by(page, selector):
    return page.find_element("css selector", selector)


def until(page, condition, seconds=30):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(page, seconds, poll_frequency=0.05).until(lambda _: condition())


def status(page):
    return by(page, "#status").text


def compare(page, prompt="hey, how was your", tokens=12):
    for selector, value in (("#prompt", prompt), ("#tokens", str(tokens))):
        field = by(page, selector)
        field.clear()
        field.send_keys(value)
    by(page, "#compare").click()
    until(page, lambda: status(page).startswith(("Done", "No answer")))


def set_alpha(page, value):
    page.execute_script(
        "const s = document.getElementById('alpha'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input', {bubbles: true})); s.dispatchEvent(new Event('change', {bubbles: true}));",
        value,
    )


def answer(page, arm):
    return page.execute_script("return document.querySelector(arguments[0]).textContent", f"[data-arm={arm}] .answer")


def test_three_answers_are_those_of_the_api_and_changed_tokens_are_shaded(page, client):
    compare(page)
    assert status(page).startswith("Done: tuning changed"), status(page)
    prompt = "hey, how was your"
    for arm, model in (("large", "tiny:large"), ("small", "tiny:small"), ("proxied", "tiny")):
        text = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=12).choices[0].text
        assert answer(page, arm) == prompt + text
    changed = page.find_elements("css selector", "[data-arm=proxied] .changed")
    assert changed
    assert status(page).startswith(f"Done: tuning changed {len(changed)} of 12")
    assert page.find_elements("css selector", "[data-arm=large] .changed") == []
    shown = changed[0].value_of_css_property("background-color")
    assert shown not in ("rgba(0, 0, 0, 0)", by(page, "article").value_of_css_property("background-color"))
    assert "underline" in changed[0].value_of_css_property("text-decoration")  # not by colour alone


def test_alpha_zero_takes_the_tuning_away_and_asks_for_the_steered_answer_only(page):
    compare(page)
    small = answer(page, "small")
    set_alpha(page, "0")
    until(page, lambda: status(page).startswith("Done: tuning changed 0 of 12"))
    assert by(page, "#alpha-value").text == "0.00"
    assert answer(page, "proxied") == answer(page, "large")
    assert answer(page, "small") == small
    set_alpha(page, "2")
    until(page, lambda: status(page).startswith("Done") and " 0 of 12" not in status(page))
    assert answer(page, "proxied") != answer(page, "large")


def test_changed_tokens_are_reached_and_explained_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    set_alpha(page, "1")
    compare(page)
    stops = page.find_elements("css selector", "[data-arm=proxied] .changed[tabindex='0']")
    changed = page.find_elements("css selector", "[data-arm=proxied] .changed")
    assert len(changed) >= 2
    assert stops == changed[:1]  # one stop on the way of the Tab key, however many tokens there are
    page.execute_script("document.getElementById('compare').focus()")
    page.switch_to.active_element.send_keys(Keys.TAB)
    assert page.switch_to.active_element == changed[0]
    first = by(page, "#detail").text
    assert "large model alone would have said" in first
    assert "%" in first
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element == changed[1]
    assert by(page, "#detail").text == changed[1].get_attribute("title")


def test_everything_can_be_used_without_a_mouse(page):
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.execute_script("document.querySelector('.skip').focus()")
    seen = []
    for _ in range(9):
        page.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(page.switch_to.active_element.get_attribute("id"))
    assert [name for name in seen if name][:7] == [
        "prompt",
        "alpha",
        "tokens",
        "temperature",
        "seed",
        "chat",
        "compare",
    ]


def test_every_control_has_a_name_and_every_changed_token_says_so(page):
    compare(page)
    for control in page.find_elements("css selector", "input, textarea, button, [tabindex='0']"):
        assert control.accessible_name or not control.is_displayed(), control.get_attribute("outerHTML")
    changed = page.find_elements("css selector", "[data-arm=proxied] .changed")
    assert all("changed" in token.accessible_name for token in changed)
    assert by(page, "#status").aria_role == "status"
    headings = [heading.text for heading in page.find_elements("css selector", "h2")]
    assert headings == ["Large model alone", "Small model, tuned", "Large model, steered"]


def test_an_error_is_told_and_the_page_goes_on(page):
    compare(page, tokens=300)
    assert status(page).startswith("No answer: this server writes at most 256")
    assert "bad" in by(page, "#status").get_attribute("class")
    compare(page, tokens=3)
    assert status(page).startswith("Done")


def test_markup_in_a_prompt_is_text(page):
    compare(page, prompt="<img src=x onerror=alert(1)><b>hey</b>", tokens=2)
    assert answer(page, "large").startswith("<img src=x onerror=alert(1)><b>hey</b>")
    assert page.find_elements("css selector", ".answer img, .answer b") == []


def test_nothing_comes_from_outside_and_the_console_is_clean(page, url):
    page.get_log("browser")
    page.refresh()
    until(page, lambda: "epsilon <= 4" in by(page, "#privacy").text)
    outside = [asked for asked in browser.requested_urls(page) if not asked.startswith((url, "data:", "chrome:"))]
    assert outside == []
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    # The policy is not only sent, it holds: an inline script does not run.
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
    )
    assert page.execute_script("return window.ran === undefined")


def test_it_fits_a_phone_in_light_and_dark_and_text_can_be_read(page):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        compare(page)
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        for selector in ("#compare", "#alpha", "#prompt"):
            assert by(page, selector).size["height"] >= 24  # WCAG 2.2's smallest target
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            ground = colour(by(page, "body").value_of_css_property("background-color"))
            assert (sum(ground) < 384) == (scheme == "dark")
            for selector in ("h1", ".help", "label", "#privacy", ".answer", ".given", ".changed", "#compare"):
                assert contrast(page, by(page, selector)) >= 4.5, (scheme, selector)
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_key_is_asked_for_where_one_is_needed(serving, make_run, tmp_path):
    from fedpt_secure.serving import ApiKeys

    with serving(make_run(), keys=ApiKeys([KEY])) as url, browser.chromium(tmp_path / "profile") as page:
        page.get(url)
        until(page, lambda: by(page, "#key").is_displayed())
        assert page.switch_to.active_element == by(page, "#key")
        by(page, "#key").send_keys(KEY)
        page.execute_script("document.getElementById('prompt').focus()")
        until(page, lambda: "Run tiny" in by(page, "#about").text)
        compare(page, tokens=3)
        assert status(page).startswith("Done")
        kept = page.execute_script("return JSON.stringify([localStorage, sessionStorage, document.cookie])")
        assert KEY not in kept
        assert json.loads(kept) == [{}, {}, ""]


def colour(text):
    """The red, green and blue of a CSS colour."""
    return [float(part) for part in text[text.index("(") + 1 : -1].split(",")[:3]]


def contrast(page, element):
    """WCAG's contrast of an element's text on the first ground behind it that is not transparent."""
    ground = page.execute_script(
        "let e = arguments[0];"
        "while (e && getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;"
        "return getComputedStyle(e ?? document.body).backgroundColor",
        element,
    )
    light, dark = sorted((luminance(colour(ground)), luminance(colour(element.value_of_css_property("color")))))[::-1]
    return (light + 0.05) / (dark + 0.05)


def luminance(rgb):
    linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
