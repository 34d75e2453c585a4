"""The page in a real browser, against the real routes and an engine that is made up.

`tests/e2e/test_page.py` does the same with vLLM behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from vllm.v1.metrics import prometheus

from tests.browser import CHROMIUM, WHY_NOT, Page, new_page
from tests.telemetry.drafted import counting
from tests.telemetry.ranks import BEYOND, PROMISED, Engine, counted, rank
from vllm_toptheta.backend.counters import LayerCounters
from vllm_toptheta.telemetry import reader
from vllm_toptheta.telemetry.endpoint import StatsEndpoint

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT), pytest.mark.timeout(180)]

ASK = "document.dispatchEvent(new Event('visibilitychange'))"  # what the page does every two seconds anyway
IDLE = "document.querySelector('#state').dataset.state === 'idle'"
NOTHING_YET: list[dict[str, Any] | None] = [rank(LayerCounters(1, [0, 1], 2), LayerCounters(3, [0, 1], 2))]


def answers(steps: int = 1) -> list[dict[str, Any] | None]:
    """Of a model of four layers, 0 and 2 dense, after some steps with two sequences, one of them short."""
    layers = [
        counted(1, [0, 1], [[100, 100], [30, 10]], 0.25, num_short=1),
        counted(3, [0, 1], [[100, 100], [6, 4]], 0.05, num_short=1),
    ]
    for layer in layers:
        sums = layer.settled()
        for buffer in (sums.totals, sums.value_rows_read, sums.lost_mass, sums.lost_mass_histogram):
            buffer *= steps
    return [rank(*layers)]


@contextmanager
def serving(engine: Engine, port: int = 0, **args: Any) -> Iterator[int]:
    """A server with the plugin's routes on a port, which is yielded."""
    app, endpoint = FastAPI(), StatsEndpoint()
    endpoint.attach_router(app)
    asyncio.run(endpoint.init_state(engine, app.state, Namespace(**args)))
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = server.force_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with new_page() as page:
        yield page


@pytest.fixture
def page(browser: Page, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    """A tab that remembers nothing of other tests, on a page whose every question reaches the engine."""
    monkeypatch.setattr(reader, "MAX_AGE", 0.0)
    browser.complaints.clear()
    browser.prefer()
    browser.resize(1200, 1000)
    yield browser
    with contextlib.suppress(AssertionError):
        browser.evaluate("sessionStorage.clear()")
    browser.open("about:blank")


def cell(page: Page, map_id: str, layer: int, head: int) -> str:
    return str(page.evaluate(f"document.querySelector('#{map_id} {where(layer, head)}').ariaLabel"))


def where(layer: int, head: int) -> str:
    return f'[data-layer="{layer}"][data-head="{head}"]'


def test_what_it_shows(page: Page) -> None:
    with serving(Engine(answers())) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        assert page.evaluate("document.querySelectorAll('#rows-map [role=gridcell]').length") == 4 * 2
        assert page.evaluate("document.querySelectorAll('#lost-map .dense').length") == 2 * 2
        assert cell(page, "rows-map", 1, 0) == "layer 1, kv head 0, 65 % of value rows read, 1 sparse tokens"
        assert cell(page, "rows-map", 3, 1) == "layer 3, kv head 1, 52 % of value rows read, 1 sparse tokens"
        assert cell(page, "lost-map", 1, 1) == "layer 1, kv head 1, 25 % of the softmax lost, 1 sparse tokens"
        assert cell(page, "lost-map", 2, 0) == "layer 2, kv head 0, a dense layer, reads everything"
        assert page.text("#rows-share") == "56.3 %"  # 450 of 800
        assert page.text("#lost-mean") == "15 %"
        assert page.text("#dense-share") == "50 %"
        assert page.text("#bytes-note") == "44.8 kB since the start"  # 350 rows of 128 bytes each
        assert page.text("#in-force").startswith("thresholds ofacme/tinytargetk:128promisednothing")
        shares = page.evaluate("[...document.querySelectorAll('#spread .share')].map((share) => share.textContent)")
        assert shares == [""] * 5 + ["50 %", "", "50 %", "", ""]
        assert "hidden" in page.evaluate("document.querySelector('#notice').outerHTML")
    assert page.complaints == []


def test_keys_are_named_where_some_are_not_read(page: Page) -> None:
    layer = counted(1, [0, 1], [[30, 10]], 0.25, keys_read=[[50, 20]], copies_read=[[60, 20]])
    with serving(Engine([rank(layer, mode="shadow")])) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        assert page.text("#rows-note") == "of 200 cached, in sparse layers; of keys 35 %; copies of 40 %"
    layer = counted(1, [0, 1], [[30, 10]], 0.25, keys_read=[[50, 20]])
    with serving(Engine([rank(layer, mode="shadow", guard="off")])) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        assert page.text("#rows-share") == "20 %"
        assert page.text("#rows-note") == "of 200 cached, in sparse layers; of keys 35 %"
        assert page.text("#in-force").endswith("guardoffmodeshadow")
    assert page.complaints == []


def test_a_promise_is_shown_with_where_the_server_differs(page: Page) -> None:
    layer = counted(1, [0, 1], [[30, 10]], 0.25)
    with serving(Engine([rank(layer, promised=PROMISED)])) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        assert (
            "promisedperplexity within 0.5 %; measured otherwise: dtype bfloat16, measured with float32compensation"
        ) in page.text("#in-force")
    assert page.complaints == []


def test_that_tokens_are_drafts_is_shown(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    monkeypatch.setattr(prometheus, "get_prometheus_registry", lambda: registry)
    count = counting(registry, positions=6)
    with serving(Engine([rank(counted(1, [0, 1], [[30, 10]], 0.25), draft_tokens=6)])) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        assert "drafts6 tokens at a time, verified by dense attentioncompensation" in page.text("#in-force")
        count("0", [6, 6, 3])
        page.evaluate(ASK)
        page.wait_for("document.querySelector('#in-force').textContent.includes('attention: ')")
        assert "attention: 83.3 % accepted, 6.0 tokens a verificationcompensation" in page.text("#in-force")
    assert page.complaints == []


def test_what_is_lost_beyond_the_evidence_is_shown(page: Page) -> None:
    layer = counted(1, [0, 1], [[30, 10]], 0.25)
    engine = Engine([rank(layer, promised=PROMISED, beyond_evidence=BEYOND)])
    with serving(engine) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        words = "4.5 % of tokens lose more than 1 % did when measured"
        assert f"beyond the evidencealarm, above 3 %: {words}compensation" in page.text("#in-force")
        states = [{"layer": i, "max_lost_mass": i / 4, "share_above": 0, "alarms": 0, "lowered_by": 0} for i in (1, 2)]
        guarded = {"guarded": states}
        engine.answers = [rank(layer, **guarded, beyond_evidence={**BEYOND, "is_alarming": False, "layers": []})]
        page.evaluate(ASK)
        page.wait_for("document.querySelector('#in-force').textContent.includes('evidenceno window of tokens yet')")
        assert "guardrelax: every layer within its own boundmode" in page.text("#in-force")
    assert page.complaints == []


def test_colours_rise_with_the_value_and_the_legend_says_to_what(page: Page) -> None:
    with serving(Engine(answers())) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        script = "getComputedStyle(document.querySelector('#lost-map {}')).backgroundColor"
        page.evaluate("document.querySelector('#lost-map').style.transition = 'none'")
        high, low = (page.evaluate(script.format(where(layer, 0))) for layer in (1, 3))
        assert high != low
        assert page.evaluate("document.querySelector('#lost-map " + where(1, 0) + "').style.backgroundColor") != ""
        assert page.text("#lost-legend") == "0 %25 %dense layer: reads everything"
        assert page.text("#rows-legend").startswith("0 %80 %")


def test_before_the_first_token_it_says_what_to_do(page: Page) -> None:
    with serving(Engine(NOTHING_YET)) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        assert "No token has been decoded yet" in page.text("#notice")
        assert "dense up to 128 tokens" in page.text("#notice")
        assert (page.text("#rows-share"), page.text("#lost-mean")) == ("–", "–")
        assert cell(page, "rows-map", 1, 0) == "layer 1, kv head 0, no tokens yet"
    assert page.complaints == []


def test_rates_and_the_last_minute_come_from_differences(page: Page) -> None:
    engine = Engine(answers())
    with serving(engine) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        engine.answers = answers(steps=101)
        page.evaluate(ASK)
        page.wait_for("document.querySelector('#state').dataset.state === 'live'")
        rate = float(page.text("#tokens-rate").replace(",", ""))
        assert 10 < rate <= 200 / 0.01  # 200 tokens in the time between two questions
        assert page.text("#bytes-rate").split()[1] in ("kB", "MB", "GB")
        assert page.evaluate("document.querySelector('#trend polyline').getAttribute('points').split(' ').length") >= 1
        assert cell(page, "rows-map", 1, 0).endswith("101 sparse tokens")
        page.evaluate("document.querySelector('[value=minute]').click()")
        assert cell(page, "rows-map", 1, 0).endswith("100 sparse tokens")
        # a server that starts anew counts from zero: no rate is negative
        engine.answers = answers()
        page.evaluate(ASK)
        page.wait_for(IDLE)
        assert page.text("#tokens-rate") == "0"


def test_when_the_server_goes_and_comes_back(page: Page) -> None:
    engine = Engine(answers())
    with serving(engine) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
    page.evaluate(ASK)
    page.wait_for("document.querySelector('#state').dataset.state === 'gone'")
    assert "does not answer" in page.text("#notice")
    assert "The figures are those of" in page.text("#notice")
    assert page.text("#rows-share") == "56.3 %"
    assert page.evaluate("document.querySelector('#content').hasAttribute('data-stale')")
    with serving(engine, port):
        page.wait_for(IDLE)
        assert not page.evaluate("document.querySelector('#content').hasAttribute('data-stale')")


def test_another_backend_is_named(page: Page) -> None:
    with serving(Engine([None])) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for("document.querySelector('#notice').textContent.includes('--attention-backend toptheta')")


def test_it_asks_for_the_key_and_keeps_it_for_the_tab(page: Page) -> None:
    with serving(Engine(answers()), api_key=["secret"]) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for("!document.querySelector('#key-form').hidden")
        assert page.evaluate("document.activeElement.id") == "key"
        assert page.evaluate("document.querySelector('#content').hidden")
        submit = "document.querySelector('#key').value = '{}'; document.querySelector('#key-form button').click()"
        page.evaluate(submit.format("wrong"))
        page.wait_for("document.querySelector('#notice').textContent.includes('does not know this key')")
        page.evaluate(submit.format("secret"))
        page.wait_for(IDLE)
        assert page.evaluate("document.querySelector('#key-form').hidden")
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        assert page.evaluate("sessionStorage.length + localStorage.length") == 1
        assert "secret" not in page.evaluate("document.documentElement.outerHTML + document.cookie")


def test_the_keyboard_walks_through_a_map(page: Page) -> None:
    with serving(Engine(answers())) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        assert page.evaluate("document.querySelectorAll('#rows-map [tabindex=\"0\"]').length") == 1
        page.evaluate("document.querySelector('#rows-map [tabindex=\"0\"]').focus()")
        for key in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown"):
            page.press(key)
        assert page.evaluate("document.activeElement.ariaLabel").startswith("layer 1, kv head 1, 55 % of value rows")
        assert page.text("#tooltip").startswith("layer 1, kv head 1\n55 %")
        assert page.evaluate("document.querySelectorAll('#rows-map [tabindex=\"0\"]').length") == 1
        page.press("Escape")
        assert page.evaluate("document.querySelector('#tooltip').hidden")


def test_it_follows_the_readers_preferences(page: Page) -> None:
    with serving(Engine(answers())) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        colours = []
        for scheme in ("light", "dark"):
            page.prefer(prefers_color_scheme=scheme)
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert colours == ["rgb(245, 246, 248)", "rgb(18, 22, 28)"]
        duration = f"getComputedStyle(document.querySelector('#rows-map {where(1, 0)}')).transitionDuration"
        assert page.evaluate(duration) != "0s"
        page.prefer(prefers_reduced_motion="reduce")
        assert page.evaluate(duration) == "0s"


@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_the_window(page: Page, width: int) -> None:
    page.resize(width, 800)
    with serving(Engine(answers())) as port:
        page.open(f"http://127.0.0.1:{port}/toptheta")
        page.wait_for(IDLE)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
