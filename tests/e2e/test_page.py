"""The page /toptheta in a browser, while the server decodes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, WHY_NOT, new_page
from tests.e2e.server import Server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.nightly,
    pytest.mark.xdist_group("server"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT),
]


def test_it_shows_live_traffic(server: Server, text_ids: list[int], tmp_path: Path) -> None:
    def ask() -> None:
        server.post("/v1/completions", prompt=text_ids[:2500], max_tokens=150, temperature=0, ignore_eos=True)

    with new_page() as page:
        page.resize(1200, 1000)
        page.open(f"{server.url}/toptheta")
        page.wait_for("document.querySelector('#state').dataset.state === 'idle'")
        request = threading.Thread(target=ask)
        request.start()
        try:
            # the prompt comes first, which a slow machine reads for a minute
            page.wait_for("document.querySelector('#state').dataset.state === 'live'", seconds=300)
            assert float(page.text("#tokens-rate")) > 0
            assert float(page.text("#rows-share").removesuffix(" %")) < 50
        finally:
            request.join()
        shown = page.evaluate(
            "[...document.querySelectorAll('#lost-map [role=gridcell]')].map((cell) => cell.ariaLabel)"
        )
        assert len(shown) == 30 * 3
        assert sum("a dense layer" in label for label in shown) == 2 * 3
        assert sum("of the softmax lost" in label for label in shown) == 28 * 3
        assert "HuggingFaceTB/SmolLM2-135M-Instruct" in page.text("#in-force")
        assert page.complaints == []
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
