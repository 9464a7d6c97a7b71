"""Size, memory and opening time of the page of `tracereward inspect`, by number and length of traces.

    python benchmarks/inspection.py [--traces 1000] [--tokens 16384] [--json FILE]

Generated scores: words of four letters, steps of 40 tokens, eight traces a question. Needs Chromium and chromedriver.
"opened" is the time from navigation to the first trace on the page, "complete" to the load event, "shown" from
the click on a long trace to its tokens. Writing is measured in a process of its own, peak memory without imports.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
from common import Result
from memory import reset_peak, resident

from tracereward.reports.inspection_page import write_inspection


def rows(traces: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Scored rows."""
    rng = random.Random(0)
    words = [f" {a}{b}{c}" for a in "abcdefgh" for b in "aeiou" for c in ("lo", "ne", "ri", "ta")]
    ends = [i % 40 == 39 for i in range(tokens)]
    offsets = [[4 * i, 4 * i + 4] for i in range(tokens)]
    for n in range(traces):
        texts = [words[int(rng.random() * len(words))] for _ in range(tokens)]
        found = [rng.gauss(0, 1) for _ in range(tokens)]
        yield {
            "prompt": f"Question {n // 8}",
            "completion": "".join(texts),
            "tokens": texts,
            "offsets": offsets,
            "token_rewards": found,
            "step_ends": ends,
            "reward": sum(found) / tokens,
            "correct": rng.random() < 0.5,
        }


def write(path: str, traces: int, tokens: int) -> None:
    """Write the page; print seconds and MiB."""
    reset_peak()
    before, began = resident("VmRSS"), time.perf_counter()
    write_inspection(path, rows(traces, tokens), "Traces")
    print(time.perf_counter() - began, resident("VmHWM") - before)


def opened(path: Path, screenshot: Path | None) -> dict[str, float]:
    """Seconds until the browser shows what it should."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.page_load_strategy = "none"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options)

    def until(script: str) -> None:
        WebDriverWait(driver, 600, poll_frequency=0.02).until(lambda _: driver.execute_script(script))

    try:
        driver.get("about:blank")
        began = time.perf_counter()
        driver.get(path.absolute().as_uri())
        until("return document.querySelectorAll('.trace').length")
        found = {"opened, s": time.perf_counter() - began}
        if driver.find_elements(By.CSS_SELECTOR, ".open"):
            clicked = time.perf_counter()
            driver.find_element(By.CSS_SELECTOR, ".open").click()
            until("return document.querySelectorAll('.t').length")
            found["shown, s"] = time.perf_counter() - clicked
        until("return document.readyState === 'complete'")
        found["complete, s"] = time.perf_counter() - began
        if screenshot is not None:
            driver.save_screenshot(str(screenshot))
        return found
    finally:
        driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with common.scratch() as scratch:
        path = Path(scratch) / "page.html"
        words = [sys.executable, __file__, "--write", str(path), str(args.traces), str(args.tokens)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        seconds, peak = map(float, done.stdout.split())
        row = {"traces": args.traces, "tokens": args.tokens, "MB": path.stat().st_size / 1e6}
        row |= {"written, s": seconds, "peak, MiB": peak, **opened(path, args.screenshot)}
    print(row)
    Result("inspection", {}, [row]).write(args.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
