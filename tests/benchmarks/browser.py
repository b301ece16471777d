"""Chromium without a window, driven over its DevTools protocol; nothing it shows comes from beyond loopback."""

import base64
import json
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from websockets.sync.client import connect

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 60  # seconds
RESTS = 2.5  # seconds that a page gets to draw what it has loaded: graphs move into place
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--mute-audio", "--force-color-profile=srgb", "--remote-debugging-port=0"),
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


class Browser:
    """One page; use as a context manager.

    Attributes:
        outside: URLs beyond loopback that a page asked for; none was answered.
    """

    def __init__(self, profile: Path) -> None:
        self._profile, self._calls = profile, 0
        self.outside: list[str] = []

    def __enter__(self) -> "Browser":
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._page = connect(self._address(), max_size=None)
            for domain in ("Page", "Network", "Runtime"):
                self._call(f"{domain}.enable")
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._page.close()
        self._process.terminate()
        self._process.wait(PATIENCE)

    def open(self, url: str, words: str, *, width: int, height: int, scale: float = 1.0) -> None:
        """Go to a URL and wait until the page shows `words`; width and height in CSS pixels.

        Raises:
            AssertionError: if it does not, with what it shows.
        """
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)
        self._call("Page.navigate", url="about:blank")  # a change of the fragment alone would not load anything
        self._call("Page.navigate", url=url)
        deadline = time.monotonic() + PATIENCE
        while words not in (shown := self.run("document.body?.innerText ?? ''")):
            assert time.monotonic() < deadline, f"{url}: expected {words!r}, got {shown[:500]!r}"
            time.sleep(0.2)
        self._rest(RESTS)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def remember(self, url: str, values: dict[str, str]) -> None:
        """Put values into the local storage of a page's origin: what a person has dismissed before."""
        self.open(url, "", width=800, height=600)
        self.run(f"Object.assign(localStorage, {json.dumps(values)}) && null")

    def sign_in(self, url: str, user: str, password: str) -> None:
        """Give a server user and password, as a person does whom the browser asks for them; it sends them from then on.

        Args:
            url: of a page of the server.
            password: with no character that a URL gives a meaning.
        """
        scheme, _, rest = url.partition("://")
        self.open(f"{scheme}://{user}:{password}@{rest}", "", width=800, height=600)

    def click(self, selector: str, text: str = "") -> None:
        """Click the first element of a selector whose text, if one is given, is `text`; and let the page draw."""
        chosen = f"e => !{json.dumps(text)} || e.innerText.trim() === {json.dumps(text)}"
        self.run(f"[...document.querySelectorAll({json.dumps(selector)})].find({chosen}).click()")
        self._rest(RESTS)

    def picture(self, selector: str | None = None) -> bytes:
        """A PNG of what is in view, or of one element, also where that is longer than the view, once it rests."""
        clip = {}
        if selector:
            box = f"(r => [r.x + scrollX, r.y + scrollY, r.width, r.height])(document.querySelector({selector!r})"
            x, y, width, height = self.run(f"{box}.getBoundingClientRect())")
            clip = {"clip": {"x": x, "y": y, "width": width, "height": height, "scale": 1}}
        seen = ""
        for _ in range(10):  # a graph moves to its places
            answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=bool(selector), **clip)
            if answer["data"] == seen:
                break
            seen = answer["data"]
            self._rest(RESTS)
        return base64.b64decode(seen)

    def _address(self) -> str:
        file, deadline = self._profile / "DevToolsActivePort", time.monotonic() + PATIENCE
        while not file.exists() or len(file.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline and self._process.poll() is None, "chromium does not start"
            time.sleep(0.1)
        port = file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=PATIENCE) as answer:
            pages = json.load(answer)
        return str(next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        self._page.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._page.recv(PATIENCE))
            if message.get("id") == self._calls:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self._note(message)

    def _rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                self._note(json.loads(self._page.recv(left)))
            except TimeoutError:
                return

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            if urlsplit(url).scheme not in ("data", "blob", "about") and urlsplit(url).hostname != "127.0.0.1":
                self.outside.append(url)
