"""A real browser that tests open a page in: Chrome or Chromium without a window, and its driver."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

ARGUMENTS = """
--headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-quic
--disable-background-networking --disable-component-update --disable-sync
""".split()


class Browser:
    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def open(self, page: Path, width: int = 1100, scheme: str = "light") -> None:
        """Load a page in a window so many CSS pixels wide, on a screen that is light or dark."""
        wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
        self.driver.get(page.resolve().as_uri())

    def ask(self, expression: str) -> Any:
        """What a JavaScript expression gives, or a promise comes to."""
        return self.driver.execute_script(f"return {expression}")

    def picture(self) -> str:
        """The whole page as PNG, in base64."""
        height = self.ask("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.ask("innerWidth"), "height": height, "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip}
        return self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser until the tests are over."""
    # GitHub's machines name the driver's folder.
    folders = [os.environ.get("PATH", os.defpath), os.environ.get("CHROMEWEBDRIVER", "")]
    program = shutil.which("chromedriver", path=os.pathsep.join(folders))
    if not program:
        raise FileNotFoundError(
            "NOT RUN: no chromedriver: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    for argument in ARGUMENTS:
        options.add_argument(argument)
    driver = webdriver.Chrome(options, Service(program))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
