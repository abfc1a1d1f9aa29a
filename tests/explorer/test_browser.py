"""The explorer's page in a real browser: headless Chromium, driven by Playwright."""

import json
import re
import shutil
import threading

import pytest
from small_run import M

pytest.importorskip("playwright", reason="the Python package playwright is not installed")

from playwright.sync_api import expect, sync_playwright

from retro_jax.explorer.page import render
from retro_jax.explorer.session import Session

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)")

PROMPT = "Some words to begin with <script>window.hacked=1</script><b>& more</b>"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Root has no sandbox; /dev/shm is small in containers.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens pages that must neither complain nor ask for anything but their own files."""
    contexts, complaints = [], []

    def open_page(address, **options):
        context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}} | options)
        contexts.append(context)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        own = address.partition("#")[0]
        page.on("request", lambda request: request.url.startswith((own, "data:")) or complaints.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # What the server refuses is logged by the browser itself.
    assert [text for text in complaints if "the server responded with a status of 4" not in text] == []


@pytest.fixture
def page(open_page, port):
    page = open_page(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#ask:not([hidden])")
    return page


@pytest.fixture
def generated(page):
    page.fill("#prompt", PROMPT)
    page.fill("#max_new_tokens", "20")
    page.fill("#seed", "8")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#chunks .chunk")
    return page


def view_of(page):
    return page.evaluate("explorer.state.view")


def figures(page):
    return [page.locator("#total dd").all_inner_texts(), page.locator(".figures").all_inner_texts()]


def classes(page, selector):
    found = page.locator(selector).evaluate_all("all => all.map(element => element.className)")
    return [re.search(r"\b[lr]-?\d\b", name)[0] for name in found]


def test_it_begins_with_what_it_was_started_with(page):
    assert page.input_value("#prompt") == "Some words to begin with" and page.input_value("#max_new_tokens") == "12"
    expect(page.locator("#run")).to_contain_text("runs/tiny, step 40 · 2 neighbours for each chunk of 8 tokens")
    expect(page.locator("#limits")).to_contain_text("at most 200 tokens of prompt and 64 new ones")


def test_it_generates_on_and_off_and_shows_chunks_with_their_neighbours_and_figures(generated):
    view = view_of(generated)
    assert generated.locator("#text-on").text_content() == view["texts"]["on"] != ""
    assert generated.locator("#text-off").text_content() == view["texts"]["off"] != ""
    assert generated.locator("#chunks .chunk").count() == len(view["chunks"]) >= 4
    shown = [chunk.text_content() for chunk in generated.locator(".own .text").all()]
    assert "".join(shown) == "".join(token["text"] for token in view["tokens"]) == PROMPT + view["texts"]["on"]
    bits = view["total"]["bits_per_byte"]
    assert figures(generated)[0][:2] == [f"{bits['off']:.3f}", f"{bits['on']:.3f}"]
    card = generated.locator("[data-key='1-2']")
    assert view["chunks"][1]["reads"]["neighbours"][1]["document"] in card.text_content()
    for text in ("2", "distance 1.250", "Neighbour", "Continuation"):
        assert text in card.text_content()
    marked = generated.locator(".token.begins")
    assert marked.count() == 1 and view["tokens"][view["prompt_tokens"]]["text"] == marked.text_content()


def test_tokens_are_coloured_by_loss_or_by_match_with_a_legend(generated):
    def expected(token):
        gain = (token["off"] - token["on"]) / 0.1
        size = min(int(abs(gain) + 0.5), 5)
        return f"l{'-' if gain < 0 and size else ''}{size}"

    tokens = view_of(generated)["tokens"]
    assert classes(generated, ".own .token") == [expected(token) for token in tokens]
    assert len({*classes(generated, ".own .token")}) > 3
    expect(generated.locator("#legend")).to_contain_text("hurts −0.5")
    assert generated.locator("#legend i").count() == 11 + 6
    generated.get_by_label("match").check(force=True)
    assert classes(generated, ".own .token") == [f"r{min(token['run'], 5)}" for token in tokens]
    assert {token["run"] for token in tokens} > {0, 1}
    expect(generated.locator("#legend")).to_contain_text("tokens in common")
    colours = generated.locator("#legend i").evaluate_all("all => all.map(i => getComputedStyle(i).backgroundColor)")
    assert len(set(colours)) == 6


def test_a_neighbour_is_dropped_another_typed_in_and_the_text_is_rescored(generated):
    before, first = figures(generated), view_of(generated)
    generated.locator("[data-key='2-1']").get_by_role("button", name="Drop").click()
    expect(generated.locator("[data-key='2-1']")).to_have_class("card dropped")
    dropped = figures(generated)
    assert dropped[1][:2] == before[1][:2] and dropped[1][2] != before[1][2] and dropped[0] != before[0]
    assert "as retrieved" in dropped[1][2]
    card = generated.locator("[data-key='1-2']")
    card.get_by_role("button", name="Replace").click()
    card.locator("textarea").fill("<b>my own</b> words")
    card.get_by_role("button", name="Rescore").click()
    expect(card).to_have_class("card typed")
    assert "".join(card.locator(".token").all_text_contents()) == "<b>my own</b> words"
    assert card.locator("b").count() == 0
    typed = figures(generated)
    assert typed[1][1] != dropped[1][1] and typed[1][0] == before[1][0]
    off = [[token["off"] for token in view["tokens"]] for view in (first, view_of(generated))]
    assert off[0] == off[1]
    generated.get_by_role("button", name="Undo all edits").click()
    expect(card).to_have_class("card retrieved")
    assert figures(generated) == before


def test_the_address_restores_the_session_and_the_json_has_it(generated, open_page):
    generated.locator("[data-key='1-1']").get_by_role("button", name="Drop").click()
    expect(generated.locator("[data-key='1-1']")).to_have_class("card dropped")
    generated.get_by_label("match").check(force=True)
    with generated.expect_download() as download:
        generated.get_by_role("button", name="Save JSON").click()
    saved = json.loads(download.value.path().read_text())
    assert saved == view_of(generated) and saved["session"]["edits"] == [{"chunk": 1, "rank": 1, "text": None}]
    again = open_page(generated.url)
    expect(again.locator("[data-key='1-1']")).to_have_class("card dropped")
    assert view_of(again) == saved and again.input_value("#prompt") == PROMPT and again.input_value("#seed") == "8"
    assert again.locator("[name=colour]:checked").input_value() == "run"
    assert figures(again) == figures(generated)


def test_the_other_continuation_can_be_looked_at_and_a_prompt_alone(generated):
    generated.locator("#show-off").click()
    expect(generated.locator("#result-title")).to_contain_text("RETRO[OFF]")
    view = view_of(generated)
    assert "".join(token["text"] for token in view["tokens"]) == PROMPT + view["texts"]["off"]
    generated.get_by_role("button", name="Only look at the prompt").click()
    expect(generated.locator("#continuations")).to_be_hidden()
    assert "".join(token["text"] for token in view_of(generated)["tokens"]) == PROMPT


def test_texts_of_documents_and_prompts_are_inert(generated):
    for text in ("onerror", "</script>"):
        assert text in generated.locator("#chunks").text_content()
    assert generated.locator("main script, main img, main b").count() == 0
    assert generated.evaluate("window.hacked") is None


def test_the_keyboard_goes_through_tokens_and_neighbours(generated):
    chunk = generated.locator("#chunk-3")
    chunk.locator(".own .token").first.focus()
    generated.keyboard.press("ArrowRight")
    tokens = view_of(generated)["tokens"]
    place = 2 * M - 1 + 1
    assert chunk.locator(".own .token").nth(1).evaluate("element => element === document.activeElement")
    expect(generated.locator("#readout")).to_contain_text(f"OFF {tokens[place]['off']:.2f}")
    generated.keyboard.press("End")
    assert chunk.locator(".own .token").last.evaluate("element => element === document.activeElement")
    generated.keyboard.press("Escape")
    expect(generated.locator("#readout")).to_be_hidden()
    chunk.locator(".own .token").last.focus()
    generated.keyboard.press("Tab")  # from the text of a chunk to the first button of its neighbours
    name = generated.evaluate("document.activeElement.getAttribute('aria-label')")
    assert name == "Drop neighbour 1 of chunk 2"
    generated.keyboard.press("Enter")
    expect(generated.locator("[data-key='2-1']")).to_have_class("card dropped")
    assert generated.evaluate("document.activeElement.getAttribute('aria-label')") == "Restore neighbour 1 of chunk 2"


def test_a_match_is_marked_in_the_neighbours(generated):
    tokens = view_of(generated)["tokens"]
    chunk = view_of(generated)["chunks"][1]
    place = max(range(chunk["first"], chunk["end"]), key=lambda place: tokens[place]["run"])
    assert tokens[place]["run"] > 0
    generated.locator("#chunk-2 .own .token").nth(place - chunk["first"]).click()
    marked = generated.locator("#chunk-2 .read .match").all_text_contents()
    assert "".join(marked).endswith(tokens[place]["text"]) and len(marked) >= tokens[place]["run"]


def test_a_busy_server_is_told_of_and_the_page_can_go_on(page, turns):
    waiting = [turns.begin(iter_nothing()) for _ in range(2)]
    page.click("#look")
    expect(page.locator("#status")).to_contain_text("busy with other requests; try again")
    for turn in waiting:
        turn.close()
    turns.thread.submit(lambda: None).result()  # behind the two
    page.click("#look")
    expect(page.locator("#chunk-1")).to_be_visible()


def iter_nothing():
    yield


def test_what_is_too_long_is_told_and_a_damaged_link_too(page, open_page, port):
    page.fill("#prompt", "word " * 300)
    page.click("#look")
    expect(page.locator("#status")).to_contain_text("at most 200 are taken, shorten it")
    damaged = open_page(f"http://127.0.0.1:{port}/#nonsense")
    expect(damaged.locator("#status")).to_contain_text("This link is damaged")
    expect(damaged.locator("#generate")).to_be_enabled()


def test_a_generation_can_be_stopped_and_what_has_come_is_shown(page, monkeypatch, explorer):
    generate, page_stopped = explorer.generate, threading.Event()

    def slowly(session):
        pieces = generate(session)
        yield next(pieces)
        yield next(pieces)
        page_stopped.wait(30)
        yield from pieces

    monkeypatch.setattr(explorer, "generate", slowly)
    page.fill("#max_new_tokens", "60")
    page.click("#generate")
    page.wait_for_selector("#text-off:not(:empty)")
    page.click("#stop")
    page_stopped.set()
    page.wait_for_selector("#chunks .chunk")
    expect(page.locator("#status")).to_contain_text("Stopped")
    session = view_of(page)["session"]
    assert 0 < len(session["on"]) < 60 and 0 < len(session["off"]) < 60


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_from_a_file_shows_the_same_and_fits_a_phone(explorer, open_page, tmp_path, scheme):
    view = explorer.view(Session(PROMPT, 0))
    file = tmp_path / "page.html"
    file.write_text(render(view), encoding="utf-8")
    page = open_page(file.as_uri(), viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert view_of(page) == view
    bits = view["total"]["bits_per_byte"]
    assert figures(page)[0][:2] == [f"{bits['off']:.3f}", f"{bits['on']:.3f}"]
    assert page.locator("button:visible").all_inner_texts() == ["Save JSON"]
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("window.hacked") is None
    assert page.locator(".own .text").all_text_contents() == [
        "".join(token["text"] for token in view["tokens"][chunk["first"] : chunk["end"]]) for chunk in view["chunks"]
    ]
    assert page.evaluate(CONTRAST) >= 4.5


# The least contrast (WCAG 2) of text on its own background, over all classes of colour.
CONTRAST = """() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const names = [1, 2, 3, 4, 5].flatMap((step) => [`l${step}`, `l-${step}`, `r${step}`]);
  return Math.min(...names.map((name) => {
    const element = document.createElement("span");
    element.className = `token ${name}`;
    document.querySelector(".own .text").append(element);
    const style = getComputedStyle(element);
    const [one, other] = [luminance(style.color), luminance(style.backgroundColor)];
    element.remove();
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  }));
}"""
