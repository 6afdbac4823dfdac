"""The page at `/` as people use it: in Chromium, on a real server."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ServerProcess, serving
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
# It shall talk to the server under test and to nobody else.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHAT = "**/v1/chat/completions"
QUESTIONS = ["Remember this: The code of Harbour is 9034. What is the code of Harbour?", "Who are you?"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}; try: apt install chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


@contextmanager
def opened(browser: Browser, url: str, **context: Any) -> Iterator[Page]:
    """The page, which must complain of nothing but refused chats, and send nothing to anybody but its server."""
    complaints, foreign = list[str](), list[str]()

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.location["url"].endswith("/v1/chat/completions"):
            complaints.append(message.text)

    with browser.new_context(**context) as tab:
        page = tab.new_page()
        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith((url, "data:")) or foreign.append(request.url))
        page.goto(url)
        yield page
        assert (complaints, foreign) == ([], [])


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Iterator[Page]:
    with opened(browser, server.url) as page:
        page.get_by_label("Temperature").fill("0")
        yield page


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def ask(page: Page, question: str) -> None:
    page.get_by_label("Message").fill(question)
    page.keyboard.press("Enter")


def answer(page: Page) -> str:
    """The last answer, once it has ended."""
    page.get_by_role("button", name="Send").wait_for()
    return page.locator(".answer").last.text_content() or ""


def figures(page: Page) -> dict[str, str]:
    rows = page.locator(".figures").last.locator("div").all()
    return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows}


def number(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


def body(request: Request) -> dict[str, Any]:
    return json.loads(request.post_data or "{}")  # type: ignore[no-any-return]


def contents(request: Request) -> list[str]:
    return [message["content"] for message in body(request)["messages"]]


def endless(page: Page) -> None:
    """The model no longer ends its answers itself."""
    page.route(CHAT, lambda route: route.continue_(post_data=body(route.request) | {"ignore_eos": True}))


def served(*chunks: dict[str, Any], done: bool = True) -> str:
    """An event stream of a server that sends these."""
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n" * done


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def test_a_conversation_is_what_the_api_answers(page: Page, http: httpx.Client) -> None:
    messages = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        ask(page, question)
        text = answer(page)
        chat = http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0}).json()
        assert text == chat["choices"][0]["message"]["content"] != ""
        assert page.locator(".question").last.text_content() == question
        messages.append({"role": "assistant", "content": text})


def test_figures_of_an_answer(page: Page, http: httpx.Client) -> None:
    started = time.perf_counter()
    ask(page, QUESTIONS[1])
    answer(page)
    seconds = time.perf_counter() - started
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    usage = http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0}).json()["usage"]
    shown = figures(page)
    assert number(shown["prompt"]) == usage["prompt_tokens"]
    assert number(shown["answer"]) == usage["completion_tokens"]
    ttft, rest = number(shown["TTFT"]) / 1000, (usage["completion_tokens"] - 1) / number(shown["tokens/s"])
    assert 0 < ttft < ttft + rest < seconds


def test_an_answer_cut_at_max_tokens_says_so(page: Page) -> None:
    page.get_by_label("Max tokens").fill("3")
    ask(page, QUESTIONS[1])
    answer(page)
    assert figures(page)["answer"] == "3 tokens, the most allowed"


def test_the_panel_shows_the_server(page: Page, http: httpx.Client) -> None:
    endless(page)
    ask(page, QUESTIONS[1])
    panel = page.get_by_label("Server", exact=True)
    expect(panel.locator("#running")).to_have_text("1")
    info = http.get("/server_info").json()
    assert panel.locator("#model").inner_text() == info["model"] == "tiny"
    assert panel.locator("#format").inner_text() == info["kv"]["format"]
    assert number(panel.locator("#bits").inner_text()) == info["kv"]["bits_per_element"] == 4.5
    assert number(panel.locator("#context").inner_text()) == info["max_model_len"]
    assert number(panel.locator("#total").inner_text()) * 2**20 == pytest.approx(info["kv"]["total_bytes"], rel=0.01)
    assert number(panel.locator("#used").inner_text()) > 0
    assert number(panel.locator("#tails").inner_text()) > 0
    expect(panel.locator("path.tails")).to_have_attribute("d", re.compile("L60.00 "))
    page.get_by_role("button", name="Stop").click()
    expect(panel.locator("#running")).to_have_text("0")
    assert panel.locator("#used").inner_text() == "0 B"


def test_stop_frees_the_memory_and_keeps_what_has_come(page: Page, http: httpx.Client) -> None:
    endless(page)
    ask(page, QUESTIONS[1])
    page.locator(".figures div").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    deadline = time.perf_counter() + 1
    while (stats := http.get("/server_info").json()["stats"])["running"] + stats["used_blocks"] + stats["used_tails"]:
        assert time.perf_counter() < deadline, stats
    first = answer(page)
    assert first
    expect(page.get_by_text("Stopped.")).to_be_visible()
    assert number(figures(page)["answer"]) > 0
    page.unroute(CHAT)
    page.get_by_label("Max tokens").fill("8")
    with page.expect_request(CHAT) as sent:
        ask(page, "Go on.")
    assert contents(sent.value) == [QUESTIONS[1], first, "Go on."]
    assert answer(page)


def test_new_chat_forgets_and_stops(page: Page, http: httpx.Client) -> None:
    endless(page)
    ask(page, QUESTIONS[0])
    page.locator(".figures div").first.wait_for()
    page.get_by_role("button", name="New chat").click()
    page.unroute(CHAT)
    assert page.locator("article").count() == 0
    with page.expect_request(CHAT) as sent:
        ask(page, QUESTIONS[1])
    assert contents(sent.value) == [QUESTIONS[1]]
    assert answer(page)
    assert page.locator("article").count() == 1


def test_a_refused_message_can_be_sent_again(page: Page) -> None:
    page.get_by_label("Max tokens").fill("5000")
    ask(page, QUESTIONS[1])
    answer(page)
    expect(page.locator("article .error")).to_have_text(re.compile("max_tokens is 5000, but"))
    expect(page.get_by_label("Message")).to_have_value(QUESTIONS[1])
    page.get_by_label("Max tokens").fill("8")
    with page.expect_request(CHAT) as sent:
        page.get_by_role("button", name="Send").click()
    assert contents(sent.value) == [QUESTIONS[1]]
    assert answer(page)
    assert page.locator("article").count() == 1


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (
            {"status": 429, "headers": {"Retry-After": "3"}, "json": {"error": {"message": "the queue is full"}}},
            "the queue is full; try again in 3 s",
        ),
        ({"status": 401, "json": {"error": {"message": "no"}}}, "The API key is missing or wrong"),
        ({"status": 502, "body": "<h1>Bad gateway</h1>"}, "status 502"),
        ({"body": served(delta("Once"), {"error": {"message": "the engine ended"}}, done=False)}, "the engine ended"),
        ({"body": served(delta("Once"), done=False)}, "The connection ended before the answer did."),
        ({"body": served()}, "The model ended its answer before the first word."),
    ],
)
def test_errors_are_shown_in_words(page: Page, response: dict[str, Any], words: str) -> None:
    page.route(CHAT, lambda route: route.fulfill(**response))
    ask(page, QUESTIONS[1])
    assert answer(page) == ("Once" if "Once" in str(response) else "")
    expect(page.locator("article .error")).to_contain_text(words)


def test_markup_stays_text(page: Page) -> None:
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b> &amp; <a href='javascript:alert(3)'>"

    def hostile(route: Route) -> None:
        route.fulfill(body=served(delta(markup[:9]), delta(markup[9:]), {"error": {"message": markup}}))

    page.on("dialog", lambda dialog: pytest.fail(f"{dialog.message} ran"))
    page.route(CHAT, hostile)
    ask(page, markup)
    assert answer(page) == markup
    assert page.locator(".question").text_content() == markup
    assert page.locator("article .error").text_content() == markup
    assert page.locator("article :is(img, script, b, a)").count() == 0


def test_the_policy_stops_scripts_that_are_not_the_page_s(browser: Browser, server: ServerProcess) -> None:
    headers = httpx.get(server.url).headers
    assert headers["cache-control"] == "no-store"
    assert "unsafe" not in headers["content-security-policy"]
    with browser.new_context() as tab:
        page = tab.new_page()
        page.goto(server.url)
        page.evaluate(
            """() => {
                const script = document.createElement("script");
                script.textContent = "window.ran = true";
                document.body.append(script);
            }"""
        )
        assert page.evaluate("window.ran") is None


def test_shift_enter_breaks_the_line(page: Page) -> None:
    box = page.get_by_label("Message")
    box.fill("Who")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("are you?")
    assert box.input_value() == "Who\nare you?"
    page.keyboard.press("Enter")
    assert answer(page)
    assert page.locator(".question").text_content() == "Who\nare you?"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(browser: Browser, server: ServerProcess, scheme: Any) -> None:
    phone: Any = {"viewport": {"width": 320, "height": 600}, "color_scheme": scheme}
    with opened(browser, server.url, **phone) as page:
        page.get_by_label("Max tokens").fill("8")
        ask(page, "a" * 200)
        answer(page)
        page.get_by_role("button", name="Details").click()
        expect(page.locator("#format")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        for name in ("Message", "Temperature", "Max tokens"):
            expect(page.get_by_label(name)).to_be_in_viewport(ratio=1)
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor")
            == {
                "light": "rgb(253, 253, 251)",
                "dark": "rgb(21, 24, 26)",
            }[scheme]
        )


def test_with_an_api_key_until_the_server_dies(browser: Browser) -> None:
    with serving("--kv-cache-memory", "64MiB", "--api-key", "secret") as server, browser.new_context() as tab:
        page = tab.new_page()
        page.goto(server.url.replace("//", "//me:secret@"))
        endless(page)
        ask(page, QUESTIONS[1])
        page.locator(".figures div").first.wait_for()
        os.kill(server.engine, signal.SIGKILL)
        assert answer(page)
        expect(page.locator("article .error")).to_contain_text("the engine ended")
        server.end()
        expect(page.get_by_role("status")).to_contain_text("cannot be reached")
        ask(page, "Are you there?")
        expect(page.locator("article .error").last).to_contain_text("cannot be reached")
