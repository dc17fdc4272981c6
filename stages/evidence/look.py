"""Looks at a page in headless Chromium: on phone and desktop, light and dark; fails if something is wrong with it.

apt-get install chromium
python -m stages.evidence.look metrics/report.html --out pictures

Not part of pytest: it needs a browser. It checks that the page is no wider than the screen, that every picture has
loaded, that nothing was requested from elsewhere, and that Tab reaches every link and every table that scrolls.
"""

import argparse
import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

SIZES = {"phone": (360, 740), "desktop": (1280, 900)}
BROWSER = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)
TAB = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
MEASURE = """({
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  pictures: [...document.images].filter(image => !image.complete || !image.naturalWidth).length,
  focusable: document.querySelectorAll('a[href], [tabindex="0"]').length,
  back: getComputedStyle(document.body).backgroundColor})"""
NUMBER = "[...document.querySelectorAll('a[href], [tabindex=\"0\"]')].indexOf(document.activeElement)"


class Browser:
    """One page of a running Chromium, spoken to in its debugging protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.numbers = socket, count(1)
        self.requested: list[str] = []

    async def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = json.loads((await self.socket.receive()).data)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    async def value(self, expression: str) -> Any:
        answer = await self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return answer["result"]["value"]


async def look(page: Path, out: Path, socket: aiohttp.ClientWebSocketResponse) -> list[str]:
    """Takes the pictures; returns what is wrong."""
    browser, wrong = Browser(socket), []
    await browser.do("Page.enable")
    await browser.do("Network.enable")
    for size, (width, height) in SIZES.items():
        for colours in ("light", "dark"):
            where = f"{size}, {colours}"
            features = [{"name": "prefers-color-scheme", "value": colours}]
            await browser.do("Emulation.setEmulatedMedia", features=features)
            await browser.do(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=size == "phone",
            )
            await browser.do("Page.navigate", url=page.absolute().as_uri())
            await browser.value("new Promise(done => document.readyState == 'complete' ? done() : onload = done)")
            await asyncio.sleep(0.5)
            measured = await browser.value(MEASURE)
            if measured["wide"] > 0:
                wrong.append(f"{where}: {measured['wide']} pixels wider than the screen")
            if measured["pictures"]:
                wrong.append(f"{where}: {measured['pictures']} pictures did not load")
            reached = set()
            for _ in range(measured["focusable"] + 2):
                for kind in ("keyDown", "keyUp"):
                    await browser.do(
                        "Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9
                    )
                reached.add(await browser.value(NUMBER))
            if missed := set(range(measured["focusable"])) - reached:
                wrong.append(f"{where}: Tab does not reach {len(missed)} of {measured['focusable']} places")
            shot = await browser.do("Page.captureScreenshot", captureBeyondViewport=True)
            file = out / f"{page.stem}-{size}-{colours}.png"
            file.write_bytes(base64.b64decode(shot["data"]))
            print(f"{file}: background {measured['back']}, {measured['focusable']} places for Tab")
    if others := [url for url in browser.requested if not url.startswith(("file:", "data:"))]:
        wrong.append(f"it asks for {others[0]}")
    return wrong


async def start(page: Path, out: Path, chromium: str) -> list[str]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [chromium, *BROWSER, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL
        )
        try:
            ports = Path(profile) / "DevToolsActivePort"
            for _ in range(100):
                if ports.exists() and ports.read_text().strip():
                    break
                await asyncio.sleep(0.1)
            port = ports.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    pages = await answer.json()
                address = next(one["webSocketDebuggerUrl"] for one in pages if one["type"] == "page")
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    return await look(page, out, socket)
        finally:
            process.terminate()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", default=Path("metrics/report.html"))
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("chromium-browser"))
    asked = parser.parse_args()
    if not asked.chromium or not asked.page.exists():
        parser.error("needs a page that exists and Chromium: apt-get install chromium, or --chromium")
    asked.out.mkdir(parents=True, exist_ok=True)
    wrong = asyncio.run(start(asked.page, asked.out, asked.chromium))
    print("\n".join(wrong) or "nothing is wrong with it")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
